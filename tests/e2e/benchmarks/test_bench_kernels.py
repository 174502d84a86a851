"""The benchmark of the compiled functions: it compares what is the same, and says what is not."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
from click.testing import CliRunner
from torch import Tensor

from benchmarks.speed import kernels
from benchmarks.speed.kernel_parts import COMPILED, PLAIN, C, Compiler, Part, Way
from benchmarks.speed.kernels import KERNELS, agree
from dfq.errors import UserError

HAS_COMPILER = shutil.which("cc") is not None


@pytest.fixture(autouse=True)
def _threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def command(*words: str) -> tuple[int, str]:
    result = CliRunner().invoke(kernels.main, ["--rounds", "1", *words])
    return result.exit_code, result.output


def test_every_function_is_timed_three_ways(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a compiler's minutes: what would be compiled runs as it is."""
    monkeypatch.setattr(Compiler, "__call__", lambda _self, function, *_: function)
    code, output = command("--case", "32x3")
    if not HAS_COMPILER:
        assert code == 2
        return
    assert code == 0, output
    rows = [
        [cell.strip() for cell in text.split("|")[1:-1]]
        for text in output.splitlines()
        if text.startswith("| ") and "| 32 |" in text
    ]
    assert {row[0] for row in rows} == set(KERNELS)
    # Of each dtype, forward and both; one of what has float32 and the way forwards alone.
    of_pixels = len(kernels.OF_PIXELS)
    assert len(rows) == (len(KERNELS) - of_pixels) * 2 * 2 + of_pixels
    for row in rows:
        assert all(float(ratio) > 0 for ratio in row[8:10])
    assert "as an operation" in output


def test_what_cannot_be_compiled_is_said_and_left_out(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def program(x: Tensor) -> Tensor:
        return x + x.tolist()[0]

    def refuse(*_: object, **__: object) -> object:
        def compiled(*_: object) -> None:
            raise RuntimeError("two\nlines")

        return compiled

    monkeypatch.setattr(torch, "compile", refuse)
    assert Compiler()(program, torch.ones(2)) is None
    assert capsys.readouterr().out == "torch.compile cannot: two lines\n"
    code, output = command("--case", "32x1", "--kernel", "variation")
    if HAS_COMPILER:
        assert code == 0, output
        assert f"{COMPILED} cannot: two lines" in output
        assert "nan" in output


def test_ways_that_differ_are_not_timed() -> None:
    one, nearly = torch.ones(3), torch.tensor([1.0, 1.0, 1.0 + 2**-10])
    ways = {PLAIN: Way(lambda: (nearly,)), C: Way(lambda: (one,))}
    agree(Part(ways, tolerance=0.002))
    with pytest.raises(UserError, match=r"PyTorch and C differ by 0.00097"):
        agree(Part(ways, tolerance=0.0005))
    nan = {**ways, PLAIN: Way(lambda: (one * float("nan"),))}
    with pytest.raises(UserError, match="differ"):
        agree(Part(nan))


def test_a_case_that_is_none() -> None:
    for case in ("160", "x8", "100x8", "160x0", "axb"):
        code, output = command("--case", case)
        assert code == 2
        assert f"--case {case}: write PXxIMAGES" in output
