"""Training in several processes, started by torchrun as a user does."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from hwnas.machine import torchrun_ranks
from hwnas.training.processes import Processes, processes

ROOT = Path(__file__).parent.parent

# Gradients of one step, for several configurations, saved by the first process.
SCRIPT = """
import sys
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

from hwnas.data import load_dataset, train_batch
from hwnas.space import SearchSpace
from hwnas.training.processes import processes
from hwnas.training.recipes import Regularisation, short
from hwnas.training.trainer import Trainer

folder = Path(sys.argv[1])
space = SearchSpace.load("tiny", resolution=[8, 12], in_channels=1, num_classes=10)
plain = replace(short(), threads=1, seed=3, batch_size=16, gamma_zero=False)
configs = {
    "local": replace(plain, biggest=Regularisation()),
    "sync": replace(plain, sync_bn=True, biggest=Regularisation()),
    "rich": replace(
        plain, sync_bn=True, sampling="attentive", mixup=0.2, cutmix=0.5, augment="standard", clip_norm=1.0,
        biggest=Regularisation(label_smoothing=0.1, dropout=0.2, drop_connect=0.3),
    ),
}
with processes("cpu") as team:
    data = team.one_after_the_first(lambda: load_dataset("digits", cache=folder, size=12))
    found = {}
    for name, config in configs.items():
        trainer = Trainer(space, data, config, None, processes=team)
        parts = [(team.rank, team.count)]
        if name == "local" and team.count == 1:  # what two processes without synchronised batch norm compute
            parts = [(0, 2), (1, 2)]
        for rank, count in parts:
            batch = train_batch(data.train, 0, 16, 3, augment=config.augment, rank=rank, num_ranks=count)
            _, losses = trainer.gradients(*batch)
            own = {f"{name}.{key}": p.grad.clone() / len(parts) for key, p in trainer.supernet.named_parameters()}
            own[f"{name}.losses"] = torch.tensor(losses) / len(parts)
            for key, tensor in own.items():
                found[key] = found.get(key, 0) + tensor
    team.wait()
    if team.first:
        save_file({key: tensor.contiguous() for key, tensor in found.items()}, folder / f"{team.count}.safetensors")
"""


def start(count: int, *words: str, options: tuple[str, ...] = ()) -> subprocess.Popen:
    """torchrun on this machine, each on its own port."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", *options]
    return subprocess.Popen(
        [*launcher, *words], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    with process:
        output, _ = process.communicate(timeout=200)
    assert process.returncode == 0, output
    return output


@pytest.fixture(scope="module")
def gradients(tmp_path_factory) -> dict[int, dict[str, torch.Tensor]]:
    """Of one process and of two, on the same global batch."""
    folder = tmp_path_factory.mktemp("gradients")
    script = folder / "script.py"
    script.write_text(SCRIPT)
    for count in (1, 2):
        finish(start(count, str(script), str(folder)))
    return {count: load_file(folder / f"{count}.safetensors") for count in (1, 2)}


@pytest.mark.parametrize("config", ["local", "sync", "rich"])
def test_two_processes_compute_the_gradients_of_one(gradients, config):
    """To 1e-5 of the largest gradient; without synchronised batch norm, the mean of those of both halves."""
    one, two = gradients[1], gradients[2]
    names = [name for name in one if name.startswith(f"{config}.")]
    assert len(names) > 50
    largest = max(one[name].abs().max().item() for name in names)
    for name in names:
        torch.testing.assert_close(two[name], one[name], rtol=1e-5, atol=1e-5 * largest)


def test_batch_norm_over_both_processes_is_not_that_of_each(gradients):
    local, sync = (gradients[2][f"{config}.stem.conv.weight"] for config in ("local", "sync"))
    assert (local - sync).abs().max() > 0.05 * sync.abs().max()


TRAIN = (
    "-m", "hwnas", "train", "--data", "digits", "-o", "train.epochs=0.5", "-o", "data.size=12", "-o", "train.threads=1",
    "-o", "space.resolution=[8,12]", "-o", "train.sync_bn=true", "-o", "train.checkpoint_every_s=0",
)  # fmt: skip


def workers(launcher: int) -> dict[str, int]:
    """Process numbers of torchrun's workers, by rank."""
    found = {}
    for task in Path(f"/proc/{launcher}/task").iterdir():
        for child in (task / "children").read_text().split():
            content = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
            ranks = [entry[5:].decode() for entry in content if entry.startswith(b"RANK=")]
            found |= {rank: int(child) for rank in ranks}
    return found


@pytest.mark.skipif(not Path("/proc/self/environ").exists(), reason="finds torchrun's workers in Linux's /proc")
def test_a_killed_process_costs_nothing_but_time(tmp_path):
    """kill -9 of one rank: torchrun starts all again, which go on from the last checkpoint to the same weights."""
    whole = start(2, *TRAIN, "--run-folder", str(tmp_path / "whole"), "--json")
    output = finish(whole)
    document = json.loads(output[output.index("{\n") :])  # one document: only the first process talks
    assert {one["child"] for one in document["evaluations"]} == {"smallest", "biggest"}

    killed = start(2, *TRAIN, "--run-folder", str(tmp_path / "killed"), options=("--max-restarts=3",))
    checkpoints = tmp_path / "killed" / "checkpoints"
    deadline = time.monotonic() + 120
    while not list(checkpoints.glob("step-00000000[3-9].safetensors")):
        assert time.monotonic() < deadline
        assert killed.poll() is None, finish(killed)
        time.sleep(0.02)
    os.kill(workers(killed.pid)["1"], signal.SIGKILL)
    output = finish(killed)
    assert output.count("going on from step") == 1
    a, b = (load_file(tmp_path / name / "supernet.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_one_process_needs_no_torchrun(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert torchrun_ranks() == (0, 1, 0, 1)
    with processes("cpu") as team:
        assert team == Processes()
        assert team.first
        assert team.text(lambda: "h\u00e9") == "h\u00e9"
        assert team.one_after_the_first(lambda: 5) == 5
        assert torch.equal(team.sum(torch.ones(2)), torch.ones(2))
