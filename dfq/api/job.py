"""What every verb works with: the processes of the job, a device, whom to report to, curves."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ..models.base import Model
from ..recipe import Recipe
from ..recipe.quick import quick_side
from ..runs.loading import load_float, require_float
from ..runtime.distributed import World, gathered
from ..runtime.files import require_output_folder, user_path
from ..runtime.progress import Progress
from ..runtime.surroundings import Report, own_device, reporter
from ..runtime.tensorboard import Curves, WithCurves

Shared = TypeVar("Shared")


@dataclass
class Job:
    """A verb at work, in this process and in those that torchrun started beside it.

    Attributes:
        world: the processes; alone without torchrun.
        device: of this process, checked to be there.
        progress: whom to report to; nobody in a process that does not lead.
        out: the folder that was asked for, checked to be one that can be written; None: none was.
        curves: where the terms of losses are drawn; None: nowhere.
    """

    world: World
    device: str
    progress: Progress
    out: Path | None
    stack: ExitStack
    curves: Curves | None = None

    @classmethod
    @contextmanager
    def start(
        cls, device: str = "auto", progress: Report = None, *, out: str | Path | None = None
    ) -> Iterator[Job]:
        """A job for the time of the block; what it opened is closed at the end.

        Args:
            device: "auto", "cpu", "cuda:0", ...
            progress: told how far it is; True: shown on standard error.
            out: the folder that is to be made; None: none is named.

        Raises:
            UserError: there is no such device, or the folder cannot be made.
        """
        with ExitStack() as stack:
            world = stack.enter_context(gathered())
            with world.main_process_first():
                if out is not None:
                    out = user_path(out)
                    require_output_folder(out, "out")
                target = own_device(world, device)
            yield cls(world, target, reporter(progress, world.is_main_process), out, stack)

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes and reports."""
        return self.world.is_main_process

    def main_process_first(self) -> AbstractContextManager[None]:
        """The leading process goes through the block before the others, who end where it fails: a
        mistake of the user's is told once."""
        return self.world.main_process_first()

    def broadcast(self, value: Shared | None) -> Shared:
        """The leading process's value, in all processes."""
        shared: Shared = self.world.broadcast(value)
        return shared

    def float_detector(self, model: str | Path | Model | None, *, trust: bool) -> Model:
        """The float detector that is given or named, with weights, on the job's device.

        Raises:
            UserError: it is none, or there is none by that name.
        """
        if isinstance(model, Model):
            return require_float(model).to(self.device)
        return load_float(model, trust=trust, device=self.device)

    def draw_curves(self, folder: str | Path | None, *, goes_on: bool = False) -> None:
        """Draw the terms of losses from now on, for TensorBoard; None: not.

        Raises:
            UserError: TensorBoard is not installed, or the folder cannot be made.
        """
        if folder is not None:
            self.curves = Curves(Path(folder), goes_on=goes_on)
            self.stack.callback(self.curves.close)

    def quickly(
        self,
        recipe: Recipe,
        model: Model,
        *,
        data: str | Path | None = None,
        trains: bool = False,
    ) -> Recipe:
        """A recipe that was read for quick work, with a size where it says none; in a line is told
        what that work is.

        Args:
            recipe: the experiment.
            model: whose images they are.
            data: what is calibrated and trained on; None: images are made.
            trains: whether the work goes on to training.
        """
        synthesis = recipe.synthesis
        if synthesis.image_size is None:
            synthesis = synthesis.model_copy(update={"image_size": quick_side(model)})
            recipe = recipe.model_copy(update={"synthesis": synthesis})
        images = f"{synthesis.images} images of {synthesis.image_size} px, "
        images += f"{synthesis.iterations} iterations in batches of {synthesis.batch_size}"
        if data is not None:
            images = f"rounding on {recipe.quantization.rounding_images} images at most"
        if trains:
            images += f", {recipe.distillation.epochs} epochs of training"
        self.progress.note(f"quick: {images}")
        return recipe

    @property
    def reports(self) -> Progress:
        """`progress`, with curves where they are drawn."""
        return self.progress if self.curves is None else WithCurves(self.progress, self.curves)

    def hold(self, lock: contextlib.AbstractContextManager[None]) -> None:
        """Keep a lock until the job ends."""
        self.stack.enter_context(lock)
