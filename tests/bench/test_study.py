from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from leakatlas.bench import scene
from leakatlas.bench import study as studies
from leakatlas.bench.cells import Cell, cells_of
from leakatlas.bench.study import Study
from leakatlas.catalogue import registry
from leakatlas.errors import InvalidInput, UnknownName

SMALL: dict[str, Any] = {
    "schema": "leakatlas/study/1",
    "title": "A small study",
    "question": "Does the machinery work?",
    "chosen": "nothing",
    "setup": {
        "model": {"builtin": "fc", "kwargs": {"size": 8, "classes": 10, "widths": [12]}},
        "victims": "photos:8",
        "attack": {"key": "rgap"},
        "measures": ["psnr", "exact"],
    },
}


def write(folder: Path, content: Any = None, **changes: Any) -> Path:
    path = folder / "small" / "study.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    text = (
        content
        if isinstance(content, str)
        else yaml.safe_dump({**SMALL, **changes}, sort_keys=False)
    )
    path.write_text(text, encoding="utf-8")
    return path


def load(folder: Path, **changes: Any) -> Study:
    return studies.load(write(folder, **changes))


def setup(**changes: Any) -> dict[str, Any]:
    return {"setup": {**SMALL["setup"], **changes}}


def test_classes_of_a_client_are_its_own_and_a_batch_takes_the_next_images(tmp_path: Path) -> None:
    changes = {"victims": {"set": "digits:8", "count": 300}, "classes_a_client": 2, "clients": 3,
               "batch": 5, "batches": 2, "model": {"builtin": "fc", "kwargs": {"size": 8,
               "in_channels": 1, "classes": 10, "widths": [12]}}}  # fmt: skip
    study = load(tmp_path, **setup(**changes))
    cells = list(cells_of(study))
    first, second = (scene.victims(cell) for cell in cells)
    assert not {i.numpy().tobytes() for i in first.images} & {
        i.numpy().tobytes() for i in second.images
    }
    for number, labels in enumerate((first.labels, second.labels)):
        for client in range(3):
            own, pair = set(labels[5 * client : 5 * client + 5].tolist()), (client + number) % 3
            assert own <= {2 * pair, 2 * pair + 1}
    with pytest.raises(InvalidInput, match="says how images are taken"):
        load(tmp_path, **setup(**changes, choose="distinct labels"))
    with pytest.raises(InvalidInput, match="too few"):
        too_many = load(tmp_path, **setup(**{**changes, "batch": 90}))
        scene.victims(next(iter(cells_of(too_many))))


def test_a_study_without_axes_has_one_case(tmp_path: Path) -> None:
    study = load(tmp_path)
    assert study.name == "small" and list(study.cases) == ["main"]
    assert study.cases["main"].model.builtin == "fc"
    assert [(c.seed, c.batch) for c in cells_of(study)] == [(0, 0)]


def test_the_cases_are_all_combinations_but_the_excluded_ones(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        axes={
            "letter": ["A", "B"],
            "model.kwargs.widths": [[4], [5]],
            "attack": {"plain": {}, "ratio": {"attack": "april"}},
        },
        exclude=[{"letter": "A", "attack": "ratio"}],
    )
    assert list(study.cases) == [
        "A/[4]/plain", "A/[5]/plain",
        "B/[4]/plain", "B/[4]/ratio", "B/[5]/plain", "B/[5]/ratio",
    ]  # fmt: skip
    case = study.cases["B/[5]/ratio"]
    assert case.letter == "B" and case.model.kwargs["widths"] == [5]
    assert case.model.kwargs["classes"] == 10  # the rest of the table stays
    assert case.attack is not None and case.attack.key == "april"


def test_every_defense_stands_for_what_is_implemented_at_its_strengths(tmp_path: Path) -> None:
    study = load(tmp_path, axes={"defense": "every defense"})
    expected = [
        (key, registry.load_defense(key).knob, value)
        for key in registry.defense_keys()
        for value in registry.load_defense(key).strengths
    ]
    assert next(iter(study.cases)) == "none" and not study.cases["none"].defenses
    found = [case.defenses[0] for label, case in study.cases.items() if label != "none"]
    assert [(d["key"], *list(d.items())[1]) for d in found] == expected
    pruned = study.cases["gradient_pruning, rate=0.95"]
    assert pruned.beside is not None and pruned.beside.defense == "gradient_pruning"


def test_some_combinations_need_more_than_their_axes_say(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        axes={"letter": ["A", "B"], "model.kwargs.widths": [[4], [5]]},
        where=[
            {"match": {"letter": "A", "model.kwargs.widths": "[4]"}, "lay": {"clients": 2}},
            {"match": {"letter": "*"}, "lay": {"model": {"kwargs": {"classes": 3}}}},
        ],
    )
    assert [case.clients for case in study.cases.values()] == [2, 1, 1, 1]
    assert {case.model.kwargs["classes"] for case in study.cases.values()} == {3}


def test_patterns_leave_many_combinations_out_at_once(tmp_path: Path) -> None:
    study = load(
        tmp_path,
        axes={"letter": ["A", "B"], "seeds": [[0], [1]]},
        exclude=[{"letter": "A", "seeds": "*"}],
    )
    assert list(study.cases) == ["B/[0]", "B/[1]"]


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attack": {"key": "rgap", "parameters": {"stepz": 5}}}, "RGAP has no parameter 'stepz'"),
        ({"attack": {"key": "dlg", "preset": "quick"}}, "attack: Unknown preset of dlg 'quick'"),
        ({"defenses": [{"key": "clipping", "maxnorm": 1.0}]}, "Clipping has no parameter 'max"),
        ({"defenses": [{"key": "clipping", "max_norm": -1.0}]}, "should be greater than 0"),
        ({"protocol": {"name": "fedavg"}}, "stands under 'algorithm'. Write algorithm: fedavg"),
        ({"protocol": {"algorithm": "fedavg", "epochz": 2}}, "FedAVG has no parameter 'epochz'"),
    ],
    ids=["attack", "preset", "defense", "range", "algorithm", "protocol"],
)  # fmt: skip
def test_settings_that_no_class_takes_are_named_before_anything_is_computed(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(InvalidInput) as refused:
        load(tmp_path, **setup(**changes))
    assert said in str(refused.value) and "case main" in str(refused.value)


def test_another_attack_does_not_inherit_the_parameters_of_the_first(tmp_path: Path) -> None:
    first = {"key": "dlg", "parameters": {"steps": 5}}
    study = load(tmp_path, **setup(attack=first), axes={"a": {"x": {}, "y": {"attack": "idlg"}}})
    x, y = study.cases["x"].attack, study.cases["y"].attack
    assert x is not None and x.parameters == {"steps": 5}
    assert y is not None and y.parameters == {}


def test_seeds_times_batches_or_one_batch_a_seed(tmp_path: Path) -> None:
    product = load(tmp_path, **setup(seeds=[3, 4], batches=2))
    assert [(c.seed, c.batch) for c in cells_of(product)] == [(3, 0), (3, 1), (4, 0), (4, 1)]
    paired = load(tmp_path, **setup(seeds=[3, 4], batches="one a seed"))
    assert [(c.seed, c.batch) for c in cells_of(paired)] == [(3, 0), (4, 1)]


def test_only_takes_patterns(tmp_path: Path) -> None:
    study = load(tmp_path, axes={"letter": ["A", "B"], "batch": [1, 2]})
    assert {c.label for c in cells_of(study, only="A/*")} == {"A/1", "A/2"}
    assert {c.label for c in cells_of(study, only=["A/1", "A/2"])} == {"A/1", "A/2"}


@pytest.mark.parametrize(
    ("changes", "field", "word"),
    [
        ({"titel": "x"}, "titel", "did you mean 'title'"),
        ({"title": ""}, "title", "empty"),
        ({"schema": "leakatlas/study/0"}, "schema", "leakatlas/study/1"),
        ({"axes": {"letter": []}}, "axes", "has no value"),
        (setup(batc=2), "batc", "did you mean 'batch'"),
        (setup(batch=0), "batch", "greater than 0"),
        (setup(batch="2"), "batch", "whole number"),
        (setup(model={"builtin": "fc", "kwarg": {}}), "model.kwarg", "did you mean 'kwargs'"),
        (setup(vantage="sever"), "vantage", "did you mean 'server'"),
        (setup(attack="rgab"), "attack.key", "did you mean 'rgap'"),
        (setup(defenses=[{"key": "cliping"}]), "defenses[1].key", "did you mean 'clipping'"),
        (setup(measures=["psnrr"]), "measures[1]", "did you mean 'psnr'"),
        (setup(measures=[{"name": "own"}]), "measures[1]", "computed by nobody"),
        (setup(measures=[]), "measures", "too short"),
        (setup(beside={"attack": "gaussian"}), "beside.attack", "one of: dlg"),
        (setup(beside={"attack": "dlg", "defense": "clipping"}), "beside", "exactly one"),
        (setup(beside={"attack": "dlg", "reported": "label acuracy"}), "beside.reported",
         "label accuracy"),
        (setup(choose="one class"), "", "label"),
        (setup(clients=2, target=2), "", "client 2"),
        (setup(budget="soon"), "budget", "paper"),
        ({"axes": {"letter": ["A", "B"]}, "exclude": [{"leter": "A"}]}, "exclude[1]", "letter"),
        ({"axes": {"letter": ["A", "B"]}, "exclude": [{"letter": "C"}]}, "exclude[1]", "A, B"),
        (
            {"axes": {"letter": ["A"]}, "where": [{"match": {"letter": "Z"}, "lay": {"batch": 2}}]},
            "where[1].match",
            "A",
        ),
        ({"compare": [{"measure": "psnr", "of": "main", "minus": "mian"}]}, "compare[1].minus",
         "did you mean 'main'"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_place_and_a_way_out(
    tmp_path: Path, changes: dict[str, Any], field: str, word: str
) -> None:
    study, problems = studies.check(write(tmp_path, **changes))
    assert study is None
    assert [problem.field for problem in problems] == [field], [str(p) for p in problems]
    assert word in str(problems[0]) and "small/study.yaml" in str(problems[0])


def test_a_mistake_that_every_case_inherits_is_said_once(tmp_path: Path) -> None:
    path = write(tmp_path, **setup(bach=3), axes={"letter": ["A", "B", "C"]})
    _, problems = studies.check(path)
    assert len(problems) == 1


@pytest.mark.parametrize(
    ("text", "word"),
    [
        ("schema: [", "not YAML"),
        ("- a", "holds list"),
        ("a: 1\na: 2", "second time"),
        ("a: !!python/object/apply:os.system ['true']", "not allowed"),
        ("[" * 3_000, "nested deeper"),
        ("\x00", "cannot be read"),
    ],
)
def test_what_is_no_study_is_refused_in_words(tmp_path: Path, text: str, word: str) -> None:
    study, problems = studies.check(write(tmp_path, text))
    assert study is None and word in str(problems[0])


def test_a_name_that_does_not_exist(tmp_path: Path) -> None:
    with pytest.raises(UnknownName, match="study"):
        studies.load("no-such-study")
    with pytest.raises(InvalidInput, match=r"small/study\.yaml"):
        studies.load(write(tmp_path, "{}"))


def test_a_cell_is_named_by_what_decides_its_figures(tmp_path: Path) -> None:
    def cell(**changes: Any) -> Cell:
        return next(iter(cells_of(load(tmp_path, **setup(**changes)))))

    same = cell().name
    assert cell(measures=["ssim"]).name == same
    assert cell(note="words").name == same
    assert cell(memory=1.0).name == same
    assert cell(batches=7).name == same
    others = [cell(batch=2), cell(letter="A"), cell(seeds=[1]), cell(execution="auto"),
              cell(attack={"key": "rgap", "preset": "tuned"}), cell(control=True)]  # fmt: skip
    assert len({same, *(other.name for other in others)}) == len(others) + 1


def test_a_cell_travels_as_json(tmp_path: Path) -> None:
    cell = next(iter(cells_of(load(tmp_path))))
    again = Cell.from_json(cell.to_json())
    assert (again.name, again.code_hash) == (cell.name, cell.code_hash)
