"""A vision-language model as a reward: its language head is one number wide, and what it says last is the score."""

import json
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.local import open_model
from rlhf_img.rewards.preference import card_of
from rlhf_img.rewards.protocol import Images

ASKED = 'This image was made for the prompt "{prompt}". How good is it?'
"""What the model reads after the image. Kept in the card: a score means something with these words alone."""

HEAD = "lm_head"


def open_base(name: str) -> tuple[Any, Any]:
    """A model with a head for a score, which is 0 for every image at first, and its processor.

    Raises RlhfImgError if there is no such model, or if it has no language head.
    """
    try:
        model, processor = open_model(name)
    except (OSError, ValueError) as error:
        raise RlhfImgError(
            f"the model {name} cannot be loaded: {error}. Give a folder or the name of a model that looks at images, "
            "such as Qwen/Qwen3-VL-4B-Instruct"
        ) from error
    if not isinstance(getattr(model, HEAD, None), nn.Linear):
        raise RlhfImgError(f"{name} is a {type(model).__name__}, which has no linear {HEAD} to put a score in place of")
    width, dtype = model.get_input_embeddings().embedding_dim, model.dtype
    # The new head must not be tied to the words' embeddings again.
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.config.num_labels = 1  # what TRL knows a reward model by
    head = nn.Linear(width, 1, bias=False, dtype=dtype)
    nn.init.zeros_(head.weight)
    setattr(model, HEAD, head)
    processor.tokenizer.padding_side = "left"  # so that the last token is in the last column of every row
    return model, processor


def prepared(processor: Any, prompts: Sequence[str], images: Sequence[Image.Image], asked: str = ASKED) -> Any:
    """What the model takes for images of prompts, one row each; the score is then `logits` (B, 1, 1)."""
    turns = [[{"type": "image"}, {"type": "text", "text": asked.format(prompt=prompt)}] for prompt in prompts]
    texts = [
        processor.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        for content in turns
    ]
    inputs = processor(text=texts, images=list(images), padding=True, return_tensors="pt")
    inputs["logits_to_keep"] = 1
    return inputs


@contextmanager
def old_names() -> Iterator[None]:
    """TRL and peft still ask transformers by names that it has given up: no warning that a user could act on."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing.*", category=FutureWarning)
        yield


@dataclass(frozen=True, kw_only=True, eq=False)
class VLMModel:
    """A trained model with its processor."""

    model: Any
    processor: Any
    asked: str

    @torch.inference_mode()
    def __call__(
        self, prompts: list[str], images_B3HW: Float[Tensor, "B 3 H W"], *, batch: int = 16
    ) -> Float[Tensor, " B"]:
        images = Images(images_B3HW)
        found = []
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            inputs = prepared(self.processor, prompts[part], list(images[part]), self.asked).to(self.model.device)
            found.append(self.model(**inputs).logits[:, -1, 0].float().cpu())
        return torch.cat(found)


def load_vlm(folder: Path) -> VLMModel:
    """What `train_vlm` wrote, on a GPU if there is one. Raises RlhfImgError if the base or the adapter is missing."""
    from peft import PeftModel

    card = json.loads(card_of(folder).read_text())
    base, processor = open_base(card["base"])
    try:
        with old_names():
            model = PeftModel.from_pretrained(base, str(folder))
    except (OSError, ValueError, RuntimeError) as error:
        raise RlhfImgError(f"aesthetic: {folder} holds no adapter for {card['base']}: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    return VLMModel(model=model.eval().requires_grad_(False).to(device), processor=processor, asked=card["asked"])
