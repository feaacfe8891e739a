"""`rlhf-img rubric`: each command as a user would call it."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from rlhf_img.cli.rubric import app
from rlhf_img.errors import RlhfImgError
from rlhf_img.playground.render import render
from rlhf_img.playground.scene import Scene, Thing
from rlhf_img.rubrics import load_rubrics, parse_rubrics


def call(*args):
    return CliRunner().invoke(app, [str(a) for a in args])


def test_decompose_prints_yaml_and_what_is_not_covered():
    result = call("decompose", "a red circle", "a cat, quickly")
    assert result.exit_code == 0 and "quickly" in result.stderr
    assert [r.prompt for r in parse_rubrics(result.stdout)] == ["a red circle", "a cat, quickly"]


def test_decompose_a_file_and_show_it(tmp_path):
    prompts, out = tmp_path / "p.txt", tmp_path / "r.yaml"
    prompts.write_text("two boxes\n\na [bold] star\n", encoding="utf-8")
    assert call("decompose", "--prompts", prompts, "--out", out).exit_code == 0
    assert len(load_rubrics(out)) == 2
    shown = call("show", out).stdout
    assert "exactly 2 box" in shown and "box_count" in shown and "[bold]" in shown


@pytest.mark.parametrize("content", ["", "\n \n"])
def test_an_empty_prompts_file_is_a_user_error(tmp_path, content):
    (tmp_path / "p.txt").write_text(content, encoding="utf-8")
    result = call("decompose", "--prompts", tmp_path / "p.txt")
    assert isinstance(result.exception, RlhfImgError) and "no prompt" in str(result.exception)


def test_lint_reports_every_broken_file(tmp_path):
    good, bad, worse = (tmp_path / f"{n}.yaml" for n in ("good", "bad", "worse"))
    good.write_text("version: 1\nprompt: no cat\nrequirements: [{id: a, check: object, target: cat}]\n")
    bad.write_text("version: 1\nprompt: p\nrequirements: [{id: a, check: colour, target: cat}]\n")
    worse.write_text("version: 1\nprompt: p\nrequirements: [{id: a, check: vqa, ask: x, needs: [a]}]\n")
    result = call("lint", good, bad, worse)
    assert isinstance(result.exception, RlhfImgError) and result.exception.exit_code == 2
    assert "2 errors in 3 files" in str(result.exception)
    for said in ('bad.yaml:3:16: error: requirements.0: no check is called colour; did you mean "color"', "a -> a"):
        assert said in result.stdout
    assert call("lint", good).exit_code == 0 and "1 warning" in call("lint", good).stdout
    assert json.loads(call("lint", good, "--json").stdout)[0]["line"] == 2


def test_new_writes_a_commented_file_that_lints_and_overwrites_nothing(tmp_path):
    out = tmp_path / "r.yaml"
    assert call("new", 'a red circle, no people, the word "NO" xyzzy', "--out", out).exit_code == 0
    assert "equals: 'NO'" in out.read_text() and "xyzzy" in out.read_text()
    assert call("lint", out).exit_code == 0
    again = call("new", "a star", "--out", out)
    assert isinstance(again.exception, RlhfImgError) and "exists" in str(again.exception)
    assert "circle" in out.read_text()


def test_score_as_table_and_as_json(tmp_path):
    scene = Scene(things=(Thing(shape="circle", color="red", size="medium", x=32, y=32, radius=9),), background="grey")
    image, rubric = tmp_path / "i.png", tmp_path / "r.yaml"
    Image.fromarray(render(scene)).save(image)
    call("decompose", "a red circle on grey", "--out", rubric)
    (found,) = json.loads(call("score", image, rubric, "--json").stdout)
    assert found["passed"] is True and len(found["requirements"]) == 4
    assert "pass" in call("score", image, rubric).stdout
    assert "cannot be read as an image" in str(call("score", rubric, rubric).exception)


def test_no_command_imports_torch():
    code = (
        "import sys, numpy as np; from rlhf_img.cli import rubric; from rlhf_img import rubrics;"
        "rubrics.score(rubrics.decompose('a red circle').rubric, np.zeros((64, 64, 3), 'uint8'));"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
