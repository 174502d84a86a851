"""One small network, one set, one recipe: trained by dfq qat and by mmdet's own training script.

The network is one of scripts/small_rcnn.py, as benchmarks/mmdet/small_networks.py trained it, and
the set is made with the settings of that benchmark. mmdet's script runs in one process and in two
(gloo), and measures with its own CocoMetric. Writes `table.md` into --out.
"""

from __future__ import annotations

import json
import os
import pprint
import subprocess
import sys
from pathlib import Path

import click
import torch

import dfq
from benchmarks.common import benchmark, header, line, out_option, set_option
from benchmarks.mmdet.small_networks import BUDGET
from dfq.demo import NAMES
from dfq.models import load_detector
from dfq.models.mmdet.config import unplain
from dfq.recipe import load_recipe
from scripts.small_rcnn import FAMILIES, SIDE

TRAINED = ("method=qat", "distillation.keep_worse=true")

_CONFIG = """\
model = {model}
metainfo = dict(classes={names!r})
test_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="Resize", scale=({side}, {side}), keep_ratio=True),
    dict(type="PackDetInputs", meta_keys=("img_id", "img_path", "ori_shape", "img_shape",
                                          "scale_factor")),
]
val_dataloader = dict(
    batch_size=1, num_workers=0, sampler=dict(type="DefaultSampler", shuffle=False),
    dataset=dict(type="CocoDataset", data_root={data!r}, ann_file="annotations.json",
                 data_prefix=dict(img="images/"), metainfo=metainfo, test_mode=True,
                 pipeline=test_pipeline))
test_dataloader = val_dataloader
val_cfg = dict(type="ValLoop")
test_cfg = dict(type="TestLoop")
val_evaluator = dict(type="CocoMetric", ann_file={data!r} + "/annotations.json",
                     metric=["bbox", "segm"])
test_evaluator = val_evaluator
default_scope = "mmdet"
env_cfg = dict(dist_cfg=dict(backend="gloo"))
default_hooks = dict(logger=dict(type="LoggerHook", interval=1),
                     checkpoint=dict(type="CheckpointHook", interval=1))
"""


def write_config(family: str, weights: Path, data: Path, out: Path) -> tuple[Path, Path]:
    """The network as a user of mmdet would have it: a config, and a checkpoint."""
    model = unplain(FAMILIES[family]()["config"])
    # dfq eval's thresholds, so that both evaluations count the same detections.
    model["test_cfg"]["rcnn"] |= {
        "score_thr": 0.001, "nms": {"type": "nms", "iou_threshold": 0.6}, "max_per_img": 300
    }  # fmt: skip
    text = _CONFIG.format(
        model=pprint.pformat(model), names=tuple(NAMES), side=SIDE, data=str(data.resolve())
    )
    config, checkpoint = out / "own.py", out / "own.pth"
    config.write_text(text)
    state = load_detector(str(weights)).module.state_dict()
    torch.save(
        {"meta": {"dataset_meta": {"classes": tuple(NAMES)}}, "state_dict": state}, checkpoint
    )
    return config, checkpoint


def by_mmdet(config: Path, work: Path, processes: int, batch: int) -> dict[str, float]:
    """Box and mask AP that mmdet's script ends with."""
    import mmdet

    script = Path(mmdet.__file__).parent / ".mim" / "tools" / "train.py"
    launch = [sys.executable]
    options = [str(script), str(config), "--work-dir", str(work)]
    if processes > 1:
        launch += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        options += ["--launcher", "pytorch"]
    # The config's batch is of each process.
    options += ["--cfg-options", f"train_dataloader.batch_size={batch // processes}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with (work.parent / f"{work.name}.log").open("w") as log:
        subprocess.run(
            [*launch, *options], check=True, env=environment, stdout=log, stderr=subprocess.STDOUT
        )
    (scalars,) = sorted(work.glob("*/vis_data/scalars.json"))[-1:]
    last = json.loads(scalars.read_text().splitlines()[-1])
    return {"AP": last["coco/bbox_mAP"], "mask_AP": last["coco/segm_mAP"]}


def by_dfq(model: Path | str, data: Path) -> dict[str, float]:
    """Box and mask AP by dfq's evaluation."""
    found = dfq.evaluate(model, data)
    assert found.masks is not None
    return {"AP": found.AP, "mask_AP": found.masks.AP}


@benchmark(__doc__)
@click.option("--bench", type=click.Path(exists=True, path_type=Path), required=True,
              help="What benchmarks.mmdet.small_networks left.")  # fmt: skip
@out_option
@click.option("--family", default="mask-rcnn-resnet", show_default=True)
@click.option("--recipe", default="w4a8", show_default=True)
@click.option("--batch", default=16, show_default=True, help="Images a step, of all processes.")
@set_option
def main(
    bench: Path, out: Path, family: str, recipe: str, batch: int, overrides: tuple[str, ...]
) -> None:
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    scenes = bench / "scenes"
    config, checkpoint = write_config(family, bench / f"{family}.safetensors", scenes, out)
    model = f"{config}@{checkpoint}"
    changes = [*overrides, f"distillation.batch_size={batch}"]
    rows = {"float": by_dfq(model, scenes)}
    settings = load_recipe(recipe, [*BUDGET, *changes, *TRAINED])
    images = dfq.synthesize(model, settings, out=out / "set", device="cpu", workers=1).root
    run = dfq.quantize(settings, model=model, data=images, out=out / "dfq", device="cpu")
    rows["dfq qat"] = by_dfq(run, scenes)
    written = out / "mmdet_qat.py"
    words = ["mmdet-config", str(config), "--recipe", recipe, "--checkpoint", str(checkpoint)]
    words += ["--data", str(images), "--out", str(written)]
    words += [f"--set={change}" for change in changes]
    subprocess.run([sys.executable, "-m", "dfq", *words], check=True)
    for processes in (1, 2):
        name = f"mmdet's script, {processes} process{'es' * (processes > 1)}"
        rows[name] = by_mmdet(written, out / f"mmdet-{processes}", processes, batch)
    lines = [line(name, f"{row['AP']:.3f}", f"{row['mask_AP']:.3f}") for name, row in rows.items()]
    table = "\n".join([header("trained by", "AP:", "mask AP:"), *lines]) + "\n"
    (out / "table.md").write_text(table)
    click.echo(table)


if __name__ == "__main__":
    main()
