"""`dfq predict`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from ..errors import UserError, shown
from ..runtime.files import json_bytes, require_apart, require_not_read
from .options import (
    PATH,
    checkpoint_option,
    common_options,
    output_file,
    output_folder,
    report_user_errors,
    write_json_output,
)

if TYPE_CHECKING:
    from ..evaluation.prediction import Prediction

_STDOUT = "-"


@click.command(short_help="Draw or list what a detector finds in images.")
@click.option("--model", required=True, help="A detector, a run folder or an exported file.")
@checkpoint_option
@click.argument("images", metavar="IMAGES...", nargs=-1)
@click.option(
    "--out",
    type=PATH,
    show_default="none are drawn",
    help="Folder for pictures with boxes (and masks, if the network predicts them), and "
    "detections.json.",
)
@click.option(
    "--json",
    "json_file",
    is_flag=False,
    flag_value=_STDOUT,
    metavar="[FILE.json]",
    help="Write what was found here; without a name that ends in .json, print it.",
)
@click.option(
    "--compare",
    metavar="FLOAT",
    show_default="none",
    help="Also detect with this float detector: pictures show it on the left, and how many "
    "detections agree is said.",
)
@click.option(
    "--threshold", type=float, default=0.25, show_default=True, help="Least score, 0 to 1."
)
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@common_options
@report_user_errors
def predict(
    model: str,
    images: tuple[str, ...],
    out: Path | None,
    json_file: str | None,
    compare: str | None,
    threshold: float,
    image_size: int | None,
    device: str,
    trust: bool,
) -> None:
    """Draw or list what a detector finds in IMAGES..., which are files or folders of them.

    Boxes are in pixels of the images: x1 y1 x2 y2. An image that cannot be read is named and left
    out.
    """
    from ..api.predict import predict as verb
    from ..data.photos import list_photos
    from ..evaluation.agreement import SAME_BOX
    from ..evaluation.prediction import agreed, counts
    from ..evaluation.prediction_picture import LIST
    from ..runtime.progress import Live

    if json_file not in (None, _STDOUT) and Path(json_file).suffix.lower() != ".json":
        # `--json photo.jpg` asks for the JSON of a photo, not for JSON in its place.
        images, json_file = (json_file, *images), _STDOUT
    if not images:
        raise UserError("which images? name files, or folders of them")
    out = output_folder(out)
    file = None
    if json_file not in (None, _STDOUT):
        file = output_file(json_file, inputs=(model, compare))
        require_apart(("json", file), ("out", out and out / LIST))
        require_not_read(file, "json", list_photos(images, without=out))
    predictions = verb(
        model,
        images,
        out=out,
        compare=compare,
        threshold=threshold,
        image_size=image_size,
        device=device,
        trust=trust,
        progress=Live(),
    )
    write_json_output(file, predictions.to_dict())
    if json_file == _STDOUT:
        click.echo(json_bytes(predictions.to_dict()).decode(), nl=False)
        return
    for prediction in predictions:
        if out is None:
            _print(prediction)
        if prediction.reference is not None:
            click.echo(f"{shown(prediction.file)}: {agreed(counts([prediction]))}")
    total = sum(map(len, predictions))
    line = f"{len(predictions)} images, {total} detections with a score of {threshold:g} or more"
    if predictions.unreadable:
        line += f"; {len(predictions.unreadable)} could not be read"
    click.echo(line)
    if compare is not None:
        click.echo(f"in all {agreed(counts(predictions))}: same category, IoU at least {SAME_BOX}")
    if out is not None:
        # Last, where scripts look for it.
        click.echo(str(out))


def _print(prediction: Prediction) -> None:
    """One row a detection."""
    count = f"{len(prediction)} detections" if len(prediction) != 1 else "1 detection"
    click.echo(f"{shown(prediction.file)} ({prediction.width} x {prediction.height}): {count}")
    names = [shown(name, limit=40) for name in prediction.categories]
    width = max(map(len, names), default=0)
    for name, score, box in zip(
        names, prediction.scores.tolist(), prediction.boxes.tolist(), strict=True
    ):
        corners = " ".join(f"{value:8.1f}" for value in box)
        click.echo(f"  {name:<{width}}  {score:.2f}  {corners}")
