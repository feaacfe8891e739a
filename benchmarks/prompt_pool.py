"""What choosing prompts costs an iteration, beside the uniform turns that are the default. CPU time, of one thread.

    python benchmarks/prompt_pool.py --prompts 100000 --drawn 16
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch

from rlhf_img.rewards import Reward
from rlhf_img.training.pool.run import PromptPool
from rlhf_img.training.pool.weights import PoolConfig
from rlhf_img.training.prompts import Prompt


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=100_000)
    parser.add_argument("--drawn", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=50)
    given = parser.parse_args()
    prompts = [Prompt(str(i)) for i in range(given.prompts)]
    reward = Reward(name="any", fn=lambda prompts, images: [0.0] * len(prompts))
    rng = torch.Generator().manual_seed(0)
    for name, curriculum in (("uniform", False), ("curriculum", True)):
        pool = PromptPool(prompts, PoolConfig(curriculum=curriculum), seed=0)
        pool._cluster_N = np.random.default_rng(0).integers(64, size=given.prompts)
        drawing, learning = [], []
        for step in range(1, given.repeats + 1):
            drawing.append(timed(partial(pool.draw, step, given.drawn)))
            values = torch.rand(given.drawn, 8, 1, generator=rng)
            learning.append(timed(partial(pool.record, step, [reward], values, [()] * given.drawn)))
        print(f"{name}: draw {statistics.median(drawing):.2f} ms, learn {statistics.median(learning):.2f} ms "
              f"({given.drawn} of {given.prompts}, median of {given.repeats})")


def timed(call: Callable[[], object]) -> float:
    """Milliseconds of CPU time: wall-clock time would count what else the machine does."""
    began = time.process_time()
    call()
    return 1000 * (time.process_time() - began)


if __name__ == "__main__":
    main()
