"""A built site and a real Chromium to open it in."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch
from playwright.sync_api import Browser, Page, expect, sync_playwright

from leakatlas import metrics
from leakatlas import site as leakatlas_site
from leakatlas.bench import picture

INSTALL = "apt-get update && apt-get install --yes --no-install-recommends chromium"
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


PATIENCE = 300_000.0
"""Milliseconds that a page may take on a busy machine; what never comes is a failure after them."""

expect.set_options(timeout=PATIENCE)


@pytest.fixture(scope="session")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two measured colours and a curve of Soteria, and one benchmark over time."""
    folder = tmp_path_factory.mktemp("results")
    measures: list[dict[str, object]] = [
        {"name": "success_rate", "value": value, "interval": [0.0, 1.0], "n": 32, "letter": letter}
        for letter, value in (("A", 0.01), ("B", 0.9))
    ]
    for knob, accuracy, psnr in (("0", 0.95, 30.0), ("0.4", 0.9, 24.5), ("0.8", 0.8, 12.0)):
        measures += [
            {"name": f"test accuracy [prune={knob}]", "value": accuracy, "unit": "share",
             "interval": None, "n": 1},
            {"name": f"PSNR, worst attack per victim [prune={knob}]", "value": psnr, "unit": "dB",
             "interval": [psnr - 1, psnr + 1], "n": 32},
        ]  # fmt: skip
    curves = {
        name: {"seconds": [1.0, 10.0, 100.0 * factor], "psnr": [10.0, 12.0, 20.0 * factor]}
        for name, factor in (("published", 1.0), ("<tuned>", 0.5))
    }
    benchmark = {
        "schema": "leakatlas/result/1", "kind": "benchmark", "key": "quality", "code_version": 1,
        "recipe": {"curves": {"small": curves}}, "hardware": "2 CPU cores", "seeds": [0],
        "measures": [{"name": "x", "value": 1.0, "interval": None, "n": 1}],
        "command": "leakatlas bench quality", "date": "2026-01-31",
    }  # fmt: skip
    shades = torch.linspace(0, 1, 4)[:, None, None, None].expand(4, 3, 8, 8)
    scores = metrics.score(shades[:3], shades, public=shades[1:3]).images
    columns = picture.columns(shades, shades[:3], scores)
    picture.save(folder / "pictures" / "dlg.png", columns, study="s", case="<one>")
    (folder / "quality.json").write_text(json.dumps(benchmark), encoding="utf-8")
    document = {
        "schema": "leakatlas/result/1",
        "kind": "defense",
        "key": "soteria",
        "code_version": 1,
        "recipe": {"attack": {"key": "inverting_gradients"}},
        "hardware": "2 CPU cores",
        "seeds": [0],
        "measures": measures,
        "command": "leakatlas bench <study> & more",
        "date": "2026-01-31",
    }
    points = {"none": (0.0, 1.0, "search recovered most")}
    points["clipping, max_norm=1"] = (0.2, 1.0, "search recovered most; dominated")
    points["client_dp, noise_multiplier=0.1"] = (0.9, 0.25, "<search> recovered most")
    points["client_dp, noise_multiplier=1"] = (12.0, 0.0, "search recovered most")
    frontier = [
        {"name": f"{what} | fresh | {name}", "value": value, "interval": [value, value], "n": 4,
         "unit": unit, "note": note}
        for name, (loss, recovered, note) in points.items()
        for what, value, unit in (("recovered", recovered, ""), ("loss", loss, "points"))
    ]  # fmt: skip
    for what, value, unit, strength in (
        ("private", 0.25, "", "0.1"), ("price", 12.0, "points", "1"),
    ):  # fmt: skip
        frontier.append(
            {"name": f"{what} | fresh | client_dp", "value": value, "interval": [value, value],
             "n": 4, "unit": unit, "note": f"at client_dp, noise_multiplier={strength}"}
        )  # fmt: skip
    frontier += [
        {"name": "level | fresh | client_dp, noise_multiplier=1 | with its secret", "value": 0.75,
         "interval": [0.3, 0.9], "n": 4, "note": "C, server; a bound"},
        {"name": "untried | fresh | odd, k=1", "value": 2.0, "interval": [2.0, 2.0], "n": 2,
         "note": "no <key>"},
        {"name": "unmeasured | fresh | trap <weights>", "value": 3.0, "interval": [3.0, 3.0],
         "n": 4, "note": "odd, k=1 (3 of 4)"},
        {"name": "colour | C | clipping", "value": 1.0, "interval": [0.4, 1.0], "n": 4,
         "note": "<search> (C, server) on fresh, at clipping, max_norm=1"},
    ]  # fmt: skip
    whole = {**benchmark, "key": "frontier", "recipe": {"axes": ["defense"]}, "measures": frontier}
    (folder / "frontier.json").write_text(json.dumps(whole), encoding="utf-8")
    (folder / "soteria.json").write_text(json.dumps(document), encoding="utf-8")
    return folder


@pytest.fixture(scope="session")
def built(tmp_path_factory: pytest.TempPathFactory, measured: Path) -> Path:
    """The folder of a built site."""
    out = tmp_path_factory.mktemp("site")
    leakatlas_site.build(out, results_folder=measured)
    return out


@pytest.fixture(scope="session")
def chromium() -> Iterator[Browser]:
    """One headless Chromium for all tests."""
    path = next((found for name in NAMES if (found := shutil.which(name))), None)
    if path is None:
        pytest.fail(f"No Chromium on this machine. Install it: {INSTALL}", pytrace=False)
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, headless=True, args=arguments)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A page under watch.

    Args:
        page: The browser's page.
        folder: The site.
        complaints: Console messages, page errors, and requests that left the folder.
    """

    page: Page
    folder: Path
    complaints: list[str] = field(default_factory=list)

    def open(self, name: str) -> Page:
        """Load a page of the site from its folder."""
        path, _, fragment = name.partition("#")
        address = (self.folder / path).as_uri() + (f"#{fragment}" if fragment else "")
        self.page.goto("about:blank")
        self.page.goto(address)
        return self.page

    def watch(self) -> None:
        """Write down everything that should not happen."""
        inside = self.folder.as_uri() + "/"
        self.page.on("console", lambda message: self.complaints.append(f"console: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(f"error: {error}"))
        self.page.on(
            "request",
            lambda request: (
                None
                if request.url.startswith((inside, "data:", "about:"))
                else self.complaints.append(f"request: {request.url}")
            ),
        )
        self.page.on(
            "requestfailed", lambda request: self.complaints.append(f"failed: {request.url}")
        )


@pytest.fixture(params=[{"width": 1280, "height": 900}], ids=["desktop"])
def visit(chromium: Browser, built: Path, request: pytest.FixtureRequest) -> Iterator[Visit]:
    """A fresh page; anything it complained about fails the test afterwards."""
    context = chromium.new_context(viewport=request.param, color_scheme="light")
    found = Visit(context.new_page(), built)
    found.page.set_default_timeout(PATIENCE)
    found.watch()
    yield found
    context.close()
    assert found.complaints == []
