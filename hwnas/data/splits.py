"""The parts of a data set, and the one place where their pixels become network input."""

from __future__ import annotations

import hashlib
import math
import threading
from abc import ABC, abstractmethod
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from hwnas.data.prepared import prepared
from hwnas.errors import InputError

# Random numbers that augmenting one image takes: top, left, flip, area, aspect ratio. All are in [0, 1).
NUM_DRAWS = 5
TOP, LEFT, FLIP, AREA, RATIO = range(NUM_DRAWS)

PHOTO_SIZE = 96  # from this size on images are photos: the centre is evaluated, random parts are trained on

NUM_FINGERPRINTED = 64  # images

RESIZED_BYTES = 256 * 2**20  # what `Split.resized` keeps in memory, at all resolutions together
_MAKING = threading.Lock()


@dataclass(frozen=True, slots=True)
class Preprocessing:
    """How an image becomes network input. It goes into the manifest of every exported network.

    First the square of `size` x `size` pixels that a `Split` gives: the shorter side is resized to
    `shorter_side` and the centre cut out; where that is None, the whole image is resized to the square. Then
    `resize`: to the network's resolution, and (pixel / 255 - mean) / std. Every resize is bicubic, antialiased
    when it shrinks.

    Attributes:
        size: side of the square, pixels.
        channels: 1 (grey) or 3 (RGB).
        mean: of the training pixels by channel, in units where white is 1.
        std: their standard deviation, in the same units.
        shorter_side: what the shorter side becomes before the centre is cut out, pixels.
    """

    size: int
    channels: int
    mean: tuple[float, ...]
    std: tuple[float, ...]
    shorter_side: int | None = None

    def __post_init__(self) -> None:
        if self.size < 1:
            raise InputError(f"image size={self.size} is not at least 1 pixel")
        if self.channels not in (1, 3):
            raise InputError(f"channels={self.channels} is not one of (1, 3)")
        if len(self.mean) != self.channels or len(self.std) != self.channels:
            raise InputError(f"mean={self.mean} and std={self.std} do not have {self.channels} values, one a channel")
        if min(self.std) <= 0:
            raise InputError(f"std={self.std} is not positive")
        if self.shorter_side is not None and self.shorter_side < self.size:
            raise InputError(f"shorter_side={self.shorter_side} is less than size={self.size}")


class Split(ABC):
    """One part of a data set. Its pixels are bytes until `resize`.

    A new kind of storage implements `pixels`, `subset` and `stored`; everything else is built on them.

    Attributes:
        labels: (num_images,) int64.
        preprocessing: what its images have gone, and will go, through.
        threads: how many may call `pixels` at a time.
        decodes: whether it decodes images each time they are trained on, which several threads should do.
        cache: folder for the files of `resized`; None to keep its images in memory.
    """

    def __init__(self, labels: Tensor, preprocessing: Preprocessing) -> None:
        self.labels = labels
        self.preprocessing = preprocessing
        self.threads = 1
        self.decodes = False
        self.cache: Path | None = None
        self._resized: OrderedDict[int, Tensor] = OrderedDict()
        self._identity: str | None = None

    def __len__(self) -> int:
        return len(self.labels)

    @abstractmethod
    def pixels(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """The images at `indices`, augmented if there are `draws`, and without any other source of chance.

        Args:
            indices: (n,) int64.
            draws: (n, NUM_DRAWS) float64 in [0, 1), or None for the images as they are evaluated.

        Returns:
            (n, channels, size, size) uint8.

        Raises:
            InputError: an image cannot be read; the message names its file.
        """

    @abstractmethod
    def subset(self, indices: Tensor, preprocessing: Preprocessing) -> Split:
        """The images at `indices` as a split of their own."""

    @abstractmethod
    def stored(self, index: int) -> bytes:
        """An image as it is stored, for `fingerprint`."""

    def fingerprint(self) -> str:
        """16 hexadecimal digits that tell these images, in this order, from others.

        Of all labels, and of what is stored for 64 images spread over the split: an image that is added or removed
        shifts them. Preprocessing and place do not matter.
        """
        digest = hashlib.blake2b(self.labels.numpy().tobytes(), digest_size=8)
        for index in torch.linspace(0, len(self) - 1, min(NUM_FINGERPRINTED, len(self))).long().tolist():
            digest.update(self.stored(index))
        return digest.hexdigest()

    def load(self, indices: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """The images at `indices`, (n, channels, size, size) uint8; with a generator, augmented by it."""
        draws = None
        if generator is not None:
            draws = torch.rand(len(indices), NUM_DRAWS, dtype=torch.float64, generator=generator)
        return self.pixels(indices, draws)

    def resized(self, resolution: int) -> Tensor | None:
        """The whole split at a resolution, (num_images, channels, resolution, resolution) uint8, made once.

        Search evaluates hundreds of children on the same images. With a folder in `cache` they are made into a file
        there, named by `identity` and resolution, that later commands find again (see `hwnas.data.prepared`); without
        one, the latest resolutions are kept in memory. Threads may ask at the same time. Do not write into the result.

        Returns:
            None where one resolution alone takes more than there is room for: then use `batches`, which makes the
            images anew each time.
        """
        shape = (len(self), self.preprocessing.channels, resolution, resolution)
        with _MAKING:
            images = self._resized.get(resolution)
            if images is None and self.cache is not None:
                path = self.cache / f"{self.identity()}-{resolution}.npy"
                images = prepared(path, shape, self._resize_into)
            elif images is None and math.prod(shape) <= RESIZED_BYTES:
                images = torch.empty(shape, dtype=torch.uint8)
                self._resize_into(images.numpy())
            if images is not None:
                self._resized[resolution] = images
                self._resized.move_to_end(resolution)
                while self.cache is None and sum(kept.nbytes for kept in self._resized.values()) > RESIZED_BYTES:
                    self._resized.popitem(last=False)
        return images

    def identity(self) -> str:
        """16 hexadecimal digits of the images (`fingerprint`) and their preprocessing, worked out once."""
        if self._identity is None:
            content = f"{self.fingerprint()} {self.preprocessing}".encode()
            self._identity = hashlib.blake2b(content, digest_size=8).hexdigest()
        return self._identity

    def _resize_into(self, images: NDArray[np.uint8]) -> None:
        for part in torch.arange(len(self)).split(1000):
            images[int(part[0]) : int(part[-1]) + 1] = resize_bytes(self.load(part), images.shape[-1]).numpy()


class TensorSplit(Split):
    """Images held in memory. Augmented by pad and crop, and by a horizontal flip where that keeps the class.

    Args:
        images: (num_images, channels, height, width) uint8, brought to the preprocessing's size when loaded.
        labels: (num_images,) int64.
        preprocessing: its mean and std are those of the training images.
        pad: black border of the padded image, in pixels of `images`.
        flip: mirror every second image, by chance.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        preprocessing: Preprocessing,
        *,
        pad: int = 0,
        flip: bool = False,
    ) -> None:
        super().__init__(labels, preprocessing)
        self.images, self.pad, self.flip = images, pad, flip

    def pixels(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """See `Split`."""
        images = self.images[indices]
        if draws is not None:
            images = shift_and_flip(images, draws, pad=self.pad, flip=self.flip)
        return resize_bytes(images, self.preprocessing.size)

    def stored(self, index: int) -> bytes:
        """See `Split`."""
        return self.images[index].numpy().tobytes()

    def subset(self, indices: Tensor, preprocessing: Preprocessing) -> TensorSplit:
        """A copy of the images at `indices` as a split of their own."""
        images, labels = self.images[indices], self.labels[indices]
        return TensorSplit(images, labels, preprocessing, pad=self.pad, flip=self.flip)


@dataclass(frozen=True, slots=True)
class Dataset:
    """A data set cut for architecture search. No image is in two splits.

    Attributes:
        name: of the data that was really loaded, for reports and manifests.
        classes: name of each label.
        preprocessing: shared by all splits.
        train: what the supernet learns from.
        calibration: training images kept apart for batch-norm statistics.
        validation: what search compares children on.
        test: the data set's own test part, for the numbers that are reported.
    """

    name: str
    classes: tuple[str, ...]
    preprocessing: Preprocessing
    train: Split = field(repr=False)
    calibration: Split = field(repr=False)
    validation: Split = field(repr=False)
    test: Split = field(repr=False)


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """Images as found, before `load_dataset` cuts them. Their preprocessing says size and channels, no more.

    Attributes:
        name: of the data.
        classes: name of each label.
        train: what becomes train and calibration, and the parts below that are missing.
        validation: where the data has such a part.
        test: likewise.
        shorter_side: `Preprocessing.shorter_side` for an image size.
    """

    name: str
    classes: tuple[str, ...]
    train: Split
    validation: Split | None = None
    test: Split | None = None
    shorter_side: Callable[[int], int | None] = lambda size: None


def plain(size: int, channels: int) -> Preprocessing:
    """Preprocessing that leaves the values as they are, for images whose mean is not known yet."""
    return Preprocessing(size, channels, mean=(0.0,) * channels, std=(1.0,) * channels)


def shift_and_flip(images: Tensor, draws: Tensor, *, pad: int, flip: bool) -> Tensor:
    """Pad with black, crop the old size at a random place, and mirror half of the images.

    The usual augmentation of small images (He et al. 2016, section 4.2).

    Args:
        images: (n, channels, height, width) uint8.
        draws: (n, NUM_DRAWS) in [0, 1).
        pad: width of the border, pixels.
        flip: whether to mirror.

    Returns:
        Of the shape of `images`.
    """
    num_images, num_channels, height, width = images.shape
    padded = F.pad(images, (pad, pad, pad, pad))
    rows = (draws[:, TOP, None] * (2 * pad + 1)).long() + torch.arange(height)
    columns = (draws[:, LEFT, None] * (2 * pad + 1)).long() + torch.arange(width)
    if flip:
        columns = torch.where(draws[:, FLIP, None] < 0.5, columns.flip(1), columns)
    image = torch.arange(num_images).reshape(-1, 1, 1, 1)
    channel = torch.arange(num_channels).reshape(1, -1, 1, 1)
    return padded[image, channel, rows[:, None, :, None], columns[:, None, None, :]]


def resize(images: Tensor, resolution: int, preprocessing: Preprocessing) -> Tensor:
    """Pixels to network input: bicubic to the resolution, then normalised, on the device of `images`.

    Args:
        images: (n, channels, height, width) uint8.
        resolution: side of the result, pixels.
        preprocessing: its mean and std are used.

    Returns:
        (n, channels, resolution, resolution) float32, contiguous.
    """
    mean, std = (
        torch.tensor(values, device=images.device).reshape(-1, 1, 1)
        for values in (preprocessing.mean, preprocessing.std)
    )
    pixels = resize_bytes(images, resolution).contiguous().float()
    return pixels.div_(255).sub_(mean).div_(std)


def resize_bytes(images: Tensor, size: int) -> Tensor:
    """(n, channels, height, width) uint8 to (n, channels, size, size) uint8, as Pillow does it to within 1/255."""
    if images.shape[2:] == (size, size):
        return images
    if images.device.type != "cpu":
        return _resize_in_two_passes(images, size)
    return F.interpolate(images, size=(size, size), mode="bicubic", antialias=True)


def _resize_in_two_passes(images: Tensor, size: int) -> Tensor:
    """For devices that cannot interpolate bytes: floats, rounded after each direction as Pillow does.

    In one pass, sharp edges come out up to 6 of 255 different.
    """
    pixels = images.float()
    for shape in ((images.shape[2], size), (size, size)):
        pixels = F.interpolate(pixels, size=shape, mode="bicubic", antialias=True).round_().clamp_(0, 255)
    return pixels.byte()
