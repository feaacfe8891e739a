"""What the embedded model scores on held-out prompts, and the card that says so beside its weights."""

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml

from rlhf_img.config import versions
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import load
from rlhf_img.model.vae import decode, encode
from rlhf_img.playground.data import WRONG_CAPTIONS, example
from rlhf_img.playground.pretrain import PretrainConfig
from rlhf_img.rewards import Images, load_rewards
from rlhf_img.rubrics import decompose, score
from rlhf_img.training.evaluate import EvalConfig, evaluate, summarise
from rlhf_img.training.intervals import interval
from rlhf_img.training.prompts import from_playground

_TEMPLATE = """# The embedded model

A Krea 2 in small, remade by `rlhf-img playground pretrain`. The stock `diffusers.Krea2Pipeline` loads this folder.

**Data.** Rendered scenes only (`rlhf_img/playground`): {scenes} for the diffusion transformer, of the training split;
4 of 40 (colour, shape) pairs are never shown (split val), and 32 of the others not on one of the four backgrounds
(split heldout). {wrong:.0%} of the captions describe a scene with one fact changed.

**Parts.** Text encoder {text_encoder:,} parameters, autoencoder {vae:,}, transformer {transformer:,}; bfloat16.

**Recipe.**

```yaml
{recipe}```

**Hardware of this measurement.** {hardware}; torch {torch}, diffusers {diffusers}.

**Scores** on held-out prompts, 16 steps, with 95 % intervals:

| what | score | n |
|---|---|---|
{rows}

**Known faults.** Two things of different kinds are often drawn as two of one kind, relations hardly ever hold, things
are missing or one too many, and some scenes stay empty. Shapes that touch melt into one. Film grain does not survive
the autoencoder.
"""


def measure(folder: Path, count: int = 512) -> dict[str, Any]:
    """Pass rates of autoencoder reconstructions of clean scenes, and of the model without and with guidance."""
    model = load(folder)
    examples = [e for e in (example(90_000_000 + i, "heldout") for i in range(2 * count)) if e.scene.style is None]
    truth = np.stack([e.image for e in examples[:count]])
    with torch.no_grad():
        images = torch.from_numpy(truth).permute(0, 3, 1, 2).float() / 255
        again = Images(decode(model, encode(model, images), 64, 64))
    passed = [
        float(bool(score(decompose(e.caption).rubric, image).passed))
        for e, image in zip(examples, again.arrays, strict=False)
    ]
    scores: dict[str, Any] = {"autoencoder": interval(passed)}
    for name, guidance in (("unguided", 0.0), ("guided", 2.0)):
        config = EvalConfig(prompts=count, guidance=guidance)
        asked = from_playground("heldout", count)
        found, _ = evaluate(model, Conditioner(model), load_rewards("rubric"), asked, config)
        scores[name] = summarise(name, found)
    return scores


def write_card(folder: Path, config: PretrainConfig, scores: dict[str, Any]) -> None:
    """README.md beside the weights."""
    model = load(folder)
    rows = [("autoencoder: reconstructions of clean scenes that pass every check", scores["autoencoder"])]
    for name, title in (("unguided", "without guidance"), ("guided", "guidance g = 2")):
        rows += [(f"{title}: all requirements met", scores[name]["pass_all"])]
        rows += [(f"{title}: single requirements met", scores[name]["pass_requirement"])]
        rows += [(f"{title}: {check}", value) for check, value in scores[name]["by_check"].items()]
    known = versions()
    parts = {n: sum(p.numel() for p in getattr(model, n).parameters()) for n in ("text_encoder", "vae", "transformer")}
    text = _TEMPLATE.format(
        scenes=config.scenes, wrong=WRONG_CAPTIONS, recipe=yaml.safe_dump(dataclasses.asdict(config), sort_keys=False),
        hardware=known["hardware"], torch=known["torch"], diffusers=known["diffusers"], **parts,
        rows="\n".join(f"| {t} | {v['mean']:.1%} ({v['low']:.1%} to {v['high']:.1%}) | {v['n']} |" for t, v in rows),
    )  # fmt: skip
    (folder / "README.md").write_text(text, encoding="utf-8")

