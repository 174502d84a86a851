"""`dfq eval`."""

from __future__ import annotations

from pathlib import Path

import click

from .options import (
    FILE,
    checkpoint_option,
    common_options,
    output_file,
    report_user_errors,
    write_json_output,
)


@click.command("eval", short_help="Measure COCO AP, or the accuracy of a classifier.")
@click.option(
    "--model", required=True, help="A detector or a classifier, a run folder or an exported file."
)
@checkpoint_option
@click.option(
    "--data",
    required=True,
    help="A labelled SET; of a classifier, a folder or ZIP file of CLASS/IMAGE. With --against, "
    "any photos.",
)
@click.option(
    "--against",
    metavar="FLOAT",
    show_default="the labels of --data",
    help="Measure against what this float model detects or says, and not against labels.",
)
@click.option("--image-size", type=int, show_default="the model's", help="Side in pixels.")
@click.option(
    "--interval",
    is_flag=True,
    help="Also say between which values AP, or top-1, would be on other draws of images (95 %, "
    "bootstrap).",
)
@click.option("--json", "json_file", type=FILE, help="Write the result here.")
@common_options
@report_user_errors
def evaluate(
    model: str,
    data: str,
    against: str | None,
    image_size: int | None,
    interval: bool,
    json_file: str | Path | None,
    device: str,
    trust: bool,
) -> None:
    """Measure COCO AP, or a classifier's accuracy, against labels or against another network."""
    from ..api.evaluate import evaluate as verb
    from ..evaluation.agreement import Agreement
    from ..evaluation.classification import Agreed, ClassificationMetrics
    from ..runtime.progress import Live
    from .tables import print_agreement, print_classification, print_metrics

    json_file = output_file(json_file, inputs=(model, data, against))
    metrics = verb(
        model,
        data,
        against=against,
        image_size=image_size,
        interval=interval,
        device=device,
        trust=trust,
        progress=Live(),
    )
    write_json_output(json_file, metrics.to_dict())
    if isinstance(metrics, Agreement):
        print_agreement(metrics)
    elif isinstance(metrics, Agreed):
        click.echo(metrics.sentence("these images"))
    elif isinstance(metrics, ClassificationMetrics):
        print_classification(metrics)
    else:
        print_metrics(metrics.to_dict())
