"""What `listener doctor` finds in a database, and the mends that it prints, run as they stand there."""

from __future__ import annotations

import shlex

from command import listener
from conftest import Database, settings_for
from listener.doctor import Finding, examine

OF_THE_SERVICE = "listener_service"
OF_THE_OWNER = "listener_migrator"


async def wrong(database: Database, user: str = OF_THE_SERVICE) -> list[Finding]:
    """Errors and warnings, as this user sees them."""
    return [f for f in await examine(settings_for(database.url(user))) if f.level != "ok"]


async def mend(database: Database, found: list[Finding]) -> None:
    """Runs the commands of these findings, each once."""
    for command in dict.fromkeys(finding.mend for finding in found):
        assert command, "whatever is wrong has a mend"
        if command.startswith("listener "):
            ended = listener(*shlex.split(command)[1:], url=database.url(OF_THE_OWNER))
            assert ended.returncode == 0, ended.stderr
            continue
        async with database.connect() as superuser:
            for statement in command.split("; "):
                await superuser.execute(statement.encode())


async def mended(database: Database, user: str = OF_THE_SERVICE) -> list[Finding]:
    """Does what the doctor says, and again where that brought up more; what is wrong in the end."""
    for _ in range(3):
        found = await wrong(database, user)
        if not found:
            break
        await mend(database, found)
    return await wrong(database, user)
