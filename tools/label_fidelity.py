"""How close the labels of sets are to those of a real set.

    python tools/label_fidelity.py --sets adaptive single tile --real coco-val

Prints a Markdown table of distances (0 is equal). Its first row compares two halves of the real
set, drawn at random: what chance alone makes of sets of that size.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np

from dfq.data.calibration_set import CalibrationSet
from dfq.data.readers import open_set
from dfq.data.statistics import Objects
from dfq.errors import UserError
from dfq.evaluation.label_fidelity import Fidelity, compare

HEADER = [
    "| labels | images | objects / image | categories (JS, bits) | area (W1) | "
    "ln aspect (W1) | objects / image (W1) |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def objects_of(source: str) -> Objects:
    """The objects of a SET: one of dfq's, or any real one."""
    path = Path(source)
    data = CalibrationSet.open(path) if CalibrationSet.is_one(path) else open_set(path)
    return Objects.of(data)


def row(name: str, objects: Objects, found: Fidelity) -> str:
    """One line of the table."""
    mean = len(objects) / objects.images
    return (
        f"| {name} | {objects.images} | {mean:.2f} | {found.categories:.3f} | {found.area:.4f} | "
        f"{found.aspect:.3f} | {found.count:.2f} |"
    )


def halves(objects: Objects, seed: int) -> tuple[Objects, Objects]:
    """Two halves of the images, drawn at random."""
    first = np.zeros(objects.images, bool)
    order = np.random.default_rng(seed).permutation(objects.images)
    first[order[: objects.images // 2]] = True
    return objects.where(first), objects.where(~first)


def table(sources: list[str], real: str, seed: int = 0) -> str:
    """The Markdown table of the sets `sources` against `real`."""
    reference = objects_of(real)
    one, other = halves(reference, seed)
    lines = [*HEADER]
    if len(one) and len(other):
        lines.append(row("half of the real set, against the other", one, compare(one, other)))
    for source in sources:
        objects = objects_of(source)
        try:
            lines.append(row(source, objects, compare(objects, reference)))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sets", nargs="+", required=True, help="The sets to compare.")
    parser.add_argument("--real", required=True, help="The real set they are compared with.")
    parser.add_argument("--seed", type=int, default=0, help="Of the halves.")
    given = parser.parse_args()
    try:
        print(table(given.sets, given.real, given.seed))
    except UserError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
