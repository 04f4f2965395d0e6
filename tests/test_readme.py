"""The documents name what is there: paths, verbs, configurations, exit codes."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from typer.testing import CliRunner

from medtrain import errors
from medtrain.cli import app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text()
VERBS = {command.name or command.callback.__name__ for command in app.registered_commands}  # type: ignore[union-attr]


@pytest.mark.parametrize("text", [README, CONTRIBUTING], ids=["README", "CONTRIBUTING"])
def test_every_path_that_is_named_exists(text: str) -> None:
    named = re.findall(r"(?:configs|slurm|bench|medtrain|tests)/[\w./-]*\w/?", text)
    assert named
    # A site writes the first itself; the second lies in a user's cache.
    for path in set(named) - {"slurm/site.yaml", "medtrain/kernels"}:
        assert (ROOT / path).exists(), path


def test_every_configuration_is_listed() -> None:
    for config in (ROOT / "configs").glob("*.yaml"):
        assert f"`configs/{config.name}`" in README


def test_every_verb_is_in_the_readme_and_no_other() -> None:
    named = set(re.findall(r"medtrain ([a-z]+)\b", " ".join(re.findall(r"`([^`]+)`", README))))
    assert named <= VERBS, named - VERBS
    for verb in VERBS:
        assert re.search(rf"`(medtrain )?{verb}\b", README), verb


@pytest.mark.parametrize("verb", sorted(VERBS))
def test_every_verb_explains_itself(verb: str) -> None:
    result = CliRunner().invoke(app, [verb, "--help"])
    assert result.exit_code == 0
    assert "Usage" in result.output


def test_exit_codes_are_those_of_the_errors() -> None:
    sentence = README[README.index("Exit codes:") :]
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.MedtrainError):
            assert str(kind.exit_code) in sentence


def test_options_in_the_readme_exist() -> None:
    for verb, option in re.findall(r"medtrain (\w+)[^`|\n]*?(--[a-z]+)", README):
        assert option in CliRunner().invoke(app, [verb, "--help"]).output or option == "--debug"
