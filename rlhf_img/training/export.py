"""What a run has trained, or a model, as others read it: diffusers, ComfyUI, and krea-ai/krea-2's single file."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.model.export import (
    WEIGHTS_FILE,
    load_lora,
    load_weights,
    merge,
    save_comfyui_lora,
    save_lora,
    save_pipeline,
)
from rlhf_img.model.loading import Model, load, local_folder
from rlhf_img.model.official import load_checkpoint, save_checkpoint
from rlhf_img.model.policy import POLICY

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
FORMATS: Mapping[str, str] = {
    "lora": "lora", "comfyui": "comfyui_lora.safetensors", "pipeline": "pipeline",
    "checkpoint": "checkpoint.safetensors",
}  # fmt: skip
"""Format -> what it is called in the folder that is written."""
_ADAPTER = ("lora", "comfyui")
"""Formats that only a run with a LoRA has."""
LORA, WEIGHTS = "lora", "weights"
"""Folders of a run: its adapter, or of a `full` run its transformer."""


def export(
    source: str, out: Path, *, formats: Sequence[str] = (), like: str | None = None, dtype: str = "float32"
) -> list[Path]:
    """Writes `source` to the folder `out` in the formats asked for, and returns what was written.

    source: a finished run, a diffusers folder or hub id, or a single-file checkpoint, for which `like` is the pipeline
    that lends the other parts. Without `formats`: of a run its LoRA twice and a pipeline, of a checkpoint a pipeline,
    of a pipeline a checkpoint. The student of a TDM run is marked as distilled. Raises RlhfImgError for an unknown
    format, one that the source does not have, or an `out` that holds one already.
    """
    if dtype not in _DTYPES:
        raise RlhfImgError(f'there is no --dtype "{dtype}"; {did_you_mean(dtype, _DTYPES)}')
    path = Path(source)
    is_run = (path / "config.yaml").is_file()
    adapter = is_run and (path / LORA).is_dir()
    wanted = _formats(formats, adapter=adapter, is_run=is_run, is_file=path.suffix == ".safetensors")
    if there := [FORMATS[name] for name in wanted if (out / FORMATS[name]).exists()]:
        raise RlhfImgError(f"{out} holds an export already ({there[0]}): give another --out")
    # Merged in float32 and rounded once, whatever the dtype of the result.
    model = _opened(source, like, adapter)
    written: dict[str, Path] = {}
    if "lora" in wanted:
        written["lora"] = save_lora(model, POLICY, out / FORMATS["lora"])
    if "comfyui" in wanted:
        written["comfyui"] = save_comfyui_lora(model, POLICY, out / FORMATS["comfyui"])
    if adapter:
        merge(model, POLICY)
    if "checkpoint" in wanted:
        written["checkpoint"] = save_checkpoint(model.transformer, out / FORMATS["checkpoint"], _DTYPES[dtype])
    if "pipeline" in wanted:
        written["pipeline"] = save_pipeline(model, out / FORMATS["pipeline"], dtype=_DTYPES[dtype])
    return [written[name] for name in FORMATS if name in written]


def open_trained(
    name: str, *, device: str | None = None, dtype: torch.dtype | None = None, merged: bool = True
) -> Model:
    """A model by name, or a finished run: its model with what it has trained in it.

    merged: the run's LoRA is added to the weights; else it is the role "policy". A student of TDM is sampled as a
    distilled model. Raises RlhfImgError if the run is not finished.
    """
    check_trained(name)
    path = Path(name)
    if not (path / "config.yaml").is_file():
        return load(name, device=device, dtype=dtype)
    saved = load_yaml(path / "config.yaml")
    model = load(str(_settings(saved)["model"]), device=device, dtype=dtype)
    if (path / LORA).is_dir():
        load_lora(model, path / LORA, POLICY)
        if merged:
            merge(model, POLICY)
    else:
        load_weights(model, path / WEIGHTS)
    return dataclasses.replace(model, is_distilled=model.is_distilled or saved["algorithm"] == "tdm")


def check_trained(name: str) -> None:
    """Raises RlhfImgError, without loading anything, if `open_trained` has no model or no finished run of this name."""
    path = Path(name)
    if not (path / "config.yaml").is_file():
        local_folder(name.partition(".safetensors@")[2] or name)
        return
    _settings(load_yaml(path / "config.yaml"))
    if not ((path / LORA).is_dir() or (path / WEIGHTS / WEIGHTS_FILE).is_file()):
        raise RlhfImgError(f"{path} has nothing trained yet: give a run's folder, and finish the run with --resume")


def _settings(saved: Mapping[str, Any]) -> Mapping[str, Any]:
    """The settings in a run's config.yaml. Raises RlhfImgError if it is another file."""
    settings = saved.get("config")
    if not isinstance(settings, Mapping) or "model" not in settings or "algorithm" not in saved:
        raise RlhfImgError("this config.yaml is not that of a run: give the folder of a run of rlhf-img")
    return settings


def _formats(given: Sequence[str], *, adapter: bool, is_run: bool, is_file: bool) -> Sequence[str]:
    if unknown := [name for name in given if name not in FORMATS]:
        raise RlhfImgError(f'there is no --format "{unknown[0]}"; {did_you_mean(unknown[0], FORMATS)}')
    if not adapter and (without := [name for name in given if name in _ADAPTER]):
        raise RlhfImgError(f"--format {without[0]}: only a run with a LoRA has it; take pipeline or checkpoint")
    if given:
        return given
    if adapter:
        return (*_ADAPTER, "pipeline")
    return ("pipeline",) if is_run or is_file else ("checkpoint",)


def _opened(source: str, like: str | None, adapter: bool) -> Model:
    """In float32 on the CPU."""
    if Path(source).suffix == ".safetensors":
        if like is None:
            raise RlhfImgError("a single-file checkpoint holds the transformer alone: give --like with a pipeline "
                               "(folder or hub id) that lends the text encoder, the autoencoder and the settings")
        model = load(like, device="cpu", dtype=torch.float32)
        load_checkpoint(model.transformer, Path(source))
        return model
    if like is not None:
        raise RlhfImgError("--like is for a single-file checkpoint (.safetensors); leave it out")
    return open_trained(source, device="cpu", dtype=torch.float32, merged=not adapter)
