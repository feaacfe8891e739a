"""Several questions about one image in one sequence, so that the image is read once: how the judge is trained fast.

Each question sees the image and itself, at the positions that it would have alone, so its answer is the one that it
would get alone. Attention is computed on just those pairs, a fifth of all, by plain products: torch's fused kernel for
CPUs is several times slower backwards at these lengths.
"""

from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedTokenizerFast, Qwen3VLForConditionalGeneration

from rlhf_img.playground.judge_build import GRID, IMAGE, MERGE, PATCH

LONGEST = 18
"""Tokens that every question is padded to, on the right."""
_PREFIX = GRID**2 + 2
"""Tokens of the image with its marks, before the questions."""
_ATTENTION = "rlhf_img_packed"


class Packed:
    """Asks the model in packed sequences; from its making on the model can read only these."""

    def __init__(self, model: Qwen3VLForConditionalGeneration, tokenizer: PreTrainedTokenizerFast, questions: int):
        """questions: how many there are about each image."""
        AttentionInterface.register(_ATTENTION, _attention)
        model.set_attn_implementation(_ATTENTION)
        start, pad, end = tokenizer.encode(IMAGE, add_special_tokens=False)
        prefix = torch.tensor([[start, *[pad] * GRID**2, end]])
        grid = torch.tensor([[1, GRID * MERGE, GRID * MERGE]])
        places_31P, _ = model.model.get_rope_index(prefix, (prefix == pad).int(), image_grid_thw=grid)
        after = int(places_31P.max()) + 1 + torch.arange(LONGEST).repeat(questions)
        self._places_31T = torch.cat([places_31P, after.expand(3, 1, -1)], dim=-1).to(model.device)
        self._grid, self._marks = grid.to(model.device), torch.tensor([start, end], device=model.device)
        self._model = model

    def __call__(
        self, images_BHWC: UInt8[Tensor, "B H W 3"], tokens_BKL: Int[Tensor, "B K L"], last_BK: Int[Tensor, "B K"]
    ) -> tuple[Float[Tensor, "B K V"], Float[Tensor, "B T D"]]:
        """The logits of each question's answer, and what the image tokens hold.

        last_BK: place of each question's last token, whose next token is the answer.
        """
        b, k, n = tokens_BKL.shape
        core = self._model.model
        seen = core.visual(_patches(images_BHWC), grid_thw=self._grid.expand(b, -1)).pooler_output
        image_BTD = seen.view(b, GRID**2, -1)
        embed = core.language_model.embed_tokens
        words, marks = embed(tokens_BKL.flatten(1)), embed(self._marks.expand(b, -1))
        states_BTD = core.language_model(
            inputs_embeds=torch.cat([marks[:, :1], image_BTD.to(words.dtype), marks[:, 1:], words], dim=1),
            position_ids=self._places_31T.expand(-1, b, -1),
            use_cache=False,
        ).last_hidden_state
        own = states_BTD[:, _PREFIX:].unflatten(1, (k, n))
        answers_BKD = own.gather(2, last_BK[:, :, None, None].expand(-1, -1, 1, own.shape[-1]))[:, :, 0]
        return self._model.lm_head(answers_BKD).float(), image_BTD.float()


def _patches(images_BHWC: Tensor) -> Tensor:
    """What the image processor makes of 64 px images: (B * patches, 3 * PATCH * PATCH), in [-1, 1]."""
    x = images_BHWC.permute(0, 3, 1, 2).float() / 127.5 - 1
    x = x.unflatten(3, (GRID, MERGE, PATCH)).unflatten(2, (GRID, MERGE, PATCH))
    return x.permute(0, 2, 5, 3, 6, 1, 4, 7).reshape(-1, 3 * PATCH * PATCH)


def _attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, scaling: float, **unused: Any
) -> tuple[Tensor, None]:
    """The form that transformers calls: (B, heads, T, head_dim) in, (B, T, heads, head_dim) out."""
    query = query * scaling
    if not module.is_causal:
        return _weigh(query @ key.mT, value).transpose(1, 2), None
    p = _PREFIX
    image = _weigh(query[:, :, :p] @ key[:, :, :p].mT + _future(p, query), value[:, :, :p])
    # Of a question: its tokens' weights on the image's tokens, then on its own.
    query_own, key_own, value_own = (x[:, :, p:].unflatten(2, (-1, LONGEST)) for x in (query, key, value))
    on_image = (query[:, :, p:] @ key[:, :, :p].mT).unflatten(2, (-1, LONGEST))
    on_own = query_own @ key_own.mT + _future(LONGEST, query)
    weights = torch.cat([on_image, on_own], dim=-1).softmax(-1)
    mixed = weights[..., :p].flatten(2, 3) @ value[:, :, :p]
    mixed = mixed + (weights[..., p:] @ value_own).flatten(2, 3)
    return torch.cat([image, mixed], dim=2).transpose(1, 2), None


def _weigh(scores: Tensor, value: Tensor) -> Tensor:
    return scores.softmax(-1).to(value.dtype) @ value


def _future(n: int, like: Tensor) -> Tensor:
    """0 where a token may look, minus infinity where it would see what follows it: (n, n)."""
    return torch.full((n, n), -torch.inf, dtype=like.dtype, device=like.device).triu(1)
