"""Training steps on the CPU with glibc's memory in large pages, as the sweep's workers have it, and in small ones.

    python -m benchmarks.large_pages [--rounds 2] [--out FILE]

Each measurement is a process of its own, the two kinds in turn; times are processor time, one thread, batch 64.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
from pathlib import Path

from benchmarks.result_file import measure_apart, result_parser, write_result

PROJECT = Path(__file__).resolve().parents[1]
LARGE = "glibc.malloc.hugetlb=1"
# Network, pixels, steps that are timed.
CASES = (
    ("tiny_vit_5m_224", 32, 6),
    ("resnet50", 32, 6),
    ("resnet18", 64, 6),
    ("deit_tiny_patch16_224", 48, 12),
    ("resnet18", 224, 2),
)
BATCH = 64


def measure(name: str, pixels: int, num_steps: int) -> dict[str, float]:
    """Processor time a step, user and system (s), and page faults a step, after two steps that warm up."""
    import torch

    from fqsweep.config import ArchitectureConfig
    from fqsweep.models import build_model

    torch.set_num_threads(1)
    model = build_model(ArchitectureConfig(name=name), num_classes=6, image_size=pixels).train()
    optimiser = torch.optim.AdamW(model.parameters(), fused=True)
    image_bchw, label_b = torch.randn(BATCH, 3, pixels, pixels), torch.randint(0, 6, (BATCH,))

    def step() -> None:
        optimiser.zero_grad()
        torch.nn.functional.cross_entropy(model(image_bchw), label_b).backward()
        optimiser.step()

    step()
    step()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(num_steps):
        step()
    after = resource.getrusage(resource.RUSAGE_SELF)
    return {
        "user_s": (after.ru_utime - before.ru_utime) / num_steps,
        "system_s": (after.ru_stime - before.ru_stime) / num_steps,
        "faults": (after.ru_minflt - before.ru_minflt) / num_steps,
    }


def measure_case(case: tuple[str, int, int], *, large: bool) -> dict[str, float]:
    """``measure`` in a process of its own: glibc reads the wish when it starts."""
    environment = {name: value for name, value in os.environ.items() if name != "GLIBC_TUNABLES"}
    if large:
        environment["GLIBC_TUNABLES"] = LARGE
    return measure_apart("benchmarks.large_pages", "--case", *case, environment=environment)


def report(num_rounds: int) -> list[str]:
    lines = [
        "| network, pixels | small pages: s a step (of it system) | large | large / small | faults a step |",
        "|---|---|---|---|---|",
    ]
    for case in CASES:
        runs = [[measure_case(case, large=large) for large in (False, True)] for _ in range(num_rounds)]
        small, large = ([pair[place] for pair in runs] for place in (0, 1))

        def mean(found: list[dict[str, float]], *names: str) -> float:
            return statistics.mean(sum(one[name] for name in names) for one in found)

        ratio = mean(large, "user_s", "system_s") / mean(small, "user_s", "system_s")
        lines.append(
            f"| {case[0]}, {case[1]} | {mean(small, 'user_s', 'system_s'):.2f} ({mean(small, 'system_s'):.2f}) | "
            f"{mean(large, 'user_s', 'system_s'):.2f} ({mean(large, 'system_s'):.2f}) | {ratio:.2f} | "
            f"{mean(small, 'faults'):,.0f} and {mean(large, 'faults'):,.0f} |"
        )
        print(lines[-1], flush=True)
    return lines


def main() -> None:
    parser = result_parser(__doc__)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--case", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.case:
        name, pixels, num_steps = options.case
        print(json.dumps(measure(name, int(pixels), int(num_steps))))
        return
    enabled = Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text().strip()
    notes = [f"transparent huge pages: {enabled}, other work beside it (load {os.getloadavg()[1]:.1f})."]
    write_result(options.out, title="Large pages", notes=notes, lines=report(options.rounds))


if __name__ == "__main__":
    main()
