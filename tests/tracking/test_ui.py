"""``fqsweep ui`` in a real browser: runs, charts, comparison, artifacts, and the report within it."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import quote

import pytest

from analysis.mlflow_runs import load_runs
from analysis.report import find, write_report
from fqsweep.files import SweepPaths
from fqsweep.main import main
from fqsweep.names import RUN_PARAMS, metric_keys
from fqsweep.pictures import draw_bits
from fqsweep.results import TrialResult
from fqsweep.tracking.publishing import publish_report
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import open_tracker
from tests.browser import Browser, browser
from tests.tracking.tracking_stores import free_port, wait_until_up

PROJECT = Path(__file__).resolve().parents[2]
# What the UI of MLflow complains about of itself: no accounts are set up, and a note of the browser on its layout.
OWN_COMPLAINTS = ("/mlflow/users/current", "ResizeObserver loop")


def test_a_server_shows_its_own_ui_and_its_password_is_not_repeated(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--tracking-uri", "http://me:secret@127.0.0.1:9"]) == 0
    assert "MLflow UI: http://127.0.0.1:9 " in capsys.readouterr().out


def test_a_folder_without_a_sweep_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["ui", "--out", str(tmp_path)]) == 2
    assert "holds no MLflow database" in capsys.readouterr().err


@dataclass(frozen=True)
class Shown:
    """A sweep's UI: its address, parent run, child runs, and the experiment they are in."""

    address: str
    parent: str
    children: list[str]
    experiment: str


def trial(method: str, seed: int) -> TrialResult:
    params = dict.fromkeys(RUN_PARAMS, "none") | {"method": method, "variant": method, "seed": str(seed)}
    params |= {"dataset": "skin", "group_attribute": "sex", "architecture": "resnet18", "budget_bits": "1"}
    metrics = dict.fromkeys(metric_keys(), 0.8 + 0.01 * seed + 0.02 * (method == "baq")) | {
        "bits/mean_weight": 1.0
    }
    history = [{"train/loss": 1.0 - 0.1 * epoch, "val/acc_worst": 0.1 * epoch} for epoch in range(4)]
    return TrialResult(
        key=f"{method}-{seed}",
        title=f"{method} {seed}",
        params=params,
        weights={},
        metrics=metrics,
        history=history,
    )


@pytest.fixture(scope="module")
def shown(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shown]:
    paths = SweepPaths(tmp_path_factory.mktemp("ui") / "out")
    paths.out.mkdir()
    (paths.out / "space.yaml").write_text("name: seen")
    uri = default_uri(paths)
    facts = {"data/skin/abc": "0123" * 16}
    book = open_tracker(uri, paths=paths, sweep="seen", space_file=paths.out / "space.yaml", facts=facts)
    row = {"layer": "conv1", "units": 8, "mean_bits": 1.0, **{f"units_at_{b}": 8 * (b == 1) for b in range(9)}}
    (paths.out / "bits.png").write_bytes(draw_bits([row, row], title="bits"))
    (paths.out / "confusion.csv").write_text(
        "split,group,true_class,predicted_class,images\ntest,male,naevus,acne,3\n"
    )
    files = [paths.out / "bits.png", paths.out / "confusion.csv"]
    children = [book.log_trial(trial(m, s), files) for m in ("static", "baq") for s in (0, 1)]
    book.log_numbers({"system/cpu_utilization_percentage": 50.0})
    write_report(find(load_runs(uri, "seen"), sweep="seen", metric="val/acc_worst"), paths.report)
    publish_report(uri, book.parent_id, paths.report)
    book.end(done=True)
    with ui_of(paths) as address:
        yield Shown(address, book.parent_id, [str(child) for child in children], book.experiment_id)


def ui_of(paths: SweepPaths):
    """The UI as the command opens it, on the port after one that is taken."""
    import contextlib

    @contextlib.contextmanager
    def running() -> Iterator[str]:
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", free_port()))
            taken.listen()
            port = taken.getsockname()[1]
            command = [sys.executable, "-m", "fqsweep.main", "ui", "--out", str(paths.out), "--port", str(port)]
            log = paths.out / "ui.log"
            with log.open("w") as stream:
                environment = os.environ | {"PYTHONPATH": str(PROJECT)}
                process = subprocess.Popen(command, stdout=stream, stderr=stream, env=environment)
            try:
                address = f"http://127.0.0.1:{port + 1}"
                wait_until_up(address, process, log=log)
                assert f"MLflow UI: {address} " in log.read_text()
                yield address
            finally:
                process.send_signal(signal.SIGTERM)
                process.wait(timeout=30)

    return running()


@pytest.fixture(scope="module")
def page(shown: Shown, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with browser(tmp_path_factory.mktemp("profile"), width=1500, height=1000) as opened:
        yield opened
        assert opened.requests_elsewhere() == []


def visit(page: Browser, shown: Shown, place: str, *, until: str) -> None:
    """Open a page of the UI and wait until it shows a text; its only complaints are MLflow's own."""
    page.open("about:blank")  # a new hash alone would not load the page anew
    page.open(f"{shown.address}/#/{place}")
    page.wait(f"return document.body.innerText.includes({json.dumps(until)})")
    found = [text for text in page.complaints() if not any(own in text for own in OWN_COMPLAINTS)]
    assert found == []


@pytest.mark.browser
@pytest.mark.slow
class TestTheUi:
    # The UI counts, and shows, the parent of what it finds.
    def test_filters_by_tag_find_the_recommended_runs(self, page: Browser, shown: Shown) -> None:
        query = quote("tags.recommended = 'true'")
        visit(page, shown, f"experiments/{shown.experiment}/runs?searchFilter={query}", until="2 matching runs")

    def test_the_parent_run_shows_answer_data_and_children(self, page: Browser, shown: Shown) -> None:
        visit(page, shown, f"experiments/{shown.experiment}/runs/{shown.parent}", until="Child runs")
        page.wait("return document.body.innerText.includes('serves the worst group best')")
        for text in ("baq 1", "static 0", "skin", "fqsweep"):
            assert text in page.text()

    def test_the_machine_is_among_the_system_metrics(self, page: Browser, shown: Shown) -> None:
        place = f"experiments/{shown.experiment}/runs/{shown.parent}/system-metrics"
        visit(page, shown, place, until="cpu_utilization_percentage")

    def test_the_report_opens_among_the_artifacts_and_can_be_used(self, page: Browser, shown: Shown) -> None:
        place = f"experiments/{shown.experiment}/runs/{shown.parent}/artifacts/report.html"
        visit(page, shown, place, until="recommended.json")
        page.wait("return document.querySelector('iframe') !== null")
        page.driver.switch_to.frame(page.driver.find_element("css selector", "iframe"))
        try:
            page.wait("return document.querySelectorAll('.main-svg').length > 0")
            page.click("input[value=val]")
            assert "which model serves the worst group best?" in page.text()
        finally:
            page.driver.switch_to.default_content()

    def test_a_childs_curves_are_drawn(self, page: Browser, shown: Shown) -> None:
        place = f"experiments/{shown.experiment}/runs/{shown.children[0]}/model-metrics"
        visit(page, shown, place, until="epoch/train")
        page.wait("return document.querySelectorAll('.main-svg').length > 0")

    @pytest.mark.parametrize(("file", "sign"), [("bits.png", "img"), ("confusion.csv", "naevus")])
    def test_a_childs_pictures_and_tables_are_shown(
        self, page: Browser, shown: Shown, file: str, sign: str
    ) -> None:
        place = f"experiments/{shown.experiment}/runs/{shown.children[0]}/artifacts/{file}"
        visit(page, shown, place, until="confusion.csv")
        if sign == "img":
            page.wait("return [...document.images].some(i => i.naturalWidth > 500)")
        else:
            page.wait(f"return document.body.innerText.includes({json.dumps(sign)})")

    def test_runs_are_compared_with_every_parameter(self, page: Browser, shown: Shown) -> None:
        runs, experiments = (quote(json.dumps(each)) for each in (shown.children, [shown.experiment]))
        visit(page, shown, f"compare-runs?runs={runs}&experiments={experiments}", until="Comparing 4 Runs")
        page.wait("return document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
        page.wait("return document.body.innerText.includes('test/acc_worst')")
        page.run(
            "[...document.querySelectorAll('[role=tab]')].find(t => t.textContent === 'Scatter Plot').click()"
        )

    def test_charts_over_runs_are_drawn(self, page: Browser, shown: Shown) -> None:
        query = quote("tags.`fqsweep.kind` = 'trial'")
        place = f"experiments/{shown.experiment}/runs?searchFilter={query}&compareRunsMode=CHART"
        visit(page, shown, place, until="5 matching runs")
        page.wait("return document.querySelectorAll('.js-plotly-plot .main-svg').length > 0")
