"""Checkpoints that hold something else than expected, anywhere: read, or refused in one line."""

from __future__ import annotations

import json
import pickle
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support import small_ultralytics, yolov5_files
from support.tiny_detector import tiny_detector
from torch import nn

from dfq.errors import UserError
from dfq.models import from_spec, load_detector, save_detector

# Whole networks of many kinds.
pytestmark = pytest.mark.e2e

ODD: list[Any] = [
    *(None, True, False, 0, -1, 10**400, 1.5, float("nan"), float("inf"), "text", "", "9" * 5000),
    *("two\nlines", "\ud800", b"bytes", (), [], {}, [[]], [None], ["a", 3], {"a": 1}, {1: {}}),
    *({(1, 2): 3}, {None: 1}, {1, 2}, slice(1), range(3), complex(1, 2), object, int),
    *(torch.tensor([]), torch.tensor(1.0), torch.tensor([float("nan")] * 3), torch.zeros(2, 2)),
    *(nn.Conv2d(1, 1, 1), nn.SiLU(), nn.Sequential(), torch.Size([1]), torch.float16),
]


def some(place: str, count: int = 9) -> list[Any]:
    """Some of `ODD`, others at each place."""
    return random.Random(place).sample(ODD, count)


def tried(path: Path) -> bool:
    """Whether a file is read; refused, it is in one line that names it."""
    try:
        detector = load_detector(path)
    except UserError as error:
        line = str(error)
        assert "\n" not in line
        assert path.name in line
        # The path itself may be long.
        assert len(line.replace(str(path), "")) < 1000
        return False
    with torch.no_grad():
        side = detector.stride * 2
        detector.detect(torch.rand(1, 3, side, side))
    json.dumps(detector.spec())
    assert all(isinstance(name, str) for name in detector.names)
    assert detector.image_size >= detector.stride
    return True


def set_at(*path: Any) -> Callable[[Any, Any], None]:
    """Puts a value somewhere in a module's `__dict__`, past what PyTorch checks."""

    def put(model: Any, value: Any) -> None:
        part = model
        for key in path[:-1]:
            part = vars(part)[key] if isinstance(part, nn.Module) else part[key]
        if isinstance(part, nn.Module):
            vars(part)[path[-1]] = value
        else:
            part[path[-1]] = value

    return put


FIRST = ("_modules", "model", "_modules", "0")
HEAD = ("_modules", "model", "_modules")
BOTH: dict[str, tuple[Any, ...]] = {
    "modules": ("_modules",),
    "a-module": (*FIRST, "_modules", "conv"),
    "modules-of-a-part": (*FIRST, "_modules"),
    "parameters": (*FIRST, "_modules", "conv", "_parameters"),
    "a-parameter": (*FIRST, "_modules", "conv", "_parameters", "weight"),
    "buffers": (*FIRST, "_modules", "bn", "_buffers"),
    "a-buffer": (*FIRST, "_modules", "bn", "_buffers", "running_var"),
    "passing-buffers": (*FIRST, "_modules", "bn", "_non_persistent_buffers_set"),
    "eps": (*FIRST, "_modules", "bn", "eps"),
    "momentum": (*FIRST, "_modules", "bn", "momentum"),
    "act": (*FIRST, "_modules", "act"),
    "stride-of-a-layer": (*FIRST, "_modules", "conv", "stride"),
    "padding-of-a-layer": (*FIRST, "_modules", "conv", "padding"),
    "names": ("names",),
    "yaml": ("yaml",),
    "stride": ("stride",),
    "args": ("args",),
    "wiring": (*FIRST, "f"),
    "classes": ("yaml", "nc"),
    "backbone": ("yaml", "backbone"),
    "head": ("yaml", "head"),
    "row": ("yaml", "backbone", 0),
    "origin": ("yaml", "backbone", 0, 0),
    "repeats": ("yaml", "backbone", 0, 1),
    "layer": ("yaml", "backbone", 0, 2),
    "arguments": ("yaml", "backbone", 0, 3),
    "argument": ("yaml", "backbone", 0, 3, 1),
    "activation": ("yaml", "activation"),
}


@pytest.mark.parametrize("place", [*BOTH, "scales", "scale", "scale-of-n", "bins", "end2end"])
def test_ultralytics(place: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    more: dict[str, tuple[Any, ...]] = {
        "scales": ("yaml", "scales"),
        "scale": ("yaml", "scale"),
        "scale-of-n": ("yaml", "scales", "n"),
        "bins": ("yaml", "reg_max"),
        "end2end": ("yaml", "end2end"),
    }
    put = set_at(*{**BOTH, **more}[place])
    for value in some(f"ultralytics {place}"):
        model = small_ultralytics.network()
        put(model, value)
        tried(small_ultralytics.save(model, path))


@pytest.mark.parametrize(
    "place", [*BOTH, "anchors", "stride-of-the-head", "classes-of-the-head", "depth", "anchor-list"]
)
def test_yolov5(place: str, tmp_path: Path) -> None:
    more: dict[str, tuple[Any, ...]] = {
        "anchors": (*HEAD, "9", "_buffers", "anchors"),
        "stride-of-the-head": (*HEAD, "9", "stride"),
        "classes-of-the-head": (*HEAD, "9", "nc"),
        "depth": ("yaml", "depth_multiple"),
        "anchor-list": ("yaml", "anchors"),
    }
    put = set_at(*{**BOTH, **more}[place])
    for value in some(f"yolov5 {place}"):
        tried(yolov5_files.write(tmp_path / "odd.pt", lambda model, _, v=value: put(model, v)))


@pytest.mark.parametrize("key", ["model", "ema", "train_args", "opt", "version", "names"])
@pytest.mark.parametrize("family", ["ultralytics", "yolov5"])
def test_what_lies_beside_the_model(key: str, family: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    for value in some(f"{family} {key}"):
        with yolov5_files.classes() as made:
            if family == "yolov5":
                model: Any = yolov5_files.tiny(made)
            else:
                model = small_ultralytics.network()
                model.args = None
            torch.save({"ema": None, "model": model, key: value}, path)
        tried(path)


@pytest.mark.parametrize(
    "size", [0, -1, -640, True, 10**9, 1e300, float("nan"), "640", [], [0], {}]
)
def test_image_sizes_that_are_none(size: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    model = small_ultralytics.network()
    model.args = {"imgsz": size}
    assert not tried(small_ultralytics.save(model, path))
    assert not tried(yolov5_files.write(path, opt={"imgsz": size}))
    detector = tiny_detector()
    with pytest.raises(UserError, match=r"image size|image_size"):
        from_spec({**detector.spec(), "image_size": size})


@pytest.mark.parametrize("size", [64, 64.0, [64], (48, 64), None])
def test_image_sizes_that_are_some(size: Any, tmp_path: Path) -> None:
    path = tmp_path / "odd.pt"
    model = small_ultralytics.network()
    model.args = {"imgsz": size}
    assert tried(small_ultralytics.save(model, path))
    assert load_detector(path).image_size == (64 if size else 640)


@pytest.mark.parametrize("family", ["yolov5", "ultralytics", "torchvision"])
def test_descriptions(family: str, tmp_path: Path) -> None:
    path = tmp_path / "odd.safetensors"
    if family == "yolov5":
        detector: Any = tiny_detector()
    elif family == "ultralytics":
        model = small_ultralytics.network(nn.LeakyReLU(0.2))
        detector = load_detector(small_ultralytics.save(model, tmp_path / "u.pt"))
    else:
        from dfq.models.torchvision.base import from_name

        options = {"width": 0.35, "representation": 32, "min_size": 64, "max_size": 64}
        detector = from_name("fasterrcnn_mobilenet_v2", options=options)
    save_detector(detector, path)
    tensors, spec = load_file(path), detector.spec()
    assert tried(path)
    for key in spec:
        for value in [*some(f"{family} {key}", 5), "missing"]:
            changed = {**spec, key: value}
            if value == "missing":
                del changed[key]
            try:
                text = json.dumps(changed)
            except (TypeError, ValueError):
                continue
            save_file(tensors, path, {"dfq": text})
            tried(path)


@pytest.mark.parametrize("name", ["two\nlines", "x" * 5000, "\ud800", "", "a.b"])
def test_names_of_classes_modules_and_tensors(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ultralytics.nn.modules import conv

    path = tmp_path / "odd.pt"
    for change in ("class", "module", "buffer"):
        model = small_ultralytics.network()
        if change == "class":
            kind = type("Own", (nn.SiLU,), {"__module__": conv.__name__, "__qualname__": name})
            part = conv
            for key in name.split(".")[:-1]:
                monkeypatch.setattr(conv, key, type(key, (), {}), raising=False)
                part = getattr(conv, key)
            monkeypatch.setattr(part, name.split(".")[-1], kind, raising=False)
            model.model[0].act = kind()
        elif change == "module":
            model.model[0]._modules[name] = nn.Conv2d(3, 3, 1)
        else:
            model.model[0]._buffers[name] = torch.zeros(1)
        try:
            torch.save({"model": model}, path, pickle_protocol=4)
        except (pickle.PicklingError, UnicodeEncodeError):
            # There is no such pickle.
            continue
        assert not tried(path)


def test_flipped_bytes_of_an_archive(tmp_path: Path) -> None:
    chance = random.Random(0)
    path = small_ultralytics.save(small_ultralytics.network(), tmp_path / "odd.pt")
    data = path.read_bytes()
    assert tried(path)
    for _ in range(40):
        damaged = bytearray(data)
        for _ in range(64):
            damaged[chance.randrange(len(damaged))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        assert not tried(path)
    # One bit of a weight: nothing but the checksum shows it.
    for place in (data.index(b"PK\x01\x02") // 2, data.index(b"PK\x01\x02") // 3):
        damaged = bytearray(data)
        damaged[place] ^= 4
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"checksum|damaged"):
            load_detector(path, trust=True)


def test_archives_without_checksums_are_read(tmp_path: Path) -> None:
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        path = small_ultralytics.save(small_ultralytics.network(), tmp_path / "odd.pt")
    finally:
        torch.serialization.set_crc32_options(before)
    assert tried(path)


def test_a_record_that_is_listed_twice(tmp_path: Path) -> None:
    import warnings
    import zipfile

    path = small_ultralytics.save(small_ultralytics.network(), tmp_path / "odd.pt")
    with warnings.catch_warnings(), zipfile.ZipFile(path, "a") as archive:
        warnings.simplefilter("ignore")
        archive.writestr("odd/data/0", bytes(64))
    assert not tried(path)


@pytest.mark.parametrize("seed", range(6))
def test_mutations_by_chance(seed: int, tmp_path: Path) -> None:
    """Values of one kind in the place of others, several at a time."""
    chance = random.Random(seed)
    places = [set_at(*path) for path in BOTH.values()]
    for _ in range(12):
        model = small_ultralytics.network()
        for put in chance.sample(places, 3):
            try:
                put(model, chance.choice(ODD))
            except (KeyError, TypeError, IndexError, AttributeError):
                # Something above it is already another thing.
                continue
        tried(small_ultralytics.save(model, tmp_path / "odd.pt"))


def pruned(model: nn.Module) -> None:
    """Cuts the last channel between the first two layers."""
    first, second = model.get_submodule("model.0"), model.get_submodule("model.1.conv")
    conv, norm = first.get_submodule("conv"), first.get_submodule("bn")
    for layer, name in ((conv, "weight"), (norm, "weight"), (norm, "bias")):
        setattr(layer, name, nn.Parameter(getattr(layer, name).detach()[:-1].clone()))
    for name in ("running_mean", "running_var"):
        setattr(norm, name, getattr(norm, name)[:-1].clone())
    second.weight = nn.Parameter(second.weight.detach()[:, :-1].clone())


@pytest.mark.parametrize("family", ["ultralytics", "yolov5"])
def test_a_pruned_network_is_called_that(family: str, tmp_path: Path) -> None:
    path = tmp_path / "pruned.pt"
    if family == "yolov5":
        yolov5_files.write(path, lambda model, _: pruned(model))
    else:
        model = small_ultralytics.network()
        pruned(model)
        small_ultralytics.save(model, path)
    with pytest.raises(UserError, match=r"own description: 6 are smaller .* as of a pruned"):
        load_detector(path)
