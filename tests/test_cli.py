"""The commands of an operator, and what they say to bad input: one line, a non-zero exit, no traceback."""

from __future__ import annotations

import json
import socket
from pathlib import Path

import psycopg
import pytest

from books import ANNA, BEN, book, open_books, transaction
from command import listener
from conftest import Database

pytestmark = pytest.mark.anyio

NOBODY = "99999999-9999-4999-8999-999999999999"


@pytest.fixture
async def books(sample: Database) -> Database:
    """Two tenants, a ledger row each, everything fresh."""
    await open_books(sample)
    for tenant in (ANNA, BEN):
        async with transaction(sample, tenant) as application:
            await book(application, tenant, 100)
    assert listener("sweep", url=sample.url()).returncode == 0
    return sample


async def test_an_operator_sees_what_is_fresh(books: Database) -> None:
    status = json.loads(listener("status", "--json", url=books.url()).stdout)
    assert {row["view"]: (row["keys"], row["dirty"]) for row in status["views"]}["mv_daily_revenue_summary"] == (2, 0)
    assert "mv_realtime_revenue" in listener("status", url=books.url()).stdout
    assert listener("status", "--tenant", str(ANNA), url=books.url()).stdout.count("  fresh ") == 5
    explained = listener("explain", "mv_realtime_revenue", "--tenant", str(ANNA), url=books.url())
    assert "fresh, refreshed" in explained.stdout
    assert listener("verify", url=books.url()).returncode == 0


async def test_explain_names_what_a_key_waits_for(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    explain = ["explain", "mv_realtime_revenue", "--tenant", str(ANNA)]
    assert "not drained yet" in listener(*explain, url=books.url()).stdout
    async with books.connect("listener_service") as service, service.transaction():
        await service.execute("SELECT listener.drain()")
    assert "the key has been dirty for" in listener(*explain, url=books.url()).stdout
    async with books.connect("listener_service") as service, service.transaction():
        await service.execute("SELECT listener.refresh('mv_realtime_revenue', %s::uuid)", (ANNA,))
        assert "holds the key's lock" in listener(*explain, url=books.url()).stdout
    assert listener("pause", "mv_realtime_revenue", url=books.url("listener_migrator")).returncode == 0
    assert "paused" in listener(*explain, url=books.url()).stdout


async def test_verify_tells_stale_from_different(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.connect() as superuser:
        await superuser.execute(
            "UPDATE dashboard.mv_realtime_revenue SET total_revenue = 7 WHERE tenant_id = %s", (BEN,)
        )
    ended = listener("verify", "mv_realtime_revenue", "--json", url=books.url())
    assert ended.returncode == 1
    verdicts = {row["tenant_id"]: row["verdict"] for row in json.loads(ended.stdout)["differences"]}
    assert verdicts == {str(ANNA): "stale", str(BEN): "different"}
    assert listener("refresh", "mv_realtime_revenue", "--all-tenants", url=books.url()).returncode == 0
    assert listener("verify", "mv_realtime_revenue", url=books.url()).returncode == 0


async def test_refresh_by_hand_says_what_it_did(books: Database) -> None:
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    ended = listener("refresh", "mv_realtime_revenue", "--tenant", str(ANNA).upper(), "--json", url=books.url())
    assert json.loads(ended.stdout) | {"version": 0} == {
        "outcome": "refreshed", "inserted": 0, "updated": 1, "deleted": 0, "version": 0,
    }  # fmt: skip


async def test_dead_letters_are_listed_shown_retried_and_discarded(books: Database) -> None:
    refused = listener("refresh", "mv_realtime_revenue", "--tenant", "no uuid", url=books.url())
    assert refused.returncode == 1
    assert "no tenant of type uuid" in refused.stderr
    (letter,) = json.loads(listener("dead-letters", "list", "--json", url=books.url()).stdout)
    assert letter["error_type"] == "validation_error"
    assert letter["correlation_id"]
    assert "no uuid" in listener("dead-letters", "show", letter["id"], url=books.url()).stdout
    assert listener("dead-letters", "retry", letter["id"], url=books.url()).returncode == 1
    assert "1 discarded" in listener("dead-letters", "discard", "--all", url=books.url()).stdout
    assert "no dead letters" in listener("dead-letters", "list", url=books.url()).stdout
    async with books.connect("listener_service") as service:
        row = await (
            await service.execute("SELECT view_id, tenant FROM listener.refresh_state WHERE tenant <> ''")
        ).fetchone()
        assert row is not None
        await service.execute(
            "SELECT listener.record_failure(%s, %s, 'id', 'definition_error', '22012', 'DivisionByZero', 'm', 't', 'w',"
            " 1, '1 s', '1 s', '1 h')",
            row,
        )
    retried = json.loads(listener("dead-letters", "retry", "--all", "--json", url=books.url()).stdout)
    assert [letter["outcome"] for letter in retried] == ["refreshed"]
    assert "no dead letters" in listener("dead-letters", "list", url=books.url()).stdout


async def test_uninstall_leaves_targets_and_writes_alone(books: Database) -> None:
    assert listener("uninstall", "--yes", url=books.url("listener_migrator")).returncode == 0
    async with transaction(books) as application:
        await book(application, ANNA, 100)
    async with books.connect() as superuser:
        rows = await (await superuser.execute("SELECT * FROM dashboard.mv_realtime_revenue")).fetchall()
    assert len(rows) == 2


COMMANDS = "demo roles migrate run status explain verify refresh sweep pause resume dead-letters uninstall"


@pytest.mark.parametrize("command", COMMANDS.split())
def test_help_teaches(command: str) -> None:
    ended = listener(command, "--help")
    assert ended.returncode == 0
    assert len(ended.stdout) > 200


def test_roles_are_printed_without_a_database() -> None:
    assert "CREATE ROLE" in listener("roles").stdout


def one_line(*arguments: str, url: str | None = None, **given: str) -> str:
    ended = listener(*arguments, url=url, **given)
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr
    lines = [line for line in ended.stderr.splitlines() if line.startswith("listener:")]
    assert len(lines) == 1, ended.stderr
    return lines[0]


def test_wrong_settings_are_named() -> None:
    assert "LISTENER_DATABASE_URL is not set" in one_line("run")
    assert "malformed" in one_line("status", url="postgresql://user:secret@host:port/x y")
    assert "secret" not in one_line("status", url="postgresql://user:secret@host:port/x y")
    refused = one_line("status", url="postgresql://user:secret@127.0.0.1:1/none")
    assert "does not answer" in refused
    assert "secret" not in refused
    assert "LISTENER_WORKERS" in one_line("run", url="postgresql://x@y/z", LISTENER_WORKERS="0")
    assert "LISTENER_SWEEP_INTERVAL" in one_line("run", url="postgresql://x@y/z", LISTENER_SWEEP_INTERVAL="abc")


def test_what_is_not_there_is_named(database: Database, tmp_path: Path) -> None:
    url = database.url()
    assert "no managed view 'nothing'" in one_line("refresh", "nothing", "--tenant", NOBODY, url=url)
    assert "no managed view" in one_line("verify", "nothing", url=url)
    assert "either --tenant" in one_line("refresh", "nothing", url=url)
    assert "no such letter" in one_line("dead-letters", "show", NOBODY, url=url)
    assert "cannot read" in one_line("demo", "--replay", str(tmp_path / "none.csv"))
    assert "listener migrate" in one_line("status", url=database.server.url("listener_service", "postgres"))


def test_a_service_that_cannot_work_does_not_start(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert "cannot listen on" in one_line("run", url=database.url(), LISTENER_HTTP_PORT=port)
    assert "superuser" in one_line("run", url=database.url("postgres"))
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("UPDATE listener.alembic_version SET version_num = '0000'")
    assert "listener migrate" in one_line("run", url=database.url())
