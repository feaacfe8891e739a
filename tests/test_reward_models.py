"""Known reward models on tiny random ones of the same class: against a computation written out, in published names."""

import json
import math
import shutil
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_training import run
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Ask
from rlhf_img.judges.local import LocalJudge
from rlhf_img.judges.protocol import JudgeConfig
from rlhf_img.rewards import Images, Scores, load_rewards, score
from rlhf_img.rewards import hpsv3 as hps_room
from rlhf_img.rewards import image_reward as blip_room

CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
PROMPTS = ["a red circle", "two stars on grey", "a red circle"]
JUDGE = Path(blip_room.__file__).parent.parent / "playground" / "judge"


def pictures(size: tuple[int, int] = (50, 40), count: int = 3) -> Images:
    rng = np.random.default_rng(0)
    small = [Image.fromarray(rng.integers(0, 256, (6, 7, 3)).astype(np.uint8)) for _ in range(count)]
    return Images.from_pil([image.resize(size, Image.Resampling.BICUBIC) for image in small])


def scored(name: str, images: Images, prompts: Sequence[str] = PROMPTS, **options: Any) -> list[float]:
    (reward,) = load_rewards([{"reward": name, "options": options}])
    found: Scores = score([reward], prompts, images, max_unscored=1.0)
    low, high = reward.range
    assert all(math.isnan(v) or low <= v <= high for v in found.values_BK[:, 0].tolist())
    return found.values_BK[:, 0].tolist()


def centred(image: Image.Image, side: int) -> Tensor:
    """Short side, bicubic, centre, mean and deviation, as CLIP's authors have it: (1, 3, side, side)."""
    width, height = image.size
    ratio = side / min(width, height)
    image = image.resize((int(width * ratio), int(height * ratio)), Image.Resampling.BICUBIC)
    left, top = (image.width - side) // 2, (image.height - side) // 2
    x = torch.from_numpy(np.array(image.crop((left, top, left + side, top + side)))).permute(2, 0, 1) / 255
    return ((x - torch.tensor(CLIP_MEAN)[:, None, None]) / torch.tensor(CLIP_STD)[:, None, None])[None]


# CLIP: CLIPScore and PickScore.


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

    folder = tmp_path_factory.mktemp("clip")
    letters = "abcdefghijklmnopqrstuvwxyz"
    ends = {f"{c}</w>": i + 28 for i, c in enumerate(letters)}
    vocab = {"<|startoftext|>": 0, "<|endoftext|>": 1, **{c: i + 2 for i, c in enumerate(letters)}, **ends}
    CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77).save_pretrained(folder)
    # As the published files have it.
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "crop_size": 32, "do_center_crop": True, "do_normalize": True, "do_resize": True, "resample": 3, "size": 32,
        "feature_extractor_type": "CLIPFeatureExtractor", "image_mean": CLIP_MEAN, "image_std": CLIP_STD,
    }))  # fmt: skip
    torch.manual_seed(0)
    config = CLIPConfig(
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "vocab_size": len(vocab), "bos_token_id": 0, "eos_token_id": 1, "projection_dim": 24},
        vision_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 32, "patch_size": 8, "projection_dim": 24},
        projection_dim=24, logit_scale_init_value=math.log(20.0),
    )  # fmt: skip
    model = CLIPModel(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter) if parameter.ndim else 0
    model.save_pretrained(folder)
    if cosines(folder, PROMPTS, pictures()).mean() < 0:  # a cosine below 0 is taken as 0, which would show little
        model.text_projection.weight.data.neg_()
        model.save_pretrained(folder)
    return folder


def cosines(folder: Path, prompts: Sequence[str], images: Images) -> Tensor:
    """One text and one image at a time, without padding, through the parts of CLIP."""
    from transformers import AutoTokenizer, CLIPModel

    model, tokenizer = CLIPModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    with torch.no_grad():
        for prompt, image in zip(prompts, images, strict=True):
            read = model.text_model(torch.tensor([tokenizer(prompt)["input_ids"]])).pooler_output
            seen = model.vision_model(centred(image, 32)).pooler_output
            text, vision = model.text_projection(read)[0], model.visual_projection(seen)[0]
            found.append(text @ vision / text.norm() / vision.norm())
    return torch.stack(found)


def test_pickscore_is_the_models_logit(clip: Path) -> None:
    raw = 20.0 * cosines(clip, PROMPTS, pictures())
    found = scored("pickscore", pictures(), model=str(clip), processor=str(clip))
    torch.testing.assert_close(torch.tensor(found), raw.clamp_min(0), rtol=1e-4, atol=1e-4)
    assert raw.unique().numel() == 3 and max(found) > 0


def test_clipscore_is_two_and_a_half_cosines_of_the_prefixed_prompt(clip: Path) -> None:
    texts = [f"A photo depicts {prompt}" for prompt in PROMPTS]
    expected = (2.5 * cosines(clip, texts, pictures())).clamp_min(0)
    found = scored("clipscore", pictures(), model=str(clip))
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-4, atol=1e-4)
    other = scored("clipscore", pictures(), model=str(clip), prefix="")
    assert not np.allclose(found, other)


# BLIP: ImageReward, in the names of the published file.

SETTINGS = {
    "hidden_size": 48, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64, "hidden_act": "gelu", "layer_norm_eps": 1e-12, "encoder_width": 64,
}  # fmt: skip
WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *["a", "red", "circle", "two", "stars", "on", "grey"]]


def published_blip() -> dict[str, Tensor]:
    """A tiny random state with timm's names of the ViT and BERT's of the text encoder."""
    generator = torch.Generator().manual_seed(1)

    def drawn(*shape: int) -> Tensor:
        return 0.15 * torch.randn(shape, generator=generator)

    def linear(name: str, inner: int, outer: int) -> dict[str, Tensor]:
        return {f"{name}.weight": drawn(outer, inner), f"{name}.bias": drawn(outer)}

    def norm(name: str, width: int) -> dict[str, Tensor]:
        return {f"{name}.weight": 1 + drawn(width), f"{name}.bias": drawn(width)}

    v, t = "blip.visual_encoder", "blip.text_encoder"
    state = {
        f"{v}.cls_token": drawn(1, 1, 64), f"{v}.pos_embed": drawn(1, 17, 64),
        f"{v}.patch_embed.proj.weight": drawn(64, 3, 8, 8), f"{v}.patch_embed.proj.bias": drawn(64),
        **norm(f"{v}.norm", 64), f"{t}.embeddings.word_embeddings.weight": drawn(len(WORDS), 48),
        f"{t}.embeddings.position_embeddings.weight": drawn(64, 48), **norm(f"{t}.embeddings.LayerNorm", 48),
        f"{t}.embeddings.position_ids": torch.arange(64)[None], **linear("blip.vision_proj", 64, 8),
    }  # fmt: skip
    for i in range(2):
        b = f"{v}.blocks.{i}"
        state |= norm(f"{b}.norm1", 64) | linear(f"{b}.attn.qkv", 64, 192) | linear(f"{b}.attn.proj", 64, 64)
        state |= norm(f"{b}.norm2", 64) | linear(f"{b}.mlp.fc1", 64, 80) | linear(f"{b}.mlp.fc2", 80, 64)
        b = f"{t}.encoder.layer.{i}"
        for kind, width in (("attention", 48), ("crossattention", 64)):
            state |= linear(f"{b}.{kind}.self.query", 48, 48) | linear(f"{b}.{kind}.self.key", width, 48)
            state |= linear(f"{b}.{kind}.self.value", width, 48) | linear(f"{b}.{kind}.output.dense", 48, 48)
            state |= norm(f"{b}.{kind}.output.LayerNorm", 48)
        state |= linear(f"{b}.intermediate.dense", 48, 64) | linear(f"{b}.output.dense", 64, 48)
        state |= norm(f"{b}.output.LayerNorm", 48)
    widths = (48, 1024, 128, 64, 16, 1)
    for number, (inner, outer) in zip((0, 2, 4, 6, 7), pairwise(widths), strict=True):
        state |= linear(f"mlp.layers.{number}", inner, outer)
    return state


def slow_blip(state: dict[str, Tensor], ids: list[int], pixels: Tensor) -> float:
    """ImageReward written out from BLIP's paper on the published names, for one prompt and image."""

    def linear(name: str, x: Tensor) -> Tensor:
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def norm(name: str, x: Tensor, eps: float) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps)

    def attend(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
        q, k, v = (x.unflatten(-1, (heads, -1)).transpose(0, 1) for x in (q, k, v))
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5).softmax(-1)
        return (weights @ v).transpose(0, 1).flatten(1)

    v, t = "blip.visual_encoder", "blip.text_encoder"
    patches = F.conv2d(pixels, state[f"{v}.patch_embed.proj.weight"], state[f"{v}.patch_embed.proj.bias"], stride=8)
    x = torch.cat([state[f"{v}.cls_token"][0], patches[0].flatten(1).T]) + state[f"{v}.pos_embed"][0]
    for i in range(2):
        b = f"{v}.blocks.{i}"
        q, k, val = linear(f"{b}.attn.qkv", norm(f"{b}.norm1", x, 1e-6)).chunk(3, -1)
        x = x + linear(f"{b}.attn.proj", attend(q, k, val, 1))  # heads are 64 wide
        x = x + linear(f"{b}.mlp.fc2", F.gelu(linear(f"{b}.mlp.fc1", norm(f"{b}.norm2", x, 1e-6))))
    seen = norm(f"{v}.norm", x, 1e-6)
    e = f"{t}.embeddings"
    places = state[f"{e}.position_embeddings.weight"][: len(ids)]
    h = norm(f"{e}.LayerNorm", state[f"{e}.word_embeddings.weight"][ids] + places, 1e-12)
    for i in range(2):
        b = f"{t}.encoder.layer.{i}"
        for kind, source in (("attention", None), ("crossattention", seen)):
            a = f"{b}.{kind}"
            keys = h if source is None else source
            read = attend(*(linear(f"{a}.self.{p}", s) for p, s in (("query", h), ("key", keys), ("value", keys))), 4)
            h = norm(f"{a}.output.LayerNorm", linear(f"{a}.output.dense", read) + h, 1e-12)
        more = linear(f"{b}.output.dense", F.gelu(linear(f"{b}.intermediate.dense", h)))
        h = norm(f"{b}.output.LayerNorm", more + h, 1e-12)
    y = h[0]
    for number in (0, 2, 4, 6, 7):  # linear layers, with nothing between them
        y = linear(f"mlp.layers.{number}", y)
    return (y.item() - 0.16717362830052426) / 1.0333394966054072


@pytest.fixture(scope="module")
def blip(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Tensor]]:
    from transformers import BertTokenizer

    folder = tmp_path_factory.mktemp("blip")
    state = published_blip()
    torch.save(state, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(SETTINGS))
    BertTokenizer(vocab={word: i for i, word in enumerate(WORDS)}).save_pretrained(folder / "tokenizer")
    return folder, state


def test_imagereward_is_blip_and_a_head_on_the_first_token(blip: tuple[Path, dict[str, Tensor]]) -> None:
    folder, state = blip
    scorer = blip_room.open_image_reward(str(folder), str(folder / "tokenizer"))
    found = scorer(PROMPTS, pictures()).tolist()
    expected = [
        slow_blip(state, [2, *(WORDS.index(word) for word in prompt.split()), 3], centred(image, 32))
        for prompt, image in zip(PROMPTS, pictures(), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
    assert len(set(np.round(found, 4))) == 3
    cut = scored("imagereward", pictures(), model=str(folder), tokenizer=str(folder / "tokenizer"))
    np.testing.assert_allclose(cut, np.clip(found, -3, 3), rtol=1e-4)


def test_imagereward_reads_safetensors_too_and_says_what_does_not_fit(
    blip: tuple[Path, dict[str, Tensor]], tmp_path: Path
) -> None:
    folder, state = blip
    save_file({k: v.contiguous() for k, v in state.items()}, tmp_path / "ImageReward.safetensors")
    (tmp_path / "med_config.json").write_text(json.dumps(SETTINGS))
    words = str(folder / "tokenizer")
    one, other = (blip_room.open_image_reward(str(f), words)(PROMPTS, pictures()) for f in (folder, tmp_path))
    assert torch.equal(one, other)
    wrong = tmp_path / "wrong"
    shutil.copytree(folder, wrong)
    torch.save({k: v for k, v in state.items() if "blocks.1.norm2" not in k}, wrong / "ImageReward.pt")
    with pytest.raises(RlhfImgError, match=r"(?s)ImageReward cannot be opened.*layer_norm2"):
        blip_room.open_image_reward(str(wrong), words)


# Qwen2-VL: HPSv3.

TEMPLATE = "Rate a picture of {text_prompt} : <|Reward|> end"


@pytest.fixture(scope="module")
def hps(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, dict[str, Tensor]]:
    """A folder with base, weights in the published names and template; the base's model; the head."""
    from transformers import AutoTokenizer, Qwen2VLConfig, Qwen2VLForConditionalGeneration

    folder = tmp_path_factory.mktemp("hps")
    tokenizer = AutoTokenizer.from_pretrained(JUDGE)
    tokenizer.save_pretrained(folder)
    # As the published file has it: with limits on the size that HPSv3 does not keep to.
    (folder / "preprocessor_config.json").write_text(json.dumps({
        "min_pixels": 3136, "max_pixels": 12845056, "patch_size": 14, "temporal_patch_size": 2, "merge_size": 2,
        "image_mean": CLIP_MEAN, "image_std": CLIP_STD, "image_processor_type": "Qwen2VLImageProcessor",
    }))  # fmt: skip
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        text_config={"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
                     "num_key_value_heads": 1, "vocab_size": len(tokenizer) + 5, "bos_token_id": 0, "eos_token_id": 0,
                     "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}},
        vision_config={"depth": 2, "embed_dim": 32, "num_heads": 2, "hidden_size": 32, "patch_size": 14,
                       "mlp_ratio": 2},
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )  # fmt: skip
    config.save_pretrained(folder)
    config.text_config.vocab_size = len(tokenizer) + 1  # as `resize_token_embeddings` leaves it
    model = Qwen2VLForConditionalGeneration(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    widths = {0: (32, 1024), 3: (1024, 16), 5: (16, 2)}
    head = {f"rm_head.{n}.{part}": 0.2 * torch.randn(*shape) for n, (inner, outer) in widths.items()
            for part, shape in (("weight", (outer, inner)), ("bias", (outer,)))}  # fmt: skip
    save_file({**{k: v.contiguous().clone() for k, v in model.state_dict().items()}, **head}, folder / hps_room.FILE)
    (folder / "template.txt").write_text(TEMPLATE)
    return folder, model, head


def slow_hps(folder: Path, model: Any, head: dict[str, Tensor], prompt: str, image: Image.Image) -> Tensor:
    """One image without padding: by transformers' own classes, and the head by hand."""
    from transformers import AutoTokenizer, Qwen2VLImageProcessorPil

    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens("<|Reward|>", special_tokens=True)
    # Already of the size that it is brought to: 448 x 448 for a square.
    square = image.resize((448, 448), Image.Resampling.BICUBIC)
    seen = Qwen2VLImageProcessorPil()(images=[square], return_tensors="pt")
    assert seen["image_grid_thw"].tolist() == [[1, 32, 32]]
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": [{"type": "image"}, {"type": "text",
                                                           "text": TEMPLATE.replace("{text_prompt}", prompt)}]}],
        tokenize=False, add_generation_prompt=True,
    )  # fmt: skip
    ids = tokenizer(text.replace("<|image_pad|>", "<|image_pad|>" * 256), return_tensors="pt")["input_ids"]
    reward = tokenizer.convert_tokens_to_ids("<|Reward|>")
    words = model.get_input_embeddings()(ids)
    features = model.model.visual(seen["pixel_values"], grid_thw=seen["image_grid_thw"]).pooler_output
    embeds = words.masked_scatter((ids == model.config.image_token_id)[..., None], features)
    out = model.model.language_model(inputs_embeds=embeds, position_ids=torch.arange(ids.shape[1]).expand(3, 1, -1))
    x = out.last_hidden_state[ids == reward]
    for n in (0, 3, 5):
        x = F.linear(x if n == 0 else x.relu(), head[f"rm_head.{n}.weight"], head[f"rm_head.{n}.bias"])
    return x[0]


def test_hpsv3_reads_the_reward_token_with_positions_in_one_dimension(hps: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder, model, head = hps
    images = pictures((64, 64))
    scorer = hps_room.open_hpsv3(TEMPLATE, str(folder), str(folder))
    values, spread = scorer(PROMPTS, images)  # padded to the longest prompt
    with torch.no_grad():
        expected = torch.stack([slow_hps(folder, model, head, p, i) for p, i in zip(PROMPTS, images, strict=True)])
    torch.testing.assert_close(torch.stack([values, spread], 1), expected, rtol=1e-3, atol=1e-3)
    assert len(set(np.round(values.tolist(), 4))) == 3
    cut = scored("hpsv3", images, template=str(folder / "template.txt"), model=str(folder), base=str(folder))
    np.testing.assert_allclose(cut, values.clamp(-5, 15), rtol=1e-4, atol=1e-4)


def test_hpsv3_reads_older_names_of_weights(hps: tuple[Path, Any, dict[str, Tensor]], tmp_path: Path) -> None:
    from safetensors.torch import load_file

    folder = hps[0]
    older = {
        name.replace("model.visual.", "visual.").replace("model.language_model.", "model."): value
        for name, value in load_file(folder / hps_room.FILE).items()
    }
    assert any(name.startswith("model.layers.") for name in older)
    save_file(older, tmp_path / hps_room.FILE)
    images = pictures((64, 64), 1)
    scorers = [hps_room.open_hpsv3(TEMPLATE, str(f), str(folder)) for f in (folder, tmp_path)]
    one, other = (scorer(PROMPTS[:1], images)[0] for scorer in scorers)
    assert torch.equal(one, other)
    save_file({k: v for k, v in older.items() if "layers.1.mlp" not in k}, tmp_path / hps_room.FILE)
    hps_room.open_hpsv3.cache_clear()
    with pytest.raises(RlhfImgError, match="do not fit the base"):
        hps_room.open_hpsv3(TEMPLATE, str(tmp_path), str(folder))


@pytest.mark.parametrize(
    ("template", "message"),
    [(None, "its authors'"), ("nowhere.txt", "cannot be read"), ("Rate {text_prompt}", "must have")],
)
def test_hpsv3_needs_its_instruction(tmp_path: Path, template: str | None, message: str) -> None:
    options = {}
    if template is not None:
        options["template"] = str(tmp_path / template) if template.endswith(".txt") else str(tmp_path / "t.txt")
        (tmp_path / "t.txt").write_text(template)
    with pytest.raises(RlhfImgError, match=message):
        scored("hpsv3", pictures(), **options)


def test_a_prompt_cannot_ask_for_the_score_itself(hps: tuple[Path, Any, dict[str, Tensor]]) -> None:
    folder = hps[0]
    with pytest.raises(RlhfImgError, match="leave it out"):
        hps_room.open_hpsv3(TEMPLATE, str(folder), str(folder))(["a <|Reward|> star"], pictures((64, 64), 1))


# VQAScore.


def test_vqascore_is_p_yes_of_the_whole_prompt() -> None:
    images = pictures((64, 64))
    judge = LocalJudge.load(JudgeConfig(model="playground"))
    asks = [Ask(image=array, question=f'Does this image show "{prompt}"?')
            for prompt, array in zip(PROMPTS, images.arrays, strict=True)]  # fmt: skip
    expected = [answer.p_yes for answer in judge.ask(asks)]
    np.testing.assert_allclose(scored("vqascore", images), expected, rtol=1e-3)


def test_a_judges_failure_is_unscored(monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_img.judges.protocol import Answer

    monkeypatch.setattr(LocalJudge, "ask", lambda self, asks: [Answer(p_yes=None, reason="no idea") for _ in asks])
    assert all(math.isnan(value) for value in scored("vqascore", pictures((64, 64))))


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pickscore", {"model": "/nowhere", "processor": "/nowhere"}, "the CLIP /nowhere"),
        ("clipscore", {"model": "/nowhere"}, "the CLIP /nowhere"),
        ("imagereward", {"model": "/nowhere"}, "ImageReward cannot be opened"),
        ("vqascore", {"judge": {"model": "/nowhere"}}, "the judge /nowhere cannot be loaded"),
    ],
)
def test_weights_that_are_not_there_are_named(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(RlhfImgError, match=message):
        scored(name, pictures(), **options)


def test_the_list_says_what_each_needs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, ["reward", "list", "--json"]) == 0
    needs = {row["name"]: row["needs"] for row in json.loads(capsys.readouterr().out)}
    expected = {
        "pickscore": "yuvalkirstain/PickScore_v1", "hpsv3": "MizzenAI/HPSv3", "clipscore": "openai/clip",
        "imagereward": "THUDM/ImageReward", "vqascore": "a judge", "aesthetic": "reward train aesthetic",
        "rubric": "none",
    }  # fmt: skip
    assert all(words in needs[name] for name, words in expected.items())
