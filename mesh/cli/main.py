"""
The entry point: the group of commands, and the turning of errors into words and exit codes.

Commands load when they are called, so that `mesh --help` is quick.
"""

from __future__ import annotations

import importlib
import os
import sys

import click

from mesh.errors import (
    EXIT_BUG,
    EXIT_CONFIGURATION,
    EXIT_LOCKED,
    AlreadyRunningError,
    ConfigurationError,
    MeshError,
)

_COMMANDS = {
    "agents": "look",
    "doctor": "doctor",
    "down": "life",
    "logs": "logs",
    "new": "new",
    "publish": "talk",
    "reload": "life",
    "restart": "life",
    "run": "replay",
    "status": "look",
    "tail": "talk",
    "up": "life",
}

_EPILOG = """
\b
Exit codes: 0 all is well; 1 something is wrong, see the words; 2 wrong usage;
3 no mesh runs here; 70 an agent failed; 75 somebody else holds the directory;
78 configuration.
"""


class _Lazy(click.Group):
    """A group that imports a command's module when it is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, name: str) -> click.Command | None:
        if name not in _COMMANDS:
            return None
        module = importlib.import_module(f"mesh.cli.{_COMMANDS[name]}")
        command: click.Command = getattr(module, name)
        return command


@click.group(cls=_Lazy, epilog=_EPILOG, context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--dir",
    "directory",
    metavar="DIR",
    help="The mesh's run directory (default: MESH_DIR, else .mesh here).",
)
@click.version_option(package_name="legion-mesh")
def cli(directory: str | None) -> None:
    r"""
    Run a mesh of agents: each a process, supervised, joined by typed events.

    \b
    mesh up -d            start all agents of ./supervisord.conf
    mesh status           how they are
    mesh tail             what they say
    mesh down             stop them
    """
    if directory is not None:
        # Everything below, and every process started from here, reads this one variable
        os.environ["MESH_DIR"] = os.path.abspath(directory)


def main() -> None:
    """Run the command line; exits with the code described in `mesh --help`."""
    try:
        code = cli.main(standalone_mode=False)
    except click.exceptions.Exit as stop:
        sys.exit(stop.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except ConfigurationError as error:
        _fail(EXIT_CONFIGURATION, *error.problems)
    except AlreadyRunningError as error:
        _fail(EXIT_LOCKED, str(error))
    except MeshError as error:
        _fail(getattr(error, "exit_code", 1), str(error))
    except BrokenPipeError:
        # The reader of our pipe has had enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(EXIT_BUG)
    sys.exit(code if isinstance(code, int) else 0)


def _fail(code: int, *lines: str) -> None:
    for line in lines:
        click.echo(f"mesh: {line}", err=True)
    sys.exit(code)


if __name__ == "__main__":
    main()
