"""Reading a recorded ledger, without a database."""

from __future__ import annotations

import gzip
import uuid
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from listener.replay import HEADER, Ledger, ReplayError, parse_row, read_ledger, shifted, tenant_of, with_runs
from listener.sample import Invoice, entries

HEADER_LINE = ",".join(HEADER)
ROW = "536365,2010-12-01T08:26:00,United Kingdom,17850,13912,7"
REFUND = "C536379,2010-12-01T09:41:00,France,,-2750,1"

Write = Callable[..., Path]
times = st.datetimes(datetime(1990, 1, 1), datetime(2030, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001 - its bounds
ledgers = st.lists(
    st.builds(
        Invoice,
        number=st.just("1"),
        tenant=st.sampled_from([uuid.UUID(int=n) for n in range(3)]),
        occurred_at=times,
        amount_cents=st.just(1),
    ),
    max_size=300,
)


@pytest.fixture
def write(tmp_path: Path) -> Write:
    """Writes lines into a file and returns its path."""

    def write(*lines: str, name: str = "ledger.csv", compress: bool = False) -> Path:
        path = tmp_path / name
        content = "".join(f"{line}\n" for line in lines).encode()
        path.write_bytes(gzip.compress(content) if compress else content)
        return path

    return write


def refusal(path: Path) -> str:
    with pytest.raises(ReplayError) as caught:
        read_ledger(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


def row_refusal(row: list[str]) -> str:
    try:
        parse_row(row)
    except ValueError as error:
        return str(error)
    return ""


@pytest.mark.parametrize("compress", [False, True])
def test_a_ledger_is_read_plain_or_compressed_whatever_its_name(write: Write, *, compress: bool) -> None:
    ledger = read_ledger(write(HEADER_LINE, ROW, REFUND, compress=compress))
    assert ledger == Ledger(
        invoices=(
            Invoice("536365", tenant_of("United Kingdom"), datetime(2010, 12, 1, 8, 26, tzinfo=UTC), 13912),
            Invoice("C536379", tenant_of("France"), datetime(2010, 12, 1, 9, 41, tzinfo=UTC), -2750),
        ),
        tenants={tenant_of("United Kingdom"): "United Kingdom", tenant_of("France"): "France"},
    )


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert refusal(tmp_path / "gone.csv") == f"cannot read {tmp_path / 'gone.csv'}: No such file or directory"


def test_a_directory_is_no_ledger(tmp_path: Path) -> None:
    assert refusal(tmp_path) == f"cannot read {tmp_path}: Is a directory"


@pytest.mark.parametrize("lines", [(), ("",), ("a,b",), (ROW,), (HEADER_LINE.upper(), ROW), (HEADER_LINE + ",x", ROW)])
def test_another_header_is_refused(write: Write, lines: tuple[str, ...]) -> None:
    assert "is no ledger: its header is" in refusal(write(*lines))


def test_a_ledger_without_invoices_is_refused(write: Write) -> None:
    assert refusal(write(HEADER_LINE)).endswith("holds no invoices")


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ("", "0 columns, not 6"),
        ("536365,2010-12-01T08:26:00,France,,1", "5 columns, not 6"),
        (ROW + ",", "7 columns, not 6"),
        (",2010-12-01T08:26:00,France,,1,1", "invoice_no is ''"),
        ("1,2010-12-01T08:26:00, ,,1,1", "country is ' '"),
        ("1,2010-12-01T08:26:00,Fra\0nce,,1,1", "country is 'Fra\\x00nce'"),
        ("1,yesterday,France,,1,1", "invoiced_at is 'yesterday', not a time"),
        ("1,2010-02-30T00:00:00,France,,1,1", "invoiced_at is '2010-02-30T00:00:00', not a time"),
        ("1,2010-12-01T08:26:00,France,,1.5,1", "amount_pence is '1.5', not a whole number of at most 12 digits"),
        ("1,2010-12-01T08:26:00,France,,--1,1", "amount_pence is '--1', not a whole number of at most 12 digits"),
        ("1,2010-12-01T08:26:00,France,,1,", "lines_n is '', not a whole number of at most 12 digits"),
        (ROW, "invoice 536365 occurs twice"),
        ('1,"2010-12-01"T,France,,1,1', "',' expected after '\"'"),
    ],
)
def test_a_malformed_row_is_refused_with_its_line(write: Write, row: str, reason: str) -> None:
    path = write(HEADER_LINE, ROW, row)
    assert refusal(path) == f"{path}, line 3: {reason}"


def test_a_damaged_compressed_file_is_refused(write: Write) -> None:
    path = write(HEADER_LINE, ROW, compress=True)
    whole = path.read_bytes()
    path.write_bytes(whole[:-12])
    assert refusal(path).startswith(f"cannot read {path}: ")
    path.write_bytes(whole[:10] + b"\xff" * 20 + whole[30:])
    assert refusal(path).startswith(f"cannot read {path}: ")


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv"
    path.write_bytes(HEADER_LINE.encode() + b"\n\xff\xfe")
    assert refusal(path) == f"cannot read {path}: it is not UTF-8"


def test_a_file_that_is_named_as_gzip_and_is_none_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.csv.gz"
    path.write_bytes(b"\xff\xfe garbage")
    assert refusal(path) == f"cannot read {path}: it is neither gzip nor UTF-8 text"


@given(st.lists(st.text(), max_size=8))
def test_any_row_is_an_invoice_or_refused_in_one_line(row: list[str]) -> None:
    assert row_refusal(row).isprintable()


@given(st.text(min_size=1).filter(lambda number: number.strip() and "\0" not in number), times, st.integers(-999, 999))
def test_a_row_is_read_as_it_was_written(number: str, when: datetime, amount: int) -> None:
    local = when.replace(tzinfo=None).isoformat()
    assert parse_row([number, local, "France", "", str(amount), "1"]) == Invoice(
        number, tenant_of("France"), when, amount
    )


def test_a_time_with_a_zone_is_taken_at_its_word() -> None:
    invoice = parse_row(["1", "2010-12-01T08:26:00+02:00", "France", "", "1", "1"])
    assert invoice.occurred_at == datetime(2010, 12, 1, 6, 26, tzinfo=UTC)


@given(ledgers, times)
def test_the_latest_invoice_is_now_and_the_distances_stay(invoices: list[Invoice], now: datetime) -> None:
    moved = list(shifted(invoices, now))
    assert len(moved) == len(invoices)
    if invoices:
        assert max(invoice.occurred_at for invoice in moved) == now
        assert len({after.occurred_at - before.occurred_at for before, after in zip(invoices, moved, strict=True)}) == 1


@given(ledgers)
def test_every_tenant_is_reconciled_at_its_first_invoice_and_each_hundredth(invoices: list[Invoice]) -> None:
    runs = Counter(invoice.tenant for invoice, reconcile in with_runs(invoices) if reconcile)
    written = Counter(invoice.tenant for invoice in invoices)
    assert runs == {tenant: (count + 99) // 100 for tenant, count in written.items()}


@pytest.mark.ledger
def test_the_recorded_ledger_is_read_whole(recorded_ledger: Path) -> None:
    ledger = read_ledger(recorded_ledger)
    assert len(ledger.invoices) == 25_900
    assert len(ledger.tenants) == 38
    assert sum(entries(invoice).state == "refunded" for invoice in ledger.invoices) == 3_836
    reconciled = {invoice.tenant for invoice, reconcile in with_runs(ledger.invoices) if reconcile}
    assert reconciled == set(ledger.tenants)
    newest = max(invoice.occurred_at for invoice in ledger.invoices)
    oldest = min(invoice.occurred_at for invoice in ledger.invoices)
    assert newest - oldest > timedelta(days=365)
