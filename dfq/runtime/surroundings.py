"""What the verbs find around them: a folder for sets, a device, somebody to report to."""

from __future__ import annotations

import os
from pathlib import Path

import platformdirs
import torch

from ..errors import UserError, shown
from .distributed import World, device_for
from .files import require_output_folder, user_path
from .progress import Live, Progress, Silent

Report = Progress | bool | None
"""Whom long work reports to; True: to people, on standard error."""


def reporter(progress: Report, is_main_process: bool = True) -> Progress:
    """Whom to report to; nobody in a process that does not lead."""
    if not is_main_process or progress is None or progress is False:
        return Silent()
    return Live() if progress is True else progress


def cache_folder() -> Path:
    """Where sets go without `--out`: `$DFQ_HOME`, else the platform's cache folder."""
    home = os.environ.get("DFQ_HOME")
    if not home:
        return Path(platformdirs.user_cache_dir("dfq"))
    folder = user_path(home, "DFQ_HOME")
    try:
        require_output_folder(folder, "DFQ_HOME")
    except UserError as error:
        # What it calls a flag is a variable.
        problem = str(error).partition(": ")[2]
        raise UserError(
            f"DFQ_HOME={shown(home)}: {problem}; set DFQ_HOME to a folder, or give --out"
        ) from None
    return folder


def pick_device(device: str) -> str:
    """Resolve "auto" and check that the device is there.

    Raises:
        UserError: where it is not.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        # Read back, which "meta" cannot.
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError):
        raise UserError(
            f"--device {shown(device)}: there is no such device here; try --device cpu or auto"
        ) from None
    return device


def own_device(world: World, device: str) -> str:
    """The device of this process, checked to be there."""
    target = pick_device(device_for(world, device))
    if target.startswith("cuda:") and world.size > 1:
        # Otherwise all processes take memory on the first one as well.
        torch.cuda.set_device(target)
    return target


def versions() -> dict[str, str]:
    """Versions that a result depends on."""
    from .._version import __version__

    return {"dfq": __version__, "torch": torch.__version__}
