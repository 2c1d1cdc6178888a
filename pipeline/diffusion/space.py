"""Where the diffusion works: the one place that turns 8-bit images into z, and z back.

A `Space` belongs to a model. Everyone else (training, sampling, scoring, evaluation, the endpoint) passes pixels to it
and takes pixels from it, and never converts anything. `Pixels` is the trivial one.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from pipeline.diffusion.pixels import PixelGrid

Draw = Callable[[Tensor], Tensor]  # a tensor -> standard normal draws of its shape, type and device


class Space(Protocol):
    """What a model diffuses.

    image_shape: (C, H, W) of an image. shape: of z. grid: where the grey levels lie in z; None where z is no pixels.
    """

    @property
    def image_shape(self) -> tuple[int, int, int]: ...
    @property
    def shape(self) -> tuple[int, int, int]: ...
    @property
    def grid(self) -> PixelGrid | None: ...

    def encode(self, pixels: Tensor, noise: Draw | None = None) -> Tensor:
        """uint8 (n, *image_shape) -> z float32 (n, *shape): a draw of its posterior by `noise`, its mean without.

        Raises:
            ValueError: pixels of another type or shape.
        """
        ...

    def decode(self, z: Tensor) -> Tensor:
        """(n, *shape), any float type -> the images, uint8 (n, *image_shape)."""
        ...
