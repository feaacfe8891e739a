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
    text = (resources.files("rlhf_img.rubrics") / "library" / name).read_text(encoding="utf-8")
    rubrics = parse_rubrics(text)
    assert rubrics and parse_rubrics(dump_rubrics(rubrics)) == rubrics
    assert lint(text) == []


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
        ("- {id: a, check: object, target: cat, via: ocr}", "via: ocr reads text"),
        ("- {id: a, check: count, target: cat, equals: 1, expect: absent}", "expect: absent"),
    ],
)
def test_refusals_say_what_to_mend(lines, said):
    with pytest.raises(RlhfImgError, match=said):
        parse_rubrics(HEAD + lines)


def test_error_names_file_and_line(tmp_path):
    path = tmp_path / "r.yaml"
    path.write_text(HEAD + "- {id: a, check: vqa, ask: x}\n- id: b\n  check: vqa\n  asc: y\n", encoding="utf-8")
    with pytest.raises(RlhfImgError, match=r"r\.yaml:7:3: error: requirements\.1\.asc: unknown field.*ask"):
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


@pytest.mark.parametrize(
    ("lines", "said"),
    [
        ('- {id: a, check: vqa, ask: "Is it red and round?"}', '4:28: warning: "and" joins two'),
        ('- {id: a, check: vqa, ask: "Is it beautiful?"}', '4:28: warning: "beautiful" is a matter of taste'),
        ('- {id: a, check: vqa, ask: "Is there no dog?"}', '4:28: warning: "no" negates'),
        ("- id: a\n  check: vqa\n  ask: Isn't it late?", "6:8: warning: \"n't\" negates"),
        ("- {id: a, check: style, equals: film grain}", "4:3: warning: the artifact reward will punish film grain"),
        ("- {id: a, check: object, target: cat}\n- {id: b, check: object, target: cat}", "5:3: warning: b says"),
        ("- {id: a, check: object, target: cat}\n- {id: b, check: color, target: cat, equals: red}", "needs: [a]"),
        ("- {id: a, check: text, equals: on}", '4:32: error: YAML reads the bare on as a boolean: quote it, "on"'),
        ("- {id: a, check: count, target: cat, equals: 12:30}", "4:46: error: YAML reads the bare 12:30 as another"),
        ("- {id: a, check: text, equals: 2024-01-01}", "4:32: error: YAML reads the bare 2024-01-01 as a date"),
        ("- {id: a, check: vqa, ask: x, on: y}", "4:31: error: YAML reads the bare on"),
        ("- {id: a, id: b, check: vqa, ask: x}", "4:11: error: id is given twice"),
        ("- {id: a, check: objct, target: cat}", '4:3: error: requirements.0: no check is called objct; did you'),
        ("- {id: a, check: vqa, ask: x, needs: [b]}", "4:38: error: a needs b, which no requirement is"),
        ("- {id: a, check: objct}\n- {id: b, check: vqa, ask: x, needs: [c]}", "5:38: error: b needs c, which no"),
        ("- {id: a, check: vqa, ask: x}\n- {id: a, check: vqa, ask: y}", "5:8: error: two requirements share the id a"),
        ("- {id: a, check: vqa, ask: x, needs: [b]}\n- {id: b, check: vqa, ask: y, needs: [a]}",
         "4:38: error: needs go in a circle: a -> b -> a"),
        ("- {id: a, check: vqa, ask: x, via: detector}", "4:36: warning: a detector cannot tell vqa"),
        ("- {id: a, check: vqa, ask: x", "error: not valid YAML"),
        ("  []", "warning: there are no requirements"),
    ],
)  # fmt: skip
def test_lint_says_where_and_how_to_mend(lines, said):
    assert any(said in str(finding) for finding in lint(HEAD + lines)), [str(f) for f in lint(HEAD + lines)]


def test_lint_compares_the_requirements_with_the_prompt():
    text = 'version: 1\nprompt: a cat, no dog, "HI"\nrequirements: [{id: a, check: object, target: cat}]'
    said = "\n".join(map(str, lint(text)))
    assert 'quoted "HI"' in said and 'the prompt says "no"' in said and said.count("2:9: warning") == 2


def test_a_compound_inside_quotation_marks_is_one_requirement():
    assert lint(HEAD + "- {id: a, check: vqa, ask: 'Does the sign read \"salt and pepper\"?'}") == []
