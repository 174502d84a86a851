"""Rounded weights shift no mean."""

from __future__ import annotations

import pytest
import torch
from support.toys import Attending, Residual, Toy, images
from torch import Tensor, nn

from dfq.graph.execution import hooks
from dfq.graph.fold_batchnorm import fold
from dfq.ptq.bias_correction import correct_biases, rectified_mean
from dfq.ptq.pipeline import calibrate_and_round, float_start
from dfq.quantization.calibration import calibrate
from dfq.quantization.insertion import insert_quantizers
from dfq.quantization.policy import Policy
from dfq.quantization.settings import Quantization
from dfq.quantization.traversal import activation_quantizers, quantized_layers
from dfq.runtime.progress import Silent


def student_of(teacher: Toy, seen: Tensor, bits: int = 3) -> Toy:
    """Its weights alone are quantized."""
    student = insert_quantizers(teacher.clone(), Policy(bits, 8, "same"))
    calibrate(student, [seen.float() / 255])
    for _, quantizer in activation_quantizers(student.module):
        quantizer.enabled = False
    return student


@pytest.mark.parametrize("slope", [0.0, 0.2, 1.0])
def test_the_mean_of_a_clipped_normal(slope: float) -> None:
    """By adding up the density in small steps."""
    mean, deviation = torch.tensor([-3.0, -0.4, 0.0, 2.0]), torch.tensor([0.5, 2.0, 1.0, 0.0])
    steps = torch.linspace(-12, 12, 200_001, dtype=torch.float64)
    density = (-(steps**2) / 2).exp()
    for mu, sigma, got in zip(mean, deviation, rectified_mean(mean, deviation, slope), strict=True):
        x = mu.double() + sigma.double() * steps
        wanted = (torch.where(x > 0, x, slope * x) * density).sum() / density.sum()
        assert float(got) == pytest.approx(float(wanted), abs=1e-5)


class Sides(nn.Module):
    """Padded, strided, grouped, and a layer without a bias."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.out = nn.Conv2d(3, 8, 3, 2, padding=1), nn.Conv2d(8, 4, 3, groups=2)
        self.bare = nn.Conv2d(4, 4, 1, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.bare(self.out(nn.functional.silu(self.stem(x))))


@pytest.mark.parametrize("network", [Sides, Residual, Attending])
def test_the_mean_error_on_the_images_is_zero(network: type[nn.Module]) -> None:
    """Of each layer given what the float network gives it, over all images and places."""
    torch.manual_seed(0)
    teacher, seen = fold(Toy(network())), (images(4) * 255).byte()
    student = student_of(teacher, seen)

    def mean_errors() -> dict[str, float]:
        found: dict[str, float] = {}
        layers = dict(quantized_layers(student.module))

        def compare(name: str, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            error = layers[name](inputs[0]) - output
            axes = [0, 2, 3] if error.ndim == 4 else [0, 1]
            found[name] = float(error.mean(axes).abs().max())

        with hooks(
            teacher.module.get_submodule(name).register_forward_hook(
                lambda _m, inputs, output, name=name: compare(name, inputs, output)
            )
            for name in layers
        ):
            teacher.raw(seen.float() / 255)
        return found

    before = mean_errors()
    corrected = correct_biases(student, teacher, seen, batch_size=3)
    after = mean_errors()
    assert set(corrected) == {name for name in before if name != "bare"}
    assert not any(corrected.values()), "no BatchNorm tells a mean here"
    for name in corrected:
        assert after[name] < 1e-5 < 1e-3 < before[name], name
    if "bare" in before:
        assert after["bare"] == before["bare"]


class Normed(nn.Module):
    """What goes into the second layer is what BatchNorm says: exactly normal, through ReLU."""

    def __init__(self, groups: int) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.one, self.norm = nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)
        self.norm.weight.data.uniform_(-2, 2)
        self.norm.bias.data.normal_()
        self.act, self.two = nn.ReLU(), nn.Conv2d(6, 4, 3, groups=groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.two(self.act(self.norm(self.one(x))))


@pytest.mark.parametrize("groups", [1, 2])
def test_the_mean_that_batchnorm_tells_needs_no_image(groups: int) -> None:
    network = Normed(groups)
    draw = torch.Generator().manual_seed(0)
    normal = torch.randn(400, 3, 16, 16, generator=draw)
    network.norm.train()
    network.norm.momentum = 1.0
    with torch.no_grad():
        network.norm(network.one(normal))
    teacher = fold(Toy(network))
    student = student_of(teacher, (images(4) * 255).byte(), bits=2)

    def shift() -> Tensor:
        x = teacher.module.act(teacher.module.norm(teacher.module.one(normal)))
        difference = student.module.two(x) - teacher.module.two(x)
        return difference.mean((0, 2, 3)).abs().max()

    before = shift()
    # Black images: what the mean is taken from where nothing is known.
    corrected = correct_biases(student, teacher, torch.zeros(2, 3, 16, 16, dtype=torch.uint8))
    assert corrected == {"one": False, "two": True}
    assert shift() < 0.03 * before


def test_a_recipe_equalises_and_corrects() -> None:
    section = Quantization(start="cle+bias-correction", reconstruction="none", refine_images=0)
    torch.manual_seed(0)
    plain, seen = Toy(Normed(1)), (images(4) * 255).byte()
    before = fold(plain.clone())
    teacher = float_start(plain.clone(), section, Silent())
    pixels = seen.float() / 255
    torch.testing.assert_close(teacher.raw(pixels), before.raw(pixels), rtol=1e-5, atol=1e-5)
    assert not torch.equal(teacher.module.one.weight, before.module.one.weight)
    student = insert_quantizers(teacher.clone(), section.policy())
    calibrate_and_round(student, teacher, seen, section, Silent())
    expected = insert_quantizers(teacher.clone(), section.policy())
    other = section.model_copy(update={"start": "none"})
    calibrate_and_round(expected, teacher, seen, other, Silent())
    assert not torch.equal(student.module.two.bias, expected.module.two.bias)
    correct_biases(expected, teacher, seen)
    for a, b in zip(student.module.parameters(), expected.module.parameters(), strict=True):
        assert torch.equal(a, b)
