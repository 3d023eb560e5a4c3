"""Classifiers from timm, and the names of their layers that are quantised."""

from __future__ import annotations

import copy
import difflib
import json
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import timm
import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

from fqsweep.config import ArchitectureConfig
from fqsweep.errors import InputError

SCRATCH_MEAN = (0.5, 0.5, 0.5)
SCRATCH_STD = (0.25, 0.25, 0.25)


@dataclass(frozen=True, kw_only=True)
class Normalisation:
    """Mean and standard deviation per colour channel, for pixels in [0, 1]."""

    mean: tuple[float, float, float]
    std: tuple[float, float, float]


def build_model(
    config: ArchitectureConfig, *, num_classes: int, image_size: int, device: str | torch.device = "cpu"
) -> nn.Module:
    """A timm classifier that takes square images of ``image_size`` pixels.

    Args:
        config: name and where weights come from; a local file may hold another number of classes, its
            classifier is then left at its start values, and position embeddings are resampled.
        num_classes: outputs.
        image_size: pixels.
        device: ``meta`` builds without memory, to count.

    Raises:
        InputError: timm does not know the name, the weights cannot be had, or the size does not fit.
    """
    _check_known(config.name)
    with torch.device(device):
        model = _create(config, num_classes, image_size)
    _check_size(model, config.name, image_size)
    _check_own_weights(model, config.name)
    return model


def build_untrained(name: str, *, num_classes: int, image_size: int) -> nn.Module:
    """An architecture with start values, to load weights into: made once a process, and copied.

    Every copy has the same values, and no random number is drawn from the stream of the caller.

    Raises:
        InputError: as ``build_model``.
    """
    return copy.deepcopy(_template(name, num_classes, image_size))


@lru_cache(maxsize=2)
def _template(name: str, num_classes: int, image_size: int) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return build_model(ArchitectureConfig(name=name), num_classes=num_classes, image_size=image_size)


def _check_known(name: str) -> None:
    if timm.is_model(name):
        return
    close = difflib.get_close_matches(name, timm.list_models(), n=3, cutoff=0.5)
    hint = f"; near: {', '.join(close)}" if close else ""
    raise InputError(
        f"architecture {name!r}: timm {timm.__version__} does not know it{hint} (see timm.list_models())"
    )


def _create(config: ArchitectureConfig, num_classes: int, image_size: int) -> nn.Module:
    options: dict[str, object] = {"num_classes": num_classes}
    if isinstance(config.pretrained, str):
        path = Path(config.pretrained).expanduser()
        if not path.is_file():
            raise InputError(f"architecture {config.name}: pretrained file {path} does not exist")
        options |= {"pretrained": True, "pretrained_cfg_overlay": {"file": str(path)}}
    else:
        options["pretrained"] = config.pretrained
    before = torch.get_rng_state()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = _create_at_size(config.name, options, image_size)
            if isinstance(config.pretrained, str):
                with torch.random.fork_rng(devices=[]):
                    torch.set_rng_state(before)
                    start = _create_at_size(config.name, {"num_classes": num_classes}, image_size)
                _check_all_loaded(model, start, config)
            return model
    except InputError:
        raise
    except Exception as error:
        if not config.pretrained:
            raise InputError(
                f"architecture {config.name} cannot be built for {image_size} px images: {error}"
            ) from error
        source = config.pretrained if isinstance(config.pretrained, str) else "the hub"
        raise InputError(
            f"architecture {config.name}: pretrained weights from {source} cannot be loaded "
            f"({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}); "
            "give a local file, or pretrained: false to train from scratch"
        ) from error


def _check_all_loaded(model: nn.Module, start: nn.Module, config: ArchitectureConfig) -> None:
    """Every weight but the classifier's came from the file: timm passes over names that it does not find.

    Args:
        start: the network with the same random start values, into which nothing was loaded.
    """
    own = timm.get_pretrained_cfg(config.name).classifier
    classifier = (own,) if isinstance(own, str) else tuple(own or ())
    given = dict(start.named_parameters())
    random = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.ndim > 1 and not name.startswith(classifier) and given[name].min() < given[name].max()
    }
    untouched = [name for name, parameter in random.items() if torch.equal(parameter, given[name])]
    if untouched:
        first = ", ".join(untouched[:3]) + (", ..." if len(untouched) > 3 else "")
        raise InputError(
            f"architecture {config.name}: {config.pretrained} holds no weights for {len(untouched)} of "
            f"{len(random)} layers ({first}); its names must be those of timm's {config.name}, without a prefix"
        )


def _create_at_size(name: str, options: dict[str, object], image_size: int) -> nn.Module:
    """Ask for the size; convolutional networks take any and do not know the option."""
    try:
        return timm.create_model(name, img_size=image_size, **options)
    except TypeError as error:
        if "img_size" not in str(error):
            raise
    return timm.create_model(name, **options)


def _check_size(model: nn.Module, name: str, image_size: int) -> None:
    """Run two blank images through the network, so that a size that does not fit shows before training."""
    was_training = model.training
    device = next(model.parameters()).device
    model.eval()
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            output = model(torch.zeros(2, 3, image_size, image_size, device=device))
    except Exception as error:
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise InputError(
            f"architecture {name} cannot take images of {image_size} px: {reason}; "
            f"set the data set's image_size (its own size is {timm.get_pretrained_cfg(name).input_size[-1]})"
        ) from error
    finally:
        model.train(was_training)
    if output.ndim != 2:
        raise InputError(f"architecture {name} is no classifier: its output has shape {tuple(output.shape)}")


def _check_own_weights(model: nn.Module, name: str) -> None:
    """Every weight has one name: it could be stored under one alone, and would have two widths."""
    seen: dict[int, str] = {}
    for key, tensor in model.state_dict(keep_vars=True).items():
        other = seen.setdefault(id(tensor), key)
        if other != key:
            raise InputError(
                f"architecture {name} uses one weight as {other} and as {key}: such networks are not supported"
            )


def normalisation_of(config: ArchitectureConfig) -> Normalisation:
    """The pretrained weights' own normalisation, or a plain one for networks trained from scratch."""
    if not config.pretrained:
        return Normalisation(mean=SCRATCH_MEAN, std=SCRATCH_STD)
    own = timm.get_pretrained_cfg(config.name)
    return Normalisation(mean=tuple(own.mean), std=tuple(own.std))


def quantisable_layers(model: nn.Module) -> dict[str, nn.Conv2d | nn.Linear]:
    """Every Conv2d and Linear by name, in the model's order; their weights' first axis is the output channel."""
    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Conv2d | nn.Linear)}


def output_change(layer: nn.Conv2d | nn.Linear, value: torch.Tensor, change: torch.Tensor) -> torch.Tensor:
    """Change of a layer's output for these inputs when ``change`` is added to its weight.

    A layer that does more than convolve with its weight is called for it, hooks and all.
    """
    if type(layer) is nn.Linear:
        return F.linear(value, change)
    if type(layer) is nn.Conv2d:
        return layer._conv_forward(value, change, None)
    moved = torch.func.functional_call(layer, {"weight": layer.weight + change}, (value,))
    return moved - layer(value)


def count_macs(model: nn.Module, *, image_size: int) -> tuple[dict[str, int], int]:
    """Multiply-accumulates of one image: per quantisable layer, and between activations.

    Every token and position counts. Products between activations (attention) are what is left of the
    counted operations after the layers; 0 in convolutional networks. A layer whose weight is used without calling the
    layer counts by its weight.

    Args:
        model: any device; on ``meta`` nothing is computed.
        image_size: pixels.
    """
    from torch.utils.flop_counter import FlopCounterMode

    layer_macs: Counter[str] = Counter()

    def note(name: str, weight: torch.Tensor) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: object, output: torch.Tensor) -> None:
            layer_macs[name] += _macs_of(output, weight)

        return hook

    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    counter = FlopCounterMode(display=False)
    with ExitStack() as after:
        after.callback(model.train, was_training)
        for name, module in quantisable_layers(model).items():
            after.enter_context(module.register_forward_hook(note(name, module.weight)))
        uses = after.enter_context(_WeightUses(model))
        with torch.no_grad(), counter:
            model(torch.zeros(1, 3, image_size, image_size, device=device))
    total = counter.get_total_flops() // 2
    macs = {**uses.macs, **layer_macs}
    return macs, max(0, total - sum(macs.values()))


def _macs_of(output: torch.Tensor, weight: torch.Tensor) -> int:
    """Every position or token of the output takes each weight once."""
    return output.numel() // weight.shape[0] * weight.numel()


class _WeightUses(TorchFunctionMode):
    """Counts multiply-accumulates of convolutions and linear maps by the layer whose weight they are given."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.names = {id(layer.weight): name for name, layer in quantisable_layers(model).items()}
        self.macs: Counter[str] = Counter()

    def __torch_function__(
        self, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        given = kwargs or {}
        output = function(*args, **given)
        if function in (F.linear, F.conv2d):
            weight = given["weight"] if "weight" in given else args[1]
            if id(weight) in self.names:
                self.macs[self.names[id(weight)]] += _macs_of(output, weight)
        return output


def file_notes(
    architecture: ArchitectureConfig, *, image_size: int, class_names: Sequence[str]
) -> dict[str, str]:
    """What a packed file says of itself, so that it can be used without the sweep."""
    normalisation = normalisation_of(architecture)
    return {
        "architecture": architecture.name,
        "image_size": str(image_size),
        "classes": json.dumps(class_names),
        "normalisation": json.dumps({"mean": normalisation.mean, "std": normalisation.std}),
    }
