"""Packed models: every bit comes back, takes the room it claims, and damage is seen."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load, save

from fqsweep.models import quantisable_layers
from fqsweep.quant import PackedFileError, fake_quantize, pack_weights, unpack_weights
from fqsweep.quant.grid import quantise_units
from fqsweep.quant.levels import absmax_steps
from fqsweep.quant.packed_model import load_model, shrink
from fqsweep.quant.packing import HeadShape, read_metadata
from tests.quant.packed_networks import SIZE_BY_NAME, notes_of, packed_network, random_images, random_network

PROJECT = Path(__file__).resolve().parents[2]


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes()


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal in shape, type and every bit, but that zero has one sign."""
    if a.is_floating_point():
        a, b = a + 0.0, b + 0.0
    return a.shape == b.shape and a.dtype == b.dtype and bytes_of(a) == bytes_of(b)


@st.composite
def models(draw: Any) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """States whose quantised tensors lie on grids, with any mix of widths; zeros, single weights, other types."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10_000)))
    state: dict[str, torch.Tensor] = {
        "bn.num_batches_tracked": torch.tensor(7),
        "empty": torch.zeros(0, 3),
        "flag": torch.tensor([True, False]),
        "bias": torch.randn(3, generator=generator),
        "half": torch.randn(2, 2, generator=generator).half(),
    }
    bits: dict[str, torch.Tensor] = {}
    for index in range(draw(st.integers(1, 3))):
        shape = draw(st.sampled_from([(1, 1), (4, 1), (3, 2, 3, 3), (5, 7), (6,)]))
        widths = torch.tensor(draw(st.lists(st.integers(0, 8), min_size=shape[0], max_size=shape[0])))
        weight = torch.randn(shape, generator=generator)
        if draw(st.booleans()):
            weight[0] = 0
        state[f"layer{index}.weight"] = fake_quantize(weight, widths)
        bits[f"layer{index}.weight"] = widths
    return state, bits


@settings(max_examples=120, deadline=None)
@given(model=models())
def test_any_mix_of_widths_comes_back_bit_for_bit(model: Any) -> None:
    state, bits = model
    found = unpack_weights(pack_weights(state, bits))
    assert set(found) == set(state)
    for name, tensor in state.items():
        assert same_bits(found[name], tensor), name
    for name, widths in bits.items():
        assert found.bits[name].tolist() == widths.tolist()


@settings(max_examples=40, deadline=None)
@given(model=models())
def test_packing_what_was_unpacked_gives_the_same_bytes(model: Any) -> None:
    blob = pack_weights(*model)
    found = unpack_weights(blob)
    assert pack_weights(found, found.bits, steps=found.steps) == blob


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("bits", range(9))
def test_other_float_types_come_back_too(dtype: torch.dtype, bits: int) -> None:
    weight = fake_quantize(torch.randn(6, 11, generator=torch.Generator().manual_seed(bits)).to(dtype), bits)
    assert same_bits(unpack_weights(pack_weights({"w": weight}, {"w": bits}))["w"], weight)


def test_steps_of_a_quantiser_are_kept_exactly() -> None:
    level = torch.tensor([[1.0, -3.0, 2.0], [0.5, -0.5, 0.5], [0.0, 0.0, 0.0]])
    step = np.array([0.1, 0.37, 0.0], dtype=np.float32)
    weight = level * torch.from_numpy(step)[:, None]
    found = unpack_weights(pack_weights({"w": weight}, {"w": np.array([3, 1, 0])}, steps={"w": step}))
    assert same_bits(found["w"], weight)
    assert found.steps["w"].tolist() == step.tolist()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_steps_of_a_quantiser_fit_weights_that_were_rounded_to_a_shorter_type(dtype: torch.dtype) -> None:
    level = torch.tensor([[1.0, -3.0, 2.0], [7.0, -5.0, 3.0]])
    step = np.array([0.1, 0.37], dtype=np.float32)
    weight = (level * torch.from_numpy(step)[:, None]).to(dtype)
    found = unpack_weights(pack_weights({"w": weight}, {"w": np.array([3, 4])}, steps={"w": step}))
    assert same_bits(found["w"], weight)


def test_one_width_for_a_whole_tensor_has_one_step() -> None:
    weight = torch.tensor([[3.0, -1.0], [0.0, 2.0]]) * 0.25
    found = unpack_weights(
        pack_weights({"w": weight}, {"w": np.array([3])}, steps={"w": np.array([0.25], np.float32)})
    )
    assert same_bits(found["w"], weight) and found.bits["w"].tolist() == [3]


def test_weights_off_the_grid_are_quantised_as_fake_quantize_does() -> None:
    weight = torch.randn(9, 20, generator=torch.Generator().manual_seed(3))
    widths = torch.arange(9)
    assert same_bits(
        unpack_weights(pack_weights({"w": weight}, {"w": widths}))["w"], fake_quantize(weight, widths)
    )


def test_a_weight_takes_as_many_bits_as_it_claims() -> None:
    weight = fake_quantize(torch.randn(64, 1000, generator=torch.Generator().manual_seed(0)), 3)
    sizes = [len(pack_weights({"w": weight}, {"w": torch.full((64,), b)})) for b in (0, 1, 3, 8)]
    claims = [64_000 * b / 8 for b in (0, 1, 3, 8)]
    # Header, widths (half a byte a unit) and steps (four bytes a unit that is not dropped).
    for size, claim, num_steps in zip(sizes, claims, (0, 64, 64, 64), strict=True):
        assert claim + 32 + 4 * num_steps <= size <= claim + 32 + 4 * num_steps + 700


def test_codes_are_laid_out_as_the_format_says() -> None:
    weight = torch.tensor([[3.0, -3.0, 0.0, 1.0]])
    blob = pack_weights({"w": weight}, {"w": 3}, steps={"w": np.ones(1, np.float32)})
    tensors = load(blob)
    # Levels plus 3 in three bits each: 110 000 011 100, then zeros.
    assert tensors["codes.3"].tolist() == [0b11000001, 0b11000000]
    assert tensors["bits"].tolist() == [0x30]
    assert json.loads(read_metadata(blob)["layers"]) == [
        {"name": "w", "shape": [1, 4], "dtype": "float32", "units": 1}
    ]


def test_a_model_without_quantised_tensors_is_packed_as_it_is() -> None:
    state = {"w": torch.randn(3, 2), "n": torch.tensor(4)}
    found = unpack_weights(pack_weights(state, {}))
    assert all(same_bits(found[name], state[name]) for name in state) and found.bits == {}


def test_tensors_that_share_memory_come_back_each() -> None:
    weight = torch.randn(3, 2)
    found = unpack_weights(pack_weights({"a": weight, "b": weight, "c": weight[:2]}, {"c": 8}))
    assert torch.equal(found["a"], weight) and torch.equal(found["b"], weight)


def test_other_kinds_of_bytes_are_read_too() -> None:
    blob = pack_weights({"w": torch.randn(3, 2)}, {"w": 4})
    for same in (bytearray(blob), memoryview(blob)):
        assert torch.equal(unpack_weights(same)["w"], unpack_weights(blob)["w"])


def test_notes_are_kept_in_the_header() -> None:
    assert read_metadata(pack_weights({}, {}, metadata={"classes": '["a"]'}))["classes"] == '["a"]'


def test_packing_changes_nothing_it_was_given() -> None:
    weight = torch.randn(3, 4)
    before = weight.clone()
    pack_weights({"w": weight}, {"w": 2})
    assert torch.equal(weight, before)


@pytest.mark.parametrize(
    ("bits", "steps", "message"),
    [
        ({"v": 4}, None, "bits are given for 'v', which is not in the state"),
        ({"w": 9}, None, r"'w': widths must lie in 0..8"),
        ({"w": 2.5}, None, "'w': widths must be whole numbers of bits"),
        ({"w": np.array([2.0, np.nan])}, None, "'w': widths must be whole numbers of bits"),
        ({"w": np.array([1, 2, 3])}, None, r"'w': 2 widths .or 1. are needed, got shape \(3,\)"),
        ({"n": 4}, None, "'n' is no float tensor"),
        (
            {"w": 3},
            {"w": np.array([0.3, 0.3], np.float32)},
            "weights do not lie on the grid of the steps given",
        ),
        ({"w": 3}, {"w": np.array([1.0], np.float32)}, "2 steps are needed"),
        ({"inf": 4}, None, "'inf': weights and steps must be finite"),
        ({"nan": 1}, None, "'nan': weights and steps must be finite"),
        ({"none": 4}, None, "'none' is no float tensor with an output-channel axis"),
    ],
)
def test_what_cannot_be_packed_is_refused(bits: Any, steps: Any, message: str) -> None:
    state = {"w": torch.tensor([[1.0, 2.0], [3.0, -1.0]]), "n": torch.tensor([1, 2])}
    state |= {
        "inf": torch.tensor([[torch.inf, 1.0]]),
        "nan": torch.tensor([[torch.nan]]),
        "none": torch.zeros(0, 3),
    }
    with pytest.raises(ValueError, match=message):
        pack_weights(state, bits, steps=steps)


# --- damage --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def blob() -> bytes:
    generator = torch.Generator().manual_seed(0)
    state = {
        "conv.weight": torch.randn(4, 3, 3, 3, generator=generator),
        "fc.weight": torch.randn(2, 5, generator=generator),
        "fc.bias": torch.randn(2, generator=generator),
        "count": torch.tensor(3),
    }
    return pack_weights(state, {"conv.weight": torch.tensor([0, 1, 4, 8]), "fc.weight": 3})


def test_a_file_cut_short_anywhere_is_refused(blob: bytes) -> None:
    for length in [*range(0, 40), *range(40, len(blob), 7), len(blob) - 1]:
        with pytest.raises(PackedFileError, match="damaged"):
            unpack_weights(blob[:length])


def test_a_file_with_something_after_it_is_refused(blob: bytes) -> None:
    with pytest.raises(PackedFileError, match="damaged"):
        unpack_weights(blob + b"\0")


def test_any_flipped_byte_is_refused(blob: bytes) -> None:
    for position in range(len(blob)):
        damaged = bytearray(blob)
        damaged[position] ^= 1 << (position % 8)
        with pytest.raises(PackedFileError, match="packed model"):
            unpack_weights(bytes(damaged))


def test_another_safetensors_file_is_refused() -> None:
    with pytest.raises(PackedFileError, match="not a packed model: its format is 'not named'"):
        unpack_weights(save({"w": torch.zeros(2)}))
    with pytest.raises(PackedFileError, match="not a packed model: its format is 'pt'"):
        unpack_weights(save({"w": torch.zeros(2)}, metadata={"format": "pt"}))


def test_a_later_version_is_refused_by_its_number(blob: bytes) -> None:
    later = save(load(blob), metadata={**read_metadata(blob), "version": "3"})
    with pytest.raises(PackedFileError, match="packed model of version 3: this fqsweep reads 1 and 2"):
        unpack_weights(later)


def headed(text: str) -> bytes:
    return len(text).to_bytes(8, "little") + text.encode()


@pytest.mark.parametrize(
    "junk",
    [
        b"",
        b"x",
        b"\0" * 8,
        headed("[]"),
        b"PK\3\4" * 10,
        headed('{"__metadata__": "abc"}'),
        headed('{"__metadata__": null}'),
        headed('{"__metadata__": {"format": 1}}'),
        headed('{"a": ' * 100_000),
    ],
)
def test_bytes_of_any_kind_are_refused(junk: bytes) -> None:
    with pytest.raises(PackedFileError, match="not a packed model"):
        unpack_weights(junk)


# --- whole networks, and the description ---------------------------------------------------------


@pytest.mark.parametrize("name", SIZE_BY_NAME)
def test_a_network_from_its_file_alone_computes_what_the_trained_one_does(name: str) -> None:
    """Random bits from 0 to 8 for every channel; the logits are equal to the last digit."""
    size = SIZE_BY_NAME[name]
    model = random_network(name, image_size=size, seed=4)
    generator = np.random.default_rng(4)
    bits, steps = {}, {}
    for layer, module in quantisable_layers(model).items():
        widths = torch.from_numpy(generator.integers(0, 9, len(module.weight)))
        weight_un = module.weight.detach().flatten(1)
        step_u1 = absmax_steps(weight_un, widths)
        with torch.no_grad():
            module.weight.copy_(quantise_units(weight_un, step_u1, widths).view(module.weight.shape))
        bits[f"{layer}.weight"], steps[f"{layer}.weight"] = widths, step_u1[:, 0].numpy()
    images = random_images(2, size, seed=0)
    with torch.no_grad():
        expected = model.eval()(images)
        blob = pack_weights(model.state_dict(), bits, steps=steps, metadata=notes_of(name, size))
        found = load_model(blob)(images)
    assert torch.equal(found, expected)


def test_a_file_that_does_not_name_its_network_is_refused(blob: bytes) -> None:
    with pytest.raises(
        PackedFileError, match="does not say its architecture, image_size, classes, normalisation"
    ):
        load_model(blob)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image_size": "abc"}, "its notes cannot be read"),
        ({"image_size": "1000000"}, "takes images of 1000000 px"),
        ({"normalisation": "[1"}, "its notes cannot be read"),
        ({"normalisation": '{"mean": [0, 0, 0]}'}, "its notes cannot be read"),
        ({"classes": "3"}, "its notes cannot be read"),
        ({"classes": "[]"}, "it names no classes"),
        ({"classes": "[[1], 2]"}, "it names no classes"),
        ({"normalisation": '{"mean": "abc", "std": [1, 1, 1]}'}, "its normalisation is not of three channels"),
        (
            {"normalisation": '{"mean": [0, 0, 0], "std": [1, 0, 1]}'},
            "its normalisation is not of three channels",
        ),
        (
            {"normalisation": '{"mean": [0, NaN, 0], "std": [1, 1, 1]}'},
            "its normalisation is not of three channels",
        ),
        ({"architecture": "resnet18"}, "its weights do not fit resnet18"),
    ],
)
def test_a_file_whose_notes_do_not_fit_is_refused(change: dict[str, str], message: str) -> None:
    model = random_network("test_resnet", image_size=32, seed=0)
    notes = {**notes_of("test_resnet", 32), **change}
    with pytest.raises(PackedFileError, match=message):
        load_model(pack_weights(model.state_dict(), {}, metadata=notes))


def test_a_small_file_of_an_enormous_dropped_layer_is_refused_before_it_takes_memory() -> None:
    record = {"name": "conv1.weight", "shape": [1, 2**40], "dtype": "float32", "units": 1}
    notes = {
        **notes_of("test_resnet", 32),
        "format": "fqsweep-packed",
        "version": "1",
        "layers": json.dumps([record]),
    }
    blob = save({"bits": torch.zeros(1, dtype=torch.uint8), "steps": torch.zeros(0)}, metadata=notes)
    with pytest.raises(
        PackedFileError, match=r"conv1.weight of shape \[1, 1099511627776\] does not fit test_resnet"
    ):
        load_model(blob)


def test_float_columns_and_heads_come_back(blob: bytes) -> None:
    state = unpack_weights(blob)
    state["conv.weight"] = torch.cat([state["conv.weight"], torch.full((4, 1, 3, 3), 0.123)], dim=1)
    state["conv.weight"][0] = 0
    state.float_columns["conv.weight"] = 1
    state.heads["attn"] = HeadShape(2, 5, 7)
    again = state.pack({"note": "x"})
    assert read_metadata(again)["version"] == "2"
    found = unpack_weights(again)
    assert torch.equal(found["conv.weight"], state["conv.weight"])
    assert found.float_columns == state.float_columns and found.heads == state.heads
    for length in range(0, len(again), 11):
        with pytest.raises(PackedFileError, match="damaged"):
            unpack_weights(again[:length])


@pytest.mark.parametrize("is_small", [False, True])
def test_the_code_in_the_description_reads_a_file(is_small: bool, tmp_path: Path) -> None:
    text = (PROJECT / "docs" / "packed_format.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    whole = packed_network("test_resnet", drop_frac=0.5, size=32)
    file = tmp_path / "model.fqs"
    file.write_bytes(shrink(whole) if is_small else whole)
    found: dict[str, Any] = {"PATH": str(file)}
    exec(code, found)
    state = unpack_weights(file.read_bytes())
    assert set(found["weights"]) == set(state)
    for name, tensor in state.items():
        columns = state.float_columns.get(name, 0)
        expected = tensor[:, :-columns] if columns else tensor
        assert np.array_equal(found["weights"][name], expected.numpy()), name


def test_nothing_in_the_project_opens_a_pickle() -> None:
    """Files that others wrote must not run code."""
    sources = [*(PROJECT / "fqsweep").rglob("*.py"), *(PROJECT / "analysis").rglob("*.py")]
    assert len(sources) > 40
    for file in sources:
        text = file.read_text()
        assert not re.search(r"^\s*(import|from) (pickle|cloudpickle|joblib|dill)\b", text, re.MULTILINE), file
        assert "allow_pickle=True" not in text, file
        for call in re.findall(r"torch\.load\([^\n]*", text):
            assert "weights_only=True" in call, file
