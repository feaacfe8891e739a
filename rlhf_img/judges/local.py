"""A judge in this process: a vision-language model of transformers (Qwen3-VL, LLaVA, ...), P(yes) from its logits."""

import time
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    BatchFeature,
)

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.protocol import (
    QUESTION,
    Answer,
    Ask,
    JudgeConfig,
    Message,
    Reply,
    Usage,
    p_yes_from_logprobs,
    template_hash,
    verdict_of,
)

PLAYGROUND = "playground"
"""The name of the judge of the playground's images that comes with the package."""


class LocalJudge:
    """Asks in batches of `concurrency`. The schema of a conversation is not enforced; who asks must check the reply."""

    def __init__(self, model: Any, processor: Any, config: JudgeConfig) -> None:
        """
        processor: called as (text=..., images=..., padding=True, return_tensors="pt"), gives the model's inputs. Its
        `tokenizer` has the model's chat template.
        """
        self._model, self._processor, self.config = model.eval(), processor, config
        self._tokenizer = tokenizer = processor.tokenizer
        tokenizer.padding_side = "left"  # so that the next token follows the last column in every row
        self.usage = Usage(max_failed=config.max_failed)
        words = (f"{lead}{word}" for word in ("yes", "Yes", "YES", "no", "No", "NO") for lead in ("", " "))
        ids = [tokenizer.encode(word, add_special_tokens=False) for word in words]
        # A word of several tokens has no probability of its own as the next token.
        self._ids = sorted({tokens[0] for tokens in ids if len(tokens) == 1})
        self._words = [tokenizer.decode([token]) for token in self._ids]
        if {verdict_of(word) for word in self._words} != {"yes", "no"}:
            raise RlhfImgError(f"{config.model}: its tokenizer has no single token for yes and no; use another judge")

    @classmethod
    def load(cls, config: JudgeConfig) -> "LocalJudge":
        """From a folder, the hub or the package, on a GPU if there is one. RlhfImgError if it is no such model."""
        device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model, processor = open_model(config.model)
        except (OSError, ValueError) as error:
            raise RlhfImgError(
                f"the judge {config.model} cannot be loaded: {error}. Give a folder or the name of a model that looks "
                "at images, or the `url` of a server that has it"
            ) from error
        return cls(model.to(device), processor, config)

    @property
    def id(self) -> str:
        return f"{self.config.model}@{template_hash()}/logits-t0"

    def ask(self, asks: Sequence[Ask]) -> list[Answer]:
        size = self.config.concurrency
        return [a for start in range(0, len(asks), size) for a in self._ask_batch(asks[start : start + size])]

    @torch.inference_mode()
    def _ask_batch(self, asks: Sequence[Ask]) -> list[Answer]:
        began = time.perf_counter()
        turns = [[{"type": "image"}, {"type": "text", "text": QUESTION.format(question=ask.question)}] for ask in asks]
        texts = [self._prompt([{"role": "user", "content": content}]) for content in turns]
        images = [Image.fromarray(ask.image) for ask in asks]
        inputs = self._processor(text=texts, images=images, padding=True, return_tensors="pt").to(self._model.device)
        logp_BV = self._model(**inputs, logits_to_keep=1).logits[:, -1].float().log_softmax(-1)
        seconds = time.perf_counter() - began
        self.usage.prompt_tokens += int(inputs["attention_mask"].sum())
        answers = []
        for logp in logp_BV[:, self._ids].tolist():
            found = p_yes_from_logprobs(zip(self._words, logp, strict=True))
            self.usage.record(found.reason, seconds / len(asks))
            answers.append(Answer(p_yes=found.p_yes, reason=found.reason, seconds=seconds))
        return answers

    def chat(self, conversations: Sequence[Sequence[Message]], schema: Mapping[str, Any]) -> list[Reply]:
        return [self._reply(turns) for turns in conversations]

    @torch.inference_mode()
    def _reply(self, turns: Sequence[Message]) -> Reply:
        began = time.perf_counter()
        prompt = self._prompt([{"role": t["role"], "content": [{"type": "text", "text": t["content"]}]} for t in turns])
        inputs = self._tokenizer(prompt, return_tensors="pt").to(self._model.device)
        asked = inputs["input_ids"].shape[1]
        tokens = self._model.generate(**inputs, do_sample=False, max_new_tokens=self.config.max_tokens)[0, asked:]
        self.usage.prompt_tokens += asked
        self.usage.completion_tokens += len(tokens)
        cut = len(tokens) == self.config.max_tokens
        reason = f"the reply was cut off at max_tokens ({self.config.max_tokens})" if cut else None
        self.usage.record(reason, time.perf_counter() - began)
        text = None if cut else self._tokenizer.decode(tokens, skip_special_tokens=True)
        return Reply(text=text, reason=reason)

    def _prompt(self, messages: Sequence[object]) -> str:
        return str(self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))


class QwenProcessor:
    """What Qwen2-VL's and Qwen3-VL's own processors do with images. Those need torchvision, for videos."""

    def __init__(self, image_processor: Any, tokenizer: Any) -> None:
        self._image_processor, self.tokenizer = image_processor, tokenizer

    def __call__(self, text: Sequence[str], images: Sequence[Any], padding: bool, return_tensors: str) -> BatchFeature:
        """One image a text. Each image token is repeated once for each patch that the model merges it to."""
        seen = self._image_processor(images=images, return_tensors=return_tensors)
        counts = (seen["image_grid_thw"].prod(-1) // self._image_processor.merge_size**2).tolist()
        token = "<|image_pad|>"
        whole = [one.replace(token, token * count) for one, count in zip(text, counts, strict=True)]
        read = self.tokenizer(whole, padding=padding, return_tensors=return_tensors)
        # 1 where an image token is, as the model places those in two dimensions.
        kinds = (read["input_ids"] == self.tokenizer.convert_tokens_to_ids(token)).int()
        inputs = {k: read[k] for k in ("input_ids", "attention_mask")}
        return BatchFeature({**inputs, **seen, "mm_token_type_ids": kinds})


def open_model(name: str) -> tuple[Any, Any]:
    """A vision-language model on the CPU and its processor, from a folder, the hub or, "playground", the package.

    Raises OSError or ValueError if there is no such model.
    """
    name = _playground_folder() if name == PLAYGROUND else name
    return AutoModelForImageTextToText.from_pretrained(name, dtype="auto"), _processor(name)


def _processor(name: str) -> Any:
    if AutoConfig.from_pretrained(name).model_type.startswith("qwen"):
        images = AutoImageProcessor.from_pretrained(name, backend="pil")
        return QwenProcessor(images, AutoTokenizer.from_pretrained(name))
    return AutoProcessor.from_pretrained(name, backend="pil")


def _playground_folder() -> str:
    folder = Path(str(resources.files("rlhf_img"))) / "playground" / "judge"
    if not (folder / "config.json").is_file():
        raise RlhfImgError(
            "the playground's judge is not in this installation; make it with rlhf-img playground train-judge --out "
            "FOLDER, and give FOLDER as the judge's model"
        )
    return str(folder)
