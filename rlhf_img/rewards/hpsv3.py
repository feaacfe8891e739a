"""HPSv3: a Qwen2-VL that reads an instruction, the prompt and the image, and gives a preference with its uncertainty.

The published file holds the weights of a Qwen2-VL with one more token, `<|Reward|>`, and of a head on that token's last
hidden state. It was trained with token positions that count on through the image, in one dimension; Qwen2-VL's own are
in three. The instruction is part of what it was trained on, and belongs to its authors: it is read from a file.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges.local import QwenProcessor
from rlhf_img.rewards.protocol import Images, Verdict

TOKEN = "<|Reward|>"
FILE = "HPSv3.safetensors"
PIXELS = 256 * 28 * 28
"""About as many pixels every image is brought to, in whole patches."""

LOWEST, HIGHEST = -5.0, 15.0


@dataclass(frozen=True, kw_only=True, eq=False)
class HPSv3:
    """The model with its preprocessing and instruction."""

    model: Any
    """The Qwen2-VL without its language head."""
    head: nn.Sequential
    processor: QwenProcessor
    template: str
    """With {text_prompt} where the prompt goes, and one <|Reward|>."""

    @torch.inference_mode()
    def __call__(self, prompts: Sequence[str], images: Images, *, batch: int = 8) -> tuple[Tensor, Tensor]:
        """Preference and log of its uncertainty, each float32 (B,)."""
        parts = [slice(start, start + batch) for start in range(0, len(prompts), batch)]
        found = torch.cat([self._scored(prompts[part], images[part]) for part in parts])
        return found[:, 0], found[:, 1]

    def _scored(self, prompts: Sequence[str], images: Images) -> Tensor:
        tokenizer = self.processor.tokenizer
        content = [
            [{"type": "image"}, {"type": "text", "text": self.template.replace("{text_prompt}", prompt)}]
            for prompt in prompts
        ]
        texts = [
            tokenizer.apply_chat_template([{"role": "user", "content": c}], tokenize=False, add_generation_prompt=True)
            for c in content
        ]
        read = self.processor(text=texts, images=list(images), padding=True, return_tensors="pt")
        inputs = read.to(self.model.device)
        positions_BL = (inputs["attention_mask"].cumsum(-1) - 1).clamp_min(0)
        out = self.model(**inputs, position_ids=positions_BL.expand(3, -1, -1)).last_hidden_state
        asked = inputs["input_ids"] == tokenizer.convert_tokens_to_ids(TOKEN)
        if asked.sum(1).ne(1).any():
            raise RlhfImgError(f"hpsv3: a prompt holds {TOKEN}, which asks for the score; leave it out")
        scores: Tensor = self.head(out[asked].float())
        return scores.cpu()


def hpsv3(
    prompts: Sequence[str],
    images: Images,
    *,
    template: str | None = None,
    model: str = "MizzenAI/HPSv3",
    base: str = "Qwen/Qwen2-VL-7B-Instruct",
    **columns: object,
) -> list[Verdict]:
    """What people prefer by a Qwen2-VL of 7B (HPSv3); cut to [-5, 15]. Its log-uncertainty is in the details.

    Ma et al. 2025, arXiv:2508.03789. template: option; a text file with the published instruction, {text_prompt} where
    the prompt goes, and <|Reward|>. model: option; a hub id or folder with HPSv3.safetensors. base: option; whose
    config, tokenizer and preprocessor are taken. Raises RlhfImgError without a template.
    """
    scorer = open_hpsv3(_template(template), model, base)
    values, spread = scorer(prompts, images)
    return [Verdict(value=min(max(value, LOWEST), HIGHEST), details={"log_sigma": log})
            for value, log in zip(values.tolist(), spread.tolist(), strict=True)]


hpsv3.range = (LOWEST, HIGHEST)  # type: ignore[attr-defined]
hpsv3.floor = 0.2  # type: ignore[attr-defined]
hpsv3.needs = "MizzenAI/HPSv3 (7B), its instruction, and Qwen2-VL's tokenizer"  # type: ignore[attr-defined]


def _template(path: str | None) -> str:
    if path is None:
        raise RlhfImgError(
            "hpsv3 was trained with one instruction, which is its authors': put INSTRUCTION and "
            "prompt_with_special_token of hpsv3/dataset/data_collator_qwen.py (github.com/MizzenAI/HPSv3), one after "
            "the other, into a text file, and give it as {reward: hpsv3, options: {template: FILE}}"
        )
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RlhfImgError(f"hpsv3: the template {path} cannot be read: {error.strerror}") from error
    if text.count("{text_prompt}") != 1 or text.count(TOKEN) != 1:
        raise RlhfImgError(f"hpsv3: the template {path} must have {{text_prompt}} once, and {TOKEN} once")
    return text


@lru_cache(maxsize=1)
def open_hpsv3(template: str, model: str, base: str) -> HPSv3:
    """Raises RlhfImgError if files are missing or do not fit together."""
    from transformers import AutoConfig, AutoTokenizer, Qwen2VLImageProcessorPil

    try:
        tokenizer = AutoTokenizer.from_pretrained(base)
        tokenizer.add_special_tokens({"additional_special_tokens": [TOKEN]}, replace_extra_special_tokens=False)
        tokenizer.padding_side = "right"
        images = Qwen2VLImageProcessorPil.from_pretrained(base, min_pixels=PIXELS, max_pixels=PIXELS)
        loaded, head = from_state(_weights(model), AutoConfig.from_pretrained(base))
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise RlhfImgError(
            f"HPSv3 cannot be opened from {model} (base {base}): {error}. Give a folder or hub id that holds {FILE} as "
            "the option `model`, and a Qwen2-VL as `base`"
        ) from error
    device, dtype = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    return HPSv3(model=loaded.eval().requires_grad_(False).to(device, dtype),
                 head=head.eval().requires_grad_(False).to(device), processor=QwenProcessor(images, tokenizer),
                 template=template)


def from_state(weights: Mapping[str, Tensor], config: Any) -> tuple[Any, nn.Sequential]:
    """The Qwen2-VL without its language head, and the head of the score, of a published state.

    weights: names with or without the `model.` and `language_model.` that newer versions of transformers have put
    before. The vocabulary's size is that of the weights. Raises RuntimeError if they do not fit the config.
    """
    from transformers import Qwen2VLModel

    state: dict[str, Tensor] = {}
    scoring: dict[str, Tensor] = {}
    for name, value in weights.items():
        bare = name.removeprefix("model.")
        if bare.startswith("rm_head."):
            scoring[bare.removeprefix("rm_head.")] = value.float()
        elif bare.startswith("visual."):
            state[bare] = value
        elif not bare.startswith("lm_head."):
            state[f"language_model.{bare.removeprefix('language_model.')}"] = value
    text = config.get_text_config()
    text.vocab_size = state["language_model.embed_tokens.weight"].shape[0]
    model, found = Qwen2VLModel.from_pretrained(None, config=config, state_dict=state, output_loading_info=True)
    if wrong := [*found["missing_keys"], *found["unexpected_keys"], *found["mismatched_keys"]]:
        raise RuntimeError(f"{len(wrong)} weights do not fit the base, {wrong[0]} among them")
    head = nn.Sequential(
        nn.Linear(text.hidden_size, 1024), nn.ReLU(), nn.Dropout(0.05), nn.Linear(1024, 16), nn.ReLU(), nn.Linear(16, 2)
    )
    head.load_state_dict(scoring)
    return model, head


def _weights(model: str) -> Mapping[str, Tensor]:
    folder = Path(model)
    if folder.is_dir():
        return load_file(folder / FILE)
    from huggingface_hub import hf_hub_download

    return load_file(hf_hub_download(model, FILE))
