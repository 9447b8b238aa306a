from __future__ import annotations

import pytest
import torch

from leakatlas import devices
from leakatlas.errors import InvalidInput, UnknownName


def test_the_cpu_is_always_there_and_auto_takes_a_gpu_if_there_is_one() -> None:
    assert devices.existing()[0] == "cpu"
    assert devices.chosen("cpu") == devices.CPU == devices.chosen(torch.device("cpu"))
    there = "cuda" if torch.cuda.is_available() else "cpu"
    assert devices.chosen("auto").type == there
    assert devices.in_words(devices.CPU) == "cpu"


@pytest.mark.parametrize("name", ["gpu", "cuda:x", "cpu:1", "cuda:-1", "", "mps:0", "CUDA"])
def test_an_unknown_name_is_answered_with_those_that_exist(name: str) -> None:
    with pytest.raises(UnknownName, match=r"Unknown device .*Known: auto, cpu, cuda"):
        devices.chosen(name)


def test_a_device_that_this_machine_lacks_is_refused_with_what_it_has() -> None:
    with pytest.raises(InvalidInput, match=r"no device 'cuda:99' on this machine; it has: cpu"):
        devices.chosen("cuda:99")


def test_on_a_gpu_float32_is_float32(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    held = torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32
    held_too = torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    try:
        assert str(devices.chosen("auto")) == str(devices.chosen("cuda")) == "cuda:0"
        assert str(devices.chosen("cuda:1")) == "cuda:1"
        assert not torch.backends.cudnn.allow_tf32
        assert not torch.backends.cuda.matmul.allow_tf32
        assert torch.backends.cudnn.deterministic
    finally:
        torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32 = held
        torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic = held_too
