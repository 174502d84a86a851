"""QAT by mmdet's own Runner and training script."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from forks import PATIENCE
from small_mmdet import NAMES, SIDE, TEXTS, enliven, write_config

from dfq.cli import cli
from dfq.dataset.calibration import CalibrationSet
from dfq.demo.scenes import write_coco
from dfq.detectors import load_detector
from dfq.detectors.mmdet_config import prepared, quiet, read_config, shipped_config
from dfq.errors import UserError
from dfq.integrations.mmdet_recipe import mmdet_config
from dfq.progress import Silent
from dfq.quantization.convert import fold
from dfq.recipe import load_recipe
from dfq.training import policy_of, quantized

RECIPES = Path(__file__).parents[2] / "recipes" / "mmdet"

# What a user's config has beside the model; `mmdet::` needs pkg_resources in mmdet's own script.
_REST = f"""
_base_ = [{str(shipped_config("faster-rcnn_r50_fpn_1x_coco").parents[1] / "_base_")!r} + file
          for file in ('/models/mask-rcnn_r50_fpn.py', '/default_runtime.py')]
metainfo = dict(classes={NAMES!r})
env_cfg = dict(dist_cfg=dict(backend='gloo'))
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type='DefaultSampler', shuffle=False),
    dataset=dict(type='CocoDataset', data_root='ROOT/scenes', ann_file='annotations.json',
                 data_prefix=dict(img='images/'), metainfo=metainfo, test_mode=True,
                 pipeline=test_pipeline))
test_dataloader = val_dataloader
val_cfg = dict(type='ValLoop')
test_cfg = dict(type='TestLoop')
val_evaluator = dict(type='CocoMetric', ann_file='ROOT/scenes/annotations.json',
                     metric=['bbox', 'segm'])
test_evaluator = val_evaluator
"""


def dfq(*words: str | Path) -> None:
    result = CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)
    assert result.exit_code == 0, result.output


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A user's config, its weights, a calibration set and `w8a8.py`, written for them."""
    folder = tmp_path_factory.mktemp("mmdet")
    rest = _REST.replace("ROOT", str(folder))
    base, _, text = TEXTS["mask-rcnn-resnet"].lstrip().partition("\n")
    assert base.startswith("_base_")
    first, second, after = rest.partition("metainfo")
    names = first.replace("file\n          for file in", "file for file in")
    (folder / "own.py").write_text(f"{names}{text}{second}{after}")
    detector = enliven(load_detector(folder / "own.py"))
    torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, folder / "w.pth")
    write_coco(folder / "scenes", 2, SIDE)
    dfq(
        "synthesize", "--model", folder / "own.py", "--checkpoint", folder / "w.pth",
        "--out", folder / "set", "--images", "8", "--iterations", "2", "--batch-size", "8",
        "--labels", "multi",
    )  # fmt: skip
    dfq(
        "mmdet-config", folder / "own.py", "--recipe", "w8a8", "--checkpoint", folder / "w.pth",
        "--data", folder / "set", "--out", folder / "w8a8.py",
        "--set", "distillation.epochs=2", "--set", "distillation.batch_size=4",
        "--set", "distillation.weights.task=0.1", "--set", "distillation.weight_lr=null",
    )  # fmt: skip
    return folder


def test_the_student_is_the_one_that_dfq_trains(place: Path) -> None:
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    import dfq.integrations.mmdet as integration

    config = Config.fromfile(str(place / "w8a8.py")).to_dict()
    options = {key: value for key, value in config["model"].items() if key != "type"}
    with quiet(), DefaultScope.overwrite_default_scope("mmdet"):
        model = integration.DFQDistiller(**options)
        dataset = integration.DFQCalibrationSet(str(place / "set"), pipeline=[])
    found = CalibrationSet.open(place / "set")
    images = found.load(list(range(len(found))))
    assert dataset.metainfo["classes"] == NAMES
    assert len(dataset) == len(found)
    model.train()
    assert model.training
    assert not any(part.training for part in model.student.modules())
    model.prepare(images)
    teacher = fold(load_detector(f"{place / 'own.py'}@{place / 'w.pth'}"))
    recipe = load_recipe("w8a8", options["overrides"])
    expected = quantized(teacher, policy_of(recipe), recipe, found, Silent()).module.state_dict()
    state = model.student.state_dict()
    assert state.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(state[name], value, msg=name)
    assert not any(name.startswith("_teacher") for name in model.state_dict())
    targets = found.targets([0, 1])
    samples = [dataset.get_data_info(index)["instances"] for index in (0, 1)]
    assert [len(one) for one in samples] == [len(one) for one in targets.per_image(2)]


def test_labels_become_dfqs(place: Path) -> None:
    from mmengine.structures import InstanceData

    import dfq.integrations.mmdet as integration

    class Sample:
        gt_instances = InstanceData(
            bboxes=torch.tensor([[16.0, 0.0, 48.0, 32.0]]), labels=torch.tensor([3])
        )

    targets = integration._targets([Sample(), Sample()], (64, 128))
    row = [3, 0.25, 0.25, 0.25, 0.5]
    assert targets.data.tolist() == [[0, *row], [1, *row]]


def script() -> str:
    """mmdet's own tools/train.py."""
    import mmdet

    return str(Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py")


def check_outcome(place: Path, work: Path) -> None:
    """What training left behind, and the figures it logged."""
    (log,) = work.glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any({"loss_kl", "loss_feature", "loss_task"} <= line.keys() for line in lines)
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= lines[-1].keys()
    saved = torch.load(work / "epoch_2.pth", weights_only=False)
    start = torch.load(place / "w.pth", weights_only=False)["state_dict"]
    state = saved["state_dict"]
    scales = [name for name in state if name.endswith("weight_quantizer.log_scale")]
    assert scales
    assert all(bool(state[name.replace("log_scale", "initialised")]) for name in scales)
    # A lower and an upper bound of each weight, kept for resuming.
    assert len(saved["dfq_leash"]) == 2 * len(scales)
    moved = state["student.roi_head.bbox_head.fc_cls.weight"]
    assert not torch.equal(moved, start["roi_head.bbox_head.fc_cls.weight"])
    assert not any("teacher" in name for name in state)


def test_mmdets_own_script(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["train.py", "w8a8.py", "--work-dir", "out1"])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(script(), run_name="__main__")
    check_outcome(place, place / "out1")


def test_mmdets_own_script_in_two_processes(place: Path) -> None:
    root = str(Path(__file__).parents[2])
    environment = {**os.environ, "PYTHONPATH": root, "OMP_NUM_THREADS": "1"}
    launch = ["torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = ["w8a8.py", "--work-dir", "out2", "--launcher", "pytorch"]
    done = subprocess.run(
        [sys.executable, "-m", *launch, script(), *arguments],
        cwd=place,
        env=environment,
        capture_output=True,
        text=True,
        timeout=PATIENCE,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    check_outcome(place, place / "out2")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("*.py")), ids=lambda path: path.stem)
def test_shipped_recipes_are_what_the_command_writes(path: Path) -> None:
    stem, _, recipe = path.stem.rpartition("_")
    folder, config = {
        "mask-rcnn_r50_fpn": ("mask_rcnn", "mask-rcnn_r50_fpn_1x_coco"),
        "mask-rcnn_swin-t_fpn": ("swin", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"),
    }[stem]
    assert path.read_text() == mmdet_config(
        load_recipe(recipe),
        recipe,
        config,
        checkpoint="weights.pth",
        data="data/calibration-set",
        name=f"recipes/mmdet/{path.name}",
        base=f"mmdet::{folder}/{config}.py",
    )
    read = read_config(path)
    assert read["model"]["type"] == "DFQDistiller"
    assert read["train_dataloader"]["dataset"]["type"] == "DFQCalibrationSet"
    assert "batch_sampler" not in read["train_dataloader"]
    assert read["val_evaluator"]["type"] == "CocoMetric"
    assert shipped_config(read["model"]["config"]) is not None


def test_mistakes(tmp_path: Path) -> None:
    import dfq.integrations.mmdet as integration

    with pytest.raises(UserError, match="no detector of mmdet"):
        integration.DFQDistiller("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn")
    config = write_config(tmp_path, "retinanet")
    for train_last in (True, False):
        kept = integration.DFQDistiller(
            str(config), recipe="w8a8", overrides=[f"distillation.train_last={train_last}"]
        )
        trained = {name for name, value in kept.named_parameters() if value.requires_grad}
        assert "student.bbox_head.cls_convs.0.conv.bias" in trained
        # It stays as it was rounded.
        assert "student.bbox_head.cls_convs.0.conv.weight" not in trained
        assert ("student.bbox_head.retina_cls.weight" in trained) is train_last
    for override in ("distillation.weight_lr=0.1", "distillation.dampen=0.1"):
        with pytest.raises(UserError, match="use dfq qat"):
            integration.DFQDistiller(str(config), overrides=[override])
    result = CliRunner().invoke(cli, ["mmdet-config", "none.py", "--recipe", "w8a8"])
    assert result.exit_code == 2
    assert "no such config" in result.stderr
    assert prepared({"type": "SyncBN", "init_cfg": {"type": "Pretrained", "checkpoint": "x"}}) == {
        "type": "BN",
        "init_cfg": None,
    }
