"""The guides say what is so: their files and commands are taken from the text and run."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from hwnas.cli import main
from hwnas.devices import device_files, load_spec
from hwnas.exporters.base import exporter, formats

ROOT = Path(__file__).parent.parent
GUIDE = (ROOT / "docs" / "devices.md").read_text(encoding="utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The guide's files, each named by its first line."""
    for name, text in re.findall(r"```\w+\n# (\S+)\n(.*?)```", GUIDE, flags=re.DOTALL):
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_device_of_your_own(folder, capsys):
    board = folder / "my-board.yaml"
    board.write_text(board.read_text().replace("max_rounds: 12", "max_rounds: 12, max_error: 10"))  # busy or not
    main(["devices", "check", "my-board.yaml", "--seconds", "0.2"])
    out = capsys.readouterr().out
    assert "pass  onnxruntime:" in out
    assert "2 thread(s)" in out
    assert main(["profile", "--device", "my-board.yaml", "--space", "tiny", "--children", "5"]) == 0
    assert "latency predictor of my-board" in capsys.readouterr().out


def test_a_runtime_of_your_own(folder):
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "test_reference.py"],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert done.returncode == 0, done.stdout
    assert " passed" in done.stdout


def test_a_runtime_file_that_is_not_there(folder):
    (folder / "reference_runtime.py").unlink()
    with pytest.raises(
        ValueError, match=r"reference\.yaml:1: runtime '.*reference_runtime\.py': there is no such file"
    ):
        load_spec("reference.yaml")


@pytest.mark.parametrize(
    "name",
    sorted(set(re.findall(r"(?<!hwnas/)\b(?:tools|runtimes|transports)/\w+\.py", GUIDE.replace("hwnas/devices/", "")))),
)
def test_files_that_the_guide_names(name):
    assert list((ROOT / "hwnas").glob(f"**/{name}")), name


def test_devices_that_the_guide_names():
    assert {"jetson-orin-nano", "pixel", "jetson", "cpu"} <= set(device_files())


def test_the_table_of_formats():
    """docs/export.md has what the exporters say of themselves."""
    text = (ROOT / "docs" / "export.md").read_text(encoding="utf-8")
    rows = dict(re.findall(r"^\| `(\w+)` \| (.*) \|$", text.partition("| `--format`")[2].partition("\n\n")[0], re.M))
    assert sorted(rows) == sorted(formats())
    for name, row in rows.items():
        made = exporter(name)
        _, precisions, batch, pixels, mixes = row.split(" | ")
        assert tuple(re.sub(r"\(.*?\)", "", precisions).replace(" ", "").split(",")) == made.precisions
        assert batch == made.batches
        assert made.pixel_input is not None
        if name != "coreml":
            assert pixels == f"{made.pixel_input.dtype} {made.pixel_input.layout}"
        assert mixes == ("yes" if made.mixes else "no")
