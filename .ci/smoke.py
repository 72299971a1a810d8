"""The installed wheel from end to end: roles, migrate, run, the three pages, SIGTERM."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

from listener.embedded import EmbeddedServer

LISTENER = Path(sys.executable).with_name("listener")
DEADLINE = 30.0


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listening:
        port: int = listening.getsockname()[1]
    return port


def get(url: str) -> tuple[int, str]:
    """Status and body; status 0 while nobody answers."""
    try:
        with urllib.request.urlopen(url, timeout=5) as response:  # noqa: S310 - the URL is made below
            return response.status, response.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()
    except OSError:
        return 0, ""


def become_ready(service: subprocess.Popen[bytes], address: str) -> None:
    deadline = time.monotonic() + DEADLINE
    while (answer := get(f"{address}/health/ready"))[0] != 200:
        assert service.poll() is None, f"listener run ended early with exit code {service.returncode}"
        assert time.monotonic() < deadline, f"not ready within {DEADLINE:.0f} s, last answer {answer}"
        time.sleep(0.1)


def main() -> None:
    import listener  # noqa: PLC0415 - only to see which one it is

    package = Path(listener.__file__).parent
    assert "site-packages" in package.parts, f"not the installed wheel: {package}"
    with EmbeddedServer.start() as server:
        environment = os.environ | {"LISTENER_DATABASE_URL": server.url()}
        print("listener roles | psql", flush=True)
        roles = subprocess.run([LISTENER, "roles"], check=True, stdout=subprocess.PIPE, env=environment)
        subprocess.run(
            [server.bin("psql"), "--no-psqlrc", "--quiet", "--set=ON_ERROR_STOP=1", server.url()],
            input=roles.stdout,
            check=True,
        )
        print("listener migrate", flush=True)
        subprocess.run([LISTENER, "migrate"], check=True, env=environment)
        run(server)


def run(server: EmbeddedServer) -> None:
    port = free_port()
    address = f"http://127.0.0.1:{port}"
    environment = os.environ | {
        "LISTENER_DATABASE_URL": server.url(user="listener_service"),
        "LISTENER_HTTP_PORT": str(port),
    }
    print("listener run", flush=True)
    service = subprocess.Popen([LISTENER, "run"], env=environment)
    try:
        become_ready(service, address)
        assert get(f"{address}/health")[0] == 200
        status, metrics = get(f"{address}/metrics")
        assert status == 200
        assert "\nlistener_" in f"\n{metrics}", "no metric of listener's own"
        print("SIGTERM", flush=True)
        service.send_signal(signal.SIGTERM)
        code = service.wait(DEADLINE)
        assert code == 0, f"SIGTERM ended it with exit code {code}"
    finally:
        if service.poll() is None:
            service.kill()
            service.wait()
    print("smoke test passed")


if __name__ == "__main__":
    main()
