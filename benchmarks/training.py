"""Training speed on a CPU: the embedded transformer with stock attention, with ours, and with freed memory kept.

    python benchmarks/training.py [--batch 64] [--steps 20] [--json FILE]

A step is forward, backward and AdamW in bfloat16 autocast, as `rlhf-img playground pretrain` does it, on random data:
speed does not depend on the values. The three ways run one after the other in one process; the median step counts.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from rich.console import Console
from rich.table import Table

from rlhf_img.cli.main import keep_freed_memory
from rlhf_img.config import versions
from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.playground.build import build_pipeline

TEXT, GRID = 15, (4, 4)
"""Tokens of a usual caption, and of an image of 64 px."""


def seconds_per_step(transformer: Krea2Transformer2DModel, batch: int, steps: int) -> float:
    """Median of `steps` steps after two to warm up."""
    config = transformer.config
    optimizer = torch.optim.AdamW(transformer.parameters(), lr=1e-5)
    x = torch.randn(batch, GRID[0] * GRID[1], config.in_channels)
    text = torch.randn(batch, TEXT, config.num_text_layers, config.text_hidden_dim)
    positions = torch.zeros(TEXT + x.shape[1], 3)
    times = []
    for _ in range(steps + 2):
        start = time.perf_counter()
        with torch.autocast("cpu", torch.bfloat16):
            v = transformer(x, text, torch.rand(batch), positions, return_dict=False)[0]
        optimizer.zero_grad(set_to_none=True)
        v.float().square().mean().backward()
        optimizer.step()
        times.append(time.perf_counter() - start)
    return statistics.median(times[2:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    transformer = build_pipeline(("a red circle", "two blue stars")).transformer.train()
    found = {}
    transformer.set_attn_processor(Krea2AttnProcessor())
    found["stock attention"] = seconds_per_step(transformer, options.batch, options.steps)
    use_lean_blocks(transformer)
    found["ours"] = seconds_per_step(transformer, options.batch, options.steps)
    keep_freed_memory()
    found["ours, freed memory kept"] = seconds_per_step(transformer, options.batch, options.steps)

    table = Table(title=f"a step of {options.batch} images", caption=versions()["hardware"])
    for column in ("", "seconds", "times faster"):
        table.add_column(column, justify="right" if column else "left")
    for name, seconds in found.items():
        table.add_row(name, f"{seconds:.3f}", f"{found['stock attention'] / seconds:.2f}")
    Console().print(table)
    if options.json:
        result = {"batch": options.batch, "steps": options.steps, "seconds": found, "versions": versions()}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
