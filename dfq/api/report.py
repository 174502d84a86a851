"""`dfq report`: the page of a run, drawn from what the run's folder says."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from ..data.pixels import LabelledImages
from ..errors import UserError, argument, shown
from ..evaluation.measuring import RealSet
from ..models.base import Model
from ..quantization.inspection import LayerInfo
from ..report.material import Comparison, Material, gather
from ..report.page import render
from ..report.sections import sections
from ..runs.folder import Run, check_run, is_run, load_run, read_metrics
from ..runtime.files import json_bytes, require_output_file, user_path, write_atomic
from ..runtime.progress import Progress

NAME = "report.html"
"""Of the page in a run's folder."""


def report(
    run: str | Path, out: str | Path | None = None, *, comparison: Comparison | None = None
) -> Path:
    """Draw the page of a finished run. It holds images of the run's set and photos, if they are
    still there, and needs no network to be read.

    Args:
        run: its folder.
        out: the HTML file; None: `report.html` in the run's folder.
        comparison: of the run's network with others, to be shown as well.

    Returns:
        The file.

    Raises:
        UserError: for anything the user can mend.

    Example:
        >>> dfq.report("run").name
        'report.html'
    """
    folder = user_path(run)
    if not is_run(folder):
        raise UserError(f"{shown(folder)}: is no run; give a folder that dfq qat has written")
    file = folder / NAME if out is None else user_path(out, argument("out"), file=True)
    if file.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{argument('out', file)}: is written as HTML; end its name in .html")
    require_output_file(file, "out", (folder,))
    manifest = check_run(folder)
    material = gather(
        folder, manifest, read_metrics(folder), load_run(folder), comparison=comparison
    )
    page = draw(material)
    file.parent.mkdir(parents=True, exist_ok=True)
    # Looked at again: drawing took its time.
    require_output_file(file, "out", (folder,))
    write_atomic(file, page)
    return file


def draw(material: Material) -> bytes:
    """The page of what was gathered."""
    return render(sections(material))


def drawing_of(
    run: Run,
    metrics: Mapping[str, Any],
    student: Model,
    layers: list[LayerInfo],
    teacher: Model,
    data: LabelledImages,
    photos: RealSet | None,
    progress: Progress,
) -> Callable[[Mapping[str, Any]], None]:
    """What draws the page of a run that is about to be finished, given its manifest.

    Args:
        run: the run.
        metrics: what it measured.
        student, layers: its network, and what `list_layers` says of that.
        teacher: the folded float network.
        data: the whole set that it was made on.
        photos: real images that it was looked at on.
        progress: told where the page cannot be drawn, which is no reason to lose a run.
    """

    def write(manifest: Mapping[str, Any]) -> None:
        file = run.folder / NAME
        try:
            # Of a run that has lost its model.
            file.unlink(missing_ok=True)
            # As they will be read again, keys in their order too.
            told, measured = (json.loads(json_bytes(value)) for value in (manifest, metrics))
            material = gather(
                run.folder, told, measured, student,
                teacher=teacher, data=data, photos=photos, layers=layers,
            )  # fmt: skip
            write_atomic(file, draw(material))
        except Exception as error:
            line = f"warning: {NAME} could not be drawn ({type(error).__name__}: {shown(error)})"
            run.log(line)
            progress.note(f"{line}; the run is complete, and dfq report tries again")

    return write
