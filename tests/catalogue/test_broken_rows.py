"""Broken rows, one mistake each: the message names file, row, field and the way out."""

from collections.abc import Callable
from pathlib import Path

import pytest

from leakatlas.catalogue import loader

ROW = """[[reference]]
key = "doe2026beacon"
entry = "inproceedings"
title = "Beacon"
authors = ["Doe, Jane", "Roe, Richard"]
year = 2026
venue = "A Conference"
[[reference.links]]
label = "paper"
url = "https://example.org/beacon.pdf"

[[attack]]
key = "beacon"
name = "Beacon"
reference = "doe2026beacon"
category = "optimization"
technique = "basic"
mechanism = "gradient-matching"
threat_model = "B"
algorithm = "fedsgd"
resolution = [32, 32]
batch = { size = 8 }
models = ["LeNet"]
tasks = ["object"]
label_recovery = { kind = "new" }
code = { kind = "link", url = "https://example.org/beacon" }
summary = "Anneals the prior."
planned = true
"""

DEFENSE = """[[defense]]
works = ["sun2021soteria"]
key = "curtain"
name = "Curtain"
category = "heuristic"
technique = "model"
where = "client"
hooks = ["update"]
intuition = "Hides."
weakness = "Tears."
planned = true
[[defense.evidence]]
letters = ["F"]
stance = "fails"
works = ["sun2021soteria"]
text = "Tears in the wind."
"""

STANCE = (
    'stance = { A = "holds", B = "holds", C = "holds", D = "fails", '
    'E = "fails", F = "fails", G = "fails", H = "fails" }\n'
)


def change(old: str, new: str) -> Callable[[str], str]:
    def apply(text: str) -> str:
        assert old in text, old
        return text.replace(old, new, 1)

    return apply


def without(name: str) -> Callable[[str], str]:
    def apply(text: str) -> str:
        head, attack = text.split("[[attack]]")
        lines = [line for line in attack.splitlines() if not line.startswith(f"{name} =")]
        assert len(lines) < len(attack.splitlines())
        return head + "[[attack]]" + "\n".join(lines) + "\n"

    return apply


def add(text: str) -> Callable[[str], str]:
    return lambda row: row + text


def published(change: Callable[[str], str]) -> Callable[[str], str]:
    """The same to a row that the systematization would print."""

    def apply(row: str) -> str:
        row = row.replace(
            "[[reference.links]]", 'number = 1060\nprinted = "L."\n[[reference.links]]'
        )
        return change(row.replace("[[attack]]", '[[attack]]\norigin = "published"'))

    return apply


CORRECTION = '[[attack.corrections]]\nfield = "{}"\nprinted = {}\ncorrected = {}\nreason = "r"\n'

# name: (what is done to the row, row named, field named, words of the message)
BROKEN: dict[str, tuple[Callable[[str], str], str, str, tuple[str, ...]]] = {
    "missing key": (without("key"), "attack", "key", ("missing", "inverting_gradients")),
    "missing threat model": (
        without("threat_model"), "beacon", "threat_model", ("missing", 'threat_model = "D"'),
    ),
    "missing batch": (without("batch"), "beacon", "batch", ("missing", "batch = { size = 8 }")),
    "missing summary": (without("summary"), "beacon", "summary", ("missing", "own words")),
    "unknown letter": (
        change('"B"', '"Z"'), "beacon", "threat_model", ("'Z' is not allowed", "A, B, C"),
    ),
    "lower-case letter": (
        change('"B"', '"b"'), "beacon", "threat_model",
        ("'b' is not allowed", "did you mean 'B'?"),
    ),
    "letter as a list": (
        change('"B"', '["B"]'), "beacon", "threat_model", ("['B']", "A, B, C"),
    ),
    "batch as text": (
        change("{ size = 8 }", '"8"'), "beacon", "batch", ("'8'", "batch = { size = 8 }"),
    ),
    "batch size as text": (
        change("size = 8", 'size = "8"'), "beacon", "batch.size", ("'8'", "size = 8"),
    ),
    "batch size zero": (
        change("size = 8", "size = 0"), "beacon", "batch.size", ("0", "greater than 0"),
    ),
    "batch size a fraction": (
        change("size = 8", "size = 8.5"), "beacon", "batch.size", ("8.5", "whole"),
    ),
    "epochs with fedsgd": (
        change("size = 8", "size = 8, epochs = 5"), "beacon", "batch",
        ("fedsgd", "batch = { size = 8 }"),
    ),
    "fedavg without local work": (
        change('"fedsgd"', '"fedavg"'), "beacon", "batch", ("fedavg", "epochs = 5, size = 8"),
    ),
    "dead reference": (
        change('reference = "doe2026beacon"', 'reference = "doe2026becon"'), "beacon",
        "reference", ("no reference 'doe2026becon'", "[[reference]]", "mean 'doe2026beacon'"),
    ),
    "reference as a number": (
        change('reference = "doe2026beacon"', "reference = 60"), "beacon", "reference",
        ("60", "text", "zhu2019deep"),
    ),
    "duplicate reference": (
        change('key = "doe2026beacon"', 'key = "zhu2019deep"'), "zhu2019deep", "key",
        ("taken", "references.toml"),
    ),
    "number of a reference": (
        change('key = "doe2026beacon"', 'key = "doe2026beacon"\nnumber = 60'), "doe2026beacon",
        "printed", ("belong together", "neither for any other"),
    ),
    "printed although it is not": (
        change('name = "Beacon"', 'name = "Beacon"\norigin = "published"'), "beacon", "origin",
        ("no such row", "leave it out"),
    ),
    "a deployed attack": (
        change('name = "Beacon"', 'name = "Beacon"\norigin = "deployed"'), "beacon", "origin",
        ("not deployed",),
    ),
    "unknown origin": (
        change('name = "Beacon"', 'name = "Beacon"\norigin = "new"'), "beacon", "origin",
        ("'new' is not allowed", "newer"),
    ),
    "superseded by nothing": (
        change('name = "Beacon"', 'name = "Beacon"\nsuperseded_by = "gidf"'), "beacon",
        "superseded_by", ("no attack 'gidf'", "did you mean 'gifd'"),
    ),
    "superseded by itself": (
        change('name = "Beacon"', 'name = "Beacon"\nsuperseded_by = "beacon"'), "beacon",
        "superseded_by", ("itself",),
    ),
    "unknown payload": (
        change('name = "Beacon"', 'name = "Beacon"\npayload = "heads"'), "beacon", "payload",
        ("did you mean 'head'",),
    ),
    "name of another row": (
        change('name = "Beacon"', 'name = "Beacon"\naliases = ["deep leakage from gradients"]'),
        "beacon", "name", ("taken", 'attack "dlg"'),
    ),
    "duplicate key": (
        change('key = "beacon"', 'key = "dlg"'), "dlg", "key",
        ("taken", 'attack "dlg" in attacks.toml', "choose another key"),
    ),
    "key of a defense": (
        change('key = "beacon"', 'key = "soteria"'), "soteria", "key", ("taken", "defenses.toml"),
    ),
    "key with capitals": (
        change('key = "beacon"', 'key = "Beacon-1"'), "Beacon-1", "key",
        ("expected form", "lower case"),
    ),
    "unknown algorithm": (
        change('"fedsgd"', '"fedsdg"'), "beacon", "algorithm", ("fedsdg", "'fedsgd'"),
    ),
    "unknown category": (
        change('"optimization"', '"optimisation"'), "beacon", "category",
        ("optimisation", "'optimization'"),
    ),
    "technique of another category": (
        change('"basic"', '"latent"'), "beacon", "technique",
        ("does not belong", "basic, augmented"),
    ),
    "resolution as text": (
        change("[32, 32]", '"32x32"'), "beacon", "resolution", ("32x32", "resolution = [64, 64]"),
    ),
    "resolution of three": (
        change("[32, 32]", "[3, 32, 32]"), "beacon", "resolution", ("resolution = [64, 64]",),
    ),
    "unknown task": (
        change('["object"]', '["faces"]'), "beacon", "tasks", ("faces", "'face'"),
    ),
    "labels as a symbol": (
        change('{ kind = "new" }', '"★"'), "beacon", "label_recovery", ('kind = "new"',),
    ),
    "labels of a dead row": (
        change('{ kind = "new" }', '{ kind = "row", row = "idgl" }'), "beacon",
        "label_recovery.row", ("no attack 'idgl'", "row's key", "'idlg'"),
    ),
    "labels of row nothing": (
        change('{ kind = "new" }', '{ kind = "row" }'), "beacon", "label_recovery.row",
        ("missing", 'kind = "row", row = "idlg"'),
    ),
    "link without an address": (
        change(', url = "https://example.org/beacon" }', " }"), "beacon", "code.url",
        ("does not fit", "https://"),
    ),
    "script as a link": (
        change('"https://example.org/beacon"', '"javascript:alert(1)"'), "beacon", "code.url",
        ("javascript", "http(s)"),
    ),
    "field with a typing error": (
        change("mechanism =", "mechanizm ="), "beacon", "mechanizm", ("no field", "'mechanism'"),
    ),
    "authors as text": (
        change('["Doe, Jane", "Roe, Richard"]', '"Jane Doe"'), "doe2026beacon", "authors",
        ("Jane Doe", "Family, Given"),
    ),
    "year as text": (
        change("year = 2026", 'year = "2026"'), "doe2026beacon", "year", ("'2026'", "whole"),
    ),
    "year too late": (
        change("year = 2026", "year = 20266"), "doe2026beacon", "year", ("2100",),
    ),
    "correction of what is not printed": (
        add(CORRECTION.format("threat_model", '"B"', '"A"')), "beacon", "corrections",
        ("a print that there is not", "into the field itself"),
    ),
    "correction of nothing": (
        published(add(CORRECTION.format("threatmodel", '"B"', '"A"'))), "beacon",
        "corrections[1].field",
        ("no field", "'threat_model'"),
    ),
    "correction that misquotes": (
        published(add(CORRECTION.format("threat_model", '"C"', '"A"'))), "beacon",
        "corrections[1].printed",
        ("does not repeat", 'printed = "B"'),
    ),
    "correction of the wrong type": (
        published(add(CORRECTION.format("batch", "{ size = 8 }", '"nine"'))), "beacon",
        "corrections[1].corrected", ("no value for batch", "{ size = 8 }"),
    ),
    "correction that changes nothing": (
        published(add(CORRECTION.format("threat_model", '"B"', '"B"'))), "beacon",
        "corrections[1].corrected", ("equals the printed value", "remove"),
    ),
    "unknown kind of row": (
        change("[[attack]]", "[[atack]]"), "atack", "", ("no kind of row", "'attack'"),
    ),
    "single brackets": (
        change("[[attack]]", "[attack]"), "attack", "", ("not a list", "[[attack]]"),
    ),
    "broken TOML": (
        change('name = "Beacon"', "name = Beacon"), "", "", ("no valid TOML", "line"),
    ),
    "unclosed text": (change('"LeNet"', '"LeNet'), "", "", ("no valid TOML", "line")),
    "stance as a colour": (
        lambda _: DEFENSE.replace("where", STANCE.replace('A = "holds"', 'A = "green"') + "where"),
        "curtain", "stance.A", ("'green'", "holds, partial, fails"),
    ),
    "stance that nobody printed": (
        lambda _: DEFENSE.replace("where", STANCE + "where"), "curtain", "stance",
        ("not", "[[defense.evidence]]"),
    ),
    "deployed nowhere": (
        lambda _: DEFENSE.replace("where =", 'origin = "deployed"\nwhere ='), "curtain",
        "ships_in", ("deployed defenses", "ships_in ="),
    ),
    "defense without a work": (
        lambda _: DEFENSE.replace('works = ["sun2021soteria"]\nkey', "key"), "curtain", "works",
        ("missing", "sun2021soteria"),
    ),
    "evidence of a dead work": (
        lambda _: DEFENSE.replace('works = ["sun2021soteria"]\ntext', 'works = ["x"]\ntext'),
        "curtain", "evidence[1].works", ("no reference 'x'",),
    ),
    "unknown hook": (
        lambda _: DEFENSE.replace('["update"]', '["updates"]'), "curtain", "hooks",
        ("updates", "'update'"),
    ),
    "defense of a dead work": (
        lambda _: DEFENSE.replace('["sun2021soteria"]\nkey', '["sun2021sotera"]\nkey'), "curtain",
        "works", ("no reference 'sun2021sotera'", "'sun2021soteria'"),
    ),
}  # fmt: skip


def test_the_unbroken_row_is_accepted(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(ROW + DEFENSE, encoding="utf-8")
    catalogue, problems = loader.check_files([path])
    assert problems == []
    assert catalogue.attack[-1].key == "beacon"
    assert catalogue.defense[-1].key == "curtain"


def test_there_are_at_least_thirty() -> None:
    assert len(BROKEN) >= 30


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_with_a_way_out(name: str, tmp_path: Path) -> None:
    breaking, row, field, words = BROKEN[name]
    path = tmp_path / "mine.toml"
    path.write_text(breaking(ROW), encoding="utf-8")
    _, problems = loader.check_files([path])
    found = [p for p in problems if p.field == field and row in p.row and "mine.toml" in p.file]
    assert len(found) == 1 and len(problems) <= 2, [str(problem) for problem in problems]
    message = str(found[0])
    assert str(path) in message and field in message
    for word in words:
        assert word in message, message
    assert found[0].fix, message


def test_every_problem_is_given_at_once(tmp_path: Path) -> None:
    text = ROW
    for broken in ("unknown letter", "batch as text", "unknown algorithm", "unknown task"):
        text = BROKEN[broken][0](text)
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    _, problems = loader.check_files([path])
    assert {p.field for p in problems} == {"threat_model", "batch", "algorithm", "tasks"}


def test_a_file_named_like_a_shipped_one_takes_its_place(tmp_path: Path) -> None:
    path = tmp_path / "attacks.toml"
    path.write_text(loader.shipped_texts()["attacks.toml"], encoding="utf-8")
    catalogue, problems = loader.check_files([path])
    assert problems == []
    assert catalogue.attack == loader.attacks()


def test_a_file_of_the_catalogue_is_checked_in_its_place() -> None:
    for name in loader.shipped_texts():
        catalogue, problems = loader.check_files([loader.HERE / name])
        assert problems == []
        assert catalogue.attack == loader.attacks()


def test_a_mistake_in_one_field_hides_no_other_mistake(tmp_path: Path) -> None:
    text = BROKEN["unknown letter"][0](ROW)
    text = BROKEN["dead reference"][0](text)
    text = BROKEN["technique of another category"][0](text)
    text = BROKEN["duplicate key"][0](text)
    text = BROKEN["epochs with fedsgd"][0](text)
    path = tmp_path / "mine.toml"
    path.write_text(text, encoding="utf-8")
    _, problems = loader.check_files([path])
    assert {p.field for p in problems} == {
        "threat_model", "reference", "technique", "key", "batch"
    }  # fmt: skip
