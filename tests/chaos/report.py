"""The table at the end, and whether it is good enough."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field

MEMORY_MAY_GROW = 1.10  # times
MEGABYTE = 1024 * 1024


@dataclass(frozen=True, slots=True)
class Held:
    """Resident bytes and file descriptors of a replica; connections of all replicas."""

    resident: int = 0
    descriptors: int = 0
    connections: int = 0


@dataclass
class Report:
    """What is known of a run; seconds."""

    seed: int
    most_connections: int
    recoveries: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    freshness: list[float] = field(default_factory=list)
    changes: int = 0
    refreshes: int = 0
    letters: int = 0
    compared: int = 0
    log_lines: int = 0
    before: Held = Held()
    after: Held = Held()
    troubles: list[str] = field(default_factory=list)

    def recovered(self, names: Sequence[str], seconds: float) -> None:
        """From the end of these faults until a write after them was shown."""
        for name in names:
            self.recoveries[name].append(seconds)


def judged(report: Report) -> bool:
    """Whether nothing was lost and nothing is left."""
    return not (report.troubles or _grown(report))


def _grown(report: Report) -> list[str]:
    before, after = report.before, report.after
    grown = []
    if after.resident > before.resident * MEMORY_MAY_GROW:
        grown.append("memory grew by more than a tenth")
    if after.connections > report.most_connections:
        grown.append("connections are left open")
    # The pool grows when it is asked for more, up to what was said at the start.
    if after.descriptors > before.descriptors + max(0, report.most_connections - before.connections):
        grown.append("file descriptors are left open")
    return grown


def printed(report: Report) -> str:
    """As Markdown."""
    before, after = report.before, report.after
    everything = [seconds for found in report.recoveries.values() for seconds in found]
    lines = [
        "| fault | injected | recovered after p50 (s) | max (s) |",
        "| --- | --- | --- | --- |",
        *(_line(name, found) for name, found in sorted(report.recoveries.items())),
        _line("all", everything),
        "",
        "| | start | end |",
        "| --- | --- | --- |",
        f"| memory of a replica (MB) | {before.resident / MEGABYTE:.0f} | {after.resident / MEGABYTE:.0f} |",
        f"| file descriptors of it | {before.descriptors} | {after.descriptors} |",
        f"| connections, at most {report.most_connections} | {before.connections} | {after.connections} |",
        "",
        (
            f"{report.changes:,} transactions committed, {report.refreshes:,} refreshes, worst freshness"
            f" {max(report.freshness, default=0):.2f} s (p50 {_median(report.freshness):.2f} s), {report.letters} dead"
            f" letters, {report.log_lines:,} log lines; {report.compared:,} keys compared,"
            f" {len(report.troubles)} troubles; seed {report.seed}"
        ),
        *(f"- {trouble}" for trouble in [*report.troubles, *_grown(report)]),
    ]
    return "\n".join(lines)


def _line(name: str, found: Sequence[float]) -> str:
    return f"| {name} | {len(found)} | {_median(found):.2f} | {max(found, default=0):.2f} |"


def _median(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2] if values else 0.0
