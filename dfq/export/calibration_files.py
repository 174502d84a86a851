"""The calibration set of another tool as files, which need no dfq where that tool runs."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from ..data.calibration_set import CalibrationSet
from ..data.export_layouts import export_yolo, new_folder, require_new_folder, write_yolo
from ..data.image_set import ImageSet
from ..errors import UserError, shown
from ..runtime.files import user_path
from .calibration_images import CalibrationImages, Layout

SNIPPETS = Path(__file__).with_name("snippets")


@dataclass(frozen=True)
class Tool:
    """How a tool takes its calibration set.

    Attributes:
        write: fills a new folder.
        result: the file in it that the tool, or the user, begins with.
        command: what to do next; `{out}` is the folder, `{side}` the images' side.
    """

    write: Callable[[CalibrationImages, Path], None]
    result: str
    command: str


def export_for(
    tool: str,
    data: CalibrationSet | ImageSet | str | Path,
    out: Path,
    image_size: int | None = None,
) -> tuple[Path, int, str]:
    """Write a set as the calibration set of a tool.

    The folder appears under its name only when it is whole, and nothing is written outside it.

    Args:
        tool: one of `TOOLS`.
        data, image_size: see `CalibrationImages.open`.
        out: the folder; must not exist, or be empty, and be no link.

    Returns:
        The path of the tool's `result`, the number of images, and the command to go on with.

    Raises:
        UserError: there is no such tool, something is in the way of `out`, or the set is damaged.
    """
    entry = find_tool(tool)
    out = require_new_folder(out)
    images = CalibrationImages.open(data, image_size)
    _require_apart(images.source, out)
    if tool == "ultralytics" and isinstance(images.source, CalibrationSet):
        export_yolo(images.source, out)
    else:
        with new_folder(out) as folder:
            entry.write(images, folder)
    command = entry.command.format(out=shlex.quote(str(out)), side=images.side)
    return out / entry.result, len(images), command


def find_tool(name: str) -> Tool:
    """The tool of that name.

    Raises:
        UserError: there is none; all are listed.
    """
    if name not in TOOLS:
        raise UserError(f"--for {shown(name)}: no such tool; there are {', '.join(TOOLS)}")
    return TOOLS[name]


def _require_apart(source: CalibrationSet | ImageSet, out: Path) -> None:
    """Refuse a folder that is searched when a folder of bare images is read again."""
    if isinstance(source, ImageSet) and not source.labelled:
        root = user_path(source.source)
        if out.resolve().is_relative_to(root.resolve()):
            raise UserError(
                f"--out {shown(out)}: would be among the photos in {shown(root)}; "
                "write it elsewhere"
            )


def _ultralytics(images: CalibrationImages, folder: Path) -> None:
    write_yolo(
        folder,
        images.names,
        ((name, png, images.label(index)) for index, (name, png) in enumerate(_pngs(images))),
    )


def _rknn(images: CalibrationImages, folder: Path) -> None:
    (folder / "images").mkdir()
    lines = []
    for name, png in _pngs(images):
        (folder / "images" / name).write_bytes(png)
        # No path of this machine, in which a blank would part two inputs.
        lines.append(f"images/{name}\n")
    (folder / "dataset.txt").write_text("".join(lines))
    _snippet("rknn_int8", folder)


def _hailo(images: CalibrationImages, folder: Path) -> None:
    _stack(images, folder / "calibration.npy", "nhwc", np.float32)
    (folder / "model.alls").write_text(
        "normalization1 = normalization([0.0, 0.0, 0.0], [255.0, 255.0, 255.0])\n"
        f"model_optimization_config(calibration, batch_size={min(8, len(images))}, "
        f"calibset_size={len(images)})\n"
    )


def _array(snippet: str) -> Callable[[CalibrationImages, Path], None]:
    """What writes `images.npy`, uint8 NCHW, and a script that uses it."""

    def write(images: CalibrationImages, folder: Path) -> None:
        _stack(images, folder / "images.npy", "nchw", np.uint8)
        _snippet(snippet, folder)

    return write


def _snippet(name: str, folder: Path) -> None:
    (folder / "calibrate.py").write_bytes((SNIPPETS / f"{name}.py").read_bytes())


def _stack(images: CalibrationImages, path: Path, layout: Layout, dtype: type[np.generic]) -> None:
    """Write all images, [0, 255], as one array of NumPy's format, without holding them at once."""
    side, axes = images.side, (2, 0, 1) if layout == "nchw" else (0, 1, 2)
    shape = (len(images), 3, side, side) if layout == "nchw" else (len(images), side, side, 3)
    header = {
        "descr": np.lib.format.dtype_to_descr(np.dtype(dtype)),
        "fortran_order": False,
        "shape": shape,
    }
    # Written and not mapped: a disk that is full is then an error and no signal.
    with path.open("xb") as file:
        np.lib.format.write_array_header_1_0(file, header)
        for index in range(len(images)):
            image = images.pixels(index).transpose(axes)
            file.write(np.ascontiguousarray(image, dtype).tobytes())


def _pngs(images: CalibrationImages) -> Iterator[tuple[str, bytes]]:
    """Name and PNG of each image, in order."""
    for index in range(len(images)):
        _, data = cv2.imencode(".png", cv2.cvtColor(images.pixels(index), cv2.COLOR_RGB2BGR))
        yield f"{index:08d}.png", data.tobytes()


TOOLS = {
    "ultralytics": Tool(
        _ultralytics,
        "data.yaml",
        "yolo export model=MODEL.pt format=onnx quantize=8 imgsz={side} data={out}/data.yaml",
    ),
    "onnxruntime": Tool(
        _array("onnxruntime_int8"),
        "calibrate.py",
        "python {out}/calibrate.py MODEL.onnx MODEL-int8.onnx",
    ),
    "openvino": Tool(
        _array("openvino_int8"),
        "calibrate.py",
        "python {out}/calibrate.py MODEL.xml MODEL-int8.xml",
    ),
    "nncf": Tool(
        _array("nncf_int8"),
        "calibrate.py",
        "python {out}/calibrate.py MODEL.onnx MODEL-int8.onnx",
    ),
    "ai-edge-quantizer": Tool(
        _array("ai_edge_quantizer_int8"),
        "calibrate.py",
        "python {out}/calibrate.py MODEL.tflite MODEL-int8.tflite",
    ),
    "mct": Tool(
        _array("mct_int8"),
        "calibrate.py",
        "from calibrate import representative_data_gen, with {out} on the Python path",
    ),
    "modelopt": Tool(
        _array("modelopt_int8"),
        "calibrate.py",
        "from calibrate import forward_loop, with {out} on the Python path",
    ),
    "rknn": Tool(
        _rknn, "dataset.txt", "python {out}/calibrate.py MODEL.onnx MODEL.rknn rk3588"
    ),
    "hailo": Tool(
        _hailo,
        "calibration.npy",
        "hailo optimize MODEL.har --hw-arch hailo8 --calib-set-path {out}/calibration.npy "
        "--model-script {out}/model.alls",
    ),
}  # fmt: skip
