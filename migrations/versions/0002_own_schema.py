"""Views as a team already has them: whole views, materialized views that stay, keys that are the whole row.

Revision ID: 0002
Revises: 0001
"""

from pathlib import Path

from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def _execute(file: str) -> None:
    connection = op.get_bind().connection.driver_connection
    assert connection is not None
    connection.execute((Path(__file__).parent / file).read_bytes())


def upgrade() -> None:
    """Adds columns and tables."""
    _execute("0002_own_schema.sql")


def downgrade() -> None:
    """Nothing: 0001, which is undone next, drops the tables with all of their columns."""
