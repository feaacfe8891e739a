"""The wheel: built from a copy of the sources, looked into, installed elsewhere, and run."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
LIMIT_MIB = 24


def run(*command: str | Path, cwd: Path, **env: str) -> str:
    done = subprocess.run(command, cwd=cwd, env={**os.environ, **env}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    # A copy: a build leaves files in the tree, and would pack what an earlier one left there.
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    shutil.copytree(ROOT / "rlhf_img", source / "rlhf_img", ignore=shutil.ignore_patterns("__pycache__"))
    out = tmp_path_factory.mktemp("dist")
    build = ("wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir")
    run(sys.executable, "-m", "pip", *build, out, ".", cwd=source)
    (path,) = out.glob("rlhf_img-*.whl")
    return path


def test_the_wheel_holds_everything_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        packed = {name for name in archive.namelist() if not name.endswith("/")}
    ours = {name for name in packed if name.startswith("rlhf_img/")}
    expected = {str(path.relative_to(ROOT)) for path in (ROOT / "rlhf_img").rglob("*") if path.is_file()}
    assert ours == {name for name in expected if "__pycache__" not in name}
    info = {name.split("/", 1)[1] for name in packed - ours}
    assert {"METADATA", "entry_points.txt", "licenses/LICENSE"} <= info
    assert {name.split("/")[0].split("-")[0] for name in packed} == {"rlhf_img"}
    assert wheel.stat().st_size < LIMIT_MIB * 2**20


def test_the_installed_command_runs(wheel: Path, tmp_path: Path) -> None:
    if not (ROOT / "rlhf_img" / "cli" / "main.py").exists():
        pytest.skip("rlhf_img.cli.main does not exist yet")
    site = tmp_path / "site"
    install = ("install", "--quiet", "--no-deps", "--no-index", "--target")
    run(sys.executable, "-m", "pip", *install, site, wheel, cwd=tmp_path)
    where = run(sys.executable, "-c", "import rlhf_img; print(rlhf_img.__file__)", cwd=tmp_path, PYTHONPATH=str(site))
    assert where.strip() == str(site / "rlhf_img" / "__init__.py")
    said = run(sys.executable, "-m", "rlhf_img.cli.main", "--help", cwd=tmp_path, PYTHONPATH=str(site))
    assert "grpo" in said and "report" in said
