"""docs/guarantees.md names tests as its proof: each of them is there."""

from __future__ import annotations

import re
from pathlib import Path

TESTS = Path(__file__).parent
PAGE = TESTS.parent / "docs" / "guarantees.md"


def test_every_test_that_the_guarantees_name_is_there() -> None:
    named = re.findall(r"`((?:faults/)?test_\w+\.py)(?:::(\w+))?`", PAGE.read_text())
    assert len(named) > 30
    missing = [
        f"{file}::{name}"
        for file, name in named
        if not (TESTS / file).exists() or (name and f"def {name}(" not in (TESTS / file).read_text())
    ]
    assert missing == []
