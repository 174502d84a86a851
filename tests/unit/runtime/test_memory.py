"""Freed memory is kept within the context, and given back after it.

Each check runs in a process of its own: what others have left on the heap would be used first.
"""

from __future__ import annotations

import ctypes
import platform
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dfq.runtime.malloc import freed_memory_kept, with_huge_pages

HUGE = Path("/sys/kernel/mm/transparent_hugepage/enabled")

BYTES = 48 << 20
"""Above what glibc ever keeps by its own rule."""

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(
        not hasattr(ctypes.CDLL(None), "mallopt"), reason="another C library than glibc"
    ),
]


def faults() -> int:
    """Pages that had to be mapped for ten large tensors, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(10):
        torch.ones(BYTES, dtype=torch.uint8)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    """Bytes of this process that are in memory."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def freed_is_allocated_again_without_new_pages() -> None:
    outside = faults()
    with freed_memory_kept():
        faults()
        within = faults()
    # Ten times 48 MiB are 122,880 pages of 4 KiB, fewer where the system gives large ones.
    assert within < 0.2 * outside


def given_back_outside() -> None:
    before = resident()
    faults()
    assert resident() < before + 0.5 * BYTES


def given_back_in_the_end() -> None:
    before = resident()
    with freed_memory_kept():
        faults()
        assert resident() > before + 0.9 * BYTES
    assert resident() < before + 0.5 * BYTES


def given_back_after_an_exception() -> None:
    def fail() -> None:
        with freed_memory_kept():
            faults()
            raise KeyError

    before = resident()
    with pytest.raises(KeyError):
        fail()
    assert resident() < before + 0.5 * BYTES


CHECKS = (
    freed_is_allocated_again_without_new_pages,
    given_back_outside,
    given_back_in_the_end,
    given_back_after_an_exception,
)


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_memory_that_is_freed_is(check: str) -> None:
    subprocess.run([sys.executable, __file__, check], check=True, timeout=600)


if __name__ == "__main__":
    {check.__name__: check for check in CHECKS}[sys.argv[1]]()


def test_large_pages_are_asked_for_beside_other_wishes() -> None:
    assert with_huge_pages({"A": "1"}) == {"A": "1", "GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}
    chosen = {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}
    assert with_huge_pages(chosen) == chosen


def test_a_process_asks_the_system_for_large_pages() -> None:
    # glibc before 2.35 does not know of it, and asks only where the system waits to be asked.
    name, version = platform.libc_ver()
    known = name == "glibc" and tuple(map(int, version.split("."))) >= (2, 35)
    asked = known and HUGE.exists() and "[madvise]" in HUGE.read_text()
    # "hg": of a part of memory, that large pages were asked for.
    code = "x = bytearray(64 << 20); print(' hg ' in open('/proc/self/smaps').read())"

    def asks(environment: dict[str, str]) -> str:
        command = [sys.executable, "-c", code]
        return subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        ).stdout.strip()

    assert (asks({}), asks(with_huge_pages({}))) == ("False", str(asked))
