"""What several tests take: of `test_outputs` and others."""

from __future__ import annotations

import os
import stat
from pathlib import Path


def everything(folder: Path) -> dict[str, object]:
    """What every entry below a folder is, and what is in it."""
    found: dict[str, object] = {}
    for path in sorted(folder.rglob("*")):
        status = path.lstat()
        kind: object = stat.S_IFMT(status.st_mode), stat.S_IMODE(status.st_mode)
        if path.is_symlink():
            kind = os.readlink(path)
        elif path.is_file():
            kind = kind, path.read_bytes()
        found[str(path.relative_to(folder))] = kind
    return found
