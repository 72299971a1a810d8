"""Partitioned tables: a trigger on the root does not see a statement that names a leaf, and leaves come and go."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any, LiteralString

import pytest
from psycopg import AsyncConnection, sql

from captured import after_rename, at_home, emptied, logged, reaches, repaired, statement, triggers_on
from conftest import Database, Server
from shop import ANNA, BERT, CLEO, application, create_view, define, differences, one, open_shop, rows, settle

pytestmark = pytest.mark.anyio

# early and late by day; odd has its columns in another order, and one that was dropped; deep is partitioned again.
VISITS: LiteralString = """
    CREATE TABLE shop.visits (day int NOT NULL, tenant_id uuid, place text) PARTITION BY RANGE (day);
    CREATE TABLE shop.early PARTITION OF shop.visits FOR VALUES FROM (0) TO (10);
    CREATE TABLE shop.late PARTITION OF shop.visits FOR VALUES FROM (10) TO (20);
    CREATE TABLE shop.odd (place text, gone int, day int NOT NULL, tenant_id uuid);
    ALTER TABLE shop.odd DROP COLUMN gone;
    ALTER TABLE shop.visits ATTACH PARTITION shop.odd FOR VALUES FROM (20) TO (30);
    CREATE TABLE shop.deep PARTITION OF shop.visits FOR VALUES FROM (30) TO (40) PARTITION BY LIST (tenant_id);
    CREATE TABLE shop.deep_anna PARTITION OF shop.deep FOR VALUES IN ({anna});
    CREATE TABLE shop.deep_rest PARTITION OF shop.deep DEFAULT;
    GRANT ALL ON ALL TABLES IN SCHEMA shop TO shop_app;
    GRANT SELECT ON ALL TABLES IN SCHEMA shop TO listener_service;
    INSERT INTO shop.visits
        SELECT d, t, 'home' FROM unnest(ARRAY[{anna}::uuid, {bert}]) t, unnest('{{5,15,25,35}}'::int[]) d;
"""
FOOTFALL = "SELECT tenant_id, place, day, count(*) AS visits FROM shop.visits GROUP BY 1, 2, 3"
LEAVES = ("early", "late", "odd", "deep", "deep_anna", "deep_rest")


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute("GRANT ALL ON shop.tenants TO shop_owner WITH GRANT OPTION")
        await define(superuser, statement(VISITS))
    await create_view(database, "footfall", FOOTFALL, ["place", "day"])
    await at_home(database)
    return database


@pytest.fixture
async def app(shop: Database) -> AsyncIterator[AsyncConnection[Any]]:
    async with application(shop, ANNA) as connection:
        yield connection


async def mended_and_exact(superuser: AsyncConnection[Any], service: AsyncConnection[Any]) -> None:
    """One call repairs and marks all tenants, a second finds nothing to do, and the target becomes exact."""
    await superuser.execute("DELETE FROM listener.change_log")
    assert await repaired(service) == [("shop.visits", "repaired")]
    assert await logged(superuser) == {"visits of all"}
    assert await repaired(service) == []
    await settle(service)
    assert await differences(superuser, "footfall") == []


WRITES = [
    ("INSERT INTO shop.{table} (day, tenant_id, place) VALUES ({day}, {anna}, 'cafe')", {"visits of anna"}),
    ("UPDATE shop.{table} SET place = 'bar' WHERE day = {day} AND tenant_id = {anna}", {"visits of anna"}),
    ("DELETE FROM shop.{table} WHERE day = {day} AND tenant_id = {anna}", {"visits of anna"}),
    (
        """MERGE INTO shop.{table} v USING (VALUES ({day}, {anna}::uuid)) n (day, tenant_id)
           ON v.day = n.day AND v.tenant_id = n.tenant_id WHEN MATCHED THEN UPDATE SET place = 'pub'""",
        {"visits of anna"},
    ),
]


@pytest.mark.parametrize(("write", "expected"), WRITES, ids=["insert", "update", "delete", "merge"])
@pytest.mark.parametrize("day", [5, 25, 35], ids=["an ordinary leaf", "a leaf of another order", "a leaf of a leaf"])
async def test_a_write_through_the_root(
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    app: AsyncConnection[Any],
    day: int,
    write: LiteralString,
    expected: set[str],
) -> None:
    async with reaches(superuser, service, "footfall", expected):
        await app.execute(written(write, "visits", day))


@pytest.mark.parametrize(("write", "expected"), WRITES, ids=["insert", "update", "delete", "merge"])
@pytest.mark.parametrize(("table", "day"), [("early", 5), ("odd", 25), ("deep", 35), ("deep_anna", 35)])
async def test_a_write_straight_into_a_partition(
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    app: AsyncConnection[Any],
    table: str,
    day: int,
    write: LiteralString,
    expected: set[str],
) -> None:
    async with reaches(superuser, service, "footfall", expected):
        await app.execute(written(write, table, day))


def written(write: LiteralString, table: str, day: int) -> sql.Composed:
    return sql.SQL(write).format(table=sql.Identifier(table), day=sql.Literal(day), anna=sql.Literal(ANNA))


async def test_each_table_but_the_root_looks_its_column_up_by_name(superuser: AsyncConnection[Any]) -> None:
    found = await rows(
        superuser,
        """SELECT g.tgrelid::regclass::text, bool_and(p.proname LIKE '%by_name') FROM pg_trigger g
           JOIN pg_proc p ON p.oid = g.tgfoid
           WHERE g.tgname LIKE 'listener%' AND g.tgname !~ '_(watch|moved)$'  -- these look at no column
           GROUP BY 1 HAVING bool_or(p.proname LIKE '%by_name')""",
    )
    assert ("shop.odd", True) in found
    assert "shop.visits" not in dict(found)
    assert all(by_name for _, by_name in found)


async def test_copy_into_the_root_and_into_a_leaf_of_another_order(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    for table in ("visits", "odd"):
        async with reaches(superuser, service, "footfall", {"visits of anna", "visits of bert"}):
            copying = sql.SQL("COPY {} (day, tenant_id, place) FROM STDIN").format(sql.Identifier("shop", table))
            async with app.cursor() as cursor, cursor.copy(copying) as copy:
                for number in range(50):
                    await copy.write_row((20 + number % 10, ANNA if number % 2 else BERT, "cinema"))


@pytest.mark.parametrize(("come", "go"), [(5, 15), (5, 25), (25, 5), (35, 25), (15, 35)])
async def test_rows_that_move_between_leaves(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any], come: int, go: int
) -> None:
    async with reaches(superuser, service, "footfall", {"visits of anna"}):
        await app.execute(
            "UPDATE shop.visits SET day = %s WHERE day = %s AND tenant_id = %s",
            (go, come, ANNA),
        )


@pytest.mark.parametrize("table", ["visits", "deep"])
async def test_rows_that_move_between_leaves_and_tenants(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any], table: str
) -> None:
    async with reaches(superuser, service, "footfall", {"visits of anna", "visits of cleo"}):
        await app.execute(
            sql.SQL("UPDATE {} SET tenant_id = %s WHERE tenant_id = %s").format(sql.Identifier("shop", table)),
            (CLEO, ANNA),
        )


@pytest.mark.parametrize("table", LEAVES)
async def test_truncate_of_a_partition(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any], table: str
) -> None:
    async with reaches(superuser, service, "footfall", {"visits of all"}):
        await app.execute(sql.SQL("TRUNCATE {}").format(sql.Identifier("shop", table)))


async def test_a_leaf_added_later_is_captured_through_the_root_at_once_and_directly_after_a_repair(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await define(
        superuser,
        """CREATE TABLE shop.later PARTITION OF shop.visits FOR VALUES FROM (40) TO (50);
           GRANT ALL ON shop.later TO shop_app""",
    )
    async with reaches(superuser, service, "footfall", {"visits of anna"}):
        await app.execute("INSERT INTO shop.visits VALUES (45, %s, 'new')", (ANNA,))
    await app.execute("INSERT INTO shop.later VALUES (46, %s, 'unseen')", (BERT,))
    await settle(service)
    assert await differences(superuser, "footfall") != []
    await mended_and_exact(superuser, service)
    async with reaches(superuser, service, "footfall", {"visits of bert"}):
        await app.execute("INSERT INTO shop.later VALUES (47, %s, 'seen')", (BERT,))


async def test_a_leaf_of_another_order_attached_with_rows_is_shown_and_captured_after_a_repair(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        statement(
            """CREATE TABLE shop.loaded (tenant_id uuid, place text, day int NOT NULL);
               INSERT INTO shop.loaded VALUES ({anna}, 'brought', 41), ({cleo}, 'brought', 42);
               ALTER TABLE shop.visits ATTACH PARTITION shop.loaded FOR VALUES FROM (40) TO (50);
               GRANT ALL ON shop.loaded TO shop_app"""
        ),
    )
    assert len(await differences(superuser, "footfall")) == 2
    await mended_and_exact(superuser, service)
    async with reaches(superuser, service, "footfall", {"visits of anna"}):
        await app.execute("DELETE FROM shop.loaded WHERE tenant_id = %s", (ANNA,))


@pytest.mark.parametrize("table", LEAVES)
async def test_a_detached_leaf_is_no_longer_shown_and_keeps_no_trigger(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any], table: str
) -> None:
    await emptied(superuser, service)
    parent = "deep" if table.startswith("deep_") else "visits"
    detach = sql.SQL("ALTER TABLE {} DETACH PARTITION {}")
    await define(superuser, detach.format(sql.Identifier("shop", parent), sql.Identifier("shop", table)))
    assert await differences(superuser, "footfall") != []
    await mended_and_exact(superuser, service)
    assert await triggers_on(superuser, f"shop.{table}") == 0
    await app.execute(sql.SQL("DELETE FROM {}").format(sql.Identifier("shop", table)))
    assert await logged(superuser) == {"visits of all"}
    async with reaches(superuser, service, "footfall", {"visits of bert"}):
        await app.execute("INSERT INTO shop.visits VALUES (%s, %s, 'x')", (15 if table == "early" else 5, BERT))


async def test_a_leaf_detached_and_attached_again_between_two_sweeps_is_noticed(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(superuser, "ALTER TABLE shop.visits DETACH PARTITION shop.early")
    await define(superuser, "ALTER TABLE shop.visits ATTACH PARTITION shop.early FOR VALUES FROM (0) TO (10)")
    await mended_and_exact(superuser, service)


@pytest.mark.parametrize("table", LEAVES)
async def test_a_dropped_leaf_is_not_held_back_by_us_and_its_rows_go(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], table: str
) -> None:
    await emptied(superuser, service)
    await define(superuser, sql.SQL("DROP TABLE {}").format(sql.Identifier("shop", table)))
    assert await differences(superuser, "footfall") != []
    await mended_and_exact(superuser, service)


async def test_a_leaf_dropped_and_made_anew_under_its_name_is_captured_after_a_repair(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        """DROP TABLE shop.late;
           CREATE TABLE shop.late PARTITION OF shop.visits FOR VALUES FROM (10) TO (20);
           GRANT ALL ON shop.late TO shop_app""",
    )
    await mended_and_exact(superuser, service)
    async with reaches(superuser, service, "footfall", {"visits of bert"}):
        await app.execute("INSERT INTO shop.late VALUES (11, %s, 'x')", (BERT,))


async def test_a_leaf_that_is_partitioned_later_is_captured_in_its_own_leaves(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(
        superuser,
        statement(
            """CREATE TABLE shop.months PARTITION OF shop.visits FOR VALUES FROM (40) TO (50) PARTITION BY RANGE (day);
               CREATE TABLE shop.months_41 (place text, day int NOT NULL, tenant_id uuid);
               INSERT INTO shop.months_41 VALUES ('brought', 41, {cleo});
               ALTER TABLE shop.months ATTACH PARTITION shop.months_41 FOR VALUES FROM (41) TO (42);
               GRANT ALL ON shop.months_41 TO shop_app"""
        ),
    )
    await mended_and_exact(superuser, service)
    async with reaches(superuser, service, "footfall", {"visits of anna"}):
        await app.execute("INSERT INTO shop.months_41 (day, tenant_id) VALUES (41, %s)", (ANNA,))


async def test_a_renamed_tenant_column_is_followed_into_the_leaves(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await define(superuser, "ALTER TABLE shop.visits RENAME COLUMN tenant_id TO customer")
    async with reaches(superuser, service, "footfall", after_rename(superuser, "visits", "bert")):
        await app.execute("INSERT INTO shop.visits (day, customer) VALUES (26, %s)", (BERT,))
    # By its name nobody finds the column any more, so it may be anybody's.
    async with reaches(superuser, service, "footfall", {"visits of all"}):
        await app.execute("INSERT INTO shop.odd (day, customer) VALUES (26, %s)", (BERT,))
        await app.execute("DELETE FROM shop.early WHERE customer = %s", (BERT,))
    assert await repaired(service) == [("shop.visits", "renamed")]
    assert await repaired(service) == []
    async with reaches(superuser, service, "footfall", {"visits of bert"}):
        await app.execute("INSERT INTO shop.odd (day, customer) VALUES (26, %s)", (BERT,))


async def test_columns_dropped_and_added_on_the_root_change_nothing_for_the_leaves(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await define(
        superuser, "ALTER TABLE shop.visits ADD COLUMN first int DEFAULT 1, ADD COLUMN second text DEFAULT 'x'"
    )
    await app.execute("UPDATE shop.visits SET second = 'y'")
    await define(superuser, "ALTER TABLE shop.visits DROP COLUMN first, ADD COLUMN third int")
    for table, day in (("visits", 6), ("early", 7), ("odd", 26), ("deep_rest", 36)):
        name = sql.Identifier("shop", table)
        async with reaches(superuser, service, "footfall", {"visits of bert"}):
            await app.execute(sql.SQL("INSERT INTO {} (day, tenant_id) VALUES (%s, %s)").format(name), (day, BERT))
        async with reaches(superuser, service, "footfall", {"visits of bert"}):
            await app.execute(sql.SQL("UPDATE {} SET place = 'z', third = 3 WHERE day = %s").format(name), (day,))
    assert await repaired(service) == []


async def test_nothing_is_repaired_while_nothing_changed(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], app: AsyncConnection[Any]
) -> None:
    await app.execute("UPDATE shop.visits SET day = 39 WHERE tenant_id = %s", (ANNA,))
    await superuser.execute("ANALYZE shop.visits")
    assert await repaired(service) == []
    assert await one(superuser, "SELECT count(*) FROM listener.source_table") == len(LEAVES) + 1


async def test_a_copy_that_misses_several_leaves_is_repaired(server: Server, shop: Database) -> None:
    async with shop.connect() as superuser, shop.connect("listener_service") as service:
        await emptied(superuser, service)
    copy = Database(server, server.clone(shop.name))
    try:
        async with copy.connect() as superuser, copy.connect("listener_service") as service:
            await define(superuser, "DROP TABLE shop.early; DROP TABLE shop.deep")
            await mended_and_exact(superuser, service)
    finally:
        server.drop(copy.name)
