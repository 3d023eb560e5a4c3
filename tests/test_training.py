"""The training loop: regulariser, schedule, faults, repeatability."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from fqsweep.data.loading import BatchLoader
from fqsweep.errors import TrialError
from fqsweep.training import GroupRegulariser, TrainingPlan, _rate_schedule, bit_rate_frac, predict, train


class Silent:
    def __init__(self) -> None:
        self.epochs: list[dict[str, float]] = []

    def log_metrics(self, metrics: dict[str, float], *, epoch: int) -> None:
        self.epochs.append(metrics)

    def note(self, text: str) -> None:
        pass


def loader(*, seed: int = 0, n: int = 96) -> BatchLoader:
    rng = np.random.default_rng(0)
    label_n = rng.integers(0, 2, n)
    image_nhwc = (rng.integers(0, 80, (n, 8, 8, 3)) + 150 * label_n[:, None, None, None]).astype(np.uint8)
    return BatchLoader(
        images=image_nhwc,
        labels=label_n,
        groups=rng.integers(0, 2, n),
        indices=np.arange(n),
        batch_size=16,
        device="cpu",
        mean=(0.5, 0.5, 0.5),
        std=(0.25, 0.25, 0.25),
        seed=seed,
    )


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)
    )


def plan(**changes: object) -> TrainingPlan:
    values: dict[str, object] = {
        "epochs": 3,
        "learning_rate": 1e-2,
        "weight_decay": 0.0,
        "warmup_frac": 0.1,
        "gradient_clip": 1.0,
        **changes,
    }
    return TrainingPlan(**values)  # type: ignore[arg-type]


def loss_of(model: nn.Module) -> dict[str, float]:
    return {"val/loss": predict(model, loader().epoch(0))[3]}


def test_training_learns_and_logs_every_epoch() -> None:
    model, recorder = network(), Silent()
    before = loss_of(model)["val/loss"]
    log = train(model, loader(), plan(epochs=5), evaluate=loss_of, recorder=recorder)
    assert loss_of(model)["val/loss"] < 0.7 * before
    assert len(log.epochs) == len(recorder.epochs) == 5
    assert log.train_s > 0


def test_the_same_seed_gives_the_same_weights_to_the_last_bit() -> None:
    states = []
    for _ in range(2):
        model = network()
        train(model, loader(seed=3), plan(), evaluate=loss_of, recorder=Silent())
        states.append(model.state_dict())
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_another_seed_gives_other_weights() -> None:
    weights = []
    for seed in (0, 1):
        model = network()
        train(model, loader(seed=seed), plan(), evaluate=loss_of, recorder=Silent())
        weights.append(model[0].weight.detach().clone())
    assert not torch.equal(weights[0], weights[1])


def test_a_loss_that_is_not_finite_names_epoch_and_step() -> None:
    class Exploding(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.calls = network(), 0

        def forward(self, image: torch.Tensor) -> torch.Tensor:
            self.calls += 1
            return self.inner(image) * (float("nan") if self.calls == 9 else 1.0)

    model = Exploding()
    with pytest.raises(TrialError, match=r"loss is nan at epoch 2, step 3 of 6; lower the learning rate"):
        train(model, loader(), plan(), evaluate=lambda _: {"val/loss": 0.0}, recorder=Silent())


def test_patience_stops_and_goes_back_to_the_best_epoch() -> None:
    losses = iter([1.0, 0.5, 0.9, 0.8, 0.7])
    kept: list[dict[str, torch.Tensor]] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        kept.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
        return {"val/loss": next(losses)}

    model = network()
    log = train(model, loader(), plan(epochs=5, patience=2), evaluate=evaluate, recorder=Silent())
    assert log.best_epoch == 1
    assert len(log.epochs) == 4
    assert all(torch.equal(kept[1][name], tensor) for name, tensor in model.state_dict().items())


def test_the_gap_is_worst_minus_best_running_group_loss() -> None:
    regulariser = GroupRegulariser("gap", 3)
    loss_b = torch.tensor([1.0, 3.0, 2.0, 2.0], requires_grad=True)
    gap = regulariser(loss_b, torch.tensor([0, 1, 2, 2]))
    assert gap.item() == pytest.approx(2.0)
    gap.backward()
    assert loss_b.grad is not None
    assert loss_b.grad.tolist() == [-1.0, 1.0, 0.0, 0.0]


def test_the_gap_gives_no_gradient_where_one_of_its_groups_is_missing() -> None:
    regulariser = GroupRegulariser("gap", 2)
    regulariser(torch.tensor([1.0, 4.0]), torch.tensor([0, 1]))
    loss_b = torch.tensor([1.0, 1.0], requires_grad=True)
    gap = regulariser(loss_b, torch.tensor([0, 0]))
    gap.backward()
    assert gap.item() == pytest.approx(3.0)
    assert loss_b.grad is not None and loss_b.grad.tolist() == [0.0, 0.0]


def test_the_gap_gives_no_gradient_where_its_best_group_is_missing() -> None:
    regulariser = GroupRegulariser("gap", 2)
    regulariser(torch.tensor([1.0, 4.0]), torch.tensor([0, 1]))
    loss_b = torch.tensor([4.0, 4.0], requires_grad=True)
    regulariser(loss_b, torch.tensor([1, 1])).backward()
    assert loss_b.grad is not None and loss_b.grad.tolist() == [0.0, 0.0]


@pytest.mark.parametrize("settle_epoch", [0.0, 0.5, 2.9, 3.0])
def test_learned_bits_are_frozen_once_however_short_the_settling(settle_epoch: float) -> None:
    calls: list[int] = []

    class NoBits:
        budget_bits = 1.0

        def mean_bits(self) -> torch.Tensor:
            return torch.ones(())

        def whole_mean_bits(self) -> float:
            return 1.0

        def step(self, *, rate_frac: float) -> None:
            assert not calls and 0 < rate_frac <= 1

    settings = plan(learned_bits=NoBits(), settle_epoch=settle_epoch, freeze=lambda: calls.append(1))
    train(network(), loader(n=33), settings, evaluate=loss_of, recorder=Silent())
    assert calls == [1]


@pytest.mark.parametrize("kind", ["gap", "group_dro"])
def test_a_batch_without_some_group_gives_no_nan_and_leaves_its_mean(kind: str) -> None:
    regulariser = GroupRegulariser(kind, 3)  # type: ignore[arg-type]
    regulariser(torch.tensor([1.0, 4.0]), torch.tensor([0, 1]))
    loss_b = torch.tensor([1.0, 1.0], requires_grad=True)
    value = regulariser(loss_b, torch.tensor([0, 0]))
    value.backward()
    assert torch.isfinite(value)
    assert loss_b.grad is not None and torch.isfinite(loss_b.grad).all()
    assert regulariser.running_g[1] == 4.0
    assert not regulariser.seen_g[2]


def test_identical_groups_have_a_gap_far_below_the_batch_estimate() -> None:
    """Batches of 128 with two equal groups: max - min of batch means is about 0.14 (losses of deviation 1)."""
    generator = torch.Generator().manual_seed(0)
    regulariser = GroupRegulariser("gap", 2)
    batch, running = [], []
    for _ in range(300):
        loss_b = torch.rand(128, generator=generator).log().neg()
        group_b = torch.randint(0, 2, (128,), generator=generator)
        batch.append(abs(loss_b[group_b == 0].mean() - loss_b[group_b == 1].mean()).item())
        running.append(regulariser(loss_b, group_b).item())
    assert np.mean(batch) == pytest.approx(0.14, abs=0.02)
    assert np.mean(running[50:]) < 0.4 * np.mean(batch)


def test_group_dro_leans_on_the_worst_group() -> None:
    regulariser = GroupRegulariser("group_dro", 2)
    loss_b = torch.tensor([0.2, 1.0], requires_grad=True)
    regulariser(loss_b, torch.tensor([0, 1])).backward()
    assert loss_b.grad is not None
    assert loss_b.grad[1] > 0.99 and loss_b.grad[0] < 0.01


def test_predict_gives_probabilities_in_the_order_of_the_split() -> None:
    plain = loader()
    probability_nc, label_n, group_n, loss = predict(network(), plain.epoch(0))
    assert probability_nc.shape == (96, 2)
    assert np.allclose(probability_nc.sum(axis=1), 1)
    picked = probability_nc[np.arange(96), label_n]
    assert loss == pytest.approx(-np.log(picked).mean())
    assert sorted(label_n) == sorted(plain.labels) and len(group_n) == 96


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [("cosine", [1.0, 0.51, 0.02]), ("step", [1.0, 0.1, 0.01]), ("constant", [1.0, 1.0, 1.0])],
)
def test_the_rate_follows_its_schedule_after_a_rising_start(schedule: str, expected: list[float]) -> None:
    rate_frac = _rate_schedule(plan(epochs=10, warmup_frac=0.1, schedule=schedule), 10)
    assert rate_frac(0) < rate_frac(5) < 1
    assert [rate_frac(step) for step in (10, 55, 100)] == pytest.approx(expected)


@pytest.mark.parametrize(("warmup_frac", "expected"), [(0, [1, 0.91, 0.55, 0.1]), (0.2, [0, 0.455, 0.55, 0.1])])
def test_the_rate_of_bits_falls_to_a_tenth_after_a_rising_start(
    warmup_frac: float, expected: list[float]
) -> None:
    found = [bit_rate_frac(progress, warmup_frac) for progress in (0.0, 0.1, 0.5, 1.0)]
    assert found == pytest.approx(expected)


def test_the_running_mean_of_the_weights_is_what_is_scored_and_kept() -> None:
    scored: list[torch.Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        scored.append(model[0].weight.detach().clone())
        return loss_of(model)

    means, plains = [], []
    for ema_decay, kept in ((0.5, means), (None, plains)):
        model = network()
        train(model, loader(n=16), plan(epochs=3, ema_decay=ema_decay), evaluate=evaluate, recorder=Silent())
        kept.append(model[0].weight.detach().clone())
    mean, (first, second, third) = scored[0], scored[3:]
    for weight in (second, third):  # one step an epoch; the first step's weights begin the mean
        mean = 0.5 * mean + 0.5 * weight
    assert torch.equal(scored[0], first)
    assert torch.allclose(means[0], mean, atol=1e-7)
    assert torch.equal(plains[0], third) and not torch.equal(means[0], plains[0])


def test_tables_of_indices_are_no_part_of_the_running_mean() -> None:
    class Indexed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = network()
            self.register_buffer("index", torch.arange(169), persistent=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.inner(x)

    scored: list[torch.Tensor] = []

    def evaluate(model: nn.Module) -> dict[str, float]:
        scored.append(model.index.clone())
        return loss_of(model)

    train(Indexed(), loader(n=16), plan(epochs=3, ema_decay=0.9), evaluate=evaluate, recorder=Silent())
    assert all(torch.equal(index, torch.arange(169)) for index in scored)


def test_channels_last_changes_the_layout_and_not_the_model() -> None:
    weights = []
    for channels_last in (False, True):
        model = network()
        train(model, loader(), plan(channels_last=channels_last), evaluate=loss_of, recorder=Silent())
        weights.append(model[0].weight.detach())
    assert weights[1].is_contiguous(memory_format=torch.channels_last) and not weights[1].is_contiguous()
    assert torch.allclose(weights[0], weights[1], atol=1e-4)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_bf16_and_channels_last_train_on_a_gpu() -> None:
    model = network().cuda()
    batches = replace(loader(), device="cuda")
    before = predict(model, batches.epoch(0))[3]
    train(
        model,
        batches,
        plan(epochs=5, autocast=True, channels_last=True),
        evaluate=lambda trained: {"val/loss": predict(trained, batches.epoch(0), autocast=True)[3]},
        recorder=Silent(),
    )
    assert predict(model, batches.epoch(0))[3] < 0.7 * before
