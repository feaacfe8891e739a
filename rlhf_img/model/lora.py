"""Roles (policy, student, critic, ...) as LoRA adapters over one frozen base; the reference is the base itself."""

import copy
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from jaxtyping import Float
from peft import LoraConfig
from peft.tuners.lora import Linear, LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_img.errors import RlhfImgError, did_you_mean

TARGETS = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_gate", "attn.to_out.0", "ff.gate", "ff.up", "ff.down")
"""Every linear layer of a transformer block."""
TIME_TARGETS = ("time_embed.linear_2", "time_mod_proj")
"""The layers that turn the noise level into the modulation that all blocks share: few weights, no work per token."""


class FusedLinear(Linear):
    """peft's layer as one autograd node, with fewer passes over the tokens: the scale goes into the small matrix, sums
    into products, forward and backward, and the input is not cast to float32 where autocast would cast it back."""

    drawing = False
    """Whether images are drawn: see `drawing`."""

    def forward(self, x: Float[Tensor, "... I"], *args: Any, **kwargs: Any) -> Float[Tensor, "... O"]:
        names, base = self.active_adapters, self.base_layer
        plain = not (args or kwargs or self.disable_adapters or self.merged) and len(names) == 1
        if not plain or type(base) is not nn.Linear or base.weight.requires_grad or not self._fits(names[0], x):
            output: Tensor = super().forward(x, *args, **kwargs)
            return output
        down, up = self.lora_A[names[0]].weight, self.lora_B[names[0]].weight * self.scaling[names[0]]
        dtype = base.weight.dtype
        rows, (wide, narrow) = x.shape[:-1].numel(), base.weight.shape
        if self.drawing and dtype is torch.float32 and rows * (wide + narrow) > wide * narrow:
            # Less work than the adapter's own products; bfloat16 would round a small update away.
            return nn.functional.linear(x, torch.addmm(base.weight, up, down), base.bias)
        out: Tensor = Adapted.apply(x.flatten(0, -2).to(dtype), base.weight, base.bias, down.to(dtype), up.to(dtype))
        return out.view(*x.shape[:-1], -1)

    def _fits(self, name: str, x: Tensor) -> bool:
        """Whether the adapter is here and no more than two matrices, in a dtype that can be multiplied with x."""
        return (
            name in self.lora_A and name not in self.lora_variant and not self.lora_bias[name]
            and isinstance(self.lora_dropout[name], nn.Identity)
            and (torch.is_autocast_enabled(x.device.type) or x.dtype == self.lora_A[name].weight.dtype)
        )  # fmt: skip


@contextmanager
def drawing() -> Iterator[None]:
    """Inside, also as a decorator, there are no gradients, and a float32 LoRA is added to the weights where this is
    less work. Velocities that are compared with those of training are computed outside: they differ by rounding."""
    before, FusedLinear.drawing = FusedLinear.drawing, True
    try:
        with torch.no_grad():
            yield
    finally:
        FusedLinear.drawing = before


class Adapted(torch.autograd.Function):
    """x W^T + bias + x A^T B^T of a frozen W, in the dtype of all of them."""

    @staticmethod
    def forward(
        ctx: Any, x_BI: Float[Tensor, "B I"], weight_OI: Float[Tensor, "O I"], bias_O: Float[Tensor, " O"] | None,
        down_RI: Float[Tensor, "R I"], up_OR: Float[Tensor, "O R"],
    ) -> Float[Tensor, "B O"]:  # fmt: skip
        """`up` has the adapter's scale in it."""
        low_BR = x_BI @ down_RI.T
        ctx.save_for_backward(x_BI, weight_OI, low_BR, down_RI, up_OR)
        return nn.functional.linear(x_BI, weight_OI, bias_O).addmm_(low_BR, up_OR.T)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BO: Tensor) -> tuple[Tensor | None, None, None, Tensor, Tensor]:
        """Gradients of x, A and B."""
        x_BI, weight_OI, low_BR, down_RI, up_OR = ctx.saved_tensors
        d_BR = d_BO @ up_OR
        of_x = (d_BO @ weight_OI).addmm_(d_BR, down_RI) if ctx.needs_input_grad[0] else None
        return of_x, None, None, d_BR.T @ x_BI, d_BO.T @ low_BR


def add_role(
    transformer: Krea2Transformer2DModel,
    name: str,
    *,
    rank: int = 32,
    alpha: float = 64.0,
    targets: Sequence[str] = (*TARGETS, *TIME_TARGETS),
    seed: int = 0,
) -> None:
    """Add the adapter `name` to the layers `targets`, of every block or shared, without making it the active one.

    It changes nothing at first (B = 0); its scale is alpha / rank. Its parameters are float32 whatever the base is,
    depend on `seed` alone, and are trainable. The text fusion cannot be a target: fused prompts serve every role.
    Raises RlhfImgError for a name in use or not an identifier, an unknown target, or a rank below 1.
    """
    if not name.isidentifier() or name in roles(transformer):
        raise RlhfImgError(f'a role needs a new name of letters, digits and underscores; got "{name}"')
    if rank < 1 or not targets:
        raise RlhfImgError(f"a role needs a rank of 1 or more and at least one target; got {rank} and {list(targets)}")
    known = (*TARGETS, *TIME_TARGETS)
    if unknown := [target for target in targets if target not in known]:
        raise RlhfImgError(f'no layer that an adapter can change is called "{unknown[0]}"; '
                           f"{did_you_mean(unknown[0], known)}")
    blocks = range(len(transformer.transformer_blocks))
    modules = [f"transformer_blocks.{i}.{t}" for i in blocks for t in targets if t in TARGETS]
    modules += [target for target in targets if target in TIME_TARGETS]
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=modules)
    with keep_state(transformer), torch.random.fork_rng(devices=[]):  # peft draws weights of its own: not used
        transformer.add_adapter(config, adapter_name=name)
    adopt(transformer, name)
    generator = torch.Generator().manual_seed(seed)
    for key, parameter in role_parameters(transformer, name).items():
        value = torch.zeros(parameter.shape)
        if key.endswith("lora_A"):
            nn.init.kaiming_uniform_(value, a=5**0.5, generator=generator)
        parameter.data.copy_(value)


def copy_role(transformer: Krea2Transformer2DModel, source: str, name: str) -> None:
    """Add the adapter `name` with the size, layers and values of `source`, without making it the active one.

    The two act alike to the bit until one is trained. Raises RlhfImgError for an unknown source or a name in use.
    """
    values = role_parameters(transformer, source)
    if not name.isidentifier() or name in roles(transformer):
        raise RlhfImgError(f'a role needs a new name of letters, digits and underscores; got "{name}"')
    config = copy.deepcopy(transformer.peft_config[source])
    with keep_state(transformer), torch.random.fork_rng(devices=[]):
        transformer.add_adapter(config, adapter_name=name)
    adopt(transformer, name)
    for key, parameter in role_parameters(transformer, name).items():
        parameter.data.copy_(values[key])


def adopt(transformer: Krea2Transformer2DModel, name: str) -> None:
    """Make the parameters of an adapter that is there already float32 and trainable, and its layers fast."""
    for parameter in role_parameters(transformer, name).values():
        parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
    for layer in _layers(transformer).values():
        if type(layer) is Linear:
            layer.__class__ = FusedLinear


def roles(transformer: Krea2Transformer2DModel) -> list[str]:
    """Names of all adapters, in the order they were added."""
    return _names(_layers(transformer).values())


def _names(layers: Collection[LoraLayer]) -> list[str]:
    return list(dict.fromkeys(name for layer in layers for name in layer.lora_A))


def role_parameters(transformer: Krea2Transformer2DModel, name: str) -> dict[str, nn.Parameter]:
    """The parameters of one role by layer; the keys of two roles with the same targets are equal."""
    layers = _layers(transformer)
    _require(layers.values(), name)
    return {
        f"{path}.{part}": adapters[name].weight
        for path, layer in layers.items()
        for part, adapters in (("lora_A", layer.lora_A), ("lora_B", layer.lora_B))
        if name in adapters
    }


def active_role(transformer: Krea2Transformer2DModel) -> str | None:
    """The role that a forward uses now; None is the reference."""
    return _active(_layers(transformer).values())


def _active(layers: Collection[LoraLayer]) -> str | None:
    layer = next(iter(layers), None)
    if layer is None or layer.disable_adapters or not layer.active_adapters:
        return None
    if len(layer.active_adapters) > 1:
        raise RlhfImgError(f"several LoRAs are active at once: {layer.active_adapters}; activate one")
    return str(layer.active_adapters[0])


@contextmanager
def role(transformer: Krea2Transformer2DModel, name: str | None) -> Iterator[None]:
    """Inside, the transformer acts as the role `name`, or with None as the reference; then as it did before.

    What requires a gradient is not touched: only the active role takes part in a forward, and so only it gets
    gradients, also if `backward` comes after the block. With gradient checkpointing, which repeats the forward,
    `backward` must be inside. Raises RlhfImgError for an unknown role.
    """
    layers = _layers(transformer).values()
    if (before := _active(layers)) == name:
        yield
        return
    _activate(layers, name)
    try:
        yield
    finally:
        _activate(layers, before)


@contextmanager
def scaled(transformer: Krea2Transformer2DModel, name: str, factor: float) -> Iterator[None]:
    """Inside, the role acts `factor` times as strongly. Raises RlhfImgError for an unknown role."""
    layers = _layers(transformer).values()
    _require(layers, name)
    adapted = [layer for layer in layers if name in layer.lora_A]
    for layer in adapted:
        layer.set_scale(name, factor)
    try:
        yield
    finally:
        for layer in adapted:
            layer.set_scale(name, 1.0)


def fuses_text(transformer: Krea2Transformer2DModel, name: str) -> bool:
    """Whether the role changes how text is fused: prompts fused for another role are then wrong for it."""
    return any(key.startswith(("text_fusion.", "txt_in.")) for key in role_parameters(transformer, name))


def _layers(transformer: Krea2Transformer2DModel) -> dict[str, LoraLayer]:
    return {path: module for path, module in transformer.named_modules() if isinstance(module, LoraLayer)}


def _require(layers: Collection[LoraLayer], name: str) -> None:
    if name not in (known := _names(layers)):
        raise RlhfImgError(f'there is no role "{name}"; {did_you_mean(name, known)}')


def _activate(layers: Collection[LoraLayer], name: str | None) -> None:
    if name is not None:
        _require(layers, name)
    # peft freezes what it deactivates; a graph built before would then drop its gradients without a word.
    trainable = {p: p.requires_grad for layer in layers for p in layer.parameters()}
    for layer in layers:
        if name is not None:
            layer.set_adapter(name)
        layer.enable_adapters(name is not None)
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)


@contextmanager
def keep_state(transformer: Krea2Transformer2DModel) -> Iterator[None]:
    """Adding an adapter makes it active and others frozen; undo both. That there are several is meant: no warning."""
    before = active_role(transformer)
    trainable = {p: p.requires_grad for p in transformer.parameters()}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Already found a `peft_config` attribute")
        yield
    _activate(_layers(transformer).values(), before)
    for parameter, flag in trainable.items():
        parameter.requires_grad_(flag)
