"""An empty value, which a shell makes of a variable that is not set, is no name of anything."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import click
import pytest
from support.harness import command, has_one_error

from dfq.cli.main import cli

_NO_TEXT = (click.types.IntParamType, click.types.FloatParamType, click.Choice)


def _commands(
    group: click.Group, words: tuple[str, ...] = ()
) -> Iterator[tuple[tuple, click.Command]]:
    for name, member in group.commands.items():
        if isinstance(member, click.Group):
            yield from _commands(member, (*words, name))
        else:
            yield (*words, name), member


def _is_text(parameter: click.Parameter) -> bool:
    if parameter.name == "overrides" or isinstance(parameter.type, _NO_TEXT):
        return False
    return isinstance(parameter, click.Argument) or not getattr(parameter, "is_flag", False)


CASES = [
    (words, member, parameter.name)
    for words, member in _commands(cli)
    for parameter in member.params
    if _is_text(parameter)
]


@pytest.mark.parametrize(
    ("words", "member", "name"), CASES, ids=[" ".join((*words, name)) for words, _, name in CASES]
)
def test_an_empty_value_is_refused(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    words: tuple[str, ...],
    member: click.Command,
    name: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    options, arguments = [], []
    for parameter in member.params:
        value = "" if parameter.name == name else "x"
        if isinstance(parameter, click.Argument):
            arguments.append(value)
        elif parameter.required or parameter.name in (name, "model"):
            options += [parameter.opts[0], value]
    line = has_one_error(command(*words, *options, *arguments))
    assert ": is empty; give a value, or leave it out" in line
    assert not list(tmp_path.iterdir())


def test_cases_cover_what_was_taken_for_the_present_folder() -> None:
    names = {(words[-1], name) for words, _, name in CASES}
    assert {("synthesize", "out"), ("ptq", "photos"), ("predict", "images")} <= names
    assert {("qat", "data"), ("synthesize", "tensorboard"), ("verify", "file")} <= names
