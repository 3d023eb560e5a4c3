"""Scripts that stand alone: the paper's table and figure, one run in the terminal, several sweeps at once."""

from __future__ import annotations

import contextlib
import importlib
import io
import json
import re
import shutil
import subprocess
import sys
import threading
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pandas as pd
import pytest
from mlflow import MlflowClient
from runs_table import run_row, runs_of
from synthetic_store import Spec, write_sweep

from analysis import (
    against,
    answers,
    effects,
    figures,
    fronts,
    load,
    mlflow_runs,
    paper,
    pareto,
    ranks,
    report,
    rules,
    show,
    stats,
    tables,
)
from analysis.effects import weight_effects
from analysis.mlflow_runs import load_layers, load_run, load_runs, load_selection
from analysis.runs import join_sweeps, load_csv
from analysis.show import run_text
from fqsweep.errors import InputError
from fqsweep.main import main as fqsweep_main
from fqsweep.names import TAG_SPACE

METRIC = "val/acc_worst"


@pytest.mark.parametrize("module", [against, effects, fronts, paper, ranks, rules])
def test_every_script_has_help_runs_from_a_csv_and_refuses_bad_input(module, small_csv, tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        module.main(["--help"])
    assert f"python -m {module.__name__}" in capsys.readouterr().out
    out = ["--out", str(tmp_path / "x")] if module is paper else []
    assert module.main(["--csv", str(small_csv), *out]) == 0
    assert capsys.readouterr().out.strip()
    assert module.main(["--csv", "nowhere.csv", *out]) == 2


def test_the_papers_table_and_figure_come_from_one_command(small_csv, tmp_path):
    assert paper.main(["--csv", str(small_csv), "--out", str(tmp_path)]) == 0
    assert {p.name for p in tmp_path.iterdir()} == {f"table.{k}" for k in ("tex", "md", "csv")} | {
        f"figure.{k}" for k in ("png", "svg", "pdf")
    }
    tex = (tmp_path / "table.tex").read_text()
    assert r"\textbf{" in tex
    assert "\\begin{tabular}" in tex
    assert len(pd.read_csv(tmp_path / "table.csv")) == tex.count(r" \\") - tex.count("multicolumn") - 1


def test_what_cannot_be_compared_is_said_and_no_share_lies_outside_0_and_100_percent(tmp_path, capsys):
    runs = [run_row("baq", 1, seed, value) for seed, value in ((0, 0.05), (1, 0.95))]
    file = tmp_path / "far_apart.csv"
    runs_of(*runs).to_csv(file, index=False)
    assert stats.main(["--csv", str(file)]) == 0
    assert capsys.readouterr().out.endswith("\n\nNo comparison: two variants must share a budget and a seed.\n")
    assert report.main(["--csv", str(file), "--out", str(tmp_path / "out")]) == 0
    assert "(95 % interval 0.0 to 100.0, 2 seeds)" in (tmp_path / "out" / "answer.md").read_text()


def test_two_sweeps_are_compared_under_their_own_names(tmp_path):
    for name, value in (("old", 0.7), ("new", 0.8)):
        runs_of(run_row("fp32", float("nan"), 0, 0.9), run_row("baq", 1, 0, value)).to_csv(
            tmp_path / f"{name}.csv", index=False
        )
    files = [tmp_path / "old.csv", tmp_path / "new.csv"]
    joined = join_sweeps({path.stem: load_csv(path) for path in files})
    assert set(joined["variant"]) == {"fp32", "baq (old)", "baq (new)"}
    arguments = [part for path in files for part in ("--csv", str(path))]
    assert report.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "baq (new) serves the worst group best" in (tmp_path / "out" / "report.html").read_text()


def test_files_of_one_name_are_called_by_their_folders(tmp_path, capsys):
    for place, value in (("a/runs", 0.7), ("b/runs", 0.8), ("other", 0.6), ("b/a/runs", 0.5)):
        (tmp_path / place).parent.mkdir(exist_ok=True)
        runs_of(run_row("baq", 1, 0, value)).to_csv(tmp_path / f"{place}.csv", index=False)
    files = [
        part for place in ("a/runs", "b/runs", "other") for part in ("--csv", str(tmp_path / f"{place}.csv"))
    ]
    assert tables.main([*files, "--format", "csv"]) == 0
    printed = capsys.readouterr().out
    assert [f"baq ({name})" in printed for name in ("a", "b", "other", "runs")] == [True, True, True, False]
    assert report.main([*files, "--out", str(tmp_path / "out")]) == 0
    assert "Report of a, b, other" in (tmp_path / "out" / "report.html").read_text()
    capsys.readouterr()
    assert tables.main([*files[:2], "--csv", str(tmp_path / "b/a/runs.csv")]) == 2
    assert "b/a/runs.csv' are called 'a': rename a file or a folder" in capsys.readouterr().err


def two_sweeps(full: tuple[float, float], **columns: tuple[str, str]) -> dict[str, pd.DataFrame]:
    """Sweeps ``old`` and ``new`` of five seeds, whose full precision has these figures."""
    frames = {}
    for i, name in enumerate(("old", "new")):
        more = {column: values[i] for column, values in columns.items()}
        rows = [run_row("fp32", float("nan"), s, full[i] + 0.001 * s**2, **more) for s in range(5)]
        rows += [run_row("baq", 1, s, 0.7 + 0.1 * i + 0.01 * s) for s in range(5)]
        frames[name] = load_frame(rows)
    return frames


@pytest.mark.parametrize(
    ("full", "columns", "is_shared"),
    [
        ((0.9, 0.9), {}, True),
        ((0.9, 0.8), {}, False),
        ((0.9, 0.899), {"key": ("same", "same")}, True),
        ((0.9, 0.8), {"key": ("one", "other")}, False),
    ],
)
def test_full_precision_of_joined_sweeps_is_one_only_where_it_is_the_same_network(full, columns, is_shared):
    joined = join_sweeps(two_sweeps(full, **columns))
    names = {"fp32"} if is_shared else {"fp32 (old)", "fp32 (new)"}
    assert set(joined["variant"]) == names | {"baq (old)", "baq (new)"}
    assert any("full-precision networks differ" in note for note in joined.attrs["notes"]) != is_shared


def test_no_sweep_is_compared_with_the_full_precision_of_another(tmp_path, capsys):
    arguments = []
    for name, frame in two_sweeps((0.9, 0.8)).items():
        frame.assign(method="none").to_csv(tmp_path / f"{name}.csv", index=False)
        arguments += ["--csv", str(tmp_path / f"{name}.csv")]
    assert against.main(arguments) == 2
    said = capsys.readouterr().err
    assert "each of the joined sweeps has its own, use 'fp32 (new)' or 'fp32 (old)'." in said
    assert against.main([*arguments, "--reference", "fp32 (new)", "--show", "acc_worst"]) == 0
    assert report.main([*arguments, "--out", str(tmp_path / "out")]) == 0
    page = (tmp_path / "out" / "report.html").read_text()
    assert "fp32 (old)" in page
    assert "full precision." not in (tmp_path / "out" / "answer.md").read_text()


def test_effects_are_those_within_cells():
    rows = [
        run_row("baq", budget, 0, level + 0.1 * weight, run_id=f"{budget}-{weight}", fairness_weight=weight)
        for budget, level in ((1, 0.3), (2, 0.8))
        for weight in (0.1, 0.5, 0.9)
    ]
    frame = load_frame(rows)
    found = weight_effects(frame, metrics=(METRIC,))
    assert found[["variant", "weight", "num_runs"]].to_numpy().tolist() == [["baq", "fairness_weight", 6]]
    assert found[METRIC].item() == pytest.approx(1.0)


def load_frame(rows: list[dict[str, object]]) -> pd.DataFrame:
    from analysis.columns import with_budget

    return with_budget(runs_of(*rows))


def test_weights_that_were_not_searched_have_no_effect():
    rows = [run_row("baq", 1, seed, 0.5, fairness_weight=0.3) for seed in range(6)]
    assert weight_effects(load_frame(rows), metrics=(METRIC,)).empty


# --- one run -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shown(store, small, tmp_path_factory) -> str:
    """A run with a bits.csv."""
    run_id = small.loc[small["variant"] == "static", "run_id"].iloc[0]
    file = tmp_path_factory.mktemp("bits") / "bits.csv"
    file.write_text("layer,units,weights_per_unit,mean_bits\nconv1,64,147,8.0\nlayer1.0.conv1,64,576,1.5\n")
    store.client.log_artifact(run_id, str(file))
    return str(run_id)


def test_a_run_is_shown_with_settings_metrics_groups_and_layers(store, shown, capsys):
    assert show.main([shown[:12], "--tracking-uri", store.uri]) == 0
    text = capsys.readouterr().out
    for part in ("variant", "static", "acc_worst", "female", "layer1.0.conv1", "1.50", "validation", "test"):
        assert part in text
    assert max(map(len, text.splitlines())) <= 130


def test_the_command_line_shows_a_run_and_refuses_one_that_is_not_there(store, shown, capsys):
    assert fqsweep_main(["show", shown, "--tracking-uri", store.uri]) == 0
    assert "layer1.0.conv1" in capsys.readouterr().out
    assert fqsweep_main(["show", "nothing", "--tracking-uri", store.uri]) == 2
    assert "there is none" in capsys.readouterr().err


def test_a_run_without_layers_says_so(store, small):
    run = load_run(store.uri, small.loc[small["variant"] == "fp32", "run_id"].iloc[0])
    assert "not recorded" in run_text(run, load_layers(store.uri, [run.run_id]))


def test_a_run_that_does_not_exist_is_refused(store):
    with pytest.raises(InputError, match=r"there is none: name its sweep's output folder .* or its store"):
        load_run(store.uri, "nothing")
    with pytest.raises(InputError, match="begin so: give more letters"):
        load_run(store.uri, "")


def test_the_report_shows_where_the_bits_went_and_links_to_runs(store, shown, tmp_path):
    options = ["--tracking-uri", store.uri, "--sweep", "small", "--out", str(tmp_path)]
    assert report.main([*options, "--ui-url", "http://127.0.0.1:7000"]) == 0
    page = (tmp_path / "report.html").read_text()
    assert f'href="http://127.0.0.1:7000/#/experiments/1/runs/{shown}"' in page
    layers = load_layers(store.uri, [shown])
    assert layers["mean_bits"].tolist() == [8.0, 1.5]


def test_a_link_must_be_of_the_web(store, tmp_path, capsys):
    options = ["--tracking-uri", store.uri, "--sweep", "small", "--out", str(tmp_path)]
    assert report.main([*options, "--ui-url", "javascript:alert(1)"]) == 2
    assert "must start with http" in capsys.readouterr().err


# --- what chooses --------------------------------------------------------------------------------

BY_AUC = "search: {objectives: [bits/mean_weight, val/eodd, val/auc_worst, val/acc_worst]}"


@pytest.fixture(scope="module")
def own_store(store, tmp_path_factory):
    """The session's store, copied: other tests list the sweeps of theirs."""
    file = tmp_path_factory.mktemp("own_store") / "mlflow.db"
    shutil.copy(store.uri.removeprefix("sqlite:///"), file)
    uri = f"sqlite:///{file}"
    return replace(store, uri=uri, client=MlflowClient(uri))


def stored_sweep(store, tmp_path: Path, name: str, space: str) -> None:
    """A sweep of one run whose parent holds ``space``; nothing is stored where that is empty."""
    parent = write_sweep(store.client, name, [Spec(variant="baq", budget_bits="1")])
    if space:
        (tmp_path / "space.yaml").write_text(space)
        store.client.log_artifact(parent, str(tmp_path / "space.yaml"))


def test_analyze_chooses_by_what_the_search_space_chose_by(own_store, tmp_path, capsys):
    stored_sweep(own_store, tmp_path, "by auc", BY_AUC)
    analyze = ["analyze", "--tracking-uri", own_store.uri, "--sweep", "by auc", "--out", str(tmp_path / "out")]
    for more, metric in (([], "val/auc_worst"), (["--metric", "val/acc_avg"], "val/acc_avg")):
        assert fqsweep_main([*analyze, *more]) == 0
        assert json.loads((tmp_path / "out" / "recommended.json").read_text())["metric"] == metric


@pytest.fixture
def analysed_here(monkeypatch):
    """The analysis in this process, which has loaded pandas and MLflow already."""

    def analysed(script, options):
        output, complaints = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(output), contextlib.redirect_stderr(complaints):
            code = importlib.import_module(f"analysis.{script}").main(options)
        if code == 2:
            raise InputError(complaints.getvalue().strip().removeprefix("Error: "))
        assert code == 0, complaints.getvalue()
        return output.getvalue()

    monkeypatch.setattr("fqsweep.main._run_analysis", analysed)


@pytest.mark.usefixtures("analysed_here")
def test_analyze_reads_the_sweep_that_its_parent_run_names_and_publishes_nothing(own_store, tmp_path, capsys):
    analyze = ["analyze", "--tracking-uri", own_store.uri, "--sweep", "small", "--out", str(tmp_path / "out")]
    assert fqsweep_main(analyze) == 0
    said = capsys.readouterr().out
    assert f"not read: {own_store.older_parent} (--parent RUN reads another)." in said
    assert fqsweep_main([*analyze, "--parent", own_store.older_parent[:16]]) == 0
    said = capsys.readouterr().out
    assert "only static was run" in said
    assert "not read" not in said
    for parent in (own_store.parent, own_store.older_parent):
        assert not own_store.client.list_artifacts(parent)
        assert "mlflow.note.content" not in own_store.client.get_run(parent).data.tags


@pytest.mark.usefixtures("analysed_here")
def test_a_parent_run_of_another_sweep_is_refused(own_store, small, tmp_path, capsys):
    analyze = ["analyze", "--tracking-uri", own_store.uri, "--sweep", "single", "--out", str(tmp_path / "out")]
    assert fqsweep_main([*analyze, "--parent", own_store.parent]) == 2
    assert f"parent run of the sweep 'single', but {own_store.parent} is the parent run of 'small'" in (
        capsys.readouterr().err
    )
    assert fqsweep_main([*analyze, "--parent", small["run_id"].iloc[0]]) == 2
    assert "is no parent run" in capsys.readouterr().err
    assert fqsweep_main([*analyze, "--parent", "nothing"]) == 2
    assert "there is none" in capsys.readouterr().err


@pytest.mark.parametrize("space", ["", "no: [yaml", "name: x", "search: {objectives: [val/none]}", "- a list"])
def test_without_a_space_that_says_so_the_worst_groups_accuracy_chooses(own_store, tmp_path, space):
    name = f"says {space}"
    stored_sweep(own_store, tmp_path, name, space)
    runs = load_runs(own_store.uri, name)
    metric, notes = load_selection(own_store.uri, runs)
    assert metric == METRIC
    parent = runs["parent_run_id"].iloc[0]
    unread = f"The search space of parent run {parent} cannot be read, so what its search chose by is not known"
    assert [note.startswith(unread) for note in notes] == ([] if space == "name: x" else [True])


def test_of_two_spaces_on_a_server_the_tagged_one_counts_and_without_a_tag_none(own_store, tmp_path):
    stored_sweep(own_store, tmp_path, "renamed", "search: {objectives: [val/acc_avg]}")
    runs = load_runs(own_store.uri, "renamed")
    parent = runs["parent_run_id"].iloc[0]
    (tmp_path / "a.yaml").write_text(BY_AUC)
    own_store.client.log_artifact(parent, str(tmp_path / "a.yaml"))
    metric, notes = load_selection(own_store.uri, runs)
    assert (metric, len(notes)) == (METRIC, 1)
    own_store.client.set_tag(parent, TAG_SPACE, "space.yaml")
    assert load_selection(own_store.uri, runs) == ("val/acc_avg", [])


def test_sweeps_that_chose_differently_are_compared_by_the_default_with_a_note(own_store, tmp_path, capsys):
    stored_sweep(own_store, tmp_path, "one", BY_AUC)
    stored_sweep(own_store, tmp_path, "other", "search: {objectives: [val/acc_avg]}")
    one = load_runs(own_store.uri, "one")
    assert load_selection(own_store.uri, one) == ("val/auc_worst", [])
    both = ["--tracking-uri", own_store.uri, "--sweep", "one", "--sweep", "other"]
    said = "The sweeps were searched by val/acc_avg and val/auc_worst: val/acc_worst chooses here"
    assert tables.main(both) == 0
    assert capsys.readouterr().out.startswith(f"Chosen by val/acc_worst.\nNote: {said}")
    assert report.main([*both, "--out", str(tmp_path / "out")]) == 0
    assert said in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.parametrize("module", [against, answers, effects, fronts, pareto, ranks, rules, stats, tables])
def test_what_chose_is_printed(module, small_csv, capsys):
    assert module.main(["--csv", str(small_csv)]) == 0
    assert capsys.readouterr().out.startswith(
        "Chosen by val/acc_worst.\nNote: A CSV does not tell what its search chose by: val/acc_worst chooses here"
    )
    assert module.main(["--csv", str(small_csv), "--metric", "val/acc_avg"]) == 0
    assert capsys.readouterr().out.startswith("Chosen by val/acc_avg.\n\n")


@pytest.mark.parametrize("module", [figures, paper])
def test_scripts_that_print_paths_say_beside_them_what_chose(module, small_csv, tmp_path, capsys):
    assert module.main(["--csv", str(small_csv), "--out", str(tmp_path)]) == 0
    printed = capsys.readouterr()
    assert "Chosen by val/acc_worst.\nNote: A CSV does not tell what its search chose by" in printed.err
    assert all(Path(line).is_file() for line in printed.out.splitlines())


@pytest.mark.parametrize("module", [answers, tables, rules])
def test_what_was_left_out_is_said_on_stderr(module, store, capsys):
    source = ["--tracking-uri", store.uri, "--sweep", "small"]
    assert module.main(source) == 0
    printed = capsys.readouterr()
    for said in ("Note: 2 sweeps are called 'small'", "Note: Left out: 1 failed of", "left out: 2 of"):
        assert said in printed.err
        assert said not in printed.out


def test_scripts_that_show_notes_themselves_say_them_once(store, capsys):
    assert load.main(["--tracking-uri", store.uri, "--sweep", "small"]) == 0
    printed = capsys.readouterr()
    assert printed.out.count("2 sweeps are called 'small'") == 1
    assert not printed.err


def test_a_table_for_programs_is_nothing_but_the_table(small_csv, capsys):
    assert tables.main(["--csv", str(small_csv), "--format", "csv"]) == 0
    printed = capsys.readouterr()
    assert printed.out.startswith("dataset,")
    assert "Chosen by val/acc_worst." in printed.err


# --- servers that do not serve -------------------------------------------------------------------


@pytest.fixture(params=[401, 500])
def refusing(request, monkeypatch):
    """A server that answers every request with one status."""

    class Refusal(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.send_response(request.param)
            self.end_headers()
            self.wfile.write(b"no")

        do_GET = do_POST  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Quiet."""

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    server = ThreadingHTTPServer(("127.0.0.1", 0), Refusal)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield request.param, server.server_port
    server.shutdown()
    server.server_close()


def test_a_server_that_refuses_is_named_with_its_status_and_without_the_password(refusing):
    status, port = refusing
    with pytest.raises(InputError, match=str(status)) as raised:
        load_runs(f"http://someone:secret@127.0.0.1:{port}", "small")
    assert "secret" not in str(raised.value)
    assert ("MLFLOW_TRACKING_USERNAME" in str(raised.value)) == (status == 401)


@pytest.mark.parametrize(("said", "refused"), [("port=40321: status 500", False), ("status 403", True)])
def test_a_number_within_a_port_is_no_status(said, refused):
    assert ("MLFLOW_TRACKING_USERNAME" in str(mlflow_runs._unreadable("http://h", OSError(said)))) == refused


def test_a_reader_who_has_seen_enough_is_no_error(tmp_path: Path):
    file = tmp_path / "runs.csv"
    runs_of(run_row("fp32", float("nan"), 0, 0.9), run_row("baq", 1, 0, 0.8)).to_csv(file, index=False)
    command = [sys.executable, "-m", "analysis.pareto", "--csv", str(file)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.wait(timeout=60) == 141
        assert "rror" not in process.stderr.read()


def test_one_panel_without_the_metric_is_missing_from_a_page_that_still_opens(tmp_path: Path):
    gone = {"architecture": "vit", METRIC: float("nan")}
    runs = load_frame([run_row("baq", 1, 0, 0.8), run_row("baq", 1, 0, 0.8, run_id="v", **gone)])
    findings = report.find(runs, sweep="s", metric=METRIC)
    page = report.write_report(findings, tmp_path)[0].read_text().split("<main>")[1].split("choice")[0]
    assert "vit" not in re.sub(r"base64,[^\"]*", "", page)  # a picture may hold any letters
