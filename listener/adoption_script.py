"""What adopt and unadopt do, as a script for psql: --dry-run prints it."""

from __future__ import annotations

from listener import adoptions
from listener.adoptions import Plan, Request

ADOPT = """\
-- listener adopt {name}, dry run: nothing was changed.
-- For psql, as a member of the owner of the schema listener. Each statement is a transaction of its own; until the last
-- {name} stays as it is.

-- Locks {sources}: SHARE ROW EXCLUSIVE, for a moment each.
{begin};
-- makes the target next to it, with the key ({key}), refreshed {how}, computed in the time zone {zone}, and runs
{beside}
{losses}
-- The service fills it; without the service:
SELECT format('SELECT outcome FROM listener.refresh(%L, %L::text)', {view}::text, t)
FROM listener.tenants({view}) t \\gexec

-- Each must return no row:
SELECT t, c.* FROM listener.tenants({view}) t, listener.compare({view}, t) c
WHERE c.missing + c.extra > 0 AND NOT c.stale;
{by_tenant}
SELECT listener.analyze_replacement({view});

-- Locks {locks}: ACCESS EXCLUSIVE, for a moment.
-- Behind a reader it fails, having done nothing, and is to be tried again.
SELECT listener.finish_adoption({view});
-- runs
{swap}
"""
DIFFERING = "SELECT * FROM listener.differing_tenants({view});"

UNADOPT = """\
-- listener unadopt {name}, dry run: nothing was changed.
-- For psql, as a member of the owner of the schema listener. Each statement is a transaction of its own.

SELECT listener.begin_unadoption({view});
-- runs
{beside}
{fill}
SELECT listener.analyze_replacement({view});

-- Locks {locks}: ACCESS EXCLUSIVE, for a moment.
-- Behind a reader it fails, having done nothing, and is to be tried again.
SELECT listener.finish_unadoption({view});
-- runs
{swap}

SELECT listener.drop_view({view}, keep_target => true);
"""


# The rows are the target's: all of one now().
REFRESHED = """\
BEGIN;
SELECT count(*) FROM listener.tenants({view}) t CROSS JOIN LATERAL listener.refresh({view}, t) r;
{fill}
COMMIT;"""


def script(request: Request, plan: Plan, begin: str) -> str:
    """What adopt would do; `begin` is the statement that begins it."""
    view = adoptions.literal(plan["view"][0])
    return ADOPT.format(
        begin=begin,
        sources=_in_one_line(plan["source"]),
        key=_in_one_line(plan["key"]) or "the whole row",
        how=_how(request, plan),
        zone=_in_one_line([request.timezone or plan["time zone"][0]]),
        losses="".join(f"-- {_in_one_line([loss])}\n" for loss in plan["loss"]),
        by_tenant=DIFFERING.format(view=view) if request.tenant_column else "-- As a whole: there are no tenants.",
        **_common(plan),
    )


def script_back(plan: Plan) -> str:
    """What unadopt would do."""
    view = adoptions.literal(plan["view"][0])
    fill = f"SELECT listener.fill_unadoption({view});"
    if plan["now"]:
        fill = REFRESHED.format(view=view, fill=fill)
    if plan["filled"]:
        fill += f"\n-- runs\n{_commented(plan['filled'])}"
    return UNADOPT.format(fill=fill, **_common(plan))


def _how(request: Request, plan: Plan) -> str:
    strategy = "by tenant" if request.tenant_column else "as a whole"
    age = request.max_age or _in_one_line(plan["max_age"])
    return f"{strategy}, each key at least once in {_in_one_line([age])}" if age else strategy


def _common(plan: Plan) -> dict[str, str]:
    return {
        "name": _in_one_line(plan["name"]),
        "view": adoptions.literal(plan["view"][0]),
        "locks": _in_one_line(plan["lock"]),
        "beside": _commented(plan["beside"]),
        "swap": _commented(plan["swap"]),
    }


def _commented(statements: list[str]) -> str:
    return "\n".join(f"--   {line}" for one in statements for line in f"{one.rstrip(';')};".splitlines())


def _in_one_line(names: list[str]) -> str:
    """For a comment, which a name with a line break must not end."""
    return " ".join(", ".join(names).splitlines())
