"""Count the operations of an iteration of synthesis beside those of the least it could be.

    python -m benchmarks.speed.operations --model yolov5n.pt --model yolo11n.yaml

The least is one forward and one input-gradient backward pass of the frozen network, folded, with
PyTorch's own operations. On a GPU, what starts operations takes longer than most of them do: how
many there are is how long an iteration takes that is not recorded. Views are not counted.

"Compiled" are the functions of dfq/kernels in the place of a SiLU and its gradient, which the least
has. "Ratio" leaves them out, "with all" counts each of them as one as well. "Settling" is the ratio
of the last iterations of a stage.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import click
import torch
from torch import Generator
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import benchmark, header, line
from benchmarks.speed.bare import bare_pass
from dfq.models import load_detector
from dfq.models.base import Model
from dfq.recipe import load_recipe
from dfq.synthesis.inversion import Inversion
from dfq.synthesis.iteration import Iteration
from dfq.synthesis.labels import scattered

COUNT, SIZE, STEPS = 3, 64, 4


class Counting(TorchDispatchMode):
    """Counts operations that compute something.

    Attributes:
        count: of them, without compiled ones in the place of an operation of the bare pass.
        in_place: of those.
        silus: of PyTorch's SiLUs and their gradients.
    """

    FREE = (
        *("view", "_unsafe_view", "slice", "select", "transpose", "t", "permute", "expand"),
        *("unsqueeze", "squeeze", "detach", "alias", "as_strided", "split", "split_with_sizes"),
        *("unbind", "unfold", "empty", "new_empty", "empty_like", "empty_strided"),
        *("new_empty_strided", "_record_function_enter_new", "_record_function_exit"),
    )
    IN_PLACE = ("silu_and_moments", "silu_backward")

    def __init__(self) -> None:
        super().__init__()
        self.count = self.in_place = self.silus = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        space, _, name = func._schema.name.rpartition("::")
        if space == "dfq" and name in self.IN_PLACE:
            self.in_place += 1
        else:
            self.count += space == "dfq" or name not in self.FREE
            self.silus += space == "aten" and name in ("silu", "silu_backward")
        return func(*args, **(kwargs or {}))


class Counted:
    """What was counted of iterations one after the other, and of the bare pass."""

    def __init__(self, detector: Model, *, static: bool, precision: str = "float32") -> None:
        settings = load_recipe(None, [f"synthesis.image_size={SIZE}"]).synthesis
        settings = settings.model_copy(update={"precision": precision})
        inversion = Inversion(detector, settings)
        inversion.static = static
        self.iterations: list[Counting] = []
        images = torch.rand(COUNT, 3, SIZE, SIZE, generator=Generator().manual_seed(0))
        labels = scattered(Generator(), COUNT, detector.num_classes, most=9, smallest_area=0.01)
        plain = Iteration.__call__

        def watched(iteration: Iteration, inputs: Any, step: int) -> Any:
            return self._counted(lambda: plain(iteration, inputs, step))

        with mock.patch.object(Iteration, "__call__", watched):
            inversion.optimise(images, labels, STEPS, 0.01, Generator(), stage="full")
        run = bare_pass(inversion.detector, images, precision)
        with Counting() as self.bare:
            run()

    def _counted(self, run: Callable[[], Any]) -> Any:
        with Counting() as counting:
            result = run()
        self.iterations.append(counting)
        return result


@benchmark(__doc__)
@click.option("--model", "models", required=True, multiple=True, help="A file or published name.")
@click.option(
    "--precision", default="float32", show_default=True,
    type=click.Choice(["float32", "bfloat16"]), help="The latter where a processor has it.",
)  # fmt: skip
def main(models: tuple[str, ...], precision: str) -> None:
    columns = ("bare:", "iteration:", "compiled:", "ratio:", "with all:", "settling:")
    print(header("model", "shapes", *columns))
    for model in models:
        detector = load_detector(model)
        for static in (False, True):
            counted = Counted(detector, static=static, precision=precision)
            bare = counted.bare.count
            _, usual, *_, last = counted.iterations
            cells = [bare, usual.count + usual.in_place, usual.in_place]
            ratios = [usual.count / bare, cells[1] / bare, last.count / bare]
            shapes = "static" if static else "by value"
            print(line(model, shapes, *cells, *[f"{ratio:.2f}" for ratio in ratios]))


if __name__ == "__main__":
    main()
