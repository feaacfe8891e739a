"""Frozen backbones under the artifact reward: real preprocessing, maps that are where they say, a head that learns."""

import json

import numpy as np
import pytest
import torch
import transformers
from PIL import Image
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.siglip2.image_processing_pil_siglip2 import Siglip2ImageProcessorPil

from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.artifact_model import DefectNet, load_detector
from rlhf_img.rewards.artifact_training import ArtifactTraining, _step, train_artifact
from rlhf_img.rewards.backbones import open_backbone
from rlhf_img.rewards.calibration import calibrate, calibration_error, image_loss
from rlhf_img.rewards.defects import CLASSES
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics.schema import Rubric

SMALL = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2, "patch_size": 8}
DINO_FILE = {"do_resize": True, "do_normalize": True, "image_mean": [0.485, 0.456, 0.406], "resample": 2,
             "image_std": [0.229, 0.224, 0.225], "size": {"height": 64, "width": 64}}
KINDS = ("siglip", "siglip2", "dinov2", "dinov3")


def make(kind: str, folder) -> str:
    """A tiny random model of a kind, saved as people save theirs; a new one at each call."""
    match kind:
        case "siglip":
            model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(image_size=64, **SMALL))
            SiglipImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
        case "siglip2":
            model = transformers.Siglip2VisionModel(transformers.Siglip2VisionConfig(num_patches=64, **SMALL))
            Siglip2ImageProcessorPil(patch_size=8, max_num_patches=64).save_pretrained(folder)
        case "dinov2":
            small = {k: v for k, v in SMALL.items() if k != "intermediate_size"}
            model = transformers.Dinov2Model(transformers.Dinov2Config(image_size=64, **small))
            sizes = {"size": {"shortest_edge": 72}, "crop_size": {"height": 64, "width": 64}}
            BitImageProcessorPil(**sizes).save_pretrained(folder)
        case _:
            config = transformers.DINOv3ViTConfig(image_size=64, num_register_tokens=4, **SMALL)
            model = transformers.DINOv3ViTModel(config)
            (folder / "preprocessor_config.json").write_text(json.dumps(DINO_FILE))
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    torch.manual_seed(0)
    return {kind: make(kind, tmp_path_factory.mktemp(kind)) for kind in KINDS}


def picture(side: int) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (side, side, 3), dtype=np.uint8)


def tensor(image: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(image).permute(2, 0, 1)[None].float() / 255


@pytest.mark.parametrize("kind", ("siglip", "siglip2"))
@pytest.mark.parametrize("side", (40, 64, 150))
def test_preprocessing_is_that_of_the_image_processor(folders, kind, side):
    processor = {"siglip": SiglipImageProcessorPil, "siglip2": Siglip2ImageProcessorPil}[kind]
    wanted = processor.from_pretrained(folders[kind])(Image.fromarray(picture(side)), return_tensors="pt")
    given = open_backbone(folders[kind]).preprocess(tensor(picture(side)))
    assert set(given) == set(wanted)
    for name, value in given.items():
        off = (value.double() - wanted[name].double()).abs() * (127.5 if name == "pixel_values" else 1)
        assert off.max() <= (2.01 if name == "pixel_values" else 0) and off.mean() < 0.25, name


def test_dinov2_sees_the_whole_image_with_its_own_mean_and_deviation(folders):
    processor = BitImageProcessorPil.from_pretrained(folders["dinov2"])
    whole = {"do_center_crop": False, "size": {"height": 64, "width": 64}}
    wanted = processor(Image.fromarray(picture(150)), return_tensors="pt", **whole)["pixel_values"]
    given = open_backbone(folders["dinov2"]).preprocess(tensor(picture(150)))["pixel_values"]
    assert (given - wanted).abs().max() <= 2.01 / 255 / 0.224


@pytest.mark.parametrize("kind", KINDS)
def test_a_patch_lies_where_its_embedding_is(folders, kind):
    backbone = open_backbone(folders[kind])
    x = torch.full((1, 3, 64, 64), 0.5)
    marked = x.clone()
    marked[..., 40:48, 8:16] = torch.rand(3, 8, 8, generator=torch.Generator().manual_seed(1))
    before, after = backbone.features(x), backbone.features(marked)
    assert before.shape == (1, 64, 8, 8) and not before.requires_grad
    changed = (after - before).square().sum(dim=1)[0]
    assert divmod(int(changed.argmax()), 8) == (5, 1)


def test_what_is_no_backbone_says_what_would_be(tmp_path):
    with pytest.raises(RlhfImgError, match=r"cannot be opened: .*Give a folder with config\.json"):
        open_backbone(str(tmp_path))
    transformers.ViTConfig().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(DINO_FILE))
    with pytest.raises(RlhfImgError, match="is a vit; known are siglip,"):
        open_backbone(str(tmp_path))


def test_the_head_learns_and_the_backbone_does_not(folders, monkeypatch):
    backbone = open_backbone(folders["dinov2"])
    before = {name: value.clone() for name, value in backbone.model.state_dict().items()}
    torch.manual_seed(0)
    net = DefectNet(backbone)
    assert not any(name.startswith(("features", "backbone")) for name in net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    from rlhf_img.rewards.artifact_pairs import Playground, make_pairs

    same = make_pairs(14, split="train", seed=(0, 0))
    monkeypatch.setattr(Playground, "pairs", lambda self, n, **settings: same)
    losses = [_step(net.train(), optimizer, ArtifactTraining(pairs=14), 0, Playground(), None) for _ in range(15)]
    assert losses[-1] < 0.8 * losses[0]
    assert all((value == before[name]).all() for name, value in backbone.model.state_dict().items())


def test_weights_remember_their_backbone(folders, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._CALIBRATED", 14)
    monkeypatch.setattr("rlhf_img.rewards.artifact_training._WATCHED", 14)
    out = tmp_path / "mine.safetensors"
    card = train_artifact(out, ArtifactTraining(steps=2, pairs=7), backbone=folders["siglip"])
    assert card["backbone"] == folders["siglip"] == json.loads(out.with_suffix(".json").read_text())["backbone"]
    assert out.stat().st_size < 500_000
    detector = load_detector(out)
    logits, heat = detector(torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    assert heat.shape == (2, len(CLASSES), 8, 8) and logits.shape == (2, len(CLASSES))
    images = Images(torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)))
    (verdict,) = artifact(["a"], images, rubrics=[Rubric(prompt="a")], weights=str(out))
    assert 0 < verdict.value < 1 and verdict.details.heat_hw.shape == (8, 8)


def test_calibration_error_by_hand():
    # Bins of a fifth: 0.9 and 0.9 (one of two happened: gap 0.4), 0.1 (did not: gap 0.1).
    p, happened = torch.tensor([0.9, 0.9, 0.1]), torch.tensor([True, False, False])
    assert calibration_error(p, happened, bins=5) == pytest.approx((2 * 0.4 + 0.1) / 3, abs=1e-5)
    assert calibration_error(torch.tensor([1.0, 0.0]), torch.tensor([True, False])) == 0


def test_image_loss_by_hand():
    # One class with p = 3/4: the image and the class each cost -log of what was true.
    logits = torch.full((2, 1), float(np.log(3)))
    loss = image_loss(logits, torch.tensor([[0.0], [1.0]]), torch.tensor([False, True]))
    torch.testing.assert_close(loss, torch.tensor([-2 * np.log(0.25), -2 * np.log(0.75)], dtype=torch.float32))


def test_calibration_mends_overconfidence_and_keeps_the_order():
    generator = torch.Generator().manual_seed(0)
    n, k = 1400, len(CLASSES)
    damaged = torch.arange(n) >= n // 2
    kinds = torch.randint(k, (n,), generator=generator)
    target = torch.zeros(n, k)
    target[damaged, kinds[damaged]] = 1.0
    # True log-odds of each class: evidence of -4 or +1, with noise; then four times too sure of itself.
    evidence = torch.where(target > 0, 1.0, -4.0) + torch.randn(n, k, generator=generator)
    heat = (4 * evidence)[..., None, None].expand(n, k, 2, 2)
    net = DefectNet()

    def error() -> float:
        with torch.no_grad():
            p_clean = torch.sigmoid(-net.pool(heat)).prod(dim=1)
        return calibration_error(1 - p_clean, damaged)

    before = error()
    calibrate(net, heat, target, damaged)
    assert (net.scale > 0).all()
    assert error() < 0.4 * before
