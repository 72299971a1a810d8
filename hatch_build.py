"""Bakes the commit into wheels and source archives, for `listener.version.commit`."""

import subprocess
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class CommitBuildHook(BuildHookInterface[Any]):
    _directory: TemporaryDirectory[str] | None = None

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        root = Path(self.root)
        # An editable install asks git at run time: a baked commit would be wrong after the next one.
        # A source archive brings its file along, and may have been unpacked inside somebody else's
        # repository, hence the root's own .git.
        if version == "editable" or not (root / ".git").exists():
            return
        try:
            answer = subprocess.run(
                ["git", "-C", str(root), "rev-parse", "--short", "HEAD"],  # noqa: S607 - git is where PATH says
                check=True,
                capture_output=True,
            )
        except (OSError, subprocess.SubprocessError):
            return
        # Not into the clone: a file left there would be believed after the next commit.
        self._directory = TemporaryDirectory()
        baked = Path(self._directory.name) / "_commit.txt"
        baked.write_bytes(answer.stdout)
        build_data["force_include"][str(baked)] = "listener/_commit.txt"

    def finalize(self, version: str, build_data: dict[str, Any], artifact_path: str) -> None:  # noqa: ARG002 - hatchling's signature
        if self._directory is not None:
            self._directory.cleanup()
