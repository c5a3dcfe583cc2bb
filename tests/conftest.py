import os
import sys
from pathlib import Path

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
