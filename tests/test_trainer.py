import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hwnas.data import Dataset, load_dataset, resize, train_batch
from hwnas.errors import InputError
from hwnas.objectives import SandwichRule, backward_in_place, zero_gradients
from hwnas.optim import RMSpropTF, make_optimizer
from hwnas.recipes import TrainConfig, bignas, short
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet, corner
from hwnas.trainer import Checkpoint, Trainer

SPACE = SearchSpace.load("tiny", resolution=[8, 12], in_channels=1, num_classes=10)
CONFIG = replace(short(), epochs=0.4, batch_size=32, threads=1, seed=3)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Dataset:
    return load_dataset("digits", cache=tmp_path_factory.mktemp("cache"), size=12)


def weights(supernet: Supernet) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in supernet.named_parameters()}


def assert_same(one: Supernet, other: Supernet) -> None:
    for (name, a), (_, b) in zip(weights(one).items(), weights(other).items(), strict=True):
        assert torch.equal(a, b), name


# ---------------------------------------------------------------- one step


def test_gradients_equal_autograd_through_the_views(data):
    """The in-place sum over detached corners against plain differentiation of the summed loss."""
    pixels, labels = train_batch(data.train, 0, 16, 0)
    supernet = Supernet(SPACE, seed=1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    rule = SandwichRule(num_random=2, dropout=0.0, label_smoothing=0.1)
    zero_gradients(supernet)
    rule(supernet, lambda r: resize(pixels, r, data.preprocessing), labels, np.random.default_rng(5))
    ours = {name: p.grad.clone() for name, p in supernet.named_parameters()}

    supernet.zero_grad()
    rng = np.random.default_rng(5)
    teacher = supernet(resize(pixels, 12, data.preprocessing), SPACE.largest())
    loss = F.cross_entropy(teacher, labels, label_smoothing=0.1)
    soft = teacher.detach().softmax(1)
    for arch in (SPACE.smallest(), SPACE.sample(rng), SPACE.sample(rng)):
        logits = supernet(resize(pixels, arch.resolution, data.preprocessing), arch)
        loss = loss - (soft * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    for name, parameter in supernet.named_parameters():
        reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name], reference, rtol=1e-4, atol=1e-6)


def test_mean_reduction_is_the_sum_over_the_children(data):
    pixels, labels = train_batch(data.train, 0, 16, 0)
    grads = []
    for reduction in ("sum", "mean"):
        supernet = Supernet(SPACE, seed=1)
        zero_gradients(supernet)
        rule = SandwichRule(num_random=1, dropout=0.0, loss_reduction=reduction)
        rule(supernet, lambda r: resize(pixels, r, data.preprocessing), labels, np.random.default_rng(5))
        grads.append(supernet.classifier.weight.grad)
    torch.testing.assert_close(grads[0], 3 * grads[1])


def test_dropout_reaches_the_biggest_child_only(data):
    """With everything dropped, the biggest child's logits are the bias; the others' are not touched."""
    pixels, labels = train_batch(data.train, 0, 16, 0)
    seen = []

    class Watched(Supernet):
        def forward(self, image, arch, **options):
            seen.append((arch, options.get("dropout", 0.0)))
            return super().forward(image, arch, **options)

    supernet = Watched(SPACE)
    zero_gradients(supernet)
    rule = SandwichRule(num_random=2, dropout=0.3)
    rule(supernet, lambda r: resize(pixels, r, data.preprocessing), labels, np.random.default_rng(0))
    assert [dropout for _, dropout in seen] == [0.3, 0.0, 0.0, 0.0]
    assert [arch for arch, _ in seen[:2]] == [SPACE.largest(), SPACE.smallest()]
    x = torch.randn(4, 1, 12, 12)
    supernet.train()
    torch.testing.assert_close(
        Supernet.forward(supernet, x, SPACE.largest(), dropout=1.0), supernet.classifier.bias.expand(4, -1)
    )


def test_gradient_of_a_child_stays_in_its_corner():
    supernet = Supernet(SPACE)
    zero_gradients(supernet)
    arch = SPACE.smallest()
    backward_in_place(supernet, arch, torch.randn(4, 1, 8, 8), lambda logits: logits.square().sum())
    weight = supernet.stem.conv.weight
    inside = corner(weight.grad, (arch.stem, 1, 3, 3))
    assert inside.any()
    assert not weight.grad[arch.stem :].any()


def test_rmsprop_is_tensorflows():
    """Three steps by hand, in the formula of tf.keras.optimizers.RMSprop's V1 kernel (ApplyRMSProp)."""
    start, grads = 1.5, (0.3, -0.2, 0.5)
    w, square, velocity = start, 1.0, 0.0
    for g in grads:
        g = g + 0.01 * w
        square = 0.9 * square + 0.1 * g * g
        velocity = 0.8 * velocity + 0.1 * g / (square + 1e-3) ** 0.5
        w = w - velocity
    parameter = torch.nn.Parameter(torch.tensor([start], dtype=torch.float64))
    optimizer = RMSpropTF([parameter], lr=0.1, decay=0.9, momentum=0.8, eps=1e-3, weight_decay=0.01)
    for g in grads:
        parameter.grad = torch.tensor([g], dtype=torch.float64)
        optimizer.step()
    assert parameter.item() == pytest.approx(w, rel=1e-12)


def test_weight_decay_spares_biases_and_norms():
    supernet = Supernet(SPACE)
    for group in make_optimizer(supernet, CONFIG).param_groups:
        assert all((p.ndim > 1) == (group["weight_decay"] > 0) for p in group["params"])


# ---------------------------------------------------------------- recipes


def test_bignas_schedule():
    config = bignas()
    assert config.learning_rate(0) == 0
    assert config.learning_rate(2.5) == pytest.approx(0.128)
    assert config.learning_rate(24) == pytest.approx(0.256 * 0.97**10)
    assert config.learning_rate(235) > 0.05 * 0.256  # the floor is reached at about epoch 236
    assert config.learning_rate(240) == config.learning_rate(359) == pytest.approx(0.05 * 0.256)
    assert replace(config, batch_size=64).peak_lr == pytest.approx(0.004)  # scales below 256 too


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs=0.*: must be over 0"),
        ({"dropout": 1.0}, r"dropout=1\.0: must be at least 0 and under 1"),
        ({"threads": 0}, "threads=0"),
        ({"optimizer": "adam"}, "optimizer: .*not 'adam'"),
        ({"learning_rate": 1}, "learning_rate: is not a known key"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(short().to_dict() | change)


# ---------------------------------------------------------------- the loop


def test_training_learns(data, tmp_path):
    trainer = Trainer(SPACE, data, replace(CONFIG, epochs=3), tmp_path)
    pixels, labels = train_batch(data.train, 0, 32, 3)
    first = trainer.gradients(pixels, labels)
    trainer.run()
    last = trainer.gradients(pixels, labels)
    assert last.biggest < 0.6 * first.biggest
    assert last.smallest < 0.8 * first.smallest


def test_resume_is_exact(data, tmp_path):
    whole = Trainer(SPACE, data, CONFIG, tmp_path / "whole")
    whole.run()
    assert whole.step == whole.num_steps > 10
    part = Trainer(SPACE, data, CONFIG, tmp_path / "part")
    for step in range(7):
        part.train_step(*train_batch(data.train, step, CONFIG.batch_size, CONFIG.seed))
    part.checkpoint()
    told: list[str] = []
    resumed = Trainer(SPACE, data, CONFIG, tmp_path / "part", told.append)
    assert resumed.step == 7
    assert "going on from step 7" in told[0]
    resumed.run()
    assert_same(whole.supernet, resumed.supernet)


def test_a_killed_run_ends_with_the_same_weights(data, tmp_path):
    """kill -9 at several moments, in a process of its own; then the same weights bit for bit."""
    script = (
        "import sys, time; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "import test_trainer as t\n"
        "data = t.load_dataset('digits', cache=Path(sys.argv[1]), size=12)\n"
        "trainer = t.Trainer(t.SPACE, data, t.CONFIG, Path(sys.argv[1]) / 'checkpoints')\n"
        "def report(done, total, note=''):\n"
        "    print(done, flush=True)\n"
        "trainer.run(report, checkpoint_every_s=0)\n"
    )
    command = [sys.executable, "-c", script, str(tmp_path), str(Path(__file__).parent)]
    rng = np.random.default_rng(0)
    for _ in range(3):
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
            for _ in range(2):
                process.stdout.readline()
            time.sleep(rng.uniform(0, 0.05))
            os.kill(process.pid, signal.SIGKILL)
    done = Checkpoint.newest(tmp_path / "checkpoints")
    assert done is not None
    assert 3 <= done.step < 15
    finished = Trainer(SPACE, data, CONFIG, tmp_path / "checkpoints")
    finished.run()
    whole = Trainer(SPACE, data, CONFIG, tmp_path / "whole")
    whole.run()
    assert_same(whole.supernet, finished.supernet)
    leftovers = [p for p in (tmp_path / "checkpoints").iterdir() if not p.name.startswith(".")]
    assert len(leftovers) == 2


def test_threads_are_chosen_and_remembered(data, tmp_path):
    config = replace(CONFIG, threads=None, epochs=0.05)
    trainer = Trainer(SPACE, data, config, tmp_path)
    before = torch.get_num_threads()
    try:
        trainer.run()
    finally:
        torch.set_num_threads(before)
    assert trainer.config.threads is not None
    assert Trainer(SPACE, data, config, tmp_path).config.threads == trainer.config.threads


def test_other_configuration_or_space_is_refused(data, tmp_path):
    Trainer(SPACE, data, CONFIG, tmp_path).checkpoint()
    with pytest.raises(InputError, match=r"another configuration \(lr=0\.2 there, 0\.5 now\)"):
        Trainer(SPACE, data, replace(CONFIG, lr=0.5), tmp_path)
    with pytest.raises(InputError, match="another space"):
        Trainer(replace(SPACE, resolution=(8,)), data, CONFIG, tmp_path)
    with pytest.raises(InputError, match="began with other images"):
        Trainer(SPACE, replace(data, name="mnist-5k"), CONFIG, tmp_path)


def test_damaged_checkpoint_is_named(data, tmp_path):
    trainer = Trainer(SPACE, data, CONFIG, tmp_path)
    first = trainer.checkpoint()
    trainer.step = 1
    second = trainer.checkpoint()
    second.write_bytes(second.read_bytes()[:1000])
    with pytest.raises(InputError, match=r"step-000000001\.safetensors: damaged.*delete it to go on"):
        Trainer(SPACE, data, CONFIG, tmp_path)
    second.unlink()
    assert Trainer(SPACE, data, CONFIG, tmp_path).step == 0
    assert first.exists()


def test_a_loss_that_is_not_finite_stops_with_the_checkpoint_intact(data, tmp_path):
    trainer = Trainer(SPACE, data, replace(CONFIG, lr=1e20, warmup_epochs=0), tmp_path)
    trainer.checkpoint()
    with pytest.raises(InputError, match=r"not finite at step \d+, learning rate .*lower train\.lr"):
        trainer.run()
    intact = Checkpoint.newest(tmp_path)
    assert intact is not None
    assert all(torch.isfinite(t).all() for t in intact.tensors.values())


def test_a_full_disk_leaves_the_old_checkpoint(data, tmp_path, monkeypatch):
    trainer = Trainer(SPACE, data, CONFIG, tmp_path)
    trainer.checkpoint()
    trainer.step = 1

    def full(tensors, path, metadata):
        Path(path).write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("hwnas.weights.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        trainer.checkpoint()
    assert [p.name for p in tmp_path.iterdir()] == ["step-000000000.safetensors"]
