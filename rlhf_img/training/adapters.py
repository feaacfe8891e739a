"""What a run begins from: the adapter of an earlier run or of a folder, frozen beside what is trained."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.export import has_alpha, load_lora
from rlhf_img.model.loading import Model
from rlhf_img.model.lora import fuses_text, role_parameters
from rlhf_img.model.policy import POLICY, LoRAConfig, Policy, make_policy, make_role

START = "start"
"""The role that a policy begins as, and that is its reference."""


def settings_of(path: str | None, keys: Sequence[str]) -> dict[str, Any]:
    """Those settings that the run in `path` has and says something about; {} if it is no run."""
    file = Path(path or "") / "config.yaml"
    if path is None or not file.is_file():
        return {}
    settings: Mapping[str, Any] = load_yaml(file).get("config") or {}
    return {key: settings[key] for key in keys if settings.get(key) is not None}


def load_frozen(model: Model, path: Path, role: str) -> None:
    """Adds the adapter of the run or LoRA folder `path` as the frozen role `role`.

    Raises RlhfImgError if there is none, if it does not fit the model, if its scale is not known, or if it changes how
    text is fused.
    """
    is_run = (path / "config.yaml").is_file()
    folder = path / "lora" if is_run else path
    if is_run and not folder.is_dir():
        raise RlhfImgError(f"the run {path}, the {role}, has no LoRA: finish it with --resume (a `full` run has none)")
    load_lora(model, folder, role)
    if not has_alpha(folder):
        raise RlhfImgError(
            f"the LoRA in {folder} does not say its alpha, so how strong the {role} is meant to be is not known; "
            "save it again with diffusers' save_lora_weights and its adapter metadata, or give a run's folder"
        )
    if fuses_text(model.transformer, role):
        raise RlhfImgError(
            f"the LoRA in {folder} changes how text is fused, and the fused prompts serve every role alike: merge it "
            "into the model first (rlhf-img export), and give that as --model"
        )
    for parameter in role_parameters(model.transformer, role).values():
        parameter.requires_grad_(False)


def begin_policy(model: Model, lora: LoRAConfig, seed: int, *, start: str | None, full: bool) -> Policy:
    """The policy of a run: new, or one that goes on from the adapter in `start`, with its size and as its reference.

    Raises RlhfImgError as `load_frozen` does, and for a `start` of a full run, whose weights are no adapter.
    """
    if start is None:
        return make_policy(model.transformer, None if full else lora, seed)
    if full:
        raise RlhfImgError(
            f"full=true trains the model's own weights and cannot begin from an adapter: merge it first "
            f"(rlhf-img export {start} --out FOLDER) and give --model FOLDER/pipeline instead of --start"
        )
    load_frozen(model, Path(start), START)
    return make_role(model.transformer, POLICY, lora, seed, start=START)
