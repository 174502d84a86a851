"""Activation functions by name and arguments: `LeakyReLU(negative_slope=0.01)`.

A checkpoint says which activations its network has, and with which arguments; a YAML names one, and
so does the description of a saved detector. All three are read here, against one closed list.
"""

from __future__ import annotations

import ast
from typing import Any

from torch import nn

from ..errors import UserError
from ..runtime.limits import WIDEST
from ..runtime.plain import brief
from .checkpoint import attribute, class_of

Arguments = dict[str, Any]

_KINDS: dict[str, tuple[type[nn.Module], Arguments]] = {
    "CELU": (nn.CELU, {"alpha": 1.0}),
    "ELU": (nn.ELU, {"alpha": 1.0}),
    "GELU": (nn.GELU, {"approximate": "none"}),
    "Hardshrink": (nn.Hardshrink, {"lambd": 0.5}),
    "Hardsigmoid": (nn.Hardsigmoid, {}),
    "Hardswish": (nn.Hardswish, {}),
    "Hardtanh": (nn.Hardtanh, {"min_val": -1.0, "max_val": 1.0}),
    "Identity": (nn.Identity, {}),
    "LeakyReLU": (nn.LeakyReLU, {"negative_slope": 0.01}),
    "LogSigmoid": (nn.LogSigmoid, {}),
    "Mish": (nn.Mish, {}),
    "PReLU": (nn.PReLU, {"num_parameters": 1}),
    "RReLU": (nn.RReLU, {"lower": 0.125, "upper": 1 / 3}),
    "ReLU": (nn.ReLU, {}),
    "ReLU6": (nn.ReLU6, {}),
    "SELU": (nn.SELU, {}),
    "SiLU": (nn.SiLU, {}),
    "Sigmoid": (nn.Sigmoid, {}),
    "Softplus": (nn.Softplus, {"beta": 1.0, "threshold": 20.0}),
    "Softshrink": (nn.Softshrink, {"lambd": 0.5}),
    "Softsign": (nn.Softsign, {}),
    "Tanh": (nn.Tanh, {}),
    "Tanhshrink": (nn.Tanhshrink, {}),
    "Threshold": (nn.Threshold, {"threshold": None, "value": None}),
}
"""By PyTorch's name: the class, and its arguments with their defaults, in order."""

_NAMES = {f"torch.nn.modules.activation.{name}": name for name in _KINDS} | {
    "torch.nn.modules.linear.Identity": "Identity",
    # The original YOLOv5's own, which compute the same.
    **{f"utils.activations.{name}": name for name in ("SiLU", "Hardswish", "Mish")},
    "utils.activations.MemoryEfficientMish": "Mish",
}

_FREE_OF_MEANING = ("inplace", "init")
"""Arguments that change no result of a trained network, in the places after the others."""


def is_name(name: str) -> bool:
    """Whether an activation of the list is called that."""
    return name in _KINDS


def is_listed(module: Any) -> bool:
    """Whether a module, real or inert, is an activation of the list."""
    return _class(module) in _NAMES


def describe(module: Any) -> str | None:
    """`LeakyReLU(negative_slope=0.01)` of a module, real or inert; None where it is not listed.

    Raises:
        UserError: an argument is no finite number.
    """
    name = _NAMES.get(_class(module))
    if name is None:
        return None
    # What older versions of PyTorch did not write down is at its default.
    arguments = {key: attribute(module, key, default) for key, default in _KINDS[name][1].items()}
    return _text(name, arguments)


def parse(text: Any) -> str:
    """The same of what a YAML or a description says: `nn.LeakyReLU(0.1)`, `torch.nn.SiLU()`.

    Raises:
        UserError: it is no activation of the list, or has other arguments. Says why, not where.
    """
    name, arguments = _call(text)
    values = dict(_KINDS[name][1])
    order = [*values, *_FREE_OF_MEANING]
    for key, value in arguments.items():
        argument = order[key] if isinstance(key, int) and key < len(order) else key
        if argument in _FREE_OF_MEANING:
            continue
        if argument not in values:
            raise UserError(f"the activation {name} has no argument {brief(argument)}")
        values[str(argument)] = value
    return _text(name, values)


def make(text: str) -> nn.Module:
    """The module of a text that `describe` or `parse` gave, in eval mode."""
    name, arguments = _call(text)
    return _KINDS[name][0](**{str(key): value for key, value in arguments.items()}).eval()


def torch_text(text: str) -> str:
    """The same as an expression of Python over `torch`, for who evaluates it."""
    return f"torch.nn.{text}"


def known() -> str:
    """Every activation's name, for messages."""
    return ", ".join(_KINDS)


def _class(module: Any) -> str:
    name = class_of(module)
    return name.removeprefix("yolov5.")


def _text(name: str, values: Arguments) -> str:
    written = []
    for key, value in values.items():
        default = _KINDS[name][1][key]
        if isinstance(default, str):
            good = isinstance(value, str) and value in ("none", "tanh")
        elif isinstance(default, int):
            good = type(value) is int and 1 <= value <= WIDEST
        else:
            good = type(value) in (int, float) and abs(value) < 1e30
            value = float(value) if good else value
        if not good:
            raise UserError(f"the activation {name} has {brief(value)} for its {key}")
        written.append(f"{key}={value!r}")
    return f"{name}({', '.join(written)})"


def _call(text: Any) -> tuple[str, dict[int | str, Any]]:
    """Name and arguments of a call; arguments by position (an integer) or name."""
    if not isinstance(text, str) or len(text) > 200:
        raise UserError("an activation is a short text")
    try:
        call = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise UserError("an activation is NAME(numbers)") from None
    if not isinstance(call, ast.Call):
        raise UserError("an activation is NAME(numbers)")
    name = ast.unparse(call.func)
    for prefix in ("torch.nn.", "nn."):
        name = name.removeprefix(prefix)
    if name not in _KINDS:
        raise UserError(f"the activation {brief(name)} is none of {known()}")
    arguments: dict[int | str, Any] = {}
    for place, node in enumerate(call.args):
        arguments[place] = _literal(node)
    for keyword in call.keywords:
        if keyword.arg is None:
            raise UserError("an activation is NAME(numbers)")
        arguments[keyword.arg] = _literal(keyword.value)
    return name, arguments


def _literal(node: ast.expr) -> Any:
    try:
        value = ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        raise UserError("an activation's arguments are numbers") from None
    if not isinstance(value, bool | int | float | str):
        raise UserError("an activation's arguments are numbers")
    return value
