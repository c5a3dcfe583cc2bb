"""Labelled images, from a folder, Parquet files, PyTorch or by name, as honest splits and reproducible batches."""

from hwnas.data.augment import AUGMENTATIONS, Augmentation
from hwnas.data.batches import batches, steps_per_epoch, train_batch, train_batches
from hwnas.data.images import unreadable
from hwnas.data.load import load_dataset
from hwnas.data.splits import Dataset, Preprocessing, Split, TensorSplit, resize

__all__ = [
    "AUGMENTATIONS",
    "Augmentation",
    "Dataset",
    "Preprocessing",
    "Split",
    "TensorSplit",
    "batches",
    "load_dataset",
    "resize",
    "steps_per_epoch",
    "train_batch",
    "train_batches",
    "unreadable",
]
