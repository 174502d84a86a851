"""Recipes, options and names that cannot be meant: one line, exit code 2, before any work."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.harness import command, contents, has_one_error
from support.small_mmdet import enliven, write_config
from support.tiny_detector import tiny_detector

from dfq.api import synthesize as verb
from dfq.mixed_precision import search as policy
from dfq.mixed_precision import sensitivity as measure
from dfq.models import load_detector, save_detector

HUGE = "99999999999999999999999"

RECIPES: dict[str, tuple[str, str]] = {
    "a key twice": ("seed: 1\nsynthesis: {images: 4}\nseed: 2\n", "'seed' is there twice"),
    "a section twice": ("synthesis: {images: 4}\nsynthesis: {flip: 0}\n", "in lines 1 and 2"),
    "a key of a section twice": ("synthesis:\n  images: 4\n  images: 8\n", "lines 2 and 3"),
    "one number written twice": ("quantization:\n  overrides: {1: 8, 0x1: 8}\n", "twice"),
    "nested": ("[" * 3000 + "]" * 3000, "nest"),
    "nested blocks": ("- " * 3000 + "1", "nest"),
    "digits": ("seed: " + "9" * 5000, "too many digits"),
    "digits of a float": ("synthesis: {flip: " + "9" * 5000 + ".0}", "finite"),
    "a date": ("seed: 2024-99-99", "not valid YAML"),
    "an alias within itself": ("a: &a [*a]", "within &a itself"),
    "aliases": (
        "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{f'*a{i - 1}, ' * 9}]\n" for i in range(1, 60)),
        "more than 100000 values",
    ),
    "too large": ("seed: 1 #" + "x" * 5_000_000, "too large"),
    "true for a number": ("synthesis: {images: true}", "synthesis.images: should be no truth"),
    "no for a number": ("synthesis: {iterations: no}", "synthesis.iterations: should be no truth"),
    "on for a share": ("synthesis: {flip: on}", "synthesis.flip: should be no truth"),
    "true for a text": ("synthesis: {labels: true}", "synthesis.labels: should be no truth"),
    "true for bits": ("quantization: {first_last_bits: true}", "quantization.first_last_bits"),
    "true among widths": (
        "quantization: {mixed: {candidates: [4, true]}}",
        "quantization.mixed.candidates",
    ),
    "true among bits": ("quantization: {overrides: {a: true}}", "quantization.overrides"),
    "start after stop": (
        "synthesis: {label_stage: {start: 0.9, stop: 0.2}}",
        "synthesis.label_stage: start (0.9) is after stop (0.2)",
    ),
    "two documents": ("seed: 1\n---\nseed: 2\n", "not valid YAML"),
    "a list": ("[]", "a mapping of sections, not a list"),
    "nothing but false": ("false", "a mapping of sections, not a bool"),
    "a key of two lines": ('"a\\nb": 1', "a b: unknown key"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes(place: Path, model: Path, case: str) -> None:
    text, message = RECIPES[case]
    (place / "odd.yaml").write_text(text)
    before = contents(place)
    for words in (
        ("synthesize", "--model", model, "--recipe", "odd.yaml", "--out", "out"),
        ("qat", "--model", model, "--recipe", "odd.yaml", "--out", "out"),
        ("sensitivity", "--model", model, "--recipe", "odd.yaml"),
    ):
        line = has_one_error(command(*words))
        assert message in line
        assert "odd.yaml" in line
        assert len(line) < 400
    assert contents(place) == before


SETTINGS: list[tuple[list[str], str]] = [
    (["--images", HUGE], "synthesis.images: "),
    (["--images", "1000001"], "synthesis.images: "),
    (["--iterations", HUGE], "synthesis.iterations: "),
    (["--image-size", HUGE], "synthesis.image_size: "),
    (["--image-size", "1000000"], "synthesis.image_size: "),
    (["--batch-size", HUGE], "synthesis.batch_size: "),
    (["--seed", HUGE], "seed: "),
    (["--set", "synthesis.label_stage.objects=1000000000"], "synthesis.label_stage.objects: "),
    (["--set", "synthesis.label_stage.updates=" + HUGE], "synthesis.label_stage.updates: "),
    (["--set", "synthesis.label_stage.iterations=" + HUGE], "synthesis.label_stage.iterations: "),
    (["--set", "synthesis.label_stage.image_size=99999968"], "synthesis.label_stage.image_size: "),
    (["--set", "synthesis.micro_batch=" + HUGE], "synthesis.micro_batch: "),
    (["--set", "synthesis.learning_rate=1e30"], "synthesis.learning_rate: "),
    (["--set", "synthesis.weights.tv=1e30"], "synthesis.weights.tv: "),
    (["--set", "synthesis.label_stage.start=1"], "start (1) is after stop (0.95)"),
    (["--set", "synthesis.images=" + "9" * 5000], "too many digits"),
    (["--set", "synthesis.images=" + "[" * 3000 + "]" * 3000], "nest"),
    (["--set", "synthesis.images=true"], "should be no truth value"),
    (["--set", "synthesis={images: 4, images: 5}"], "twice"),
]


@pytest.mark.parametrize(("words", "message"), SETTINGS, ids=lambda part: str(part)[:50])
def test_settings_that_ask_for_too_much(
    place: Path, model: Path, words: list[str], message: str
) -> None:
    before = contents(place)
    base = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out")
    line = has_one_error(command(*base, *words))
    assert message in line
    assert len(line) < 400
    assert contents(place) == before


@pytest.mark.parametrize(
    "setting",
    [
        *("epochs=" + HUGE, "batch_size=" + HUGE, "lr=.inf", "weight_lr=-1", "scale_lr=true"),
        *("zero_lr=-1", "feature_form=paper"),
        *("temperature=1e30", "clip=1e30", "weights.kl=1e30", "epochs=true"),
    ],
)
def test_settings_of_training_that_ask_for_too_much(place: Path, model: Path, setting: str) -> None:
    words = ("qat", "--model", model, "--recipe", "tiny.yaml", "--set", f"distillation.{setting}")
    line = has_one_error(command(*words))
    assert f"distillation.{setting.partition('=')[0]}: " in line
    assert not (place / "runs").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--images", "4", "--set", "synthesis.images=8"], "--images 4 and --set synthesis.images"),
        (["--images", "4", "--set", "synthesis={images: 8}"], "--images 4 and --set synthesis="),
        (["--seed", "1", "--set", "seed=2"], "--seed 1 and --set seed=2"),
        (["--labels", "multi", "--set", "synthesis.labels=none"], "--labels 'multi'"),
        (["--init", "gaussian", "--set", "synthesis.init=uniform"], "--init 'gaussian'"),
        (["--iterations", "3", "--set", "synthesis.iterations=null"], "--iterations 3"),
    ],
)
def test_an_option_and_a_set_that_contradict(
    place: Path, model: Path, words: list[str], message: str
) -> None:
    base = ("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out")
    line = has_one_error(command(*base, *words))
    assert message in line
    assert "contradict" in line
    assert not (place / "out").exists()


def test_the_other_options_that_contradict(place: Path, model: Path) -> None:
    for words in (
        ("qat", "--recipe", "w4a8", "--model", model, "--set", "model=demo"),
        ("qat", "--recipe", "w4a8", "--seed", "1", "--set", "seed=2"),
        (
            *("qat", "--recipe", "w4a8", "--model", model, "--select-on", "a"),
            *("--set", "distillation.select_on=b"),
        ),
        (
            *("sensitivity", "--model", model, "--budget", "w4a8"),
            *("--set", "quantization.mixed.budget=w8a8"),
        ),
        (
            *("sensitivity", "--model", model, "--images", "4"),
            *("--set", "quantization.mixed.images=8"),
        ),
        ("inspect", "--model", model, "--checkpoint", "w.pth", "--random-weights"),
    ):
        assert "contradict: leave one out" in has_one_error(command(*words))


def test_an_option_and_a_set_that_agree(place: Path, model: Path) -> None:
    words = ("--images", "4", "--set", "synthesis.images=4", "--set", "synthesis.flip=0.2")
    made = command("synthesize", "--model", model, "--recipe", "tiny.yaml", "--out", "out", *words)
    assert made.exit_code == 0, made.output


# ---- budgets


@pytest.mark.parametrize("budget", ["1", "0", "0.5k", "w2a2"])
def test_a_budget_that_cannot_be_kept_is_refused_before_the_measurements(
    place: Path, model: Path, budget: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def begun(*_: Any, **__: Any) -> Any:
        raise AssertionError("work was begun")

    monkeypatch.setattr(policy, "measure", begun)
    monkeypatch.setattr(measure, "measure", begun)
    monkeypatch.setattr(verb, "synthesize_set", begun)
    line = has_one_error(command("sensitivity", "--model", model, "--budget", budget))
    assert "quantization.mixed.budget: " in line
    assert "the least is" in line
    mixed = ("--set", f"quantization.mixed.budget={budget}")
    line = has_one_error(command("qat", "--model", model, "--recipe", "tiny.yaml", *mixed))
    assert "the least is" in line
    assert not (place / "runs").exists()


@pytest.mark.parametrize("budget", ["9" * 5000, "w9a9", "1e5", "-1", "many", "1\n2"])
def test_budgets_that_are_none(place: Path, model: Path, budget: str) -> None:
    line = has_one_error(command("sensitivity", "--model", model, "--budget", budget))
    assert "is no budget" in line
    assert len(line) < 400


# ---- what was meant


@pytest.mark.parametrize(
    ("words", "meant"),
    [
        (("--set", "synthesis.imagse=4"), "synthesis.images"),
        (("--set", "sinthesis.images=4"), "synthesis"),
        (("--set", "images=4"), "synthesis.images"),
        (("--set", "synthesis.label_stage.updtes=4"), "synthesis.label_stage.updates"),
        (("--set", "synthesis.learning-rate=0.1"), "synthesis.learning_rate"),
        (("--set", "weight_bits=4"), "quantization.weight_bits"),
        (("--recipe", "w4a8x"), "w4a8"),
        (("--recipe", "W4A8"), "w4a8"),
        (("--recipe", "paper-yolo5"), "paper-yolov5"),
    ],
)
def test_settings_that_were_meant(
    place: Path, model: Path, words: tuple[str, ...], meant: str
) -> None:
    result = command("synthesize", "--model", model, "--out", "out", *words)
    assert f"; did you mean {meant}?" in has_one_error(result)


@pytest.mark.parametrize("method", ["qat", "auto", "nonsense", ""])
def test_ptq_has_no_other_method(place: Path, model: Path, method: str) -> None:
    words = ("ptq", "--model", model, "--recipe", "w4a8", "--set", f"method={method}")
    assert "dfq ptq trains nothing; leave it out" in has_one_error(command(*words))


def test_a_key_of_a_recipe_that_was_meant(place: Path, model: Path) -> None:
    (place / "odd.yaml").write_text("quantization:\n  weigth_bits: 4\n")
    line = has_one_error(command("qat", "--model", model, "--recipe", "odd.yaml"))
    assert "odd.yaml: quantization.weigth_bits: unknown key; did you mean" in line
    assert line.endswith("quantization.weight_bits?")


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("yolo11sm", "yolo11s"),
        ("yolov8ss", "yolov8s"),
        ("dem", "demo"),
        ("torchvision/fasterrcnn_resnet50", "fasterrcnn_resnet50_fpn"),
        ("faster-rcnn_r50_fpn_1x_cocco", "faster-rcnn_r50_fpn_1x_coco"),
        ("yolo11.yml", "yolo11.yaml"),
        ("weights/bset.pt", "weights/best.pt"),
        ("tiny.safetensor", "tiny.safetensors"),
    ],
)
def test_models_that_were_meant(place: Path, name: str, meant: str) -> None:
    (place / "weights").mkdir()
    (place / "weights" / "best.pt").touch()
    (place / "tiny.safetensors").touch()
    line = has_one_error(command("inspect", "--model", name))
    assert f"; did you mean {meant}?" in line


@pytest.mark.parametrize("name", ["something else entirely", "x" * 5000, "a\nb"])
def test_names_like_nothing(place: Path, name: str) -> None:
    line = has_one_error(command("inspect", "--model", name))
    assert "did you mean" not in line
    assert len(line) < 800


# ---- networks without weights


def test_random_weights_have_to_be_asked_for(place: Path) -> None:
    config = write_config(place, "retinanet")
    torchvision = "torchvision/fasterrcnn_mobilenet_v3_large_320_fpn"
    (place / "scenes").mkdir()
    for name in (str(config), torchvision):
        for words in (
            ("synthesize", "--model", name, "--recipe", "tiny.yaml", "--out", "out"),
            ("qat", "--model", name, "--recipe", "tiny.yaml", "--out", "out"),
            ("sensitivity", "--model", name),
        ):
            line = has_one_error(command(*words))
            assert name in line
            assert "--checkpoint FILE" in line
            assert "--random-weights" in line
        assert not (place / "out").exists()
        # Nothing is computed with them here.
        assert command("inspect", "--model", name).exit_code == 0
    (place / "named.yaml").write_text(f"model: {config}\n")
    assert "--random-weights" in has_one_error(command("qat", "--recipe", "named.yaml"))
    made = command(
        "synthesize", "--model", config, "--random-weights", "--recipe", "tiny.yaml",
        "--out", "out",
    )  # fmt: skip
    assert made.exit_code == 0, made.output
    assert "whose weights?" in has_one_error(
        command("qat", "--recipe", "tiny.yaml", "--random-weights")
    )


def test_evaluation_wants_weights(place: Path) -> None:
    from dfq.demo.scenes import write_coco

    config = write_config(place, "retinanet")
    write_coco(place / "scenes", 1, 64)
    line = has_one_error(command("eval", "--model", config, "--data", "scenes"))
    assert "--random-weights" in line


# ---- weights that are none


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nothing_is_left_of_a_model_with_numbers_that_are_none(place: Path, value: float) -> None:
    detector = tiny_detector()
    detector.module.get_submodule("model.1.bn").running_var[3] = value
    save_detector(detector, place / "m.safetensors")
    before = contents(place)
    for words in (
        ("synthesize", "--recipe", "tiny.yaml", "--out", "out"),
        ("qat", "--recipe", "tiny.yaml", "--out", "out"),
        ("sensitivity",),
        ("inspect", "--json", "out.json"),
    ):
        line = has_one_error(command(*words, "--model", "m.safetensors"))
        assert "the tensor model.1.bn.running_var holds" in line
        assert contents(place) == before
        assert not (place / "out").exists()


# ---- configs, which are programs


@pytest.mark.parametrize(
    "text",
    [
        "import sys\nsys.exit(3)\n",
        "raise SystemExit\n",
        "quit(0)\n",
        "raise BaseException('no')\n",
        "class Own(BaseException): pass\nraise Own\n",
        "raise GeneratorExit\n",
        "1 / 0\n",
        "model = lambda: 1\n",
        "model = dict(type=lambda: 1)\n",
        "while True break\n",
        "model = dict(type='RetinaNet', backbone=open)\n",
        "x = " + "(" * 3000 + ")" * 3000 + "\n",
    ],
)
def test_configs_that_end_by_themselves(place: Path, text: str) -> None:
    (place / "own.py").write_text(text)
    line = has_one_error(command("inspect", "--model", "own.py"))
    assert "own.py" in line
    mixed = ("mmdet-config", "own.py", "--recipe", "w8a8", "--random-weights", "--data", "set")
    assert command(*mixed).exit_code == 2
    assert not (place / "own-w8a8.py").exists()


def test_a_checkpoint_beside_a_config_is_read_for_its_names(place: Path) -> None:
    config = write_config(place, "retinanet")
    detector = enliven(load_detector(config))
    names = [f"thing {index}" for index in range(10)]
    for meta, message in (
        ({"dataset_meta": {"classes": names}}, None),
        ({"dataset_meta": {"classes": names[:3]}}, "names 3 categories"),
        ({"dataset_meta": {"classes": [[names]] * 10}}, "which is no name"),
        ({"CLASSES": "text"}, None),
        ({"dataset_meta": 7}, None),
        (7, None),
    ):
        torch.save({"meta": meta, "state_dict": detector.module.state_dict()}, place / "w.pth")
        result = command("inspect", "--model", config, "--checkpoint", "w.pth")
        if message is None:
            assert result.exit_code == 0, result.output
        else:
            assert message in has_one_error(result)
