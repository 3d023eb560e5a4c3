"""MLflow with a real sqlite store: one run a trial, cut-off runs made whole, tags that follow the report."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import shutil
import signal
import time
import weakref
from functools import partial
from pathlib import Path
from urllib.parse import unquote

import pytest
from mlflow import MlflowClient
from mlflow.entities import Param
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import TEMPORARILY_UNAVAILABLE

from analysis.mlflow_runs import load_layers
from fqsweep.errors import InputError, TrackingError
from fqsweep.files import SweepPaths
from fqsweep.names import (
    RUN_PARAMS,
    TAG_FRONT,
    TAG_KEY,
    TAG_PARENT,
    TAG_PRUNED,
    TAG_REASON,
    TAG_RECOMMENDED,
    TAG_RETIRED,
    TAG_SPACE,
)
from fqsweep.results import TrialResult
from fqsweep.tracking import spool as spool_module
from fqsweep.tracking import stores
from fqsweep.tracking.publishing import publish_report
from fqsweep.tracking.spool import Spool
from fqsweep.tracking.stores import default_uri
from fqsweep.tracking.tracker import Tracker, fetch_model, fetch_space, open_tracker, reaching
from tests.whole_sweeps import give_database, wait_for


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> SweepPaths:
    return new_paths(tmp_path_factory.mktemp("tracking"))


def new_paths(parent: Path) -> SweepPaths:
    folder = parent / "a folder's out"
    (folder / "report").mkdir(parents=True)
    (folder / "space.yaml").write_text("name: t")
    (folder / "model.fqs").write_bytes(b"packed")
    give_database(folder)
    return SweepPaths(folder)


def tracker(paths: SweepPaths) -> Tracker:
    space = paths.out / "space.yaml"
    return open_tracker(
        default_uri(paths), paths=paths, sweep="t", space_file=space, facts={"version/torch": "1"}
    )


def result(key: str) -> TrialResult:
    metrics = {"val/acc_worst": 0.5, "test/acc_group/60 and over": 0.25, "bits/mean_weight": 1.0}
    params = dict.fromkeys(RUN_PARAMS, "none")
    history = [{"train/loss": 1.0}, {"train/loss": 0.5}]
    return TrialResult(
        key=key, title=f"trial {key}", params=params, weights={}, metrics=metrics, history=history
    )


def children(paths: SweepPaths, parent_id: str) -> dict[str, list[str]]:
    client = MlflowClient(default_uri(paths))
    experiment = client.get_experiment_by_name("fqsweep")
    found: dict[str, list[str]] = {}
    for run in client.search_runs([experiment.experiment_id], f"tags.`{TAG_PARENT}` = '{parent_id}'"):
        found.setdefault(run.data.tags[TAG_KEY], []).append(run.info.run_id)
    return found


def test_a_trial_is_one_nested_run_with_params_metrics_curves_and_its_model(paths: SweepPaths) -> None:
    book = tracker(paths)
    run_id = book.log_trial(result("one"), [paths.out / "model.fqs"])
    assert run_id is not None
    run = book.client.get_run(run_id)
    assert run.info.status == "FINISHED"
    assert run.data.tags[TAG_PARENT] == book.parent_id
    assert set(run.data.params) == set(RUN_PARAMS)
    assert run.data.metrics["test/acc_group/60 and over"] == 0.25
    curve = book.client.get_metric_history(run_id, "epoch/train/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 1.0), (1, 0.5)]
    assert fetch_model(default_uri(paths), run_id) == b"packed"


def test_logging_a_trial_twice_makes_one_run_also_after_a_new_start(paths: SweepPaths) -> None:
    tracker(paths).log_trial(result("two"), [])
    assert tracker(paths).log_trial(result("two"), []) is None
    assert len(children(paths, tracker(paths).parent_id)["two"]) == 1


def test_a_run_is_called_by_what_tells_it_from_its_siblings_first(paths: SweepPaths) -> None:
    params = {
        **result("t").params,
        "dataset": "derm",
        "group_attribute": "sex x age",
        "architecture": "resnet18",
    }
    titled = dataclasses.replace(result("t"), title="derm/sex x age resnet18 static@0.5 seed 1", params=params)
    book = tracker(paths)
    run = book.log_trial(titled, [])
    assert run is not None
    assert book.client.get_run(run).info.run_name == "static@0.5 seed 1, derm/sex x age resnet18"


def test_a_row_that_was_renamed_has_its_run_written_anew_under_its_new_name(paths: SweepPaths) -> None:
    old = tracker(paths).log_trial(result("named"), [])
    book = tracker(paths)
    book.retire(book.logged)
    renamed = dataclasses.replace(
        result("named"), title="new", params={**result("named").params, "variant": "new"}
    )
    new = book.log_trial(renamed, [paths.out / "model.fqs"])
    assert new is not None and children(paths, book.parent_id)["named"] == [new] != [old]
    run = book.client.get_run(new)
    assert run.data.params["variant"] == run.data.tags["variant"] == run.info.run_name == "new"
    assert TAG_RETIRED not in run.data.tags
    assert book.log_trial(renamed, []) is None and tracker(paths).log_trial(renamed, []) is None


def test_a_run_of_a_version_with_fewer_parameters_is_written_anew_with_all(paths: SweepPaths) -> None:
    now = result("grown")
    before = {name: value for name, value in now.params.items() if name != "pin"}
    tracker(paths).log_trial(dataclasses.replace(now, params=before), [])
    book = tracker(paths)
    new = book.log_trial(now, [])
    assert new is not None and children(paths, book.parent_id)["grown"] == [new]
    assert book.client.get_run(new).data.params["pin"] == now.params["pin"]


def test_a_run_that_was_cut_off_is_removed_and_written_anew(paths: SweepPaths) -> None:
    book = tracker(paths)
    tags = {TAG_PARENT: book.parent_id, TAG_KEY: "three"}
    cut_off = book.client.create_run(book.experiment_id, tags=tags).info.run_id
    again = tracker(paths)
    written = again.log_trial(result("three"), [])
    assert children(paths, again.parent_id)["three"] == [written]
    assert written != cut_off


def test_the_same_folder_keeps_its_parent_run(paths: SweepPaths) -> None:
    assert tracker(paths).parent_id == tracker(paths).parent_id


def test_a_store_that_was_left_and_is_used_again_keeps_its_parent_run(tmp_path: Path) -> None:
    paths, elsewhere = new_paths(tmp_path), new_paths(tmp_path / "elsewhere")
    uris = [default_uri(paths), default_uri(elsewhere)]
    space = paths.out / "space.yaml"

    def opened(uri: str) -> str:
        return open_tracker(uri, paths=paths, sweep="t", space_file=space, facts={}).parent_id

    first, second = (opened(uri) for uri in uris)
    assert first != second
    assert [opened(uri) for uri in uris] == [first, second]


def test_a_parent_run_that_was_deleted_gets_a_successor(tmp_path: Path) -> None:
    paths = new_paths(tmp_path)
    first = tracker(paths)
    first.client.delete_run(first.parent_id)
    assert tracker(paths).parent_id != first.parent_id
    assert tracker(paths).parent_id == tracker(paths).parent_id


def test_a_store_that_does_not_answer_is_no_word_that_the_parent_run_is_gone(
    paths: SweepPaths, monkeypatch: pytest.MonkeyPatch
) -> None:
    parent_id = tracker(paths).parent_id

    def away(*_given: object) -> None:
        raise MlflowException("database is locked", error_code=TEMPORARILY_UNAVAILABLE)

    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "get_run", away)
        with pytest.raises(InputError, match="database is locked"):
            tracker(paths)
    assert tracker(paths).parent_id == parent_id


def test_runs_that_the_search_space_no_longer_has_are_marked_until_they_are_back(tmp_path: Path) -> None:
    paths = new_paths(tmp_path)
    book = tracker(paths)
    for key in ("stays", "goes", "returns"):
        book.log_trial(result(key), [])

    def retired() -> set[str]:
        runs = stores.search_runs(book.client, f"tags.{TAG_RETIRED} = 'true'")
        return {run.data.tags[TAG_KEY] for run in runs}

    book.retire({"goes", "returns"})
    assert retired() == {"goes", "returns"}
    again = tracker(paths)
    assert again.log_trial(result("returns"), []) is None
    again.retire({"goes"})
    assert retired() == {"goes"}
    tracker(paths).retire([])
    assert retired() == set()


def test_what_goes_wrong_at_the_store_is_told_in_one_line_without_a_password() -> None:
    uri = "http://me:secret@host:5000"
    expected = pytest.raises(TrackingError, match="MLflow at http://host:5000 did not take it: no answer from")
    with expected as told, reaching(uri):
        raise MlflowException(f"no answer from {uri}\nand more")
    assert "secret" not in str(told.value) and "run the same command again" in str(told.value)
    with pytest.raises(OSError, match="full"), reaching(uri):
        raise OSError(errno.ENOSPC, "full")


def test_files_of_runs_lie_beside_a_database_that_several_sweeps_share(tmp_path: Path) -> None:
    first, second = (new_paths(tmp_path / name) for name in "ab")
    for paths in (first, second):
        uri = f"sqlite:///{tmp_path}/mlflow.db"
        space = paths.out / "space.yaml"
        book = open_tracker(uri, paths=paths, sweep="t", space_file=space, facts={})
        book.log_trial(result("one"), [paths.out / "model.fqs"])
        assert not paths.artifacts.exists()
    assert len(list((tmp_path / "mlartifacts").rglob("model.fqs"))) == 2


def test_a_report_tags_its_runs_and_takes_old_tags_away(paths: SweepPaths) -> None:
    book = tracker(paths)
    first, second = (book.log_trial(result(key), []) for key in ("four", "five"))
    for chosen, other in ((first, second), (second, first)):
        (paths.report / "front.csv").write_text(f"variant,run_ids,on_front\na,{chosen},True\nb,{other},False\n")
        budgets = {"1": {"run_id": chosen, "reason": "it is best"}}
        (paths.report / "answer.md").write_text("**At 1 bit**")
        (paths.report / "recommended.json").write_text(json.dumps({"settings": [{"budgets": budgets}]}))
        publish_report(default_uri(paths), book.parent_id, paths.report)
        tags = {run_id: book.client.get_run(run_id).data.tags for run_id in (chosen, other)}
        assert tags[chosen][TAG_FRONT] == "true" and tags[chosen][TAG_RECOMMENDED] == "true"
        assert tags[chosen][TAG_REASON] == "it is best"
        assert TAG_FRONT not in tags[other] and TAG_RECOMMENDED not in tags[other]
    names = {file.path for file in book.client.list_artifacts(book.parent_id)}
    assert {"front.csv", "recommended.json", "space.yaml"} <= names


def test_artifacts_lie_in_the_sweep_folder_whatever_the_working_folder(
    paths: SweepPaths, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    tracker(paths).log_trial(result("six"), [paths.out / "model.fqs"])
    assert os.listdir(tmp_path) == []
    assert list(paths.artifacts.rglob("model.fqs"))


def test_a_run_that_is_not_there_has_no_model_or_is_the_sweeps_is_said(
    paths: SweepPaths, tmp_path: Path
) -> None:
    book, uri = tracker(paths), default_uri(paths)
    empty = book.log_trial(result("bare"), [])
    assert empty is not None
    with pytest.raises(InputError, match=r"run .* \(trial bare\) has no packed model at file://"):
        fetch_model(uri, empty)
    with pytest.raises(InputError, match="is that of the sweep 't': give the run of one of its trials"):
        fetch_model(uri, book.parent_id)
    with pytest.raises(InputError, match="must exist at .* but there is none"):
        fetch_model(uri, "0" * 32)
    with pytest.raises(InputError, match="no database"):
        fetch_model(f"sqlite:///{tmp_path}/nosuch/mlflow.db", empty)
    assert not (tmp_path / "nosuch").exists()
    with pytest.raises(InputError, match=f"is a folder: give its database, sqlite:///{paths.out}/mlflow.db"):
        fetch_model(str(paths.out), empty)
    (tmp_path / "text.db").write_text("no database " * 99)
    with pytest.raises(InputError, match=r"text.db cannot be read: "):
        fetch_model(f"sqlite:///{tmp_path}/text.db", empty)


def test_the_first_letters_of_a_run_name_it(paths: SweepPaths) -> None:
    run_id = tracker(paths).log_trial(result("eight"), [paths.out / "model.fqs"])
    assert run_id is not None
    assert fetch_model(default_uri(paths), run_id[:12]) == b"packed"


def test_an_output_folder_that_was_moved_still_has_its_files(paths: SweepPaths, tmp_path: Path) -> None:
    bits = paths.out / "bits.csv"
    bits.write_text("layer,mean_bits\nconv1,2\n")
    run_id = tracker(paths).log_trial(result("nine"), [paths.out / "model.fqs", bits])
    assert run_id is not None
    moved = SweepPaths(tmp_path / "moved")
    paths.out.rename(moved.out)
    try:
        assert fetch_model(default_uri(moved), run_id) == b"packed"
        assert load_layers(default_uri(moved), [run_id])["layer"].tolist() == ["conv1"]
        file, _ = fetch_space(default_uri(moved), run_id, tmp_path)
        assert file.read_text() == "name: t"
        assert file.is_relative_to(moved.out), "where it lies now"
    finally:
        moved.out.rename(paths.out)


def test_of_several_search_spaces_the_one_that_was_started_last_is_read(
    paths: SweepPaths, tmp_path: Path
) -> None:
    book, uri = tracker(paths), default_uri(paths)
    run_id = book.log_trial(result("ten"), [])
    assert run_id is not None
    files = paths.out / "mlartifacts" / book.parent_id / "artifacts"
    now_s = (files / "space.yaml").stat().st_mtime
    for name, age_s in (("a_newer.yaml", 60), ("z_older.yaml", 120)):
        (files / name).write_text(f"name: {name}")
        os.utime(files / name, (now_s - age_s, now_s - age_s))
    os.utime(files / "space.yaml", (0, 0))
    assert fetch_space(uri, run_id, tmp_path)[0].name == "space.yaml", "by its tag, whatever the files' times"
    book.client.delete_tag(book.parent_id, TAG_SPACE)
    assert fetch_space(uri, run_id, tmp_path)[0].name == "a_newer.yaml", "without a tag the newest"
    for name in ("a_newer.yaml", "z_older.yaml"):
        (files / name).unlink()


def test_a_trial_that_was_stopped_early_has_its_curve_and_a_tag_and_no_test_metric(paths: SweepPaths) -> None:
    book = tracker(paths)
    history = [{"val/acc_worst": 0.25}, {"val/acc_worst": 0.5}]
    stopped = dataclasses.replace(result("seven"), metrics={"time/total_s": 1.0}, history=history, pruned=True)
    run_id = book.log_trial(stopped, [])
    assert run_id is not None
    run = book.client.get_run(run_id)
    assert run.data.tags[TAG_PRUNED] == "true"
    assert set(run.data.metrics) == {"time/total_s", "epoch/val/acc_worst"}
    assert len(book.client.get_metric_history(run_id, "epoch/val/acc_worst")) == 2


def test_a_second_try_after_a_cut_leaves_one_run(paths: SweepPaths) -> None:
    book = tracker(paths)
    for cut_off in ("RUNNING", "FINISHED"):
        tags = {TAG_PARENT: book.parent_id, TAG_KEY: cut_off}
        begun = book.client.create_run(book.experiment_id, tags=tags).info.run_id
        if cut_off == "FINISHED":  # the server did it all, and its last answer was lost
            book.client.log_batch(begun, params=[Param(*item) for item in result(cut_off).params.items()])
            book.client.set_terminated(begun, cut_off)
        written = book.log_trial(result(cut_off), [], again=True)
        kept = children(paths, book.parent_id)[cut_off]
        assert kept == [begun if cut_off == "FINISHED" else written]


def test_runs_that_were_cut_off_hide_none_that_was_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "PAGE", 2)
    paths = new_paths(tmp_path)
    book = tracker(paths)
    for number in range(3):
        book.log_trial(result(f"early {number}"), [])
        tags = {TAG_PARENT: book.parent_id, TAG_KEY: f"cut {number}"}
        book.client.create_run(book.experiment_id, tags=tags)
        book.log_trial(result(f"late {number}"), [])
    again = tracker(paths)
    assert set(again.logged) == {f"{when} {number}" for when in ("early", "late") for number in range(3)}
    again.client.create_run(again.experiment_id, tags={TAG_PARENT: again.parent_id, TAG_KEY: "early 0"})
    again.end(done=True)
    assert {key: len(runs) for key, runs in children(paths, book.parent_id).items()} == dict.fromkeys(
        again.logged, 1
    )


class AwayTracker:
    """Stands for a tracker whose server refuses some calls."""

    def __init__(self, refusals: int) -> None:
        self.refusals = refusals
        self.taken: list[tuple[str, bool]] = []

    def log_trial(self, result: TrialResult, files: list[Path], *, again: bool = False) -> None:
        if self.refusals:
            self.refusals -= 1
            raise ConnectionError("the server is away")
        self.taken.append((result.key, again))


def test_the_spool_keeps_what_is_refused_and_tries_again(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "PAUSE_S", 0.01)
    away = AwayTracker(refusals=3)
    spool = Spool(away)  # type: ignore[arg-type]
    for key in ("a", "b"):
        spool.put(key, partial(lambda key: (result(key), []), key))
    spool.finish(patience_s=10)
    assert sorted(key for key, _ in away.taken) == ["a", "b"]
    assert dict(away.taken)["a"] is True and not spool.waiting


def test_results_that_wait_for_a_server_are_not_in_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "PAUSE_S", 0.01)
    away = AwayTracker(refusals=1)
    seen: list[weakref.ref[TrialResult]] = []
    alive: list[int] = []

    def read(key: str) -> tuple[TrialResult, list[Path]]:
        read_now = result(key)
        seen.append(weakref.ref(read_now))
        alive.append(sum(one() is not None for one in seen))
        return read_now, []

    spool = Spool(away)  # type: ignore[arg-type]
    keys = [str(number) for number in range(50)]
    for key in keys:
        spool.put(key, partial(read, key))
    spool.finish(patience_s=10)
    assert sorted(key for key, _ in away.taken) == sorted(keys)
    assert max(alive) <= 2, "the one that is sent, and the one before it"


def test_what_is_logged_while_marking_is_tried_again_is_not_marked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spool_module, "PAUSE_S", 0.01)
    book = tracker(new_paths(tmp_path))
    book.log_trial(result("left the space"), [])
    set_tag, refusals = book.client.set_tag, iter(["away"])

    def refuse_once(*given: str) -> None:
        if next(refusals, None):
            raise ConnectionError("the server is away")
        set_tag(*given)

    monkeypatch.setattr(book.client, "set_tag", refuse_once)
    spool = Spool(book)
    spool.retire_all_but([])
    spool.put("new", lambda: (result("new"), []))
    spool.finish(patience_s=10)
    runs = stores.search_runs(book.client, f"tags.{TAG_RETIRED} = 'true'")
    assert {run.data.tags[TAG_KEY] for run in runs} == {"left the space"}


def test_a_driver_killed_while_it_places_the_database_leaves_none_and_the_next_makes_it(tmp_path: Path) -> None:
    paths = new_paths(tmp_path)
    paths.tracking_db.unlink()

    def is_there() -> bool:
        return any(file.stat().st_size for file in paths.out.glob(".mlflow.db.*/mlflow.db"))

    pid = os.fork()
    if pid == 0:
        os.link = lambda *_given: time.sleep(60)  # type: ignore[assignment]
        tracker(paths)
        os._exit(0)
    wait_for(is_there, what="a database beside its place")
    os.kill(pid, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == -signal.SIGKILL
    assert not paths.tracking_db.exists()
    assert tracker(paths).log_trial(result("a"), [])


def test_a_sweep_that_was_stopped_says_so_of_its_run_and_is_open_again_when_it_goes_on(tmp_path: Path) -> None:
    paths = new_paths(tmp_path)
    book = tracker(paths)
    book.stopped()
    assert book.client.get_run(book.parent_id).info.status == "KILLED"
    again = tracker(paths)
    assert again.parent_id == book.parent_id
    assert again.client.get_run(book.parent_id).info.status == "RUNNING"


def test_a_model_whose_sending_was_cut_off_is_sent_again(paths: SweepPaths) -> None:
    book = tracker(paths)
    run_id = book.log_trial(result("recommended"), [paths.out / "model.fqs"])
    budgets = {"1": {"run_id": run_id, "reason": "it is best"}}
    (paths.report / "recommended.json").write_text(json.dumps({"settings": [{"budgets": budgets}]}))
    (paths.report / "answer.md").write_text("")
    (paths.report / "front.csv").write_text(f"variant,run_ids,on_front\na,{run_id},True\n")
    publish_report(default_uri(paths), book.parent_id, paths.report)
    folder = Path(unquote(book.client.get_run(run_id).info.artifact_uri.removeprefix("file://"))) / "model"
    assert (folder / "MLmodel").exists()
    shutil.rmtree(folder / "data")
    publish_report(default_uri(paths), book.parent_id, paths.report)
    assert any((folder / "data").iterdir())


def test_the_spool_says_so_when_patience_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(spool_module, "PAUSE_S", 0.01)
    spool = Spool(AwayTracker(refusals=10**9))  # type: ignore[arg-type]
    spool.put("a", lambda: (result("a"), []))
    with pytest.raises(TrackingError, match=r"did not take 1 results: the server is away"):
        spool.finish(patience_s=0.1)
