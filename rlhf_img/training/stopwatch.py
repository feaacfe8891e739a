"""Time of a training step before a run: one block and two of the model, with random weights, in the run's batches."""

import json
import statistics
import time
from collections.abc import Callable

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel

from rlhf_img.model.compute import apply_compute
from rlhf_img.model.counting import Batch, as_text, dress, inputs, set_dtype
from rlhf_img.model.forward import velocity
from rlhf_img.model.lora import role
from rlhf_img.model.policy import POLICY
from rlhf_img.model.sizes import Sizes
from rlhf_img.model.vae import at_once, single_frame
from rlhf_img.training.config import RunConfig
from rlhf_img.training.estimate import Work, plan_of

_REPEATS = 3


def synchronised(device: torch.device) -> float:
    """Now, in seconds, once the device has done what it was told."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def seconds_of(run: Callable[[], object], device: torch.device, repeats: int = _REPEATS) -> float:
    """Median seconds of a call, after one to warm up."""
    run()
    times = []
    for _ in range(repeats):
        start = synchronised(device)
        run()
        times.append(synchronised(device) - start)
    return statistics.median(times)


def matmul_rate(device: torch.device, dtype: torch.dtype, side: int | None = None) -> float:
    """FLOP a second of one large square product: what the hardware can reach, not what its sheet says."""
    side = side or (8192 if device.type == "cuda" else 1024)
    a = torch.randn(side, side, device=device, dtype=dtype)
    return 2 * side**3 / seconds_of(lambda: a @ a, device, repeats=10)


def step_seconds(
    config: RunConfig, sizes: Sizes, *, device: torch.device, dtype: torch.dtype, size: int | None = None,
    text: int = 100,
) -> dict[str, float]:  # fmt: skip
    """Seconds of each phase of a step on this device, without rewards, the optimiser and reading prompts.

    The blocks need a few hundredths of the model's memory, the batches all of theirs.
    """
    plan, size = plan_of(config), size or sizes.default_size
    found = {}
    for work in plan.works:
        batch = Batch(images=work.at_once, grid=sizes.grid(size), text=text)
        one, two = (_pass_seconds(config, sizes, work, batch, n, device, dtype) for n in (1, 2))
        blocks = int(sizes.transformer["num_layers"])
        found[work.phase] = (two + (blocks - 2) * max(two - one, 0.0)) * work.images / work.at_once
    if plan.decoded:
        found["decoding"] = _decode_seconds(sizes, size, plan.decoded, device, dtype)
    return found


def _pass_seconds(
    config: RunConfig, sizes: Sizes, work: Work, batch: Batch, blocks: int, device: torch.device, dtype: torch.dtype
) -> float:
    settings = {**json.loads(as_text(sizes.transformer)), "num_layers": blocks}
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel.from_config(settings)
    set_dtype(transformer, dtype)
    transformer = transformer.to_empty(device=device)
    for parameter in transformer.parameters():
        parameter.data.normal_(std=0.02)
    apply_compute(transformer, config.compute)
    every = blocks if config.compute.checkpoint_blocks == "all" else 0
    dress(transformer, None if config.full else config.lora, dtype, every)
    given = inputs(transformer, batch)

    def run() -> None:
        with role(transformer, None if config.full else POLICY), torch.set_grad_enabled(work.train):
            v = velocity(transformer, *given, batch.grid)
            if work.train:
                v.square().mean().backward()

    return seconds_of(run, device)


def _decode_seconds(sizes: Sizes, size: int, images: int, device: torch.device, dtype: torch.dtype) -> float:
    vae = AutoencoderKLQwenImage.from_config(json.loads(as_text(sizes.vae))).eval().requires_grad_(False)
    set_dtype(vae, dtype)
    vae.to(device)
    some, side = min(at_once(size, size), images), size // 2 ** len(vae.temperal_downsample)
    z = torch.zeros(some, vae.config.z_dim, 1, side, side, device=device, dtype=dtype)
    with torch.no_grad(), single_frame(vae):
        return seconds_of(lambda: vae.decoder(vae.post_quant_conv(z)), device) * images / some
