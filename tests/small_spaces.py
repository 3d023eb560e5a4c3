"""A small search space as text and as cells, for tests that start nothing."""

from __future__ import annotations

from pathlib import Path

from fqsweep.config import SearchSpace
from fqsweep.space import load_space

# What a finished trial shows, for those who only pass it on.
METRICS = {"val/acc_worst": 0.5, "bits/mean_weight": 1.0}
SMALL = """\
name: small
datasets:
  - kind: synthderm
    group_attributes: [skin_tone]
    image_size: 32
    num_images: 500
architectures: [test_resnet]
budgets_bits: [1, 3]
seeds: [0, 1]
methods:
  - method: fp32
  - method: uniform
    bits: [4]
  - method: static
    fairness_weight: {low: 0.0, high: 1.0, start: 0.25}
  - method: baq
    bitrate_weight: 0.01
recipe:
  epochs: 2
  learning_rate: 1.0e-3
  finetune_epochs: 1
search: {trials_per_cell: 2}
"""


def write_space(folder: Path, text: str = SMALL) -> Path:
    file = folder / "space.yaml"
    file.write_text(text)
    return file


def small_space(folder: Path, *changes: tuple[str, str]) -> SearchSpace:
    """The small space with pieces of its text replaced; every piece must be there."""
    text = SMALL
    for old, new in changes:
        assert old in text, old
        text = text.replace(old, new)
    return load_space(write_space(folder, text))
