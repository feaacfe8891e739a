"""Training the artifact reward on a folder of pictures: what is read, what is damaged, what comes out."""

import io
import json
import os
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image
from scipy import ndimage
from typer.testing import CliRunner

from rlhf_img.cli.reward import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.rewards.appearance import STYLES, photo_look, style_look
from rlhf_img.rewards.artifact import artifact
from rlhf_img.rewards.artifact_measure import evaluate, heat_hits
from rlhf_img.rewards.artifact_training import ArtifactTraining, train_artifact
from rlhf_img.rewards.defects import CLASSES, inject
from rlhf_img.rewards.folder_images import read_folder, summary
from rlhf_img.rewards.photo_defects import INJECTORS, prepared
from rlhf_img.rewards.photo_pairs import Photographs
from rlhf_img.rewards.protocol import Images
from rlhf_img.rubrics.schema import Rubric

PHOTOS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "coins.png", "rocket.jpg", "motorcycle_left.png",
          "grass.png")


def picture(seed: int, height: int = 80, width: int = 96) -> np.ndarray:
    """Smooth colours and a few edges: something that can be broken."""
    rng = np.random.default_rng(seed)
    noise = ndimage.gaussian_filter(rng.standard_normal((height, width, 3)), (9, 9, 0))
    image = 128 + 60 * noise / noise.std()
    image[height // 4 : height // 2, width // 3 : 2 * width // 3] = rng.integers(0, 256, 3)
    return image.clip(0, 255).astype(np.uint8)


@pytest.fixture(scope="module")
def photos(tmp_path_factory):
    """Photographs that scikit-image brings along."""
    folder = tmp_path_factory.mktemp("photos")
    for name in PHOTOS:
        shutil.copy(Path(skimage.__file__).parent / "data" / name, folder)
    return folder


@pytest.fixture(scope="module")
def source(photos):
    return Photographs(folder=read_folder(photos, 64), side=64)


@pytest.fixture
def plain(tmp_path):
    """A folder of five pictures without a fault."""
    for i in range(5):
        Image.fromarray(picture(i)).save(tmp_path / f"plain{i}.png")
    return tmp_path


def read_one(folder: Path, name: str) -> np.ndarray:
    found = read_folder(folder, 64)
    return np.asarray(dict(zip(found.names, found.pictures, strict=True))[name])


# What is read


def test_grey_cmyk_16_bit_animated_turned_and_transparent_files_are_read(plain):
    base = Image.fromarray(picture(9))
    base.convert("L").save(plain / "grey.png")
    base.convert("CMYK").save(plain / "cmyk.jpg", quality=95)
    deep = np.asarray(base.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep[:, ::-1].copy()).save(plain / "deep.png")
    Image.fromarray(picture(10)).save(plain / "moving.gif", save_all=True, append_images=[Image.new("RGB", (96, 80))])
    clear = base.transpose(Image.Transpose.ROTATE_180).convert("RGBA")
    clear.putalpha(Image.fromarray(np.where(np.arange(96) < 48, 0, 255).astype(np.uint8)[None].repeat(80, 0)))
    clear.save(plain / "clear.png")
    turned = Image.Exif()
    turned[0x0112] = 6  # turn by 90 degrees to see it upright
    (plain / "sub").mkdir()
    base.save(plain / "sub" / "turned.jpg", exif=turned, quality=95)

    found = read_folder(plain, 64)
    assert found.skipped == {}
    assert found.read_as == {"grey to RGB": sorted_like(found, "grey.png", "deep.png"), "16 bits to 8": ["deep.png"],
                             "CMYK to RGB": ["cmyk.jpg"], "first frame of several": ["moving.gif"],
                             "transparency on white": ["clear.png"]}
    grey = np.asarray(base.convert("L"))
    assert (read_one(plain, "grey.png") == grey[..., None]).all()
    assert (read_one(plain, "deep.png") == grey[:, ::-1, None]).all()
    assert np.abs(read_one(plain, "cmyk.jpg").astype(int) - np.asarray(base)).mean() < 6
    assert np.abs(read_one(plain, "moving.gif").astype(int) - picture(10)).mean() < 12
    assert (read_one(plain, "clear.png")[:, :48] == 255).all()
    assert (read_one(plain, "clear.png")[:, 48:] == np.asarray(base)[::-1, ::-1][:, 48:]).all()
    upright = np.asarray(base.transpose(Image.Transpose.ROTATE_270)).astype(int)
    assert np.abs(read_one(plain, os.path.join("sub", "turned.jpg")) - upright).mean() < 6


def sorted_like(found, *names: str) -> list[str]:
    return sorted(names, key=found.names.index)


def test_what_cannot_be_used_is_skipped_and_counted_with_its_reason(plain, monkeypatch):
    whole = io.BytesIO()
    Image.fromarray(picture(11)).save(whole, "JPEG")
    (plain / "cut.jpg").write_bytes(whole.getvalue()[: len(whole.getvalue()) // 2])
    png = (plain / "plain0.png").read_bytes()
    (plain / "rotten.png").write_bytes(png[:60] + b"rotten" + png[66:])
    (plain / "empty.png").touch()
    (plain / "notes.txt").write_text("no picture")
    Image.fromarray(picture(12, 63, 200)).save(plain / "low.png")
    Image.new("RGB", (80, 80), "navy").save(plain / "navy.png")
    Image.fromarray(np.full((80, 80), 0.5, np.float32)).save(plain / "float.tif")
    shutil.copy(plain / "plain1.png", plain / "again.png")
    Image.fromarray(picture(13, 200, 200)).save(plain / "bomb.png")
    os.mkfifo(plain / "pipe.png")
    (plain / "dead.png").symlink_to(plain / "nowhere.png")
    (plain / "loop").symlink_to(plain)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 30_000)

    found = read_folder(plain, 64)
    (copies,) = [files for reason, files in found.skipped.items() if reason == "a copy of another file"]
    assert len(copies) == 1 and copies[0] in ("again.png", "plain1.png")
    assert len(found.names) == 5
    assert {reason: sorted(files) for reason, files in found.skipped.items() if files != copies} == {
        "broken or cut off": ["cut.jpg", "rotten.png"],
        "no image that Pillow reads": ["empty.png", "notes.txt"],
        "smaller than 64 px": ["low.png"],
        "of one colour": ["navy.png"],
        "32-bit grey, of which white is not known": ["float.tif"],
        "more than 0 megapixels": ["bomb.png"],
        "no regular file, or a dead link": ["dead.png", "pipe.png"],
        "link to a folder": ["loop"],
    }
    assert summary({"broken": ["b"], "small": ["d", "c", "a", "e"]}) == "4 small (a, c, d, ...); 1 broken (b)"


def test_folders_without_enough_pictures_say_what_is_in_them(tmp_path):
    with pytest.raises(RlhfImgError, match="nowhere is no folder"):
        read_folder(tmp_path / "nowhere", 64)
    with pytest.raises(RlhfImgError, match="0 pictures that can be used, at least 5 .* there are no other files"):
        read_folder(tmp_path, 64)
    (tmp_path / "a.txt").write_text("a")
    with pytest.raises(RlhfImgError, match=r"1 no image that Pillow reads \(a\.txt\)"):
        read_folder(tmp_path, 64)


def test_large_pictures_are_kept_small_and_only_as_many_as_there_is_room_for(plain):
    Image.fromarray(picture(14)).save(plain / "sixth.png")
    whole = read_folder(plain, 64)
    full = read_folder(plain, 64, memory=80 * 96 * 3 * 5)
    (reason,) = full.skipped
    assert reason.startswith("no room: ") and len(full.names) == 5
    assert read_folder(plain, 64).fingerprint == whole.fingerprint != full.fingerprint
    Image.fromarray(picture(15, 600, 900)).save(plain / "large.png")
    assert read_one(plain, "large.png").shape == (256, 384, 3)


# What is damaged


@pytest.mark.parametrize("name", CLASSES)
def test_defects_of_photographs_are_visible_local_repeatable_and_of_many_sizes(source, name):
    sizes, far = [], 0
    for seed in range(24):
        rng = np.random.default_rng(seed)
        image = source._crop("train", rng)
        image, objects = prepared(name, image, rng)
        before = image.copy()
        damaged, again = (inject(name, image, objects, np.random.default_rng(seed), injectors=INJECTORS)
                          for _ in range(2))
        assert (image == before).all()
        if damaged is None:
            continue
        assert again is not None and (damaged == again).all()
        change = np.abs(damaged.astype(int) - image).max(axis=-1)
        clear = change > 40
        assert clear.sum() >= 16
        sizes.append(clear.sum())
        # Soft rims and weak parts may lie beside the clear ones, nothing may happen elsewhere.
        far += ((change > 8) & ~ndimage.binary_dilation(clear, iterations=8)).mean() > 0.02
    assert len(sizes) >= 16
    assert far <= (8 if name == "seam" else 3), "a grid or a strip that crosses even parts shows in places only"
    assert max(sizes) > 3 * min(sizes)


def test_twins_share_the_look_and_differ_in_the_mask_only(source):
    pairs, again = (source.pairs(27, split="train", seed=(3, 1)) for _ in range(2))
    assert (pairs.clean_B3HW == again.clean_B3HW).all() and (pairs.damaged_B3HW == again.damaged_B3HW).all()
    assert pairs.class_B.tolist() == list(range(len(CLASSES))) * 3
    difference = (pairs.clean_B3HW - pairs.damaged_B3HW).abs().amax(dim=1)
    assert (difference[pairs.mask_BHW] > 0.12).all()
    # Where nothing was broken both twins are alike, JPEG's blocks and blurred rims aside: grain alone is over 0.02.
    local = torch.tensor([name != "seam" for name in CLASSES])[pairs.class_B]
    outside = torch.tensor([d[~m].mean() for d, m in zip(difference, pairs.mask_BHW, strict=True)])
    assert outside[local].median() < 0.004 and outside[local].max() < 0.03
    assert (pairs.visible_B == (pairs.mask_BHW.sum(dim=(1, 2)) >= 16)).all() and pairs.visible_B.float().mean() > 0.6


def test_looks_of_photographs_have_jpeg_and_depth_and_are_the_same_twice():
    x = torch.from_numpy(np.stack([picture(i, 64, 64) for i in range(20)])).permute(0, 3, 1, 2).float() / 255
    look = photo_look(20, 64, torch.Generator().manual_seed(1))
    assert (look(x) == look(x)).all()
    plain = replace(look, jpeg_B=None, depth_blur_B=None)
    assert (look.jpeg_B > 0).any() and (look.jpeg_B == 0).any() and (look.depth_blur_B > 0).any()
    touched = (look(x) != plain(x)).flatten(1).any(dim=1)
    assert (touched == ((look.jpeg_B > 0) | (look.depth_blur_B > 0))).all()


@pytest.mark.parametrize("style", STYLES)
def test_a_style_changes_more_the_stronger_it_is(style):
    x = torch.from_numpy(np.stack([picture(i, 64, 64) for i in range(4)])).permute(0, 3, 1, 2).float() / 255
    looks = [style_look(style, strength, 4, 64, torch.Generator().manual_seed(0)) for strength in STYLES[style]]
    weak, medium, strong = ((look(x) - x).abs().mean().item() for look in looks)
    assert 0 < weak < medium < strong


def test_depth_blur_is_sharp_in_one_plane_and_soft_far_from_it():
    x = (torch.rand(1, 3, 64, 64, generator=torch.Generator().manual_seed(0)) > 0.5).float()
    look = style_look("depth blur", 3.0, 1, 64, torch.Generator().manual_seed(0))
    changed = (look(x) - x).abs().mean(dim=1, keepdim=True)
    assert look.depth_B1HW.min() < 0.05 and look.depth_B1HW.max() > 0.9
    assert changed[look.depth_B1HW < 0.05].mean() < 0.25 * changed[look.depth_B1HW > 0.8].mean()


def test_no_crop_of_a_held_out_picture_is_trained_on(source):
    assert len(source.heldout) == 2 and len(source.train) == 6
    assert not {id(p) for p in source.heldout} & {id(p) for p in source.train}
    red = Photographs(folder=replace(source.folder, pictures=tuple(
        Image.fromarray(np.stack([picture(i)[..., 0], *[np.zeros((80, 96), np.uint8)] * 2], axis=-1)
                        if i < 2 else picture(i)) for i in range(8))), side=64)
    rng = np.random.default_rng(0)
    assert all(red._crop("heldout", rng)[..., 1:].max() == 0 for _ in range(20))
    assert all(red._crop("train", rng)[..., 1:].max() > 0 for _ in range(20))


def test_pictures_in_which_no_defect_shows_are_an_error(source):
    dark = replace(source.folder, pictures=tuple(Image.new("RGB", (64, 64)) for _ in range(8)))
    with pytest.raises(RlhfImgError, match="no defect shows in these pictures"):
        Photographs(folder=dark, side=64).pairs(2, split="train", seed=(0,))


def test_the_hottest_cell_hits_on_the_damage_or_one_cell_beside_it():
    mask = torch.zeros(2, 16, 16, dtype=torch.bool)
    mask[:, 0:4, 0:4] = True  # cell (0, 0) of 4 x 4; beside it are three more
    heat = torch.zeros(2, 4, 4)
    heat[0, 1, 1] = heat[1, 2, 2] = 1.0
    hits, by_chance = heat_hits(heat, mask)
    assert hits.tolist() == [True, False] and by_chance == 4 / 16


# What comes out


def test_training_resumes_to_the_same_weights_and_refuses_another_folder(photos, source, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", lambda net, **settings: {})
    config = ArtifactTraining(steps=3, pairs=7, save_every=2)
    whole = train_artifact(tmp_path / "a.safetensors", config, source=source)

    def interrupt(step: int, loss: float) -> None:
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_artifact(tmp_path / "b.safetensors", config, source=source, progress=interrupt)
    fewer = tmp_path / "fewer"
    shutil.copytree(photos, fewer)
    (fewer / "grass.png").unlink()
    changed = Photographs(folder=read_folder(fewer, 64), side=64)
    with pytest.raises(RlhfImgError, match=r"another training: pictures was .* start anew without --resume"):
        train_artifact(tmp_path / "b.safetensors", config, source=changed, resume=True)
    with pytest.raises(RlhfImgError, match="side was 64, is 32"):
        train_artifact(tmp_path / "b.safetensors", config, source=replace(source, side=32), resume=True)
    with pytest.raises(RlhfImgError, match="autoencoder was False, is True"):
        train_artifact(tmp_path / "b.safetensors", config, source=source, resume=True, clean_transform=lambda x: x)
    resumed = train_artifact(tmp_path / "b.safetensors", config, source=source, resume=True)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    assert resumed == whole and [point["step"] for point in whole["curve"]] == [2, 3]


def test_the_command_trains_on_photographs_and_the_reward_reads_the_weights(photos, tmp_path, monkeypatch):
    monkeypatch.setattr("rlhf_img.rewards.artifact_training.evaluate", small_evaluation)
    (photos / "notes.txt").write_text("no picture")
    out = tmp_path / "mine" / "artifact.safetensors"
    args = ["train", "artifact", "--images", str(photos), "--side", "32", "--steps", "4", "--out", str(out)]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    (photos / "notes.txt").unlink()
    assert "6 pictures to learn from, 2 held out to measure on" in result.stdout
    assert "Skipped: 1 no image that Pillow reads (notes.txt)" in result.stdout
    card = json.loads(out.with_suffix(".json").read_text())
    assert card["side"] == 32 and card["vae_reconstructions"] is False
    assert card["pictures"]["used"] == 8 and len(card["pictures"]["held-out files"]) == 2
    assert card["pictures"]["skipped"] == {"no image that Pillow reads": {"count": 1, "files": ["notes.txt"]}}
    measured = card["heldout"]
    assert set(measured["false_positives_at_95_recall"]) == {
        "random looks", "no style",
        *(f"{style}, {level}" for style in STYLES for level in ("weak", "medium", "strong"))}
    assert set(measured["auc_per_class"]) <= set(CLASSES) and 0 <= measured["recall_at_5_false_positives"] <= 1
    assert measured["heat_hits"]["hottest cell"] >= 0
    with Image.open(out.with_suffix(".png")) as curve:
        assert curve.size == (800, 300)
    images = Images(torch.rand(2, 3, 48, 48, generator=torch.Generator().manual_seed(0)))
    verdicts = artifact(["a"] * 2, images, rubrics=[Rubric(prompt="a")] * 2, weights=str(out))
    assert all(0 < verdict.value < 1 for verdict in verdicts)
    with pytest.raises(RlhfImgError, match="trained at 32 px"):
        artifact(["a"], Images(torch.zeros(1, 3, 96, 96)), rubrics=[Rubric(prompt="a")], weights=str(out))


def small_evaluation(net, **settings):
    return evaluate(net, n=70, **settings)


def test_options_that_do_not_fit_are_refused(photos, tmp_path):
    for args, message in (
        (["--side", "128"], "give their folder with --images"),
        (["--side", "100", "--images", str(photos)], "give a multiple of 8"),
        (["--images", str(tmp_path)], "at least 5 are needed"),
    ):
        with pytest.raises(RlhfImgError, match=message):
            CliRunner().invoke(app, ["train", "artifact", *args], catch_exceptions=False)
