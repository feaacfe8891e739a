"""Prompts as the transformer reads them: encoded and fused once, without padding, and kept."""

from collections import OrderedDict, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from diffusers import Krea2Pipeline
from jaxtyping import Float, Int
from torch import Tensor

from rlhf_img.model.forward import by_length, fuse_text
from rlhf_img.model.loading import Model
from rlhf_img.model.text_store import TextStore

MAX_TOKENS = 512
"""Prompt and suffix tokens at most, as in the stock pipeline; a longer prompt is cut there."""
BATCH_SIZE = 64
"""Prompts that are encoded together, at most."""
_AHEAD = 1024
"""Prompts that are read ahead in one visit of the text encoder to the device."""


class Conditioner:
    """Turns prompts into fused text features, with a least-recently-used cache of at most `cache_bytes`, and with the
    folder `store` behind it, where fused features outlive the process.

    The stock layout, [34-token prefix | prompt | padding | 5-token suffix], minus the padding: it takes no position
    and is never attended to, so the features are the same without it. While the fusion weights are frozen the fused
    features are kept; while they are trained, the encoder's states are, and every call fuses them with gradients.
    """

    def __init__(
        self, model: Model, *, cache_bytes: int = 256 * 2**20, batch_size: int = BATCH_SIZE,
        store: str | Path | None = None,
    ) -> None:  # fmt: skip
        stock: Krea2Pipeline = model.pipeline()
        self._model = model
        self._prefix: str = stock.prompt_template_encode_prefix
        self._drop: int = stock.prompt_template_encode_start_idx
        self._suffix: list[int] = model.tokenizer(stock.prompt_template_encode_suffix)["input_ids"]
        self._cache_bytes = cache_bytes
        self._batch_size = batch_size
        self._used = 0
        self._cache: OrderedDict[tuple[str, bool], Tensor] = OrderedDict()
        self._store = TextStore(store, model) if store is not None else None

    def encode(self, prompts: Sequence[str]) -> list[Float[Tensor, "_ D"]]:
        """Fused features (L, D) of every prompt, on the transformer's device; L counts prompt and suffix."""
        transformer = self._model.transformer
        fusion = [*transformer.text_fusion.parameters(), *transformer.txt_in.parameters()]
        trained = any(p.requires_grad for p in fusion)
        kept = self._look_up(dict.fromkeys(prompts), fused=not trained)
        if not trained:
            return [kept[prompt] for prompt in prompts]
        fused: dict[int, Tensor] = {}
        for rows, hidden in by_length([kept[prompt] for prompt in prompts]):
            fused.update(zip(rows, fuse_text(transformer, hidden), strict=True))
        return [fused[i] for i in range(len(prompts))]

    def lengths(self, prompts: Sequence[str]) -> Int[np.ndarray, " N"]:
        """L of each prompt's features, without computing them."""
        return np.array([len(self._tokens(prompt)) - self._drop for prompt in prompts])

    def read_ahead(self, prompts: Iterable[str]) -> Iterator[int]:
        """Put all prompts into the store, if there is one, and yield now and then how many of them are there. What it
        has is not read again."""
        if self._store is None:
            return
        wanted = dict.fromkeys(prompts)
        missing = [prompt for prompt in wanted if prompt not in self._store]
        for start in range(0, len(missing), _AHEAD):
            yield len(wanted) - len(missing) + start
            self._look_up(missing[start : start + _AHEAD], fused=True)
        yield len(wanted)

    def clear(self) -> None:
        """Forget everything in memory: call it when the weights of the text encoder or the fusion have changed."""
        self._cache.clear()
        self._used = 0

    def _look_up(self, prompts: Sequence[str] | dict[str, None], *, fused: bool) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for prompt in prompts:
            if (prompt, fused) in self._cache:
                self._cache.move_to_end((prompt, fused))
                found[prompt] = self._cache[prompt, fused]
            elif fused and self._store is not None and (stored := self._store.read(prompt)) is not None:
                found[prompt] = stored
                self._keep((prompt, fused), stored)
        by_tokens: defaultdict[int, list[tuple[str, list[int]]]] = defaultdict(list)
        for prompt in prompts:
            if prompt not in found:
                ids = self._tokens(prompt)
                by_tokens[len(ids)].append((prompt, ids))
        if by_tokens:
            with self._model.present(self._model.text_encoder):
                for group in by_tokens.values():
                    for start in range(0, len(group), self._batch_size):
                        found |= self._read(group[start : start + self._batch_size], fused=fused)
        return found

    def _read(self, part: list[tuple[str, list[int]]], *, fused: bool) -> dict[str, Tensor]:
        """Features of prompts that have as many tokens, which are kept."""
        found: dict[str, Tensor] = {}
        for (prompt, _), row in zip(part, self._features([ids for _, ids in part], fused=fused), strict=True):
            found[prompt] = row.clone()  # its own storage: a view would keep the whole batch alive
            self._keep((prompt, fused), found[prompt])
            if fused and self._store is not None:
                self._store.write(prompt, found[prompt])
        return found

    def _tokens(self, prompt: str) -> list[int]:
        room = self._drop + MAX_TOKENS - len(self._suffix)
        ids: list[int] = self._model.tokenizer(self._prefix + prompt, truncation=True, max_length=room)["input_ids"]
        return ids + self._suffix

    @torch.no_grad()
    def _features(self, ids: list[list[int]], *, fused: bool) -> Tensor:
        """Tapped states (B, L, T, E), or fused features (B, L, D), of token lists of one length."""
        encoder = self._model.text_encoder
        tokens = torch.tensor(ids, device=encoder.device)
        positions = torch.arange(tokens.shape[1], device=encoder.device).expand(3, *tokens.shape)
        states = encoder(input_ids=tokens, position_ids=positions, output_hidden_states=True).hidden_states
        hidden = torch.stack([states[i][:, self._drop :] for i in self._model.text_layers], dim=2)
        hidden = hidden.to(self._model.device)
        return fuse_text(self._model.transformer, hidden) if fused else hidden

    def _keep(self, key: tuple[str, bool], features: Tensor) -> None:
        self._cache[key] = features
        self._used += features.nbytes
        while self._used > self._cache_bytes:
            _, oldest = self._cache.popitem(last=False)
            self._used -= oldest.nbytes
