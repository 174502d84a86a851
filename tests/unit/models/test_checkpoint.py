"""Reading checkpoints: what is read is right, and nothing in a file is ever run."""

from __future__ import annotations

import argparse
import builtins
import collections
import datetime
import hashlib
import io
import os
import pathlib
import pickle
import random
import sys
import types
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from ultralytics.nn.modules import Conv

from dfq.errors import UserError
from dfq.models.checkpoint import (
    Inert,
    attribute,
    find_model,
    modules_of,
    read_checkpoint,
    sha256_of,
    state_dict_of,
)


class Call:
    """Pickles to a call of `function`."""

    def __init__(self, function: Callable[..., Any], *args: Any) -> None:
        self.call = (function, args)

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return self.call


def global_call(module: str, name: str, argument: str) -> bytes:
    """A hand-written pickle that calls `module.name(argument)`: it needs no such module."""
    text = argument.encode()
    return (
        b"\x80\x02c" + f"{module}\n{name}\n".encode() + b"X" + len(text).to_bytes(4, "little")
    ) + (text + b"\x85R.")


def zip_around(path: Path, pickled: bytes) -> None:
    """A torch zip checkpoint whose pickle is `pickled`."""
    plain = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        for item in old.namelist():
            new.writestr(item, pickled if item.endswith("data.pkl") else old.read(item))


def legacy_around(path: Path, pickled: bytes) -> None:
    """A torch checkpoint of the format before 1.6 whose pickle is `pickled`."""
    from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

    start: tuple[Any, ...] = (MAGIC_NUMBER, PROTOCOL_VERSION, {})
    parts = [pickle.dumps(value, 2) for value in start]
    path.write_bytes(b"".join(parts) + pickled + pickle.dumps([], 2))


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize(
    "function", [os.system, eval, exec, builtins.__import__, open, torch.load, torch.hub.load]
)
def test_a_call_nested_in_a_checkpoint_is_refused_and_not_made(
    tmp_path: Path, function: Callable[..., Any], legacy: bool
) -> None:
    marker = tmp_path / "marker"
    argument = {
        os.system: f"touch {marker}",
        open: str(marker),
        eval: f"open({str(marker)!r}, 'w')",
        exec: f"open({str(marker)!r}, 'w')",
    }.get(function, "nonexistent")
    args = (argument, "w") if function is open else (argument,)
    path = tmp_path / "x.pt"
    root = {"ema": None, "model": {"layers": [torch.zeros(3), Call(function, *args)]}}
    torch.save(root, path, _use_new_zipfile_serialization=not legacy)
    name = f"{function.__module__}.{function.__qualname__}"
    with pytest.raises(UserError, match=rf"x\.pt asks to run {name}, .* pass --trust"):
        read_checkpoint(path)
    assert not marker.exists()
    if function is os.system:  # the file does bite: the check above can fail
        read_checkpoint(path, trust=True)
        assert marker.exists()


@pytest.mark.parametrize("wrap", [zip_around, legacy_around, Path.write_bytes])
@pytest.mark.parametrize(
    ("module", "name"),
    [
        ("posix", "system"),
        ("nt", "system"),
        ("subprocess", "Popen"),
        ("__builtin__", "eval"),
        ("builtins", "getattr"),
        ("builtins", "vars"),
        ("builtins", "type"),
        ("numpy.testing._private.utils", "runstring"),
        ("numpy", "load"),
        ("torch.serialization", "load"),
        ("torch.utils.model_zoo", "load_url"),
        ("torch.jit", "load"),
        ("torch", "compile"),
        ("torch._utils", "_import_dotted_name"),
        ("collections", "OrderedDict.fromkeys"),
        ("functools", "partial"),
        ("operator", "attrgetter"),
        ("pickle", "loads"),
        ("shutil", "rmtree"),
    ],
)
def test_other_gadgets_are_refused_by_name(
    tmp_path: Path, wrap: Callable[[Path, bytes], None], module: str, name: str
) -> None:
    path = tmp_path / "x.pt"
    wrap(path, global_call(module, name, "x"))
    shown = module.replace("__builtin__", "builtins")
    with pytest.raises(UserError, match=rf"asks to run {shown}\.{name}, "):
        read_checkpoint(path)


def test_getattr_reaches_no_real_object(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save([Call(getattr, collections.OrderedDict, "__subclasses__")], path)
    with pytest.raises(UserError, match=r"asks to run builtins\.getattr"):
        read_checkpoint(path)


def test_a_method_of_a_stand_in_is_one(tmp_path: Path) -> None:
    """As `fuse` of Ultralytics and YOLOv5 leaves one in each layer."""
    layer = Conv(1, 1)
    layer.forward = layer.forward_fuse
    torch.save({"model": layer}, tmp_path / "x.pt")
    network = read_checkpoint(tmp_path / "x.pt").root["model"]
    method = network.state["forward"]
    assert issubclass(method, Inert)
    assert method._file_name == "ultralytics.nn.modules.conv.Conv.forward_fuse"


def test_known_packages_are_not_imported_or_called(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    zip_around(path, global_call("ultralytics.utils.downloads", "download", "http://x"))
    root = read_checkpoint(path).root
    assert isinstance(root, Inert)
    assert root.qualified_name == "ultralytics.utils.downloads.download"
    assert root.args == ("http://x",)


def test_state_with_special_names_stays_data(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    state = {"__class__": 1, "__setstate__": 2, "qualified_name": "other", "args": 3}

    class Build:
        def __reduce__(self) -> tuple[Any, ...]:
            return argparse.Namespace, (), state

    torch.save(Build(), path)
    root = read_checkpoint(path).root
    assert isinstance(root, Inert)
    assert root.state == state
    assert root.qualified_name == "argparse.Namespace"
    assert root.args == ()


@pytest.mark.parametrize(
    "name",
    [
        "torch._utils\n_rebuild_tensor_v2",
        "torch\nUntypedStorage",
        "collections\nOrderedDict",
        "torch.nn.modules.conv\nConv2d",
        "builtins\nset",
        "torch\nfloat32",
    ],
)
def test_what_a_name_stands_for_cannot_be_altered(tmp_path: Path, name: str) -> None:
    path = tmp_path / "x.pt"
    # BUILD with (None, {"__defaults__": ()}) sets attributes of whatever is on the stack.
    build = b"\x80\x02c" + name.encode() + b"\nN}X\x0c\x00\x00\x00__defaults__)s\x86b."
    zip_around(path, build)
    with pytest.raises(UserError):
        read_checkpoint(path)


def test_mutated_checkpoints_end_in_a_user_error(tmp_path: Path) -> None:
    plain = io.BytesIO()
    torch.save({"model": nn.Linear(2, 2), "date": datetime.datetime(2024, 1, 1)}, plain)
    with zipfile.ZipFile(plain) as archive:
        pickled = next(archive.read(n) for n in archive.namelist() if n.endswith("data.pkl"))
    path, chance, failures = tmp_path / "x.pt", random.Random(0), 0
    for _ in range(300):
        data = bytearray(pickled)
        for _ in range(chance.randint(1, 3)):
            data[chance.randrange(len(data))] = chance.randrange(256)
        zip_around(path, bytes(data))
        try:
            read_checkpoint(path)
        except UserError:
            failures += 1
    assert failures > 50


@pytest.mark.parametrize("legacy", [False, True])
def test_tensors_and_containers_come_back(tmp_path: Path, legacy: bool) -> None:
    base = torch.arange(12.0)
    root = {
        "half": torch.randn(3, 4).half(),
        "view": base.view(3, 4).t()[1:],
        "integers": torch.tensor([1, -2]),
        "bfloat": torch.ones(2, dtype=torch.bfloat16),
        "parameter": nn.Parameter(torch.randn(2)),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 3),
        "ordered": collections.OrderedDict(a=1, b=(2, [3, None, True])),
        "default": collections.defaultdict(list, x=[1]),
        "set": {1, 2},
        "slice": slice(1, 2),
        "bytes": b"\x00\xff",
        "size": torch.Size([1, 2]),
        "device": torch.device("cpu"),
        "dtype": torch.float16,
        "date": datetime.datetime(2024, 5, 6, 7, 8, 9),
        "int64": np.int64(-7),
        "float64": np.float64(0.1),
        "bool": np.bool_(True),
    }
    path = tmp_path / "x.pt"
    torch.save(root, path, _use_new_zipfile_serialization=not legacy)
    read = read_checkpoint(path).root
    assert read.keys() == root.keys()
    for key, value in root.items():
        if isinstance(value, torch.Tensor):
            assert read[key].dtype == value.dtype
            assert torch.equal(read[key], value.detach())
        else:
            assert read[key] == value
            assert type(read[key]) is (
                type(value.item()) if hasattr(value, "item") else type(value)
            )


def test_paths_arrays_and_namespaces_are_inert(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    root = {
        "path": pathlib.PurePosixPath("a/b"),
        "array": np.arange(3),
        "options": argparse.Namespace(imgsz=640),
    }
    torch.save(root, path)
    read = read_checkpoint(path).root
    assert all(isinstance(value, Inert) for value in read.values())
    assert read["path"].qualified_name.endswith("PurePosixPath")
    assert read["options"].state == {"imgsz": 640}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.none = None
        self.register_buffer("kept", torch.ones(2).half())
        self.register_buffer("transient", torch.ones(2), persistent=False)
        self.register_buffer("absent", None)
        self.extra = "text"


@pytest.fixture
def known_block(monkeypatch: pytest.MonkeyPatch) -> type[Block]:
    """`Block`, pickled under the name of a package that checkpoints may name."""
    module = types.ModuleType("models.common")
    module.Block = Block  # type: ignore[attr-defined]
    monkeypatch.setattr(Block, "__module__", "models.common")
    monkeypatch.setitem(sys.modules, "models", types.ModuleType("models"))
    monkeypatch.setitem(sys.modules, "models.common", module)
    return Block


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("trust", [False, True])
def test_state_dict_of_a_module(
    tmp_path: Path,
    known_block: type[Block],
    monkeypatch: pytest.MonkeyPatch,
    *,
    legacy: bool,
    trust: bool,
) -> None:
    monkeypatch.chdir(tmp_path)
    module = nn.Sequential(known_block(), nn.SiLU())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch: no source text for Block
        torch.save(
            {"ema": module, "model": None}, "x.pt", _use_new_zipfile_serialization=not legacy
        )
        checkpoint = read_checkpoint("x.pt", trust=trust)
    found = find_model(checkpoint)
    assert isinstance(found, nn.Module if trust else Inert)
    expected = {
        k: v.float() if v.is_floating_point() else v for k, v in module.state_dict().items()
    }
    read = state_dict_of(found)
    assert list(read) == list(expected)
    assert all(torch.equal(read[k], v) and read[k].dtype == v.dtype for k, v in expected.items())
    assert [name for name, _ in modules_of(found)] == [name for name, _ in module.named_modules()]
    block = attribute(found, "0")
    assert attribute(block, "extra") == "text"
    assert torch.equal(attribute(block, "transient"), torch.ones(2))
    assert attribute(block, "nothing", 5) == 5
    assert os.listdir(tmp_path) == ["x.pt"]  # torch may write a patch of changed sources


def test_legacy_sources_are_neither_compared_nor_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save(nn.Conv2d(1, 1, 1), "x.pt", _use_new_zipfile_serialization=False)
    data = Path("x.pt").read_bytes()
    assert b"class Conv2d" in data
    Path("x.pt").write_bytes(data.replace(b"class Conv2d", b"class Conv3d"))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        root = read_checkpoint("x.pt").root
    assert root.class_name == "Conv2d"
    assert os.listdir(tmp_path) == ["x.pt"]


def test_the_moving_average_comes_first(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save({"ema": nn.Linear(1, 2), "model": nn.Linear(1, 3)}, path)
    assert state_dict_of(find_model(read_checkpoint(path)))["weight"].shape == (2, 1)
    torch.save({"ema": None, "model": nn.Linear(1, 3)}, path)
    assert state_dict_of(find_model(read_checkpoint(path)))["weight"].shape == (3, 1)
    torch.save(nn.DataParallel(nn.Linear(1, 4)), path)
    assert state_dict_of(find_model(read_checkpoint(path)))["weight"].shape == (4, 1)


def test_digest(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    torch.save(torch.zeros(1), path)
    expected = hashlib.sha256(path.read_bytes()).hexdigest()
    assert sha256_of(path) == read_checkpoint(path).sha256 == expected


def test_files_that_are_no_checkpoints(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    with pytest.raises(UserError, match="there is no checkpoint"):
        read_checkpoint(path)
    with pytest.raises(UserError, match="is a folder"):
        read_checkpoint(tmp_path)
    for data, message in (
        (b"", "is empty"),
        (b"hello, this is text\n", "not a PyTorch checkpoint"),
        (b"\x89PNG\r\n\x1a\n\x00\x00\x00\rIHDR", "not a PyTorch checkpoint"),
        (b"\xff\xd8\xff\xe0\x00\x10JFIF", "not a PyTorch checkpoint"),
        (pickle.dumps({"a": 1}), "not a PyTorch checkpoint"),
    ):
        path.write_bytes(data)
        with pytest.raises(UserError, match=message):
            read_checkpoint(path)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "text")
    with pytest.raises(UserError, match="not a PyTorch checkpoint"):
        read_checkpoint(path)


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("share", [0.3, 0.7, 0.999])
def test_truncated_files(tmp_path: Path, share: float, legacy: bool) -> None:
    path = tmp_path / "x.pt"
    torch.save({"model": nn.Linear(64, 64)}, path, _use_new_zipfile_serialization=not legacy)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(UserError, match="cut short"):
        read_checkpoint(path)


@pytest.mark.parametrize("trust", [False, True])
def test_torchscript_is_refused(tmp_path: Path, trust: bool) -> None:
    path = tmp_path / "x.pt"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.jit.save(torch.jit.trace(nn.Linear(1, 1), torch.zeros(1, 1)), str(path))
    with pytest.raises(UserError, match="TorchScript"):
        read_checkpoint(path, trust=trust)


def test_files_without_a_network(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    for root in (nn.Linear(1, 1).state_dict(), {"model": nn.Linear(1, 1).state_dict()}):
        torch.save(root, path)
        with pytest.raises(UserError, match="tensors only"):
            find_model(read_checkpoint(path))
    torch.save({"epoch": 3}, path)
    with pytest.raises(UserError, match="holds no network"):
        find_model(read_checkpoint(path))


def test_a_module_that_contains_itself(tmp_path: Path) -> None:
    module = nn.Sequential(nn.Sequential())
    module[0]._modules["loop"] = module
    torch.save(module, tmp_path / "x.pt")
    with pytest.raises(UserError, match="contains itself"):
        state_dict_of(find_model(read_checkpoint(tmp_path / "x.pt")))


def test_trust_names_missing_code(tmp_path: Path) -> None:
    path = tmp_path / "x.pt"
    zip_around(path, global_call("models.yolo", "Model", "x"))
    with pytest.raises(UserError, match="without --trust"):
        read_checkpoint(path, trust=True)


def test_a_real_checkpoint_gives_the_bytes_of_its_archive(yolov5n: Path) -> None:
    state = state_dict_of(find_model(read_checkpoint(yolov5n)))
    with zipfile.ZipFile(yolov5n) as archive:
        stored = {archive.read(name) for name in archive.namelist() if "/data/" in name}
    assert state["model.0.conv.weight"].shape == (16, 3, 6, 6)
    for tensor in state.values():
        raw = tensor.half() if tensor.is_floating_point() else tensor
        assert raw.numpy().tobytes() in stored
