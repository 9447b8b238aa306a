from __future__ import annotations

import torch

from leakatlas.fl import stream, stream_seed


def test_the_same_keys_give_the_same_stream() -> None:
    first = torch.randn(5, generator=stream("client", 3, "noise"))
    assert torch.equal(first, torch.randn(5, generator=stream("client", 3, "noise")))


def test_different_keys_give_different_streams() -> None:
    keys = [(), ("a",), ("a", 0), ("a", "0"), (0, "a"), ("a|0",), ("a", None)]
    assert len({stream_seed(*k) for k in keys}) == len(keys)


def test_seeds_are_fixed_for_ever_and_fit_torch() -> None:
    # Written down once: if this changes, every stored recipe describes another run.
    assert stream_seed("dlg", "run", 0) == 7_034_243_352_098_409_468
    assert all(0 <= stream_seed(i) < 2**63 for i in range(100))


def test_making_a_stream_leaves_the_global_generator_alone() -> None:
    before = torch.get_rng_state()
    torch.randn(3, generator=stream("x"))
    assert torch.equal(before, torch.get_rng_state())
