"""Sets the schema up: Alembic makes the tables, then the files of sql/ are applied, in one transaction.

Used by `listener migrate` and, through migrations/env.py, by the alembic command.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import psycopg
from alembic import command
from alembic.util import CommandError
from psycopg import sql
from sqlalchemy import NullPool, create_engine
from sqlalchemy.exc import DBAPIError

from listener import console
from listener.backoff import Backoff
from listener.database_url import describe, libpq_url
from listener.errors import ListenerError, SetupError, from_database
from listener.resources import sql_directory
from listener.revisions import config, head, known
from listener.settings import Settings, load
from listener.startup import owned_by_another, refuse_old_server

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext

# The advisory lock that makes two migrations at once wait for each other: "listener" in ASCII.
MIGRATION_LOCK = 0x6C697374656E6572
LOCK_ATTEMPTS = 15


def upgrade(settings: Settings) -> str:
    """Brings the schema to this release; returns the migration it is at. Doing it twice changes nothing."""
    _run(settings, lambda cfg: command.upgrade(cfg, "head"))
    return head()


def downgrade(settings: Settings, *, drop_targets: bool = False) -> None:
    """Takes everything away but the targets, which stay as plain tables unless `drop_targets`.

    Raises SetupError where there is nothing to take away.
    """
    _run(settings, lambda cfg: command.downgrade(cfg, "base"), drop_targets=drop_targets, must_exist=True)


def _run(settings: Settings, act: Any, **attributes: bool) -> None:
    """Does it, again where a lock was not had: services and writers are at work meanwhile, and must not wait long."""
    backoff = Backoff(base=0.1, cap=2)
    while True:
        cfg = config()
        cfg.attributes.update(settings=settings, **attributes)
        try:
            act(cfg)
        except (DBAPIError, psycopg.Error) as error:
            if _is_locked_out(error) and backoff.attempts < LOCK_ATTEMPTS:
                time.sleep(backoff.next_delay())
                continue
            raise _known(error, settings) from error
        except CommandError as error:
            raise SetupError(f"alembic: {error}") from error
        return


def _original(error: DBAPIError | psycopg.Error) -> psycopg.Error:
    original = error.orig if isinstance(error, DBAPIError) else error
    if not isinstance(original, psycopg.Error):
        raise error
    return original


def _is_locked_out(error: DBAPIError | psycopg.Error) -> bool:
    return isinstance(_original(error), psycopg.errors.LockNotAvailable | psycopg.errors.DeadlockDetected)


def _known(error: DBAPIError | psycopg.Error, settings: Settings) -> ListenerError:
    if _is_locked_out(error):
        return SetupError(
            "a transaction holds a lock that this needs, and nothing was changed.",
            hint=_original(error).diag.message_hint
            or "See which: SELECT pid, query FROM pg_stat_activity WHERE xact_start < now() - interval '1 s'; then run "
            "this again.",
        )
    return from_database(_original(error), needed=f"a member of {settings.owner_role}")


def run_in_context(context: EnvironmentContext) -> None:
    """What migrations/env.py does, for the alembic command and for the functions above."""
    settings: Settings | None = context.config.attributes.get("settings")
    if settings is not None:
        _migrate(context, settings)
        return
    # The alembic command shows its own kind of error in one line, and any other as a traceback.
    try:
        settings = load()
        try:
            _migrate(context, settings)
        except (DBAPIError, psycopg.Error) as error:
            raise _known(error, settings) from error
    except ListenerError as error:
        raise CommandError(str(error)) from error


def _migrate(context: EnvironmentContext, settings: Settings) -> None:
    if context.is_offline_mode():
        raise SetupError("migrations run against a database only, not with --sql.")
    url = libpq_url(settings.database_url.get_secret_value())
    # What libpq takes, several hosts and key=value pairs among it, is more than SQLAlchemy's URLs can say.
    engine = create_engine(
        "postgresql+psycopg://",
        creator=lambda: psycopg.connect(
            url, application_name="listener migrate", connect_timeout=10, client_encoding="utf8"
        ),
        poolclass=NullPool,
    )
    with engine.connect() as connection, connection.begin():
        driver: psycopg.Connection[Any] = connection.connection.driver_connection  # type: ignore[assignment]
        _prepare(driver, settings)
        if context.config.attributes.get("must_exist") and not _is_installed(driver):
            raise SetupError(f"{describe(url)} has no schema listener: there is nothing to uninstall.")
        context.configure(connection=connection, version_table_schema="listener", transaction_per_migration=False)
        migration = context.get_context()
        unknown = set(migration.get_current_heads()) - known()
        if unknown:
            raise SetupError(
                f"the schema listener is at migration {', '.join(sorted(unknown))}, which this release does not know.",
                hint="Use the release that made it, or a newer one.",
            )
        mutates = not migration.opts.get("dont_mutate")
        if mutates:
            _create_schema(driver, settings)
        with context.begin_transaction():
            context.run_migrations()
        if mutates and migration.get_current_heads() == (head(),):
            _apply_functions(driver, settings)
        if mutates and not migration.get_current_heads():
            _drop_schema(driver)


def _is_installed(connection: psycopg.Connection[Any]) -> bool:
    row = connection.execute(
        "SELECT EXISTS (SELECT FROM pg_class WHERE relnamespace = to_regnamespace('listener')"
        " AND relname = 'alembic_version')"
    ).fetchone()
    return bool(row and row[0])


def _prepare(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """One migration at a time, by the role that is to own everything."""
    refuse_old_server(connection.info.server_version)
    connection.execute("SET LOCAL client_min_messages = warning")
    # What the files of sql/ do not qualify is the server's own, whatever an application put into `public`.
    connection.execute("SET LOCAL search_path = pg_catalog, pg_temp")
    # What the files hold, and what is generated of the catalog's texts, is meant so.
    connection.execute("SET LOCAL standard_conforming_strings = on; SET LOCAL quote_all_identifiers = off")
    connection.execute("SELECT pg_advisory_xact_lock(%s)", (MIGRATION_LOCK,))
    # Whoever writes a source waits behind a lock on the change log that is waited for.
    connection.execute("SET LOCAL lock_timeout = '1s'")
    found = connection.execute(
        "SELECT pg_has_role(current_user, oid, 'MEMBER') FROM pg_roles WHERE rolname = %s",
        (settings.owner_role,),
    ).fetchone()
    if found is not None and not found[0]:
        raise SetupError(
            f"role {connection.info.user} is no member of {settings.owner_role}, which owns the schema.",
            hint="Run what `listener roles` prints, or set LISTENER_OWNER_ROLE.",
        )
    if found is not None:
        connection.execute("SELECT set_config('role', %s, true)", (settings.owner_role,))
    other = connection.execute(
        """
        SELECT pg_get_userbyid(n.nspowner)::text, current_user::text FROM pg_namespace n
        WHERE n.nspname = 'listener'
          AND NOT (has_schema_privilege(n.oid, 'USAGE') AND has_schema_privilege(n.oid, 'CREATE'))
        """
    ).fetchone()
    if other is not None:
        owner, role = other
        raise SetupError(
            f"the schema listener belongs to {owner}, and role {role} may not change it.", hint=owned_by_another(owner)
        )


def _create_schema(connection: psycopg.Connection[Any], settings: Settings) -> None:
    row = connection.execute(
        """
        SELECT to_regnamespace('listener') IS NOT NULL, has_database_privilege(current_database(), 'CREATE'),
               current_user::text, current_database()::text
        """
    ).fetchone()
    assert row is not None
    exists, may_create, role, database = row
    if exists:
        return
    if not may_create:
        raise SetupError(
            f"role {role} may not create a schema in {database}.",
            hint=f"Run what `listener roles` prints, or: GRANT CREATE ON DATABASE {database} TO {role};",
        )
    connection.execute("CREATE SCHEMA listener")
    if role != settings.owner_role:
        console.warning(
            f"there is no role {settings.owner_role}: everything will belong to {role}. Where that is not wanted, "
            f"uninstall with LISTENER_OWNER_ROLE={role}, and run `listener roles` first."
        )


def _drop_schema(connection: psycopg.Connection[Any]) -> None:
    """What Alembic leaves: its table and the schema. Raises SetupError where somebody else's things are in it."""
    connection.execute("DROP TABLE IF EXISTS listener.alembic_version")
    others = connection.execute(
        """
        SELECT pg_describe_object(d.classid, d.objid, d.objsubid) FROM pg_depend d
        WHERE d.refclassid = 'pg_namespace'::regclass AND d.refobjid = to_regnamespace('listener')
          AND d.deptype = 'n' ORDER BY 1
        """
    ).fetchall()
    if others:
        raise SetupError(
            f"the schema listener holds what is not listener's: {', '.join(other for (other,) in others)}.",
            hint="Move it or drop it, then uninstall again.",
        )
    connection.execute("DROP SCHEMA listener")


def _apply_functions(connection: psycopg.Connection[Any], settings: Settings) -> None:
    """The service's role computes; where it does not exist, or may not be handed functions, the owner does."""
    row = connection.execute("SELECT to_regprocedure('listener.lock_registration()')").fetchone()
    if row and row[0]:
        # A service that runs meanwhile may be about to make capture functions anew.
        connection.execute("SELECT listener.lock_registration()")
    connection.execute(
        """
        INSERT INTO listener.installation AS i (owner_role, service_role, compute_role)
        SELECT current_user, s.role, coalesce((SELECT r.rolname FROM pg_roles r WHERE r.rolname = %(compute)s
                                               AND pg_has_role(current_user, r.oid, 'MEMBER')), s.role)
        FROM (SELECT coalesce((SELECT r.rolname FROM pg_roles r WHERE r.rolname = %(service)s
                               AND pg_has_role(current_user, r.oid, 'MEMBER')), current_user) AS role) s
        ON CONFLICT (only_row) DO UPDATE SET owner_role = excluded.owner_role, service_role = excluded.service_role,
                                             compute_role = excluded.compute_role
        WHERE (i.owner_role, i.service_role, i.compute_role)
              <> (excluded.owner_role, excluded.service_role, excluded.compute_role)
        """,
        {"service": settings.service_role, "compute": settings.compute_role},
    )
    for file in sorted(sql_directory().glob("*.sql")):
        connection.execute(file.read_bytes())
    connection.execute("SELECT listener.regenerate()")
    lacking = connection.execute(
        "SELECT i.service_role::text FROM listener.installation i"
        " WHERE i.compute_role = i.service_role AND i.service_role <> i.owner_role"
    ).fetchone()
    if lacking is not None:
        console.warning(
            f"role {settings.compute_role} does not exist, or the owner is no member of it: {lacking[0]} computes "
            "definitions. As an administrator run what `listener roles` prints, then `listener migrate` again."
        )


def roles_script(settings: Settings, database: str) -> str:
    """The statements that create the roles and grants, for an administrator to read and run."""
    template = sql.SQL((sql_directory() / "admin" / "roles.sql").read_text())
    return template.format(
        owner=sql.Identifier(settings.owner_role),
        owner_name=sql.Literal(settings.owner_role),
        service=sql.Identifier(settings.service_role),
        service_name=sql.Literal(settings.service_role),
        compute=sql.Identifier(settings.compute_role),
        compute_name=sql.Literal(settings.compute_role),
        database=sql.Identifier(database),
    ).as_string(None)
