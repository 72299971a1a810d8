"""What an orchestrator and Prometheus ask a running service."""

from __future__ import annotations

import httpx

from conftest import RunningService


async def get(running: RunningService, path: str) -> httpx.Response:
    """A GET of its HTTP port."""
    async with httpx.AsyncClient() as client:
        return await client.get(f"http://127.0.0.1:{running.service.port}{path}", timeout=10)


async def reasons(running: RunningService) -> str:
    """Why it is not ready; the empty string where it is."""
    response = await get(running, "/health/ready")
    body = response.json()
    assert (response.status_code == 503) == bool(body["reasons"])
    return "; ".join(body["reasons"])


async def is_ready(running: RunningService) -> bool:
    """Whether it is ready."""
    return await reasons(running) == ""
