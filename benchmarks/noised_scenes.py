"""What a model still sees of a scene under noise: the scene is noised to a level, and drawn from there.

    python benchmarks/noised_scenes.py [--model FOLDER] [--levels 0.95 0.9 0.85 0.75 0.6] [--count 384]

Held-out scenes of the playground, without guidance, in those of 48 steps that lie below the level. What is met in full
from a level, but not from a higher one, is settled between them: there the model fails, or there was no scene to see.
"""

import argparse
from itertools import pairwise

import numpy as np
import torch

from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.flow import euler_step, sigmas
from rlhf_img.model.forward import in_batches, velocity
from rlhf_img.model.loading import load
from rlhf_img.model.vae import decode, encode
from rlhf_img.playground.data import example
from rlhf_img.rewards import Images
from rlhf_img.rubrics import decompose, score

STEPS = 48


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="playground", help="playground, or a pipeline folder with its text encoder")
    parser.add_argument("--levels", type=float, nargs="+", default=[0.95, 0.9, 0.85, 0.75, 0.6], help="in (0, 1]")
    parser.add_argument("--count", type=int, default=384, help="scenes")
    options = parser.parse_args()
    model = load(options.model)
    examples = [example(1_000_003 + i, "heldout") for i in range(options.count)]
    pixels = torch.from_numpy(np.stack([e.image for e in examples])).permute(0, 3, 1, 2).float() / 255
    x0_BNC = encode(model, pixels.to(model.device))
    noise_BNC = torch.randn(x0_BNC.shape, generator=torch.Generator().manual_seed(0)).to(x0_BNC)
    texts, grid = Conditioner(model).encode([e.caption for e in examples]), model.grid(64, 64)
    steps = sigmas(STEPS, grid[0] * grid[1], model.scheduler.config, model.is_distilled).tolist()
    for level in options.levels:
        drawn_BNC, below = torch.lerp(x0_BNC, noise_BNC, level), [level, *(s for s in steps if s < level)]
        for rows, text_BLD in in_batches(model.transformer, texts, 64, 1):
            x = drawn_BNC[rows]
            for s, s_next in pairwise(below):
                sigma = torch.tensor(s, device=x.device)
                x = euler_step(x, velocity(model.transformer, x, sigma, text_BLD, grid), s, s_next)
            drawn_BNC[rows] = x
        images = Images(decode(model, drawn_BNC, 64, 64).cpu()).arrays
        passed = [bool(score(decompose(e.caption).rubric, i).passed) for e, i in zip(examples, images, strict=True)]
        print(f"from {level}: {np.mean(passed):.1%} of {len(passed)} scenes met in full", flush=True)


if __name__ == "__main__":
    main()
