"""
The entry point `mesh`: a group whose commands load when they are called.

`mesh --help` imports none of them, so it answers at once.
"""

from __future__ import annotations

import importlib
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mesh.cli import say
from mesh.cli.exits import (
    EXIT_FILE,
    EXIT_INTERRUPTED,
    EXIT_UNREAD,
    MEANINGS,
    code_of,
    words_for_file,
)
from mesh.errors import ConfigurationError, MeshError, first_leaf

if TYPE_CHECKING:
    from collections.abc import Sequence

#: Command: module, what for.
COMMANDS = {
    "run": ("run", "Run the pipeline on a CSV file or an invented market; print the report."),
    "up": ("up", "Start every agent of supervisord.conf as a supervised process."),
    "down": ("up", "Stop the mesh, losing nothing that is under way."),
    "status": ("status", "Show how every agent is doing, and what was lost."),
    "restart": ("change", "Restart single agents."),
    "reload": ("change", "Take up what changed in supervisord.conf; start only what is new."),
    "scale": ("scale", "Run more replicas of one agent, or fewer."),
    "logs": ("logbook", "Show and follow the agents' logs."),
    "tail": ("tail", "Listen to events as they happen."),
    "publish": ("publish", "Say an event."),
    "dlq": ("dlq", "Look at dead letters, send them back, correct them, throw them away."),
    "journal": ("journal", "Look at what is kept for whom; forget what nobody needs."),
    "agents": ("agents", "Show who hears and says what."),
    "init": ("scaffold", "Begin a project: a supervisord.conf without agents."),
    "new": ("scaffold", "Write a new agent: script, test, and its place in supervisord.conf."),
    "doctor": ("checkup", "Check the environment, the run directory and the running mesh."),
}

#: Commands of commands.
DLQ_COMMANDS = ("ls", "show", "replay", "edit", "purge")
JOURNAL_COMMANDS = ("ls", "trim", "forget")


class MeshGroup(click.Group):
    """Loads commands by name, and turns errors into words and an exit code."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """List the commands in the order in which they are learnt."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Load a command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(f"mesh.cli.{COMMANDS[cmd_name][0]}")
        command: click.Command = getattr(module, cmd_name)
        return command

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """Find a command; for an unknown one, say which is meant."""
        if args and args[0] not in COMMANDS and not args[0].startswith("-"):
            import difflib

            close = difflib.get_close_matches(args[0], COMMANDS, 1)
            hint = f"; did you mean `mesh {close[0]}`?" if close else "; see `mesh --help`"
            ctx.fail(f"no such command {say.clean(args[0])!r}{hint}")
        return super().resolve_command(ctx, args)

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """List the commands without loading them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, words) for name, (_, words) in COMMANDS.items()])
        with formatter.section("Exit codes"):
            formatter.write_dl([(str(code), words) for code, words in MEANINGS.items()])

    def make_context(self, *given: Any, **extra: Any) -> click.Context:
        """Read the command line; that prints the help, which nobody may read to its end."""
        try:
            return super().make_context(*given, **extra)
        except BrokenPipeError:
            _drop_unwritten()
            sys.exit(EXIT_UNREAD)

    def invoke(self, ctx: click.Context) -> Any:
        """
        Run a command; an error of the mesh becomes words on stderr and its exit code.

        So does that of a file which cannot be written. A reader who closed the pipe has an exit
        code only.
        """
        error: MeshError | OSError | None = None
        try:
            return super().invoke(ctx)
        except* (MeshError, OSError) as group:
            error = _leaf(group)
        except* KeyboardInterrupt:
            pass
        # Not above: what is raised in `except*` comes out wrapped
        if error is None:
            ctx.exit(EXIT_INTERRUPTED)
        if isinstance(error, BrokenPipeError):
            _drop_unwritten()
            ctx.exit(EXIT_UNREAD)
        if not isinstance(error, MeshError):
            words = words_for_file(error)
            if words is None:
                raise error
            say.note(words, "red")
            _drop_unwritten()
            ctx.exit(EXIT_FILE)
        for problem in error.problems if isinstance(error, ConfigurationError) else [str(error)]:
            say.note(problem, "red")
        ctx.exit(code_of(error))


@click.group(
    cls=MeshGroup,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    epilog="Every command teaches itself: mesh COMMAND --help",
)
@click.version_option(package_name="legion-mesh", prog_name="mesh")
@click.option("--dir", "directory", metavar="DIR", help="As the option of each command.")
@click.pass_context
def cli(context: click.Context, directory: str | None) -> None:
    """
    A mesh of agents: each its own supervised process, joined by typed events.

    \b
    Example:
      mesh up -d           start the agents of ./supervisord.conf
      mesh status          see how they are
      mesh tail            listen to what they say
      mesh new hello       write another one
      mesh reload          let it join
      mesh down            stop them all
    """  # noqa: D301 - click's mark for lines it must not wrap
    if directory is not None:
        chosen = {"directory": directory}
        context.default_map = {
            **dict.fromkeys(COMMANDS, chosen),
            "dlq": dict.fromkeys(DLQ_COMMANDS, chosen),
            "journal": dict.fromkeys(JOURNAL_COMMANDS, chosen),
        }


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the command line; exits."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            # Closed by whoever called us (`>&-`): nobody listens
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))
    cli.main(args=list(arguments) if arguments is not None else None, prog_name="mesh")


def _drop_unwritten() -> None:
    """Let the interpreter not try once more, at its end, to write what could not be written."""
    try:
        sys.stdout.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


def _leaf(error: BaseException) -> MeshError | OSError:
    first = first_leaf(error)
    assert isinstance(first, (MeshError, OSError))
    return first


if __name__ == "__main__":
    main()
