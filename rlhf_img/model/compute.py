"""How a transformer is computed with, which changes time and memory and no result beyond rounding: gradient
checkpointing, compiled blocks, the attention kernel, and what leaves the device while it is not needed."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.attention_dispatch import AttentionBackendName
from diffusers.utils import logging as diffusers_logging
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_img.errors import RlhfImgError, did_you_mean

_COMPILED_VARIANTS = 64
"""A compiled block is kept for each role, with and without gradients, for one image and several; torch's own limit, 8,
is below that for TDM's roles."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ComputeConfig:
    """Time against memory. Results are the same up to rounding."""

    checkpoint_blocks: int | Literal["all"] = 0
    """Blocks of the transformer of which training keeps only the input and repeats the forward: about a third more
    time for all of them, and memory for one block instead of every one. `rlhf-img doctor` tells what is needed."""
    compile: bool = False
    """torch.compile of the repeated block, with a sequence length that may change: the first steps take minutes, the
    others less time. Not worth it on a CPU."""
    attention: str = "auto"
    """An attention backend of diffusers ("native", "_native_cudnn", "flash", "_flash_3_hub", ...); "auto": torch's
    choice, and for short sequences on a CPU plain products."""
    offload: bool = False
    """Whether text encoder and autoencoder wait in the CPU's memory and visit the device only while they work."""
    text_store: str | None = None
    """A folder for prompts as the transformer reads them. A run puts all of its prompts there before it trains, so that
    the text encoder is not needed again, and later runs of the same model find them: about 0.8 MB for a prompt of 64
    tokens of Krea 2."""

    def __post_init__(self) -> None:
        """Raises RlhfImgError for values out of range."""
        if self.checkpoint_blocks != "all" and self.checkpoint_blocks < 0:
            raise RlhfImgError(f"compute.checkpoint_blocks is a number of blocks or all; got {self.checkpoint_blocks}")
        known = ["auto", *(backend.value for backend in AttentionBackendName)]
        if self.attention not in known:
            raise RlhfImgError(
                f'compute.attention: there is no backend "{self.attention}"; {did_you_mean(self.attention, known)}'
            )


def apply_compute(transformer: Krea2Transformer2DModel, config: ComputeConfig) -> None:
    """Sets up gradient checkpointing, attention and compilation of `transformer`, in place, before roles are added.

    Raises RlhfImgError if the attention backend is not installed.
    """
    checkpoint_blocks(transformer, config.checkpoint_blocks)
    if config.attention != "auto":
        use_attention(transformer, config.attention)
    if config.compile:
        compile_blocks(transformer)


def checkpoint_blocks(transformer: Krea2Transformer2DModel, count: int | Literal["all"]) -> None:
    """Of the first `count` blocks training keeps only the input. The first: backwards they come last, when the
    activations of the others are gone. Raises RlhfImgError for more blocks than there are."""
    blocks = transformer.transformer_blocks
    count = len(blocks) if count == "all" else count
    if count > len(blocks):
        raise RlhfImgError(f"compute.checkpoint_blocks: the transformer has {len(blocks)} blocks; got {count}")
    for i, block in enumerate(blocks):
        block.is_checkpointed = i < count
    if count:
        transformer.enable_gradient_checkpointing(_run_block)
    else:
        transformer.disable_gradient_checkpointing()


def _run_block(block: nn.Module, *args: Any) -> Tensor:
    run: Callable[..., Tensor] = partial(checkpoint, block, use_reentrant=False) if block.is_checkpointed else block
    return run(*args)


def use_attention(transformer: Krea2Transformer2DModel, backend: str) -> None:
    """Attend with this backend of diffusers. Raises RlhfImgError if what it needs is not there."""
    shown = diffusers_logging.get_verbosity()
    diffusers_logging.set_verbosity_error()  # says of every backend that the interface may change
    try:
        transformer.set_attention_backend(backend)
    except (ImportError, RuntimeError, ValueError, OSError) as error:
        raise RlhfImgError(
            f'compute.attention: "{backend}" cannot be used here: {error}; "auto" needs nothing'
        ) from error
    finally:
        diffusers_logging.set_verbosity(shown)


def compile_blocks(transformer: Krea2Transformer2DModel, backend: str | Callable[..., Any] = "inductor") -> None:
    """Compile the repeated block. All blocks share one graph, which the second length that it sees makes one for all
    lengths; further ones come with roles, gradients, and batches of one image."""
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, _COMPILED_VARIANTS)
    transformer.compile_repeated_blocks(fullgraph=True, backend=backend)
