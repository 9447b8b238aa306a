"""``leakatlas init``: a commented file that runs, every line of which is true."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import torch
from pydantic import BaseModel
from typer.testing import CliRunner

from leakatlas import models, yamlfiles
from leakatlas.audit import make_plan, read_config
from leakatlas.audit.config import AuditConfig
from leakatlas.audit.keys import PARTS, json_schema, keys_of, protocol_keys, starter
from leakatlas.cli import app
from leakatlas.fl import Update
from leakatlas.fl.capture import Capture

HERE = {"model": {"builtin": "lenet"}, "data": {"victims": "photos"}}
FACTORY = """from leakatlas import models


def make():
    return models.build("fc", in_channels=3, size=16, classes=8, widths=[8])
"""


def init(*words: str) -> str:
    done = CliRunner().invoke(app, ["init", *words])
    assert done.exit_code == 0, done.output
    return done.output


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_file_runs_as_it_is(folder: Path) -> None:
    assert "audit.yaml" in init()
    plan = make_plan(read_config(folder / "audit.yaml"), base=folder, command="")
    assert plan.letters == tuple("CDEFGH") and plan.seconds == 300
    assert json.loads((folder / "audit.schema.json").read_text()) == json_schema()
    assert (folder / "audit.yaml").read_text().startswith("# yaml-language-server: $schema=audit.")


@pytest.mark.parametrize("algorithm", ["fedsgd", "fedavg"])
def test_every_default_that_it_shows_is_the_default(folder: Path, algorithm: str) -> None:
    """Taking the # off every line that shows a key changes nothing."""
    values = HERE | {"protocol": {"algorithm": algorithm}}
    text = starter(values)
    (folder / "bare.yaml").write_text(text)
    names = {key.name for key in keys_of(AuditConfig)} | {"context"}
    names |= {key.name for part in PARTS.values() for key in keys_of(part)}
    names |= {key.name for key in protocol_keys(algorithm)}
    shown = re.sub(
        rf"^(\s*)# (\s*)((?:{'|'.join(sorted(names))}):(?: |$))",
        r"\1\2\3",
        text,
        flags=re.MULTILINE,
    )
    assert shown.count("\n  purpose:") == 1 and "\ncontext:\n" in shown
    (folder / "whole.yaml").write_text(shown)
    bare, whole = read_config(folder / "bare.yaml"), read_config(folder / "whole.yaml")
    assert whole.model_dump(exclude={"protocol"}) == bare.model_dump(exclude={"protocol"})
    plans = [make_plan(config, base=folder, command="") for config in (bare, whole)]
    assert plans[0].settings[0].protocol == plans[1].settings[0].protocol


def test_every_key_is_described() -> None:
    models_of: list[type[BaseModel]] = [AuditConfig, *PARTS.values()]
    for model in models_of:
        assert [key.name for key in keys_of(model) if not key.text] == []
    for algorithm in ("fedsgd", "fedavg"):
        assert [key.name for key in protocol_keys(algorithm) if not key.text] == []


def test_the_schema_takes_what_the_program_takes_and_no_other_key() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(AuditConfig.model_fields)
    assert schema["additionalProperties"] is False
    algorithms = schema["properties"]["protocol"]["anyOf"]
    assert [one["properties"]["algorithm"]["const"] for one in algorithms] == ["fedsgd", "fedavg"]
    defenses = {one["properties"]["key"]["const"] for one in schema["$defs"]["Defense"]["anyOf"]}
    assert {"client_dp", "clipping", "secure_aggregation"} <= defenses


ROOT = Path(__file__).resolve().parents[2]
WRITTEN = [
    text
    for page in (ROOT / "README.md", *sorted((ROOT / "docs" / "guide").glob("*.md")))
    for text in re.findall(
        r"^```yaml\n(.*?)^```", page.read_text("utf-8"), re.DOTALL | re.MULTILINE
    )
    if "\nmodel:" in text
]


@pytest.mark.parametrize("text", [starter(HERE | {"protocol": {"algorithm": "fedsgd"}}), *WRITTEN])
def test_what_we_write_ourselves_fits_the_schema(text: str) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    written = yamlfiles.parse(text, who="the text")
    assert [problem.message for problem in validator.iter_errors(written)] == []


@pytest.mark.parametrize(
    "wrong",
    [
        {"modell": {}},
        {"context": {"porpose": ""}},
        {"protocol": {"algorithm": "fedavg", "epoch": 1}},
        {"protocol": {"algorithm": "fedsgd", "epochs": 1}},
        {"defenses": [{"key": "clipping", "max": 1}]},
        {"defenses": [{"key": "clippping"}]},
        {"grants": ["label"]},
        {"data": {"limit": 0}},
    ],
)
def test_an_editor_marks_what_the_program_refuses(wrong: dict[str, object]) -> None:
    validator = jsonschema.Draft202012Validator(json_schema())
    assert list(validator.iter_errors({"model": {"builtin": "lenet"}, **wrong})) != []


def test_ones_own_model_images_and_attacks(folder: Path) -> None:
    (folder / "mine.py").write_text(FACTORY)
    init("my.yaml", "--model", "mine.py:make", "--victims", "photos:16", "--attacks", "DLG, idlg",
         "--lr", "0.5", "--budget", "10s")  # fmt: skip
    plan = make_plan(read_config(folder / "my.yaml"), base=folder, command="")
    assert plan.settings[0].attacks == ("dlg", "idlg") and plan.seconds == 10
    assert plan.settings[0].protocol.lr == 0.5


def test_from_a_capture(folder: Path) -> None:
    model = models.build("fc", in_channels=3, size=16, classes=8, widths=[8])
    gradients = {name: torch.zeros_like(p) for name, p in model.named_parameters()}
    update = Update.from_gradients(gradients, model, num_examples=3)
    (folder / "deep").mkdir()
    Capture.of(update).save(folder / "deep" / "c.safetensors")
    (folder / "mine.py").write_text(FACTORY)
    init("c.yaml", "--from", "deep/c.safetensors", "--model", "mine.py:make", "--shape", "3,16,16")
    config = read_config(folder / "c.yaml")
    assert config.captured == "deep/c.safetensors" and config.protocol["algorithm"] == "fedsgd"
    setting = make_plan(config, base=folder, command="").settings[0]
    assert not setting.known and setting.victims.images.shape == (3, 3, 16, 16)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit.yaml"], "exists; choose another name"),
        (["b.yaml", "--shape", "3,16,16"], "--shape belongs to --from"),
        (["b.yaml", "--attacks", "dlgg"], "Did you mean 'dlg'"),
        (["b.yaml", "--budget", "soon"], "write '30s'"),
        (["b.yaml", "--from", "no.safetensors", "--model", "lenet"], "no.safetensors"),
    ],
)
def test_what_does_not_fit_is_said_and_nothing_is_written(
    folder: Path, words: list[str], said: str
) -> None:
    (folder / "audit.yaml").write_text("model: {builtin: lenet}\n")
    done = CliRunner().invoke(app, ["init", *words])
    assert done.exit_code == 2
    assert said in done.output.replace("\n", " ")
    assert not (folder / "b.yaml").exists()
    assert (folder / "audit.yaml").read_text() == "model: {builtin: lenet}\n"
