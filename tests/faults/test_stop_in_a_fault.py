"""SIGTERM while the database is frozen or cannot be reached, in the middle of a refresh: the service ends in time."""

from __future__ import annotations

import pytest

pytestmark = pytest.mark.anyio
