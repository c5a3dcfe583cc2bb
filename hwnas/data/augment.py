"""Augmentation policies: what is done to a training image after the crop and the flip of "standard".

Operations and magnitudes are torchvision's (its `AutoAugment` and `RandAugment`, nearest neighbour), which follow the
authors' code; what an operation uncovers is filled with grey, as there. Pillow does the work: for 224 x 224 pixels it
takes 0.03 to 0.3 ms an operation (sharpness 1.6), where torchvision takes 0.4 to 1.3 ms on tensors (sharpness 5.4, and
0.01 for posterize and invert, where Pillow takes 0.1).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import Literal, TypeAlias, get_args

import numpy as np
import torch
from PIL import Image, ImageEnhance, ImageOps
from torch import Tensor

from hwnas.errors import InputError

Augmentation: TypeAlias = Literal["none", "standard", "autoaugment", "randaugment"]
AUGMENTATIONS: tuple[Augmentation, ...] = get_args(Augmentation)

# Random numbers in [0, 1) that a policy takes for one image: two operations at most, each with a chance and a sign.
NUM_POLICY_DRAWS = 5
SUB_POLICY, OPERATIONS, SIGNS = 0, (1, 2), (3, 4)

GREY = 128  # of what shearing, shifting and turning uncover
LEVELS = 9  # the largest magnitude in the tables below

RANDAUGMENT_MAGNITUDE = 9 / 30  # of N=2 operations: the paper's M for ResNet-50 on ImageNet

# Cubuk et al. 2019, arXiv 1805.09501, appendix: 25 sub-policies, each of two operations with their chance in tenths and
# their magnitude, up to 9.
_IMAGENET = """
posterize 4 8, rotate 6 9; solarize 6 5, autocontrast 6; equalize 8, equalize 6; posterize 6 7, posterize 6 6;
equalize 4, solarize 2 4; equalize 4, rotate 8 8; solarize 6 3, equalize 6; posterize 8 5, equalize 10;
rotate 2 3, solarize 6 8; equalize 6, posterize 4 6; rotate 8 8, color 4 0; rotate 4 9, equalize 6;
equalize 0, equalize 8; invert 6, equalize 10; color 6 4, contrast 10 8; rotate 8 8, color 10 2;
color 8 8, solarize 8 7; sharpness 4 7, invert 6; shear_x 6 5, equalize 10; color 4 0, equalize 6;
equalize 4, solarize 2 4; solarize 6 5, autocontrast 6; invert 6, equalize 10; color 6 4, contrast 10 8;
equalize 8, equalize 6
"""
_CIFAR10 = """
invert 1, contrast 2 6; rotate 7 2, translate_x 3 9; sharpness 8 1, sharpness 9 3; shear_y 5 8, translate_y 7 9;
autocontrast 5, equalize 9; shear_y 2 7, posterize 3 7; color 4 3, brightness 6 7; sharpness 3 9, brightness 7 9;
equalize 6, equalize 5; contrast 6 7, sharpness 6 5; color 7 7, translate_x 5 8; equalize 3, autocontrast 4;
translate_y 4 3, sharpness 2 6; brightness 9 6, color 2 8; solarize 5 2, invert 0; equalize 2, autocontrast 6;
equalize 2, equalize 6; color 9 9, equalize 6; autocontrast 8, solarize 2 8; brightness 1 3, color 7 0;
solarize 4 5, autocontrast 9; translate_y 9 9, translate_y 7 9; autocontrast 9, solarize 8 3; equalize 8, invert 1;
translate_y 7 9, autocontrast 9
"""

SubPolicy: TypeAlias = tuple[tuple[str, float, float], ...]  # operation, chance, magnitude; the last two 0 to 1


def _parse(table: str) -> tuple[SubPolicy, ...]:
    def operation(text: str) -> tuple[str, float, float]:
        name, chance, *level = text.split()
        return name, int(chance) / 10, int(level[0]) / LEVELS if level else 0.0

    return tuple(tuple(operation(text) for text in pair.split(",")) for pair in table.split(";"))


IMAGENET, CIFAR10 = _parse(_IMAGENET), _parse(_CIFAR10)


def _affine(image: Image.Image, *matrix: float) -> Image.Image:
    fill = (GREY,) * len(image.getbands())
    return image.transform(image.size, Image.Transform.AFFINE, matrix, Image.Resampling.NEAREST, fillcolor=fill)


def _shift(length: int, magnitude: float) -> int:
    return int(150 / 331 * length * magnitude)  # 150 pixels of the authors' 331


# What an operation of a magnitude does to an image of mode RGB or L. Signed ones take -1 to 1, the others 0 to 1.
SIGNED: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "shear_x": lambda image, m: _affine(image, 1, 0.3 * m, 0, 0, 1, 0),
    "shear_y": lambda image, m: _affine(image, 1, 0, 0, 0.3 * m, 1, 0),
    "translate_x": lambda image, m: _affine(image, 1, 0, -_shift(image.width, m), 0, 1, 0),
    "translate_y": lambda image, m: _affine(image, 1, 0, 0, 0, 1, -_shift(image.height, m)),
    "rotate": lambda image, m: image.rotate(30 * m, fillcolor=(GREY,) * len(image.getbands())),
    "brightness": lambda image, m: ImageEnhance.Brightness(image).enhance(1 + 0.9 * m),
    "color": lambda image, m: ImageEnhance.Color(image).enhance(1 + 0.9 * m),  # a grey image stays as it is
    "contrast": lambda image, m: ImageEnhance.Contrast(image).enhance(1 + 0.9 * m),
    "sharpness": lambda image, m: ImageEnhance.Sharpness(image).enhance(1 + 0.9 * m),
}
UNSIGNED: dict[str, Callable[[Image.Image, float], Image.Image]] = {
    "identity": lambda image, m: image,
    "posterize": lambda image, m: ImageOps.posterize(image, 8 - round(4 * m)),
    "solarize": lambda image, m: ImageOps.solarize(image, math.ceil(255 - 255 * m)),
    "autocontrast": lambda image, m: ImageOps.autocontrast(image),
    "equalize": lambda image, m: ImageOps.equalize(image),
    "invert": lambda image, m: ImageOps.invert(image),
}
# RandAugment draws from all but `invert`, which its paper leaves out.
RANDAUGMENT = tuple(name for name in (*SIGNED, *UNSIGNED) if name != "invert")


def check_augmentation(augment: str) -> None:
    """Raises `InputError` for a name that is not in `AUGMENTATIONS`."""
    if augment not in AUGMENTATIONS:
        raise InputError(f"augment={augment!r} is not one of {', '.join(AUGMENTATIONS)}")


def apply_policy(images: Tensor, augment: Augmentation, draws: Tensor, *, photos: bool) -> Tensor:
    """The images after "autoaugment" (Cubuk et al. 2019) or "randaugment" (Cubuk et al. 2020, arXiv 1909.13719).

    Args:
        images: (n, channels, height, width) uint8, grey or RGB.
        augment: "none" and "standard" leave the images as they are.
        draws: (n, NUM_POLICY_DRAWS) float64 in [0, 1), the only source of chance.
        photos: whether AutoAugment takes the policy found on ImageNet, or the one found on CIFAR-10.

    Returns:
        Of the shape of `images`.
    """
    if augment in ("none", "standard"):
        return images
    choose = _randaugment if augment == "randaugment" else _autoaugment
    result = torch.empty_like(images)
    for pixels, row, target in zip(images, draws.tolist(), result, strict=True):
        operations = list(choose(row, IMAGENET if photos else CIFAR10))
        target.copy_(_apply(pixels, operations) if operations else pixels)
    return result


def _apply(pixels: Tensor, operations: Sequence[tuple[str, float]]) -> Tensor:
    """(channels, height, width) uint8 after the operations with their magnitudes."""
    array = pixels.permute(1, 2, 0).contiguous().numpy()
    image = Image.fromarray(array[:, :, 0] if len(pixels) == 1 else array)
    for name, magnitude in operations:
        image = (SIGNED.get(name) or UNSIGNED[name])(image, magnitude)
    return torch.from_numpy(np.array(image).reshape(array.shape)).permute(2, 0, 1)


def _autoaugment(draws: Sequence[float], policy: Sequence[SubPolicy]) -> Iterator[tuple[str, float]]:
    sub_policy = policy[int(draws[SUB_POLICY] * len(policy))]
    for (name, chance, magnitude), draw, sign in zip(sub_policy, OPERATIONS, SIGNS, strict=True):
        if draws[draw] < chance:
            yield name, _signed(name, magnitude, draws[sign])


def _randaugment(draws: Sequence[float], policy: Sequence[SubPolicy]) -> Iterator[tuple[str, float]]:
    for draw, sign in zip(OPERATIONS, SIGNS, strict=True):
        name = RANDAUGMENT[int(draws[draw] * len(RANDAUGMENT))]
        yield name, _signed(name, RANDAUGMENT_MAGNITUDE, draws[sign])


def _signed(name: str, magnitude: float, draw: float) -> float:
    return -magnitude if name in SIGNED and draw < 0.5 else magnitude
