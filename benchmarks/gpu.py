"""The full Krea 2 with random weights on one GPU: everything that the speed and memory goals are about, in one call.

    python benchmarks/gpu.py --json gpu.json                       # an H200, at most ten minutes
    python benchmarks/gpu.py --model playground --sizes 64 --json tiny.json   # proves the script on a CPU

Speed does not depend on the weights' values, so nothing is downloaded. Each part has a time limit, and what was
measured is in the JSON file after every part, whatever becomes of the next. The baseline of a part is the stock forward
in the same process: text padded to 512 tokens, masked attention, everything else equal. Model FLOP are counted on our
forward (without padding or recomputation); MFU is their rate over that of a large product measured here.
"""

import argparse
import gc
import json
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKLQwenImage, FlowMatchEulerDiscreteScheduler, Krea2Transformer2DModel
from shared import in_turn, report, stock_forward
from torch import Tensor

from rlhf_img.algorithms import grpo, nft, rollout, sft, tdm
from rlhf_img.config import from_mapping, merge, versions
from rlhf_img.model import sampling
from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.compute import checkpoint_blocks, compile_blocks
from rlhf_img.model.counting import Batch, as_text, count_passes, set_dtype
from rlhf_img.model.forward import velocity
from rlhf_img.model.loading import Model, default_device, fast_dtype
from rlhf_img.model.policy import LoRAConfig, Policy, make_role
from rlhf_img.model.sizes import Sizes, sizes_of
from rlhf_img.model.vae import decode
from rlhf_img.training import grpo as grpo_room
from rlhf_img.training import nft as nft_room
from rlhf_img.training import tdm as tdm_room
from rlhf_img.training.estimate import estimate
from rlhf_img.training.stopwatch import matmul_rate, seconds_of

TEXT = 60
"""Tokens of a usual prompt."""


class RandomText:
    """Stands for a conditioner: fused text for our forward, or tapped states padded to 512 for the stock one."""

    def __init__(self, model: Model, *, stock: bool) -> None:
        config, like = model.transformer.config, model.transformer.img_in.weight
        if stock:
            width = config.num_text_layers * config.text_hidden_dim
            states = torch.randn(512, width, device=like.device, dtype=like.dtype)
            mask = (torch.arange(512, device=like.device) < TEXT)[:, None].to(like.dtype)
            self._text = torch.cat([states, mask], dim=1)
        else:
            width = config.num_attention_heads * config.attention_head_dim
            self._text = torch.randn(TEXT, width, device=like.device, dtype=like.dtype)

    def encode(self, prompts: list[str]) -> list[Tensor]:
        return [self._text] * len(prompts)


@dataclass(frozen=True)
class Bench:
    """What every part works with."""

    model: Model
    sizes: Sizes
    policy: Policy
    critic: Policy
    rate: float
    images: int


def build(sizes: Sizes, device: torch.device, dtype: torch.dtype, size: int) -> Model:
    """Random weights straight on the device; no text encoder, because text is random too."""
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel.from_config(json.loads(as_text(sizes.transformer)))
        vae = AutoencoderKLQwenImage.from_config(json.loads(as_text(sizes.vae)))
    for part in (transformer, vae):
        set_dtype(part, dtype)
        part.to_empty(device=device).eval().requires_grad_(False)
        for parameter in part.parameters():
            parameter.data.normal_(std=0.02)
    use_lean_blocks(transformer)
    scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15,
                                                base_image_seq_len=256, max_image_seq_len=6400)  # fmt: skip
    return Model(
        transformer=transformer, vae=vae, text_encoder=None, tokenizer=None, scheduler=scheduler, text_layers=(),
        patch_size=sizes.patch_size, is_distilled=False, default_size=size, source=sizes.name,
    )  # fmt: skip


def both(bench: Bench, run: Callable[[RandomText], object], repeats: int = 3) -> dict[str, float]:
    """Median seconds of a run on our forward and on the stock one, in turn."""
    ours, theirs = RandomText(bench.model, stock=False), RandomText(bench.model, stock=True)

    def stock() -> None:
        with stock_forward(bench.model.transformer):
            run(theirs)

    run(ours)
    stock()
    return in_turn({"ours": lambda: run(ours), "stock": stock}, repeats, bench.model.device)


def forward(bench: Bench) -> dict[str, float]:
    """A forward of a rollout, and its share of the matrix rate."""
    model, size = bench.model, bench.model.default_size
    shape = (bench.images, model.grid(size, size)[0] ** 2, model.transformer.config.in_channels)
    x = torch.randn(shape, device=model.device)

    @torch.no_grad()
    def run(conditioner: RandomText) -> None:
        text = torch.stack(conditioner.encode([""] * bench.images))
        with bench.policy.acting() as transformer:
            velocity(transformer, x, torch.tensor(0.5, device=model.device), text, model.grid(size, size))

    seconds = both(bench, run)
    batch = Batch(images=bench.images, grid=model.grid(size, size), text=TEXT)
    flop = count_passes(bench.sizes.transformer, LoRAConfig(), model.transformer.img_in.weight.dtype, batch).infer_flop
    return {**seconds, "images": bench.images, "tflop": flop / 1e12, "mfu": flop / seconds["ours"] / bench.rate}


def lora_step(bench: Bench) -> dict[str, float]:
    """A LoRA train step of one image with all blocks checkpointed: forward, backward, AdamW."""
    model, size = bench.model, bench.model.default_size
    optimizer = torch.optim.AdamW(bench.policy.parameters.values(), lr=1e-5)
    shape = (1, model.grid(size, size)[0] ** 2, model.transformer.config.in_channels)
    x, noise = torch.randn(2, *shape, device=model.device)
    checkpoint_blocks(model.transformer, "all")

    def run(conditioner: RandomText) -> None:
        text = torch.stack(conditioner.encode([""]))
        batch = sft.noised(x, text, torch.tensor([0.5], device=model.device), noise, model.grid(size, size))
        sft.update(bench.policy, optimizer, [batch], sft.SFTConfig(batch_size=1))

    return both(bench, run)


def online_step(bench: Bench, name: str) -> dict[str, float]:
    """GRPO or NFT without rewards: 10 steps, no guidance, two of them or two draws trained, images decoded."""
    model, size, shared = bench.model, bench.model.default_size, {"prompts": 1, "num_steps": 10, "kl": 0.0}
    kind, own, update = _ONLINE[name]
    given = {name: {**shared, "group": bench.images, "batch_size": bench.images, **own}}
    settings = from_mapping(kind, merge(given, _AS_HERE), "settings")
    config = settings.method
    optimizer = torch.optim.AdamW(bench.policy.parameters.values(), lr=1e-5)
    advantages = torch.linspace(-1, 1, bench.images, device=model.device)
    checkpoint_blocks(model.transformer, "all")

    def run(conditioner: RandomText) -> None:
        drawn = rollout.rollout(model, bench.policy, conditioner, [""], config, 0)  # type: ignore[arg-type]
        with torch.no_grad():
            decode(model, drawn.latents(), size, size)
        update(bench.policy, optimizer, rollout.noised(bench.policy, drawn, config), advantages, config)

    seconds = both(bench, run, repeats=1)
    return {**seconds, "images_a_second": bench.images / seconds["ours"],
            **peaks(bench, settings, lambda: run(RandomText(model, stock=False)))}  # fmt: skip


_ONLINE: dict[str, tuple[Any, dict[str, object], Callable[..., object]]] = {
    "grpo": (grpo_room.Config, {"likelihood": "steps", "window": 2}, grpo.update),
    "nft": (nft_room.Config, {"draws": 2}, partial(nft.update, iteration=1)),
}
"""A run's settings, what differs from the defaults, and its optimiser step."""


def latency(bench: Bench) -> dict[str, float]:
    """One image in eight steps, decoded: what a user of a distilled model waits for."""
    model, size = bench.model, bench.model.default_size

    def run(conditioner: RandomText) -> None:
        x = sampling.sample(model, conditioner, [""], [0], num_steps=8)  # type: ignore[arg-type]
        with torch.no_grad():
            decode(model, x, size, size)

    return both(bench, run)


def tdm_step(bench: Bench) -> dict[str, float]:
    """A TDM step of one image: student and critic as LoRAs on one base. Seconds and peak memory."""
    config = tdm.TDMConfig(prompts=1, images=1, critic_updates=1, batch_size=1)
    optimizers = [torch.optim.AdamW(role.parameters.values(), lr=1e-5) for role in (bench.policy, bench.critic)]
    checkpoint_blocks(bench.model.transformer, "all")

    def run() -> None:
        text = RandomText(bench.model, stock=False)
        drawn = tdm.rollout(bench.model, bench.policy, text, [""], config, 0)  # type: ignore[arg-type]
        generator = torch.Generator().manual_seed(0)
        tdm.train_critic(bench.critic, optimizers[1], drawn, config, generator)
        tdm.train_student(bench.policy, bench.critic, optimizers[0], drawn, config, generator)

    given = {"tdm": {"prompts": 1, "images": 1, "critic_updates": 1, "batch_size": 1}}
    settings = from_mapping(tdm_room.Config, merge(given, _AS_HERE), "settings")
    return {"ours": seconds_of(run, bench.model.device, 1), **peaks(bench, settings, run)}


_AS_HERE = {"compute": {"checkpoint_blocks": "all", "offload": True}, "dtype": "bfloat16"}


def peaks(bench: Bench, config: Any, run: Callable[[], None]) -> dict[str, float]:
    """Peak memory of a step as CUDA tells it, and as it is predicted for the same settings; nothing on a CPU."""
    model = bench.model
    found = estimate(config, bench.sizes, dtype=torch.bfloat16, size=model.default_size, text=TEXT)
    text_encoder = found.phases.pop("conditioning")  # there is none here
    predicted = {"predicted_gib": found.peak / 2**30, "predicted_conditioning_gib": text_encoder / 2**30}
    if model.device.type != "cuda":
        return predicted
    gc.collect()
    torch.cuda.reset_peak_memory_stats()
    run()
    return {**predicted, "peak_gib": torch.cuda.max_memory_allocated() / 2**30}


def compiled(bench: Bench) -> dict[str, float]:
    """The forward and the LoRA step once more, with compiled blocks; the first calls, which compile, are not timed."""
    compile_blocks(bench.model.transformer)
    forwards, step = forward(bench), lora_step(bench)
    return {"forward": forwards["ours"], "mfu": forwards["mfu"], "lora_step": step["ours"]}


PARTS: dict[str, tuple[Callable[[Bench], dict[str, float]], int]] = {
    "forward": (forward, 60), "lora step": (lora_step, 60), "GRPO step": (partial(online_step, name="grpo"), 90),
    "NFT step": (partial(online_step, name="nft"), 90), "8-step image": (latency, 60), "TDM step": (tdm_step, 90),
    "compiled": (compiled, 150),
}  # fmt: skip
"""What is measured, and seconds that it may take."""


@contextmanager
def at_most(seconds: float) -> Iterator[None]:
    """Raises TimeoutError inside after so many seconds."""

    def stop(*_: object) -> None:
        raise TimeoutError(f"stopped after {seconds:.0f} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(max(1, int(seconds)))
    try:
        yield
    finally:
        signal.alarm(0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="krea-2", help='"krea-2", or whatever `rlhf-img doctor --model` takes')
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 512], help="sides in pixels")
    parser.add_argument("--images", type=int, default=4, help="in a rollout's forward")
    parser.add_argument("--minutes", type=float, default=9.5, help="for everything")
    parser.add_argument("--patience", type=float, default=1.0, help="so many times the time limit of each part")
    parser.add_argument("--json", type=Path, required=True, help="where the figures go, after every part")
    options = parser.parse_args()
    began = time.monotonic()
    device, sizes = default_device(), sizes_of(options.model)
    dtype = torch.bfloat16 if device.type == "cuda" else fast_dtype()
    rate = matmul_rate(device, dtype)
    model = build(sizes, device, dtype, options.sizes[0])
    policy, critic = (make_role(model.transformer, name, LoRAConfig(), 0, start=None) for name in ("policy", "critic"))
    rows: list[dict[str, object]] = []
    found: dict[str, object] = {"versions": versions(), "matmul_tflop_a_second": rate / 1e12, "rows": rows}
    for name, (measure, limit) in PARTS.items():
        for size in options.sizes:
            object.__setattr__(model, "default_size", size)
            checkpoint_blocks(model.transformer, 0)
            bench = Bench(model, sizes, policy, critic, rate, options.images)
            left = options.minutes * 60 - (time.monotonic() - began)
            try:
                with at_most(min(limit * options.patience, left)):
                    row: dict[str, object] = {"part": name, "px": size, **measure(bench)}
            except (TimeoutError, RuntimeError) as error:  # a part that fails must not take the others with it
                row = {"part": name, "px": size, "failed": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
                traceback.print_exc()
            rows.append(row)
            print(json.dumps(row), flush=True)
            options.json.write_text(json.dumps(found, indent=2) + "\n", encoding="utf-8")
    columns = ("part", "px", "stock", "ours", "mfu", "images_a_second", "peak_gib", "predicted_gib", "failed")
    report(f"{options.model}, seconds; matrix rate {rate / 1e12:.3g} TFLOP/s",
           [{column: row.get(column, "") for column in columns} for row in rows], None)  # fmt: skip
    if any("failed" in row for row in rows):
        raise SystemExit(1)


if __name__ == "__main__":
    main()
