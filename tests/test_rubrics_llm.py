"""The `llm` decomposer and its cache: replies are checked, nothing is asked twice, edits win. Judged requirements."""

import json

import numpy as np
import pytest
from test_judges import completion, serving
from typer.testing import CliRunner

from rlhf_img.cli.rubric import app
from rlhf_img.errors import RlhfImgError, RunStopped
from rlhf_img.judges import FakeJudge
from rlhf_img.rewards import Images, load_rewards
from rlhf_img.rewards.rubric import rubric as rubric_reward
from rlhf_img.rubrics import Requirement, Rubric, decompose_all, llm, load_rubrics, score_all
from rlhf_img.rubrics.questions import question_of

CAT = {"id": "cat", "check": "object", "target": "cat", "expect": "present", "needs": []}
RED = {"id": "red", "check": "color", "target": "cat", "equals": "red", "needs": ["cat"]}
GREY = np.full((32, 32, 3), 128, np.uint8)


def reply(*requirements, uncovered=()):
    return json.dumps({"requirements": requirements, "uncovered": uncovered})


def judge_that_says(*replies):
    """Says one thing after another, and keeps what it was told in `talks`."""
    said = iter(replies)
    judge = FakeJudge(reply=lambda turns: talks.append(list(turns)) or next(said))
    judge.talks = talks = []
    return judge


def rubric_of(*requirements, **more):
    return Rubric(prompt="p", requirements=[Requirement.model_validate(r) for r in requirements], **more)


def test_a_reply_becomes_a_rubric_that_says_where_it_comes_from():
    judge = judge_that_says(reply(CAT, RED, uncovered=["stunning"]))
    (found,) = decompose_all(["a red cat, stunning"], "llm", judge=judge)
    assert [r.id for r in found.rubric.requirements] == ["cat", "red"] and found.uncovered == ("stunning",)
    source = found.rubric.source
    assert (source.decomposer, source.model, source.template) == ("llm", "fake", llm.template_version())
    system, user = judge.talks[0]
    assert "Prompt: a red cat, stunning" in user["content"] and system["content"] == llm.template()


BAD = {
    "half-written": ('{"requirements": [{"id"', "Invalid JSON"),
    "wrong type": ('{"requirements": "cat", "uncovered": []}', "requirements"),
    "a list": ("[]", "object"),
    "unknown field": (reply(CAT | {"colour": "red"}), "colour"),
    "missing argument": (reply({"id": "a", "check": "count", "target": "cat", "needs": []}), "lacks equals"),
    "dangling need": (reply(RED), "cat"),
    "circle": (reply(CAT | {"needs": ["red"]}, RED), "circle"),
    "same id": (reply(CAT, CAT), "ids must be unique"),
    "nothing": (reply(), "nothing about the prompt"),
    "code to run": (reply({"id": "a", "check": "evil.py:run"}), "no check is called evil.py:run"),
    "text": ("Sure! Here is the JSON.", "Invalid JSON"),
}


@pytest.mark.parametrize("bad", BAD)
def test_a_reply_that_is_not_valid_is_asked_for_again_with_what_is_wrong(bad):
    text, problem = BAD[bad]
    judge, told = judge_that_says(text, reply(CAT)), []
    (found,) = decompose_all(["a cat"], "llm", judge=judge, say=told.append)
    assert found.rubric.requirements[0].target == "cat"
    assert judge.talks[1][-2]["content"] == text and problem in judge.talks[1][-1]["content"]
    assert told == ["1 of 2 replies (50%) were not valid and were asked for again"]


def test_a_prompt_without_a_valid_reply_is_an_error_and_the_others_are_kept(tmp_path):
    judge = FakeJudge(reply=lambda turns: reply(CAT) if "fine" in turns[1]["content"] else "no")
    with pytest.raises(RlhfImgError, match="1 of 2 prompts.*the others are in(.|\n)*'bad'.*Invalid JSON"):
        decompose_all(["bad", "fine"], "llm", judge=judge, cache=tmp_path, say=str)
    assert [r.prompt for path in tmp_path.glob("*.yaml") for r in load_rubrics(path)] == ["fine"]
    with pytest.raises(RlhfImgError, match="says nothing"):
        decompose_all(["a"], "llm", judge=FakeJudge())
    with pytest.raises(RunStopped):
        decompose_all([f"p{i}" for i in range(30)], "llm", judge=FakeJudge())


def test_the_cache_answers_until_the_template_or_the_prompt_changes(tmp_path, monkeypatch):
    def once(prompt, *replies):
        (found,) = decompose_all([prompt], "llm", judge=judge_that_says(*replies), cache=tmp_path)
        return found

    first = once("a cat", reply(CAT, uncovered=["a"]))
    again = once("a cat")
    assert again.rubric.requirements == first.rubric.requirements and again.uncovered == ("a",)
    assert len(once("another cat", reply(CAT)).rubric.requirements) == 1
    monkeypatch.setattr(llm, "template", lambda: "Be brief.")
    assert len(once("a cat", reply(CAT, RED)).rubric.requirements) == 2
    assert decompose_all(["a cat"], cache=tmp_path)[0].rubric.source.decomposer == "grammar"


def test_an_edited_file_wins_over_everything_and_says_so_once(tmp_path, monkeypatch):
    decompose_all(["a cat"], "llm", judge=judge_that_says(reply(CAT)), cache=tmp_path)
    (path,) = tmp_path.iterdir()
    text = path.read_text()
    path.write_text("# a comment is no edit\n" + text)
    told = []
    decompose_all(["a cat"], "llm", judge=judge_that_says(), cache=tmp_path, say=told.append)
    assert told == []
    path.write_text(text.replace("target: cat", "target: black cat"))
    monkeypatch.setattr(llm, "template", lambda: "Be brief.")
    for how in ("llm", "grammar"):
        found = decompose_all(["a cat"] * 3, how, judge=judge_that_says(), cache=tmp_path, say=told.append)
        assert [d.rubric.requirements[0].target for d in found] == ["black cat"] * 3
    assert len(told) == 2 and path.name in told[0]
    path.write_text(text.replace("prompt: a cat", "prompt: a dog"))
    with pytest.raises(RlhfImgError, match="expected the one rubric of the prompt 'a cat'"):
        decompose_all(["a cat"], cache=tmp_path)


def test_the_template_keeps_its_own_rules():
    lines = llm.template().splitlines()
    prompts = [line.removeprefix("Prompt: ") for line in lines if line.startswith("Prompt: ")]
    replies = [line.removeprefix("Reply: ") for line in lines if line.startswith("Reply: ")]
    assert len(prompts) == len(replies) >= 2
    decompose_all(prompts, "llm", judge=judge_that_says(*replies), say=pytest.fail)
    shapes = llm.reply_schema()["properties"]["requirements"]["items"]["anyOf"]
    fields = {shape["properties"]["check"]["enum"][0]: set(shape["required"]) for shape in shapes}
    for requirement in (r for text in replies for r in json.loads(text)["requirements"]):
        assert set(requirement) == fields[requirement["check"]]


def test_the_command_asks_a_server_and_needs_one(tmp_path):
    with serving(lambda handler, body, n: completion(reply(CAT, uncovered=["stunning"]))) as server:
        url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        judge = ["--decomposer", "llm", "--judge-url", url, "--judge-model", "writer", "--cache", str(tmp_path / "c")]
        first, again = (CliRunner().invoke(app, ["decompose", "a cat, stunning", *judge]) for _ in range(2))
    assert first.exit_code == 0 and "target: cat" in first.stdout and "stunning" in first.stderr
    assert (again.stdout, again.stderr, len(server.requests)) == (first.stdout, first.stderr, 1)
    result = CliRunner().invoke(app, ["decompose", "a cat", "--decomposer", "llm"])
    assert isinstance(result.exception, RlhfImgError) and "--judge-model" in str(result.exception)
    result = CliRunner().invoke(app, ["decompose", "a red circle", "--cache", str(tmp_path)])
    assert result.exit_code == 0 and len(list(tmp_path.glob("*.yaml"))) == 1


@pytest.mark.parametrize(
    "requirement, question",
    [
        (CAT, "Is there a cat in the image?"),
        ({"id": "o", "check": "object", "target": "owl", "expect": "absent"}, "Is there an owl in the image?"),
        ({"id": "n", "check": "count", "target": "cat", "equals": 3}, "Are there exactly three cats in the image?"),
        ({"id": "n", "check": "count", "target": "cat", "equals": 1}, "Is there exactly one cat in the image?"),
        (RED | {"needs": []}, "Is the cat red?"),
        ({"id": "r", "check": "relation", "subject": "cat", "is": "on", "object": "mat"}, "Is the cat on the mat?"),
        ({"id": "b", "check": "background", "equals": "blue"}, "Is the background blue?"),
        ({"id": "s", "check": "style", "equals": "film grain"}, "Does the image show film grain?"),
        ({"id": "t", "check": "text", "equals": "NO", "target": "sign"},
         'Does the sign show exactly the text "NO" and no other text?'),
        ({"id": "t", "check": "text", "equals": "NO", "extra_text": "ignore"}, 'Does the image show the text "NO"?'),
        ({"id": "v", "check": "vqa", "ask": "Is it dawn?"}, "Is it dawn?"),
        ({"id": "c", "check": "mine.py:check"}, None),
    ],
)  # fmt: skip
def test_the_question_of_a_requirement(requirement, question):
    assert question_of(Requirement.model_validate(requirement)) == question


def test_the_judge_is_asked_only_what_the_checks_leave_open_or_via_gives_it():
    rubric = rubric_of(
        CAT, RED, {"id": "dog", "check": "object", "target": "dog", "expect": "absent"},
        {"id": "no_judge", "check": "object", "target": "bird", "via": "cv"},
        {"id": "circle", "check": "object", "target": "circle"},
        {"id": "star", "check": "object", "target": "star", "via": "vlm"},
    )  # fmt: skip
    asked = []
    p_yes = {"Is there a cat in the image?": 0.6, "Is the cat red?": 0.9, "Is there a dog in the image?": 0.3,
             "Is there a star in the image?": None}  # fmt: skip
    judge = FakeJudge(answer=lambda ask: asked.append(ask.question) or p_yes[ask.question])
    first, second = score_all([rubric, rubric], [GREY, GREY], judge)
    assert asked == list(p_yes) * 2 and first == second
    scores = {r.id: r.score for r in first.requirements}
    assert scores == {"cat": 0.6, "red": 0.6, "dog": 0.7, "no_judge": None, "circle": 0.0, "star": None}
    evidence = {r.id: r.evidence for r in first.requirements}
    assert "fake: P(yes) 0.60 to 'Is there a cat" in evidence["cat"] and "told to fail" in evidence["star"]
    assert "a judge; none" in score_all([rubric], [GREY])[0].requirements[-1].evidence


def test_a_tie_counts_as_there():
    absent = {"id": "dog", "check": "object", "target": "dog", "expect": "absent"}
    present, gone = score_all([rubric_of(CAT), rubric_of(absent)], [GREY] * 2, FakeJudge(answer=lambda ask: 0.5))
    assert present.passed and not gone.passed


def test_the_reward_asks_a_judge_that_its_options_describe():
    import torch

    images = Images(torch.full((2, 3, 32, 32), 0.5))
    own = [rubric_of(CAT, RED)] * 2
    assert {v.value for v in rubric_reward(["p"] * 2, images, rubrics=own)} == {None}
    spec = [{"reward": "rubric", "options": {"judge": {"url": "fake:", "model": "any"}}}]
    (reward,) = load_rewards(spec)
    verdicts = reward.fn(prompts=["p"] * 2, images=images, rubrics=own)
    assert all(0 <= v.value <= 1 and "fake" in v.details.requirements[0].evidence for v in verdicts)
    (wrong,) = load_rewards([{"reward": "rubric", "options": {"judge": {"url": "fake:", "modell": "any"}}}])
    with pytest.raises(RlhfImgError, match='did you mean "model"'):
        wrong.fn(prompts=["p"] * 2, images=images, rubrics=own)
