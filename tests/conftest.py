import os
from pathlib import Path

import pytest


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
    """No test touches the developer's own run folder."""
    monkeypatch.setenv("HWNAS_RUN", str(tmp_path / "run"))
