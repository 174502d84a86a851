"""The bench against runtimes' own quantizers measures each file once, and prints its tables."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import openvino
import pytest
import torch
from click.testing import CliRunner
from support.cli_parts import stamps

import dfq
from benchmarks.runtimes import baselines
from benchmarks.runtimes.baseline_tables import report
from benchmarks.runtimes.runtime_tools import decoding_of_onnx, decoding_of_openvino
from dfq.demo import write_coco

QUICK = ("quantization.ranges=minmax", "quantization.reconstruction=none")
SIDE = 96


@pytest.fixture
def scenes(place: Path) -> Path:
    """A folder to work in, with scenes to measure on and others to calibrate on."""
    write_coco(place / "val", 4, SIDE, first_seed=0)
    write_coco(place / "train", 3, SIDE, first_seed=100)
    return place


def words(*more: str) -> list[str]:
    return [
        "--model", "demo", "--data", "val", "--size", str(SIDE), "--time-at", str(SIDE),
        "--set", "some=train", "--first", "some=2", "--set", "all=train", "--out", "out",
        "--rounds", "1", *(word for text in QUICK for word in ("--override", text)), *more,
    ]  # fmt: skip


def test_all_files_are_measured_once(scenes: Path) -> None:
    first = CliRunner().invoke(baselines.main, words(), catch_exceptions=False)
    assert first.exit_code == 0, first.output
    rows = [
        json.loads(line) for line in (scenes / "out" / "results.jsonl").read_text().split("\n")[:-1]
    ]
    measured = {
        (r["runtime"], r["tool"], r["set"], r["images"]): r for r in rows if r["kind"] == "AP"
    }
    assert set(measured) == {
        ("onnxruntime", "float", None, None), ("onnxruntime", "ours W8A8", "some", 2),
        ("onnxruntime", "quantize_dynamic", None, None),
        ("onnxruntime", "quantize_static", "some", 2), ("onnxruntime", "quantize_static", "all", 3),
        ("OpenVINO", "float", None, None), ("OpenVINO", "ours W8A8", "some", 2),
        ("OpenVINO", "NNCF", "some", 2), ("OpenVINO", "NNCF", "all", 3),
    }  # fmt: skip
    truth = dfq.evaluate("demo", "val", image_size=SIDE).AP
    assert truth > 0.3
    for (runtime, tool, _, _), row in measured.items():
        whole = measured[runtime, "float", None, None]
        if tool == "float":
            assert row["AP"] == pytest.approx(truth, abs=0.002)
            assert row["change"] is None
        else:
            low, high = row["change"]
            assert low <= high
            assert row["bytes"] < whole["bytes"] / 2
    # Sets of their own make files of their own.
    files = scenes / "out" / "files"
    for stem in ("onnxruntime-quantize_static-{}-96.onnx", "OpenVINO-NNCF-{}-96.bin"):
        assert (files / stem.format("some")).is_file()
        assert (files / stem.format("all")).is_file()
    timed = {r["runtime"]: r["files"] for r in rows if r["kind"] == "latency"}
    assert set(timed["onnxruntime"]) == {
        "float",
        "ours W8A8",
        "quantize_dynamic",
        "quantize_static",
    }
    assert set(timed["OpenVINO"]) == {"float", "float, bfloat16", "ours W8A8", "NNCF"}
    for of_runtime, static in (("onnxruntime", "quantize_static"), ("OpenVINO", "NNCF")):
        assert timed[of_runtime]["float"]["cpu"]["of_float"] == 1
        assert timed[of_runtime][static]["wall"]["of_static"] == 1
    assert "Ultralytics INT8: left out" in first.stdout
    assert "CPU: " in first.stdout

    before = stamps(scenes / "out")
    again = CliRunner().invoke(baselines.main, words(), catch_exceptions=False)
    assert again.stdout == first.stdout
    assert stamps(scenes / "out") == before
    # A name that means something else by now is no name of these files.
    changed = ["all=val" if word == "all=train" else word for word in words()]
    other = CliRunner().invoke(baselines.main, changed)
    assert other.exit_code == 2
    assert "its files are of another --set all" in other.output
    assert stamps(scenes / "out") == before


def test_decoding_stays_in_float_and_all_before_it_does_not(scenes: Path) -> None:
    path = dfq.export("demo", scenes / "float.onnx", image_size=SIDE)
    nodes = {node.name: node for node in onnx.load(path).graph.node}
    left = decoding_of_onnx(path)
    assert left
    assert not [name for name in left if nodes[name].op_type == "Conv"]
    # Whatever takes a result of theirs is one of them too.
    given = {result for name in left for result in nodes[name].output}
    assert {name for name, node in nodes.items() if given.intersection(node.input)} <= set(left)
    # And whatever gives boxes and scores.
    assert given >= {"boxes", "scores"}
    # SiLU's sigmoids, which convolutions follow, are not among them.
    sigmoids = {name for name, node in nodes.items() if node.op_type == "Sigmoid"}
    assert sigmoids - set(left)

    model = openvino.Core().read_model(dfq.export("demo", scenes / "float.xml", image_size=SIDE))
    kinds = {node.get_friendly_name(): node.get_type_name() for node in model.get_ordered_ops()}
    found = decoding_of_openvino(scenes / "float.xml")
    assert found
    assert set(found) < set(kinds)
    assert not {kinds[name] for name in found} & {"Convolution", "GroupConvolution", "Constant"}
    assert "Convolution" in kinds.values()


def test_the_one_output_of_ultralytics_is_boxes_and_scores() -> None:
    # One anchor, centre 10, 20, sides 4, 8, and three categories.
    one = torch.tensor([10.0, 20, 4, 8, 0.1, 0.2, 0.3]).view(1, 7, 1)
    found = baselines.split(one)
    assert found["boxes"].tolist() == [[[8, 16, 12, 24]]]
    assert np.allclose(found["scores"].numpy(), [[[0.1, 0.2, 0.3]]])


def test_figures_stand_in_their_rows() -> None:
    common = {"kind": "AP", "runtime": "r", "bytes": 2_000_000}
    rows = [
        {**common, "tool": "float", "set": None, "images": None, "AP": 0.5, "change": None},
        {**common, "tool": "x", "set": "a", "images": 4, "AP": 0.4, "change": [-0.2, -0.1]},
        {**common, "tool": "x", "set": "left out", "images": 4, "AP": 0.3, "change": [0, 0]},
        {
            "kind": "latency", "runtime": "r", "size": 64,
            "files": {
                "x": {
                    "cpu": {"ms": 3.0, "of_float": 0.75, "of_static": 1.5},
                    "wall": {"ms": 9.0, "of_float": 0.8, "of_static": 1.2},
                },
            },
        },
    ]  # fmt: skip
    lines = report(rows, ["a"], [64, 128])
    assert "| r | x | a | 4 | 0.4000 | -0.200 to -0.100 | 80.0% | 0.75 | – | 2.00 MB |" in lines
    assert "| r | float | – | – | 0.5000 | – | 100.0% | – | – | 2.00 MB |" in lines
    assert "| r | 64 | x | 3.00 | 0.75 | 1.50 | 9.00 | 0.80 | 1.20 |" in lines
    assert not [line for line in lines if "left out" in line]


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--ours", "other"], "--ours other: names none of the sets"),
        (["--first", "other=3"], "--first other: names none of the sets"),
    ],
)
def test_a_name_of_no_set(place: Path, more: list[str], message: str) -> None:
    result = CliRunner().invoke(baselines.main, words(*more))
    assert result.exit_code == 2
    assert message in result.output
    assert not (place / "out").exists()
