"""What several tests take: of `test_exports` and others."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

WHOLE: dict[str, Any] = {
    "file": "w8a8.onnx",
    "format": "onnx",
    "runtime": "onnxruntime",
    "size_bytes": 2_097_152,
    "precision": "W8A8",
    "parity": {
        "outputs": {
            "boxes": {"step": 0.5, "max_steps": 2, "mean_steps": 0.25, "share_within_one": 0.99}
        }
    },
    "integers": {
        "share_of_macs": 0.875,
        "counted_from": "the optimised graph",
        "float_operations": [{"name": "/head/Softmax", "type": "Softmax", "reason": "no kernel"}],
    },
    "latency": [
        {"image_size": 320, "threads": 1, "float_ms": 40.5, "file_ms": 20.25, "ratio": 0.5}
    ],
    "accuracy": {"AP": 0.271, "float_AP": 0.274, "data": "my/val"},
    "threshold": {"float": 0.3, "this": 0.27},
    "faults": ["boxes: more than one step off"],
    "command": "dfq verify w8a8.onnx",
}


def written(run: Path, name: str, content: Any) -> Path:
    (run / "exports").mkdir(parents=True, exist_ok=True)
    path = run / "exports" / f"{name}.verify.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path
