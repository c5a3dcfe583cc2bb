"""Encoded images, from wherever they are stored, as the square bytes that a network is trained and evaluated on."""

from __future__ import annotations

import io
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from statistics import median_low
from typing import Any, ClassVar, TypeAlias, TypeVar

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from torch import Tensor

from hwnas.data.splits import (
    AREA,
    FLIP,
    LEFT,
    PHOTO_SIZE,
    RATIO,
    TOP,
    Preprocessing,
    Source,
    Split,
    plain,
    resize_bytes,
    shift_and_flip,
)
from hwnas.errors import InputError
from hwnas.machine import num_processors

DEFAULT_SIZE = 224
SHORTER_SIDE = 256 / 224  # of the image to the side of its centre crop: He et al. 2016, section 3.4
LEAST_AREA = 0.25  # share of the photo that a random crop shows at least
MOST_RATIO = 4 / 3  # of a random crop's width to its height, or the reverse: Szegedy et al. 2015, section 6

KEPT_BYTES = 2**30  # a split that fits, as evaluated (ImageNet: 7,100 images at 224), is decoded only once
LARGE = 2**25  # pixels (100 MB decoded); of larger JPEG files, a smaller image is decoded for evaluation too

Box: TypeAlias = tuple[float, float, float, float]
Encoded: TypeAlias = bytes | Image.Image
T = TypeVar("T")

# Pillow warns from 89 million pixels on. From twice as many on it raises, and the message here names the image.
warnings.filterwarnings("ignore", category=Image.DecompressionBombWarning)


class Images(ABC):
    """Where images are stored. A new kind of storage implements this, and all of `ImageSplit` works with it.

    Attributes:
        num_checked: how many images, spread over all, are opened at the start.
        threads: how many may be read at a time.
    """

    num_checked: ClassVar[int] = 2000
    threads: ClassVar[int] = 64

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def read(self, index: int) -> Encoded:
        """An image as the bytes of its file, or as Pillow has it; may raise anything. Called from many threads."""

    @abstractmethod
    def name(self, index: int) -> str:
        """How messages name the image: a path, for example."""

    def decode(self, index: int, how: Callable[[Encoded], T]) -> T:
        """What `how` makes of an image.

        Raises:
            InputError: it cannot be read; the message names it.
        """
        try:
            return how(self.read(index))
        except InputError:
            raise
        except Exception as error:  # what decoders raise on damaged files is not documented
            reason = "no image" if isinstance(error, UnidentifiedImageError) else str(error) or type(error).__name__
        raise InputError(f"{self.name(index)}: cannot be read as an image ({reason}): replace or remove it")


class ImageSplit(Split):
    """Images that are decoded on demand, in a few threads.

    Photos (`PHOTO_SIZE` and up) are augmented by a random crop of random size, and mirrored; smaller images
    like those of `TensorSplit`. As evaluated, images are kept in memory if all of them fit into `KEPT_BYTES`.
    Every image becomes RGB: transparency is dropped, of animations the first picture is taken. Rotation marks in
    EXIF data are ignored, as torchvision does.

    Args:
        images: where they are stored.
        indices: (num_images,) int64, which of `images` are in this split.
        labels: (num_images,) int64.
        preprocessing: what they become.
    """

    def __init__(self, images: Images, indices: Tensor, labels: Tensor, preprocessing: Preprocessing) -> None:
        super().__init__(labels, preprocessing)
        self.images, self.indices = images, indices
        self.threads = images.threads
        shape = (len(labels), preprocessing.channels, preprocessing.size, preprocessing.size)
        # Memory is taken only when pixels are written.
        self._kept = torch.empty(shape, dtype=torch.uint8) if math.prod(shape) <= KEPT_BYTES else None
        self.decodes = self._kept is None or preprocessing.size >= PHOTO_SIZE
        self._is_kept = torch.zeros(len(labels), dtype=torch.bool)

    @property
    def names(self) -> Iterator[str]:
        """How messages name each image."""
        return map(self.images.name, self.indices.tolist())

    def pixels(self, indices: Tensor, draws: Tensor | None) -> Tensor:
        """See `Split`."""
        if draws is None:
            return self._as_evaluated(indices)
        size = self.preprocessing.size
        if size < PHOTO_SIZE:
            return shift_and_flip(self._as_evaluated(indices), draws, pad=max(1, size // 8), flip=True)
        return self._decoded(indices, draws.tolist())

    def subset(self, indices: Tensor, preprocessing: Preprocessing) -> ImageSplit:
        """The images at `indices` as a split of their own."""
        return ImageSplit(self.images, self.indices[indices], self.labels[indices], preprocessing)

    def stored(self, index: int) -> bytes:
        """See `Split`."""
        encoded = self.images.read(int(self.indices[index]))
        return encoded if isinstance(encoded, bytes) else encoded.tobytes()

    def unreadable(self) -> Iterator[str | None]:
        """Decode every image: None for a good one, and for a bad one the line that training would end with."""

        def problem(index: int) -> str | None:
            try:
                self.images.decode(index, lambda encoded: rgb(opened(encoded)))
            except InputError as error:
                return str(error)
            return None

        for part in self.indices.split(1000):
            yield from self._in_threads(problem, part.tolist())

    def _as_evaluated(self, indices: Tensor) -> Tensor:
        if self._kept is None:
            return self._decoded(indices, [None] * len(indices))
        missing = indices[~self._is_kept[indices]]
        self._kept[missing] = self._decoded(missing, [None] * len(missing))
        self._is_kept[missing] = True
        return self._kept[indices]

    def _decoded(self, indices: Tensor, draws: Sequence[Sequence[float] | None]) -> Tensor:
        size, shorter_side = self.preprocessing.size, self.preprocessing.shorter_side
        # In Pillow's order of channels, which is also the fastest one for what comes next.
        images = torch.empty(len(indices), size, size, 3, dtype=torch.uint8).permute(0, 3, 1, 2)

        def fill(image: Tensor, index: int, draws: Sequence[float] | None) -> None:
            def decode(encoded: Encoded) -> Tensor:
                return centre(encoded, size, shorter_side) if draws is None else random_crop(encoded, size, draws)

            image[:] = self.images.decode(index, decode)

        # While training, several threads call this, each for a part of the batch.
        several = map if any(draw is not None for draw in draws) else self._in_threads
        for _ in several(fill, images, self.indices[indices].tolist(), draws):
            pass  # raises what `fill` raised
        return images

    def _in_threads(self, function: Callable[..., T], *arguments: Iterable[Any]) -> Iterator[T]:
        """`map`, with a few calls at a time."""
        if self.threads == 1:
            yield from map(function, *arguments)
            return
        with ThreadPoolExecutor(min(self.threads, num_processors()), thread_name_prefix="hwnas-decode") as threads:
            yield from threads.map(function, *arguments)


def unreadable(*splits: Split, report: Callable[[int, int, str], None] = lambda *_: None) -> list[str]:
    """Decode every image of the splits once, to find all damaged ones before a long training meets the first.

    Args:
        splits: those held in memory have no such images.
        report: is told, after every thousand images, how many are done, how many there are, and how many are bad.

    Returns:
        A line for each bad image, as training would raise it.
    """
    encoded = [split for split in splits if isinstance(split, ImageSplit)]
    total = sum(map(len, encoded))
    problems: list[str] = []
    for done, problem in enumerate(chain.from_iterable(split.unreadable() for split in encoded), start=1):
        if problem is not None:
            problems.append(problem)
        if done % 1000 == 0 or done == total:
            report(done, total, f"{len(problems)} cannot be read")
    return problems


def source_of_images(name: str, classes: Sequence[str], parts: Mapping[str, tuple[Images, Tensor]]) -> Source:
    """Encoded images as a source; its size is that of the smaller half of the training images, at most 224.

    Args:
        name: of the data.
        classes: name of each label.
        parts: images and (num_images,) labels of train, and perhaps of validation and test.

    Raises:
        InputError: one of (a sample of) the images cannot be read, or a part is empty, or there is only one class.
    """
    if len(classes) < 2:
        raise InputError(f"{name} has only one class, {', '.join(classes)!r}: at least two are needed")
    for part, (images, _) in parts.items():
        if not len(images):
            raise InputError(f"{name}: {part} has no images: add some or remove it")
    shorter_sides = {part: _shorter_sides(images) for part, (images, _) in parts.items()}
    preprocessing = plain(min(DEFAULT_SIZE, median_low(shorter_sides["train"])), 3)
    splits = {
        part: ImageSplit(images, torch.arange(len(images)), labels, preprocessing)
        for part, (images, labels) in parts.items()
    }
    return Source(
        name=name,
        classes=tuple(classes),
        train=splits["train"],
        validation=splits.get("validation"),
        test=splits.get("test"),
        shorter_side=lambda size: round(size * SHORTER_SIDE) if size >= PHOTO_SIZE else None,
    )


def name_parts(found: Mapping[str, T], where: str, notice: Callable[[str], None]) -> dict[str, T]:
    """What is called train, val or validation, and test, by our names.

    Without `test`, `val` is the test part, as is usual with ImageNet, and `notice` is told.
    """
    parts = {"validation" if name == "val" else name: part for name, part in found.items()}
    if "validation" in parts and "test" not in parts:
        parts["test"] = parts.pop("validation")
        notice(f"{where}: the validation part is the test part; images for validation are taken off the training part")
    return parts


def _shorter_sides(images: Images) -> list[int]:
    """Of (a sample of) the images."""
    sample = range(0, len(images), math.ceil(len(images) / images.num_checked))
    with ThreadPoolExecutor(images.threads) as threads:
        return list(threads.map(lambda index: images.decode(index, lambda encoded: min(opened(encoded).size)), sample))


def opened(encoded: Encoded) -> Image.Image:
    """The image, with no more read than its header if it is encoded."""
    return Image.open(io.BytesIO(encoded)) if isinstance(encoded, bytes) else encoded


def centre(encoded: Encoded, size: int, shorter_side: int | None) -> Tensor:
    """(3, size, size) uint8 of an image as it is evaluated, see `Preprocessing`."""
    image = opened(encoded)
    resized = [size, size] if shorter_side is None else [shorter_side * side // min(image.size) for side in image.size]
    if math.prod(image.size) > LARGE:
        image.draft(image.mode, (2 * resized[0], 2 * resized[1]))
    width, height = resized
    image = rgb(image).resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    return _tensor(image.crop((left, top, left + size, top + size)))[0]


def random_crop(encoded: Encoded, size: int, draws: Sequence[float]) -> Tensor:
    """(3, size, size) uint8 of a random part of an image, chosen by the (NUM_DRAWS,) draws, perhaps mirrored."""
    image = opened(encoded)
    full, box = image.size, crop_box(*image.size, draws)
    shown = min(box[2] - box[0], box[3] - box[1])
    # Have the JPEG decoder shrink the image, by at most what the crop will shrink anyway.
    image.draft(image.mode, (math.ceil(full[0] * size / shown), math.ceil(full[1] * size / shown)))
    image = rgb(image)
    scale = image.width / full[0], image.height / full[1]
    left, top, right, bottom = (round(edge * scale[axis % 2]) for axis, edge in enumerate(box))
    image = image.crop((left, top, max(right, left + 1), max(bottom, top + 1)))
    if draws[FLIP] < 0.5:
        image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return resize_bytes(_tensor(image), size)[0]  # takes half the time of Pillow's


def crop_box(width: int, height: int, draws: Sequence[float]) -> Box:
    """Left, top, right, bottom of the part of a (width, height) image that the draws choose, in pixels.

    Area and aspect ratio are drawn once and clipped to the image, where torchvision draws until they fit.
    """
    area = width * height * (LEAST_AREA + (1 - LEAST_AREA) * draws[AREA])
    ratio = MOST_RATIO ** (2 * draws[RATIO] - 1)
    shown_width, shown_height = min(width, math.sqrt(area * ratio)), min(height, math.sqrt(area / ratio))
    left, top = draws[LEFT] * (width - shown_width), draws[TOP] * (height - shown_height)
    return left, top, left + shown_width, top + shown_height


def rgb(image: Image.Image) -> Image.Image:
    """Decode and convert to RGB. Transparency is dropped; 16-bit grey is brought to 8."""
    if image.mode.startswith("I"):  # 16 bits, which some formats give as 32
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a transparent palette goes to RGB directly
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")  # `convert` copies even if there is nothing to do


def _tensor(image: Image.Image) -> Tensor:
    """(1, 3, height, width) uint8 of an RGB image, channels last in memory."""
    return torch.from_numpy(np.array(image)).view(1, image.height, image.width, 3).permute(0, 3, 1, 2)
