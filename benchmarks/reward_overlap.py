"""What it saves to score images while the next are drawn: a reward on another machine, and the package's own here.

    python benchmarks/reward_overlap.py [--images 128] [--batch 32] [--latency 0.5] [--rounds 5] [--json FILE]

A rollout of GRPO on the embedded model (its default settings, but --batch images a forward) is scored by a server on
this machine that takes --latency seconds for each request of 8 images, with nothing else to do, four requests at a
time, as a machine elsewhere would. `serial` scores once all images are drawn, `overlapped` each batch as it is drawn;
both draw the same images and ask for the same requests, in turn, --rounds times. The same again for `rubric,artifact`
in this process, in a thread. Medians count; scores that differ between the two ways are an error. `waits` is what comes
after the last image is drawn: on a machine that others use too it tells more than the totals.
"""

import argparse
import asyncio
import json
import statistics
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import uvicorn
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_img.algorithms.grpo import GRPOConfig
from rlhf_img.algorithms.rollout import Batch, rollout
from rlhf_img.cli.serving import hosts_of, listening
from rlhf_img.config import versions
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import PLAYGROUND, load
from rlhf_img.model.policy import LoRAConfig, make_policy
from rlhf_img.model.vae import decode
from rlhf_img.rewards import Images, Reward, Scoring, load_rewards
from rlhf_img.rewards.server import Limits, make_app
from rlhf_img.training.prompts import from_playground

GROUP = 16
COLUMNS = ("rollout", "serial", "overlapped", "serial waits", "overlapped waits")


class World:
    """The embedded model, and prompts for one rollout."""

    def __init__(self, images: int, batch: int) -> None:
        self.model = load(PLAYGROUND)
        self.policy = make_policy(self.model.transformer, LoRAConfig(), seed=0)
        self.conditioner = Conditioner(self.model)
        self.prompts = [p.text for p in from_playground("train", images // GROUP)]
        self.config = GRPOConfig(prompts=images // GROUP, group=GROUP, batch_size=batch)
        self.batches = 0

    def scored(self, rewards: Sequence[Reward], *, overlapped: bool) -> tuple[float, float, Tensor]:
        """Seconds until all images are drawn, until all are scored, and the scores."""
        texts = [text for text in self.prompts for _ in range(GROUP)]
        drawn: list[tuple[list[int], Images]] = []
        began = time.perf_counter()
        with Scoring(rewards, len(texts), texts, group_size=GROUP) as scoring:

            def sampled(batch: Batch) -> None:
                size = self.model.default_size
                drawn.append((batch.rows_B, Images(decode(self.model, batch.final_BNC, size, size))))
                if overlapped:
                    scoring.add(*drawn[-1])

            rollout(self.model, self.policy, self.conditioner, self.prompts, self.config, 0, sampled=sampled)
            after_rollout = time.perf_counter() - began
            for rows, images in [] if overlapped else drawn:
                scoring.add(rows, images)
            values_BK = scoring.result().values_BK
        self.batches = len(drawn)
        return after_rollout, time.perf_counter() - began, values_BK


def compare(world: World, rewards: Sequence[Reward], rounds: int) -> dict[str, float]:
    """Medians of both ways, in turn, after one warm-up."""
    world.scored(rewards, overlapped=True)
    times: dict[str, list[float]] = {name: [] for name in COLUMNS}
    for _ in range(rounds):
        drawn, serial, one_BK = world.scored(rewards, overlapped=False)
        drawn_too, overlapped, other_BK = world.scored(rewards, overlapped=True)
        assert torch.equal(one_BK, other_BK), "the way of scoring changes the scores"
        found = drawn, serial, overlapped, serial - drawn, overlapped - drawn_too
        for name, seconds in zip(COLUMNS, found, strict=True):
            times[name].append(seconds)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--batch", type=int, default=32, help="images a forward of the rollout")
    parser.add_argument("--latency", type=float, default=0.5, help="seconds that the server takes for a request")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()

    async def far(prompts: Sequence[str], images: Images, **columns: object) -> list[float]:
        await asyncio.sleep(options.latency)
        return [float(mean) for mean in images.tensor.mean(dim=(1, 2, 3))]

    app = make_app([Reward(name="far", fn=far)], Limits(workers=4), None, hosts_of("127.0.0.1"))
    world = World(options.images, options.batch)
    found = {}
    with listening("127.0.0.1", 0) as (bound, address):
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [bound]})
        thread.start()
        found["remote"] = compare(world, load_rewards(f"remote:{address}/far"), options.rounds)
        server.should_exit = True
        thread.join()
    waiting = [{"reward": name, "waits": True} for name in ("rubric", "artifact")]
    found["rubric,artifact in a thread"] = compare(world, load_rewards(waiting), options.rounds)

    title = f"{options.images} images in {world.batches} batches; {options.latency:g} s a request of 8"
    table = Table(title=title, caption=versions()["hardware"])
    for column in ("seconds", *COLUMNS):
        table.add_column(column, justify="left" if column == "seconds" else "right")
    for name, of in found.items():
        table.add_row(name, *(f"{of[key]:.2f}" for key in COLUMNS))
    Console().print(table)
    if options.json:
        result = {**vars(options), "json": None, "batches": world.batches, "seconds": found, "versions": versions()}
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
