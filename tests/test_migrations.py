"""The schema comes and goes: by alembic and by `listener migrate`, by an owner who is no superuser."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from subprocess import CompletedProcess
from typing import Any

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from command import alembic, listener, python
from conftest import Database, Server, settings_for
from listener.errors import SetupError
from listener.migrate import upgrade
from listener.revisions import head
from listener.startup import check

CATALOG = """
    SELECT 'relation', c.relname, c.relkind::text, c.relacl::text, pg_get_userbyid(c.relowner)
    FROM pg_class c WHERE c.relnamespace = 'listener'::regnamespace
    UNION ALL
    SELECT 'function', p.oid::regprocedure::text, md5(pg_get_functiondef(p.oid)),
           (SELECT string_agg(a::text, ' ' ORDER BY a::text) FROM unnest(p.proacl) a),
           pg_get_userbyid(p.proowner)
    FROM pg_proc p WHERE p.pronamespace = 'listener'::regnamespace
    ORDER BY 1, 2
"""


@pytest.fixture
def empty(server: Server, template: str) -> Iterator[Database]:
    """A database without the schema; the roles exist, as `listener roles` made them for the template."""
    name = server.clone("template0")
    with psycopg.connect(server.url("postgres", name), autocommit=True) as administrator:
        administrator.execute(f'GRANT CREATE ON DATABASE "{name}" TO listener_owner'.encode())
        administrator.execute("GRANT CREATE, USAGE ON SCHEMA public TO listener_owner")
    yield Database(server, name)
    server.drop(name)


def rows(database: Database, query: str) -> list[tuple[Any, ...]]:
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        return superuser.execute(query.encode()).fetchall()


def test_alembic_works_in_a_clone(empty: Database) -> None:
    url = empty.url("listener_migrator")
    assert f"{head()} (head)" in python("-m", "alembic", "heads", url=url).stdout
    assert alembic("current", url=url).stdout == ""
    assert rows(empty, "SELECT to_regnamespace('listener')") == [(None,)]
    assert alembic("upgrade", "head", url=url).returncode == 0
    assert f"{head()} (head)" in alembic("current", url=url).stdout
    assert alembic("downgrade", "base", url=url).returncode == 0
    assert alembic("current", url=url).stdout == ""
    assert rows(empty, "SELECT to_regnamespace('listener')") == [(None,)]
    assert alembic("upgrade", "head", url=url).returncode == 0


def test_migrating_twice_changes_nothing_and_keeps_grants(empty: Database) -> None:
    url = empty.url("listener_migrator")
    assert listener("migrate", url=url).returncode == 0
    with psycopg.connect(empty.url("postgres"), autocommit=True) as superuser:
        superuser.execute("GRANT EXECUTE ON FUNCTION listener.refresh(text, text) TO listener_reader")
    before = rows(empty, CATALOG)
    assert listener("migrate", url=url).returncode == 0
    assert rows(empty, CATALOG) == before
    owners = {owner for *_, owner in before}
    assert owners == {"listener_owner"}


def test_two_migrations_at_once_wait_for_each_other(empty: Database) -> None:
    with ThreadPoolExecutor() as threads:
        done = [threads.submit(listener, "migrate", url=empty.url("listener_migrator")) for _ in range(3)]
        assert [d.result().returncode for d in done] == [0, 0, 0], [d.result().stderr for d in done]


@pytest.mark.parametrize("scheme", ["postgresql+psycopg://", "postgresql+asyncpg://", "postgres://"])
def test_a_url_in_sqlalchemys_form_is_taken(database: Database, scheme: str) -> None:
    url = database.url("listener_migrator")
    if not url.startswith("postgresql://"):
        pytest.fail("the embedded server gives URLs; with LISTENER_TEST_DATABASE_URL give one too")
    assert listener("migrate", url=url.replace("postgresql://", scheme)).returncode == 0


@pytest.mark.parametrize("told", [False, True])
def test_downgrade_keeps_a_target_unless_told_and_lets_writes_go_on(database: Database, *, told: bool) -> None:
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute(
            """
            SET ROLE listener_owner;
            CREATE TABLE sales (tenant_id bigint NOT NULL, cents bigint);
            GRANT SELECT ON sales TO listener_service;
            SELECT listener.create_view('totals', 'SELECT tenant_id, sum(cents)::bigint AS cents FROM sales GROUP BY 1',
                                        '{tenant_id}');
            INSERT INTO sales VALUES (1, 5);
            """
        )
    assert listener("sweep", url=database.url()).returncode == 0
    arguments = ["-x", "drop_targets=true"] if told else []
    ended = alembic(*arguments, "downgrade", "base", url=database.url("listener_migrator"))
    assert ended.returncode == 0, ended.stderr
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("INSERT INTO sales VALUES (1, 6)")
        triggers = superuser.execute("SELECT tgname FROM pg_trigger WHERE tgrelid = 'sales'::regclass").fetchall()
        assert triggers == []
        if told:
            assert superuser.execute("SELECT to_regclass('totals')").fetchone() == (None,)
        else:
            assert superuser.execute("SELECT * FROM totals").fetchall() == [(1, 5)]


def test_who_may_not_migrate_is_told_in_one_line(empty: Database, server: Server) -> None:
    with psycopg.connect(server.url("postgres", "postgres"), autocommit=True) as administrator:
        administrator.execute(
            """
            DO $$ BEGIN
                IF to_regrole('listener_stranger') IS NULL THEN CREATE ROLE listener_stranger LOGIN; END IF;
            END $$
            """
        )
    for role, what in (("listener_stranger", "no member of listener_owner"), ("listener_service", "no member")):
        ended = listener("migrate", url=empty.url(role))
        assert ended.returncode == 1
        assert what in ended.stderr
        assert ended.stderr.count("\n") == 1
    ended = listener("migrate", url=empty.url("listener_stranger"), LISTENER_OWNER_ROLE="listener_stranger")
    assert "may not create a schema" in ended.stderr


def lines(ended: CompletedProcess[str]) -> str:
    assert ended.returncode != 0
    assert "Traceback" not in ended.stderr + ended.stdout
    return ended.stderr + ended.stdout


def test_libpqs_own_form_and_several_hosts_are_taken(empty: Database) -> None:
    parts: dict[str, Any] = conninfo_to_dict(empty.url("listener_migrator"))
    assert listener("migrate", url=make_conninfo("", **parts)).returncode == 0
    several = make_conninfo("", **(parts | {"host": f"/nowhere,{parts['host']}", "port": f"1,{parts['port']}"}))
    assert listener("migrate", url=several).returncode == 0
    assert "does not answer" in lines(listener("migrate", url="host=/nowhere dbname=x user=y"))


def test_uninstall_leaves_nothing_and_refuses_what_is_not_there(empty: Database) -> None:
    url = empty.url("listener_migrator")
    assert "nothing to uninstall" in lines(listener("uninstall", "--yes", url=url))
    assert rows(empty, "SELECT to_regnamespace('listener')") == [(None,)]
    assert listener("migrate", url=url).returncode == 0
    with psycopg.connect(empty.url("postgres"), autocommit=True) as superuser:
        superuser.execute("CREATE TABLE listener.notes (x int)")
    said = lines(listener("uninstall", "--yes", url=url))
    assert "holds what is not listener's: table listener.notes. Move it" in said
    with psycopg.connect(empty.url("postgres"), autocommit=True) as superuser:
        superuser.execute("DROP TABLE listener.notes")
    assert rows(empty, "SELECT count(*) FROM listener.managed_view") == [(0,)]
    assert listener("uninstall", "--yes", url=url).returncode == 0
    assert rows(empty, "SELECT to_regnamespace('listener')") == [(None,)]
    assert alembic("downgrade", "base", url=url).returncode == 0
    assert rows(empty, "SELECT to_regnamespace('listener')") == [(None,)]


def test_a_schema_of_a_newer_release_is_one_line(database: Database) -> None:
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute("UPDATE listener.alembic_version SET version_num = '9999'")
    for act in (listener("migrate", url=database.url("listener_migrator")),
                alembic("upgrade", "head", url=database.url("listener_migrator"))):  # fmt: skip
        assert "at migration 9999, which this release does not know" in lines(act)


def test_alembic_says_in_one_line_what_is_wrong(empty: Database) -> None:
    for url, what in (("", "LISTENER_DATABASE_URL is not set"), ("host=/nowhere", "does not answer"),
                      (empty.url("listener_service"), "no member of listener_owner")):  # fmt: skip
        said = lines(alembic("upgrade", "head", url=url))
        assert what in said
        assert len([line for line in said.splitlines() if "INFO" not in line]) == 1


def test_who_migrates_before_the_roles_are_there_learns_the_way_back(empty: Database) -> None:
    superuser = empty.url("postgres")
    early = listener("migrate", url=superuser, LISTENER_OWNER_ROLE="listener_nobody")
    assert early.returncode == 0
    (owner,) = rows(empty, "SELECT nspowner::regrole::text FROM pg_namespace WHERE nspname = 'listener'")[0]
    assert f"there is no role listener_nobody: everything will belong to {owner}." in early.stderr
    assert f"belongs to {owner}" in lines(listener("migrate", url=superuser))
    assert f"LISTENER_OWNER_ROLE={owner}" in lines(listener("migrate", url=empty.url("listener_migrator")))
    with psycopg.connect(superuser, autocommit=True) as administrator:
        administrator.execute("REVOKE ALL ON SCHEMA listener FROM listener_service")
    said = lines(listener("status", url=empty.url()))
    assert f"belongs to {owner}, and role listener_service may not use it" in said
    assert f"LISTENER_OWNER_ROLE={owner}" in said
    assert listener("uninstall", "--yes", url=superuser, LISTENER_OWNER_ROLE=owner).returncode == 0
    assert listener("migrate", url=empty.url("listener_migrator")).stderr == ""


@pytest.mark.anyio
async def test_a_server_that_is_too_old_is_refused(database: Database, monkeypatch: pytest.MonkeyPatch) -> None:
    # No such server is to be had: the bound is moved instead.
    monkeypatch.setattr("listener.startup.OLDEST_SERVER", 990000)
    with pytest.raises(SetupError, match="is too old: 15 or newer is needed"):
        upgrade(settings_for(database.url("listener_migrator")))
    with pytest.raises(SetupError, match="is too old: 15 or newer is needed"):
        await check(database.url(), settings_for(database.url()))


def test_a_migration_that_meets_a_lock_keeps_no_writer_waiting_and_goes_on_when_it_is_gone(database: Database) -> None:
    at_work = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'listener migrate' AND wait_event_type = 'Lock'"
    )

    def waiting(connection: psycopg.Connection[Any]) -> list[tuple[int]]:
        return connection.execute(at_work.encode()).fetchall()

    with (
        psycopg.connect(database.url("postgres")) as writer,
        psycopg.connect(database.url("postgres"), autocommit=True) as other,
        ThreadPoolExecutor() as threads,
    ):
        append = b"INSERT INTO listener.change_log (xid, changed_at, tenant) VALUES ('1', now(), '')"
        writer.execute(append)
        uninstalling = threads.submit(listener, "uninstall", "--yes", url=database.url("listener_migrator"))
        while not (first := waiting(other)):
            assert not uninstalling.done(), uninstalling.result()
        # It stands in the queue before this one, and leaves it.
        other.execute(append)
        while waiting(other) in ([], first):
            assert not uninstalling.done(), uninstalling.result()
        writer.rollback()
        assert uninstalling.result().returncode == 0, uninstalling.result().stderr
    assert rows(database, "SELECT to_regnamespace('listener')") == [(None,)]
