"""What a service that comes back has to do: very many dirty keys; a backlog of the change log."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from benchmarks.bench import Result, database, service
from benchmarks.sales import VIEWS, all_fresh, create_sales, differing, tenant_of
from listener.embedded import EmbeddedServer

KEYS = 100_000


def run(server: EmbeddedServer, options: argparse.Namespace) -> list[Result]:
    """The service's memory and CPU while 100,000 keys are dirty; and how long a backlog of log rows takes."""
    return [_keys(server), _log(server, options.rows)]


def _keys(server: EmbeddedServer) -> Result:
    tenants = KEYS // len(VIEWS)
    with database(server, "bench_keys") as administrator:
        create_sales(administrator, views=5, tenants=tenants, rows_per_tenant=2)
        started = time.perf_counter()
        with service(server, "bench_keys") as process:
            most, dirty = 0.0, 0
            while True:
                most = max(most, _resident_megabytes(process.pid))
                row = administrator.execute("SELECT count(*) FROM listener.dirty").fetchone()
                assert row is not None
                dirty = max(dirty, row[0])
                if dirty > KEYS / 2 and all_fresh(administrator):
                    break
                time.sleep(0.25)
            took = time.perf_counter() - started
            most = max(most, _resident_megabytes(process.pid))
            cpu = _cpu_seconds(process.pid)
        differ = differing(administrator, len(VIEWS))
    return Result(
        f"{KEYS:,} dirty keys: filling five views for {tenants:,} tenants",
        ["what", "figure"],
        rows=[
            ("most dirty keys seen at once", f"{dirty:,}"),
            ("resident memory of the service, at the most (MB)", f"{most:.0f}"),
            ("until nothing is dirty (s)", f"{took:.0f}"),
            ("refreshes a second", f"{KEYS / took:,.0f}"),
            ("CPU of the service, share of one core", f"{cpu / took:.0%}"),
            ("rows that differ at the end", differ),
        ],
        note="The target is 150 MB at the most.",
    )


def _log(server: EmbeddedServer, rows: int) -> Result:
    with database(server, "bench_log") as administrator:
        create_sales(administrator, views=5, tenants=1000, rows_per_tenant=100)
        with service(server, "bench_log"):
            while not all_fresh(administrator):
                time.sleep(0.2)
        administrator.execute(
            f"""
            INSERT INTO listener.change_log (xid, changed_at, source_id, tenant)
            SELECT pg_current_xact_id(), clock_timestamp(), s.id, {tenant_of("1 + n % 1000")}::text
            FROM generate_series(1, {rows}) n, (SELECT min(id) FROM listener.source WHERE table_name = 'sales') s (id)
            """.encode()
        )
        started = time.perf_counter()
        with service(server, "bench_log"):
            serving = time.perf_counter() - started
            while not all_fresh(administrator):
                time.sleep(0.05)
            fresh = time.perf_counter() - started
            while administrator.execute("SELECT FROM listener.change_log LIMIT 1").fetchone():
                time.sleep(0.2)
            purged = time.perf_counter() - started
    return Result(
        f"A backlog of {rows:,} log rows of 1,000 tenants, five views, after a restart (s)",
        ["what", "seconds from the start of the process"],
        rows=[
            ("serving", f"{serving:.1f}"),
            ("every target fresh", f"{fresh:.1f}"),
            ("the log is empty", f"{purged:.1f}"),
        ],
    )


def _resident_megabytes(pid: int) -> float:
    """VmRSS, from /proc (Linux)."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def _cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
