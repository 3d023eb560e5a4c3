"""The answers in words: who leads at which budget, how sure that is, and which run to take."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from analysis import cli
from analysis.columns import (
    BITS,
    BYTES,
    GROUP_ACCURACY,
    GROUP_COUNT,
    PANEL,
    budget_phrase,
    budgets,
    group_names,
    is_full_precision,
    is_maximized,
    listing,
    of_panel,
    on_test,
    panel_title,
    panels,
    percent,
    tie_column,
)
from analysis.intervals import share_interval
from analysis.pareto import aggregate, best_first, leaders, more_runs_sentence, select_cells, under_budget
from analysis.rules import Choice, rules_record
from analysis.stats import MIN_SEEDS, compare_variants
from analysis.tables import markdown_safe
from fqsweep.names import budget_label, budget_order, metric_of

HEADLINE_LOSS_FRAC = 0.02  # the headline's budget: the smallest that costs at most this much validation
MOST_NAMED = 6  # variants in a sentence


@dataclass(frozen=True, kw_only=True)
class Answer:
    """The headline of one panel: the leader in a sentence, and what is known about its lead."""

    panel: tuple[str, ...]
    budget: str
    variant: str
    sentence: str
    evidence: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Recommendation:
    """The run with the best validation metric that fits a budget."""

    dataset: str
    group_attribute: str
    architecture: str
    budget: str
    run_id: str
    variant: str
    seed: int
    true_bits: float
    value: float
    reason: str

    @property
    def panel(self) -> tuple[str, ...]:
        return self.dataset, self.group_attribute, self.architecture


def headlines(points: pd.DataFrame, comparisons: pd.DataFrame, *, metric: str) -> list[Answer]:
    """One answer a panel, for the smallest budget that costs little against the best validation value.

    Where budgets are in bytes the file tells which is smaller, and those with several variants go first.

    Args:
        points: ``pareto.aggregate``.
        comparisons: ``stats.compare_variants`` on test data.
        metric: the validation metric that chose.
    """
    answers = []
    for panel, part in panels(points):
        lead = leaders(part, metric=metric)
        if not lead.empty:
            answers.append(_answer(panel, part, lead, of_panel(comparisons, panel), metric=metric))
    return answers


def _headline(part: pd.DataFrame, lead: pd.DataFrame, *, metric: str) -> tuple[pd.Series, str]:
    """The leader of the first budget that costs little, and a sentence where every budget costs more.

    Little is ``HEADLINE_LOSS_FRAC`` of the best validation value, fp32 included; where none does, the best is shown.
    """
    lead = _in_headline_order(part, lead)
    value = lead[metric] if is_maximized(metric) else -lead[metric]
    best = (part[metric] if is_maximized(metric) else -part[metric]).max()
    near = (value >= best - HEADLINE_LOSS_FRAC).to_numpy()
    if near.any():
        return lead.iloc[int(near.argmax())], ""
    far = f"No budget comes within {100 * HEADLINE_LOSS_FRAC:g} points of the best {metric}"
    return lead.iloc[int(value.to_numpy().argmax())], f"{far}: the one that comes nearest is shown."


def _in_headline_order(part: pd.DataFrame, lead: pd.DataFrame) -> pd.DataFrame:
    """The leaders by their budgets, the smallest first.

    Bits and bytes have no common scale: where a budget is in bytes, the size of the leaders' files decides, and
    budgets at which one variant alone was run (a width of ``uniform``) come last.
    """
    if lead["budget_bytes"].isna().all():
        return lead
    num_variants = part.loc[~is_full_precision(part), "budget"].value_counts()
    order = lead.assign(_alone=lead["budget"].map(num_variants) == 1).sort_values(["_alone", BYTES])
    return order.drop(columns="_alone")


def _answer(
    panel: tuple[str, ...], part: pd.DataFrame, leads: pd.DataFrame, pairs: pd.DataFrame, *, metric: str
) -> Answer:
    leader, far = _headline(part, leads, metric=metric)
    budget = str(leader["budget"])
    pairs = pairs[pairs["budget"] == budget]
    lead = _lead(part, leader, metric=metric)
    figure, reference = _figure(leader, on_test(metric)), _against_reference(part, leader, on_test(metric))
    sentence = f"At {budget_phrase(budget)}, {lead}: {figure}{reference}."
    evidence = ((far,) if far else ()) + _evidence(part, leader, pairs, metric=metric)
    return Answer(
        panel=panel, budget=budget, variant=str(leader["variant"]), sentence=sentence, evidence=evidence
    )


def _lead(part: pd.DataFrame, leader: pd.Series, *, metric: str) -> str:
    """Who leads; of several that are level, whose figure follows."""
    if (part["budget"] == leader["budget"]).sum() == 1:
        return f"only {leader['variant']} was run"
    is_worst, variant = metric.endswith("worst"), leader["variant"]
    if not leader["level_with"]:
        return f"{variant} serves the worst group best" if is_worst else f"{variant} has the best {metric}"
    what = "serve the worst group best" if is_worst else f"have the best {metric}"
    names = listing([variant, *leader["level_with"]], most=MOST_NAMED)
    return f"{names} {what}, level on validation data; with {variant}"


def _figure(point: pd.Series, key: str) -> str:
    """``84.1 % accuracy of the worst-served group on test data (95 % interval 82.0 to 86.2, 5 seeds)``."""
    seeds = f"{point['num_seeds']} seed{'' if point['num_seeds'] == 1 else 's'}"
    low, high = max(point[f"{key}:low"], 0.0), min(point[f"{key}:high"], 1.0)  # Student's t knows no ends
    interval = "" if math.isnan(point[f"{key}:low"]) else f"95 % interval {percent(low)} to {percent(high)}, "
    value = f"{percent(point[key])} %" if math.isfinite(point[key]) else "not recorded:"
    return f"{value} {metric_of(key).meaning} on test data ({interval}{seeds})"


def _against_reference(part: pd.DataFrame, leader: pd.Series, key: str) -> str:
    """How far from full precision; nothing where that is not over the same seeds, or sweeps have each their own."""
    reference = part[is_full_precision(part) & (part["seeds"] == leader["seeds"])]
    if reference[key].nunique() != 1 or not math.isfinite(reference.iloc[0][key] - leader[key]):
        return ""
    points = 100 * float(leader[key] - reference.iloc[0][key])
    side = "above" if points >= 0 else "below"
    return f", {abs(points):.1f} points {side} full precision"


def _evidence(part: pd.DataFrame, leader: pd.Series, pairs: pd.DataFrame, *, metric: str) -> tuple[str, ...]:
    said = [_verdict_sentence(pairs, word) for word in ("better", "worse", "no evidence", "cannot be told")]
    said += [_test_order(part, leader, pairs, metric=metric), _image_noise(leader), _fewer_seeds(part, leader)]
    said.append(more_runs_sentence(_beside(part, leader), metric=metric))
    return tuple(s for s in said if s)


def _beside(part: pd.DataFrame, leader: pd.Series) -> pd.DataFrame:
    """The quantised points at the leader's budget, itself among them."""
    return part[~is_full_precision(part) & (part["budget"] == leader["budget"])]


def _verdict_sentence(pairs: pd.DataFrame, word: str) -> str:
    those = pairs[pairs["verdict"] == word]
    if those.empty:
        return ""
    those = _most_telling(those, -those["difference"].abs())
    differences = zip(those["other"], those["difference"], strict=True)
    others = listing([f"{other} ({_signed(by)})" for other, by in differences], most=MOST_NAMED)
    num = int(those["num_pairs"].min())
    if word == "cannot be told":
        return (
            f"Whether that beats {others} cannot be told: {num} common seed{'' if num == 1 else 's'}, "
            f"{MIN_SEEDS} are needed."
        )
    test = f"over {num} seeds, p < 0.05 after Holm"
    if word == "no evidence":
        return f"Not settled against {others}: over {num} seeds no p < 0.05 after Holm."
    return f"{word.capitalize()} than {others} {test}."


def _most_telling(rows: pd.DataFrame, value: pd.Series) -> pd.DataFrame:
    """Rows for a ``listing``: as they are where it names all of them, else those of the highest value first."""
    return rows if len(rows) <= MOST_NAMED + 1 else rows.iloc[(-value).argsort(kind="stable")]


def _signed(difference_frac: float) -> str:
    return f"{100 * difference_frac:+.1f} points" if math.isfinite(difference_frac) else "no common seed"


def _test_order(part: pd.DataFrame, leader: pd.Series, pairs: pd.DataFrame, *, metric: str) -> str:
    """Say it where validation and test do not agree on who leads."""
    key, sign = on_test(metric), 1 if is_maximized(metric) else -1
    at_budget = _beside(part, leader)
    ahead = at_budget[sign * at_budget[key] > sign * leader[key]]
    if ahead.empty or pairs.empty:
        return ""
    ahead = _most_telling(ahead, sign * ahead[key])
    said = [f"{v} ({percent(x)} %)" for v, x in zip(ahead["variant"], ahead[key], strict=True)]
    names = listing(said, most=MOST_NAMED)
    return f"Chosen on validation; on test data {names} came out ahead, so the order is not settled."


def _image_noise(leader: pd.Series) -> str:
    """For a single seed: how far the worst group's number of test images alone can move its accuracy."""
    if leader["num_seeds"] > 1:
        return ""
    groups = group_names(pd.DataFrame([leader]), split="test")
    known = [(float(leader[f"test/{GROUP_ACCURACY}{g}"]), g) for g in groups]
    if not known:
        return "One seed: the order may be chance."
    accuracy, worst = min(known)
    count = leader.get(f"test/{GROUP_COUNT}{worst}", math.nan)
    if not math.isfinite(count) or count < 1:
        return "One seed: the order may be chance."
    low, high = share_interval(accuracy, int(count))
    return (
        f"One seed: the order may be chance. The worst group ({worst}) has {int(count)} test images, which "
        f"alone leaves its accuracy anywhere from {percent(low)} to {percent(high)} %."
    )


def _fewer_seeds(part: pd.DataFrame, leader: pd.Series) -> str:
    at_budget = pd.concat([part[is_full_precision(part)], _beside(part, leader)])
    if at_budget["seeds"].nunique() <= 1:
        return ""
    numbers = zip(at_budget["variant"], at_budget["num_seeds"], strict=True)
    counts = listing([f"{v} {n}" for v, n in numbers], most=MOST_NAMED)
    return f"Not all variants finished the same seeds ({counts}): their means are not over the same trials."


def lead_counts(points: pd.DataFrame, *, metric: str) -> str:
    """Who leads how often, over all panels and budgets with a choice; empty where there is nothing to count.

    Whoever was chosen from more runs than what it is compared with is named: some of its lead is chance.
    """
    contested = points[~is_full_precision(points)].groupby([*PANEL, "budget"])["variant"].transform("size")
    compared = points.loc[contested.index[contested > 1]]
    lead = leaders(compared, metric=metric)
    if len(lead) < 2:
        return ""
    is_level = lead["level_with"].map(len) > 0
    num_level = int(is_level.sum())
    alone = lead.loc[~is_level, "variant"].value_counts()
    counts = [f"{variant} in {count}" for variant, count in alone.items()]
    named = [f"the best validation mean belongs to {listing(counts)}"] if counts else []
    named += [f"several are level in {num_level}"] if num_level else []
    counted = f"Of {len(lead)} comparisons at equal budget, {', and '.join(named)}."
    return f"{counted} {more_runs_sentence(compared, metric=metric)}".rstrip()


def recommend(cells: pd.DataFrame, *, metric: str) -> list[Recommendation]:
    """For each panel and budget the run with the best validation ``metric`` that fits the budget.

    The chosen cells are compared run by run: this picks a model to use. Its validation value is the best of
    several and so a little too good; its test figure is not affected.
    """
    found = []
    for panel, part in panels(cells):
        quantised = part[~is_full_precision(part)]
        for budget in budgets(quantised):
            fitting = under_budget(quantised, budget)
            if not fitting.empty:
                # Of equal runs the one of the variant that leads; keys would draw lots.
                best = best_first(fitting, "num_runs", "variant", tie_column(fitting), metric=metric).iloc[0]
                found.append(_recommendation(panel, budget, best, len(fitting), metric=metric))
    return found


def _recommendation(
    panel: tuple[str, ...], budget: str, best: pd.Series, num: int, *, metric: str
) -> Recommendation:
    word = "highest" if is_maximized(metric) else "lowest"
    key = on_test(metric)
    reason = (
        f"{word} {metric} ({best[metric]:.4f}) of the {num} chosen runs of {panel_title(panel)} with at most "
        f"{budget_phrase(budget)}; it has {_true_size(best, budget)} and {key} {best[key]:.4f}"
    )
    place = dict(zip(PANEL, panel, strict=True))
    return Recommendation(
        **place,
        budget=budget,
        run_id=str(best["run_id"]),
        variant=str(best["variant"]),
        seed=int(best["seed"]),
        true_bits=float(best[BITS]),
        value=float(best[metric]),
        reason=reason,
    )


def _true_size(run: pd.Series, budget: str) -> str:
    """``0.250 bits per weight``, after the size of the file where the budget is one in bytes."""
    kind, _ = budget_order(budget)
    on_disk = f"{budget_phrase(budget_label(math.nan, run[BYTES]))}, " if kind == 2 else ""
    return f"{on_disk}{run[BITS]:.3f} bits per weight"


def recommended_record(
    found: list[Recommendation], choices: list[Choice], *, sweep: str, metric: str
) -> dict[str, Any]:
    """What ``recommended.json`` holds: for each setting (panel) a map from budget to run and reason, and one from
    selection rule to run.

    Settings are kept apart, because runs on other data, groups or networks cannot be compared.
    """
    by_panel: dict[tuple[str, ...], dict[str, Any]] = {}
    for item in found:
        plain = {k: v for k, v in asdict(item).items() if k not in (*PANEL, "budget")}
        by_panel.setdefault(item.panel, {})[item.budget] = plain
    settings = [
        dict(zip(PANEL, panel, strict=True)) | {"budgets": value, "rules": rules_record(choices, panel)}
        for panel, value in by_panel.items()
    ]
    return {"sweep": sweep, "metric": metric, "settings": settings}


def headline_markdown(answers: list[Answer]) -> str:
    """The headlines for a description in Markdown."""
    parts = []
    for answer in answers:
        parts += [f"### {markdown_safe(panel_title(answer.panel))}", f"**{markdown_safe(answer.sentence)}**"]
        parts += [markdown_safe(line) for line in answer.evidence]
    return "\n\n".join(parts) or "No quantised variant has finished: there is nothing to compare yet."


def headline_text(answers: list[Answer]) -> str:
    """The headlines as lines for a terminal."""
    lines = []
    for answer in answers:
        lines += [f"{panel_title(answer.panel)}:", f"  {answer.sentence}", *(f"  {e}" for e in answer.evidence)]
    return "\n".join(lines) or "No quantised variant has finished: there is nothing to compare yet."


def main(argv: list[str] | None = None) -> int:
    """Print the headline of each panel."""
    parser = cli.source_parser("analysis.answers", "Say which variant serves the worst group best.")
    cli.add_metric(parser)

    def act(arguments: Any) -> None:
        cells = select_cells(cli.read_source(arguments), metric=arguments.metric)
        print(arguments.chosen_by, end="\n\n")
        points = aggregate(cells)
        lead = leaders(points, metric=arguments.metric)
        pairs = compare_variants(cells, metric=on_test(arguments.metric), leaders=lead)
        print(headline_text(headlines(points, pairs, metric=arguments.metric)))

    return cli.run(parser, act, argv)


if __name__ == "__main__":
    raise SystemExit(main())
