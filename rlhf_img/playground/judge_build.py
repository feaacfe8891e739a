"""The playground's judge before it has learned: a Qwen3-VL in small, its tokenizer and its image processor."""

from collections.abc import Iterable

import torch
from tokenizers import AddedToken, Regex, normalizers
from transformers import PreTrainedTokenizerFast, Qwen3VLConfig, Qwen3VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlhf_img.playground.build import train_bpe
from rlhf_img.playground.captions import SHAPE_WORDS, plural
from rlhf_img.playground.scene import SIZE

PATCH, MERGE = 8, 2
"""Side of a vision token in pixels, and of an image token in vision tokens: no two things have their centres in the
same image token."""
GRID = SIZE // (PATCH * MERGE)
"""Image tokens along a side of an image."""
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
"""How the chat template marks an image; the processor repeats the middle token GRID * GRID times."""
ANSWER = "<|answer|>"
"""What a prompt ends with: the next token is the answer."""
_SPECIAL = ("<|endoftext|>", ANSWER, "<|vision_start|>", "<|image_pad|>", "<|vision_end|>")
_TEMPLATE = (
    "{% for m in messages %}{% for c in m.content %}{% if c.type == 'image' %}" + IMAGE
    + "{% else %}{{ c.text }}{% endif %}{% endfor %}{% endfor %}{% if add_generation_prompt %}" + ANSWER + "{% endif %}"
)  # fmt: skip


def synonyms() -> normalizers.Sequence:
    """Turns the captions' other words for shapes into those that the questions of the training use."""
    pairs = [(word, shape) for shape, words in SHAPE_WORDS.items() for word in sorted(set(words) - {shape})]
    pairs = [(plural(word), plural(shape)) for word, shape in pairs] + pairs
    return normalizers.Sequence([normalizers.Replace(Regex(rf"\b{old}\b"), new) for old, new in pairs])


def build_judge_tokenizer(questions: Iterable[str], suffix: str) -> PreTrainedTokenizerFast:
    """A BPE in which every word of the questions is one token, as are "Yes" and "No".

    suffix: the words that every question ends with. They are one token too, as reading them again and again would be
    half of the work.
    """
    core = train_bpe([*[*questions, "Yes", "No"] * 2], _SPECIAL, min_frequency=2)
    core.normalizer = synonyms()
    core.add_tokens([AddedToken(suffix, normalized=False)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=_SPECIAL[0],
        eos_token=_SPECIAL[0],
        additional_special_tokens=list(_SPECIAL[1:]),
        padding_side="left",
        model_max_length=512,
        chat_template=_TEMPLATE,
    )


def build_image_processor() -> Qwen2VLImageProcessorPil:
    """Brings an image of any size to about 64 x 64 px in [-1, 1], cut into patches."""
    return Qwen2VLImageProcessorPil(
        patch_size=PATCH,
        merge_size=MERGE,
        temporal_patch_size=1,
        size={"shortest_edge": SIZE * SIZE, "longest_edge": SIZE * SIZE},
        image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    )


def build_judge(tokenizer: PreTrainedTokenizerFast, seed: int = 0) -> Qwen3VLForConditionalGeneration:
    """About 2 M random parameters, the same for the same seed: four layers that see and four that read, 128 wide."""
    config = Qwen3VLConfig(
        text_config={
            "vocab_size": len(tokenizer),
            "hidden_size": 128,
            "intermediate_size": 320,
            "num_hidden_layers": 4,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": 512,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1000.0, "mrope_section": [6, 5, 5]},
            "pad_token_id": tokenizer.pad_token_id,
        },
        vision_config={
            "depth": 4,
            "hidden_size": 128,
            "intermediate_size": 384,
            "num_heads": 4,
            "out_hidden_size": 128,
            "patch_size": PATCH,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": 1,
            "num_position_embeddings": (SIZE // PATCH) ** 2,
            "deepstack_visual_indexes": [],
        },
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
        vision_start_token_id=tokenizer.convert_tokens_to_ids("<|vision_start|>"),
        vision_end_token_id=tokenizer.convert_tokens_to_ids("<|vision_end|>"),
        tie_word_embeddings=True,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(config)
        with torch.no_grad():
            # The default deviation, 0.02, is made for wide layers: narrow ones would hardly let a signal through.
            for weight in (p for p in model.parameters() if p.dim() > 1):
                weight.normal_(std=weight[0].numel() ** -0.5)
    return model
