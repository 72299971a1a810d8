"""`python -m benchmarks [NAME …]`: runs them, prints tables, writes them with --write."""

from __future__ import annotations

import argparse
import json
import re
from datetime import UTC, datetime
from pathlib import Path

from benchmarks import (
    adopt,
    backlog,
    bulk,
    calm,
    capture,
    doctor,
    drain,
    fill,
    held_snapshot,
    idle,
    noisy,
    recovery,
    refresh,
    sustained,
    write_path,
)
from benchmarks.bench import Result, environment
from listener.embedded import EmbeddedServer

ALL = {
    "calm": calm,
    "write-path": write_path,
    "capture": capture,
    "bulk": bulk,
    "refresh": refresh,
    "sustained": sustained,
    "noisy": noisy,
    "backlog": backlog,
    "fill": fill,
    "adopt": adopt,
    "drain": drain,
    "held-snapshot": held_snapshot,
    "recovery": recovery,
    "idle": idle,
    "doctor": doctor,
}
PAGE = Path(__file__).parents[1] / "docs" / "benchmarks.md"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which: {', '.join(ALL)}; all where left out")
    parser.add_argument("--writes", type=int, default=300, help="calm: how many writes (300)")
    parser.add_argument(
        "--tenants", type=int, nargs="+", default=[100, 1000, 10000], help="refresh: how many tenants (100 1000 10000)"
    )
    parser.add_argument("--seconds", type=float, default=30, help="idle: how long (30)")
    parser.add_argument(
        "--rows", type=int, default=1_000_000, help="drain, backlog: log rows; bulk: rows of a statement (1000000)"
    )
    parser.add_argument(
        "--writers", type=int, nargs="+", default=[1, 4, 16, 64], help="write-path: how many writers (1 4 16 64)"
    )
    parser.add_argument("--rounds", type=int, default=3, help="write-path, capture, bulk, noisy: how often each (3)")
    parser.add_argument("--burst", type=float, default=4, help="write-path: seconds of each run (4)")
    parser.add_argument(
        "--rates", type=float, nargs="+", default=[1000, 1500, 2000, 3000, 4000], help="sustained: writes a second"
    )
    parser.add_argument(
        "--load-seconds", type=float, default=30, help="sustained, noisy: how long each rate or turn (30)"
    )
    parser.add_argument("--hold-seconds", type=float, default=600, help="held-snapshot: how long (600)")
    parser.add_argument("--hold-rate", type=float, default=5000, help="held-snapshot: writes a second (5000)")
    parser.add_argument("--kills", type=int, default=100, help="recovery: how often each is killed (100)")
    parser.add_argument("--restarts", type=int, default=20, help="recovery: how often the server restarts (20)")
    parser.add_argument("--adopt-rows", type=int, default=1_000_000, help="adopt: rows of the view (1000000)")
    parser.add_argument("--adopt-rate", type=float, default=1000, help="adopt: writes a second meanwhile (1000)")
    parser.add_argument("--fill-rows", type=int, default=2_000_000, help="fill: rows of the source (2000000)")
    parser.add_argument("--tables", type=int, default=200, help="doctor: how many source tables (200)")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.add_argument("--write", action="store_true", help="write the tables into docs/benchmarks.md too")
    options = parser.parse_args()
    if unknown := set(options.names) - set(ALL):
        parser.error(f"unknown benchmark {', '.join(sorted(unknown))}; there are {', '.join(ALL)}")
    tables: dict[str, list[str]] = {}
    with EmbeddedServer.start(settings={"shared_buffers": "4GB", "max_wal_size": "4GB"}) as server:
        where = environment(server)
        print(where, flush=True)
        for name in options.names or ALL:
            for result in ALL[name].run(server, options):
                tables.setdefault(name, []).append(_table(result))
                print(json.dumps(result.__dict__) if options.json else _table(result), flush=True)
    if options.write:
        _write(where, tables)


def _write(where: str, tables: dict[str, list[str]]) -> None:
    """Into the page, in the order of ALL; what other benchmarks printed before stays."""
    kept = dict(re.findall(r"(?ms)^<!-- ([a-z-]+) -->\n(.*?)(?=^<!-- |\Z)", PAGE.read_text()))
    for name, printed in tables.items():
        kept[name] = "\n".join([*printed, f"`make bench ARGS={name}`, {datetime.now(UTC):%Y-%m-%d}.", "", ""])
    parts = [f"<!-- {name} -->\n{kept[name]}" for name in ALL if name in kept]
    PAGE.write_text(f"# Benchmarks\n\nPrinted by `make bench`: {where}.\n\n{''.join(parts).rstrip()}\n")


def _table(result: Result) -> str:
    lines = [f"## {result.title}", "", " | ".join(["", *result.columns, ""]).strip()]
    lines.append("|" + " --- |" * len(result.columns))
    lines += [" | ".join(["", *map(str, row), ""]).strip() for row in result.rows]
    return "\n".join([*lines, "", *([result.note, ""] if result.note else [])])


if __name__ == "__main__":
    main()
