"""Cost of the artifact reward on a CPU: images a second and memory, beside scoring one by one and beside drawing them.

    python benchmarks/artifact.py [--images 128] [--repeats 3] [--json FILE]

The shipped network scores images of the playground in batches, and one at a time (the baseline). What matters to a run
is the share of a step: the same images are also drawn by the embedded model in 8 steps. The median repeat counts;
memory is what the process' peak grows by while a batch of noise is scored, weights included, before anything else is.
"""

import argparse
import json
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlhf_img.config import versions
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import load
from rlhf_img.playground.scene import SIZE
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics.schema import Rubric
from rlhf_img.training.prompts import from_playground
from rlhf_img.training.samples import draw_images

STEPS = 8


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median of `repeats`, after once to warm up."""
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])


def peak_mib() -> float:
    """The most memory that this process has had, in MiB (Linux counts it in KiB)."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    n = options.images
    before = peak_mib()
    artifact(["noise"] * n, Images(torch.rand(n, 3, SIZE, SIZE)), rubrics=[Rubric(prompt="noise")] * n)
    grown = peak_mib() - before
    model = load("playground")
    conditioner = Conditioner(model)
    prompts = from_playground("val", n)

    def draw() -> torch.Tensor:
        return draw_images(model, conditioner, prompts, list(range(n)), num_steps=STEPS, guidance=0.0)

    images = Images(draw())
    texts, rubrics = [p.text for p in prompts], [Rubric(prompt=p.text) for p in prompts]
    found = {
        "in batches": seconds(lambda: artifact(texts, images, rubrics=rubrics), options.repeats),
        "one by one": seconds(lambda: [artifact(texts[i : i + 1], images[i : i + 1], rubrics=rubrics[i : i + 1])
                                       for i in range(n)], options.repeats),
        f"drawing, {STEPS} steps": seconds(draw, options.repeats),
    }  # fmt: skip
    table = Table("artifact reward", "images/s", "ms an image", "of the drawing", title=f"{n} images, {grown:.0f} MiB")
    for name, value in found.items():
        table.add_row(name, f"{n / value:.0f}", f"{1000 * value / n:.2f}",
                      f"{value / found[f'drawing, {STEPS} steps']:.0%}")
    Console().print(table)
    if options.json:
        rows = {"images": n, "memory_mib": grown, "seconds": found, "versions": versions()}
        options.json.write_text(json.dumps(rows, indent=2), encoding="utf-8")


if __name__ == "__main__":
    main()
