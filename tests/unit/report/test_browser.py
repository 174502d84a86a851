"""The page in a browser, on a desk and on a phone: nothing sticks out, all of it can be read."""

from __future__ import annotations

import html
import json
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.exports_parts import WHOLE
from support.pages import check
from support.tiny_detector import blobs, tiny_detector

from dfq.data.drawing import COLOURS
from dfq.graph.fold_batchnorm import fold
from dfq.models.base import Detector
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.inspection import list_layers
from dfq.quantization.policy import Policy
from dfq.recipe import Recipe
from dfq.report import page as pages_of_runs
from dfq.report.exports import parse
from dfq.report.material import Compared, Comparison, Material
from dfq.report.page import render
from dfq.report.pictures import Pair, tile
from dfq.report.sections import sections

# A browser, started for every page.
pytestmark = pytest.mark.e2e

STYLE = Path(pages_of_runs.__file__).parent / "templates" / "page.css"

LONG = "an_unbroken_name_of_a_layer_or_of_a_category_" * 6

# Of each element that is no part of a table or of a drawing, which scroll or shrink by themselves.
MEASURE = """
<script>
addEventListener("load", () => {
  const found = {};
  for (const frame of document.querySelectorAll("iframe")) {
    const page = frame.contentDocument, width = frame.contentWindow.innerWidth;
    const out = [], small = [];
    for (const one of page.querySelectorAll("body *")) {
      if (one.closest(".scroll, svg svg, .away") || one.ownerSVGElement) continue;
      const place = one.getBoundingClientRect();
      const outside = place.right > width + 0.5 || place.left < -0.5;
      if (place.width && outside) out.push(one.outerHTML.slice(0, 200));
    }
    for (const one of page.querySelectorAll(".chart svg text, p, td, th, dd, dt, li, small")) {
      const matrix = one.ownerSVGElement && one.getScreenCTM();
      const scale = matrix ? Math.hypot(matrix.a, matrix.b) : 1;
      const size = parseFloat(page.defaultView.getComputedStyle(one).fontSize) * scale;
      if (size < 9.5) small.push([one.textContent.slice(0, 40), size]);
    }
    found[frame.id] = {
      width, scroll: page.documentElement.scrollWidth, out, small,
      loaded: performance.getEntriesByType("resource").map(one => one.name)
        .concat(frame.contentWindow.performance.getEntriesByType("resource").map(one => one.name)),
      tables: page.querySelectorAll("table").length,
    };
  }
  const said = document.createElement("pre");
  said.id = "measured";
  said.textContent = JSON.stringify(found);
  document.body.append(said);
});
</script>
"""


@pytest.fixture(scope="session")
def chromium() -> str:
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("there is no chromium to look at pages with (apt-get install chromium)")
    return found


def looked_at(chromium: str, folder: Path, source: str) -> dict[str, Any]:
    """What a browser makes of a page, 390 and 1280 pixels wide."""
    frames = "".join(
        f'<iframe id="{width}" style="width:{width}px;height:900px;border:0" '
        f'srcdoc="{html.escape(source)}"></iframe>'
        for width in (390, 1280)
    )
    (folder / "frames.html").write_text(f"<!DOCTYPE html><body>{frames}{MEASURE}")
    done = subprocess.run(
        [
            chromium, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic",
            "--no-first-run", "--disable-background-networking", "--disable-component-update",
            "--disable-sync", f"--user-data-dir={folder / 'profile'}", "--window-size=1400,900",
            "--virtual-time-budget=20000", "--dump-dom", (folder / "frames.html").as_uri(),
        ],
        capture_output=True, text=True, timeout=600, check=False,
    )  # fmt: skip
    measured = re.search(r'<pre id="measured">(.*?)</pre>', done.stdout, re.DOTALL)
    assert measured is not None, done.stderr[-2000:]
    return dict(json.loads(html.unescape(measured[1])))


def networks() -> tuple[Detector, Detector, Policy]:
    teacher = fold(tiny_detector())
    teacher.names[:] = [LONG, "<script>alert(1)</script>", "猫" * 40]
    policy = Policy(overrides=(("model.0.*", "float"), ("*9.m.0", 8)))
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [blobs(4)])
    return teacher, student, policy


def full_page(**more: Any) -> str:
    """A page with everything on it, every name as long as they come."""
    _, student, policy = networks()
    metrics: dict[str, Any] = {
        "selected": f"ptq: {LONG}",
        "said": [LONG, f"--set {LONG}=1"],
        "method": "qat",
        "weight_bits": 4,
        "activation_bits": 8,
        "images": 1_000_000,
        "quantized_share_of_macs": 0.987,
        "history": [{"kl": 1e-7 / (i + 1), LONG: 123456.7 * i} for i in range(60)],
        "teacher_divergence": {"start": 1234.5678, LONG: 0.001},
        "closeness": {
            "synthetic": {"objects": 12345, "kept": 12001, "kept_above": 11999, "images": 16,
                          "held_out": True},
            "photos": {"objects": 12345, "kept": 12001, "kept_above": 11999, "images": 64,
                       "AP": 0.5, "data": f"/{LONG}/{LONG}"},
        },
        "evaluation": {"data": f"/{LONG}", "float": {"AP": 0.5, "AP50": 0.7},
                       "quantized": {"AP": 0.4, "AP50": 0.6}},
        "set_quality": {"images": 128, "layers": [
            {"name": f"{LONG}{i}", "shift": 0.1 * i, "log_variance": -0.2 * i} for i in range(9)]},
    }  # fmt: skip
    found = Material(
        manifest={
            "policy": policy.to_dict(),
            "identity": {"checkpoint": "0" * 64, "data": ["1" * 64, ["2" * 64]]},
            "versions": {"dfq": "1", LONG: LONG},
            "model_sha256": "3" * 64,
        },
        metrics=metrics,
        recipe=Recipe(model=f"/{LONG}/{LONG}.pt"),
        student=student,
        layers=list_layers(student),
        origin=f"/{LONG}",
        sensitivity={"layers": [
            {"name": row.name, "divergence": {"w4a8": 0.5, "w8a8": 0.1}}
            for row in list_layers(student)
        ]},
        exports=[parse({**WHOLE, "file": f"{LONG}.onnx", "faults": [LONG] * 2}, f"{LONG}.json")],
        comparison=Comparison(
            [Compared("Float", 0.5, 0.7, before=True), Compared("This", 0.4, 0.6, this=True),
             Compared("Naive (min-max, noise)", 0.3, 0.5), Compared(LONG, 0.3, 0.5)],
            LONG, "results.json", f"dfq demo {LONG}",
        ),
        missing=[f"the set: not found ({LONG})"],
    )  # fmt: skip
    context = sections(found)
    pixels = np.full((64, 160, 3), 90, np.uint8)
    boxes = np.array([[0.0, 0.0, 0.4, 0.4], [0.6, 0.6, 1.0, 1.0], [0.1, 0.2, 0.9, 0.8]])
    some = [tile(each, boxes, [0, 1, 2], [0.9, 0.8, 0.7], student.names, with_scores=True)
            for each in (pixels, pixels.transpose(1, 0, 2).copy())]  # fmt: skip
    context["pairs"] = [
        {"title": "On 16 images", "pairs": [Pair(one, one) for one in some * 2], "real": True}
    ]
    context["set"] = {
        "tiles": some * 6, "real": False, "noise": False, "labelled": True,
        "summary": [("Images", "1000000"), ("Pixels", "16384 × 16384")], "charts": [],
        "categories": {"rows": [(name, 10, 50.0) for name in student.names], "others": 7,
                       "objects": 9},
    }  # fmt: skip
    return render({**context, **more}).decode()


def bare_page() -> str:
    """A page with next to nothing on it."""
    _, student, policy = networks()
    found = Material(
        {"policy": policy.to_dict()}, {"selected": "ptq"}, Recipe(), student, list_layers(student)
    )
    return render(sections(found)).decode()


@pytest.mark.parametrize("make", [full_page, bare_page])
def test_nothing_sticks_out_and_nothing_is_fetched(
    chromium: str, tmp_path: Path, make: Any
) -> None:
    source = make()
    assert source == make()
    check(source)
    found = looked_at(chromium, tmp_path, source)
    assert set(found) == {"390", "1280"}
    for width, one in found.items():
        assert one["width"] == int(width)
        assert one["scroll"] <= one["width"], one["out"][:5]
        assert one["out"] == []
        assert one["small"] == []
        assert one["tables"] >= 2
        assert not [name for name in one["loaded"] if not name.startswith("data:")]


def test_what_sticks_out_is_seen(chromium: str, tmp_path: Path) -> None:
    wide = '<p style="width:600px">wide</p><p style="font-size:6px">small</p></main>'
    found = looked_at(chromium, tmp_path, bare_page().replace("</main>", wide))
    assert found["390"]["scroll"] > 390
    assert found["390"]["out"]
    assert found["1280"]["out"] == []
    assert found["1280"]["small"]


def luminance(colour: str) -> float:
    """Relative luminance as WCAG 2 has it."""
    parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in parts]
    return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_contrast_on_screen_in_the_dark_and_on_paper() -> None:
    blocks = re.findall(r":root \{(.*?)\}", STYLE.read_text(), re.DOTALL)
    assert len(blocks) == 3
    for block in blocks:
        colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6});", block))
        for ground in ("paper", "card"):
            for name in ("ink", "muted", "accent", "green", "amber", "red", "grey"):
                assert contrast(colours[name], colours[ground]) >= 4.5, (name, ground)
            for name in ("series-1", "series-2", "series-3"):
                assert contrast(colours[name], colours[ground]) >= 3, (name, ground)
    assert all(contrast(colour, "#ffffff") >= 4.5 for colour in COLOURS)
