"""The aesthetic reward: its loss by hand, what it learns from pairs, and that it goes on where it was stopped."""

import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import run

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards import Images, load_rewards, score
from rlhf_img.rewards import aesthetic_training as room
from rlhf_img.rewards.aesthetic_model import load_head, open_features
from rlhf_img.rewards.aesthetic_training import AestheticTraining, train_aesthetic
from rlhf_img.rewards.artifact_model import load_detector
from rlhf_img.rewards.preference import bradley_terry, fingerprint, fitted_scale, measured, part_of
from rlhf_img.training.pairs import Pair, encode_image, read_pairs, write_pairs

QUICK = AestheticTraining(steps=60, pairs=32, save_every=20, hidden=8)


def picture(rng: np.random.Generator, warm: bool, size: tuple[int, int] = (32, 32)) -> bytes:
    """Noise on a warm or a cold ground."""
    array = rng.integers(0, 60, (*size, 3))
    array[..., 0 if warm else 2] += 150
    return encode_image(Image.fromarray(array.astype(np.uint8)))


def warm_ones(count: int = 120, mixed: bool = False) -> list[Pair]:
    """Pairs whose warmer image is preferred; a prompt each. `mixed`: of two sizes."""
    rng = np.random.default_rng(0)
    sizes = [(32, 32), (48, 32)] if mixed else [(32, 32)]
    return [Pair(prompt=f"prompt {i}", chosen=picture(rng, True, sizes[i % len(sizes)]),
                 rejected=picture(rng, False, sizes[i % len(sizes)])) for i in range(count)]  # fmt: skip


def turned(pairs: list[Pair]) -> list[Pair]:
    return [Pair(prompt=p.prompt, chosen=p.rejected, rejected=p.chosen) for p in pairs]


def reader(pairs: list[Pair]) -> Any:
    return lambda: iter(pairs)


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    out = tmp_path_factory.mktemp("aesthetic") / "warm.safetensors"
    return out, train_aesthetic(out, QUICK, reader(warm_ones()))


def test_the_loss_by_hand_and_its_slope() -> None:
    margin = torch.tensor([0.0, 1.0, -2.0], requires_grad=True)
    loss = bradley_terry(margin)
    expected = [math.log(2), math.log1p(math.exp(-1)), math.log1p(math.exp(2))]
    torch.testing.assert_close(loss, torch.tensor(expected))
    loss.sum().backward()
    assert margin.grad is not None and (margin.grad < 0).all()  # a larger margin is always better
    torch.testing.assert_close(margin.grad[0], torch.tensor(-0.5))


def test_the_scale_is_the_likeliest_one() -> None:
    # 3 of 4 right at |margin| 1: sigmoid(scale) = 3/4
    margin = torch.tensor([1.0, 1.0, 1.0, -1.0])
    assert fitted_scale(margin) == pytest.approx(math.log(3), rel=1e-4)
    assert fitted_scale(10 * margin) == pytest.approx(math.log(3) / 10, rel=1e-4)
    assert fitted_scale(torch.tensor([1.0, 2.0])) == pytest.approx(1.0)  # never wrong: no surer than it was
    assert fitted_scale(torch.tensor([-1.0, -2.0])) == pytest.approx(1e-3)


def test_what_is_measured_by_hand() -> None:
    found = measured(torch.tensor([2.0, 0.5, 0.0, -1.0]))
    assert found["accuracy"] == 2.5 / 4 and found["accuracy_low"] < 2.5 / 4 < found["accuracy_high"]
    assert found["loss"] == pytest.approx(sum(math.log1p(math.exp(-m)) for m in (2.0, 0.5, 0.0, -1.0)) / 4)
    sure = measured(torch.full((50,), 0.0))
    assert sure["accuracy"] == 0.5 and sure["loss"] == pytest.approx(math.log(2)) and sure["calibration_error"] < 1e-6


def test_no_prompt_is_in_two_parts_and_tenths_are_held_out() -> None:
    parts = [part_of(f"prompt {i}") for i in range(3000)]
    assert 0.08 < parts.count("heldout") / 3000 < 0.12 and 0.08 < parts.count("val") / 3000 < 0.12
    assert part_of("a star") == part_of("a star")
    _, sizes = fingerprint(reader(warm_ones()))
    assert sum(sizes.values()) == 120


def test_the_fingerprint_sees_a_turned_pair() -> None:
    pairs = warm_ones()
    assert fingerprint(reader(pairs))[0] == fingerprint(reader(list(pairs)))[0]
    assert fingerprint(reader(pairs))[0] != fingerprint(reader([*turned(pairs[:1]), *pairs[1:]]))[0]


def test_features_are_the_frozen_networks_pooled_by_hand() -> None:
    features = open_features("artifact")
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        places = load_detector().net.embed(x)
    expected = torch.cat([places.mean((2, 3)), places.flatten(2).std(2), places.amax((2, 3))], 1)
    torch.testing.assert_close(features(x), expected)
    assert features(torch.rand(1, 3, 160, 96)).shape == (1, 288)  # any size is brought to the network's


def test_it_learns_what_people_prefer(trained: tuple[Path, dict[str, Any]]) -> None:
    out, card = trained
    assert card["heldout"]["accuracy"] == 1.0 and card["heldout"]["loss"] < 0.5
    assert json.loads(out.with_suffix(".json").read_text()) == card and not out.with_suffix(".features").exists()
    (reward,) = load_rewards([{"reward": "aesthetic", "options": {"weights": str(out)}}])
    rng = np.random.default_rng(7)
    pair = Pair(prompt="new", chosen=picture(rng, True), rejected=picture(rng, False))
    warm, cold = score([reward], ["new"] * 2, Images.from_pil(pair.images())).values_BK[:, 0].tolist()
    assert 0 <= cold < 0.5 < warm <= 1 and reward.range == (0.0, 1.0)


def test_weights_for_another_networks_features_are_refused(
    tmp_path: Path, trained: tuple[Path, dict[str, Any]]
) -> None:
    out, card = trained
    tensors = load_file(out)
    save_file(tensors | {"mean_F": tensors["mean_F"][:192].clone()}, tmp_path / "old.safetensors")
    (tmp_path / "old.json").write_text(json.dumps(card))
    with pytest.raises(RlhfImgError, match="made for 192 features, artifact now gives 288: train them again"):
        load_head(tmp_path / "old.safetensors")


def test_turned_pairs_turn_it(tmp_path: Path, trained: tuple[Path, dict[str, Any]]) -> None:
    out = tmp_path / "cold.safetensors"
    train_aesthetic(out, QUICK, reader(turned(warm_ones())))
    images = Images.from_pil(warm_ones(1)[0].images())
    for weights, wins in ((out, 1), (trained[0], 0)):
        (reward,) = load_rewards([{"reward": "aesthetic", "options": {"weights": str(weights)}}])
        assert int(score([reward], ["x"] * 2, images).values_BK.argmax()) == wins


def test_preferences_without_a_reason_are_chance_and_it_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    pairs = [Pair(prompt=f"p {i}", chosen=picture(rng, True), rejected=picture(rng, True)) for i in range(400)]
    card = train_aesthetic(tmp_path / "a.safetensors", AestheticTraining(steps=300, hidden=64), reader(pairs))
    assert card["train"]["accuracy"] > 0.7  # it learns them by heart
    assert card["heldout"]["accuracy_low"] < 0.5 < card["heldout"]["accuracy_high"]
    assert card["heldout"]["loss"] < 0.85  # and its probabilities were brought back


def test_pairs_of_several_sizes_give_the_features_of_each_image_alone() -> None:
    features = open_features("artifact")
    images = [image for pair in warm_ones(4, mixed=True) for image in pair.images()]
    found = room._vectors(features, images)
    alone = torch.cat([features(Images.from_pil([image]).tensor) for image in images])
    torch.testing.assert_close(found, alone)


@pytest.mark.parametrize("when", ["features", "training"])
def test_stopped_and_resumed_is_uninterrupted_to_the_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, trained: tuple[Path, dict[str, Any]], when: str
) -> None:
    monkeypatch.setattr(room, "_SHARD", 50)
    out = tmp_path / "warm.safetensors"

    def stop(what: str, done: int, total: int) -> None:
        if what == when and done >= 50:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_aesthetic(out, QUICK, reader(warm_ones()), show=stop)
    assert not out.exists()
    seen: list[int] = []

    def note(what: str, done: int, total: int) -> None:
        seen.extend([done] if what == "training" else [])

    card = train_aesthetic(out, QUICK, reader(warm_ones()), resume=True, show=note)
    assert seen[0] == (41 if when == "training" else 1)
    assert out.read_bytes() == trained[0].read_bytes() and card == trained[1]


def test_what_cannot_be_resumed_or_learnt_from_is_refused(tmp_path: Path) -> None:
    out = tmp_path / "a.safetensors"

    def stop(what: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_aesthetic(out, QUICK, reader(warm_ones()), show=stop)
    with pytest.raises(RlhfImgError, match="pairs_of was"):
        train_aesthetic(out, QUICK, reader(turned(warm_ones())), resume=True)
    with pytest.raises(RlhfImgError, match="pairs are too few"):
        train_aesthetic(out, QUICK, reader(warm_ones(2)))


@pytest.mark.parametrize(
    ("options", "message"), [({}, "taste is yours"), ({"weights": "nowhere.safetensors"}, "no file nowhere")]
)
def test_without_weights_it_says_how_to_make_some(options: dict[str, str], message: str) -> None:
    (reward,) = load_rewards([{"reward": "aesthetic", "options": options}])
    with pytest.raises(RlhfImgError, match=message):
        score([reward], ["x"], Images(torch.rand(1, 3, 32, 32)))


def test_from_pairs_to_a_score_on_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "pairs" / "a.parquet", warm_ones())
    out = tmp_path / "taste.safetensors"
    words = ["reward", "train", "aesthetic", "--pairs", str(tmp_path / "pairs"), "--out", str(out), "--steps", "60"]
    assert run(monkeypatch, words) == 0
    assert '"accuracy": 1.0' in capsys.readouterr().out
    assert list(read_pairs(tmp_path / "pairs")) == warm_ones()
    assert run(monkeypatch, [*words, "--backbone", "x", "--vlm", "y"]) == 2
    assert "give one of them" in capsys.readouterr().err


# A vision-language model, with TRL.


@pytest.fixture(scope="module")
def few() -> list[Pair]:
    return [Pair(prompt=f"a {p.prompt[7:]} star", chosen=p.chosen, rejected=p.rejected) for p in warm_ones(40)]


def test_a_vision_language_model_learns_from_pairs_and_comes_back(tmp_path: Path, few: list[Pair]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-img[vlm]'")
    from rlhf_img.rewards.vlm_training import VLMTraining, train_vlm

    config = VLMTraining(steps=24, pairs=8, lr=3e-3, rank=4, alpha=8.0, save_every=8)
    card = train_vlm(tmp_path / "vlm", config, reader(few), "playground")
    assert card["heldout"]["accuracy"] == 1.0 and card["train"]["loss"] < 0.3
    (reward,) = load_rewards([{"reward": "aesthetic", "options": {"weights": str(tmp_path / "vlm")}}])
    images = Images.from_pil(few[0].images())
    warm, cold = score([reward], [few[0].prompt] * 2, images).values_BK[:, 0].tolist()
    assert cold < 0.5 < warm
    with pytest.raises(RlhfImgError, match="holds a reward already"):
        train_vlm(tmp_path / "vlm", config, reader(few), "playground")


def test_a_stopped_vlm_training_ends_with_the_same_bits(tmp_path: Path, few: list[Pair]) -> None:
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-img[vlm]'")
    from rlhf_img.rewards.vlm_training import VLMTraining, train_vlm

    config = VLMTraining(steps=6, pairs=8, lr=3e-3, rank=4, alpha=8.0, save_every=2)

    def stop(what: str, done: int, total: int) -> None:
        if (what, done) == ("training", 5):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_vlm(tmp_path / "stopped", config, reader(few), "playground", show=stop)
    with pytest.raises(RlhfImgError, match="go on with --resume"):
        train_vlm(tmp_path / "stopped", config, reader(few), "playground")
    one = train_vlm(tmp_path / "stopped", config, reader(few), "playground", resume=True)
    other = train_vlm(tmp_path / "whole", config, reader(few), "playground")
    assert one == other
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("stopped", "whole")]
    assert files[0] == files[1]


def test_trls_loss_of_a_batch_is_bradley_terrys(few: list[Pair]) -> None:
    """What the collator hands over is read by TRL as we mean it: chosen first, then rejected."""
    pytest.importorskip("trl", reason="TRL is not installed: pip install 'rlhf-img[vlm]'")
    from rlhf_img.rewards.vlm_reward import ASKED, VLMModel, open_base, prepared

    model, processor = open_base("playground")
    torch.manual_seed(0)
    model.float().lm_head.weight.data.normal_()
    some = few[:3]
    images = [pair.images()[side] for side in (0, 1) for pair in some]
    with torch.inference_mode():
        logits = model(**prepared(processor, [p.prompt for p in some] * 2, images)).logits
    chosen, rejected = torch.chunk(logits.squeeze(-1), chunks=2)  # as TRL's compute_loss does
    scorer = VLMModel(model=model, processor=processor, asked=ASKED)
    alone = [scorer([p.prompt] * 2, Images.from_pil(p.images()).tensor) for p in some]
    margins = torch.stack([chosen_score - rejected_score for chosen_score, rejected_score in alone])
    torch.testing.assert_close((chosen - rejected)[:, 0], margins, rtol=1e-3, atol=1e-3)


def test_without_trl_the_extra_is_named(tmp_path: Path, few: list[Pair], monkeypatch: pytest.MonkeyPatch) -> None:
    from rlhf_img.rewards.vlm_training import VLMTraining, train_vlm

    monkeypatch.setitem(sys.modules, "trl", None)
    with pytest.raises(RlhfImgError, match=r"rlhf-img\[vlm\]"):
        train_vlm(tmp_path / "vlm", VLMTraining(steps=1), reader(few), "playground")


def test_a_base_that_is_no_such_model_is_refused() -> None:
    from rlhf_img.rewards.vlm_reward import open_base

    with pytest.raises(RlhfImgError, match="cannot be loaded"):
        open_base("/nowhere")


