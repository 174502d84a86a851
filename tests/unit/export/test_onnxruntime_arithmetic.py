"""What onnxruntime computes in float between integers, done once more."""

from __future__ import annotations

import numpy as np
import onnx
import onnxruntime
import torch
from torch import Generator

from dfq.export.kernels import logistic


def test_its_sigmoid_is_two_polynomials() -> None:
    helper, kind = onnx.helper, onnx.TensorProto.FLOAT
    ends = [helper.make_tensor_value_info(name, kind, ["n"]) for name in "xy"]
    graph = helper.make_graph([helper.make_node("Sigmoid", ["x"], ["y"])], "g", ends[:1], ends[1:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
    x = 4 * torch.randn(100_000, generator=Generator().manual_seed(0))
    x = torch.cat([x, torch.tensor([0.0, 18.0, -18.0, 1e9, -1e9])])
    session = onnxruntime.InferenceSession(model.SerializeToString())
    (theirs,) = session.run(None, {"x": x.numpy()})
    ours = logistic(x).numpy()
    # One rounding more than a fused multiply-add, or one less on a processor that has none.
    assert np.abs(ours - theirs).max() <= 2**-22
    if torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512"):
        assert (ours != theirs).mean() < 1e-4 < (torch.sigmoid(x).numpy() != theirs).mean()
