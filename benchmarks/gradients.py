"""How much of GRPO's gradient is signal, for each stand-in for the likelihood, and what an iteration costs.

    python benchmarks/gradients.py [KEY=VALUE ...] [--iterations 12] [--json FILE]

At the untrained policy an iteration's gradient is the wanted direction s and noise of mean 0, independent between
iterations. So the mean of <g_i, g_j> over pairs of iterations estimates |s|^2, and over the mean of |g_i|^2 it is the
share of signal. Its standard error takes the pairs as independent. Everything else, and KEY=VALUE, is as in
`rlhf-img grpo`.
"""

import argparse
import json
import statistics
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from rlhf_img.cli.main import keep_freed_memory
from rlhf_img.config import from_mapping, merge, parse_overrides, versions
from rlhf_img.training.grpo import Config, prepare


def signal(config: Config, iterations: int) -> dict[str, float]:
    """Share of signal, its standard error, and seconds an iteration."""
    _, job = prepare(config)
    parameters = job.policy.parameters.values()
    start = [p.detach().clone() for p in parameters]
    gradients, seconds = [], []
    for step in range(1, iterations + 1):
        seconds.append(job.iterate(step)["time/step"])
        gradients.append(torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]).double())
        for p, value in zip(parameters, start, strict=True):
            p.data.copy_(value)
    products = torch.stack(gradients) @ torch.stack(gradients).T
    pairs = products[tuple(torch.triu_indices(iterations, iterations, offset=1))]
    power = products.diagonal().mean()
    return {
        "signal": float(pairs.mean() / power),
        "standard_error": float(pairs.std() / len(pairs) ** 0.5 / power),
        "seconds": statistics.median(seconds),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("settings", nargs="*", metavar="KEY=VALUE", help="as in `rlhf-img grpo`")
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    keep_freed_memory()
    given = parse_overrides([*options.settings, "grpo.max_grad_norm=1e9", "tracker=none"])
    found = {}
    for kind in ("forward", "steps"):
        config = from_mapping(Config, merge(given, {"grpo": {"likelihood": kind}}), "settings")
        found[kind] = signal(config, options.iterations)
    table = Table(title=f"{options.iterations} iterations", caption=versions()["hardware"])
    for column in ("likelihood", "signal", "standard error", "seconds", "signal a second"):
        table.add_column(column, justify="left" if column == "likelihood" else "right")
    for kind, f in found.items():
        table.add_row(
            kind, f"{f['signal']:.4f}", f"{f['standard_error']:.4f}", f"{f['seconds']:.2f}",
            f"{f['signal'] / f['seconds']:.4f}",
        )  # fmt: skip
    Console().print(table)
    if options.json:
        result = {
            "iterations": options.iterations, "settings": options.settings, "found": found, "versions": versions(),
        }  # fmt: skip
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
