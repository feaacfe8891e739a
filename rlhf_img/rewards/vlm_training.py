"""Makes the aesthetic reward from a vision-language model: TRL's RewardTrainer, and a LoRA of peft.

TRL's reward trainer is for texts: it turns pairs into token ids, and has no place for images. Its loss asks for no
more than a model with `logits`, so that the images come in where rows become a batch, in a collator of our own.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.aesthetic_training import Show
from rlhf_img.rewards.preference import (
    Preference,
    Read,
    card_of,
    fingerprint,
    fitted_scale,
    keep_settings,
    measured,
    part_of,
    write_card,
)
from rlhf_img.rewards.protocol import Images
from rlhf_img.rewards.vlm_reward import ASKED, HEAD, VLMModel, old_names, open_base, prepared

_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of the language model, as nearly all of them are called."""


@dataclass(frozen=True, kw_only=True, slots=True)
class VLMTraining:
    """How the adapter and the head are trained."""

    steps: int = 600
    """Optimiser steps."""
    pairs: int = 8
    """Pairs a step."""
    lr: float = 1e-4
    """Learning rate of AdamW at the start; it falls linearly to 0."""
    rank: int = 32
    """Of the LoRA."""
    alpha: float = 64.0
    save_every: int = 100
    """Steps between checkpoints."""
    seed: int = 0


def train_vlm(
    out: Path, config: VLMTraining, read: Read, base: str, *, resume: bool = False,
    show: Show = lambda what, done, total: None,
) -> dict[str, Any]:  # fmt: skip
    """Trains a LoRA and a head on `base`; writes the adapter and its card into the folder `out`; returns the card.

    The encoded pairs are held in memory. Raises RlhfImgError for too few pairs, a base that cannot be used, missing
    packages, an `out` that holds a finished reward, and if what is to be resumed is of other pairs or settings.
    """
    if card_of(out).is_file() and out.is_dir():
        raise RlhfImgError(f"{out} holds a reward already: give another --out")
    _require_trl()
    digest, sizes = fingerprint(read)
    settings = {**asdict(config), "base": base, "pairs_of": digest, "asked": ASKED}
    state = out / "training"
    if state.is_dir() and not resume:
        raise RlhfImgError(f"{out} holds a training: go on with --resume, or give another --out")
    keep_settings(state, settings)
    pairs = list(read())
    parts = [part_of(pair.prompt) for pair in pairs]
    train = [pair for pair, part in zip(pairs, parts, strict=True) if part == "train"]
    model, processor = _trained(train, config, base, state, resume, show)
    scorer = VLMModel(model=model.eval(), processor=processor, asked=ASKED)
    scores_P2 = _scores(scorer, pairs, show)
    margin_P = scores_P2[:, 0] - scores_P2[:, 1]
    val, heldout, learnt = (torch.tensor([part == name for part in parts]) for name in ("val", "heldout", "train"))
    scale = fitted_scale(margin_P[val])
    card = {
        "kind": "vlm", "base": base, "asked": ASKED, "config": asdict(config), "pairs": sizes, "pairs_of": digest,
        "scale": scale, "centre": float(scores_P2[learnt].mean()), "torch": torch.__version__,
        "heldout": measured(scale * margin_P[heldout]), "train": measured(scale * margin_P[learnt]),
    }  # fmt: skip
    model.save_pretrained(str(out))
    write_card(out, card)
    return card


def _require_trl() -> None:
    try:
        import datasets  # noqa: F401
        import trl  # noqa: F401
    except ImportError as error:
        raise RlhfImgError(
            f"training a vision-language model needs more ({error}): pip install 'rlhf-img[vlm]'"
        ) from error


def _trained(
    pairs: Sequence[Preference], config: VLMTraining, base: str, state: Path, resume: bool, show: Show
) -> tuple[Any, Any]:
    """The model with its adapter after all steps, and its processor."""
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import TrainerCallback
    from trl import RewardConfig, RewardTrainer

    class Bar(TrainerCallback):
        def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
            show("training", state.global_step, config.steps)

    model, processor = open_base(base)
    cuda = torch.cuda.is_available()
    arguments = RewardConfig(
        output_dir=str(state), max_steps=config.steps, per_device_train_batch_size=config.pairs,
        learning_rate=config.lr, lr_scheduler_type="linear", save_steps=config.save_every, save_total_limit=2,
        seed=config.seed, data_seed=config.seed, report_to="none", logging_steps=10, remove_unused_columns=False,
        max_length=None, bf16=cuda, use_cpu=not cuda, activation_checkpointing=cuda, disable_tqdm=True,
        dataloader_pin_memory=cuda,
    )  # fmt: skip
    # Columns that make TRL leave the rows as they are; the images come in with the batch.
    rows = Dataset.from_dict({"row": list(range(len(pairs))), "chosen_ids": [[0]] * len(pairs),
                              "rejected_ids": [[0]] * len(pairs)})  # fmt: skip

    def collate(batch: list[dict[str, Any]]) -> dict[str, Any]:
        """TRL's order: first all chosen ones, then all rejected ones."""
        some = [pairs[row["row"]] for row in batch]
        images = [pair.images()[side] for side in (0, 1) for pair in some]
        return dict(prepared(processor, [pair.prompt for pair in some] * 2, images))

    lora = LoraConfig(r=config.rank, lora_alpha=config.alpha, target_modules=list(_TARGETS), modules_to_save=[HEAD])
    with old_names():
        trainer = RewardTrainer(
            model=model, args=arguments, train_dataset=rows, data_collator=collate,
            processing_class=processor.tokenizer, callbacks=[Bar()], peft_config=lora,
        )  # fmt: skip
        trainer.train(resume_from_checkpoint=resume and any(state.glob("checkpoint-*")))
    return trainer.model, processor


def _scores(scorer: VLMModel, pairs: Sequence[Preference], show: Show) -> Tensor:
    """Of the chosen and the rejected image of each pair, (P, 2)."""
    found = []
    for number, pair in enumerate(pairs):
        found.append(scorer([pair.prompt] * 2, Images.from_pil(pair.images()).tensor))
        show("scoring", number + 1, len(pairs))
    return torch.stack(found)
