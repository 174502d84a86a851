"""Mixed precision on the command line: measured, spread, trained, and found again after a kill."""

from __future__ import annotations

import json
from pathlib import Path

from support.forks import ended, killed, launch, start, wait_for
from support.harness import command, contents, has_one_error, has_one_error_after_output

MIXED = ["--set", "quantization.mixed.budget=w4a8", "--set", "quantization.mixed.images=2"]


def words_for(model: Path, data: Path, out: str = "run", *more: str) -> list[str]:
    return [
        "qat", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(data),
        "--out", out, *MIXED, *more,
    ]  # fmt: skip


def test_sensitivity(place: Path, model: Path, made: Path) -> None:
    words = ("sensitivity", "--model", model, "--data", made, "--recipe", "tiny.yaml")
    result = command(*words, "--images", "2", "--json", "plain.json")
    assert result.exit_code == 0, result.output
    plain = json.loads((place / "plain.json").read_text())
    assert plain["budget"] is None
    assert plain["overrides"] == {}
    first = plain["layers"][0]
    assert first["name"] in result.stdout
    assert "w8a8 (fixed)" in result.stdout
    free = [row for row in plain["layers"] if len(row["divergence"]) > 1]
    assert all(list(row["divergence"]) == ["w3a8", "w4a8", "w5a8", "w6a8", "w8a8"] for row in free)
    assert f"{len(free)} of {len(plain['layers'])} layers measured on 2 images" in result.stdout

    result = command(*words, "--images", "2", "--budget", "w4a8", "--json", "deep/spent.json")
    assert result.exit_code == 0, result.output
    spent = json.loads((place / "deep" / "spent.json").read_text())
    assert spent["layers"] == plain["layers"]
    assert 0 < spent["spent"] <= spent["budget"]
    assert set(spent["overrides"]) == {row["name"] for row in free}
    chosen = sum(row["divergence"][spent["overrides"][row["name"]]] for row in free)
    assert abs(chosen - spent["divergence"]) < 1e-9
    # w4a8 throughout was among the choices.
    assert chosen <= sum(row["divergence"]["w4a8"] for row in free)
    # In bytes, the same budget buys something else.
    result = command(*words, "--images", "2", "--budget", "1k", "--cost", "bytes")
    line = has_one_error_after_output(result)
    assert "quantization.mixed.budget: 1000 bytes cannot be kept" in line


def test_a_budget_that_is_none(place: Path, model: Path, made: Path) -> None:
    words = ("sensitivity", "--model", model, "--data", made, "--budget", "cheap")
    assert "'cheap' is no budget" in has_one_error(command(*words))


def test_a_run_with_a_budget(place: Path, model: Path, made: Path) -> None:
    result = command(*words_for(model, made))
    assert result.exit_code == 0, result.output
    found = json.loads((place / "run" / "sensitivity.json").read_text())
    assert command("inspect", "--model", "run", "--json", "run.json").exit_code == 0
    inspected = json.loads((place / "run.json").read_text())
    bits = {
        row["name"]: f"w{row['weight_bits']}a{row['activation_bits']}"
        for row in inspected["layers"]
    }
    assert found["overrides"].items() <= bits.items()
    assert len(set(found["overrides"].values())) > 1
    # The budget is kept by what was made, not by what was planned alone.
    assert inspected["bit_operations"] == found["spent"] <= found["budget"]
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["mixed"]["spent"] == found["spent"]
    assert "bits by layer: " in (place / "run" / "log.txt").read_text()


def test_killed_and_resumed_with_a_budget(place: Path, model: Path, made: Path) -> None:
    more = ("--set", "distillation.epochs=8")
    assert command(*words_for(model, made, "whole", *more)).exit_code == 0
    process = start(words_for(model, made, "run", *more))
    wait_for((place / "run" / "checkpoint.pt").exists, process)
    killed(process)
    stamp = (place / "run" / "sensitivity.json").stat().st_mtime_ns
    assert command(*words_for(model, made, "run", *more)).exit_code == 0
    assert contents(place / "run") == contents(place / "whole")
    assert (place / "run" / "sensitivity.json").stat().st_mtime_ns == stamp


def test_two_processes_take_the_same_bits(place: Path, model: Path, made: Path) -> None:
    processes = launch(words_for(model, made), 2, place)
    codes = [ended(process) for process in processes]
    assert codes == [0, 0], (place / "rank-0.txt").read_text()
    found = json.loads((place / "run" / "sensitivity.json").read_text())
    assert command("inspect", "--model", "run", "--json", "run.json").exit_code == 0
    assert json.loads((place / "run.json").read_text())["bit_operations"] == found["spent"]


def test_two_processes_measure_once(place: Path, model: Path, made: Path) -> None:
    words = [
        "sensitivity", "--recipe", "tiny.yaml", "--model", str(model), "--data", str(made),
        "--images", "2", "--json", "found.json",
    ]  # fmt: skip
    processes = launch(words, 2, place)
    assert [ended(process) for process in processes] == [0, 0]
    assert "layers measured on 2 images" in (place / "rank-0.txt").read_text()
    assert (place / "rank-1.txt").read_text() == ""
    assert (place / "found.json").exists()


def test_a_run_from_before_a_key_existed_goes_on(place: Path, model: Path, made: Path) -> None:
    words = [word for word in words_for(model, made) if word not in MIXED]
    process = start([*words, "--set", "distillation.epochs=30"])
    wait_for((place / "run" / "checkpoint.pt").exists, process)
    killed(process)
    state = json.loads((place / "run" / "state.json").read_text())
    del state["recipe"]["quantization"]["mixed"]
    (place / "run" / "state.json").write_text(json.dumps(state))
    result = command(*words, "--set", "distillation.epochs=30")
    assert result.exit_code == 0, result.output
    assert "training resumed" in (place / "run" / "log.txt").read_text()
    # A key that had another value then is another experiment.
    assert "another recipe" in has_one_error(command(*words))
