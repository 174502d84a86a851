"""The bench over networks measures each thing once, goes on where it was, and prints its tables."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from support.cli_parts import stamps

from benchmarks.accuracy import networks as bench_networks
from benchmarks.accuracy.network_tables import comparisons, correlation, report
from benchmarks.accuracy.networks import Bench, Network, Settings
from dfq.demo import write_coco
from dfq.models import load_detector, save_detector

QUICK = (
    "synthesis.iterations=2", "synthesis.label_stage.image_size=64",
    "synthesis.label_stage.iterations=2", "synthesis.label_stage.updates=1",
    "quantization.ranges=minmax", "quantization.reconstruction=none",
)  # fmt: skip


@pytest.fixture
def scenes(place: Path) -> Path:
    """A folder to work in, with two sets of scenes to measure on and one to calibrate on."""
    for seed, name in enumerate(("val", "other", "train")):
        write_coco(place / name, 3, 160, first_seed=100 * seed)
    return place


def bench(*words: str) -> Result:
    common = [
        "--photos", "val", "--photos", "other", "--real", "train", "--out", "out",
        "--images", "2", *(word for text in QUICK for word in ("--set", text)),
    ]  # fmt: skip
    return CliRunner().invoke(bench_networks.main, [*common, *words], catch_exceptions=False)


def rows_of(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


def test_tables_and_nothing_measured_twice(scenes: Path) -> None:
    words = ("--network", "demo", "--labelled", "demo=val", "--width", "w8a8", "--seed", "0")
    first = bench(*words, "--seed", "1", "--width", "w4a4")
    assert first.exit_code == 0, first.output
    rows = rows_of(scenes / "out")
    assert {(row["source"], row["seed"], row["width"]) for row in rows} == {
        (source, seed, width)
        for source, seed in (
            *(("synthetic", 0), ("synthetic", 1), ("photographs", 0), ("photographs", 1)),
            ("noise", 0),
        )
        for width in (None, "w8a8", "w4a4")
    }
    assert len(rows) == 15
    for row in rows:
        if row["width"] is None:
            assert row["worst_log_variance"] >= row["mean_log_variance"] > 0
            assert isinstance(row["warnings"], list)
        else:
            assert row["agreement"] == pytest.approx(sum(row["by_set"]) / 2)
            assert row["AP_float"] > 0.5
    agreement = [line for line in first.stdout.splitlines() if line.startswith("| demo | W")]
    # Of agreement and of AP on labels.
    assert len(agreement) == 4
    differences = [float(line.split("|")[-2]) for line in agreement]
    assert differences[:2] == sorted(differences[:2])
    found = {
        (row["source"], row["seed"]): row["agreement"] for row in rows if row["width"] == "w8a8"
    }
    seeds = found["synthetic", 0], found["synthetic", 1]
    draws = found["photographs", 0], found["photographs", 1]
    mean, photographs = sum(seeds) / 2, sum(draws) / 2
    assert (
        f"| demo | W8A8 | {mean:.3f} ({seeds[0]:.3f}, {seeds[1]:.3f}) | "
        f"{photographs:.3f} ({draws[0]:.3f}, {draws[1]:.3f}) | "
        f"{found['noise', 0]:.3f} | {mean - photographs:+.3f} |"
    ) in agreement[:2]
    assert "worst ln variance ratio, all sets (5): " in first.stdout

    before = stamps(scenes / "out")
    again = bench(*words, "--seed", "1", "--width", "w4a4")
    assert again.stdout == first.stdout
    assert stamps(scenes / "out") == before
    # What a stopped bench had begun to write is measured anew, alone.
    lines = (scenes / "out" / "results.jsonl").read_text().splitlines()
    (scenes / "out" / "results.jsonl").write_text("\n".join([*lines[:-1], lines[-1][:20], ""]))
    resumed = bench(*words, "--seed", "1", "--width", "w4a4")
    assert resumed.stdout == first.stdout
    assert (scenes / "out" / "results.jsonl").read_text().splitlines() == [
        *lines[:-1], lines[-1][:20], lines[-1],
    ]  # fmt: skip


def test_two_networks_in_two_processes(scenes: Path) -> None:
    save_detector(load_detector("demo"), scenes / "same.safetensors")
    words = ["--network", "demo", "--network", "same=same.safetensors@160"]
    result = bench(*words, "--width", "w8a8", "--seed", "0", "--workers", "2")
    assert result.exit_code == 0, result.output
    found: dict[str, dict[str, Any]] = {"demo": {}, "same": {}}
    for row in rows_of(scenes / "out"):
        found[row["network"]][row["source"], row["width"]] = row.get("agreement")
    assert len(found["demo"]) == 6
    assert found["demo"] == found["same"]


def test_results_of_other_settings_do_not_count(scenes: Path) -> None:
    words = ["--network", "demo", "--width", "w8a8", "--seed", "0"]
    assert bench(*words).exit_code == 0
    assert bench(*words, "--labelled", "demo=val").exit_code == 0
    rows = rows_of(scenes / "out")
    # The set's own figures, too, are measured again.
    assert len(rows) == 12
    assert ["AP" in row for row in rows if row["width"]] == [False] * 3 + [True] * 3


def test_a_perfect_copy_agrees_and_a_damaged_one_does_not(scenes: Path) -> None:
    settings = Settings(("val", "other"), "train", scenes / "out", 2, (0,), ("w8a8",), QUICK)
    measured = Bench(Network.parse("demo", {}), settings)
    copy = measured.teacher.clone()
    found = measured.yardstick.measure(copy)
    assert (found["agreement"], *found["by_set"]) == pytest.approx((1, 1, 1))
    with torch.no_grad():
        for parameter in copy.module.parameters():
            parameter.mul_(0.8)
    assert measured.yardstick.measure(copy)["agreement"] < 0.9


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("demo", ("demo", "demo", None)),
        ("demo@320", ("demo", "demo", 320)),
        ("own=a/b=c.pt", ("own", "a/b=c.pt", None)),
        ("own=a@b/c.pt@640", ("own", "a@b/c.pt", 640)),
        ("own=a@b.pt", ("own", "a@b.pt", None)),
    ],
)
def test_names_of_networks(text: str, expected: tuple[str, str, int | None]) -> None:
    network = Network.parse(text, {})
    assert (network.name, network.source, network.image_size) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--network", "a/b.pt"], "--network a/b.pt: give NAME=FILE"),
        (["--network", "a="], "--network a=: give NAME=FILE"),
        (["--network", "demo", "--network", "demo"], "two of them have one name"),
        (["--network", "demo", "--labelled", "other=val"], "--labelled other: give NAME=SET"),
    ],
)
def test_a_mistake_is_told_before_anything_is_made(
    place: Path, words: list[str], message: str
) -> None:
    result = bench(*words)
    assert result.exit_code == 2
    assert message in result.output
    assert not (place / "out").exists()


def test_an_unknown_width_is_one_line(place: Path) -> None:
    result = bench("--network", "demo", "--width", "w9a9")
    assert result.exit_code == 2
    assert "recipe 'w9a9': no such file" in result.output
    assert not (place / "out").exists()


def results() -> dict[Any, dict[str, Any]]:
    """Two networks; on the first the float one detects nothing. The worse a set's figure, the
    worse the network, but for noise."""
    agreements = {
        ("synthetic", 0): 0.6, ("synthetic", 1): 0.4,
        ("photographs", 0): 0.75, ("photographs", 1): 0.85,
    }  # fmt: skip
    found: dict[Any, dict[str, Any]] = {}
    for (source, seed), value in {**agreements, ("noise", 0): 0.7}.items():
        for network in ("none", "some"):
            figure = 0.0 if source == "noise" else 1 - value
            found[network, source, seed, None] = {"worst_log_variance": figure}
            known = value if network == "some" else None
            found[network, source, seed, "w8a8"] = {"agreement": known}
            found[network, source, seed, "w4a4"] = {"agreement": known and value / 2}
    return found


def test_the_worst_difference_comes_first_and_unknown_ones_last() -> None:
    rows = comparisons(results(), ["none", "some"], [0, 1], "agreement")
    assert [(row.network, row.width) for row in rows[:2]] == [("some", "w8a8"), ("some", "w4a4")]
    assert [row.difference for row in rows[:2]] == pytest.approx([-0.3, -0.15])
    assert all(math.isnan(row.difference) for row in rows[2:])
    lines = report(results(), ["none", "some"], [], [0, 1])
    assert "| none | W8A8 | – (–, –) | – (–, –) | – | – |" in lines
    assert "| some | W8A8 | 0.500 (0.600, 0.400) | 0.800 (0.750, 0.850) | 0.700 | -0.300 |" in lines


def test_the_correlation_is_that_of_ranks() -> None:
    assert correlation(results(), "worst_log_variance", ["synthetic", "photographs"]) == (-1, 4)
    # By figure: noise, photographs 1 and 0, 0, 1. By agreement: photographs 1 and 0, noise, 0, 1.
    value, count = correlation(
        results(), "worst_log_variance", ["synthetic", "photographs", "noise"]
    )
    assert (value, count) == (pytest.approx(1 - 6 * (4 + 9 + 1 + 4 + 16) / (5 * 24)), 5)
    assert math.isnan(correlation(results(), "mean_log_variance", ["synthetic"])[0])
