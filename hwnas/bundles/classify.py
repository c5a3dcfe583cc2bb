"""Classify images: the part of a bundle's `run.py` that all formats share; `hwnas.load_bundle` runs it too."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

Run = Callable[[NDArray[Any]], NDArray[np.float32]]  # images to logits (num_images, num_classes)


def pixels(image: Image.Image, how: dict[str, Any]) -> NDArray[np.uint8]:
    """(resolution, resolution, channels) of any image, by the manifest's `preprocessing`."""
    if image.mode.startswith("I"):  # 16 bits, which some formats give as 32
        image = Image.fromarray((np.asarray(image).clip(0, 2**16 - 1) >> 8).astype(np.uint8))
    if image.mode == "P":
        image = image.convert("RGBA")  # Pillow warns where a transparent palette goes to RGB directly
    image = image.convert("L" if how["channels"] == 1 else "RGB")
    size, shorter_side = how["size"], how["shorter_side"]
    width = height = size
    if shorter_side is not None:
        width, height = (shorter_side * side // min(image.size) for side in image.size)
    image = image.resize((width, height), Image.Resampling.BICUBIC)
    left, top = round((width - size) / 2), round((height - size) / 2)
    image = image.crop((left, top, left + size, top + size))
    image = image.resize((how["resolution"],) * 2, Image.Resampling.BICUBIC)
    return np.asarray(image).reshape(how["resolution"], how["resolution"], how["channels"])


def normalised(image: Image.Image, how: dict[str, Any]) -> NDArray[np.float32]:
    """(resolution, resolution, channels) float32 of any image, by the manifest's `preprocessing`."""
    mean, std = np.float32(how["mean"]), np.float32(how["std"])
    return (pixels(image, how).astype(np.float32) / np.float32(255) - mean) / std


def preprocess(image: Image.Image, manifest: dict[str, Any]) -> NDArray[Any]:
    """What the network's file takes, (1, ...), of any image."""
    wanted = manifest["input"]
    values = (normalised if wanted["values"] == "normalised" else pixels)(image, manifest["preprocessing"])
    if wanted["layout"] == "NCHW":
        values = values.transpose(2, 0, 1)
    return np.ascontiguousarray(values[None], dtype=wanted["dtype"])


def softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities, along the last axis."""
    powers = np.exp(logits - logits.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)  # type: ignore[no-any-return]


def main(load: Callable[[Path], Run], folder: Path, paths: list[str]) -> None:
    """Print the three likeliest classes of each image file."""
    if not paths:
        sys.exit("usage: python run.py IMAGE...")
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    run = load(folder / manifest["file"]["name"])
    batch = manifest["input"]["shape"][0] or 1  # that many copies, where the file takes so many at a time
    for path in paths:
        with Image.open(path) as image:
            probabilities = softmax(run(preprocess(image, manifest).repeat(batch, axis=0)))[0]
        best = (-probabilities).argsort(kind="stable")[:3]
        print(f"{path}: " + ", ".join(f"{manifest['classes'][i]} {probabilities[i]:.1%}" for i in best))
