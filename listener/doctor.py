"""What is wrong with the set-up, before it hurts: the checks of `listener doctor`.

What the database knows of itself it says in one question (sql/26_doctor.sql to sql/28_doctor_findings.sql); here is
what only a client sees: whether it gets there, through what, which release answers, what time it is there.
"""

from __future__ import annotations

import re
import shlex
import time
import uuid
from collections.abc import AsyncIterator
from contextlib import suppress
from functools import partial
from typing import Any, NamedTuple

import psycopg
from psycopg import sql
from psycopg.conninfo import conninfo_to_dict

from listener import connections, pooler, queries, server_queries, startup
from listener.database_url import describe, libpq_url
from listener.errors import SetupError, from_database
from listener.settings import Settings

Connection = psycopg.AsyncConnection[Any]

LEVELS = ("error", "warning", "ok")
# Below these, vacuum may take away what the server needs to hand out notifications that were sent long ago, and LISTEN
# fails with "could not access status of transaction" until the server is restarted.
FIRST_SOUND_MINOR = {15: 16, 16: 12, 17: 8, 18: 2}
SKEW = 5.0  # seconds between the server's clock and ours that nobody need care about


class Finding(NamedTuple):
    """One thing that was looked at; `problem` is one sentence, `mend` the one command, None where all is well."""

    check: str
    level: str
    view: str | None
    object: str
    problem: str
    mend: str | None


async def examine(settings: Settings) -> list[Finding]:
    """Everything that can be found out, errors first. A database that cannot be used is a finding, too."""
    found = [finding async for finding in _examined(settings)]
    return sorted(found, key=lambda f: (LEVELS.index(f.level), f.check, f.object, f.problem))


async def _examined(settings: Settings) -> AsyncIterator[Finding]:
    url = settings.database_url.get_secret_value()
    try:
        async with await connections.direct(url, "listener doctor") as connection:
            reads_only = await _only_reads(connection, url)
            yield reads_only or _well("connection", describe(url), "it is reached, and can be written to")
            yield minor_release(connection.info.server_version)
            broken = await _schema(connection, url, settings)
            yield broken or _well("schema", "schema listener", "it is of this release")
            asked_at = time.time()
            server = await server_queries.server_time(connection)
            yield clock(server - (asked_at + time.time()) / 2)
            if reads_only is None:
                async for finding in _listening(connection, settings):
                    yield finding
            if broken is None:
                async for finding in _asked(connection, settings, may_plan=reads_only is None):
                    yield finding
    except (psycopg.Error, SetupError) as error:
        yield unusable(error, url, settings)


async def _asked(connection: Connection, settings: Settings, *, may_plan: bool) -> AsyncIterator[Finding]:
    """What the database says of itself. A check that cannot be made is a finding: rights may be what is missing."""
    most = connections.most(settings)
    distrusted: list[str] = []
    for check, ask in (
        ("rights", queries.state_findings),
        ("capture", queries.capture_findings),
        ("progress", queries.progress_findings),
        ("result", queries.result_findings),
        ("server", partial(queries.server_findings, replica_connections=most)),
        # Without what its rights and policies should be, a view is not planned as it should be.
        ("scope", partial(queries.scope_findings, left_out=distrusted)),
    ):
        if check == "scope" and not may_plan:
            continue  # it takes temporary tables
        try:
            for row in await ask(connection):
                finding = Finding(**row)
                if finding.view and finding.level != "ok" and finding.check in {"rights", "row security", "view"}:
                    distrusted += finding.view.split(", ")
                yield finding
        except psycopg.errors.InsufficientPrivilege as error:
            problem = f"it cannot be asked: {error.diag.message_primary}."
            yield Finding(check, "error", None, f"the check of {check}", problem, _lets_ask(error, settings))


def _lets_ask(error: psycopg.Error, settings: Settings) -> str:
    """What lets a check be made: the owner's role, as which it looks, may be kept out of a schema."""
    schema = re.fullmatch("permission denied for schema (.+)", error.diag.message_primary or "")
    if schema is None or schema[1] == "listener":
        return "listener migrate"
    names = sql.Identifier(schema[1]).as_string(), sql.Identifier(settings.owner_role).as_string()
    return "GRANT USAGE ON SCHEMA {} TO {};".format(*names)


def _well(check: str, what: str, why: str) -> Finding:
    return Finding(check, "ok", None, what, why, None)


def minor_release(version: int) -> Finding:
    """Whether notifications are safe in this release of PostgreSQL; `version` as server_version_num has it."""
    major, minor = divmod(version, 10000)
    needed = FIRST_SOUND_MINOR.get(major, 0)
    name = f"PostgreSQL {major}.{minor}"
    if major < min(FIRST_SOUND_MINOR):
        return Finding("server", "error", None, name, "15 or newer is needed.", "upgrade PostgreSQL to 15 or newer")
    if minor >= needed:
        return _well("server", name, "no fault of LISTEN is known in it")
    return Finding(
        "server",
        "warning",
        None,
        name,
        'LISTEN may fail in it with "could not access status of transaction", after a vacuum.',
        f"upgrade PostgreSQL to {major}.{needed} or newer",
    )


def clock(skew: float) -> Finding:
    """`skew`: by how many seconds the server's clock is ahead of ours."""
    if abs(skew) <= SKEW:
        return _well("server", "clock", "the server's and this machine's agree")
    where = "ahead of" if skew > 0 else "behind"
    problem = f"the server's is {abs(skew):.0f} s {where} this machine's: times in logs and in tables do not match."
    return Finding("server", "warning", None, "clock", problem, "timedatectl set-ntp true")


async def _only_reads(connection: Connection, url: str) -> Finding | None:
    """What keeps this connection from writing, None where nothing does."""
    is_standby, told_by = await server_queries.read_only_reason(connection)
    if is_standby:
        wanted = f"{describe(url)}?target_session_attrs=read-write"
        mend = f"export LISTENER_DATABASE_URL={shlex.quote(wanted)}"
        return Finding("connection", "error", None, describe(url), "it is a standby, and cannot be written to.", mend)
    if told_by is None:
        return None
    problem = "its sessions only read: default_transaction_read_only is on."
    return Finding("connection", "error", None, describe(url), problem, f"{told_by};")


async def _schema(connection: Connection, url: str, settings: Settings) -> Finding | None:
    """Why the schema cannot be used by this role and release, None where it can."""
    missing = await server_queries.missing_roles(connection, [settings.owner_role, settings.service_role])
    try:
        await startup.schema_facts(connection, url, settings)
    except (SetupError, psycopg.Error) as error:
        return unusable(error, url, settings, missing)
    return None


async def _listening(connection: Connection, settings: Settings) -> AsyncIterator[Finding]:
    """Whether what is notified is heard, by a round trip, and whether a pooler stands between."""
    name, url = startup.listen_url(settings)
    try:
        async with await connections.direct(url, "listener doctor") as listening:
            if await server_queries.database_identity(listening) != await server_queries.database_identity(connection):
                problem = f"{name} leads to another database than LISTENER_DATABASE_URL."
                yield Finding("connection", "error", None, describe(url), problem, f"unset {name}")
                return
            patience = settings.probe_timeout.total_seconds()
            if not await pooler.hears(listening, connection, uuid.uuid4().hex, patience):
                problem = (
                    f"{name} goes through a transaction pooler: no notification is ever heard there."
                    if await pooler.is_pooled(listening)
                    else f"a notification did not arrive within {patience:g} s."
                )
                direct = await server_queries.direct_address(listening)
                mend = f"export LISTENER_LISTEN_DATABASE_URL={shlex.quote(direct)}"
                yield Finding("connection", "error", None, describe(url), problem, mend)
                return
            yield _well("connection", name, "a notification that was sent was heard")
            pooled = await pooler.is_pooled(connection)
            through = "goes through a transaction pooler" if pooled else "leads to the server itself"
            yield _well("connection", "LISTENER_DATABASE_URL", through)
    except (psycopg.Error, SetupError) as error:
        yield unusable(error, url, settings)


def unusable(
    error: psycopg.Error | SetupError, url: str, settings: Settings, missing_roles: list[str] | None = None
) -> Finding:
    """Why the database cannot be used, and the one command that changes that."""
    known = error if isinstance(error, SetupError) else from_database(error)
    said = str(known.args[0])
    parts: dict[str, Any] = {}
    with suppress(psycopg.Error, SetupError):
        parts = conninfo_to_dict(libpq_url(url))
    user, database = str(parts.get("user") or settings.service_role), str(parts.get("dbname") or "")
    as_whom = shlex.quote(f'\\password "{user}"')
    if missing_roles or f'role "{user}" does not exist' in said:
        mend = f"listener roles --database {shlex.quote(database)} | psql --dbname {shlex.quote(database)}"
        if missing_roles:
            said = f"the roles {' and '.join(missing_roles)} are not there." if len(missing_roles) > 1 else (
                f"the role {missing_roles[0]} is not there."
            )  # fmt: skip
    elif "password" in said or "no password supplied" in said:
        mend = f"psql --dbname {shlex.quote(database)} --command {as_whom}"
    elif "does not exist" in said and "database" in said:
        mend = f"createdb {shlex.quote(database)}"
    elif "pg_hba.conf" in said:
        mend = "psql --command 'TABLE pg_hba_file_rules'"
    elif "may not use it" in said and user == settings.service_role:
        mend = f"GRANT USAGE ON SCHEMA listener TO {user};"
    elif isinstance(error, SetupError):
        mend = _command_in(known.hint or "") or known.hint or ""
    else:
        host, port = str(parts.get("host") or "localhost"), str(parts.get("port") or 5432)
        mend = f"pg_isready --host {shlex.quote(host)} --port {port}"
    where = describe(url) if parts else "LISTENER_DATABASE_URL"
    if said.startswith(f"{where} "):
        said = f"it {said.removeprefix(f'{where} ')}"
    schema = isinstance(error, SetupError) and "schema" in said
    return Finding("schema" if schema else "connection", "error", None, where, said, mend)


def _command_in(hint: str) -> str | None:
    """The command that a hint names after `Run:`, the last of several."""
    if "Run: " not in hint:
        return None
    return "listener migrate" if "listener migrate" in hint else hint.partition("Run: ")[2]
