"""The SQL of adopting: one function per statement."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, replace
from typing import Any

from psycopg import AsyncConnection, sql

from listener import queries

# What would be done, by part: see listener.plan_adoption().
Plan = dict[str, list[str]]


@dataclass(frozen=True, slots=True)
class Request:
    """What is to be adopted and how, as listener.begin_adoption() takes it; None: its default."""

    name: str
    strategy: str | None = None
    key_columns: tuple[str, ...] | None = None
    tenant_column: str | None = "tenant_id"
    tenants_query: str | None = None
    depends_on: tuple[str, ...] | None = None
    quiet_period: str | None = None
    max_wait: str | None = None
    max_age: str | None = None
    timezone: str | None = None
    target_rls: bool = False
    owner: str | None = None
    compute_role: str | None = None

    def by(self, strategy: str) -> Request:
        """The same by this strategy: a view that is refreshed as a whole has no tenants."""
        if strategy == "tenant":
            return replace(self, strategy=strategy)
        return replace(self, strategy=strategy, tenant_column=None, tenants_query=None, target_rls=False)


def literal(text: str) -> str:
    """As SQL writes it."""
    return sql.Literal(text).as_string(None)


def begin_statement(request: Request, *, path: sql.Composable | None = None) -> sql.Composed:
    """SELECT listener.begin_adoption(…), with the arguments that are not its defaults."""
    given: dict[str, sql.Composable] = {"name": sql.Literal(request.name)}
    if request.tenant_column is None:
        given["tenant_column"] = sql.SQL("NULL")
    elif request.tenant_column != "tenant_id":
        given["tenant_column"] = sql.Literal(request.tenant_column)
    for name in ("key_columns", "depends_on"):
        if (columns := getattr(request, name)) is not None:
            cast = "name[]" if name == "key_columns" else "regclass[]"
            given[name] = sql.SQL("{}::{}").format(sql.Literal(list(columns)), sql.SQL(cast))
    for name in ("tenants_query", "quiet_period", "max_wait", "max_age", "timezone", "owner", "compute_role"):
        if (value := getattr(request, name)) is not None:
            given[name] = sql.Literal(value)
    if request.target_rls:
        given["target_rls"] = sql.SQL("true")
    if path is not None:
        given["search_path"] = path
    arguments = [sql.SQL("{} => {}").format(sql.SQL(name), value) for name, value in given.items()]
    return sql.SQL("SELECT listener.begin_adoption({})").format(sql.SQL(", ").join(arguments))


async def _plan(connection: AsyncConnection[Any], query: Any, *given: Any) -> Plan:
    found: Plan = defaultdict(list)
    for part, statement in await (await connection.execute(query, given)).fetchall():
        found[part].append(statement)
    return found


async def begin(connection: AsyncConnection[Any], request: Request) -> str:
    """The name of the managed view that stands beside the materialized view now."""
    return str(await queries.first(connection, begin_statement(request, path=queries.ROLES_PATH)))


@asynccontextmanager
async def rehearsal(connection: AsyncConnection[Any]) -> AsyncIterator[None]:
    """A transaction that tries adopting without triggers and notices, and is rolled back."""
    async with connection.transaction(force_rollback=True):
        await connection.execute("SET LOCAL client_min_messages = error")
        await connection.execute("SELECT listener.begin_rehearsal()")
        yield


async def plan(connection: AsyncConnection[Any], request: Request) -> Plan:
    """What adopt would do. Raises psycopg.Error where it would refuse the materialized view."""
    keys = None if request.key_columns is None else list(request.key_columns)
    return await _plan(
        connection,
        sql.SQL("SELECT * FROM listener.plan_adoption(%s, %s::name[], %s::name, %s::name, {})").format(
            queries.ROLES_PATH
        ),
        request.name,
        keys,
        request.tenant_column,
        request.owner,
    )


async def plan_back(connection: AsyncConnection[Any], view: str) -> Plan:
    """What unadopt would do."""
    return await _plan(connection, "SELECT * FROM listener.plan_unadoption(%s)", view)


async def has_column(connection: AsyncConnection[Any], name: str, column: str | None) -> bool:
    """Whether the materialized view has it. Raises psycopg.Error where there is no such materialized view."""
    return bool(
        await queries.first(
            connection,
            sql.SQL(
                """
                SELECT EXISTS (SELECT FROM pg_attribute a
                               WHERE a.attrelid = listener.find_materialized_view(%s, {})
                                 AND a.attname = %s AND a.attnum > 0 AND NOT a.attisdropped)
                """
            ).format(queries.ROLES_PATH),
            name,
            column,
        )
    )


async def tied(connection: AsyncConnection[Any], name: str) -> bool:
    """Whether something is tied to the materialized view that a swap could not lead over."""
    return bool(
        await queries.first(
            connection,
            sql.SQL("SELECT EXISTS (SELECT listener.tied_to(listener.find_materialized_view(%s, {})))").format(
                queries.ROLES_PATH
            ),
            name,
        )
    )


def keep_statement(request: Request) -> str:
    """SELECT listener.keep_materialized_view(…), for somebody to read."""
    given = [("", literal(request.name))]
    given += [
        (f"{name} => ", literal(value))
        for name in ("quiet_period", "max_wait")
        if (value := getattr(request, name)) is not None
    ]
    age = literal(request.max_age) if request.max_age else "NULL"
    given.append(("max_age => ", f"listener.adopted_max_age({literal(request.name)}, {age})"))
    zone = literal(request.timezone) if request.timezone else "listener.default_time_zone()"
    given.append(("timezone => ", zone))
    if request.depends_on is not None:
        given.append(("depends_on => ", literal("{" + ",".join(request.depends_on) + "}")))
    return f"SELECT listener.keep_materialized_view({', '.join(name + value for name, value in given)});"


async def keep(connection: AsyncConnection[Any], request: Request) -> str:
    """Registers the materialized view as it is; the name of the managed view."""
    depends_on = None if request.depends_on is None else list(request.depends_on)
    relation = await queries.first(
        connection,
        sql.SQL("SELECT listener.find_materialized_view(%s, {})::text").format(queries.ROLES_PATH),
        request.name,
    )
    await connection.execute(
        """
        SELECT listener.keep_materialized_view(
            %s::regclass, quiet_period => %s::interval, max_wait => %s::interval,
            max_age => listener.adopted_max_age(%s::regclass, %s::interval),
            timezone => coalesce(%s, listener.default_time_zone()), depends_on => %s::regclass[])
        """,
        (
            relation,
            request.quiet_period,
            request.max_wait,
            relation,
            request.max_age,
            request.timezone,
            depends_on,
        ),
    )
    return str(
        await queries.first(
            connection,
            "SELECT v.name FROM listener.managed_view v WHERE format('%%I.%%I', v.target_schema, v.target_name) = %s",
            relation,
        )
    )


async def state(connection: AsyncConnection[Any], name: str) -> tuple[str, str, str | None]:
    """Name, strategy and state of adoption of a managed view; None where it was not adopted."""
    cursor = await connection.execute(
        """
        SELECT v.name, v.strategy, a.state
        FROM listener.find_view(%s) v LEFT JOIN listener.adoption a ON a.view_id = v.id
        """,
        (name,),
    )
    row = await cursor.fetchone()
    assert row is not None
    return row[0], row[1], row[2]


async def is_proven(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether each tenant's rows depend on its own alone, and its tenants query lists all whose rows there are."""
    return bool(await queries.first(connection, "SELECT listener.is_by_tenant(%s)", view))


async def is_tenant_local(connection: AsyncConnection[Any], view: str) -> bool:
    """Whether the planner proves it of the query, leaving aside what row-level security shows to whom."""
    return bool(
        await queries.first(
            connection,
            """
            SELECT coalesce(bool_and(s.proven), true)
            FROM listener.managed_view v
            CROSS JOIN LATERAL listener.tenant_scope(
                to_regclass('listener.definition_' || v.id), v.tenant_column, v.tenant_type) s
            WHERE v.name = %s
            """,
            view,
        )
    )


async def why_not_by_tenant(connection: AsyncConnection[Any], view: str) -> str | None:
    """Why it is not known that its rows are right; None: it is, or a comparison will show it."""
    found = await queries.first(connection, "SELECT listener.why_not_by_tenant(%s)", view)
    return None if found is None else str(found)


async def hidden_from_owner(connection: AsyncConnection[Any], view: str) -> tuple[str, str] | None:
    """A table whose rows row-level security hides from the owner of the materialized view, and that owner."""
    cursor = await connection.execute(
        """
        SELECT h.hidden::text, a.owner_role
        FROM listener.managed_view v JOIN listener.adoption a ON a.view_id = v.id
        CROSS JOIN LATERAL (SELECT listener.hidden_from_owner(a.relid) AS hidden) h
        WHERE v.name = %s AND h.hidden IS NOT NULL
        """,
        (view,),
    )
    return await cursor.fetchone()


async def rows_changed(connection: AsyncConnection[Any], view: str) -> int | None:
    """How many rows differ from those of the materialized view; None: not known."""
    found = await queries.first(connection, "SELECT listener.rows_changed(%s)", view)
    return None if found is None else int(found)


async def refresh_and_compare(connection: AsyncConnection[Any], view: str, tenant: str) -> bool:
    """Refreshes a tenant, and compares its rows with the query at the same now(). False also while the key is busy."""
    return bool(
        await queries.first(
            connection,
            """
            SELECT c.stale OR (r.outcome = 'refreshed' AND c.missing + c.extra = 0)
            FROM listener.refresh(%s, %s::text) r
            CROSS JOIN LATERAL listener.compare(%s, CASE WHEN r.outcome IS NOT NULL THEN %s::text END) c
            """,
            view,
            tenant,
            view,
            tenant,
        )
    )


async def differing_tenants(connection: AsyncConnection[Any], view: str) -> list[str | None]:
    """The tenants that cannot be computed alone."""
    cursor = await connection.execute("SELECT d.tenant FROM listener.differing_tenants(%s) d", (view,))
    return [row[0] for row in await cursor.fetchall()]


async def analyze(connection: AsyncConnection[Any], view: str) -> None:
    """Statistics for what is to be put in place."""
    await connection.execute("SELECT listener.analyze_replacement(%s)", (view,))


async def finish(connection: AsyncConnection[Any], view: str) -> float:
    """The swap; how many seconds readers were locked out."""
    return float(
        await queries.first(connection, "SELECT extract(epoch FROM listener.finish_adoption(%s))::float8", view)
    )


async def begin_back(connection: AsyncConnection[Any], view: str) -> None:
    """Makes the materialized view beside the target."""
    await connection.execute("SELECT listener.begin_unadoption(%s)", (view,))


async def fills_from_target(connection: AsyncConnection[Any], view: str) -> tuple[bool, bool]:
    """Whether the materialized view is filled from the target, and whether the rows depend on the time."""
    cursor = await connection.execute("SELECT is_so, depends_on_time FROM listener.fills_from_target(%s)", (view,))
    row = await cursor.fetchone()
    assert row is not None
    return row[0], row[1]


async def fill_back(connection: AsyncConnection[Any], view: str) -> None:
    """Fills it, and compares it with the query."""
    await connection.execute("SELECT listener.fill_unadoption(%s)", (view,))


async def finish_back(connection: AsyncConnection[Any], view: str) -> float:
    """The swap back; how many seconds readers were locked out."""
    return float(
        await queries.first(connection, "SELECT extract(epoch FROM listener.finish_unadoption(%s))::float8", view)
    )


async def under_way(connection: AsyncConnection[Any], name: str) -> str | None:
    """The managed view of an adoption that was begun for this materialized view; None where none was."""
    found = await queries.first(
        connection,
        sql.SQL(
            """
            SELECT v.name FROM listener.adoption a JOIN listener.managed_view v ON v.id = a.view_id
            WHERE a.state = 'filling' AND to_regclass(format('%%I.%%I', a.schema_name, a.relation_name))
                                          = listener.find_materialized_view(%s, {})
            """
        ).format(queries.ROLES_PATH),
        name,
    )
    return None if found is None else str(found)


async def begun_at(connection: AsyncConnection[Any], view: str) -> tuple[int, str] | None:
    """Which adoption, or turning back, of this view is under way: the view's id and when that began."""
    cursor = await connection.execute(
        """
        SELECT a.view_id, a.begun_at::text FROM listener.adoption a JOIN listener.managed_view v ON v.id = a.view_id
        WHERE v.name = %s
        """,
        (view,),
    )
    return await cursor.fetchone()


async def abort(connection: AsyncConnection[Any], view: str) -> None:
    """Takes back what stands beside."""
    await connection.execute("SELECT listener.abort_adoption(%s)", (view,))


async def drop(connection: AsyncConnection[Any], view: str) -> None:
    """Ends the managed view; what stands in its place stays."""
    await connection.execute("SELECT listener.drop_view(%s, keep_target => true)", (view,))
