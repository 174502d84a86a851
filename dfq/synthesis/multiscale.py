"""Adam on images at several scales at once.

Adam gives every pixel a step of its own, about as long for all of them. What a network's first
layers miss in such images are the slow changes of light and colour that hold most of a photograph's
contrast: whole regions have to move together, which single pixels, pulled to and fro by edges, do
not. Here the gradient is averaged over blocks of 2 to 16 pixels as well, each scale has its own
Adam, and a pixel moves by the sum: the images are optimised as sums of coarse and fine ones.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..kernels.grids import add_doubled, halved

OPPONENT = ((1.0, 1.0, 1.0), (1.0, 0.0, -1.0), (-0.5, 1.0, -0.5))
"""Directions of colour, as rows of red, green and blue, before they are brought to length 1: light,
red against blue, green against magenta."""

COLOUR = (1.0, 0.35, 0.175)
"""How far a coarse scale moves along each of them: regions of photographs differ in light more than
in colour (Ruderman et al., 1998)."""


class MultiscaleAdam:
    """Optimises images in [0, 1] in place.

    Args:
        images: float32 `(n, 3, h, w)`, contiguous; what `step` changes.
        scales: how many coarser grids there are beside the pixels, each of half the side of the one
            before as long as sides are even; 0: Adam on the pixels alone.

    Example:
        >>> images = torch.full((1, 3, 32, 32), 0.5, requires_grad=True)
        >>> optimizer = MultiscaleAdam(images, scales=4)
        >>> optimizer.step(torch.ones(1, 3, 32, 32), rate=0.01)
        >>> bool((images < 0.5).all())
        True
    """

    def __init__(self, images: Tensor, scales: int) -> None:
        self.images = images
        self.grids: list[Tensor] = []
        height, width = images.shape[2:]
        while len(self.grids) < scales and height % 2 == 0 and width % 2 == 0:
            height, width = height // 2, width // 2
            self.grids.append(images.new_zeros(*images.shape[:2], height, width))
        self._means = [0.25 ** (1 + index) for index in range(len(self.grids))]
        # Of an iteration that is recorded, even the number of the step is on the device.
        self._optimizer = torch.optim.Adam(
            [images, *self.grids],
            lr=0.0,
            betas=(0.9, 0.999),
            fused=True,
            capturable=images.is_cuda,
        )
        opponent = images.new_tensor(OPPONENT)
        self._opponent = opponent / opponent.norm(dim=1, keepdim=True)
        # Of the square root of 3: a step along light alone moves each colour by the whole rate.
        reach = images.new_tensor(COLOUR) * 3**0.5
        self._back = (self._opponent * reach[:, None]).T.contiguous()

    @torch.no_grad()
    def step(self, gradient: Tensor, rate: float | Tensor) -> None:
        """One step of `rate` on each scale down `gradient`, `(n, 3, h, w)`; then back to [0, 1]."""
        self._optimizer.param_groups[0]["lr"] = rate
        # The fused optimizer pairs numbers by their place in memory, whatever the strides.
        self.images.grad = gradient = gradient.to(self.images.dtype).contiguous()
        if self.grids:
            # Turning the colours and averaging can change places: the former once, where less is.
            coarse = [_turned(self._opponent, halved(gradient))]
            for _ in self.grids[1:]:
                coarse.append(halved(coarse[-1]))
            # Powers of two: means as they would be one after the other, to the last bit.
            torch._foreach_mul_(coarse, self._means)
            for grid, mean in zip(self.grids, coarse, strict=True):
                grid.grad = mean
        self._optimizer.step()
        if self.grids:
            for coarser, finer in zip(self.grids[:0:-1], self.grids[-2::-1], strict=True):
                add_doubled(coarser, finer)
            add_doubled(_turned(self._back, self.grids[0]), self.images)
            torch._foreach_zero_(self.grids)
        self.images.clamp_(0, 1)


def _turned(matrix: Tensor, images: Tensor) -> Tensor:
    """`images` `(n, 3, h, w)` in other colours: `matrix` `(3, 3)` times each pixel's."""
    # On a CPU a convolution by one pixel takes four to ten times as long.
    return torch.matmul(matrix, images.flatten(2)).view_as(images)
