"""The verbs of the `medtrain` command.

parse → load the configuration → hand over to the pipeline; every error ends in one message and its
exit code. Nothing heavy is imported until a stage runs: `medtrain --help` must be instant.
"""

from __future__ import annotations

import io
import os
import sys
import traceback
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer

from medtrain import cluster_verbs
from medtrain.arguments import (
    AsJson,
    ConfigPath,
    Force,
    Forced,
    From,
    Only,
    Overrides,
    RunPath,
    Until,
    load,
)
from medtrain.ending import Ending
from medtrain.environment import LAUNCHER_VARIABLE, is_launched
from medtrain.errors import DEBUG_VARIABLE, MedtrainError, as_medtrain_error

if TYPE_CHECKING:
    from medtrain.selection import Selection

_USAGE_EXIT_CODE, _INTERRUPTED = 64, 130

# typer carried click as a dependency, then inside itself: this is the class either way.
_UsageError: Any = typer.BadParameter.__base__

app = typer.Typer(
    name="medtrain",
    help="From a base checkpoint to a preference-aligned, evaluated medical chatbot.",
    epilog="A CONFIG is a YAML file or a run directory; `dotted.key=value` after it overrides. "
    "Add --debug for tracebacks.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.command()
def run(
    config: ConfigPath,
    overrides: Overrides = None,
    start: From = None,
    until: Until = None,
    only: Only = None,
    force: Forced = None,
    executor: Annotated[
        str, typer.Option("--executor", metavar="here|local", help="`local`: several processes.")
    ] = "here",
    workers: Annotated[
        int, typer.Option("--workers", min=1, help="Processes of --executor local.")
    ] = 2,
) -> None:
    """Run every stage that is not finished, from the data to the report."""
    from medtrain.errors import ConfigError
    from medtrain.selection import Selection

    selection = Selection(start, until, only, tuple(force or ()))
    if executor not in ("here", "local"):
        raise ConfigError(f"There is no executor {executor!r}", fix="Valid: here, local")
    _run_stages(config, overrides, selection, workers if executor == "local" else None)


@app.command()
def prepare(
    config: ConfigPath,
    overrides: Overrides = None,
    preview: Annotated[
        int, typer.Option("--preview", min=0, help="Show this many rows with coloured loss masks.")
    ] = 0,
    fetch: Annotated[
        bool, typer.Option("--fetch", help="Only download what the run takes from the hub.")
    ] = False,
    force: Force = False,
) -> None:
    """Read, clean, deduplicate and split the data; check the loss masks."""
    if fetch:
        _fetch(config, overrides, alone=not (preview or force))
        return
    _run_one("prepare", config, overrides, force)
    if preview:
        from medtrain.console import Console
        from medtrain.data.prepare import preview as show_preview

        loaded, a_run = load(config, overrides)
        show_preview(a_run, loaded, Console(a_run.log), preview)


def _fetch(config: str, overrides: list[str] | None, *, alone: bool) -> None:
    from medtrain.cluster.site import job_environment
    from medtrain.console import Console, quiet_libraries
    from medtrain.data.fetch import fetch
    from medtrain.errors import ConfigError

    if not alone:
        raise ConfigError("--fetch prepares nothing, so it goes with neither --preview nor --force")
    loaded, a_run = load(config, overrides)
    quiet_libraries()
    fetch(loaded, Console(a_run.log), job_environment(loaded))


def _stage_verb(name: str, help_text: str) -> None:
    def verb(config: ConfigPath, overrides: Overrides = None, force: Force = False) -> None:
        _run_one(name, config, overrides, force)

    app.command(name, help=help_text)(verb)


_stage_verb("sft", "Train the adapter on questions and answers (also under accelerate launch).")


@app.command()
def merge(
    config: ConfigPath,
    overrides: Overrides = None,
    adapter: Annotated[
        str, typer.Option("--adapter", metavar="sft|dpo", help="Which adapter.")
    ] = "sft",
    force: Force = False,
) -> None:
    """Merge an adapter into a plain model directory."""
    from medtrain.errors import ConfigError

    if adapter not in ("sft", "dpo"):
        raise ConfigError(f"There is no adapter {adapter!r}", fix="Valid: sft, dpo")
    _run_one(f"merge-{adapter}", config, overrides, force)


_stage_verb("generate", "Sample candidate answers for the preference prompts.")
_stage_verb("judge", "Compare the candidates of each prompt.")
_stage_verb("pairs", "Turn verdicts into preference pairs.")
_stage_verb("dpo", "Train the adapter on preferences (also under accelerate launch).")
_stage_verb("evaluate", "Answer the evaluation questions with every model, score and judge them.")
_stage_verb("report", "Write the report of what was evaluated.")


@app.command()
def status(
    run_or_config: RunPath,
    overrides: Overrides = None,
    as_json: AsJson = False,
) -> None:
    """Show the stages of a run, their counts, and what is next."""
    import json

    from medtrain.cluster.board import Board
    from medtrain.console import Console

    config, a_run = load(run_or_config, overrides)
    found = Board(a_run, config).look()
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=2))
    else:
        Console().show(found)
        # Outside the table, which would break a path that is longer than a line.
        typer.echo(f"\nnext: {found.next_command}")


cluster_verbs.register(app)


@app.command()
def schema() -> None:
    """Print the JSON Schema of a configuration, for editors."""
    import json

    from medtrain.config.schema import json_schema

    typer.echo(json.dumps(json_schema(), indent=2))


@app.command()
def push(
    run_or_config: RunPath,
    repository: Annotated[str, typer.Argument(metavar="REPO", help="Hub repository, user/name.")],
    what: Annotated[str, typer.Option("--what", metavar="adapter|merged")] = "merged",
    stage: Annotated[str, typer.Option("--stage", metavar="sft|dpo")] = "dpo",
    public: Annotated[bool, typer.Option("--public", help="Make a new repository public.")] = False,
) -> None:
    """Upload an adapter or a merged model to the hub, with its model card."""
    from medtrain.console import Console, quiet_libraries
    from medtrain.published import check_published
    from medtrain.train.push import push as upload

    quiet_libraries()
    config, a_run = load(run_or_config, None)
    check_published(a_run, config, what, stage)
    upload(a_run, repository, Console(a_run.log), what=what, stage=stage, private=not public)


def _run_one(stage: str, config: str, overrides: list[str] | None, force: bool) -> None:
    from medtrain.selection import Selection

    _run_stages(config, overrides, Selection(only=stage, force=(stage,) if force else ()))


def _run_stages(
    config: str,
    overrides: list[str] | None,
    selection: Selection,
    workers: int | None = None,
) -> None:
    from medtrain.console import Console, quiet_libraries
    from medtrain.kernel_cache import keep_compiled_kernels
    from medtrain.launch import IN_JOB_VARIABLE
    from medtrain.pipeline import run_stages

    loaded, a_run = load(config, overrides)
    selection.stages()
    quiet_libraries()
    keep_compiled_kernels()
    if a_run.submissions.is_dir() and not os.environ.get(IN_JOB_VARIABLE):
        from medtrain.cluster.submit import refuse_while_queued

        refuse_while_queued(a_run)
    console = Console(a_run.log)
    if workers is None:
        run_stages(a_run, loaded, console, selection)
        return
    from medtrain.cluster.local import local_drive, with_shards_for

    loaded = with_shards_for(loaded, workers)
    run_stages(a_run, loaded, console, selection, lambda s: local_drive(a_run, loaded, s, workers))


def main() -> NoReturn:
    """Run the command line; every end of it is an exit code."""
    ending = Ending.register() if is_launched() else None
    for stream in (sys.stdout, sys.stderr):
        # An arrow that the terminal's encoding lacks must not end a run.
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    arguments = [argument for argument in sys.argv[1:] if argument != "--debug"]
    if len(arguments) < len(sys.argv) - 1:
        os.environ[DEBUG_VARIABLE] = "1"
    code = _exit_code(arguments)
    if ending is not None:
        ending.code = code
    sys.exit(code)


def _exit_code(arguments: list[str]) -> int:
    try:
        code = app(arguments, prog_name="medtrain", standalone_mode=False)
        # Some versions of typer make an exit code of Ctrl-C themselves.
        return _say_interrupted() if code == _INTERRUPTED else int(code or 0)
    except (KeyboardInterrupt, typer.Abort):
        return _say_interrupted()
    except BrokenPipeError:
        # The reader of our output left (`medtrain schema | head`); nothing more can be said.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:
        if isinstance(error, _UsageError):
            if not error.format_message():
                return _USAGE_EXIT_CODE  # no verb at all: the help has been shown
            return _say(error.format_message(), "See `medtrain --help`.", _USAGE_EXIT_CODE)
        known = as_medtrain_error(error)
        return _say(known.message, known.fix, known.exit_code)


def _say_interrupted() -> int:
    return _say("Interrupted", "Run the same command to go on.", _INTERRUPTED)


def _say(message: str, fix: str, code: int) -> int:
    from medtrain.console import is_rank_zero, show_error

    # What medtrain has launched writes to a log, which is where a fault of ours is looked for.
    logged = code == MedtrainError.exit_code and LAUNCHER_VARIABLE in os.environ
    if (logged or os.environ.get(DEBUG_VARIABLE)) and sys.exc_info()[0] is not None:
        traceback.print_exc()
    if is_rank_zero():
        show_error(message, fix)
    return code


if __name__ == "__main__":
    main()
