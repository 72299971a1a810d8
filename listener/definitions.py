"""Views as files have them against views as the database has them: what differs, and the statements that make it so."""

from __future__ import annotations

import difflib
from collections.abc import AsyncGenerator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import psycopg
from psycopg import sql
from psycopg.rows import DictRow, dict_row

from listener import queries
from listener.errors import SetupError
from listener.view_files import ViewFile, written

if TYPE_CHECKING:
    from psycopg import AsyncConnection

Action = Literal["create", "alter", "set", "none", "not in files"]
# What create_view takes where it is not given.
DEFAULTS: dict[str, Any] = {"tenant_column": "tenant_id", "timezone": "UTC", "target_rls": False, "key_columns": []}
WINDOW = ("quiet_period", "max_wait", "edge", "max_age", "max_staleness")
WINDOW_DEFAULTS = {"quiet_period": "00:00:00.25", "max_wait": "00:00:02", "edge": "leading"}


@dataclass(slots=True)
class Step:
    """What is to be done for one view.

    `changes`: a line for each thing that differs. `rebuild` and `window` are those arguments of begin_alter and
    set_window that are to change; `readers` have to be granted SELECT; `compute_role` holds the role to set, and is
    empty where it stays.
    """

    view: str
    action: Action
    file: ViewFile | None = None
    changes: list[str] = field(default_factory=list)
    diff: list[str] = field(default_factory=list)
    rebuild: dict[str, Any] = field(default_factory=dict)
    window: dict[str, Any] = field(default_factory=dict)
    readers: list[str] = field(default_factory=list)
    compute_role: list[str | None] = field(default_factory=list)

    @property
    def settings(self) -> list[str]:
        """The names of the settings that change without building the view again."""
        return [*self.window, *(["compute_role"] if self.compute_role else [])]


async def plan(connection: AsyncConnection[Any], files: list[ViewFile]) -> list[Step]:
    """A step for each file, in their order, and one for each managed view that none is of.

    Raises psycopg.Error, LSN03 where a query is none, and SetupError for what no alteration can do.
    """
    known = {row["name"]: row for row in await registered(connection)}
    steps = []
    seen: dict[str, ViewFile] = {}
    for file in files:
        row = _found(file.name, known)
        if row is None:
            steps.append(Step(file.name, "create", file, readers=list(file.readers)))
        elif row["name"] in seen:
            raise SetupError(f"{seen[row['name']].path} and {file.path} are both of the view {row['name']}.")
        else:
            seen[row["name"]] = file
            steps.append(await _compared(connection, file, row))
    return steps + [Step(name, "not in files") for name in sorted(known.keys() - seen.keys())]


def _found(name: str, known: dict[str, DictRow]) -> DictRow | None:
    if name in known:
        return known[name]
    spelled = [
        row
        for row in known.values()
        # As file_of() writes it, with quotes where it needs them, and without.
        if name in {row["target"], short_name(row), f"{row['target_schema']}.{row['target_name']}"}
    ]
    return spelled[0] if spelled else None


def short_name(row: DictRow) -> str:
    """The target as a file names it: with its schema, but for public."""
    return str(row["target"]).removeprefix("public.")


async def registered(connection: AsyncConnection[Any]) -> list[DictRow]:
    """Every managed view as it was registered, in the words of create_view; but for those that are being altered."""
    async with connection.cursor(row_factory=dict_row) as cursor:
        await cursor.execute(
            """
            SELECT v.name, v.strategy, v.target_schema::text, v.target_name::text,
                   quote_ident(v.target_schema) || '.' || quote_ident(v.target_name) AS target, v.query,
                   array_remove(v.key_columns, v.tenant_column)::text[] AS key_columns,
                   v.tenant_column::text, v.tenants_query, v.depends_on, v.time_zone AS timezone, v.target_rls,
                   v.quiet_period::text, v.max_wait::text, v.edge, v.max_age::text, v.max_staleness::text,
                   v.compute_role::text,
                   cardinality(v.key_columns) AS keys,
                   ARRAY(SELECT DISTINCT r.rolname::text
                         FROM pg_class c, aclexplode(c.relacl) x JOIN pg_roles r ON r.oid = x.grantee
                         WHERE c.oid = to_regclass(format('%I.%I', v.target_schema, v.target_name))
                           AND x.privilege_type = 'SELECT' AND x.grantee <> c.relowner
                           AND r.rolname <> listener.grantee_of(v)
                         ORDER BY 1) AS readers
            FROM listener.managed_view v WHERE v.replaces IS NULL ORDER BY v.name
            """
        )
        rows = await cursor.fetchall()
    for row in rows:
        # A key of the tenant alone is not the whole row.
        if row["keys"] and not row["key_columns"]:
            row["key_columns"] = [row["tenant_column"]]
    return rows


async def _compared(connection: AsyncConnection[Any], file: ViewFile, row: DictRow) -> Step:
    step = Step(row["name"], "none", file)
    wanted = DEFAULTS | file.options
    if row["strategy"] == "materialized view":
        raise SetupError(f"{row['name']} is a materialized view of your own: {file.path} cannot define it.")
    if wanted["tenant_column"] != row["tenant_column"]:
        raise SetupError(
            f"{file.path}: the tenant column of {row['name']} is {row['tenant_column']}, and cannot become "
            f"{wanted['tenant_column']}.",
            hint="Drop the view, and apply again.",
        )
    if not await queries.first(connection, "SELECT listener.same_query(%s, %s)", row["name"], file.query):
        step.rebuild["query"] = file.query
        step.changes.append("the query")
        before, after = row["query"].strip().splitlines(), file.query.splitlines()
        step.diff = list(difflib.unified_diff(before, after, "in the database", str(file.path), lineterm=""))
    keys = [key for key in wanted["key_columns"] if key != row["tenant_column"]] or wanted["key_columns"][:1]
    for name, value in (
        ("key_columns", keys),
        ("tenants_query", wanted.get("tenants_query")),
        ("timezone", wanted["timezone"]),
        ("target_rls", wanted["target_rls"]),
    ):
        if _stripped(value) != _stripped(row[name]):
            step.rebuild[name] = value if value is not None else ""
            step.changes.append(f"{name}: {_shown(row[name])} -> {_shown(value)}")
    if (depends_on := file.options.get("depends_on")) is not None:
        named = await queries.first(connection, "SELECT listener.qualified_names(%s::regclass[])", depends_on)
        if sorted(named) != sorted(row["depends_on"] or []):
            step.rebuild["depends_on"] = depends_on
            step.changes.append(f"depends_on: {_shown(row['depends_on'])} -> {_shown(named)}")
    await _compare_settings(connection, step, file, row)
    step.readers = [role for role in file.readers if role not in row["readers"]]
    step.changes += [f"{role} is to read it" for role in step.readers]
    if step.rebuild:
        step.action = "alter"
    elif step.changes:
        step.action = "set"
    return step


async def _compare_settings(connection: AsyncConnection[Any], step: Step, file: ViewFile, row: DictRow) -> None:
    async with connection.cursor(row_factory=dict_row) as cursor:
        # As create_view fills in what is not given; as text, so that '1 hour' and '60 min' are one.
        await cursor.execute(
            """
            SELECT w.quiet_period::text,
                   coalesce(%(max_wait)s::interval, greatest('2 s', w.quiet_period))::text AS max_wait,
                   coalesce(%(edge)s, 'leading') AS edge, (%(max_age)s::interval)::text AS max_age,
                   (%(max_staleness)s::interval)::text AS max_staleness
            FROM (SELECT coalesce(%(quiet_period)s::interval, '250 ms') AS quiet_period) w
            """,
            {name: file.options.get(name) for name in WINDOW},
        )
        wanted = await cursor.fetchone()
    assert wanted is not None
    for name in WINDOW:
        if wanted[name] != row[name]:
            step.window[name] = wanted[name]
            step.changes.append(f"{name}: {_shown(row[name])} -> {_shown(wanted[name])}")
    if (role := file.options.get("compute_role")) != row["compute_role"]:
        step.compute_role = [role]
        step.changes.append(f"compute_role: {_shown(row['compute_role'])} -> {_shown(role)}")


def _stripped(value: Any) -> Any:
    return value.strip().rstrip(";") if isinstance(value, str) else value


def _shown(value: Any) -> str:
    if value is None or value == []:
        return "none"
    return ", ".join(value) if isinstance(value, list) else str(value)


async def create(connection: AsyncConnection[Any], file: ViewFile) -> None:
    """listener.create_view() as the file says. Raises psycopg.Error: nothing was made then."""
    given: dict[str, Any] = {"name": file.name, "query": file.query} | {
        name: value for name, value in file.options.items() if name != "search_path"
    }
    casts = {"key_columns": "name[]", "depends_on": "regclass[]"}
    arguments = sql.SQL(", ").join(
        sql.SQL("{} => {}::{}").format(sql.SQL(name), sql.Literal(value), sql.SQL(casts[name]))
        if name in casts
        else sql.SQL("{} => {}").format(sql.SQL(name), sql.Literal(value))
        for name, value in given.items()
    )
    path = sql.Literal(file.options["search_path"]) if "search_path" in file.options else queries.ROLES_PATH
    await connection.execute(
        sql.SQL(
            "WITH path AS MATERIALIZED (SELECT set_config('search_path', {}, true))"
            " SELECT listener.create_view({}) FROM path"
        ).format(path, arguments)
    )


async def create_all(connection: AsyncConnection[Any], files: list[ViewFile]) -> AsyncGenerator[ViewFile]:
    """create(), whichever order they need, since one may read another; yields each that is made.

    Raises psycopg.Error of the first that cannot be made once all that can be are.
    """
    waiting = files
    while waiting:
        failed: list[tuple[ViewFile, psycopg.Error]] = []
        for file in waiting:
            try:
                await create(connection, file)
            except psycopg.Error as error:
                if connection.broken or connection.closed:
                    raise
                failed.append((file, error))
            else:
                yield file
        if len(failed) == len(waiting):
            raise failed[0][1]
        waiting = [file for file, _ in failed]


async def set_settings(connection: AsyncConnection[Any], step: Step) -> None:
    """listener.set_compute_role() and listener.set_window() for what differs. Raises psycopg.Error."""
    for role in step.compute_role:
        await connection.execute("SELECT listener.set_compute_role(%s, %s)", (step.view, role))
    if not step.window:
        return
    await connection.execute(
        """
        SELECT listener.set_window(%(view)s, %(quiet_period)s::interval, %(max_wait)s::interval, %(edge)s,
                                   %(max_age)s::interval, without_max_age => %(without_max_age)s,
                                   max_staleness => %(max_staleness)s::interval,
                                   without_max_staleness => %(without_max_staleness)s)
        """,
        {name: step.window.get(name) for name in WINDOW}
        | {f"without_{name}": step.window.get(name, "") is None for name in ("max_age", "max_staleness")}
        | {"view": step.view},
    )


async def grant(connection: AsyncConnection[Any], view: str, readers: list[str]) -> None:
    """SELECT on the target, to each. Raises psycopg.Error for a role that is not there."""
    for role in readers:
        await connection.execute("SELECT listener.grant_reader(%s, %s)", (view, role))


def file_of(row: DictRow) -> str:
    """The text of a file of a registered view: what is as create_view would have it anyway is left out."""
    whole = row["strategy"] == "whole"
    options = {
        name: row[name]
        for name in (
            "key_columns",
            "tenant_column",
            "tenants_query",
            "depends_on",
            *WINDOW,
            "timezone",
            "target_rls",
            "compute_role",
        )
        if row[name] is not None and row[name] != (DEFAULTS | WINDOW_DEFAULTS).get(name)
    }
    if whole:
        options["whole"] = True
    return written(short_name(row), row["query"], options, row["readers"])
