"""What a report says of where the labels of a synthetic set are from."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from dfq.recipe import load_recipe
from dfq.report.account import _labels_of_set, what_was_real
from dfq.report.material import SYNTHESIS


@pytest.mark.parametrize(
    ("labels", "said", "real"),
    [
        ("adaptive", "its labels are the network's own", False),
        ("multi", "its labels are random", False),
        ("none", "without labels", False),
        ("real:some", "its labels were taken from a real set", True),
        ("tile:some", "its labels are random, as frequent and as large as those of a real", True),
    ],
)
def test_labels_are_what_they_are(labels: str, said: str, real: bool) -> None:
    recipe = load_recipe("w4a8", [f"synthesis.labels={labels}"])
    found: Any = SimpleNamespace(data=None, recipe=recipe, origin=SYNTHESIS, manifest={})
    assert _labels_of_set(found).startswith(said)
    assert ("the labels of a real set were" in what_was_real(found)) == real
