"""Recorded outputs of device tools, which lie beside the project where they lie at all."""

from pathlib import Path

import pytest

SAMPLES = Path(__file__).parents[2] / "shared" / "samples"


def sample(name):
    """The text of one; skips the test where it is not there."""
    if not (SAMPLES / name).exists():
        pytest.skip(f"no {name} in {SAMPLES}")
    return (SAMPLES / name).read_text(encoding="utf-8")
