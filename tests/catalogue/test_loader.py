"""Reading the rows: cheap to import, complete, and found by the names people use."""

import subprocess
import sys
from pathlib import Path

import pytest

from leakatlas import catalogue
from leakatlas.catalogue import loader, registry
from leakatlas.catalogue.schema import ROW_TYPES, json_schema
from leakatlas.errors import CatalogueError, UnknownName
from leakatlas.threat import LETTERS

PROBE = """
import sys
before = set(sys.modules)
import leakatlas.catalogue
print(*sorted(set(sys.modules) - before))
"""


def test_importing_loads_nothing_heavy() -> None:
    loaded = subprocess.check_output([sys.executable, "-c", PROBE], text=True).split()
    others = {name.partition(".")[0] for name in loaded} - sys.stdlib_module_names - {"leakatlas"}
    assert others == set(), "the standard library is enough to begin with"
    assert len([name for name in loaded if name.startswith("leakatlas")]) < 15


def test_reading_every_row_loads_no_torch() -> None:
    code = (
        "import sys; from leakatlas.catalogue import export, pages; export.export();"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_published_rows_come_first_and_in_the_order_of_the_print() -> None:
    assert [row.letter for row in catalogue.threat_models()] == list("ABCDEFGH")
    for numbers in (
        [loader.printed_number(row) for row in catalogue.attacks()],
        [row.number for row in catalogue.references()],
    ):
        printed = [number for number in numbers if number is not None]
        assert numbers[: len(printed)] == list(range(1, len(printed) + 1))


def test_the_rows_of_the_letters_say_what_the_code_says() -> None:
    for row in catalogue.threat_models():
        assert LETTERS[row.letter].name == row.name
        assert LETTERS[row.letter].knowledge.names() == row.knowledge


@pytest.mark.parametrize("name", ["cpa", "CPA", "Cocktail Party Attack", "8", "[8]"])
def test_an_attack_is_found_by_any_of_its_names(name: str) -> None:
    assert catalogue.attack(name).key == "cpa"


@pytest.mark.parametrize("name", ["gradient_pruning", "DGP", "top-k"])
def test_a_defense_is_found_by_any_of_its_names(name: str) -> None:
    assert catalogue.defense(name).key == "gradient_pruning"


def test_unknown_names_come_with_suggestions() -> None:
    with pytest.raises(UnknownName, match="Did you mean 'soteria'"):
        catalogue.defense("sotera")
    with pytest.raises(UnknownName, match="Unknown threat model 'Q'"):
        catalogue.threat_model("q")
    with pytest.raises(UnknownName, match=r"Unknown reference 'zhu2019dep'. Did you mean 'zhu"):
        catalogue.reference("zhu2019dep")
    assert catalogue.reference("[1]") == catalogue.reference("zhu2019deep")
    assert catalogue.threat_model("d").letter == "D"


def test_a_shelf_file_with_a_fault_stops_everything(monkeypatch: pytest.MonkeyPatch) -> None:
    texts = loader.shipped_texts()
    texts["attacks.toml"] = texts["attacks.toml"].replace(
        'threat_model = "A"', 'threat_model = "Z"', 1
    )
    monkeypatch.setattr(loader, "shipped_texts", lambda: texts)
    loader._shelf.cache_clear()
    try:
        with pytest.raises(CatalogueError, match=r'attacks.toml: attack "dlg": threat_model'):
            catalogue.attacks()
    finally:
        loader._shelf.cache_clear()


def test_the_schema_types_every_kind_of_row() -> None:
    schema = json_schema()
    assert set(schema["properties"]) == set(ROW_TYPES)
    attack = schema["$defs"]["Attack"]
    assert attack["additionalProperties"] is False
    assert attack["properties"]["threat_model"]["enum"] == list("ABCDEFGH")
    undescribed = [
        name
        for name, field in attack["properties"].items()
        if "description" not in field and "$ref" not in field and name != "corrections"
    ]
    assert undescribed == []


def test_every_row_file_points_editors_at_the_schema() -> None:
    for name, text in loader.shipped_texts().items():
        schema = "../" * name.count("/") + "catalogue.schema.json"
        assert text.startswith(f"#:schema {schema}\n")
    assert (Path(registry.__file__).parent / "catalogue.schema.json").is_file()
