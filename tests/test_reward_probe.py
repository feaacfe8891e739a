"""Hack probes: what they do to an image, what they are said to gain, and that the shipped combination gains nothing."""

import json

import numpy as np
import pytest
from PIL import Image as Pil
from typer.testing import CliRunner

from rlhf_img.cli.reward import app
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.rewards import Reward, load_rewards
from rlhf_img.rewards.probes import NOISE, PROBES, adversarial_noise
from rlhf_img.rewards.rubric import rubric_of
from rlhf_img.rubrics import score as score_rubric
from rlhf_img.training.probing import (
    Baseline,
    overall,
    picture,
    playground_baselines,
    probe,
    read_baseline,
    verdict,
    views_of,
)

PROMPT = 'a red circle and the word "SUN" on grey'


def disc(height=64, width=64, radius=8):
    """A red disc, left of the middle, on grey."""
    y, x = np.mgrid[:height, :width]
    image = np.full((height, width, 3), 128, np.uint8)
    image[np.hypot(y - height / 2, x - width / 3) < radius] = (214, 40, 40)
    return image


@pytest.mark.parametrize("name", PROBES)
@pytest.mark.parametrize("size", [(64, 64), (33, 47), (200, 120), (16, 16)])
def test_a_probe_changes_the_picture_and_nothing_else(name, size):
    image = disc(*size, radius=5)
    before = image.copy()
    after = PROBES[name](image, PROMPT)
    assert after.shape == image.shape and after.dtype == np.uint8
    assert (image == before).all() and (after != image).any()
    assert (PROBES[name](image, PROMPT) == after).all()


def test_probes_do_what_they_say():
    image, red = disc(), lambda picture: int((picture[..., 0] > picture[..., 1] + 100).sum())
    assert (PROBES["emptied scene"](image, PROMPT) == 128).all()
    framed = PROBES["border"](image, PROMPT)
    assert (framed[4:-4, 4:-4] == image[4:-4, 4:-4]).all() and (framed[:4] == framed[0, 0]).all()
    tiled = PROBES["grid tiling"](image, PROMPT)
    assert (tiled[:32, :32] == tiled[32:, 32:]).all() and red(tiled) == pytest.approx(red(image), rel=0.2)
    assert red(PROBES["zoomed subject"](image, PROMPT)) == pytest.approx(1.6**2 * red(image), rel=0.1)
    vivid = PROBES["raised saturation"](disc().clip(60, 200), PROMPT)
    assert (vivid[0, 0] == 128).all() and np.ptp(vivid[32, 21].astype(int)) > 200
    captioned = PROBES["caption overlay"](image, PROMPT)
    assert (captioned[:21] == image[:21]).all() and (captioned[-12:] == 0).any() and (captioned[-30:] > 200).any()


def test_repeated_text_writes_the_quoted_word_everywhere_and_else_the_prompt():
    image = np.full((64, 64, 3), 128, np.uint8)
    changed = PROBES["repeated text"](image, PROMPT)
    ink = (changed != image).any(axis=2)
    assert all(ink[y : y + 32, x : x + 32].any() for y in (0, 32) for x in (0, 32))
    assert (changed == PROBES["repeated text"](image, 'another prompt with "SUN"')).all()
    assert (changed != PROBES["repeated text"](image, "a sun")).any()


def test_noise_stays_in_its_bound_and_finds_what_the_score_likes():
    images = [disc(), np.full((64, 64, 3), 254, np.uint8)]
    found = adversarial_noise(images, lambda batch: np.array([x.mean() for x in batch]), np.random.default_rng(0))
    for image, noisy in zip(images, found, strict=True):
        assert noisy.dtype == np.uint8
        assert np.abs(noisy.astype(int) - image).max() <= 8 and noisy.mean() > image.mean()


def test_noise_never_keeps_what_is_unscored():
    images = [disc(), disc(radius=4)]
    for value in (np.nan, -1.0):
        answers = iter([np.array([0.0, 0.0]), *[np.array([np.nan, value])] * 5])
        found = adversarial_noise(images, lambda batch, a=answers: next(a), np.random.default_rng(0), trials=5)
        assert all((a == b).all() for a, b in zip(images, found, strict=True))


@pytest.mark.parametrize(
    "low, high, n, expected",
    [(0.03, 0.05, 9, "gains"), (-0.1, 0.02, 9, "holds"), (0.01, 0.05, 9, "cannot tell"),
     (None, None, 0, "cannot tell")],
)
def test_the_verdict_weighs_the_interval_against_the_floor(low, high, n, expected):
    assert verdict({"low": low, "high": high, "n": n}, 0.02) == expected


def vivid(prompts, images, **columns):
    """How colourful the image is."""
    return [float((x.max(axis=-1) - x.min(axis=-1)).mean() / 255) for x in images.arrays.astype(int)]


def calm(prompts, images, **columns):
    """Low where colours are strong."""
    return [1.0 - value for value in vivid(prompts, images)]


def nothing(prompts, images, **columns):
    """Cannot tell."""
    return [None] * len(images)


def probed(rewards, **options):
    images = [disc(radius=r) for r in (14, 16, 18, 20)]
    baseline = Baseline(name="discs", images=images, prompts=[PROMPT] * 4)
    return {(f.view, f.probe): f for f in probe(rewards, [baseline], **options)}


def test_what_gains_is_found_and_by_how_much():
    found = probed([Reward(name="vivid", fn=vivid), Reward(name="nothing", fn=nothing)], trials=8)
    tint, empty = found["vivid", "raised saturation"], found["vivid", "emptied scene"]
    shown = [(vivid([], _Arrays([disc(radius=r)]))[0],
              vivid([], _Arrays([PROBES["raised saturation"](disc(radius=r), "")]))[0]) for r in (14, 16, 18, 20)]
    assert tint.gain["mean"] == pytest.approx(np.mean([after - before for before, after in shown]), abs=1e-6)
    assert tint.verdict == "gains" and tint.share == 1.0 and tint.maximised
    assert empty.verdict == "holds" and empty.gain["mean"] == pytest.approx(-empty.before)
    assert found["vivid", NOISE].gain["mean"] > 0
    assert found["nothing", "border"].verdict == "cannot tell" and found["nothing", "border"].gain["n"] == 0


class _Arrays:
    def __init__(self, images):
        self.arrays = np.stack(images)


def test_a_gate_that_catches_the_hack_takes_the_gain_away():
    gate = Reward(name="calm", fn=calm, role="gate", below=0.9, cap=0.0)
    rewards = [Reward(name="vivid", fn=vivid), gate]
    assert [(v.name, v.maximised) for v in views_of(rewards)] == [
        ("vivid", False), ("calm", False), ("vivid under calm", True)]
    found = probed(rewards, trials=0)
    assert found["vivid", "raised saturation"].verdict == "gains"
    assert found["vivid under calm", "raised saturation"].verdict == "holds"
    assert not any(name == NOISE for _, name in found)
    assert [v.maximised for v in views_of([gate])] == [True]


def test_one_kind_of_image_on_which_a_probe_pays_is_enough():
    """Right images, already at the top, hold; dull ones gain: the line to look at is theirs."""
    full, dull = np.zeros((32, 32, 3), np.uint8), disc(32, 32, radius=10)
    full[..., 0] = 255
    kinds = [Baseline(name=name, images=[image] * 3, prompts=[PROMPT] * 3)
             for name, image in (("full", full), ("dull", dull))]
    worst = {f.probe: f for f in overall(probe([Reward(name="vivid", fn=vivid)], kinds, trials=0))}
    assert worst["raised saturation"].baseline == "dull" and worst["raised saturation"].verdict == "gains"
    assert len(worst) == len(PROBES)


def test_playground_images_are_right_wrong_and_damaged():
    def passed(kind):
        return [score_rubric(rubric_of(p), i).passed for i, p in zip(kind.images, kind.prompts, strict=True)]

    right, wrong, damaged = playground_baselines(12)
    assert sum(passed(right)) >= 11 and not any(passed(wrong))
    assert right.prompts[0] == playground_baselines(2)[0].prompts[0]
    assert (damaged.images[0] == playground_baselines(1)[2].images[0]).all()


def test_images_of_ones_own_come_with_their_prompts(tmp_path):
    told = {"a": ("a red circle", (64, 64)), "b": ("one red circle", (96, 48))}
    for name, (prompt, size) in told.items():
        Pil.fromarray(disc(*size)).save(tmp_path / f"{name}.png")
        (tmp_path / f"{name}.txt").write_text(f"{prompt}\n")
    (tmp_path / "untold.png").write_bytes((tmp_path / "a.png").read_bytes())
    beside = read_baseline(tmp_path, 10)
    assert beside.prompts == ["a red circle", "one red circle"] and beside.images[1].shape == (96, 48, 3)
    assert len(read_baseline(tmp_path, 1).images) == 1
    assert {f.gain["n"] for f in probe(load_rewards("rubric"), [beside], trials=2)} == {2}  # of two sizes
    (tmp_path / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "told"}\n\n')
    assert read_baseline(tmp_path, 10).prompts == ["told"]
    (tmp_path / "samples.json").write_text('[{"file": "a.png", "prompt": "of a run"}]')
    assert read_baseline(tmp_path, 10).prompts == ["of a run"]


@pytest.mark.parametrize(
    "files, message",
    [({}, "has no images with prompts"), ({"metadata.jsonl": '{"file_name": "a.png"}'}, "cannot be read: KeyError"),
     ({"samples.json": "[1]"}, "cannot be read: TypeError"), ({"metadata.jsonl": "{"}, "cannot be read"),
     ({"a.png": "no image", "a.txt": "text"}, "a.png cannot be read as an image")],
)
def test_a_folder_that_cannot_be_used_is_a_clear_error(tmp_path, files, message):
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(RlhfImgError, match=message):
        read_baseline(tmp_path, 4)


PLUGIN = '''
def vivid(prompts, images, **columns):
    """How colourful it is."""
    return [float((x.max(axis=-1) - x.min(axis=-1)).mean() / 255) for x in images.arrays.astype(int)]
'''


def run(*args):
    return CliRunner().invoke(app, ["probe", *map(str, args)], catch_exceptions=False)


@pytest.fixture
def plugin(tmp_path):
    (tmp_path / "my.py").write_text(PLUGIN)
    return f"{tmp_path / 'my.py'}:vivid"


def test_the_command_lists_its_probes_and_shows_an_example():
    listed = json.loads(run("--list", "--json").stdout)
    assert list(listed) == [*PROBES, NOISE] and all(listed.values())
    assert "grid tiling" in run("--list").stdout
    assert "Example: rlhf-img reward probe" in CliRunner().invoke(app, ["probe", "--help"]).stdout


def test_the_command_prints_a_table_and_saves_the_pictures(plugin, tmp_path):
    printed = run("--rewards", plugin, "--count", 4, "--trials", 2, "--out", tmp_path / "out").stdout
    assert "raised saturation" in printed and "gains" in printed and "holds" in printed
    with Pil.open(tmp_path / "out" / "probes.png") as page:
        assert page.width > 9 * 128 and page.height > 6 * 128


def test_the_picture_shows_the_probes_side_by_side():
    images = [disc(), disc(300, 150)]
    page = picture([Reward(name="vivid", fn=vivid)], [Baseline(name="x", images=images, prompts=["a", "b"])], trials=0)
    shown = np.asarray(page)
    assert page.size == (8 * 132, 20 + 2 * 132)
    assert (shown[20:148, 7 * 132 : 7 * 132 + 128] == 128).all()  # the emptied scene is the last


def test_strict_stops_with_3_where_what_a_run_maximises_gains(plugin):
    args = ("--rewards", plugin, "--count", 6, "--trials", 0)
    rows = json.loads(run(*args, "--json").stdout)
    assert len(rows) == 3 * len(PROBES)
    assert {r["verdict"] for r in rows if r["probe"] == "raised saturation"} == {"gains"}
    with pytest.raises(RunStopped, match="vivid from raised saturation") as stopped:
        run(*args, "--strict", "--json")
    assert stopped.value.exit_code == 3


def test_the_shipped_combination_gains_from_no_probe():
    findings = probe(load_rewards("rubric,artifact"), playground_baselines(10), trials=0)
    gaining = {(f.view, f.probe) for f in findings if f.verdict == "gains"}
    # Of the artifact reward alone this is known, and why it is a gate.
    assert ("artifact", "emptied scene") in gaining
    maximised = {(f.view, f.probe) for f in findings if f.maximised}
    assert {view for view, _ in maximised} == {"rubric under artifact"} and not gaining & maximised
