"""Loading the components of a stock Krea 2 pipeline, from the package, a folder or a model hub."""

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from importlib import resources
from pathlib import Path

import torch
from diffusers import (
    AutoencoderKLQwenImage,
    FlowMatchEulerDiscreteScheduler,
    Krea2Pipeline,
    Krea2Transformer2DModel,
)
from diffusers.utils import logging as diffusers_logging
from safetensors import SafetensorError
from torch import nn
from transformers import PreTrainedTokenizerBase, Qwen3VLModel
from transformers.utils import logging as transformers_logging

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.files import check_folder
from rlhf_img.model.official import load_checkpoint

PLAYGROUND = "playground"
SETTINGS_FILE = "rlhf_img.json"
"""Optional, beside model_index.json: {"default_size": side in pixels}. The stock pipeline does not read it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """The stock modules of one Krea 2, frozen and in eval mode; LoRA roles are added to `transformer`."""

    transformer: Krea2Transformer2DModel
    vae: AutoencoderKLQwenImage
    text_encoder: Qwen3VLModel
    tokenizer: PreTrainedTokenizerBase
    scheduler: FlowMatchEulerDiscreteScheduler
    text_layers: tuple[int, ...]
    """Which hidden states of the text encoder are tapped; 0 is the embedding."""
    patch_size: int
    """Side, in latent pixels, of the patch that is one token."""
    is_distilled: bool
    """A few-step checkpoint (Turbo): its schedule does not depend on the resolution."""
    default_size: int
    """Height and width, in pixels, when nothing else is said."""
    source: str
    """What `load` was given."""
    offload: bool = False
    """Whether text encoder and autoencoder wait on the CPU, see `present`."""

    @contextmanager
    def present(self, module: nn.Module) -> Iterator[None]:
        """Inside, `module` (the text encoder or the autoencoder) is where the transformer is."""
        if not self.offload:
            yield
            return
        module.to(self.device)
        try:
            yield
        finally:
            module.to("cpu")

    @property
    def device(self) -> torch.device:
        return self.transformer.img_in.weight.device

    @property
    def token_pixels(self) -> int:
        """Side, in image pixels, of one token: the autoencoder's factor times the patch."""
        return int(2 ** len(self.vae.temperal_downsample)) * self.patch_size

    def grid(self, height: int, width: int) -> tuple[int, int]:
        """Rows and columns of tokens of an image of this many pixels; RlhfImgError where they are not whole."""
        side = self.token_pixels
        if height < side or width < side or height % side or width % side:
            raise RlhfImgError(f"height and width must be positive multiples of {side} pixels; got {height} x {width}")
        return height // side, width // side

    def pipeline(self) -> Krea2Pipeline:
        """A stock pipeline over these same modules: it sees the same weights and the same active LoRA role."""
        return Krea2Pipeline(
            scheduler=FlowMatchEulerDiscreteScheduler.from_config(self.scheduler.config),
            vae=self.vae,
            text_encoder=self.text_encoder,
            tokenizer=self.tokenizer,
            transformer=self.transformer,
            text_encoder_select_layers=self.text_layers,
            is_distilled=self.is_distilled,
            patch_size=self.patch_size,
        )


def from_pipeline(
    pipeline: Krea2Pipeline, *, source: str = "memory", default_size: int = 1024, offload: bool = False
) -> Model:
    """A Model over the modules of a stock pipeline, which are frozen and set to eval mode in place."""
    for module in (pipeline.transformer, pipeline.vae, pipeline.text_encoder):
        module.eval().requires_grad_(False)
    use_lean_blocks(pipeline.transformer)
    return Model(
        transformer=pipeline.transformer,
        vae=pipeline.vae,
        text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
        scheduler=pipeline.scheduler,
        text_layers=tuple(pipeline.text_encoder_select_layers),
        patch_size=pipeline.patch_size,
        is_distilled=pipeline.config.is_distilled,
        default_size=default_size,
        source=source,
        offload=offload,
    )


def default_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def fast_dtype() -> torch.dtype:
    """bfloat16 where the hardware multiplies it (CUDA, and CPUs with AVX-512 BF16 or AMX), else float32."""
    if torch.cuda.is_available():
        return torch.bfloat16
    able = torch.cpu.get_capabilities()
    return torch.bfloat16 if able.get("avx512_bf16") or able.get("amx_bf16") else torch.float32


def load(
    name: str | Path, *, device: torch.device | str | None = None, dtype: torch.dtype | None = None,
    offload: bool = False,
) -> Model:  # fmt: skip
    """The model called `name`: "playground", a local diffusers folder, a hub id such as "krea/Krea-2-Raw", or
    "FILE.safetensors@MODEL": a transformer in the layout of krea-ai/krea-2 with the other parts of MODEL, one of these.

    `device` defaults to CUDA where there is one, else the CPU; `dtype` (of the frozen base) to bfloat16 on CUDA and
    float32 elsewhere. Each weight goes from its file to the device in its dtype, without a second copy in memory; with
    `offload` text encoder and autoencoder wait on the CPU.
    Raises RlhfImgError if there is no such model, it is not a Krea 2, or a file of it is missing or damaged.
    """
    device = torch.device(device) if device else default_device()
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    file, at, parts = str(name).partition(".safetensors@")
    folder = local_folder(parts if at else name)
    if folder is not None:
        check_folder(folder)
    source = str(folder or parts or name)
    given = {}
    try:
        here = torch.cuda.device(device) if device.type == "cuda" else nullcontext()
        with without_progress_bars(), here:
            if at:
                given["transformer"] = _from_checkpoint(Path(f"{file}.safetensors"), source, device, dtype)
            if offload:
                waiting = Krea2Pipeline.from_pretrained(
                    source, dtype=dtype, device_map="cpu", transformer=None, tokenizer=None, scheduler=None
                )
                given |= {"text_encoder": waiting.text_encoder, "vae": waiting.vae}
            pipeline = Krea2Pipeline.from_pretrained(source, dtype=dtype, device_map=device.type, **given)
    except (OSError, ValueError, SafetensorError) as error:
        advice = (
            "check that the folder is complete, or save it again"
            if folder
            else "check the id, your connection and, for a gated model, that you accepted its licence and are logged in"
        )
        raise RlhfImgError(f'could not load the model "{name}": {_first_line(error)}; {advice}') from error
    return from_pipeline(pipeline, source=str(name), default_size=default_size(folder), offload=offload)


def _from_checkpoint(
    file: Path, parts: str, device: torch.device, dtype: torch.dtype
) -> Krea2Transformer2DModel:
    config = Krea2Transformer2DModel.load_config(parts, subfolder="transformer")
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel.from_config(config)
    load_checkpoint(transformer, file, device, dtype)
    return transformer


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """The libraries' bars for files that load in a second; downloads from a hub keep theirs."""
    shown = [room for room in (diffusers_logging, transformers_logging) if room.is_progress_bar_enabled()]
    for room in shown:
        room.disable_progress_bar()
    try:
        yield
    finally:
        for room in shown:
            room.enable_progress_bar()


def local_folder(name: str | Path) -> Path | None:
    """The checked diffusers folder of `name`, or None if it is a hub id."""
    if name == PLAYGROUND:
        folder = Path(str(resources.files("rlhf_img"))) / "playground" / "weights"
        if not (folder / "model_index.json").is_file():
            raise RlhfImgError(
                "the embedded model's weights are not in this installation; make them: rlhf-img playground pretrain"
            )
        return folder
    folder = Path(name).expanduser()
    if not folder.is_dir():
        if isinstance(name, str) and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", name):
            return None
        raise RlhfImgError(
            f'there is no model "{name}"; give "{PLAYGROUND}", a folder that holds a diffusers Krea 2 '
            'pipeline, or a hub id such as "krea/Krea-2-Raw"'
        )
    index = folder / "model_index.json"
    if not index.is_file():
        raise RlhfImgError(f'the folder "{name}" has no model_index.json; give a folder saved by diffusers')
    kind = _read_json(index).get("_class_name")
    if kind != "Krea2Pipeline":
        raise RlhfImgError(f'the folder "{name}" holds a {kind}; only Krea2Pipeline models can be aligned')
    return folder


def default_size(folder: Path | None) -> int:
    if folder is None or not (folder / SETTINGS_FILE).is_file():
        return 64 if folder is not None and folder.parent.name == PLAYGROUND else 1024
    size = _read_json(folder / SETTINGS_FILE).get("default_size")
    if not isinstance(size, int) or size <= 0:
        raise RlhfImgError(f"{folder / SETTINGS_FILE}: default_size must be a positive whole number; got {size!r}")
    return size


def _read_json(path: Path) -> dict[str, object]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RlhfImgError(f"{path} is not JSON: {error}; save the model again") from error
    if not isinstance(content, dict):
        raise RlhfImgError(f"{path} must hold a JSON object; got a {type(content).__name__}")
    return content


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
