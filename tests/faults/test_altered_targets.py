"""A target dropped or altered by hand: writes and other views go on, and what the service says mends it."""

from __future__ import annotations

from typing import Any, LiteralString, NamedTuple

import pytest
from psycopg import AsyncConnection

from conftest import Database, eventually
from on_call import explained, is_exact, open_letters, pauses_and_resumes
from shop import ANNA, BERT, SALES, application, create_view, one, order

pytestmark = pytest.mark.anyio

PAID = "SELECT tenant_id, product, sum(cents)::bigint AS cents FROM shop.payments GROUP BY 1, 2"
BRISK = {"retry_base": "50ms", "retry_cap": "100ms", "retry_quarantined": "200ms", "max_attempts": 2}


class Harm(NamedTuple):
    """What somebody does to the target, and what readiness and explain say: cause, colon, statement."""

    statement: LiteralString
    says: str
    # Whether changes are not shown until it is mended.
    stops: bool = True


HARMS = {
    "dropped": Harm("DROP TABLE public.sales", "the target public.sales of sales is gone: "),
    "renamed": Harm(
        "ALTER TABLE public.sales RENAME TO turnover",
        "the target public.sales of sales is called public.turnover now: ",
    ),
    "moved to another schema": Harm(
        "ALTER TABLE public.sales SET SCHEMA shop", "the target public.sales of sales is called shop.sales now: "
    ),
    "a column dropped": Harm(
        "ALTER TABLE public.sales DROP COLUMN quantity", "the target public.sales lacks what its definition returns: "
    ),
    "a column renamed": Harm(
        "ALTER TABLE public.sales RENAME COLUMN quantity TO pieces",
        "the target public.sales lacks what its definition returns: ",
    ),
    "a key column dropped": Harm(
        "ALTER TABLE public.sales DROP COLUMN product", "the target public.sales lacks what its definition returns: "
    ),
    "a type changed": Harm(
        "ALTER TABLE public.sales ALTER COLUMN quantity TYPE text",
        "the target public.sales has other types than its definition: ",
    ),
    "a column added not null": Harm(
        "ALTER TABLE public.sales ADD COLUMN note text NOT NULL DEFAULT '';"
        "ALTER TABLE public.sales ALTER COLUMN note DROP DEFAULT",
        "nothing fills what was added to the target public.sales: ",
    ),
    "its unique index dropped": Harm(
        "DROP INDEX public.sales_tenant_id_product_idx", "the unique index of the target public.sales is gone: "
    ),
    "row-level security switched on": Harm(
        "ALTER TABLE public.sales ENABLE ROW LEVEL SECURITY",
        "row-level security lets listener_service write nothing into the target public.sales: ",
    ),
    "its rights revoked": Harm(
        "REVOKE UPDATE ON public.sales FROM listener_service",
        "listener_service may not write the target public.sales: ",
    ),
    "its owner changed": Harm(
        "ALTER TABLE public.sales OWNER TO shop_app",
        "the target public.sales belongs to shop_app, so that listener_owner can neither mend nor drop it: ",
        stops=False,
    ),
}
# With the row-level security of listener.create_view.
SECURED_HARMS = {
    "row-level security switched off": Harm(
        "ALTER TABLE public.sales DISABLE ROW LEVEL SECURITY",
        "row-level security is not enabled and forced on the target public.sales, and its readers see every tenant: ",
        stops=False,
    ),
    "its policy dropped": Harm(
        "DROP POLICY listener_tenant ON public.sales",
        "row-level security lets listener_service write nothing into the target public.sales: ",
    ),
}


async def troubles(shop: Database) -> list[str]:
    async with shop.connect("listener_service") as service:
        return [line for (line,) in await (await service.execute("SELECT * FROM listener.readiness()")).fetchall()]


async def harmed_and_mended(shop: Database, superuser: AsyncConnection[Any], harm: Harm) -> None:
    async with shop.service(sweep_interval="200ms", **BRISK) as running:
        async with application(shop, ANNA) as anna, application(shop, BERT) as bert:
            for session, tenant in ((anna, ANNA), (bert, BERT)):
                await order(session, tenant, "tea")
            await eventually(lambda: is_exact(shop, "sales", "paid"))
            seen = len(running.outcomes)
            await superuser.execute(harm.statement)
            # The application's writes go on, and so does the other view.
            await order(anna, ANNA, "tea", 2)
            await anna.execute("INSERT INTO shop.payments (tenant_id, product, cents) VALUES (%s, 'tea', 5)", (ANNA,))
            await running.until_refreshed("paid", ANNA, after=seen)
            if harm.stops:
                await eventually(lambda: open_letters(superuser))
                assert {(view, tenant) for view, tenant, _ in await open_letters(superuser)} == {("sales", ANNA)}
            else:
                await running.until_refreshed("sales", ANNA, after=seen)
            (line,) = await troubles(shop)
            assert line.startswith(harm.says)
            assert line in await running.service.reasons_not_ready()
            said = await explained(shop, "sales", ANNA)
            assert said[:2] == ["stale" if harm.stops else "fresh", line]
            assert line not in await explained(shop, "paid", ANNA)
            await pauses_and_resumes(shop, "sales", ANNA)
        # As it stands there, until nothing is said any more: an index is made after its columns.
        while lines := await troubles(shop):
            _, _, mend = lines[0].partition(": ")
            await superuser.execute(mend.encode())
            assert lines != await troubles(shop), "the statement mends nothing"
        await eventually(lambda: is_exact(shop, "sales", "paid"))
        assert await one(superuser, "SELECT count(*) FROM public.sales") == 2
        assert await open_letters(superuser) == []

        async def is_well() -> bool:
            return await running.service.reasons_not_ready() == [] and await explained(shop, "sales", ANNA) == ["fresh"]

        await eventually(is_well)


@pytest.mark.parametrize("harm", HARMS.values(), ids=HARMS.keys())
async def test_a_target_altered_by_hand_is_named_with_what_mends_it_and_becomes_exact(
    shop: Database, superuser: AsyncConnection[Any], harm: Harm
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    await create_view(shop, "paid", PAID, ["product"])
    await harmed_and_mended(shop, superuser, harm)


@pytest.mark.parametrize("harm", SECURED_HARMS.values(), ids=SECURED_HARMS.keys())
async def test_a_target_whose_tenants_are_kept_apart_no_more_is_named_with_what_mends_it(
    shop: Database, superuser: AsyncConnection[Any], harm: Harm
) -> None:
    await create_view(shop, "sales", SALES, ["product"], target_rls=True)
    await create_view(shop, "paid", PAID, ["product"])
    await harmed_and_mended(shop, superuser, harm)


async def test_a_schema_that_is_made_anew_leaves_no_column_of_a_harmed_target_out(
    shop: Database, superuser: AsyncConnection[Any]
) -> None:
    await create_view(shop, "sales", SALES, ["product"])
    async with shop.service(sweep_interval="200ms", **BRISK), application(shop, ANNA) as anna:
        await order(anna, ANNA, "tea", 2)
        await eventually(lambda: is_exact(shop, "sales"))
        await superuser.execute("ALTER TABLE public.sales DROP COLUMN quantity")
        # As `listener migrate` does.
        await superuser.execute("SELECT listener.regenerate()")
        await superuser.execute("ALTER TABLE public.sales ADD COLUMN quantity bigint")
        await eventually(lambda: is_exact(shop, "sales"))
        assert await one(superuser, "SELECT quantity FROM public.sales") == 2
