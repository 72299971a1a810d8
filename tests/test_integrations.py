"""What docs/integrations.md tells applications to do, done."""

from __future__ import annotations

import re
from pathlib import Path
from textwrap import dedent
from typing import Any

import pytest
from alembic.autogenerate import produce_migrations
from alembic.migration import MigrationContext
from alembic.operations.ops import DropTableOp
from psycopg import AsyncConnection
from sqlalchemy import Column, MetaData, Table, Uuid, create_engine, text

from conftest import Database
from listener.database_url import libpq_url
from shop import ANNA, BERT, application, create_view, one, order, rows, settle

pytestmark = pytest.mark.anyio
PAGE = (Path(__file__).parents[1] / "docs/integrations.md").read_text()
QUERY = "SELECT tenant_id, count(*) AS orders FROM shop.orders GROUP BY tenant_id"


def block(beginning: str) -> str:
    """The indented block of the page that has this line."""
    found = [b for b in re.findall(r"(?:^    .*\n|^\n(?=    ))+", PAGE, re.MULTILINE) if beginning in b]
    assert len(found) == 1, beginning
    return dedent(found[0])


def engine_url(database: Database, user: str) -> str:
    """As SQLAlchemy takes it."""
    return re.sub(r"^postgresql://", "postgresql+psycopg://", libpq_url(database.url(user)))


@pytest.fixture
async def shop(shop: Database) -> Database:
    await create_view(shop, "mv_revenue", QUERY, ["tenant_id"])
    async with shop.connect() as superuser, shop.connect("listener_service") as service:
        await settle(service)
        await superuser.execute(block("GRANT EXECUTE ON FUNCTION listener.refresh").replace("app_role", "shop_app"))
        await superuser.execute("GRANT SELECT ON mv_revenue TO shop_app")
    return shop


async def test_the_one_call_shows_what_its_own_transaction_wrote(shop: Database) -> None:
    async with application(shop, ANNA, autocommit=False) as app:
        await order(app, ANNA, "a")
        call = block("SELECT outcome FROM listener.refresh('mv_revenue', '1111")
        assert await rows(app, call) == [("refreshed",)]
        assert await rows(app, "SELECT orders FROM mv_revenue") == [(1,)]
        await app.rollback()


async def test_the_call_of_sqlalchemys_session_is_made(shop: Database) -> None:
    statement = re.search(r'text\("(SELECT outcome [^"]+)"\)', PAGE)
    assert statement is not None
    # The page's session is asyncio's; what it sends is the same.
    engine = create_engine(engine_url(shop, "shop_app"))
    with engine.begin() as connection:
        connection.execute(text("SELECT set_config('app.current_tenant_id', :tenant, true)"), {"tenant": BERT})
        connection.execute(text("INSERT INTO shop.orders (tenant_id) VALUES (:tenant)"), {"tenant": BERT})
        assert connection.execute(text(statement[1]), {"tenant": BERT}).all() == [("refreshed",)]
        assert connection.execute(text("SELECT orders FROM mv_revenue")).all() == [(1,)]
    engine.dispose()


async def test_autogenerate_drops_no_target(shop: Database, superuser: AsyncConnection[Any]) -> None:
    await superuser.execute(
        """
        DROP TABLE shop.spots; -- a type that SQLAlchemy does not know
        CREATE TABLE public.unknown (x int); CREATE TABLE public.known (id uuid);
        GRANT USAGE ON SCHEMA listener TO shop_app; GRANT SELECT ON listener.managed_view TO shop_app;
        """
    )
    metadata = MetaData()
    Table("known", metadata, Column("id", Uuid))
    page = block("def run_migrations_online")
    body = page[page.index("        targets = {") : page.index("        context.configure")]
    engine = create_engine(engine_url(shop, "shop_app"))
    with engine.connect() as connection:
        scope: dict[str, Any] = {"connection": connection, "text": text}
        exec(dedent(body), scope)  # noqa: S102 - the page's own lines

        def dropped(**options: Any) -> set[str]:
            context = MigrationContext.configure(connection, opts={"target_metadata": metadata, **options})
            found = produce_migrations(context, metadata).upgrade_ops
            assert found is not None
            return {op.table_name for op in found.ops if isinstance(op, DropTableOp)}

        assert dropped() == {"unknown", "mv_revenue"}
        assert dropped(include_object=scope["include_object"]) == {"unknown"}
        names = {name: scope[name] for name in ("include_object", "include_name")}
        everywhere = dropped(**names, include_schemas=True)
        assert everywhere == {"unknown", "tenants", "orders", "payments", "prices", "secret", "plain", "days"}
    engine.dispose()


async def test_a_view_is_made_and_dropped_by_the_calls_of_a_migration(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await superuser.execute(
        """
        CREATE TABLE public.tenants (id uuid);
        CREATE TABLE public.orders (tenant_id uuid, currency text, cents bigint);
        ALTER TABLE public.orders OWNER TO shop_owner;
        GRANT SELECT ON public.tenants, public.orders TO listener_service;
        """
    )
    page = block("def upgrade() -> None:")
    made = re.search(r'op\.execute\("""(.*?)"""\)', page, re.DOTALL)
    gone = re.search(r'op\.execute\("(SELECT listener.drop_view[^"]*)"\)', page)
    assert made is not None
    assert gone is not None
    async with shop.connect("listener_migrator") as migrator:
        await migrator.execute("SELECT listener.drop_view('mv_revenue')")
        await migrator.execute(made[1])
        assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 1
        await migrator.execute(gone[1])
    assert await one(superuser, "SELECT count(*) FROM listener.managed_view") == 0
