"""Small files that ask for endless work or memory: refused in a line, before either is taken.

None of these can be tried without the bounds: what is refused here took minutes or all memory.
"""

from __future__ import annotations

import collections
import io
import json
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from support import small_ultralytics
from support.small_ultralytics import yaml_with
from support.tiny_detector import DESCRIPTION, tiny_detector
from torch import nn

from dfq.errors import UserError
from dfq.models import from_spec, load_detector, save_detector
from dfq.models.bounded import bounded
from dfq.models.checkpoint import read_checkpoint
from dfq.models.yolov5.detector import YOLOv5
from dfq.runtime.limits import MOST_MACS, MOST_MODULES, MOST_VALUES


def refused(make: Callable[[], Any]) -> str:
    with pytest.raises(UserError) as caught:
        make()
    line = str(caught.value)
    assert "\n" not in line
    assert len(line) < 1500
    return line


def shared(value: Any = 1, depth: int = 80) -> list[Any]:
    """A list that holds the same list ten times, and so on: 10**80 values in a few bytes."""
    for _ in range(depth):
        value = [value] * 10
    return value


def rows(*more: list[Any]) -> dict[str, Any]:
    """`YAML` with layers before its head."""
    changed = yaml_with(scale="n")
    changed["head"][3:3] = list(more)
    changed["head"][-1][0] = [7 + len(more), 4]
    return changed


NETWORKS: dict[str, Callable[[], dict[str, Any]]] = {
    "depth-multiple": lambda: yaml_with(scales=None, depth_multiple=1e9),
    "depth-of-a-scale": lambda: yaml_with(scale="n", scales={"n": [1e9, 0.25, 64]}),
    "depth-infinite": lambda: yaml_with(scales=None, depth_multiple=float("inf")),
    "width-multiple": lambda: yaml_with(scales=None, width_multiple=1e9),
    "width-infinite": lambda: yaml_with(scale="n", scales={"n": [1, float("inf"), 64]}),
    "width-not-a-number": lambda: yaml_with(scale="n", scales={"n": [1, float("nan"), 64]}),
    "width-limit-infinite": lambda: yaml_with(scale="n", scales={"n": [1, 1, float("inf")]}),
    "width-negative": lambda: yaml_with(scales=None, width_multiple=-1.0),
    "repeats": lambda: rows([-1, 100_000_000, "Conv", [16, 3, 1]]),
    "repeats-of-nothing": lambda: rows([-1, 100_000_000, "nn.Identity", []]),
    "repeats-inside": lambda: rows([-1, 1, "SPPF", [16, 5, 100_000_000]]),
    "repeats-of-a-block": lambda: rows([-1, 1, "RepNCSPELAN4", [16, 16, 16, 60_000]]),
    "width": lambda: rows([-1, 1, "Conv", [10**12, 3, 1]]),
    "widths": lambda: yaml_with(
        scales=None, width_multiple=64.0, backbone=[[-1, 1, "Conv", [65536, 3, 2]]] * 5
    ),
    "kernel": lambda: rows([-1, 1, "Conv", [16, 60_001, 1]]),
    "expansion": lambda: rows([-1, 1, "C2f", [64, False, 1, 60_000.0]]),
    "classes": lambda: yaml_with(scale="n", nc=10**9),
    "bins": lambda: yaml_with(scale="n", reg_max=10**9),
    "upsampling": lambda: rows([-1, 1, "nn.Upsample", ["None", 60_000, "nearest"]]),
    "upsampling-again": lambda: rows(*[[-1, 1, "nn.Upsample", ["None", 8, "nearest"]]] * 9),
    "padding": lambda: rows([-1, 1, "nn.ZeroPad2d", [60_000]]),
    "attention": lambda: yaml_with(
        scale="n", backbone=[[-1, 1, "Conv", [256, 1, 1]], [-1, 9, "C2PSA", [1024]]]
    ),
    "layers": lambda: rows(*[[-1, 1, "nn.Identity", []]] * 100_000),
    "layers-of-modules": lambda: rows(*[[-1, 900, "C3k2", [16, True]]] * 60),
    "multiplications": lambda: yaml_with(
        scales=None, backbone=[[-1, 1, "Conv", [4096, 3, 1]]] * 5, width_multiple=1.0
    ),
    "aliases": lambda: rows([-1, 1, "CBFuse", shared()]),
    "nested": lambda: json.loads("[" * 300 + "]" * 300),
}


@pytest.mark.parametrize("bomb", NETWORKS)
def test_networks_of_ultralytics(bomb: str, tmp_path: Path) -> None:
    model = small_ultralytics.network()
    model.yaml = NETWORKS[bomb]()
    path = small_ultralytics.save(model, tmp_path / "bomb.pt")
    assert "bomb.pt" in refused(lambda: load_detector(path))
    if bomb != "aliases":
        (tmp_path / "bomb.yaml").write_text(yaml.safe_dump(NETWORKS[bomb]()))
        assert "bomb.yaml" in refused(lambda: load_detector(tmp_path / "bomb.yaml"))


@pytest.mark.parametrize(
    "text",
    [
        "[" * 3000 + "]" * 3000,
        "- " * 3000 + "1",
        "a: " + "9" * 5000,
        "&a [*a]",
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 60)),
        "x: {}\n" * 3,
        "[" + "1, " * 300_000 + "1]",
        "a: " + "x" * 5_000_000,
        "a: 2024-99-99",
        "a: !!int ''",
        "a: !!python/object/apply:os.system ['touch mark']",
    ],
    ids=[
        *("nested", "nested-blocks", "digits", "itself", "aliases", "twice", "long", "large"),
        *("date", "no-number", "object"),
    ],
)
def test_yaml_texts(text: str, tmp_path: Path) -> None:
    (tmp_path / "bomb.yaml").write_text(text)
    assert "bomb.yaml" in refused(lambda: load_detector(tmp_path / "bomb.yaml"))


YOLOV5: dict[str, dict[str, Any]] = {
    "depth-multiple": {"depth_multiple": 1e9, "backbone": [[-1, 3, "Conv", [8, 3, 2]]] * 4},
    "depth-infinite": {"depth_multiple": float("inf")},
    "width-multiple": {"width_multiple": 1e9},
    "width-infinite": {"width_multiple": float("inf")},
    "width-text": {"width_multiple": "1" * 5000},
    "repeats": {"backbone": [[-1, 10**8, "Conv", [8, 3, 2]]] * 4},
    "repeats-inside": {"backbone": [[-1, 10**8, "C3", [8]]] * 4},
    "width": {"backbone": [[-1, 1, "Conv", [10**12, 3, 2]]] * 4},
    "widths": {"backbone": [[-1, 1, "Conv", [65_000, 3, 2]]] * 4},
    "kernel": {"backbone": [[-1, 1, "Conv", [8, 60_001, 2]]] * 4},
    "kernels": {"backbone": [[-1, 1, "SPP", [8, [5] * 60_000]]] * 4},
    "classes": {"nc": 10**9},
    "layers": {"backbone": [[-1, 1, "Concat", [1]]] * 100_000},
    "shared": {"more": shared()},
    "kind": {"backbone": [[-1, 1, shared(), [8]]] * 4},
}


@pytest.mark.parametrize("bomb", YOLOV5)
def test_descriptions_of_yolov5(bomb: str) -> None:
    changed = {**DESCRIPTION, **YOLOV5[bomb]}
    refused(lambda: YOLOv5.from_yaml(changed))
    spec = {**tiny_detector().spec(), "description": changed}
    refused(lambda: from_spec(spec))


def test_descriptions_of_torchvision() -> None:
    from dfq.models.torchvision.base import from_name

    spec = from_name("fasterrcnn_mobilenet_v2", options={"width": 0.35}).spec()
    for change in (
        {"options": {"width": 1e9}},
        {"options": {"width": 6e4}},
        {"options": {"representation": 60_000_000}},
        {"options": {"representation": 60_000}},
        {"options": {"anchors": [32] * 60_000}},
        {"options": {"weights": "DEFAULT"}},
        {"options": {"box_head": "x"}},
        {"options": {"min_size": float("inf")}},
        {"names": ["a"] * 60_000},
        {"network": ["fasterrcnn_mobilenet_v2"]},
        {"network": "alexnet"},
        {"epsilon": float("nan")},
        {"image_size": 10**9},
    ):
        refused(lambda change=change: from_spec({**spec, **change}))


def test_descriptions_of_mmdet() -> None:
    from dfq.models.mmdet.config import plain, prepared, read_config, shipped_config

    path = shipped_config("retinanet_r18_fpn_1x_coco")
    assert path is not None
    base = prepared(plain(read_config(path)["model"]))
    for part, key, value in (
        ("bbox_head", "num_classes", 10**9),
        ("bbox_head", "feat_channels", 900_000),
        ("bbox_head", "stacked_convs", 10**8),
        ("bbox_head", "stacked_convs", 900_000),
        ("backbone", "base_channels", 900_000),
        ("neck", "num_outs", 900_000),
    ):
        config = {**base, part: {**base[part], key: value}}
        spec = {
            "family": "mmdet",
            "config": config,
            "names": ["a"] * 80,
            "image_size": 64,
            "fingerprint": "0",
            "source": "bomb",
        }
        refused(lambda spec=spec: from_spec(spec))


# ---- pickles


def zip_of(path: Path, pickled: bytes, **records: bytes) -> Path:
    """A torch checkpoint whose pickle is `pickled`, with storages."""
    plain = io.BytesIO()
    torch.save({"model": torch.zeros(3)}, plain)
    with zipfile.ZipFile(plain) as old, zipfile.ZipFile(path, "w") as new:
        folder = old.namelist()[0].partition("/")[0]
        for item in old.namelist():
            new.writestr(item, pickled if item.endswith("data.pkl") else old.read(item))
        for name, content in records.items():
            new.writestr(f"{folder}/data/{name}", content)
    return path


class Reduced:
    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


def nested_tuples(depth: int = 80) -> Any:
    value: Any = ()
    for _ in range(depth):
        value = (value, value)
    return value


def tower_as_key() -> bytes:
    # Hashing it looks through 2**80 tuples; pickled by hand, as making such a dict never ends.
    tower = pickle.dumps(nested_tuples(), 2)[:-1]
    return b"\x80\x02}" + tower[2:] + b"K\x01s."


def tower_in_a_set() -> bytes:
    return b"\x80\x04\x8f(" + pickle.dumps(nested_tuples(), 2)[2:-1] + b"\x90."


def tower_in_frozenset() -> bytes:
    return b"\x80\x04(" + pickle.dumps(nested_tuples(), 2)[2:-1] + b"\x91."


def text_of_shared() -> bytes:
    return pickle.dumps(Reduced(str, shared()), 2)


PICKLES: dict[str, Callable[[], bytes]] = {
    "list-of-a-range": lambda: pickle.dumps(Reduced(list, range(10**15)), 2),
    "set-of-a-range": lambda: pickle.dumps(Reduced(set, range(10**15)), 2),
    "size-of-a-range": lambda: pickle.dumps(Reduced(torch.Size, range(10**15)), 2),
    "queue-of-a-range": lambda: pickle.dumps(Reduced(collections.deque, range(10**15)), 2),
    "range": lambda: pickle.dumps(range(10**15), 2),
    "bytes": lambda: pickle.dumps(Reduced(bytes, 10**15), 2),
    "bytearray": lambda: pickle.dumps(Reduced(bytearray, 10**15), 2),
    "text": text_of_shared,
    "key": tower_as_key,
    "member": tower_in_a_set,
    "frozen-member": tower_in_frozenset,
    "memo": lambda: b"\x80\x02]r\xff\xff\xff\xff.",
    "digits": lambda: b"\x80\x02L" + b"9" * 5000 + b"L\n.",
}


@pytest.mark.parametrize("bomb", PICKLES)
@pytest.mark.parametrize("legacy", [False, True])
def test_pickles(bomb: str, legacy: bool, tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    if legacy:
        from torch.serialization import MAGIC_NUMBER, PROTOCOL_VERSION

        start = [pickle.dumps(value, 2) for value in (MAGIC_NUMBER, PROTOCOL_VERSION, {})]
        path.write_bytes(b"".join(start) + PICKLES[bomb]() + pickle.dumps([], 2))
    else:
        zip_of(path, PICKLES[bomb]())
    assert "bomb.pt" in refused(lambda: load_detector(path))


class StorageOf:
    """Pickles to a storage of so many numbers under a name."""

    def __init__(self, name: Any, count: int) -> None:
        self.identity = ("storage", torch.FloatStorage, name, "cpu", count)


class Pickler(pickle.Pickler):
    def persistent_id(self, value: Any) -> Any:
        return value.identity if isinstance(value, StorageOf) else None


def with_storage(value: Any) -> bytes:
    file = io.BytesIO()
    Pickler(file, 2).dump(value)
    return file.getvalue()


@pytest.mark.parametrize("count", [3, 10**6, 10**15, -3])
def test_storages_that_are_larger_than_what_is_stored(count: int, tmp_path: Path) -> None:
    tensor = Reduced(
        torch._utils._rebuild_tensor_v2, StorageOf("7", count), 0, (3,), (1,), False, {}
    )
    path = zip_of(tmp_path / "bomb.pt", with_storage([tensor]), **{"7": bytes(12)})
    if count == 3:
        assert torch.equal(read_checkpoint(path).root[0], torch.zeros(3))
    else:
        refused(lambda: read_checkpoint(path))


@pytest.mark.parametrize(
    ("offset", "size", "stride"),
    [
        (0, (4,), (1,)),
        (1, (3,), (1,)),
        (0, (10**9, 10**9), (0, 0)),
        (0, (10**12, 0), (1, 1)),
        (0, (2, 2), (1, 2)),
        (-1, (3,), (1,)),
        (0, (-3,), (1,)),
        (0, (3,), (-1,)),
        (0, ("3",), (1,)),
        (0, (2**70,), (1,)),
    ],
)
def test_tensors_that_are_larger_than_their_storage(
    offset: int, size: Any, stride: Any, tmp_path: Path
) -> None:
    function = torch._utils._rebuild_tensor_v2
    tensor = Reduced(function, StorageOf("7", 3), offset, size, stride, False, {})
    path = zip_of(tmp_path / "bomb.pt", with_storage([tensor]), **{"7": bytes(12)})
    refused(lambda: read_checkpoint(path))


def test_a_tensor_is_not_given_another_state(tmp_path: Path) -> None:
    # Tensors of old took storage, offset, size and stride for a state.
    tensor = pickle.dumps(Reduced(torch.Size, (1,)), 2)[2:-1]
    refused(lambda: load_detector(zip_of(tmp_path / "b.pt", b"\x80\x02" + tensor + b"}b.")))


def test_archives_that_unpack_to_more(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    torch.save({"model": torch.zeros(3)}, path)
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for index in range(3):
            archive.writestr(f"bomb/data/{index + 7}", bytes(200_000_000))
    assert path.stat().st_size < 1_000_000
    assert "unpacks" in refused(lambda: load_detector(path))


def test_modules_that_are_shared(tmp_path: Path) -> None:
    model = small_ultralytics.network()
    block = nn.Sequential()
    for _ in range(40):
        outer = nn.Sequential()
        for name in ("a", "b", "c"):
            outer._modules[name] = block
        block = outer
    model.model[0].conv = block
    path = small_ultralytics.save(model, tmp_path / "bomb.pt")
    assert "modules" in refused(lambda: load_detector(path))


def test_modules_that_are_nested(tmp_path: Path) -> None:
    model = small_ultralytics.network()
    block: nn.Module = nn.Identity()
    for _ in range(90):
        block = nn.Sequential(block)
    model.model[0].conv = block
    path = small_ultralytics.save(model, tmp_path / "bomb.pt")
    assert "in each other" in refused(lambda: load_detector(path))


def test_mappings_that_are_shared(tmp_path: Path) -> None:
    value: Any = 1
    for _ in range(6):
        value = dict.fromkeys(range(3000), value)
    torch.save({"model": value, "ema": value}, tmp_path / "bomb.pt")
    assert "holds no network" in refused(lambda: load_detector(tmp_path / "bomb.pt"))


def test_tensors_that_are_shared(tmp_path: Path) -> None:
    path = tmp_path / "bomb.pt"
    model = small_ultralytics.network()
    small = torch.zeros(1)
    model.model[0]._buffers.update({f"b{i}": small for i in range(60_000)})
    assert "bomb.pt" in refused(lambda: load_detector(small_ultralytics.save(model, path)))
    model = small_ultralytics.network()
    large = torch.zeros(1 << 20, dtype=torch.float16)
    model.model[0]._buffers.update({f"b{i}": large for i in range(5000)})
    line = refused(lambda: load_detector(small_ultralytics.save(model, path)))
    assert "shared ones included" in line
    model = small_ultralytics.network()
    part = nn.Sequential()
    part._buffers.update({f"b{i}": small for i in range(4000)})
    for index in range(4000):
        model.model[0]._modules[f"m{index}"] = part
    assert "tensors" in refused(lambda: load_detector(small_ultralytics.save(model, path)))


@pytest.mark.parametrize(
    ("where", "value"),
    [
        *((where, shared()) for where in ("names", "args", "stride", "yaml", "nc", "task")),
        ("names", {0: shared(), 1: "b"}),
        ("names", {"x": "a", "1": "b"}),
        ("args", {"imgsz": shared()}),
        ("args", {"imgsz": 10**400}),
    ],
)
def test_values_that_are_shared(where: str, value: Any, tmp_path: Path) -> None:
    model = small_ultralytics.network()
    setattr(model, where, value)
    path = small_ultralytics.save(model, tmp_path / "bomb.pt")
    if where in ("stride", "nc", "task") or (where == "args" and isinstance(value, list)):
        # Of no use to anyone.
        load_detector(path)
    else:
        assert "bomb.pt" in refused(lambda: load_detector(path))


def test_a_network_larger_than_its_file(tmp_path: Path) -> None:
    """Within the bounds of a network, and out of all proportion to what is there of it."""
    model = small_ultralytics.network()
    wide = {"scales": {"n": [1.0, 8.0, 65536]}, "scale": "n"}
    model.yaml = yaml_with(**wide)
    path = small_ultralytics.save(model, tmp_path / "bomb.pt")
    assert "asks for" in refused(lambda: load_detector(path))
    detector = load_detector(small_ultralytics.save(small_ultralytics.network(), tmp_path / "m.pt"))
    save_detector(detector, tmp_path / "bomb.safetensors")
    spec = {**detector.spec(), "yaml": yaml_with(**wide)}
    tensors = load_file(tmp_path / "bomb.safetensors")
    save_file(tensors, tmp_path / "bomb.safetensors", {"dfq": json.dumps(spec)})
    assert "asks for" in refused(lambda: load_detector(tmp_path / "bomb.safetensors"))


# ---- descriptions


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"a": ' * 3000 + "1" + "}" * 3000,
        "9" * 5000,
        '{"family": "yolov5", "x": NaN}',
        '{"family": "yolov5", "names": "\\ud800"}',
        '"text"',
        "",
    ],
    ids=["open", "nested", "digits", "nan", "surrogate", "text", "empty"],
)
def test_descriptions_that_are_none(text: str, tmp_path: Path) -> None:
    path = tmp_path / "bomb.safetensors"
    save_detector(tiny_detector(), path)
    save_file(load_file(path), path, {"dfq": text})
    assert "bomb.safetensors" in refused(lambda: load_detector(path))


# ---- the bounds themselves


def test_modules_are_counted() -> None:
    with bounded("x"):
        nn.Sequential(*(nn.Sequential(nn.Identity()) for _ in range(100)))

    def make() -> None:
        for _ in range(MOST_MODULES + 1):
            nn.Sequential(nn.Identity())

    with pytest.raises(UserError, match=f"more than {MOST_MODULES} modules"), bounded("x"):
        make()
    # The count ends with the context.
    nn.Sequential(*(nn.Identity() for _ in range(3)))


def test_tensors_are_counted_before_they_are_made() -> None:
    for make in (
        lambda: nn.Linear(MOST_VALUES, MOST_VALUES),
        lambda: torch.arange(10**15),
        lambda: torch.zeros(2**20, 2**20),
        lambda: [nn.Linear(2**14, 2**14, device="meta") for _ in range(10)],
    ):
        with pytest.raises(UserError, match="numbers in a tensor"), bounded("x"):
            make()


def test_multiplications_are_counted_before_they_are_done() -> None:
    wide = nn.Conv2d(4096, 4096, 3, padding=1, bias=False, device="meta")

    def run() -> None:
        for _ in range(100):
            wide(torch.empty(1, 4096, 128, 128, device="meta"))

    with pytest.raises(UserError, match=f"more than {MOST_MACS} multiplications"), bounded("x"):
        run()
