"""What there is to take over: inventory."""

from __future__ import annotations

import textwrap
from datetime import timedelta
from typing import Annotated, Any

import typer

from listener import console
from listener import inventory as stock
from listener.cli.session import Connection, Json, app, with_connection

WIDTH = 100
PROPOSED = {
    "tenant": "adopt it, by tenant",
    "whole": "adopt it, as a whole",
    "materialized view": "keep it a materialized view that is refreshed on change",
    "refused": "nothing",
}


@app.command()
def inventory(
    tenant_column: Annotated[
        list[str] | None,
        typer.Option("--tenant-column", help="what the tenant's column is called; may be given several times"),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="compute each materialized view's query, and count what differs")
    ] = False,
    timeout: Annotated[float, typer.Option("--timeout", min=0.1, help="seconds that one comparison may take")] = 10,
    as_json: Json = False,
) -> None:
    """Every materialized view and managed view: what it reads, who refreshes it, how stale it is, what adopt would do.

    Changes nothing, and plans each query without running it; --compare runs them. Run it as an administrator, or as a
    member of the views' owners: what a role may not see is not shown.
    """

    async def act(connection: Connection) -> None:
        found: list[dict[str, Any]] = []
        with console.progress(quiet=as_json) as bar:
            task = bar.add_task("inventory", total=None)
            within = timedelta(seconds=timeout) if compare else None
            async for done, total, one in stock.take_stock(connection, tenant_column or [], compare_within=within):
                bar.update(task, completed=done, total=total)
                if one is not None:
                    found.append(one)
        if as_json:
            console.print_json({"views": [one | {"staleness": _staleness(one)} for one in found]})
            return
        for one in found:
            _print(one)
        console.out.print(_summary(found))

    with_connection(act)


def _print(one: dict[str, Any]) -> None:
    """A block: the name, then a line or more for each thing that is known."""
    console.out.print(one["relation"], soft_wrap=True)
    for what, told in _facts(one):
        wrapped = textwrap.wrap(told, WIDTH - 15, break_long_words=False, break_on_hyphens=False) or [""]
        for number, line in enumerate(wrapped):
            console.out.print(f"  {what if number == 0 else '':<12} {line}", soft_wrap=True)
    console.out.print("")


def _facts(one: dict[str, Any]) -> list[tuple[str, str]]:
    if "error" in one:
        return [("error", one["error"])]
    facts = [("what", _what(one)), ("reads", ", ".join(one["reads"]) or "no table"), ("tenant", _tenant(one))]
    facts += [("", finding) for finding in one["findings"]]
    if one["timed"]:
        facts.append(("time", f"depends on {', '.join(one['timed'])}: max_age {_interval(one['max_age'])} at most"))
    if one["zoned"]:
        facts.append(("time zone", f"depends on the session's: {', '.join(one['zoned'])}"))
    if one["volatile"]:
        facts.append(("volatile", f"{', '.join(one['volatile'])}: may be another at each refresh"))
    by = one["refreshed_by"] or ["nothing that the database shows; cron and applications are not seen here"]
    facts += [("refreshed by", ", ".join(by)), ("stale", _staleness(one))]
    if one["managed"] is None:
        facts.append(("proposal", f"{PROPOSED[one['proposed']]}: {one['why']}"))
        if one["key_columns"] is not None and one["proposed"] != "refused":
            facts.append(("key", ", ".join(one["key_columns"]) or "the whole row, since no unique index says less"))
        facts += [("before", mend) for mend in one["mends"]]
    return facts


def _what(one: dict[str, Any]) -> str:
    parts = [f"managed as {one['managed']}, strategy {one['strategy']}" if one["managed"] else one["kind"]]
    parts.append(f"owner {one['owner']}")
    parts.append("rows not counted yet" if one["rows"] is None else f"about {console.count(one['rows'], 'row')}")
    if one["bytes"] is not None:
        parts.append(_size(one["bytes"]))
    if one["kind"] == "materialized view":
        key = one["unique_key"]
        parts.append(f"unique index on {', '.join(key)}" if key else "no unique index for CONCURRENTLY")
        if not one["populated"]:
            parts.append("never populated")
    return ", ".join(parts)


def _tenant(one: dict[str, Any]) -> str:
    if one["tenant_column"] is None:
        return "no column by that name (see --tenant-column)"
    verdict = {
        True: "each tenant's rows depend on that tenant's rows alone",
        False: "not proven that a tenant's rows depend on that tenant's rows alone",
        None: "not known whether a tenant's rows depend on that tenant's rows alone",
    }[one["separable"]]
    return f"{one['tenant_column']} ({one['tenant_type']}): {verdict}"


def _staleness(one: dict[str, Any]) -> str:
    if "error" in one:
        return "unknown"
    if one["managed"] is not None:
        refreshed = f"refreshed {console.text(one['refreshed_at'])}" if one["refreshed_at"] else "never refreshed"
        stale = f"{console.count(one['dirty'], 'key')} not fresh" if one["dirty"] else "fresh"
        return f"{stale}, {refreshed}"
    return _difference(one)


def _difference(one: dict[str, Any]) -> str:
    if "missing" in one:
        if not one["missing"] and not one["extra"]:
            return "not at all: it has the rows that its query has now"
        return f"{console.count(one['missing'], 'row')} missing, {console.count(one['extra'], 'row')} too many"
    if "not_compared" in one:
        return f"unknown: {one['not_compared']}"
    if one["rewritten_at"] is not None:
        return (
            f"unknown: rewritten or altered {console.text(one['rewritten_at'])}, "
            "and perhaps refreshed CONCURRENTLY since; --compare counts what differs"
        )
    return f"unknown: {stock.NO_TIME}; --compare counts what differs"


def _interval(value: timedelta) -> str:
    return "1 hour" if value >= timedelta(hours=1) else "1 min"


def _size(size: float) -> str:
    for unit in ("bytes", "kB", "MB"):
        if size < 10 * 1024:
            return f"{size:.0f} {unit}"
        size /= 1024
    return f"{size:.0f} GB"


def _summary(found: list[dict[str, Any]]) -> str:
    managed = sum(one.get("managed") is not None for one in found)
    kinds = [(what, sum(one.get("proposed") == what for one in found)) for what in PROPOSED]
    told = ", ".join(f"{number} {what}" for what, number in kinds if number)
    return f"{console.count(len(found), 'view')}, {managed} managed" + (f"; proposals: {told}" if told else "")
