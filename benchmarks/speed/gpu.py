"""What synthesis and quantization take on a GPU, in one run of under eight minutes.

    python -m benchmarks.speed.gpu --out runs/bench/speed
    python -m benchmarks.speed.gpu --device cpu --size 64 --batch-size 2 --images 4 \\
        --train-images 4 --model demo --other demo

Parts, each in processes of its own and with a time limit, so that one that fails costs no other:

    check       iterations wait for nothing, and come out the same recorded, side by side or plain
    bare        forward and input-gradient backward alone, as they are and as a CUDA graph
    real        the product's iterations: one shard, plain and recorded; several side by side
    profile     which kernels a recorded iteration's time goes to (asked for by --only)
    synthesize  dfq synthesize of --images
    set         dfq synthesize of --train-images
    quantize    dfq qat --recipe w4a8 on these

What is found is printed as it comes, and written to OUT/gpu.json at once.
"""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import click

from benchmarks.common import benchmark, names
from benchmarks.speed.measuring import Bench

MODULE = "benchmarks.speed.gpu"

LIMITS = {
    "check": 60,
    "bare": 50,
    "real": 110,
    "profile": 90,
    "synthesize": 300,
    "set": 120,
    "quantize": 200,
}
"""Of the parts, seconds."""

MEASURED = ("check", "bare", "real", "profile")
"""Parts that go from network to network."""

DEFAULT = ("check", "bare", "real", "synthesize", "set", "quantize")


def run_part(name: str, arguments: list[str], limit: float) -> Iterator[dict[str, Any]]:
    """What a part finds, as it comes; at the end what became of it."""
    command = [sys.executable, "-m", MODULE, *arguments, "--part", name]
    started = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    assert process.stdout is not None

    def stop() -> None:
        # What it started as well.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    timer = threading.Timer(limit, stop)
    timer.start()
    try:
        for line in process.stdout:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                print(line, end="", flush=True)
        code = process.wait()
    finally:
        timer.cancel()
        stop()
        process.wait()
    spent = time.perf_counter() - started
    result = "ok" if code == 0 else f"exit code {code}"
    if code < 0 and spent >= limit:
        result = f"stopped after its {limit:.0f} s"
    yield {"what": "part", "result": result, "seconds": round(spent, 1)}


def timed_command(words: list[str]) -> dict[str, Any]:
    """A command of the product's, its time and its last words."""
    started = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "dfq", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    return {
        "command": shlex.join(["dfq", *words]),
        "seconds": round(time.perf_counter() - started, 1),
        "exit_code": done.returncode,
        "said": [line[:300] for line in lines if "synthesis:" in line][:6] + lines[-8:],
    }


def _commands(part: str, bench: Bench, out: Path) -> Iterator[dict[str, Any]]:
    size, device = str(max(bench.sizes)), ["--device", bench.device]
    model = ["--model", bench.models[0]]
    batch = ["--batch-size", str(bench.batch)]
    made = ["synthesize", *model, "--image-size", size, *batch, *device]
    if part == "synthesize":
        images = bench.images
        yield timed_command([*made, "--images", str(images), "--out", str(out / "all")])
    elif part == "set":
        images = bench.train_images
        yield timed_command([*made, "--images", str(images), "--out", str(out / "set")])
    else:
        words = ["qat", *model, "--recipe", "w4a8", "--data", str(out / "set"), *device]
        yield timed_command([*words, "--out", str(out / "run")])


@benchmark(__doc__)
@click.option("--kit", default="../shared/kit", show_default=True, help="Folder of networks.")
@click.option("--model", help="Instead of the kit's YOLOv5n.")
@click.option("--other", default="yolo11n.yaml", show_default=True, help="A second network.")
@click.option("--device", default="cuda", show_default=True)
@click.option("--size", "sizes", type=int, multiple=True, default=(320, 640), show_default=True)
@click.option("--batch-size", default=32, show_default=True)
@click.option("--iterations", default=65, show_default=True, help="Of a measurement.")
@click.option("--images", default=2000, show_default=True, help="That are synthesized.")
@click.option("--train-images", default=512, show_default=True, help="That are trained on.")
@click.option("--only", help="Parts, with commas between them.")
@click.option("--out", default="runs/bench/speed", show_default=True, type=Path)
@click.option("--part", hidden=True)
@click.option("--network", hidden=True)
def main(
    kit: str,
    model: str | None,
    other: str,
    device: str,
    sizes: tuple[int, ...],
    batch_size: int,
    iterations: int,
    images: int,
    train_images: int,
    only: str | None,
    out: Path,
    part: str | None,
    network: str | None,
) -> None:
    models = (model or f"{kit}/weights/yolov5n-coco/yolov5n.pt", other)
    bench = Bench(
        (network,) if network else models,
        device,
        sizes,
        batch_size,
        iterations,
        images,
        train_images,
    )
    if part is not None:
        own: dict[str, Callable[[], Iterator[dict[str, Any]]]] = {
            "check": bench.check,
            "bare": bench.bare,
            "real": bench.real,
            "profile": bench.profile,
        }
        found = own[part]() if part in own else _commands(part, bench, out)
        for row in found:
            print(json.dumps(row), flush=True)
        return
    parts = names(only, LIMITS, "--only") if only else list(DEFAULT)
    out.mkdir(parents=True, exist_ok=True)
    file = out / "gpu.json"
    arguments = [word for word in sys.argv[1:] if not word.startswith("--only")]
    if "--only" in sys.argv:
        del arguments[sys.argv.index("--only") - 1]
    told: dict[str, Any] = {**bench.surroundings(), "parts": {}}
    for name in parts:
        rows = told["parts"].setdefault(name, [])
        # A process for each network: after one that cannot be recorded no other can.
        for network in models if name in MEASURED else (None,):
            own_arguments = arguments if network is None else [*arguments, "--network", network]
            limit = LIMITS[name] / (1 if network is None else len(models))
            for row in run_part(name, own_arguments, limit):
                rows.append(row)
                print(f"{name}: {json.dumps(row)}", flush=True)
                file.write_text(json.dumps(told, indent=1) + "\n")
    print(f"written: {file}")


if __name__ == "__main__":
    main()
