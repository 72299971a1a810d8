"""A password reaches no log line, no error, no page and no dead letter, however it is given and whatever goes wrong."""

from __future__ import annotations

import json
import re
import socket
from pathlib import Path
from urllib.parse import quote

import psycopg
import pytest
from psycopg.conninfo import conninfo_to_dict, make_conninfo

from command import listener
from conftest import Database, eventually
from listener.database_url import describe, libpq_url
from listener.errors import SetupError, without_secrets
from process import service_process

# Its parts, too: what is not escaped is torn, and libpq names what it took for a host or a port.
SECRET = "Gehe1m@n1s: 'Wort'/x?y#z%&"
PARTS = [part for part in re.split(r"[^A-Za-z0-9]+", SECRET) if len(part) > 2]
NOWHERE = "127.0.0.1:1/none"


def spellings(secret: str, address: str = NOWHERE) -> dict[str, str]:
    """The ways to give a password to this host:port/database."""
    host, port, database = re.split("[:/]", address)
    quoted = secret.replace("\\", r"\\").replace("'", r"\'")
    return {
        "a URL": f"postgresql://user:{quote(secret, safe='')}@{address}",
        "SQLAlchemy's URL": f"postgresql+psycopg://user:{quote(secret, safe='')}@{address}",
        "a parameter of the URL": f"postgresql://user@{address}?password={quote(secret, safe='')}",
        "pairs": f"host={host} port={port} dbname={database} user=user password='{quoted}'",
        "pairs with spaces": f"host = {host} port = {port} dbname = {database} user = user password = '{quoted}'",
    }


TORN = {
    "not escaped": f"postgresql://user:{SECRET}@{NOWHERE}",
    "an @": f"postgresql://user:Gehe1m@n1s@{NOWHERE}",
    "two @": f"postgresql://user:Gehe1m@Wort@n1s@{NOWHERE}",
    "a /": f"postgresql://user:Gehe1m/Wort@{NOWHERE}",
    "a number and a /": f"postgresql://user:12/Gehe1mWort@{NOWHERE}",
    "an @ and a /": f"postgresql://user:Gehe1m@n1s/Wort@{NOWHERE}",
    "a space": f"postgresql://user:Gehe1m Wort@{NOWHERE}",
    "a bad escape": f"postgresql://user:Gehe1m%zzWort@{NOWHERE}",
    "a bad escape in a parameter": f"postgresql://user@{NOWHERE}?password=Gehe1m%zzWort",
    "no host": "postgresql://user:Gehe1m",
    "pairs without quotes": "host=127.0.0.1 port=1 user=user password=Gehe1m Wort",
    "pairs with one quote": "host=127.0.0.1 port=1 user=user password='Gehe1m Wort",
    "no scheme": f"user:Gehe1m@{NOWHERE}",
    "another scheme": f"mysql://user:Gehe1m@{NOWHERE}",
    "another name": "host=127.0.0.1 port=1 user=user passwort=Gehe1m",
    "a port that is none": "postgresql://user:Gehe1mWort@127.0.0.1:Wort/none",
}  # fmt: skip


def assert_kept(said: str) -> None:
    assert said
    assert "Traceback" not in said
    assert [part for part in PARTS if part in said] == [], said


@pytest.mark.parametrize("url", spellings(SECRET).values(), ids=spellings(SECRET))
def test_a_server_that_does_not_answer_is_named_without_the_password(url: str) -> None:
    assert conninfo_to_dict(libpq_url(url))["password"] == SECRET
    assert describe(url) == f"user@{NOWHERE}"
    for command in (["status"], ["migrate"], ["uninstall", "--yes"]):
        ended = listener(*command, url=url)
        assert ended.returncode == 1
        assert "does not answer" in ended.stderr
        assert_kept(ended.stdout + ended.stderr)


@pytest.mark.parametrize("url", TORN.values(), ids=TORN)
def test_what_libpq_would_misread_is_refused_without_naming_what_it_read(url: str) -> None:
    with pytest.raises(SetupError, match="is malformed") as refused:
        libpq_url(url)
    assert_kept(str(refused.value))
    assert refused.value.__cause__ is None
    ended = listener("status", url=url)
    assert ended.returncode == 1
    assert ended.stderr.startswith("listener: the database URL is malformed. Its form: ")
    assert_kept(ended.stdout + ended.stderr)


WRONG = {
    "an impossible host": "postgresql://user:{}@nowhere..invalid/none",
    "a host that is too long": "postgresql://user:{}@" + "n" * 300 + "/none",
    "a wrong parameter": f"postgresql://user:{{}}@{NOWHERE}?sslmode=Wrong",
    "a wrong timeout": f"postgresql://user:{{}}@{NOWHERE}?connect_timeout=soon",
}
UNREACHED = {
    "an unknown host": "postgresql://user:{}@nowhere.invalid/none",
    "a directory that is none": "postgresql://user:{}@/none?host=/nowhere",
    "a passfile that is none": f"postgresql://user@{NOWHERE}?passfile=/nowhere/passfile&password={{}}",
}


@pytest.mark.parametrize("url", WRONG.values(), ids=WRONG)
def test_what_no_waiting_mends_ends_a_start_in_one_line(database: Database, url: str) -> None:
    for name in ("LISTENER_DATABASE_URL", "LISTENER_LISTEN_DATABASE_URL"):
        ended = listener(
            "run", **({"LISTENER_DATABASE_URL": database.url()} | {name: url.format(quote(SECRET, safe=""))})
        )
        assert ended.returncode == 1
        assert len([line for line in ended.stderr.splitlines() if line.startswith("listener: ")]) == 1
        assert_kept(ended.stdout + ended.stderr)


@pytest.mark.anyio
@pytest.mark.parametrize(
    "url",
    [*spellings(SECRET).values(), *(url.format(quote(SECRET, safe="")) for url in UNREACHED.values())],
    ids=[*spellings(SECRET), *UNREACHED],
)
async def test_what_is_waited_for_is_named_without_the_password(database: Database, url: str) -> None:
    for given in ({"url": url}, {"url": database.url(), "listen_database_url": url}):
        async with service_process(given.pop("url"), **given) as service:
            await service.until("waiting for the database")
            assert await service.end() == 0
        assert_kept(json.dumps(service.log))


def with_password(database: Database, secret: str, **more: str) -> str:
    parts = {name: str(value) for name, value in conninfo_to_dict(database.url()).items()}
    return make_conninfo("", **(parts | {"password": secret} | more))


def test_a_server_that_refuses_says_it_without_the_password(database: Database, tmp_path: Path) -> None:
    passfile = tmp_path / "passfile"
    passfile.write_text(f"*:*:*:*:{SECRET}\n")
    passfile.chmod(0o600)
    for given in (
        {"user": "nobody_at_all"}, {"dbname": "nothing_at_all"}, {"options": "-c no_such_setting=1"},
        {"require_auth": "scram-sha-256"},
    ):  # fmt: skip
        for url in (
            with_password(database, SECRET, **given),
            make_conninfo(database.url(), passfile=str(passfile), **given),
        ):
            ended = listener("run", url=url)
            assert ended.returncode == 1, given
            assert_kept(ended.stdout + ended.stderr)
            ended = listener("run", url=database.url(), LISTENER_LISTEN_DATABASE_URL=url)
            assert ended.returncode == 1, given
            assert_kept(ended.stdout + ended.stderr)


def test_something_else_on_the_port_is_one_line_without_the_password() -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        # It closes whatever connects as soon as this is closed; nobody accepts.
        address = f"127.0.0.1:{silent.getsockname()[1]}/none"
        silent.close()
        for url in spellings(SECRET, address).values():
            assert_kept(listener("status", url=url).stderr)


@pytest.mark.anyio
async def test_a_service_whose_server_goes_away_keeps_the_password_to_itself(database: Database) -> None:
    url = with_password(database, SECRET)
    async with service_process(url, listen_database_url=url, sweep_interval="100ms") as service:
        await service.until("serving")
        pages = [(await service.get(path)).text for path in ("/health", "/health/ready", "/metrics")]
        async with Database(database.server, "postgres").connect() as administrator:
            await administrator.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS false'.encode())
            await administrator.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", (database.name,)
            )
            await service.until("not listening; trying again")
            await service.until("sweep failed; the next one tries again")

            async def cannot_be_asked() -> bool:
                pages.append((await service.get("/health/ready")).text)
                return "the database cannot be asked" in pages[-1]

            await eventually(cannot_be_asked)
            pages.append((await service.get("/metrics")).text)
            await administrator.execute(f'ALTER DATABASE "{database.name}" ALLOW_CONNECTIONS true'.encode())
        assert await service.end() == 0
        for text in (*pages, json.dumps(service.log), listener("status", "--json", url=url).stdout):
            assert_kept(text)


@pytest.mark.parametrize(
    ("text", "kept"),
    [
        ("cannot reach postgresql://u:Gehe1m@Wort@h/d, gave up", "cannot reach postgresql://u:***@h/d, gave up"),
        ("host=h password='it''s Gehe1m' user=u", "host=h password=*** user=u"),
        (r"password = 'it\'s Gehe1m'", "password = ***"),
        ("ALTER ROLE x PASSWORD 'Gehe1m'", "ALTER ROLE x PASSWORD ***"),
        ("?sslmode=x&password=Gehe1m&user=u", "?sslmode=x&password=***&user=u"),
        ("SSLPASSWORD=Gehe1m", "SSLPASSWORD=***"),
        ('password authentication failed for user "x"', 'password authentication failed for user "x"'),
        ("http://127.0.0.1:9546/health", "http://127.0.0.1:9546/health"),
    ],
)  # fmt: skip
def test_passwords_are_struck_from_what_others_say(text: str, kept: str) -> None:
    assert without_secrets(text) == kept


def test_a_dead_letters_traceback_and_error_keep_a_password(database: Database) -> None:
    with psycopg.connect(database.url("postgres"), autocommit=True) as superuser:
        superuser.execute(
            """
            SET ROLE listener_owner;
            CREATE TABLE sales (tenant_id bigint NOT NULL, cents bigint);
            GRANT SELECT ON sales TO listener_service;
            CREATE FUNCTION far(bigint) RETURNS bigint LANGUAGE plpgsql STABLE AS $$ BEGIN
                RAISE EXCEPTION 'could not connect to postgresql://u:Gehe1m@n1s@h/d and host=h password=''Wort Wort''';
            END $$;
            SELECT listener.create_view('totals', 'SELECT tenant_id, far(cents) AS cents FROM sales', '{tenant_id}',
                                        depends_on => '{}');
            INSERT INTO sales VALUES (1, 5);
            """
        )
    swept = listener("sweep", url=database.url(), LISTENER_MAX_ATTEMPTS="1")
    assert swept.returncode == 1
    letters = listener("dead-letters", "list", "--json", url=database.url()).stdout
    assert "could not connect to postgresql://u:***@h/d and host=h password=***" in letters
    explained = listener("explain", "totals", "--tenant", "1", "--json", url=database.url()).stdout
    for text in (swept.stderr, letters, explained):
        assert [part for part in PARTS if part in text] == []
