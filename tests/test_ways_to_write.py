"""Every way that PostgreSQL has to write a row, from the application's statement to the target."""

from __future__ import annotations

from typing import Any, LiteralString

import psycopg
import pytest
from psycopg import AsyncConnection, sql

from captured import OFFICE, emptied, logged, reaches, statement
from conftest import Database
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
    rows,
    settle,
)

pytestmark = pytest.mark.anyio

BASKETS: LiteralString = """
    CREATE TABLE shop.baskets (id int PRIMARY KEY, tenant_id uuid NOT NULL, UNIQUE (tenant_id, id));
    CREATE TABLE shop.items (id int PRIMARY KEY, tenant_id uuid NOT NULL, basket_id int, cents bigint);
    CREATE TABLE shop.notices (tenant_id uuid, title text);
    GRANT ALL ON shop.baskets, shop.items, shop.notices TO shop_app;
    GRANT SELECT ON shop.baskets, shop.items, shop.notices TO listener_service;
    INSERT INTO shop.baskets SELECT row_number() OVER (ORDER BY id), id FROM shop.tenants;
    INSERT INTO shop.items SELECT id, tenant_id, id, 100 FROM shop.baskets;
"""
CONTENTS = "SELECT tenant_id, basket_id, sum(cents)::bigint AS cents FROM shop.items GROUP BY 1, 2"
# A notice without a tenant is everybody's.
NOTICES = """
    SELECT t.id AS tenant_id, count(n.title) AS notices
    FROM shop.tenants t LEFT JOIN shop.notices n ON n.tenant_id = t.id OR n.tenant_id IS NULL GROUP BY 1
"""


@pytest.fixture
async def shop(database: Database) -> Database:
    await open_shop(database)
    async with database.connect() as superuser:
        await superuser.execute("GRANT SELECT ON shop.tenants TO shop_owner")
        await define(superuser, OFFICE)
        await define(superuser, BASKETS)
        await superuser.execute(
            statement("INSERT INTO shop.orders (tenant_id, product) VALUES ({anna}, 'a'), ({bert}, 'a')")
        )
    await create_view(database, "sales", SALES, ["product"])
    await create_view(database, "balance", BALANCE, ["product"])
    await create_view(database, "contents", CONTENTS, ["basket_id"])
    await create_view(database, "noticeboard", NOTICES, [])
    return database


@pytest.fixture
async def office(shop: Database) -> Any:
    """A session of the application that may write for every tenant."""
    async with application(shop, ANNA) as app:
        await app.execute("SET app.office = 'on'")
        yield app


async def test_insert_on_conflict_do_update(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", {"orders of bert", "orders of cleo"}):
        (bert_has,) = await rows(office, "SELECT id FROM shop.orders WHERE tenant_id = %s", BERT)
        await office.execute(
            """INSERT INTO shop.orders (id, tenant_id, product) OVERRIDING SYSTEM VALUE
               SELECT v.id, v.tenant, 'a' FROM (VALUES (%s, %s::uuid), (1000, %s)) AS v (id, tenant)
               ON CONFLICT (id) DO UPDATE SET quantity = 7""",
            (bert_has[0], ANNA, CLEO),
        )


async def test_merge(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", {"orders of anna", "orders of bert", "orders of cleo"}):
        await office.execute(
            statement(
                """MERGE INTO shop.orders o
                   USING (VALUES ({anna}::uuid, 'change'), ({bert}, 'remove'), ({cleo}, 'add')) AS v (tenant, what)
                   ON o.tenant_id = v.tenant
                   WHEN MATCHED AND v.what = 'change' THEN UPDATE SET quantity = 5
                   WHEN MATCHED THEN DELETE
                   WHEN NOT MATCHED THEN INSERT (tenant_id, product) VALUES (v.tenant, 'new')"""
            )
        )
    assert await rows(superuser, "SELECT quantity FROM public.sales ORDER BY 1") == [(1,), (5,)]


async def test_merge_of_one_arm_says_nothing_of_the_others(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", {"orders of bert"}):
        await office.execute(
            statement(
                """MERGE INTO shop.orders o USING (VALUES ({anna}::uuid, false), ({bert}, true)) AS v (tenant, go)
                   ON o.tenant_id = v.tenant WHEN MATCHED AND v.go THEN DELETE"""
            )
        )


async def test_copy(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with (
        reaches(superuser, service, "contents", {"items of anna", "items of cleo"}),
        office.cursor() as cursor,
        cursor.copy("COPY shop.items FROM STDIN") as copy,
    ):
        for number in range(100, 200):
            await copy.write_row((number, ANNA if number % 2 else CLEO, 1, 5))


async def test_update_from_another_table(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "contents", {"items of bert"}):
        await office.execute(
            statement(
                """UPDATE shop.items i SET cents = i.cents * 2 FROM shop.baskets b
                   WHERE b.id = i.basket_id AND b.tenant_id = {bert}"""
            )
        )


@pytest.mark.parametrize(
    ("action", "write", "expected"),
    [
        ("ON DELETE CASCADE", "DELETE FROM shop.baskets WHERE id = 2", {"items of bert"}),
        ("ON DELETE SET NULL (basket_id)", "DELETE FROM shop.baskets WHERE id = 2", {"items of bert"}),
        (
            "ON UPDATE CASCADE",
            "UPDATE shop.baskets SET tenant_id = {cleo} WHERE id = 2",
            {"items of bert", "items of cleo"},
        ),
    ],
)
async def test_a_cascading_foreign_key(
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    office: AsyncConnection[Any],
    action: LiteralString,
    write: LiteralString,
    expected: set[str],
) -> None:
    await define(
        superuser,
        "ALTER TABLE shop.items ADD FOREIGN KEY (tenant_id, basket_id) REFERENCES shop.baskets (tenant_id, id) "
        + action,
    )
    async with reaches(superuser, service, "contents", expected):
        await office.execute(statement(write))


async def test_a_foreign_key_that_cascades_within_one_table(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    await define(
        superuser, "ALTER TABLE shop.items ADD FOREIGN KEY (basket_id) REFERENCES shop.items ON DELETE CASCADE"
    )
    await superuser.execute("UPDATE shop.items SET basket_id = nullif(id - 1, 0)")
    async with reaches(superuser, service, "contents", {"items of anna", "items of bert", "items of cleo"}):
        await office.execute("DELETE FROM shop.items WHERE id = 1")
    assert await one(superuser, "SELECT count(*) FROM public.contents") == 0


async def test_truncate_cascade(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    await define(superuser, "ALTER TABLE shop.items ADD FOREIGN KEY (basket_id) REFERENCES shop.baskets")
    async with reaches(superuser, service, "contents", {"items of all"}):
        await office.execute("TRUNCATE shop.baskets CASCADE")
    assert await one(superuser, "SELECT count(*) FROM public.contents") == 0


@pytest.mark.parametrize(
    "write",
    [
        """WITH first AS (INSERT INTO shop.orders (tenant_id, product) VALUES ({anna}, 'b')),
                second AS (INSERT INTO shop.orders (tenant_id, product) VALUES ({bert}, 'b'))
           INSERT INTO shop.orders (tenant_id, product) VALUES ({cleo}, 'b')""",
        """WITH first AS (UPDATE shop.orders SET quantity = 2 WHERE tenant_id = {anna}),
                second AS (UPDATE shop.orders SET tenant_id = {cleo} WHERE tenant_id = {bert})
           SELECT 1""",
        """WITH first AS (DELETE FROM shop.orders WHERE tenant_id = {anna}),
                second AS (INSERT INTO shop.orders (tenant_id, product) VALUES ({cleo}, 'b'))
           UPDATE shop.orders SET quantity = 9 WHERE tenant_id = {bert}""",
    ],
    ids=["the same way", "updates", "each in its own way"],
)
async def test_several_writes_to_one_table_in_one_statement(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any], write: LiteralString
) -> None:
    async with reaches(superuser, service, "sales", {"orders of anna", "orders of bert", "orders of cleo"}):
        await office.execute(statement(write))


async def test_writes_to_two_tables_in_one_statement(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "balance", {"orders of anna", "payments of bert"}):
        await office.execute(
            statement(
                """WITH gone AS (DELETE FROM shop.orders WHERE tenant_id = {anna} RETURNING product)
                   INSERT INTO shop.payments (tenant_id, product, cents) SELECT {bert}, product, 5 FROM gone"""
            )
        )


async def test_a_write_by_a_trigger_of_the_application(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    await define(
        superuser,
        """
        CREATE FUNCTION shop.pay() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            INSERT INTO shop.payments (tenant_id, product, cents) VALUES (NEW.tenant_id, NEW.product, 5);
            RETURN NEW;
        END $$;
        CREATE TRIGGER pay BEFORE INSERT ON shop.orders FOR EACH ROW EXECUTE FUNCTION shop.pay();
        """,
    )
    async with reaches(superuser, service, "balance", {"orders of cleo", "payments of cleo"}):
        await office.execute(statement("INSERT INTO shop.orders (tenant_id, product) VALUES ({cleo}, 'b')"))


async def test_a_savepoint_that_was_rolled_back(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", {"orders of bert"}), office.transaction():
        async with office.transaction(force_rollback=True):
            await office.execute(statement("INSERT INTO shop.orders (tenant_id, product) VALUES ({anna}, 'b')"))
        await office.execute(statement("INSERT INTO shop.orders (tenant_id, product) VALUES ({bert}, 'b')"))


async def test_a_block_with_an_exception_that_was_rolled_back(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", {"orders of anna", "orders of cleo"}):
        await office.execute(
            statement(
                """
                DO $$ BEGIN
                    INSERT INTO shop.orders (tenant_id, product) VALUES ({anna}, 'b');
                    BEGIN
                        INSERT INTO shop.orders (tenant_id, product) VALUES ({bert}, 'b');
                        PERFORM 1 / 0;
                    EXCEPTION WHEN division_by_zero THEN
                        BEGIN
                            DELETE FROM shop.orders WHERE tenant_id = {bert};
                            RAISE 'no';
                        EXCEPTION WHEN raise_exception THEN
                            INSERT INTO shop.orders (tenant_id, product) VALUES ({cleo}, 'b');
                        END;
                    END;
                END $$
                """
            )
        )


async def test_a_transaction_that_was_rolled_back(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "sales", set(), seen=False), office.transaction(force_rollback=True):
        await office.execute("DELETE FROM shop.orders")


async def test_rows_without_a_tenant(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    async with reaches(superuser, service, "noticeboard", {"notices of all"}):
        await office.execute("INSERT INTO shop.notices VALUES (NULL, 'closed on Monday')")
    async with reaches(superuser, service, "noticeboard", {"notices of all", "notices of bert"}):
        await office.execute("UPDATE shop.notices SET tenant_id = %s", (BERT,))
    assert await rows(superuser, "SELECT notices FROM public.noticeboard ORDER BY 1") == [(0,), (0,), (1,)]


async def test_a_session_that_applies_a_replicas_writes(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], shop: Database
) -> None:
    async with reaches(superuser, service, "sales", {"orders of anna", "orders of bert"}), shop.connect() as applying:
        await applying.execute("SET session_replication_role = replica")
        await applying.execute("INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'b')", (ANNA,))
        await applying.execute("DELETE FROM shop.orders WHERE tenant_id = %s", (BERT,))


@pytest.mark.parametrize(
    ("tenant", "other", "through"),
    [("VIRTUAL", "STORED", None), ("STORED", "VIRTUAL", None), ("STORED", "VIRTUAL", "shop.baskets")],
    ids=["of the tenant", "of another column", "of a look-up"],
)
async def test_a_table_with_virtual_generated_columns_is_captured_unless_a_trigger_would_have_to_read_them(
    shop: Database,
    superuser: AsyncConnection[Any],
    service: AsyncConnection[Any],
    office: AsyncConnection[Any],
    tenant: LiteralString,
    other: LiteralString,
    through: str | None,
) -> None:
    if superuser.info.server_version < 18_00_00:
        return  # it has no such columns
    await define(
        superuser,
        sql.SQL(
            """CREATE TABLE shop.docs (
                   doc jsonb,
                   tenant_id uuid GENERATED ALWAYS AS ((doc ->> 'tenant')::uuid) {},
                   basket_id int GENERATED ALWAYS AS ((doc ->> 'basket')::int) {});
               GRANT ALL ON shop.docs TO shop_app; GRANT SELECT ON shop.docs TO listener_service"""
        ).format(sql.SQL(tenant), sql.SQL(other)),
    )
    if tenant == "VIRTUAL" or through:
        with pytest.raises(psycopg.Error, match="virtual generated column") as raised:
            await superuser.execute(
                """SELECT listener.add_source('shop.docs', 'tenant_id', through => %s::regclass,
                     columns => CASE WHEN %s::text IS NULL THEN NULL ELSE '{basket_id}'::name[] END,
                     references_columns => '{id}')""",
                (through, through),
            )
        assert raised.value.sqlstate == "LSN03"
        await superuser.execute("SELECT listener.add_source('shop.docs')")
    await create_view(shop, "docs_of", "SELECT tenant_id, count(*) FROM shop.docs GROUP BY 1", [])
    by_name = tenant == "STORED" and not through
    async with reaches(superuser, service, "docs_of", {"docs of anna"} if by_name else {"docs of all"}):
        await office.execute("INSERT INTO shop.docs VALUES (jsonb_build_object('tenant', %s::text))", (ANNA,))
    both = {"docs of anna", "docs of bert"}
    async with reaches(superuser, service, "docs_of", both if by_name else {"docs of all"}):
        await office.execute("UPDATE shop.docs SET doc = jsonb_build_object('tenant', %s::text)", (BERT,))


async def test_a_publication_for_all_tables_beside_us(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    async with reaches(superuser, service, "sales", {"orders of bert"}):
        await office.execute("UPDATE shop.orders SET quantity = 2 WHERE tenant_id = %s", (BERT,))
    # The filling of a view, a change of all tenants, is expanded.
    async with reaches(superuser, service, "sales", {"orders of all"}):
        await office.execute("TRUNCATE shop.orders")
    await office.execute("INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'b')", (ANNA,))
    await settle(service)
    await superuser.execute("UPDATE listener.drain_log SET drained_at = drained_at - interval '2 hours'")
    await office.execute("INSERT INTO shop.orders (tenant_id, product) VALUES (%s, 'b')", (ANNA,))
    await settle(service)
    counts = "SELECT (SELECT count(*) FROM listener.dirty_key), (SELECT count(*) FROM listener.drain_log)"
    before = await rows(superuser, counts)
    assert await one(service, "SELECT listener.purge()") > 0
    after = await rows(superuser, counts)
    assert after[0][0] < before[0][0]
    assert after[0][1] < before[0][1]
    assert await differences(superuser, "sales") == []


async def test_a_publication_for_all_tables_would_refuse_the_purge_of_a_log_without_replica_identity(
    superuser: AsyncConnection[Any], service: AsyncConnection[Any], office: AsyncConnection[Any]
) -> None:
    await emptied(superuser, service)
    await superuser.execute("SET client_min_messages = error")
    await superuser.execute("CREATE PUBLICATION everything FOR ALL TABLES")
    await superuser.execute("ALTER TABLE listener.change_log REPLICA IDENTITY DEFAULT")
    await office.execute("DELETE FROM shop.orders")
    assert await logged(superuser) == {"orders of anna", "orders of bert"}
    await settle(service)
    with pytest.raises(psycopg.errors.ObjectNotInPrerequisiteState, match="change_log"):
        await service.execute("SELECT listener.purge()")
