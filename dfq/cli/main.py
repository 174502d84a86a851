"""The command line: parse, call a verb, print. A user's mistake is one line and exit code 2."""

from __future__ import annotations

import click

from .._version import __version__
from ..runtime.processes import end_with_launcher
from .compare import compare
from .cost import cost
from .data import data
from .demo import demo
from .deploy import deploy
from .evaluate import evaluate
from .export import export
from .first_line import announce_loading
from .inspect import inspect
from .mmdet_config import mmdet_config
from .options import require_streams
from .predict import predict
from .quantize import ptq, qat, quantize
from .recipe import recipe
from .report import report
from .sensitivity import sensitivity
from .synthesize import synthesize
from .verify import verify


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
def cli() -> None:
    """Make a trained object detector, or image classifier, small without its training data.

    A SET is a folder with annotations.json and images/ (COCO; also what dfq writes), a COCO
    .json beside its images, a YOLO data.yaml, or a Pascal VOC folder; of a classifier, a folder or
    ZIP file of CLASS/IMAGE. Where no labels are needed (quantize, sensitivity, data show), a folder
    of photos will do.
    """


for command in (
    compare,
    cost,
    data,
    demo,
    deploy,
    evaluate,
    export,
    inspect,
    mmdet_config,
    predict,
    ptq,
    qat,
    quantize,
    recipe,
    report,
    sensitivity,
    synthesize,
    verify,
):
    cli.add_command(command)


def main() -> None:
    """Entry point of `dfq`."""
    require_streams()
    end_with_launcher()
    announce_loading()
    cli()


if __name__ == "__main__":
    main()
