"""A tenant column of type char(n): capture logs its text without the blanks at the end, as a cast to text shows it."""

from __future__ import annotations

import pytest

from conftest import Database
from shop import create_view, rows, settle

pytestmark = pytest.mark.anyio


async def test_a_padded_tenant_is_one_also_in_a_partition_of_other_columns(database: Database) -> None:
    async with database.connect() as superuser, database.connect("listener_service") as service:
        await superuser.execute(
            """SET ROLE listener_owner;
               CREATE TABLE padded (id int NOT NULL, tenant_id char(4), n int) PARTITION BY RANGE (id);
               CREATE TABLE padded_1 PARTITION OF padded FOR VALUES FROM (0) TO (10);
               CREATE TABLE padded_2 (n int, tenant_id char(4), id int NOT NULL);
               ALTER TABLE padded ATTACH PARTITION padded_2 FOR VALUES FROM (10) TO (20);
               CREATE INDEX ON padded (tenant_id);
               INSERT INTO padded VALUES (1, 'ab', 1), (11, 'ab', 1);
               GRANT SELECT ON padded TO listener_service;
               RESET ROLE; GRANT CREATE, USAGE ON SCHEMA public TO listener_owner, listener_migrator"""
        )
        query = "SELECT tenant_id::text AS tenant_id, sum(n) AS n FROM padded GROUP BY 1"
        await create_view(database, "v", query, ["tenant_id"], tenants_query=None)
        await settle(service)
        for written in ("padded_1", "padded_2"):
            await superuser.execute(f"UPDATE {written} SET n = n + 1".encode())  # noqa: S608
            await settle(service)
            shown = await rows(superuser, "SELECT * FROM v")
            assert shown == await rows(superuser, "SELECT tenant_id::text, sum(n) FROM padded GROUP BY 1"), written
