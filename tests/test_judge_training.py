"""The playground's judge: true labels, packed questions that are those asked alone, a stock folder, exact resume."""

import shutil
from collections import Counter
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from rlhf_img.cli.main import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.judges import Ask, JudgeConfig, local, open_judge, protocol
from rlhf_img.judges.local import LocalJudge
from rlhf_img.playground.fit import FitConfig
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, Thing, pairs_of
from rlhf_img.rubrics import Rubric, decompose, score
from rlhf_img.rubrics.questions import question_of
from rlhf_img.training import judge, judge_card
from rlhf_img.training.judge_data import (
    KINDS,
    SUFFIX,
    all_words,
    asked_damaged,
    asked_image,
    asked_render,
    question_text,
    seen_facts,
)
from rlhf_img.training.judge_packed import LONGEST, Packed

TINY = judge.JudgeTraining(
    renders=12, damaged=4, drawn=0, questions=3, batch=8, fit=FitConfig(steps=4, lr=1e-3, ema=0.9, save_every=2)
)


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    folder = tmp_path_factory.mktemp("trained")
    judge.train_judge(TINY, folder / "work", folder / "judge")
    return folder / "judge"


def test_answers_from_the_scene_are_those_of_the_exact_checks_on_the_pixels():
    rng = np.random.default_rng(0)
    agree, seen = [], Counter()
    for _ in range(60):
        item = asked_render(rng, "train", 8)
        asked = tuple(r.model_copy(update={"id": f"r{i}"}) for i, (r, _) in enumerate(item.questions))
        found = score(Rubric(prompt="any", requirements=asked), item.image).requirements
        agree += [r.passed == truth for r, (_, truth) in zip(found, item.questions, strict=True)]
        seen.update((r.check, truth) for r, truth in item.questions)
    assert np.mean(agree) >= 0.995 and len(agree) == 480
    assert set(seen) == {(kind, truth) for kind in KINDS for truth in (True, False)}
    assert 0.35 < sum(n for (_, truth), n in seen.items() if truth) / len(agree) < 0.6


def test_damaged_images_are_answered_for_by_their_pixels_and_what_has_no_answer_is_not_asked():
    rng, answers = np.random.default_rng(3), set()
    for _ in range(6):
        item = asked_damaged(rng, "train", 8)
        asked = tuple(r.model_copy(update={"id": f"r{i}"}) for i, (r, _) in enumerate(item.questions))
        found = score(Rubric(prompt="any", requirements=asked), item.image).requirements
        assert [r.passed for r in found] == [truth for _, truth in item.questions] and item.scene is None
        answers.update(truth for _, truth in item.questions)
    assert answers == {True, False}
    scene = asked_render(np.random.default_rng(0), "train", 1).scene
    nothing = asked_image(np.full((64, 64, 3), 128, np.uint8), scene, np.random.default_rng(0), 8)
    assert nothing.questions and {r.check for r, _ in nothing.questions} <= {"object", "background", "style", "text"}


def test_a_combination_that_training_never_shows_is_never_asked_about():
    rng = np.random.default_rng(5)
    for _ in range(25):
        item = asked_render(rng, "train", 6)
        for r, _ in item.questions:
            color, _, shape = (f"{r.equals} {r.target}" if r.check == "color" else str(r.target)).partition(" ")
            if r.check in ("object", "color") and shape:
                assert (color, shape) in pairs_of("train", item.scene.background)


def test_the_facts_to_see_are_where_the_things_are():
    things = (Thing(shape="star", color="red", size="large", x=20, y=44, radius=13),)
    cells, facts = seen_facts(Scene(things=things, background="grey", word="GO", style="vignette"))
    (place,) = np.flatnonzero(cells.any(1))
    # Column 1 and row 2 of four; 20 px lies in the left half of 16 to 32, 44 px in the lower half of 32 to 48.
    assert place == 2 * 4 + 1 and cells[place].tolist() == [3, 4, 1, 3] and facts.tolist() == [1, 1, 3]


def test_the_tokenizer_knows_every_word_that_prompts_ask_with():
    tokenizer = judge.build_judge_tokenizer(all_words(), SUFFIX)
    prompts = ["two small red circles and a blue star on grey, with film grain", "a red star left of a purple star",
               'a pink cross above a large green square and the word "STOP" on brown']  # fmt: skip
    texts = {question_text(r) for p in prompts for r in decompose(p).rubric.requirements}
    assert len(texts) > 10
    for text in texts:
        ids = tokenizer.encode(text, add_special_tokens=False)
        assert len(ids) < LONGEST and tokenizer.decode(ids[-1]) == SUFFIX
        words = text.removesuffix(SUFFIX).replace("?", " ?").replace('"', ' " ').split()
        assert len(ids) - 1 <= len(words)
    assert tokenizer.decode(tokenizer.encode("a façade?")) == "a façade?"


def test_packed_questions_get_the_answers_that_they_get_alone(trained, monkeypatch):
    monkeypatch.setattr(protocol, "MIN_MASS", 0.0)
    alone = LocalJudge.load(JudgeConfig(model=str(trained)))
    model, tokenizer = alone._model.float(), alone._tokenizer
    with torch.no_grad():
        for p in model.parameters():  # weights with which the answers differ clearly
            p.add_(0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())))
    items = [asked_render(np.random.default_rng(i), "train", 3) for i in range(3)]
    asks = [Ask(image=item.image, question=str(question_of(r))) for item in items for r, _ in item.questions]
    expected = [answer.p_yes for answer in alone.ask(asks)]
    data = judge.pack(items, tokenizer, 3)
    with torch.no_grad():
        logits, _ = Packed(model, tokenizer, 3)(data.images_NHWC, data.tokens_NKL.long(), data.last_NK)
    words = list(zip(alone._words, alone._ids, strict=True))
    p = logits.softmax(-1).flatten(0, 1)
    yes, no = (sum(p[:, i] for word, i in words if protocol.verdict_of(word) == said) for said in ("yes", "no"))
    assert (yes / (yes + no)).tolist() == pytest.approx(expected, abs=1e-4)
    assert np.std(expected) > 0.01


def test_the_folder_is_small_and_a_local_judge_loads_it(trained, monkeypatch):
    monkeypatch.setattr(protocol, "MIN_MASS", 0.0)
    assert sum(f.stat().st_size for f in trained.rglob("*")) < 8e6
    judged = open_judge(JudgeConfig(model=str(trained)))
    image = asked_render(np.random.default_rng(0), "val", 1).image
    large = np.asarray(np.kron(image, np.ones((3, 3, 1))), np.uint8)
    answers = judged.ask([Ask(image=x, question="Is the circle red?") for x in (image, large)])
    assert all(0 <= a.p_yes <= 1 for a in answers)
    assert answers[0].p_yes == pytest.approx(answers[1].p_yes, abs=0.02)


def test_training_that_was_interrupted_ends_with_the_same_bits(trained, tmp_path, monkeypatch):
    whole = judge._loss_fn

    def cut(*args):
        loss_fn = whole(*args)

        def stops(step):
            if step == 3:
                raise KeyboardInterrupt
            return loss_fn(step)

        return stops

    monkeypatch.setattr(judge, "_loss_fn", cut)
    with pytest.raises(KeyboardInterrupt):
        judge.train_judge(TINY, tmp_path / "work", tmp_path / "judge")
    monkeypatch.setattr(judge, "_loss_fn", whole)
    judge.train_judge(TINY, tmp_path / "work", tmp_path / "judge")
    assert (tmp_path / "judge/model.safetensors").read_bytes() == (trained / "model.safetensors").read_bytes()
    with pytest.raises(RlhfImgError, match="another recipe .batch"):
        judge.train_judge(replace(TINY, batch=4), tmp_path / "work", tmp_path / "judge")


def test_training_lowers_the_loss():
    tokenizer = judge.build_judge_tokenizer(all_words(), SUFFIX)
    model = judge.build_judge(tokenizer)
    judge.add_seeing(model, 0)
    items = [asked_render(np.random.default_rng(i), "train", 3) for i in range(8)]
    config = replace(TINY, renders=8, damaged=0)
    loss_fn = judge._loss_fn(model, tokenizer, judge.pack(items, tokenizer, 3), config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses = []
    for step in range(12):
        losses.append(loss_fn(step))
        optimizer.zero_grad()
        losses[-1].backward()
        optimizer.step()
    assert losses[-1].item() < 0.6 * losses[0].item()


def test_the_command_writes_a_judge_and_its_card(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(judge, "JudgeTraining", lambda seed: replace(TINY, seed=seed))
    monkeypatch.setattr(judge, "train_judge", lambda config, work, out: shutil.copytree(trained, out))
    monkeypatch.setattr(judge_card, "measure_judge", partial(judge_card.measure_judge, count=6, drawn=0))
    out = tmp_path / "mine"
    result = CliRunner().invoke(app, ["playground", "train-judge", "--out", str(out)], catch_exceptions=False)
    assert result.exit_code == 0 and str(out / "README.md") in result.stdout
    card = (out / "README.md").read_text()
    assert "| renders | all |" in card and "| damaged | relation |" in card and "steps: 4" in card


def test_agreement_weighs_yes_and_no_alike(monkeypatch):
    class SaysYes:
        def ask(self, asks):
            return [protocol.Answer(p_yes=0.9) for _ in asks]

    monkeypatch.setattr(LocalJudge, "load", lambda config: SaysYes())
    rows = {(r.images, r.kind): r for r in judge_card.measure_judge(Path("any"), count=8, drawn=0)}
    everything = rows["renders", "all"]
    assert everything.yes + everything.no == 32 and everything.balanced == 0.5
    assert everything.right_yes == everything.yes > 0 == everything.right_no
    assert sum(rows["damaged", kind].yes for kind in KINDS) == rows["damaged", "all"].yes


def test_the_shipped_judge_is_found_by_name_or_said_to_be_missing(trained, tmp_path, monkeypatch):
    monkeypatch.setattr(local.resources, "files", lambda package: tmp_path)
    with pytest.raises(RlhfImgError, match="playground train-judge"):
        open_judge(JudgeConfig(model="playground", max_tokens=1))
    shutil.copytree(trained, tmp_path / "playground" / "judge")
    found = open_judge(JudgeConfig(model="playground", max_tokens=2))
    assert found.id.startswith("playground@")
    image = render(asked_render(np.random.default_rng(1), "train", 1).scene)
    assert len(found.ask([Ask(image=image, question="Is the background grey?")])) == 1
