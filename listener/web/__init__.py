"""HTTP: alive, making progress, Prometheus. Nothing here shows a tenant."""

from __future__ import annotations

import contextlib
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator

import anyio
import uvicorn
from prometheus_client import CONTENT_TYPE_LATEST, CollectorRegistry, generate_latest
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route

from listener.errors import ListenerError, SetupError


def application(
    registry: CollectorRegistry,
    reasons_not_ready: Callable[[], Awaitable[list[str]]],
    update_gauges: Callable[[], Awaitable[None]],
) -> Starlette:
    """The three endpoints."""

    async def health(_: Request) -> Response:
        return JSONResponse({"status": "alive"})

    async def ready(_: Request) -> Response:
        reasons = await reasons_not_ready()
        return JSONResponse(
            {"status": "not ready" if reasons else "ready", "reasons": reasons},
            status_code=503 if reasons else 200,
        )

    async def metrics(_: Request) -> Response:
        await update_gauges()
        return PlainTextResponse(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)

    return Starlette(routes=[Route("/health", health), Route("/health/ready", ready), Route("/metrics", metrics)])


def bind(host: str, port: int) -> socket.socket:
    """The listening socket, before anything else starts. Raises SetupError where the address is taken.

    It listens at once: two sockets with SO_REUSEADDR may both bind an address that nobody listens on yet.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    bound = socket.socket(family, socket.SOCK_STREAM)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
        bound.listen()
    except (OSError, TypeError, UnicodeError) as error:  # the last two for what can be no host's name
        bound.close()
        raise SetupError(
            f"cannot listen on {host}:{port}: {getattr(error, 'strerror', error)}.",
            hint="Set LISTENER_HTTP_PORT or LISTENER_HTTP_HOST.",
        ) from error
    return bound


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leaves the signals to the service, which has work to finish first."""
        yield


@contextlib.asynccontextmanager
async def serving(app: Starlette, bound: socket.socket) -> AsyncIterator[None]:
    """Serves while the body runs. An error of ours that the body raises is raised as it is, not in a group."""
    raised: ListenerError | None = None
    async with anyio.create_task_group() as tasks:
        server = _Server(uvicorn.Config(app, log_config=None, lifespan="off"))
        tasks.start_soon(server.serve, [bound])
        try:
            yield
        except ListenerError as error:
            raised = error
        tasks.cancel_scope.cancel()
    if raised is not None:
        raise raised
