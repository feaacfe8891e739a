"""LoRAs carried from one checkpoint to another: the measures against values by hand, and the command end to end."""

import dataclasses
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import run
from tiny import PROMPTS, save_tiny, tiny_model

from rlhf_img.errors import RlhfImgError
from rlhf_img.model.delta import predictors
from rlhf_img.model.export import save_lora
from rlhf_img.model.lora import add_role, role_parameters, scaled
from rlhf_img.report.load import load_run
from rlhf_img.report.ported import load_ported
from rlhf_img.training.likeness import alike, colours, energy_distance
from rlhf_img.training.portability import PortabilityConfig, find_loras
from rlhf_img.training.prompts import Prompt


def test_changes_alike_opposite_and_across_by_hand() -> None:
    one = np.array([[1.0, 0.0], [3.0, 0.0]])
    same, opposite, across = alike(one, 2 * one), alike(one, -one), alike(one, one[:, ::-1])
    assert same["cosine"]["mean"] == 1 and same["magnitude"]["mean"] == 2 and same["cosine_each"]["mean"] == 1
    assert opposite["cosine"]["mean"] == -1 and opposite["magnitude"]["mean"] == 1
    assert across["cosine"]["mean"] == 0
    assert (same["cosine"]["low"], same["cosine"]["high"]) == pytest.approx((1, 1))
    mixed = alike(np.array([[1.0, 0.0], [1.0, 0.0]]), np.array([[1.0, 1.0], [1.0, -1.0]]))
    assert mixed["cosine"]["mean"] == 1  # what single images do beside the common change cancels
    assert mixed["cosine_each"]["mean"] == pytest.approx(2**-0.5)


def test_no_change_is_not_measured_and_is_not_0() -> None:
    still, moved = np.zeros((3, 2)), np.ones((3, 2))
    assert alike(still, moved)["cosine"]["mean"] is None and alike(still, moved)["magnitude"]["mean"] is None
    assert alike(moved, still)["magnitude"]["mean"] == 0


def test_energy_distance_is_that_of_a_slow_loop_and_tells_laws_apart() -> None:
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(40, 3)), rng.normal(size=(40, 3)) + 1
    scale = y.std(0)

    def mean(a: np.ndarray, b: np.ndarray) -> float:
        return float(np.mean([np.linalg.norm((a[i] - b[j]) / scale) for i in range(40) for j in range(40) if i != j]))

    found = energy_distance(x, y)
    assert found["value"] == pytest.approx(2 * mean(x, y) - mean(x, x) - mean(y, y))
    assert found["value"] > found["chance"]
    assert energy_distance(x, x)["value"] == pytest.approx(0)
    same = energy_distance(x, rng.normal(size=(40, 3)))
    assert same["value"] < found["chance"]


def test_colours_by_hand() -> None:
    image = torch.zeros(1, 3, 2, 2)
    image[:, 0] = 1
    assert colours(image) == {
        "brightness": [pytest.approx(0.299)], "contrast": [pytest.approx(0.0)], "saturation": [1.0]
    }  # fmt: skip


def test_weight_predictors_know_a_lora_along_and_across_the_distillation() -> None:
    """With D of rank 1 along e0, an adapter that writes to e0 lies within its span, and one that writes to e1 not."""
    for row, overlap in ((0, 1.0), (1, 0.0)):
        model = tiny_model()
        other = tiny_model().transformer
        path = "transformer_blocks.0.attn.to_q"
        add_role(model.transformer, "ported", rank=1, alpha=2.0, targets=("attn.to_q",))
        parameters = role_parameters(model.transformer, "ported")
        for key, parameter in parameters.items():
            parameter.data.zero_()
            if key == f"{path}.lora_A":
                parameter.data[0, 0] = 3.0
            if key == f"{path}.lora_B":
                parameter.data[row, 0] = 1.0
        other.get_submodule(path).weight.data[0, 5] += 0.5
        found = predictors(model.transformer, other, "ported")
        size = sum(float(model.transformer.get_submodule(f"transformer_blocks.{i}.attn.to_q").base_layer.weight
                         .square().sum()) for i in range(2)) ** 0.5  # fmt: skip
        assert found["overlap"] == pytest.approx(overlap, abs=1e-5)
        assert found["lora"] == pytest.approx(6.0 / size) and found["distilled"] == pytest.approx(0.5 / size, rel=1e-3)
        assert found["chance"] == pytest.approx(1 / 128)
    assert predictors(model.transformer, model.transformer, "ported")["overlap"] is None


def test_scaled_is_alpha_times_a_factor_and_goes_back() -> None:
    model = tiny_model()
    add_role(model.transformer, "ported", rank=4, alpha=6.0)
    layer = model.transformer.get_submodule("transformer_blocks.0.attn.to_q")
    with scaled(model.transformer, "ported", 0.5):
        assert layer.scaling["ported"] == 0.75
    assert layer.scaling["ported"] == 1.5


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, prompts, and a folder with one LoRA that changes much, and says what it is for."""
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    (folder / "bright.py").write_text(
        "def bright(prompts, images, **columns):\n    return [float(i.mean()) for i in images.tensor]\n"
    )
    model = tiny_model()
    add_role(model.transformer, "policy", rank=4, alpha=8.0)
    for i, parameter in enumerate(role_parameters(model.transformer, "policy").values()):
        parameter.data = 0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
    save_lora(model, "policy", folder / "loras" / "loud")
    (folder / "loras" / "loud" / "prompts.txt").write_text("\n".join(PROMPTS))
    (folder / "loras" / "loud" / "portability.yaml").write_text(
        f"kind: style\nprompts: prompts.txt\ntarget: {folder / 'bright.py'}:bright\n"
    )
    return folder


def words(files: Path, out: Path, *more: str) -> list[str]:
    settings = ("steps=2", "guidance=0", "turbo_steps=2", "rewards=rubric", "prompts=4", "scales=[1.0, 2.0]")
    return ["eval", "portability", "--loras", str(files / "loras"), "--from", str(files / "model"), "--to",
            str(files / "model"), "--out", str(out), *(word for s in settings for word in ("--set", s)), *more]


def test_on_the_same_model_a_lora_carries_over_whole(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert run(monkeypatch, words(files, out, "--json")) == 0
    (lora,) = json.loads(capsys.readouterr().out)["loras"]
    assert lora["cosine"]["mean"] == pytest.approx(1) and lora["magnitude"]["mean"] == pytest.approx(1)
    assert lora["verdict"] == "carries over" and lora["target_kept"]["mean"] == pytest.approx(1)
    assert lora["target"]["raw with LoRA"] == lora["target"]["turbo with LoRA"] != lora["target"]["raw"]
    assert [row["scale"] for row in lora["curve"]] == [1.0, 2.0] and lora["curve"][0]["cosine"] == lora["cosine"]
    assert lora["curve"][1]["target"] != lora["curve"][0]["target"]
    assert lora["weights"]["distilled"] == 0 and lora["weights"]["overlap"] is None
    ported = load_ported(out, [])
    assert ported is not None and ported.loras[0].sheet and load_run(out).evaluation is None
    assert "LoRAs carried over" in (out / "report.html").read_text()


@pytest.mark.parametrize(("more", "message"), [
    (["--loras", "nowhere"], "there is no folder nowhere"), (["--set", "scales=[0.5]"], "1 is among them"),
    (["--set", "prompt=3"], "prompts"), (["--threshold", "7"], "a cosine"), (["--to", "nowhere"], "nowhere"),
])  # fmt: skip
def test_what_a_user_gets_wrong_is_said(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
    more: list[str], message: str,
) -> None:  # fmt: skip
    assert run(monkeypatch, words(files, tmp_path / "out", *more)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error


def test_loras_are_found_or_it_is_said_what_is_missing(files: Path, tmp_path: Path) -> None:
    config = PortabilityConfig(prompts=3)
    (lora,) = find_loras(files / "loras", config, ())
    assert (lora.name, lora.kind, len(lora.prompts)) == ("loud", "style", 3)
    assert lora.target is not None and lora.target[0]["role"] == "measure"
    with pytest.raises(RlhfImgError, match="holds no LoRA"):
        find_loras(tmp_path, config, (Prompt("a"), Prompt("b")))
    (tmp_path / "bare.safetensors").touch()
    with pytest.raises(RlhfImgError, match="has no prompts"):
        find_loras(tmp_path, config, ())
    assert find_loras(tmp_path, config, (Prompt("a"), Prompt("b")))[0].target is None
    assert dataclasses.asdict(config)["threshold"] == 0.7


def test_what_was_trained_is_what_is_drawn_and_scored(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run acts as its model with the run's LoRA, for `sample` and for `eval`; neither as the model alone."""
    finished = tmp_path / "run"
    shutil.copytree(files / "loras" / "loud", finished / "lora")
    (finished / "config.yaml").write_text(f"algorithm: grpo\nconfig: {{model: {files / 'model'}}}\n")
    ways = ([str(files / "model")], [str(files / "model"), "--lora", str(files / "loras" / "loud")], [str(finished)])
    drawn = []
    for i, way in enumerate(ways):
        words = ["sample", PROMPTS[0], "--steps", "2", "--out", str(tmp_path / str(i)), "--model", *way]
        assert run(monkeypatch, words) == 0
        drawn.append(np.asarray(Image.open(tmp_path / str(i) / "000.png"), dtype=float))
    assert np.abs(drawn[0] - drawn[1]).max() > 20 and np.abs(drawn[1] - drawn[2]).max() <= 1
    (tmp_path / "prompts.txt").write_text("\n".join(PROMPTS))
    capsys.readouterr()
    words = ["eval", "models", *(way[-1] for way in (ways[0], ways[2])), "--prompts", str(tmp_path / "prompts.txt"),
             "--steps", "2", "--rewards", f"rubric,{files / 'bright.py'}:bright", "--json"]  # fmt: skip
    assert run(monkeypatch, words) == 0
    first, second = json.loads(capsys.readouterr().out)
    change = second["rewards"]["bright"]["mean"] - first["rewards"]["bright"]["mean"]
    assert abs(change) > 1e-3 and "difference" not in first
    assert second["difference"]["rewards"]["bright"]["mean"] == pytest.approx(change)
    assert run(monkeypatch, words[:-1]) == 0  # as a table
    assert f"{change:+.3f} (" in capsys.readouterr().out


def test_eval_without_a_word_means_models(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(monkeypatch, ["eval", "no/where/model", "--count", "1"]) == 2
    assert "no/where/model" in capsys.readouterr().err


def test_eval_measures_nothing_before_it_has_looked_for_every_model(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setattr("rlhf_img.training.evaluate.evaluate", lambda *args: pytest.fail("measured"))
    (tmp_path / "config.yaml").write_text("algorithm: grpo\nconfig: {model: playground}\n")
    assert run(monkeypatch, ["eval", "playground", str(tmp_path)]) == 2
    assert "nothing trained yet" in capsys.readouterr().err
    assert run(monkeypatch, ["eval", "playground", "nosuch"]) == 2
    assert 'no model "nosuch"' in capsys.readouterr().err
