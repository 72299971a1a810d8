"""What the service costs when nothing happens."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

import psycopg

from benchmarks.bench import Result, database, service
from listener.embedded import EmbeddedServer
from listener.sample import load_sample


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """CPU of the service's process in percent of one core, and the statements that its sessions ran last."""
    with database(server, "bench_idle") as administrator, service(server, "bench_idle") as process:
        load_sample(administrator)
        time.sleep(6)  # the filling of no tenant, and a first sweep
        before, started = _cpu_seconds(process.pid), time.perf_counter()
        transactions = _transactions(administrator)
        statements: set[str] = set()
        while time.perf_counter() - started < options.seconds:
            time.sleep(0.05)
            for (query,) in administrator.execute(
                "SELECT regexp_replace(left(query, 70), '\\s+', ' ', 'g') FROM pg_stat_activity"
                " WHERE application_name LIKE 'listener%%' AND datname = current_database()"
            ).fetchall():
                statements.add(query.strip())
        elapsed = time.perf_counter() - started
        cpu = (_cpu_seconds(process.pid) - before) / elapsed * 100
        ran = _transactions(administrator) - transactions
    result = Result(
        f"Idle for {elapsed:.0f} s",
        ["what", "figure"],
        rows=[
            ("CPU of the service, % of one core", f"{cpu:.2f}"),
            ("transactions a second in its database, our own sampling included", f"{ran / elapsed:.1f}"),
        ],
        note="Sessions of the service were seen with: " + "; ".join(sorted(statements - {""})),
    )
    return [result]


def _cpu_seconds(pid: int) -> float:
    """User and system time of a process, from /proc (Linux)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def _transactions(connection: psycopg.Connection[Any]) -> int:
    row = connection.execute(
        "SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = current_database()"
    ).fetchone()
    assert row is not None
    return int(row[0])
