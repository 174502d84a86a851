"""The paper's tables: what their rows are made with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.paper.conditions import LSQ, OURS, PAPER

REAL_LABELS = "real:{real}"


@dataclass(frozen=True)
class Row:
    """A row of a table: a set, and a training on it.

    Attributes:
        title: in the table; `{real}` is the number of real images, `{images}` that of a set.
        recipe: of quantization and training, see `Conditions.recipe`.
        settings: beside that recipe.
        data: "synthetic"; "real", the images of `--real`; "one stage", synthetic images that form
            while their labels are sampled.
        made_by: recipe of the synthetic set.
        synthesis: settings beside that one; `{real}` is the set of `--real`.
    """

    title: str
    recipe: str = PAPER
    settings: tuple[str, ...] = ()
    data: str = "synthetic"
    made_by: str = PAPER
    synthesis: tuple[str, ...] = ()


@dataclass(frozen=True)
class Table:
    """A table of the paper.

    Attributes:
        title: what it compares, and which of the paper's tables it is.
        rows: by name.
        widths: that are measured unless others are asked for.
        note: what a reader has to know beside it.
        by_epoch: AP after epochs instead of the final figures.
    """

    title: str
    rows: dict[str, Row]
    widths: tuple[str, ...] = ("w4a8",)
    note: str = ""
    by_epoch: bool = False

    def only(self, names: Sequence[str]) -> Table:
        """With those of its rows that have these names."""
        return replace(self, rows={name: row for name, row in self.rows.items() if name in names})


UNLABELLED = ("distillation.weights.task=0",)
"""There is no object to train on."""

ASYMMETRIC = ("quantization.activations=asymmetric",)

WHOLE = Row("the paper's recipe")
OUR_WHOLE = Row("ours", recipe=OURS, made_by=OURS)
AGNOSTIC = Row(
    "task-agnostic: no labels, no task loss",
    settings=UNLABELLED,
    synthesis=("synthesis.labels=none",),
)
NOISE = Row(
    "Gaussian noise",
    settings=UNLABELLED,
    synthesis=("synthesis.iterations=0", "synthesis.init=gaussian", "synthesis.labels=none"),
)

METHODS = Table(
    "Methods by widths (the paper's tables 1, 2, 3 and 11)",
    {
        "lsq-real": Row("LSQ, {real} real images", recipe=LSQ, data="real"),
        "lsqplus-real": Row("LSQ+, {real} real images", LSQ, ASYMMETRIC, data="real"),
        "lsqplus": Row("LSQ+, the paper's synthetic set", LSQ, ASYMMETRIC),
        "agnostic": AGNOSTIC,
        "paper": WHOLE,
        "ours": OUR_WHOLE,
    },
    ("w8a8", "w6a6", "w4a8"),
    "The paper's recipe leaves first and last layers in float; ours and LSQ have them in 8 bits.",
)

TASK = Table(
    "Task-specific against task-agnostic (4)",
    {
        "neither": replace(AGNOSTIC, title="neither"),
        "images": Row("task loss in synthesis alone", settings=UNLABELLED),
        "both": replace(WHOLE, title="in synthesis and in training (the paper's recipe)"),
    },
    note="Task loss in training alone has no row: images without labels have nothing to train on.",
)


def _labels(kind: str) -> tuple[str, ...]:
    return (f"synthesis.labels={kind}",)


LABELS = Table(
    "Label baselines (5 and 10)",
    {
        "real": Row("labels of the real set", synthesis=_labels(REAL_LABELS)),
        "noise": NOISE,
        "tile-in": Row("tile, in distribution", synthesis=_labels("tile:{real}")),
        "tile": Row("tile, out of distribution", synthesis=_labels("tile")),
        "multi-in": Row("multi-sample, in distribution", synthesis=_labels("multi:{real}")),
        "multi": Row("multi-sample, out of distribution", synthesis=_labels("multi")),
        "single": Row("one random box", synthesis=_labels("single")),
        "adaptive": replace(WHOLE, title="adaptive sampling (the paper's recipe)"),
        "scattered": Row(
            "adaptive sampling, ours",
            synthesis=(
                "synthesis.label_stage.sampler=scattered",
                "synthesis.label_stage.smallest_area=0.0016",
                "synthesis.label_stage.start=0.5",
                "synthesis.label_stage.stop=0.95",
                "synthesis.label_stage.updates=4",
            ),
        ),
    },
    ("w4a4",),
    "In distribution: categories and sizes are drawn from the real set. All are trained alike, by "
    "the paper's recipe, without the task loss where there are no labels.",
)

STAGES = Table(
    "One, two and three stages (7)",
    {
        "one": Row("one: labels and full-size images at once", data="one stage"),
        "two": replace(WHOLE, title="two: labels, then images (the paper's recipe)"),
        "three": Row(
            "three: labels, images at half the size, images",
            synthesis=("synthesis.multires=0.5",),
        ),
    },
    ("w6a6",),
    "Our reading of the three: with three, the iterations of the image stage are shared between "
    "half and full size.",
)

LOSSES = Table(
    "Loss terms (9)",
    {
        "all": replace(WHOLE, title="all (the paper's recipe)"),
        "no-task": Row("training without the task loss", settings=UNLABELLED),
        "no-kl": Row(
            "training without the predictions' divergence", settings=("distillation.weights.kl=0",)
        ),
        "no-feature": Row(
            "training without the features' distance", settings=("distillation.weights.feature=0",)
        ),
        "task": Row(
            "training by the task loss alone",
            settings=("distillation.weights.kl=0", "distillation.weights.feature=0"),
        ),
        "images-no-task": Row(
            "images without the task loss", synthesis=("synthesis.weights.task=0",)
        ),
        "images-no-bn": Row(
            "images without BatchNorm statistics", synthesis=("synthesis.weights.bn=0",)
        ),
        "images-no-tv": Row(
            "images without total variation", synthesis=("synthesis.weights.tv=0",)
        ),
    },
)

ZEROQ = (
    *_labels("none"),
    *("synthesis.init=gaussian", "synthesis.erase=0", "synthesis.flip=0"),
    *("synthesis.weights.tv=0", "synthesis.weights.first_bn=1"),
)

SYNTHESES = Table(
    "Other syntheses (12)",
    {
        "noise": NOISE,
        "zeroq": Row("as ZeroQ: BatchNorm statistics alone", settings=UNLABELLED, synthesis=ZEROQ),
        "genie": Row(
            "as GENIE: with swing convolutions",
            settings=UNLABELLED,
            synthesis=(*ZEROQ, "synthesis.techniques.swing=true"),
        ),
        "paper": WHOLE,
        "ours": Row("ours, trained by the paper's recipe", made_by=OURS),
    },
    note="All trained by the paper's recipe, without the task loss where there are no labels. Of "
    "GENIE only the swing convolutions are here, not its generator.",
)

GRIDS = (
    *("quantization.first_last_bits=8", "quantization.weights=per_channel"),
    *("quantization.weight_grid=asymmetric", "quantization.activations=asymmetric"),
    *("quantization.ranges=mse", "quantization.refine_images=16"),
)

STEPS = Table(
    "What each step of ours gives",
    {
        "paper": WHOLE,
        "images": Row("and our images", made_by=OURS),
        "grids": Row("and our grids", settings=GRIDS, made_by=OURS),
        "rounding": Row(
            "and our rounding", settings=(*GRIDS, "quantization.reconstruction=gptq"), made_by=OURS
        ),
        "training": replace(OUR_WHOLE, title="and our training: ours"),
        "untrained": Row("ours without any training", OURS, settings=("method=ptq",), made_by=OURS),
    },
    ("w4a8", "w4a4"),
    "Each row has what those above it have, but for the last. First and last layers are in float "
    "in the first two rows, in 8 bits in the others.",
)

CONVERGENCE = Table(
    "Convergence (figure 6): AP after each epoch",
    {
        "lsq-real": Row(
            "LSQ, {real} real images", LSQ, ("distillation.select_on={val}",), data="real"
        ),
        "paper": Row("the paper's recipe", settings=("distillation.select_on={val}",)),
        "ours": Row("ours", OURS, ("method=qat", "distillation.select_on={val}"), made_by=OURS),
    },
    note="Measured during one training each; with averaged weights where the recipe averages them.",
    by_epoch=True,
)


def sizes_table(sizes: Sequence[int]) -> Table:
    """The same recipe on sets of some sizes."""
    rows = {
        str(size): Row(f"{size} images", synthesis=(f"synthesis.images={size}",)) for size in sizes
    }
    note = "A smaller set is the beginning of a larger one as far as whole batches go."
    return Table("Size of the set (8)", rows, ("w4a4",), note)


def all_tables(sizes: Sequence[int]) -> dict[str, Table]:
    """By the name that `--tables` takes."""
    return {
        "methods": METHODS,
        "task": TASK,
        "labels": LABELS,
        "stages": STAGES,
        "sizes": sizes_table(sizes),
        "losses": LOSSES,
        "syntheses": SYNTHESES,
        "convergence": CONVERGENCE,
        "steps": STEPS,
    }
