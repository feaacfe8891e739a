"""Requirements scored by a detector: tiny models of the real classes with random weights, and rules on given boxes."""

import itertools
import math

import numpy as np
import pytest
import torch
from test_rubrics_cli import call
from transformers import (
    BertTokenizer,
    CLIPTokenizer,
    GroundingDinoConfig,
    GroundingDinoForObjectDetection,
    GroundingDinoProcessor,
    Owlv2Config,
    Owlv2ForObjectDetection,
    Owlv2Model,
    Owlv2Processor,
    OwlViTConfig,
    OwlViTForObjectDetection,
    OwlViTProcessor,
)
from transformers.models.grounding_dino.image_processing_pil_grounding_dino import GroundingDinoImageProcessorPil
from transformers.models.owlv2.image_processing_pil_owlv2 import Owlv2ImageProcessorPil
from transformers.models.owlvit.image_processing_pil_owlvit import OwlViTImageProcessorPil

from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import FakeJudge
from rlhf_img.rewards.loading import load_rewards
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics import Detection, DetectorConfig, Requirement, Rubric, open_detector, score_all
from rlhf_img.rubrics.detector import LocalDetector, presence_of, score_boxes

SIDE = 32
WORDS = ["cat", "neon", "sign", "red", "blue", "star"]


def clip_tokenizer():
    """Letters, and the end as the highest id, by which OWL finds it."""
    letters = [f"{a}{end}" for a in "abcdefghijklmnopqrstuvwxyz" for end in ("", "</w>")]
    names = ["!", *letters, "<|startoftext|>", "<|endoftext|>"]
    vocab = {name: place for place, name in enumerate(names)}
    return CLIPTokenizer(vocab=vocab, merges=[], pad_token="!", model_max_length=32), len(vocab)


def save_owl(folder, model_class=Owlv2ForObjectDetection, family=(Owlv2Config, Owlv2ImageProcessorPil, Owlv2Processor)):
    config_class, pixels_class, processor_class = family
    words, size = clip_tokenizer()
    text = {"vocab_size": size, "hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "bos_token_id": 1,
            "num_attention_heads": 2, "max_position_embeddings": 32, "eos_token_id": size - 1}  # fmt: skip
    vision = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
              "image_size": SIDE, "patch_size": 8}  # fmt: skip
    config = config_class(text_config=text, vision_config=vision, projection_dim=32)
    pixels = pixels_class(size={"height": SIDE, "width": SIDE})
    torch.manual_seed(0)
    model = model_class(config)
    for name, parameter in model.named_parameters():
        if name.startswith(("box_head", "class_head")):
            parameter.data *= 0.2  # else nearly all boxes are points and nearly all scores 0 or 1
    for part in (model, processor_class(pixels, words)):
        part.save_pretrained(folder)


def save_dino(folder):
    # The model knows [CLS], [SEP], "." and "?" by these numbers of BERT's vocabulary.
    fixed = {"[PAD]": 0, "[UNK]": 100, "[CLS]": 101, "[SEP]": 102, "[MASK]": 103, ".": 1012, "?": 1029}
    free = (i for i in range(1100) if i not in fixed.values())
    vocab = fixed | {word: next(free) for word in [*WORDS, "##s"]} | {f"[unused{i}]": i for i in free}
    text = {"model_type": "bert", "vocab_size": 1100, "hidden_size": 32, "num_hidden_layers": 1,
            "num_attention_heads": 2, "intermediate_size": 32, "max_position_embeddings": 32}  # fmt: skip
    backbone = {"model_type": "swin", "embed_dim": 16, "depths": [1, 1, 1], "num_heads": [2, 2, 2], "window_size": 2,
                "image_size": SIDE, "out_indices": [2, 3]}  # fmt: skip
    config = GroundingDinoConfig(
        text_config=text, backbone_config=backbone, d_model=32, encoder_layers=1, decoder_layers=2, num_queries=12,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=32, decoder_ffn_dim=32,
        num_feature_levels=2, max_text_len=24, disable_custom_kernels=True,
    )  # fmt: skip
    pixels = GroundingDinoImageProcessorPil(size={"shortest_edge": SIDE, "longest_edge": 2 * SIDE})
    torch.manual_seed(0)
    for part in (GroundingDinoForObjectDetection(config), GroundingDinoProcessor(pixels, BertTokenizer(vocab=vocab))):
        part.save_pretrained(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    found = {name: tmp_path_factory.mktemp(name) for name in ("owl", "dino")}
    save_owl(found["owl"])
    save_dino(found["dino"])
    return {name: str(folder) for name, folder in found.items()}


def open_at(folder, **settings):
    return LocalDetector.load(DetectorConfig(model=folder, device="cpu", **settings))


RNG = np.random.default_rng(0)
WIDE = RNG.integers(0, 256, (24, 48, 3), dtype=np.uint8)
TALL = RNG.integers(0, 256, (48, 24, 3), dtype=np.uint8)
NOUNS = ["cat", "neon sign", "red star"]


def rows(seen):
    """(noun, score, box) of all boxes, as an array for each noun."""
    return {noun: np.array([[d.score, *d.box] for d in boxes]).reshape(-1, 5) for noun, boxes in seen.items()}


def same(a, b):
    a, b = rows(a), rows(b)
    return a.keys() == b.keys() and all(len(a[n]) == len(b[n]) and np.allclose(a[n], b[n], atol=1e-4) for n in a)


@pytest.mark.parametrize("image, scale", [(WIDE, (1, 2)), (TALL, (2, 1))])
def test_owl_boxes_on_a_padded_image_are_fractions_of_the_image_itself(folders, image, scale):
    detector = open_at(folders["owl"])
    square = np.zeros((48, 48, 3), np.uint8)
    square[: image.shape[0], : image.shape[1]] = image
    (found,), (whole,) = detector.detect([image], [["cat"]]), detector.detect([square], [["cat"]])
    expected = rows(whole)["cat"]
    expected[:, 1:] = (expected[:, 1:] * [*scale, *scale]).clip(0, 1)
    expected = expected[(expected[:, 1] < expected[:, 3]) & (expected[:, 2] < expected[:, 4])]
    assert len(expected) > 4 and np.allclose(rows(found)["cat"], expected, atol=1e-4)
    assert not np.allclose(rows(found)["cat"][:, 1:], rows(whole)["cat"][: len(expected), 1:], atol=0.05)


def test_the_first_owl_squeezes_images_and_its_boxes_are_fractions_of_them(tmp_path):
    save_owl(tmp_path, OwlViTForObjectDetection, (OwlViTConfig, OwlViTImageProcessorPil, OwlViTProcessor))
    detector = open_at(str(tmp_path))
    heard = []
    detector._model.register_forward_hook(lambda *call: heard.append(call[2].pred_boxes[0]))
    (seen,) = detector.detect([WIDE], [["cat"]])
    x, y, w, h = heard[0].unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clip(0, 1).tolist()
    assert len(boxes) == 16 and np.allclose(sorted(boxes), sorted(d.box for d in seen["cat"]), atol=1e-5)


def test_dino_boxes_are_fractions_of_the_image_and_scores_the_mean_over_a_nouns_tokens(folders):
    detector = open_at(folders["dino"])
    heard = []
    hook = detector._model.register_forward_hook(lambda *call: heard.append(call[2:]), with_kwargs=True)
    (seen,) = detector.detect([WIDE], [["Red Star", "neon signs"]])
    hook.remove()
    inputs, outputs = heard[0]
    # [CLS] red star . neon sign ##s . [SEP]
    words = detector._processor.tokenizer.convert_ids_to_tokens(inputs["input_ids"][0].tolist())
    assert words == ["[CLS]", "red", "star", ".", "neon", "sign", "##s", ".", "[SEP]"]
    p = outputs.logits[0].sigmoid()
    scores = torch.stack([p[:, 1:3].mean(-1), p[:, 4:7].mean(-1)], -1)
    x, y, w, h = outputs.pred_boxes[0].unbind(-1)
    boxes = torch.stack([x - w / 2, y - h / 2, x + w / 2, y + h / 2], -1).clip(0, 1)
    for place, noun in enumerate(("Red Star", "neon signs")):
        own = scores.argmax(-1) == place
        order = scores[own, place].argsort(descending=True)
        expected = torch.cat([scores[own, place, None], boxes[own]], -1)[order].numpy()
        assert np.allclose(rows(seen)[noun], expected, atol=1e-5)
    assert sum(len(boxes) for boxes in seen.values()) == 12


@pytest.mark.parametrize("name", ["owl", "dino"])
def test_a_box_is_one_nouns_and_a_batch_gives_what_each_image_gives_alone(folders, name):
    detector = open_at(folders[name], batch_size=2)
    images, nouns = [WIDE, TALL, WIDE[::-1].copy(), WIDE[:, ::-1].copy()], [NOUNS, ["cat"], NOUNS, NOUNS[::-1]]
    together = detector.detect(images, nouns)
    alone = [detector.detect([image], [words])[0] for image, words in zip(images, nouns, strict=True)]
    assert all(same(a, b) for a, b in zip(together, alone, strict=True)) and not same(together[0], together[2])
    assert set(together[0]) == set(NOUNS) and set(together[1]) == {"cat"}
    boxes = [d.box for found in together[0].values() for d in found]
    assert boxes and len(set(boxes)) == len(boxes)
    scores = [d.score for d in together[1]["cat"]]
    assert scores == sorted(scores, reverse=True) and all(0 < s < 1 for s in scores)


def test_texts_longer_than_the_model_reads(folders):
    long = "a very long name of a thing that no text encoder reads to its end"
    assert open_at(folders["owl"]).detect([WIDE], [[long]])[0][long]
    dino = open_at(folders["dino"])
    (seen,) = dino.detect([WIDE], [[f"{word} star cat" for word in (*WORDS, "zoo")]])
    assert set(seen) < {f"{word} star cat" for word in (*WORDS, "zoo")} and len(seen) == 6
    assert dino.detect([WIDE], [["?"]]) == [{}]


def test_one_forward_pass_serves_all_requirements_of_an_image(folders):
    detector = open_at(folders["owl"])
    calls = []
    detector._model.register_forward_hook(lambda *call: calls.append(1))
    rubric = rubric_of(
        {"check": "object", "target": "cat"}, {"check": "count", "target": "dog", "equals": 2},
        {"check": "relation", "subject": "cat", "is": "above", "object": "dog"}, {"check": "vqa", "ask": "Is it dawn?"},
    )  # fmt: skip
    (result,) = score_all([rubric], [WIDE], detector=detector)
    assert len(calls) == 1
    assert [r.score is None for r in result.requirements] == [False, False, False, True]
    assert folders["owl"] in result.requirements[0].evidence


def test_what_cannot_be_a_detector_is_a_user_error_that_says_what_to_give(folders, tmp_path):
    def refused(match, **settings):
        with pytest.raises(RlhfImgError, match=match):
            open_detector(DetectorConfig(**settings))

    refused("(?s)cannot be loaded.*Grounding DINO, such as", model=str(tmp_path / "none"))
    clip_tokenizer()[0].save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text('{"model_type": "bert"}')
    refused("(?s)cannot be loaded.*Grounding DINO, such as", model=str(tmp_path))
    save_owl(tmp_path / "headless", Owlv2Model)
    refused("no weights for .*box.*Give the whole one", model=str(tmp_path / "headless"))
    refused("cannot run on cuda:77.*Give another device", model=folders["owl"], device="cuda:77")
    for wrong in ({"threshold": 0.0}, {"threshold": 1.0}, {"nms_iou": 1.5}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="given"):
            DetectorConfig(model="any", **wrong)


# The rules, on boxes that are given.

T = 0.2
CONFIG = DetectorConfig(model="boxes", threshold=T, nms_iou=0.5)


def box(score, left, top=0.4, side=0.2):
    return Detection(score=score, box=(left, top, left + side, top + side))


def requirement(**fields):
    return Requirement.model_validate({"id": "r", **fields})


def judged(seen, size=(64, 64), **fields):
    return score_boxes(requirement(**fields), seen, size, CONFIG)


def rubric_of(*requirements):
    return Rubric.model_validate(
        {"prompt": "p", "requirements": [{"id": f"r{i}"} | r for i, r in enumerate(requirements)]}
    )


def test_presence_is_half_at_the_threshold_and_rises_with_the_score():
    scores = np.linspace(0, 1, 101).tolist()
    for threshold in (0.1, 0.2, 0.35):
        values = [presence_of(score, threshold) for score in scores]
        assert values[0] == 0 and values[-1] == 1 and all(a < b for a, b in itertools.pairwise(values))
        assert presence_of(threshold, threshold) == 0.5
    assert presence_of(0.5, 0.2) == pytest.approx(0.8)  # even odds against odds of 1 to 4
    assert presence_of(0.1, 0.2) == pytest.approx(4 / 13)


@pytest.mark.parametrize("score, there", [(T, True), (math.nextafter(T, 0) - 1e-9, False), (0.6, True), (0.0, False)])
def test_object_and_absent_turn_at_the_threshold(score, there):
    seen = {"cat": [box(score, 0.1), box(score / 9, 0.6)]}
    present = judged(seen, check="object", target="cat")
    absent = judged(seen, check="object", target="cat", expect="absent")
    assert (present.score >= 0.5) is there and (absent.score >= 0.5) is not there
    assert present.score == presence_of(score, T) and len(present.boxes) == there
    assert "boxes at 0.2: " in present.evidence and f"best score {score:.2f}" in present.evidence


def test_nothing_seen_is_absent_and_not_unscored():
    assert judged({"cat": []}, check="object", target="cat").score == 0
    assert judged({"cat": []}, check="object", target="cat", expect="absent").score == 1
    assert judged({"cat": []}, check="count", target="cat", equals=0).score == 1


def test_count_takes_each_thing_once_and_is_soft_on_both_sides():
    def count(boxes, wanted):
        return judged({"cat": boxes}, check="count", target="cat", equals=wanted).score

    sure = [box(0.5, 0.0), box(0.5, 0.4), box(0.5, 0.8)]  # presence 0.8
    assert count(sure, 3) == pytest.approx(0.5 + 0.5 * 0.6)
    assert count(sure, 2) == pytest.approx(0.5 * math.exp(-(2.4 - 2)))
    assert count(sure, 9) < count(sure, 5) < count(sure, 4) < 0.5
    nearly = [*sure, box(0.19, 0.6, top=0.0)]
    assert 0.5 <= count(nearly, 3) < count(sure, 3) and count(sure, 4) < count(nearly, 4) < 0.5
    assert count([*sure, box(T, 0.6, top=0.0)], 4) >= 0.5
    # what is far below the threshold is no thing, however many there are
    assert count([*sure, *(box(0.01, x, top=0.7) for x in (0, 0.2, 0.4, 0.6, 0.8))], 3) == count(sure, 3)


@pytest.mark.parametrize("shift, things", [(0.0, 1), (0.06, 1), (0.0666, 1), (0.067, 2), (0.1, 2), (0.3, 2)])
def test_boxes_of_one_noun_that_overlap_by_more_than_nms_iou_are_one_thing(shift, things):
    # side 0.2: intersection over union (0.2 - shift) / (0.2 + shift), which is 0.5 at a shift of 0.0667
    seen = {"cat": [box(0.4, 0.3), box(0.5, 0.3 + shift)], "dog": [box(0.9, 0.3)]}
    found = judged(seen, check="count", target="cat", equals=things)
    assert found.score >= 0.5 and len(found.boxes) == things and found.boxes[0][0] == 0.3 + shift


def test_a_box_that_was_suppressed_suppresses_nothing():
    seen = {"cat": [box(0.9, 0.30), box(0.8, 0.35), box(0.7, 0.40)]}
    assert judged(seen, check="count", target="cat", equals=2).score >= 0.5


BESIDE = {"cat": [box(0.8, 0.0)], "dog": [box(0.8, 0.7)]}
ABOVE = {"cat": [box(0.8, 0.4, top=0.0)], "dog": [box(0.8, 0.4, top=0.7)]}


@pytest.mark.parametrize(
    "seen, holds",
    [(BESIDE, {"left of"}), (ABOVE, {"above"}),
     ({"cat": BESIDE["dog"], "dog": BESIDE["cat"]}, {"right of"}),
     ({"cat": ABOVE["dog"], "dog": ABOVE["cat"]}, {"below"}),
     ({"cat": [box(0.8, 0.4)], "dog": [box(0.8, 0.45)]}, set())],
)  # fmt: skip
def test_relations_go_from_centre_to_centre(seen, holds):
    relations = ("left of", "right of", "above", "below")
    found = {
        name: judged(seen, check="relation", subject="cat", **{"is": name}, object="dog").score for name in relations
    }
    assert {name for name, score in found.items() if score >= 0.5} == holds
    assert judged(seen, check="relation", subject="cat", **{"is": "on top of"}, object="dog").score == found["above"]


def test_a_relation_is_measured_in_pixels_and_not_in_fractions():
    # a quarter to the right and a fifth down: right of on a wide image, and nearly straight below on a tall one
    seen = {"cat": [box(0.8, 0.5, top=0.45)], "dog": [box(0.8, 0.25, top=0.25)]}

    def of(name, size):
        return judged(seen, size, check="relation", subject="cat", **{"is": name}, object="dog").score >= 0.5

    assert of("right of", (64, 128)) and not of("below", (64, 128))
    assert of("below", (128, 64)) and not of("right of", (128, 64))


def test_every_thing_stands_in_the_relation_and_what_is_not_there_in_none():
    def left_of(seen):
        return judged(seen, check="relation", subject="cat", **{"is": "left of"}, object="dog").score

    assert left_of(BESIDE) == pytest.approx(presence_of(0.8, T))
    assert left_of(BESIDE | {"cat": [box(0.8, 0.0), box(0.8, 0.75)]}) < 0.5
    assert left_of(BESIDE | {"cat": [box(0.1, 0.0)]}) == pytest.approx(presence_of(0.1, T))
    assert left_of(BESIDE | {"cat": []}) == 0


@pytest.mark.parametrize(
    "fields",
    [{"check": "color", "target": "cat", "equals": "red"}, {"check": "size", "target": "cat", "equals": "small"},
     {"check": "background", "equals": "red"}, {"check": "style", "equals": "watercolor"},
     {"check": "text", "equals": "NO"}, {"check": "vqa", "ask": "Is it dawn?"}, {"check": "mine.py:check"},
     {"check": "relation", "subject": "cat", "is": "behind", "object": "dog"}],
)  # fmt: skip
def test_what_boxes_cannot_tell_is_unscored_and_says_so(fields):
    found = judged({"cat": [box(0.9, 0)], "dog": [box(0.9, 0)]}, **fields)
    assert found.score is None and "a judge can; a detector tells object, count and relation" in found.evidence


def test_a_noun_without_room_is_unscored():
    found = judged({}, check="object", target="cat")
    assert found.score is None and "no room for 'cat'" in found.evidence


# Who is asked.

GREY = np.full((64, 64, 3), 128, np.uint8)


class Boxes:
    """Sees the same on every image, and keeps what it was asked for."""

    config = CONFIG

    def __init__(self, **seen):
        self.seen, self.asked = seen, []

    def detect(self, images, nouns):
        self.asked += [sorted(set(words)) for words in nouns]
        return [{noun: self.seen.get(noun, []) for noun in words} for words in nouns]


def test_first_the_check_then_the_detector_then_the_judge_and_via_one_alone():
    rubric = rubric_of(
        {"id": "circle", "check": "object", "target": "circle"},
        {"id": "cat", "check": "object", "target": "cat"},
        {"id": "behind", "check": "relation", "subject": "cat", "is": "behind", "object": "dog"},
        {"id": "star", "check": "object", "target": "star", "via": "detector"},
        {"id": "owl", "check": "object", "target": "owl", "via": "vlm"},
        {"id": "hen", "check": "object", "target": "hen", "via": "cv"},
        {"id": "red", "check": "color", "target": "cat", "equals": "red", "via": "detector"},
    )
    detector, asked = Boxes(cat=[box(0.5, 0.1)], star=[box(0.05, 0.1)]), []
    judge = FakeJudge(answer=lambda ask: asked.append(ask.question) or 0.9)
    results = score_all([rubric] * 2, [GREY] * 2, judge, detector)
    assert detector.asked == [["cat", "star"]] * 2
    assert asked == ["Is the cat behind the dog?", "Is there an owl in the image?"] * 2
    scores = {r.id: r.score for r in results[1].requirements}
    assert scores == {"circle": 0.0, "cat": pytest.approx(0.8), "behind": 0.9, "star": presence_of(0.05, T), "owl": 0.9,
                      "hen": None, "red": None}  # fmt: skip
    assert results[0] == results[1]


def test_via_detector_without_a_detector_is_unscored_and_no_judge_is_asked():
    rubric = rubric_of({"check": "object", "target": "circle", "via": "detector"})
    (result,) = score_all([rubric], [GREY], FakeJudge(answer=lambda ask: 1.0))
    (one,) = result.requirements
    assert one.score is None and result.total is None
    assert one.evidence == "via: detector needs a detector; none was given"


def test_the_reward_takes_the_settings_of_a_detector(folders):
    images = Images(torch.full((2, 3, 32, 32), 0.5))
    own = [rubric_of({"check": "object", "target": "cat"})] * 2
    options = {"detector": {"model": folders["owl"], "threshold": 0.4, "device": "cpu", "batch_size": 1}}
    (reward,) = load_rewards([{"reward": "rubric", "options": options}])
    verdicts = reward.fn(prompts=["p"] * 2, images=images, rubrics=own)
    assert all(0 < v.value < 1 and " at 0.4: " in v.details.requirements[0].evidence for v in verdicts)
    (reward,) = load_rewards([{"reward": "rubric", "options": {"detector": {"model": "any", "treshold": 0.4}}}])
    with pytest.raises(RlhfImgError, match="threshold"):
        reward.fn(prompts=["p"] * 2, images=images, rubrics=own)


def test_score_takes_a_detector_on_the_command_line(folders, tmp_path):
    from PIL import Image

    image, rubric = tmp_path / "i.png", tmp_path / "r.yaml"
    Image.fromarray(WIDE).save(image)
    rubric.write_text("{prompt: p, requirements: [{id: cat, check: object, target: cat}]}")
    said = call("score", image, rubric, "--json", "--detector", folders["owl"], "--detector-threshold", 0.45).stdout
    assert f"{folders['owl']} at 0.45: " in said
    assert "needs --detector" in str(call("score", image, rubric, "--detector-threshold", 0.3).exception)
    wrong = call("score", image, rubric, "--detector", folders["owl"], "--detector-threshold", 2).exception
    assert isinstance(wrong, RlhfImgError) and "between 0 and 1" in str(wrong)
