"""The rules of the house that a machine can check: imports run downwards, code stays small, help stays light."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = ROOT / "rlhf_img"
ROOMS = ("cli", "training", "algorithms", "report", "rewards", "rubrics", "judges", "playground", "model")
"""From top to bottom: a room may import those after it."""
SHARED = {"errors", "config"}
"""Modules beside the rooms; everyone may import them."""
FILES = sorted(PACKAGE.rglob("*.py"))


def name_of(path: Path) -> str:
    return str(path.relative_to(ROOT))


def imported_rooms(tree: ast.Module) -> Iterator[str]:
    """What follows `rlhf_img.` in every import, at the top or inside a function."""
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            # `from rlhf_img import rewards` names the room after the import.
            names = (
                [f"{node.module}.{a.name}" for a in node.names] if node.module == "rlhf_img" else [node.module or ""]
            )
        yield from (name.split(".")[1] for name in names if name.startswith("rlhf_img."))


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_downwards(path: Path) -> None:
    room = path.relative_to(PACKAGE).parts[0]
    imported = set(imported_rooms(ast.parse(path.read_text()))) - SHARED - {"__version__"}
    if room not in ROOMS:
        assert not imported, f"{name_of(path)} lies beside the rooms and may import none of them"
        return
    allowed = set(ROOMS[ROOMS.index(room) :])
    if room == "rubrics":
        allowed -= {"model"}  # rubrics know nothing of models
    assert imported <= allowed, f"{room} may not import {', '.join(sorted(imported - allowed))}"


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_modules_say_what_they_are_for_and_stay_small(path: Path) -> None:
    text = path.read_text()
    tree = ast.parse(text)
    assert ast.get_docstring(tree), "a module begins with a docstring"
    assert len(text.splitlines()) <= 400, "a file has at most 400 lines: divide it by what it does"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            length = (node.end_lineno or 0) - node.lineno + 1
            assert length <= 60, f"{node.name} has {length} lines: at most 60"


LIGHT = ("rlhf_img.cli.main", "rlhf_img.config", "rlhf_img.errors", "rlhf_img.report", "rlhf_img.rubrics")


@pytest.mark.parametrize("module", LIGHT)
def test_light_modules_do_not_load_torch(module: str) -> None:
    path = PACKAGE.joinpath(*module.split(".")[1:])
    if not path.with_suffix(".py").exists() and not (path / "__init__.py").exists():
        pytest.skip(f"{module} does not exist yet")
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0


def test_help_does_not_load_torch() -> None:
    if not (PACKAGE / "cli" / "main.py").exists():
        pytest.skip("rlhf_img.cli.main does not exist yet")
    command = [sys.executable, "-X", "importtime", "-m", "rlhf_img.cli.main", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "grpo" in done.stdout
    loaded = {line.split("|")[-1].strip() for line in done.stderr.splitlines() if line.startswith("import time:")}
    assert not loaded & {"torch", "diffusers", "transformers"}


def test_every_shipped_yaml_parses() -> None:
    for folder in ("rlhf_img", "experiments", "docs", "benchmarks"):
        for path in (ROOT / folder).rglob("*.y*ml"):
            assert yaml.safe_load(path.read_text()) is not None, name_of(path)


@pytest.mark.parametrize("room", ["model", "rewards", "rubrics"])
def test_the_rooms_are_reachable_from_the_root(room: str) -> None:
    link = ROOT / room
    assert link.is_symlink()
    assert str(link.readlink()) == f"rlhf_img/{room}"
