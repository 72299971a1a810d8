"""Which commit is running, for logs, metrics and reports of trouble."""

import subprocess
from pathlib import Path

_PACKAGE = Path(__file__).resolve().parent


def commit() -> str:
    """Return the short commit that a wheel was built from or a clone is at, else "unknown"."""
    baked = _PACKAGE / "_commit.txt"
    if baked.is_file():
        return baked.read_text(encoding="ascii").strip()
    clone = _PACKAGE.parent
    # Without this check, a package installed below somebody else's repository would report that one's commit.
    if not (clone / ".git").exists():
        return "unknown"
    try:
        git = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"],  # noqa: S607 - git is where PATH says
            cwd=clone,
            capture_output=True,
            check=True,
            text=True,
            timeout=5,
        )
    except (OSError, subprocess.SubprocessError):
        return "unknown"
    return git.stdout.strip()
