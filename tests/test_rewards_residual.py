"""The residual: clean renders are explained in any look, defects are not, and no policy is trained on it unasked."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.loading import load
from rlhf_img.model.vae import reconstruct
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import STYLES, Scene, Thing, sample_scene
from rlhf_img.rewards import Images, load_rewards, score
from rlhf_img.rewards.artifact_measure import auc
from rlhf_img.rewards.defects import CLASSES, GARBLED, inject, parts_of
from rlhf_img.rewards.residual import fit_clean, residual, unexplained
from rlhf_img.training.config import RunConfig
from rlhf_img.training.loop import watched_rewards

N = 8


def circle(x: float, y: float, radius: float = 10.0, color: str = "red") -> Thing:
    return Thing(shape="circle", color=color, size="medium", x=x, y=y, radius=radius)


@pytest.fixture(scope="module")
def scenes():
    rng = np.random.default_rng(11)
    return [replace(sample_scene(rng, "heldout"), style=None) for _ in range(N)]


@pytest.fixture(scope="module")
def model():
    return load("playground")


def through(model, images: list[np.ndarray]) -> list[np.ndarray]:
    """Images after the embedded autoencoder, which softens edges and turns grain to mottle."""
    x = torch.from_numpy(np.stack(images)).permute(0, 3, 1, 2).float() / 255
    with torch.inference_mode():
        return list((reconstruct(model, x) * 255).round().byte().permute(0, 2, 3, 1).numpy())


def shares(images: list[np.ndarray]) -> np.ndarray:
    return np.array([fit_clean(image).residual for image in images])


@pytest.fixture(scope="module")
def clean_shares(scenes, model):
    """Of clean renders as they are, and through the autoencoder."""
    clean = [render(scene) for scene in scenes]
    return torch.tensor(shares(clean)), torch.tensor(shares(through(model, clean)))


def test_a_clean_render_is_found_again_to_a_quarter_of_a_pixel():
    star = Thing(shape="star", color="blue", size="small", x=44.3, y=20.6, radius=7.6)
    scene = Scene(things=(circle(20.4, 22.1, 9.3), star), background="white", word="TEA")
    fit = fit_clean(render(scene))
    assert fit.residual == 0 and fit.word == "TEA" and fit.word_xy == pytest.approx((32, 54), abs=0.5)
    found = {figure.shape: figure for figure in fit.figures}
    assert set(found) == {"circle", "star"}
    for thing in scene.things:
        figure = found[thing.shape]
        assert (figure.x, figure.y, figure.radius) == pytest.approx((thing.x, thing.y, thing.radius), abs=0.3)
    assert np.abs(fit.render_HW3.astype(int) - render(scene)).mean() < 1.5


def test_an_empty_scene_has_no_glitch():
    assert fit_clean(np.full((64, 64, 3), 128, np.uint8)).residual == 0


def test_clean_renders_are_explained_in_every_style_and_through_the_autoencoder(scenes, model):
    for style in (None, *STYLES):
        clean = [render(replace(scene, style=style), seed=i) for i, scene in enumerate(scenes)]
        assert shares(clean).max() < 0.001, style
        value = np.exp(-shares(through(model, clean)) / 0.01)
        assert value.mean() > 0.85, style


@pytest.mark.parametrize("name", CLASSES)
def test_injected_defects_are_not_explained(scenes, model, clean_shares, name):
    rng = np.random.default_rng(0)
    if name == GARBLED:
        many = [replace(sample_scene(rng, "heldout"), style=None) for _ in range(16 * N)]
        scenes = [scene for scene in many if scene.word][:N]
    broken = [inject(name, render(scene), parts_of(scene, name), rng) for scene in scenes]
    damaged = [image for image in broken if image is not None]
    for seen, good, least in zip((damaged, through(model, damaged)), clean_shares, (0.9, 0.7), strict=True):
        bad = torch.tensor(shares(seen))
        assert auc(bad, good) > least
        assert bad.mean() > max(0.002, 10 * good.mean())


def test_what_is_no_thing_of_the_playground_is_unexplained():
    scene = Scene(things=(circle(20, 32), circle(46, 32, color="blue")), background="grey")
    image = render(scene).copy()
    image[8:12, 28:36] = (214, 40, 40)  # a crumb: too small to be a thing
    fit = fit_clean(image)
    assert len(fit.figures) == 2
    assert fit.unexplained_HW[8:12, 28:36].mean() > 0.9 and fit.unexplained_HW.sum() <= 40
    fused = np.array(render(scene))
    fused[29:35, 28:38] = (214, 40, 40)  # a bridge between the two
    assert fit_clean(fused).unexplained_HW[30:34, 30:36].mean() > 0.4


def test_an_error_of_one_pixel_is_forgiven_and_one_of_three_is_not():
    drawn = np.zeros((16, 16, 3), np.float32)
    drawn[:, 8:] = 200
    moved = [np.roll(drawn, shift, axis=1)[:, 4:12] for shift in (1, 3)]
    assert unexplained(moved[0], drawn[:, 4:12], 20).sum() == 0
    assert unexplained(moved[1], drawn[:, 4:12], 20).sum() == 16 * 2


def test_the_reward_falls_with_the_share_and_refuses_other_sizes():
    clean = render(Scene(things=(circle(32, 32, 13),), background="white"))
    broken = clean.copy()
    broken[24:36, 28:34] = 245  # a hole of 72 px, of which a rim of one is forgiven
    images = Images(torch.from_numpy(np.stack([clean, broken])).permute(0, 3, 1, 2).float() / 255)
    scores = score(load_rewards("residual"), ["a"] * 2, images)
    good, bad = scores.values_BK[:, 0].tolist()
    share = scores.details["residual"][1].residual
    assert good == 1 and bad == pytest.approx(np.exp(-100 * share), rel=1e-5) and 40 / 4096 <= share <= 90 / 4096
    with pytest.raises(RlhfImgError, match="96 x 64 px, but it knows only what the playground draws"):
        residual(["a"], Images(torch.zeros(1, 3, 64, 96)))


def test_it_measures_a_run_and_trains_one_only_when_told_so_in_as_many_words():
    config = RunConfig.__new__(RunConfig)  # `eval.rewards` alone is read
    object.__setattr__(config, "eval", type("Eval", (), {"rewards": "residual"})())
    watched = watched_rewards(load_rewards("rubric,artifact"), config)
    assert [reward.name for reward in watched] == ["rubric", "artifact", "residual"]
    with pytest.raises(RlhfImgError, match=r"reward residual only measures.*eval\.rewards=residual.*role: objective"):
        watched_rewards(load_rewards("rubric,residual"), config)
    object.__setattr__(config, "eval", type("Eval", (), {"rewards": None})())
    told = load_rewards([{"reward": "rubric"}, {"reward": "residual", "role": "objective"}])
    assert [reward.name for reward in watched_rewards(told, config)] == ["rubric", "residual"]
