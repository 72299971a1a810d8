"""pg_dump and pg_restore: a copy knows that it is one, and misses nothing that was under way."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, sql
from structlog.testing import capture_logs

from conftest import Database, eventually, install, server_of, start_embedded
from diagnosis import mend, wrong
from listener.embedded import EmbeddedServer
from shop import (
    ANNA,
    BALANCE,
    BERT,
    CLEO,
    SALES,
    application,
    create_view,
    define,
    differences,
    one,
    open_shop,
    order,
    rows,
    settle,
)
from test_lookups import LINES, ROWS, TOTALS, line

pytestmark = pytest.mark.anyio

VIEWS = ("balance", "sales", "totals")
IS_A_COPY = "this database is a copy or was restored: every tenant of every view is marked dirty"


@pytest.fixture(scope="module")
def cluster() -> Iterator[EmbeddedServer]:
    with start_embedded() as embedded:
        yield embedded


@pytest.fixture(scope="module")
def installed(cluster: EmbeddedServer) -> str:
    server = server_of(cluster)
    name = server.clone("template0")
    install(server, name)
    return name


@pytest.fixture(scope="module")
def other_cluster() -> Iterator[EmbeddedServer]:
    with start_embedded() as embedded:
        yield embedded


def run(program: Path, *arguments: object) -> str:
    """What a program prints; it says nothing else, and does not fail."""
    done = subprocess.run([str(word) for word in (program, *arguments)], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, ""), done.stderr
    return done.stdout


@pytest.fixture
async def shop(cluster: EmbeddedServer, installed: str) -> Database:
    """Three views; unconsumed changes in the log, a key that is dirty, a mark of the purge."""
    database = Database(server_of(cluster), server_of(cluster).clone(installed))
    await open_shop(database)
    async with database.connect() as superuser:
        await define(superuser, LINES)
        await superuser.execute(ROWS)
        await superuser.execute("SELECT listener.add_source('shop.order_lines', through => 'shop.orders')")
    await create_view(database, "totals", TOTALS, ["product"])
    await create_view(database, "sales", SALES, ["product"], target_rls=True)
    await create_view(database, "balance", BALANCE, ["product"], quiet_period="0 s")
    async with database.connect("listener_service") as service:
        await settle(service)
        await service.execute("SELECT listener.purge()")
        await service.execute("SELECT listener.repair_capture()")
        async with application(database, ANNA) as app:
            await order(app, ANNA, "drained")
            await service.execute("SELECT listener.drain()")
            await line(app, 1)
    async with application(database, BERT) as app:
        await order(app, BERT, "not drained", 4)
    return database


async def differing(superuser: AsyncConnection[Any]) -> list[str]:
    return [view for view in VIEWS if await differences(superuser, view) != []]


def dump(cluster: EmbeddedServer, database: Database, into: Path) -> Path:
    file = into / "shop.dump"
    assert run(cluster.bin("pg_dump"), "--format=custom", f"--file={file}", database.url("postgres")) == ""
    return file


@pytest.fixture(params=["another cluster", "the same cluster"])
def copy(request: pytest.FixtureRequest, shop: Database, tmp_path: Path) -> Database:
    """The shop's dump, restored."""
    cluster: EmbeddedServer = request.getfixturevalue("cluster")
    file = dump(cluster, shop, tmp_path)
    to = cluster
    if request.param == "another cluster":
        to = request.getfixturevalue("other_cluster")
        roles = run(cluster.bin("pg_dumpall"), "--roles-only", f"--dbname={cluster.url()}")
        # The superuser is there already, and so are all of them the second time.
        subprocess.run([to.bin("psql"), "--quiet", to.url()], input=roles, text=True, capture_output=True, check=True)
    server = server_of(to)
    restored = Database(server, server.clone("template0"))
    assert run(to.bin("pg_restore"), f"--dbname={restored.url('postgres')}", file) == ""
    return restored


async def until_exact(superuser: AsyncConnection[Any]) -> None:
    async def is_exact() -> bool:
        return await differing(superuser) == []

    await eventually(is_exact)


async def test_a_restored_copy_becomes_exact_says_so_once_and_goes_on_capturing(copy: Database) -> None:
    async with copy.connect() as superuser:
        assert await differing(superuser) == ["balance", "sales", "totals"]
        with capture_logs() as logs:
            async with copy.service(sweep_interval=3600.0):
                await until_exact(superuser)
                async with application(copy, CLEO) as app:
                    await order(app, CLEO, "after the restore")
                    await line(app, 3)
                await until_exact(superuser)
                sold = "SELECT orders FROM public.sales WHERE product = 'after the restore' AND tenant_id = %s"
                await eventually(lambda: one(superuser, sold, CLEO))
        assert [entry["event"] for entry in logs].count(IS_A_COPY) == 1
        with capture_logs() as logs:
            async with copy.service(sweep_interval=3600.0):
                async with application(copy, CLEO) as app:
                    await order(app, CLEO, "after the second start")
                sold = "SELECT orders FROM public.sales WHERE product = 'after the second start' AND tenant_id = %s"
                await eventually(lambda: one(superuser, sold, CLEO))
                await until_exact(superuser)
        assert [entry for entry in logs if entry["log_level"] == "warning"] == []
        assert await differing(superuser) == []


async def test_what_doctor_prints_mends_the_capture_of_a_copy(copy: Database) -> None:
    before = [finding for finding in await wrong(copy) if (finding.check, finding.level) == ("capture", "error")]
    assert {finding.mend for finding in before} == {"SELECT * FROM listener.repair_capture();"}
    await mend(copy, before)
    assert [finding for finding in await wrong(copy) if (finding.check, finding.level) == ("capture", "error")] == []


async def test_every_key_of_a_copy_is_refreshed_and_its_log_can_be_purged(copy: Database) -> None:
    async with copy.connect() as superuser, copy.connect("listener_service") as service:
        assert await one(superuser, "SELECT count(*) FROM listener.change_log") > 0
        # Nobody knows what was changed in a target of a copy, so each is looked at.
        await superuser.execute(
            "UPDATE public.sales SET orders = 77; DELETE FROM public.balance; DELETE FROM public.totals"
        )
        drained = await rows(service, "SELECT DISTINCT outcome, restored FROM listener.drain()")
        assert drained == [("drained", True)]
        await settle(service)
        assert await differing(superuser) == []
        assert await one(superuser, "SELECT count(*) FROM listener.dirty") == 0
        await order(superuser, ANNA, "one more")
        drained = await rows(service, "SELECT DISTINCT outcome, restored, tenant FROM listener.drain()")
        assert drained == [("drained", False, ANNA)]
        await settle(service)
        await service.execute("SELECT listener.purge()")
        await superuser.execute("SELECT pg_current_xact_id()")
        await order(superuser, ANNA, "and one")
        await settle(service)
        await service.execute("SELECT listener.purge()")
        # What the last drain saw last may still be there, and nothing older.
        assert await one(superuser, "SELECT count(*) FROM listener.change_log WHERE xid = '0'") == 0
        assert await one(superuser, "SELECT count(*) FROM listener.change_log") <= 1
        assert await one(superuser, "SELECT count(*) FROM listener.dirty_key") == 0
        assert await differing(superuser) == []


TRIGGERS: LiteralString = """
    SELECT DISTINCT tgenabled::text FROM pg_trigger WHERE starts_with(tgname, 'listener_') AND tgrelid = %s::regclass
"""


@pytest.mark.parametrize("table", ["shop.orders", "shop.order_lines"])
async def test_rows_restored_with_triggers_disabled_are_found_by_the_repair(
    cluster: EmbeddedServer, shop: Database, tmp_path: Path, table: str
) -> None:
    schema, name = table.split(".")
    file = dump(cluster, shop, tmp_path)
    async with shop.connect() as superuser, shop.connect("listener_service") as service:
        await superuser.execute("SET session_replication_role = replica")  # deletes no lines with the orders
        await superuser.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier(schema, name)))
        await settle(service)
        assert await differing(superuser) == []
        only = ("--data-only", "--disable-triggers", f"--schema={schema}", f"--table={name}")
        assert run(cluster.bin("pg_restore"), *only, f"--dbname={shop.url('postgres')}", file) == ""
        assert await rows(service, "SELECT outcome FROM listener.drain()") == [("nothing",)]
        assert "totals" in await differing(superuser)
        assert await rows(superuser, TRIGGERS, table) != [("A",)]
        assert await rows(service, "SELECT source, outcome FROM listener.repair_capture()") == [(table, "repaired")]
        assert await rows(superuser, TRIGGERS, table) == [("A",)]
        assert await rows(service, "SELECT * FROM listener.repair_capture()") == []
        await settle(service)
        assert await differing(superuser) == []
