"""What a checkpoint's pickle may name: stand-ins for objects, and functions that can do no harm.

A pickle may call what a name stands for with any arguments (REDUCE), so everything in the table has
to be harmless with any arguments. Functions are wrapped, and each stand-in class is made anew for
each name: nothing that is altered is seen by anyone else.

Nor may it take time or memory out of proportion to the file's size: containers are made of
containers only, keys are small (hashing a tuple looks through all of it), and tensors are as large
as their storages.
"""

from __future__ import annotations

import collections
import datetime
import math
import pickle
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..runtime.plain import brief


class Inert:
    """What stands in for an object of a class that is not loaded.

    Attributes:
        qualified_name: module and class as the file names them, e.g. "models.common.Conv".
        args: positional constructor arguments in the file (empty for most objects).
        state: the object's `__dict__` as the file holds it.
    """

    __slots__ = ("args", "qualified_name", "state")

    _file_name = ""

    qualified_name: str
    args: tuple[Any, ...]
    state: dict[str, Any]

    def __new__(cls, *args: Any, **_: Any) -> Inert:
        self = super().__new__(cls)
        self.qualified_name = cls._file_name
        self.args = args
        self.state = {}
        return self

    def __init__(self, *_: Any, **__: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        # (dict, slots) is how pickle writes an object with __slots__.
        parts = state if isinstance(state, tuple) and len(state) == 2 else (state,)
        if all(part is None or isinstance(part, dict) for part in parts):
            for part in parts:
                self.state.update(part or {})
        else:
            self.state["__state__"] = state

    def __repr__(self) -> str:
        return f"Inert({self.qualified_name})"

    @property
    def class_name(self) -> str:
        """The last part of `qualified_name`."""
        return self.qualified_name.rpartition(".")[2]

    @classmethod
    def named(cls, qualified_name: str) -> type[Inert]:
        """A new stand-in class for `qualified_name`."""
        return type("Inert", (cls,), {"__slots__": (), "_file_name": qualified_name})


class Function:
    """A callable the file may use but, unlike a Python function, cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)


class _ByteStorage:
    """The storage type of untyped storages, for torch's reader, which asks for its `dtype`."""

    __slots__ = ()
    dtype = torch.uint8


_MOST_REPEATED = 1 << 20
"""Numbers of a tensor that its storage holds fewer of: those of an expanded one."""


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # The rest (requires_grad, hooks, conjugate and negative bits) has no use in a trained network.
    stored = storage._untyped_storage.nbytes() // storage.dtype.itemsize
    size, stride = _layout(stored, offset, size, stride)
    return torch._utils._rebuild_tensor(storage, offset, size, stride)


def _tensor_of_dtype(
    storage: Any, offset: int, size: Any, stride: Any, _grad: Any, _hooks: Any, dtype: Any, *_: Any
) -> Tensor:
    if not isinstance(dtype, torch.dtype):
        raise pickle.UnpicklingError("the type of a tensor is none")
    untyped = storage._untyped_storage
    size, stride = _layout(untyped.nbytes() // dtype.itemsize, offset, size, stride)
    return torch.empty(0, dtype=dtype).set_(untyped, offset, size, stride)


def _layout(stored: int, offset: Any, size: Any, stride: Any) -> tuple[Any, Any]:
    """Size and stride of a tensor, checked against the numbers its storage holds: torch would make
    the storage larger, or leave a tensor of any size to who looks at it."""
    size, stride = tuple(size), tuple(stride)
    numbers = (offset, *size, *stride)
    if len(numbers) > 129 or not all(type(n) is int and 0 <= n < 1 << 62 for n in numbers):
        raise pickle.UnpicklingError("the layout of a tensor is not of whole numbers")
    count = math.prod(size)
    reach = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) + 1
    if (count and reach > stored) or count > max(stored, _MOST_REPEATED):
        raise pickle.UnpicklingError("a tensor is larger than what is stored of it")
    if any(part > _MOST_REPEATED for part in size if not count):
        raise pickle.UnpicklingError("a tensor is empty and large")
    return size, stride


def _tensor_from_type(function: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, Function):
        raise pickle.UnpicklingError("a tensor subclass is rebuilt by no known function")
    return function(*args)


def _first(value: Any, *_: Any) -> Any:
    if not isinstance(value, Tensor):
        raise pickle.UnpicklingError("a parameter is not a tensor")
    return value


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are written in the encoding {brief(encoding)}")
    return text.encode("latin1")


def _numpy_scalar(dtype: Any, raw: Any = None) -> bool | int | float:
    """A numpy number as the Python number it is."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
        raise pickle.UnpicklingError(f"a numpy scalar has the type {brief(code)}")
    state = dtype.state.get("__state__", ())
    order = state[1] if len(state) > 1 and state[1] in ("<", ">") else "="
    return np.frombuffer(raw, np.dtype(order + code), count=1)[0].item()


def _plain_object(cls: Any, *_: Any) -> Inert:
    if not (isinstance(cls, type) and issubclass(cls, Inert)):
        raise pickle.UnpicklingError("an object is rebuilt from an unknown class")
    return cls()


_CONTAINERS = (list, tuple, dict, set, frozenset, str, bytes, bytearray, torch.Size)
_SCALARS = (str, bytes, int, float, bool, complex, type(None))


def _items(contents: Any = ()) -> Any:
    """What a container may be made of: another one, not what may be endless or count to 10**18."""
    if type(contents) not in _CONTAINERS and not isinstance(contents, dict):
        raise pickle.UnpicklingError(f"a container is made of a {type(contents).__name__}")
    return contents


def _pairs(contents: Any = ()) -> dict[Any, Any]:
    pairs = list(contents.items() if isinstance(contents, dict) else _items(contents))
    for pair in pairs:
        if not (isinstance(pair, list | tuple) and len(pair) == 2):
            raise pickle.UnpicklingError("a mapping is made of something else than pairs")
        check_key(pair[0])
    return {pair[0]: pair[1] for pair in pairs}


def _members(contents: Any = ()) -> list[Any]:
    members = list(_items(contents))
    for member in members:
        check_key(member)
    return members


def check_key(key: Any) -> None:
    """Refuse a key of a mapping or member of a set that it takes long to hash or to compare.

    Raises:
        UnpicklingError: it is such a one.
    """
    pending, count = [key], 0
    while pending:
        part = pending.pop()
        count += 1
        if isinstance(part, tuple):
            pending += part
        elif isinstance(part, frozenset):
            raise pickle.UnpicklingError("a key is a set")
        if count + len(pending) > 1000:
            raise pickle.UnpicklingError("a key is too large")


def _text(value: Any = "", encoding: Any = "utf-8", *_: Any) -> str:
    if isinstance(value, bytes | bytearray) and encoding in ("utf-8", "latin1", "latin-1", "ascii"):
        return value.decode(encoding)
    if type(value) not in _SCALARS:
        raise pickle.UnpicklingError(f"text is made of a {type(value).__name__}")
    return str(value)


def _bytes(kind: type) -> Callable[..., Any]:
    def make(value: Any = b"", encoding: Any = None) -> Any:
        if isinstance(value, str):
            return kind(_latin1(value, encoding))
        if isinstance(value, int):
            raise pickle.UnpicklingError("bytes are made of a number")
        return kind(_items(value))

    return make


def _range(*limits: Any) -> range:
    numbers = range(*limits)
    if len(numbers) > _MOST_REPEATED:
        raise pickle.UnpicklingError("a range is too long")
    return numbers


def _default(factory: Any = None, contents: Any = ()) -> collections.defaultdict[Any, Any]:
    if factory is not None and not callable(factory):
        raise pickle.UnpicklingError("a default is made by no function")
    return collections.defaultdict(factory, _pairs(contents))


def _allowed() -> dict[str, Any]:
    """Every name that is given a real meaning: immutable types, dtypes and wrapped functions."""
    table: dict[str, Any] = {
        "builtins.list": Function(lambda contents=(): list(_items(contents))),
        "builtins.tuple": Function(lambda contents=(): tuple(_items(contents))),
        "builtins.dict": Function(_pairs),
        "builtins.set": Function(lambda contents=(): set(_members(contents))),
        "builtins.frozenset": Function(lambda contents=(): frozenset(_members(contents))),
        "builtins.str": Function(_text),
        "builtins.bytes": Function(_bytes(bytes)),
        "builtins.bytearray": Function(_bytes(bytearray)),
        "builtins.range": Function(_range),
        "collections.OrderedDict": Function(
            lambda contents=(): collections.OrderedDict(_pairs(contents))
        ),
        "collections.defaultdict": Function(_default),
        "collections.Counter": Function(_pairs),
        "collections.deque": Function(lambda contents=(), *_: list(_items(contents))),
        "_codecs.encode": Function(_latin1),
        "copyreg._reconstructor": Function(_plain_object),
        "numpy._core.multiarray.scalar": Function(_numpy_scalar),
        "torch.Size": Function(lambda contents=(): torch.Size(_items(contents))),
        "torch.device": torch.device,
        "torch.UntypedStorage": _ByteStorage(),
        "torch.storage.UntypedStorage": _ByteStorage(),
        "torch._utils._rebuild_tensor": Function(_tensor),
        "torch._utils._rebuild_tensor_v2": Function(_tensor),
        "torch._utils._rebuild_tensor_v3": Function(_tensor_of_dtype),
        "torch._utils._rebuild_parameter": Function(_first),
        "torch._utils._rebuild_parameter_with_state": Function(_first),
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": Function(_first),
        "torch._tensor._rebuild_from_type_v2": Function(_tensor_from_type),
        "torch.Tensor": Inert.named("torch.Tensor"),
    }
    for plain in (slice, object, bool, int, float, complex):
        table[f"builtins.{plain.__name__}"] = plain
    for kind in (datetime.datetime, datetime.date, datetime.time):
        table[f"datetime.{kind.__name__}"] = kind
    table["datetime.timedelta"] = datetime.timedelta
    table["datetime.timezone"] = datetime.timezone
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            table[f"torch.{name}"] = value
    return table


ALLOWED = _allowed()
