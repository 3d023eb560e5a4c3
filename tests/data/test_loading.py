import threading

import numpy as np
import pytest
import torch
from torchvision.transforms import v2

from fqsweep.data.augment import Values, _affine_grid, draw_moves, flip, move, move_by_torch
from fqsweep.data.autoaugment import HIGHEST_LEVEL, IMAGENET_POLICY, OPERATIONS, SIGNED, _draw, auto_augment
from fqsweep.data.loading import BatchLoader

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
PLAIN = Values(scale_c=torch.ones(1, 3, 1, 1), shift_c=torch.zeros(1, 3, 1, 1))


def loader(count: int = 20, *, side: int = 16, **changes: object) -> BatchLoader:
    rng = np.random.default_rng(0)
    settings: dict[str, object] = {
        "images": rng.integers(0, 256, (count, side, side, 3), dtype=np.uint8),
        "labels": np.arange(count) % 3,
        "groups": np.arange(count) % 2,
        "indices": np.arange(count),
        "batch_size": 6,
        "device": "cpu",
        "mean": MEAN,
        "std": STD,
    }
    return BatchLoader(**settings | changes)  # type: ignore[arg-type]


def test_evaluation_gives_every_image_normalised_and_in_order() -> None:
    plain = loader(19, indices=np.array([5, 3, 18, 0, 7, 9, 1]), shuffle=False)
    batches = list(plain.epoch(0))
    assert [len(batch.label_b) for batch in batches] == [6, 1]
    image_bchw = torch.cat([batch.image_bchw for batch in batches])
    pixels = plain.images[plain.indices].transpose(0, 3, 1, 2) / 255
    expected = (pixels - np.reshape(MEAN, (3, 1, 1))) / np.reshape(STD, (3, 1, 1))
    assert np.allclose(image_bchw.numpy(), expected, atol=1e-5)
    assert image_bchw.dtype == torch.float32
    assert torch.cat([batch.label_b for batch in batches]).tolist() == (plain.indices % 3).tolist()
    assert torch.cat([batch.group_b for batch in batches]).tolist() == (plain.indices % 2).tolist()


@pytest.mark.parametrize(
    ("count", "shuffle", "sizes"),
    [(13, True, [6, 6]), (13, False, [6, 6, 1]), (14, True, [6, 6, 2]), (12, True, [6, 6]), (1, True, [1])],
)
def test_a_last_single_image_is_left_out_of_training_alone(count: int, shuffle: bool, sizes: list[int]) -> None:
    batches = loader(count, shuffle=shuffle)
    assert [len(batch.label_b) for batch in batches.epoch(0)] == sizes
    assert batches.num_batches == len(sizes)


@pytest.mark.parametrize("augment", ["none", "flips", "standard", "autoaugment"])
@pytest.mark.parametrize("class_balance", ["none", "sampler"])
def test_an_epoch_depends_on_seed_and_number_alone(augment: str, class_balance: str) -> None:
    def pixels(seed: int, epoch: int) -> torch.Tensor:
        batches = loader(augment=augment, class_balance=class_balance, seed=seed)
        return torch.cat([batch.image_bchw for batch in batches.epoch(epoch)])

    torch.manual_seed(1)
    first = pixels(7, 3)
    torch.manual_seed(2)
    state = torch.random.get_rng_state()
    assert torch.equal(first, pixels(7, 3))
    assert torch.equal(state, torch.random.get_rng_state())
    assert not torch.equal(first, pixels(7, 4))
    assert not torch.equal(first, pixels(8, 3))


def test_shuffling_gives_every_training_image_once() -> None:
    labels = np.arange(18)
    batches = loader(18, labels=labels)
    seen = torch.cat([batch.label_b for batch in batches.epoch(0)]).tolist()
    assert sorted(seen) == labels.tolist()
    assert seen != labels.tolist()


def test_the_sampler_draws_classes_equally_and_no_image_twice_before_all_others() -> None:
    labels = np.array([0] * 50 + [1] * 8 + [2] * 2)
    batches = loader(60, labels=labels, groups=np.arange(60), class_balance="sampler", batch_size=10)
    drawn = list(batches.epoch(0))
    label = torch.cat([batch.label_b for batch in drawn])
    assert torch.bincount(label).tolist() == [20, 20, 20]
    image = torch.cat([batch.group_b for batch in drawn])
    times = torch.bincount(image, minlength=60)
    assert times[:50].max() == 1
    assert times[50:58].tolist().count(2) == 4
    assert times[58:].tolist() == [10, 10]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": "flip"}, "augment must be one of .* but is 'flip'"),
        ({"class_balance": "loss"}, "class_balance must be one of"),
        ({"group_balance": "loss"}, "group_balance must be one of"),
        ({"group_balance": "sampler", "shuffle": False}, "set shuffle=True"),
        ({"class_balance": "sampler", "shuffle": False}, "set shuffle=True"),
        ({"indices": np.array([], int)}, "indices is empty"),
        ({"labels": np.zeros(3, int)}, "must have one length, but have 20, 3, 20"),
    ],
)
def test_options_that_cannot_work_are_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        loader(**changes)  # type: ignore[arg-type]


def test_flips_give_each_of_the_four_mirrorings_and_nothing_else() -> None:
    image = torch.arange(4.0).view(1, 1, 2, 2).repeat(400, 1, 1, 1)
    flipped = flip(image, generator=torch.Generator().manual_seed(0))
    kinds, counts = torch.unique(flipped.reshape(400, 4), dim=0, return_counts=True)
    assert {tuple(kind) for kind in kinds.int().tolist()} == {
        (0, 1, 2, 3),
        (1, 0, 3, 2),
        (2, 3, 0, 1),
        (3, 2, 1, 0),
    }
    assert counts.min() > 60


def moved(image: torch.Tensor, *, with_crop_and_light: bool = False) -> torch.Tensor:
    draws = draw_moves(
        len(image), with_crop_and_light=with_crop_and_light, generator=torch.Generator().manual_seed(0)
    )
    return move(image, draws, PLAIN)


def test_rotation_and_shift_keep_the_centre_in_place_and_invent_no_black() -> None:
    image = torch.full((64, 3, 32, 32), 120, dtype=torch.uint8)
    image[:, :, 14:18, 14:18] = 250
    there = moved(image)
    assert there.min() >= 119.9
    brightest = there[:, 0].reshape(64, -1).argmax(dim=1)
    offset = torch.stack((brightest // 32, brightest % 32)).float() - 15.5
    assert offset.abs().max() <= 4.5


def test_moves_turn_both_ways_and_mirror_half_of_the_images() -> None:
    """A dot right of the centre goes left in half of the images, and above or below it in all."""
    image = torch.zeros((200, 3, 65, 65), dtype=torch.uint8)
    image[:, :, 31:34, 54:57] = 255
    place = moved(image)[:, 0].reshape(200, -1).argmax(dim=1)
    right, down = place % 65 - 32, place // 65 - 32
    assert 70 < int((right < 0).sum()) < 130
    assert int(down.max()) > 4 and int(down.min()) < -4
    assert int(down.abs().max()) <= 10


def test_the_grid_is_torchs() -> None:
    theta_b23 = torch.randn((3, 2, 3), generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.affine_grid(theta_b23, [3, 1, 5, 7], align_corners=False)
    assert torch.allclose(_affine_grid(theta_b23, 5, 7), expected, atol=1e-6)


@pytest.mark.parametrize("shape", [(5, 2, 2), (7, 31, 18), (40, 160, 160)])
@pytest.mark.parametrize("with_crop_and_light", [False, True])
def test_opencv_moves_images_as_torch_does(shape: tuple[int, int, int], with_crop_and_light: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (*shape, 3), dtype=torch.uint8, generator=generator).permute(0, 3, 1, 2)
    draws = draw_moves(shape[0], with_crop_and_light=with_crop_and_light, generator=generator)
    difference = move(pixels, draws, PLAIN) - move_by_torch(pixels, draws, PLAIN)
    # Of random pixels a 32nd of a pixel is up to 16 of 255, half of it on average less than two.
    assert float(difference.abs().max()) < 17
    assert float(difference.abs().mean()) < 2.5
    assert abs(float(difference.mean())) < 0.6


@pytest.mark.parametrize("num_threads", [2, 3])
def test_the_number_of_threads_changes_no_bit(num_threads: int) -> None:
    batches = loader(40, side=128, batch_size=40, augment="standard")
    usual = torch.get_num_threads()
    images = []
    try:
        for threads in (1, num_threads):
            torch.set_num_threads(threads)
            images.append(next(batches.epoch(0)).image_bchw)
    finally:
        torch.set_num_threads(usual)
    assert torch.equal(*images)


def test_light_changes_stay_in_their_bounds() -> None:
    """An image of one value stays so when it is moved; its contrast changes nothing, its brightness all."""
    image = torch.full((300, 3, 8, 8), 200, dtype=torch.uint8)
    bright = moved(image, with_crop_and_light=True).mean(dim=(1, 2, 3)) / 200
    assert 0.9 - 1e-3 <= float(bright.min()) < 0.905
    assert 1.095 < float(bright.max()) <= 1.1 + 1e-3
    first, second = draw_moves(
        5000, with_crop_and_light=True, generator=torch.Generator().manual_seed(0)
    ).light_b2.T
    contrast = first / (first + second)
    assert 0.9 - 1e-4 <= float(contrast.min()) < 0.901
    assert 1.099 < float(contrast.max()) <= 1.1 + 1e-4


def test_crops_keep_at_least_85_percent_of_the_side_and_autoaugment_gets_none() -> None:
    sides = {}
    for cropped in (False, True):
        draws = draw_moves(5000, with_crop_and_light=cropped, generator=torch.Generator().manual_seed(0))
        sides[cropped] = draws.theta_b23[:, :, :2].det().abs().sqrt()
    assert torch.allclose(sides[False], torch.ones(5000))
    assert 0.85 - 1e-4 <= float(sides[True].min()) < 0.851
    assert 0.999 < float(sides[True].max()) <= 1 + 1e-4


def test_light_changes_stop_at_black_and_white() -> None:
    image = torch.tensor([0, 255], dtype=torch.uint8).repeat(50, 3, 8, 4)
    lit = moved(image, with_crop_and_light=True)
    assert float(lit.min()) == 0 and float(lit.max()) == 255


@pytest.mark.parametrize(
    ("class_balance", "group_balance"), [("none", "sampler"), ("sampler", "sampler"), ("sampler", "none")]
)
def test_groups_and_classes_are_drawn_equally_often_as_asked(class_balance: str, group_balance: str) -> None:
    labels, groups = np.repeat([0, 1, 0, 1], [70, 15, 5, 10]), np.repeat([0, 0, 1, 1], [70, 15, 5, 10])
    batches = BatchLoader(
        images=np.zeros((100, 4, 4, 3), np.uint8),
        labels=labels,
        groups=groups,
        indices=np.arange(100),
        batch_size=10,
        device="cpu",
        mean=(0.5,) * 3,
        std=(0.5,) * 3,
        class_balance=class_balance,
        group_balance=group_balance,
    )
    seen = list(batches.epoch(0))
    label_n, group_n = torch.cat([b.label_b for b in seen]), torch.cat([b.group_b for b in seen])
    if group_balance == "none":
        assert torch.bincount(label_n).tolist() == [50, 50]
    elif class_balance == "none":
        assert torch.bincount(group_n).tolist() == [50, 50]
    else:
        assert torch.bincount(2 * group_n + label_n).tolist() == [25] * 4


TORCHVISION_NAMES = {
    "rotate": "Rotate",
    "shear": "ShearX",
    "colour": "Color",
    "contrast": "Contrast",
    "sharpness": "Sharpness",
    "posterize": "Posterize",
    "solarize": "Solarize",
    "autocontrast": "AutoContrast",
    "equalize": "Equalize",
    "invert": "Invert",
}


def test_the_policy_and_its_operations_are_torchvisions() -> None:
    """torchvision applies one policy to a whole batch; its tables and single operations are the reference."""
    reference = v2.AutoAugment(v2.AutoAugmentPolicy.IMAGENET)
    ours = [
        tuple((TORCHVISION_NAMES[name], probability, level) for name, probability, level in pair)
        for pair in IMAGENET_POLICY
    ]
    assert ours == [tuple((n, p, level or 0) for n, p, level in pair) for pair in reference._policies]
    pixels = torch.randint(
        0, 256, (3, 3, 24, 24), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )
    for name, level in {(name, level) for pair in IMAGENET_POLICY for name, _, level in pair}:
        magnitudes, signed = reference._AUGMENTATION_SPACE[TORCHVISION_NAMES[name]]
        assert signed == (name in SIGNED)
        table = magnitudes(10, 24, 24)
        for sign in (1, -1) if signed else (1,):
            size = 0.0 if table is None else sign * float(table[level])
            expected = reference._apply_image_or_video_transform(
                pixels, TORCHVISION_NAMES[name], size, reference.interpolation, reference._fill
            )
            strength = torch.full((3, 1, 1, 1), sign * level / HIGHEST_LEVEL)
            apart = (OPERATIONS[name](pixels, strength).int() - expected.int()).abs()
            if name in {"rotate", "shear"}:  # a place between two pixels can be rounded either way
                assert float((apart > 0).float().mean()) < 0.01, (name, level)
            else:  # rounding of the strength
                assert int(apart.max()) <= 1, (name, level)


@pytest.mark.parametrize("name", ["autocontrast", "equalize"])
def test_a_channel_of_one_value_stays(name: str) -> None:
    pixels = torch.tensor([[7, 7, 7, 7], [0, 255, 3, 9], [255] * 4], dtype=torch.uint8).view(1, 3, 2, 2)
    changed = OPERATIONS[name](pixels, torch.zeros(1, 1, 1, 1))
    assert torch.equal(changed[:, [0, 2]], pixels[:, [0, 2]])


def test_operations_are_drawn_as_often_as_the_policy_says() -> None:
    batch, generator = 20_000, torch.Generator().manual_seed(0)
    drawn = _draw(batch, generator=generator, device=torch.device("cpu"))
    for name in OPERATIONS:
        wanted = sum(p for pair in IMAGENET_POLICY for n, p, _ in pair if n == name) / len(IMAGENET_POLICY)
        found = sum(len(rows) for n, rows, _ in drawn if n == name) / batch
        assert found == pytest.approx(wanted, abs=0.02)
        strengths = torch.cat([strength for n, _, strength in drawn if n == name])
        assert bool((strengths < 0).any()) == (name in SIGNED)


def test_autoaugment_draws_for_each_image_and_leaves_the_given_ones_alone() -> None:
    pixels = torch.randint(0, 256, (1, 3, 16, 16), dtype=torch.uint8).expand(64, 3, 16, 16)
    before = pixels.clone()
    changed = auto_augment(pixels, generator=torch.Generator().manual_seed(0))
    assert torch.equal(pixels, before)
    assert 10 < len(torch.unique(changed.reshape(64, -1), dim=0)) < 64


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("augment", ["none", "flips", "standard", "autoaugment"])
def test_a_gpu_gives_the_same_batches(augment: str) -> None:
    for here, there in zip(
        loader(augment=augment).epoch(0), loader(augment=augment, device="cuda").epoch(0), strict=True
    ):
        difference = (here.image_bchw - there.image_bchw.cpu()).abs()
        # Moved images of random pixels: OpenCV rounds places and values on the CPU, torch does not.
        assert float(difference.mean()) < (1e-3 if augment in ("none", "flips") else 0.06)
        assert torch.equal(here.label_b, there.label_b.cpu())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_first_batch_on_a_gpu_waits_for_what_its_loader_has_put_on_the_stream() -> None:
    batches = loader(augment="none", device="cuda")
    right = batches._values.scale_c.clone()
    batches._values.scale_c.zero_()
    torch.cuda.synchronize()
    torch.cuda._sleep(500_000_000)  # what follows on this stream happens a while later
    batches._values.scale_c.copy_(right)
    found = next(batches.epoch(0)).image_bchw
    expected = next(loader(augment="none").epoch(0)).image_bchw
    assert torch.allclose(found.cpu(), expected, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_an_epoch_that_is_left_early_ends_its_thread_and_the_next_one_is_whole() -> None:
    batches = loader(augment="standard", device="cuda")
    first = next(batches.epoch(0)).image_bchw
    again = [batch.image_bchw for batch in batches.epoch(0)]
    assert len(again) == batches.num_batches
    assert torch.equal(first, again[0])
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("ThreadPoolExecutor")]
