"""The quantiser's arithmetic: forward and backward as pure functions, and in which form a run uses them.

Eager, every line below is a pass over the weights. Where all layers are quantised together (``quant.at_once``), the
same formulas stand in C++ for CPUs and in Triton for GPUs. Where they cannot be, ``torch.compile`` makes each
function one loop that reads the weights once; one compilation serves all shapes, but for layers of one unit and units
of more than 4,096 weights, which have their own. It is kept for the life of the process, and lies in the compiler's
cache on disk for the next one. All give the same levels at whole widths; sums over a unit and mixes of two levels may
differ in the last place, so which of them a run uses is part of what determines it.

Axes: u units (rows), n weights of a unit (columns); ``_u1`` is (u, 1).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch

from fqsweep.config import KernelChoice
from fqsweep.quant.at_once_native import NativeBuildError, find_compiler, load_library
from fqsweep.quant.levels import round_to_levels

Tensors = tuple[torch.Tensor, ...]
logger = logging.getLogger(__name__)

# With ``torch.compile`` on a CPU: a process takes 3.5 s to load the kernels, a machine's first one compiles for 20 s,
# and fused passes save 4 ns a weight and step at fixed widths and 15 ns at learned ones.
COMPILING_PAYS_FROM_WEIGHTS = 300_000_000


# --- one grid a unit -----------------------------------------------------------------------------


def quantise(
    weight_un: torch.Tensor, step_u1: torch.Tensor, limit_u1: torch.Tensor, offset_u1: torch.Tensor
) -> torch.Tensor:
    """Each weight's nearest level."""
    return round_to_levels(weight_un, step_u1, limit_u1, offset_u1) * step_u1


def quantise_backward(
    grad_un: torch.Tensor,
    weight_un: torch.Tensor,
    quantised_un: torch.Tensor,
    step_u1: torch.Tensor,
    limit_u1: torch.Tensor,
    offset_u1: torch.Tensor,
) -> Tensors:
    """Straight-through to the weights inside the range; to the steps as Esser et al. 2020, eq. 3.

    Returns:
        gradient of the weights (u, n) and of the steps (u, 1).
    """
    # Clipped weights get no gradient. At 1 bit nothing is clipped; a dropped unit has no gradient.
    one_bit = offset_u1 > 0
    reach_u1 = torch.where(one_bit, torch.inf, limit_u1 * step_u1 * (1 + 1e-6))
    reach_u1 = torch.where(step_u1 > 0, reach_u1, -1.0)
    grad_weight = grad_un.masked_fill(weight_un.abs() > reach_u1, 0.0)
    along_level_u1 = _row_products(grad_un, quantised_un)
    along_weight_u1 = torch.where(one_bit, 0.0, _row_products(grad_weight, weight_un))
    divisor_u1 = torch.where(step_u1 > 0, step_u1, torch.ones_like(step_u1))
    grad_step_u1 = torch.where(step_u1 > 0, (along_level_u1 - along_weight_u1) / divisor_u1, 0.0)
    return grad_weight, grad_step_u1


def _row_products(first_un: torch.Tensor, second_un: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vecdot(first_un, second_un)[:, None]


# --- between two grids ---------------------------------------------------------------------------


def mix(
    weight_un: torch.Tensor,
    share_u1: torch.Tensor,
    low_step_u1: torch.Tensor,
    low_limit_u1: torch.Tensor,
    low_offset_u1: torch.Tensor,
    high_step_u1: torch.Tensor,
    high_limit_u1: torch.Tensor,
    high_offset_u1: torch.Tensor,
) -> torch.Tensor:
    """The mix of a unit's values on two grids, ``share_u1`` of the higher one."""
    low_un = quantise(weight_un, low_step_u1, low_limit_u1, low_offset_u1)
    high_un = quantise(weight_un, high_step_u1, high_limit_u1, high_offset_u1)
    return torch.lerp(low_un, high_un, share_u1)


def mix_backward(
    grad_un: torch.Tensor,
    weight_un: torch.Tensor,
    share_u1: torch.Tensor,
    low_step_u1: torch.Tensor,
    low_limit_u1: torch.Tensor,
    low_offset_u1: torch.Tensor,
    high_step_u1: torch.Tensor,
    high_limit_u1: torch.Tensor,
    high_offset_u1: torch.Tensor,
) -> Tensors:
    """Gradients of the weights (u, n), the share and the two grids' steps, each (u, 1).

    Both grids' values are computed again: reading them back would cost more than the arithmetic.
    """
    low_un = quantise(weight_un, low_step_u1, low_limit_u1, low_offset_u1)
    high_un = quantise(weight_un, high_step_u1, high_limit_u1, high_offset_u1)
    low_weight, low_step = quantise_backward(
        grad_un, weight_un, low_un, low_step_u1, low_limit_u1, low_offset_u1
    )
    high_weight, high_step = quantise_backward(
        grad_un, weight_un, high_un, high_step_u1, high_limit_u1, high_offset_u1
    )
    grad_share_u1 = _row_products(grad_un, high_un) - _row_products(grad_un, low_un)
    low_share_u1 = 1 - share_u1
    grad_weight = torch.lerp(low_weight, high_weight, share_u1)
    return grad_weight, grad_share_u1, low_step * low_share_u1, high_step * share_u1


# --- in which form -------------------------------------------------------------------------------


@dataclass(frozen=True)
class Kernels:
    """The four functions above in one of their forms."""

    name: str
    quantise: Callable[..., torch.Tensor]
    quantise_backward: Callable[..., Tensors]
    mix: Callable[..., torch.Tensor]
    mix_backward: Callable[..., Tensors]


EAGER = Kernels("eager", quantise, quantise_backward, mix, mix_backward)
# Layer by layer the eager ones, as in an evaluation; of all layers at once ``quant.at_once_native``.
NATIVE = Kernels("native", quantise, quantise_backward, mix, mix_backward)


def choose_kernels(
    wanted: KernelChoice, device: torch.device, *, num_weights: int, num_steps: int, at_once: bool
) -> tuple[Kernels, str]:
    """The kernels for a training run, and a remark where there is something to say.

    ``auto`` decides by the work alone, never by a clock: the same run always uses the same kernels. Where no
    compiler works, the eager ones serve: the same arithmetic, slower.

    Args:
        num_weights: quantised weights of the model.
        num_steps: training steps; without any there is nothing to compile for.
        at_once: all layers are quantised together (``quant.at_once``).
    """
    if wanted == "eager" or num_steps == 0:
        return EAGER, ""
    if at_once and device.type == "cpu":
        found, reason = _native()
    elif wanted == "auto" and device.type == "cpu" and num_weights * num_steps < COMPILING_PAYS_FROM_WEIGHTS:
        return EAGER, ""
    else:
        found, reason = _compiled(device.type)
    if found is None:
        return EAGER, f"quantiser kernels are not compiled ({reason}); the eager ones serve, slower"
    return found, ""


def _native() -> tuple[Kernels | None, str]:
    try:
        load_library()
    except NativeBuildError as error:
        return None, str(error)
    return NATIVE, ""


@lru_cache(maxsize=4)
def _compiled(device_type: str) -> tuple[Kernels | None, str]:
    """Compile by use on a small problem; the reason where that fails."""
    if device_type == "cpu" and find_compiler() is None:
        return None, "no C++ compiler found"
    eager: list[Callable[..., Any]] = [quantise, quantise_backward, mix, mix_backward]
    compiled = [_compile(function) for function in eager]
    try:
        with warnings.catch_warnings(), _quiet_compiler():
            warnings.simplefilter("ignore")
            _try_out(Kernels("compiled", *compiled), torch.device(device_type))
    except Exception as error:  # whatever a compiler can raise: it is not needed
        return None, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
    return Kernels("compiled", *map(_or_eager, compiled, eager)), ""


def _or_eager(compiled: Callable[..., Any], eager: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, until a shape that it was not tried on does not compile; then the eager one."""
    fails = False

    @torch.no_grad()
    def call(*tensors: torch.Tensor) -> Any:
        nonlocal fails
        if not fails:
            try:
                return compiled(*tensors)
            except torch.OutOfMemoryError:
                raise  # the eager one takes more
            except Exception:
                fails = True
                logger.warning(
                    "%s does not compile; its eager kernel serves, slower", eager.__name__, exc_info=True
                )
        return eager(*tensors)

    return call


def _compile(function: Callable[..., Any]) -> Callable[..., Any]:
    compiled = torch.compile(function, dynamic=True, fullgraph=True)

    @torch.no_grad()
    def call(*tensors: torch.Tensor) -> Any:
        # Contiguous and without gradients: every other stride or flag would be compiled anew.
        return compiled(*[tensor.detach().contiguous() for tensor in tensors])

    return call


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Without the remark that a machine without a GPU has no CUDA runtime."""
    compiler = logging.getLogger("torch.utils.cpp_extension")
    level = compiler.level
    compiler.setLevel(logging.ERROR)
    try:
        yield
    finally:
        compiler.setLevel(level)


def _try_out(kernels: Kernels, device: torch.device) -> None:
    # Every tensor its own: inputs that are one tensor would be compiled as such.
    weight_un, grad_un = torch.ones(6, 10, device=device), torch.ones(6, 10, device=device)
    share_u1, *grids = [torch.ones(6, 1, device=device) for _ in range(7)]
    quantised_un = kernels.quantise(weight_un, *grids[:3])
    kernels.quantise_backward(grad_un, weight_un, quantised_un, *grids[:3])
    kernels.mix(weight_un, share_u1, *grids)
    kernels.mix_backward(grad_un, weight_un, share_u1, *grids)
