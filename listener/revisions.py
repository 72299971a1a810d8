"""The migrations that this release carries."""

from __future__ import annotations

from functools import cache

from alembic.config import Config
from alembic.script import ScriptDirectory

from listener.resources import migrations_directory


def config() -> Config:
    """Alembic's configuration for the migrations of this package, wherever it is installed."""
    made = Config()
    made.set_main_option("script_location", str(migrations_directory()).replace("%", "%%"))
    return made


@cache
def head() -> str:
    """The newest migration."""
    revision = ScriptDirectory.from_config(config()).get_current_head()
    assert revision is not None
    return revision


@cache
def known() -> frozenset[str]:
    """Every migration that this release can go to or come from."""
    return frozenset(script.revision for script in ScriptDirectory.from_config(config()).walk_revisions())
