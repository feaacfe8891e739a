"""`rlhf-img reward`: what it prints, and what it does not import."""

import json
import subprocess
import sys

import pytest
from PIL import Image
from typer.testing import CliRunner

from rlhf_img.cli.reward import app
from rlhf_img.errors import RlhfImgError

PLUGIN = '''
def redness(prompts, images, **columns):
    """How red it is."""
    return [float(p[..., 0].mean() / 255) if p.any() else None for p in images.arrays]
'''


@pytest.fixture
def pictures(tmp_path):
    (tmp_path / "my.py").write_text(PLUGIN)
    for name, color in {"red": (255, 9, 9), "black": (0, 0, 0), "half": (51, 0, 0)}.items():
        Image.new("RGB", (8, 8), color).save(tmp_path / f"{name}.png")
    return tmp_path


def test_importing_the_commands_does_not_import_torch():
    code = "import sys, rlhf_img.cli.reward; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


def test_score_prints_json_with_unscored_apart(pictures):
    files = [str(pictures / f"{name}.png") for name in ("red", "black", "half")]
    args = ["score", *files, "--prompt", "red", "--rewards", f"{pictures / 'my.py'}:redness", "--json"]
    result = CliRunner().invoke(app, args, catch_exceptions=False)
    printed = json.loads(result.stdout)
    assert printed["scores"] == [{"image": files[0], "redness": 1.0}, {"image": files[1], "redness": None},
                                 {"image": files[2], "redness": pytest.approx(0.2)}]
    assert printed["unscored"] == {"redness": {"no score given": 1}}


def test_score_prints_a_table(pictures):
    args = ["score", str(pictures / "half.png"), "--prompt", "red", "--rewards", f"{pictures / 'my.py'}:redness"]
    assert "0.200" in CliRunner().invoke(app, args, catch_exceptions=False).stdout


def test_score_of_what_is_no_image_is_a_clear_error(pictures):
    args = ["score", str(pictures / "my.py"), "--prompt", "red", "--rewards", f"{pictures / 'my.py'}:redness"]
    with pytest.raises(RlhfImgError, match=r"my\.py cannot be read as an image"):
        CliRunner().invoke(app, args, catch_exceptions=False)


def test_list_shows_the_built_in_rewards():
    rows = json.loads(CliRunner().invoke(app, ["list", "--json"], catch_exceptions=False).stdout)
    known = {row["name"]: row for row in rows}
    assert known["rubric"]["source"] == "built-in" and known["rubric"]["range"] == "0 to 1"
    assert known["artifact"]["role"] == "gate" and "defect" in known["artifact"]["about"]


def test_help_shows_an_example():
    for command in (["list"], ["score"], ["train", "artifact"]):
        assert "Example: rlhf-img reward" in CliRunner().invoke(app, [*command, "--help"]).stdout
