"""A ledger of sales for the benchmarks under load: one table, up to five views over it, pgbench as its writers."""

from __future__ import annotations

import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, LiteralString

import psycopg
from psycopg import sql

from listener.embedded import EmbeddedServer

COLUMNS: LiteralString = """(
    id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL, channel text NOT NULL,
    cents bigint NOT NULL, sold_at timestamptz NOT NULL DEFAULT clock_timestamp())"""

VIEWS: dict[str, tuple[LiteralString, LiteralString]] = {
    "totals": (
        "{tenant_id}",
        (
            "SELECT tenant_id, sum(cents)::bigint AS cents, count(*) AS sales, max(sold_at) AS newest"
            " FROM sales GROUP BY tenant_id"
        ),
    ),
    "by_channel": (
        "{tenant_id,channel}",
        "SELECT tenant_id, channel, sum(cents)::bigint AS cents FROM sales GROUP BY tenant_id, channel",
    ),
    "by_day": (
        "{tenant_id,day}",
        (
            "SELECT tenant_id, (sold_at AT TIME ZONE 'UTC')::date AS day, sum(cents)::bigint AS cents FROM sales"
            " GROUP BY 1, 2"
        ),
    ),
    "by_channel_and_day": (
        "{tenant_id,channel,day}",
        (
            "SELECT tenant_id, channel, (sold_at AT TIME ZONE 'UTC')::date AS day, count(*) AS sales FROM sales"
            " GROUP BY 1, 2, 3"
        ),
    ),
    "best_channel": (
        "{tenant_id}",
        (
            "SELECT DISTINCT ON (tenant_id) tenant_id, channel, sum(cents)::bigint AS cents FROM sales"
            " GROUP BY tenant_id, channel ORDER BY tenant_id, 3 DESC, channel"
        ),
    ),
}


def tenant_of(number: str) -> str:
    """SQL of the tenant with a number, 1 to 1,000,000,000,000."""
    return f"('00000000-0000-4000-8000-' || lpad(({number})::text, 12, '0'))::uuid"


def create_sales(administrator: psycopg.Connection[Any], *, views: int, tenants: int, rows_per_tenant: int = 0) -> None:
    """The table `sales`, its tenants, rows for each, and so many of the five views."""
    administrator.execute("SET ROLE listener_owner")
    administrator.execute("CREATE TABLE tenants (id uuid PRIMARY KEY)")
    administrator.execute(f"INSERT INTO tenants SELECT {tenant_of('n')} FROM generate_series(1, {tenants}) n".encode())
    administrator.execute(b"CREATE TABLE sales " + COLUMNS.encode())
    administrator.execute("CREATE INDEX ON sales (tenant_id, sold_at)")
    if rows_per_tenant:
        administrator.execute(
            f"INSERT INTO sales (tenant_id, channel, cents) SELECT {tenant_of('t')}, 'channel ' || n % 5, n"
            f" FROM generate_series(1, {rows_per_tenant}) n, generate_series(1, {tenants}) t".encode()
        )
    administrator.execute("GRANT SELECT ON tenants, sales TO listener_service")
    for name, (keys, query) in list(VIEWS.items())[:views]:
        administrator.execute(
            "SELECT listener.create_view(%s, %s, %s::name[], tenants_query => 'SELECT id FROM tenants')",
            (name, query, keys),
        )
    administrator.execute("RESET ROLE")
    administrator.execute("VACUUM ANALYZE sales")


def pgbench(
    server: EmbeddedServer,
    database: str,
    script: str,
    *,
    clients: int,
    seconds: float,
    rate: float | None = None,
    environment: dict[str, str] | None = None,
) -> float:
    """Runs the script, each run of it a transaction; returns transactions a second, connections not counted."""
    with tempfile.TemporaryDirectory() as directory:
        file = Path(directory) / "script.sql"
        file.write_text(script)
        command = [
            str(server.bin("pgbench")), "--no-vacuum", "--protocol=prepared", f"--client={clients}", "--jobs=1",
            f"--time={max(1, round(seconds))}", f"--file={file}", "--max-tries=1",
            *([f"--rate={rate:g}"] if rate else []),
            server.url(database=database),
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    if done.returncode or found is None:
        raise RuntimeError(f"pgbench: {done.stderr.strip().splitlines()[-1:]}")
    return float(found[1])


def insert_script(table: str, tenants: int, *, skewed: bool = False) -> str:
    """One row of a random tenant a transaction; skewed: a few tenants write most."""
    draw = f"random_zipfian(1, {tenants}, 1.1)" if skewed else f"random(1, {tenants})"
    return (
        f"\\set n {draw}\n\\set c random(0, 4)\n"
        f"INSERT INTO {table} (tenant_id, channel, cents) VALUES ({tenant_of(':n')}, 'channel ' || :c, :n);\n"
    )


def all_fresh(administrator: psycopg.Connection[Any]) -> bool:
    """Whether nothing is logged and not drained, or drained and not shown."""
    row = administrator.execute(
        "SELECT NOT EXISTS (SELECT FROM listener.unconsumed()) AND NOT EXISTS (SELECT FROM listener.dirty)"
    ).fetchone()
    return bool(row and row[0])


def differing(administrator: psycopg.Connection[Any], views: int) -> int:
    """Rows by which the targets differ from their queries, both ways."""
    return sum(differing_in(administrator, name) for name in list(VIEWS)[:views])


def differing_in(administrator: psycopg.Connection[Any], view: str) -> int:
    """The same of one of them."""
    row = administrator.execute(
        sql.SQL(
            "SELECT (SELECT count(*) FROM (({q}) EXCEPT ALL SELECT * FROM {t}) a)"
            " + (SELECT count(*) FROM (SELECT * FROM {t} EXCEPT ALL ({q})) b)"
        ).format(q=sql.SQL(VIEWS[view][1]), t=sql.Identifier(view))
    ).fetchone()
    return row[0] if row else 0
