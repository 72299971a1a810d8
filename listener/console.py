"""Printing: tables for people, JSON for machines, a progress bar for long work."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

MINUTE, HOUR = 60, 3600  # seconds
COMMANDS_OF_TERMINALS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")


def visible(text: str) -> str:
    """The text with control characters written out: a tenant's name must not move the cursor of who reads it."""
    return COMMANDS_OF_TERMINALS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


class _Printer(Console):
    def print(self, *objects: Any, **options: Any) -> None:
        super().print(*(visible(one) if isinstance(one, str) else one for one in objects), **options)


# Nothing that is printed is markup: the names of views and tenants may hold brackets. Where no person's terminal is at
# the other end nothing is folded to its width.
out = _Printer(highlight=False, markup=False, emoji=False, width=None if sys.stdout.isatty() else 100_000)
err = _Printer(stderr=True, highlight=False, markup=False, emoji=False, width=None if sys.stderr.isatty() else 100_000)


def error(message: str) -> None:
    """One line on stderr."""
    err.print(Text.assemble(("listener:", "bold red"), " ", visible(message)), soft_wrap=True)


def warning(message: str) -> None:
    """One line on stderr that stops nothing."""
    err.print(Text.assemble(("listener:", "bold yellow"), " ", visible(message)), soft_wrap=True)


def print_json(value: object) -> None:
    """Machine-readable; times as ISO 8601, durations in seconds."""
    print(json.dumps(value, default=_plain, ensure_ascii=False))  # noqa: T201


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str]) -> Table:
    """A table of these columns; headings are the names."""
    made = Table(header_style="bold", box=None, pad_edge=False)
    columns = list(columns)
    for name in columns:
        numeric = all(isinstance(row[name], int | float | timedelta) or row[name] is None for row in rows)
        # The name of a view is what the eye looks for: it is never broken.
        made.add_column(
            name.replace("_", " "),
            justify="right" if numeric and rows else "left",
            overflow="fold",
            no_wrap=name == "view",
        )
    for row in rows:
        made.add_row(*(Text(visible(text(row[name])).replace("\n", r"\n").replace("\t", r"\t")) for name in columns))
    return made


def text(value: object) -> str:
    """A cell: times as ages, durations short."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        age = (datetime.now(UTC) - value).total_seconds()
        return f"{duration(age)} ago" if age >= 0 else f"in {duration(-age)}"
    if isinstance(value, timedelta):
        return duration(value.total_seconds())
    return ("yes" if value else "no") if isinstance(value, bool) else str(value)


def duration(seconds: float) -> str:
    """`3 ms`, `1.2 s`, `5 min`, `2 h`."""
    if abs(seconds) < 1:
        return f"{seconds * 1000:.0f} ms"
    if abs(seconds) < 2 * MINUTE:
        return f"{seconds:.1f} s"
    return f"{seconds / MINUTE:.0f} min" if abs(seconds) < 2 * HOUR else f"{seconds / HOUR:.0f} h"


def count(number: int, noun: str) -> str:
    """`1 key`, `2 keys`."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def progress(*, quiet: bool = False) -> Progress:
    """A bar with what is done, the total and the time left; on stderr, so that stdout stays for results.

    Where stderr is no terminal there is none.
    """
    return Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        disable=quiet or not err.is_interactive,
    )
