"""Views that are not refreshed by tenant, into a table or a materialized view; and keys that are the whole row."""

from __future__ import annotations

import random
from typing import Any

import psycopg
import pytest
from psycopg import AsyncConnection

from command import listener
from conftest import Database
from shop import (
    ANNA,
    BERT,
    TRACES,
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

RANKING = """
    SELECT tenant_id, sum(quantity) AS quantity, rank() OVER (ORDER BY sum(quantity) DESC) AS place
    FROM shop.orders GROUP BY tenant_id
"""
LET_THE_SERVICE_READ = "CREATE POLICY listener_reads ON shop.orders FOR SELECT TO listener_service USING (true)"


@pytest.fixture
async def shop(shop: Database) -> Database:
    """With a materialized view, as a team has it: its owner reads every tenant."""
    async with shop.connect() as superuser:
        await define(superuser, "CREATE POLICY owner_reads ON shop.orders FOR SELECT TO shop_owner USING (true)")
        await define(superuser, f"CREATE MATERIALIZED VIEW shop.ranking AS {RANKING}")
    return shop


async def whole(shop: Database, name: str, query: str, keys: list[str], **options: Any) -> None:
    await create_view(shop, name, query, keys, tenant_column=None, tenants_query=None, **options)


async def test_a_view_without_tenants_is_one_key_whoever_writes(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, LET_THE_SERVICE_READ)
    await whole(shop, "places", RANKING, ["tenant_id"])
    assert await settle(service) == 0  # expand() does it for a service of an older release
    for tenant, quantity in ((ANNA, 1), (BERT, 2)):
        async with application(shop, tenant) as app:
            await order(app, tenant, "a", quantity)
    drained = await rows(service, "SELECT view_name, tenant, bulk FROM listener.drain()")
    assert drained == [("places", "", False)]
    assert await one(service, "SELECT stale FROM listener.compare('places', NULL)") is True
    done = "SELECT outcome, inserted, updated, deleted FROM listener.refresh_key('places', '')"
    assert await rows(service, done) == [("refreshed", 2, 0, 0)]
    assert await one(service, "SELECT stale FROM listener.compare('places', NULL)") is False
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a", 5)
        # Logged and not drained: of a tenant, which the one key is not.
        assert await one(service, "SELECT stale FROM listener.compare('places', NULL)") is True
        assert await one(service, "SELECT undrained FROM listener.explain_key('places', NULL)") == 1
    await service.execute("SELECT listener.drain()")
    assert await rows(service, done) == [("refreshed", 0, 2, 0)]
    assert await rows(superuser, "SELECT tenant_id::text, place FROM places ORDER BY place") == [(ANNA, 1), (BERT, 2)]
    assert await differences(superuser, "places") == []
    # Whichever tenant is named: its rows are the whole view's.
    assert await one(service, "SELECT outcome FROM listener.refresh('places', %s::text)", ANNA) == "refreshed"
    assert await rows(service, "SELECT tenant_id, status FROM listener.freshness") == [("", "fresh")]


async def test_the_running_service_keeps_it_fresh_and_old_age_refreshes_it(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await define(superuser, LET_THE_SERVICE_READ)
    await whole(shop, "places", RANKING, ["tenant_id"], max_age="1 hour")
    async with shop.service() as running:
        await running.until_refreshed("places", "")
        known = len(running.outcomes)
        async with application(shop, ANNA) as app:
            await order(app, ANNA, "a", 5)
        assert (await running.until_refreshed("places", "", after=known)).inserted == 1
    await superuser.execute("UPDATE listener.refresh_state SET refreshed_at = now() - interval '2 hours'")
    aged = "SELECT view_name, tenant FROM listener.pending_keys(true) WHERE outcome = 'aged'"
    assert await rows(superuser, aged) == [("places", "")]


async def test_what_row_level_security_hides_from_the_service_cannot_be_computed_as_a_whole(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    before = await rows(superuser, TRACES)
    with pytest.raises(psycopg.Error, match=r"row-level security hides rows of shop\.orders") as refused:
        await whole(shop, "places", RANKING, ["tenant_id"])
    assert refused.value.sqlstate == "LSN03"
    assert "CREATE POLICY listener_reads ON shop.orders" in str(refused.value.diag.message_hint)
    assert await rows(superuser, TRACES) == before


@pytest.mark.parametrize("options", [{"tenants_query": "SELECT 1"}, {"tenants_query": None, "target_rls": True}])
async def test_a_view_without_tenants_takes_nothing_that_is_for_tenants(
    shop: Database, options: dict[str, Any]
) -> None:
    with pytest.raises(psycopg.Error, match="has neither a tenants_query nor target_rls"):
        await create_view(shop, "places", RANKING, ["tenant_id"], tenant_column=None, **options)


async def test_both_kinds_of_view_share_the_triggers_of_a_table(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await define(superuser, LET_THE_SERVICE_READ)
    await whole(shop, "places", RANKING, ["tenant_id"])
    await create_view(shop, "sales", "SELECT tenant_id, count(*) AS n FROM shop.orders GROUP BY 1", ["tenant_id"])
    await whole(shop, "more", RANKING, ["tenant_id"])
    sources = "SELECT tenant_column FROM listener.source WHERE table_name = 'orders'"
    assert await rows(superuser, sources) == [("tenant_id",)]


ODD = """
    SELECT o.tenant_id, o.product, json_build_object('p', o.product) AS document, point(o.quantity, 1) AS spot
    FROM shop.orders o
"""


async def test_the_whole_row_is_the_key_and_equal_rows_stand_there_as_often_as_they_are(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    seed = random.randrange(2**32)
    print("seed", seed)
    chosen = random.Random(seed)
    await create_view(shop, "odd", ODD, [])
    await settle(service)
    assert await one(superuser, "SELECT count(*) FROM pg_index WHERE indrelid = 'odd'::regclass AND indisunique") == 0
    for _ in range(12):
        tenant = chosen.choice((ANNA, BERT))
        async with application(shop, tenant) as app:
            for _ in range(chosen.randint(1, 5)):
                await order(app, tenant, chosen.choice((None, "", "a", "NULL", '",')), chosen.randint(1, 2))
            some = "DELETE FROM shop.orders WHERE id IN (SELECT id FROM shop.orders ORDER BY random() LIMIT %s)"
            await app.execute(some, (chosen.randint(0, 4),))
            await app.execute(
                "UPDATE shop.orders SET quantity = 3 - quantity WHERE id %% %s = 0", (chosen.randint(2, 5),)
            )
        await settle(service)
        text = "SELECT tenant_id, product, document::text, spot::text FROM"
        assert await rows(superuser, f"({text} ({ODD}) d EXCEPT ALL {text} odd)") == []
        assert await rows(superuser, f"({text} odd EXCEPT ALL {text} ({ODD}) d)") == []
    # Nothing changed, so nothing is written.
    done = "SELECT inserted, updated, deleted FROM listener.refresh('odd', %s::text)"
    assert await rows(service, done, ANNA) == [(0, 0, 0)]
    assert await rows(service, "SELECT missing, extra FROM listener.compare('odd', %s::text)", ANNA) == [(0, 0)]


async def keep(shop: Database, arguments: str) -> list[str]:
    """keep_materialized_view; the notices."""
    notices: list[str] = []
    async with shop.connect("listener_migrator") as migrator:
        migrator.add_notice_handler(lambda diagnostic: notices.append(str(diagnostic.message_primary)))
        await migrator.execute(f"SELECT listener.keep_materialized_view({arguments})")
    return notices


@pytest.mark.parametrize("indexes", [1, 0])
async def test_a_materialized_view_is_refreshed_as_a_whole_by_its_owner(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any], indexes: int
) -> None:
    if indexes:
        await define(superuser, "CREATE UNIQUE INDEX ON shop.ranking (tenant_id)")
    notices = await keep(shop, "'shop.ranking'")
    assert notices == (
        [] if indexes else ["shop.ranking has no unique index on columns alone: its readers wait for each refresh"]
    )
    window = "SELECT quiet_period::text, max_wait::text, edge FROM listener.managed_view"
    assert await rows(superuser, window) == [("00:01:00", "00:05:00", "trailing")]
    await settle(service)
    for tenant in (ANNA, BERT):
        async with application(shop, tenant) as app:
            await order(app, tenant, "a", len(tenant))
            await app.execute("UPDATE shop.orders SET quantity = quantity + 1")
    assert await rows(service, "SELECT view_name, tenant FROM listener.drain()") == [("ranking", "")]
    assert await rows(service, "SELECT missing, stale FROM listener.compare('ranking', NULL)") == [(2, True)]
    # A concurrent refresh takes a lock that readers do not meet.
    async with shop.connect(autocommit=False) as reader:
        await reader.execute("SELECT count(*) FROM shop.ranking")
        if indexes:
            assert await one(service, "SELECT outcome FROM listener.refresh('ranking', NULL)") == "refreshed"
    assert await one(service, "SELECT outcome FROM listener.refresh('ranking', NULL)") == "refreshed"
    assert await one(superuser, "SELECT count(*) FROM shop.ranking") == 2
    assert await rows(service, "SELECT missing, extra, stale FROM listener.compare('ranking', NULL)") == [(0, 0, False)]
    # The service may refresh it, and nothing else of its owner's.
    assert await one(superuser, "SELECT pg_has_role('listener_service', 'shop_owner', 'MEMBER')") is False


async def test_a_view_that_was_never_filled_is(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await define(superuser, "CREATE UNIQUE INDEX ON shop.ranking (tenant_id)")
    await define(superuser, "REFRESH MATERIALIZED VIEW shop.ranking WITH NO DATA")
    await keep(shop, "'shop.ranking'")
    await settle(service)
    assert await one(superuser, "SELECT relispopulated FROM pg_class WHERE oid = 'shop.ranking'::regclass") is True


async def test_it_stays_when_it_is_no_longer_managed(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await keep(shop, "'shop.ranking', quiet_period => '1 s', max_wait => '2 s', edge => 'leading'")
    await settle(service)
    with pytest.raises(psycopg.Error, match="managed already"):
        await keep(shop, "'shop.ranking'")
    async with shop.connect("listener_migrator") as migrator:
        with pytest.raises(psycopg.Error, match="is there"):
            await migrator.execute("SELECT listener.restore_target('ranking')")
        await migrator.execute("SELECT listener.drop_view('ranking')")
    assert await one(superuser, "SELECT count(*) FROM shop.ranking") == 0
    assert await rows(superuser, "SELECT tgname FROM pg_trigger WHERE tgname LIKE 'listener%'") == []
    await keep(shop, "'shop.ranking'")
    assert listener("uninstall", "--yes", "--drop-targets", url=shop.url("listener_migrator")).returncode == 0
    assert await one(superuser, "SELECT count(*) FROM shop.ranking") == 0


async def test_one_that_is_dropped_is_named_and_others_go_on(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await keep(shop, "'shop.ranking'")
    await settle(service)
    await superuser.execute("DROP MATERIALIZED VIEW shop.ranking")
    assert await rows(service, "SELECT listener.readiness()") == [
        ("the materialized view shop.ranking is gone: create it again, or SELECT listener.drop_view('ranking')",)
    ]
    await define(superuser, f"CREATE MATERIALIZED VIEW shop.ranking AS {RANKING}")
    assert await rows(service, "SELECT listener.readiness()") == []
    assert await one(service, "SELECT outcome FROM listener.refresh('ranking', NULL)") == "refreshed"


async def test_one_that_is_made_anew_of_another_query_is_refreshed_when_what_that_reads_changes(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    paid = "SELECT tenant_id, sum(cents) AS quantity, 1::bigint AS place FROM shop.payments GROUP BY 1"
    await keep(shop, "'shop.ranking'")
    await settle(service)
    await define(superuser, "CREATE POLICY owner_reads ON shop.payments FOR SELECT TO shop_owner USING (true)")
    for query in (paid, "SELECT tenant_id, count(*) AS n FROM shop.payments GROUP BY 1"):
        await define(
            superuser, f"DROP MATERIALIZED VIEW shop.ranking; CREATE MATERIALIZED VIEW shop.ranking AS {query}"
        )
        assert await rows(service, "SELECT listener.readiness()") == []
        assert await rows(service, "SELECT * FROM listener.changed_definitions()") == [("ranking", None)]
        assert await rows(service, "SELECT * FROM listener.changed_definitions()") == []
        await settle(service)
        async with application(shop, ANNA) as app:
            await app.execute("INSERT INTO shop.payments (tenant_id, cents) VALUES (%s, 7)", (ANNA,))
        await settle(service)
        assert await differences(superuser, "ranking") == []
        assert await rows(service, "SELECT missing, extra, stale FROM listener.compare('ranking', NULL)") == [
            (0, 0, False)
        ]
    # What it read before is of no interest any more.
    async with application(shop, BERT) as app:
        await order(app, BERT, "a")
    assert await rows(service, "SELECT view_name FROM listener.drain() WHERE view_name IS NOT NULL") == []


async def test_a_column_that_has_the_name_of_one_of_ours_is_refused(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    before = await rows(superuser, TRACES)
    for name in ("listener.row", "listener.n"):
        query = 'SELECT tenant_id, product AS "odd" FROM shop.orders'.replace("odd", name)
        with pytest.raises(psycopg.Error, match=f'no column may be called "{name}"'):
            await create_view(shop, "odd", query, [])
    assert await rows(superuser, TRACES) == before


@pytest.mark.parametrize(
    ("relation", "refusal"),
    [("shop.orders", "shop.orders is no materialized view"), ("public.theirs", "only postgres, who owns it")],
)
async def test_what_cannot_be_kept_is_refused(
    shop: Database, superuser: AsyncConnection[Any], relation: str, refusal: str
) -> None:
    await superuser.execute("CREATE MATERIALIZED VIEW public.theirs AS SELECT 1 AS x")
    before = await rows(superuser, TRACES)
    with pytest.raises(psycopg.Error, match=refusal) as refused:
        await keep(shop, f"'{relation}'")
    assert refused.value.sqlstate == "LSN03"
    assert await rows(superuser, TRACES) == before


async def test_the_commands_know_a_view_without_tenants(
    shop: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]
) -> None:
    await keep(shop, "'shop.ranking'")
    await create_view(shop, "sales", "SELECT tenant_id, count(*) AS n FROM shop.orders GROUP BY 1", ["tenant_id"])
    await settle(service)
    async with application(shop, ANNA) as app:
        await order(app, ANNA, "a")
    url = shop.url()
    explained = listener("explain", "ranking", url=url)
    assert explained.stdout.startswith("ranking: stale"), explained
    assert "1 logged change is not drained yet" in explained.stdout
    verified = listener("verify", "ranking", "--json", url=url)
    assert verified.returncode == 1
    assert '"verdict": "stale"' in verified.stdout
    refreshed = listener("refresh", "ranking", url=url)
    assert refreshed.stdout.startswith("outcome refreshed"), refreshed
    assert listener("sweep", url=url).returncode == 0
    assert listener("verify", url=url).returncode == 0
    assert listener("explain", "ranking", url=url).stdout.startswith("ranking: fresh")
    for command in ("explain", "refresh"):
        said = listener(command, "sales", url=url)
        assert said.returncode == 1
        assert "--tenant ID" in said.stderr
