"""What is read of exported files' own reports: what is there, whatever else is or is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.exports_parts import WHOLE, written

from dfq.report.exports import Export, Latency, Parity, parse, read_exports


def test_all_of_it(tmp_path: Path) -> None:
    written(tmp_path, "b", WHOLE)
    written(tmp_path, "a", {"file": "a.tflite"})
    (tmp_path / "exports" / "other.json").write_text("{")
    (first, second), problems = read_exports(tmp_path)
    assert problems == []
    assert first == Export("a.verify.json", file="a.tflite")
    assert second.size_bytes == 2_097_152
    assert second.parity == [Parity("boxes", 0.5, 2, 0.25, 0.99)]
    assert second.integer_share == 0.875
    assert second.float_operations[0].type == "Softmax"
    assert second.latency == [Latency(320, 1, 40.5, 20.25, 0.5)]
    assert (second.AP, second.float_AP, second.accuracy_data) == (0.271, 0.274, "my/val")
    assert (second.threshold_float, second.threshold) == (0.3, 0.27)
    assert second.faults == ["boxes: more than one step off"]


def test_nothing_there(tmp_path: Path) -> None:
    assert read_exports(tmp_path) == ([], [])


@pytest.mark.parametrize("key", sorted(WHOLE))
@pytest.mark.parametrize("value", [None, 7, "text", [], {}, [7], {"outputs": 3}, True, [[{}]]])
def test_a_part_that_is_missing_or_of_another_kind_takes_no_other_with_it(
    key: str, value: Any
) -> None:
    found, whole = parse({**WHOLE, key: value}, "x"), parse(WHOLE, "x")
    parts = {
        "integers": {"integer_share", "counted_from", "float_operations"},
        "accuracy": {"AP", "float_AP", "accuracy_data"},
        "threshold": {"threshold_float", "threshold"},
    }.get(key, {key})
    others = vars(whole).keys() - parts
    assert {name: vars(found)[name] for name in others} == {
        name: vars(whole)[name] for name in others
    }


@pytest.mark.parametrize(
    "content", ["{", "[]", '{"file": 1e999}', '{"a": 1, "a": 2}', "[" * 10_000, "7"]
)
def test_a_file_that_is_broken_is_named(tmp_path: Path, content: str) -> None:
    written(tmp_path, "whole", WHOLE)
    written(tmp_path, "broken", content)
    (found,), problems = read_exports(tmp_path)
    assert found.file == "w8a8.onnx"
    (problem,) = problems
    assert problem.startswith("exports/broken.verify.json: ")
    assert str(tmp_path) not in problem
