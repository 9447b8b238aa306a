"""Every way in: what a person may hand to LeakAtlas, and valid examples to start from."""

from __future__ import annotations

import functools
import io
import json
import pickle
import tempfile
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import torch
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from torch import Tensor
from typer.testing import CliRunner

from leakatlas import data, lint, models
from leakatlas.audit.config import captured_update, make_plan, read_config
from leakatlas.audit.plan import presets
from leakatlas.bench import study
from leakatlas.catalogue import citations, loader, results
from leakatlas.cli import app
from leakatlas.data import image_folder, parquet
from leakatlas.fl import FedAVG, FedSGD, ModelRef, Scenario, Tampering, Update, View, stage
from leakatlas.fl.edits import Imprint, SplitImprint
from leakatlas.fl.tampering import TamperedModel
from leakatlas.report import load_report, parse_gate
from leakatlas.threat import Grant
from tests.conftest import build_stage, surrogate
from tests.doors import hostile
from tests.doors.hostile import as_json, damaged, tampered

Files = Mapping[str, bytes]


@dataclass(frozen=True)
class Door:
    """One way in.

    Args:
        files: What may be found there.
        open: What a user calls on it.
        share: Of the inputs of a campaign, relative to the others.
        examples: In the gate.
    """

    files: st.SearchStrategy[Files]
    open: Callable[[Path], object]
    share: float = 1.0
    examples: int = 200


DOORS: dict[str, Door] = {}


def door(
    files: st.SearchStrategy[Files], *, share: float = 1.0, examples: int = 200
) -> Callable[[Callable[[Path], object]], Callable[[Path], object]]:
    """Register what follows under its name."""

    def register(function: Callable[[Path], object]) -> Callable[[Path], object]:
        DOORS[function.__name__] = Door(files, function, share, examples)
        return function

    return register


def one(name: str, content: st.SearchStrategy[bytes]) -> st.SearchStrategy[Files]:
    """One file."""
    return content.map(lambda held: {name: held})


# -- configurations ------------------------------------------------------------------------------

MODEL = {"builtin": "fc", "kwargs": {"in_channels": 3, "size": 8, "classes": 8, "widths": [4]}}
CONFIGURATIONS: tuple[Any, ...] = (
    {
        "model": MODEL,
        "data": {"victims": "photos:8", "limit": 2, "surrogate": "patches:8:8:surrogate",
                 "mean": [0.5, 0.5, 0.5], "std": [0.2, 0.2, 0.2]},
        "protocol": {"algorithm": "fedavg", "epochs": 2, "batch_size": 2, "lr": 0.01},
        "clients": 2, "targets": [0, 1], "vantage": "server", "grants": ["labels"],
        "defenses": [{"key": "clipping", "max_norm": 1.0}],
        "alternatives": {"pruned": [{"key": "gradient_pruning", "rate": 0.9}]},
        "threat": "A-C", "attacks": ["inverting_gradients", "dlg"],
        "attack_parameters": {"inverting_gradients": {"steps": 3, "restarts": 2}},
        "budget": "10s", "seed": 0, "execution": "eager", "fail_on": ["P(psnr > 20 dB) > 0.05"],
    },
    {"model": {"builtin": "lenet", "kwargs": {"size": 8, "classes": 8}, "weights": "w.pt"},
     "data": {"victims": "folder:pictures@8"}, "captured": "update.safetensors"},
    {"model": {"python": "net.py:make", "kwargs": {"width": 4}}, "data": {"victims": "digits:8"}},
)  # fmt: skip

SNIPPETS = (
    "[" * 3000, "{a: " * 500, "a: &a [*a]", "a: &a {b: *a}", "!!python/object/apply:os.mkdir [x]",
    "!!python/name:os.system", "x: !!int abc", "seed: 2001-99-99", "? [a]\n: b", "a: *b", "- \t-",
    "--- a\n--- b", "%TAG ! tag:x,2000:\n--- !x y", "a: |\n x", "a: !!set {b}", "key: !!null x",
    "&a a: &b b", "<<: [{a: 1}]", "a: " + "9" * 5000, "\ufeffa: 1", "a: !!float 1__0", "@", "`",
    "a: &x [1,1,1,1,1,1,1,1,1,1]\n" + "".join(f"b{i}: &y{i} [{','.join(['*x' if i == 0 else f'*y{i-1}'] * 10)}]\n" for i in range(9)),
)  # fmt: skip


def _yaml(documents: tuple[Any, ...]) -> st.SearchStrategy[bytes]:
    """JSON is YAML; text that is neither comes from snippets and damage."""
    whole = tuple(json.dumps(d, indent=1).encode() for d in documents)
    joined = st.builds(
        lambda head, tail: head + b"\n" + tail.encode("utf-8", "replace"),
        st.sampled_from((b"", b"model: {builtin: fc}", b"seed: 1")),
        st.one_of(st.sampled_from(SNIPPETS), st.text(max_size=30)),
    )
    return st.one_of(tampered(documents).map(as_json), damaged(whole), joined)


NET = (
    b"from torch import nn\n"
    b"def make(width):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, 10))\n"
)


@door(
    _yaml(CONFIGURATIONS).map(lambda text: {"audit.yaml": text, "net.py": NET}),
    share=3.0,
)
def configuration(folder: Path) -> object:
    """``leakatlas audit audit.yaml``, up to the first gradient."""
    config = read_config(folder / "audit.yaml")
    if config.model.python not in (None, "net.py:make"):
        return None  # code that the person named is run, whatever it is
    for condition in config.fail_on:
        parse_gate(condition)
    plan = make_plan(config, base=folder, command="")
    captured_update(config, base=folder)
    for setting in plan.settings:
        presets(setting.attacks, plan.attack_parameters, published=False)
        setting.stage(letter=plan.letters[0], seed=plan.seed)
    return plan


def _run(*arguments: str) -> int:
    """A command, in this process.

    Raises:
        AssertionError: If it ended as a defect of ours.
    """
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code in (0, 1, 2, 3), (done.exit_code, done.output[-300:], done.exception)
    return done.exit_code


@door(
    tampered(
        tuple({**CONFIGURATIONS[0], "attacks": ["inverting_gradients"], **change}
              for change in ({}, {"protocol": {"algorithm": "fedsgd"}}, {"defenses": []}))
    ).map(lambda document: {"audit.yaml": as_json(document)}),
    share=0.02, examples=6,
)  # fmt: skip
def doctor(folder: Path) -> object:
    """``leakatlas doctor audit.yaml``, as typed."""
    return _run("doctor", str(folder / "audit.yaml"))


STUDIES: tuple[Any, ...] = (
    {
        "schema": "leakatlas/study/1", "title": "A study", "question": "Does it leak?", "chosen": "nothing",
        "setup": {"model": {"builtin": "fc", "kwargs": {"size": 8}}, "victims": "photos:8",
                  "protocol": {"algorithm": "fedsgd"}, "batch": 1, "letter": "C",
                  "attack": {"key": "dlg", "parameters": {"steps": 3}}},
        "axes": {"batch": [1, 2], "defense": {"none": {"defenses": []}}},
    },
)  # fmt: skip


@door(one("s/study.yaml", _yaml(STUDIES)))
def study_file(folder: Path) -> object:
    """``leakatlas bench study.yaml``, up to its cases."""
    return study.load(folder / "s" / "study.yaml")


# -- what travels in a round ---------------------------------------------------------------------


def _safetensors(
    valid: Callable[[Path], object], metadata: str | None
) -> st.SearchStrategy[bytes]:
    """Damaged bytes, exotic tensors, and a description that is tampered with."""
    with tempfile.TemporaryDirectory() as folder:
        valid(Path(folder))
        content = next(Path(folder).glob("*.safetensors")).read_bytes()
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    body = content[8 + length :]

    def joined(changed: Any, text: Any = None) -> bytes:
        if isinstance(changed, dict) and text is not None and metadata is not None:
            held = text if isinstance(text, str) else as_json(text).decode("utf-8", "replace")
            changed = {**changed, "__metadata__": {metadata: held}}
        new = as_json(changed)
        return len(new).to_bytes(8, "little") + new + body

    ways = [damaged((content,)), tampered((header,)).map(joined)]
    if metadata is not None:
        described = json.loads(header["__metadata__"][metadata])
        ways.append(tampered((described,)).map(lambda text: joined(header, text)))
        deep = st.sampled_from(("[" * 100_000, '{"a":' * 50_000, "1" * 10_000, "", "null", "[]"))
        ways.append(deep.map(lambda text: joined(header, text)))
    return st.one_of(*ways)


@functools.cache
def _views() -> tuple[View, ...]:
    made = []
    for protocol, letter in ((FedSGD(), "C"), (FedAVG(batch_size=2, shuffle=True), "H")):
        scene = build_stage(
            protocol=protocol, letter=letter, grants=frozenset(Grant), public=surrogate(),
            settings={"widths": (3,)}, dtype=torch.float32,
        )  # fmt: skip
        made.append(scene.view([scene.federation.play_round()]))
    return tuple(made)


def _update() -> Update:
    return _views()[0].update


@door(
    one("update.safetensors", _safetensors(lambda f: _update().save(f / "u.safetensors"),
                                           "leakatlas.update")),
    share=2.0,
)  # fmt: skip
def update(folder: Path) -> object:
    """A captured update."""
    found = Update.load(folder / "update.safetensors")
    return found.check_fits(dict(_views()[0].model.named_parameters()))


def _view_files() -> st.SearchStrategy[Files]:
    ways = []
    for view in _views():
        with tempfile.TemporaryDirectory() as folder:
            view.save(folder)
            text = (Path(folder) / "view.json").read_bytes()
            tensors = (Path(folder) / "view.safetensors").read_bytes()
        description = json.loads(text)
        code = {"kind": "python", "name": "os:mkdir", "kwargs": {"path": hostile.CANARY}}
        inside = _safetensors(lambda f, v=view: v.save(f), None)  # type: ignore[misc]
        ways += [
            tampered((description, {**description, "model": code})).map(
                lambda d, t=tensors: {"view.json": as_json(d), "view.safetensors": t}
            ),
            damaged((text,)).map(lambda d, t=tensors: {"view.json": d, "view.safetensors": t}),
            inside.map(lambda t, d=text: {"view.json": d, "view.safetensors": t}),
        ]
    return st.one_of(*ways)


@door(_view_files(), share=3.0)
def view(folder: Path) -> object:
    """A saved view."""
    found = View.load(folder)
    return found.model if found.has("rounds") else found


def _tampering() -> Tampering:
    imprint = Imprint(w=torch.ones(192), edges=torch.arange(4.0))
    split = SplitImprint(
        w=torch.ones(192), edges=torch.arange(4.0), shape=(3, 8, 8), clients=2, group=0, kappa=1.0
    )
    models_sent = {
        0: TamperedModel(weights={"fc.bias": torch.zeros(10)}, edits=(imprint,)),
        1: TamperedModel(edits=(split,)),
    }
    return Tampering(sent=models_sent, key={"k": torch.ones(2)})


@door(one("t.safetensors", _safetensors(lambda f: _tampering().save(f / "t.safetensors"),
                                        "leakatlas.tampering")))  # fmt: skip
def tampering(folder: Path) -> object:
    """What a malicious server sends, built as its client would."""
    found = Tampering.load(folder / "t.safetensors")
    agreed = models.build("fc", size=8, widths=[3])
    sent = found.sent if isinstance(found.sent, Mapping) else {0: found.sent}
    return [model.build(agreed, pixels=192) for model in sent.values()]


SCENARIO = Scenario(
    model=ModelRef("builtin", "fc", {"size": 8, "widths": [4]}), data="photos:8",
    surrogate="patches:8:8:surrogate", letter="D", protocol=FedAVG(), grants=frozenset(Grant),
).to_json()  # fmt: skip
CODE = {**SCENARIO, "model": {"kind": "python", "name": "os:mkdir", "kwargs": {"path": hostile.CANARY}}}


@door(one("scenario.json", tampered((SCENARIO, CODE)).map(as_json)))
def scenario(folder: Path) -> object:
    """A described scenario, brought to life."""
    values = json.loads((folder / "scenario.json").read_text("utf-8", "surrogatepass"))
    return stage(Scenario.from_json(values))


# -- models --------------------------------------------------------------------------------------


class _Payload:
    def __reduce__(self) -> tuple[Any, ...]:
        import os

        return os.mkdir, (hostile.CANARY,)


def _saved(value: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return buffer.getvalue()


@functools.cache
def _states() -> tuple[dict[str, Tensor], ...]:
    small = models.build("fc", size=8, widths=[3]).state_dict()
    return (small, models.build("lenet", size=8, width=2).state_dict())


def _weights() -> tuple[bytes, ...]:
    small, lenet = _states()
    exotic: list[Any] = [
        {"w": torch.zeros(1).expand(10**12)}, {"w": torch.zeros(3, device="meta")},
        {"w": torch.eye(3).to_sparse()}, {"w": torch.zeros(3, dtype=torch.complex64)},
        {"w": torch.zeros(3, dtype=torch.uint8).view(torch.bits8)}, {"w": torch.tensor(0.0)},
        {n: t.to(torch.int8) for n, t in small.items()}, {"state_dict": small},
        {n: t.to(torch.float8_e4m3fn) for n, t in small.items()}, {"model": {"model": small}},
        {n: t.to(torch.bfloat16) for n, t in small.items()}, {"w": torch.zeros(0, 5)},
        [small["fc.weight"]], {1: small["fc.weight"]}, small["fc.weight"], {"a\x1b[2J": 3},
    ]  # fmt: skip
    bomb = io.BytesIO()
    with zipfile.ZipFile(bomb, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}." + bytes(10**6))
    return (
        *map(_saved, (small, lenet, *exotic)), save(small), save(lenet), bomb.getvalue(),
        pickle.dumps({"w": _Payload()}), pickle.dumps({"w": _Payload()}, protocol=0),
    )  # fmt: skip


def _any_weights() -> st.SearchStrategy[bytes]:
    valid = _weights()
    return st.one_of(
        damaged(valid), st.sampled_from(valid),
        _safetensors(lambda f: (f / "m.safetensors").write_bytes(save(_states()[0])), None),
    )  # fmt: skip


@door(one("w.pt", _any_weights()), share=2.0)
def weights(folder: Path) -> object:
    """Weights of a stranger."""
    return models.load_state(folder / "w.pt")


@st.composite
def _live(draw: st.DrawFn) -> bytes:
    """States whose values no file check refuses."""
    state = {n: t.clone() for n, t in draw(st.sampled_from(_states())).items()}
    for _ in range(draw(st.integers(0, 3))):
        name = draw(st.sampled_from(sorted(state)))
        tensor = state[name]
        dtype = draw(st.sampled_from((
            torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool,
            torch.float8_e4m3fn, torch.float8_e5m2, torch.int64,
        )))  # fmt: skip
        match draw(st.sampled_from(("scale", "dtype", "zero", "shape", "lose", "rename"))):
            case "scale":
                state[name] = tensor.double() * draw(st.sampled_from((1e-300, 1e-30, 1e30, 1e300)))
            case "dtype":
                state[name] = tensor.to(dtype)
            case "zero":
                state[name] = torch.zeros_like(tensor)
            case "shape":
                state[name] = tensor.reshape(-1)[: draw(st.integers(0, 5))]
            case "lose" if len(state) > 1:
                del state[name]
            case "rename":
                state[draw(st.sampled_from(("", "[/x]", "a.b.c", "\x1b[2J", name + "_orig")))] = (
                    state.pop(name)
                )
    return _saved(state)


@door(one("w.pt", st.one_of(_live(), _live(), _any_weights())), share=2.0, examples=100)
def lint_weights(folder: Path) -> object:
    """``leakatlas lint w.pt``, by its function."""
    return lint.lint(models.load_state(folder / "w.pt"))


# -- images --------------------------------------------------------------------------------------


@functools.cache
def _pictures() -> tuple[bytes, ...]:
    found = []
    for mode in ("RGB", "L", "RGBA", "P", "1", "LA", "I;16", "F", "CMYK", "YCbCr"):
        image = Image.new(mode, (9, 7))
        for form in ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF", "PPM", "TGA", "DDS", "ICO"):
            buffer = io.BytesIO()
            try:
                image.save(buffer, form)
            except (OSError, ValueError, KeyError):
                continue  # a format that cannot hold the mode
            found.append(buffer.getvalue())
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EndComments\n(x) print\n%%EOF\n"
    return (*found, eps)


@door(one("a.png", st.one_of(damaged(_pictures()), st.sampled_from(_pictures()))), share=3.0)
def image(folder: Path) -> object:
    """A folder of images."""
    return image_folder(folder, 8)


@functools.cache
def _parquets() -> tuple[bytes, ...]:
    png = _pictures()[0]
    found = []
    for cell in ({"bytes": png, "path": "x"}, {"bytes": png[:30], "path": None}, {"path": "/x"}):
        for labels in ([0, 1], [-1, 0], [2**40, 0], [None, 1]):
            table = pa.table({"img": [cell, cell], "label": pa.array(labels, type=pa.int64())})
            names = {"info": {"features": {"label": {"names": ["a", "b"]}}}}
            for extra in (None, json.dumps(names).encode(), b"[" * 5000, b"{"):
                held = table if extra is None else table.replace_schema_metadata({b"huggingface": extra})
                buffer = io.BytesIO()
                pq.write_table(held, buffer)
                found.append(buffer.getvalue())
    return tuple(found)


@door(one("a.parquet", st.one_of(damaged(_parquets()), st.sampled_from(_parquets()))), share=2.0)
def parquet_file(folder: Path) -> object:
    """A Parquet file of images."""
    return parquet(folder / "a.parquet", 8)


KINDS = ("photos", "patches", "digits", "faces", "parquet", "folder", "torchvision", "", "x")
WORDS = ("8", "0", "-1", "²", "1e3", "99999999999999999999", "victim", "all", "x", ".", "/", "",
         "CIFAR10", "MNIST/train", "Food101", "@8", "@1000000000", "@²", "a\x00b", "[/x]")  # fmt: skip


@door(
    one("spec", st.builds(
        lambda kind, words: ":".join([kind, *words]).encode("utf-8", "replace"),
        st.sampled_from(KINDS),
        st.lists(st.one_of(st.sampled_from(WORDS), st.text(max_size=5)), max_size=4),
    )),
    examples=100,
)  # fmt: skip
def data_name(folder: Path) -> object:
    """``data.victims: ...``"""
    return data.load((folder / "spec").read_text("utf-8"), limit=2)


# -- the catalogue -------------------------------------------------------------------------------

ROWS = tuple(
    text.encode()[:4000].rsplit(b"\n[[", 1)[0] for text in loader.shipped_texts().values()
)
TOML = ("[[attack]]\nkey = [[[[[[1]]]]]]", "[[attack]]\n" * 50, "a = " + "[" * 3000, "x = 2001-99-99",
        "attack = 1", "[attack]\nkey = 1", 'a."b".c = 1\na = 2', "a = " + "9" * 5000, "a=\"\\ud800\"",
        "[[attack]]\nkey = \"[/x]\"", "[[attack]]\nyear = 1e400")  # fmt: skip


@door(
    one("added.toml", st.one_of(damaged(ROWS), st.sampled_from(TOML).map(str.encode))),
    share=0.5, examples=40,
)  # fmt: skip
def rows(folder: Path) -> object:
    """``leakatlas validate added.toml``."""
    return loader.check_files([folder / "added.toml"])


RESULTS = tuple(
    json.loads(path.read_text()) for path in sorted(results.default_folder().glob("*.json"))[:4]
)


@door(
    one("dlg.json", st.one_of(
        tampered(RESULTS).map(as_json), damaged(tuple(map(as_json, RESULTS))),
    )),
    share=0.5, examples=50,
)  # fmt: skip
def result(folder: Path) -> object:
    """``leakatlas validate dlg.json``."""
    return results.read(folder / "dlg.json")


REPORT: Any = {
    "schema": "leakatlas/report/2", "runs": [{"attack": "dlg", "recipe": {"attack": {"key": "dlg"},
    "defenses": [{"key": "clipping"}], "model": {"name": "lenet"}}, "status": "complete"}],
}  # fmt: skip


@door(
    one("report.json", st.one_of(
        tampered((REPORT,)).map(as_json), damaged((as_json(REPORT),)),
        st.sampled_from((b"[" * 100_000, b"\xff\xfe", b"", b"null")),
    )),
    examples=100,
)  # fmt: skip
def report(folder: Path) -> object:
    """``leakatlas cite report.json``."""
    load_report(folder / "report.json")
    return citations.used_in(folder / "report.json")


COMMANDS = ("show", "cite", "table", "list", "validate", "lint", "doctor", "audit", "export")
OPTIONS = ("--json", "--printed", "--threat-model", "--where", "--format", "--mean", "--limit", "--out",
           "--budget", "--batch", "--update", "--reference", "--other", "--search", "--fail-on", "--seed")  # fmt: skip


@door(
    one("arguments", st.builds(
        lambda command, rest: "\n".join([command, *rest]).encode("utf-8", "replace"),
        st.sampled_from(COMMANDS),
        st.lists(st.one_of(st.sampled_from(OPTIONS), st.sampled_from(hostile.TEXTS[3:]),
                           st.text(max_size=5)), min_size=1, max_size=4),
    )),
    examples=40,
)  # fmt: skip
def command_line(folder: Path) -> object:
    """A command with words that it does not expect."""
    first, *rest = (folder / "arguments").read_text("utf-8").split("\n")
    if first == "audit" and not any(word and not word.startswith("-") for word in rest):
        return None  # the bundled audit would run, for minutes
    if first == "audit":
        rest = ["absent.yaml", *rest]
    return _run(first, *rest)
