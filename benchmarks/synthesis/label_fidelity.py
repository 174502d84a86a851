"""How close the labels of sets are to those of a real set.

    python -m benchmarks.synthesis.label_fidelity adaptive single tile --real coco-val

Prints a Markdown table of distances (0 is equal). Its first row compares two halves of the real
set, drawn at random: the distance that chance alone gives between sets of that size.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import click
import numpy as np

from benchmarks.common import benchmark, header, line
from dfq.data.calibration_set import CalibrationSet
from dfq.data.readers import open_set
from dfq.data.statistics import Objects
from dfq.errors import UserError
from dfq.evaluation.label_fidelity import Fidelity, compare

COLUMNS = (
    *("images:", "objects / image:", "categories (JS, bits):"),
    *("area (W1):", "ln aspect (W1):", "objects / image (W1):"),
)


def objects_of(source: str) -> Objects:
    """The objects of a SET: one of dfq's, or any real one."""
    path = Path(source)
    data = CalibrationSet.open(path) if CalibrationSet.is_one(path) else open_set(path)
    return Objects.of(data)


def row(name: str, objects: Objects, found: Fidelity) -> str:
    """One line of the table."""
    return line(
        name,
        objects.images,
        f"{len(objects) / objects.images:.2f}",
        f"{found.categories:.3f}",
        f"{found.area:.4f}",
        f"{found.aspect:.3f}",
        f"{found.count:.2f}",
    )


def halves(objects: Objects, seed: int) -> tuple[Objects, Objects]:
    """Two halves of the images, drawn at random."""
    first = np.zeros(objects.images, bool)
    order = np.random.default_rng(seed).permutation(objects.images)
    first[order[: objects.images // 2]] = True
    return objects.where(first), objects.where(~first)


def table(sources: Sequence[str], real: str, seed: int = 0) -> str:
    """The Markdown table of the sets `sources` against `real`."""
    reference = objects_of(real)
    one, other = halves(reference, seed)
    lines = header("labels", *COLUMNS).splitlines()
    if len(one) and len(other):
        lines.append(row("half of the real set, against the other", one, compare(one, other)))
    for source in sources:
        objects = objects_of(source)
        try:
            lines.append(row(source, objects, compare(objects, reference)))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    return "\n".join(lines)


@benchmark(__doc__)
@click.argument("sets", nargs=-1, required=True)
@click.option("--real", required=True, help="The real set that the sets are compared with.")
@click.option("--seed", default=0, show_default=True, help="Of the halves.")
def main(sets: tuple[str, ...], real: str, seed: int) -> None:
    print(table(sets, real, seed))


if __name__ == "__main__":
    main()
