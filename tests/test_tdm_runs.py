"""Distillation end to end on a tiny random Krea 2: what a run leaves, exports and refuses, and how it resumes."""

import dataclasses
import json
import sys
from pathlib import Path

import pytest
import torch
from diffusers import Krea2Pipeline
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from test_training import run
from tiny import PROMPTS, SIZE, save_tiny, tiny_model

from rlhf_img.algorithms import tdm
from rlhf_img.cli.main import main
from rlhf_img.config import from_mapping, parse_overrides
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.export import LORA_FILE, load_lora, merge, save_lora
from rlhf_img.model.loading import load
from rlhf_img.model.lora import add_role, role, role_parameters
from rlhf_img.model.sampling import sample
from rlhf_img.report.load import load_run
from rlhf_img.training import tdm as room
from rlhf_img.training.adapters import settings_of
from rlhf_img.training.evaluate import EVAL_SEED
from rlhf_img.training.export import open_trained
from rlhf_img.training.panel import Panel
from rlhf_img.training.samples import draw

SMALL = (
    "tdm.prompts=2", "tdm.images=2", "tdm.num_steps=3", "tdm.guidance=1", "tdm.lr=1e-2", "tdm.warmup=1",
    "eval.num_steps=3",
    "eval.diversity_prompts=2", "eval.diversity_images=2", "full_steps=4", "samples=2", "checkpoint_every=1",
    "sample_every=0", "tracker=none", "dtype=float32", "sentinels.every=0",
)  # fmt: skip


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and an adapter that aligned it."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    model = tiny_model()
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    generator = torch.Generator().manual_seed(3)
    for parameter in role_parameters(model.transformer, "policy").values():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    save_lora(model, "policy", folder / "aligned" / "lora")
    settings = {"model": str(folder / "model"), "prompts": str(folder / "prompts.txt"), "rewards": "rubric",
                "eval_prompts": str(folder / "prompts.txt")}  # fmt: skip
    (folder / "aligned" / "config.yaml").write_text(json.dumps({"algorithm": "grpo", "config": settings}))
    return folder


def words(files: Path, out: Path, *more: str) -> list[str]:
    return ["tdm", "--teacher", str(files / "aligned"), "--out", str(out), *SMALL, *more]


def lines(folder: Path) -> list[dict[str, float]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith("time/")} for row in rows]


def test_a_run_its_card_and_its_export(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, words(files, out, "steps=2", "--json")) == 0
    assert json.loads(capsys.readouterr().out)["num_steps"] == 3
    first, second = lines(out)
    assert {"guidance", "critic/loss"} <= first.keys() and "dm" not in first  # it warms up
    assert {"dm", "guidance", "norm", "critic/loss"} <= second.keys()
    card = json.loads((out / "card.json").read_text())
    assert [(row["name"], row["calls"]) for row in card["rows"]] == [
        ("student, 3 steps, no guidance", 3), ("teacher, 4 steps, g = 1", 8), ("teacher, 3 steps, g = 1", 6),
        ("teacher, 3 steps, no guidance", 3), ("raw, 4 steps, g = 1", 8),
    ]  # fmt: skip
    assert all(row["seconds"] > 0 for row in card["rows"])
    after = json.loads((out / "eval.json").read_text())["checkpoints"][1]
    assert card["rows"][0]["rewards"] == after["rewards"]
    difference = card["rows"][1]["student_minus"]["rewards"]["rubric"]["mean"]
    expected = after["rewards"]["rubric"]["mean"] - card["rows"][1]["rewards"]["rubric"]["mean"]
    assert difference == pytest.approx(expected, abs=1e-6)
    assert load_run(out).card is not None and "raw, 4 steps" in (out / "report.html").read_text()

    for row in card["rows"]:
        assert row["colours"].keys() == {"brightness", "contrast", "saturation"}
        assert ("distance" in row) == (row is not card["rows"][1])  # nothing is at a distance from itself
    assert card["memory"] > 10**8 and (out / "card.png").is_file()

    # Its student in a stock pipeline, from the folder alone.
    assert run(monkeypatch, ["export", str(out), "--out", str(tmp_path / "turbo")]) == 0
    stock = Krea2Pipeline.from_pretrained(tmp_path / "turbo" / "pipeline")
    stock.set_progress_bar_config(disable=True)
    assert stock.config.is_distilled
    model = load(files / "model", dtype=torch.float32)
    load_lora(model, out / "lora", "policy")
    exported = load(tmp_path / "turbo" / "pipeline")
    assert exported.default_size == SIZE and exported.is_distilled
    for prompt, seed in zip(PROMPTS[:2], (4, 5), strict=True):
        theirs = stock(
            prompt, height=SIZE, width=SIZE, num_inference_steps=3, guidance_scale=0.0, output_type="latent",
            generator=torch.Generator().manual_seed(seed),
        ).images  # fmt: skip
        with role(model.transformer, "policy"):
            distilled = dataclasses.replace(model, is_distilled=True)
            ours = sample(distilled, Conditioner(model), [prompt], [seed], num_steps=3)
        bare = sample(model, Conditioner(model), [prompt], [seed], num_steps=3)
        torch.testing.assert_close(theirs.reshape(ours.shape), ours, atol=1e-5, rtol=0)
        assert (bare - ours).abs().max() > 1e-3
    assert run(monkeypatch, ["export", str(out), "--out", str(tmp_path / "turbo")]) == 2
    assert "holds an export already" in capsys.readouterr().err


def test_a_full_run_is_measured_exported_and_read_again(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    assert run(monkeypatch, words(files, out, "steps=1", "full=true", "card=false", "panel.every=0")) == 0
    assert not (out / "lora").exists()
    assert run(monkeypatch, ["export", str(out), "--out", str(tmp_path / "turbo")]) == 0
    again, exported = open_trained(str(out), dtype=torch.float32), load(tmp_path / "turbo" / "pipeline")
    teacher = load(files / "model", dtype=torch.float32)
    load_lora(teacher, files / "aligned" / "lora", "policy")
    merge(teacher, "policy")
    drawn = [sample(dataclasses.replace(m, is_distilled=True), Conditioner(m), PROMPTS[:1], [4], num_steps=3)
             for m in (again, exported, teacher)]
    assert again.is_distilled and exported.is_distilled
    assert torch.equal(drawn[0], drawn[1]) and (drawn[0] - drawn[2]).abs().max() > 1e-4


def test_the_best_weights_are_kept_and_a_run_stops_when_they_are_past(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scores = {1: 0.2, 2: 0.5, 3: float("nan"), 4: 0.4, 5: 0.9}
    kept = {}

    def look(panel: Panel) -> dict[str, float]:
        step = len(kept) + 1
        kept[step] = {name: value.clone() for name, value in panel.policy.average.items()}
        return {"panel/score": scores[step]}

    monkeypatch.setattr(Panel, "look", look)
    out = tmp_path / "run"
    assert run(monkeypatch, words(files, out, "steps=9", "card=false", "panel.every=1", "panel.patience=2")) == 0
    assert [row["step"] for row in lines(out)] == [1, 2, 3, 4]  # nothing better in two looks, one of them unscored
    assert json.loads((out / "eval.json").read_text())["kept_step"] == 2
    model = load(files / "model", dtype=torch.float32)
    load_lora(model, out / "lora", "policy")
    for name, value in role_parameters(model.transformer, "policy").items():
        assert torch.equal(value, kept[2][name])
    # A finished run that is resumed stays where it stopped.
    assert run(monkeypatch, ["tdm", "--out", str(out), "--resume"]) == 0
    assert len(lines(out)) == 4


def test_the_panel_looks_from_the_end_of_the_warm_up_on_and_at_the_last_weights(files: Path) -> None:
    more = ["tdm.warmup=5", "panel.every=4", f"teacher={files / 'aligned'}"]
    inherited = settings_of(str(files / "aligned"), room.INHERITED)
    config = from_mapping(room.Config, {**inherited, **parse_overrides([*SMALL, *more])}, "settings")
    panel = room.prepare(config)[1].panel
    assert panel is not None
    assert [step for step in range(1, 12) if panel.is_due(step, 11)] == [5, 8, 11]
    assert [step for step in range(1, 4) if panel.is_due(step, 3)] == [3]  # a run that ends before


class _Killed(Exception):
    pass


def test_killed_and_resumed_is_uninterrupted_to_the_bit_with_critic_and_average(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(monkeypatch, words(files, whole, "steps=3", "card=false")) == 0
    train = tdm.train_student
    iterations = iter((2, 3))  # the first warms up

    def dies(*args: object) -> dict[str, float]:
        if next(iterations) == 3:  # when the critic has moved already
            raise _Killed
        return train(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(tdm, "train_student", dies)
    monkeypatch.setattr(sys, "argv", ["rlhf-img", *words(files, killed, "steps=3", "card=false")])
    with pytest.raises(_Killed):
        main()
    monkeypatch.setattr(tdm, "train_student", train)
    assert run(monkeypatch, ["tdm", "--out", str(killed), "--resume"]) == 0
    assert lines(killed) == lines(whole)
    ends = [max((folder / "checkpoints").iterdir()) for folder in (killed, whole)]
    for name in ("policy.safetensors", "critic.safetensors", "state.json"):
        assert (ends[0] / name).read_bytes() == (ends[1] / name).read_bytes()
    critic, student = (load_file(ends[0] / f"{name}.safetensors") for name in ("critic", "policy"))
    assert any(not torch.equal(student[key], student[key.replace("weights/", "average/")])
               for key in student if key.startswith("weights/"))  # fmt: skip
    assert critic.keys() == student.keys() and any(not torch.equal(critic[key], student[key]) for key in critic)
    assert json.loads((killed / "eval.json").read_text()) == json.loads((whole / "eval.json").read_text())


def test_the_panel_counts_no_more_of_a_reward_than_the_guided_teacher_has(files: Path) -> None:
    _, job = room.prepare(from_mapping(room.Config, {
        **settings_of(str(files / "aligned"), room.INHERITED), "teacher": str(files / "aligned"), "full_steps": 3,
        "tdm": {"num_steps": 2, "guidance": 1.5}, "eval": {"num_steps": 2}, "dtype": "float32",
    }, "settings"))  # fmt: skip
    panel = job.panel
    assert panel is not None
    with role(job.model.transformer, "teacher"):
        raw = dataclasses.replace(job.model, is_distilled=False)
        drawn = draw(raw, job.conditioner, panel.rewards, panel.prompts, [3 * EVAL_SEED + i for i in range(
            len(panel.prompts))], num_steps=3, guidance=1.5)  # fmt: skip
    assert panel.at_most() == {"rubric": pytest.approx(float(drawn.scores.values_BK.mean()), abs=1e-6)}
    for most, counted in ((1e-4, 1e-4), (1.0, panel.look()["panel/rubric"])):
        capped = dataclasses.replace(panel, at_most=lambda most=most: {"rubric": most})
        assert capped.look()["panel/score"] == pytest.approx(counted)


def test_before_is_the_teacher_at_the_steps_of_the_student(files: Path) -> None:
    _, job = room.prepare(from_mapping(room.Config, {
        **settings_of(str(files / "aligned"), room.INHERITED), "teacher": str(files / "aligned"),
        "tdm": {"num_steps": 3}, "eval": {"num_steps": 3}, "dtype": "float32",
    }, "settings"))  # fmt: skip
    model = load(files / "model", dtype=torch.float32)
    load_lora(model, files / "aligned" / "lora", "policy")
    with role(model.transformer, "policy"):
        expected = sample(
            dataclasses.replace(model, is_distilled=True), Conditioner(model), PROMPTS, [1, 2, 3, 4], num_steps=3
        )
    with job.policy.acting():
        assert torch.equal(sample(job.model, job.conditioner, PROMPTS, [1, 2, 3, 4], num_steps=3), expected)


def without_alpha(files: Path, folder: Path) -> Path:
    folder.mkdir()
    save_file(load_file(files / "aligned" / "lora" / LORA_FILE), folder / LORA_FILE)
    return folder


def of_another_model(folder: Path) -> Path:
    model = tiny_model()
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    for parameter in role_parameters(model.transformer, "policy").values():
        parameter.data = torch.zeros([2 * n for n in parameter.shape])
    return save_lora(model, "policy", folder).parent


def that_fuses_text(folder: Path) -> Path:
    model = tiny_model()
    config = LoraConfig(r=2, lora_alpha=2, target_modules=["text_fusion.refiner_blocks.0.attn.to_q"])
    model.transformer.add_adapter(config, adapter_name="policy")
    return save_lora(model, "policy", folder).parent


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--teacher", "{no alpha}", "--model", "{model}"], "does not say its alpha"),
        (["--teacher", "{other}", "--model", "{model}"], "is not a LoRA for this model"),
        (["--teacher", "nowhere", "--model", "{model}"], 'there is no folder "nowhere"'),
        (["--teacher", "{unfinished}"], "finish it with --resume"),
        (["--model", "{turbo}"], "distilled already"),
        (["eval.num_steps=16"], "made for 3 steps"),
        (["eval.guidance=1"], "without guidance"),
        (["tdm.guidance=-1"], "the common scale w is 1 + g"),
        (["tdm.margin=0.5"], "tdm.margin is a share"),
        (["--teacher", "{fusing}", "--model", "{model}"], "changes how text is fused"),
        (["panel.every=-1"], "panel.every and panel.patience"),
        (["tdm.critic_target=rtdmd"], "ambient"),
    ],
)
def test_what_a_user_gets_wrong_is_said(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    named = {"{model}": lambda: files / "model", "{no alpha}": lambda: without_alpha(files, tmp_path / "bare"),
             "{other}": lambda: of_another_model(tmp_path / "other"), "{turbo}": lambda: turbo(tmp_path / "turbo"),
             "{fusing}": lambda: that_fuses_text(tmp_path / "fusing"),
             "{unfinished}": lambda: unfinished(files, tmp_path / "unfinished")}  # fmt: skip
    filled = [str(named[word]()) if word in named else word for word in more]
    prompts = ["--prompts", str(files / "prompts.txt"), "--eval-prompts", str(files / "prompts.txt")]
    capsys.readouterr()  # what making the folders above printed
    assert run(monkeypatch, [*words(files, tmp_path / "run", *prompts, "steps=1"), *filled]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error and "Traceback" not in error


def turbo(folder: Path) -> Path:
    save_tiny(folder)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "is_distilled": True}))
    return folder


def unfinished(files: Path, folder: Path) -> Path:
    folder.mkdir()
    (folder / "config.yaml").write_text((files / "aligned" / "config.yaml").read_text())
    return folder


def test_what_is_distilled_must_be_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, ["tdm", "--out", str(tmp_path / "run")]) == 2
    assert "Give --teacher RUN" in capsys.readouterr().err
