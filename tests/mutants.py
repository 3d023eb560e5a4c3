"""Do the tests notice when a core formula is wrong? Each mutant below is one wrong formula, and must be caught.

    python -m tests.mutants [WORD ...]        only mutants whose file or text has one of the words

Each runs in a copy of the tree, against the tests of its part; the unchanged copy must pass them first. Ends with 1
if a mutant lives. Slow tests are left out: what is wrong with a formula must show in seconds.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

PROJECT = Path(__file__).resolve().parents[1]
COPIED = ("fqsweep", "analysis", "tests", "search_spaces", "docs", "pyproject.toml")
ALLOCATION = ("tests/test_allocation.py", "tests/test_quantile.py")
FAIRNESS = ("tests/test_fairness.py",)
TRAINING = ("tests/test_training.py",)
PACKING = ("tests/quant/test_packing.py",)
REMAINDER = ("tests/quant/test_remainder.py",)
QUANTISER = ("tests/quant/test_grid.py", "tests/quant/test_convert.py", "tests/quant/test_baq.py")
IMPORTANCE = ("tests/test_importance.py", "tests/test_importance_matched.py")
MOMENTS = ("tests/quant/test_moments.py",)
RECONSTRUCTION = ("tests/quant/test_reconstruction.py",)
AT_ONCE = ("tests/quant/test_at_once.py",)


@dataclass(frozen=True)
class Mutant:
    """``old`` stands in the file once and becomes ``new``; ``tests`` should then fail."""

    file: str
    old: str
    new: str
    tests: tuple[str, ...]


HULL, MINIMAX = "fqsweep/allocation/hull.py", "fqsweep/allocation/minimax.py"
PROBLEM, GROUPS = "fqsweep/allocation/problem.py", "fqsweep/fairness.py"
FILE, CODES = "fqsweep/quant/packing.py", "fqsweep/quant/codes.py"
KERNELS, REST = "fqsweep/quant/kernels.py", "fqsweep/quant/remainder.py"
REFIT, NATIVE = "fqsweep/quant/reconstruction.py", "fqsweep/quant/at_once_native.cpp"
BAQ, CONVERT, LEVELS = "fqsweep/quant/baq.py", "fqsweep/quant/convert.py", "fqsweep/quant/levels.py"

MUTANTS = (
    # Allocation: sizes, the budget, the certificate, the largest group.
    Mutant(PROBLEM, "budget_bits * total * (1 + 1e-12)", "budget_bits * total + 1", ALLOCATION),
    Mutant(PROBLEM, "side_bits * (choice_b > 0)", "side_bits * (choice_b >= 0)", ALLOCATION),
    Mutant(PROBLEM, ".sum(axis=1) + offset_g).max())", ".sum(axis=1) + offset_g).min())", ALLOCATION),
    Mutant(PROBLEM, "sum(axis=1) + offset_g", "sum(axis=1)", ALLOCATION),
    Mutant(HULL, "left = capacity - spent(size_ub, start_u)", "left = capacity", ALLOCATION),
    Mutant(HULL, "value -= price * rest", "value -= price * left", ALLOCATION),
    Mutant(HULL, "falls = steepest < 0", "falls = steepest < 1", ALLOCATION),
    Mutant(HULL, "fits = np.flatnonzero(sizes[position:] <= left)", "fits = np.arange(1)", ALLOCATION),
    Mutant(HULL, "if unit not in blocked:", "if True:", ALLOCATION),
    Mutant(MINIMAX, "own_bound = relaxed.value + float(weight_g @ offset_g)", "own_bound = relaxed.value", ALLOCATION),
    Mutant(MINIMAX, "range(len(queue) + MAX_CUTS)", "range(60)", ALLOCATION),
    Mutant(MINIMAX, "cost_g + share * (", "cost_g - share * (", ALLOCATION),
    # The file: codes, their order, steps and widths.
    Mutant(CODES, "np.arange(width - 1, -1, -1, dtype=np.uint8)) & 1", "np.arange(width, dtype=np.uint8)) & 1", PACKING),
    Mutant(CODES, "(level_un + LIMIT_BY_BITS[width])", "(level_un + LIMIT_BY_BITS[width] + 1)", PACKING),
    Mutant(CODES, "return (level_un > 0)", "return (level_un < 0)", PACKING),
    Mutant(CODES, "packed >> 4, packed & 15", "packed & 15, packed >> 4", PACKING),
    Mutant(FILE, "return float(2 * absmax)", "return float(absmax)", PACKING),
    Mutant(FILE, "position[width] = end", "position[width] = 0", PACKING),
    Mutant(REST, "counted_u[gone] = 1", "counted_u[gone] = layer.num_weights", REMAINDER),
    Mutant(REST, "np.where(own_u == 1, 2.0, 1.0)", "np.where(own_u == 1, 1.0, 1.0)", REMAINDER),
    Mutant(REST, "torch.from_numpy(own_u > 0)", "torch.from_numpy(own_u > 1)", REMAINDER),
    # Group metrics.
    Mutant(GROUPS, "predicted_gc - hit_gc, total_g1 - true_gc", "predicted_gc, total_g1 - true_gc", FAIRNESS),
    Mutant(GROUPS, "tpr_gc = _divide(hit_gc, true_gc)", "tpr_gc = _divide(hit_gc, predicted_gc)", FAIRNESS),
    Mutant(GROUPS, "(tpr_gap_c + fpr_gap_c).mean()", "np.maximum(tpr_gap_c, fpr_gap_c).mean()", FAIRNESS),
    Mutant(GROUPS, "known_gc.sum(axis=0) >= 2", "known_gc.sum(axis=0) >= 3", FAIRNESS),
    Mutant(GROUPS, "np.nanmean(tpr_gc, axis=1).min()", "np.nanmin(tpr_gc, axis=1).min()", FAIRNESS),
    Mutant(GROUPS, "scored_g = count_g >= max(min_count, 1)", "scored_g = count_g >= 1", FAIRNESS),
    Mutant(GROUPS, "acc_gap=acc_avg - acc_worst", "acc_gap=float(np.nanmax(acc_g)) - acc_worst", FAIRNESS),
    Mutant(GROUPS, "eopp0=float(fpr_gap_c.mean())", "eopp0=float(tpr_gap_c.mean())", FAIRNESS),
    # The regulariser.
    Mutant("fqsweep/training.py", "* present_g\n", "\n", TRAINING),
    Mutant("fqsweep/training.py", "self.running_g / DRO_TEMPERATURE, -torch.inf", "-self.running_g / DRO_TEMPERATURE, -torch.inf", TRAINING),
    Mutant("fqsweep/training.py", "present_g.gather(0, worst) & present_g.gather(0, best)", "present_g.gather(0, worst)", TRAINING),
    # Levels, the quantiser's gradients, and those of the bits.
    Mutant(LEVELS, "float(2 ** (b - 1) - 1) for b", "float(2 ** (b - 1)) for b", QUANTISER),
    Mutant(LEVELS, "2 * mean_u1, torch", "mean_u1, torch", QUANTISER),
    Mutant(KERNELS, "(along_level_u1 - along_weight_u1) / divisor_u1", "(along_level_u1 + along_weight_u1) / divisor_u1", QUANTISER),
    Mutant(KERNELS, "_row_products(grad_un, high_un) - _row_products(grad_un, low_un)", "_row_products(grad_un, low_un) - _row_products(grad_un, high_un)", QUANTISER),
    Mutant(KERNELS, "low_step * low_share_u1, high_step * share_u1", "low_step * share_u1, high_step * low_share_u1", QUANTISER),
    Mutant(CONVERT, "(-LN2 * levels / (levels - 1))", "(LN2 * levels / (levels - 1))", QUANTISER),
    Mutant(CONVERT, "share_u1.detach() >= 0.5", "share_u1.detach() < 0.5", QUANTISER),
    # BAQ: what moves the bits, and the projection on the budget.
    Mutant(BAQ, "for p in self.parameters]) - move_u", "for p in self.parameters]) + move_u", QUANTISER),
    Mutant(BAQ, "gradient_u / self.size_u", "gradient_u", QUANTISER),
    Mutant(BAQ, "@ share_u\n", "@ torch.full_like(share_u, 1 / len(share_u))\n", QUANTISER),
    Mutant(BAQ, "limit = max(min(self.budget_bits, learned_mean + 1e-3)", "limit = max(self.budget_bits + 0.1", QUANTISER),
    # Importance: the cost of a change, per group.
    Mutant("fqsweep/predictors.py", "/ (2 * count_g[:, None, None])", "/ (2 * count_g.sum())", IMPORTANCE),
    Mutant("fqsweep/predictors.py", '"ng,nu->gu", group_ng, of_image_nu.square()', '"ng,nu->gu", group_ng, of_image_nu', IMPORTANCE),
    Mutant("fqsweep/predictors.py", ".double().cpu().numpy() / 2)", ".double().cpu().numpy())", IMPORTANCE),
    Mutant("fqsweep/quant/moments.py", "torch.where(moves_c, now.variance_c, 1.0)).sqrt()", "torch.where(moves_c, now.variance_c, 1.0))", MOMENTS),
    Mutant("fqsweep/quant/moments.py", "wanted.mean_c - stretch_c * now.mean_c", "wanted.mean_c - now.mean_c", MOMENTS),
    Mutant("fqsweep/quant/moments.py", "(norm.running_mean - shift_c) / stretch_c", "norm.running_mean - shift_c", MOMENTS),
    Mutant("fqsweep/quant/moments.py", "(norm.running_var + norm.eps) / stretch_c.square()", "(norm.running_var + norm.eps) / stretch_c", MOMENTS),
    Mutant("fqsweep/quant/moments.py", "layer.bias * stretch_c + shift_c", "layer.bias + shift_c", MOMENTS),
    Mutant("fqsweep/quant/moments.py", "variance + mean.square()) * images", "variance) * images", IMPORTANCE),
    Mutant("fqsweep/quant/moments.py", "if not in_norm and layer.bias is None", "if False", IMPORTANCE),
    Mutant("fqsweep/quant/moments.py", "stretches = in_norm or can_stretch", "stretches = can_stretch", IMPORTANCE),
    Mutant("fqsweep/quant/moments.py", "if not seen[part.name].images:", "if False:", IMPORTANCE),
    Mutant("fqsweep/quant/moments.py", "num_steps == layer.weight.shape[0] and ", "", MOMENTS),
    Mutant("fqsweep/predictors.py", "(stretch_c - 1) * own_nc", "stretch_c * own_nc", IMPORTANCE),
    Mutant("fqsweep/predictors.py", "+ shift_c * one_nc", "- shift_c * one_nc", IMPORTANCE),
    Mutant("fqsweep/predictors.py", "as_units(gradient * change, part.num_units)", "as_units(change, part.num_units)", IMPORTANCE),
    # What exempt layers, and layers that are used by their weights, compute.
    Mutant("fqsweep/quant/costs.py", "if name not in quantised", "if name in quantised", ("tests/quant/test_units.py",)),
    Mutant("fqsweep/quant/costs.py", "float(exempt_macs) * FULL_PRECISION_BITS", "float(exempt_macs)", ("tests/quant/test_units.py",)),
    Mutant("fqsweep/models.py", "macs = {**uses.macs, **layer_macs}", "macs = {**layer_macs}", ("tests/test_models.py",)),
    # All layers in one call.
    Mutant(NATIVE, "weight / divisor - offset", "weight / divisor", AT_ONCE),
    Mutant(NATIVE, "level > limit ? limit : level", "level", AT_ONCE),
    Mutant(NATIVE, "? std::numeric_limits<float>::infinity()", "? limit * step", AT_ONCE),
    Mutant(NATIVE, "along_level += level_sum;", "along_level = level_sum;", AT_ONCE),
    Mutant(NATIVE, "low.step_gradient(low_level, low_weight) * (1.0f - share)", "low.step_gradient(low_level, low_weight) * share", AT_ONCE),
    Mutant(NATIVE, "high_level - low_level", "low_level - high_level", AT_ONCE),
    Mutant(NATIVE, "low_passed, high_passed, share", "high_passed, low_passed, share", AT_ONCE),
    # Weights re-fitted to full precision's outputs.
    Mutant(REFIT, "off_gpc -= off_gpc.mean", "off_gpc -= 0 * off_gpc.mean", RECONSTRUCTION),
    Mutant(REFIT, "self.wanted.pop(name).sub_(now_gpi)", "now_gpi - self.wanted.pop(name)", RECONSTRUCTION),
    Mutant(REFIT, "keeps_u = quantiser.bits_u > 0", "keeps_u = quantiser.bits_u >= 0", RECONSTRUCTION),
    Mutant(REFIT, "DAMPING * num_places * moment_gi", "DAMPING * moment_gi", RECONSTRUCTION),
    Mutant(REFIT, "now_gpi = _centre(now_gpi)", "pass", RECONSTRUCTION),
    Mutant(REFIT, "(4 * FLOAT32_EPS) ** 2 *", "0 *", RECONSTRUCTION),
    Mutant(REFIT, "_solve(gram, damping, output_gpc).mT @ input_gpi", "_solve(gram, 0 * damping + 1, output_gpc).mT @ input_gpi", RECONSTRUCTION),
    Mutant(REFIT, "moment_gi[:, None].expand_as", "now_gpi.mean(dim=1)[:, None].expand_as", RECONSTRUCTION),
    Mutant(REFIT, "layer.stride[1] * (place % num_x)", "layer.stride[0] * (place % num_x)", RECONSTRUCTION),
    Mutant(REFIT, 'layer.padding_mode == "zeros" and ', "", RECONSTRUCTION),
    Mutant(REFIT, "torch.Generator().manual_seed(0)", "None", RECONSTRUCTION),
    Mutant("fqsweep/quant/moments.py", "inputs[0], name in norms or layer.bias is not None", "inputs[0], True", RECONSTRUCTION),
)  # fmt: skip


def tests_fail(folder: Path, tests: tuple[str, ...]) -> bool:
    """Whether any of the tests fails in that copy."""
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-n0", "-m", "not slow", "-p", "no:cacheprovider", *tests],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    if ended.returncode not in (0, 1):
        raise RuntimeError(
            f"pytest ended with {ended.returncode}:\n{ended.stdout[-2000:]}{ended.stderr[-2000:]}"
        )
    return ended.returncode == 1


def main() -> int:
    """Try the mutants; the number that live."""
    words = sys.argv[1:]
    mutants = [m for m in MUTANTS if not words or any(word in m.file + m.old for word in words)]
    alive = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for part in COPIED:
            source = PROJECT / part
            (shutil.copytree if source.is_dir() else shutil.copy)(source, folder / part)
        for tests in dict.fromkeys(mutant.tests for mutant in mutants):
            if tests_fail(folder, tests):
                raise RuntimeError(f"{', '.join(tests)}: fails without any mutant")
        for mutant in mutants:
            file = folder / mutant.file
            text = file.read_text(encoding="utf-8")
            if text.count(mutant.old) != 1:
                raise RuntimeError(f"{mutant.file}: {mutant.old!r} stands there {text.count(mutant.old)} times")
            file.write_text(text.replace(mutant.old, mutant.new), encoding="utf-8")
            caught = tests_fail(folder, mutant.tests)
            file.write_text(text, encoding="utf-8")
            print(
                f"{'caught' if caught else 'LIVES '} {mutant.file}: {mutant.old.strip()} -> {mutant.new.strip()}",
                flush=True,
            )
            if not caught:
                alive.append(mutant)
    print(f"{len(mutants) - len(alive)} of {len(mutants)} mutants caught")
    return min(len(alive), 1)


if __name__ == "__main__":
    sys.exit(main())
