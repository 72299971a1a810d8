"""How long `listener doctor` takes, and its part that /health/ready asks every few seconds."""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

import psycopg
from psycopg import sql

from benchmarks.bench import Result, database, percentile
from listener.embedded import EmbeddedServer

VIEWS = 40
ROUNDS = 5

ROLES = """
DO $$ BEGIN IF to_regrole('bench_owner') IS NULL THEN CREATE ROLE bench_owner; END IF; END $$;
GRANT bench_owner TO listener_owner;
CREATE SCHEMA bench AUTHORIZATION bench_owner;
GRANT USAGE ON SCHEMA bench TO listener_service;
SET ROLE bench_owner;
CREATE TABLE bench.tenants (id uuid PRIMARY KEY);
GRANT SELECT ON bench.tenants TO listener_service;
"""
TABLE = """
CREATE TABLE bench.t{n} (tenant_id uuid NOT NULL, at timestamptz NOT NULL, amount numeric NOT NULL);
CREATE INDEX ON bench.t{n} (tenant_id);
ALTER TABLE bench.t{n} ENABLE ROW LEVEL SECURITY, FORCE ROW LEVEL SECURITY;
CREATE POLICY tenant ON bench.t{n} USING (tenant_id = current_setting('app.current_tenant_id')::uuid);
GRANT SELECT ON bench.t{n} TO listener_service
"""


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """Seconds for so many source tables, shared evenly by 40 views."""
    name = "bench_doctor"
    with database(server, name) as administrator:
        administrator.execute(ROLES.encode())
        for n in range(options.tables):
            administrator.execute(sql.SQL(TABLE).format(n=sql.SQL(str(n))))
        administrator.execute("RESET ROLE")
        for n in range(VIEWS):
            read = range(n * options.tables // VIEWS, (n + 1) * options.tables // VIEWS)
            branches = " UNION ALL ".join(f"SELECT tenant_id, amount FROM bench.t{t}" for t in read)
            administrator.execute(
                "SELECT listener.create_view(%s, %s, '{}', tenants_query => 'SELECT id FROM bench.tenants')",
                (f"v{n}", f"SELECT tenant_id, sum(amount) AS amount FROM ({branches}) AS u GROUP BY 1"),
            )
        url = server.url(user="listener_service", database=name)
        command = [sys.executable, "-m", "listener", "doctor", "--json"]
        environment = os.environ | {"LISTENER_DATABASE_URL": url}
        with psycopg.connect(url, autocommit=True) as service:
            rows = [
                ("listener doctor, the whole command", _seconds(lambda: _told(command, environment))),
                *((f"its question {q}", _seconds(lambda q=q: _ask(service, q))) for q in QUESTIONS),  # type: ignore[misc]
                ("what /health/ready asks", _seconds(lambda: _ask(service, "listener.readiness()"))),
            ]
    result = Result(
        f"Doctor: {options.tables} source tables, {VIEWS} views (s)",
        ["what", "p50", "max"],
        note="The target is 5 s at most for the command.",
    )
    for what, took in rows:
        result.rows.append((what, f"{percentile(took, 0.5):.3f}", f"{max(took):.3f}"))
    return [result]


QUESTIONS = (
    "listener.state_findings()",
    "listener.capture_findings()",
    "listener.progress_findings()",
    "listener.server_findings(8)",
    "listener.scope_findings()",
)


def _seconds(act: Callable[[], object]) -> list[float]:
    took = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        act()
        took.append(time.perf_counter() - started)
    return took


def _told(command: list[str], environment: dict[str, str]) -> None:
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if ended.returncode != 0:
        raise RuntimeError(f"doctor finds errors: {ended.stdout} {ended.stderr}")


def _ask(connection: psycopg.Connection[Any], question: str) -> None:
    connection.execute(sql.SQL("SELECT * FROM {}").format(sql.SQL(question))).fetchall()
