"""How grids of a file fit what its tensors have."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from onnx import helper
from support.onnx_files import SIDE, written

from dfq.export.ranges import GridObserver
from dfq.export.ranges_onnx import without_grids


def test_a_grid_from_zero_on_is_the_relu(tmp_path: Path) -> None:
    """Files leave the ReLU out before such a grid; without the grid it has to be there again."""
    nodes = [
        helper.make_node("QuantizeLinear", ["images", "scale", "zero"], ["q"]),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"]),
        helper.make_node("Neg", ["d"], ["n"]),
        helper.make_node("QuantizeLinear", ["n", "scale", "middle"], ["q2"]),
        helper.make_node("DequantizeLinear", ["q2", "scale", "middle"], ["out"]),
    ]
    path = written(
        tmp_path / "q.onnx", nodes, scale=np.float32(0.01), zero=np.uint8(0), middle=np.uint8(128)
    )
    opened = without_grids(path)
    assert opened is not None
    session, observers = opened
    assert sorted(name for name in observers) == ["images/seen", "n"]
    images = np.full((1, 3, SIDE, SIDE), -5, np.float32)
    images[0, 0] = 1
    (seen,) = session.run(["n"], {"images": images})
    assert np.array_equal(np.unique(seen), [-1, 0])
    observer = GridObserver("x", 0.0, 2.55, 0.01, None)
    observer.add(images)
    assert observer.fit().lost == 0
    signed = GridObserver("x", -1.28, 1.27, 0.01, None)
    signed.add(images)
    assert signed.fit().lost > 0.5
