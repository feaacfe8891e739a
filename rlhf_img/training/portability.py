"""What becomes of LoRAs trained on one checkpoint of a model on another: on Turbo, of those trained on Raw.

The same prompts and seeds are drawn four times: with and without the LoRA, on the model it was trained on and on the
other. If the two changes of the images go the same way and are of like size, the LoRA carries over.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.delta import predictors
from rlhf_img.model.export import LORA_FILE, has_alpha, load_lora
from rlhf_img.model.loading import PLAYGROUND, Model
from rlhf_img.model.lora import fuses_text, role, scaled
from rlhf_img.playground import variants
from rlhf_img.rewards import Reward, load_rewards
from rlhf_img.training import prompts as prompt_room
from rlhf_img.training.card import grid
from rlhf_img.training.evaluate import EVAL_SEED, compare, measure, summarise
from rlhf_img.training.intervals import interval, ratio_interval
from rlhf_img.training.likeness import ARTIFACT, Features, alike, open_features
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.samples import Drawn, draw, draw_images

_ROLE = "ported"
_SHOWN = 8
"""Prompts of a LoRA that are shown."""
TARGET = "target"
"""What the reward that measures a LoRA's purpose is called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class PortabilityConfig:
    """How portability is measured."""

    prompts: int = 64
    """Prompts a LoRA, one image each."""
    scales: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    """Strengths of the LoRA on the other model; 1 must be among them."""
    steps: int = 16
    """Denoising steps of the model that the LoRAs were trained on."""
    guidance: float = 1.0
    """Krea's g there."""
    turbo_steps: int = 8
    """Denoising steps of the other model."""
    turbo_guidance: float = 0.0
    """Krea's g there."""
    threshold: float = 0.7
    """Cosine of the two changes, at scale 1, from which a LoRA is said to carry over."""
    rewards: str = "rubric,artifact"
    """What measures the quality of images."""
    features: str = ARTIFACT
    """In what changes are measured: "artifact", or a hub id or folder of SigLIP or DINO."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        if self.prompts < 2 or min(self.steps, self.turbo_steps) < 1 or min(self.guidance, self.turbo_guidance) < 0:
            raise RlhfImgError("portability needs 2 or more prompts, 1 or more steps, and guidance of 0 or more")
        if 1.0 not in self.scales or min(self.scales) <= 0:
            raise RlhfImgError(f"scales are above 0, and 1 is among them; got {', '.join(map(str, self.scales))}")
        if not -1 <= self.threshold <= 1:
            raise RlhfImgError(f"the threshold is a cosine, between -1 and 1; got {self.threshold}")


@dataclass(frozen=True, kw_only=True, slots=True)
class PortedLora:
    """A LoRA, and what it is for."""

    name: str
    path: Path
    kind: str | None = None
    target: tuple[dict[str, Any], ...] | None = None
    """The reward that measures whether it does what it is for; None: that is not known."""
    prompts: tuple[Prompt, ...] = field(default=(), repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """A model and how it is sampled."""

    model: Model
    conditioner: Conditioner
    num_steps: int
    guidance: float

    @contextmanager
    def with_lora(self, scale: float) -> Iterator["Side"]:
        """Inside, the LoRA is on; prompts are fused anew if it changes that."""
        transformer = self.model.transformer
        with ExitStack() as stack:
            stack.enter_context(role(transformer, _ROLE))
            stack.enter_context(scaled(transformer, _ROLE, scale))
            if not fuses_text(transformer, _ROLE):
                yield self
            else:
                yield Side(model=self.model, conditioner=Conditioner(self.model), num_steps=self.num_steps,
                           guidance=self.guidance)

    def draw(self, rewards: list[Reward], prompts: tuple[Prompt, ...]) -> Drawn:
        """One image a prompt, scored."""
        seeds = [EVAL_SEED + i for i in range(len(prompts))]
        return draw(self.model, self.conditioner, rewards, prompts, seeds, num_steps=self.num_steps,
                    guidance=self.guidance)

    def others(self, prompts: tuple[Prompt, ...]) -> Tensor:
        """Images of other seeds."""
        seeds = [EVAL_SEED + len(prompts) + i for i in range(len(prompts))]
        return draw_images(self.model, self.conditioner, prompts, seeds, num_steps=self.num_steps,
                           guidance=self.guidance)


def find_loras(folder: Path, config: PortabilityConfig, fallback: tuple[Prompt, ...]) -> list[PortedLora]:
    """The LoRAs in a folder: .safetensors files, folders that hold one, and runs of `rlhf-img sft`.

    A folder's portability.yaml may say what its LoRA is for: `target`, a reward as in a run file's list, `prompts`, a
    file, and `kind`, a word. A run on a variant of the playground says so itself. Others are drawn with `fallback`.
    Raises RlhfImgError if there is none, or if one has no prompts.
    """
    if not folder.is_dir():
        raise RlhfImgError(f"there is no folder {folder}; give one that holds LoRAs, or runs of `rlhf-img sft`")
    found = []
    for entry in sorted(folder.iterdir()):
        path = entry / "lora" if (entry / "lora" / LORA_FILE).is_file() else entry
        if path.suffix == ".safetensors" or (path / LORA_FILE).is_file():
            found.append(_described(entry, path, config, fallback))
    if not found:
        raise RlhfImgError(f"{folder} holds no LoRA: expected .safetensors files, folders with {LORA_FILE}, or "
                           "finished runs of `rlhf-img sft`")
    if bare := [lora.name for lora in found if len(lora.prompts) < 2]:
        raise RlhfImgError(f"LoRA {bare[0]} has no prompts to be drawn with: give --prompts FILE with two or more, or "
                           "`prompts: FILE` in its portability.yaml")
    return found


def _described(entry: Path, path: Path, config: PortabilityConfig, fallback: tuple[Prompt, ...]) -> PortedLora:
    said = load_yaml(entry / "portability.yaml") if (entry / "portability.yaml").is_file() else {}
    for key in said:
        if key not in (known := ("kind", "target", "prompts")):
            raise RlhfImgError(f'{entry / "portability.yaml"}: unknown key "{key}": {did_you_mean(str(key), known)}')
    run = load_yaml(entry / "config.yaml").get("config") or {} if (entry / "config.yaml").is_file() else {}
    name = run.get("variant")
    target: dict[str, Any] | None = None
    kind, prompts = None, fallback
    if name in variants.VARIANTS:
        kind, target = variants.VARIANTS[name].kind, {"reward": "variant", "options": {"of": name}}
        prompts = tuple(Prompt(text) for text in variants.prompts(name, "heldout", config.prompts))
    target = said.get("target", target)
    if isinstance(target, str):
        target = {"reward": target}
    if "prompts" in said:
        prompts = tuple(prompt_room.read_prompts(entry / str(said["prompts"])))
    return PortedLora(
        name=entry.stem, path=path, kind=said.get("kind", kind), prompts=prompts[: config.prompts],
        target=None if target is None else ({"role": "measure", **target, "name": TARGET},),
    )  # fmt: skip


def portability(
    source: Model, turbo: Model, loras: list[PortedLora], quality_prompts: tuple[Prompt, ...],
    config: PortabilityConfig, progress: Callable[[int, int], None] | None = None,
    save: Callable[[str, list[Drawn]], None] | None = None,
) -> dict[str, Any]:  # fmt: skip
    """What portability.json holds. `save` gets each LoRA's images: without and with it, on both models.

    Raises RlhfImgError if the two models, or a LoRA and a model, do not fit together.
    """
    if source.default_size != turbo.default_size:
        raise RlhfImgError(f"the models draw {source.default_size} px and {turbo.default_size} px: images of different "
                           "size cannot be compared; give checkpoints of one model")
    sides = (
        Side(model=source, conditioner=Conditioner(source), num_steps=config.steps, guidance=config.guidance),
        Side(model=turbo, conditioner=Conditioner(turbo), num_steps=config.turbo_steps,
             guidance=config.turbo_guidance),
    )  # fmt: skip
    quality = load_rewards(config.rewards)
    quality += [] if any(r.name == "rubric" for r in quality) else load_rewards("rubric")
    features = open_features(config.features)
    plain = sides[1].draw(quality, quality_prompts) if quality_prompts else None
    found = []
    for done, lora in enumerate(loras):
        for side in sides:
            load_lora(side.model, lora.path, _ROLE)
        found.append(_ported(sides, lora, quality, features, plain, config, save))
        for side in sides:
            side.model.transformer.delete_adapters(_ROLE)
        if progress is not None:
            progress(done + 1, len(loras))
    return {"settings": asdict(config), "threshold": config.threshold, "loras": found}


def _ported(
    sides: tuple[Side, Side], lora: PortedLora, quality: list[Reward], features: Features, plain: Drawn | None,
    config: PortabilityConfig, save: Callable[[str, list[Drawn]], None] | None,
) -> dict[str, Any]:  # fmt: skip
    raw, turbo = sides
    rewards = [*quality, *(load_rewards(lora.target) if lora.target else [])]
    before = [side.draw(rewards, lora.prompts) for side in sides]
    again = raw.others(lora.prompts)
    with raw.with_lora(1.0) as on:
        raw_after, again_after = on.draw(rewards, lora.prompts), on.others(lora.prompts)
    after = {}
    for scale in config.scales:
        with turbo.with_lora(scale) as on:
            after[scale] = on.draw(rewards, lora.prompts)
    if save is not None:
        save(lora.name, [before[0], raw_after, before[1], after[1.0]])
    unit = features(before[0].images.tensor).std(0)
    unit = np.where(unit > 1e-6, unit, 1.0)

    def change(one: Tensor, other: Tensor) -> np.ndarray:
        return (features(other) - features(one)) / unit

    raw_change, plain_turbo = change(before[0].images.tensor, raw_after.images.tensor), before[1].images.tensor
    changes = {scale: alike(raw_change, change(plain_turbo, drawn.images.tensor)) for scale, drawn in after.items()}
    states = {"raw": before[0], "raw with LoRA": raw_after, "turbo": before[1], "turbo with LoRA": after[1.0]}
    result = {
        "name": lora.name, "kind": lora.kind, "prompts": len(lora.prompts),
        "alpha": "in the file" if has_alpha(lora.path) else "not in the file, taken as the rank",
        **changes[1.0], "verdict": _verdict(changes[1.0]["cosine"], config.threshold),
        "ceiling": alike(raw_change, change(again, again_after))["cosine"],
        "target": {name: _target(drawn) for name, drawn in states.items()} if lora.target else None,
        "target_kept": _kept(before, raw_after, after[1.0]) if lora.target else None,
        "fidelity": {name: _fidelity(drawn) for name, drawn in states.items()},
        "curve": [
            {"scale": scale, **changes[scale], "target": _target(drawn) if lora.target else None,
             "fidelity": _fidelity(drawn), "rewards": summarise(str(scale), measure(drawn, [], []))["rewards"]}
            for scale, drawn in after.items()
        ],
        "weights": predictors(raw.model.transformer, turbo.model.transformer, _ROLE),
    }  # fmt: skip
    if plain is not None:
        with turbo.with_lora(1.0) as on:
            loaded = on.draw(quality, plain.prompts)
        one, other = (measure(drawn, [], []) for drawn in (plain, loaded))
        result["quality"] = {"without": summarise("without", one), "with": summarise("with", other),
                             "difference": compare(one, other)}
    return result


def _verdict(cosine: dict[str, Any], threshold: float) -> str:
    """Whether it carries over, where the whole interval says so."""
    if cosine["mean"] is None:
        return "not measured"
    if cosine["low"] >= threshold:
        return "carries over"
    return "does not carry over" if cosine["high"] < threshold else "unclear"


def _values(drawn: Drawn) -> np.ndarray:
    return drawn.scores.values_BK[:, drawn.scores.names.index(TARGET)].numpy()


def _target(drawn: Drawn) -> dict[str, Any]:
    return interval(_values(drawn))


def _kept(before: list[Drawn], raw_after: Drawn, turbo_after: Drawn) -> dict[str, Any]:
    """The rise of the target on the other model over that on the model of training."""
    top, bottom = _values(turbo_after) - _values(before[1]), _values(raw_after) - _values(before[0])
    known = ~(np.isnan(top) | np.isnan(bottom))
    return ratio_interval(top[known], bottom[known])


def _fidelity(drawn: Drawn) -> dict[str, Any]:
    return interval(measure(drawn, [], []).pass_requirement)


def default_prompts(model: str, file: Path | None, count: int) -> tuple[Prompt, ...]:
    """Of a file, or the playground's held-out ones for its model and those made from it; else none."""
    if file is not None:
        return tuple(prompt_room.read_prompts(file))[:count]
    return tuple(prompt_room.from_playground("heldout", count)) if model == PLAYGROUND else ()


def settings_for(turbo: str) -> dict[str, Any]:
    """How both models are sampled if `turbo` is a run of tdm: as on its card; else {}."""
    file = Path(turbo) / "config.yaml"
    saved = load_yaml(file) if file.is_file() else {}
    if saved.get("algorithm") != "tdm":
        return {}
    settings = saved["config"]
    return {"steps": settings["full_steps"], "guidance": settings["tdm"]["guidance"],
            "turbo_steps": settings["tdm"]["num_steps"]}


def open_folder(folder: Path) -> RunDir:
    """Where results go: the folder of a run, or one that becomes its own. Raises RlhfImgError if it is in use."""
    return RunDir.create(folder, resume=(folder / "config.yaml").is_file())


def write_grid(run: RunDir, name: str, drawn: list[Drawn]) -> None:
    """`portability-NAME.png`: a line a prompt; without and with the LoRA, on Raw, then on Turbo."""
    run.write_image(f"portability-{name}.png", grid([d.images for d in drawn], _SHOWN))
