"""SFT: its loss against values by hand, its data as people keep it, and runs that resume to the bit."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_training import lines, run, state
from tiny import PROMPTS, SIZE, save_tiny, tiny_model

from rlhf_img.algorithms import sft
from rlhf_img.algorithms.sft import SFTConfig
from rlhf_img.errors import RlhfImgError
from rlhf_img.model.conditioning import Conditioner
from rlhf_img.model.policy import LoRAConfig, make_policy
from rlhf_img.playground import variants
from rlhf_img.playground.data import example
from rlhf_img.training import sft as room
from rlhf_img.training.captioned import from_folder

SMALL = (
    "sft.images=2", "sft.lr=1e-2", "eval.num_steps=2", "eval.prompts=2", "eval.diversity_prompts=2",
    "eval.diversity_images=2", "samples=1", "checkpoint_every=1", "sample_every=0", "tracker=none", "lora.rank=4",
    "dtype=float32",
)  # fmt: skip


def test_loss_and_gradient_by_hand() -> None:
    v = torch.tensor([[[1.0, 3.0]], [[0.0, 0.0]]], requires_grad=True)
    target = torch.tensor([[[0.0, 1.0]], [[0.0, 0.0]]])
    loss_B = sft.sft_loss(v, target)
    assert loss_B.tolist() == [2.5, 0.0]
    loss_B.sum().backward()
    assert v.grad is not None
    assert v.grad.tolist() == [[[1.0, 2.0]], [[0.0, 0.0]]]  # towards the target; none where it is met


def test_noising_ends_at_the_image_and_at_the_noise() -> None:
    x0, noise = torch.randn(2, 3, 4), torch.randn(2, 3, 4)
    made = sft.noised(x0, torch.zeros(2, 1, 1), torch.tensor([0.0, 1.0]), noise, (1, 3))
    assert torch.equal(made.x_BNC[0], x0[0]) and torch.equal(made.x_BNC[1], noise[1])
    assert torch.equal(made.target_BNC, noise - x0)


def test_levels_are_stratified_and_of_the_law_that_is_named() -> None:
    generator = torch.Generator().manual_seed(0)
    uniform = sft.draw_levels(4, 5000, generator, "uniform")
    for i in range(4):  # one level of every image in each quarter
        assert i / 4 <= float(uniform[i].min()) and float(uniform[i].max()) <= (i + 1) / 4
    logit = sft.draw_levels(4, 5000, generator, "logit_normal").flatten().double()
    normal = torch.logit(logit)
    assert float(normal.mean()) == pytest.approx(0.0, abs=0.02) and float(normal.std()) == pytest.approx(1.0, abs=0.02)


def test_losses_are_told_by_third_of_the_levels() -> None:
    told = sft.describe(torch.tensor([1.0, 2.0, 6.0]), torch.tensor([0.1, 0.2, 1.0]))
    assert told == {"loss": 3.0, "loss/low": 1.5, "loss/high": 6.0}


def test_gradient_does_not_depend_on_how_a_batch_is_split() -> None:
    gradients = []
    for size in (1, 8):
        model = tiny_model()
        policy = make_policy(model.transformer, LoRAConfig(rank=4), 0)
        for i, parameter in enumerate(policy.parameters.values()):
            parameter.data = 0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(i))
        generator = torch.Generator().manual_seed(1)
        text = torch.stack(Conditioner(model).encode([PROMPTS[0]] * 3))
        x0, noise = (torch.randn(3, 4, 64, generator=generator) for _ in range(2))
        images = sft.noised(x0, text, torch.tensor([0.2, 0.5, 0.9]), noise, (2, 2))
        optimizer = torch.optim.SGD(list(policy.parameters.values()), lr=0.0)
        sft.update(policy, optimizer, [images], SFTConfig(batch_size=size, max_grad_norm=1e9))
        gradients.append([p.grad.clone() for p in policy.parameters.values() if p.grad is not None])
    assert gradients[0] and any(bool(g.any()) for g in gradients[0])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-4 * float(one.abs().max()) + 1e-7)


@pytest.mark.parametrize("name", list(variants.VARIANTS))
def test_a_variant_shows_what_its_measure_measures(name: str) -> None:
    variant = variants.VARIANTS[name]
    with_it = np.mean([variant.score(variants.example(name, seed)[1]) for seed in range(40)])
    without = np.mean([variant.score(example(seed, styled=0.0).image) for seed in range(40)])
    assert with_it > without + (0.1 if name == "warm" else 0.6)
    assert all((variant.word or "") in prompt for prompt in variants.prompts(name, "heldout", 5))


def picture(file: Path, value: int) -> Path:
    Image.fromarray(np.full((SIZE, 2 * SIZE, 3), value, np.uint8)).save(file)
    return file


def table(folder: Path, name: str, text: str) -> Path:
    folder.mkdir(exist_ok=True)
    picture(folder / "a.png", 255)
    picture(folder / "b.png", 0)
    (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(("name", "text"), [
    ("captions.jsonl", '{"file": "a.png", "prompt": "white"}\n\n{"file": "b.png", "prompt": "black"}\n'),
    ("metadata.jsonl", '{"file_name": "a.png", "text": "white"}\n{"file_name": "b.png", "text": "black"}\n'),
    ("captions.csv", "file,prompt\na.png,white\nb.png,black\n"),
])  # fmt: skip
def test_captions_are_read_as_people_keep_them(tmp_path: Path, name: str, text: str) -> None:
    items = from_folder(table(tmp_path / "data", name, text))
    assert [item.prompt for item in items] == ["white", "black"]
    assert [float(item.pixels(SIZE).mean()) for item in items] == [1.0, 0.0]
    assert items[0].pixels(SIZE).shape == (3, SIZE, SIZE)


def test_captions_beside_their_images(tmp_path: Path) -> None:
    for name, value in (("b", 0), ("a", 255)):
        picture(tmp_path / f"{name}.png", value)
        (tmp_path / f"{name}.txt").write_text(f"  {name}\nof two lines ")
    assert [item.prompt for item in from_folder(tmp_path)] == ["a of two lines", "b of two lines"]


@pytest.mark.parametrize(("name", "text", "message"), [
    ("captions.jsonl", "{file: a.png}", "line 1: not JSON"),
    ("captions.jsonl", '{"file": "a.png"}', 'expected "prompt" with text'),
    ("captions.jsonl", '{"file": "a.png", "prompt": " "}', 'expected "prompt" with text'),
    ("captions.jsonl", '{"file": "c.png", "prompt": "c"}', 'no image "c.png"'),
    ("captions.jsonl", '{"file": "../secret.png", "prompt": "c"}', 'no image "../secret.png"'),
    ("captions.csv", "image,prompt\na.png,white\n", 'expected "file" with text'),
    ("captions.jsonl", "", "holds no image with a caption"),
    ("notes.md", "", "2 of 2 images have no caption, such as a.png"),
])  # fmt: skip
def test_what_is_wrong_with_data_is_said(tmp_path: Path, name: str, text: str, message: str) -> None:
    picture(tmp_path / "secret.png", 1)
    with pytest.raises(RlhfImgError, match=message):
        from_folder(table(tmp_path / "data", name, text))


def test_a_broken_image_is_found_before_training(tmp_path: Path) -> None:
    folder = table(tmp_path / "data", "captions.csv", "file,prompt\na.png,white\nb.png,black\n")
    (folder / "b.png").write_bytes((folder / "a.png").read_bytes()[:40])
    with pytest.raises(RlhfImgError, match=r"b\.png is no readable image"):
        from_folder(folder)


def words(files: Path, out: Path, *more: str) -> list[str]:
    return ["sft", "--data", str(files / "data"), "--model", str(files / "model"), "--rewards", "rubric",
            "--eval-prompts", str(files / "prompts.txt"), "--out", str(out), *SMALL, *more]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("files")
    save_tiny(folder / "model")
    (folder / "prompts.txt").write_text("\n".join(PROMPTS))
    table(folder / "data", "captions.csv", "file,prompt\na.png,a white square\nb.png,two black stars on grey\n")
    return folder


class _Killed(Exception):
    pass


def test_killed_and_resumed_is_uninterrupted_to_the_bit(
    files: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(monkeypatch, words(files, whole, "steps=3")) == 0
    update, calls = sft.update, iter(range(9))

    def dies(*args: object) -> dict[str, float]:
        if next(calls) == 2:
            raise _Killed
        return update(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(room.sft, "update", dies)
    monkeypatch.setattr("sys.argv", ["rlhf-img", *words(files, killed, "steps=3")])
    from rlhf_img.cli.main import main

    with pytest.raises(_Killed):
        main()
    monkeypatch.setattr(room.sft, "update", update)
    assert run(monkeypatch, ["sft", "--out", str(killed), "--resume"]) == 0
    assert lines(killed) == lines(whole) and state(killed) == state(whole)
    result = json.loads((whole / "eval.json").read_text())
    assert result == json.loads((killed / "eval.json").read_text()) and (whole / "report.html").is_file()
    assert (whole / "lora").is_dir() and lines(whole)[0].keys() >= {"loss", "grad_norm", "lr"}


@pytest.mark.parametrize(("more", "message"), [
    ([], "what is to be learnt"), (["--variant", "stripes"], 'no variant "stripes"'),
    (["--variant", "ring", "--data", "x"], "what is to be learnt"), (["--data", "nowhere"], "there is no folder"),
    (["--variant", "ring", "sft.drop=2"], "sft.drop is a share"),
])  # fmt: skip
def test_what_a_user_gets_wrong_is_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], more: list[str], message: str
) -> None:
    assert run(monkeypatch, ["sft", "--out", str(tmp_path / "run"), *more]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and message in error
