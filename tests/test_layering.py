"""Imports point one way, and the command line imports nothing heavy."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "medtrain"

LAYERS = [
    {"errors", "environment", "kernel_cache"},
    {"attention", "files", "locks", "ending"},
    {"console", "config", "run", "endpoint"},
    {"digests", "memory", "beforehand", "gpus"},
    {"lineage", "quickstart"},
    {"data", "shards"},
    {"train"},
    {"generate", "judge"},
    {"evaluate"},
    {"report"},
    {"inputs"},
    {"stage"},
    {"stages"},
    {"selection", "launch"},
    {"pipeline"},
    {"status", "published"},
    {"cluster"},
    {"arguments"},
    {"cluster_verbs"},
    {"cli"},
    {"__main__"},
]
RANK = {room: rank for rank, rooms in enumerate(LAYERS) for room in rooms}


def imported_rooms(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    rooms: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            parts = node.module.split(".")
            if parts[0] == "medtrain":
                names = {a.name for a in node.names} - {"__version__"}
                rooms |= {parts[1]} if len(parts) > 1 else names
        elif isinstance(node, ast.Import):
            rooms |= {a.name.split(".")[1] for a in node.names if a.name.startswith("medtrain.")}
    return rooms


def room_of(file: Path) -> str:
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [f for f in sorted(PACKAGE.rglob("*.py")) if f != PACKAGE / "__init__.py"]


@pytest.mark.parametrize("file", MODULES, ids=lambda f: str(f.relative_to(PACKAGE)))
def test_imports_point_down(file: Path) -> None:
    room = room_of(file)
    for other in imported_rooms(file) - {room}:
        assert other in RANK, f"{other} has no place in the order of rooms"
        assert RANK[other] < RANK[room], f"{room} imports {other}, which is not below it"


def test_importing_every_light_module_loads_no_torch() -> None:
    light = ["cli", "config", "run", "console", "pipeline", "stages", "status", "shards", "lineage"]
    imports = "; ".join(f"import medtrain.{name}" for name in light)
    heavy = "{'torch', 'transformers', 'datasets', 'trl', 'peft', 'numpy'}"
    code = f"{imports}; import sys; print(sorted({heavy} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stdout + result.stderr


def test_help_imports_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['medtrain', '--help']\n"
        "from medtrain.cli import main\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 0\n"
        "print('HEAVY', sorted({'torch', 'transformers', 'pydantic'} & set(sys.modules)))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "HEAVY []" in result.stdout, result.stdout + result.stderr


def test_answering_with_a_merged_model_imports_nothing_of_training(tmp_path: Path) -> None:
    """On a cold disk PEFT and bitsandbytes take longer than a small model's answers."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from medtrain.console import Console\n"
        "from medtrain.generate.stage import generate\n"
        "from tests.generate.models import config_for, write_run\n"
        "from tests.tiny import tiny_base\n"
        "root = Path(sys.argv[1])\n"
        "run = write_run(root / 'run', tiny_base(root / 'base'), 2)\n"
        "generate(run, config_for(root, max_new_tokens=2), Console(quiet=True))\n"
        "assert run.candidates.stat().st_size\n"
        "import medtrain.evaluate.stage, medtrain.judge.stage, medtrain.judge.chat_model\n"
        "print(sorted({'peft', 'bitsandbytes', 'trl', 'datasets'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True,
        cwd=PACKAGE.parent,
    )  # fmt: skip
    assert result.stdout.splitlines()[-1:] == ["[]"], result.stdout + result.stderr
