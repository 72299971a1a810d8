"""What capture costs the writers: commits a second, against the same table without triggers, and with two others."""

from __future__ import annotations

import argparse
import statistics
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import psycopg

from benchmarks.bench import Result, database, service
from benchmarks.sales import COLUMNS, create_sales, insert_script, pgbench
from listener.embedded import EmbeddedServer

TENANTS = 1000
OTHERS = """
CREATE TABLE bare {columns};
CREATE INDEX ON bare (tenant_id, sold_at);
CREATE TABLE empty_trigger {columns};
CREATE INDEX ON empty_trigger (tenant_id, sold_at);
CREATE FUNCTION nothing() RETURNS trigger LANGUAGE plpgsql SECURITY DEFINER SET search_path = pg_catalog, pg_temp AS
    'BEGIN RETURN NULL; END';
CREATE TRIGGER nothing AFTER INSERT ON empty_trigger REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION nothing();
CREATE TABLE notify_each_row {columns};
CREATE INDEX ON notify_each_row (tenant_id, sold_at);
CREATE FUNCTION ring() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify(''bench'', NEW.tenant_id::text); RETURN NULL; END';
CREATE TRIGGER ring AFTER INSERT ON notify_each_row FOR EACH ROW EXECUTE FUNCTION ring();
CREATE TABLE notify_each_statement {columns};
CREATE INDEX ON notify_each_statement (tenant_id, sold_at);
CREATE FUNCTION ring_all() RETURNS trigger LANGUAGE plpgsql AS
    'BEGIN PERFORM pg_notify(''bench'', DISTINCT_ROWS.tenant_id::text)
     FROM (SELECT DISTINCT tenant_id FROM new_rows) AS DISTINCT_ROWS; RETURN NULL; END';
CREATE TRIGGER ring AFTER INSERT ON notify_each_statement REFERENCING NEW TABLE AS new_rows
    FOR EACH STATEMENT EXECUTE FUNCTION ring_all();
"""
WAYS = {
    "no trigger": ("bench_write_5", "bare"),
    "ours, 1 view": ("bench_write_1", "sales"),
    "ours, 5 views": ("bench_write_5", "sales"),
    "floor: an empty trigger": ("bench_write_5", "empty_trigger"),
    "pg_notify for each row": ("bench_write_5", "notify_each_row"),
    "pg_notify for each statement": ("bench_write_5", "notify_each_statement"),
}


DRAINED = "ours, 5 views, the service draining"


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """A row per number of writers: commits a second without a trigger, and the share that each way keeps.

    The ways take turns, `rounds` times, and the median counts. The lease is held and nobody drains, so that what the
    writers pay is seen by itself; the last column adds the service, which takes its processor time from the same cores.
    """
    result = Result(
        "Commits kept by the writers, one-row inserts, durable commits",
        ["writers", "no trigger, commits/s", *list(WAYS)[1:], DRAINED],
        note="Prepared statements, autocommit, a primary key and one index. Medians of alternating runs. The lease is"
        " held as under load; in the last column the service drains beside the writers, on the same cores. The target"
        " at 16 writers is 86 % with five views, the same as with one. The floor: a PL/pgSQL trigger like ours, with a"
        " transition table, that does nothing.",
    )
    with database(server, "bench_write_1") as one, database(server, "bench_write_5") as five:
        create_sales(one, views=1, tenants=TENANTS)
        create_sales(five, views=5, tenants=TENANTS)
        five.execute(OTHERS.format(columns=COLUMNS).encode())
        for administrator in (one, five):
            administrator.execute("SELECT listener.pause()")  # drained, and not refreshed
        for writers in options.writers:
            measured: dict[str, list[float]] = {way: [] for way in [*WAYS, DRAINED]}
            for _ in range(options.rounds):
                for way, (name, table) in WAYS.items():
                    with _lease_held(server, name):
                        measured[way].append(_commits(server, name, table, writers, options.burst))
                with service(server, "bench_write_5"):
                    measured[DRAINED].append(_commits(server, "bench_write_5", "sales", writers, options.burst))
            medians = {way: statistics.median(rates) for way, rates in measured.items()}
            base = medians["no trigger"]
            result.rows.append(
                (writers, f"{base:,.0f}", *(f"{medians[way] / base:.0%}" for way in [*list(WAYS)[1:], DRAINED]))
            )
    return [result]


def _commits(server: EmbeddedServer, name: str, table: str, writers: int, seconds: float) -> float:
    return pgbench(server, name, insert_script(table, TENANTS), clients=writers, seconds=seconds)


@contextmanager
def _lease_held(server: EmbeddedServer, name: str) -> Iterator[None]:
    over = threading.Event()
    with psycopg.connect(server.url(user="listener_service", database=name), autocommit=True) as session:

        def hold() -> None:
            while not over.wait(0.2):
                session.execute("SELECT listener.hold_lease()")

        session.execute("SELECT listener.hold_lease()")
        holding = threading.Thread(target=hold)
        holding.start()
        try:
            yield
        finally:
            over.set()
            holding.join()
            session.execute("SELECT listener.end_lease()")
