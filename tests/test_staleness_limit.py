"""How stale a view may be: set per view, carried along, measured whatever keeps a change from being shown, and told."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database
from diagnosis import wrong
from shop import ANNA, SALES, TENANTS, create_view, one, open_shop, order, rows, settle
from stranger import BY_TENANT, TENANTS_QUERY
from web_client import get

pytestmark = pytest.mark.anyio

TOTALS = "SELECT tenant_id, sum(quantity)::bigint AS quantity FROM sales GROUP BY 1"
LIMIT = "SELECT max_staleness::text FROM listener.managed_view WHERE name = %s"
# As if it had happened an hour ago.
LONG_AGO = """
    UPDATE listener.change_log SET changed_at = changed_at - interval '1 hour';
    UPDATE listener.dirty_key SET first_change_at = first_change_at - interval '1 hour';
    UPDATE listener.drain_log SET drained_at = drained_at - interval '1 hour';
"""


@pytest.fixture
async def shop(database: Database) -> Database:
    """A view over a view; both have a limit, and nothing is stale."""
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute("ALTER TABLE shop.orders ALTER COLUMN tenant_id SET NOT NULL")
    await create_view(database, "sales", SALES, ["product"], max_staleness="10 min")
    await create_view(database, "totals", TOTALS, ["tenant_id"], max_staleness="20 min")
    async with database.connect("listener_service") as service:
        await settle(service)
    return database


async def staleness(superuser: AsyncConnection[Any]) -> dict[str, float | None]:
    """Minutes, rounded; None where nothing is stale."""
    found = await rows(
        superuser, "SELECT view_name, round(extract(epoch FROM staleness) / 60)::int FROM listener.staleness()"
    )
    return dict(found)


async def test_it_is_set_changed_and_taken_away(shop: Database, superuser: AsyncConnection[Any]) -> None:
    assert await one(superuser, LIMIT, "sales") == "00:10:00"
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.set_window('sales', max_wait => '3 s')")
        assert await one(superuser, LIMIT, "sales") == "00:10:00"
        await migrator.execute("SELECT listener.set_window('sales', max_staleness => '1 hour')")
        assert await one(superuser, LIMIT, "sales") == "01:00:00"
        assert (
            await one(superuser, "SELECT max_wait::text FROM listener.managed_view WHERE name = 'sales'") == "00:00:03"
        )
        await migrator.execute("SELECT listener.set_window('sales', without_max_staleness => true)")
        assert await one(superuser, LIMIT, "sales") is None


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ("max_staleness => '-1 s'", "must not be shorter than max_wait"),
        ("max_staleness => '0'", "must not be shorter than max_wait"),
        ("max_staleness => '1 s'", r"max_staleness \(00:00:01\) must not be shorter than max_wait \(00:00:02\)"),
        ("max_wait => '11 min'", "must not be shorter than max_wait"),
        ("max_staleness => '2 years'", "no window is longer than a year"),
    ],
)
async def test_a_limit_that_makes_no_sense_is_refused(shop: Database, given: str, says: str) -> None:
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match=says) as refused:
            await migrator.execute(f"SELECT listener.set_window('sales', {given})".encode())
    assert refused.value.sqlstate == "LSN02"


async def test_an_alteration_keeps_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_migrator") as migrator:
        beside = await one(migrator, "SELECT listener.begin_alter('totals', %s)", TOTALS.replace("sum", "max"))
        assert await one(superuser, LIMIT, beside) == "00:20:00"
        # It is being filled, and nobody reads it yet.
        await superuser.execute(LONG_AGO)
        limits = dict(await rows(superuser, "SELECT view_name, max_staleness IS NULL FROM listener.staleness()"))
        assert limits == {"sales": False, "totals": False, beside: True}
        await settle(service)
        await migrator.execute("SELECT listener.finish_alter('totals')")
    assert await one(superuser, LIMIT, "totals") == "00:20:00"
    assert await rows(superuser, "SELECT view_name FROM listener.staleness() ORDER BY 1") == [("sales",), ("totals",)]


async def test_an_adoption_that_starts_over_keeps_it(stranger: Database) -> None:
    begin = "SELECT listener.begin_adoption(%s, tenants_query => %s, edge => %s)"
    async with stranger.connect() as superuser, stranger.connect("listener_migrator") as migrator:
        view = await one(migrator, begin, BY_TENANT, TENANTS_QUERY, "leading")
        await migrator.execute("SELECT listener.set_window(%s, max_staleness => '5 min')", (view,))
        assert await rows(superuser, "SELECT max_staleness FROM listener.staleness()") == [(None,)]
        await one(migrator, begin, BY_TENANT, TENANTS_QUERY, "trailing")
        kept = "SELECT edge, max_staleness::text FROM listener.managed_view"
        assert await rows(superuser, kept) == [("trailing", "00:05:00")]


async def test_files_carry_it(shop: Database, superuser: AsyncConnection[Any], tmp_path: Path) -> None:
    def views(*arguments: str) -> str:
        done = listener("views", *arguments, str(tmp_path), url=shop.url("listener_migrator"))
        assert done.returncode == 0, done.stderr
        return done.stdout

    views("export")
    file = tmp_path / "sales.sql"
    assert '-- max_staleness = "00:10:00"\n' in file.read_text()
    assert views("plan").splitlines()[-1] == "0 to do, 2 as the files say"
    file.write_text(file.read_text().replace('"00:10:00"', '"15 min"'))
    assert "max_staleness: 00:10:00 -> 00:15:00" in views("plan")
    assert "set max_staleness of sales" in views("apply")
    assert await one(superuser, LIMIT, "sales") == "00:15:00"
    file.write_text(file.read_text().replace('-- max_staleness = "15 min"\n', ""))
    assert "max_staleness: 00:15:00 -> none" in views("plan")
    views("apply")
    assert await one(superuser, LIMIT, "sales") is None
    assert await one(superuser, LIMIT, "totals") == "00:20:00"


async def test_a_change_counts_from_the_log_to_the_last_view_that_reads_it(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    assert await staleness(superuser) == {"sales": None, "totals": None}
    await order(superuser, ANNA, "tea")
    await superuser.execute(LONG_AGO)
    assert await staleness(superuser) == {"sales": 60, "totals": 60}, "logged"
    await service.execute("SELECT listener.drain()")
    assert await staleness(superuser) == {"sales": 60, "totals": 60}, "drained"
    await service.execute("SELECT listener.refresh('sales', %s)", (ANNA,))
    # What the refresh itself changed for the next view was logged just now.
    assert await staleness(superuser) == {"sales": None, "totals": 0}
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.pause()")
    await superuser.execute(LONG_AGO)
    assert await staleness(superuser) == {"sales": None, "totals": 60}, "paused"
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.resume()")
    await settle(service)
    assert await staleness(superuser) == {"sales": None, "totals": None}


async def test_a_transaction_that_was_open_for_long_is_not_staleness(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect() as slow, slow.transaction():
        await order(slow, ANNA, "tea")
        await slow.execute("UPDATE listener.change_log SET changed_at = changed_at - interval '1 hour'")
        await order(superuser, ANNA, "pot")
        await settle(service)
    assert await staleness(superuser) == {"sales": 0, "totals": 0}


async def test_status_shows_the_limit_and_whether_it_is_passed(shop: Database, superuser: AsyncConnection[Any]) -> None:
    lines = listener("status", url=shop.url()).stdout
    assert "limit" in lines
    assert "10 min" in lines
    assert "passed" not in lines
    await order(superuser, ANNA, "tea")
    await superuser.execute(LONG_AGO)
    lines = listener("status", url=shop.url()).stdout
    assert "10 min, passed" in lines
    assert "20 min, passed" in lines
    found = {row["view"]: row for row in json.loads(listener("status", "--json", url=shop.url()).stdout)["views"]}
    assert (found["sales"]["max_staleness"], found["sales"]["too_stale"]) == (600, True)
    assert 3600 <= found["sales"]["staleness"] < 3700
    async with shop.connect("listener_migrator") as migrator:
        for view in ("sales", "totals"):
            await migrator.execute("SELECT listener.set_window(%s, without_max_staleness => true)", (view,))
    assert "limit" not in listener("status", url=shop.url()).stdout


async def test_metrics_show_both_per_view_and_no_tenant(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.pause('totals')")
        await migrator.execute("SELECT listener.set_window('totals', without_max_staleness => true)")
    async with shop.service() as running:
        await order(superuser, ANNA, "tea")
        await running.until_refreshed("sales", ANNA)
        await service.execute("SELECT listener.drain()")
        await superuser.execute(LONG_AGO)
        text = (await get(running, "/metrics")).text
        samples = dict(line.rsplit(" ", 1) for line in text.splitlines() if line.startswith("listener_view_"))
        limits = {name: value for name, value in samples.items() if "max_staleness" in name}
        assert limits == {'listener_view_max_staleness_seconds{view="sales"}': "600.0"}
        assert 3600 <= float(samples['listener_view_staleness_seconds{view="totals"}']) < 3700
        assert float(samples['listener_view_staleness_seconds{view="sales"}']) < 60
        assert 'listener_oldest_dirty_age_seconds{view="totals"} 0.0' in text, "a paused view's keys do not count there"
        assert [tenant for tenant in TENANTS if tenant in text] == []


async def test_doctor_says_which_view_is_past_its_limit_and_a_pause_is_not_that(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    assert await wrong(shop) == []
    async with shop.connect("listener_migrator") as migrator:
        # Far above what doctor complains of by itself.
        await migrator.execute("SELECT listener.set_window('totals', max_wait => '10 min')")
        await migrator.execute("SELECT listener.set_window('sales', max_wait => '10 min')")
    await order(superuser, ANNA, "tea")
    await service.execute("SELECT listener.drain()")
    await superuser.execute("UPDATE listener.dirty_key SET first_change_at = first_change_at - interval '15 min'")
    (found,) = await wrong(shop)
    assert (found.check, found.level, found.view, found.mend) == ("progress", "error", "sales", "listener run")
    assert found.problem == "it does not show a change that is 15 min old, and its max_staleness is 10 min."
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.pause('sales')")
        assert await wrong(shop) == []
        # What reads a paused view is past a limit that nobody took away.
        await migrator.execute("SELECT listener.set_window('totals', max_wait => '1 s', max_staleness => '10 min')")
        (found,) = await wrong(shop)
        assert (found.view, found.mend) == ("totals", "listener resume sales")
        await migrator.execute("SELECT listener.resume()")
    await settle(service)
    assert await wrong(shop) == []
