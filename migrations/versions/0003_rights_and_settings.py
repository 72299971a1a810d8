"""Who computes a view and under which settings; how stale a view may be.

Revision ID: 0003
Revises: 0002
"""

from pathlib import Path

from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def _execute(file: str) -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute((Path(__file__).parent / file).read_bytes())


def upgrade() -> None:
    """Adds columns."""
    _execute("0003_rights_and_settings.sql")


def downgrade() -> None:
    """Nothing: 0001, which is undone later, drops the tables with all of their columns."""
