"""`rlhf-img playground pretrain`: makes the embedded model from nothing but rendered scenes.

Four stages, each resumable: a tokenizer and a text encoder (which reads a caption in Krea's chat template until the
scene's facts can be read off its states), the autoencoder, latents and text features of the training set computed
once, and the DiT by flow matching with dropped captions and an averaged copy of the weights.
"""

import json
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLQwenImage, Krea2Pipeline
from PIL import Image
from rich.progress import track
from torch import Tensor

from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.loading import SETTINGS_FILE
from rlhf_img.model.vae import single_frame
from rlhf_img.playground import build
from rlhf_img.playground.captions import caption
from rlhf_img.playground.data import FACT_SIZES, WRONG_CAPTIONS, example, facts, prompts
from rlhf_img.playground.fit import FitConfig, fit
from rlhf_img.playground.scene import SIZE, SPLITS, sample_scene


@dataclass(frozen=True, kw_only=True, slots=True)
class PretrainConfig:
    """The recipe of the embedded model."""

    seed: int = 0
    scenes: int = 40_960
    """Training scenes of the DiT."""
    vae: FitConfig = field(default_factory=lambda: FitConfig(steps=5000, lr=1.5e-3, ema=0.995))
    decoder: FitConfig = field(default_factory=lambda: FitConfig(steps=2200, lr=1e-3, ema=0.995))
    """The decoder alone, with the encoder frozen."""
    text: FitConfig = field(default_factory=lambda: FitConfig(steps=1200, lr=2e-3))
    dit: FitConfig = field(default_factory=lambda: FitConfig(steps=20_000, lr=2e-3, ema=0.998, save_every=500))
    batch: int = 64
    """Examples a step of the text encoder and the DiT; the autoencoder takes a quarter of it."""
    drop: float = 0.1
    """Share of DiT batches without a caption, which is what guidance subtracts."""


@dataclass(frozen=True, slots=True)
class Cache:
    """The DiT's training set: packed latents, and text features grouped by prompt length so that no batch pads."""

    latents_BNC: Tensor
    features_BLKD: dict[int, Tensor]
    """Prompt length L -> (examples of that length, L, tapped layers, width)."""
    members_B: dict[int, Tensor]
    """Prompt length L -> indices of those examples into `latents_BNC`."""
    empty_LKD: Tensor


def pretrain(config: PretrainConfig, work: Path, out: Path, start: Path | None = None) -> None:
    """Runs every stage that is not done yet, in `work`, and writes the pipeline folder `out`.

    With `start`, a pipeline folder made by this function, only its transformer is trained further.
    """
    work.mkdir(parents=True, exist_ok=True)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if start is not None:
        pipe = Krea2Pipeline.from_pretrained(str(start), dtype=torch.float32).to(device)
    else:
        pipe = build.build_pipeline((example(i).caption for i in range(5000)), config.seed).to(device)
        train_text(pipe, config, work)
        train_vae(pipe.vae, config, work)
    train_dit(pipe, make_cache(pipe, config, work), config, work)
    save(pipe, out)


def train_text(pipe: Krea2Pipeline, config: PretrainConfig, work: Path) -> None:
    """Reading comprehension: from each suffix token, which has seen the whole caption, linear heads (dropped
    afterwards) tell the scene's facts. The blocks get no text positions, so binding has to be in these states."""
    encoder, tokenizer = pipe.text_encoder, pipe.tokenizer
    device = encoder.device
    encoder.heads = torch.nn.Linear(encoder.config.text_config.hidden_size, sum(FACT_SIZES), device=device)

    def loss_fn(step: int) -> Tensor:
        rng = np.random.default_rng((10, config.seed, step))
        scenes = [sample_scene(rng) for _ in range(config.batch)]
        texts = [build.PREFIX + caption(scene, rng) + build.SUFFIX for scene in scenes]
        tokens = tokenizer(texts, padding=True, padding_side="left", return_tensors="pt").to(device)
        hidden = encoder(**tokens).last_hidden_state[:, -5:]
        truth = torch.tensor([facts(scene) for scene in scenes], device=device)
        logits = encoder.heads(hidden).split(FACT_SIZES, dim=-1)
        wrong = [F.cross_entropy(x.flatten(0, 1), truth[:, i].repeat_interleave(5)) for i, x in enumerate(logits)]
        return torch.stack(wrong).sum()

    fit("text", encoder, loss_fn, config.text, work)
    del encoder.heads


def train_vae(vae: AutoencoderKLQwenImage, config: PretrainConfig, work: Path) -> None:
    """The autoencoder, then its decoder alone: latents and their statistics (which go into the config) stay."""
    with single_frame(vae):
        _fit_vae("vae", vae, config.vae, config, work)
        with torch.no_grad():
            x = _pixels([example(40_000_000 + i).image for i in range(1024)]).to(vae.device)
            z = torch.cat([vae.encode(part[:, :, None]).latent_dist.mode() for part in x.split(64)])
        vae.register_to_config(
            latents_mean=[round(v, 5) for v in z.mean((0, 2, 3, 4)).tolist()],
            latents_std=[round(v, 5) for v in z.std((0, 2, 3, 4)).tolist()],
        )
        vae.encoder.requires_grad_(False)
        vae.quant_conv.requires_grad_(False)
        _fit_vae("decoder", vae, config.decoder, config, work)


def _fit_vae(name: str, vae: AutoencoderKLQwenImage, fit_config: FitConfig, config: PretrainConfig, work: Path) -> None:
    """Reconstruction (squared, absolute, of edges and of texture) with a light KL, of what is not frozen.

    Of scenes of all splits, half of them in a style: what an autoencoder cannot draw, no model on its latents can be
    asked for. Texture is the mean step between neighbouring pixels in patches of 8 px: without it, film grain, which
    no latent can hold pixel by pixel, would best be drawn as none at all. Errors are relative to an image's own
    spread: a green star on grey is as much of a star as one on white.
    """
    device = vae.device

    def loss_fn(step: int) -> Tensor:
        count = config.batch // 4
        seeds = range(20_000_000 + step * count, 20_000_000 + (step + 1) * count)
        x = _pixels([example(seed, SPLITS[seed % len(SPLITS)], styled=0.5).image for seed in seeds]).to(device)
        posterior = vae.encode(x[:, :, None]).latent_dist
        y = vae.decode(posterior.sample()).sample[:, :, 0]
        scale = 0.4 / (0.1 + x.std(dim=(1, 2, 3), keepdim=True))
        x, y = x * scale, y * scale
        steps = [(x.diff(dim=d), y.diff(dim=d)) for d in (2, 3)]
        edges = sum((a - b).abs().mean() for a, b in steps)
        texture = sum((F.avg_pool2d(a.abs(), 8) - F.avg_pool2d(b.abs(), 8)).abs().mean() for a, b in steps)
        kl = (posterior.mean**2 + posterior.var - 1 - posterior.logvar).mean() / 2
        return (x - y).square().mean() + 0.3 * (x - y).abs().mean() + 0.2 * edges + 0.5 * texture + 1e-4 * kl

    def preview(step: int) -> None:
        x = _pixels([example(30_000_000 + i, styled=0.5).image for i in range(16)]).to(device)
        with torch.no_grad():
            y = vae.decode(vae.encode(x[:, :, None]).latent_dist.mode()).sample[:, :, 0]
        save_grid(torch.cat([x, y]) / 2 + 0.5, work / f"{name}_{step:06d}.png", columns=16)

    fit(name, vae, loss_fn, fit_config, work, preview)


@torch.no_grad()
def make_cache(pipe: Krea2Pipeline, config: PretrainConfig, work: Path) -> Cache:
    """Latents and text features of every training example, computed once and kept in `work`."""
    file = work / "cache.pt"
    if file.exists():
        return Cache(*torch.load(file, weights_only=True))
    mean, std = (torch.tensor(v, device=pipe.vae.device)[:, None, None] for v in
                 (pipe.vae.config.latents_mean, pipe.vae.config.latents_std))
    latents, by_length = [], defaultdict(list)
    with single_frame(pipe.vae):
        for start in track(range(0, config.scenes, 128), "latents and text features"):
            items = [example(i, wrong_captions=WRONG_CAPTIONS) for i in range(start, start + 128)]
            x = _pixels([e.image for e in items]).to(pipe.vae.device)
            z = (pipe.vae.encode(x[:, :, None]).latent_dist.mode()[:, :, 0] - mean) / std
            latents.append(pipe._pack_latents(z, *z.shape).cpu())
            features, lengths = text_features(pipe, [e.caption for e in items])
            for i, length in enumerate(lengths):
                by_length[length].append((start + i, features[i][:length].to(torch.bfloat16)))
    empty, (length,) = text_features(pipe, [""])
    cache = Cache(
        latents_BNC=torch.cat(latents),
        features_BLKD={n: torch.stack([f for _, f in rows]) for n, rows in by_length.items()},
        members_B={n: torch.tensor([i for i, _ in rows]) for n, rows in by_length.items()},
        empty_LKD=empty[0][:length],
    )
    torch.save((cache.latents_BNC, cache.features_BLKD, cache.members_B, cache.empty_LKD), file)
    return cache


def text_features(pipe: Krea2Pipeline, texts: list[str]) -> tuple[Tensor, list[int]]:
    """Tapped hidden states (B, L, K, D) of prompt and suffix on the CPU, and each prompt's true length.

    The encoder is causal, so appending the suffix before padding on the right gives what the stock pipeline gives.
    """
    full = [build.PREFIX + t + build.SUFFIX for t in texts]
    tokens = pipe.tokenizer(full, padding=True, return_tensors="pt").to(pipe.text_encoder.device)
    states = pipe.text_encoder(**tokens, output_hidden_states=True).hidden_states
    features = torch.stack([states[i] for i in build.TEXT_LAYERS], dim=2)[:, 34:]
    return features.cpu(), (tokens.attention_mask.sum(1) - 34).tolist()


def train_dit(pipe: Krea2Pipeline, cache: Cache, config: PretrainConfig, work: Path) -> None:
    """Flow matching: v = eps - x0 at sigma drawn logit-normal and shifted as in sampling."""
    transformer = pipe.transformer
    device = transformer.device
    lengths = sorted(cache.members_B)
    shares = np.array([len(cache.members_B[n]) for n in lengths]) / len(cache.latents_BNC)

    def loss_fn(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, step))
        noise = torch.Generator().manual_seed(step)
        length = lengths[rng.choice(len(lengths), p=shares)]
        rows = torch.from_numpy(rng.integers(len(cache.members_B[length]), size=config.batch))
        x0 = cache.latents_BNC[cache.members_B[length][rows]]
        text = cache.features_BLKD[length][rows].float()
        if rng.random() < config.drop:
            text = cache.empty_LKD.expand(config.batch, -1, -1, -1)
        sigma = torch.sigmoid(torch.randn(config.batch, generator=noise) + 0.4)
        eps = torch.randn(x0.shape, generator=noise)
        x0, text, sigma, eps = (t.to(device) for t in (x0, text, sigma, eps))
        x = torch.lerp(x0, eps, sigma[:, None, None])
        positions = pipe.prepare_position_ids(text.shape[1], 4, 4, device)
        with torch.autocast(device.type, torch.bfloat16):
            v = transformer(x, text, sigma, positions, return_dict=False)[0]
        return F.mse_loss(v.float(), eps - x0)

    shown = prompts("val", 12) + prompts("heldout", 12)

    def preview(step: int) -> None:
        pipe.set_progress_bar_config(disable=True)
        rows = []
        for guidance in (0.0, 2.0):
            generator = torch.Generator().manual_seed(0)
            rows.append(pipe(shown, height=64, width=64, num_inference_steps=16, guidance_scale=guidance,
                             max_sequence_length=40, generator=generator, output_type="pt").images)
        save_grid(torch.cat(rows), work / f"dit_{step:06d}.png", columns=12)

    use_lean_blocks(transformer)
    fit("dit", transformer, loss_fn, config.dit, work, preview)


def save(pipe: Krea2Pipeline, out: Path) -> None:
    """The stock folder, in bfloat16 (the norms stay float32)."""
    pipe.to("cpu", torch.bfloat16).save_pretrained(out)
    for file in (out / "model_index.json", *out.glob("*/config.json")):
        settings = json.loads(file.read_text())
        settings.pop("_name_or_path", None)  # a folder of the machine that it was made on
        file.write_text(json.dumps(settings, indent=2) + "\n")
    (out / SETTINGS_FILE).write_text(json.dumps({"default_size": SIZE}))


def save_grid(images_B3HW: Tensor, file: Path, columns: int) -> None:
    """Images in [0, 1] as one PNG, `columns` a row."""
    x = (images_B3HW.detach().float().clamp(0, 1) * 255).round().byte().cpu()
    b, c, h, w = x.shape
    x = x.reshape(b // columns, columns, c, h, w).permute(0, 3, 1, 4, 2).reshape(b // columns * h, columns * w, c)
    Image.fromarray(x.numpy()).save(file)


def _pixels(images: list[np.ndarray]) -> Tensor:
    """uint8 (H, W, 3) images to float (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 127.5 - 1
