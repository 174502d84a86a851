"""Unpickling without importing or running anything a file names.

Every name a pickle asks for is looked up in a closed table (`pickle_table`). Tensors and plain
containers become real; classes of known packages become `Inert` stand-ins, which record what the
file says about them and can do nothing; any other name ends the reading.
"""

from __future__ import annotations

import pickle
import types
from collections.abc import Callable
from typing import Any, ClassVar

from ..errors import UserError, shown
from .pickle_table import ALLOWED, Function, Inert, check_key

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
    # The original YOLOv5 as a package of pip.
    "yolov5.",
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


# The one written in Python, whose opcodes can be looked at and whose memo is as large as what is in
# it. Its annotations leave most of it out.
_Written: Any = pickle._Unpickler


class _Unpickler(_Written):
    """Resolves names by the table alone. Base class `find_class` is never reached."""

    source = "the file"
    storages: dict[str, int] | int = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "persistent_load":
            value = _checked(value, self.storages)
        super().__setattr__(name, value)

    def load_build(self) -> None:
        instance = self.stack[-2]
        if isinstance(instance, dict):
            # What PyTorch notes beside a state dict. Kept, it might stand in for a method.
            self.stack.pop()
        elif isinstance(instance, Inert):
            super().load_build()
        else:
            raise pickle.UnpicklingError(f"a {type(instance).__name__} is given a state")

    def load_setitem(self) -> None:
        check_key(self.stack[-2])
        super().load_setitem()

    def load_setitems(self) -> None:
        for key in self.stack[::2]:
            check_key(key)
        super().load_setitems()

    def load_dict(self) -> None:
        for key in self.stack[::2]:
            check_key(key)
        super().load_dict()

    def load_members(self) -> None:
        for member in self.stack:
            check_key(member)
        super().load_additems()

    def load_frozen_members(self) -> None:
        for member in self.stack:
            check_key(member)
        super().load_frozenset()

    dispatch: ClassVar[dict[int, Any]] = {
        **_Written.dispatch,
        pickle.BUILD[0]: load_build,
        pickle.SETITEM[0]: load_setitem,
        pickle.SETITEMS[0]: load_setitems,
        pickle.DICT[0]: load_dict,
        pickle.ADDITEMS[0]: load_members,
        pickle.FROZENSET[0]: load_frozen_members,
    }

    def find_class(self, module: str, name: str) -> Any:
        module = _RENAMED_MODULES.get(module, module)
        full = f"{module}.{name}"
        if full in ALLOWED:
            return ALLOWED[full]
        if full in _INERT_NAMES or full.startswith(_INERT_PREFIXES):
            return Inert.named(full)
        if full == "builtins.getattr":
            return Function(self._member)
        raise self._refusal(full)

    def _member(self, owner: Any, name: Any = None) -> Any:
        # Protocol 2 writes a method (YOLO's Segment keeps one) as `getattr` of its class, or of the
        # very object (fused layers keep one as their `forward`).
        if isinstance(owner, type) and issubclass(owner, Inert) and isinstance(name, str):
            return Inert.named(f"{owner._file_name}.{name}")
        if isinstance(owner, Inert) and isinstance(name, str):
            return Inert.named(f"{owner.qualified_name}.{name}")
        raise self._refusal("builtins.getattr")

    def _refusal(self, full: str) -> UserError:
        return UserError(
            f"{self.source} asks to run {shown(full)}, which no checkpoint needs: refused. "
            "If you trust its author, pass --trust"
        )


def _checked(load: Callable[[Any], Any], storages: dict[str, int] | int) -> Callable[[Any], Any]:
    known: dict[str, int] = {} if isinstance(storages, int) else storages
    remaining = storages if isinstance(storages, int) else 0

    def persistent_load(saved: Any) -> Any:
        nonlocal remaining
        if not isinstance(saved, tuple) or len(saved) < 2:
            raise pickle.UnpicklingError("a storage has no name")
        # Files written before PyTorch 1.6 carry the source text of their classes. torch compares it
        # with the present source and may write a patch file to the working folder.
        if saved[0] in ("module", b"module"):
            return saved[1]
        _, kind, key, _, count, *view = saved
        names = [key, *(part[0] for part in view if part is not None)]
        if not all(type(name) is str for name in names) or type(count) is not int or count < 0:
            raise pickle.UnpicklingError("a storage is described by other than text and a number")
        size = count * kind.dtype.itemsize
        if isinstance(storages, int) and key not in known:
            remaining -= size
            known[key] = size if remaining >= 0 else 0
        if size > known.get(key, 0):
            # torch would hand out whatever lies in memory behind it.
            raise pickle.UnpicklingError("a storage is larger than what is stored of it")
        return load(saved)

    return persistent_load


def restricted_pickle(source: str, storages: dict[str, int] | int) -> Any:
    """What `torch.load` takes as `pickle_module`.

    Its unpickler raises `UserError` for a name outside the table.

    Args:
        source: names the file in messages.
        storages: how many bytes the file holds of each storage, by its key; or of all together,
            where it does not say.
    """
    kind = type("Unpickler", (_Unpickler,), {"source": source, "storages": storages})

    def load(file: Any, **options: Any) -> Any:
        return kind(file, **options).load()

    return types.SimpleNamespace(__name__=__name__, Unpickler=kind, load=load)
