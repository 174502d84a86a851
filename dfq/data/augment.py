"""Augmentation of calibration batches by kornia: on the device, for all images of a batch at once.

Whatever is drawn comes from a generator on the CPU and is handed to kornia, which then draws
nothing itself: a seed gives one batch on every device, and the global generator is left alone.

kornia takes a second to import, and is where a batch is augmented, not before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, overload

import torch
import torch.nn.functional as F
from torch import Generator, Tensor
from torchvision.ops import box_convert

from ..models.base import Targets

if TYPE_CHECKING:
    from kornia.augmentation.base import _AugmentationBase

    Part = tuple[_AugmentationBase, dict[str, Tensor]]

GREY = 114 / 255
"""What comes in from outside of an image, as letterboxing pads."""

EXPOSURE = 1.0
"""Stops by which a camera of strength 1 is off at most, either way."""
DAYLIGHT, DAYLIGHT_STEPS = 5, 5
"""Where in kornia's table of daylights, 500 K apart, 6500 K is, which leaves an image as it is; and
how many steps a camera of strength 1 is off at most: from 4000 K to 9000 K."""
BLUR, BLUR_KERNEL = 1.5, 9
"""Standard deviation of the widest blur of a camera of strength 1, and width of its kernel, both in
pixels."""
NOISE = 0.05
"""Standard deviation of the strongest noise of a camera of strength 1; images are in [0, 1]."""
JPEG_BEST, JPEG_WORST = 95.0, 35.0
"""Highest quality that a camera stores at, and the lowest of one of strength 1, in percent."""


def mosaic(images: Tensor, targets: Targets, generator: Generator) -> tuple[Tensor, Targets]:
    """Each image becomes four of the batch at half their size, in the corners of a square.

    Objects come out half as large and in new company: a small set then shows the network more.

    Args:
        images: float `(n, 3, h, w)` in [0, 1], h and w even, n at least 1.
        targets: their labels.
        generator: on the CPU; draws which four, the image itself always among them.

    Returns:
        Images of the same shape, and four times as many labels.

    Example:
        >>> images, targets = torch.rand(8, 3, 64, 64), Targets.empty()
        >>> tiled, labels = mosaic(images, targets, torch.Generator().manual_seed(0))
        >>> tiled.shape
        torch.Size([8, 3, 64, 64])
    """
    # Not kornia's RandomMosaic: that cuts a window out of four images at their full size, never
    # shrinks them, wants as many boxes in every image, and waits for the device to count them.
    count = len(images)
    small = F.interpolate(images, scale_factor=0.5, mode="bilinear", antialias=True)
    orders = [torch.arange(count)]
    orders += [torch.randperm(count, generator=generator) for _ in range(3)]
    quarters = [small[order.to(images.device)] for order in orders]
    tiled = torch.cat([torch.cat(quarters[:2], dim=3), torch.cat(quarters[2:], dim=3)], dim=2)
    rows = []
    for place, order in enumerate(orders):
        # Image order[i] goes into mosaic i: an image's labels move to where it went.
        went_to = torch.empty_like(order)
        went_to[order] = torch.arange(count)
        data = targets.data.clone()
        data[:, 0] = went_to.to(data.device)[data[:, 0].long()].to(data.dtype)
        data[:, 2:] = data[:, 2:] / 2
        data[:, 2] += 0.5 * (place % 2)
        data[:, 3] += 0.5 * (place // 2)
        rows.append(data)
    return tiled, Targets(torch.cat(rows))


def jitter_colours(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Scale and shift each channel of each image by up to `strength` and a half of it.

    Args:
        images: float `(n, 3, h, w)` in [0, 1].
        strength: in [0, 1).
        generator: on the CPU.

    Returns:
        New images, clipped to [0, 1].

    Example:
        >>> images = torch.full((1, 3, 2, 2), 0.5)
        >>> changed = jitter_colours(images, 0.2, torch.Generator().manual_seed(0))
        >>> bool((changed - 0.5).abs().max() <= 0.2)
        True
    """
    from kornia.enhance import denormalize

    draw = (2 * torch.rand(2, len(images), 3, generator=generator) - 1).to(images.device)
    # To kornia a shift is a mean and a gain a standard deviation.
    return denormalize(images, mean=strength / 2 * draw[1], std=1 + strength * draw[0]).clamp(0, 1)


def camera(images: Tensor, strength: float, generator: Generator) -> Tensor:
    """Picture images by cameras that differ: blur, exposure, white balance, noise, JPEG.

    Each image has its own camera, and each of the five a strength of its own, even between none
    and that of `strength`. Nothing moves: labels stay as they are.

    Args:
        images: float `(n, 3, h, w)` in [0, 1], h and w at least 5.
        strength: in [0, 1]. At 1, exposure is off by up to a stop, light is between 4000 K and
            9000 K, blur has up to 1.5 pixels and noise up to 0.05 of standard deviation, and JPEG a
            quality of 35 % or more. At 0 images are left as they are.
        generator: on the CPU.

    Returns:
        New images in [0, 1].

    Raises:
        ValueError: `strength` is not in [0, 1].

    Example:
        >>> images = torch.rand(2, 3, 32, 32)
        >>> seen = camera(images, 0.5, torch.Generator().manual_seed(0))
        >>> seen.shape, bool((seen - images).abs().mean() > 0.01)
        (torch.Size([2, 3, 32, 32]), True)
    """
    if not 0 <= strength <= 1:
        raise ValueError(f"the strength of a camera must be in [0, 1], got {strength}")
    if strength == 0:
        return images
    import kornia.augmentation as K

    count = len(images)
    # Blur, noise and JPEG are between none and all of it, exposure and light off to either side.
    draw = strength * torch.rand(5, count, generator=generator)
    noise = torch.randn(images.shape, generator=generator)
    blur, grain, loss = draw[:3]
    exposure, light = 2 * draw[3:] - strength
    # What the lens does, then the sensor, then the file.
    parts: list[Part] = [
        # A kernel of no width is refused; one so narrow changes nothing. The range is kornia's own
        # to draw from, and goes unused.
        (
            K.RandomGaussianBlur(BLUR_KERNEL, (0.1, 1.0), p=1.0),
            {"sigma": (BLUR * blur).clamp(min=0.1)},
        ),
        # Stops are of light, of which pixels hold about the power 1 / 2.2.
        (
            K.RandomGamma(p=1.0),
            {"gamma_factor": torch.ones(count), "gain_factor": 2 ** (EXPOSURE * exposure / 2.2)},
        ),
        (
            K.RandomPlanckianJitter("CIED", p=1.0),
            {"idx": DAYLIGHT + (DAYLIGHT_STEPS * light).round().long()},
        ),
        (
            K.RandomGaussianNoise(p=1.0),
            {"gaussian_noise": NOISE * grain[:, None, None, None] * noise},
        ),
        (K.RandomJPEG(p=1.0), {"jpeg_quality": JPEG_BEST - (JPEG_BEST - JPEG_WORST) * loss}),
    ]
    return _apply(parts, images.shape, {"input": images})[0]


@overload
def augment(
    images: Tensor, targets: Targets, generator: Generator, *, flip: float, zoom: float
) -> tuple[Tensor, Targets]: ...


@overload
def augment(
    images: Tensor,
    targets: Targets,
    generator: Generator,
    *,
    flip: float,
    zoom: float,
    masks: Tensor,
) -> tuple[Tensor, Targets, Tensor]: ...


def augment(
    images: Tensor,
    targets: Targets,
    generator: Generator,
    *,
    flip: float,
    zoom: float,
    masks: Tensor | None = None,
) -> tuple[Tensor, Targets] | tuple[Tensor, Targets, Tensor]:
    """Mirror and zoom a batch at random, boxes and masks with it.

    Args:
        images: float `(n, 3, h, w)` in [0, 1].
        targets: their labels.
        generator: on the CPU; what is drawn does not depend on the device.
        flip: probability of a mirrored image, in [0, 1].
        zoom: in [0, 1); images are scaled by a factor in [1 - zoom, 1 + zoom] about a random point;
            what comes in from outside is grey (114 / 255), as letterboxing pads.
        masks: of each label, in their order, `(labels, h, w)`, of any type; where given, they come
            back as a third value.

    Returns:
        New images and labels; boxes are clipped, those that all but leave the image (of whose width
        or height a quarter or less is left) are dropped, and their masks too. Masks are of the type
        they had, 0 where nothing was.

    Raises:
        ValueError: there are not as many masks as labels, or not of the images' size.

    Example:
        >>> images = torch.rand(2, 3, 64, 64)
        >>> targets = Targets(torch.tensor([[0, 5, 0.25, 0.5, 0.5, 0.5]]))
        >>> generator = torch.Generator().manual_seed(0)
        >>> mirrored, labels = augment(images, targets, generator, flip=1.0, zoom=0.0)
        >>> labels.data
        tensor([[0.0000, 5.0000, 0.7500, 0.5000, 0.5000, 0.5000]])
    """
    size = images.shape[2:]
    if masks is not None and masks.shape != (len(targets), *size):
        raise ValueError(
            f"masks must have shape {(len(targets), *size)}, one for each label, got "
            f"{tuple(masks.shape)}"
        )
    draw = torch.rand(4, len(images), generator=generator).to(images.device)
    if flip > 0:
        move = _mirror(draw[0] < flip)
        images = _apply([move], images.shape, {"input": images})[0]
        targets, masks = _follow(move, targets, masks, size)
    if zoom > 0:
        move = _scale(1 + zoom * (2 * draw[1] - 1), draw[2:].T, size)
        images = _apply([move], images.shape, {"input": images - GREY})[0] + GREY
        targets, masks = _clip(*_follow(move, targets, masks, size))
    return (images, targets) if masks is None else (images, targets, masks)


def _mirror(flipped: Tensor) -> Part:
    """What mirrors the images where the boolean tensor `flipped` `(n,)` is true."""
    from kornia.augmentation import RandomHorizontalFlip

    return RandomHorizontalFlip(), {"batch_prob": flipped.float()}


def _scale(factor: Tensor, fixed: Tensor, size: Sequence[int]) -> Part:
    """What scales images by `factor` `(n,)` about `fixed` `(n, 2)`: x y, as shares of the sides."""
    from kornia.augmentation import RandomAffine

    drawn = {
        # Pixels are numbered by their centres: the image's left edge is at -0.5.
        "center": fixed * fixed.new_tensor([size[1], size[0]]) - 0.5,
        "scale": torch.stack([factor, factor], dim=1),
        "translations": torch.zeros_like(fixed),
        **dict.fromkeys(("angle", "shear_x", "shear_y"), torch.zeros_like(factor)),
    }
    return RandomAffine(0.0, p=1.0), drawn


def _follow(
    move: Part, targets: Targets, masks: Tensor | None, size: Sequence[int]
) -> tuple[Targets, Tensor | None]:
    """Boxes and masks, moved as their images are.

    kornia wants as many boxes in every image. Each row of `targets` goes as the only one of an
    image of its own, with what was drawn for the image it is in.
    """
    if len(targets) == 0:
        return targets, masks
    index = targets.data[:, 0].long()
    module, drawn = move
    drawn = {key: value[index] for key, value in drawn.items()}
    side = targets.data.new_tensor([size[1], size[0]])
    x1, y1, x2, y2 = box_convert(targets.data[:, 2:], "cxcywh", "xyxy").unbind(1)
    corners = torch.stack([x1, y1, x2, y1, x2, y2, x1, y2], dim=1).view(-1, 1, 4, 2)
    data = {"bbox": corners * side - 0.5}
    if masks is not None:
        data["mask"] = masks[:, None]
    moved, *moved_masks = _apply([(module, drawn)], (len(targets), 3, *size), data)
    moved = (moved[:, 0] + 0.5) / side
    boxes = box_convert(torch.cat([moved.amin(1), moved.amax(1)], dim=1), "xyxy", "cxcywh")
    moved_targets = Targets(torch.cat([targets.data[:, :2], boxes], dim=1))
    return moved_targets, moved_masks[0][:, 0] if moved_masks else None


def _clip(targets: Targets, masks: Tensor | None) -> tuple[Targets, Tensor | None]:
    """Boxes clipped to their image, without those of which hardly anything is left there."""
    boxes = box_convert(targets.data[:, 2:], "cxcywh", "xyxy").clamp(0, 1)
    boxes = box_convert(boxes, "xyxy", "cxcywh")
    visible = (boxes[:, 2:] > 0.25 * targets.data[:, 4:]).all(dim=1)
    visible_targets = Targets(torch.cat([targets.data[:, :2], boxes], dim=1)[visible])
    return visible_targets, None if masks is None else masks[visible]


def _apply(parts: list[Part], shape: Sequence[int], data: dict[str, Tensor]) -> list[Tensor]:
    """What kornia makes of `data`, by its names of what there is, with what was drawn already.

    Args:
        parts: its augmentations.
        shape: of the images, be they in `data` or not.
    """
    from kornia.augmentation import AugmentationSequential
    from kornia.augmentation.container.params import ParamItem

    sequence = AugmentationSequential(*(module for module, _ in parts))
    always = {
        "batch_prob": torch.ones(shape[0]),
        "forward_input_shape": torch.tensor(list(shape)),
    }
    params = [
        ParamItem(name, {**always, **drawn})
        for (name, _), (_, drawn) in zip(sequence.named_children(), parts, strict=True)
    ]
    # Not called as a module, which would keep the batch for a later look.
    transformed: Any = sequence.forward(*data.values(), params=params, data_keys=list(data))
    return list(transformed) if len(data) > 1 else [transformed]
