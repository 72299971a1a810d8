"""The command line. Every command reads LISTENER_DATABASE_URL; a failure is one line on stderr and exit code 1."""

from __future__ import annotations

import inspect
import os
import re
import sys
from typing import Annotated, Any

import psycopg
import typer

from listener import __version__, console, errors
from listener.cli import act, adopting, doctor, filling, inventory, letters, look, setup, views
from listener.cli.session import app
from listener.version import commit

__all__ = ["act", "adopting", "app", "doctor", "filling", "inventory", "letters", "look", "main", "setup", "views"]


def _fold_help(*groups: typer.Typer) -> None:
    """Help is folded to the terminal's width: typer would keep the lines of a docstring after its first paragraph."""
    for group in groups:
        for command in group.registered_commands:
            told = inspect.getdoc(command.callback) if command.callback else None
            command.help = re.sub(r"(?<!\n)\n(?!\n)", " ", told or "")


_fold_help(app, letters.letters_app, views.views_app)


def main() -> None:
    """Entry point: turns the errors that a user can mend into one line."""
    try:
        app(standalone_mode=True)
    except errors.ListenerError as error:
        console.error(str(error))
        sys.exit(1)
    except psycopg.Error as error:
        console.error(str(errors.from_database(error)))
        sys.exit(1)
    except ExceptionGroup as group:
        leaves = _leaves(group)
        known = [e for e in leaves if isinstance(e, errors.ListenerError | psycopg.Error)]
        if len(known) != len(leaves):
            raise
        for leaf in known:
            console.error(str(errors.from_database(leaf) if isinstance(leaf, psycopg.Error) else leaf))
        sys.exit(1)
    except UnicodeEncodeError:
        wrong = [argument for argument in sys.argv[1:] if not _is_text(argument)]
        wrong += [name for name, value in os.environ.items() if name.startswith("LISTENER_") and not _is_text(value)]
        if not wrong:
            raise
        console.error(f"not valid UTF-8: {', '.join(ascii(one) for one in wrong)}.")
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _leaves(group: BaseExceptionGroup[Any]) -> list[BaseException]:
    return [leaf for e in group.exceptions for leaf in (_leaves(e) if isinstance(e, BaseExceptionGroup) else [e])]


def _version(value: bool) -> None:
    if value:
        console.out.print(f"listener {__version__} ({commit()})")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
