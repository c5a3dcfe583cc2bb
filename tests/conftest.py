import os
import sys
from pathlib import Path
from typing import Any

import pytest

# Where other programs compute, two threads of a small network can be a hundred times slower than one: each waits for
# the other at every operation. Read by torch, here and in the processes that tests start, when it is first imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip, with the reason, what this machine cannot run."""
    if item.get_closest_marker("gpu"):
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
    if item.get_closest_marker("phone") and not os.environ.get("HWNAS_TEST_PHONE"):
        pytest.skip("no phone: set $HWNAS_TEST_PHONE to its adb serial")


@pytest.fixture(autouse=True)
def _run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No test touches the developer's own run folder, or devices."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.setenv("HWNAS_RUN", str(tmp_path / "run"))


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Also after a test that changed torch's threads, and whatever the environment says."""
    if torch := sys.modules.get("torch"):
        torch.set_num_threads(1)


@pytest.fixture(scope="session")
def quantised() -> tuple[Any, ...]:
    """A network, its tensors with ranges, images, and a stand-in for accuracy, as it was never trained."""
    import torch

    from hwnas.bundles.parity import correlation
    from hwnas.layers import lower
    from hwnas.testing import random_images, tensors_with_ranges, tiny_space, trained_network

    space = tiny_space()
    network = trained_network(lower(space, space.largest()))
    tensors = tensors_with_ranges(network.layers, network, random_images(network.layers, 16, seed=0))
    images = random_images(network.layers, 64, seed=1)
    expected = network(torch.from_numpy(images)).numpy()

    def accuracy(writer: Any, path: Path) -> float:
        found = writer.infer(path, images)
        return correlation(found - found.mean(0), expected - expected.mean(0))

    return network, tensors, images, accuracy
