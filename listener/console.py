"""Printing: tables for people, JSON for machines, a progress bar for long work."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

MINUTE, HOUR = 60, 3600  # seconds
out = Console(highlight=False)
err = Console(stderr=True, highlight=False)


def error(message: str) -> None:
    """One line on stderr."""
    err.print(f"[bold red]listener:[/] {escape(message)}", soft_wrap=True)


def print_json(value: object) -> None:
    """Machine-readable; times as ISO 8601, durations in seconds."""
    print(json.dumps(value, default=_plain, ensure_ascii=False))  # noqa: T201


def _plain(value: object) -> object:
    if isinstance(value, datetime):
        return value.isoformat()
    return value.total_seconds() if isinstance(value, timedelta) else str(value)


def table(rows: Sequence[Mapping[str, Any]], columns: Iterable[str], *, title: str | None = None) -> Table:
    """A table of these columns; headings are the names."""
    made = Table(title=title, title_justify="left", header_style="bold", box=None, pad_edge=False)
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
        made.add_row(*(escape(text(row[name])) for name in columns))
    return made


def text(value: object) -> str:
    """A cell: times as ages, durations short."""
    if value is None:
        return "-"
    if isinstance(value, datetime):
        return f"{duration((datetime.now(UTC) - value).total_seconds())} ago"
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


def progress(*, quiet: bool = False) -> Progress:
    """A bar with what is done, the total and the time left; on stderr, so that stdout stays for results."""
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=err,
        transient=not err.is_terminal,
        disable=quiet,
    )
