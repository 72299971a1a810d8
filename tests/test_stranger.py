"""The stranger's schema is what it claims: every materialized view is filled, and a session without a tenant fails."""

from __future__ import annotations

import psycopg
import pytest

from conftest import Database
from shop import one, rows
from stranger import TENANTS, billing_app

pytestmark = pytest.mark.anyio


async def test_every_materialized_view_is_filled_with_the_rows_of_all_tenants(stranger: Database) -> None:
    async with stranger.connect() as superuser:
        views = await rows(superuser, "SELECT schemaname, matviewname, ispopulated FROM pg_matviews")
        assert len(views) == 9
        assert all(populated for _, _, populated in views)
        assert await one(superuser, "SELECT count(DISTINCT tenant_id) FROM reporting.invoice_totals") == len(TENANTS)


async def test_a_session_sees_its_tenant_alone_and_without_one_gets_an_error(stranger: Database) -> None:
    async with billing_app(stranger, TENANTS[0]) as app:
        assert await rows(app, "SELECT DISTINCT tenant_id::text FROM billing.invoices") == [(TENANTS[0],)]
    async with stranger.connect("listener_service") as service:
        with pytest.raises(psycopg.errors.UndefinedObject):
            await service.execute("SELECT * FROM billing.invoices")
