"""`dfq mmdet-config`: what it writes is what was asked for, and nothing else."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result
from support.small_mmdet import enliven, write_config

from dfq.cli.main import cli
from dfq.demo.scenes import write_coco
from dfq.integrations.mmdet_config import mmdet_config
from dfq.models import load_detector, save_detector
from dfq.models.mmdet.config import read_config
from dfq.recipe import load_recipe

TEXTS = [
    "plain/path-1.py",
    "x\nopen('mark', 'w')",
    "x\r\nopen('mark', 'w')",
    "x\ropen('mark', 'w')",
    "x\u2028y\u0085z\x0c",
    "\"\"\"; open('mark', 'w') #",
    "'); open('mark', 'w') #",
    "back\\slash\\n",
    "ends with \\",
    "{{ fileBasename }}",
    "{{ $DFQ_TEST: a\\nopen('mark', 'w') }}",
    "{{$HOME:x}}",
    "{{_base_.model}}",
    "{braces} {0} %s",
    "coding: utf-7",
    "-*- coding=utf_7 -*-",
    "schöne Größe 中文 😀",
    "tab\tand nul\x00",
]


def written(text: str, where: str) -> str:
    given = {"config": "c.py", "checkpoint": "w.pth", "data": "set", "name": "out.py"}
    recipe = ("w8a8", ())
    if where == "recipe":
        recipe = (text, ())
    elif where == "overrides":
        recipe = ("w8a8", (text,))
    elif where != "missing":
        given[where] = text
    return mmdet_config(
        load_recipe("w8a8"),
        recipe[0],
        given["config"],
        checkpoint=given["checkpoint"],
        data=given["data"],
        name=given["name"],
        overrides=recipe[1],
        missing=text if where == "missing" else None,
    )


@pytest.mark.parametrize("text", TEXTS)
@pytest.mark.parametrize(
    "where", ["config", "checkpoint", "data", "name", "recipe", "overrides", "missing"]
)
def test_no_text_becomes_code(text: str, where: str, tmp_path: Path) -> None:
    usual = written("plain", where)
    given = written(text, where)
    # Its statements are those of any other, one by one.
    kinds = [ast.dump(node, annotate_fields=False)[:20] for node in ast.parse(usual).body]
    assert [ast.dump(node, annotate_fields=False)[:20] for node in ast.parse(given).body] == kinds
    strings = {node.value for node in ast.walk(ast.parse(given)) if isinstance(node, ast.Constant)}
    if where in ("config", "checkpoint", "data", "recipe", "overrides"):
        assert text in strings
    # mmengine puts values of its own, of the environment too, in the place of these.
    assert "{{" not in given
    first = b"".join(given.encode("utf-8", "surrogateescape").splitlines(keepends=True)[:2])
    assert b"coding:" not in first
    assert b"coding=" not in first


@pytest.mark.parametrize("text", [text for text in TEXTS if "\x00" not in text])
def test_mmengine_reads_what_was_meant(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DFQ_TEST", "a\\nopen('mark', 'w')")
    base = write_config(tmp_path, "retinanet")
    config = mmdet_config(
        load_recipe("w8a8"), "w8a8", str(base), checkpoint=text, data=text, name=text
    )
    (tmp_path / "own.py").write_text(config)
    read = read_config(tmp_path / "own.py")
    assert read["model"]["checkpoint"] == text
    assert read["train_dataloader"]["dataset"]["data_root"] == text
    assert not (tmp_path / "mark").exists()


# ---- the command


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A config, its weights and a calibration set."""
    folder = tmp_path_factory.mktemp("mmdet")
    detector = enliven(load_detector(write_config(folder, "retinanet")))
    torch.save({"meta": {}, "state_dict": detector.module.state_dict()}, folder / "w.pth")
    save_detector(detector, folder / "m.safetensors")
    done = dfq(
        *("synthesize", "--model", folder / "m.safetensors", "--out", folder / "set"),
        *("--images", "2", "--iterations", "1", "--batch-size", "2", "--labels", "none"),
        *("--image-size", "64"),
    )
    assert done.exit_code == 0, done.output
    return folder


def dfq(*words: str | Path) -> Result:
    return CliRunner().invoke(cli, [str(word) for word in words], catch_exceptions=False)


def refused(result: Result) -> str:
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.splitlines()
    return line


@pytest.fixture
def place(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "own.py").write_text((made / "retinanet.py").read_text())
    return tmp_path


def test_weights_and_set_have_to_be_there(place: Path, made: Path) -> None:
    usual = ("mmdet-config", "own.py", "--recipe", "w8a8", "--out", "out.py")
    weights, data = ("--checkpoint", made / "w.pth"), ("--data", made / "set")
    (place / "empty").mkdir()
    (place / "note").write_text("x")
    for words, message in (
        ((*usual, *data), "--random-weights"),
        ((*usual, *data, "--checkpoint", "none.pth"), "--checkpoint none.pth: there is no such"),
        ((*usual, *data, "--checkpoint", "empty"), "--checkpoint empty: there is no such"),
        ((*usual, *data, *weights, "--random-weights"), "contradict"),
        ((*usual, *weights), "calibration-set"),
        ((*usual, *weights, "--data", "empty"), "empty"),
        ((*usual, *weights, "--data", "note"), "note"),
    ):
        assert message in refused(dfq(*words)), words
        assert not (place / "out.py").exists()
    assert dfq(*usual, *weights, "--data", "x\nopen('mark', 'w')").exit_code == 2
    assert not (place / "out.py").exists()
    assert dfq(*usual, *data, *weights).exit_code == 0
    assert dfq(*usual, *data, "--random-weights").exit_code == 0
    assert read_config(place / "out.py")["model"]["checkpoint"] is None


def test_a_name_that_was_meant(place: Path) -> None:
    result = dfq("mmdet-config", "wn.py", "--recipe", "w8a8")
    assert "did you mean own.py?" in refused(result)


@pytest.mark.parametrize("gone", ["annotations.json", "images", "evaluator", "nothing"])
def test_a_validation_set_that_is_not_there_is_left_out(place: Path, made: Path, gone: str) -> None:
    write_coco(place / "scenes", 1, 64)
    truth = place / ("none.json" if gone == "evaluator" else "scenes/annotations.json")
    with (place / "own.py").open("a") as file:
        file.write(
            "\nval_dataloader = dict(batch_size=1, num_workers=0,\n"
            "    sampler=dict(type='DefaultSampler', shuffle=False),\n"
            f"    dataset=dict(type='CocoDataset', data_root={str(place / 'scenes')!r},\n"
            "    ann_file='annotations.json', data_prefix=dict(img='images/'), pipeline=[]))\n"
            "val_cfg = dict(type='ValLoop')\n"
            f"val_evaluator = dict(type='CocoMetric', ann_file={str(truth)!r}, metric='bbox')\n"
        )
    if gone in ("annotations.json", "images"):
        (place / "scenes" / gone).rename(place / "elsewhere")
    usual = ("mmdet-config", "own.py", "--recipe", "paper-mask-rcnn-r50", "--out", "out.py")
    result = dfq(*usual, "--checkpoint", made / "w.pth", "--data", made / "set")
    assert result.exit_code == 0, result.output
    read = read_config(place / "out.py")
    kept = [read.get(key) for key in ("val_dataloader", "val_cfg", "val_evaluator")]
    if gone == "nothing":
        assert all(kept)
        assert result.stderr == ""
    else:
        # mmengine wants all three or none.
        assert kept == [None, None, None]
        (line,) = result.stderr.splitlines()
        assert "without validation" in line
        assert str(place / ("none.json" if gone == "evaluator" else f"scenes/{gone}")) in line


def test_what_the_runner_does_not_do_is_said(place: Path, made: Path) -> None:
    """dfq may keep the calibrated start; the Runner keeps what it has trained."""
    usual = ("mmdet-config", "own.py", "--recipe", "w8a8", "--out", "out.py")
    files = ("--checkpoint", made / "w.pth", "--data", made / "set")
    result = dfq(*usual, *files)
    assert result.exit_code == 0, result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("method: auto")
    (line,) = dfq(*usual, *files, "--set", "method=qat").stderr.splitlines()
    assert line.startswith("distillation.keep_worse: false")
    model = read_config(place / "out.py")["model"]
    written = load_recipe(model["recipe"], model["overrides"])
    assert (written.method, written.distillation.keep_worse) == ("qat", True)
    asked = ("--set", "method=qat", "--set", "distillation.keep_worse=true")
    assert dfq(*usual, *files, *asked).stderr == ""
    (place / "out.py").unlink()
    for key, value in (("quantization.mixed.budget", "w4a8"), ("distillation.mosaic", "0.5")):
        assert key in refused(dfq(*usual, *files, "--set", f"{key}={value}"))
        assert not (place / "out.py").exists()
    # Averaged weights are not what `last` asks for.
    for selection, averaged in (("ema", True), ("last", False)):
        assert dfq(*usual, *files, "--set", f"distillation.selection={selection}").exit_code == 0
        hooks = [hook["type"] for hook in read_config(place / "out.py")["custom_hooks"]]
        assert ("EMAHook" in hooks) is averaged
