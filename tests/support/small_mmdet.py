"""Small mmdet configs, of the kind a user would have, and detectors built from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from dfq.models.base import Detector

SIDE = 64
NAMES = ("ball", "ring", "star", "triangle", "cross", "flower", "arrow", "checker", "brick", "moon")

_MASK_RCNN = f"""
_base_ = ['mmdet::_base_/models/mask-rcnn_r50_fpn.py']
metainfo = dict(classes={NAMES!r})
model = dict(
    backbone=BACKBONE,
    neck=dict(in_channels=CHANNELS, out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=32, num_classes={len(NAMES)}),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(
            num_convs=1, in_channels=16, conv_out_channels=16, num_classes={len(NAMES)})),
    train_cfg=dict(rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(max_per_img=60)))
test_pipeline = [
    dict(type='LoadImageFromFile'),
    dict(type='Resize', scale=({SIDE}, {SIDE}), keep_ratio=True),
    dict(type='PackDetInputs', meta_keys=('img_id', 'img_path', 'ori_shape', 'img_shape',
                                          'scale_factor')),
]
test_dataloader = dict(dataset=dict(pipeline=test_pipeline))
"""

_RESNET = (
    "dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None)",
    "[8, 16, 32, 64]",
)
_SWIN = (
    "dict(_delete_=True, type='SwinTransformer', embed_dims=16, depths=[1, 2, 1, 1], "
    "num_heads=[1, 2, 2, 4], window_size=4, drop_path_rate=0.1, with_cp=True)",
    "[16, 32, 64, 128]",
)

_RETINANET = f"""
_base_ = ['mmdet::_base_/models/retinanet_r50_fpn.py']
model = dict(
    backbone=dict(depth=18, base_channels=8, stem_channels=8, init_cfg=None),
    neck=dict(in_channels=[8, 16, 32, 64], out_channels=16),
    bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes={len(NAMES)}))
"""

TEXTS = {
    "mask-rcnn-resnet": _MASK_RCNN.replace("BACKBONE", _RESNET[0]).replace("CHANNELS", _RESNET[1]),
    "mask-rcnn-swin": _MASK_RCNN.replace("BACKBONE", _SWIN[0]).replace("CHANNELS", _SWIN[1]),
    "retinanet": _RETINANET,
}


def write_config(folder: Path, name: str) -> Path:
    """One of `TEXTS` as a file."""
    path = folder / f"{name}.py"
    path.write_text(TEXTS[name])
    return path


def enliven(detector: Detector) -> Detector:
    """Statistics and heads as training might leave them: fresh ones see no difference anywhere."""
    generator = torch.Generator().manual_seed(1)
    norms = [m for m in detector.module.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    for norm in norms:
        norm.train().momentum = 1.0
    with torch.no_grad():
        images = torch.rand(4, 3, SIDE, SIDE, generator=generator)
        detector.module.backbone(detector.normalize(images))
    for norm in norms:
        norm.eval()
    for name, layer in detector.module.named_modules():
        if "norm" not in name and isinstance(layer, nn.Conv2d | nn.Linear) and "backbone" in name:
            continue
        last = name in detector.boundary_layers().last
        if isinstance(layer, nn.Conv2d | nn.Linear):
            fan = layer.weight[0].numel()
            boxes = "reg" in name
            scale = (0.3 if boxes else 4.0) if last else 2.0
            layer.weight.data.normal_(0, scale * (1 / fan) ** 0.5, generator=generator)
            if layer.bias is not None:
                layer.bias.data.normal_(0, 0.1, generator=generator)
    return detector
