"""Unpickling without importing or running anything a file names.

Every name a pickle asks for is looked up in a closed table. Tensors and plain containers become
real; classes of known packages become `Inert` stand-ins, which record what the file says about
them and can do nothing; any other name ends the reading.

A pickle may call what a name stands for with any arguments (REDUCE) and give any object a state
(BUILD), so everything in the table has to be harmless with any arguments, and nothing in it may be
altered: functions are wrapped, and each stand-in class is made anew for each name.
"""

from __future__ import annotations

import builtins
import collections
import datetime
import pickle
import re
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError

# Packages whose classes may be named by a checkpoint. None is imported: see `Inert`.
_INERT_PREFIXES = (
    "torch.nn.",
    "torch._C._nn.",
    "torchvision.",
    "mmcv.",
    "mmdet.",
    "mmengine.",
    "ultralytics.",
    "models.yolo.",
    "models.common.",
    "models.experimental.",
    "utils.",
)
_INERT_NAMES = {
    "argparse.Namespace",
    "types.SimpleNamespace",
    "numpy.ndarray",
    "numpy.dtype",
    "numpy._core.multiarray._reconstruct",
    "numpy._core.multiarray.scalar",
    *(
        f"{module}.{name}"
        for module in ("pathlib", "pathlib._local")
        for name in ("Path", "PosixPath", "WindowsPath")
    ),
    *(f"pathlib.Pure{name}" for name in ("Path", "PosixPath", "WindowsPath")),
}
# Python 2 names, which pickle protocol 2 (torch's default) still writes, and numpy 1 names.
_RENAMED_MODULES = {
    "__builtin__": "builtins",
    "copy_reg": "copyreg",
    "numpy.core.multiarray": "numpy._core.multiarray",
}


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


class _Function:
    """A callable the file may use but, unlike a Python function, cannot alter."""

    __slots__ = ("_function",)

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a function was given a state")


class _ByteStorage:
    """The storage type of untyped storages, for torch's reader, which asks for its `dtype`."""

    __slots__ = ()
    dtype = torch.uint8

    def __setstate__(self, state: Any) -> None:
        raise pickle.UnpicklingError("a storage type was given a state")


def _tensor(storage: Any, offset: int, size: Any, stride: Any, *_: Any) -> Tensor:
    # The rest (requires_grad, hooks, conjugate and negative bits) has no use in a trained network.
    return torch._utils._rebuild_tensor(storage, offset, tuple(size), tuple(stride))


def _tensor_from_type(function: Any, _type: Any, args: tuple[Any, ...], _state: Any) -> Any:
    if not isinstance(function, _Function):
        raise pickle.UnpicklingError("a tensor subclass is rebuilt by no known function")
    return function(*args)


def _first(value: Any, *_: Any) -> Any:
    if not isinstance(value, Tensor):
        raise pickle.UnpicklingError("a parameter is not a tensor")
    return value


def _latin1(text: Any, encoding: Any = "latin1") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise pickle.UnpicklingError(f"bytes are written in the encoding {encoding!r}")
    return text.encode("latin1")


def _numpy_scalar(dtype: Any, raw: Any = None) -> bool | int | float:
    """A numpy number as the Python number it is."""
    code = dtype.args[0] if isinstance(dtype, Inert) and dtype.args else None
    if not isinstance(code, str) or not re.fullmatch(r"b1|[iu][1248]|f[248]", code):
        raise pickle.UnpicklingError(f"a numpy scalar has the type {code!r}")
    state = dtype.state.get("__state__", ())
    order = state[1] if len(state) > 1 and state[1] in ("<", ">") else "="
    return np.frombuffer(raw, np.dtype(order + code), count=1)[0].item()


def _plain_object(cls: Any, *_: Any) -> Inert:
    if not (isinstance(cls, type) and issubclass(cls, Inert)):
        raise pickle.UnpicklingError("an object is rebuilt from an unknown class")
    return cls()


def _allowed() -> dict[str, Any]:
    """Every name that is given a real meaning: immutable types, dtypes and wrapped functions."""
    table: dict[str, Any] = {
        "collections.OrderedDict": collections.OrderedDict,
        "collections.defaultdict": collections.defaultdict,
        "collections.Counter": _Function(dict),
        "collections.deque": _Function(lambda items=(), *_: list(items)),
        "_codecs.encode": _Function(_latin1),
        "copyreg._reconstructor": _Function(_plain_object),
        "numpy._core.multiarray.scalar": _Function(_numpy_scalar),
        "torch.Size": torch.Size,
        "torch.device": torch.device,
        "torch.UntypedStorage": _ByteStorage(),
        "torch.storage.UntypedStorage": _ByteStorage(),
        "torch._utils._rebuild_tensor": _Function(_tensor),
        "torch._utils._rebuild_tensor_v2": _Function(_tensor),
        "torch._utils._rebuild_parameter": _Function(_first),
        "torch._utils._rebuild_parameter_with_state": _Function(_first),
        "torch._utils._rebuild_device_tensor_from_cpu_tensor": _Function(_first),
        "torch._tensor._rebuild_from_type_v2": _Function(_tensor_from_type),
        "torch.Tensor": Inert.named("torch.Tensor"),
    }
    for name in (
        *("set", "frozenset", "list", "tuple", "dict", "slice", "range", "object"),
        *("bool", "int", "float", "complex", "str", "bytes", "bytearray"),
    ):
        table[f"builtins.{name}"] = getattr(builtins, name)
    for kind in (datetime.datetime, datetime.date, datetime.time):
        table[f"datetime.{kind.__name__}"] = kind
    table["datetime.timedelta"] = datetime.timedelta
    table["datetime.timezone"] = datetime.timezone
    for name, value in vars(torch).items():
        if isinstance(value, torch.dtype):
            table[f"torch.{name}"] = value
    return table


_ALLOWED = _allowed()


class _Unpickler(pickle.Unpickler):
    """Resolves names by the table alone. Base class `find_class` is never reached."""

    source = "the file"

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":
            value = _without_source_comparison(value)
        super().__setattr__(name, value)

    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED_MODULES.get(module, module)
        full = f"{module}.{name}"
        if full in _ALLOWED:
            return _ALLOWED[full]
        if full in _INERT_NAMES or full.startswith(_INERT_PREFIXES):
            return Inert.named(full)
        if full == "builtins.getattr":
            return _Function(self._member)
        raise self._refusal(full)

    def _member(self, owner: Any, name: Any = None) -> Any:
        # Protocol 2 writes a method (YOLO's Segment keeps one) as `getattr` of its class.
        if isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str):
            return Inert.named(f"{owner._file_name}.{name}")
        raise self._refusal("builtins.getattr")

    def _refusal(self, full: str) -> UserError:
        return UserError(
            f"{self.source} asks to run {full}, which no checkpoint needs: refused. "
            "If you trust its author, pass --trust"
        )


def _without_source_comparison(load: Callable[[Any], Any]) -> Callable[[Any], Any]:
    # Files written before PyTorch 1.6 carry the source text of their classes. torch compares it
    # with the present source and may write a patch file to the working folder.
    def persistent_load(saved: Any) -> Any:
        if isinstance(saved, tuple) and len(saved) > 1 and saved[0] in ("module", b"module"):
            return saved[1]
        return load(saved)

    return persistent_load


def restricted_pickle(source: str) -> Any:
    """What `torch.load` takes as `pickle_module`; `source` names the file in messages.

    Its unpickler raises `UserError` for a name outside the table.
    """
    unpickler = type("Unpickler", (_Unpickler,), {"source": source})

    def load(file: Any, **options: Any) -> Any:
        return unpickler(file, **options).load()

    return types.SimpleNamespace(__name__=__name__, Unpickler=unpickler, load=load)
