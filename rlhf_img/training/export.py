"""A finished run as what stock diffusers reads: its LoRA, and its model with the LoRA merged."""

from pathlib import Path

import torch

from rlhf_img.config import load_yaml
from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.model.export import load_lora, save_lora, save_merged
from rlhf_img.model.loading import load
from rlhf_img.model.policy import POLICY

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def export_run(run: Path, out: Path, *, merged: bool, dtype: str) -> list[Path]:
    """Writes `out`/lora, and with `merged` `out`/pipeline; returns what was written.

    The student of a TDM run is marked as distilled. Raises RlhfImgError if the run has no LoRA yet or `out` holds an
    export.
    """
    if dtype not in _DTYPES:
        raise RlhfImgError(f'there is no --dtype "{dtype}"; {did_you_mean(dtype, _DTYPES)}')
    if not (run / "lora").is_dir():
        raise RlhfImgError(f"{run} has no LoRA to export: give a run's folder, and finish the run with --resume")
    if (out / "lora").exists() or (out / "pipeline").exists():
        raise RlhfImgError(f"{out} holds an export already: give another --out")
    saved = load_yaml(run / "config.yaml")
    # Merged in float32 and rounded once, whatever the dtype of the result.
    model = load(str(saved["config"]["model"]), device="cpu", dtype=torch.float32)
    load_lora(model, run / "lora", POLICY)
    written = [save_lora(model, POLICY, out / "lora")]
    if merged:
        distilled = model.is_distilled or saved["algorithm"] == "tdm"
        written.append(save_merged(model, POLICY, out / "pipeline", is_distilled=distilled, dtype=_DTYPES[dtype]))
    return written
