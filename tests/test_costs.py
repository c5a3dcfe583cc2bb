"""What children cost beside time: memory, file size, energy; and the report of a space."""

import numpy as np
import pytest

from hwnas.errors import InputError
from hwnas.exporters.base import exporter, file_bytes, write_random
from hwnas.files import parts
from hwnas.layers import lower
from hwnas.space import SearchSpace

PACKAGES = {"executorch": "executorch"}  # that a format needs for writing
SIZES = [
    ("onnx", "fp32"), ("onnx", "int8"), ("onnx", "int8-symmetric"), ("tflite", "fp32"), ("tflite", "int8"),
    ("ncnn", "fp32"), ("ncnn", "int8"), ("executorch", "fp32"),
]  # fmt: skip


@pytest.mark.parametrize(("format", "precision"), SIZES)
def test_file_size_is_known_before_the_file_is_written(format, precision, tmp_path):
    if format in PACKAGES:
        pytest.importorskip(PACKAGES[format])
    rng = np.random.default_rng(5)
    for name, children, off in (("bignas", 1, 0.005), ("ofa-mbv3", 1, 0.005), ("tiny", 3, 0.02)):
        space = SearchSpace.load(name)
        for arch in (space.smallest(), *(space.sample(rng) for _ in range(children))):
            path = write_random(exporter(format, precision), space, arch, tmp_path / arch.id, rng)
            size = sum(part.stat().st_size for part in parts(path))
            assert file_bytes(lower(space, arch), format, precision) == pytest.approx(size, rel=off)


def test_size_of_files_that_nobody_measured():
    with pytest.raises(
        InputError, match="size of onnx files in fp13 is not known beforehand, only that of executorch fp32"
    ):
        file_bytes([], "onnx", "fp13")
