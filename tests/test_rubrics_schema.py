"""The rubric file: what is read, what is refused and how the refusal reads."""

from importlib import resources

import pytest

from rlhf_img.errors import RlhfImgError
from rlhf_img.rubrics import decompose, dump_rubrics, lint, load_rubrics, parse_rubrics

HEAD = "version: 1\nprompt: p\nrequirements:\n"
LIBRARY = sorted(
    p.name for p in (resources.files("rlhf_img.rubrics") / "library").iterdir() if p.name.endswith(".yaml")
)


@pytest.mark.parametrize("name", LIBRARY)
def test_library_parses_without_warnings_and_round_trips(name):
    rubrics = load_rubrics(str(resources.files("rlhf_img.rubrics") / "library" / name))
    assert rubrics and parse_rubrics(dump_rubrics(rubrics)) == rubrics
    assert [lint(r) for r in rubrics] == [[] for _ in rubrics]


@pytest.mark.parametrize("prompt", ['a box and the word "NO"', 'the word "on"', 'text "12:30"', 'a sign reading "007"'])
def test_words_that_yaml_would_misread_survive_dump_and_load(prompt):
    rubric = decompose(prompt).rubric
    assert parse_rubrics(dump_rubrics([rubric])) == [rubric]


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ("- {id: a, check: objct, target: cat}", 'did you mean "object"'),
        ("- {id: a, check: object, targt: cat}", 'did you mean "target"'),
        ("- {id: a, check: object}", "lacks target"),
        ("- {id: a, check: object, target: cat, equals: red}", "does not take equals"),
        ("- {id: a, check: text, equals: NO}", "quotes"),
        ("- {id: a, check: text, equals: on}", "quotes"),
        ("- {id: a, check: text, equals: 12:30}", "750"),
        ("- {id: a, check: text, equals: 007}", "quotes"),
        ("- {id: a, check: count, target: cat, equals: 'three'}", "whole number"),
        ("- {id: a, check: count, target: cat, equals: yes}", "whole number"),
        ("- {id: a, check: count, target: cat, equals: -1}", "whole number"),
        ("- {id: a, check: vqa, ask: x}\n- {id: a, check: vqa, ask: y}", "share the id a"),
        ("- {id: cat, check: vqa, ask: x}\n- {id: b, check: vqa, ask: y, needs: [cats]}", 'did you mean "cat"'),
        ("- {id: a, check: vqa, ask: x, needs: [a]}", "a -> a"),
        (
            "- {id: a, check: vqa, ask: x, needs: [b]}\n- {id: b, check: vqa, ask: x, needs: [c]}\n"
            "- {id: c, check: vqa, ask: x, needs: [a]}",
            "a -> b -> c -> a",
        ),
        ("- {id: a, check: vqa, ask: x, weight: 0}", "greater than 0"),
        ("- {id: a, check: count, target: cat, equals: 1, expect: absent}", "expect: absent"),
    ],
)
def test_refusals_say_what_to_mend(lines, said):
    with pytest.raises(RlhfImgError, match=said):
        parse_rubrics(HEAD + lines)


def test_error_names_file_and_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "- {id: a, check: vqa, ask: x}\n- id: b\n  check: vqa\n  asc: y\n", encoding="utf-8")
    with pytest.raises(RlhfImgError, match=r"r\.yaml:7: requirements\.1\.asc: unknown field.*ask"):
        load_rubrics(path)


@pytest.mark.parametrize("text", ["", "just words", "- 3", "{", "prompt: 3\nrequirements: []"])
def test_what_is_no_rubric_is_a_user_error(text):
    with pytest.raises(RlhfImgError):
        parse_rubrics(text)


def test_missing_file_and_bare_on_key():
    with pytest.raises(RlhfImgError, match="cannot be read"):
        load_rubrics("nowhere.yaml")
    with pytest.raises(RlhfImgError):
        parse_rubrics(HEAD + "- {id: a, check: vqa, ask: x, on: y}")


def test_custom_check_by_file_is_allowed_and_permits_are_collected():
    (rubric,) = parse_rubrics(
        HEAD
        + "- {id: a, check: 'my.py:f', target: cat, permits: [blur]}\n- {id: b, check: vqa, ask: x, permits: [grain]}"
    )
    assert rubric.permits == {"blur", "grain"}


def test_lint_warns_of_what_is_valid_but_doubtful():
    (rubric,) = parse_rubrics(
        'version: 1\nprompt: a cat, no dog, "HI"\nrequirements:\n- {id: a, check: vqa, ask: "Is it red and round?"}\n'
        "- {id: b, check: style, equals: film grain}\n- {id: c, check: style, equals: film grain}"
    )
    text = "\n".join(lint(rubric))
    for part in ("two things", "permits: [grain, noise]", "same as b", '"HI"', 'says "no"'):
        assert part in text
