"""Memory and arithmetic of a forward and backward, counted on the code that runs them.

`Count` watches every operation and adds up the storages that are alive, so that its peak is what a device must hold
(what `torch.cuda.max_memory_allocated` shows, without the allocator's rounding and the kernels' own scratch). On fake
tensors, which have sizes and no values, the same operations are counted without being computed: that is how a step of
a 12.9B model is known on a laptop. Blocks are all alike, so two counts, of one block and of two, give every number.
"""

import json
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from diffusers import AutoencoderKLQwenImage, Krea2Transformer2DModel
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rlhf_img.model.blocks import use_lean_blocks
from rlhf_img.model.compute import checkpoint_blocks
from rlhf_img.model.files import weight_dtype
from rlhf_img.model.forward import rotary_tables, velocity
from rlhf_img.model.lora import role
from rlhf_img.model.policy import POLICY, LoRAConfig, make_policy
from rlhf_img.model.vae import single_frame


def _attention_flop(products: int, query: int) -> Callable[..., int]:
    """Of a fused attention whose query is argument `query`: two or five products of B H L L D multiply-adds."""

    def flop(*args: Any, **kwargs: Any) -> int:
        B, H, L, D = args[query].shape
        return 2 * products * B * H * L * L * D

    return flop


_FLOP: dict[Any, Callable[..., int]] = {
    **flop_registry,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flop(2, query=0),
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_flop(5, query=1),
}


class Count(TorchDispatchMode):
    """Bytes of the storages that are made inside it, and of those that it `held` before, while they live; and FLOP."""

    def __init__(self, held: Sequence[Tensor] = ()) -> None:
        super().__init__()
        self.live = self.peak = self.flop = 0
        self._known: set[int] = set()
        self._hold(held)
        self.start = self.live

    def _hold(self, tensors: Sequence[Tensor]) -> None:
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._known:
                self._known.add(key)
                self.live += size
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._hold([leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)])
        if func.overloadpacket in _FLOP:
            self.flop += _FLOP[func.overloadpacket](*args, **kwargs, out_val=result)
        return result


@dataclass(frozen=True, slots=True)
class Passes:
    """What one batch needs beside weights and gradients, in bytes, and its arithmetic, in FLOP."""

    infer_peak: float
    """Most bytes during a forward without gradients."""
    infer_flop: float
    train_peak: float
    """Most bytes during a forward with gradients and its way back."""
    kept: float
    """Bytes that this forward keeps for the way back."""
    train_flop: float


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """The shape of what goes through the transformer at once."""

    images: int
    grid: tuple[int, int]
    """Rows and columns of image tokens."""
    text: int
    """Text tokens, prompt and suffix."""


def count_passes(
    config: Mapping[str, Any], lora: LoRAConfig | None, dtype: torch.dtype, batch: Batch,
    checkpointed: int | Literal["all"] = 0,
) -> Passes:  # fmt: skip
    """Of a transformer with this diffusers config, whose first `checkpointed` blocks are; with `lora` None its blocks
    are trained.

    What goes in, the text and the latents, is not counted, and gradients are there already, from a batch before.
    """
    total = int(config["num_layers"])
    repeated = total if checkpointed == "all" else min(checkpointed, total)

    def counts(kind: _Kind) -> list[tuple[float, float, float]]:
        return [_count_blocks(as_text(config), lora, dtype, batch, n, kind) for n in (1, 2)]

    # Blocks are alike, so that one and two of them tell of any number; to a peak each adds what it keeps.
    infer = [two + (total - 2) * (two - one) for one, two in zip(*counts("infer"), strict=True)]
    shared, peaks, kept, flop = [], [], 0.0, 0.0
    shares: tuple[tuple[_Kind, int], ...] = (("repeated", repeated), ("plain", total - repeated))
    for kind, blocks in shares:
        if blocks:
            one, two = counts(kind)
            shared = [2 * a - b for a, b in zip(one, two, strict=True)]
            # Backwards the last blocks come first, which keep everything; the others wait, and then repeat a forward.
            peaks.append(two[0] + (blocks - 2) * (two[1] - one[1]) + kept)
            kept += blocks * (two[1] - one[1])
            flop += blocks * (two[2] - one[2])
    return Passes(infer[0], infer[2], max(peaks), kept + shared[1], flop + shared[2])


_Kind = Literal["infer", "plain", "repeated"]


@lru_cache(maxsize=256)
def _count_blocks(
    config: str, lora: LoRAConfig | None, dtype: torch.dtype, batch: Batch, blocks: int, kind: _Kind
) -> tuple[float, float, float]:
    """Peak, what is kept, and FLOP, of a transformer of so few blocks."""
    with torch.device("meta"):
        transformer = Krea2Transformer2DModel.from_config({**json.loads(config), "num_layers": blocks})
    dress(transformer, lora, dtype, blocks if kind == "repeated" else 0)
    rotary_tables.cache_clear()  # real tables must not meet fake tensors, here or later
    try:
        with FakeTensorMode():
            _fake(transformer)
            return measure(transformer, batch, train=kind != "infer", adapted=lora is not None)
    finally:
        rotary_tables.cache_clear()


def set_dtype(module: nn.Module, dtype: torch.dtype) -> None:
    """The dtypes that weights have once they are loaded."""
    for name, parameter in module.named_parameters():
        parameter.data = parameter.data.to(weight_dtype(module, name, dtype))


def dress(transformer: Krea2Transformer2DModel, lora: LoRAConfig | None, dtype: torch.dtype, checkpointed: int) -> None:
    """Gives a transformer, on any device, the dtypes, role and checkpointing that a run gives it."""
    set_dtype(transformer, dtype)
    transformer.eval().requires_grad_(False)
    use_lean_blocks(transformer)
    checkpoint_blocks(transformer, checkpointed)
    make_policy(transformer, lora, seed=0)


def inputs(transformer: Krea2Transformer2DModel, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
    """Zeros in place of latents, noise levels and fused text."""
    config, like = transformer.config, transformer.img_in.weight
    x = torch.zeros(batch.images, batch.grid[0] * batch.grid[1], config.in_channels, device=like.device)
    width = config.num_attention_heads * config.attention_head_dim
    text = torch.zeros(batch.images, batch.text, width, dtype=like.dtype, device=like.device)
    return x, torch.zeros(batch.images, device=like.device), text


def measure(
    transformer: Krea2Transformer2DModel, batch: Batch, *, train: bool, adapted: bool
) -> tuple[float, float, float]:
    """Peak, what is kept, and FLOP, of one batch through a transformer that is there, fake or real."""
    weights = list(transformer.parameters())
    for weight in weights:
        weight.grad = torch.zeros_like(weight) if weight.requires_grad else None
    given = inputs(transformer, batch)
    held = [*weights, *(w.grad for w in weights if w.grad is not None), *given]
    with role(transformer, POLICY if adapted else None), torch.set_grad_enabled(train):
        velocity(transformer, *given, batch.grid)  # makes the rotary tables, which stay
        with Count(held) as count:
            v = velocity(transformer, *given, batch.grid)
            kept = count.live - count.start
            if train:
                v.square().mean().backward()
    return count.peak - count.start, kept, count.flop


@lru_cache(maxsize=64)
def count_decode(vae_config: str, dtype: torch.dtype, images: int, size: int) -> tuple[int, int]:
    """Most bytes beside the weights, and FLOP, of decoding so many square images of `size` pixels at once."""
    with torch.device("meta"):
        vae = AutoencoderKLQwenImage.from_config(json.loads(vae_config)).eval().requires_grad_(False)
    set_dtype(vae, dtype)
    side = size // 2 ** len(vae.temperal_downsample)
    with FakeTensorMode(), torch.no_grad(), single_frame(vae):
        _fake(vae)
        z = torch.zeros(images, vae.config.z_dim, 1, side, side, dtype=dtype)
        with Count([*vae.parameters(), z]) as count:
            (vae.decoder(vae.post_quant_conv(z))[:, :, 0].float() / 2 + 0.5).clamp(0, 1)
    return count.peak - count.start, count.flop


def as_text(config: Mapping[str, Any]) -> str:
    """A diffusers config as JSON, which can be a key, without what diffusers adds for itself."""
    return json.dumps({key: value for key, value in config.items() if not key.startswith("_")}, sort_keys=True)


def _fake(module: nn.Module) -> None:
    """Puts fake tensors in place of all weights; within a FakeTensorMode."""
    for part in module.modules():
        for name, old in part._parameters.items():
            if old is not None:
                new = torch.empty(old.shape, dtype=old.dtype, device="cpu")
                part._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
