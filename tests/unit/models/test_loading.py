"""Which detector a name or a file gives, and what is said where it gives none."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from dfq.errors import UserError
from dfq.models import Detector, from_spec, load_detector, save_detector
from dfq.models.checkpoint import sha256_of
from dfq.models.ultralytics import resolve as ultralytics_resolve


@pytest.fixture(scope="module")
def detector() -> Detector:
    return load_detector("yolo11n.yaml")


def _line(error: pytest.ExceptionInfo[UserError]) -> str:
    line = str(error.value)
    assert "\n" not in line
    return line


def test_shipped_yaml(detector: Detector) -> None:
    assert detector.family == "ultralytics"
    assert detector.source == "yolo11n.yaml"
    assert detector.num_classes == 80
    assert detector.image_size == 640
    assert len(detector.fingerprint) == 64


def test_yaml_of_ones_own(tmp_path: Path, detector: Detector) -> None:
    spec = detector.spec()
    path = tmp_path / "mine.yml"
    yaml = copy.deepcopy(spec["yaml"])
    yaml["head"][-1][3] = ["nc"]
    path.write_text(json.dumps({**yaml, "nc": 3}))  # JSON is YAML
    assert load_detector(path).names == ["0", "1", "2"]
    # One whose head says otherwise contradicts itself.
    yaml["head"][-1][3] = [80]
    path.write_text(json.dumps({**yaml, "nc": 3}))
    with pytest.raises(UserError, match="3 category names and 80 categories"):
        load_detector(path)


def test_the_checkpoint_decides_the_family(kit: Path, yolov5n: Path) -> None:
    assert load_detector(yolov5n).family == "yolov5"
    assert load_detector(kit / "weights/yolov9t-ball/yolov9t.pt").family == "ultralytics"


@pytest.mark.parametrize("family", ["yolov5", "ultralytics"])
def test_saved_detector_comes_back(tmp_path: Path, kit: Path, yolov5n: Path, family: str) -> None:
    path = yolov5n if family == "yolov5" else kit / "weights/yolov9t-ball/yolov9t.pt"
    detector = load_detector(path)
    save_detector(detector, tmp_path / "saved.safetensors")
    loaded = load_detector(tmp_path / "saved.safetensors")
    assert type(loaded) is type(detector)
    assert loaded.names == detector.names
    assert loaded.image_size == detector.image_size
    assert loaded.fingerprint == sha256_of(tmp_path / "saved.safetensors")
    images = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        pairs = zip(
            loaded.levels(loaded.raw(images)), detector.levels(detector.raw(images)), strict=True
        )
        assert all(torch.equal(one, other) for one, other in pairs)
    assert [entry.name for entry in tmp_path.iterdir()] == ["saved.safetensors"]


def test_half_precision_file(tmp_path: Path, detector: Detector) -> None:
    twin = detector.clone()
    norm = next(layer for layer in twin.module.modules() if isinstance(layer, nn.BatchNorm2d))
    norm.running_var.fill_(1e6)  # more than float16 can hold
    path = tmp_path / "half.safetensors"
    save_detector(twin, path, dtype=torch.float16)
    assert path.stat().st_size < 0.55 * 4 * sum(p.numel() for p in twin.module.parameters())
    state = load_detector(path).module.state_dict()
    for key, value in twin.module.state_dict().items():
        assert state[key].dtype == value.dtype
        torch.testing.assert_close(state[key], value, rtol=1e-3, atol=1e-6)


def test_batch_counters_may_be_missing(tmp_path: Path, detector: Detector) -> None:
    path = tmp_path / "full.safetensors"
    save_detector(detector, path)
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    fewer = {key: value for key, value in tensors.items() if "num_batches" not in key}
    assert len(fewer) < len(tensors)
    save_file(fewer, path, metadata=metadata)
    assert load_detector(path).names == detector.names
    fewer.popitem()
    save_file(fewer, path, metadata=metadata)
    with pytest.raises(UserError, match="does not fit"):
        load_detector(path)


def test_safetensors_of_others_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    save_file({"weight": torch.zeros(1)}, path)
    with pytest.raises(UserError, match="not written by dfq"):
        load_detector(path)
    path.write_bytes(b"nothing of the kind")
    with pytest.raises(UserError, match="cannot be read") as error:
        load_detector(path)
    _line(error)


def test_nothing_is_left_of_a_failed_save(tmp_path: Path, detector: Detector) -> None:
    with pytest.raises(UserError, match="cannot write"):
        save_detector(detector, tmp_path / "no" / "folder.safetensors")
    (tmp_path / "taken.safetensors").mkdir()
    with pytest.raises(UserError, match="cannot write"):
        save_detector(detector, tmp_path / "taken.safetensors")
    assert [entry.name for entry in tmp_path.iterdir()] == ["taken.safetensors"]


def test_save_takes_two_types(tmp_path: Path, detector: Detector) -> None:
    with pytest.raises(ValueError, match="float32 or float16"):
        save_detector(detector, tmp_path / "x.safetensors", dtype=torch.bfloat16)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("yolo99q", "there is no detector yolo99q.*checkpoint.*demo"),
        ("no/such/file.pt", "there is no detector no/such/file.pt"),
        ("no-such-model.yaml", "ships no model YAML of that name"),
        ("https://example.org/yolo.yaml", "web address"),
        ("coco8.yaml", "no Ultralytics model description"),
        ("yolo11n-cls.yaml", "classification"),
        ("yolo11n-seg", "instance segmentation"),
        ("yolo11n-cls.pt", "classification"),
        ("rtdetr-l", "RT-DETR"),
        ("rtdetr-l.yaml", "RT-DETR"),
        ("yolov8s-world.pt", "open-vocabulary"),
    ],
)
def test_names_that_give_no_detector(name: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_detector(name)
    _line(error)


@pytest.mark.parametrize(
    ("file", "content"),
    [("model.onnx", b"x"), ("labels.txt", b"x"), ("model.pt", b"x"), ("model.yaml", b"a: [1")],
)
def test_files_that_give_no_detector(tmp_path: Path, file: str, content: bytes) -> None:
    (tmp_path / file).write_bytes(content)
    with pytest.raises(UserError, match=file) as error:
        load_detector(tmp_path / file)
    _line(error)


def test_folder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is a folder"):
        load_detector(tmp_path)


def test_tensors_alone_are_no_detector(tmp_path: Path, detector: Detector) -> None:
    torch.save(detector.module.state_dict(), tmp_path / "state.pt")
    with pytest.raises(UserError, match="state dict"):
        load_detector(tmp_path / "state.pt")


def test_a_network_of_no_known_family(tmp_path: Path) -> None:
    torch.save({"model": nn.Sequential(nn.Conv2d(3, 8, 3))}, tmp_path / "other.pt")
    with pytest.raises(UserError, match=r"torch\.nn\.modules\.container\.Sequential"):
        load_detector(tmp_path / "other.pt")


def test_no_such_device() -> None:
    with pytest.raises(UserError, match="device cuda:99"):
        load_detector("yolo11n.yaml", device="cuda:99")


@pytest.mark.parametrize("name", ["yolo11s", "yolo11s.pt", "yolov5n", "yolov5nu.pt"])
def test_offline_says_so_at_once(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ultralytics_resolve, "SETTINGS", {"weights_dir": str(tmp_path)})
    monkeypatch.setenv("YOLO_OFFLINE", "1")

    def asked(*_: object, **__: object) -> None:
        raise AssertionError("the network was asked, which takes its time")

    for function in ("_probe", "safe_download", "attempt_download_asset"):
        monkeypatch.setattr(ultralytics_resolve, function, asked)
    with pytest.raises(UserError, match="could not be downloaded") as error:
        load_detector(name)
    assert str(tmp_path) in _line(error)
    assert f"{name.removesuffix('.pt')}.pt" in _line(error)


def test_no_network_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ultralytics_resolve, "SETTINGS", {"weights_dir": str(tmp_path)})
    monkeypatch.delenv("YOLO_OFFLINE", raising=False)

    def refuse(*_: object, **__: object) -> None:
        raise ultralytics_resolve.urllib.error.URLError("no route to host")

    monkeypatch.setattr(ultralytics_resolve.urllib.request, "urlopen", refuse)
    with pytest.raises(UserError, match="no route to host") as error:
        load_detector("yolo11s")
    _line(error)
    assert not list(tmp_path.iterdir())


def test_published_name_is_looked_for_in_the_weights_folder(
    kit: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ultralytics_resolve, "SETTINGS", {"weights_dir": str(tmp_path)})
    shutil.copy(kit / "weights" / "yolov9t-ball" / "yolov9t.pt", tmp_path)
    detector = load_detector("yolov9t")
    assert detector.names == ["ball"]
    assert detector.source == "yolov9t"


def test_published_names_are_downloaded_from_their_makers(
    kit: Path, yolov5n: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copies = {"yolov9t.pt": kit / "weights/yolov9t-ball/yolov9t.pt", "yolov5n.pt": yolov5n}
    asked = []

    def download(url: str, file: Path, **_: object) -> None:
        asked.append(url)
        shutil.copy(copies[url.rpartition("/")[2]], file)

    folder = tmp_path / "weights"
    monkeypatch.setattr(ultralytics_resolve, "SETTINGS", {"weights_dir": str(folder)})
    monkeypatch.delenv("YOLO_OFFLINE", raising=False)
    monkeypatch.setattr(ultralytics_resolve, "_probe", lambda address: None)
    monkeypatch.setattr(ultralytics_resolve, "safe_download", download)
    monkeypatch.setattr("ultralytics.utils.downloads.safe_download", download)
    assert load_detector("yolov9t.pt").family == "ultralytics"
    assert load_detector("yolov5n").family == "yolov5"
    assert load_detector("yolov5n").family == "yolov5"  # from the folder
    assert [url.split("/")[3:5] for url in asked] == [
        ["ultralytics", "assets"],
        ["ultralytics", "yolov5"],
    ]
    assert sorted(entry.name for entry in folder.iterdir()) == ["yolov5n.pt", "yolov9t.pt"]


def test_from_spec(detector: Detector) -> None:
    spec = json.loads(json.dumps(detector.spec()))
    assert from_spec(spec).spec() == spec
    with pytest.raises(UserError, match="family 'ssd'; known are yolov5, ultralytics"):
        from_spec({**spec, "family": "ssd"})
    with pytest.raises(UserError, match="damaged"):
        from_spec({"family": "ultralytics"})


def test_names_of_another_number_than_the_head_has_categories() -> None:
    spec = load_detector("demo").spec()
    yaml = copy.deepcopy(spec["yaml"])
    # The head's own count stays as it is; what is said beside it changes.
    assert yaml["head"][-1][3] == [10]
    spec |= {"names": ["a", "b"], "yaml": {**yaml, "nc": 2}}
    with pytest.raises(UserError, match="2 category names and 10 categories"):
        from_spec(spec)
