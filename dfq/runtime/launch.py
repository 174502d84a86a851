"""What torchrun says in the environment of the processes it starts, and whether it makes sense."""

from __future__ import annotations

import os

import torch.distributed as dist

from ..errors import UserError, shown

_ALONE = "start the processes with torchrun, or unset RANK and WORLD_SIZE to work in one"


def number(name: str, default: int, most: int = 10**6) -> int:
    """A variable that torchrun sets.

    Raises:
        UserError: it is no whole number from 0 to `most`.
    """
    text = os.environ.get(name, "").strip() or str(default)
    if not (text.isascii() and text.isdigit() and len(text) < 19 and int(text) <= most):
        raise UserError(
            f"{name}={shown(text)} in the environment is no number that torchrun sets; {_ALONE}"
        )
    return int(text)


def place() -> tuple[int, int]:
    """Which of how many processes this is.

    Raises:
        UserError: where the environment contradicts itself.
    """
    rank, size = number("RANK", 0), number("WORLD_SIZE", 1)
    if size > 1 and not os.environ.get("RANK", "").strip():
        raise UserError(f"WORLD_SIZE={size}, but RANK is not set; {_ALONE}")
    if rank >= size:
        raise UserError(
            f"RANK={rank} in the environment is none of WORLD_SIZE={size} processes; {_ALONE}"
        )
    return rank, size


def meet() -> tuple[dist.Store, int, int]:
    """The store through which the processes keep in touch, the rank and the size.

    Raises:
        UserError: nothing says where the leading process is, or it is not there.
    """
    try:
        shared, rank, size = next(dist.rendezvous("env://"))
    except (ValueError, OverflowError, RuntimeError) as error:
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if not os.environ.get(name)]
        if missing:
            problem = f"{missing[0]} is not set"
        else:
            where = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
            problem = f"no leading process is at {shown(where)} ({shown(error)})"
        size_given = os.environ.get("WORLD_SIZE")
        raise UserError(f"WORLD_SIZE={size_given}, but {problem}; {_ALONE}") from None
    return shared, rank, size
