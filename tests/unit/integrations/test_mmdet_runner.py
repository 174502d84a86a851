"""QAT by mmdet's own Runner and training script."""

from __future__ import annotations

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Set
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from support.forks import PATIENCE
from support.small_mmdet import NAMES, SIDE, TEXTS, enliven, write_config

from dfq.cli.main import cli
from dfq.data.calibration_set import CalibrationSet
from dfq.demo.scenes import write_coco
from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.integrations.mmdet_config import TRAINED, mmdet_config
from dfq.models import load_detector
from dfq.models.mmdet.config import _package_paths, prepared, quiet, read_config, shipped_config
from dfq.ptq.pipeline import quantized
from dfq.recipe import load_recipe
from dfq.runtime.progress import Silent

TERMS = frozenset({"loss_kl", "loss_feature"})
"""Of a recipe as it is shipped."""

WRITTEN = Path(__file__).parent / "written" / "mask-rcnn_r50_fpn_w4a8.py"

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
    """A user's config, its weights, a calibration set, and what is written for them: `w8a8.py` is
    the recipe as it is but for the size of the work, `weights.py` trains the weights as well."""
    folder = tmp_path_factory.mktemp("mmdet")
    rest = _REST.replace("ROOT", str(folder))
    for stem, network in (("own", "mask-rcnn-resnet"), ("swin", "mask-rcnn-swin")):
        base, _, text = TEXTS[network].lstrip().partition("\n")
        assert base.startswith("_base_")
        first, second, after = rest.partition("metainfo")
        names = first.replace("file\n          for file in", "file for file in")
        (folder / f"{stem}.py").write_text(f"{names}{text}{second}{after}")
        detector = enliven(load_detector(folder / f"{stem}.py"))
        state = {"meta": {}, "state_dict": detector.module.state_dict()}
        torch.save(state, folder / f"{stem}.pth")
    write_coco(folder / "scenes", 2, SIDE)
    dfq(
        "synthesize", "--model", folder / "own.py", "--checkpoint", folder / "own.pth",
        "--out", folder / "set", "--images", "8", "--iterations", "2", "--batch-size", "8",
        "--labels", "multi",
    )  # fmt: skip
    trained = ("--set", "distillation.weights.task=0.1", "--set", "distillation.weight_lr=null")
    for name, more in (("w8a8", ()), ("weights", trained)):
        dfq(
            "mmdet-config", folder / "own.py", "--recipe", "w8a8",
            "--checkpoint", folder / "own.pth", "--data", folder / "set",
            "--out", folder / f"{name}.py",
            "--set", "distillation.epochs=2", "--set", "distillation.batch_size=4", *more,
        )  # fmt: skip
    return folder


def test_the_student_is_the_one_that_dfq_trains(place: Path) -> None:
    from mmengine.config import Config
    from mmengine.registry import DefaultScope

    import dfq.integrations.mmdet.runner as integration

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
    teacher = fold(load_detector(f"{place / 'own.py'}@{place / 'own.pth'}"))
    recipe = load_recipe("w8a8", options["overrides"])
    expected = quantized(
        teacher, recipe.quantization.policy(), recipe.quantization, found, Silent()
    ).module.state_dict()
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

    import dfq.integrations.mmdet.runner as integration

    class Sample:
        gt_instances = InstanceData(
            bboxes=torch.tensor([[16.0, 0.0, 48.0, 32.0]]), labels=torch.tensor([3])
        )

    targets = integration._targets([Sample(), Sample()], (64, 128))
    row = [3, 0.25, 0.25, 0.25, 0.5]
    assert targets.data.tolist() == [[0, *row], [1, *row]]


@pytest.fixture(autouse=True)
def _own_logs() -> None:
    """mmengine's loggers are made once a process, and go on writing where the first run did."""
    from mmdet.visualization import DetLocalVisualizer
    from mmengine.logging import MessageHub, MMLogger

    for kind in (DetLocalVisualizer, MessageHub, MMLogger):
        kind._instance_dict.clear()


def script() -> str:
    """mmdet's own tools/train.py."""
    import mmdet

    return str(Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py")


def check_outcome(place: Path, work: Path, *, epoch: int = 2, terms: Set[str] = TERMS) -> None:
    """What training left behind, and the figures it logged."""
    logs = sorted(work.glob("*/vis_data/scalars.json"))
    lines = [json.loads(line) for log in logs for line in log.read_text().splitlines()]
    assert any(terms <= line.keys() for line in lines)
    assert {"coco/bbox_mAP", "coco/segm_mAP"} <= lines[-1].keys()
    saved = torch.load(work / f"epoch_{epoch}.pth", weights_only=True)
    state = saved["state_dict"]
    scales = [name for name in state if name.endswith("weight_quantizer.log_scale")]
    assert scales
    assert all(bool(state[name.replace("log_scale", "initialised")]) for name in scales)
    start = torch.load(place / "own.pth", weights_only=False)["state_dict"]
    moved = state["student.roi_head.bbox_head.fc_cls.weight"]
    assert not torch.equal(moved, start["roi_head.bbox_head.fc_cls.weight"])
    assert not any("teacher" in name for name in state)
    assert "ema_state_dict" in saved


def integers(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """What the weights of a student's layers are multiples of their step sizes by."""
    found = {}
    for name in state:
        if name.endswith(".weight_quantizer.log_scale"):
            layer = name.removesuffix(".weight_quantizer.log_scale")
            weight = state[f"{layer}.weight"]
            scale = state[name].exp().view(-1, *([1] * (weight.ndim - 1)))
            found[layer] = weight / scale
    return found


def run_script(place: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> None:
    monkeypatch.chdir(place)
    monkeypatch.setattr(sys, "argv", ["train.py", *words])
    with torch.random.fork_rng(devices=[]):
        runpy.run_path(script(), run_name="__main__")


def test_mmdets_own_script(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(place, monkeypatch, "w8a8.py", "--work-dir", "out1")
    check_outcome(place, place / "out1")


def test_training_the_weights(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_script(place, monkeypatch, "weights.py", "--work-dir", "weights")
    check_outcome(place, place / "weights", terms={*TERMS, "loss_task"})


@pytest.mark.parametrize(("stem", "kind"), [("own", "r50"), ("swin", "swin")])
def test_the_papers_recipes(
    stem: str, kind: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dfq(
        "mmdet-config", place / f"{stem}.py", "--recipe", f"paper-mask-rcnn-{kind}",
        "--checkpoint", place / f"{stem}.pth", "--data", place / "set",
        "--out", place / f"paper-{kind}.py", "--set", "distillation.epochs=1",
        "--set", "distillation.batch_size=4",
    )  # fmt: skip
    run_script(place, monkeypatch, f"paper-{kind}.py", "--work-dir", kind)
    (log,) = (place / kind).glob("*/vis_data/scalars.json")
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    assert any({*TERMS, "loss_task"} <= line.keys() for line in lines)
    saved = torch.load(place / kind / "epoch_1.pth", weights_only=True)
    # The paper averages no weights of these networks.
    assert "ema_state_dict" not in saved
    start = torch.load(place / f"{stem}.pth", weights_only=False)["state_dict"]
    moved = "roi_head.bbox_head.shared_fcs.0.weight"
    assert not torch.equal(saved["state_dict"][f"student.{moved}"], start[moved])


def test_a_resumed_training_keeps_the_integers(
    place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after an epoch and resumed: the weights stay what they were rounded to, also those
    that are averaged; step sizes, and with them the weights, go on from where they were."""
    one_epoch = ["--cfg-options", "train_cfg.max_epochs=1", "train_cfg.val_interval=1"]
    # Told to resume what has not begun, it begins.
    run_script(place, monkeypatch, "w8a8.py", "--work-dir", "stopped", "--resume", *one_epoch)
    check_outcome(place, place / "stopped", epoch=1)
    run_script(place, monkeypatch, "w8a8.py", "--work-dir", "stopped", "--resume")
    check_outcome(place, place / "stopped")
    before, after = (
        torch.load(place / "stopped" / f"epoch_{epoch}.pth", weights_only=True) for epoch in (1, 2)
    )
    assert after["meta"]["iter"] == 2 * before["meta"]["iter"]
    for part, prefix in (("state_dict", "student."), ("ema_state_dict", "module.student.")):
        first, second = integers(before[part]), integers(after[part])
        assert first.keys() == second.keys()
        held = [name for name in first if not name.endswith(("fc_cls", "fc_reg", "conv_logits"))]
        held = [name for name in held if "rpn_head.rpn_" not in name or "conv" in name]
        assert len(held) > 10
        moved = 0
        for name in held:
            assert name.startswith(prefix)
            whole = first[name].round()
            torch.testing.assert_close(first[name], whole, rtol=0, atol=1e-3, msg=name)
            torch.testing.assert_close(second[name], whole, rtol=0, atol=1e-3, msg=name)
            scale = f"{name}.weight_quantizer.log_scale"
            moved += not torch.equal(before[part][scale], after[part][scale])
        assert moved > 10


def written(kind: str, recipe: str, name: str) -> str:
    """The config that trains one of mmdet's own detectors by a shipped recipe."""
    folder, config = {
        "r50": ("mask_rcnn", "mask-rcnn_r50_fpn_1x_coco"),
        "swin": ("swin", "mask-rcnn_swin-t-p4-w7_fpn_1x_coco"),
    }[kind]
    return mmdet_config(
        load_recipe(recipe),
        recipe,
        config,
        checkpoint="weights.pth",
        data="data/calibration-set",
        name=name,
        base=f"mmdet::{folder}/{config}.py",
    )


@pytest.mark.parametrize(("kind", "recipe"), [("r50", "w4a8"), ("swin", "w8a8"), ("swin", "w6a6")])
def test_written_configs_train_as_they_are(
    kind: str, recipe: str, place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing of them is changed but whose network, weights and data they are about."""
    from mmengine.config import Config
    from mmengine.runner import Runner

    path = tmp_path / "written.py"
    path.write_text(written(kind, recipe, path.name))
    stem = "swin" if kind == "swin" else "own"
    own = read_config(place / f"{stem}.py")
    with quiet(), _package_paths():
        config = Config.fromfile(str(path))
    config.model.config = str(place / f"{stem}.py")
    config.model.checkpoint = str(place / f"{stem}.pth")
    config.train_dataloader.dataset.data_root = str(place / "set")
    for key in ("val_dataloader", "test_dataloader", "val_evaluator", "test_evaluator", "env_cfg"):
        config[key] = own[key]
    config.work_dir = str(tmp_path)
    monkeypatch.chdir(tmp_path)
    with torch.random.fork_rng(devices=[]):
        Runner.from_cfg(config).train()
    check_outcome(place, tmp_path, epoch=config.train_cfg.max_epochs)


def test_mmdets_own_script_in_two_processes(place: Path) -> None:
    root = str(Path(__file__).parents[3])
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


def unscoped(value: Any) -> Any:
    """Without what mmengine adds where a base is named `mmdet::`."""
    if isinstance(value, dict):
        return {key: unscoped(one) for key, one in value.items() if key != "_scope_"}
    return [unscoped(one) for one in value] if isinstance(value, list) else value


def test_what_the_command_writes(place: Path, tmp_path: Path) -> None:
    assert WRITTEN.read_text() == written("r50", "w4a8", WRITTEN.name)
    read = read_config(WRITTEN)
    assert read["model"]["type"] == "DFQDistiller"
    assert read["train_dataloader"]["dataset"]["type"] == "DFQCalibrationSet"
    assert "batch_sampler" not in read["train_dataloader"]
    assert read["val_evaluator"]["type"] == "CocoMetric"
    base = shipped_config(read["model"]["config"])
    assert base is not None
    dfq(
        "mmdet-config", base, "--recipe", "w4a8", "--checkpoint", place / "own.pth",
        "--data", place / "set", "--out", tmp_path / "own.py",
    )  # fmt: skip
    own = read_config(tmp_path / "own.py")
    # It has its user's files, of which the shipped ones know nothing.
    own["model"] |= {"config": base.stem, "checkpoint": "weights.pth"}
    own["train_dataloader"]["dataset"]["data_root"] = "data/calibration-set"
    changed = {key for key in read if unscoped(own.get(key)) != unscoped(read[key])}
    # Where COCO is not beside it, it does without a validation.
    assert changed <= {"val_dataloader", "val_cfg", "val_evaluator"}


def test_a_training_with_bounds_of_an_earlier_version_is_not_gone_on_with() -> None:
    from dfq.integrations.mmdet.runner import DFQCalibrationHook

    def load(resume: bool, bounds: list[torch.Tensor]) -> None:
        runner = SimpleNamespace(_resume=resume, work_dir="work")
        DFQCalibrationHook().after_load_checkpoint(runner, {"dfq_leash": bounds})

    load(True, [])
    load(False, [torch.zeros(1)])
    with pytest.raises(UserError, match=r"^work: was begun with distillation\.drift, which this"):
        load(True, [torch.zeros(1)])


def test_mistakes(tmp_path: Path) -> None:
    import dfq.integrations.mmdet.runner as integration

    with pytest.raises(UserError, match="no detector of mmdet"):
        integration.DFQDistiller(
            "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn", overrides=TRAINED
        )
    config = write_config(tmp_path, "retinanet")
    for train_last in (True, False):
        kept = integration.DFQDistiller(
            str(config),
            recipe="w8a8",
            overrides=[*TRAINED, f"distillation.train_last={train_last}"],
        )
        trained = {name for name, value in kept.named_parameters() if value.requires_grad}
        assert "student.bbox_head.cls_convs.0.conv.bias" in trained
        # It stays as it was rounded.
        assert "student.bbox_head.cls_convs.0.conv.weight" not in trained
        assert ("student.bbox_head.retina_cls.weight" in trained) is train_last
    for override in (
        "distillation.zero_lr=0.01", "distillation.mosaic=0.5", "distillation.zoom=0.1",
        "distillation.colour=0.1", "distillation.camera=0.5", "distillation.selection=agreement",
        "method=auto", "method=ptq", "quantization.mixed.budget=w4a8",
        "distillation.select_on=real", "evaluation.data=real", "distillation.keep_worse=false",
    ):  # fmt: skip
        key = override.partition("=")[0]
        with pytest.raises(UserError, match=rf"^{key}.*use dfq qat"):
            integration.DFQDistiller(str(config), overrides=[*TRAINED, override])
    result = CliRunner().invoke(cli, ["mmdet-config", "none.py", "--recipe", "w8a8"])
    assert result.exit_code == 2
    assert "no such config" in result.stderr
    assert prepared({"type": "SyncBN", "init_cfg": {"type": "Pretrained", "checkpoint": "x"}}) == {
        "type": "BN",
        "init_cfg": None,
    }
