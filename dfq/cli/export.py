"""`dfq export`."""

from __future__ import annotations

import click

from ..errors import UserError, shown
from .options import FILE, checkpoint_option, report_user_errors


@click.command(short_help="Write a file that a runtime executes.")
@click.option("--model", required=True, help="A run's folder, or a float model (the baseline).")
@checkpoint_option
@click.option("--out", required=True, type=FILE, help="The file.")
@click.option(
    "--format",
    show_default="by the suffix of --out",
    help="onnx (.onnx), openvino (.xml), litert (.tflite) or torch (.pt2).",
)
@click.option(
    "--runtime",
    show_default="the format's own",
    help="That is to execute it: onnxruntime, openvino, tensorrt or litert.",
)
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option("--batch", default="1", show_default=True, help="Images a call takes, or dynamic.")
@click.option(
    "--pack",
    type=click.Choice(["int4"]),
    show_default="int8",
    help="ONNX: store weights of 4 bits as INT4.",
)
@click.option(
    "--data",
    show_default="what the run was made on",
    help="Images to find ranges on, where the run was made for another runtime.",
)
@click.option(
    "--nms",
    type=float,
    is_flag=False,
    flag_value=0.25,
    metavar="[SCORE]",
    show_default="none: the caller's",
    help="NMS within the file, of boxes with at least this score (0.25 if none is given).",
)
@click.option("--trust", is_flag=True, help="Run what is in the checkpoint.")
@report_user_errors
def export(
    model: str,
    out: str,
    format: str | None,
    runtime: str | None,
    image_size: int | None,
    batch: str,
    pack: str | None,
    data: str | None,
    nms: float | None,
    trust: bool,
) -> None:
    """Write a run as a file that a runtime executes in integers, or a float model as it is.

    Detectors with proposals become several: FILE.onnx, and FILE.heads.onnx and FILE.masks.onnx for
    what is computed within boxes. Proposals, RoIAlign and NMS stay outside of them.

    The file says of itself what it detects, at which size, and how images get to it. `dfq verify`
    tells whether it is right and computes in integers.
    """
    from ..api.export import export as verb
    from ..runtime.progress import Live

    written = verb(
        model,
        out,
        format=format,
        runtime=runtime,
        image_size=image_size,
        batch=_batch(batch),
        int4=pack == "int4",
        data=data,
        nms=nms,
        trust=trust,
        progress=Live(),
    )
    click.echo(f"{shown(written)}: {written.stat().st_size / 1e6:.1f} MB")


def _batch(text: str) -> int | None:
    if text == "dynamic":
        return None
    try:
        return int(text)
    except ValueError:
        raise UserError(f"--batch {shown(text)}: a number of images, or dynamic") from None
