"""The difference: a column of any type is written when it reads differently, and only then."""

from __future__ import annotations

from typing import Any

import pytest
from psycopg import AsyncConnection, sql

from conftest import Database
from shop import ANNA, create_view, define, one, open_shop, rows, settle

pytestmark = pytest.mark.anyio

VALUES = [
    ("json", '{"a": 1}', '{"a":  1}'),
    ("jsonb", '{"a": 1.0}', '{"a": 1.00}'),
    ("point", "(1,2)", "(1,2.0000000001)"),
    ("numeric", "1.0", "1.00"),
    ("numeric(9,4)", "1", "1.5"),
    ("double precision", "0", "-0"),
    ("real", "0.1", "0.10000001"),
    ("double precision", "NaN", "0.30000000000000004"),
    ("integer[]", "{1,2}", "{1,2,NULL}"),
    ("numeric[]", "{1.0}", "{1.00}"),
    ("json[]", '{"{}"}', '{"{ }"}'),
    ("interval", "24:00:00", "1 day"),
    ("char(5)", "a", "b"),
    ("bytea", "\\x00", "\\x01"),
    ("timestamptz", "2026-01-01 00:00:00.000001+00", "2026-01-01 00:00:00.000002+00"),
    ("numrange", "[1.0,2)", "[1.00,2)"),
    ("shop.pair", "(1,x)", "(1,y)"),
    ("shop.price", "1.0", "1.00"),
    ("shop.mood", "fine", "dull"),
    ("tsvector", "'a':1", "'a':2"),
]


async def test_a_column_of_any_type_is_written_when_it_reads_differently_and_only_then(
    database: Database,
) -> None:
    await open_shop(database)
    async with database.connect() as superuser, database.connect("listener_service") as service:
        await compare_all(database, superuser, service)


async def compare_all(database: Database, superuser: AsyncConnection[Any], service: AsyncConnection[Any]) -> None:
    await define(
        superuser,
        """CREATE TYPE shop.pair AS (a int, b text); CREATE DOMAIN shop.price AS numeric;
           CREATE TYPE shop.mood AS ENUM ('fine', 'dull'); CREATE TABLE shop.wide (tenant_id uuid, id int);""",
    )
    for number, (column_type, *_) in enumerate(VALUES):
        await define(
            superuser,
            sql.SQL("ALTER TABLE shop.wide ADD COLUMN {} {}").format(
                sql.Identifier(f"c{number}"),
                sql.SQL(column_type),
            ),
        )
    await define(superuser, "GRANT SELECT ON shop.wide TO listener_service")
    await create_view(database, "wide_copy", "SELECT * FROM shop.wide", ["id"])
    await superuser.execute("INSERT INTO shop.wide (tenant_id, id) VALUES (%s, 1), (%s, 2)", (ANNA, ANNA))
    await settle(service)
    counts = "SELECT inserted, updated, deleted FROM listener.refresh('wide_copy', %s::text)"
    for number, (column_type, *literals) in enumerate(VALUES):
        column = sql.Identifier(f"c{number}")
        for literal in literals:
            await superuser.execute(
                sql.SQL("UPDATE shop.wide SET {} = {} WHERE id = 1").format(column, sql.Literal(literal))
            )
            assert await rows(service, counts, ANNA) == [(0, 1, 0)], (column_type, literal)
            assert await rows(service, counts, ANNA) == [(0, 0, 0)], (column_type, literal)
            same = sql.SQL("SELECT s.{c}::text = t.{c}::text FROM shop.wide s, wide_copy t WHERE s.id = 1 AND t.id = 1")
            assert await one(superuser, same.format(c=column)) is True, (column_type, literal)
    assert await rows(service, "SELECT missing, extra FROM listener.compare('wide_copy', %s)", ANNA) == [(0, 0)]
