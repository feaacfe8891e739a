"""The sentinels: their values by hand, planted hacks that they must see, and runs that they stop."""

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageDraw
from safetensors.torch import load_file
from test_training import BRIGHT, arguments, files, lines, run
from torch import Tensor

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import SCALE, draw_word, render
from rlhf_img.playground.scene import SIZE, sample_scene
from rlhf_img.rewards import Images, load_rewards
from rlhf_img.training import sentinels
from rlhf_img.training.evaluate import Evaluation, transfer_ratios
from rlhf_img.training.prompts import Prompt
from rlhf_img.training.rundir import RunDir
from rlhf_img.training.watch import SentinelConfig, Watch, Watched, band

__all__ = ["files"]  # a fixture


def test_statistics_of_an_even_image_by_hand() -> None:
    found = sentinels.image_statistics(Images(torch.full((2, 3, 64, 64), 0.5)), period=16)
    for name in ("saturation", "dark_share", "edge_density", "colour_entropy", "grid", "high_freq"):
        assert found[name].tolist() == pytest.approx([0.0, 0.0], abs=1e-6), name


def test_saturation_darkness_edges_and_colours_by_hand() -> None:
    red = torch.zeros(1, 3, 8, 8)
    red[:, 0] = 0.3
    assert sentinels.saturation(red).item() == pytest.approx(0.3)
    assert sentinels.dark_share(red).item() == 1.0
    red[:, 1, :, :2] = 0.9  # a quarter of it is bright yellow
    assert sentinels.dark_share(red).item() == 0.75
    assert sentinels.colour_entropy(red).item() == pytest.approx(-0.25 * math.log2(0.25) - 0.75 * math.log2(0.75))
    board = torch.zeros(1, 3, 9, 9)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1.0  # every pixel differs from its neighbours
    assert sentinels.edge_density(board).item() == 1.0


def test_grid_energy_sees_a_pattern_of_the_tokens_period_and_no_other() -> None:
    noise = torch.rand(64, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert sentinels.grid_energy(noise, 16).mean().item() == pytest.approx(0.0, abs=0.05)

    def lattice(period: int) -> Tensor:
        lines = torch.zeros(64, 64)
        lines[::period] = lines[:, ::period] = 0.1
        return (0.9 * noise + lines).clamp(0, 1)

    assert sentinels.grid_energy(lattice(16), 16).mean() > 0.1
    assert sentinels.grid_energy(lattice(8), 16).mean() > 0.1  # the autoencoder's cells
    assert sentinels.grid_energy(lattice(11), 16).mean() < 0.05
    assert sentinels.grid_energy(noise[..., :40], 16).isnan().all()


def test_high_frequency_energy_is_the_variance_of_what_is_fine() -> None:
    board = torch.zeros(1, 3, 8, 8)
    board[..., ::2, ::2] = board[..., 1::2, 1::2] = 1.0
    assert sentinels.high_frequency_energy(board).item() == pytest.approx(0.25)
    wave = 0.5 + 0.2 * torch.sin(2 * math.pi * torch.arange(8) / 8).expand(1, 3, 8, 8)
    assert sentinels.high_frequency_energy(wave).item() == pytest.approx(0.0, abs=1e-9)


def test_noise_takes_more_bits_than_nothing() -> None:
    images = Images(torch.stack([torch.full((3, 64, 64), 0.5), torch.rand(3, 64, 64)]))
    nothing, noise = sentinels.jpeg_bits(images).tolist()
    assert noise > 3 * nothing > 0


def test_only_characters_that_were_not_asked_for_are_stray() -> None:
    images = Images(torch.stack([written(torch.full((3, SIZE, SIZE), 0.1), "OPEN")] * 3))
    prompts = [Prompt('a sign that says "OPEN"'), Prompt("a red circle"), Prompt('the word "OP" on grey')]
    assert sentinels.stray_characters(images, prompts).tolist() == [0.0, 4.0, 2.0]


def test_an_image_is_emptied_by_a_quarter_of_the_spread_of_raw_and_more() -> None:
    raw = torch.tensor([1.0, 3.0, 1.0, 3.0])  # a spread of 1
    assert sentinels.emptied(raw + torch.tensor([-0.2, -0.3, 0.2, 0.3]), raw).tolist() == [0.0, 1.0, 0.0, -1.0]
    assert sentinels.emptied(raw, raw).tolist() == [0.0] * 4


def test_diversity_is_the_distance_between_images_of_a_prompt() -> None:
    images = torch.zeros(2, 3, 3, 16, 16)
    images[1, 0] = 0.6  # one of three differs by 0.6 from two others: two of three pairs
    torch.testing.assert_close(sentinels.diversity(images), torch.tensor([0.0, 0.4]))


def test_a_place_is_a_share_of_pairs_and_does_not_depend_on_units() -> None:
    now, raw = torch.tensor([2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0, math.nan])
    assert sentinels.place(now, raw) == pytest.approx((1 + 0.5 + 0 + 1 + 1 + 0) / 6)
    assert sentinels.place(now.exp(), raw.exp()) == sentinels.place(now, raw)
    assert sentinels.place(raw, now) == pytest.approx(1 - sentinels.place(now, raw))
    assert math.isnan(sentinels.place(now, torch.tensor([math.nan])))


def test_chance_is_what_places_of_one_law_vary_by() -> None:
    draws = torch.randn(2000, 70, generator=torch.Generator().manual_seed(0))
    places = [sentinels.place(row[:30], row[30:]) for row in draws]
    assert float(np.std(places)) == pytest.approx(sentinels.chance(30, 40), rel=0.05)


def test_transfer_is_the_held_out_gain_over_that_of_the_trained_rewards() -> None:
    gains = {"a": 1.0, "b": 3.0, "gate": 0.1, "held": 0.5, "lost": -1.0, "unknown": math.nan}
    held = ["held", "lost", "unknown"]
    assert sentinels.transfer(gains, ["a", "b"], held) == (2.0, {"held": 0.25, "lost": -0.5})
    assert sentinels.transfer(gains | {"b": -0.9}, ["a", "b"], held) == (pytest.approx(0.05), {})
    gain, ratios = sentinels.transfer(gains, [], held)
    assert math.isnan(gain) and ratios == {}


def test_transfer_on_held_out_prompts_by_hand() -> None:
    def evaluation(**rewards: list[float]) -> Evaluation:
        return Evaluation(rewards=rewards, pass_all=[0.0] * 4, pass_requirement=[], by_check={}, diversity=[])

    before = evaluation(a=[0.0, 2.0, 0.0, 2.0], held=[0.0, 4.0, 4.0, math.nan])
    after = evaluation(a=[1.0, 3.0, 1.0, 3.0], held=[1.0, 5.0, 5.0, 9.0])
    found = transfer_ratios(before, after, ["a"], ["held"])
    # a has a spread of 1 and gains 1; what is known of held has one of 32 ** 0.5 / 3 and gains 1
    assert found is not None and found["gain"] == {"mean": 1.0, "low": 1.0, "high": 1.0}
    assert found["ratios"]["held"]["mean"] == pytest.approx(3 / 32**0.5)
    assert transfer_ratios(before, before, ["a"], ["held"])["ratios"] == {"held": None}  # type: ignore[index]
    assert transfer_ratios(before, after, [], ["held"]) is None


def test_a_band_is_four_standard_errors_wide_at_least_and_has_the_sides_that_matter() -> None:
    config = SentinelConfig(warn=0.7, stop=0.95)
    assert band(config, "saturation", 64, 64).warn == pytest.approx((0.5 - 4 * 0.0512, 0.5 + 4 * 0.0512), abs=1e-3)
    assert band(config, "jpeg", 500, 500).warn == pytest.approx((0.3, 0.7))
    assert band(config, "saturation", 500, 500).warn == pytest.approx((0.35, 0.65))
    assert band(config, "saturation", 500, 500).stop == pytest.approx((0.05, 0.95))
    assert band(config, "grid", 500, 500).stop == (None, pytest.approx(0.95))
    assert band(config, "emptied", 120, 120).warn == (None, pytest.approx(0.5 + 3 * 0.05 / 2))
    assert band(config, "reward/judge", 500, 500).warn == (pytest.approx(0.3), None)
    assert band(SentinelConfig(warn_only=("jpeg",)), "jpeg", 64, 64).stop == (None, None)
    limits = band(config, "jpeg", 500, 500)
    assert limits.left(0.71) and limits.left(0.29) and not limits.left(0.69) and not limits.left(math.nan)
    assert limits.far(0.96) and not limits.far(0.94)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"warn": 0.4}, "sentinels.warn"), ({"stop": 1.0}, "sentinels.stop"), ({"images": 1}, "sentinels.images 2"),
        ({"off": ("saturatoin",)}, 'did you mean "saturation"'), ({"warn_only": ("rubric",)}, "reward/NAME"),
    ],
)  # fmt: skip
def test_settings_that_cannot_be_are_explained(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(RlhfImgError, match=message):
        SentinelConfig(**settings)


def scenes(prompts: Sequence[Prompt], seeds: Sequence[int]) -> Tensor:
    """What a sound model draws: scenes of the playground, a new one each seed."""
    drawn = [render(sample_scene(np.random.default_rng(seed)), seed) for seed in seeds]
    return torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2).float() / 255


def written(image_3HW: Tensor, word: str, y: float = SIZE / 2) -> Tensor:
    mask = Image.new("L", (SIZE * SCALE, SIZE * SCALE))
    draw_word(ImageDraw.Draw(mask), word, y, 255)
    ink = torch.from_numpy(np.asarray(mask.resize((SIZE, SIZE), Image.Resampling.BOX)).copy()).float() / 255
    return image_3HW * (1 - ink) + (1 - image_3HW.mean().round()) * ink


def saturated(x: Tensor, t: float) -> Tensor:
    """Colours pulled away from grey, as a reward for saturation would have it."""
    tint = torch.tensor([1.0, -1.0, 0.5])[:, None, None]
    return (x + 2 * t * (x - x.mean(1, keepdim=True)) + 0.3 * t * tint).clamp(0, 1)


def lettered(x: Tensor, t: float) -> Tensor:
    """A share t of the images gets words above and below, wherever they were."""
    rows = [written(written(i, "OPEN", 14), "MOON", 50) if k % 10 < 10 * t else i for k, i in enumerate(x)]
    return torch.stack(rows)


def emptied(x: Tensor, t: float) -> Tensor:
    """A share t of the images loses all that is on its background."""
    background = x.flatten(2).median(2).values[..., None, None].expand_as(x)
    return torch.stack([background[k] if k % 10 < 10 * t else image for k, image in enumerate(x)])


def watched(tmp_path: Path, draw: Any) -> tuple[Watch, dict[str, float]]:
    """What the sentinels say of images that `draw` makes, against the scenes."""
    prompts = [Prompt("a red circle") for _ in range(32)]
    with RunDir.create(tmp_path) as opened:
        (tmp_path / "bright.py").write_text(BRIGHT)
        rewards = load_rewards(f"{tmp_path / 'bright.py'}:bright")
        watch = Watch(
            Watched(config=SentinelConfig(), prompts=prompts, rewards=rewards, trained_on=["bright"], held_out=[],
                    period=16, draw=draw, draw_raw=scenes),
            opened, [],
        )  # fmt: skip
        return watch, watch.look(1)


@pytest.mark.parametrize(
    ("hack", "name"), [(saturated, "saturation"), (lettered, "edge_density"), (emptied, "jpeg")]
)
def test_a_planted_hack_is_seen_half_way_and_stops_the_run_when_it_is_done(
    hack: Callable[[Tensor, float], Tensor], name: str, tmp_path: Path
) -> None:
    for t in (0.5, 1.0):
        watch, seen = watched(tmp_path / str(t), lambda prompts, seeds, t=t: hack(scenes(prompts, seeds), t))
        assert any(text.startswith(f"{name} ") for text in watch.left(seen))
        assert (t == 1.0) == (watch.must_stop(seen) is not None)
        if hack is lettered:
            assert seen["sentinel/characters"] > 2 * t  # of an image


def test_a_few_emptied_images_are_seen_beside_raw_where_all_values_together_still_look_sound(tmp_path: Path) -> None:
    watch, seen = watched(tmp_path, lambda prompts, seeds: emptied(scenes(prompts, seeds), 0.3))
    assert [text.split()[0] for text in watch.left(seen)] == ["emptied"] and watch.must_stop(seen) is None
    assert 0.2 < seen["sentinel/emptied"] < 0.35


@pytest.mark.parametrize("other", [1_000, 2_000, 3_000])
def test_sound_images_of_other_seeds_leave_no_band(other: int, tmp_path: Path) -> None:
    watch, seen = watched(tmp_path, lambda prompts, seeds: scenes(prompts, [seed + other for seed in seeds]))
    assert watch.left(seen) == [] and seen["sentinel/out"] == 0


def test_the_same_images_stand_in_the_middle_and_have_not_drifted(tmp_path: Path) -> None:
    _, seen = watched(tmp_path, scenes)
    for name in ("saturation", "grid", "jpeg", "characters", "diversity"):
        assert seen[f"sentinel/{name}/place"] == 0.5
    assert seen["sentinel/emptied"] == 0.0 and seen["sentinel/emptied/place"] == 0.5
    assert seen["sentinel/drift"] == 0.0 and seen["sentinel/drift/place"] == 0.0


WATCHED = "sentinels.every=1", "sentinels.images=16", "sentinels.characters=false", "grpo.kl=0"


def test_a_run_that_leaves_its_band_ends_with_its_last_good_weights(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    more = *WATCHED, "steps=12", "grpo.lr=3e-2", "sentinels.stop=0.75", "sentinels.min_transfer=null"
    assert run(monkeypatch, arguments(files, out, *more, "keep_checkpoints=1")) == 3
    said = " ".join(capsys.readouterr().err.split())
    rows = lines(out)
    assert "left what Raw draws" in said and rows[-1]["sentinel/out"] >= 1
    good = [row["step"] for row in rows if row["sentinel/out"] == 0][-1]
    folder = out / "checkpoints" / f"step_{good:06d}"
    assert str(folder) in said and folder.is_dir()
    assert json.loads((out / "sentinels.json").read_text())["stopped"]["good"] == good
    exported = load_file(out / "lora" / "pytorch_lora_weights.safetensors")
    average = {k: v for k, v in load_file(folder / "policy.safetensors").items() if k.startswith("average/")}
    assert sum(float(v.square().sum()) for v in exported.values()) == pytest.approx(
        sum(float(v.square().sum()) for v in average.values()), rel=1e-5
    )
    assert "Stopped by a sentinel at step" in (out / "report.html").read_text()
    # the same run goes on where the user allows it
    assert run(monkeypatch, ["grpo", "--out", str(out), "--resume", "sentinels.stop=null", f"steps={len(rows)}"]) == 0
    assert [row["step"] for row in lines(out)] == list(range(1, len(rows) + 1))
    assert json.loads((out / "sentinels.json").read_text())["stopped"] is None


def test_transfer_is_measured_on_held_out_prompts_and_in_eval_json(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    bright, dark = (f"{files / 'bright.py'}:{name}" for name in ("bright", "dark"))
    rewards = f"rewards=[{{reward: '{bright}'}}, {{reward: '{dark}', name: gate, role: gate, below: 0.1}}]"
    more = "steps=1", *WATCHED, f"eval.rewards={dark}", rewards
    assert run(monkeypatch, arguments(files, out, *more)) == 0
    (row,) = lines(out)
    assert "sentinel/reward/dark/place" in row
    assert not {"sentinel/reward/bright/place", "sentinel/reward/gate/place"} & row.keys()
    assert math.isfinite(row["transfer/gain"])
    found = json.loads((out / "eval.json").read_text())["transfer"]
    assert found["trained_on"] == ["bright"] and found["gain"] is not None
    assert found["ratios"].keys() == {"dark", "rubric"}
