"""Training brings the student closer, survives interruption bit by bit, and fails with one line."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_detector import blobs, stacked
from support.trainer_parts import (
    Blobs,
    Interrupt,
    assert_same,
    settings,
    state,
    student_of,
)
from torch import Tensor, nn

from dfq.errors import UserError
from dfq.models.base import Detector
from dfq.qat.averaging import ExponentialMovingAverage
from dfq.qat.settings import DistillationWeights
from dfq.qat.trainer import Trainer
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.quantizers import Quantizer
from dfq.quantization.traversal import quantized_layers


@pytest.fixture(scope="module")
def data() -> Blobs:
    return Blobs()


def trainer(
    teacher: Detector, data: Blobs, folder: Path, *, calibrated: bool = True, **changes: Any
) -> Trainer:
    student = student_of(teacher, calibrated=calibrated)
    return Trainer(student, teacher, data, settings(**changes), seed=11, folder=folder)


@pytest.mark.parametrize("form", ["family", "flattened"])
def test_training_brings_the_student_closer(
    teacher: Detector, data: Blobs, tmp_path: Path, form: str
) -> None:
    weights = DistillationWeights(kl=100.0 if form == "flattened" else 1.0)
    changes: dict[str, Any] = {"epochs": 8, "lr": 1e-3, "zoom": 0.0}
    run = trainer(teacher, data, tmp_path, kl_form=form, weights=weights, **changes)
    before = state(teacher)
    start = run.divergence()
    outcome = run.train()
    assert outcome.divergence["start"] == start
    assert outcome.divergence["last"] < 0.75 * start
    assert outcome.divergence["ema"] < 0.75 * start
    assert run.divergence() == outcome.divergence[outcome.selected]
    assert len(outcome.history) == 8
    assert all(set(terms) == {"kl", "feature", "loss"} for terms in outcome.history)
    first, last = outcome.history[0]["loss"], outcome.history[-1]["loss"]
    assert last < 0.8 * first
    assert_same(state(teacher), before)


def test_every_parameter_learns_and_the_teacher_gets_no_gradient(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    thawed = teacher.clone()
    thawed.module.requires_grad_(True)
    weights = DistillationWeights(kl=1, feature=1, task=1)
    run = trainer(thawed, data, tmp_path, epochs=1, selection="last", weights=weights)
    before = state(run.student)
    outcome = run.train()
    assert set(outcome.history[0]) == {"kl", "feature", "task", "loss"}
    assert all(parameter.grad is None for parameter in thawed.module.parameters())
    after = state(run.student)
    still = {name for name in before if torch.equal(before[name], after[name])}
    frozen = {name for name in before if name.endswith((".initialised", ".anchors"))}
    # The zero point of a symmetric grid is no parameter.
    frozen |= {name for name in before if name.endswith("weight_quantizer.zero_point")}
    # Nothing reaches below an image that does not clip: its zero point stays where it is.
    assert still - frozen <= {n for n in before if n.endswith("input_quantizer.zero_point")}
    assert frozen <= still
    assert not any(m.training for m in run.student.module.modules())


@pytest.mark.parametrize(
    ("weights", "terms"),
    [
        ({"kl": 1, "feature": 0, "task": 0}, {"kl"}),
        ({"kl": 0, "feature": 1, "task": 0}, {"feature"}),
        ({"kl": 0, "feature": 0, "task": 2}, {"task"}),
    ],
)
def test_terms_of_weight_zero_are_not_computed(
    teacher: Detector, data: Blobs, tmp_path: Path, weights: dict[str, float], terms: set[str]
) -> None:
    run = trainer(teacher, data, tmp_path, epochs=1, weights=DistillationWeights(**weights))
    (means,) = run.train().history
    assert set(means) == terms | {"loss"}
    assert means["loss"] == pytest.approx(means[next(iter(terms))])


def test_weights_multiply_their_terms(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    """With rates too small to matter, an epoch's means are those of the start."""
    histories = []
    for index, factor in enumerate((1.0, 3.0)):
        folder = tmp_path / str(index)
        folder.mkdir()
        weights = DistillationWeights(kl=factor, feature=2 * factor, task=factor)
        run = trainer(teacher, data, folder, epochs=1, lr=1e-12, scale_lr=1e-12, weights=weights)
        histories.append(run.train().history[0])
    one, three = histories
    for name in one:
        assert three[name] == pytest.approx(3 * one[name], rel=1e-3)
    assert one["loss"] == pytest.approx(one["kl"] + one["feature"] + one["task"], rel=1e-5)


def test_rate_rises_then_falls_to_zero(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    run = trainer(teacher, data, tmp_path, epochs=10, warmup=0.2, zero_lr=1e-3)
    rates = [run._rate(step) for step in range(30)]
    assert rates[:6] == pytest.approx([1 / 6, 2 / 6, 3 / 6, 4 / 6, 5 / 6, 1])
    assert rates[6] == 1
    assert rates[18] == pytest.approx(0.5)
    assert rates[6:] == sorted(rates[6:], reverse=True)
    assert 0 < rates[-1] < 0.02
    groups = {group["peak"]: group["params"] for group in run.optimizer.param_groups}
    scales = [m for m in run.student.module.modules() if isinstance(m, Quantizer)]
    assert len(groups[5e-3]) == len(scales)
    assert len(groups[2e-3]) == 2 * 18  # weight and bias
    # A rate in widths of the grid; zero points of weights stay where they are.
    assert len(groups[1e-3 * 63]) + len(groups[1e-3 * 255]) == 18


def test_zero_points_move_by_whole_levels_to_where_the_loss_falls(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    """Activations calibrated on values that lie half of the range further down."""
    student = insert_quantizers(teacher.clone(), Policy(8, 6, first_last_bits="float"))
    calibrate(student, (data.images.float() / 255).split(8), samples=1024)
    chosen = settings(
        epochs=8, ema=0, zoom=0, flip=0, weight_lr=0.0, lr=1e-9, scale_lr=1e-9, zero_lr=0.02
    )
    run = Trainer(student, teacher, data, chosen, seed=11, folder=tmp_path)
    right = run.divergence()
    points = [layer.input_quantizer.zero_point for _, layer in quantized_layers(student.module)]
    before = [point.item() for point in points]
    for point in points:
        point.data.add_(32)
    outcome = run.train()
    shifts = [point.item() - zero for point, zero in zip(points, before, strict=True)]
    lost = outcome.divergence["start"] - right
    assert lost > right
    assert outcome.divergence["last"] < outcome.divergence["start"] - 0.6 * lost
    back = sorted(32 - round(shift) for shift in shifts)
    assert back[len(back) // 2] >= 6


def test_zero_points_without_a_rate_stay_where_they_are(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    run = trainer(teacher, data, tmp_path, epochs=1, zero_lr=0.0)
    before = state(run.student)
    run.train()
    points = [name for name in before if name.endswith("zero_point")]
    assert points
    assert all(torch.equal(run.student.module.state_dict()[n], before[n]) for n in points)


def test_zero_points_stay_on_their_grids(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    """However far a step goes: zero is a level, and after a step at most at the end."""
    run = trainer(teacher, data, tmp_path, epochs=2, zero_lr=1.0)
    for module in run.student.module.modules():
        if isinstance(module, Quantizer) and module.zero_point.requires_grad:
            module.log_scale.data.sub_(0.5)
    run.train()
    moved = 0
    for module in run.student.module.modules():
        if isinstance(module, Quantizer):
            low, high = module.bounds
            assert bool(((module.zero_point >= low) & (module.zero_point <= high)).all())
            moved += module.zero_point.requires_grad and module.zero_point.item() in (low, high)
    assert moved


@pytest.mark.parametrize("after", [1, 2, 3])
def test_an_interrupted_training_ends_the_same(
    teacher: Detector, data: Blobs, tmp_path: Path, after: int
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = trainer(teacher, data, whole, zero_lr=0.02)
    expected = unbroken.train()

    def stop(done: int, total: int, terms: dict[str, float]) -> None:
        assert total == 3
        if done == after:
            raise Interrupt

    with pytest.raises(Interrupt):
        trainer(teacher, data, broken, zero_lr=0.02).train(stop)
    torch.manual_seed(99)  # nothing may hang on the global generator
    # As a resumed run has it: scales come from the checkpoint alone.
    resumed = trainer(teacher, data, broken, calibrated=False, zero_lr=0.02)
    done: list[int] = []
    outcome = resumed.train(lambda epoch, _total, _terms: done.append(epoch))
    assert done == list(range(after + 1, 4))
    assert outcome == expected
    assert_same(state(resumed.student), state(unbroken.student))
    shadows = zip(resumed.average.shadow, unbroken.average.shadow, strict=True)
    assert all(torch.equal(a, b) for a, b in shadows)


AUGMENTED = {"flip": 0.5, "zoom": 0.3, "mosaic": 0.5, "colour": 0.2, "camera": 0.6}


def test_an_interrupted_training_draws_the_same_augmentation(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    unbroken = trainer(teacher, data, whole, epochs=2, **AUGMENTED)
    expected = unbroken.train()

    def stop(*_: Any) -> None:
        raise Interrupt

    with pytest.raises(Interrupt):
        trainer(teacher, data, broken, epochs=2, **AUGMENTED).train(stop)
    torch.manual_seed(99)  # nothing may hang on the global generator
    resumed = trainer(teacher, data, broken, calibrated=False, epochs=2, **AUGMENTED)
    assert resumed.train() == expected
    assert_same(state(resumed.student), state(unbroken.student))


def test_a_camera_changes_pixels_and_no_label(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    batches = []
    for strength in (0.0, 0.5, 1.0):
        run = trainer(teacher, data, tmp_path, camera=strength)
        batches.append(run._batch([3, 1, 4], torch.Generator().manual_seed(1)))
    (plain, labels), *seen = batches
    differences = []
    for images, targets in seen:
        assert torch.equal(targets.data, labels.data)
        assert images.shape == plain.shape
        assert images.min() >= 0
        assert images.max() <= 1
        differences.append(float((images - plain).abs().mean()))
    assert 0.005 < differences[0] < differences[1]


def test_epochs_since_the_last_checkpoint_are_done_again(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    def stop(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == 2:
            raise Interrupt

    with pytest.raises(Interrupt):
        trainer(teacher, data, tmp_path, checkpoint_minutes=60).train(stop)
    done: list[int] = []
    resumed = trainer(teacher, data, tmp_path, calibrated=False)
    resumed.train(lambda epoch, _total, _terms: done.append(epoch))
    assert done == [1, 2, 3]
    (tmp_path / "unbroken").mkdir()
    unbroken = trainer(teacher, data, tmp_path / "unbroken")
    unbroken.train()
    assert_same(state(resumed.student), state(unbroken.student))


def test_bfloat16_follows_float32(
    teacher: Detector, data: Blobs, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Emulated where the processor has no instructions for it: slower, and of the same values.
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"amx_bf16": True}, raising=False)
    losses = {}
    for precision in ("float32", "bfloat16"):
        folder = tmp_path / precision
        folder.mkdir()
        trained = trainer(
            teacher, data, folder, epochs=1, lr=2e-4, scale_lr=5e-4, precision=precision
        )
        losses[precision] = [epoch["loss"] for epoch in trained.train().history]
        for parameter in trained.student.module.parameters():
            assert parameter.dtype == torch.float32
    assert losses["bfloat16"] != losses["float32"]
    assert losses["bfloat16"] == pytest.approx(losses["float32"], rel=0.1)


def test_the_seed_counts(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    students = []
    for seed in (1, 2):
        (tmp_path / str(seed)).mkdir()
        student = student_of(teacher)
        run = Trainer(
            student, teacher, data, settings(epochs=1), seed=seed, folder=tmp_path / str(seed)
        )
        run.train()
        students.append(stacked(student.raw(blobs(1))))
    assert not torch.equal(*students)


def test_a_damaged_checkpoint_is_one_clear_line(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    (tmp_path / "checkpoint.pt").write_bytes(b"PK\x03\x04 half a file")
    with pytest.raises(UserError, match=r"checkpoint\.pt: cannot be read") as raised:
        trainer(teacher, data, tmp_path).train()
    assert "\n" not in str(raised.value)


def saved(folder: Path) -> dict[str, Any]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)


def sound(checkpoint: dict[str, Any]) -> bool:
    tensors = [*checkpoint["student"].values(), *checkpoint["shadow"]]
    return all(bool(tensor.isfinite().all()) for tensor in tensors)


def test_a_huge_rate_ends_in_one_line_and_a_sound_checkpoint(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    run = trainer(teacher, data, tmp_path, lr=1e30)
    with pytest.raises(UserError, match=r"diverged in epoch 1 .*lower distillation\.lr") as raised:
        run.train()
    assert "\n" not in str(raised.value)
    checkpoint = saved(tmp_path)
    assert checkpoint["epoch"] == 0
    assert sound(checkpoint)


def test_a_weight_poisoned_later_keeps_the_epochs_before(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    run = trainer(teacher, data, tmp_path)

    def poison(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == 2:
            next(run.student.module.parameters()).data[0] = float("nan")

    with pytest.raises(UserError, match="diverged in epoch 3"):
        run.train(poison)
    checkpoint = saved(tmp_path)
    assert checkpoint["epoch"] == len(checkpoint["history"]) == 2
    assert sound(checkpoint)


def test_what_the_last_step_breaks_is_not_saved(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    """The loss of that epoch is finite: it was computed before the step."""
    run = trainer(teacher, data, tmp_path, batch_size=len(data))
    calls: list[int] = []

    def break_second(gradient: Tensor) -> Tensor:
        calls.append(1)
        return gradient * (float("nan") if len(calls) == 2 else 1)

    next(run.student.module.parameters()).register_hook(break_second)
    with pytest.raises(UserError, match="diverged in epoch 2"):
        run.train()
    checkpoint = saved(tmp_path)
    assert checkpoint["epoch"] == 1
    assert sound(checkpoint)


def test_average_is_the_recurrence_written_out() -> None:
    layer = nn.Linear(3, 2)
    layer.bias.requires_grad_(False)
    average = ExponentialMovingAverage(layer, 0.6)
    shadow = [float(value) for value in layer.weight.detach().flatten()]
    generator = torch.Generator().manual_seed(0)
    for step in range(12):
        with torch.no_grad():
            layer.weight.copy_(torch.randn(2, 3, generator=generator))
        average.update(step)
        decay = min(0.6, (1 + step) / (10 + step))
        now = [float(value) for value in layer.weight.detach().flatten()]
        shadow = [decay * s + (1 - decay) * n for s, n in zip(shadow, now, strict=True)]
    assert len(average.shadow) == 1
    assert average.shadow[0].flatten().tolist() == pytest.approx(shadow, abs=1e-6)
    kept, bias = layer.weight.detach().clone(), layer.bias.clone()
    average.swap()
    assert layer.weight.flatten().tolist() == pytest.approx(shadow, abs=1e-6)
    assert torch.equal(average.shadow[0], kept)
    average.swap()
    assert torch.equal(layer.weight, kept)
    assert torch.equal(layer.bias, bias)


def test_selection(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    outcomes, students = {}, {}
    for selection in ("last", "ema", "agreement"):
        folder = tmp_path / selection
        folder.mkdir()
        run = trainer(teacher, data, folder, epochs=1, ema=0.9, selection=selection)
        outcomes[selection] = run.train()
        students[selection] = state(run.student)
        assert run.divergence() == outcomes[selection].divergence[outcomes[selection].selected]
    assert outcomes["last"].divergence == outcomes["ema"].divergence
    assert [outcomes[name].selected for name in ("last", "ema")] == ["last", "ema"]
    agreement = outcomes["agreement"].divergence
    best = "ema" if agreement["ema"] <= agreement["last"] else "last"
    assert outcomes["agreement"].selected == best
    assert_same(students["agreement"], students[best])
    other = students["last" if best == "ema" else "ema"]
    assert any(not torch.equal(other[name], students[best][name]) for name in other)


def test_no_average_no_choice(teacher: Detector, data: Blobs, tmp_path: Path) -> None:
    outcome = trainer(teacher, data, tmp_path, epochs=1, ema=0, selection="ema").train()
    assert outcome.selected == "last"
    assert set(outcome.divergence) == {"start", "last"}


def integers(layer: nn.Module) -> Tensor:
    scale = layer.weight_quantizer.scale_of(layer.weight)
    return (layer.weight / scale).detach().clone()


@pytest.mark.parametrize("train_last", [True, False])
def test_rounded_weights_keep_their_integers_while_all_else_is_trained(
    teacher: Detector, data: Blobs, tmp_path: Path, train_last: bool
) -> None:
    run = trainer(teacher, data, tmp_path, weight_lr=0.0, scale_lr=0.03, train_last=train_last)
    layers = dict(quantized_layers(run.student.module))
    weights = {name: layer.weight.detach().clone() for name, layer in layers.items()}
    before = {
        name: integers(layer).round().clamp(*layer.weight_quantizer.limits_of(layer.weight))
        for name, layer in layers.items()
    }
    scales = {name: layer.weight_quantizer.scale.detach() for name, layer in layers.items()}
    biases = {name: layer.bias.detach().clone() for name, layer in layers.items()}
    outcome = run.train()
    assert outcome.divergence[outcome.selected] < outcome.divergence["start"]
    last = layers.keys() & run.student.boundary_layers().last if train_last else set()
    assert bool(last) is train_last
    for name, layer in layers.items():
        if name in last:
            assert layer.weight_quantizer.bits == 8
            assert not torch.equal(layer.weight, weights[name])
        else:
            torch.testing.assert_close(integers(layer), before[name], rtol=0, atol=1e-4)
        assert not torch.equal(layer.bias, biases[name])
        assert not torch.equal(layer.weight_quantizer.scale, scales[name])
        # Nothing is frozen any more.
        assert layer.weight_quantizer.levels is None
    moved = [scales[n] / layer.weight_quantizer.scale.detach() for n, layer in layers.items()]
    # So far that rounding anew would have turned the largest ones over.
    assert max(float((ratio - 1).abs().max()) for ratio in moved) > 0.5 / 4


@pytest.mark.parametrize("rate", [None, 0.0])
def test_a_broken_training_resumes_to_the_same_weights(
    teacher: Detector, data: Blobs, tmp_path: Path, rate: float | None
) -> None:
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = trainer(teacher, data, tmp_path / "whole", weight_lr=rate)
    whole.train()
    broken = trainer(teacher, data, tmp_path / "broken", weight_lr=rate)

    def stop(done: int, _total: int, _terms: dict[str, float]) -> None:
        if done == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.train(stop)
    resumed = trainer(teacher, data, tmp_path / "broken", weight_lr=rate, calibrated=False)
    resumed.train()
    assert_same(state(whole.student), state(resumed.student))


def test_a_checkpoint_of_an_earlier_version_is_gone_on_from(
    teacher: Detector, data: Blobs, tmp_path: Path
) -> None:
    """It holds the state of what there is no more, which was empty where it was switched off."""
    for name in ("whole", "broken"):
        (tmp_path / name).mkdir()
    whole = trainer(teacher, data, tmp_path / "whole", weight_lr=0.0)
    whole.train()
    broken = trainer(teacher, data, tmp_path / "broken", weight_lr=0.0)

    def stop(done: int, _total: int, _terms: dict[str, float]) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        broken.train(stop)
    saved = torch.load(broken.checkpoint, weights_only=True)
    saved |= {"leash": [], "weight_steps": [], "oscillation": []}
    torch.save(saved, broken.checkpoint)
    resumed = trainer(teacher, data, tmp_path / "broken", weight_lr=0.0, calibrated=False)
    resumed.train()
    assert_same(state(whole.student), state(resumed.student))
