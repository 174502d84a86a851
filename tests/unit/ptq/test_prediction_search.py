"""Scales of activations by what each alone does to the predictions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from support.toys import Residual, Toy, images
from torch import Tensor, nn

from dfq.graph.execution import hooks, last_called_by_end
from dfq.models.base import Detector, DistillationPair
from dfq.models.divergence import total_divergence
from dfq.ptq.activation_refinement import candidates
from dfq.ptq.pipeline import calibrate_and_round
from dfq.ptq.prediction_search import FACTORS, HOPELESS, METRICS, search_grids
from dfq.quantization.calibration import calibrate, run_observers
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import activation_quantizers, float_mode
from dfq.runtime.progress import Silent


class Classes(Toy):
    """A toy whose every place holds two classes, one against the other."""

    def distillation_pairs(self, student_raw: Tensor, teacher_raw: Tensor) -> Any:
        return [DistillationPair("class", student_raw, teacher_raw, "categorical", dim=1)]


def network() -> Classes:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        layers = nn.Sequential(
            *(nn.Conv2d(3, 6, 3, padding=1), nn.SiLU(), nn.Conv2d(6, 6, 3, padding=1), nn.ReLU()),
            nn.Conv2d(6, 2, 1),
        )
    with torch.no_grad():
        for layer in layers[::2]:
            layer.weight.mul_(3)
    return Classes(layers)


def joined() -> Classes:
    """Two blocks with sums in them and a layer between."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        between = nn.Conv2d(8, 3, 1)
        return Classes(nn.Sequential(Residual(), between, Residual(), nn.Conv2d(8, 2, 1)))


def started(teacher: Detector, bits: int, activations: str, seen: Tensor) -> Detector:
    policy = Policy(8, bits, "same", activations=activations)
    student = insert_quantizers(teacher.clone(), policy)
    calibrate(student, [seen.float() / 255])
    return student


DISTANCES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    # By PyTorch's own, in double precision.
    "pd": lambda ours, theirs: nn.functional.kl_div(
        ours.log_softmax(1), theirs.log_softmax(1), reduction="sum", log_target=True
    ),
    "mse-output": nn.functional.mse_loss,
    "cosine-output": lambda ours, theirs: (
        1 - nn.functional.cosine_similarity(ours.flatten(), theirs.flatten(), dim=0)
    ),
}


@pytest.mark.parametrize("metric", sorted(METRICS))
@pytest.mark.parametrize(
    ("bits", "activations"),
    [(2, "symmetric"), (3, "asymmetric"), (5, "symmetric"), (8, "asymmetric")],
)
def test_it_chooses_as_brute_force_in_double_precision(
    metric: str, bits: int, activations: str
) -> None:
    teacher, seen = network(), (images(4) * 255).byte()
    student = started(teacher, bits, activations, seen)
    values = run_observers(student, [seen.float() / 255])
    tried = {
        name: candidates(quantizer, values[name], factors=FACTORS, hopeless=HOPELESS)
        for name, quantizer in activation_quantizers(student.module)
    }
    search_grids(student, teacher, seen, metric)
    exact, pixels = teacher.clone().module.double(), seen.double() / 255
    expected, moved = exact(pixels), 0
    for name, quantizer in activation_quantizers(student.module):
        qmin, qmax = quantizer.bounds

        def distance(scale: float, zero: int, name: str = name, ends: Any = (qmin, qmax)) -> float:
            def rounded(_m: nn.Module, inputs: tuple[Tensor]) -> tuple[Tensor]:
                return (((inputs[0] / scale).round() + zero).clamp(*ends).sub(zero) * scale,)

            with hooks([exact.get_submodule(name).register_forward_pre_hook(rounded)]):
                return float(DISTANCES[metric](exact(pixels), expected))

        every = [distance(float(s.double()), round(float(z))) for s, z in tried[name]]
        # Pixels are on a grid of 8 bits as they are: nothing else is worth trying.
        assert len(every) > 2 or (name, bits) == ("0", 8)
        chosen = distance(float(quantizer.scale.double()), round(float(quantizer.zero_point)))
        assert chosen <= min(every) * (1 + 1e-3) + 1e-7
        moved += chosen < every[0]
    assert moved or bits == 8


def test_the_rest_is_float_while_one_is_looked_at() -> None:
    teacher, seen = joined(), (images(1) * 255).byte()
    student = insert_quantizers(teacher.clone(), Policy(4, 4, "same", placement="everywhere"))
    calibrate(student, [seen.float() / 255])
    quantizers = {id(q): name for name, q in activation_quantizers(student.module)}
    on: set[frozenset[str]] = set()

    def look(*_: object) -> None:
        enabled = [m for m in student.module.modules() if isinstance(m, Quantizer) and m.enabled]
        on.add(frozenset(quantizers.get(id(one), "a weight") for one in enabled))

    with hooks([student.module.register_forward_pre_hook(look)]):
        search_grids(student, teacher, seen, "pd")
    assert on == {frozenset(), *(frozenset({name}) for name in quantizers.values())}
    assert all(m.enabled for m in student.module.modules() if isinstance(m, Quantizer))


def test_pd_takes_another_scale_than_least_squares_and_predicts_better() -> None:
    """Half of the channels are large, and no layer listens to them."""
    teacher, seen = network(), (images(8) * 255).byte()
    with torch.no_grad():
        teacher.module[2].weight[:3] *= 8
        teacher.module[4].weight[:, :3] *= 0.02
    student = started(teacher, 3, "asymmetric", seen)
    by_squares = student.clone()
    search_grids(student, teacher, seen, "pd")
    # Measured on others, with this activation alone quantized.
    other, found = (images(8, seed=5) * 255).byte(), {}
    for name, one in (("mse", by_squares), ("pd", student)):
        with float_mode(one.module):
            one.module[4].input_quantizer.enabled = True
            found[name] = float(total_divergence(one, teacher, [other]))
    assert student.module[4].input_quantizer.scale < by_squares.module[4].input_quantizer.scale
    assert found["pd"] < 0.8 * found["mse"]


def test_what_is_finished_is_not_computed_again_and_changes_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Also where quantizers stand behind the last layer of a block, or between blocks."""
    teacher, seen, found = joined(), (images(1) * 255).byte(), []
    for blocks in (["0", "2"], []):
        student = insert_quantizers(teacher.clone(), Policy(8, 3, "same", placement="everywhere"))
        assert len(list(activation_quantizers(student.module))) > 8
        calibrate(student, [seen.float() / 255])
        monkeypatch.setattr(student, "blocks", lambda blocks=blocks: blocks)
        search_grids(student, teacher, seen, "pd")
        found.append([(q.scale, q.zero_point) for _, q in activation_quantizers(student.module)])
    assert all(torch.equal(torch.stack(a), torch.stack(b)) for a, b in zip(*found, strict=True))


def test_blocks_end_with_the_last_that_was_called() -> None:
    """However the names go: `late` is called behind the block, which calls `early` again."""
    early, late, inner = nn.Identity(), nn.Identity(), nn.Identity()
    none, block, last = nn.Identity(), nn.Sequential(early, inner, early), nn.Sequential(early)
    order, ends = last_called_by_end(
        {"late": late, "early": early, "inner": inner},
        {"last": last, "block": block, "none": none},
        lambda: last(late(block(none(torch.zeros(1))))),
    )
    assert order == ["early", "inner", "late"]
    assert list(ends.items()) == [("none", None), ("block", "inner"), ("last", "late")]


@pytest.mark.parametrize("ranges", ["cosine", "pd"])
@pytest.mark.parametrize("bits", [2, 8])
def test_a_recipe_names_it(ranges: str, bits: int) -> None:
    section = Quantization(
        weight_bits=8, activation_bits=bits, ranges=ranges, reconstruction="none", refine_images=2
    )
    teacher, seen = network(), (images(4) * 255).byte()
    student = insert_quantizers(teacher.clone(), section.policy())
    calibrate_and_round(student, teacher, seen, section, Silent())
    other = insert_quantizers(teacher.clone(), section.policy())
    calibrate(other, [seen.float() / 255], search=section.local_search)
    if section.ranges == "pd":
        search_grids(other, teacher, seen[:2], "pd")
    for a, b in zip(student.module.parameters(), other.module.parameters(), strict=True):
        assert torch.equal(a, b)
