"""Replays a recorded ledger into the sample schema: one transaction for each invoice, from several connections.

The file is a CSV, plain or gzip, with the header below, in the order in which the invoices were written. A country is
a tenant. Times are shifted, all by the same amount, so that the last invoice is written now.
"""

from __future__ import annotations

import csv
import gzip
import time
import uuid
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, NamedTuple

import anyio
import anyio.lowlevel
from psycopg import AsyncConnection

from listener.errors import ListenerError
from listener.sample import Invoice, create_tenants, write_invoice

HEADER = ["invoice_no", "invoiced_at", "country", "customer_id", "amount_pence", "lines_n"]
# A tenant's id is derived from its name: every replay of one file has the same tenants.
TENANT_NAMESPACE = uuid.UUID("6f1c2a52-3d0e-5b0a-9f43-0d1f6a5c7e11")
# Each tenant's first invoice is written with a reconciliation run, and then every so many of them.
INVOICES_PER_RUN = 100
# Digits of a number: enough for any invoice, and sums of as many as a file can hold stay within a bigint.
LONGEST_NUMBER = 12
GZIP_MAGIC = b"\x1f\x8b"


class ReplayError(ListenerError):
    """The file cannot be replayed: it is missing, is no such ledger, or a row of it is malformed."""


@dataclass(frozen=True, slots=True)
class Ledger:
    """A file's invoices, in its order, and the names of their tenants, in the order of their first invoice."""

    invoices: tuple[Invoice, ...]
    tenants: dict[uuid.UUID, str]


@dataclass(slots=True)
class ReplayCounters:
    """How far a replay is."""

    total: int = 0
    committed: int = 0


class Summary(NamedTuple):
    """What a replay did."""

    invoices: int
    tenants: int
    seconds: float

    @property
    def rate(self) -> float:
        """Invoices a second."""
        return self.invoices / self.seconds


def tenant_of(country: str) -> uuid.UUID:
    return uuid.uuid5(TENANT_NAMESPACE, country)


def read_ledger(path: Path) -> Ledger:
    """The file's invoices, at the times that it says. Raises ReplayError, which names the line."""
    try:
        with _open(path) as file:
            return _parse(path, file)
    except (OSError, EOFError, zlib.error) as error:  # the last two, and one kind of the first: damaged gzip
        reason = getattr(error, "strerror", None) or str(error)
        raise ReplayError(f"cannot read {path}: {reason}") from error
    except UnicodeDecodeError as error:
        # What is no gzip is read as text: its name tells what it was meant to be.
        reason = "it is neither gzip nor UTF-8 text" if path.suffix == ".gz" else "it is not UTF-8"
        raise ReplayError(f"cannot read {path}: {reason}") from error


def _open(path: Path) -> IO[str]:
    with path.open("rb") as file:
        is_gzip = file.read(len(GZIP_MAGIC)) == GZIP_MAGIC
    if is_gzip:
        return gzip.open(path, "rt", encoding="utf-8", newline="")
    return path.open(encoding="utf-8", newline="")


def _parse(path: Path, file: Iterable[str]) -> Ledger:
    rows = csv.reader(file, strict=True)
    invoices: list[Invoice] = []
    tenants: dict[uuid.UUID, str] = {}
    numbers: set[str] = set()
    try:
        header = next(rows, [])
        if header != HEADER:
            raise ReplayError(
                f"{path} is no ledger: its header is {','.join(header)[:100]!r}, not {','.join(HEADER)!r}"
            )
        for row in rows:
            invoice = parse_row(row)
            if invoice.number in numbers:
                raise ValueError(f"invoice {invoice.number} occurs twice")
            numbers.add(invoice.number)
            tenants.setdefault(invoice.tenant, row[2])
            invoices.append(invoice)
    except UnicodeDecodeError:
        raise
    except (ValueError, csv.Error) as error:
        raise ReplayError(f"{path}, line {rows.line_num}: {error}") from error
    if not invoices:
        raise ReplayError(f"{path} holds no invoices")
    return Ledger(tuple(invoices), tenants)


def parse_row(row: list[str]) -> Invoice:
    """Raises ValueError, which says what is wrong with the row."""
    if len(row) != len(HEADER):
        raise ValueError(f"{len(row)} columns, not {len(HEADER)}")
    number, invoiced_at, country, _, amount, lines = row
    for name, value in (("invoice_no", number), ("country", country)):
        if not value.strip() or "\0" in value:
            raise ValueError(f"{name} is {value!r}")
    try:
        occurred_at = datetime.fromisoformat(invoiced_at)
    except ValueError:
        raise ValueError(f"invoiced_at is {invoiced_at!r}, not a time") from None
    occurred_at = occurred_at.astimezone(UTC) if occurred_at.tzinfo else occurred_at.replace(tzinfo=UTC)
    amount_cents = _integer("amount_pence", amount)
    _integer("lines_n", lines)
    return Invoice(number, tenant_of(country), occurred_at, amount_cents)


def _integer(name: str, text: str) -> int:
    # Not by int() alone: it takes spaces, underscores and other scripts' digits too.
    digits = text.removeprefix("-")
    if digits.isascii() and digits.isdigit() and len(digits) <= LONGEST_NUMBER:
        return int(text)
    raise ValueError(f"{name} is {text[:40]!r}, not a whole number of at most {LONGEST_NUMBER} digits")


def shifted(invoices: Iterable[Invoice], last: datetime) -> Iterator[Invoice]:
    """The same invoices, the latest of them at `last`, and as far from each other as before."""
    kept = tuple(invoices)
    shift = last - max((invoice.occurred_at for invoice in kept), default=last)
    return (replace(invoice, occurred_at=invoice.occurred_at + shift) for invoice in kept)


def with_runs(invoices: Iterable[Invoice]) -> Iterator[tuple[Invoice, bool]]:
    """Each invoice, and whether a reconciliation run is written with it."""
    seen: dict[uuid.UUID, int] = {}
    for invoice in invoices:
        count = seen.get(invoice.tenant, 0)
        seen[invoice.tenant] = count + 1
        yield invoice, count % INVOICES_PER_RUN == 0


async def replay(ledger: Ledger, url: str, counters: ReplayCounters | None = None, *, connections: int = 4) -> Summary:
    """Writes the ledger as fast as it goes; `url` is listener_app's."""
    counters = counters if counters is not None else ReplayCounters()
    counters.total = len(ledger.invoices)
    started = time.perf_counter()
    with anyio.CancelScope(shield=True):
        async with await AsyncConnection.connect(url, autocommit=True) as connection:
            await create_tenants(connection, list(ledger.tenants.items()))
    pending = with_runs(shifted(ledger.invoices, datetime.now(UTC)))
    async with anyio.create_task_group() as tasks:
        for _ in range(connections):
            tasks.start_soon(_write, url, pending, counters)
    return Summary(len(ledger.invoices), len(ledger.tenants), time.perf_counter() - started)


async def _write(url: str, pending: Iterator[tuple[Invoice, bool]], counters: ReplayCounters) -> None:
    """Takes the next invoice that no other connection has taken, until there is none.

    Cancelled between two invoices only: whatever was committed is counted.
    """
    async with await AsyncConnection.connect(url, autocommit=True) as connection:
        for invoice, reconcile in pending:
            with anyio.CancelScope(shield=True):
                await write_invoice(connection, invoice, reconcile=reconcile)
                counters.committed += 1
            await anyio.lowlevel.checkpoint()
