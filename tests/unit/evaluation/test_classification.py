"""The accuracy of a classifier, on images whose logits are known."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from support.small_classifiers import packed, saved, small_resnet, write_classes
from torch import Tensor

from dfq.data.class_set import open_class_set
from dfq.evaluation.classification import agreed_on_pixels, evaluate_classifier
from dfq.models import Classifier, load_model


@pytest.fixture
def model(tmp_path: Path) -> Classifier:
    found = load_model(saved(tmp_path / "m.pt", small_resnet()))
    assert isinstance(found, Classifier)
    found.names = ["dog", "cat", "gnu"]
    return found


def test_figures_by_hand(
    model: Classifier, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_classes(tmp_path / "set", each=2, names=("cat", "cow", "dog"))
    said = iter([1, 0, 0, 0])

    def raw(images: Tensor) -> Tensor:
        rows = [next(said) for _ in images]
        return torch.nn.functional.one_hot(torch.tensor(rows), 3).float()

    monkeypatch.setattr(model, "raw", raw)
    file = packed(folder, tmp_path / "set.zip")
    found = evaluate_classifier(model, open_class_set(file), batch_size=3, interval=True)
    # Cats are category 1, dogs 0; one cat is taken for a dog; cows do not count.
    assert (found.images, found.missing_categories) == (4, ("cow",))
    assert found.top1 == found.f1_micro == 0.75
    assert found.top5 == 1.0
    assert found.per_category == {"dog": 1.0, "cat": 0.5}
    assert found.f1_macro == pytest.approx((2 / 3 + 4 / 5) / 2)
    assert found.top1_interval is not None
    assert found.top1_interval[0] < 0.75 < found.top1_interval[1]


def test_a_network_agrees_with_itself(model: Classifier) -> None:
    pixels = torch.randint(0, 256, (5, 3, 32, 32), dtype=torch.uint8)
    same = agreed_on_pixels(model, model.clone(), pixels)
    assert (same.images, same.same, same.divergence) == (5, 5, 0.0)
    other = model.clone()
    other.module.linear.weight.mul_(-1)
    other.module.linear.bias.mul_(-1)
    apart = agreed_on_pixels(other, model, pixels)
    assert apart.same == 0
    assert apart.divergence > 0
