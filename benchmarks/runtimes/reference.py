"""AP of a file, of its run in the same integers by PyTorch, and of its run in PyTorch's float32.

    python -m benchmarks.runtimes.reference --file yolov5n.xml --run RUN --data coco-val

The middle one is the reference that `dfq verify` holds a file against, here on every image of a
labelled set. Prints one line of Markdown: on how many images all outputs are the file's but for
their last bits, and the three APs.
"""

from __future__ import annotations

from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.common import benchmark, header, line
from dfq.data.readers import open_set
from dfq.errors import UserError
from dfq.evaluation.coco import Detecting, predict, score
from dfq.export.exported import ExportInfo
from dfq.export.integer import KERNELS
from dfq.export.opened import OpenedDetector, open_exported
from dfq.export.parity import parity
from dfq.export.reference import program_of, reference_outputs
from dfq.models import require_detector
from dfq.models.base import Model
from dfq.runs.folder import load_run


class Reference(OpenedDetector):
    """A file whose outputs PyTorch gives, in the runtime's integers.

    Attributes:
        equal, images: on how many of how many images the file gave the same.
    """

    def __init__(self, opened: OpenedDetector, source: Model) -> None:
        super().__init__(opened.file, opened.info, opened.parts)
        self.program = program_of(opened.info, source)
        self.equal = self.images = 0

    def run(self, images: np.ndarray) -> dict[str, np.ndarray]:
        rows = []
        for image in np.split(images, len(images)):
            row = reference_outputs(self.program, torch.from_numpy(image), self.info.runtime)
            given = super().run(image)
            self.images += 1
            self.equal += parity(row, given, None).is_exact
            rows.append(row)
        return self._joined(rows, 1, len(images))


def require_known(info: ExportInfo) -> None:
    """Raise a `UserError` where the runtime's arithmetic is not known, or boxes are suppressed in
    the file."""
    if info.runtime not in KERNELS:
        raise UserError(f"{info.runtime}: its arithmetic is not known; {', '.join(KERNELS)} are")
    if info.nms is not None:
        raise UserError("a file that suppresses boxes itself; export it without --nms")


@benchmark(__doc__)
@click.option("--file", required=True, help="An export of the run.")
@click.option("--run", required=True, help="The run's folder.")
@click.option("--data", required=True, help="A labelled set.")
@click.option("--threads", default=1, show_default=True)
def main(file: str, run: str, data: str, threads: int) -> None:
    torch.set_num_threads(threads)
    opened = open_exported(file, threads=threads)
    if not isinstance(opened, OpenedDetector):
        raise UserError(f"{file}: not a detector")
    require_known(opened.info)
    images, source = open_set(data), require_detector(load_run(run))
    reference = Reference(opened, source)
    models: dict[str, Detecting] = {
        "file": opened,
        "its integers by PyTorch": reference,
        "PyTorch's float32": source,
    }
    figures = []
    for model in models.values():
        found = predict(model, images, image_size=opened.image_size)
        figures.append(f"{score(images, found, opened.names).AP:.4f}")
    print(header("file", "equal images:", *(f"AP, {name}:" for name in models)))
    print(line(Path(file).name, f"{reference.equal} of {reference.images}", *figures))


if __name__ == "__main__":
    main()
