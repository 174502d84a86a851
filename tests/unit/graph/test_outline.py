"""The outline of a network: what it holds, and that a run watches a network once for it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import dfq
from dfq.graph import outline as outlines
from dfq.graph.execution import StopForward, calls_in_order, hooks, last_layer_of_block
from dfq.graph.fold_batchnorm import fold
from dfq.graph.outline import outline
from dfq.models import load_detector
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy


@pytest.fixture
def watched(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The sides of the images that networks were watched on."""
    sides: list[int] = []
    real = outlines._watch

    def watch(model: dfq.models.Detector, size: int) -> outlines.NetworkOutline:
        sides.append(size)
        return real(model, size)

    monkeypatch.setattr(outlines, "_watch", watch)
    return sides


def test_macs_are_those_of_the_shapes() -> None:
    demo = load_detector("demo")
    found = outline(demo, 64)
    assert [row.kind for row in found.layers] == ["conv"] * len(found.layers)
    for row in found.layers:
        out, per_group, *kernel = row.weight_shape
        places = row.output_shape[1] * row.output_shape[2]
        each = out * places * per_group * torch.Size(kernel).numel()
        # Heads that several levels share run once for each, at sizes of their own.
        assert row.macs == each if row.calls == 1 else row.macs > each
    assert found.edge == {*demo.boundary_layers().first, *demo.boundary_layers().last}


def test_what_is_folded_or_quantized_is_not_watched_again(watched: list[int]) -> None:
    demo = load_detector("demo")
    first = outline(demo)
    teacher = fold(demo.clone())
    student = insert_quantizers(teacher.clone(), Policy(8, 8))
    assert outline(teacher) == outline(student) == first
    assert watched == [demo.image_size]
    outline(student, 64)
    assert watched == [demo.image_size, 64]


def test_a_network_that_was_taken_apart_is_watched_again(watched: list[int]) -> None:
    demo = load_detector("demo")
    before = outline(demo, 64)
    name = before.layers[-1].name
    parent, _, leaf = name.rpartition(".")
    layer = demo.module.get_submodule(name)
    assert isinstance(layer, nn.Conv2d)
    setattr(demo.module.get_submodule(parent), leaf, nn.Sequential(layer))
    assert f"{name}.0" in {row.name for row in outline(demo, 64).layers}


def test_a_run_watches_its_network_once(tmp_path: Path, watched: list[int]) -> None:
    dfq.quantize(
        "w4a8",
        model="demo",
        out=tmp_path / "run",
        image_size=64,
        overrides={
            "method": "ptq",
            "synthesis.images": 2,
            "synthesis.iterations": 1,
            "synthesis.label_stage.iterations": 1,
            "quantization.mixed": {"budget": "w4a8", "images": 1, "candidates": [4, 8]},
            "distillation.weights.task": 0,
        },
    )
    # The page counts what the network costs; that is of the run's own model, loaded anew.
    assert watched.count(load_detector("demo").image_size) == 1


def test_hooks_go_where_one_cannot_be_set() -> None:
    layers = [nn.ReLU(), nn.ReLU()]

    def some():  # type: ignore[no-untyped-def]
        yield layers[0].register_forward_hook(lambda *_: None)
        raise RuntimeError("no more")

    with pytest.raises(RuntimeError, match="no more"), hooks(some()):
        pass
    assert not layers[0]._forward_hooks


def test_hooks_go_where_the_pass_ends_early() -> None:
    layer = nn.ReLU()

    def stop(*_: object) -> None:
        raise StopForward

    with pytest.raises(StopForward), hooks([layer.register_forward_hook(stop)]):
        layer(torch.zeros(1))
    layer(torch.zeros(1))


def test_calls_are_counted_in_order() -> None:
    inner, outer = nn.ReLU(), nn.Sigmoid()
    network = nn.Sequential(outer, inner, inner)
    counts = calls_in_order(
        [("inner", inner), ("outer", outer), ("idle", nn.Tanh())], lambda: network(torch.zeros(1))
    )
    assert list(counts.items()) == [("outer", 1), ("inner", 2)]
    assert counts["idle"] == 0


def test_a_block_ends_with_the_last_layer_that_runs_in_it() -> None:
    order = ["a.first", "b.x", "a.second", "b.y"]
    assert last_layer_of_block(order, ["a", "b"]) == {"a.second": "a", "b.y": "b"}
