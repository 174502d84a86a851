"""Which of mmdet's detectors dfq can use: a table of configs as mmdet ships them, random weights.

    python -m benchmarks.mmdet.configs faster-rcnn_r50_fpn_1x_coco detr_r50_8xb2-150e_coco

Loading one runs its predictions, losses, gradients, distillation and decoder once; then every layer
is quantized, calibrated and compared.
"""

from __future__ import annotations

import click
import torch

from benchmarks.common import benchmark, header, line
from dfq.errors import UserError
from dfq.graph.fold_batchnorm import fold
from dfq.models import load_detector
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers, quantized_share
from dfq.quantization.policy import Policy

CONFIGS = (
    "faster-rcnn_r50_fpn_1x_coco",
    "mask-rcnn_r50_fpn_1x_coco",
    "mask-rcnn_swin-t-p4-w7_fpn_1x_coco",
    "retinanet_r50_fpn_1x_coco",
    "fcos_r50-caffe_fpn_gn-head-center-normbbox-centeronreg-giou_1x_coco",
    "atss_r50_fpn_1x_coco",
    "gfl_r50_fpn_1x_coco",
    "rtmdet_tiny_8xb32-300e_coco",
    "yolox_tiny_8xb8-300e_coco",
    "detr_r50_8xb2-150e_coco",
    "cascade-rcnn_r50_fpn_1x_coco",
    "dino-4scale_r50_8xb2-12e_coco",
    "rtmdet-ins_tiny_8xb32-300e_coco",
    "mask2former_r50_8xb2-lsj-50e_coco",
    "solo_r50_fpn_1x_coco",
)


def attempt(config: str, size: int) -> tuple[str, str]:
    """Whether dfq can use it, and the share of its MACs that are quantized."""
    try:
        detector = fold(load_detector(config))
    except UserError as error:
        return f"refused: {str(error).partition(': ')[2]}", ""
    student = insert_quantizers(detector.clone(), Policy(weight_bits=8))
    image = torch.rand(1, 3, size, size, generator=torch.Generator().manual_seed(0))
    calibrate(student, [image], search="minmax")
    with torch.no_grad():
        pairs = student.distillation_pairs(student.raw(image), detector.raw(image))
    assert all(torch.isfinite(pair.student).all() for pair in pairs)
    return "works", f"{quantized_share(list_layers(student, size)):.1%}"


@benchmark(__doc__)
@click.argument("configs", nargs=-1)
@click.option("--size", default=128, show_default=True, help="Side of the image, pixels.")
def main(configs: tuple[str, ...], size: int) -> None:
    torch.set_num_threads(1)
    click.echo(header("config", "outcome", "MACs quantized:"))
    for config in configs or CONFIGS:
        click.echo(line(config, *attempt(config, size)))


if __name__ == "__main__":
    main()
