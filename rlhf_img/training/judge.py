"""`rlhf-img playground train-judge`: a small Qwen3-VL learns to answer yes/no questions about the playground's images.

Two stages, each resumable: images with questions and answers made once, and training on the answer's token alone. What
there is to see (which thing where, which background, word and style) is told to the image tokens as well, by linear
heads that are dropped afterwards: from yes and no alone, seeing would be learned much more slowly.
"""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from itertools import cycle, islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.loading import PLAYGROUND, load
from rlhf_img.playground.data import example
from rlhf_img.playground.fit import FitConfig, fit
from rlhf_img.playground.judge_build import (
    ANSWER,
    GRID,
    build_image_processor,
    build_judge,
    build_judge_tokenizer,
)
from rlhf_img.playground.scene import Split
from rlhf_img.rewards import Images
from rlhf_img.training.judge_data import (
    CELL_SIZES,
    SCENE_SIZES,
    SUFFIX,
    Asked,
    all_words,
    asked_damaged,
    asked_image,
    asked_render,
    question_text,
    seen_facts,
)
from rlhf_img.training.judge_packed import LONGEST, Packed
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import draw_images

_UNKNOWN = -1
"""Class of a fact that is not known, as of all that damaged and drawn images show."""


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgeTraining:
    """The recipe of the playground's judge."""

    seed: int = 0
    """Of weights, images, questions and batches."""
    renders: int = 32_768
    """Clean scenes, answered for by the scene."""
    damaged: int = 3072
    """Renders with a structural defect, answered for by the exact checks."""
    drawn: int = 1024
    """Images that the embedded model drew, answered for by the exact checks."""
    questions: int = 8
    """Questions an image; they share its tokens."""
    batch: int = 32
    """Images a step, of which an eighth are damaged or drawn."""
    seeing: float = 0.1
    """Weight of the loss of the facts that image tokens are to hold."""
    fit: FitConfig = field(default_factory=lambda: FitConfig(steps=4000, lr=2e-3, ema=0.998, save_every=100))


@dataclass(frozen=True, slots=True)
class JudgeCache:
    """The training set, N images with K questions of L tokens at most; the first are the renders."""

    images_NHWC: Tensor
    """uint8, RGB."""
    tokens_NKL: Tensor
    """int16, padded on the right."""
    last_NK: Tensor
    """int64: place of the last token of each question, whose next token is the answer."""
    yes_NK: Tensor
    """bool: the answer."""
    cells_NTF: Tensor
    """int64: class of each fact of each image token, -1 where it is not known."""
    facts_NF: Tensor
    """int64: class of each fact of the image, -1 where it is not known."""


def train_judge(config: JudgeTraining, work: Path, out: Path) -> None:
    """Runs every stage that is not done yet, in `work`, and writes the folder `out` that a local judge loads.

    Raises RlhfImgError if `work` holds the stages of another recipe.
    """
    work.mkdir(parents=True, exist_ok=True)
    _same_recipe(config, work / "recipe.json")
    tokenizer = build_judge_tokenizer(all_words(), SUFFIX)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = build_judge(tokenizer, config.seed).to(device)
    cache = make_judge_cache(config, tokenizer, work)
    add_seeing(model, config.seed)
    fit("judge", model, _loss_fn(model, tokenizer, cache, config), config.fit, work)
    del model.seeing
    for part in (model.to("cpu", torch.bfloat16), tokenizer, build_image_processor()):
        part.save_pretrained(out)


def add_seeing(model: Any, seed: int) -> None:
    """The linear heads, as `model.seeing`, that tell from an image token the facts that it is to hold."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        heads = torch.nn.Linear(model.config.text_config.hidden_size, sum(CELL_SIZES + SCENE_SIZES))
    model.seeing = heads.to(model.device)


def _same_recipe(config: JudgeTraining, file: Path) -> None:
    recipe = json.loads(json.dumps(asdict(config)))
    if file.exists() and (made := json.loads(file.read_text())) != recipe:
        changed = ", ".join(sorted(key for key in recipe if recipe[key] != made.get(key)))
        raise RlhfImgError(f"{file.parent} holds the work of another recipe ({changed}); give another --work folder")
    file.write_text(json.dumps(recipe, indent=2) + "\n")


def make_judge_cache(config: JudgeTraining, tokenizer: PreTrainedTokenizerFast, work: Path) -> JudgeCache:
    """Every image with its questions, made once and kept in `work`."""
    file = work / "judge_data.pt"
    if file.exists():
        return JudgeCache(*torch.load(file, weights_only=True))
    items: list[Asked] = []
    for place, (make, count) in enumerate(((asked_render, config.renders), (asked_damaged, config.damaged))):
        for i in track(range(count), ("renders", "damaged renders")[place]):
            rng = np.random.default_rng((config.seed, place, i))
            items.append(make(rng, "train", config.questions))
    items += asked_drawn(config.drawn, "train", config.questions, config.seed)
    cache = pack(items, tokenizer, config.questions)
    torch.save([getattr(cache, f.name) for f in dataclasses.fields(cache)], file)
    return cache


def asked_drawn(count: int, split: Split, questions: int, seed: int) -> list[Asked]:
    """Images that the embedded model drew from captions of a split, with questions that the exact checks answer."""
    if not count:
        return []
    model = load(PLAYGROUND)
    conditioner = Conditioner(model)
    first = 60_000_000 + 1_000_000 * seed
    items: list[Asked] = []
    for seeds in track(torch.arange(first, first + count).split(32), "drawn images"):
        meant = [example(i, split) for i in seeds.tolist()]
        asked = [Prompt(e.caption) for e in meant]
        drawn = Images(draw_images(model, conditioner, asked, seeds.tolist(), num_steps=16, guidance=0.0))
        for i, e, image in zip(seeds.tolist(), meant, drawn.arrays, strict=True):
            items.append(asked_image(image, e.scene, np.random.default_rng(i), questions))
    return items


def pack(items: Sequence[Asked], tokenizer: PreTrainedTokenizerFast, questions: int) -> JudgeCache:
    """As tensors, with so many questions an image; where there are fewer, they are repeated."""
    n = len(items)
    tokens = torch.full((n, questions, LONGEST), tokenizer.pad_token_id, dtype=torch.int16)
    last, yes = torch.zeros(n, questions, dtype=torch.int64), torch.zeros(n, questions, dtype=torch.bool)
    cells = torch.full((n, GRID**2, len(CELL_SIZES)), _UNKNOWN)
    facts = torch.full((n, len(SCENE_SIZES)), _UNKNOWN)
    known: dict[str, list[int]] = {}
    for i, item in enumerate(items):
        for j, (requirement, answer) in enumerate(islice(cycle(item.questions), questions)):
            text = question_text(requirement)
            if text not in known:
                known[text] = tokenizer.encode(text + ANSWER, add_special_tokens=False)
            ids = known[text]
            tokens[i, j, : len(ids)] = torch.tensor(ids, dtype=torch.int16)
            last[i, j], yes[i, j] = len(ids) - 1, answer
        if item.scene is not None:
            cells[i], facts[i] = (torch.from_numpy(x) for x in seen_facts(item.scene))
    images = torch.from_numpy(np.stack([item.image for item in items]))
    return JudgeCache(images, tokens, last, yes, cells, facts)


def _loss_fn(
    model: Any, tokenizer: PreTrainedTokenizerFast, cache: JudgeCache, config: JudgeTraining
) -> Callable[[int], Tensor]:
    packed = Packed(model, tokenizer, config.questions)
    device = model.device
    others = len(cache.images_NHWC) - config.renders
    no, yes = (tokenizer.encode(word, add_special_tokens=False)[0] for word in ("No", "Yes"))
    words = torch.tensor([no, yes], device=device)

    def loss_fn(step: int) -> Tensor:
        rng = np.random.default_rng((config.seed, 2, step))
        few = config.batch // 8 if others else 0
        clean = rng.integers(config.renders, size=config.batch - few)
        rows = np.concatenate([clean, config.renders + rng.integers(max(others, 1), size=few)])
        images, tokens, last, truth, cells, facts = (
            getattr(cache, f.name)[rows].to(device) for f in dataclasses.fields(cache)
        )
        with torch.autocast(device.type, torch.bfloat16):
            logits_BKV, image_BTD = packed(images, tokens.long(), last)
            seen = model.seeing(image_BTD).float()
        answer = F.cross_entropy(logits_BKV.flatten(0, 1), words[truth.long()].flatten())
        return answer + config.seeing * _seeing_loss(seen, cells, facts)

    return loss_fn


def _seeing_loss(seen_BTC: Tensor, cells_BTF: Tensor, facts_BF: Tensor) -> Tensor:
    """Mean over images of the cross-entropies of an image's facts, and of the things in its image tokens."""
    cell_logits, scene_logits = seen_BTC.split([sum(CELL_SIZES), sum(SCENE_SIZES)], dim=-1)
    wrong = [
        F.cross_entropy(x.flatten(0, 1), cells_BTF[..., i].flatten(), ignore_index=_UNKNOWN, reduction="sum")
        for i, x in enumerate(cell_logits.split(CELL_SIZES, dim=-1))
    ]
    wrong += [
        F.cross_entropy(x, facts_BF[:, i], ignore_index=_UNKNOWN, reduction="sum")
        for i, x in enumerate(scene_logits.mean(1).split(SCENE_SIZES, dim=-1))
    ]
    return torch.stack(wrong).sum() / len(seen_BTC)
