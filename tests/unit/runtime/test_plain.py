"""Reading YAML, JSON and objects of others within bounds."""

from __future__ import annotations

import collections
import datetime
import json
import math
import pickle
import random
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dfq.errors import UserError, shown
from dfq.runtime.files import read_json
from dfq.runtime.limits import DEEPEST, MOST_NODES
from dfq.runtime.plain import brief, one_line, parse_json, parse_yaml, plain_tree
from dfq.runtime.suggest import suggestion


@pytest.mark.parametrize(
    "text",
    [
        "a: 1\nb: [1, 2.5, x, null, true]\nc: {d: {e: f}}\n",
        "# nothing",
        "",
        "just text",
        "- 1\n- [2, 3]\n",
        "base: &b {x: 1, y: 2}\nmore: {<<: *b, y: 3}\n",
        "a: &a [1, 2]\nb: *a\nc: *a\n",
        "a: !!str 1\nb: !!float 2\n",
        "long: |\n  one\n  two\n",
        "1: a\ntext: b\n1.5: c\n",
        "a: 2024-05-06\n",
        "dup: [{a: 1}, {a: 2}]\n",
    ],
)
def test_yaml_is_pyyamls(text: str) -> None:
    assert parse_yaml(text, "x") == yaml.safe_load(text)


def test_yaml_as_deep_and_long_as_it_may_be() -> None:
    deep = "[" * DEEPEST + "]" * DEEPEST
    assert parse_yaml(deep, "x") == yaml.safe_load(deep)
    with pytest.raises(UserError, match=rf"x: is nested more than {DEEPEST} deep"):
        parse_yaml(f"[{deep}]", "x")
    count = MOST_NODES - 1
    assert len(parse_yaml("[" + "1," * count + "]", "x")) == count
    with pytest.raises(UserError, match=f"x: holds more than {MOST_NODES} values"):
        parse_yaml("[" + "1," * (count + 1) + "]", "x")


def test_aliases_count_as_often_as_they_stand() -> None:
    rows = "a: &a [" + "1," * 998 + "]\n"
    assert parse_yaml(rows + "b: [" + "*a," * 98 + "]\n", "x")["b"][97] == [1] * 998
    with pytest.raises(UserError, match="holds more than"):
        parse_yaml(rows + "b: [" + "*a," * 101 + "]\n", "x")


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("a: 1\nb: 2\na: 3\n", "lines 1 and 3"),
        ("x:\n  a: 1\n  a: 1\n", "lines 2 and 3"),
        ("x: [{a: 1, a: 2}]\n", "lines 1 and 1"),
        ("1: a\n0x1: b\n", "lines 1 and 2"),
        ("b: &b {a: 1}\nc: {<<: *b, d: 1, d: 2}\n", "lines 2 and 2"),
    ],
)
def test_keys_that_are_there_twice(text: str, lines: str) -> None:
    with pytest.raises(UserError, match=rf"the key .* is there twice, in {lines}"):
        parse_yaml(text, "x")


def test_values_by_chance_survive() -> None:
    chance = random.Random(0)

    def make(depth: int) -> Any:
        kind = chance.randrange(8 if depth else 6)
        if kind == 6:
            return [make(depth - 1) for _ in range(chance.randrange(4))]
        if kind == 7:
            return {f"k{i}": make(depth - 1) for i in range(chance.randrange(4))}
        return chance.choice([None, True, False, 7, -(2**62), 1.5, "", "text", "ä\n\t", "1e3"])

    for _ in range(200):
        value = make(4)
        assert parse_json(json.dumps(value), "x") == value
        assert plain_tree(value, "x") == value
        assert parse_yaml(yaml.safe_dump(value), "x") == value


def test_plain_trees_are_of_plain_values() -> None:
    given = {
        1: (1, [2.5], torch.Size([3])),
        "b": collections.OrderedDict(c=collections.defaultdict(list, d=["x"])),
    }
    tree = plain_tree(given, "x")
    assert tree == {"1": [1, [2.5], [3]], "b": {"c": {"d": ["x"]}}}
    assert json.loads(json.dumps(tree)) == tree
    assert type(tree["b"]["c"]) is dict
    given["b"]["c"]["d"].append("y")
    assert tree["b"]["c"]["d"] == ["x"]


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": [0, math.nan]}}, r"x, a\.b\.1: is nan"),
        ({"a": math.inf}, r"x, a: is inf"),
        ([2**63], r"x, 0: is 9223372036854775808"),
        ([2**4000], r"x, 0: is a number of some 1204 digits"),
        ({"a": object()}, r"x, a: is a object"),
        ({"a": {1, 2}}, r"x, a: is a set of 2"),
        ({"a": torch.zeros(3)}, r"x, a: is a Tensor"),
        ({"a": datetime.date(2024, 1, 1)}, r"x, a: is a date"),
        ({(1, 2): 3}, r"x: has the key a tuple of 2"),
        ({"a": "\ud800"}, r"x, a: is "),
        (b"bytes", r"x: is a bytes"),
    ],
)
def test_plain_trees_name_what_is_none(value: Any, message: str) -> None:
    with pytest.raises(UserError, match=message) as refused:
        plain_tree(value, "x")
    assert "\n" not in str(refused.value)


def test_a_tree_that_holds_itself() -> None:
    loop: list[Any] = []
    loop.append(loop)
    with pytest.raises(UserError, match="nested more than"):
        plain_tree(loop, "x")


def test_values_in_a_few_words() -> None:
    shared: Any = 1
    for _ in range(100):
        shared = [shared, shared]
    assert brief(shared) == "a list of 2"
    assert brief("a\nb") == r"'a\nb'"
    assert len(brief("x" * 10_000)) < 70
    assert brief(10**5000) == "a number of some 5000 digits"
    assert brief(-3) == "-3"
    assert brief({}) == "a dict of 0"
    assert brief(None) == "None"
    assert brief(torch.zeros(2)) == "a Tensor"
    assert shown("plain name.pt") == "plain name.pt"
    assert shown("two\nlines") == r"two\nlines"
    assert one_line(ValueError("a\n  b")) == "a b"
    assert one_line(KeyError()) == "KeyError"
    assert len(one_line(ValueError("x" * 5000))) == 200


@pytest.mark.parametrize(
    ("given", "known", "expected"),
    [
        ("imagse", ["images", "flip"], "; did you mean images?"),
        ("IMAGES", ["flip", "images"], "; did you mean images?"),
        ("zebra", ["images", "flip"], ""),
        ("", ["images"], ""),
        ("images", [], ""),
        ("x" * 10_000, ["images"], ""),
        ("yolo11ss", ["yolo11s", "yolo11n"], "; did you mean yolo11s?"),
    ],
)
def test_suggestions(given: str, known: list[str], expected: str) -> None:
    assert suggestion(given, known) == expected


@pytest.mark.parametrize("text", ['{"a": 1, "a": 1}', '[{"b": {"a": 1, "c": 2, "a": []}}]'])
def test_json_with_a_key_given_twice(text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="x: the key 'a' is there twice: keep one"):
        parse_json(text, "x")
    (tmp_path / "own.json").write_text(text)
    with pytest.raises(UserError, match=r"own\.json: the key 'a' is there twice: keep one"):
        read_json(tmp_path / "own.json")


def test_what_is_wrong_stays_on_its_line() -> None:
    """Names of files, devices and keys may hold what ends a line or moves the cursor."""
    assert str(UserError("a\nb\x1b[2J: gone")) == r"a\nb\x1b[2J: gone"
    several = UserError("first\nthing", "second")
    assert str(several).splitlines() == [r"first\nthing", "second"]
    assert str(pickle.loads(pickle.dumps(several))) == str(several)
