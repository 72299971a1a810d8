"""What each part of the capture trigger costs, in CPU time of the writer's backend for one single-row INSERT.

Each in a transaction of its own: much of what a trigger costs, PL/pgSQL prepares anew for each transaction.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.bench import Result, database
from benchmarks.sales import COLUMNS, create_sales, tenant_of
from listener.embedded import EmbeddedServer

INSERTS = 5000
LOG = "xid xid8 NOT NULL, changed_at timestamptz NOT NULL, source_id integer, view_id integer, tenant text NOT NULL"
DEFINER = "SECURITY DEFINER SET search_path = pg_catalog, pg_temp"
TRANSITION = "REFERENCING NEW TABLE AS new_rows"
LOGGING = (
    "INSERT INTO public.{log} (xid, changed_at, source_id, tenant) SELECT pg_current_xact_id(), clock_timestamp(), 1, "
    "t.tenant FROM (SELECT DISTINCT tenant_id::text FROM new_rows) t (tenant);"
)
LONE = (
    "INSERT INTO public.log (xid, changed_at, source_id, tenant) SELECT pg_current_xact_id(), statement_timestamp(), 1,"
    " r.tenant_id::text FROM new_rows r WHERE NOT EXISTS (SELECT FROM new_rows OFFSET 1); IF NOT FOUND THEN "
    + LOGGING.format(log="log")
    + " END IF;"
)
LEASE = (
    "IF pg_sequence_last_value('public.lease'::regclass) > date_part('epoch', clock_timestamp()) * 1000"
    " THEN RETURN NULL; END IF;"
)
LEASE_BY_SELECT = (
    "IF (SELECT last_value FROM public.lease) > date_part('epoch', clock_timestamp()) * 1000 THEN RETURN NULL; END IF;"
)
COLLECTING = (
    "WITH logged AS (INSERT INTO public.log (xid, changed_at, source_id, tenant) SELECT pg_current_xact_id(), "
    "clock_timestamp(), 1, t.tenant FROM (SELECT DISTINCT tenant_id::text FROM new_rows) t (tenant) RETURNING tenant) "
    "SELECT array_agg(tenant) INTO tenants FROM logged;"
)
# What a trigger does: the transition table, the function's attributes, its body.
FORMS = {
    "no trigger": None,
    "a trigger that does nothing": ("", "", ""),
    "+ transition table": (TRANSITION, "", ""),
    "+ security definer with a pinned search_path": (TRANSITION, DEFINER, ""),
    "+ tenants told apart, a log row, without an index": (TRANSITION, DEFINER, LOGGING.format(log="log_without_index")),
    "+ the log's index": (TRANSITION, DEFINER, LOGGING.format(log="log")),
    "not told apart where there is one row": (TRANSITION, DEFINER, LONE),
    "+ the lease, by pg_sequence_last_value": (TRANSITION, DEFINER, LONE + LEASE),
    "the lease by SELECT instead": (TRANSITION, DEFINER, LONE + LEASE_BY_SELECT),
    "tenants collected by RETURNING instead": (TRANSITION, DEFINER, COLLECTING),
    "a row trigger instead": (
        "FOR EACH ROW",
        DEFINER,
        (
            "INSERT INTO public.log (xid, changed_at, source_id, tenant) VALUES"
            " (pg_current_xact_id(), clock_timestamp(), 1, NEW.tenant_id::text);"
        ),
    ),
}


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """One row per form of the trigger; the least of some alternating runs, since CPU time has no downward noise."""
    with database(server, "bench_capture") as administrator:
        administrator.execute(f"CREATE TABLE log ({LOG}); CREATE INDEX ON log (xid)".encode())
        administrator.execute(f"CREATE TABLE log_without_index ({LOG}); CREATE SEQUENCE lease".encode())
        administrator.execute(
            "SELECT setval('lease', (date_part('epoch', clock_timestamp()) * 1000)::bigint + 100000000)"
        )
        tables = {}
        for number, (name, form) in enumerate(FORMS.items()):
            tables[name] = f"t{number}"
            _create(administrator, f"t{number}", form)
        create_sales(administrator, views=1, tenants=1)
        administrator.execute(
            "SELECT setval('listener.doorbell', (date_part('epoch', clock_timestamp()) * 1000)::bigint + 100000000)"
        )
        tables["listener's own"] = "sales"
        least = dict.fromkeys(tables, float("inf"))
        for _ in range(options.rounds):
            for name, table in tables.items():
                least[name] = min(least[name], _microseconds(server, table))
    base = least["no trigger"]
    return [
        Result(
            "What each part of capture costs: CPU of the backend for one single-row INSERT (µs)",
            ["form", "µs", "more than no trigger"],
            rows=[(name, f"{value:.1f}", f"{value - base:.1f}") for name, value in least.items()],
            note="Least of alternating runs, each insert with its commit, which waits for no disk; the table has a"
            " primary key and one index. The lease is held.",
        )
    ]


def _create(administrator: psycopg.Connection[Any], table: str, form: tuple[str, str, str] | None) -> None:
    administrator.execute(f"CREATE TABLE {table} {COLUMNS}; CREATE INDEX ON {table} (tenant_id, sold_at)".encode())
    if form is None:
        return
    how, attributes, body = form
    level = how if how == "FOR EACH ROW" else f"{how} FOR EACH STATEMENT"
    administrator.execute(
        f"CREATE FUNCTION f_{table}() RETURNS trigger LANGUAGE plpgsql {attributes} AS $f$"
        f" DECLARE tenants text[]; BEGIN {body} RETURN NULL; END $f$;"
        f" CREATE TRIGGER capture AFTER INSERT ON {table} {level} EXECUTE FUNCTION f_{table}()".encode()
    )


def _microseconds(server: EmbeddedServer, table: str) -> float:
    loop = (
        f"DO $$ BEGIN FOR n IN 1..{{count}} LOOP INSERT INTO {table} (tenant_id, channel, cents)"
        f" VALUES ({tenant_of('n % 1000')}, 'email', n); COMMIT; END LOOP; END $$"
    )
    with psycopg.connect(server.url(database="bench_capture"), autocommit=True) as writer:
        writer.execute("SET synchronous_commit = off")
        writer.execute(loop.format(count=500).encode())
        before = _cpu_seconds(writer.info.backend_pid)
        writer.execute(loop.format(count=INSERTS).encode())
        return (_cpu_seconds(writer.info.backend_pid) - before) / INSERTS * 1e6


def _cpu_seconds(pid: int) -> float:
    """Time on a processor, from /proc (Linux), in nanoseconds there."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9
