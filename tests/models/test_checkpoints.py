import json
import pickle
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from leakatlas import limits, tensorfiles
from leakatlas.data import Box, parquet, photos
from leakatlas.errors import InvalidInput, UnknownName
from leakatlas.models import (
    Generator,
    apply_state,
    build,
    card,
    checkpoints,
    load_state,
    load_weights,
    pretrained,
    shipped,
)
from leakatlas.models.structure import batchnorm_layers

CIFAR10_TEST = Path(__file__).parents[2].parent / "shared" / "data" / "cifar10" / "test.parquet"


@pytest.fixture
def state() -> dict[str, Tensor]:
    return build("convnet-bn", width=2).state_dict()


@pytest.fixture
def copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The shipped weights in a folder that a test may damage."""
    folder = tmp_path / "weights"
    shutil.copytree(checkpoints.WEIGHTS, folder)
    monkeypatch.setattr(checkpoints, "WEIGHTS", folder)
    return folder


@pytest.mark.parametrize("name", shipped())
def test_shipped_weights_fit_their_card(name: str) -> None:
    about = card(name)
    assert about.name == name
    assert about.recipe.startswith(("python scripts/train_", "leakatlas prior train "))
    assert about.figures
    assert all(text for text in (about.data, about.split))
    weights = load_weights(name)
    assert all(value.dtype in (torch.float32, torch.int64) for value in weights.values())
    model = pretrained(name)
    assert not model.training
    assert all(torch.equal(weights[key], value) for key, value in model.state_dict().items())


def test_what_is_shipped_and_how_large() -> None:
    assert {"convnet-bn-cifar10", "convnet-cifar10", "generator-cifar10"} <= set(shipped())
    total = sum(path.stat().st_size for path in checkpoints.WEIGHTS.iterdir())
    assert total < 12 * 2**20


def test_trained_statistics_are_those_of_images() -> None:
    """Photos in the model's box are closer to the running statistics than noise is."""
    model = pretrained("convnet-bn-cifar10")
    settings = card("convnet-bn-cifar10").box
    assert settings is not None
    box = Box.from_json(settings)
    distances = []
    real = photos(32, part="all").images
    noise = torch.rand(real.shape, generator=torch.Generator().manual_seed(0))
    for images in (real, noise):
        terms: list[Tensor] = []

        def record(
            layer: nn.Module, inputs: tuple[Tensor], output: Tensor, terms: list[Tensor] = terms
        ) -> None:
            mean = inputs[0].mean((0, 2, 3))
            terms.append((mean - layer.get_buffer("running_mean")).square().sum())

        handles = [
            layer.register_forward_hook(record) for layer in batchnorm_layers(model).values()
        ]
        with torch.no_grad():
            model(box.normalize(images))
        for handle in handles:
            handle.remove()
        distances.append(float(torch.stack(terms).sum()))
    assert distances[0] < 0.5 * distances[1]


def test_generator_prior_explains_photos_better_than_their_mean_colour() -> None:
    generator = pretrained("generator-cifar10")
    assert isinstance(generator, Generator)
    x = photos(32).images[:4]
    flat = (x - x.mean((2, 3), keepdim=True)).square().mean()
    z = torch.zeros(len(x), generator.latent, requires_grad=True)
    optimizer = torch.optim.Adam([z], lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        torch.autograd.backward((generator(z) - x).square().mean((1, 2, 3)).sum())
        optimizer.step()
    found = (generator(z.detach()).detach() - x).square().mean()
    assert float(found) < 0.4 * float(flat)


@pytest.mark.parametrize("path", [path for path in [CIFAR10_TEST] if path.is_file()])
@pytest.mark.parametrize("name", ["convnet-bn-cifar10", "convnet-cifar10"])
def test_accuracy_on_the_card_holds_on_test_images(name: str, path: Path) -> None:
    about = card(name)
    assert about.box is not None
    images = parquet(path, limit=500)
    with torch.no_grad():
        logits = pretrained(name)(Box.from_json(about.box).normalize(images.images))
    accuracy = float((logits.argmax(1) == images.labels).float().mean())
    # Four standard deviations of a proportion over 500 images.
    assert accuracy == pytest.approx(about.figures["held_out_accuracy"], abs=0.08)


def test_unknown_weights_are_refused() -> None:
    with pytest.raises(UnknownName, match="generator-cifar10"):
        load_weights("generator-cifar")


def test_altered_weights_are_refused(copied: Path) -> None:
    path = copied / "generator-cifar10.safetensors"
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(bytes(content))
    with pytest.raises(InvalidInput, match="SHA-256"):
        load_weights("generator-cifar10")
    with pytest.raises(InvalidInput, match="SHA-256"):
        pretrained("generator-cifar10")


@pytest.mark.parametrize("text", ["", "{", "[]", '{"name": "x"}'])
def test_damaged_cards_are_refused(copied: Path, text: str) -> None:
    (copied / "generator-cifar10.json").write_text(text)
    with pytest.raises(InvalidInput, match="card"):
        card("generator-cifar10")


@pytest.mark.parametrize("half", [False, True])
def test_save_weights_writes_what_load_weights_reads(copied: Path, half: bool) -> None:
    model = build("convnet-bn", width=2, seed=5)
    about = checkpoints.Card(
        name="small",
        model="convnet-bn",
        settings={"width": 2},
        box=None,
        data="none",
        split="none",
        recipe="none",
        seed=5,
        epochs=0,
        figures={},
        date="2026-11-22",
        license="Apache-2.0",
        sha256="",
    )
    written = checkpoints.save_weights(model, about, copied, half=half)
    assert card("small") == written
    assert json.loads((copied / "small.json").read_text())["sha256"] == written.sha256
    again = pretrained("small")
    for key, value in model.state_dict().items():
        expected = value.half().float() if half and value.is_floating_point() else value
        assert torch.equal(again.state_dict()[key], expected)


@pytest.mark.parametrize("suffix", [".safetensors", ".bin"])
def test_safetensors_are_known_by_content(
    tmp_path: Path, state: dict[str, Tensor], suffix: str
) -> None:
    path = tmp_path / f"model{suffix}"
    safetensors.torch.save_file(state, path)
    read = load_state(path)
    assert all(torch.equal(state[key], read[key]) for key in state)


@pytest.mark.parametrize("wrapper", [None, "state_dict", "model_state_dict", "model"])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files_are_read(
    tmp_path: Path, state: dict[str, Tensor], wrapper: str | None, zipped: bool
) -> None:
    path = tmp_path / "model.pt"
    content: Any = state if wrapper is None else {wrapper: state, "epoch": 3}
    torch.save(content, path, _use_new_zipfile_serialization=zipped)
    read = load_state(path)
    assert all(torch.equal(state[key], read[key]) for key in state)
    model = build("convnet-bn", width=2, seed=9)
    apply_state(model, read, source="file")
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


class Payload:
    """Writes a file when unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.write_text, (self.target, "owned")


def test_a_pickle_with_code_is_refused_and_not_run(tmp_path: Path) -> None:
    owned = tmp_path / "owned"
    plain, zipped = tmp_path / "plain.pkl", tmp_path / "zipped.pt"
    plain.write_bytes(pickle.dumps({"w": Payload(owned)}))
    torch.save({"w": Payload(owned)}, zipped)
    for path in (plain, zipped):
        with pytest.raises(InvalidInput, match="never loaded"):
            load_state(path)
    assert not owned.exists()
    pickle.loads(plain.read_bytes())
    assert owned.exists()  # the payload is real: an unguarded reader runs it


def test_whole_models_and_other_contents_are_refused(
    tmp_path: Path, state: dict[str, Tensor]
) -> None:
    path = tmp_path / "x.pt"
    torch.save(build("lenet"), path)
    with pytest.raises(InvalidInput, match=r"state_dict\(\)"):
        load_state(path)
    some: list[tuple[Any, str]] = [
        (torch.zeros(2), "found a Tensor"),
        ({}, "no tensor"),
        ({"a": 3}, "'a' is a int"),
        ({0: torch.zeros(1)}, "one is named 0"),
        ({"a": torch.eye(2).to_sparse()}, "sparse"),
        ({"a": torch.tensor([1.0, float("nan"), float("inf")])}, "a holds 2 values"),
    ]
    for content, word in some:
        torch.save(content, path)
        with pytest.raises(InvalidInput, match=word):
            load_state(path)


@pytest.mark.parametrize("kind", ["safetensors", "zip", "legacy"])
def test_truncated_and_damaged_files_are_refused(
    tmp_path: Path, state: dict[str, Tensor], kind: str
) -> None:
    path = tmp_path / ("model.safetensors" if kind == "safetensors" else "model.pt")
    if kind == "safetensors":
        safetensors.torch.save_file(state, path)
    else:
        torch.save(state, path, _use_new_zipfile_serialization=kind == "zip")
    whole = path.read_bytes()
    for length in (0, 1, 7, 8, 9, 40, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(InvalidInput, match=path.name):
            load_state(path)
    generator = torch.Generator().manual_seed(0)
    for _ in range(40):  # damage may hit the numbers alone; it must never escape as another error
        damaged = bytearray(whole)
        for place in torch.randint(min(len(whole), 2_000), (4,), generator=generator).tolist():
            damaged[place] ^= 0xFF
        path.write_bytes(bytes(damaged))
        try:
            load_state(path)
        except InvalidInput as problem:
            assert path.name in str(problem)


def test_foreign_files_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="does not exist"):
        load_state(tmp_path / "absent.pt")
    for name in ("a.txt", "a.pt", "a.safetensors"):
        (tmp_path / name).write_text("these are no weights at all")
        with pytest.raises(InvalidInput, match=name):
            load_state(tmp_path / name)
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("hello.txt", "hello")
    with pytest.raises(InvalidInput, match=r"b\.pt"):
        load_state(tmp_path / "b.pt")


def test_state_that_does_not_fit_changes_nothing(state: dict[str, Tensor]) -> None:
    model = build("convnet-bn", width=2, seed=9)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    nan = {**state, "fc.bias": torch.full((10,), float("nan"))}
    wide = {**state, "fc.bias": torch.zeros(11)}
    short = {key: value for key, value in state.items() if key != "fc.bias"}
    for bad, word in (
        (nan, "fc.bias holds 10 values that are not finite"),
        (wide, r"fc.bias has shape \(11,\).*expects \(10,\)"),
        (short, "missing fc.bias"),
        ({**state, "extra": torch.zeros(1)}, "not in the model: extra"),
    ):
        with pytest.raises(InvalidInput, match=word):
            apply_state(model, bad, source="user.pt")
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())


def exotic() -> dict[str, tuple[Any, str]]:
    return {
        "stride 0": (torch.zeros(1).expand(10**12), "stores only 4 bytes"),
        "meta": (torch.zeros(3, device="meta"), "meta tensor"),
        "sparse": (torch.eye(3).to_sparse(), "sparse or quantised"),
        "complex": (torch.zeros(3, dtype=torch.complex64), "complex64; expected floats"),
        "bits": (torch.zeros(3, dtype=torch.uint8).view(torch.bits8), "bits8; expected floats"),
    }


@pytest.mark.parametrize("name", sorted(exotic()))
def test_tensors_without_plain_values_are_refused(name: str, tmp_path: Path) -> None:
    value, words = exotic()[name]
    torch.save({"w": value}, tmp_path / "x.pt")
    with pytest.raises(InvalidInput, match=words):
        load_state(tmp_path / "x.pt")


@pytest.mark.parametrize("dtype", tensorfiles.DTYPES)
def test_tensors_of_every_listed_type_are_read(dtype: torch.dtype, tmp_path: Path) -> None:
    value = torch.ones(3).to(dtype)
    torch.save({"w": value}, tmp_path / "x.pt")
    read = load_state(tmp_path / "x.pt")["w"]
    assert read.dtype == dtype and read.float().equal(torch.ones(3))
    if dtype.is_floating_point:
        torch.save({"w": torch.full((3,), torch.nan).to(dtype)}, tmp_path / "x.pt")
        with pytest.raises(InvalidInput, match="3 values that are not finite"):
            load_state(tmp_path / "x.pt")


def test_a_compressed_archive_is_refused(tmp_path: Path) -> None:
    torch.save({"w": torch.zeros(100_000)}, tmp_path / "x.pt")
    with zipfile.ZipFile(tmp_path / "x.pt") as stored:
        with zipfile.ZipFile(tmp_path / "y.pt", "w", zipfile.ZIP_DEFLATED) as bomb:
            for entry in stored.namelist():
                bomb.writestr(entry, stored.read(entry))
    with pytest.raises(InvalidInput, match="compressed archive"):
        load_state(tmp_path / "y.pt")


def test_a_file_beyond_the_memory_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.save({"w": torch.zeros(1000)}, tmp_path / "x.pt")
    monkeypatch.setattr(limits, "memory", lambda: 4000)
    with pytest.raises(InvalidInput, match="this machine's memory has 4 kB"):
        load_state(tmp_path / "x.pt")
