"""Building classifiers, naming their quantisable layers and counting their work."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from fqsweep.config import ArchitectureConfig
from fqsweep.errors import InputError
from fqsweep.models import build_model, build_untrained, count_macs, normalisation_of, quantisable_layers

ARCHITECTURES = [
    ("resnet18", 32),
    ("deit_tiny_patch16_224", 32),
    ("tiny_vit_5m_224", 64),
    ("mobilenetv3_small_050", 32),
    ("convnext_atto", 32),
]


class Small(nn.Module):
    """A grouped convolution, a plain one, tokens, attention-like products and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.grouped = nn.Conv2d(8, 8, 3, padding=1, groups=4)
        self.tokens = nn.Linear(8, 6)
        self.head = nn.Linear(6, 2)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        x = self.grouped(self.conv(image)).flatten(2).transpose(1, 2)
        x = self.tokens(x)
        x = (x @ x.transpose(1, 2)) @ x
        return self.head(x.mean(dim=1))


@pytest.mark.parametrize(("name", "size"), ARCHITECTURES)
def test_an_architecture_takes_the_size_and_gives_the_classes(name: str, size: int) -> None:
    torch.set_num_threads(1)
    model = build_model(ArchitectureConfig(name=name), num_classes=3, image_size=size)
    assert model.training
    with torch.no_grad():
        assert model.eval()(torch.zeros(2, 3, size, size)).shape == (2, 3)


def test_trying_the_size_does_not_move_the_networks_statistics() -> None:
    model = build_model(ArchitectureConfig(name="test_resnet"), num_classes=2, image_size=32)
    moved = [
        name for name, value in model.state_dict().items() if name.endswith("tracked") and value.item() != 0
    ]
    assert moved == []


@pytest.mark.parametrize(
    ("name", "size", "message"),
    [
        ("resnet81", 32, "timm .* does not know it; near: .*resnet18"),
        ("no-such-thing-at-all", 32, "does not know it .see timm.list_models"),
        ("inception_v3", 16, "inception_v3 cannot take images of 16 px: .* set the data set's image_size"),
    ],
)
def test_what_cannot_be_built_is_refused_with_what_to_do(name: str, size: int, message: str) -> None:
    with pytest.raises(InputError, match=message):
        build_model(ArchitectureConfig(name=name), num_classes=2, image_size=size, device="meta")


def test_pretrained_weights_come_from_a_local_file_with_another_number_of_classes(tmp_path: Path) -> None:
    source = build_model(ArchitectureConfig(name="test_resnet"), num_classes=7, image_size=32)
    save_file(source.state_dict(), tmp_path / "weights.safetensors")
    config = ArchitectureConfig(name="test_resnet", pretrained=str(tmp_path / "weights.safetensors"))
    model = build_model(config, num_classes=2, image_size=32)
    first = next(iter(quantisable_layers(source)))
    assert torch.equal(quantisable_layers(model)[first].weight, quantisable_layers(source)[first].weight)
    assert list(quantisable_layers(model).values())[-1].weight.shape[0] == 2


def test_a_pretrained_file_that_is_absent_or_no_weights_is_refused(tmp_path: Path) -> None:
    absent = ArchitectureConfig(name="test_resnet", pretrained=str(tmp_path / "absent.pth"))
    with pytest.raises(InputError, match=r"pretrained file .*absent.pth does not exist"):
        build_model(absent, num_classes=2, image_size=32)
    (tmp_path / "junk.safetensors").write_bytes(b"junk")
    junk = ArchitectureConfig(name="test_resnet", pretrained=str(tmp_path / "junk.safetensors"))
    with pytest.raises(InputError, match=r"cannot be loaded .*pretrained: false"):
        build_model(junk, num_classes=2, image_size=32)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit", "test_efficientnet"])
def test_a_pretrained_file_whose_names_do_not_fit_is_refused(tmp_path: Path, name: str) -> None:
    size = 160 if "vit" in name else 32
    weights = build_model(ArchitectureConfig(name=name), num_classes=7, image_size=size).state_dict()
    one = next(key for key, value in weights.items() if key.endswith("weight") and value.ndim > 1)
    file = tmp_path / "weights.safetensors"
    config = ArchitectureConfig(name=name, pretrained=str(file))
    half = {key: value for key, value in weights.items() if key != one}
    for content in ({f"backbone.{key}": value for key, value in weights.items()}, half):
        save_file(content, file)
        with pytest.raises(InputError, match=f"holds no weights for .*{one}.*must be those of timm's {name}"):
            build_model(config, num_classes=2, image_size=size)
    save_file(weights, file)
    torch.manual_seed(3)
    build_model(config, num_classes=2, image_size=size)
    drawn = torch.rand(1)
    torch.manual_seed(3)
    build_model(ArchitectureConfig(name=name), num_classes=2, image_size=size)
    assert torch.equal(drawn, torch.rand(1)), "the check draws nothing from the caller's stream"


def test_networks_from_scratch_have_a_plain_normalisation_and_pretrained_ones_their_own() -> None:
    assert normalisation_of(ArchitectureConfig(name="resnet18")).mean == (0.5, 0.5, 0.5)
    own = normalisation_of(ArchitectureConfig(name="resnet18", pretrained=True))
    assert own.mean == pytest.approx((0.485, 0.456, 0.406))
    assert own.std == pytest.approx((0.229, 0.224, 0.225))


def test_quantisable_layers_are_every_convolution_and_linear_layer_in_order() -> None:
    assert list(quantisable_layers(Small())) == ["conv", "grouped", "tokens", "head"]
    with torch.device("meta"):
        layers = quantisable_layers(
            build_model(ArchitectureConfig(name="resnet18"), num_classes=2, image_size=32)
        )
    assert len(layers) == 21
    assert sum(layer.weight.shape[0] for name, layer in layers.items() if name != "fc") == 4800


def test_macs_are_counted_by_position_token_and_group() -> None:
    layer_macs, between = count_macs(Small(), image_size=8)
    assert layer_macs == {
        "conv": 4 * 4 * 8 * 3 * 9,
        "grouped": 4 * 4 * 8 * 2 * 9,
        "tokens": 16 * 6 * 8,
        "head": 6 * 2,
    }
    assert between == 2 * 16 * 16 * 6


def test_a_layer_counts_where_only_its_weight_is_used() -> None:
    class ByWeight(Small):
        def forward(self, image: torch.Tensor) -> torch.Tensor:
            x = self.grouped(self.conv(image)).flatten(2).transpose(1, 2)
            x = nn.functional.linear(x, weight=self.tokens.weight)
            return nn.functional.linear((x @ x.transpose(1, 2) @ x).mean(dim=1), self.head.weight)

    assert count_macs(ByWeight(), image_size=8) == count_macs(Small(), image_size=8)


def test_a_network_that_shares_weights_between_layers_is_refused() -> None:
    config = ArchitectureConfig(name="coat_lite_tiny")
    with pytest.raises(
        InputError, match=r"coat_lite_tiny uses one weight as cpe1\.proj\.weight and as serial_blocks1"
    ):
        build_model(config, num_classes=2, image_size=224, device="meta")


@pytest.mark.parametrize(("name", "size"), [("resnet18", 64), ("deit_tiny_patch16_224", 32)])
def test_macs_on_the_meta_device_are_those_on_the_cpu(name: str, size: int) -> None:
    config = ArchitectureConfig(name=name)
    counts = [
        count_macs(build_model(config, num_classes=2, image_size=size, device=device), image_size=size)
        for device in ("meta", "cpu")
    ]
    assert counts[0] == counts[1]
    assert (counts[0][1] > 0) == (name != "resnet18")


def test_counting_leaves_the_model_as_it_was() -> None:
    model = Small().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    count_macs(model, image_size=8)
    assert model.training and not model.conv._forward_hooks
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_networks_to_load_into_are_copies_and_draw_no_random_numbers() -> None:
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first, second = (build_untrained("test_resnet", num_classes=4, image_size=32) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    with torch.no_grad():
        for parameter in first.parameters():
            parameter.zero_()
    third = build_untrained("test_resnet", num_classes=4, image_size=32)
    for name, value in second.state_dict().items():
        assert torch.equal(value, third.state_dict()[name]), name
    assert any(parameter.any() for parameter in third.parameters())
