"""Quantization-aware training inside mmdet: its Runner, launchers, logging and evaluation.

A config joins in with

    custom_imports = dict(imports=['dfq.integrations.mmdet'], allow_failed_imports=False)

which registers with mmdet

- `DFQDistiller`, a model: the quantized student of a detector, trained to follow the float one;
- `DFQCalibrationHook`, which finds the quantizers' scales before training and keeps weights on
  their leash;
- `DFQDistributed`, what wraps the model where several processes train it;
- `DFQCalibrationSet`, a data set: what `dfq synthesize` writes.

`dfq mmdet-config` writes such a config for a detector's own.
"""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...data.calibration_set import CalibrationSet
from ...errors import UserError
from ...models import Targets, load_detector
from ...models.mmdet.config import require_mmdet
from ...ptq.pipeline import calibrate_and_round, clip_strictly, float_start, images_to_prepare
from ...qat.features import distilled_layers
from ...qat.frozen_integers import FrozenIntegers, frozen_layers
from ...qat.losses import FeatureHooks, training_terms
from ...qat.parameter_groups import rate_at, require_gradients
from ...quantization.insertion import insert_quantizers
from ...recipe import load_recipe
from ...runtime.launch import number
from ...runtime.precision import resolve_precision
from ...runtime.progress import Silent
from ..mmdet_config import require_supported

require_mmdet()

# Only now: without compiled operations mmdet cannot be imported before.
from mmdet.datasets import CocoDataset  # noqa: E402
from mmdet.models.data_preprocessors import DetDataPreprocessor  # noqa: E402
from mmdet.registry import DATASETS, HOOKS, MODELS  # noqa: E402
from mmengine.dist import broadcast  # noqa: E402
from mmengine.hooks import Hook  # noqa: E402
from mmengine.model import (  # noqa: E402
    BaseModel,
    MMDistributedDataParallel,
    is_model_wrapper,
)
from mmengine.registry import MODEL_WRAPPERS  # noqa: E402
from mmengine.runner import find_latest_checkpoint  # noqa: E402

__all__ = ["DFQCalibrationHook", "DFQCalibrationSet", "DFQDistiller", "DFQDistributed"]


def _join_processes() -> None:
    """Join the other processes of a run on CPUs; mmengine's launchers want a GPU to do it."""
    if (
        number("WORLD_SIZE", 1) > 1
        and not torch.cuda.is_available()
        and not torch.distributed.is_initialized()
    ):
        torch.distributed.init_process_group("gloo")


# At import, which is when a config is read: the Runner joins them itself if nobody has before.
_join_processes()


@MODEL_WRAPPERS.register_module()
class DFQDistributed(MMDistributedDataParallel):
    """mmengine's wrapper for several processes, on GPUs as on CPUs.

    Args:
        module: the model.
        device_ids: what mmengine's Runner takes for the index of this process's GPU; left out
            where there is none.
        options: of `DistributedDataParallel`.
    """

    def __init__(
        self, module: torch.nn.Module, device_ids: list[int] | None = None, **options: Any
    ) -> None:
        if next(module.parameters()).device.type == "cpu":
            device_ids = None
        super().__init__(module, device_ids=device_ids, **options)


@DATASETS.register_module()
class DFQCalibrationSet(CocoDataset):
    """A calibration set as a data set of mmdet; categories and files are the set's own.

    Args:
        data_root: the folder that `dfq synthesize` wrote.
        pipeline: as for any data set.

    Raises:
        UserError: the set is unfinished or damaged.
    """

    def __init__(self, data_root: str, **options: Any) -> None:
        calibration_set = CalibrationSet.open(Path(data_root)).require_intact()
        options.setdefault("metainfo", {"classes": tuple(calibration_set.names)})
        options.setdefault("ann_file", "annotations.json")
        options.setdefault("data_prefix", {"img": "images/"})
        # Images without an object are to stay empty for the student too.
        options.setdefault("filter_cfg", {"filter_empty_gt": False})
        super().__init__(data_root=str(data_root), **options)


@MODELS.register_module()
class DFQDistiller(BaseModel):
    """The quantized student of a detector, which learns from the float one.

    In `loss` mode it gives the terms of dfq's training, weighted as the recipe says. Validation and
    test go to the student as mmdet knows it, with its own preprocessing and rescaling, so that any
    evaluator of mmdet measures it. The teacher is not part of the state dict.

    Args:
        config: the detector's own config, or the name of one that comes with mmdet.
        checkpoint: its float weights; None: random ones.
        recipe: name or file of a recipe, of which `quantization`, `distillation` and
            `synthesis.masks` count.
        overrides: `section.key=value` texts that change the recipe.

    Raises:
        UserError: for anything the user can mend.
    """

    def __init__(
        self,
        config: str,
        checkpoint: str | None = None,
        recipe: str = "w8a8",
        overrides: tuple[str, ...] | list[str] = (),
        **_unused: Any,
    ) -> None:
        # To RGB in [0, 1], as dfq's detectors take it; they normalise themselves.
        super().__init__(
            data_preprocessor=DetDataPreprocessor(
                mean=[0.0] * 3, std=[255.0] * 3, bgr_to_rgb=True, pad_size_divisor=32
            )
        )
        self.recipe = load_recipe(recipe, overrides)
        require_supported(self.recipe)
        detector = load_detector(f"{config}@{checkpoint}" if checkpoint else config)
        if detector.family != "mmdet":
            raise UserError(f"{config}: is no detector of mmdet; train it with dfq qat")
        # Not modules: they are neither saved nor trained nor moved with this one.
        self._teacher = float_start(detector, self.recipe.quantization, Silent())
        self._student = insert_quantizers(detector.clone(), self.recipe.quantization.policy())
        self._student.mask_targets = self.recipe.synthesis.masks
        self.student = self._student.module
        self._frozen: FrozenIntegers | None = None
        if self.recipe.quantization.ranges == "lsq":
            clip_strictly(self.student)
        settings = self.recipe.distillation
        require_gradients(self.student, frozen_layers(self._student, settings))
        self._names = distilled_layers(self._student, settings)

    def init_weights(self) -> None:
        """Nothing: the weights are the detector's."""

    def train(self, mode: bool = True) -> DFQDistiller:
        """As any module's; but student and teacher stay in eval mode, without dropped paths."""
        super().train(mode)
        self.student.eval()
        return self

    def prepare(self, images: Tensor) -> None:
        """Find the quantizers' initial scales and round the weights as the recipe says.

        Args:
            images: uint8 `(n, 3, h, w)`, RGB, the first ones of the training set.
        """
        self._teacher.to(self._student.device)
        calibrate_and_round(
            self._student, self._teacher, images, self.recipe.quantization, Silent()
        )

    def freeze_integers(self) -> None:
        """Keep the integers of the weights that the recipe does not train, as they are now; those
        of a checkpoint that is loaded later take their place.

        They are buffers: to be made before anything copies the model or counts its buffers.
        """
        if self._frozen is None:
            self._frozen = FrozenIntegers(frozen_layers(self._student, self.recipe.distillation))

    def forward(
        self, inputs: Tensor, data_samples: list[Any] | None = None, mode: str = "tensor"
    ) -> Any:
        """The loss terms in `loss` mode, else the student's raw predictions.

        Args:
            inputs: `(n, 3, h, w)`, RGB in [0, 1].
            data_samples: mmdet's, with the labels; for the task term only.
            mode: "loss" or "tensor".
        """
        if mode != "loss":
            return self._student.raw(inputs)
        if self._teacher.device != inputs.device:
            self._teacher.to(inputs.device)
        settings, targets = self.recipe.distillation, Targets.empty()
        self.freeze_integers()
        if settings.weights.task > 0:
            targets = _targets(data_samples or [], (inputs.shape[2], inputs.shape[3]))
        # Evaluation runs the student as well: the feature_hooks are there for this pass only.
        with (
            closing(FeatureHooks(self.student, self._names)) as ours,
            closing(FeatureHooks(self._teacher.module, self._names)) as theirs,
        ):
            terms = training_terms(
                self._student,
                self._teacher,
                inputs,
                targets,
                settings,
                ours,
                theirs,
                precision=resolve_precision(settings.precision, inputs.device, "distillation"),
            )
        return {f"loss_{name}": term for name, term in terms.items()}

    def val_step(self, data: Any) -> list[Any]:
        """Detections of the student, by mmdet."""
        return self.student.val_step(data)

    def test_step(self, data: Any) -> list[Any]:
        """Detections of the student, by mmdet."""
        return self.student.test_step(data)


def _targets(samples: list[Any], shape: tuple[int, int]) -> Targets:
    """mmdet's labels as dfq's."""
    height, width = shape
    rows = []
    for sample in samples:
        truth = sample.gt_instances
        boxes = getattr(truth.bboxes, "tensor", truth.bboxes)
        corners = boxes / boxes.new_tensor([width, height, width, height])
        centres, sides = (corners[:, :2] + corners[:, 2:]) / 2, corners[:, 2:] - corners[:, :2]
        rows.append(torch.cat([truth.labels[:, None].to(boxes), centres, sides], dim=1))
    return Targets.from_per_image(rows)


@HOOKS.register_module()
class DFQCalibrationHook(Hook):
    """Prepares a `DFQDistiller` before training.

    Scales are found, and weights rounded, on the first images of the training set, as many as the
    recipe says; every process then has the first one's. A run that is resumed takes them from its
    checkpoint.
    """

    # Before hooks that copy the model, as the one for averaged weights does.
    priority = "VERY_HIGH"

    def before_train_iter(self, runner: Any, *_: Any, **__: Any) -> None:
        """Rates as dfq's own training has them, where the config brings no schedule: rising over
        the warm-up, then a cosine to zero."""
        if runner.param_schedulers:
            return
        settings = _distiller(runner).recipe.distillation
        share = rate_at(runner.iter, runner.max_iters, settings.warmup)
        for group in runner.optim_wrapper.param_groups:
            # Kept in checkpoints, as all that a group holds.
            group["lr"] = group.setdefault("dfq_peak", group["lr"]) * share

    def before_run(self, runner: Any) -> None:
        model = _distiller(runner)
        if not _loads(runner):
            model.prepare(_first_images(runner, model))
            for value in model.student.state_dict().values():
                broadcast(value)
        model.freeze_integers()

    def before_save_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        # torch reads nothing but numbers and tensors of its own accord, and mmengine's buffers of
        # what was logged bring their functions along: no run could be resumed from them.
        hub = checkpoint["message_hub"]
        hub["log_scalars"] = {}
        hub["runtime_info"] = {
            key: value.item() if isinstance(value, np.generic) else value
            for key, value in hub["runtime_info"].items()
            if isinstance(value, bool | int | float | str | np.generic | type(None))
        }

    def after_load_checkpoint(self, runner: Any, checkpoint: dict[str, Any]) -> None:
        # Bounds of the weights, in checkpoints of earlier versions; empty where they were none.
        if runner._resume and checkpoint.get("dfq_leash"):
            raise UserError(
                f"{runner.work_dir}: was begun with distillation.drift, which this version does "
                "not have; go on with the version that began it, or train into another folder"
            )


def _distiller(runner: Any) -> DFQDistiller:
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    if not isinstance(model, DFQDistiller):
        raise UserError(f"DFQCalibrationHook is for a DFQDistiller, not a {type(model).__name__}")
    return model


def _loads(runner: Any) -> bool:
    """Whether a checkpoint will be loaded; a run may be told to resume before there is one."""
    if runner._load_from is not None:
        return True
    return bool(runner._resume) and find_latest_checkpoint(runner.work_dir) is not None


def _first_images(runner: Any, model: DFQDistiller) -> Tensor:
    dataset, section = runner.train_dataloader.dataset, model.recipe.quantization
    wanted = min(images_to_prepare(section), len(dataset))
    images = [dataset[index]["inputs"] for index in range(wanted)]
    if len({tuple(image.shape) for image in images}) != 1:
        raise UserError(
            "DFQCalibrationHook: the images of the training set are not all of one size; train on "
            "a set that dfq synthesize wrote"
        )
    # As LoadImageFromFile gives them: BGR.
    return torch.stack(images).flip(1)
