"""What a model file says is data: nothing in it runs, is fetched, or opens another file.

Every attack here leaves a mark, or asks for a file or an address, where it succeeds.
"""

from __future__ import annotations

import copy
import hashlib
import json
import socket
import subprocess
import sys
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file
from support import small_ultralytics
from support.small_ultralytics import YAML, yaml_with

from dfq.cli.main import cli
from dfq.errors import UserError
from dfq.models import from_spec, load_detector, save_detector
from dfq.models.mmdet.config import plain, prepared, read_config
from dfq.models.mmdet.spec import check_spec
from dfq.quantization.policy import Policy
from dfq.runs.folder import FORMAT, KIND, load_run

MARK = "mark"
TOUCH = f"__import__('pathlib').Path({MARK!r}).touch() or torch.nn.SiLU()"
CALL = f"__import__('pathlib').Path('{MARK}').touch()"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in, without a network, whose every use leaves a mark."""
    monkeypatch.chdir(tmp_path)

    def reached(*_: Any, **__: Any) -> Any:
        (tmp_path / MARK).touch()
        raise OSError("the network was asked")

    monkeypatch.setattr(socket, "create_connection", reached)
    monkeypatch.setattr(socket.socket, "connect", reached)
    monkeypatch.setattr(urllib.request, "urlopen", reached)
    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", reached)
    monkeypatch.setattr(torch.hub, "download_url_to_file", reached)
    # What another model's YAML would be: read, it leaves a mark.
    evil = {**YAML, "scale": "n", "activation": TOUCH}
    (tmp_path / "other.yaml").write_text(yaml.safe_dump(evil))
    (tmp_path / "yolo11-other.yaml").write_text(yaml.safe_dump(evil))
    return tmp_path


def row(name: str, *arguments: Any) -> dict[str, Any]:
    """`YAML` with one layer more, before the head."""
    changed = yaml_with(scale="n")
    changed["head"].insert(3, [-1, 1, name, list(arguments)])
    changed["head"][-1][0] = [8, 4]
    return changed


def argument(name: str, value: Any) -> dict[str, Any]:
    return row(name, 16, value)


YAMLS: dict[str, Callable[[], dict[str, Any]]] = {
    "activation": lambda: yaml_with(scale="n", activation=TOUCH),
    "activation-hidden": lambda: yaml_with(scale="n", activation=f"torch.nn.SiLU({CALL})"),
    "activation-attribute": lambda: yaml_with(scale="n", activation="torch.nn.SiLU.__init__()"),
    "activation-two-lines": lambda: yaml_with(scale="n", activation=f"torch.nn.SiLU()\n{CALL}"),
    "activation-list": lambda: yaml_with(scale="n", activation=[TOUCH]),
    **{
        f"row-{name}-file": lambda name=name: row(name, "other.yaml")
        for name in (
            *("DetectionModel", "ClassificationModel", "SegmentationModel", "PoseModel"),
            *("OBBModel", "WorldModel", "RTDETRDetectionModel", "YOLOEModel", "BaseModel"),
        )
    },
    "row-nested-yaml": lambda: row("DetectionModel", {**YAML, "scale": "n", "activation": TOUCH}),
    "row-torchvision": lambda: row("TorchVision", 16, "resnet18", "DEFAULT"),
    "row-index": lambda: row("Index", 16, "other.yaml"),
    "row-attention": lambda: row("ImagePoolingAttn", 16),
    "row-sequential": lambda: row("nn.Sequential", "other.yaml"),
    "row-lazy": lambda: row("nn.LazyLinear", 16),
    "row-dotted": lambda: row("nn.modules.activation.SiLU"),
    "row-builtin": lambda: row("__builtins__", "x"),
    "row-torch": lambda: row("torch", "x"),
    "row-ops": lambda: row("torchvision.ops.DeformConv2d", 16, 16, 3),
    "row-a-function": lambda: row("torch_safe_load", "other.yaml"),
    "row-a-dict": lambda: row({"type": "Conv"}),  # type: ignore[arg-type]
    "argument-local": lambda: argument("Conv", "d"),
    "argument-text": lambda: argument("Conv", CALL),
    "argument-activation": lambda: row("Conv", 16, 1, 1, None, 1, 1, TOUCH),
    "argument-dict": lambda: argument("Conv", {"a": CALL}),
    "argument-list": lambda: argument("Conv", [CALL]),
    "mode": lambda: row("nn.Upsample", None, 2, CALL),
    "second-head": lambda: row("Detect", "nc"),
    "scale-text": lambda: yaml_with(scale="n", scales={"n": [CALL, 0.25, 64]}),
    "classes-text": lambda: yaml_with(scale="n", nc=CALL),
}


def yaml_file(content: dict[str, Any]) -> Path:
    Path("evil.yaml").write_text(json.dumps(content))
    return Path("evil.yaml")


def pt_file(content: dict[str, Any]) -> Path:
    model = small_ultralytics.network()
    model.yaml = content
    return small_ultralytics.save(model, Path("evil.pt"))


def saved_file(content: dict[str, Any]) -> Path:
    good = load_detector(small_ultralytics.save(small_ultralytics.network(), Path("good.pt")))
    save_detector(good, "evil.safetensors")
    spec = {**good.spec(), "yaml": content}
    save_file(load_file("evil.safetensors"), "evil.safetensors", {"dfq": json.dumps(spec)})
    return Path("evil.safetensors")


@pytest.mark.parametrize("write", [yaml_file, pt_file, saved_file])
@pytest.mark.parametrize("attack", YAMLS)
def test_a_yaml_runs_nothing(place: Path, attack: str, write: Callable[..., Path]) -> None:
    file = write(YAMLS[attack]())
    with pytest.raises(UserError) as refused:
        load_detector(file)
    assert not (place / MARK).exists()
    assert "\n" not in str(refused.value)
    assert "evil" in str(refused.value)


def test_a_yaml_that_is_read_by_ultralytics_does_run(place: Path) -> None:
    """The mark is left where the activation is evaluated: the test above can fail."""
    from ultralytics.nn.tasks import DetectionModel

    content = copy.deepcopy(YAMLS["activation"]())
    DetectionModel(content, verbose=False)
    assert (place / MARK).exists()


def test_an_activation_of_the_description_is_one_of_the_list(place: Path) -> None:
    good = load_detector(small_ultralytics.save(small_ultralytics.network(), place / "good.pt"))
    for changes in ({TOUCH: ["model.0.act"]}, {"SiLU()": ["model.0.conv"]}, {"SiLU()": [{}]}, [1]):
        with pytest.raises(UserError):
            from_spec({**good.spec(), "activations": changes})
    assert not (place / MARK).exists()


# ---- mmdet


def popen() -> dict[str, Any]:
    return {"type": "subprocess.Popen", "args": [sys.executable, "-c", f"open('{MARK}', 'w')"]}


def faster() -> dict[str, Any]:
    """A detector of registered parts, in a description's form."""
    config = read_config(_shipped("faster-rcnn_r50_fpn_1x_coco"))
    return prepared(plain(config["model"]))


def _shipped(name: str) -> Path:
    from dfq.models.mmdet.config import shipped_config

    path = shipped_config(name)
    assert path is not None
    return path


def at(*path: str, value: Any) -> Callable[[], dict[str, Any]]:
    """`faster` with a value set somewhere in it."""

    def make() -> dict[str, Any]:
        model = faster()
        part = model
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] = value
        return model

    return make


FILE = {"type": "Pretrained", "checkpoint": "weights.pth"}
SPECS: dict[str, Callable[[], Any]] = {
    "call": popen,
    "call-of-a-part": at("backbone", value=popen()),
    "call-of-a-norm": at("backbone", "norm_cfg", value=popen()),
    "call-of-a-loss": at("roi_head", "bbox_head", "loss_cls", value=popen()),
    "call-of-an-assigner": at("train_cfg", "rcnn", "assigner", value=popen()),
    "call-of-an-init": at("backbone", "init_cfg", value=popen()),
    "call-in-a-list": at("backbone", "plugins", value=[{"cfg": popen(), "stages": [True] * 4}]),
    "scope": at("backbone", "_scope_", value="subprocess"),
    "dotted-registered": at("backbone", "type", value="mmdet.models.backbones.resnet.ResNet"),
    "type-list": at("backbone", "type", value=["ResNet"]),
    "type-missing-name": at("backbone", "type", value="NoSuchBackbone"),
    "type-evaluated": at("test_cfg", "rcnn", "nms", "type", value=CALL),
    "init-file": at("backbone", "init_cfg", value=FILE),
    "init-file-in-a-list": at("backbone", "init_cfg", value=[FILE]),
    "init-file-of-a-head": at("roi_head", "bbox_head", "init_cfg", value=FILE),
    "init-file-untyped": at("backbone", "init_cfg", value={"checkpoint": "http://x/y.pth"}),
    "pretrained": at("backbone", "pretrained", value="torchvision://resnet50"),
    "teacher": lambda: {
        **faster(),
        "type": "KnowledgeDistillationSingleStageDetector",
        "teacher_config": "other.py",
    },
    "text-model": at("backbone", value={"type": "BertModel", "name": "bert-base-uncased"}),
    "evaluated-text": at(
        "train_cfg", "rcnn", "assigner", value={"type": "CameraMotionCompensation", "x": "y"}
    ),
    "expression": at("backbone", "style", value=CALL),
    "path": at("backbone", "style", value="../x"),
    "distiller": lambda: {"type": "DFQDistiller", "config": "other.py"},
    "no-mapping": lambda: [popen()],
    "nothing": lambda: None,
}


@pytest.mark.parametrize("attack", SPECS)
def test_an_mmdet_description_runs_nothing(
    place: Path, attack: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (place / "other.py").write_text(f"open({MARK!r}, 'w')\n")
    spec = {
        "family": "mmdet",
        "config": SPECS[attack](),
        "names": ["a"] * 80,
        "image_size": 64,
        "stride": 32,
        "fingerprint": "0",
        "source": "evil",
    }
    save_file({"x": torch.zeros(1)}, "evil.safetensors", {"dfq": json.dumps(spec)})
    started = []
    monkeypatch.setattr(subprocess, "Popen", lambda *a, **k: started.append(a))
    with pytest.raises(UserError) as refused:
        load_detector("evil.safetensors")
    assert "\n" not in str(refused.value)
    assert not started
    assert not (place / MARK).exists()


@pytest.mark.parametrize("attack", ["call", "call-of-a-part", "type-evaluated", "init-file"])
def test_the_manifest_of_a_run_runs_nothing(place: Path, attack: str) -> None:
    folder = place / "run"
    folder.mkdir()
    save_file({"x": torch.zeros(1)}, folder / "model.safetensors")
    digest = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    spec = {"family": "mmdet", "config": SPECS[attack](), "names": ["a"] * 80, "image_size": 64}
    manifest = {
        "kind": KIND,
        "format": FORMAT,
        "identity": {},
        "spec": {**spec, "stride": 32, "fingerprint": "0", "source": "evil"},
        "policy": Policy().to_dict(),
        "model_sha256": digest,
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError):
        load_run(folder)
    assert not (place / MARK).exists()


def test_the_parts_of_the_attacked_description_are_fine() -> None:
    check_spec(faster(), "the description")


def test_an_mmdet_config_loses_what_it_reads_files_with(place: Path) -> None:
    text = (
        f"_base_ = [{str(_shipped('retinanet_r50_fpn_1x_coco'))!r}]\n"
        "model = dict(backbone=dict(pretrained='torchvision://resnet50', type='mmdet.ResNet',\n"
        "    init_cfg=[dict(type='Pretrained', checkpoint='x'), dict(type='Kaiming',\n"
        "    layer='Conv2d')]))\n"
    )
    (place / "own.py").write_text(text)
    backbone = prepared(plain(read_config(place / "own.py")["model"]))["backbone"]
    assert backbone["pretrained"] is None
    assert backbone["type"] == "ResNet"
    assert backbone["init_cfg"] == [{"type": "Kaiming", "layer": "Conv2d"}]


SHIPPED = [
    *("faster-rcnn_r50_fpn_1x_coco", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco", "fcos_r50-caffe_fpn"),
    *("retinanet_pvt-t_fpn_1x_coco", "faster-rcnn_regnetx-3.2GF_fpn_1x_coco", "yolof_r50-c5_8xb8"),
    *("faster-rcnn_hrnetv2p-w18-1x_coco", "retinanet_effb3_fpn_8xb4-crop896-1x_coco", "ssd300"),
    *("faster-rcnn_r50_fpg_crop640-50e_coco", "rtmdet_tiny_8xb32-300e_coco", "detr_r50_8xb2"),
    *("yolox_tiny_8xb8-300e_coco", "gfl_r50_fpn_1x_coco", "atss_r50_fpn_1x_coco", "tood_r50_fpn"),
]


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_detectors_are_of_registered_parts(name: str) -> None:
    from dfq.models.mmdet.config import shipped_names

    full = next(one for one in sorted(shipped_names()) if one.startswith(name))
    model = prepared(plain(read_config(_shipped(full))["model"]))
    check_spec(json.loads(json.dumps(model)), full)


# ---- through the commands


@pytest.mark.parametrize("words", [("inspect",), ("synthesize", "--out", "out", "--images", "1")])
def test_a_command_runs_nothing(place: Path, words: tuple[str, ...]) -> None:
    yaml_file(YAMLS["row-DetectionModel-file"]())
    result = CliRunner().invoke(cli, [*words, "--model", "evil.yaml"])
    assert result.exit_code == 2
    assert len(result.stderr.splitlines()) == 1
    assert not (place / MARK).exists()
    assert not (place / "out").exists()
