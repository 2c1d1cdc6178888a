"""uint8 pixels <-> model space. The only module that knows the pixel range.

A grey level u = 0..255 stands in model space at the middle of its bin, x = 2 (u + 0.5) / 256 - 1, so x runs over
+-255/256 and the 256 bins of width 1/128 tile [-1, 1] exactly. A model's density in x therefore gives bits per
dimension -log2 p(x) + log2(128), that is nats / ln 2 + 7, and 8-bit noise under a uniform model scores exactly 8.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

GREY_LEVELS = 256
PIXEL_BIN = 2.0 / GREY_LEVELS
FIRST_LEVEL = PIXEL_BIN / 2 - 1.0  # where level 0 lies in model space
LOG_VOLUME_NATS_PER_DIM = -math.log(
    PIXEL_BIN
)  # log 128: add to nats per dimension in x to get nats per dimension in pixels


def to_model(u: Tensor) -> Tensor:
    """Pixels uint8 of any shape -> model space float32, x = 2 (u + 0.5) / 256 - 1, exact."""
    return u.float().add_(0.5).mul_(PIXEL_BIN).sub_(1.0)


def to_pixels(x: Tensor) -> Tensor:
    """Model space, any float type and shape -> the nearest grey level as uint8; values beyond the range are clamped.
    Undoes `to_model` exactly.
    """
    return x.float().add(1.0).mul_(1.0 / PIXEL_BIN).sub_(0.5).round_().clamp_(0, GREY_LEVELS - 1).byte()


@dataclass(frozen=True)
class PixelGrid:
    """Where the grey levels lie in model space: level u at first + bin u, u in 0..levels-1; a level's volume is bin."""

    levels: int = 256
    first: float = -255 / 256
    bin: float = 1 / 128

    def __post_init__(self) -> None:
        if self.levels < 2 or not self.bin > 0:
            raise ValueError(f"pixel grid: need levels >= 2 and bin > 0, got {self.levels} and {self.bin:g}")

    @property
    def log_volume(self) -> float:
        """log(bin): nats a dimension between a density in model space and the probability of a grey level."""
        return math.log(self.bin)

    def index(self, x: Tensor) -> Tensor:
        """int64, shaped like x: the grey level of each pixel.

        Raises:
            ValueError: a pixel lies off the grid by more than 1/1000 of a bin, or beyond its ends.
        """
        position = (x.double() - self.first) / self.bin
        index = position.round()
        bad = ~((position - index).abs() <= 1e-3) | (index < 0) | (index >= self.levels)
        if bool(bad.any()):
            last = self.first + self.bin * (self.levels - 1)
            image = int(bad.flatten(1).any(1).nonzero()[0, 0])
            last = self.first + self.bin * (self.levels - 1)
            raise ValueError(
                f"image {image} of the batch has the value {float(x[bad][0]):.6g}, which is not one of the "
                f"{self.levels} grey levels {self.first:.6g}, {self.first + self.bin:.6g}, ..., {last:.6g} of model "
                f"space: a likelihood is that of an 8-bit image; convert it with `to_model`, add no noise"
            )
        return index.long()


@dataclass(frozen=True)
class Pixels:
    """The trivial `Space`: z is the image itself, shape (C, H, W), its grey levels on `grid`."""

    image_shape: tuple[int, int, int]
    grid: PixelGrid = field(default_factory=PixelGrid)

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.image_shape

    def encode(self, pixels: Tensor, noise: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        """uint8 (n, C, H, W) -> float32, exact; nothing is drawn.

        Raises:
            ValueError: pixels of another type or shape.
        """
        if pixels.dtype != torch.uint8 or pixels.shape[1:] != self.image_shape:
            shape = ", ".join(map(str, (len(pixels), *self.image_shape)))
            raise ValueError(f"images must be uint8 ({shape}), got {pixels.dtype} {tuple(pixels.shape)}")
        return to_model(pixels)

    def decode(self, z: Tensor) -> Tensor:
        """(n, C, H, W), any float type -> the nearest grey levels, uint8."""
        return to_pixels(z)
