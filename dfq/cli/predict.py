"""`dfq predict`."""

from __future__ import annotations

from pathlib import Path

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

_STDOUT = "-"


@click.command(short_help="Draw or list what a model says of images.")
@click.option(
    "--model", required=True, help="A detector or classifier, a run folder or an exported file."
)
@checkpoint_option
@click.argument("images", metavar="IMAGES...", nargs=-1)
@click.option(
    "--out",
    type=PATH,
    show_default="none are drawn",
    help="Folder for pictures with boxes (and masks, if the network predicts them), or of a "
    "classifier with categories; and detections.json, or classes.json.",
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
    help="Also ask this float model: pictures show it on the left, and how far both agree is said.",
)
@click.option(
    "--threshold", type=float, show_default="0.25", help="Least score of detections, 0 to 1."
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
    threshold: float | None,
    image_size: int | None,
    device: str,
    trust: bool,
) -> None:
    """Draw or list what a detector finds in IMAGES..., which are files or folders of them, or the
    five categories that a classifier finds likeliest.

    Boxes are in pixels of the images: x1 y1 x2 y2. An image that cannot be read is named and left
    out.
    """
    from ..api.predict import predict as verb
    from ..api.predicting import ASKING
    from ..data.photos import list_photos
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
        for listed in (asking.listed for asking in ASKING.values()):
            require_apart(("json", file), ("out", out and out / listed))
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
            for row in prediction.lines():
                click.echo(row)
        if prediction.reference is not None:
            click.echo(f"{shown(prediction.file)}: {prediction.comparison()}")
    line = f"{len(predictions)} images, {predictions.summary()}"
    if predictions.unreadable:
        line += f"; {len(predictions.unreadable)} could not be read"
    click.echo(line)
    if compare is not None:
        click.echo(predictions.comparison())
    if out is not None:
        # Last, where scripts look for it.
        click.echo(str(out))
