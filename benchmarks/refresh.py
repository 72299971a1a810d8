"""One tenant's refresh against REFRESH MATERIALIZED VIEW CONCURRENTLY of the same query, alternating."""

from __future__ import annotations

import argparse
import statistics
import time
import uuid
from typing import Any

import psycopg

from benchmarks.bench import Result, database
from listener.embedded import EmbeddedServer

ROWS = 1000
# Of each size; CONCURRENTLY takes seconds, so a few times tell enough.
ROUNDS = 5


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row per number of tenants, medians in milliseconds."""
    result = Result(
        f"One row changed, {ROWS} rows a tenant: refresh of one tenant, and of the materialized view (ms, medians)",
        ["tenants", "listener.refresh", "REFRESH … CONCURRENTLY", "times faster", "listener.refresh by itself"],
        note="The target is 500 times at 1,000 tenants, and no slower at many tenants than at 100. Larger tables"
        " outgrow the processor's caches, and each REFRESH drives out what is in them; in the last column none comes"
        " between.",
    )
    for tenants in options.tenants:
        with database(server, "bench_refresh") as administrator:
            ours, theirs, alone = _measure(server, administrator, tenants)
        result.rows.append(
            (
                f"{tenants:,}",
                f"{ours * 1000:.2f}",
                f"{theirs * 1000:.0f}",
                f"{theirs / ours:,.0f}",
                f"{alone * 1000:.2f}",
            )
        )
    return [result]


def _measure(
    server: EmbeddedServer, administrator: psycopg.Connection[Any], tenants: int
) -> tuple[float, float, float]:
    administrator.execute("SET ROLE listener_owner")
    administrator.execute("CREATE TABLE tenants (id uuid PRIMARY KEY)")
    administrator.execute("INSERT INTO tenants SELECT gen_random_uuid() FROM generate_series(1, %s)", (tenants,))
    administrator.execute(
        "CREATE TABLE ledger (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, tenant_id uuid NOT NULL,"
        " day date NOT NULL, cents bigint NOT NULL)"
    )
    administrator.execute(
        "INSERT INTO ledger (tenant_id, day, cents) SELECT t.id, date '2026-01-01' + n %% 365, n"
        " FROM tenants t, generate_series(1, %s) n",
        (ROWS,),
    )
    # Read row by row of the outer table: a tenant's rows come to lie together at every size, so that sizes compare.
    administrator.execute("CREATE INDEX ON ledger (tenant_id)")
    query = (
        "SELECT tenant_id, day, sum(cents)::bigint AS cents, count(*) AS entries FROM ledger GROUP BY tenant_id, day"
    )
    # Filled before row-level security: a populate that sets no tenant would see no row.
    administrator.execute(b"CREATE MATERIALIZED VIEW whole AS " + query.encode())
    administrator.execute("CREATE UNIQUE INDEX ON whole (tenant_id, day)")
    administrator.execute("GRANT SELECT ON tenants, ledger TO listener_service")
    administrator.execute("ALTER TABLE ledger ENABLE ROW LEVEL SECURITY")
    administrator.execute(
        "CREATE POLICY tenant ON ledger USING (tenant_id = current_setting('app.current_tenant_id')::uuid)"
    )
    administrator.execute(
        "SELECT listener.create_view('scoped', %s, '{tenant_id,day}', tenants_query => 'SELECT id FROM tenants')",
        (query,),
    )
    administrator.execute("RESET ROLE")
    administrator.execute("VACUUM ANALYZE ledger, whole")
    tenants_of_interest = administrator.execute("SELECT id FROM tenants ORDER BY id LIMIT 20").fetchall()
    url = server.url(user="listener_service", database="bench_refresh")
    ours: list[float] = []
    alone: list[float] = []
    theirs: list[float] = []
    # As the service does: a crash that loses a refresh loses the mark "clean" with it.
    with psycopg.connect(url, autocommit=True, options="-c synchronous_commit=off") as service:
        for (tenant,) in tenants_of_interest:
            _refresh(service, tenant)  # the first one fills
        for into in (ours, alone):
            for number in range(ROUNDS * len(tenants_of_interest)):
                (tenant,) = tenants_of_interest[number % len(tenants_of_interest)]
                administrator.execute(
                    "UPDATE ledger SET cents = cents + 1 WHERE id = (SELECT min(id) FROM ledger WHERE tenant_id = %s)",
                    (tenant,),
                )
                service.execute("SELECT listener.drain()").fetchall()
                into.append(_refresh(service, tenant))
                if into is ours and number % len(tenants_of_interest) == 0:
                    started = time.perf_counter()
                    administrator.execute("REFRESH MATERIALIZED VIEW CONCURRENTLY whole")
                    theirs.append(time.perf_counter() - started)
    return statistics.median(ours), statistics.median(theirs), statistics.median(alone)


def _refresh(service: psycopg.Connection[Any], tenant: uuid.UUID) -> float:
    started = time.perf_counter()
    row = service.execute("SELECT outcome FROM listener.refresh('scoped', %s::uuid)", (tenant,)).fetchone()
    assert row == ("refreshed",)
    return time.perf_counter() - started
