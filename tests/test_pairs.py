"""Preference pairs: files in every layout, what is wrong with a row, making them, and runs on them."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from PIL import Image
from test_training import BRIGHT, lines, run, state
from tiny import PROMPTS, SIZE, save_tiny, tiny_model

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.vae import encode
from rlhf_img.rewards import Images, load_rewards
from rlhf_img.training.dpo import encode_pairs, split
from rlhf_img.training.pair_making import MakeConfig, Setting, parse_setting, total_reward
from rlhf_img.training.pairs import Bad, Pair, encode_image, parse_columns, read_pairs, read_rows, survey, write_pairs
from rlhf_img.training.prompts import Prompt

SMALL = (
    "steps=4", "eval.prompts=4", "eval.num_steps=2", "eval.diversity_prompts=2", "eval.diversity_images=2", "samples=2",
    "checkpoint_every=1", "sample_every=0", "tracker=none", "lora.rank=4", "dpo.pairs=4", "dpo.calibration_steps=2",
    "heldout_pairs=4", "measure_every=2", "sentinels.every=0",
)  # fmt: skip


def png(level: int, size: tuple[int, int] = (SIZE, SIZE)) -> bytes:
    return encode_image(Image.new("RGB", size, (level, level, 255 - level)))


def pair(i: int, prompt: str | None = None) -> Pair:
    return Pair(prompt=prompt or PROMPTS[i % 4], chosen=png(200 - i), rejected=png(i), source="by hand",
                on_policy=i % 2 == 0, margin=0.1 * i)  # fmt: skip


def table(folder: Path, rows: list[dict[str, Any]], name: str = "data.parquet") -> Path:
    folder.mkdir(exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows), folder / name)
    return folder / name


@pytest.fixture(scope="session")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny model, prompts, a reward, and 24 pairs of 12 prompts."""
    folder = tmp_path_factory.mktemp("pairs")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "bright.py").write_text(BRIGHT)
    texts = [f"{prompt}{end}" for prompt in PROMPTS for end in ("", " on grey", " above a star")]
    write_pairs(folder / "pairs" / "pairs-00000.parquet", [pair(i, texts[i % 12]) for i in range(24)])
    return folder


def words(files: Path, out: Path, *more: str) -> list[str]:
    named = {
        "--model": files / "model", "--pairs": files / "pairs", "--eval-prompts": files / "prompts.txt",
        "--rewards": f"{files / 'bright.py'}:bright", "--out": out,
    }  # fmt: skip
    return ["dpo", *(str(word) for item in named.items() for word in item), *SMALL, *more]


def test_pairs_come_back_as_they_were_written_and_datasets_sees_images(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    given = [pair(i) for i in range(3)]
    write_pairs(tmp_path / "pairs.parquet", given)
    assert list(read_pairs(tmp_path / "pairs.parquet")) == given == list(read_pairs(tmp_path))
    loaded = datasets.Dataset.from_parquet(str(tmp_path / "pairs.parquet"), cache_dir=str(tmp_path / "cache"))
    assert loaded.column_names == ["prompt", "chosen", "rejected", "source", "on_policy", "margin"]
    assert np.array_equal(np.asarray(loaded[1]["chosen"]), np.asarray(given[1].images()[0]))
    assert (loaded[1]["prompt"], loaded[1]["margin"], loaded[1]["on_policy"]) == (PROMPTS[1], 0.1, False)


def test_labelled_layouts_are_read_with_a_mapping(tmp_path: Path) -> None:
    data = table(tmp_path, [
        {"caption": "a star", "jpg_0": png(1), "jpg_1": png(2), "label_0": 1.0},
        {"caption": "a star", "jpg_0": png(1), "jpg_1": png(2), "label_0": 0.0},
        {"caption": "a star", "jpg_0": png(1), "jpg_1": png(2), "label_0": 0.5},
    ])  # fmt: skip
    mapping = parse_columns("prompt=caption, image_0=jpg_0, image_1=jpg_1, prefers_0=label_0")
    first, second, third = read_rows(data, mapping)
    assert isinstance(first, Pair) and (first.chosen, first.rejected) == (png(1), png(2))
    assert isinstance(second, Pair) and (second.chosen, second.rejected) == (png(2), png(1))
    assert third == Bad(row="data.parquet, row 2", reason="a tie")


def test_label_is_the_number_of_the_preferred_image_and_images_may_be_paths(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_bytes(png(1))
    (tmp_path.parent / "outside.png").write_bytes(png(2))
    rows = [{"prompt": "x", "image_0": "a.png", "image_1": {"bytes": png(3), "path": None}, "label": 1}]
    outside = [{"prompt": "x", "image_0": "../outside.png", "image_1": "a.png", "label": 0}]
    (found,) = read_rows(_mixed(tmp_path, rows))
    assert isinstance(found, Pair) and (found.chosen, found.rejected) == (png(3), png(1))
    (refused,) = read_rows(_mixed(tmp_path, outside))
    assert isinstance(refused, Bad) and refused.reason == "image missing"


def _mixed(folder: Path, rows: list[dict[str, Any]]) -> Path:
    """A file whose two image columns have types of their own."""
    columns = {name: pa.array([row[name] for row in rows]) for name in rows[0]}
    pq.write_table(pa.table(columns), folder / "data.parquet")
    return folder / "data.parquet"


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"prompt": "  "}, "empty prompt"),
        ({"prompt": None}, "empty prompt"),
        ({"image_0": None}, "image missing"),
        ({"image_0": b""}, "image missing"),
        ({"image_0": b"no image"}, "image unreadable"),
        ({"image_0": png(2)[:60]}, "image unreadable"),
        ({"image_0": png(2, (16, 32))}, "images of different size"),
        ({"image_0": png(5)}, "identical images"),
        ({"label": None}, "label absent"),
        ({"label": 3}, "label absent"),
    ],
)
def test_what_is_wrong_with_a_row_is_named_and_the_others_are_kept(
    tmp_path: Path, change: dict[str, Any], reason: str
) -> None:
    good = {"prompt": "a star", "image_0": png(2), "image_1": png(5), "label": 0}
    data = table(tmp_path, [good, {**good, "prompt": "a cross", **change}, good])
    rows = list(read_rows(data))
    assert isinstance(rows[0], Pair)
    assert rows[1] == Bad(row="data.parquet, row 1", reason=reason)
    assert rows[2] == Bad(row="data.parquet, row 2", reason="a pair that was there before")
    found = survey(data)
    assert found.pairs == 1 and found.bad == {reason: 1, "a pair that was there before": 1}
    with pytest.raises(RlhfImgError, match=f"2 of 3 rows cannot be used.*1 x {reason}"):
        survey(data, max_bad=0.5)


@pytest.mark.parametrize(
    ("rows", "columns", "message"),
    [
        ([{"prompt": "x", "image": b""}], "", "has the columns prompt, image: expected prompt, chosen, rejected"),
        ([{"prompt": "x"}], "chosen=win", 'no column "win"'),
        ([{"prompt": "x"}], "choosen=prompt", 'did you mean "chosen"'),
        ([{"prompt": "x"}], "chosen", "give ours=theirs"),
    ],
)
def test_files_and_mappings_that_fit_nothing_are_refused(
    tmp_path: Path, rows: list[dict[str, Any]], columns: str, message: str
) -> None:
    with pytest.raises(RlhfImgError, match=message):
        list(read_rows(table(tmp_path, rows), parse_columns(columns)))


def test_data_that_is_not_there_or_no_parquet_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match="there are no pairs in"):
        list(read_rows(tmp_path))
    (tmp_path / "x.parquet").write_text("no")
    with pytest.raises(RlhfImgError, match="no readable Parquet"):
        list(read_rows(tmp_path))


def test_statistics_by_hand(tmp_path: Path) -> None:
    write_pairs(tmp_path / "a.parquet", [pair(i) for i in range(5)])
    found = survey(tmp_path)
    assert (found.pairs, found.prompts, found.on_policy) == (5, 4, 0.6)
    assert found.sizes == {"32 x 32": 5} and found.sources == {"by hand": 5}
    assert found.margins["median"] == pytest.approx(0.2) and found.margins["highest"] == pytest.approx(0.4)


def test_settings_are_read_from_text() -> None:
    assert parse_setting("steps=8, guidance=2") == Setting(steps=8, guidance=2.0)
    assert Setting(steps=4).on_policy and not Setting(guidance=1.0).on_policy and not Setting(lora="x").on_policy
    for text, message in (("step=8", 'did you mean "steps"'), ("steps=many", "is a number"), ("steps=0", "1 or more")):
        with pytest.raises(RlhfImgError, match=message):
            parse_setting(text)
    with pytest.raises(ValueError, match="both --strong and --weak"):
        MakeConfig(strong=Setting())
    with pytest.raises(ValueError, match="two images a pair"):
        MakeConfig(group=3, pairs=2)


def test_the_total_is_the_weighted_mean_under_the_gates(files: Path) -> None:
    spec: list[dict[str, Any]] = [
        {"reward": f"{files / 'bright.py'}:bright", "weight": 3.0},
        {"reward": f"{files / 'bright.py'}:dark", "weight": 1.0},
        {"reward": f"{files / 'bright.py'}:bright", "name": "gate", "role": "gate", "below": 0.3, "cap": 0.5},
    ]
    images = Images(torch.stack([torch.full((3, 8, 8), level) for level in (0.1, 0.8)]))
    found = total_reward(load_rewards(spec), [Prompt("a"), Prompt("a")], images, 2)
    assert found == pytest.approx([(3 * 0.1 + 0.5) / 4, (3 * 0.8 + 0.2) / 4], abs=1e-5)  # the first is caught
    assert all(np.isnan(total_reward([], [Prompt("a")] * 2, images, 2)))


def _make(files: Path, out: Path, *more: str) -> list[str]:
    given = "--model", files / "model", "--prompts", files / "prompts.txt", "--rewards", f"{files / 'bright.py'}:bright"
    return ["pairs", "make", "--out", str(out), *map(str, given), "--min-margin", "0", *more]


def test_best_against_worst_is_what_the_reward_says(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, _make(files, tmp_path / "p", "--group", "4", "--pairs", "2", "--setting", "steps=2")) == 0
    assert "8 pairs written" in capsys.readouterr().out
    made = list(read_pairs(tmp_path / "p"))
    assert [p.prompt for p in made] == [prompt for prompt in PROMPTS for _ in range(2)]
    for p in made:
        bright = [float(np.asarray(image).mean()) / 255 for image in p.images()]
        assert p.margin is not None and bright[0] - bright[1] == pytest.approx(p.margin, abs=0.005)
        assert p.on_policy and p.source is not None and "best of 4" in p.source
    assert all(a.margin >= b.margin for a, b in zip(made[::2], made[1::2], strict=True))  # type: ignore[operator]
    before = (tmp_path / "p" / "pairs-00000.parquet").stat().st_mtime_ns
    assert run(monkeypatch, _make(files, tmp_path / "p", "--group", "4", "--pairs", "2", "--setting", "steps=2")) == 0
    assert "1 files were there already" in capsys.readouterr().out
    assert (tmp_path / "p" / "pairs-00000.parquet").stat().st_mtime_ns == before
    assert run(monkeypatch, _make(files, tmp_path / "p", "--group", "6", "--setting", "steps=2")) == 2
    assert "made with another group, pairs" in capsys.readouterr().err


def test_a_delta_pairs_two_settings_on_the_same_noise(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    delta = ("--strong", "steps=3,guidance=2", "--weak", "steps=1", "--group", "1", "--rewards", "none")
    assert run(monkeypatch, [*_make(files, tmp_path / "p"), *delta]) == 0
    made = list(read_pairs(tmp_path / "p"))
    assert len(made) == 4 and all(p.margin is None and p.on_policy for p in made)
    assert made[0].source == "3 steps, g 2 > 1 steps, g 0"
    off = ("--strong", "guidance=2", "--weak", "steps=1,guidance=1", "--group", "1", "--rewards", "none")
    assert run(monkeypatch, [*_make(files, tmp_path / "q"), *off]) == 0
    assert survey(tmp_path / "q").on_policy == 0.0


def test_shards_are_the_parts_of_one_data_set(files: Path, tmp_path: Path) -> None:
    from rlhf_img.training.pair_making import make

    config = MakeConfig(model=str(files / "model"), prompts=str(files / "prompts.txt"), group=1, shard_prompts=1,
                        rewards=None, strong=Setting(steps=2), weak=Setting(steps=1))  # fmt: skip
    make(config, tmp_path / "whole")
    make(config, tmp_path / "parts", part=(1, 2))
    assert sorted(f.name for f in (tmp_path / "parts").glob("*.parquet")) == ["pairs-00001.parquet",
                                                                             "pairs-00003.parquet"]  # fmt: skip
    make(config, tmp_path / "parts", part=(0, 2))
    assert list(read_pairs(tmp_path / "parts")) == list(read_pairs(tmp_path / "whole"))


def test_the_page_shows_pairs_and_trusts_none_of_their_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write_pairs(tmp_path / "a.parquet", [pair(1, "<script>alert(1)</script>"), pair(2)])
    words = ["pairs", "show", str(tmp_path), "--out", str(tmp_path / "page.html")]
    assert run(monkeypatch, words) == 0
    page = (tmp_path / "page.html").read_text()
    assert page.count("data:image/png;base64,") == 4
    assert "<script>" not in page and "&lt;script&gt;" in page and "margin +0.200" in page
    assert run(monkeypatch, ["pairs", "stats", str(tmp_path), "--json"]) == 0
    assert json.loads(capsys.readouterr().out.partition("\n")[2])["pairs"] == 2


def test_latents_are_those_of_each_image_in_order(files: Path) -> None:
    model = tiny_model()
    given = [pair(1), Pair(prompt="x", chosen=png(9, (64, 32)), rejected=png(3, (64, 32))), pair(2)]
    found = encode_pairs(model, given, at_once=2)
    assert [e.grid for e in found] == [(2, 2), (2, 4), (2, 2)]
    assert [e.prompt for e in found] == [p.prompt for p in given]
    for p, e in zip(given, found, strict=True):
        for image, latents in zip(p.images(), (e.winner_NC, e.loser_NC), strict=True):
            with torch.no_grad():
                alone = encode(model, Images.from_pil([image]).tensor)[0]
            torch.testing.assert_close(latents, alone, rtol=1e-4, atol=1e-4)


def test_held_out_pairs_share_no_prompt_with_training(files: Path) -> None:
    found = encode_pairs(tiny_model(), read_pairs(files / "pairs"))
    train, heldout = split(found, 4)
    assert len(heldout) == 4 and len(train) == 20
    assert not {e.prompt for e in train} & {e.prompt for e in heldout}
    with pytest.raises(RlhfImgError, match="too few"):
        split(found[:1], 4)


def test_a_run_measures_both_errors_and_leaves_what_the_design_promises(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, words(files, out, "--json")) == 0
    printed = capsys.readouterr()
    assert "beta: " in printed.err and "24 pairs of 12 prompts" in printed.err
    rows = lines(out)
    assert [row["step"] for row in rows] == [1, 2, 3, 4]
    assert rows[0]["pairs/margin"] == 0.0 and rows[0]["pairs/accuracy"] == 0.5 and rows[0]["pairs/drift"] == 0.0
    assert rows[0]["loss"] == pytest.approx(np.log(2), abs=1e-5)
    assert rows[0]["beta_sum"] == pytest.approx(rows[0]["beta_mean"] / 256)
    assert [("heldout/winner_rise" in row) for row in rows] == [False, True, False, True]
    assert rows[3]["heldout/drift"] > rows[1]["heldout/drift"] > 0
    result = json.loads((out / "eval.json").read_text())
    assert result["difference"]["high_freq_ratio"]["n"] == 4 and result["checkpoints"][1]["high_freq"]["mean"] > 0
    assert "<html" in (out / "report.html").read_text()
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file()


@pytest.mark.parametrize("loss", ["dpo", "stpo-mirror"])
def test_training_prefers_the_winners_of_pairs_it_has_not_seen(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, loss: str
) -> None:
    more = "steps=16", "dpo.pairs=16", f"dpo.loss={loss}", "dpo.lr=2e-3", "checkpoint_every=16", "measure_every=16"
    more += ("max_winner_rise=null",)
    assert run(monkeypatch, words(files, tmp_path / "run", *more)) == 0
    last = lines(tmp_path / "run")[-1]
    assert last["heldout/accuracy"] > 0.9 and last["heldout/margin"] > 0


def test_killed_and_resumed_is_uninterrupted_to_the_bit(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(monkeypatch, words(files, whole)) == 0
    command = [sys.executable, "-m", "rlhf_img.cli.main", *words(files, killed)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.time() + 300
        while not (killed / "checkpoints" / "step_000002").exists() and time.time() < deadline:
            assert process.poll() is None, "the run ended before it could be killed"
            time.sleep(0.01)
        os.kill(process.pid, signal.SIGKILL)
    assert run(monkeypatch, ["dpo", "--out", str(killed), "--resume"]) == 0
    assert lines(killed) == lines(whole)
    assert state(killed) == state(whole)
    assert json.loads((killed / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())


@pytest.mark.parametrize(
    ("more", "code", "message"),
    [
        (["dpo.loss=stpo"], 2, "dpo.loss"),
        (["--pairs", "nowhere"], 2, "there are no pairs in nowhere"),
        (["--columns", "chosen=win"], 2, 'no column "win"'),
        (["max_bad=2"], 2, "max_bad is a share"),
        (["max_winner_rise=-0.9"], 3, "the model leaves its distribution"),
    ],
)
def test_what_a_user_gets_wrong_is_said(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], code: int, message: str,
) -> None:  # fmt: skip
    assert run(monkeypatch, [*words(files, tmp_path / "run"), *more]) == code
    assert message in capsys.readouterr().err


def test_a_run_without_pairs_says_what_to_do(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ["dpo", "--out", str(tmp_path / "run")]) == 2
    assert "rlhf-img pairs make" in capsys.readouterr().err


def test_truncated_images_are_seen(tmp_path: Path) -> None:
    """Pillow decodes lazily: a file whose head is sound must be read to its end to be trusted."""
    (found,) = read_rows(table(tmp_path, [{"prompt": "x", "chosen": png(1), "rejected": png(2)[:-30]}]))
    assert isinstance(found, Bad) and found.reason == "image unreadable"
