"""The report: says what the files say, escapes what people wrote, and tells what is missing."""

import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.captions import caption
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import break_scene, sample_scene
from rlhf_img.report import build
from rlhf_img.report.charts import Line, line_chart, nice_ticks, running_mean, short
from rlhf_img.report.images import strips
from rlhf_img.report.load import load_run
from rlhf_img.report.page import duration, points

NASTY = 'a <script>alert("1")</script> & a sign reading "OPEN LATE"'


def interval(mean: float, half: float = 0.05, n: int = 256) -> dict[str, float]:
    return {"mean": mean, "low": mean - half, "high": min(1.0, mean + half), "n": n}


def write_run(path: Path, *, steps: int = 40, prompts: int = 6, gain: float = 0.22, seed: int = 0) -> Path:
    """A run directory as training writes it, with images of the playground."""
    path.mkdir(parents=True)
    config = {"lr": 1e-4, "group_size": 8, "lora": {"rank": 16}, "rewards": ["rubric", "artifact"]}
    versions = {"rlhf-img": "0.1.0", "git": "d714a4bf1c02", "python": "3.11.7", "hardware": "2 x a CPU <fast>"}
    command = "rlhf-img grpo --rewards rubric,artifact"
    record = {"algorithm": "grpo", "command": command, "config": config, "versions": versions, "seed": seed}
    (path / "config.yaml").write_text(yaml.safe_dump(record))
    (path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in metric_lines(steps, gain, seed)))
    (path / "eval.json").write_text(json.dumps(evaluation(gain)))
    for tag, quality in (("before", 0.0), ("step_000020", 0.5), ("after", 1.0)):
        write_samples(path / "samples" / tag, prompts, quality)
    return path


def metric_lines(steps: int, gain: float, seed: int) -> list[dict[str, float | None]]:
    rng = np.random.default_rng(seed)

    def noisy(value: float, spread: float) -> float:
        return float(value + rng.normal(0, spread))

    return [
        {
            "step": step,
            "loss": noisy(0.0, 0.02),
            "reward/rubric/mean": noisy(0.7 + gain * step / steps / 2, 0.03),
            "reward/rubric/unscored": 0,
            "reward/artifact/mean": None if step == 7 else noisy(0.8, 0.01),
            "reward/artifact/unscored": 64 if step == 7 else 0,
            "rubric/pass_all": noisy(0.4 + gain * step / steps, 0.05),
            "rubric/pass_requirement": noisy(0.7 + gain * step / steps / 2, 0.02),
            "ties": 0.125,
            "kl": 0.002 * step,
            "ratio/max_dev": 0.0,
            "clip_fraction": abs(noisy(0.1, 0.02)),
            "grad_norm": abs(noisy(0.3, 0.1)),
            "sentinel/diversity": noisy(0.5 - 0.05 * step / steps, 0.01),
            "sentinel/high_freq": abs(noisy(2e-5, 2e-6)),
            "time/rollout": 4.0,
            "time/reward": 1.0,
            "time/train": 2.5,
            "time/step": 8.0,
        }
        for step in range(1, steps + 1)
    ]


def evaluation(gain: float) -> dict[str, object]:
    def checkpoint(name: str, more: float) -> dict[str, object]:
        checks = {
            "object": 0.82,
            "count": 0.55,
            "color": 0.71,
            "relation": 0.6,
            "size": 0.66,
            "background": 0.93,
            "text": 0.2,
        }
        return {
            "name": name,
            "pass_all": interval(0.41 + more, 0.06),
            "pass_requirement": interval(0.72 + more / 2, 0.03, 900),
            "by_check": {key: interval(min(0.97, value + more / 2), 0.04, 300) for key, value in checks.items()},
            "rewards": {"rubric": interval(0.7 + more / 2, 0.02), "artifact": interval(0.8 + more / 20, 0.02)},
            "unscored": {"rubric": 0, "artifact": 3 if more else 0},
            "diversity": interval(0.5, 0.02),
        }

    return {
        "split": "heldout",
        "num_prompts": 256,
        "images_per_prompt": 1,
        "num_steps": 16,
        "guidance": 0.0,
        "checkpoints": [checkpoint("before", 0.0), checkpoint("after", gain)],
        "difference": {
            "pass_all": interval(gain, 0.065),
            "pass_requirement": interval(gain / 2, 0.03),
            "rewards": {"rubric": interval(gain / 2, 0.02), "artifact": interval(gain / 20, 0.015)},
            "diversity_ratio": interval(0.93, 0.03),
        },
    }


def write_samples(folder: Path, prompts: int, quality: float) -> None:
    """The first prompt holds markup; the second image can be judged only in part; the last is missing."""
    folder.mkdir(parents=True)
    entries = []
    for i in range(prompts):
        rng = np.random.default_rng(300 + i)
        scene = sample_scene(rng, "heldout")
        prompt = NASTY if i == 0 else caption(scene, rng)
        good = i % 3 == 0 or i / prompts < quality
        drawn, broken = (scene, "") if good else break_scene(scene, rng)
        if i < prompts - 1:
            Image.fromarray(render(drawn)).save(folder / f"{i:03d}.png")
        checks = ["object", "count", "color", "background"]
        unsure = i == 1 and quality == 1.0
        requirements = [
            {
                "id": c,
                "text": f"{c} as asked <b>",
                "passed": None if unsure and c == "color" else c != broken,
                "score": 0.5,
            }
            for c in checks
        ]
        rewards = {"rubric": 0.9 if good else 0.6, "artifact": None if unsure else 0.81}
        entries.append(
            {"file": f"{i:03d}.png", "prompt": prompt, "seed": i, "rewards": rewards, "requirements": requirements}
        )
    (folder / "samples.json").write_text(json.dumps(entries))


class Page(HTMLParser):
    """Tags with their attributes, and the text that a reader sees."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.pieces: list[str] = []
        self.feed(html)
        self.text = re.sub(r"\s+", " ", " ".join(self.pieces))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "img", "line", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style":
            self.pieces.append(data)


def read(path: Path) -> Page:
    return Page(path.read_text(encoding="utf-8"))


def test_the_report_says_what_the_files_say(tmp_path: Path) -> None:
    out = build([write_run(tmp_path / "run")])
    assert out == tmp_path / "run" / "report.html"
    page = read(out)
    assert page.open == []
    for said in (
        "GRPO: more held-out prompts are met in full",
        "41 % → 63 %",
        "Better: +22.0 points",
        "95 % interval +15.5 to +28.5",
        "256 held-out prompts, 1 image each, 16 sampling steps, guidance 0.0.",
        "93 %",
        "5 min 20 s",  # 40 steps of 8 s
        "40 steps",
        "artifact: unscored in training 64 images",
        "artifact: unscored, after 3 images",
        "reward/artifact/unscored",
        "ties, mean over steps 0.125",
        "rollout 2 min 40 s 50 % 4.00 s",
        "everything else 20 s 6 % 0.50 s",
        "command rlhf-img grpo --rewards rubric,artifact",
        "rank: 16",
        "Trained on: rubric, artifact.",
        "Some held-out images are unscored (artifact)",
        "color n 300 71 % → 82 %",
    ):
        assert said.replace(" ", "") in page.text.replace(" ", ""), said


def test_it_needs_no_network_and_runs_no_script(tmp_path: Path) -> None:
    page = read(build([write_run(tmp_path / "run")]))
    assert not {"script", "link", "iframe", "object"} & {tag for tag, _ in page.elements}
    sources = [value or "" for _, attrs in page.elements for key, value in attrs.items() if key in ("src", "href")]
    assert sources and all(source.startswith("data:image/") for source in sources)
    assert not any(key.startswith("on") for _, attrs in page.elements for key in attrs)


def test_what_people_wrote_is_shown_as_written(tmp_path: Path) -> None:
    out = build([write_run(tmp_path / "run")])
    page = read(out)
    assert NASTY in page.text
    assert "2 x a CPU <fast>" in page.text
    assert any(NASTY in (attrs.get("alt") or "") for tag, attrs in page.elements if tag == "img")
    assert "<script" not in out.read_text()


def test_pairs_are_matched_by_prompt_and_seed_and_changes_are_marked(tmp_path: Path) -> None:
    run = load_run(write_run(tmp_path / "run"))
    shown = strips(run)
    assert len(shown) == 6
    assert [frame.tag for frame in shown[0].frames] == ["before", "step 20", "after"]
    assert [frame.passed for frame in shown[1].frames] == [False, True, None]
    unsure = {v.text: (v.before, v.after) for v in shown[1].verdicts}
    assert unsure["color as asked <b>"][1] is None
    assert [frame.uri is None for frame in shown[-1].frames] == [True] * 3
    changes = {v.change for strip in shown for v in strip.verdicts}
    assert "fixed" in changes and "broken" not in changes
    assert "no image" in read(build([tmp_path / "run"])).text


def test_what_the_artifact_reward_sees_is_shown_below_broken_images(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    assert "artifact reward sees" not in build([run]).read_text()
    folder = run / "samples" / "before"
    rows = json.loads((folder / "samples.json").read_text())
    Image.new("RGB", (64, 64), "red").save(folder / "000.heat.png")
    rows[0]["defects"] = {"probability": {"hole": 0.93, "seam": 0.2, "speckle": 0.01}, "heat": "000.heat.png"}
    rows[1]["defects"] = {"probability": {"hole": 0.05}, "permitted": ["seam"], "heat": None}
    rows[2]["defects"] = {"probability": {"seam": 0.4}, "heat": "../../config.yaml"}  # nothing outside is read
    (folder / "samples.json").write_text(json.dumps(rows))
    first, second, third = strips(load_run(run))[:3]
    assert first.frames[0].heat and first.frames[0].defects == (("hole", 0.93), ("seam", 0.2))
    assert second.frames[0].heat is None and second.frames[0].defects == () and third.frames[0].heat is None
    page = read(build([run]))
    assert "hole 93 %, seam 20 %" in page.text.replace("\xa0", " ")
    assert any(attrs.get("alt") == "where the artifact reward sees hole, seam" for _, attrs in page.elements)
    assert page.open == []


def test_a_judge_that_changed_is_said_and_what_it_did_not_answer_is_counted(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line |= {"judge/calls": 480, "judge/failed": 2}
    lines[10] |= {"judge/drift": 0.02, "judge/flipped": 0.0}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    page = build([run]).read_text()
    assert "<h3>Judge</h3>" in page and "judge: questions without an answer" in page
    assert "The judge has changed" not in page
    lines[30] |= {"judge/drift": 0.31, "judge/flipped": 0.5}
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    assert "moved by up to 0.31" in build([run]).read_text()


def watch(run: Path, places: dict[int, float], *, stopped: dict[str, object] | None = None) -> None:
    """Adds a sentinel of band 0.3 to 0.7 that stood there at these steps."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    for step, place in places.items():
        lines[step - 1] |= {
            "sentinel/jpeg": 1.5, "sentinel/jpeg/place": place, "sentinel/out": float(not 0.3 <= place <= 0.7),
        }  # fmt: skip
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    bands = {"jpeg": {"warn": [0.3, 0.7], "stop": [0.05, 0.95]}, "drift": {"warn": [None, 0.7], "stop": [None, None]}}
    raw = {"jpeg": [1.0, None, 2.0], "drift": []}
    (run / "sentinels.json").write_text(json.dumps({"bands": bands, "raw": raw, "stopped": stopped}))


@pytest.mark.parametrize(
    ("places", "stopped", "verdict"),
    [
        ({10: 0.5, 20: 0.6}, None, "All sentinels stayed inside of Raw's band"),
        ({10: 0.8, 20: 0.6}, None, "on the way these were not: jpeg (step 10)"),
        ({10: 0.5, 20: 0.8}, None, "Sentinels outside of Raw's band: jpeg (last all inside at step 10)"),
        ({10: 0.8}, None, "jpeg (never all inside)"),
        ({10: 0.5, 20: 0.99}, {"step": 20, "why": "jpeg left what Raw draws", "good": 10},
         "Stopped by a sentinel at step 20: jpeg left what Raw draws; the last good checkpoint is that of step 10"),
    ],
)  # fmt: skip
def test_where_the_sentinels_stood_is_said_first(
    places: dict[int, float], stopped: dict[str, object] | None, verdict: str, tmp_path: Path
) -> None:
    run = write_run(tmp_path / "run")
    watch(run, places, stopped=stopped)
    page = read(build([run]))
    assert page.text.count(verdict) == 2 and page.text.index(verdict) < page.text.index("Which requirements are met")
    assert "bits a pixel as JPEG" in page.text
    shaded = [attrs for tag, attrs in page.elements if tag == "rect" and attrs.get("class") == "band"]
    # places 0 to 1 are drawn from y = 128 up to 8: the band from 0.3 to 0.7 is 48 high and ends at 44
    assert [(attrs["y"], attrs["height"]) for attrs in shaded] == [("44.0", "48.0")]


def test_the_transfer_to_what_was_held_out_is_shown(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    watch(run, {10: 0.5})
    raw = json.loads((run / "eval.json").read_text())
    ratios = {"judge": {"mean": 0.83, "low": 0.4, "high": 1.2}, "other": None}
    raw["transfer"] = {"trained_on": ["rubric"], "gain": interval(0.4), "ratios": ratios}
    (run / "eval.json").write_text(json.dumps(raw))
    text = read(build([run])).text
    assert "Transfer to judge, which was not trained on: 0.83 of their gain (0.40 to 1.20)" in text
    assert "Transfer to other, which was not trained on: the trained rewards gained too little to say" in text


def test_several_runs_stand_side_by_side(tmp_path: Path) -> None:
    runs = [write_run(tmp_path / "a"), write_run(tmp_path / "b", gain=-0.15, steps=20, seed=1)]
    out = build(runs, tmp_path / "both.html")
    page = read(out)
    assert "2 runs side by side" in page.text
    assert "Better: +22.0 points" in page.text and "Worse: −15.0 points" in page.text
    charts = [attrs for tag, attrs in page.elements if tag == "path"]
    assert {attrs["class"] for attrs in charts} == {"raw run0", "mean run0", "raw run1", "mean run1"}
    assert build(runs).parent == tmp_path


@pytest.mark.parametrize(
    ("missing", "note"),
    [
        ("config.yaml", "What was run is not known"),
        ("metrics.jsonl", "There is no metrics.jsonl, so there are no curves and no times."),
        ("eval.json", "so whether the run helped was not measured."),
        ("samples/before/samples.json", "so its images are not shown."),
    ],
)
def test_what_is_missing_is_said(tmp_path: Path, missing: str, note: str) -> None:
    run = write_run(tmp_path / "run")
    (run / missing).unlink()
    assert note in read(build([run])).text


def test_a_run_that_was_cut_off_still_has_a_report(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run")
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"step": 41, "lo')
    raw = json.loads((run / "eval.json").read_text())
    raw["checkpoints"] = raw["checkpoints"][:1]
    raw["checkpoints"][0]["pass_requirement"]["mean"] = None
    del raw["difference"]
    (run / "eval.json").write_text(json.dumps(raw))
    text = read(build([run])).text
    assert "metrics.jsonl, line 41, is not a JSON object and was left out." in text
    assert 'no checkpoint "after", so nothing can be said about a change' in text
    assert "GRPO: what happened, as far as it was measured" in text


def test_no_run_is_an_error_that_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(RlhfImgError, match=r"is no run directory: expected at least one of config.yaml"):
        build([tmp_path / "nothing"])
    with pytest.raises(RlhfImgError, match="cannot be written"):
        (tmp_path / "file").touch()
        build([write_run(tmp_path / "run")], tmp_path / "file" / "report.html")


def test_large_images_are_made_smaller(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", prompts=2)
    noise = np.random.default_rng(0).integers(0, 255, (600, 500, 3), dtype=np.uint8)
    for tag in ("before", "step_000020", "after"):
        Image.fromarray(noise).save(run / "samples" / tag / "000.png")
    assert (build([run])).stat().st_size < 600_000


def test_the_chart_draws_gaps_as_gaps_and_every_run() -> None:
    svg = line_chart("kl", [Line("a", 0, [1, 2, 3, 4], [0.0, 1.0, None, 2.0]), Line("b", 1, [1, 2], [0.0, 2.0])])
    raw = re.findall(r'class="raw run0" d="([^"]*)"', svg)[0]
    assert raw.count("M") == 2
    # Plot area: x 46 to 312, y 8 (top, value 2) to 128 (bottom, value 0).
    assert raw.startswith("M46.0 128.0 L134.7 68.0")
    assert raw.endswith("M312.0 8.0 L312.0 8.0")
    assert "no values" in line_chart("x", [Line("a", 0, [1], [None])])


@pytest.mark.parametrize(
    ("low", "high", "ticks"),
    [
        (0.12, 0.37, [0.1, 0.2, 0.3, 0.4]),
        (0, 1, [0, 0.5, 1]),
        (-3, 5, [-5, 0, 5]),
        (2e-5, 4e-5, [2e-5, 3e-5, 4e-5]),
        (0.0, 0.0, [0.0, 0.5, 1.0]),
        (1000.0, 1000.0, [500, 1000, 1500]),
    ],
)
def test_ticks_are_round_and_span_the_values(low: float, high: float, ticks: list[float]) -> None:
    assert nice_ticks(low, high) == pytest.approx(ticks)


def test_numbers_read_well() -> None:
    assert running_mean([1.0, 3.0, None, 5.0], 2) == [1.0, 2.0, None, 5.0]
    assert [short(v) for v in (0, 0.25, 12.0, 1234.5, 0.00002)] == ["0", "0.25", "12", "1234", "2e-05"]
    assert [duration(s) for s in (0.25, 42, 59.9, 312, 7260)] == [
        "0.25 s",
        "42 s",
        "1 min 00 s",
        "5 min 12 s",
        "2 h 01 min",
    ]
    assert points(-0.051) == "−5.1"
