"""How right the first estimate of a whole quantization or deployment is: told at its start, and
taken.

    python -m benchmarks.speed.estimate --model yolov5n.pt --data SET --recipe w8a8 --set method=ptq
    python -m benchmarks.speed.estimate --model yolov5n.pt --data SET --target onnxruntime-cpu

Both by the processor time of one thread, so that others on the same cores take no part.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import click
import torch

import dfq
from benchmarks.common import benchmark, model_option, threads_option
from dfq.ptq import rates
from dfq.runtime import forecast, progress

CLOCK = SimpleNamespace(monotonic=time.process_time, perf_counter=time.process_time)


@benchmark(__doc__)
@model_option
@click.option("--data", required=True, help="A calibration set.")
@click.option("--recipe", default="w8a8", show_default=True)
@click.option("--target", help="Deploy for it, instead of a recipe.")
@click.option("--set", "overrides", multiple=True, metavar="KEY=VALUE")
@threads_option
def main(
    model: str,
    data: str,
    recipe: str,
    target: str | None,
    overrides: tuple[str, ...],
    threads: int,
) -> None:
    torch.set_num_threads(threads)
    told: list[tuple[float, str]] = []
    timed: list[float] = []

    class Noting(forecast.Forecast):
        def announcement(self, left: float | None) -> str:
            text = super().announcement(left)
            if text:
                told.append((time.process_time(), text))
            return text

    announced = progress.forecast

    def timing(where: object, work: str, phases: object, advice: str = "") -> object:
        def watched() -> object:
            start = time.process_time()
            try:
                return phases()  # type: ignore[operator]
            finally:
                timed.append(time.process_time() - start)

        return announced(where, work, watched, advice)  # type: ignore[arg-type]

    with (
        tempfile.TemporaryDirectory() as folder,
        mock.patch.object(progress, "time", CLOCK),
        mock.patch.object(rates, "time", CLOCK),
        mock.patch.object(progress, "Forecast", Noting),
        # However short the work is.
        mock.patch.object(forecast, "LONG_SECONDS", 0.0),
        mock.patch("dfq.api.expected.forecast", timing),
    ):
        out, told_to = Path(folder) / "out", progress.Live(advises=False)
        if target is None:
            dfq.quantize(
                recipe, model=model, data=data, out=out, overrides=overrides, device="cpu",
                progress=told_to,
            )  # fmt: skip
        else:
            dfq.deploy(
                model, target, data=data, out=out, overrides=overrides, device="cpu",
                progress=told_to,
            )  # fmt: skip
        end = time.process_time()
    at, text = told[0]
    minutes = text.partition("about ")[2].split(": ")[0].split(":")
    seconds = sum(60**place * int(part) for place, part in enumerate(reversed(minutes)))
    taken = end - at
    click.echo(text)
    click.echo(
        f"told {seconds} s, taken {taken:.1f} s, ratio {seconds / taken:.2f}; "
        f"the timing took {timed[0]:.1f} s, {timed[0] / taken:.1%}"
    )


if __name__ == "__main__":
    main()
