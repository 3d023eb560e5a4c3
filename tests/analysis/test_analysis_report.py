from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from runs_table import run_row, runs_of
from synthetic_store import SCRIPT_NAME

from analysis import answers, figures, load, paper, pareto, report, stats, tables
from analysis.interactive import panel_figure
from analysis.report import find, summary_text, write_report
from analysis.style import FRONT_COLOR, heat_color, looks
from analysis.tables import MAX_WIDTH, as_csv, as_latex, as_markdown, as_text

METRIC = "val/acc_worst"
NAN = math.nan
FILES = {
    *("report.html", "front.html", "front.csv", "front.png", "front.svg", "front.pdf"),
    *("answer.md", "cells.csv", "table.csv", "table.md", "table.tex", "recommended.json"),
}


class Page(HTMLParser):
    """Collects start tags and the text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.open = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self.open = tag

    def handle_endtag(self, tag: str) -> None:
        self.open = ""

    def handle_data(self, data: str) -> None:
        if self.open not in ("script", "style"):
            self.text += data


@pytest.fixture(scope="session")
def out(small, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    write_report(find(small, sweep="small & <b>", metric=METRIC), folder)
    return folder


@pytest.fixture(scope="session", params=["report.html", "front.html"])
def page(request, out) -> Page:
    return Page((out / request.param).read_text())


def test_every_file_is_written(out):
    assert {path.name for path in out.iterdir()} == FILES
    assert (out / "report.html").stat().st_size < 8_000_000


def test_a_page_loads_nothing(page):
    for tag, attrs in page.tags:
        for name in ("src", "href", "srcset", "poster", "data"):
            value = attrs.get(name) or "#"
            assert value.startswith(("#", "data:")), (tag, name, value[:80])
    policy = next(a["content"] for t, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy is not None
    assert "default-src 'none'" in policy
    assert "http" not in policy


def test_styles_import_nothing(out):
    style = re.search(r"<style>(.*?)</style>", (out / "report.html").read_text(), re.S)
    assert style
    assert "url(" not in style[1]
    assert "@import" not in style[1]


def test_names_are_text_and_never_markup(page, out):
    assert sum(tag == "b" for tag, _ in page.tags) == 0
    assert "small & <b>" in page.text
    for name in ("report.html", "front.html"):
        assert SCRIPT_NAME not in (out / name).read_text()
    for name in ("table.md", "answer.md"):
        assert SCRIPT_NAME not in (out / name).read_text()


def test_the_report_shows_a_variant_called_like_a_script(out):
    assert SCRIPT_NAME in Page((out / "report.html").read_text()).text


def test_tables_have_headers_with_scope_and_pictures_words(out):
    page = Page((out / "report.html").read_text())
    assert all(a.get("scope") in ("col", "row") for t, a in page.tags if t == "th")
    assert all(a.get("alt") for t, a in page.tags if t == "img")
    assert all(a.get("aria-label") for t, a in page.tags if a.get("role") == "img")
    assert ("html", {"lang": "en"}) in page.tags
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(ids) == len(set(ids))
    assert {a["href"] for t, a in page.tags if t == "a"} <= {f"#{i}" for i in ids}


def test_plotly_is_embedded_once(out):
    assert (out / "report.html").read_text().count("<script>/**\n* plotly.js") == 1


def test_the_recommended_run_is_the_best_on_validation_that_fits(out, small):
    record = json.loads((out / "recommended.json").read_text())
    cells = pareto.select_cells(small, metric=METRIC)
    quantised = cells[cells["budget_bits"].notna()]
    (setting,) = record["settings"]
    assert set(setting["budgets"]) == {"1", "2", "4", "8"}
    for budget, item in setting["budgets"].items():
        fitting = quantised[quantised["bits/mean_weight"] <= float(budget)]
        assert item["value"] == fitting[METRIC].max()
        assert item["run_id"] in set(fitting["run_id"])
        assert METRIC in item["reason"]


def test_front_csv_holds_every_point_and_marks_the_front(out):
    points = pd.read_csv(out / "front.csv")
    assert points["on_front"].any()
    assert points["run_ids"].notna().all()


def five_seeds() -> pd.DataFrame:
    rng = np.random.default_rng(1)
    rows = [run_row("fp32", NAN, s, 0.86) for s in range(5)]
    for seed in range(5):
        rows += [run_row(v, 1, seed, x + rng.normal(0, 0.001)) for v, x in (("baq", 0.85), ("static", 0.80))]
    return runs_of(*rows)


def sentences(runs: pd.DataFrame) -> str:
    return summary_text(find(runs, sweep="s", metric=METRIC))


def test_the_headline_says_better_where_five_seeds_show_it():
    text = sentences(five_seeds())
    assert "At 1 bit per weight, baq serves the worst group best: 84." in text
    assert "5 seeds" in text
    assert "below full precision" in text
    assert "Better than static" in text


def test_the_headline_is_honest_about_one_seed():
    group = {"test/acc_group/male": 0.84, "test/count_group/male": 50.0}
    text = sentences(runs_of(run_row("baq", 1, 0, 0.85, **group), run_row("static", 1, 0, 0.80, **group)))
    assert "cannot be told: 1 common seed, 5 are needed" in text
    assert "One seed: the order may be chance. The worst group (male) has 50 test images" in text
    assert "interval" not in text


def test_the_headline_names_the_nearest_of_many():
    rows = [run_row(f"v{rank:02}", 1, 0, 0.90 - rank / 100) for rank in range(12)]
    text = sentences(runs_of(*rows))
    assert "Whether that beats v01 (+1.0 points), v02 (+2.0 points)," in text
    assert "v06 (+6.0 points) and 5 others cannot be told" in text


def test_the_headline_says_where_test_data_disagree():
    text = sentences(runs_of(run_row("a", 1, 0, 0.85), run_row("b", 1, 0, 0.80, **{"test/acc_worst": 0.9})))
    assert "on test data b (90.0 %) came out ahead" in text


def test_the_headline_names_unequal_seeds():
    text = sentences(runs_of(*[run_row("a", 1, s, 0.85) for s in (0, 1)], run_row("b", 1, 0, 0.80)))
    assert "Not all variants finished the same seeds" in text


def test_the_headline_takes_the_smallest_budget_that_costs_little():
    fp32 = run_row("fp32", NAN, 0, 0.85)
    text = sentences(runs_of(fp32, *[run_row("a", bits, 0, 0.80 + bits / 100) for bits in (1, 3, 4, 5)]))
    assert "At 3 bits per weight" in text and "No budget" not in text


def test_the_headline_says_that_every_budget_costs_much_and_takes_the_best():
    fp32 = run_row("fp32", NAN, 0, 0.85)
    text = sentences(runs_of(fp32, *[run_row("a", bits, 0, 0.60 + bits / 100) for bits in (1, 8, 4)]))
    assert "At 8 bits per weight" in text
    assert "No budget comes within 2 points of the best val/acc_worst" in text


def test_the_headline_compares_with_full_precision_over_the_same_seeds_alone():
    fp32 = [run_row("fp32", NAN, s, v) for s, v in enumerate((0.9, 0.9, 0.6))]
    text = sentences(runs_of(*fp32, *[run_row("a", 1, s, 0.9) for s in (0, 1)]))
    assert "full precision." not in text and "(fp32 3 and a 2)" in text
    text = sentences(runs_of(*fp32[:2], *[run_row("a", 1, s, 0.9) for s in (0, 1)]))
    assert "0.0 points above full precision." in text


def test_full_precision_alone_gives_a_report_and_no_answer(tmp_path):
    findings = find(runs_of(run_row("fp32", NAN, 0, 0.9)), sweep="s", metric=METRIC)
    assert "nothing to compare yet" in summary_text(findings)
    assert len(write_report(findings, tmp_path)) == len(FILES)


def test_missing_test_figures_are_dashes_and_no_crash(tmp_path):
    gone = {"test/acc_worst": NAN, "size/packed_bytes": NAN, "time/total_s": NAN}
    runs = runs_of(run_row("baq", 1, 0, 0.8, **gone), run_row("static", 1, 0, 0.7))
    findings = find(runs, sweep="s", metric=METRIC)
    write_report(findings, tmp_path)
    assert "–" in as_text(findings.points)
    assert "nan" not in Page((tmp_path / "report.html").read_text()).text.lower().replace("finance", "")


def recommended_table(folder: Path) -> tuple[list[str], list[str]]:
    """Heads and first row of the table of recommended runs."""
    page = (folder / "report.html").read_text()
    table = page.split("Recommended run under each budget</h3>")[1].split("</table>")[0]
    first = table.split("<tbody>")[1].split("</tr>")[0]
    return re.findall(r"<th scope=\"col\".*?>(.*?)</th>", table), re.findall(r"<t[hd].*?>(.*?)</t[hd]>", first)


@pytest.mark.parametrize(("metric", "has_interval"), [("acc_worst", True), ("balanced_acc_worst", False)])
def test_recommended_runs_show_the_metric_that_chose_on_both_kinds_of_data(tmp_path, metric, has_interval):
    counts = {f"test/count_group/{name}": 100.0 for name in "ab"}
    groups = {"test/acc_group/a": 0.75, "test/acc_group/b": 0.8} | counts
    figures_of = {"test/acc_worst": 0.75, "val/balanced_acc_worst": 0.625, "test/balanced_acc_worst": 0.5}
    runs = runs_of(run_row("baq", 1, 0, 0.875, **groups, **figures_of))
    write_report(find(runs, sweep="s", metric=f"val/{metric}"), tmp_path)
    heads, cells = recommended_table(tmp_path)
    row = dict(zip(heads, cells, strict=True))
    assert (row[f"val/{metric} %"], row[f"test/{metric} %"]) == (
        ("87.5", "75.0") if metric == "acc_worst" else ("62.5", "50.0")
    )
    assert ("95 % over test images" in row) == has_interval
    assert not has_interval or re.fullmatch(r"6\d\.\d to 8\d\.\d", row["95 % over test images"])
    page = (tmp_path / "report.html").read_text()
    assert ("bootstrap over test images" in page) == has_interval


def test_the_text_table_fits_the_terminal(small):
    runs = small.assign(variant=small["variant"] + "-with-a-name-that-goes-on-and-on-and-on-and-on-and-on")
    lines = as_text(find(runs, sweep="s", metric=METRIC).points).splitlines()
    assert max(map(len, lines)) <= MAX_WIDTH


def test_tables_agree_in_every_format(small):
    points = find(small, sweep="s", metric=METRIC).points
    assert as_markdown(points).count("\n|") == len(points) + 2
    assert len(as_csv(points).splitlines()) == len(points) + 1
    assert as_latex(points).count(r"\\") == len(points) + 1
    assert r"\_" in as_latex(points.assign(variant="a_b"))


def test_what_plus_minus_and_bars_mean_is_said_where_they_are_shown(tmp_path):
    points = find(five_seeds(), sweep="s", metric=METRIC).points
    for table in (as_text(points), as_markdown(points)):
        assert table.rstrip().endswith("\n\n± is half of the 95 % t interval over seeds.")
    said = r"resnet18; test data; $\pm$ half of the 95 \% t interval over seeds.}"
    assert said in as_latex(points)
    assert "± is half of the 95 % t interval over seeds" in paper.as_markdown(points, metric=METRIC)
    (page,) = (
        path
        for path in write_report(find(five_seeds(), sweep="s", metric=METRIC), tmp_path)
        if path.name == "front.html"
    )
    assert "bars their 95 % intervals" in page.read_text()
    one_seed = points.assign(**{"test/acc_worst:low": NAN, "test/acc_worst:high": NAN})
    assert "±" not in as_text(one_seed) + as_markdown(one_seed)
    assert "resnet18; test data.}" in as_latex(one_seed)


def test_a_front_of_one_point_is_seen():
    rows = [run_row("baq", 1, seed, 0.9) for seed in (0, 1)] + [
        run_row("static", 2, seed, 0.5) for seed in (0, 1)
    ]
    points = find(runs_of(*rows), sweep="s", metric=METRIC).points
    assert points["on_front"].sum() == 1
    (axis,) = figures.front_figure(points, metric=METRIC).axes
    (front,) = (line for line in axis.lines if line.get_color() == FRONT_COLOR)
    assert len(front.get_xdata()) == 1 and front.get_marker() == "o"
    trace = next(
        t
        for t in panel_figure(points, metric=METRIC, all_variants=["baq", "static"]).data
        if t.name.startswith("front")
    )
    assert len(trace.x) == 1 and "markers" in trace.mode


def test_the_same_figure_gives_the_same_file(small):
    points = find(small, sweep="s", metric=METRIC).points
    first, second = (figures.figure_bytes(figures.front_figure(points, metric=METRIC), "svg") for _ in range(2))
    assert first == second


def test_names_with_dollars_are_text_in_figures(small):
    points = find(small.assign(variant="$x_1"), sweep="s", metric=METRIC).points
    assert figures.figure_bytes(figures.front_figure(points, metric=METRIC), "svg")


@pytest.mark.parametrize("name", ["a", "static, importance gradient", "W" * 30])
def test_the_legend_lies_within_the_figure(small, name: str):
    points = find(small.assign(variant=name + small["variant"]), sweep="s", metric=METRIC).points
    figure = figures.front_figure(points, metric=METRIC)
    figure.draw_without_rendering()
    (legend,) = figure.legends
    box, whole = legend.get_window_extent(), figure.bbox
    assert whole.x0 <= box.x0 and box.x1 <= whole.x1


def test_variants_look_different():
    found = list(looks(f"v{i}" for i in range(88)).values())
    assert len({(look.color, look.marker) for look in found}) == 88
    assert len({look.color for look in found[:11]}) == 11


def test_heat_map_text_has_contrast_everywhere():
    def luminance(color: str) -> float:
        values = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in values]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    for share in np.linspace(0, 1, 50):
        dark, light = sorted(luminance(c) for c in heat_color(share))
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize("module", [load, pareto, stats, tables, figures, answers, report])
def test_every_script_has_help(module, capsys):
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out


@pytest.mark.parametrize("module", [load, pareto, stats, tables, figures, answers, report])
def test_every_script_runs_from_a_csv_and_refuses_bad_input(module, small_csv, tmp_path, capsys):
    out = ["--out", str(tmp_path / "x")] if module in (load, figures, report) else []
    assert module.main(["--csv", str(small_csv), *out]) == 0
    assert module.main(["--csv", "nowhere.csv", *out]) == 2
    assert "there is no file 'nowhere.csv'" in capsys.readouterr().err


def test_a_source_is_needed(capsys):
    assert report.main(["--out", "x"]) == 2
    assert "--tracking-uri and --sweep, or --csv" in capsys.readouterr().err
