"""The functions of `dfq`: the arguments that people try, what errors call them, progress."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from support.cli_parts import real_set

import dfq
from dfq.errors import in_python


def test_synthesize_takes_the_settings_of_the_command(place: Path, model: Path) -> None:
    made = dfq.synthesize(
        model, "tiny.yaml", images=3, image_size=96, iterations=1, batch_size=3, labels="single",
        init="gaussian", seed=7, out="set",
    )  # fmt: skip
    assert len(made) == 3
    assert made.load([0]).shape == (1, 3, 96, 96)
    settings = made.manifest["determinants"]
    assert settings["seed"] == 7
    assert settings["synthesis"]["iterations"] == 1
    assert settings["synthesis"]["labels"] == "single"
    # Without a recipe they change the defaults, and an object serves as well as a file.
    recipe = dfq.load_recipe("tiny.yaml")
    again = dfq.synthesize(
        model, recipe, images=3, image_size=96, iterations=1, batch_size=3, labels="single",
        init="gaussian", seed=7, out="set",
    )  # fmt: skip
    assert again.manifest == made.manifest
    # The recipe itself stays what it was.
    assert recipe.synthesis.images == 4


def test_noise_stays_as_it_is(place: Path, model: Path) -> None:
    made = dfq.synthesize(model, "tiny.yaml", init="noise", out="noise")
    assert made.manifest["determinants"]["synthesis"]["iterations"] == 0
    assert sum(map(len, made.labels)) == 0
    with pytest.raises(dfq.UserError, match="'init' noise stays as it is"):
        dfq.synthesize(model, "tiny.yaml", init="noise", overrides={"synthesis": {"iterations": 3}})


OVERRIDES: list[Any] = [
    {"distillation.epochs": 1, "quantization.weight_bits": 6, "method": "ptq"},
    {"distillation": {"epochs": 1}, "quantization": {"weight_bits": 6}, "method": "ptq"},
    ["distillation.epochs=1", "quantization.weight_bits=6", "method=ptq"],
]


@pytest.mark.parametrize("overrides", OVERRIDES)
def test_quantize_takes_overrides(place: Path, model: Path, made: Path, overrides: Any) -> None:
    recipe: Any
    for recipe in ("tiny.yaml", dfq.load_recipe("tiny.yaml")):
        run = dfq.quantize(recipe, model=model, data=made, overrides=overrides, seed=3)
        resolved = dfq.load_recipe(run / "recipe.yaml")
        assert (resolved.distillation.epochs, resolved.quantization.weight_bits) == (1, 6)
        assert (resolved.method, resolved.seed) == ("ptq", 3)
        # What was not named is the recipe's.
        assert resolved.distillation.batch_size == 2


def test_overrides_of_layers_are_one_value() -> None:
    found = dfq.load_recipe(None, {"quantization": {"overrides": {"model.0.*": 8}}})
    assert found.quantization.overrides == {"model.0.*": 8}
    found = dfq.load_recipe(None, {"quantization.overrides": {"model.0.*": "w4a8"}})
    assert found.quantization.overrides == {"model.0.*": "w4a8"}
    for wrong, message in (
        ({"distillation.epoch": 1}, "distillation.epoch: unknown key"),
        ({"distillation": {"epochs": 0}}, "distillation.epochs: "),
        ({"distillation": 3}, "distillation: "),
        ({"epochs": 3}, "epochs: unknown key"),
    ):
        with pytest.raises(dfq.UserError, match=message):
            dfq.load_recipe(None, wrong)


def test_sensitivity_takes_the_settings_of_the_command(model: Path, made: Path) -> None:
    found = dfq.sensitivity(
        model, data=made, budget="w6a8", cost="bytes", images=1,
        overrides={"quantization.mixed.candidates": [4, 8]},
    )  # fmt: skip
    assert (found.kind, found.images) == ("bytes", 1)
    assert found.spent is not None
    assert found.budget is not None
    assert found.spent <= found.budget


WRONG: dict[str, tuple[Callable[[Path, Path], object], str]] = {
    "device": (lambda m, s: dfq.evaluate(m, s, device="cuda:99"), "'device' cuda:99: there is no"),
    "device of synthesize": (lambda m, _: dfq.synthesize(m, device="toaster"), "'device' toaster"),
    "no model": (lambda *_: dfq.quantize("w4a8"), "which model? give 'model'"),
    "out": (lambda m, _: dfq.synthesize(m, out="tiny.yaml/x"), "'out' tiny.yaml/x: a file is in"),
    "foreign out": (lambda m, _: dfq.synthesize(m, out="."), "choose another 'out'"),
    "run out": (lambda m, s: dfq.quantize("w4a8", model=m, data=s, out="."), "another 'out'"),
    "tensorboard": (
        lambda m, _: dfq.synthesize(m, tensorboard="tiny.yaml"), "'tensorboard' tiny.yaml: a file"
    ),
    "task loss": (
        lambda m, s: dfq.quantize(
            "w4a8", model=m, data=s / "images", overrides={"distillation.weights.task": 1}
        ),
        "overrides={'distillation.weights.task': 0}",
    ),
    "a set for a model": (lambda _, s: dfq.inspect(s), "the set as 'data'"),
    "size": (
        lambda m, s: dfq.quantize("w4a8", model=m, data=s, image_size=96),
        "'image_size' 96: the images of",
    ),
    "a long name": (lambda *_: dfq.inspect("x" * 300), "xxx...: file name too long"),
    "a long name of a set": (lambda m, _: dfq.evaluate(m, "x" * 300), "no such file or folder"),
    "a home of nobody": (lambda *_: dfq.load_detector("~nobody-here/x.pt"), "no home folder"),
    "a network without weights": (
        lambda *_: dfq.synthesize("torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"),
        "say model='torchvision/fasterrcnn_mobilenet_v3_large_320_fpn@random'",
    ),
    "a checkpoint that runs code": (lambda *_: dfq.load_detector("evil.pt"), "pass trust=True"),
}  # fmt: skip


@pytest.mark.parametrize("case", WRONG)
def test_errors_name_arguments(place: Path, model: Path, made: Path, case: str) -> None:
    import torch

    torch.save({"model": Evil()}, place / "evil.pt")
    call, message = WRONG[case]
    with pytest.raises(dfq.UserError) as error:
        call(model, made)
    assert message in str(error.value)
    assert "--" not in str(error.value)


class Evil:
    def __reduce__(self) -> Any:
        return print, ("run",)


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("--select-on x: no", "'select_on' x: no"),
        ("give --model, or `model:`", "give 'model', or `model:`"),
        ("or --set a.b=0 --set c=1", "or overrides={'a.b': 0} overrides={'c': 1}"),
        ("make one with dfq synthesize --out X", "make one with dfq synthesize --out X"),
        ("x: broken; run dfq data show --json A; choose another --out", None),
        ("torchrun --nproc-per-node=2 -m dfq qat --model x", None),
        (
            "give them with --checkpoint FILE (x@FILE), or say --random-weights (x@random)",
            "give them with model='x@FILE', or say model='x@random'",
        ),
        ("file--out.png: missing", "file--out.png: missing"),
    ],
)
def test_how_flags_become_arguments(message: str, expected: str | None) -> None:
    found = in_python(message)
    if expected is None:
        expected = message.replace("another --out", "another 'out'")
    assert found == expected


def test_progress_is_shown_when_asked_for(
    place: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made = dfq.synthesize(model, "tiny.yaml", out="set", progress=True)
    run = dfq.quantize("tiny.yaml", model=model, data=made.root, out="run", progress=True)
    dfq.evaluate(run, made.root, progress=True)
    shown = capsys.readouterr()
    for line in ("synthesis: 4/4 images", "training: 2/2 epochs", "evaluation: 4/4 images"):
        assert line in shown.err
    assert shown.out == ""
    dfq.sensitivity(
        model, data=made.root, images=1, progress=True,
        overrides={"quantization.mixed.candidates": [4, 8]},
    )  # fmt: skip
    assert "sensitivity: " in capsys.readouterr().err
    # And else not.
    dfq.evaluate(run, made.root)
    dfq.evaluate(run, made.root, progress=False)
    assert capsys.readouterr().err == ""


def test_python_gives_the_interval_too(place: Path, model: Path) -> None:
    data = real_set(place / "real")
    plain, found = (dfq.evaluate(model, data, interval=wanted) for wanted in (False, True))
    assert plain.AP_interval is None
    assert found.AP_interval is not None
    low, high = found.AP_interval
    assert 0 <= low <= found.AP <= high <= 1


def test_python_compares_runs(run: Path) -> None:
    (row,) = dfq.compare([run])
    assert row.bits == "w4a8"
    assert json.loads(json.dumps(row.to_dict()))["run"] == str(run)
    with pytest.raises(dfq.UserError, match="which runs"):
        dfq.compare([])


def test_every_public_function_is_one_object() -> None:
    assert dfq.evaluate is dfq.evaluate
    assert re.search(r"COCO AP", dfq.evaluate.__doc__ or "")
    assert set(dfq.__all__) <= set(dir(dfq))
