"""Every detector that Ultralytics ships a YAML of is built, and as Ultralytics builds it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import ultralytics
import yaml
from ultralytics.nn.tasks import DetectionModel, yaml_model_load

from dfq.errors import UserError
from dfq.models import load_detector
from dfq.models.ultralytics.layers import LAYERS
from dfq.models.ultralytics.resolve import quiet

# Whole networks of many kinds.
pytestmark = pytest.mark.e2e

FOLDER = Path(ultralytics.__file__).parent / "cfg" / "models"
FILES = sorted(FOLDER.rglob("*.yaml"))


def head_of(path: Path) -> str:
    return str(yaml.safe_load(path.read_text(encoding="utf-8"))["head"][-1][2])


DETECTORS = [path for path in FILES if head_of(path) in ("Detect", "v10Detect")]
OTHERS = [path for path in FILES if path not in DETECTORS]
# Of each, one size is named; Ultralytics finds the file of all sizes.
SIZED = [
    "yolo11s",
    "yolov8n-p2",
    "yolov8n6",
    "yolov5n6",
    "yolov5su",
    "yolo26n",
    "yolo12n",
    "yolov3u",
]


def test_there_are_some() -> None:
    assert len(DETECTORS) > 20
    assert len(OTHERS) > 20


@pytest.mark.parametrize(
    "name", [*(path.name for path in DETECTORS), *(f"{s}.yaml" for s in SIZED)]
)
def test_a_shipped_detector(name: str) -> None:
    detector = load_detector(name)
    # The names of networks with a `u` at their end are Ultralytics' own for what it trains itself.
    own_name = name.replace("u.yaml", ".yaml")
    with quiet(), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        own = DetectionModel(yaml_model_load(own_name), verbose=False)
    given, expected = detector.module.state_dict(), own.state_dict()
    assert list(given) == list(expected)
    assert all(torch.equal(given[key], value) for key, value in expected.items())
    assert detector.stride == int(own.stride.max())


@pytest.mark.parametrize("path", DETECTORS, ids=lambda path: path.name)
def test_its_layers_are_listed(path: Path) -> None:
    text = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert {row[2] for row in [*text["backbone"], *text["head"]]} <= LAYERS.keys()


@pytest.mark.parametrize("path", OTHERS, ids=lambda path: path.name)
def test_other_networks_are_refused(path: Path) -> None:
    with pytest.raises(UserError) as refused:
        load_detector(path)
    assert "\n" not in str(refused.value)
    assert "name an object detector" in str(refused.value)
