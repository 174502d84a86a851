"""Text and objects of others as plain values: mappings, lists, text and numbers, within bounds.

YAML and JSON can name a value a million times in a line, nest it until Python's stack ends, or say
the same key twice; an object out of a checkpoint can do all of it and hold anything besides. What
comes out of here is a tree of a bounded size that holds nothing but plain values.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import yaml

from ..errors import UserError, shown
from .files import keys_once, reason
from .limits import DEEPEST, MOST_NODES, MOST_TEXT

# libyaml's parser where PyYAML was built with it: it is some ten times faster.
_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

ODD = (
    *(TypeError, ValueError, LookupError, AttributeError, ArithmeticError),
    *(RuntimeError, AssertionError, MemoryError, OSError),
)
"""What code that reads data of another form than it takes for granted runs into."""


def brief(value: Any, most: int = 60) -> str:
    """A short description of any value, on one line."""
    if isinstance(value, str):
        return repr(value if len(value) <= most else f"{value[: most - 3]}...")
    if isinstance(value, int) and value.bit_length() > 128:
        return f"a number of some {int(value.bit_length() * 0.30103)} digits"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    if isinstance(value, list | tuple | Mapping | set | frozenset):
        return f"a {type(value).__name__} of {len(value)}"
    return f"a {getattr(value, 'qualified_name', type(value).__name__)}"


def one_line(error: BaseException, most: int = 200, *, kind: bool = False) -> str:
    """What an exception says, in one line; with its kind, where its text alone says little."""
    text = shown(" ".join(str(error).split()), most)
    if not text:
        return type(error).__name__
    return f"{type(error).__name__}: {text}" if kind else text


def read_small(path: Path) -> str:
    """The text of a file (UTF-8), of no more than what `parse_yaml` takes.

    Raises:
        UserError: it cannot be read, is larger, or is no text.
    """
    try:
        with path.open("rb") as file:
            data = file.read(MOST_TEXT + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {reason(error)}") from None
    if len(data) > MOST_TEXT:
        raise UserError(f"{path}: is too large for a description, over {MOST_TEXT >> 20} MB")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not valid YAML: {one_line(error)}") from None


def parse_yaml(text: str, where: str) -> Any:
    """The one document of a YAML text.

    Args:
        text: the YAML.
        where: what to call it in messages.

    Raises:
        UserError: it is no YAML, is too large or nested too deeply, says a key twice, or refers to
            a value within itself.
    """
    if len(text) > MOST_TEXT:
        raise UserError(f"{where}: is too large for a description, over {MOST_TEXT >> 20} MB")
    try:
        _check_size(text, where)
        loader = _LOADER(text)
        try:
            root = loader.get_single_node()
            if root is None:
                return None
            check_keys(root, loader.construct_object, where)
            return loader.construct_document(root)
        finally:
            loader.dispose()
    except UserError:
        raise
    except yaml.YAMLError as error:
        if "nesting depth" in str(error):
            # libyaml has a bound of its own.
            raise UserError(f"{where}: is nested more than {DEEPEST} deep") from None
        raise UserError(f"{where}: not valid YAML: {one_line(error)}") from None
    # PyYAML lets through what its own constructors run into: a number of too many digits, a date
    # that does not exist, an empty number.
    except Exception as error:
        raise UserError(f"{where}: not valid YAML: holds {_not_a_value(error)}") from None


def _not_a_value(error: Exception) -> str:
    if "integer string conversion" in str(error):
        return "a number of too many digits"
    return f"a value that is none ({one_line(error)})"


def _check_size(text: str, where: str) -> None:
    """Count values event by event, which neither recurses nor builds anything."""
    count = 0
    open_nodes: list[tuple[str | None, int]] = []
    sizes: dict[str | None, int] = {}
    for event in yaml.parse(text, Loader=_LOADER):
        if isinstance(event, yaml.AliasEvent):
            if event.anchor in (anchor for anchor, _ in open_nodes):
                raise UserError(f"{where}: *{event.anchor} stands within &{event.anchor} itself")
            count += sizes.get(event.anchor, 1)
        elif isinstance(event, yaml.ScalarEvent):
            count += 1
            sizes[event.anchor] = 1
        elif isinstance(event, yaml.CollectionStartEvent):
            open_nodes.append((event.anchor, count))
            count += 1
            if len(open_nodes) > DEEPEST:
                raise UserError(f"{where}: is nested more than {DEEPEST} deep")
        elif isinstance(event, yaml.CollectionEndEvent):
            anchor, before = open_nodes.pop()
            sizes[anchor] = count - before
        if count > MOST_NODES:
            raise UserError(f"{where}: holds more than {MOST_NODES} values")


def check_keys(root: yaml.Node, construct: Callable[..., Any], where: str) -> None:
    """Refuse a YAML that says a key twice.

    Args:
        root: its document.
        construct: what makes a value of a node.
        where: what to call it in messages.

    Raises:
        UserError: names the key and both lines.
    """
    nodes, visited = [root], set()
    while nodes:
        node = nodes.pop()
        if id(node) in visited or not isinstance(node, yaml.CollectionNode):
            continue
        visited.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
            continue
        lines: dict[Any, int] = {}
        for key, value in node.value:
            nodes.append(value)
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = construct(key), key.start_mark.line + 1
            if name in lines:
                raise UserError(
                    f"{where}: the key {brief(name)} is there twice, in lines {lines[name]} and "
                    f"{line}: keep one"
                )
            lines[name] = line


def parse_json(text: str, where: str) -> Any:
    """The value of a JSON text, as `plain_tree` gives it.

    Raises:
        UserError: it is no JSON, too large or nested too deeply, says a key twice, or holds a
            number that is not finite.
    """
    if len(text) > MOST_TEXT:
        raise UserError(f"{where}: is too large for a description, over {MOST_TEXT >> 20} MB")
    try:
        value = json.loads(text, object_pairs_hook=keys_once(where))
    except RecursionError:
        raise UserError(f"{where}: is nested more than {DEEPEST} deep") from None
    except ValueError as error:
        raise UserError(f"{where}: is not JSON: {_not_a_value(error)}") from None
    return plain_tree(value, where)


def plain_tree(value: Any, where: str) -> Any:
    """A copy of a value as JSON has them: tuples as lists, keys as text.

    Args:
        value: anything, of a source that is not trusted.
        where: what to call it in messages.

    Raises:
        UserError: it holds an object or a number that is not finite or of over 64 bits, is too
            large or nested too deeply. The message says where.
    """
    nodes_left = MOST_NODES

    def copy(item: Any, path: tuple[str, ...]) -> Any:
        nonlocal nodes_left
        nodes_left -= 1
        if nodes_left < 0:
            raise UserError(f"{where}: holds more than {MOST_NODES} values")
        if len(path) > DEEPEST:
            raise UserError(f"{where}: is nested more than {DEEPEST} deep")
        if item is None or isinstance(item, bool):
            return item
        if isinstance(item, int) and item.bit_length() < 64:
            return int(item)
        if isinstance(item, float) and math.isfinite(item):
            return float(item)
        if isinstance(item, str) and _is_text(item):
            return str(item)
        if isinstance(item, list | tuple):
            return [copy(part, (*path, str(index))) for index, part in enumerate(item)]
        if isinstance(item, Mapping):
            result = {}
            for key, part in item.items():
                if not isinstance(key, str | int) or not _is_text(name := _text_of(key)):
                    raise UserError(f"{_place(where, path)}: has the key {brief(key)}, not text")
                result[name] = copy(part, (*path, brief(name, 40).strip("'\"")))
            return result
        raise UserError(f"{_place(where, path)}: is {brief(item)}, which no description holds")

    return copy(value, ())


def _text_of(key: str | int) -> str:
    return key if isinstance(key, str) else brief(key)


def _is_text(text: str) -> bool:
    if len(text) > MOST_TEXT:
        return False
    try:
        text.encode()
    except UnicodeEncodeError:
        # Halves of a pair, which no file or terminal takes.
        return False
    return True


def _place(where: str, path: tuple[str, ...]) -> str:
    return f"{where}, {'.'.join(path)}" if path else where
