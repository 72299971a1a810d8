"""Replays a recorded ledger through the application: a country is a tenant, an invoice is one transaction."""

from __future__ import annotations

import csv
import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO

import anyio
import psycopg

from listener.database_url import libpq_url
from listener.errors import ListenerError
from listener.sample import Invoice, create_tenants, write_invoice

COLUMNS = ["invoice_no", "invoiced_at", "country", "customer_id", "amount_pence", "lines_n"]
# Every so many invoices of a tenant are followed by a reconciliation run; the first one always.
RECONCILED_EVERY = 20


class ReplayError(ListenerError):
    """The file is missing or is no such ledger; the message names the line."""


@dataclass(frozen=True, slots=True)
class Line:
    """One invoice as recorded; `at` is UTC."""

    number: str
    at: datetime
    country: str
    amount_pence: int


@dataclass(slots=True)
class Progress:
    """How far a replay is; `seconds` is set when it has ended."""

    total: int
    done: int = 0
    seconds: float = 0.0


def read(path: Path) -> list[Line]:
    """The invoices in their order. Raises ReplayError: missing file, another header, a malformed row."""
    try:
        with _open(path) as file:
            return list(_lines(path, file))
    except (OSError, EOFError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise ReplayError(f"cannot read {path}: {reason}.") from error


def _open(path: Path) -> IO[str]:
    if path.suffix == ".gz":
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _lines(path: Path, file: IO[str]) -> Iterator[Line]:
    rows = csv.reader(file)
    header = next(rows, [])
    if header != COLUMNS:
        raise ReplayError(f"{path} is no such ledger: its header must be {','.join(COLUMNS)}.")
    for row in rows:
        try:
            number, at, country, _, amount, _ = row
            if not number or not country:
                raise ValueError("invoice_no and country must not be empty")
            yield Line(number, datetime.fromisoformat(at).replace(tzinfo=UTC), country, int(amount))
        except ValueError as error:
            raise ReplayError(f"{path}, line {rows.line_num}: {error}.") from error


def shifted(lines: Sequence[Line], now: datetime) -> list[Line]:
    """The same invoices, their times moved so that the last one is `now`."""
    if not lines:
        return []
    by = now - max(line.at for line in lines)
    return [Line(line.number, line.at + by, line.country, line.amount_pence) for line in lines]


async def replay(url: str, lines: Sequence[Line], progress: Progress, connections: int = 4) -> None:
    """Writes the invoices in their order, each on the next free of the connections, which log in as the application."""
    started = anyio.current_time()
    async with await psycopg.AsyncConnection.connect(libpq_url(url), autocommit=True) as connection:
        tenants = await create_tenants(connection, sorted({line.country for line in lines}))
    count: dict[str, int] = {}
    invoices: list[Invoice] = []
    for line in lines:
        number = count[line.country] = count.get(line.country, 0) + 1
        reconciled = number % RECONCILED_EVERY == 1
        refund = line.number.startswith("C")
        invoices.append(Invoice(tenants[line.country], line.number, line.at, line.amount_pence, refund, reconciled))
    remaining = iter(invoices)

    async def write() -> None:
        async with await psycopg.AsyncConnection.connect(libpq_url(url), autocommit=True) as connection:
            for invoice in remaining:
                await write_invoice(connection, invoice)
                progress.done += 1

    async with anyio.create_task_group() as tasks:
        for _ in range(connections):
            tasks.start_soon(write)
    progress.seconds = anyio.current_time() - started
