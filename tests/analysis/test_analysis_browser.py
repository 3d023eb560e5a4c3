"""The pages in a real browser: drawn, clicked, printed, and silent on console and network."""

from __future__ import annotations

import base64
from collections.abc import Iterator
from pathlib import Path

import pytest

from analysis.report import find, write_report
from tests.browser import Browser, browser

pytestmark = pytest.mark.browser
METRIC = "val/acc_worst"
DRAWN = "return document.querySelectorAll('.plotly-graph-div .main-svg').length > 0"
SHOWN = "return JSON.stringify(document.getElementById('plot-1').data.map(t => t.y))"
WANTED = "return JSON.stringify(document.getElementById('plot-1').data.map(t => t.meta[arguments[0]].y))"
# Contrast of text against what lies behind it, as WCAG 2 defines it; elements with a lower one are returned.
LOW_CONTRAST = """
const luminance = rgb => rgb.map(v => v / 255).map(c => c <= .04045 ? c / 12.92 : ((c + .055) / 1.055) ** 2.4)
  .reduce((sum, c, i) => sum + c * [.2126, .7152, .0722][i], 0);
const parse = text => text.match(/[\\d.]+/g).map(Number);
const behind = node => { for (; node; node = node.parentElement) {
  const color = parse(getComputedStyle(node).backgroundColor); if (color.length < 4 || color[3] > 0) return color.slice(0, 3);
} return [255, 255, 255]; };
const low = [];
let seen = 0;
for (const node of document.querySelectorAll('h1,h2,h3,p,li,td,th,a,caption span,summary,label,button,legend')) {
  if (!node.textContent.trim() || !node.offsetParent) continue;
  seen += 1;
  const [a, b] = [parse(getComputedStyle(node).color).slice(0, 3), behind(node)].map(luminance).sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) low.push(node.tagName + ': ' + node.textContent.slice(0, 40));
}
return {low, seen};
"""


@pytest.fixture(scope="module")
def pages(small, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pages")
    write_report(find(small, sweep="small", metric=METRIC), folder)
    return folder


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile")) as opened:
        yield opened


def open_page(page: Browser, file: Path) -> None:
    page.prefer("light")
    page.size(1280, 900)
    page.open(file.as_uri())
    page.wait(DRAWN)


@pytest.mark.parametrize("name", ["report.html", "front.html"])
def test_the_page_draws_switches_and_asks_nobody(page: Browser, pages: Path, name: str):
    open_page(page, pages / name)
    assert page.run(SHOWN) == page.run(WANTED, "test")
    page.click("input[value=val]")
    assert page.run(SHOWN) == page.run(WANTED, "val") != page.run(WANTED, "test")
    assert page.complaints() == []
    assert page.requests_elsewhere() == []


def test_the_legend_hides_and_shows_by_keyboard(page: Browser, pages: Path):
    open_page(page, pages / "report.html")
    page.run("document.querySelector('.legend button[data-trace=\"1\"]').focus()")
    visible = "return document.getElementById('plot-1').data[1].visible"
    page.press("\ue007")  # Enter
    assert page.run(visible) is False
    page.press(" ")
    assert page.run(visible) is True


def test_hovering_names_the_runs_behind_a_marker(page: Browser, pages: Path):
    open_page(page, pages / "report.html")
    page.run("Plotly.Fx.hover('plot-1', [{curveNumber: 1, pointNumber: 0}])")
    page.wait("return document.querySelector('.hoverlayer').textContent.includes('run ')")


def test_the_tables_can_be_copied(page: Browser, pages: Path):
    open_page(page, pages / "report.html")
    page.click("#copy ~ details summary")
    page.click("#copy ~ details button.copy")
    assert page.run("return getSelection().toString()").startswith("### isic2019")
    assert page.run("return document.querySelector('button.copy').textContent") == "Copied"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_text_has_contrast(page: Browser, pages: Path, scheme: str):
    open_page(page, pages / "report.html")
    page.prefer(scheme)
    page.run("document.querySelectorAll('details').forEach(d => d.open = true)")
    found = page.run(LOW_CONTRAST)
    assert found["low"] == [] and found["seen"] > 200


@pytest.mark.parametrize("name", ["report.html", "front.html"])
def test_nothing_is_wider_than_a_phone(page: Browser, pages: Path, name: str):
    open_page(page, pages / name)
    page.size(360, 740, phone=True)
    page.wait("return document.documentElement.scrollWidth <= 360")
    page.wait("return document.querySelector('.main-svg').getBoundingClientRect().width <= 360")


def test_on_paper_the_figure_fits_and_is_dark_on_white_even_for_who_reads_in_the_dark(
    page: Browser, pages: Path
):
    open_page(page, pages / "report.html")
    page.prefer("dark")
    page.run("""window.onPaper = {}; addEventListener('beforeprint', () => Object.assign(onPaper, {
      width: document.querySelector('.main-svg').getBoundingClientRect().width,
      color: document.getElementById('plot-1').layout.font.color,
      open: document.querySelectorAll('details.paper[open]').length }))""")
    sheets = page.driver.execute_cdp_cmd("Page.printToPDF", {"printBackground": False})["data"]
    assert base64.b64decode(sheets).startswith(b"%PDF")
    seen = page.run("return onPaper")
    assert seen["width"] <= 700 and seen["color"] == "#1a1f24" and seen["open"] > 0
    assert page.run("return document.querySelectorAll('details.paper[open]').length") == 0
    assert page.run("return document.querySelector('.main-svg').getBoundingClientRect().width") > 700


def test_without_scripts_a_picture_stands_for_the_fronts(page: Browser, pages: Path):
    page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": True})
    try:
        page.open((pages / "report.html").as_uri())
        assert page.run("return document.querySelector('noscript img').naturalWidth") > 500
    finally:
        page.driver.execute_cdp_cmd("Emulation.setScriptExecutionDisabled", {"value": False})
