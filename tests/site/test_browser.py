"""The site in a real Chromium, opened from its folder."""

from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, expect

from leakatlas import catalogue
from tests.site.conftest import Visit

PAGES = (
    "index.html",
    "attacks.html",
    "defenses.html",
    "matrix.html",
    "measured.html",
    "threat-models.html",
    "references.html",
    "attacks/inverting_gradients.html",
    "attacks/dlg.html",
    "attacks/loki.html",
    "defenses/soteria.html",
    "threat-models/D.html",
)
ATTACKS = len(catalogue.attacks())
PHONE = {"width": 390, "height": 844}

# Contrast of every visible text against the nearest opaque background (WCAG 2, 4.5 or 3 for
# large text); returns what falls short.
CONTRAST = """() => {
  const channel = (v) => (v /= 255) <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
  const light = ([r, g, b]) => 0.2126 * channel(r) + 0.7152 * channel(g) + 0.0722 * channel(b);
  const parse = (c) => c.match(/[\\d.]+/g).map(Number);
  const poor = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const node = walker.currentNode, element = node.parentElement;
    if (!node.textContent.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    if (element.closest(".visually-hidden, [hidden], noscript, option, .skip")) continue;
    const style = getComputedStyle(element);
    if (style.visibility === "hidden" || !element.getClientRects().length) continue;
    let under = element, back = null;
    while (under && !back) {
      const c = parse(getComputedStyle(under).backgroundColor);
      if (c.length === 3 || c[3] === 1) back = c;
      under = under.parentElement;
    }
    const a = light(parse(style.color)), b = light(back ?? [255, 255, 255]);
    const ratio = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
    const large = parseFloat(style.fontSize) >= 24;
    if (ratio < (large ? 3 : 4.5)) poor.push([node.textContent.trim().slice(0, 30), ratio]);
  }
  return poor;
}"""


def shown(page: Page) -> list[str]:
    """Keys of the visible rows, in their order."""
    keys: list[str] = page.locator("#table tbody tr:visible").evaluate_all(
        "rows => rows.map(row => row.id)"
    )
    return keys


def of_letter(letter: str) -> set[str]:
    return {a.key for a in catalogue.attacks() if a.corrected().threat_model == letter}


@pytest.mark.parametrize("name", PAGES)
def test_every_page_opens_without_a_complaint(visit: Visit, name: str) -> None:
    page = visit.open(name)
    expect(page.locator("h1")).to_be_visible()
    assert page.title().endswith("LeakAtlas")


@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
@pytest.mark.parametrize("name", PAGES)
def test_a_phone_never_scrolls_sideways(visit: Visit, name: str) -> None:
    page = visit.open(name)
    assert page.evaluate("document.documentElement.scrollWidth") <= PHONE["width"]


@pytest.mark.parametrize("visit", [{"width": 1200, "height": 900}], indirect=True, ids=["1200"])
@pytest.mark.parametrize("name", PAGES)
def test_nothing_is_cut_at_1200_pixels(visit: Visit, name: str) -> None:
    page = visit.open(name)
    cut = page.locator(".scroll, .math, figure").evaluate_all(
        "all => all.filter(e => e.scrollWidth > e.clientWidth).map(e => e.outerHTML.slice(0, 80))"
    )
    assert cut == []
    assert page.evaluate("document.documentElement.scrollWidth") <= 1200


@pytest.mark.parametrize("visit", [PHONE], indirect=True, ids=["phone"])
def test_a_phone_shows_rows_as_cards_with_labels(visit: Visit) -> None:
    page = visit.open("attacks.html")
    row = page.locator("#dlg")
    box = row.bounding_box()
    assert box is not None and box["height"] > 150
    label = row.locator('[data-label="Batch"]').evaluate(
        "cell => getComputedStyle(cell, '::before').content"
    )
    assert label == '"Batch"'


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", PAGES)
def test_text_has_contrast(visit: Visit, name: str, scheme: Any) -> None:
    visit.page.emulate_media(color_scheme=scheme)
    page = visit.open(name)
    assert page.evaluate(CONTRAST) == []


def test_filters_join_and_say_how_many(visit: Visit) -> None:
    page = visit.open("attacks.html")
    assert len(shown(page)) == ATTACKS
    page.get_by_label("Threat model", exact=True).select_option("G")
    assert set(shown(page)) == of_letter("G")
    page.get_by_label("Algorithm").select_option("fedsgd")
    both = {
        a.key
        for a in catalogue.attacks()
        if a.key in of_letter("G") and a.corrected().algorithm != "fedavg"
    }
    assert set(shown(page)) == both
    expect(page.locator(".found")).to_have_text(f"{len(both)} of {ATTACKS} attacks")
    page.get_by_role("button", name="Clear").first.click()
    assert len(shown(page)) == ATTACKS


def test_search_looks_into_everything_and_an_empty_answer_has_a_way_out(visit: Visit) -> None:
    page = visit.open("attacks.html")
    page.get_by_label("Search").fill("geiping break privacy")
    assert "inverting_gradients" in shown(page) and len(shown(page)) < ATTACKS / 2
    page.get_by_label("Search").fill("nothing fits this")
    assert shown(page) == []
    page.get_by_role("button", name="Clear the filters").click()
    assert len(shown(page)) == ATTACKS
    expect(page.get_by_label("Search")).to_be_focused()


def test_printed_values_move_rows(visit: Visit) -> None:
    page = visit.open("attacks.html")
    page.get_by_label("Threat model", exact=True).select_option("E")
    assert "gradvit" not in shown(page)
    page.get_by_label("Values").select_option("printed")
    assert "gradvit" in shown(page)
    expect(page.locator('#gradvit [data-label="Threat model"]')).to_have_text(
        "E", use_inner_text=True
    )


def test_sorting_by_number_and_by_text_both_ways(visit: Visit) -> None:
    page = visit.open("attacks.html")
    header = page.get_by_role("columnheader", name="Batch")
    header.get_by_role("button").click()
    expect(header).to_have_attribute("aria-sort", "ascending")
    header.get_by_role("button").click()
    expect(header).to_have_attribute("aria-sort", "descending")
    sizes = {a.key: a.corrected().batch.size or 0 for a in catalogue.attacks()}
    order = [sizes[key] for key in shown(page)]
    assert order == sorted(order, reverse=True)
    name = page.get_by_role("columnheader", name="Attack")
    name.get_by_role("button").click()
    expect(header).to_have_attribute("aria-sort", "none")
    names = {a.key: a.name.casefold() for a in catalogue.attacks()}
    assert shown(page)[0] == min(names, key=lambda key: names[key])


def test_the_address_carries_filters_and_order(visit: Visit) -> None:
    page = visit.open("attacks.html")
    page.get_by_label("Knowledge").select_option("manipulation")
    page.get_by_role("columnheader", name="No.").get_by_role("button").click()
    page.get_by_role("columnheader", name="No.").get_by_role("button").click()
    before, address = shown(page), page.url
    assert "knowledge=manipulation" in address and "sort=-0" in address
    again = visit.open("attacks.html#" + address.partition("#")[2])
    assert shown(again) == before
    assert before.index("scale_mia") < before.index("mandrake")


def test_a_strange_address_shows_everything(visit: Visit) -> None:
    page = visit.open("attacks.html#letter=Q&sort=999&q=&nonsense=%3Cscript%3E")
    assert len(shown(page)) == ATTACKS
    assert len(shown(visit.open("attacks.html#sort=abc"))) == ATTACKS


def test_a_deep_link_to_a_row_shows_that_row(visit: Visit) -> None:
    page = visit.open("attacks.html#gifd")
    assert len(shown(page)) == ATTACKS
    expect(page.locator("#gifd")).to_be_in_viewport()


def test_defenses_are_filtered_by_what_they_hold_against(visit: Visit) -> None:
    page = visit.open("defenses.html")
    page.get_by_label("Holds against").select_option("H")
    assert set(shown(page)) == {
        d.key for d in catalogue.defenses() if d.stance_against("H") == "holds"
    }
    page.get_by_label("Holds against").select_option("")
    page.get_by_label("Fails against").select_option("D")
    expected = {d.key for d in catalogue.defenses() if d.stance_against("D") == "fails"}
    assert set(shown(page)) == expected


def test_measured_colours_stand_beside_the_printed_ones(visit: Visit) -> None:
    page = visit.open("defenses.html")
    cell = page.locator('#soteria [data-label="B"] .stance')
    expect(cell.locator(".printed")).to_have_class("printed holds")
    expect(cell.locator(".measured")).to_have_class("measured fails")
    expect(cell).to_contain_text("printed holds, measured fails")
    other = page.locator('#soteria [data-label="C"] .measured')
    expect(other).to_have_class("measured unknown")


def test_formulas_are_set_by_the_browser(visit: Visit) -> None:
    page = visit.open("attacks/inverting_gradients.html")
    formula = page.locator(".math math").first
    expect(formula).to_be_visible()
    box = formula.locator("mfrac").first.bounding_box()
    assert box is not None and box["height"] > 20  # a fraction stands on two lines
    assert "\\frac" not in page.locator(".prose").inner_text()


def test_the_measured_figure_stands_beside_the_printed_facts(visit: Visit) -> None:
    page = visit.open("defenses.html")
    cell = page.locator('#soteria [data-label="Measured"]')
    expect(cell).to_contain_text("24.5 dB")
    expect(cell.locator(".figure")).to_have_attribute(
        "title", "worst attack at prune = 0.4, test accuracy 90%"
    )


def test_curves_are_drawn_with_names_and_markers(visit: Visit) -> None:
    page = visit.open("defenses/soteria.html")
    drawing = page.get_by_role("img", name="Soteria: PSNR that attacks reach")
    expect(drawing).to_be_visible()
    assert drawing.locator("g > title").count() == 3
    assert page.locator(".legend li").all_inner_texts() == ["worst for each victim"]
    page = visit.open("measured.html")
    assert page.locator("figure.chart").count() == 2
    expect(page.get_by_role("img", name="small: PSNR of the best iterate")).to_be_visible()


def test_victims_and_what_came_out_are_seen(visit: Visit) -> None:
    page = visit.open("attacks/dlg.html")
    image = page.get_by_role("img", name="4 victims above, what DLG made of each below")
    expect(image).to_be_visible()
    assert image.evaluate("image => image.complete && image.naturalWidth > 0")
    expect(page.locator(".victims figcaption")).to_contain_text("study s, <one>")
    cells = page.locator(".victims + .scroll tbody tr").first.locator("td").all_inner_texts()
    assert cells[:3] == ["100.0"] * 3 and cells[3].endswith("(nothing)")


def lit(page: Page) -> set[str]:
    return set(
        page.locator("[data-attack].on").evaluate_all("items => items.map(i => i.dataset.attack)")
    )


def standing(page: Page) -> set[str]:
    return set(
        page.locator("[data-defense].holds").evaluate_all(
            "items => items.map(i => i.dataset.defense)"
        )
    )


def expected(letters: str) -> tuple[set[str], set[str]]:
    attacks = {key for letter in letters for key in of_letter(letter)}
    defenses = {
        d.key
        for d in catalogue.defenses()
        if all(d.stance_against(letter) == "holds" for letter in letters)
    }
    return attacks, defenses


def test_the_switches_light_up_what_the_knowledge_gives(visit: Visit) -> None:
    page = visit.open("index.html")
    assert (lit(page), standing(page)) == expected("A")
    page.get_by_role("switch", name="Basic Knowledge").check()
    assert (lit(page), standing(page)) == expected("AB")
    page.get_by_role("switch", name="Training Details").check()
    page.get_by_role("switch", name="Active Manipulation").check()
    assert (lit(page), standing(page)) == expected("ABCF")
    expect(page.locator("#verdict")).to_contain_text("This is F, the Active Manipulator")
    page.get_by_role("switch", name="Surrogate Data").check()
    page.get_by_role("switch", name="Client Data Distribution").check()
    assert (lit(page), standing(page)) == expected("ABCDEFG")
    expect(page.locator("#verdict")).to_contain_text("No letter of its own")
    page.get_by_role("switch", name="Model Updates").uncheck()
    assert lit(page) == set()
    expect(page.locator("#verdict")).to_contain_text("nothing to invert")


@pytest.mark.parametrize(
    ("letter", "contained"), [("E", "ABCDE"), ("F", "ABCF"), ("G", "ABCDFG"), ("H", "ABCDFGH")]
)
def test_a_preset_is_its_threat_model(visit: Visit, letter: str, contained: str) -> None:
    page = visit.open("index.html")
    page.get_by_role("button", name=letter, exact=True).click()
    assert (lit(page), standing(page)) == expected(contained)
    expect(page.get_by_role("button", name=letter, exact=True)).to_have_attribute(
        "aria-pressed", "true"
    )
    again = visit.open("index.html#" + page.url.partition("#")[2])
    assert lit(again) == expected(contained)[0]


def test_measured_colours_drive_the_switches_too(visit: Visit) -> None:
    page = visit.open("index.html#knows=updates&colours=measured")
    assert standing(page) == {"soteria"}
    page.get_by_role("switch", name="Basic Knowledge").check()
    assert standing(page) == set()
    expect(page.locator('[data-defense="soteria"]')).to_contain_text("fails")
    expect(page.locator('[data-defense="censor"]')).to_contain_text("not measured")


def test_the_keyboard_reaches_everything_in_reading_order(visit: Visit) -> None:
    page = visit.open("index.html")
    page.keyboard.press("Tab")
    expect(page.get_by_text("Skip to content")).to_be_focused()
    page.keyboard.press("Enter")
    expect(page.locator("main")).to_be_focused()
    page.keyboard.press("Tab")
    first = page.get_by_role("switch", name="Model Updates")
    expect(first).to_be_focused()
    page.keyboard.press("Tab")
    page.keyboard.press("Space")
    expect(page.get_by_role("switch", name="Basic Knowledge")).to_be_checked()
    assert lit(page) == expected("AB")[0]
    seen: list[float] = []
    for _ in range(12):
        page.keyboard.press("Tab")
        seen.append(page.evaluate("document.activeElement.getBoundingClientRect().top + scrollY"))
    assert seen == sorted(seen)


def test_focus_is_visible(visit: Visit) -> None:
    page = visit.open("attacks.html")
    for _ in range(6):
        page.keyboard.press("Tab")
        assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"


def test_every_control_has_a_name(visit: Visit) -> None:
    for name in PAGES:
        page = visit.open(name)
        for role in ("button", "link", "combobox", "searchbox", "switch", "columnheader"):
            for control in page.get_by_role(role).all():
                assert (
                    control.inner_text()
                    or control.get_attribute("aria-label")
                    or (control.evaluate("e => e.labels && e.labels.length > 0"))
                ), (name, role, control.evaluate("e => e.outerHTML"))


def test_tables_keep_their_meaning_for_a_screen_reader(visit: Visit) -> None:
    visit.page.set_viewport_size({"width": 390, "height": 844})
    page = visit.open("attacks.html")
    assert page.get_by_role("table").count() == 1
    assert page.get_by_role("rowheader").count() == ATTACKS
    assert page.get_by_role("table").get_by_role("cell").count() == ATTACKS * 11


def test_the_theme_is_switched_and_kept(visit: Visit) -> None:
    page = visit.open("index.html")
    light = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.get_by_role("button", name="Switch to dark colours").click()
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark != light
    page = visit.open("attacks/dlg.html")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == dark
    page.get_by_role("button", name="Switch to light colours").click()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == light


def test_the_theme_follows_the_machine(visit: Visit) -> None:
    visit.page.emulate_media(color_scheme="dark")
    page = visit.open("index.html")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(20, 22, 27)"


def test_citations_are_copied(visit: Visit) -> None:
    page = visit.open("attacks/rgap.html")
    page.context.grant_permissions(["clipboard-read", "clipboard-write"])
    page.get_by_role("button", name="Copy BibTeX").click()
    expect(page.get_by_text("Copied", exact=True)).to_be_visible()
    text = page.evaluate("navigator.clipboard.readText()")
    assert text.startswith("@inproceedings{zhu2021rgap,")
    assert "2010.07733" in text


def test_citations_are_copied_where_the_clipboard_is_refused(visit: Visit) -> None:
    visit.page.add_init_script("Object.defineProperty(navigator, 'clipboard', {value: undefined})")
    page = visit.open("references.html")
    page.get_by_role("button", name="Copy BibTeX of reference 45").click()
    expect(page.locator("#announce")).to_have_text("BibTeX copied")


def test_without_script_every_row_can_be_read(chromium: Browser, built: Path) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto((built / "attacks.html").as_uri())
    assert page.locator("#table tbody tr").count() == ATTACKS
    assert page.locator("form.filters").is_hidden()
    context.close()
