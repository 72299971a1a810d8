"""What is wrong with the set-up: doctor."""

from __future__ import annotations

import textwrap
from collections import Counter
from itertools import groupby
from typing import Annotated

import anyio
import typer

from listener import console
from listener.cli.session import Json, app
from listener.doctor import Finding, examine
from listener.settings import load

WIDTH = 100


@app.command()
def doctor(
    verbose: Annotated[
        bool, typer.Option("--verbose", help="what is well, too: each right and what the server says of it")
    ] = False,
    as_json: Json = False,
) -> None:
    """What is wrong, or will hurt one day, and for each the one command that mends it. Changes nothing.

    Triggers, rights, row-level security, indexes, connection, server, views without progress. Exit 1 where there is an
    error; warnings alone are exit 0. Run it as the service's role, or as a member of the owner's.
    """
    found = anyio.run(examine, load())
    levels = Counter(finding.level for finding in found)
    if as_json:
        console.print_json(
            {"errors": levels["error"], "warnings": levels["warning"], "findings": [f._asdict() for f in found]}
        )
    else:
        shown = [f for f in found if verbose or f.level != "ok"]
        for level, of_level in groupby(shown, key=lambda f: f.level):
            console.out.print({"error": "errors", "warning": "warnings", "ok": "ok"}[level])
            for finding in of_level:
                _print(finding)
        console.out.print(_summary(levels, verbose=verbose))
    if levels["error"]:
        raise typer.Exit(1)


def _print(finding: Finding) -> None:
    """The problem within a terminal's width; the command in a line of its own, whole, since it is copied."""
    told = f"{finding.check}: {finding.object}: {finding.problem}"
    wrapped = textwrap.wrap(
        told, WIDTH, initial_indent="  ", subsequent_indent="    ", break_long_words=False, break_on_hyphens=False
    )
    for line in wrapped:
        console.out.print(line, soft_wrap=True)
    if finding.mend:
        console.out.print(f"    mend: {finding.mend}", soft_wrap=True)


def _summary(levels: Counter[str], *, verbose: bool) -> str:
    said = (
        f"{console.count(levels['error'], 'error')}, {console.count(levels['warning'], 'warning')}, {levels['ok']} ok"
    )
    return said if verbose or not levels["ok"] else f"{said} (listed by --verbose)"
