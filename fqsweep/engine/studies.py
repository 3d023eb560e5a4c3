"""Where the values of free weights come from: one Optuna study a cell, in one journal that the driver writes."""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections import defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Literal

import optuna
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState

from fqsweep.cells import Cell, trial_key
from fqsweep.config import SearchConfig, WeightRange, content_hash
from fqsweep.files import write_bytes
from fqsweep.names import BITS, metric_of, selection_of

WARM_START = "fqsweep:warm_start"
LOCK_FILE_SUFFIX = ".lock"  # of Optuna's journals
LOCK_HELD_S = 0.5


class OptunaStudies:
    """One multi-objective study a cell; see ``search.Study`` for what each method promises."""

    def __init__(self, config: SearchConfig, journal: Path, *, cells: Iterable[Cell] = ()) -> None:
        """Open the journal, or begin it.

        Args:
            cells: all cells of the sweep, among which neighbouring budgets are found.
        """
        self.config = config
        journal.parent.mkdir(parents=True, exist_ok=True)
        _take_away_left_lock(journal)
        _cut_off_unfinished_line(journal)
        optuna.logging.set_verbosity(optuna.logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            self.storage = JournalStorage(JournalFileBackend(str(journal)))
        self.studies: dict[str, optuna.Study] = {}
        # Of a new study until its second trial: TPE has no part in the first, whose values are given, and takes 5 KB.
        self.no_sampler = optuna.samplers.RandomSampler(seed=0)
        self.handed_out: set[tuple[str, int]] = set()
        self.names: dict[str, list[str]] = defaultdict(list)
        for one in self.storage.get_all_studies():
            self.names[one.study_name.rpartition("[")[2].rstrip("]")].append(one.study_name)
        self.families: dict[str, list[Cell]] = defaultdict(list)
        for cell in cells:
            if cell.point.free_weights and _size(cell):
                self.families[_family(cell)].append(cell)

    def ask(self, cell: Cell) -> tuple[int, dict[str, float]]:
        """See ``search.Study.ask``."""
        study = self._study(cell)
        self._warm_start(cell, study)
        trials = study.get_trials(deepcopy=False)
        is_first = all(trial.state == TrialState.WAITING for trial in trials)
        if study.sampler is self.no_sampler and not is_first:
            study.sampler = self._sampler(cell, num_trials=0)
        for trial in trials:
            if trial.state == TrialState.RUNNING and (cell.key, trial.number) not in self.handed_out:
                return self._hand_out(cell, optuna.Trial(study, trial._trial_id))
        return self._hand_out(cell, study.ask())

    def _hand_out(self, cell: Cell, asked: optuna.Trial) -> tuple[int, dict[str, float]]:
        """Number and values; values that a driver killed between two of them left open are drawn now."""
        for name, limits in cell.point.free_weights.items():
            asked.suggest_float(name, limits.low, limits.high, log=limits.log)
        self.handed_out.add((cell.key, asked.number))
        return asked.number, dict(asked.params)

    def tell(self, cell: Cell, number: int, metrics: Mapping[str, float]) -> None:
        """See ``search.Study.tell``."""
        values = [metrics[key] for key in self.config.objectives]
        self._study(cell).tell(number, values, skip_if_finished=True)
        self._let_go(cell)

    def prune(self, cell: Cell, number: int) -> None:
        """See ``search.Study.prune``."""
        self._study(cell).tell(number, state=TrialState.PRUNED, skip_if_finished=True)
        self._let_go(cell)

    def give_up(self, cell: Cell, number: int) -> None:
        """See ``search.Study.give_up``."""
        self._study(cell).tell(number, state=TrialState.FAIL, skip_if_finished=True)
        self._let_go(cell)

    def try_again(self, cell: Cell, number: int) -> bool:
        """The values of a trial that failed come again, once, under a number of their own.

        Returns:
            whether the trial had failed.
        """
        study = self._study(cell)
        trials = study.get_trials(deepcopy=False)
        if trials[number].state != TrialState.FAIL:
            return False
        wanted = trials[number].params
        if wanted not in (
            later.system_attrs.get("fixed_params", later.params) for later in trials[number + 1 :]
        ):
            study.enqueue_trial(dict(wanted))
        return True

    def _let_go(self, cell: Cell) -> None:
        """A study whose trials have all ended is in the journal; a sweep may have thousands, each with a sampler."""
        trials = self._study(cell).get_trials(deepcopy=False)
        if len(trials) >= self.config.trials_per_cell and all(trial.state.is_finished() for trial in trials):
            del self.studies[cell.key]

    def chosen(self, cell: Cell) -> dict[str, float] | None:
        """See ``search.Study.chosen``."""
        best = self._best(cell)
        return None if best is None else dict(best.params)

    def _best(self, cell: Cell) -> optuna.trial.FrozenTrial | None:
        """Of the cell's trials that ended whole, the best by ``_worth``.

        Of several, as ``analysis.pareto.select_cells`` chooses: fewer bits, which are known here where they are an
        objective, then the smaller key.
        """
        # Not ``_study``, which would keep it, with a sampler, although its cell is done.
        study = self._find_study(cell)
        if study is None:
            return None
        ended = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
        bits = self.config.objectives.index(BITS) if BITS in self.config.objectives else None

        def rank(trial: optuna.trial.FrozenTrial) -> tuple[float, float, str]:
            key = trial_key(cell, number=trial.number, weights=trial.params)
            return -self._worth(trial.values), 0.0 if bits is None else trial.values[bits], key

        return min(ended, key=rank, default=None)

    def asked_before(self, cell: Cell) -> list[tuple[int, dict[str, float]]]:
        """Numbers and values of the trials that an earlier start asked for, however they ended."""
        study = self._find_study(cell)
        if study is None:
            return []
        known = study.get_trials(deepcopy=False)
        return [(trial.number, dict(trial.params)) for trial in known if trial.state != TrialState.WAITING]

    def _warm_start(self, cell: Cell, study: optuna.Study) -> None:
        """Once, as soon as a neighbouring budget has finished trials: its best weights are tried here too."""
        if study.user_attrs.get(WARM_START):
            return
        for neighbour in self._neighbours(cell):
            best = self._best(neighbour)
            if best is not None:
                study.enqueue_trial(dict(best.params), skip_if_exists=True)
                study.set_user_attr(WARM_START, f"{neighbour.title}, trial {best.number}")
                return

    def _neighbours(self, cell: Cell) -> list[Cell]:
        """The cells that differ from this one in their budget alone, the nearest by ratio first."""
        if not _size(cell):
            return []
        others = [other for other in self.families.get(_family(cell), []) if other.key != cell.key]
        return sorted(others, key=lambda other: abs(math.log(_size(other) / _size(cell))))

    def _worth(self, values: list[float]) -> float:
        """The objective that chooses between runs, else the first; more is better."""
        keys = self.config.objectives
        chooses = selection_of(keys)
        place = keys.index(chooses) if chooses in keys else 0
        return values[place] if _direction(keys[place]) == "maximize" else -values[place]

    def _study(self, cell: Cell) -> optuna.Study:
        """The cell's study; a new one begins with the start values of its ranges.

        It is found by the cell's key and the objectives: the title before them may have changed.
        """
        if cell.key in self.studies:
            return self.studies[cell.key]
        name = f"{cell.title} by {', '.join(self.config.objectives)} [{cell.key}]"
        study = self._find_study(cell) or optuna.create_study(
            study_name=name,
            storage=self.storage,
            directions=[_direction(key) for key in self.config.objectives],
            load_if_exists=True,  # a driver may have died before it gave the study its names
        )
        self.names[cell.key].append(study.study_name)
        trials = study.get_trials(deepcopy=False)
        is_needed = trials or self.config.sampler == "nsga2"  # which marks even the first trial
        study.sampler = self._sampler(cell, num_trials=len(trials)) if is_needed else self.no_sampler
        if not trials:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                study.set_metric_names(self._metric_names())
            study.enqueue_trial({n: _start(limits) for n, limits in cell.point.free_weights.items()})
        self.studies[cell.key] = study
        return study

    def _find_study(self, cell: Cell) -> optuna.Study | None:
        if cell.key in self.studies:
            return self.studies[cell.key]
        for name in self.names.get(cell.key, []):
            study = optuna.load_study(study_name=name, storage=self.storage)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                if study.metric_names == self._metric_names():
                    return study
        return None

    def _metric_names(self) -> list[str]:
        return [key.replace("/", " ") for key in self.config.objectives]

    def _sampler(self, cell: Cell, *, num_trials: int) -> optuna.samplers.BaseSampler:
        # Each cell its own stream; going on after ``num_trials`` must not draw their values again.
        seed = (self.config.seed * 1_000_003 + int(cell.key, 16) + num_trials) % 2**32
        if self.config.sampler == "nsga2":
            return optuna.samplers.NSGAIISampler(seed=seed)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return optuna.samplers.TPESampler(
                seed=seed, n_startup_trials=5, multivariate=True, constant_liar=True
            )


def _take_away_left_lock(journal: Path) -> None:
    """Take away the lock of a driver that was killed while it wrote: Optuna would wait half a minute for it.

    No other driver writes (``control.only_driver``); whoever else adds to the journal, as Optuna's dashboard may,
    holds its lock for milliseconds.
    """
    lock = journal.with_name(journal.name + LOCK_FILE_SUFFIX)
    with contextlib.suppress(FileNotFoundError):
        made_ns = lock.lstat().st_mtime_ns
        time.sleep(LOCK_HELD_S)
        if lock.lstat().st_mtime_ns == made_ns:
            lock.unlink()


def _cut_off_unfinished_line(journal: Path) -> None:
    """Drop what a crash left of a line: Optuna would append to it and never read the journal again."""
    content = journal.read_bytes() if journal.exists() else b""
    if content and not content.endswith(b"\n"):
        write_bytes(journal, content[: content.rfind(b"\n") + 1])


def _direction(key: str) -> Literal["minimize", "maximize"]:
    direction = metric_of(key).direction
    assert direction != "none"
    return direction


def _start(limits: WeightRange) -> float:
    return limits.low if limits.start is None else limits.start


def _family(cell: Cell) -> str:
    """The same for cells that differ in their budget alone, of bits or of bytes."""
    unit = "bits" if cell.budget_bytes is None else "bytes"
    return content_hash(
        [cell.dataset, cell.group_attribute, cell.architecture, cell.point, cell.seed, cell.recipe, unit]
    )


def _size(cell: Cell) -> float:
    """A cell's budget, in mean bits or in bytes; 0 where it has none."""
    return cell.budget_bits or cell.budget_bytes or 0.0
