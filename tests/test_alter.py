"""A definition changes: built beside the old one, filled, compared, swapped at once, or taken back."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import anyio
import psycopg
import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database, eventually
from listener import alter
from listener.errors import SetupError
from shop import (
    ANNA,
    BERT,
    CLEO,
    SALES,
    application,
    create_view,
    define,
    differences,
    one,
    order,
    rows,
    settle,
)

pytestmark = pytest.mark.anyio

# One more column, one less, another type, and fewer rows.
CHANGED = """
    SELECT tenant_id, product, count(*)::text AS orders, max(quantity) AS largest
    FROM shop.orders WHERE quantity < 100 GROUP BY 1, 2
"""


@pytest.fixture
async def shop(shop: Database) -> Database:
    """With the view `sales`, which somebody reads, and a view on top of it."""
    await create_view(shop, "sales", SALES, ["product"], target_rls=True)
    async with shop.connect() as superuser:
        await superuser.execute(
            """
            GRANT SELECT ON sales TO shop_app;
            GRANT SELECT (product) ON sales TO listener_reader;
            COMMENT ON TABLE sales IS 'what was sold';
            COMMENT ON COLUMN sales.product IS 'its name';
            SET ROLE listener_owner;
            CREATE INDEX sales_by_product ON sales (product);
            CREATE VIEW products WITH (security_barrier = true, security_invoker = true) AS
                SELECT tenant_id, product FROM sales;
            GRANT SELECT ON products TO shop_app;
            """
        )
    for tenant, product, quantity in ((ANNA, "a", 1), (ANNA, "b", 100), (BERT, "a", 2), (CLEO, None, 200)):
        async with application(shop, tenant) as app:
            await order(app, tenant, product, quantity)
    async with shop.connect("listener_service") as service:
        await settle(service)
    return shop


def altered(shop: Database, tmp_path: Path, query: str, *options: str) -> Any:
    file = tmp_path / "query.sql"
    file.write_text(query)
    return listener("views", "alter", "sales", "--query", str(file), *options, url=shop.url("listener_migrator"))


async def traces(superuser: AsyncConnection[Any]) -> list[Any]:
    """What an alteration that was taken back must not leave, but for ids."""
    return await rows(
        superuser,
        """
        SELECT c.relname::text, c.relkind::text, c.relacl::text FROM pg_class c
        WHERE c.relnamespace IN ('public'::regnamespace, 'listener'::regnamespace) AND c.relkind IN ('r', 'v', 'i')
        UNION ALL SELECT tgname::text, tgrelid::regclass::text, tgenabled::text FROM pg_trigger
        UNION ALL SELECT name, query, target_name::text FROM listener.managed_view
        UNION ALL SELECT proname::text, '', '' FROM pg_proc WHERE pronamespace = 'listener'::regnamespace
        ORDER BY 1, 2, 3
        """,
    )


async def test_columns_come_and_go_and_everything_else_is_carried_over(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], tmp_path: Path
) -> None:
    done = altered(shop, tmp_path, CHANGED, "--yes")
    assert done.returncode == 0, done.stderr
    assert "column quantity removed: bigint" in done.stdout
    assert "column largest added: integer" in done.stdout
    assert "column orders retyped: bigint -> text" in done.stdout
    # The count is the same as text: rows that both have are compared by what both have.
    assert "0 rows added, 2 rows removed, 0 rows changed, in 2 of 3 keys" in done.stdout
    assert "sales is altered: readers were locked out for" in done.stdout
    assert await differences(superuser, "sales") == []
    assert await one(superuser, "SELECT reltuples FROM pg_class WHERE oid = 'sales'::regclass") == 2
    assert await rows(superuser, "SELECT name, target_name::text FROM listener.managed_view") == [("sales", "sales")]
    columns = "SELECT attname::text FROM pg_attribute WHERE attrelid = 'sales'::regclass AND attnum > 0 ORDER BY attnum"
    assert [name for (name,) in await rows(superuser, columns)] == ["tenant_id", "product", "orders", "largest"]
    grants = """SELECT has_table_privilege('shop_app', 'sales', 'SELECT'),
                       has_column_privilege('listener_reader', 'sales', 'product', 'SELECT')"""
    assert await rows(superuser, grants) == [(True, True)]
    comments = "SELECT obj_description('sales'::regclass), col_description('sales'::regclass, 2)"
    assert await rows(superuser, comments) == [("what was sold", "its name")]
    assert (
        await one(
            superuser,
            "SELECT indexrelid::regclass::text FROM pg_index WHERE indrelid = 'sales'::regclass AND NOT indisunique",
        )
        == "sales_by_product"
    )
    assert await one(superuser, "SELECT reloptions FROM pg_class WHERE relname = 'products'") == [
        "security_barrier=true",
        "security_invoker=true",
    ]
    # Readers still see their own rows alone, and it is kept fresh.
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "c")
        await settle(service)
        assert await rows(app, "SELECT product FROM products ORDER BY 1") == [("a",), ("c",)]
    assert await rows(service, "SELECT listener.readiness()") == []
    assert await differences(superuser, "sales") == []


async def test_a_dry_run_compares_and_leaves_nothing(
    shop: Database, superuser: AsyncConnection[Any], tmp_path: Path
) -> None:
    before = await traces(superuser)
    more = SALES.replace("sum(quantity)", "sum(quantity) + 1").replace(
        "FROM shop.orders", "FROM shop.orders WHERE product IS NOT NULL"
    )
    tried = altered(shop, tmp_path, more, "--dry-run", "--json")
    assert tried.returncode == 0, tried.stderr
    assert '"swapped": false' in tried.stdout
    for change in (f'{{"tenant_id": "{ANNA}", "added": 0, "removed": 0, "changed": 2}}',
                   f'{{"tenant_id": "{BERT}", "added": 0, "removed": 0, "changed": 1}}',
                   f'{{"tenant_id": "{CLEO}", "added": 0, "removed": 1, "changed": 0}}'):  # fmt: skip
        assert change in tried.stdout
    assert await traces(superuser) == before


@pytest.mark.parametrize(
    ("query", "refusal"),
    [
        ("SELECT tenant_id, count(*) AS n FROM shop.orders GROUP BY 1", "returns no column product"),
        (
            "SELECT tenant_id, product::varchar AS product FROM shop.orders",
            "is read on top of sales: public.products reads product",
        ),
        ("SELECT tenant_id, product, 1 / (quantity - 2) AS x FROM shop.orders", "division by zero"),
        ("SELECT nonsense", "the query is refused"),
        ("SELECT tenant_id, product FROM shop.orders; DROP TABLE shop.orders", "the query is refused"),
    ],
)
async def test_what_goes_wrong_before_the_swap_leaves_the_view_as_it_was(
    shop: Database,
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    tmp_path: Path,
    query: str,
    refusal: str,
) -> None:
    before = await traces(superuser)
    refused = altered(shop, tmp_path, query, "--yes")
    assert refused.returncode == 1
    assert refusal in refused.stderr
    assert len([line for line in refused.stderr.splitlines() if line.startswith("listener:")]) == 1, refused.stderr
    assert await traces(superuser) == before
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "c")
    await settle(service)
    assert await differences(superuser, "sales") == []


async def test_a_function_that_is_tied_to_the_rows_is_named_first(
    shop: Database, superuser: AsyncConnection[Any], tmp_path: Path
) -> None:
    await superuser.execute("CREATE FUNCTION all_sales() RETURNS SETOF sales LANGUAGE sql AS 'SELECT * FROM sales'")
    before = await traces(superuser)
    refused = altered(shop, tmp_path, CHANGED, "--yes")
    assert "function public.all_sales()" in refused.stderr
    assert await traces(superuser) == before


async def test_writes_and_refreshes_go_on_meanwhile_and_none_is_lost(
    shop: Database, superuser: AsyncConnection[Any], tmp_path: Path
) -> None:
    file = tmp_path / "query.sql"
    file.write_text(CHANGED)
    written = 0
    over = anyio.Event()

    async def keep_writing() -> None:
        nonlocal written
        async with application(shop, ANNA) as app:
            while not over.is_set():
                await order(app, ANNA, "w")
                written += 1
                await anyio.sleep(0.005)  # the pace of the load, and nothing that is waited for

    async with shop.service(), anyio.create_task_group() as tasks:
        tasks.start_soon(keep_writing)
        url = shop.url("listener_migrator")
        done = await anyio.to_thread.run_sync(
            lambda: listener("views", "alter", "sales", "--query", str(file), "--yes", url=url)
        )
        assert done.returncode == 0, done.stderr
        over.set()

        async def is_shown() -> bool:
            shown = await one(superuser, "SELECT orders FROM sales WHERE tenant_id = %s AND product = 'w'", ANNA)
            return bool(shown == str(written))

        await eventually(is_shown)
    assert await differences(superuser, "sales") == []


async def test_behind_a_long_reader_it_gives_way_and_tries_again(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    async with shop.connect("listener_migrator") as migrator, shop.connect(autocommit=False) as reader:
        await migrator.execute("SELECT listener.begin_alter('sales', %s)", (CHANGED,))
        await settle(service)
        await reader.execute("SELECT count(*) FROM sales")
        with pytest.raises(psycopg.errors.LockNotAvailable, match="sales is in use"):
            await migrator.execute("SELECT listener.finish_alter('sales')")
        # Nobody was made to wait by the attempt, and nothing was done.
        assert await one(superuser, "SELECT count(*) FROM sales") == 4
        assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 2
        await reader.rollback()
        await migrator.execute("SELECT listener.finish_alter('sales')")
    assert await one(superuser, "SELECT count(*) FROM sales") == 2
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 1


async def test_it_is_not_finished_before_all_is_filled_and_begins_anew(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    before = await traces(superuser)
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="is not being altered"):
            await migrator.execute("SELECT listener.finish_alter('sales')")
        await migrator.execute("SELECT listener.begin_alter('sales', %s)", (CHANGED,))
        with pytest.raises(psycopg.Error, match="3 keys of listener_alter_1: not filled yet"):
            await migrator.execute("SELECT listener.finish_alter('sales')")
        beside = await one(migrator, "SELECT listener.begin_alter('sales', %s)", CHANGED)
        with pytest.raises(psycopg.Error, match="to take the place of another"):
            await migrator.execute("SELECT listener.begin_alter(%s, 'SELECT 1')", (beside,))
        await migrator.execute("SELECT listener.abort_alter('sales')")
    await superuser.execute("SELECT count(*) FROM listener.repair_capture()")
    assert await traces(superuser) == before


async def test_a_view_that_others_read_is_altered_under_them(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], tmp_path: Path
) -> None:
    await superuser.execute("GRANT SELECT ON sales TO listener_service")
    await create_view(shop, "totals", "SELECT tenant_id, count(*) AS products FROM sales GROUP BY 1", ["tenant_id"])
    await settle(service)
    done = altered(shop, tmp_path, CHANGED, "--yes")
    assert done.returncode == 0, done.stderr
    await settle(service)
    assert await rows(superuser, "SELECT tenant_id::text, products FROM totals ORDER BY 1") == [(ANNA, 1), (BERT, 1)]
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "new")
    await settle(service)
    assert await one(superuser, "SELECT products FROM totals WHERE tenant_id = %s", ANNA) == 2
    assert await rows(service, "SELECT listener.readiness()") == []
    assert await rows(service, "SELECT source, outcome FROM listener.repair_capture()") == []
    refused = altered(
        shop, tmp_path, SALES.replace("tenant_id, product,", "tenant_id, product || '' AS product,"), "--yes"
    )
    assert refused.returncode == 0, "a column of the same type may be computed otherwise"


async def test_bad_input_is_one_line(shop: Database, superuser: AsyncConnection[Any], tmp_path: Path) -> None:
    url = shop.url("listener_migrator")
    for arguments, what in (
        (("sales",), "nothing is to change"),
        (("sales", "--query", str(tmp_path / "none.sql")), "cannot be read"),
        (("nothing", "--max-age", "1 hour"), "no managed view 'nothing'"),
        (("sales", "--max-age", "soon", "--yes"), "invalid input syntax for type interval"),
        (("sales", "--max-age", "1 hour", "--json"), "--json does not ask"),
    ):
        said = listener("views", "alter", *arguments, url=url)
        assert said.returncode == 1
        assert what in said.stderr
        assert len(said.stderr.splitlines()) == 1, said.stderr
    # The service's role may look at nothing of this.
    assert (
        "member of listener_owner" in listener("views", "alter", "sales", "--max-age", "1 hour", url=shop.url()).stderr
    )


async def test_a_key_and_a_time_zone_alone_may_change_too(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, "GRANT SELECT ON shop.orders TO shop_app")
    done = listener("views", "alter", "sales", "--key", "product,orders", "--timezone", "Europe/Berlin", "-y",
                    url=shop.url("listener_migrator"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = "SELECT key_columns::text[], time_zone, query FROM listener.managed_view"
    assert await rows(superuser, found) == [(["tenant_id", "product", "orders"], "Europe/Berlin", SALES)]
    assert await differences(superuser, "sales") == []


async def test_a_tenant_that_comes_after_the_fill_is_filled_before_the_swap(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    newcomer = "44444444-4444-4444-8444-444444444444"
    async with shop.connect("listener_migrator") as migrator:
        async with alter.begun(migrator, "sales", {"query": CHANGED}) as beside:
            await settle(service)
            await superuser.execute("INSERT INTO shop.tenants VALUES (%s)", (newcomer,))
            async with application(shop, newcomer) as app:
                await order(app, newcomer, "n")
            done = await alter.finish(migrator, "sales", beside, lambda _: None)
        assert done.attempts == 1
    assert await one(superuser, "SELECT product FROM sales WHERE tenant_id = %s", newcomer) == "n"


async def test_whoever_is_cancelled_leaves_nothing_beside(shop: Database, superuser: AsyncConnection[Any]) -> None:
    before = await traces(superuser)

    async def let_it_go() -> None:
        # Only once it is waited for: until then nothing could have been taken back.
        waiting = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory' AND query LIKE '%abort_alter%'"
        await eventually(lambda: one(superuser, waiting))
        await superuser.execute("SELECT pg_advisory_unlock(listener.lock_key(0, 'registration'))")

    async with shop.connect("listener_migrator") as migrator, anyio.create_task_group() as tasks:
        with anyio.CancelScope() as scope:
            async with alter.begun(migrator, "sales", {"query": CHANGED}):
                assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 2
                await superuser.execute("SELECT pg_advisory_lock(listener.lock_key(0, 'registration'))")
                tasks.start_soon(let_it_go)
                scope.cancel()
                await anyio.sleep_forever()
    assert await traces(superuser) == before


@pytest.mark.parametrize("moment", ["before it is compared", "before the swap"])
async def test_of_two_who_alter_the_same_view_the_one_who_began_last_goes_on(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], moment: str
) -> None:
    other = SALES.replace("sum(quantity)", "1 + sum(quantity)")
    async with shop.connect("listener_migrator") as migrator, shop.connect("listener_migrator") as late:
        with pytest.raises(SetupError, match="somebody else altered sales"):  # noqa: PT012  # he begins in the middle
            async with alter.begun(migrator, "sales", {"query": CHANGED}) as first:
                await settle(service)
                await late.execute("SELECT listener.begin_alter('sales', %s)", (other,))
                await settle(service)
                if moment == "before the swap":
                    await alter.finish(migrator, "sales", first, lambda _: None)
                else:
                    await migrator.execute("SELECT listener.compare_alter('sales', 'no uuid')")
        await late.execute("SELECT listener.finish_alter('sales')")
    assert await one(superuser, "SELECT query FROM listener.managed_view") == other
    assert await differences(superuser, "sales") == []
