"""Sampling speed: the stock Krea2Pipeline against rlhf-img, with the same weights, prompts, noise and steps.

    python benchmarks/sampling.py [--model playground] [--images 16] [--steps 8] [--repeats 3] [--json FILE]

Both paths run in turn in the same process, `--repeats` times after one warm-up; the median counts. The run fails if
their latents differ. Without the embedded model's weights a random model of the same size is timed: speed does not
depend on the weights' values.
"""

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from diffusers.models.transformers.transformer_krea2 import Krea2AttnProcessor
from rich.console import Console
from rich.table import Table
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model, from_pipeline, load
from rlhf_img.model.sampling import initial_noise, sample
from rlhf_img.model.vae import decode
from rlhf_img.playground.build import build_pipeline

PROMPTS = (
    "two red circles on a grey background",
    "a blue star to the left of a green square",
    "a small yellow cross",
    "three pink triangles on black",
)


def model_for(name: str) -> Model:
    """The model called `name`; a random one of the playground's size where the embedded weights are not made yet."""
    try:
        return load(name)
    except RlhfImgError:
        if name != "playground":
            raise
    pipeline = build_pipeline(PROMPTS * 40)
    generator = torch.Generator().manual_seed(0)
    for parameter in pipeline.transformer.parameters():
        parameter.data += 0.02 * torch.randn(parameter.shape, generator=generator)
    return from_pipeline(pipeline, source="random weights of the playground's size", default_size=64)


def timed(run: Callable[[], Tensor], device: torch.device) -> tuple[float, Tensor]:
    """Seconds of one run, and what it gave."""
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def hardware(device: torch.device) -> str:
    """The processor or GPU, and how many threads may work."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    cpuinfo = Path("/proc/cpuinfo")
    names = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    name = next((line.split(":", 1)[1].strip() for line in names if line.startswith("model name")), "")
    return f"{name or platform.machine()}, {torch.get_num_threads()} thread(s)"


def compare(model: Model, images: int, steps: int, guidance: float, repeats: int) -> dict[str, object]:
    """Median seconds of both paths to latents, and of both decoders; raises if the results differ."""
    size = model.default_size
    prompts = [PROMPTS[i % len(PROMPTS)] for i in range(images)]
    seeds = list(range(images))
    noise = initial_noise(model, seeds, size, size)

    # Made anew each run, so that encoding the prompts is timed on both sides.
    def ours() -> Tensor:
        use_lean_blocks(model.transformer)
        return sample(model, Conditioner(model), prompts, seeds, num_steps=steps, guidance=guidance)

    stock = model.pipeline()
    stock.set_progress_bar_config(disable=True)

    def theirs() -> Tensor:
        model.transformer.set_attn_processor(Krea2AttnProcessor())
        return stock(
            prompts, negative_prompt="", height=size, width=size, num_inference_steps=steps, guidance_scale=guidance,
            latents=noise, output_type="latent",
        ).images  # fmt: skip

    latents = ours()

    def stock_decode() -> Tensor:
        vae = model.vae
        z = stock._unpack_latents(latents, size, size).to(vae.dtype)
        both = (vae.config.latents_mean, vae.config.latents_std)
        mean, std = (torch.tensor(values).to(z)[:, None, None, None] for values in both)
        with torch.no_grad():
            return (vae.decode(z * std + mean).sample[:, :, 0].float() / 2 + 0.5).clamp(0, 1)

    paths: dict[str, Callable[[], Tensor]] = {
        "stock": theirs,
        "ours": ours,
        "stock_decode": stock_decode,
        "ours_decode": lambda: decode(model, latents, size, size),
    }
    difference = (theirs() - latents).abs().max().item()
    decode_difference = (paths["stock_decode"]() - paths["ours_decode"]()).abs().max().item()
    if model.transformer.img_in.weight.dtype == torch.float32 and max(difference, decode_difference) > 1e-4:
        raise SystemExit(f"the two paths differ: latents by {difference:.1e}, images by {decode_difference:.1e}")
    seconds: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(repeats):
        for name, run in paths.items():
            seconds[name].append(timed(run, model.device)[0])
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return {
        "model": model.source, "hardware": hardware(model.device), "torch": torch.__version__,
        "dtype": str(model.transformer.img_in.weight.dtype), "size": size, "images": images, "steps": steps,
        "guidance": guidance, "repeats": repeats, "latent_difference": difference,
        "image_difference": decode_difference, "seconds": seconds, "median": median,
        "speedup": median["stock"] / median["ours"], "decode_speedup": median["stock_decode"] / median["ours_decode"],
    }  # fmt: skip


def show(result: dict[str, object]) -> None:
    """The result as a table."""
    median = result["median"]
    assert isinstance(median, dict)
    table = Table(
        title=f"{result['images']} images of {result['size']} px, {result['steps']} steps, g = {result['guidance']}",
        caption=f"{result['model']}; {result['hardware']}; torch {result['torch']}; median of {result['repeats']}",
    )
    for column in ("", "stock", "rlhf-img", "times faster", "largest difference"):
        table.add_column(column, justify="right" if column else "left")
    for label, suffix, speedup, difference in (
        ("prompts to latents", "", "speedup", "latent_difference"),
        ("latents to images", "_decode", "decode_speedup", "image_difference"),
    ):
        table.add_row(
            label, f"{median['stock' + suffix]:.3f} s", f"{median['ours' + suffix]:.3f} s",
            f"{result[speedup]:.1f}", f"{result[difference]:.1e}",
        )  # fmt: skip
    Console().print(table)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="playground", help="as in `rlhf-img sample`")
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--guidance", type=float, default=0.0, help="Krea's g; 0 = off")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="also write the figures here")
    options = parser.parse_args()
    try:
        model = model_for(options.model)
        result = compare(model, options.images, options.steps, options.guidance, options.repeats)
    except RlhfImgError as error:
        raise SystemExit(f"error: {error}") from None
    show(result)
    if options.json:
        options.json.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
