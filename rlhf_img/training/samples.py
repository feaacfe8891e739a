"""Images of fixed prompts and seeds: drawn, scored, and written where the report finds them."""

import json
import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import Model
from rlhf_img.model.sampling import sample
from rlhf_img.model.vae import decode
from rlhf_img.rewards import Images, Reward, Scores, score
from rlhf_img.rewards.artifact import ArtifactResult, artifact
from rlhf_img.rewards.heat import overlay
from rlhf_img.rubrics.scoring import RubricResult
from rlhf_img.training import distributed
from rlhf_img.training.prompts import Prompt

Progress = Callable[[int, int], None]
"""Called with the image-steps done and their total."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Drawn:
    """B prompts with what the rewards said of their images, and the images of the first of them, or of all."""

    prompts: tuple[Prompt, ...]
    seeds: tuple[int, ...]
    images: Images
    scores: Scores

    def rubric_results(self) -> list[RubricResult]:
        """The `rubric` reward's results, one an image; empty ones where it failed."""
        nothing = RubricResult(total=None, passed=None, requirements=())
        return [r if isinstance(r, RubricResult) else nothing for r in self.scores.details["rubric"]]

    def with_images(self, count: int) -> "Drawn":
        """The same with the first `count` images only: all of them may be more than one wants to keep or send."""
        return replace(self, images=Images(self.images.tensor[:count]))


def merge(parts: Sequence[Drawn]) -> Drawn:
    """One from those of several processes, in the order of the seeds; what several drew is there once."""
    if len(parts) == 1:
        return parts[0]
    seeds = [seed for part in parts for seed in part.seeds]
    order = _in_order(seeds)
    pictured = [seed for part in parts for seed in part.seeds[: len(part.images)]]
    images = torch.cat([part.images.tensor for part in parts])[_in_order(pictured)]
    first = parts[0].scores
    details = {name: [d for part in parts for d in part.scores.details[name]] for name in first.details}
    unscored = {name: sum((Counter(part.scores.unscored[name]) for part in parts), Counter()) for name in first.names}
    scores = Scores(
        names=first.names, values_BK=torch.cat([part.scores.values_BK for part in parts])[order],
        details={name: tuple(found[i] for i in order) for name, found in details.items()}, unscored=unscored,
        seconds={name: max(part.scores.seconds[name] for part in parts) for name in first.names},
    )  # fmt: skip
    prompts = [prompt for part in parts for prompt in part.prompts]
    return Drawn(prompts=tuple(prompts[i] for i in order), seeds=tuple(seeds[i] for i in order),
                 images=Images(images), scores=scores)


def _in_order(seeds: Sequence[int]) -> list[int]:
    """Where each seed is, once, from the lowest to the highest."""
    places = {seed: place for place, seed in enumerate(seeds)}
    return [places[seed] for seed in sorted(places)]


def draw(
    model: Model, conditioner: Conditioner, rewards: Sequence[Reward], prompts: Sequence[Prompt], seeds: Sequence[int],
    *, num_steps: int, guidance: float, progress: Progress | None = None,
) -> Drawn:  # fmt: skip
    """One image a prompt and seed, with the role that is active. `rewards` only look: nothing stops if they fail."""
    images = draw_images(
        model, conditioner, prompts, seeds, num_steps=num_steps, guidance=guidance, progress=progress
    )
    wrapped = Images(images)
    columns = {"rubrics": [p.rubric for p in prompts]}
    scores = score(rewards, [p.text for p in prompts], wrapped, columns, max_unscored=1.0)
    return Drawn(prompts=tuple(prompts), seeds=tuple(seeds), images=wrapped, scores=scores)


def draw_together(
    model: Model, conditioner: Conditioner, rewards: Sequence[Reward], prompts: Sequence[Prompt], seeds: Sequence[int],
    *, num_steps: int, guidance: float,
) -> Drawn:  # fmt: skip
    """`draw` with the work shared by all processes, each of which gets the whole. The seeds differ and rise."""
    mine = distributed.share(len(prompts))
    drawn = draw(
        model, conditioner, rewards, [prompts[i] for i in mine], [seeds[i] for i in mine], num_steps=num_steps,
        guidance=guidance,
    )  # fmt: skip
    return merge(distributed.gather(drawn))


def draw_images(
    model: Model, conditioner: Conditioner, prompts: Sequence[Prompt], seeds: Sequence[int],
    *, num_steps: int, guidance: float, progress: Progress | None = None,
) -> Tensor:  # fmt: skip
    """(B, 3, H, W) in [0, 1], on the CPU."""
    size = model.default_size
    latents = sample(
        model, conditioner, [p.text for p in prompts], seeds, num_steps=num_steps, guidance=guidance,
        progress=progress,
    )  # fmt: skip
    return decode(model, latents, size, size).detach().cpu()


def write_samples(folder: Path, drawn: Drawn, count: int) -> None:
    """The first `count` images as PNG, and samples.json with prompt, seed, rewards and requirements of each.

    A requirement's evidence says what scored it: of a judge, its model, wording and decoding. With an artifact reward
    also what it saw (`defects`), and, where its gate would close by default, its heat map over the image.
    """
    rows = []
    for i in range(min(count, len(drawn.prompts))):
        file = f"{i:03d}.png"
        drawn.images[i].save(folder / file)
        values = drawn.scores.values_BK[i]
        known = torch.isfinite(values).tolist()
        rewards = {
            name: float(values[k]) if known[k] else None for k, name in enumerate(drawn.scores.names)
        }
        requirements = [
            {"id": r.id, "text": r.text, "passed": r.passed, "score": r.score, "evidence": r.evidence}
            for r in drawn.rubric_results()[i].requirements
        ]
        rows.append({
            "file": file, "prompt": drawn.prompts[i].text, "seed": drawn.seeds[i], "rewards": rewards,
            "requirements": requirements, "defects": _write_defects(folder, drawn, i),
        })  # fmt: skip
    (folder / "samples.json").write_text(json.dumps(rows, indent=1, ensure_ascii=False))


def _write_defects(folder: Path, drawn: Drawn, i: int) -> dict[str, Any] | None:
    """What the first artifact reward says of an image; its heat map goes into `folder` where the image is broken."""
    values = dict(zip(drawn.scores.names, drawn.scores.values_BK[i].tolist(), strict=True))
    found = ((values[name], of[i]) for name, of in drawn.scores.details.items() if isinstance(of[i], ArtifactResult))
    value, result = next(found, (math.nan, None))
    if not isinstance(result, ArtifactResult):
        return None
    heat = f"{i:03d}.heat.png" if value < artifact.below else None  # type: ignore[attr-defined]
    if heat is not None:
        Image.fromarray(overlay(drawn.images.arrays[i], result.heat_hw)).save(folder / heat)
    return {"probability": result.against, "permitted": sorted(result.permitted), "heat": heat}
