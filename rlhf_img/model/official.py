"""The layout of krea-ai/krea-2's single-file checkpoints, which ComfyUI reads too: other names, the same numbers.

Layers are called as in that repository's mmdit.py. Norms hold `scale` where diffusers says `weight` (both
zero-centred), and the six modulation vectors of a block are one flat vector.
"""

import os
import re
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import set_module_tensor_to_device
from diffusers import Krea2Transformer2DModel
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_img.errors import RlhfImgError, did_you_mean
from rlhf_img.model.files import check_file, weight_dtype

_STACKS = {
    "transformer_blocks": "blocks",
    "text_fusion.layerwise_blocks": "txtfusion.layerwise_blocks",
    "text_fusion.refiner_blocks": "txtfusion.refiner_blocks",
}
_IN_A_BLOCK = {
    "attn.to_q": "attn.wq", "attn.to_k": "attn.wk", "attn.to_v": "attn.wv", "attn.to_gate": "attn.gate",
    "attn.to_out.0": "attn.wo", "attn.norm_q": "attn.qknorm.qnorm", "attn.norm_k": "attn.qknorm.knorm",
    "ff.gate": "mlp.gate", "ff.up": "mlp.up", "ff.down": "mlp.down", "norm1": "prenorm", "norm2": "postnorm",
}  # fmt: skip
_ALONE = {
    "img_in": "first", "time_embed.linear_1": "tmlp.0", "time_embed.linear_2": "tmlp.2", "time_mod_proj": "tproj.1",
    "txt_in.norm": "txtmlp.0", "txt_in.linear_1": "txtmlp.1", "txt_in.linear_2": "txtmlp.3",
    "text_fusion.projector": "txtfusion.projector", "final_layer.linear": "last.linear",
    "final_layer.norm": "last.norm",
}  # fmt: skip
_PREFIXES = ("model.diffusion_model.", "diffusion_model.")
"""What tools put before the names of a whole checkpoint's transformer."""


def official_module(module: str) -> str:
    """The official name of a layer of `Krea2Transformer2DModel`. Raises ValueError for a layer that Krea 2 lacks."""
    if module in _ALONE:
        return _ALONE[module]
    match = re.fullmatch(r"(.+_blocks)\.(\d+)\.(.+)", module)
    if match is None or match[1] not in _STACKS or match[3] not in _IN_A_BLOCK:
        raise ValueError(f"{module} is no layer of a Krea 2 transformer")
    return f"{_STACKS[match[1]]}.{match[2]}.{_IN_A_BLOCK[match[3]]}"


def official_name(name: str) -> str:
    """The official name of a weight of `Krea2Transformer2DModel`. Raises ValueError for a weight that Krea 2 lacks."""
    module, _, leaf = name.rpartition(".")
    if leaf == "scale_shift_table":
        if module == "final_layer":
            return "last.modulation.lin"
        stack, _, index = module.rpartition(".")
        return f"{_STACKS[stack]}.{index}.mod.lin"
    is_norm = re.search(r"(^|\.)norm(1|2|_q|_k)?$", module) is not None
    return f"{official_module(module)}.{'scale' if is_norm else leaf}"


def to_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state of a `Krea2Transformer2DModel` in official names and shapes; also on the meta device."""
    return {official_name(name): value.flatten() if _is_block_table(name) else value for name, value in state.items()}


def from_official(state: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `to_official`. `like`: the state of a transformer of the same architecture, for its shapes.

    Raises RlhfImgError for missing or unknown weights, and for another size.
    """
    found = {}
    for key, value in state.items():
        prefix = next((p for p in _PREFIXES if key.startswith(p)), "")
        found[key.removeprefix(prefix)] = value
    wanted = {official_name(name): name for name in like}
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        hint = did_you_mean(unknown[0], wanted) if unknown else f"{missing[0]} is missing"
        raise RlhfImgError(f"this is no checkpoint of this Krea 2: {len(missing)} weights are missing, {len(unknown)} "
                           f"are unknown: {hint}. Give one in the layout of krea-ai/krea-2, and --like a pipeline of "
                           "the same architecture")
    converted = {}
    for key, name in wanted.items():
        if found[key].numel() != like[name].numel():
            raise RlhfImgError(f"{key} has the shape {tuple(found[key].shape)}, and this architecture's {name} "
                               f"{tuple(like[name].shape)}: give --like a pipeline of the checkpoint's architecture")
        converted[name] = found[key].reshape(like[name].shape)
    return converted


def save_checkpoint(transformer: Krea2Transformer2DModel, file: Path, dtype: torch.dtype) -> Path:
    """Write one official checkpoint, whole or not at all. Raises RlhfImgError if it cannot be written."""
    state = {name: value.detach().to(dtype).cpu().contiguous() for name, value in
             to_official(transformer.state_dict()).items()}
    return write_safetensors(state, file)


def load_checkpoint(
    transformer: Krea2Transformer2DModel, file: Path, device: torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> None:  # fmt: skip
    """Read an official checkpoint into `transformer`, weight by weight, so that memory never holds it twice.

    With `device` and `dtype` the transformer may be on the meta device; norms stay float32, as diffusers loads them.
    Raises RlhfImgError if the file is missing, damaged or does not fit.
    """
    check_file(file)
    try:
        state = load_file(file)  # mapped, not read
    except (OSError, SafetensorError) as error:
        raise RlhfImgError(f"{file} is no readable safetensors file: {error}") from error
    like = transformer.state_dict()
    for name, value in from_official(state, like).items():
        wanted = dtype and weight_dtype(transformer, name, dtype)
        set_module_tensor_to_device(transformer, name, device or like[name].device, value, wanted or like[name].dtype)


def write_safetensors(state: dict[str, Tensor], file: Path, metadata: dict[str, str] | None = None) -> Path:
    """One file, whole or not at all. Raises RlhfImgError if it cannot be written."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=file.parent, prefix=".weights-") as scratch:
            hidden = Path(scratch) / file.name
            save_file(state, hidden, metadata={"format": "pt", **(metadata or {})})
            os.replace(hidden, file)
    except (OSError, SafetensorError) as error:
        raise RlhfImgError(f'could not write "{file}": {error}; give a writable folder') from error
    return file


def _is_block_table(name: str) -> bool:
    return name.startswith("transformer_blocks.") and name.endswith(".scale_shift_table")
