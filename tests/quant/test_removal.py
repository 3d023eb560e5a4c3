"""Dropped channels leave and the logits stay: every architecture, every kind of place, and what must not leave."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.quant import fake_quantize
from fqsweep.quant.packed_model import load_model, mean_bits, shrink
from fqsweep.quant.packing import UnpackedWeights, pack_weights, read_metadata, unpack_weights
from fqsweep.quant.removal import RemovalError, load_weights, remove_dropped_channels
from fqsweep.quant.resizing import fit_layers
from tests.quant.packed_networks import SIZE_BY_NAME, logits_of, packed_network, random_images

WHOLE_LAYERS = {
    "resnet18": ("layer1.0.conv1", "layer2.0.conv2", "layer3.1.conv1", "layer3.1.conv2"),
    "deit_tiny_patch16_224": (
        "blocks.0.mlp.fc1",
        "blocks.1.mlp.fc2",
        "blocks.2.attn.qkv",
        "blocks.3.attn.proj",
    ),
    "tiny_vit_5m_224": (
        "stages.0.blocks.0.conv2.conv",
        "stages.1.blocks.0.attn.qkv",
        "stages.2.blocks.0.attn.proj",
        "stages.2.blocks.1.mlp.fc1",
    ),
}


shrunk = cache(shrink)


def num_weights(blob: bytes) -> int:
    return sum(tensor.numel() for tensor in unpack_weights(blob).values())


def spent_bits(blob: bytes) -> int:
    state = unpack_weights(blob)
    return sum(int(b.astype(int).sum()) * (state[name].numel() // len(b)) for name, b in state.bits.items())


def check_same_logits(whole: bytes, small: bytes, image_size: int) -> None:
    images = random_images(3, image_size, seed=5)
    expected = logits_of(load_model(whole), images)
    error = float((logits_of(load_model(small), images) - expected).abs().max())
    assert error <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("drop_frac", [0.1, 0.6])
@pytest.mark.parametrize("name", SIZE_BY_NAME)
def test_the_logits_stay_and_the_file_shrinks(name: str, drop_frac: float) -> None:
    whole = packed_network(name, drop_frac=drop_frac)
    small = shrunk(whole)
    check_same_logits(whole, small, SIZE_BY_NAME[name])
    assert len(small) < len(whole)
    assert num_weights(small) < num_weights(whole) * (0.97 if drop_frac == 0.1 else 0.5)
    assert spent_bits(small) < spent_bits(whole)
    assert float(read_metadata(small)["whole_mean_bits"]) == pytest.approx(
        mean_bits(unpack_weights(whole)), rel=1e-5
    )


@pytest.mark.parametrize("name", WHOLE_LAYERS)
def test_layers_that_are_dropped_whole_keep_one_channel(name: str) -> None:
    whole = packed_network(name, drop_frac=0.2, whole_layers=WHOLE_LAYERS[name])
    small = shrink(whole)
    check_same_logits(whole, small, SIZE_BY_NAME[name])
    state = unpack_weights(small)
    assert min(len(tensor) for key, tensor in state.items() if key.endswith(".weight")) == 1
    assert all(tensor.numel() for tensor in state.values())


def test_a_smaller_file_comes_back_bit_for_bit_and_shrinks_no_further() -> None:
    for name in ("resnet18", "deit_tiny_patch16_224"):
        small = shrunk(packed_network(name, drop_frac=0.6))
        state = unpack_weights(small)
        assert state.float_columns or state.heads
        metadata = {k: v for k, v in read_metadata(small).items() if k != "crc32"}
        assert state.pack(metadata) == small
        assert shrink(small) == small


def test_a_network_without_dropped_channels_stays_as_it_is() -> None:
    whole = packed_network("resnet18", drop_frac=0.0, widths=(4, 8))
    assert shrink(whole) == whole


def test_one_width_for_whole_layers_is_shrunk_too() -> None:
    """Units of whole tensors: a dropped layer leaves, queries are not scaled by themselves."""
    source = unpack_weights(packed_network("deit_tiny_patch16_224", drop_frac=0.0))
    bits = {name: np.array([3]) for name in source.bits}
    bits["blocks.0.mlp.fc1.weight"] = bits["blocks.1.attn.qkv.weight"] = np.array([0])
    state = {
        n: fake_quantize(t.reshape(1, -1), int(bits[n][0])).view_as(t) if n in bits else t
        for n, t in source.items()
    }
    notes = read_metadata(packed_network("deit_tiny_patch16_224", drop_frac=0.0))
    whole = pack_weights(
        state,
        bits,
        metadata={
            k: v for k, v in notes.items() if k in ("architecture", "image_size", "classes", "normalisation")
        },
    )
    small = shrink(whole)
    check_same_logits(whole, small, 64)
    found = unpack_weights(small)
    assert len(found["blocks.0.mlp.fc1.weight"]) == 1
    assert found.heads == {"blocks.1.attn": (1, 64, 64)}


# --- small networks, place by place ---------------------------------------------------------------


class Net(nn.Module):
    """Layers in a row, then the mean over positions."""

    def __init__(self, *layers: nn.Module) -> None:
        super().__init__()
        self.layers = nn.Sequential(*layers)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers(x).mean(dim=(2, 3))


def conv(inputs: int, outputs: int, size: int, **options: int | bool) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, size, padding=size // 2, **options)  # type: ignore[arg-type]


NETS: dict[str, tuple[Callable[[], nn.Module], int, list[int]]] = {
    # Name: network, layer whose rows 1 and 3 are dropped, channels that its consumer reads afterwards.
    "into a pointwise layer": (lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 1)), 0, [4]),
    "without a bias": (lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 1, bias=False)), 0, [4]),
    "into a norm": (lambda: Net(conv(3, 6, 3), nn.ReLU(), conv(6, 4, 1), nn.BatchNorm2d(4)), 0, [4]),
    "in place": (lambda: Net(conv(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(True), conv(6, 4, 1)), 0, [4]),
    "into a border": (lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 3)), 0, [5]),
    "border with a stride": (lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 3, stride=2)), 0, [5]),
    "before a depthwise border": (
        lambda: Net(conv(3, 6, 1), nn.GELU(), conv(6, 6, 3, groups=6), nn.GELU(), conv(6, 4, 1)),
        0,
        [6],
    ),
    "in a depthwise layer": (
        lambda: Net(conv(3, 6, 1), nn.GELU(), conv(6, 6, 3, groups=6), nn.GELU(), conv(6, 4, 1)),
        2,
        [4],
    ),
    "before a softmax": (lambda: Net(conv(3, 6, 3), nn.Softmax(dim=1), conv(6, 4, 1)), 0, [6]),
    "before a norm over channels": (lambda: Net(conv(3, 6, 3), nn.GroupNorm(2, 6), conv(6, 4, 1)), 0, [6]),
    "before a grouped layer": (lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 1, groups=2)), 0, [3]),
}


def plain_state(model: nn.Module) -> UnpackedWeights:
    return UnpackedWeights({name: tensor.detach().clone() for name, tensor in model.state_dict().items()})


def seeded(build: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
    def again() -> nn.Module:
        torch.manual_seed(3)
        model = build()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.normal_(module.running_mean)
                nn.init.uniform_(module.running_var, 0.5, 2.0)
                nn.init.normal_(module.weight)
                nn.init.normal_(module.bias)
        return model.eval()

    return again


@pytest.mark.parametrize("place", NETS)
def test_what_leaves_a_small_network_is_what_the_rules_say(place: str) -> None:
    make, dropped, columns = NETS[place]
    build = seeded(make)
    state = plain_state(build())
    state[f"layers.{dropped}.weight"][[1, 3]] = 0
    small = remove_dropped_channels(state, build, image_size=8)
    last = [key for key in small if key.endswith(".weight") and small[key].ndim == 4][-1]
    assert [small[last].shape[1]] == columns
    images = random_images(2, 8, seed=0)
    whole, shrunk = (load_weights(build(), weights)(images) for weights in (state, small))
    assert torch.allclose(whole, shrunk, atol=2e-6)


def test_channels_that_nothing_reads_leave_even_if_they_vary() -> None:
    build = seeded(lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 3)))
    state = plain_state(build())
    state["layers.2.weight"][:, [0, 5]] = 0
    small = remove_dropped_channels(state, build, image_size=8)
    assert torch.equal(small["layers.0.weight"], state["layers.0.weight"][1:5])


def test_the_merged_column_by_hand() -> None:
    """Constants 2 and 4 with columns of 1 and 3: one channel of 4 with the column (2 * 1 + 4 * 3) / 4."""
    build = lambda: Net(nn.Conv2d(3, 3, 1), nn.ReLU(), nn.Conv2d(3, 1, 3, padding=1, bias=False))  # noqa: E731
    state = plain_state(build())
    state["layers.0.weight"][1:] = 0
    state["layers.0.bias"] = torch.tensor([0.0, 2.0, 4.0])
    state["layers.2.weight"][:, 1], state["layers.2.weight"][:, 2] = 1.0, 3.0
    small = remove_dropped_channels(state, build, image_size=4)
    assert small["layers.0.bias"].tolist() == [0.0, 4.0]
    assert torch.equal(small["layers.2.weight"][:, 1], torch.full((1, 3, 3), 3.5))


def test_constants_that_would_take_more_room_as_one_column_stay() -> None:
    """Two columns of 4 bits are smaller than one of 32."""
    build = seeded(lambda: Net(conv(3, 6, 3), nn.GELU(), conv(6, 4, 3)))
    state = plain_state(build())
    state["layers.0.weight"][[1, 3]] = 0
    weight = fake_quantize(state["layers.2.weight"], 4)
    state["layers.2.weight"], state.bits["layers.2.weight"] = weight, np.full(4, 4, np.uint8)
    state.steps["layers.2.weight"] = (weight.flatten(1).abs().amax(dim=1) / 7).numpy()
    assert remove_dropped_channels(state, build, image_size=8)["layers.2.weight"].shape[1] == 6


def test_a_shared_layer_keeps_its_channels() -> None:
    class Shared(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.layers[1](self.layers[0](self.layers[0](x))).mean(dim=(2, 3))

    build = seeded(lambda: Shared(conv(3, 3, 3), conv(3, 4, 1)))
    state = plain_state(build())
    state["layers.0.weight"][1] = 0
    assert remove_dropped_channels(state, build, image_size=8)["layers.0.weight"].shape[0] == 3


def test_a_network_that_would_compute_something_else_is_never_returned() -> None:
    class CountsItsChannels(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * self.layers[0].out_channels

    build = seeded(lambda: CountsItsChannels(conv(3, 6, 3), nn.GELU(), conv(6, 4, 1)))
    state = plain_state(build())
    state["layers.0.weight"][1] = 0
    with pytest.raises(RemovalError, match="without its dropped channels has other logits"):
        remove_dropped_channels(state, build, image_size=8)


def test_a_network_whose_code_wants_all_its_channels_is_said() -> None:
    class WantsAll(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            first, second, third = self.layers
            hidden = first(x)
            if hidden.shape[1] != 6:
                raise RuntimeError("six channels are wanted")
            return third(second(hidden)).mean(dim=(2, 3))

    build = seeded(lambda: WantsAll(conv(3, 6, 3), nn.GELU(), conv(6, 4, 1)))
    state = plain_state(build())
    state["layers.0.weight"][1] = 0
    with pytest.raises(RemovalError, match="does not take fewer channels: six channels are wanted"):
        remove_dropped_channels(state, build, image_size=8)


def test_a_depthwise_layer_with_several_filters_a_channel_keeps_its_groups() -> None:
    def build() -> nn.Module:
        return nn.Sequential(
            conv(3, 4, 3), nn.Conv2d(4, 8, 3, groups=4), nn.Conv2d(8, 8, 3, groups=8), nn.Flatten()
        )

    source, model = build(), build()
    fit_layers(model, source.state_dict(), heads={})
    model.load_state_dict(source.state_dict())
    images = torch.randn(2, 3, 12, 12)
    assert torch.equal(model(images), source(images))


def test_nothing_that_is_given_is_changed() -> None:
    whole = unpack_weights(packed_network("resnet18", drop_frac=0.6))
    before = {name: tensor.clone() for name, tensor in whole.items()}
    build = lambda: load_model(packed_network("resnet18", drop_frac=0.6))  # noqa: E731
    remove_dropped_channels(whole, build, image_size=64)
    assert all(torch.equal(whole[name], tensor) for name, tensor in before.items())
    assert not whole.float_columns
