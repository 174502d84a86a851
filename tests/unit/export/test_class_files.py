"""Anyone's files of classifiers: their input, their output, and what of their predictions moved."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import helper
from support.onnx_files import SIDE, written

from dfq.errors import UserError
from dfq.evaluation.classification import paired_interval
from dfq.export.class_files import ForeignClassifier, task_of
from dfq.export.class_movement import ClassAccuracy, moved_classes
from dfq.export.faults import of_accuracy
from dfq.export.opening import open_file
from dfq.models.classifying import IMAGENET_MEAN, IMAGENET_STD, Preprocessing

CLASSES = 4
WEIGHT = np.random.default_rng(0).normal(size=(CLASSES, 3)).astype(np.float32)


def classifier(path: Path, *, softmax: bool = False) -> Path:
    """A file that multiplies the mean colour of what it is given with a matrix."""
    last = "logits" if softmax else "out"
    nodes = [
        helper.make_node("ReduceMean", ["images"], ["mean"], axes=[2, 3], keepdims=0),
        helper.make_node("MatMul", ["mean", "weight"], [last]),
    ]
    if softmax:
        nodes.append(helper.make_node("Softmax", ["logits"], ["out"], axis=1))
    return written(path, nodes, weight=np.ascontiguousarray(WEIGHT.T))


def logits_by_hand(
    images: torch.Tensor, mean: tuple[float, ...], std: tuple[float, ...]
) -> torch.Tensor:
    colours = (images - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)
    return colours.mean(dim=(2, 3)) @ torch.from_numpy(WEIGHT).T


@pytest.fixture
def images() -> torch.Tensor:
    """Each of a colour of its own."""
    torch.manual_seed(0)
    return torch.rand(64, 3, 1, 1).expand(-1, -1, SIDE, SIDE).contiguous()


@pytest.mark.parametrize(
    ("words", "mean", "std"),
    [
        ("in [0, 1]", (0, 0, 0), (1, 1, 1)),
        ("normalised as the float model's are", (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)),
        ("normalised by ImageNet's mean and spread", IMAGENET_MEAN, IMAGENET_STD),
        ("in [-1, 1]", (0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
        ("from 0 to 255", (0, 0, 0), (1 / 255, 1 / 255, 1 / 255)),
    ],
)
@pytest.mark.parametrize("softmax", [False, True])
def test_how_it_wants_its_images_is_found_out(
    tmp_path: Path,
    images: torch.Tensor,
    softmax: bool,
    words: str,
    mean: tuple[float, ...],
    std: tuple[float, ...],
) -> None:
    model = ForeignClassifier(
        open_file(classifier(tmp_path / "a.onnx", softmax=softmax)), list("abcd"), None,
        Preprocessing(SIDE, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2)),
    )  # fmt: skip
    assert model.gives_probabilities == softmax
    wanted = logits_by_hand(images, mean, std)
    model.choose_input(images, wanted)
    assert model.input.words == words
    given = model.classify(images).softmax(dim=1)
    # Probabilities below 1e-4 are taken for that.
    assert torch.allclose(given, wanted.softmax(dim=1), atol=1e-3)


def test_labels_tell_it_too(tmp_path: Path, images: torch.Tensor) -> None:
    model = ForeignClassifier(open_file(classifier(tmp_path / "a.onnx")), None, None, None)
    assert model.names == ["0", "1", "2", "3"]
    labels = logits_by_hand(images, (0.5,) * 3, (0.5,) * 3).argmax(dim=1)
    assert len(labels.unique()) > 1
    model.choose_input_by_labels(images, labels)
    assert torch.equal(model.classify(images).argmax(dim=1), labels)


def test_files_of_other_networks_are_refused(tmp_path: Path) -> None:
    file = open_file(classifier(tmp_path / "a.onnx"))
    assert task_of(file) == "classification"
    with pytest.raises(UserError, match=r"none of its outputs \(out \[4, 4\]\) is 3 categories'"):
        ForeignClassifier(file, list("abc"), None, None)
    boxes = written(
        tmp_path / "b.onnx", [helper.make_node("Flatten", ["images"], ["flat"]),
        helper.make_node("Reshape", ["flat", "shape"], ["out"])],
        shape=np.array([-1, 6, 32], np.int64),
    )  # fmt: skip
    assert task_of(open_file(boxes)) == "detection"


def test_what_moved_is_said_by_category() -> None:
    # a a a b b, and the file takes one a for b and one b for c.
    before = torch.tensor([[2.0, 0, 0], [2, 0, 0], [2, 0, 0], [0, 2, 0], [0, 2, 0]])
    after = torch.tensor([[2.0, 0, 0], [2, 0, 0], [0, 2, 0], [0, 2, 0], [0, 0, 2]])
    moved = moved_classes(before, after, list("abc"), "float model")
    assert (moved.images, moved.same) == (5, 3)
    groups = {
        name: (group.images, group.same, group.most_to, group.most_to_images)
        for name, group in moved.categories.items()
    }
    assert groups == {"a": (3, 2, "b", 1), "b": (2, 1, "c", 1)}
    sure = np.exp(2) / (np.exp(2) + 2)
    other = 1 / (np.exp(2) + 2)
    assert moved.probability_shift == pytest.approx(2 / 5 * (other - sure))
    # KL of two images: the two probabilities change places.
    assert moved.divergence == pytest.approx(2 / 5 * (sure - other) * 2, abs=1e-5)
    assert moved.logits is not None
    assert moved.logits.max_steps == pytest.approx(255)
    assert not moved.as_before()
    assert any("a: 2 of 3, 1 become b" in line for line in moved.lines())


def test_the_interval_is_of_pairs() -> None:
    right = torch.tensor([True] * 60 + [False] * 40)
    # The same images right: no draw of them differs.
    assert paired_interval(right, right) == (0.0, 0.0)
    low, high = paired_interval(right, torch.roll(right, 10))
    assert low < 0 < high
    # 20 of 100 right in the reference alone: binomial, a spread of 4 images.
    low, high = paired_interval(right, torch.tensor([True] * 80 + [False] * 20))
    assert low == pytest.approx(-0.28, abs=0.02)
    assert high == pytest.approx(-0.12, abs=0.02)


def test_a_drop_of_top1_counts() -> None:
    def faults(top1: float, between: tuple[float, float]) -> list[str]:
        accuracy = ClassAccuracy("set", 100, top1, 1.0, top1, top1, 0.8, 0.8, between)
        return of_accuracy(accuracy, 0.003)

    assert "top-1 0.7000" in faults(0.7, (-0.15, -0.05))[0]
    assert not faults(0.7, (-0.15, 0.01))
    assert not faults(0.798, (-0.003, -0.001))
