"""Training steps: the same loops on the stock forward, as public trainers have them, against rlhf-img's.

    python benchmarks/steps.py [grpo sft dpo tdm text] [--repeats 3] [--scale 1] [--json FILE]

Both sides have the same weights, prompts, noise, batches, losses and optimiser, and the run fails if their gradients
differ. The stock side is what flow_grpo and the like run on a stock pipeline: text padded to 512 tokens and fused at
every forward, masked attention with repeated heads, a three-dimensional autoencoder. GRPO is `likelihood=steps`.
Prompts have one length, so that batches are equal; they run in turn in one process, and the median counts. Rewards are
not timed. The profile tells where the time of our GRPO step goes.
"""

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from shared import StockConditioner, in_turn, replaced, report, stock_forward
from torch import Tensor

from rlhf_img.algorithms import dpo, grpo, rollout, sft, tdm
from rlhf_img.cli.main import keep_freed_memory
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model, load
from rlhf_img.model.policy import LoRAConfig, Policy, make_role
from rlhf_img.model.vae import decode

PROMPTS = ("two red circles on a grey background", "two blue circles on a grey background",
           "two red crosses on a green background", "two blue stars on a grey background")  # fmt: skip
Run = Callable[[Any], list[Tensor]]


def gradients(policy: Policy) -> list[Tensor]:
    return [p.grad.clone() for p in policy.parameters.values() if p.grad is not None]


def optimizer_of(policy: Policy) -> torch.optim.Optimizer:
    return torch.optim.AdamW(policy.parameters.values(), lr=0.0)  # the same weights at every repeat


def grpo_step(model: Model, roles: list[Policy], scale: int) -> Run:
    config = grpo.GRPOConfig(
        likelihood="steps", prompts=4, group=2 * scale, num_steps=8, window=2, batch_size=8 * scale, kl=0.04
    )
    optimizer, size = optimizer_of(roles[0]), model.default_size
    advantages = torch.linspace(-1, 1, config.prompts * config.group)

    def run(conditioner: Any) -> list[Tensor]:
        drawn = rollout.rollout(model, roles[0], conditioner, PROMPTS, config, 0)
        if isinstance(conditioner, StockConditioner):
            stock_decode(model, drawn.latents())
        else:
            decode(model, drawn.latents(), size, size)
        grpo.update(roles[0], optimizer, drawn, advantages.to(model.device), config)
        return gradients(roles[0])

    return run


@torch.no_grad()
def stock_decode(model: Model, latents: Tensor) -> Tensor:
    vae, stock, size = model.vae, model.pipeline(), model.default_size
    z = stock._unpack_latents(latents, size, size).to(vae.dtype)
    mean, std = (
        torch.tensor(v).to(z)[:, None, None, None] for v in (vae.config.latents_mean, vae.config.latents_std)
    )
    return (vae.decode(z * std + mean).sample[:, :, 0].float() / 2 + 0.5).clamp(0, 1)


def sft_step(model: Model, roles: list[Policy], scale: int) -> Run:
    config, count = sft.SFTConfig(batch_size=8 * scale), 8 * scale
    optimizer, x = optimizer_of(roles[0]), noise(model, count, 0)

    def run(conditioner: Any) -> list[Tensor]:
        text = torch.stack(conditioner.encode(PROMPTS)).repeat(count // 4, 1, 1)
        sigma = torch.linspace(0.1, 0.9, count, device=model.device)
        sft.update(roles[0], optimizer, [sft.noised(x, text, sigma, noise(model, count, 1), grid(model))], config)
        return gradients(roles[0])

    return run


def dpo_step(model: Model, roles: list[Policy], scale: int) -> Run:
    config, count = dpo.DPOConfig(loss="dpo", batch_size=8 * scale), 4 * scale
    optimizer, winner, loser = optimizer_of(roles[0]), noise(model, count, 0), noise(model, count, 1)

    def run(conditioner: Any) -> list[Tensor]:
        text = torch.stack(conditioner.encode(PROMPTS)).repeat(count // 4, 1, 1)
        sigma = torch.linspace(0.1, 0.9, count, device=model.device)
        pairs = dpo.noised(winner, loser, text, sigma, noise(model, count, 2), grid(model))
        dpo.update(roles[0], optimizer, [pairs], 100.0, config)
        return gradients(roles[0])

    return run


def tdm_step(model: Model, roles: list[Policy], scale: int) -> Run:
    config = tdm.TDMConfig(prompts=4, images=scale, batch_size=8 * scale, critic_updates=1)
    student, critic = roles
    optimizers = [optimizer_of(role) for role in roles]

    def run(conditioner: Any) -> list[Tensor]:
        drawn = tdm.rollout(model, student, conditioner, PROMPTS, config, 0)
        generator = torch.Generator().manual_seed(0)
        tdm.train_critic(critic, optimizers[1], drawn, config, generator)
        tdm.train_student(student, critic, optimizers[0], drawn, config, generator)
        return gradients(student) + gradients(critic)

    return run


def text_step(model: Model, roles: list[Policy], scale: int) -> Run:
    def run(conditioner: Any) -> list[Tensor]:
        conditioner.encode(PROMPTS * scale)
        return []

    return run


STEPS = {
    "grpo": ("GRPO step, 4 x {2} images, 8 steps, window 2", grpo_step),
    "sft": ("LoRA train step, {8} images", sft_step),
    "dpo": ("DPO step, {4} pairs", dpo_step),
    "tdm": ("TDM step, 4 x {1} images, 8 steps", tdm_step),
    "text": ("reading four prompts", text_step),
}


def noise(model: Model, count: int, seed: int) -> Tensor:
    rows, columns = grid(model)
    shape = (count, rows * columns, model.transformer.config.in_channels)
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(model.device)


def grid(model: Model) -> tuple[int, int]:
    return model.grid(model.default_size, model.default_size)


def compare(model: Model, name: str, roles: list[Policy], scale: int, repeats: int) -> dict[str, object]:
    """Median seconds of both; raises if their gradients differ."""
    title, make = STEPS[name]
    run = make(model, roles, scale)

    def ours() -> list[Tensor]:
        return run(Conditioner(model))  # a new one each time: reading the prompts is timed on both sides

    def stock() -> list[Tensor]:
        with stock_forward(model.transformer):
            return run(StockConditioner(model))

    apart = [float((a - b).norm() / a.norm().clamp_min(1e-12)) for a, b in zip(ours(), stock(), strict=True)]
    difference = max(apart, default=0.0)
    if model.transformer.img_in.weight.dtype == torch.float32 and difference > 1e-2:
        raise SystemExit(f"{name}: the gradients of the two differ by {difference:.1e} of their size")
    median = in_turn({"stock": stock, "ours": ours}, repeats, model.device)
    for number in (1, 2, 4, 8):
        title = title.replace(f"{{{number}}}", str(number * scale))
    return {
        "what": title, "stock, s": median["stock"], "rlhf-img, s": median["ours"],
        "times faster": median["stock"] / median["ours"], "gradients differ by": difference,
    }  # fmt: skip


def profile(model: Model, roles: list[Policy], scale: int) -> list[dict[str, object]]:
    """Seconds of the parts of our GRPO step, as it runs."""
    parts: dict[str, float] = {}

    def timed(name: str, run: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return run(*args, **kwargs)
            finally:
                parts[name] = parts.get(name, 0.0) + time.perf_counter() - start

        return wrapper

    def of(room: str) -> str:
        return "rollout: forwards" if room == rollout.__name__ else "training: forwards"

    with (
        replaced(lambda room, forward: timed(of(room), forward)),
        patch.object(torch.Tensor, "backward", timed("training: backward", torch.Tensor.backward)),
        patch.object(Conditioner, "encode", timed("text", Conditioner.encode)),
        patch(f"{__name__}.decode", timed("decoding", decode)),
    ):
        start = time.perf_counter()
        grpo_step(model, roles, scale)(Conditioner(model))
        whole = time.perf_counter() - start
    parts["the rest: noise, losses, AdamW"] = whole - sum(parts.values())
    return [{"part of a GRPO step": name, "s": value, "share": f"{value / whole:.0%}"} for name, value in parts.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("steps", nargs="*", metavar="STEP", help=f"of {', '.join(STEPS)} [default: all]")
    parser.add_argument("--model", default="playground", help="as in `rlhf-img sample`")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scale", type=int, default=1, help="so many times as many images")
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    if unknown := set(options.steps) - set(STEPS):
        raise SystemExit(f"there is no step {', '.join(sorted(unknown))}; there are {', '.join(STEPS)}")
    keep_freed_memory()
    model = load(options.model)
    names = ("policy", "critic")
    roles = [make_role(model.transformer, name, LoRAConfig(), i, start=None) for i, name in enumerate(names)]
    for role in roles:  # B is 0 at first, and then A has no gradient
        for key, parameter in role.parameters.items():
            if key.endswith("lora_B"):
                parameter.data.normal_(std=0.02, generator=torch.Generator(parameter.device).manual_seed(0))
    rows = [compare(model, name, roles, options.scale, options.repeats) for name in options.steps or STEPS]
    parts = profile(model, roles, options.scale)
    report(f"{model.source}, {model.default_size} px", rows, options.json, profile=parts, repeats=options.repeats)
    report("where our time goes", parts, None)


if __name__ == "__main__":
    main()
