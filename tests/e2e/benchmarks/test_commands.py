"""Benchmarks and scripts are commands that run, and their table names all of them."""

from __future__ import annotations

import importlib
import re
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

from benchmarks.common import header, in_turns, line, names, pairs, results

ROOT = Path(__file__).resolve().parents[3]
COMMANDS = sorted(
    ".".join(file.relative_to(ROOT).with_suffix("").parts)
    for folder in ("benchmarks", "scripts")
    for file in (ROOT / folder).rglob("*.py")
    if 'if __name__ == "__main__"' in file.read_text()
)


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_tells_its_options(module: str) -> None:
    result = CliRunner().invoke(importlib.import_module(module).main, ["--help"])
    assert result.exit_code == 0
    # The example in the help is a command of this very module, as it is typed.
    examples = re.findall(r"python -m (\S+)", result.output)
    assert set(examples) <= {module}


def test_the_table_names_every_benchmark_and_target() -> None:
    rows = [
        [cell.strip(" `") for cell in text.split("|")]
        for text in (ROOT / "benchmarks" / "README.md").read_text().splitlines()
        if text.startswith("| `")
    ]
    modules = {name for name in COMMANDS if name.startswith("benchmarks.")}
    assert {f"benchmarks.{row[1]}" for row in rows} == modules
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^(bench-[\w-]+):", makefile, re.MULTILINE))
    assert {row[2] for row in rows if row[2]} == targets - {"bench-demo"}


def test_commands_in_the_docs_are_there() -> None:
    texts = [*ROOT.glob("*.md"), ROOT / "Makefile", *(ROOT / "docs").rglob("*.md")]
    named = {
        module
        for text in texts
        for module in re.findall(
            r"python\s+-m\s+((?:benchmarks|scripts)\.[\w.]+\w)", text.read_text()
        )
    }
    assert named
    assert named <= set(COMMANDS)


def test_calls_take_turns_and_the_first_do_not_count() -> None:
    order: list[str] = []
    times = in_turns({"a": lambda: order.append("a"), "b": lambda: order.append("b")}, 2, warm=1)
    assert order == ["a", "b"] * 3
    assert {name: len(found) for name, found in times.items()} == {"a": 2, "b": 2}


def test_tables_and_lists() -> None:
    assert header("x", "y:") == "| x | y |\n| --- | ---: |"
    assert line("a", 1) == "| a | 1 |"
    assert names("b,a,", {"a": 1, "b": 2}, "--only") == ["b", "a"]
    with pytest.raises(click.UsageError, match="--only c: choose from a, b"):
        names("a,c", {"a": 1, "b": 2}, "--only")
    assert pairs(["a=x=y", "b=z"], "--set") == {"a": "x=y", "b": "z"}
    for wrong in (["a"], ["=x"], ["a="], ["a=x", "a=y"]):
        with pytest.raises(click.UsageError, match=r"--set .*: write NAME=VALUE"):
            pairs(wrong, "--set")


def test_results_that_were_cut_short_are_left_out(tmp_path: Path) -> None:
    assert list(results(tmp_path / "none")) == []
    (tmp_path / "results.jsonl").write_text('{"a": 1}\n{"b": ')
    assert list(results(tmp_path / "results.jsonl")) == [{"a": 1}]
