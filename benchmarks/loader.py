"""How fast training images are decoded and augmented, next to torchvision's own pipeline.

    python benchmarks/loader.py                                    # 10,000 images: 1.1 GB, and about ten minutes
    python benchmarks/loader.py --images 3000 --repeats 1          # a first impression

The images are JPEG files of ImageNet's size, cut from photographs that scikit-learn brings. Both pipelines give random
parts of 224 x 224 pixels, ours in threads and torchvision's in processes, and run in turns: a busy machine slows both.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from environment import heading
from PIL import Image, ImageEnhance, __version__
from sklearn.datasets import load_sample_images
from torch.utils.data import DataLoader
from torchvision import __version__ as torchvision_version
from torchvision import transforms
from torchvision.datasets import ImageFolder

from hwnas.data import Augmentation, train_batches
from hwnas.data.folder import open_folder
from hwnas.data.images import LEAST_AREA
from hwnas.progress import reporting

SIZE, BATCH, CLASSES = 224, 100, 10
AUGMENTATIONS: tuple[Augmentation, ...] = ("standard", "autoaugment")
SHAPES = ((500, 375), (500, 375), (500, 333), (500, 400), (375, 500))  # frequent on ImageNet
QUALITY, NOISE = 96, 4.5  # which together make files of ImageNet's size: 110 KB on average


def write_photo(path: Path, number: int, photos: list[Image.Image]) -> None:
    """A part of a photograph, at another scale and in other colours for each number, with a sensor's noise."""
    rng = np.random.default_rng(number)
    photo = photos[number % len(photos)]
    width, height = SHAPES[rng.integers(len(SHAPES))]
    scale = rng.uniform(0.7, 1) * min(photo.width / width, photo.height / height)
    left, top = rng.uniform(0, photo.width - scale * width), rng.uniform(0, photo.height - scale * height)
    box = (left, top, left + scale * width, top + scale * height)
    image = photo.resize((width, height), Image.Resampling.BICUBIC, box=box)
    for change in (ImageEnhance.Brightness, ImageEnhance.Color, ImageEnhance.Contrast):
        image = change(image).enhance(rng.uniform(0.7, 1.3))
    pixels = np.asarray(image) + rng.normal(0, NOISE, (height, width, 1))
    temporary = path.with_suffix(".part")
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(temporary, "JPEG", quality=QUALITY)
    temporary.replace(path)


def write_photos(folder: Path, count: int) -> list[Path]:
    """So many files, in folders of classes; those that are there already stay."""
    photos = [Image.fromarray(image) for image in load_sample_images().images]
    paths = [folder / f"class{number % CLASSES}" / f"{number:06}.jpg" for number in range(count)]
    with reporting("photos") as (report,):
        for number, path in enumerate(paths):
            path.parent.mkdir(parents=True, exist_ok=True)
            if not path.exists():
                write_photo(path, number, photos)
            report(number + 1, count, "")
    return paths


def ours(folder: Path, augment: Augmentation, workers: int) -> Generator[object, None, None]:
    split = open_folder(folder, print).train
    with closing(train_batches(split, BATCH, seed=0, augment=augment, threads=workers)) as batches:
        yield from batches


def torchvisions(folder: Path, augment: Augmentation, workers: int) -> Generator[object, None, None]:
    steps = [transforms.RandomResizedCrop(SIZE, scale=(LEAST_AREA, 1)), transforms.RandomHorizontalFlip()]
    policy = [transforms.AutoAugment()] if augment == "autoaugment" else []
    data = ImageFolder(folder, transforms.Compose([*steps, *policy, transforms.PILToTensor()]))
    yield from DataLoader(data, BATCH, shuffle=True, num_workers=workers, drop_last=True)


PIPELINES: dict[str, Callable[[Path, Augmentation, int], Generator[object, None, None]]] = {
    "ours": ours,
    "torchvision": torchvisions,
}


def images_per_s(batches: Iterator[object], skip: int, count: int) -> float:
    """Over `count` batches, after so many that what was prepared ahead is as much at the start as at the end."""
    for _ in islice(batches, skip):
        pass
    start = time.perf_counter()
    seen = sum(1 for _ in islice(batches, count))
    seconds = time.perf_counter() - start
    assert seen == count, "too few images"
    return BATCH * count / seconds


def measured(folder: Path, repeats: int, numbers: list[int], count: int) -> list[str]:
    runs: dict[tuple[Augmentation, int, str], list[float]] = {}
    with reporting("loading") as (report,):
        total = repeats * len(numbers) * len(AUGMENTATIONS) * len(PIPELINES)
        for _ in range(repeats):
            for augment in AUGMENTATIONS:
                for workers in numbers:
                    for name, pipeline in PIPELINES.items():
                        with closing(pipeline(folder, augment, workers)) as batches:
                            rate = images_per_s(batches, 3 * workers + 1, count)
                        runs.setdefault((augment, workers, name), []).append(rate)
                        done = sum(map(len, runs.values()))
                        report(done, total, f"{augment}, {workers} {name}: {rate:.0f} images/s")
    lines = [
        "| augmentation | threads or processes | pipeline | images/s | range | against torchvision |",
        "|---|---|---|---|---|---|",
    ]
    for (augment, workers, name), rates in runs.items():
        median, reference = (statistics.median(runs[augment, workers, which]) for which in (name, "torchvision"))
        lines.append(
            f"| {augment} | {workers} | {name} | {median:.0f} | {min(rates):.0f} to {max(rates):.0f} "
            f"| {median / reference:.2f} |"
        )
    return lines


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=10_000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=20, help="timed in a run")
    parser.add_argument("--folder", type=Path, help="for the images, which stay there; a temporary one otherwise")
    parser.add_argument("--output", type=Path, help="write the results there too")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        folder = (arguments.folder or Path(temporary)) / str(arguments.images)
        paths = write_photos(folder, arguments.images)
        kilobytes = statistics.mean(path.stat().st_size for path in paths) / 1e3
        sizes = [Image.open(path).size for path in paths[:1000]]
        width, height = (statistics.mean(size) for size in zip(*sizes, strict=True))
        cores = len(os.sched_getaffinity(0))
        lines = heading(
            "Loading of training images",
            f"{len(paths)} JPEG files of {kilobytes:.0f} KB and {width:.0f} x {height:.0f} pixels on average; random "
            f"parts of {SIZE} x {SIZE} pixels; {arguments.batches} batches of {BATCH} from all over the files a run; "
            f"medians of {arguments.repeats} runs in turns; "
            f"load of the machine before: {os.getloadavg()[0]:.1f}",
        )
        lines.insert(5, f"- torchvision {torchvision_version}, Pillow {__version__}")
        lines += [*measured(folder, arguments.repeats, sorted({1, cores}), arguments.batches), ""]
    text = "\n".join(lines)
    print(text)
    if arguments.output is not None:
        arguments.output.write_text(text, encoding="utf-8")
