"""The artifact reward: defects are real, looks are not defects, the shipped weights are as good as their card says."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import SIZE, Scene, Thing, sample_scene
from rlhf_img.rewards import load_rewards, score
from rlhf_img.rewards.appearance import gaussian_blur, random_look
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.artifact_losses import Targets, detector_loss
from rlhf_img.rewards.artifact_measure import auc
from rlhf_img.rewards.artifact_model import WEIGHTS, DefectNet, load_detector, log_p_clean
from rlhf_img.rewards.artifact_pairs import make_pairs
from rlhf_img.rewards.artifact_training import ArtifactTraining, train_artifact
from rlhf_img.rewards.defects import CLASSES, GARBLED, glyph_masks, inject, object_masks, parts_of, permitted
from rlhf_img.rewards.heat import overlay
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics.schema import Requirement, Rubric
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.samples import Drawn, write_samples


def rubric(*permits: str) -> Rubric:
    asked = (Requirement(id="looks", check="vqa", ask="Is it so?", permits=permits),) if permits else ()
    return Rubric(prompt="a red circle", requirements=asked)


def test_object_masks_cover_what_is_drawn():
    things = (Thing(shape="circle", color="red", size="large", x=20, y=20, radius=12),
              Thing(shape="square", color="blue", size="small", x=48, y=46, radius=7))
    scene = Scene(things=things, background="white")
    masks, image = object_masks(scene), render(scene)
    drawn = np.abs(image.astype(int) - 245).max(axis=-1) > 120
    union = masks.any(axis=0)
    assert (drawn & union).sum() / (drawn | union).sum() > 0.95
    assert masks[0].sum() == pytest.approx(math.pi * 144, rel=0.03)
    assert masks[1].sum() == pytest.approx(12.32**2, rel=0.1)


def test_glyph_masks_are_the_letters_and_nothing_is_garbled_where_nothing_is_written():
    things = (Thing(shape="circle", color="red", size="small", x=32, y=40, radius=7),)
    scene = Scene(things=things, background="black", word="CAT", word_at_top=True)
    masks, image = glyph_masks(scene), render(scene)
    assert len(masks) == 3
    written = image.min(axis=-1) > 110
    assert (written & masks.any(axis=0)).sum() / (written | masks.any(axis=0)).sum() > 0.95
    assert inject(GARBLED, image, parts_of(replace(scene, word=None), GARBLED), np.random.default_rng(0)) is None


@pytest.mark.parametrize("name", CLASSES)
def test_every_defect_is_clearly_visible_local_to_its_scene_and_repeatable(name):
    found = 0
    for seed in range(12):
        scene = replace(sample_scene(np.random.default_rng(seed)), style=None, word="CAT" if name == GARBLED else None)
        image, objects = render(scene), parts_of(scene, name)
        before = image.copy()
        damaged = inject(name, image, objects, np.random.default_rng(seed))
        assert (image == before).all()
        if damaged is None:
            continue
        found += 1
        assert damaged.dtype == np.uint8 and damaged.shape == image.shape
        assert (np.abs(damaged.astype(int) - image).max(axis=-1) > 40).sum() >= 16
        again = inject(name, image, objects, np.random.default_rng(seed))
        assert again is not None and (again == damaged).all()
    assert found >= 10


def test_permits_name_classes_and_looks_change_nothing():
    assert permitted(["grain", "noise", "blur"]) == frozenset()
    assert permitted(["Colour-Bleed", "hollow"]) == {"colour bleed", "hole"}


def test_log_p_clean_is_the_product_over_classes_that_are_not_permitted():
    logits = torch.tensor([[0.0, math.log(3.0), -40.0]])  # p = 1/2, 3/4, 0
    assert log_p_clean(logits).exp().item() == pytest.approx(0.5 * 0.25)
    assert log_p_clean(logits, torch.tensor([[False, True, False]])).exp().item() == pytest.approx(0.5)


def test_detector_loss_by_hand():
    # One class, one cell, p = 3/4: image, class and cell each cost -log of what was true.
    heat = torch.full((2, 1, 1, 1), math.log(3.0))
    target = torch.tensor([0.0, 1.0]).reshape(2, 1, 1, 1)
    targets = Targets(damaged_B=torch.tensor([False, True]), class_BK=target[..., 0, 0], cells_BKhw=target)
    loss = detector_loss(heat, heat[..., 0, 0], targets, 2.0)
    torch.testing.assert_close(loss, torch.tensor([-4 * math.log(0.25), -4 * math.log(0.75)]))


def test_the_mean_of_the_most_certain_cells_is_pooled():
    net = DefectNet()
    heat = torch.full((1, len(CLASSES), 4, 4), -9.0)
    heat[0, 2, 1, 1:4] = torch.tensor([3.0, 6.0, 0.0])
    pooled = net.pool(heat)[0].tolist()
    assert pooled[2] == 3.0 and pooled[0] == -9.0


def test_auc_by_hand():
    assert auc(torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0])) == 0.875
    assert auc(torch.tensor([1.0]), torch.tensor([1.0])) == 0.5


def test_blur_keeps_the_mean_and_sigma_zero_keeps_the_image():
    x = torch.zeros(2, 3, 21, 21)
    x[:, :, 10, 10] = 1.0
    blurred = gaussian_blur(x, torch.tensor([0.0, 1.5]))
    torch.testing.assert_close(blurred[0], x[0])
    assert blurred[1].sum().item() == pytest.approx(3.0, rel=1e-4)
    offsets = torch.arange(21.0) - 10
    variance = (blurred[1, 0].sum(dim=0) * offsets.square()).sum().item()
    assert variance == pytest.approx(1.5**2, rel=0.02)


def test_a_look_is_the_same_for_both_twins_and_rounds_to_8_bits():
    look = random_look(6, SIZE, torch.Generator().manual_seed(3))
    x = torch.rand(6, 3, SIZE, SIZE, generator=torch.Generator().manual_seed(0))
    once, twice = look(x), look(x)
    assert (once == twice).all()
    torch.testing.assert_close(once * 255, (once * 255).round(), atol=1e-4, rtol=0)


def test_pairs_are_matched_repeatable_and_masked_where_they_differ():
    pairs, again = (make_pairs(7, split="train", seed=(5, 0)) for _ in range(2))
    assert (pairs.clean_B3HW == again.clean_B3HW).all() and (pairs.damaged_B3HW == again.damaged_B3HW).all()
    assert pairs.class_B.tolist() == list(range(7))
    difference = (pairs.clean_B3HW - pairs.damaged_B3HW).abs().amax(dim=1)
    assert (difference[pairs.mask_BHW] > 0.12).all()
    assert (pairs.visible_B == (pairs.mask_BHW.sum(dim=(1, 2)) >= 16)).all()


def test_a_transform_is_given_to_both_twins_of_half_the_pairs():
    seen = []

    def darken(x: torch.Tensor) -> torch.Tensor:
        seen.append(len(x))
        return x * 0.5

    plain = make_pairs(8, split="train", seed=(5, 1))
    dark = make_pairs(8, split="train", seed=(5, 1), transform=darken)
    assert seen == [4, 4]
    assert (dark.clean_B3HW[1::2] == plain.clean_B3HW[1::2]).all()
    assert (dark.clean_B3HW[::2].mean() < 0.7 * plain.clean_B3HW[::2].mean()).item()


def test_training_resumes_to_the_same_weights_and_refuses_other_settings(tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    config = ArtifactTraining(steps=3, pairs=7, save_every=2)
    train_artifact(tmp_path / "a.safetensors", config)

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_artifact(tmp_path / "b.safetensors", config, progress=interrupt)
    with pytest.raises(RlhfImgError, match="start anew without --resume"):
        train_artifact(tmp_path / "b.safetensors", replace(config, lr=1e-3), resume=True)
    steps = []
    train_artifact(tmp_path / "b.safetensors", config, resume=True, progress=lambda step, loss: steps.append(step))
    assert steps == [3]
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert not (tmp_path / "b.resume.pt").exists()


def test_missing_and_misfitting_weights_say_how_to_make_them(tmp_path):
    with pytest.raises(RlhfImgError, match="rlhf-img reward train artifact"):
        load_detector(tmp_path / "none.safetensors")
    (tmp_path / "old.safetensors").write_bytes(WEIGHTS.read_bytes())
    (tmp_path / "old.json").write_text(json.dumps({"classes": ["blob"], "side": 64}))
    with pytest.raises(RlhfImgError, match="know the classes"):
        load_detector(tmp_path / "old.safetensors")
    (tmp_path / "narrow.json").write_text(WEIGHTS.with_suffix(".json").read_text())
    save_file({"head.bias": torch.zeros(len(CLASSES))}, tmp_path / "narrow.safetensors")
    with pytest.raises(RlhfImgError, match="another network than this version's. Train them again"):
        load_detector(tmp_path / "narrow.safetensors")


def test_shipped_weights_are_small_and_reach_what_they_must():
    card = json.loads(WEIGHTS.with_suffix(".json").read_text())
    assert WEIGHTS.stat().st_size <= 1_000_000
    assert card["heldout"]["auc"] >= 0.97
    assert all(share <= 0.05 for share in card["heldout"]["false_positives_at_90_recall"].values())


def test_shipped_weights_tell_damaged_from_clean_on_pairs_they_never_saw():
    pairs = make_pairs(140, split="heldout", seed=(77, 7))
    net = load_detector().net
    with torch.inference_mode():
        clean, damaged = (-log_p_clean(net.pool(net(x))) for x in (pairs.clean_B3HW, pairs.damaged_B3HW))
    assert auc(damaged[pairs.visible_B], clean) >= 0.96


def test_reward_is_high_for_clean_and_low_for_damaged_unless_permitted():
    rng = np.random.default_rng(11)
    scene = Scene(things=(Thing(shape="circle", color="red", size="large", x=32, y=30, radius=12),), background="white")
    clean = render(scene)
    damaged = inject("speckle", clean, object_masks(scene), rng)
    images = Images(torch.from_numpy(np.stack([clean, damaged, damaged])).permute(0, 3, 1, 2).float() / 255)
    good, bad, allowed = artifact(["a red circle"] * 3, images, rubrics=[rubric("grain"), rubric(), rubric(*CLASSES)])
    assert good.value > 0.5 > bad.value
    assert allowed.value == 1.0 and allowed.details.permitted == set(CLASSES)
    assert max(bad.details.probability, key=bad.details.probability.get) == "speckle"
    assert bad.details.heat_hw.max() > 0.5 > good.details.heat_hw.max() and allowed.details.heat_hw.max() == 0


def test_images_of_a_scale_it_never_saw_are_refused():
    with pytest.raises(RlhfImgError, match="256 x 256 px, but these weights were trained at 64 px"):
        artifact(["a red circle"], Images(torch.zeros(1, 3, 256, 256)), rubrics=[rubric()])


def test_a_heat_map_reddens_the_image_where_it_is_hot_and_nowhere_else():
    image = np.full((64, 64, 3), 100, np.uint8)
    heat = np.zeros((16, 16), np.float16)
    heat[2:6, 8:12] = 1.0
    shown = overlay(image, heat)
    assert shown.dtype == np.uint8 and shown[14, 38].tolist() == [208, 51, 30]  # 0.7 of (255, 30, 0), 0.3 of 100
    assert (shown[40:] == 100).all() and (shown[:, :20] == 100).all()


def test_samples_keep_what_the_artifact_reward_saw(tmp_path):
    rng = np.random.default_rng(11)
    scene = Scene(things=(Thing(shape="circle", color="red", size="large", x=32, y=30, radius=12),), background="white")
    clean = render(scene)
    damaged = inject("speckle", clean, object_masks(scene), rng)
    images = Images(torch.from_numpy(np.stack([clean, damaged, damaged])).permute(0, 3, 1, 2).float() / 255)
    prompts = [Prompt("a red circle", rubric(*permits)) for permits in ((), (), CLASSES)]
    columns = {"rubrics": [p.rubric for p in prompts]}
    scores = score(load_rewards("rubric,artifact"), [p.text for p in prompts], images, columns, max_unscored=1.0)
    write_samples(tmp_path, Drawn(prompts=tuple(prompts), seeds=(0, 1, 2), images=images, scores=scores), 3)
    good, bad, allowed = (row["defects"] for row in json.loads((tmp_path / "samples.json").read_text()))
    assert good["heat"] is None and set(good["probability"]) == set(CLASSES)
    assert next(iter(bad["probability"])) == "speckle" and bad["heat"] == "001.heat.png"
    with Image.open(tmp_path / "001.heat.png") as shown:
        changed = np.abs(np.asarray(shown).astype(int) - damaged).max(axis=-1) > 60
    near = np.abs(damaged.astype(int) - clean).max(axis=-1) > 40
    rows, columns_ = np.nonzero(near)
    assert changed[rows.min() : rows.max() + 1, columns_.min() : columns_.max() + 1].sum() > 0.5 * changed.sum() > 0
    assert allowed == {"probability": {}, "permitted": sorted(CLASSES), "heat": None}
    assert sorted(p.name for p in tmp_path.glob("*.heat.png")) == ["001.heat.png"]
