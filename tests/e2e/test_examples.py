"""Examples in docstrings of the public functions, one after the other in an empty folder."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest
import torch

import dfq
from dfq.graph import execution

# In this order: some use what those before them have made.
NAMES = (
    "synthesize", "quantize", "inspect", "evaluate", "sensitivity", "cost", "compare", "load_run",
    "load_detector", "load_model", "load_recipe", "predict", "export", "verify", "report",
)  # fmt: skip
# What takes minutes is shown in the README and run by `make demo`; types show their functions'.
ELSEWHERE = {"deploy", "Recipe", "UserError", "__version__"}


def _run(function: object, name: str) -> int:
    """Run the examples of a function; how many there were."""
    names = {"dfq": dfq, "torch": torch, **vars(execution)}
    runner = doctest.DocTestRunner(optionflags=doctest.NORMALIZE_WHITESPACE)
    (test,) = doctest.DocTestFinder(recurse=False).find(function, name, globs=names)
    printed: list[str] = []
    runner.run(test, out=printed.append)
    assert runner.failures == 0, "".join(printed)
    return runner.tries


def test_every_public_function_has_examples_that_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFQ_HOME", str(tmp_path / "home"))
    assert {*NAMES} | ELSEWHERE == set(dfq.__all__)
    for name in NAMES:
        home = importlib.import_module(f"dfq.{dfq._HOMES[name]}")
        assert _run(getattr(home, name), name) > 0, f"{name} has no example"


@pytest.mark.parametrize("name", ["hooks", "last_layer_of_block"])
def test_examples_of_what_watches_a_network(name: str) -> None:
    assert _run(getattr(execution, name), name) > 0
