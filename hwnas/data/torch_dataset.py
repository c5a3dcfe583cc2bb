"""Any map-style dataset of PyTorch as images and labels."""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, TypeAlias

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset as TorchDataset
from torch.utils.data import Subset

from hwnas.data.images import Images, name_parts, rgb, source_of_images
from hwnas.data.splits import Source
from hwnas.errors import InputError

TorchDatasets: TypeAlias = "TorchDataset[Any] | Mapping[str, TorchDataset[Any]]"

PARTS = ("train", "val", "validation", "test")
NUM_COMPARED = 10  # images whose labels are compared with the list of labels that a dataset has


class DatasetImages(Images):
    """The images of a dataset of PyTorch: Pillow's, or uint8 as numpy (H, W[, 3]) or tensor ([3, ]H, W).

    Read one at a time within a process, as a dataset need not allow more.

    Args:
        dataset: gives (image, label) for an index.
        part: for messages.
    """

    num_checked: ClassVar[int] = 100
    threads: ClassVar[int] = 1

    def __init__(self, dataset: TorchDataset[Any], part: str) -> None:
        self.dataset, self.part = dataset, part

    def __len__(self) -> int:
        """Number of images."""
        return len(self.dataset)  # type: ignore[arg-type]

    def read(self, index: int) -> Image.Image:
        """See `Images`."""
        image, _ = _item(self.dataset, index, self.part)
        if isinstance(image, Image.Image):
            return rgb(image.copy())  # what is done to it stays here
        pixels = image.numpy(force=True) if isinstance(image, Tensor) else image
        if isinstance(image, Tensor) and image.ndim == 3:
            pixels = pixels.transpose(1, 2, 0)
        if isinstance(pixels, np.ndarray) and pixels.ndim == 3 and pixels.shape[2] == 1:
            pixels = pixels[:, :, 0]
        is_image = isinstance(pixels, np.ndarray) and (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3))
        if not is_image or pixels.dtype != np.uint8:
            shape = f"{getattr(image, 'dtype', type(image).__name__)} {tuple(getattr(image, 'shape', ()))}"
            raise InputError(
                f"{self.name(index)}: is {shape}, but an image of Pillow or uint8 pixels are needed, numpy (H, W, 3) "
                "or tensor (3, H, W): leave the conversion and normalisation out of the dataset's transform"
            )
        return rgb(Image.fromarray(np.ascontiguousarray(pixels)))

    def name(self, index: int) -> str:
        """The part and the index."""
        return f"{self.part}[{index}]"


def open_torch(data: TorchDatasets, notice: Callable[[str], None]) -> Source:
    """A dataset of PyTorch, or one for each of train and perhaps validation (or val) and test.

    Labels are taken from its `targets` or `labels` where those are what it gives with the images; otherwise every
    image is read once. Class names are its `classes`, or the numbers.

    Raises:
        InputError: it does not give images and labels as described, or the names of parts are others.
    """
    datasets = data if isinstance(data, Mapping) else {"train": data}
    if "train" not in datasets or not datasets.keys() <= {*PARTS}:
        found = ", ".join(map(repr, datasets))
        raise InputError(f"the parts {found} are not 'train' and perhaps 'validation' and 'test'")
    for part, dataset in datasets.items():
        if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
            raise InputError(f"{part} is {type(dataset).__name__}, which is no map-style dataset with a length")
    labels = {part: _labels(dataset, part, notice) for part, dataset in datasets.items()}
    whole = _whole(datasets["train"])
    values = [value for of_part in labels.values() for value in of_part]
    classes = getattr(whole, "classes", None) or range(max(values) + 1)
    if min(values) < 0 or max(values) >= len(classes):
        raise InputError(
            f"labels go from {min(values)} to {max(values)}, but there are {len(classes)} classes, counted from 0"
        )
    parts = {part: (DatasetImages(dataset, part), torch.tensor(labels[part])) for part, dataset in datasets.items()}
    return source_of_images(type(whole).__name__, tuple(map(str, classes)), name_parts(parts, "the data", notice))


def _item(dataset: TorchDataset[Any], index: int, part: str) -> tuple[Any, Any]:
    """Image and label, which Hugging Face's datasets give by name."""
    item = dataset[index]
    if isinstance(item, Mapping) and "image" in item and "label" in item:
        return item["image"], item["label"]
    if isinstance(item, tuple | list) and len(item) == 2:
        return item[0], item[1]
    raise InputError(f"{part}[{index}] is not an image and its label, but {type(item).__name__}")


def _labels(dataset: TorchDataset[Any], part: str, notice: Callable[[str], None]) -> list[int]:
    num_images = len(dataset)  # type: ignore[arg-type]
    if num_images == 0:
        raise InputError(f"{part} has no images")

    def label(index: int) -> int:
        value = _item(dataset, index, part)[1]
        try:
            return operator.index(value)
        except TypeError:
            raise InputError(f"{part}[{index}] has the label {value!r}, which is no integer") from None

    listed = _listed(dataset)
    if listed is not None and len(listed) == num_images:
        compared = np.linspace(0, num_images - 1, min(NUM_COMPARED, num_images)).astype(int).tolist()
        if all(listed[index] == label(index) for index in compared):  # or else a transform changes them
            return [int(value) for value in listed]
    notice(f"{part}: reading all {num_images} images for their labels, as there is no list of them (`targets`)")
    return [label(index) for index in range(num_images)]


def _listed(dataset: Any) -> Sequence[Any] | None:
    """The labels that a dataset, or the one it is a `Subset` of, lists."""
    if isinstance(dataset, Subset):
        whole = _listed(dataset.dataset)
        return None if whole is None else [whole[index] for index in dataset.indices]
    return getattr(dataset, "targets", getattr(dataset, "labels", None))


def _whole(dataset: Any) -> Any:
    """The dataset that this one is a `Subset` of, or this one."""
    return _whole(dataset.dataset) if isinstance(dataset, Subset) else dataset
