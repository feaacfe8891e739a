"""The judge in this process: tiny models with random weights, of the classes that real judges have."""

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Ask, JudgeConfig, open_judge, protocol
from rlhf_img.judges.local import LocalJudge


def tiny_tokenizer(image):
    """A byte-level tokenizer with whole tokens for yes, no and what marks an image; `image` is what a template puts."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    core = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    core.add_tokens(["Yes", "No"])
    template = (
        "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}IMAGE{% else %}"
        "{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}assistant: "
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="<pad>", eos_token="<|end|>", chat_template=template.replace("IMAGE", image),
        additional_special_tokens=["<image>", "<|image_pad|>", "<|vision_start|>", "<|vision_end|>"],
    )  # fmt: skip


TEXT = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}  # fmt: skip


def tiny_qwen():
    mark = "<|vision_start|><|image_pad|><|vision_end|>"
    words = tiny_tokenizer(mark)
    ids = dict(zip(("vision_start", "image", "vision_end"), words.encode(mark), strict=True))
    vision = {"depth": 1, "hidden_size": 32, "intermediate_size": 32, "num_heads": 2, "out_hidden_size": 32,
              "patch_size": 8, "num_position_embeddings": 16, "deepstack_visual_indexes": [0]}  # fmt: skip
    rope = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
    config = Qwen3VLConfig(text_config=TEXT | {"rope_parameters": rope}, vision_config=vision,
                           **{f"{name}_token_id": token for name, token in ids.items()})  # fmt: skip
    size = {"shortest_edge": 256, "longest_edge": 4096}
    pixels = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, temporal_patch_size=2, size=size)
    return Qwen3VLForConditionalGeneration(config), [pixels, words]


def tiny_llava():
    words = tiny_tokenizer("<image>")
    vision = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2,
              "num_attention_heads": 2, "image_size": 32, "patch_size": 8, "projection_dim": 32}  # fmt: skip
    config = LlavaConfig(text_config=TEXT | {"model_type": "llama"}, vision_config=vision,
                         image_token_id=words.convert_tokens_to_ids("<image>"))  # fmt: skip
    pixels = CLIPImageProcessorPil(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})
    processor = LlavaProcessor(pixels, words, patch_size=8, vision_feature_select_strategy="default",
                               num_additional_image_tokens=1, chat_template=words.chat_template)  # fmt: skip
    return LlavaForConditionalGeneration(config), [processor]


@pytest.fixture(scope="module", params=[tiny_qwen, tiny_llava])
def judge(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    model, parts = request.param()
    for part in (model, *parts):
        part.save_pretrained(folder)
    return LocalJudge.load(JudgeConfig(model=str(folder), concurrency=3, max_tokens=4))


RNG = np.random.default_rng(0)
ASKS = [
    Ask(image=RNG.integers(0, 256, (height, width, 3), dtype=np.uint8), question=question)
    for height, width, question in ((32, 32, "A cat?"), (48, 32, "Is anything red?"), (32, 64, "Two?"), (40, 40, "?"))
]


def test_a_batch_gives_what_each_question_gives_alone_and_what_the_logits_say(judge, monkeypatch):
    monkeypatch.setattr(protocol, "MIN_MASS", 0.0)
    answers = judge.ask(ASKS)
    alone = [judge.ask([ask])[0].p_yes for ask in ASKS]
    assert [a.p_yes for a in answers] == pytest.approx(alone, abs=1e-4) and len(set(alone)) == len(ASKS)
    seen = []
    hook = judge._model.register_forward_hook(lambda *call: seen.append(call[-1].logits[0, -1]))
    judge.ask(ASKS[:1])
    hook.remove()
    yes, no = seen[0][judge._tokenizer.convert_tokens_to_ids(["Yes", "No"])].tolist()
    assert answers[0].p_yes == pytest.approx(1 / (1 + np.exp(no - yes)), abs=1e-4)


def test_what_is_neither_yes_nor_no_is_unscored_and_counted(judge):
    before = judge.usage.failures
    answers = judge.ask(ASKS)
    assert all(a.p_yes is None and "neither" in a.reason for a in answers)
    assert judge.usage.failures == before + len(ASKS) and "logits" in judge.id


def test_a_reply_that_does_not_end_is_none(judge):
    (reply,) = judge.chat([[{"role": "user", "content": "Say something."}]], {})
    assert reply.text is None and "max_tokens" in reply.reason


def test_what_cannot_be_a_judge_is_a_user_error(tmp_path):
    with pytest.raises(RlhfImgError, match="cannot be loaded"):
        open_judge(JudgeConfig(model=str(tmp_path)))
