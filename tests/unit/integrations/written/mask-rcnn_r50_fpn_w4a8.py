# Quantization-aware training of mask-rcnn_r50_fpn_1x_coco
# (4-bit weights and 8-bit activations), by mmdet's own Runner.
#
#   python tools/train.py mask-rcnn_r50_fpn_w4a8.py
#
# Written by `dfq mmdet-config`; the data are a calibration set:
#
#   dfq synthesize --recipe w4a8 --model mask-rcnn_r50_fpn_1x_coco \
#     --checkpoint weights.pth --out data/calibration-set
_base_ = ["mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py"]

custom_imports = dict(imports=["dfq.integrations.mmdet"], allow_failed_imports=False)

model = dict(
    _delete_=True,
    type="DFQDistiller",
    # The detector's own config, and its float weights.
    config="mask-rcnn_r50_fpn_1x_coco",
    checkpoint="weights.pth",
    # Whose quantization and distillation sections count.
    recipe="w4a8",
    overrides=["method=qat", "distillation.keep_worse=true"],
)

train_pipeline = [
    dict(type="LoadImageFromFile"),
    dict(type="LoadAnnotations", with_bbox=True),
    dict(type="RandomFlip", prob=0.5),
    dict(type="PackDetInputs"),
]
train_dataloader = dict(
    _delete_=True,
    # Of each process.
    batch_size=16,
    num_workers=0,
    sampler=dict(type="DefaultSampler", shuffle=True),
    dataset=dict(
        type="DFQCalibrationSet",
        data_root="data/calibration-set",
        pipeline=train_pipeline,
    ),
)

train_cfg = dict(
    _delete_=True,
    type="EpochBasedTrainLoop",
    max_epochs=6,
    val_interval=6,
)
optim_wrapper = dict(
    _delete_=True,
    type="OptimWrapper",
    optimizer=dict(type="Adam", lr=0.0003),
    # Step sizes live on a scale of their own.
    paramwise_cfg=dict(custom_keys=dict(quantizer=dict(lr_mult=3.33333))),
    clip_grad=dict(max_norm=10.0),
)
# DFQCalibrationHook sets the rates: rising over the recipe's warm-up, then a cosine to zero.
param_scheduler = []
randomness = dict(seed=0)
custom_hooks = [
    dict(type="DFQCalibrationHook", priority="VERY_HIGH"),
    dict(type="EMAHook", ema_type="ExpMomentumEMA", momentum=0.002, gamma=100),
]
model_wrapper_cfg = dict(
    type="DFQDistributed",
    broadcast_buffers=False,
    find_unused_parameters=True,
)
# The base's is for its own learning rate.
auto_scale_lr = dict(enable=False, base_batch_size=16)
load_from = None
