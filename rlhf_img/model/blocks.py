"""A transformer block on the stock module's own weights, with less work: no mask, key/value heads not repeated, and on
a CPU, where a small model's time is its passes over the tokens and not its products, fewer of those.

What a CPU does otherwise than the stock block: RMSNorm is one autograd node with the scale and shift (or the rotation)
that follow it, sums with products are one pass, short sequences attend by plain products, and the softmax is float32,
which is a fifth of bfloat16's time there. Results are the stock block's up to rounding.
"""

from typing import Any

import torch
from diffusers import Krea2Transformer2DModel
from diffusers.models.attention_dispatch import dispatch_attention_fn
from diffusers.models.embeddings import apply_rotary_emb
from diffusers.models.transformers.transformer_krea2 import (
    Krea2Attention,
    Krea2AttnProcessor,
    Krea2RMSNorm,
    Krea2TransformerBlock,
)
from jaxtyping import Complex, Float
from torch import Tensor
from torch.autograd.function import once_differentiable

_SHORT = 512
"""Tokens up to which a CPU attends by plain products."""


def use_lean_blocks(transformer: Krea2Transformer2DModel) -> None:
    """Let `transformer` do without what it need not do; the stock pipeline on it stays right, mask and all."""
    transformer.set_attn_processor(NativeGQAProcessor())
    for block in transformer.transformer_blocks:
        block.__class__ = LeanBlock
        for norm in (block.norm1, block.norm2, block.attn.norm_q, block.attn.norm_k):
            norm.__class__ = LeanNorm
    transformer._repeated_blocks = [LeanBlock.__name__]  # what diffusers compiles, by name


class LeanBlock(Krea2TransformerBlock):
    """The stock block; on a CPU, without a mask, in fewer passes."""

    def forward(
        self, hidden_states: Float[Tensor, "B L D"], temb: Float[Tensor, "_ 1 M"],
        image_rotary_emb: tuple[Tensor, Tensor], attention_mask: Tensor | None = None,
    ) -> Float[Tensor, "B L D"]:  # fmt: skip
        """As the stock block's: `temb` is the modulation, of every image or of all."""
        # Elsewhere kernels are fused, or the compiler fuses them.
        if attention_mask is not None or hidden_states.device.type != "cpu" or torch.compiler.is_compiling():
            out: Tensor = super().forward(hidden_states, temb, image_rotary_emb, attention_mask)
            return out
        modulation = temb.unflatten(-1, (6, -1)) + self.scale_shift_table
        prescale, preshift, pregate, postscale, postshift, postgate = modulation.unbind(-2)
        read = self.norm1(hidden_states, modulation=(prescale, preshift))
        hidden = torch.addcmul(hidden_states, pregate, self.attn(read, image_rotary_emb=image_rotary_emb))
        read = self.norm2(hidden, modulation=(postscale, postshift))
        return torch.addcmul(hidden, postgate, self.ff(read))


class NativeGQAProcessor(Krea2AttnProcessor):
    """Attention with key/value heads not repeated; a call with a mask (the stock pipeline's) takes the stock way."""

    def __call__(
        self,
        attn: Krea2Attention,
        hidden_states: Tensor,
        attention_mask: Tensor | None = None,
        image_rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        if attention_mask is not None:
            return super().__call__(attn, hidden_states, attention_mask, image_rotary_emb)
        heads = (*hidden_states.shape[:-1], -1, attn.head_dim)
        query, key = attn.to_q(hidden_states).view(heads), attn.to_k(hidden_states).view(heads)
        value = attn.to_v(hidden_states).view(heads)
        if image_rotary_emb is not None and not torch.compiler.is_compiling():  # inductor has no complex kernels
            cos, sin = image_rotary_emb
            turn = torch.complex(cos[:, None, ::2].contiguous(), sin[:, None, ::2].contiguous())
            query, key = attn.norm_q(query, turn=turn), attn.norm_k(key, turn=turn)
        else:
            query, key = attn.norm_q(query), attn.norm_k(key)
            if image_rotary_emb is not None:
                query, key = (apply_rotary_emb(x, image_rotary_emb, sequence_dim=1) for x in (query, key))
        out = self._attend(query, key, value).flatten(2, 3)
        return attn.to_out[0](out * torch.sigmoid(attn.to_gate(hidden_states)))

    def _attend(
        self, query_BLHD: Float[Tensor, "B L H D"], key_BLGD: Float[Tensor, "B L G D"],
        value_BLGD: Float[Tensor, "B L G D"],
    ) -> Float[Tensor, "B L H D"]:  # fmt: skip
        """Attention of H query heads on G key/value heads."""
        B, L, H, D = query_BLHD.shape
        G = key_BLGD.shape[2]
        if self._attention_backend is not None or query_BLHD.device.type != "cpu" or L > _SHORT:
            return dispatch_attention_fn(
                query_BLHD, key_BLGD, value_BLGD, enable_gqa=H != G, backend=self._attention_backend
            )
        # torch's fused kernel for CPUs is 2 (float32) to 5 (bfloat16) times slower backwards than plain products of
        # short sequences; the queries that share a key/value head are more rows of one product.
        query = query_BLHD.transpose(1, 2).reshape(B * G, H // G * L, D)
        key, value = (x.transpose(1, 2).reshape(B * G, L, D) for x in (key_BLGD, value_BLGD))
        scores = query * D**-0.5 @ key.transpose(1, 2)
        return (scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ value).view(B, H, L, D).transpose(1, 2)


class LeanNorm(Krea2RMSNorm):
    """The stock norm, in one with what follows it."""

    def forward(
        self, hidden_states: Float[Tensor, "... D"], modulation: tuple[Tensor, Tensor] | None = None,
        turn: Complex[Tensor, "L 1 _"] | None = None,
    ) -> Float[Tensor, "... D"]:  # fmt: skip
        """Then modulated by scale and shift, or rotated by `turn`, or neither."""
        out: Tensor
        if modulation is not None:
            scale, shift = modulation
            gain = (1.0 + scale) * (1.0 + self.weight)
            out = Normed.apply(hidden_states, gain.to(hidden_states.dtype), shift, self.eps)
        elif turn is not None:
            out = NormedRotated.apply(hidden_states, 1.0 + self.weight, turn, self.eps)
        else:
            out = super().forward(hidden_states)
        return out


class Normed(torch.autograd.Function):
    """x / rms(x) * gain + shift: an RMSNorm and the modulation that follows it."""

    @staticmethod
    def forward(
        ctx: Any, x_BLD: Float[Tensor, "B L D"], gain: Float[Tensor, "_ 1 D"], shift: Float[Tensor, "_ 1 D"], eps: float
    ) -> Float[Tensor, "B L D"]:
        """`gain` and `shift` are of every image or of all, in the dtype of x."""
        inverse = _inverse_rms(x_BLD, eps).to(x_BLD.dtype)
        unit = x_BLD * inverse
        ctx.save_for_backward(unit, inverse, gain)
        return torch.addcmul(shift, unit, gain)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLD: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        """Gradients of x, gain and shift."""
        unit, inverse, gain = ctx.saved_tensors
        of_gain = d_BLD * unit
        along = torch.matmul(of_gain, gain.mT) / -unit.shape[-1]
        of_x = torch.addcmul(d_BLD * gain, unit, along).mul_(inverse)
        return of_x, of_gain.sum_to_size(gain.shape), d_BLD.sum_to_size(gain.shape), None


class NormedRotated(torch.autograd.Function):
    """The rotation of x / rms(x) * gain: queries and keys."""

    @staticmethod
    def forward(
        ctx: Any, x_BLHD: Float[Tensor, "B L H D"], gain_D: Float[Tensor, " D"], turn_LD: Complex[Tensor, "L 1 _"],
        eps: float,
    ) -> Float[Tensor, "B L H D"]:  # fmt: skip
        """`turn`: cos + i sin of every pair of neighbouring channels."""
        inverse = _inverse_rms(x_BLHD, eps)
        ctx.save_for_backward(x_BLHD, inverse, gain_D, turn_LD)
        return _rotate_((x_BLHD * inverse).mul_(gain_D), turn_LD).to(x_BLHD.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_BLHD: Tensor) -> tuple[Tensor, Tensor | None, None, None]:
        """Gradients of x and gain."""
        x_BLHD, inverse, gain_D, turn_LD = ctx.saved_tensors
        d = _rotate_(d_BLHD.to(torch.float32, copy=True, memory_format=torch.contiguous_format), turn_LD.conj())
        unit = x_BLHD * inverse
        of_gain = (d * unit).sum((0, 1, 2)) if ctx.needs_input_grad[1] else None
        along = (d.mul_(gain_D) * unit).mean(-1, keepdim=True)
        return d.addcmul_(unit, along, value=-1).mul_(inverse).to(x_BLHD.dtype), of_gain, None, None


def _inverse_rms(x: Float[Tensor, "... D"], eps: float) -> Float[Tensor, "... 1"]:
    """1 / sqrt(mean x^2 + eps) in float32."""
    norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _rotate_(x: Float[Tensor, "B L H D"], turn: Complex[Tensor, "L 1 _"]) -> Float[Tensor, "B L H D"]:
    torch.view_as_complex(x.view(*x.shape[:-1], -1, 2)).mul_(turn)
    return x
