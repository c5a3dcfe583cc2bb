import multiprocessing
import os
import signal
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import hwnas
from hwnas.calibrate import evaluate
from hwnas.data import Dataset, load_dataset, prepared
from hwnas.data.splits import Split
from hwnas.errors import InputError
from hwnas.evaluator import EvaluationProtocol, Evaluator
from hwnas.space import SearchSpace
from hwnas.store import Store
from hwnas.supernet import Supernet

SPACE = SearchSpace.load("tiny", resolution=[8, 12], in_channels=1, num_classes=10)
PROTOCOL = EvaluationProtocol(calibration_images=32, batch_size=16)


def make_supernet(seed: int = 1) -> Supernet:
    supernet = Supernet(SPACE, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return supernet


def digits(folder: Path) -> Dataset:
    return load_dataset("digits", cache=folder, size=12)


@pytest.fixture
def data(tmp_path) -> Dataset:
    return digits(tmp_path)


@pytest.fixture
def store(tmp_path):
    with Store(tmp_path / "run.db") as store:
        yield store


def children(count: int) -> list:
    rng = np.random.default_rng(0)
    return list(dict.fromkeys([SPACE.smallest(), SPACE.largest(), *(SPACE.sample(rng) for _ in range(count - 2))]))


# -- one child --------------------------------------------------------------------------------------------------


def test_a_child_is_worked_out_once(data, store, monkeypatch):
    evaluator = Evaluator(make_supernet(), data, PROTOCOL)
    first = evaluator.accuracy(SPACE.smallest(), store)
    images = evaluator.images(data.validation, 8, 10**6)
    with torch.no_grad():
        alone = evaluate(evaluator.child(SPACE.smallest()), [(images, data.validation.labels)])
    assert first == pytest.approx(alone.accuracy)
    child = evaluator.child(SPACE.smallest())
    assert evaluator.score(child, SPACE.smallest(), data.validation).accuracy == first
    monkeypatch.setattr(evaluator, "_timed_score", lambda *arguments: pytest.fail("worked out again"))
    assert evaluator.accuracy(SPACE.smallest(), store) == first
    with pytest.raises(InputError, match="split 'train' is not one of validation, test"):
        evaluator.accuracy(SPACE.smallest(), store, "train")


def test_other_weights_are_another_evaluation(data, store):
    """Also those of the same supernet, after a step of training."""
    supernet = make_supernet()
    evaluator = Evaluator(supernet, data, PROTOCOL)
    before = evaluator.accuracy(SPACE.largest(), store)
    supernet.load_state_dict(make_supernet(seed=5).state_dict())
    after = evaluator.accuracy(SPACE.largest(), store)
    assert after == Evaluator(make_supernet(seed=5), data, PROTOCOL).scores([SPACE.largest()])[0].accuracy
    assert after != before


# -- many children ----------------------------------------------------------------------------------------------


def test_many_at_a_time_are_as_one_by_one(data, store, tmp_path):
    archs = children(7)
    torch.set_num_threads(2)
    one = Evaluator(make_supernet(), data, PROTOCOL, workers=1)
    expected = [one.accuracy(arch, store) for arch in archs]
    told = []
    with Store(tmp_path / "other.db") as other:
        many = Evaluator(make_supernet(), data, PROTOCOL, workers=3)
        found = many.accuracies([*archs, archs[0]], other, report=lambda *progress: told.append(progress[:2]))
        assert found == [*expected, expected[0]]
        assert told == [(number, 7) for number in range(1, 8)]
        assert many.accuracies(archs[:3], other) == expected[:3]
        assert [round(known.accuracy, 9) for known in other.evaluations(*which(many, other))]
    assert torch.get_num_threads() == 2
    assert not evaluating()
    assert len(set(expected)) > 3


def which(evaluator: Evaluator, store: Store) -> tuple[str, str, str]:
    num_images = len(evaluator.data.validation)
    protocol = f"{evaluator.protocol.key()} images={num_images} data={evaluator.data.name}"
    return evaluator.supernet.identity(), "validation", protocol


def evaluating() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("hwnas-evaluate")]


def test_what_was_evaluated_before_a_failure_is_kept(data, store, monkeypatch):
    """The failure itself comes out, other children in work stop at their next batch, and no thread is left."""
    archs = children(6)
    evaluator = Evaluator(make_supernet(), data, PROTOCOL, workers=2)
    honest = store.add_evaluation
    added = []

    def dies(evaluation):
        honest(evaluation)
        added.append(evaluation)
        if len(added) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(store, "add_evaluation", dies)
    with pytest.raises(KeyboardInterrupt):
        evaluator.accuracies(archs, store)
    assert not evaluating()
    monkeypatch.undo()
    assert len(store.evaluations(*which(evaluator, store))) == 2
    counted = []
    evaluator.accuracies(archs, store, report=lambda done, total, note: counted.append(total))
    assert counted == [4] * 4


def test_an_image_that_cannot_be_read_ends_all(data, store, monkeypatch):
    monkeypatch.setattr(Split, "resized", lambda self, resolution: None)

    def broken(indices, draws):
        raise InputError("cat.jpg cannot be read")

    monkeypatch.setattr(data.validation, "pixels", broken)
    with pytest.raises(InputError, match=r"cat\.jpg"):
        Evaluator(make_supernet(), data, PROTOCOL, workers=2).accuracies(children(4), store)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("hwnas")]


def test_scores_during_training(data):
    """Of the weights of this moment, on a bounded number of images spread over the split, and nothing is recorded."""
    supernet = make_supernet()
    evaluator = Evaluator(supernet, data, PROTOCOL)
    archs = children(2)
    whole = evaluator.scores(archs)
    assert [score.num_images for score in whole] == [len(data.validation)] * 2
    few = evaluator.scores(archs, num_images=50)
    assert [score.num_images for score in few] == [50, 50]
    assert evaluator.scores(archs, num_images=50) == few
    supernet.load_state_dict(make_supernet(seed=5).state_dict())
    assert evaluator.scores(archs, num_images=50) != few
    assert all(parameter.grad is None for parameter in supernet.parameters())
    with pytest.raises(InputError, match="num_images=0 is not at least 1"):
        evaluator.scores(archs, num_images=0)


INTERRUPTED = """
import signal, sys
from pathlib import Path
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs ignore it
sys.path.insert(0, {tests!r})
import test_evaluator as t
folder = Path({folder!r})
with t.Store(folder / "run.db") as store:
    evaluator = t.Evaluator(t.make_supernet(), t.digits(folder), t.PROTOCOL, cache=folder / "prepared", workers=2)
    evaluator.accuracies(t.children(300), store, report=lambda done, total, note: print(done, flush=True))
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(tmp_path, number):
    """Ctrl-C and a kill leave the evaluations so far; the next call goes on."""
    code = INTERRUPTED.format(tests=str(Path(__file__).parent), folder=str(tmp_path))
    root = str(Path(hwnas.__file__).parent.parent)
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=root
    )
    with process:
        assert process.stdout is not None
        for _ in range(3):
            assert process.stdout.readline()
        os.kill(process.pid, number)
        _, errors = process.communicate(timeout=60)
    assert process.returncode in (-number, 130)
    assert number == signal.SIGKILL or "KeyboardInterrupt" in errors
    evaluator = Evaluator(make_supernet(), digits(tmp_path), PROTOCOL, cache=tmp_path / "prepared")
    with Store(tmp_path / "run.db") as store:
        known = store.evaluations(*which(evaluator, store))
        assert 3 <= len(known) < 300
        todo = []
        evaluator.accuracies(
            [known[0].arch, SPACE.largest()], store, report=lambda done, total, note: todo.append(total)
        )
        assert len(todo) <= 1


# -- prepared images --------------------------------------------------------------------------------------------


def test_prepared_images_are_found_again(tmp_path, monkeypatch):
    splits = [digits(tmp_path).validation for _ in range(2)]
    in_memory = splits[0].resized(8)
    for split in splits:
        split.cache = tmp_path / "prepared"
        split._resized.clear()
    assert torch.equal(splits[0].resized(8), in_memory)
    (file,) = (tmp_path / "prepared").iterdir()
    assert file.name == f"{splits[0].identity()}-8.npy"
    monkeypatch.setattr(type(splits[1]), "_resize_into", lambda *arguments: pytest.fail("made again"))
    assert torch.equal(splits[1].resized(8), in_memory)


def test_other_images_have_another_file(data):
    validation = data.validation
    half = validation.subset(torch.arange(0, len(validation), 2), validation.preprocessing)
    assert len({split.identity() for split in (data.calibration, validation, data.test, half)}) == 4
    assert validation.identity() == validation.subset(torch.arange(len(validation)), data.preprocessing).identity()


@pytest.mark.parametrize(
    "damage",
    [
        pytest.param(lambda content: content[:-1], id="cut short"),
        pytest.param(lambda content: b"", id="empty"),
        pytest.param(lambda content: b"no array" + content[8:], id="garbage"),
        pytest.param(lambda content: content.replace(b"|u1", b"|i1"), id="another type"),
        pytest.param(lambda content: content.replace(b"False", b"True ", 1), id="another order"),
    ],
)
def test_a_damaged_file_is_made_again(data, tmp_path, damage):
    split = data.validation
    split.cache = tmp_path / "prepared"
    expected = split.resized(8).clone()
    (file,) = split.cache.iterdir()
    file.write_bytes(damage(file.read_bytes()))
    split._resized.clear()
    assert torch.equal(split.resized(8), expected)
    assert [path.name for path in split.cache.iterdir()] == [file.name]


def test_no_room_and_no_rights(data, tmp_path, monkeypatch):
    """Then images are made anew for each child: slower, not wrong."""
    split = data.validation
    expected = split.resized(8)
    split._resized.clear()
    split.cache = tmp_path / "prepared"
    monkeypatch.setattr(prepared, "PREPARED_BYTES", expected.nbytes - 1)
    assert split.resized(8) is None
    monkeypatch.undo()
    (tmp_path / "file").touch()
    split.cache = tmp_path / "file" / "prepared"
    assert split.resized(8) is None


def test_old_files_make_room(data, tmp_path, monkeypatch):
    split = data.validation
    split.cache = tmp_path / "prepared"
    kept = split.resized(8)
    (first,) = split.cache.iterdir()
    monkeypatch.setattr(prepared, "PREPARED_BYTES", split.resized(12).nbytes + kept.nbytes + 300)
    split._resized.clear()
    split.resized(10)
    assert not first.exists()
    assert kept.sum() > 0  # who has it mapped keeps it
    assert not list(split.cache.glob(".*"))


def _prepare(folder: Path, start) -> None:
    split = digits(folder).validation
    split.cache = folder / "prepared"
    start.wait()
    images = split.resized(12)
    assert images is not None
    np.save(folder / f"{os.getpid()}.npy", images.numpy())


@pytest.mark.slow
def test_two_processes_at_once(tmp_path):
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(2)
    processes = [context.Process(target=_prepare, args=(tmp_path, start)) for _ in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        assert process.exitcode == 0
    expected = digits(tmp_path).validation.resized(12).numpy()
    found = [np.load(path) for path in tmp_path.glob("*.npy")]
    assert len(found) == 2
    assert all(np.array_equal(images, expected) for images in found)
    assert len(list((tmp_path / "prepared").iterdir())) == 1
