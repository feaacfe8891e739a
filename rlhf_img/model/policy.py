"""What is being trained: a LoRA role over the frozen base, or the base's blocks themselves, with an average and a
reference to measure against."""

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from diffusers import Krea2Transformer2DModel
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from rlhf_img.model.lora import TARGETS, TIME_TARGETS, add_role, copy_role, role, role_parameters

POLICY = "policy"


@dataclass(frozen=True, kw_only=True, slots=True)
class LoRAConfig:
    """Size of the policy's adapter."""

    rank: int = 32
    """Rank of the update of each layer. Flow-GRPO and miles train Krea-2-Raw with 32."""
    alpha: float = 64.0
    """The update is scaled by alpha / rank."""
    targets: tuple[str, ...] = (*TARGETS, *TIME_TARGETS)
    """Layers that get an update: of every transformer block, and of the time modulation that the blocks share."""


@dataclass(frozen=True, slots=True)
class Policy:
    """A trainable view of a transformer. The text fusion is never trained, so that fused prompts stay valid."""

    transformer: Krea2Transformer2DModel
    parameters: dict[str, nn.Parameter]
    average: dict[str, Tensor]
    """Exponential moving average of `parameters`: what is evaluated and exported."""
    frozen: Krea2Transformer2DModel | None
    """The reference of full fine-tuning: another copy of the base. With LoRA the base itself is the reference."""
    name: str = POLICY
    """The adapter that it is."""
    start: str | None = None
    """The adapter, on the reference, that it began as; None: the base."""

    @contextmanager
    def acting(self) -> Iterator[Krea2Transformer2DModel]:
        """The transformer as the policy."""
        with role(self.transformer, None if self.frozen else self.name):
            yield self.transformer

    @contextmanager
    def reference(self) -> Iterator[Krea2Transformer2DModel]:
        """The transformer as it was before training, without gradients."""
        transformer = self.frozen or self.transformer
        with torch.no_grad(), role(transformer, self.start):
            yield transformer

    @contextmanager
    def averaged(self) -> Iterator[Krea2Transformer2DModel]:
        """The transformer as the policy with its averaged weights; the trained ones come back afterwards."""
        kept = {name: p.detach().clone() for name, p in self.parameters.items()}
        self._write(self.average)
        try:
            with self.acting() as transformer:
                yield transformer
        finally:
            self._write(kept)

    @torch.no_grad()
    def update_average(self, decay: float) -> None:
        """average <- decay average + (1 - decay) parameters."""
        torch._foreach_lerp_(list(self.average.values()), [p.detach() for p in self.parameters.values()], 1 - decay)

    def clip_gradients(self, max_norm: float) -> Tensor:
        """Scales the gradients down if their norm, of all parameters together, exceeds `max_norm`; the norm before."""
        norm = nn.utils.clip_grad_norm_(list(self.parameters.values()), max_norm)
        return norm.full_tensor() if isinstance(norm, DTensor) else norm

    @torch.no_grad()
    def _write(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.parameters.items():
            parameter.copy_(values[name])


def make_policy(transformer: Krea2Transformer2DModel, lora: LoRAConfig | None, seed: int) -> Policy:
    """A LoRA policy that equals the base at first, or with `lora` None all weights of the base's blocks."""
    frozen = None
    if lora is None:
        frozen = copy.deepcopy(transformer).requires_grad_(False)
        parameters = dict(transformer.transformer_blocks.named_parameters())
        for parameter in parameters.values():
            parameter.requires_grad_(True)
    else:
        add_role(transformer, POLICY, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
        parameters = role_parameters(transformer, POLICY)
    return Policy(transformer, parameters, _copied(parameters), frozen)


def make_role(
    transformer: Krea2Transformer2DModel, name: str, lora: LoRAConfig, seed: int, *, start: str | None
) -> Policy:
    """A LoRA policy called `name` that equals the adapter `start`, or with None the base, at first and to the bit.

    With a `start` it has that adapter's size and layers, whatever `lora` says.
    """
    if start is None:
        add_role(transformer, name, rank=lora.rank, alpha=lora.alpha, targets=lora.targets, seed=seed)
    else:
        copy_role(transformer, start, name)
    parameters = role_parameters(transformer, name)
    return Policy(transformer, parameters, _copied(parameters), None, name, start)


def make_full(transformer: Krea2Transformer2DModel, name: str, *, start: str | None) -> Policy:
    """A policy that is all weights of the blocks of a copy of `transformer`, which begins as its adapter `start`.

    The adapter is added to the copy's weights and so rounded to their dtype; `transformer` itself is the reference.
    """
    copied = copy.deepcopy(transformer)
    if start is not None:
        copied.fuse_lora(adapter_names=[start])
    copied.unload_lora()
    parameters = dict(copied.requires_grad_(False).transformer_blocks.named_parameters())
    for parameter in parameters.values():
        parameter.requires_grad_(True)
    return Policy(copied, parameters, _copied(parameters), transformer, name, start)


def _copied(parameters: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in parameters.items()}
