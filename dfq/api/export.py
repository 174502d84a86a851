"""`dfq export`: a detector or a run as a file that a runtime executes."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..data.training_images import open_training_data
from ..errors import UserError, argument, shown
from ..export.exported import FORMATS, RUNTIMES, SUFFIXES, ExportInfo
from ..export.program import build
from ..export.replacing import is_placed_for, place_for
from ..export.suppression import OUTPUTS
from ..export.writers import files_of, write
from ..graph.fold_batchnorm import fold
from ..models.base import Model
from ..quantization.inspection import LayerInfo, list_layers, quantized_share
from ..quantization.layers import QUANTIZED_LAYERS
from ..quantization.placement import PLACEMENTS
from ..quantization.policy import Policy
from ..runs.folder import check_run, is_run
from ..runs.loading import load_model, require_weights
from ..runs.set_cache import sets_of_run
from ..runtime.files import require_output_file, user_path
from ..runtime.surroundings import Report, reporter

RANGE_IMAGES = 64
"""Images that ranges are found on, where a run's quantizers stand elsewhere than a runtime's."""


def export(
    model: str | Path | Model,
    out: str | Path,
    *,
    format: str | None = None,
    runtime: str | None = None,
    image_size: int | None = None,
    batch: int | None = 1,
    int4: bool = False,
    data: str | Path | None = None,
    nms: float | None = None,
    trust: bool = False,
    progress: Report = None,
) -> Path:
    """Write a run, or a float detector, as a file that a runtime executes.

    Args:
        model: a run folder, or what names a float detector.
        out: the file; its suffix says the format where `format` does not.
        format: "onnx", "openvino", "litert" or "torch".
        runtime: that is to execute it; None: the usual one of the format.
        image_size: side in pixels; None: the detector's own.
        batch: images a call takes; None: any number (not LiteRT).
        int4: ONNX alone: weights of 4 bits and fewer are stored as INT4.
        data: images to find ranges on, where the run was not made for this runtime; None: the set
            that it was made on, else the one of its network that the cache has.
        nms: ONNX and OpenVINO alone: the runtime's own NMS is part of the file, and leaves out
            detections with lower scores than this; None: what the file gives is before NMS.
        trust: run what is in a checkpoint.
        progress: told how far it is.

    Returns:
        The file written.

    Raises:
        UserError: for anything the user can mend; nothing is written then.

    Example:
        >>> dfq.export("run", "demo.onnx", image_size=64, data="set").name
        'demo.onnx'
    """
    told = reporter(progress)
    path = user_path(out, "--out", file=True)
    format, runtime = choose(path, format, runtime)
    if path.suffix.lower() != SUFFIXES[format]:
        path = path.with_name(path.name + SUFFIXES[format])
    _check(format, batch, int4)
    _check_nms(nms, format)
    inputs = (str(model), str(data) if data else None)
    for file in files_of(path, format):
        require_output_file(file, "out", inputs)
    detector = model if isinstance(model, Model) else load_model(model, trust=trust)
    require_weights(detector)
    size = image_size or detector.image_size
    detector.check_size(size, "--image-size")
    for file in files_of(path, format, detector.parts(size)):
        require_output_file(file, "out", inputs)
    refuse_widths(detector, runtime)
    if nms is not None:
        _require_decoded(detector, size)
    ranges = None
    folder = user_path(model) if not isinstance(model, Model) else None
    manifest = check_run(folder) if folder is not None and is_run(folder) else None
    if manifest is None:
        detector = fold(detector.clone())
        policy = None
    else:
        policy = Policy.from_dict(manifest["policy"])
        if policy.activation_ranges == "dynamic":
            raise UserError(
                f"{model}: its activations have dynamic ranges, a baseline that dfq does not "
                "export; make a run with quantization.activation_ranges: static"
            )
        if policy.softmax != "uniform":
            raise UserError(
                f"{model}: outputs of softmax are powers of two in it, a baseline that dfq does "
                "not export; make a run with quantization.softmax: uniform"
            )
        if policy.weight_grid == "piecewise":
            raise UserError(
                f"{model}: its weights are on piecewise grids, a baseline that dfq does not "
                "export; make a run with quantization.weight_grid: asymmetric"
            )
        if runtime != "torch" and not is_placed_for(policy, runtime):
            told.note(
                f"ranges: this run has its quantizers where {_where(policy)}; those that {runtime} "
                "needs are found now. To train with them: "
                f"--set quantization.placement=qdq --set quantization.runtime={runtime}"
            )
            pixels = range_images(detector, range_source(manifest, data))
            ranges = digest_of(pixels)
            images = (batch.float() / 255 for batch in pixels.split(8))
            detector, policy = place_for(detector, policy, runtime, images)
    if any(isinstance(m, QUANTIZED_LAYERS) for m in detector.module.modules()) and policy is None:
        raise UserError(f"{argument('model')}: give the run's folder, not its loaded detector")
    for line in remarks(policy, runtime, int4, list_layers(detector, size)):
        told.note(line)
    with told.task("export", 2, "steps") as task:
        program = build(detector, runtime, image_size=size, dynamic=batch is None, batch=batch or 1)
        several = format != "litert"
        parts = {
            name: build(detector, runtime, image_size=size, dynamic=several, part=name)
            for name in detector.parts(size)
        }
        task.update(1, 2)
        info = describe_export(detector, policy, format, runtime, size, batch, manifest)
        info = info.model_copy(update={"ranges": ranges})
        if nms is not None:
            info = info.model_copy(update={"nms": nms, "outputs": OUTPUTS})
        path.parent.mkdir(parents=True, exist_ok=True)
        written = write(program, info, path, int4=int4, parts=parts)
        task.update(2, 2)
    return written[0]


def choose(path: Path, format: str | None, runtime: str | None) -> tuple[str, str]:
    """Format and runtime, where one or both may be left to the other or to a file's suffix.

    Raises:
        UserError: nothing says which, or they exclude each other.
    """
    suffixes = {suffix: name for name, suffix in SUFFIXES.items()}
    if format is None:
        format = suffixes.get(path.suffix.lower())
    if format is None and runtime is not None:
        format = next((f for f, runtimes in RUNTIMES.items() if runtime in runtimes), None)
    if format is None:
        raise UserError(
            f"{argument('format')}: which? one of {', '.join(FORMATS)}, or an --out that ends in "
            f"{', '.join(SUFFIXES.values())}"
        )
    if format not in RUNTIMES:
        raise UserError(f"{argument('format', format)}: no such format; {', '.join(FORMATS)}")
    runtime = runtime or RUNTIMES[format][0]
    if runtime not in RUNTIMES[format]:
        known = {name for runtimes in RUNTIMES.values() for name in runtimes}
        if runtime not in known:
            raise UserError(
                f"{argument('runtime', runtime)}: no such runtime; {', '.join(sorted(known))}"
            )
        fits = [name for name, runtimes in RUNTIMES.items() if runtime in runtimes]
        raise UserError(
            f"{argument('runtime', runtime)}: does not execute the format {format}; "
            f"use --format {fits[0]}, or --runtime {RUNTIMES[format][0]}"
        )
    if path.suffix.lower() in suffixes and suffixes[path.suffix.lower()] != format:
        raise UserError(
            f"{argument('out', path)}: ends as a file of the format "
            f"{suffixes[path.suffix.lower()]}, and the format is {format}"
        )
    return format, runtime


def _check(format: str, batch: int | None, int4: bool) -> None:
    if int4 and format != "onnx":
        raise UserError("--pack int4: ONNX alone has 4-bit integers; leave it out")
    if batch is not None and batch < 1:
        raise UserError(f"--batch {batch}: 1 or more, or dynamic")
    if format == "litert" and batch != 1:
        raise UserError("--batch: LiteRT takes one image a call; leave it out")


def _check_nms(nms: float | None, format: str) -> None:
    if nms is None:
        return
    if format not in ("onnx", "openvino"):
        raise UserError(
            f"--nms: {format} has no NMS that every runtime of it executes; leave it out"
        )
    if not 0 <= nms < 1:
        raise UserError(f"--nms {nms}: a score from 0 to below 1")


def _require_decoded(detector: Model, image_size: int) -> None:
    """NMS needs boxes and scores."""
    if getattr(detector, "nms_free", False):
        raise UserError("--nms: this network needs no NMS: its best boxes are its detections")
    if set(_outputs(detector, image_size)) != {"boxes", "scores"}:
        raise UserError(
            f"--nms: files of {detector.family} give what is decoded outside of them; leave it out"
        )


def _outputs(detector: Model, image_size: int) -> dict[str, Tensor]:
    with torch.no_grad():
        raw = detector.exportable(torch.zeros(1, 3, image_size, image_size))
        return detector.outputs(raw, (image_size, image_size))


def _where(policy: Policy) -> str:
    if policy.placement == "qdq":
        return f"{policy.runtime} needs them"
    if policy.placement == "everywhere":
        return "layers, sums and concatenations have theirs"
    return "the inputs of layers are"


def range_source(manifest: dict[str, Any], data: str | Path | None) -> str | Path:
    """What to find a run's ranges on: what is named, else the set that it was made on, else its
    network's newest set in the cache."""
    if data is not None:
        return data
    sets = sets_of_run(manifest)
    if not sets:
        raise UserError(
            f"{argument('data')}: ranges have to be found for this runtime, the set that the run "
            "was made on is not where it was, and no calibration set of this network is in the "
            "cache; name the set or some photos"
        )
    return sets[0]


def range_images(detector: Model, source: str | Path) -> Tensor:
    """Images to find ranges on: uint8 `(n, 3, s, s)`."""
    images = open_training_data(source, detector, None)
    return images.load(list(range(min(RANGE_IMAGES, len(images)))))


def digest_of(pixels: Tensor) -> str:
    """Tells the images that ranges were found on from others."""
    return hashlib.sha256(pixels.contiguous().numpy().tobytes()).hexdigest()


def refuse_widths(detector: Model, runtime: str) -> None:
    """Refuse what a runtime, or its converter, has no integers for.

    Raises:
        UserError: a layer's activations have more bits than the runtime's, or fewer than its
            converter has limits for.
    """
    if runtime not in PLACEMENTS:
        return
    kernels = PLACEMENTS[runtime]
    for row in list_layers(detector, detector.stride * 2):
        if not row.quantized or kernels.least_bits <= row.activation_bits <= kernels.most_bits:
            continue
        than = "more" if row.wide else "fewer"
        raise UserError(
            f"{argument('runtime', runtime)}: no activations of {than} than 8 bits, as "
            f"'{row.name}' has; make the run with 8 bits or float there, or export for another "
            "runtime"
        )


def remarks(
    policy: Policy | None, runtime: str, int4: bool, layers: Sequence[LayerInfo]
) -> list[str]:
    """What a user should know of a file before it is written.

    Args:
        policy: of the run; None: of a float detector.
        runtime: that is to execute it.
        int4: weights are stored as INT4.
        layers: as they are exported.
    """
    if policy is None:
        return []
    lines = []
    floating = [row.name for row in layers if not row.quantized and row.macs]
    if floating:
        names = ", ".join(floating[:3]) + (", ..." if len(floating) > 3 else "")
        share = 1 - quantized_share(layers)
        lines.append(f"{share:.1%} of the multiply-accumulates stay in float: {names}")
    if policy.weight_bits < 8:
        stored = "INT4" if int4 and policy.weight_bits <= 4 else "int8"
        lines.append(
            f"weights of {policy.weight_bits} bits are stored as {stored}: {runtime} computes with "
            "them as with 8 bits, so fewer bits save storage and no time"
        )
    if any(row.activation_bits < 8 for row in layers):
        lines.append(
            f"activations of fewer than 8 bits are computed as 8 bits by {runtime}: they save "
            "nothing"
        )
    wide = [row for row in layers if row.wide]
    if wide:
        share = sum(row.macs for row in wide) / max(1, sum(row.macs for row in layers))
        lines.append(
            f"{share:.1%} of the multiply-accumulates have activations of more than 8 bits: "
            f"{runtime} computes these in float"
        )
    return lines


def describe_export(
    detector: Model,
    policy: Policy | None,
    format: str,
    runtime: str,
    image_size: int,
    batch: int | None,
    manifest: dict[str, Any] | None,
) -> ExportInfo:
    """What the file says of itself."""
    outputs = _outputs(detector, image_size)
    understood = set(outputs) in ({"boxes", "scores"}, {"logits"})
    meaning = {
        "boxes": "x1 y1 x2 y2 in pixels of the letterboxed image, before NMS",
        "scores": "probability of each category, before NMS",
        "logits": "of each category, before softmax",
    }
    source = _without_folders(detector.source)
    bits = (32, 32) if policy is None else (policy.weight_bits, policy.activation_bits)
    return ExportInfo.model_validate(
        {
            "format": format,
            "runtime": runtime,
            "family": detector.family,
            "names": list(detector.names),
            "image_size": image_size,
            "stride": detector.stride,
            "batch": batch,
            "dynamic": batch is None,
            "weight_bits": bits[0],
            "activation_bits": bits[1],
            "precision": "float32" if policy is None else "W{}A{}".format(*bits),
            "checkpoint": manifest["identity"]["checkpoint"] if manifest else detector.fingerprint,
            "model_sha256": manifest["model_sha256"] if manifest else None,
            "source": source,
            "letterbox": detector.resizing(image_size),
            "normalisation": "within the graph; images are RGB, float32 in [0, 1], n x 3 x h x w",
            "outputs": {
                name: meaning[name] if understood else "raw predictions of the family"
                for name in outputs
            },
            "spec": {**detector.spec(), "source": source},
        }
    )


def _without_folders(source: str) -> str:
    """What names a detector, for a file that goes elsewhere: where it lay is nobody's business.
    `network@weights` names two."""
    of_packages = ("torchvision/", "timm/")
    parts = (
        part if part.startswith(of_packages) else Path(part).name or part
        for part in source.split("@")
    )
    return shown("@".join(parts))
