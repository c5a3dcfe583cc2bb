import json
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from hwnas.data import Dataset, load_dataset, resize, train_batch
from hwnas.errors import InputError
from hwnas.layers import LayerSums, lower, total_macs
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet, corner
from hwnas.training.checkpoint import Checkpoint
from hwnas.training.losses import adaptive_alpha_divergence, alpha_divergence
from hwnas.training.mixing import mix
from hwnas.training.objectives import Batch, Noise, Objective, backward_in_place, regulariser
from hwnas.training.optim import RMSpropTF, make_optimizer, update_average
from hwnas.training.plan import plan
from hwnas.training.processes import FlatGradients, processes
from hwnas.training.recipes import (
    RECIPES,
    WITHOUT_EFFECT,
    Regularisation,
    TrainConfig,
    alphanet,
    bignas,
    sgd_cosine,
    short,
)
from hwnas.training.sampling import make_sampler
from hwnas.training.trainer import Trainer
from hwnas.training.watch import Watch

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


def noisy_supernet(seed: int = 1) -> Supernet:
    """Gammas are not zero, so that every tensor gets a gradient."""
    supernet = Supernet(SPACE, seed=seed)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return supernet


def batch_of(data: Dataset, count: int = 16) -> Batch:
    pixels, labels = train_batch(data.train, 0, count, 0)
    noise = Noise(torch.Generator().manual_seed(0), count, slice(0, count))
    return Batch(lambda r: resize(pixels, r, data.preprocessing), labels, noise)


def gradients(supernet: Supernet, batch: Batch, seed: int = 5, **changes) -> dict[str, torch.Tensor]:
    flat = FlatGradients(supernet, extra=0)
    config = replace(CONFIG, **{"biggest": Regularisation(), **changes})
    Objective(SPACE, config)(supernet, batch, np.random.default_rng(seed))
    assert flat.flat.any()
    return {name: p.grad.clone() for name, p in supernet.named_parameters()}


def test_gradients_equal_autograd_through_the_views(data):
    """The in-place sum over detached corners against plain differentiation of the summed loss."""
    supernet, batch = noisy_supernet(), batch_of(data)
    ours = gradients(supernet, batch, biggest=Regularisation(label_smoothing=0.1))

    supernet.zero_grad()
    rng = np.random.default_rng(5)
    teacher = supernet(batch.resized(12), SPACE.largest())
    loss = F.cross_entropy(teacher, batch.labels, label_smoothing=0.1)
    soft = teacher.detach().softmax(1)
    for arch in (SPACE.smallest(), SPACE.sample(rng), SPACE.sample(rng)):
        logits = supernet(batch.resized(arch.resolution), arch)
        loss = loss - (soft * logits.log_softmax(1)).sum(1).mean()
    loss.backward()
    for name, parameter in supernet.named_parameters():
        reference = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        torch.testing.assert_close(ours[name], reference, rtol=1e-4, atol=1e-6)


def test_mean_reduction_is_the_sum_over_the_children(data):
    supernet, batch = noisy_supernet(), batch_of(data)
    children = ("biggest", "smallest", "random")
    total, mean = (
        gradients(supernet, batch, children=children, loss_reduction=reduction) for reduction in ("sum", "mean")
    )
    for name in total:
        torch.testing.assert_close(total[name], 3 * mean[name])


def test_gradients_share_one_piece_of_memory():
    supernet = Supernet(SPACE).to(memory_format=torch.channels_last)
    flat = FlatGradients(supernet, extra=2)
    assert len(flat.flat) == sum(p.numel() for p in supernet.parameters()) + 2
    flat.flat.copy_(torch.arange(len(flat.flat)))
    seen = torch.cat([p.grad.flatten() for p in supernet.parameters()] + [flat.extra])
    assert torch.equal(seen.sort().values, flat.flat)
    assert all(p.grad.stride() == p.stride() for p in supernet.parameters())


class Watched(Supernet):
    """Remembers which children ran, and with what regularisation."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.seen = []

    def forward(self, image, arch, **options):
        self.seen.append((arch, options.get("before")))
        return super().forward(image, arch, **options)


def test_regularisation_reaches_the_child_it_is_for(data):
    for name, hit in (("biggest", [True, False, False, False]), ("others", [False, True, True, True])):
        supernet = Watched(SPACE)
        gradients(supernet, batch_of(data), **{"biggest": Regularisation(), name: Regularisation(dropout=0.3)})
        assert [before is not None for _, before in supernet.seen] == hit
        assert [arch for arch, _ in supernet.seen[:2]] == [SPACE.largest(), SPACE.smallest()]


def test_dropout_and_drop_connect_do_what_they_say():
    """Almost everything dropped: the logits are the bias; a block's output is its shortcut alone."""
    supernet = noisy_supernet().train()
    arch, x = SPACE.largest(), torch.randn(64, 1, 12, 12)
    layers = supernet.lower(arch)
    noise = Noise(torch.Generator().manual_seed(0), 64, slice(0, 64))
    dropping = regulariser(Regularisation(dropout=0.999999), SPACE, layers, noise, 2)
    torch.testing.assert_close(supernet(x, arch, before=dropping), supernet.classifier.bias.expand(64, -1))

    drop = regulariser(Regularisation(drop_connect=0.9), SPACE, layers, noise, 2)
    adds = [layer for layer in layers if layer.kind == "add"]
    rates = {}
    for layer in adds:
        branch, shortcut = torch.ones(64, 4, 3, 3), torch.zeros(64, 4, 3, 3)
        out = drop(layer, (branch, shortcut))[0]
        kept = out[:, 0, 0, 0] > 0
        assert (out.flatten(1) == out[:, :1, 0, 0]).all()  # a whole image's branch at a time
        rates[layer.name] = 1 - kept.double().mean().item()
        if kept.any() and not kept.all():
            assert out.max().item() == pytest.approx(1 / (1 - 0.9 * adds.index(layer) / len(adds)))
    last_two = [name for name in rates if name.startswith(("stage3", "stage4"))]
    assert all(rates[name] == 0 for name in rates if name not in last_two)
    assert [rates[name] for name in last_two] == pytest.approx(
        [0.9 * index / len(adds) for index, layer in enumerate(adds) if layer.name in last_two], abs=0.2
    )


def test_masks_of_the_processes_are_parts_of_one():
    whole = Noise(torch.Generator().manual_seed(4), 8, slice(0, 8)).mask((3,), 0.5)
    parts = [Noise(torch.Generator().manual_seed(4), 8, slice(i, i + 4)).mask((3,), 0.5) for i in (0, 4)]
    assert torch.equal(torch.cat(parts), whole)
    assert set(whole.unique().tolist()) == {0.0, 2.0}


@pytest.mark.parametrize("distillation", ["none", "soft-labels", "alpha-divergence"])
def test_what_the_smallest_child_learns_from(data, distillation):
    """Only `none` lets the labels reach the others' gradients, directly."""
    batch = batch_of(data)
    shuffled = Batch(batch.resized, batch.labels.flip(0), batch.noise)
    grads = []
    for each in (batch, shuffled):
        supernet = noisy_supernet()
        both = gradients(supernet, each, children=("biggest", "smallest"), distillation=distillation)
        alone = gradients(supernet, each, children=("biggest",), distillation="none")
        grads.append({name: both[name] - alone[name] for name in both})
    same = all(torch.allclose(grads[0][name], grads[1][name], atol=1e-5) for name in grads[0])
    assert same == (distillation != "none")


def test_precision_is_lower_in_the_layers_and_full_in_the_sums(data):
    supernet, batch = noisy_supernet(), batch_of(data)
    full = gradients(supernet, batch)
    half = gradients(supernet, batch, precision="bf16")
    assert all(g.dtype == torch.float32 for g in half.values())
    a, b = (torch.cat([g.flatten() for g in grads.values()]) for grads in (full, half))
    assert not torch.equal(a, b)
    assert F.cosine_similarity(a, b, dim=0) > 0.99


def test_gradient_of_a_child_stays_in_its_corner():
    supernet = Supernet(SPACE)
    FlatGradients(supernet, extra=0)
    arch = SPACE.smallest()
    backward_in_place(supernet, arch, torch.randn(4, 1, 8, 8), lambda logits: logits.square().sum())
    weight = supernet.stem.conv.weight
    inside = corner(weight.grad, (arch.stem, 1, 3, 3))
    assert inside.any()
    assert not weight.grad[arch.stem :].any()


# ---------------------------------------------------------------- losses, mixing, sampling


def reference_divergence(q: torch.Tensor, p: torch.Tensor, alpha: float) -> torch.Tensor:
    t = p / q
    if alpha == 1:
        return (p * t.log()).sum(1)
    return (q * (t**alpha - 1)).sum(1) / (alpha * (alpha - 1))


@pytest.mark.parametrize("alpha", [-1.0, 0.5, 1.0, 2.0])
def test_alpha_divergence_has_the_value_and_gradient_of_its_formula(alpha):
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (torch.randn(5, 7, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    expected = reference_divergence(logits.softmax(1), teacher.softmax(1), alpha)
    (gradient,) = torch.autograd.grad(expected.sum(), logits)
    value, slope = alpha_divergence(logits, teacher, alpha, clip=1e9)
    torch.testing.assert_close(value, expected.detach())
    torch.testing.assert_close(torch.autograd.grad(slope.sum(), logits)[0], gradient)


def test_the_larger_divergence_is_taken_for_each_image():
    generator = torch.Generator().manual_seed(0)
    logits, teacher = (3 * torch.randn(50, 4, generator=generator) for _ in range(2))
    low, high = (alpha_divergence(logits, teacher, a, clip=5.0)[0] for a in (-1.0, 1.0))
    assert (low > high).any()
    assert (low < high).any()
    total = adaptive_alpha_divergence(logits, teacher, (-1.0, 1.0), 5.0)
    torch.testing.assert_close(total, torch.maximum(low, high).mean())


@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0)])
def test_mixing_gives_labels_their_share_of_the_pixels(mixup, cutmix):
    """Neighbours are white and black, so the white share of the image is the share of its label."""
    pixels = torch.zeros(6, 3, 32, 32, dtype=torch.uint8)
    pixels[::2] = 255
    labels = torch.tensor([0, 1, 0, 1, 0, 1])
    shares = set()
    for seed in range(20):
        mixed, targets = mix(pixels, labels, 4, np.random.default_rng(seed), mixup=mixup, cutmix=cutmix)
        white = mixed.double().mean((1, 2, 3)) / 255
        torch.testing.assert_close(targets[:, 0].double(), white, atol=0.003, rtol=0)
        torch.testing.assert_close(targets.sum(1), torch.ones(6))
        shares.add(round(white[0].item(), 3))
        halves = [mix(pixels[i : i + 2], labels[i : i + 2], 4, np.random.default_rng(seed), mixup=mixup, cutmix=cutmix)
                  for i in (0, 2, 4)]  # fmt: skip
        assert torch.equal(torch.cat([half[0] for half in halves]), mixed)
    assert len(shares) > 10


def test_a_child_drawn_per_stage_has_equal_blocks():
    rng = np.random.default_rng(0)
    drawn = [arch for _ in range(50) for arch in make_sampler("stage", SPACE, 3).candidates(rng)]
    assert all(len(set(stage.blocks)) == 1 for arch in drawn for stage in arch.stages)
    assert len(set(drawn)) == 50
    free = [arch for _ in range(50) for arch in make_sampler("layer", SPACE, 3).candidates(rng)]
    assert any(len(set(stage.blocks)) > 1 for arch in free for stage in arch.stages)


def test_children_drawn_by_multiply_adds_are_spread_evenly():
    space = SearchSpace.load("bignas")
    macs = LayerSums(space, lambda layer: (layer.macs,))
    ends = macs(space.encode([space.smallest(), space.largest()]))[:, 0]
    rng = np.random.default_rng(0)
    spread = {}
    for name in ("layer", "macs"):
        sampler = make_sampler(name, space, 3)
        drawn = [space.check(arch) for _ in range(400) for arch in sampler.candidates(rng)]
        share = (macs(space.encode(drawn))[:, 0] - ends[0]) / (ends[1] - ends[0])
        spread[name] = np.histogram(share, bins=5, range=(0, 1))[0] / len(drawn)
    assert spread["macs"].min() > 0.1
    assert spread["layer"].min() < 0.02  # what it is for


def test_attentive_sampling_trains_the_candidate_with_the_least_loss(data):
    supernet, batch = Watched(SPACE), batch_of(data)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    sampler = make_sampler("attentive", SPACE, 4)
    candidates = sampler.candidates(np.random.default_rng(5))
    assert len(set(candidates)) == 4
    costs = [total_macs(lower(SPACE, arch)) for arch in candidates]
    assert max(costs) < 1.1 * min(costs)
    with torch.no_grad():
        losses = [F.cross_entropy(supernet(batch.resized(a.resolution), a), batch.labels).item() for a in candidates]
    supernet.seen.clear()
    gradients(supernet, batch, sampling="attentive", num_candidates=4, children=("biggest", "random"))
    trained = supernet.seen[-1][0]
    assert trained == candidates[int(np.argmin(losses))]
    assert len(supernet.seen) == 6


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


def test_average_of_constant_weights_stays_and_of_moving_ones_lags():
    network, average = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    average.load_state_dict(network.state_dict())
    update_average(average, network, 0.9, 1000)
    torch.testing.assert_close(average.weight, network.weight)
    with torch.no_grad():
        before = average.weight.clone()
        network.weight.add_(1)
    update_average(average, network, 0.9, 1000)
    torch.testing.assert_close(average.weight, before + 0.1)
    update_average(average, network, 0.9999, 1)  # few steps: a lower decay
    torch.testing.assert_close(average.weight, before + 0.1 + 0.9 * 9 / 11)


# ---------------------------------------------------------------- recipes


@pytest.mark.parametrize("recipe", RECIPES.values())
def test_recipes_are_complete_and_survive_json(recipe):
    config = recipe()
    assert TrainConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.others == Regularisation()
    assert config.children == ("biggest", "smallest", "random", "random")


def test_attentivenas_and_alphanet_recipes():
    """facebookresearch/AttentiveNAS and AlphaNet, configs/train_*.yml."""
    config = sgd_cosine()
    assert config.peak_lr == pytest.approx(0.1)
    assert config.learning_rate(2.5) == pytest.approx(0.05)
    assert config.learning_rate(5 + 355 / 2) == pytest.approx(0.05)
    assert config.learning_rate(360) == pytest.approx(0)
    assert (config.clip_value, config.momentum, config.weight_decay) == (1.0, 0.9, 1e-5)
    assert config.biggest == Regularisation(label_smoothing=0.1, dropout=0.2, drop_connect=0.2)
    assert alphanet() == replace(config, distillation="alpha-divergence")
    assert (alphanet().alpha, alphanet().alpha_clip) == ((-1.0, 1.0), 5.0)


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
        ({"biggest": {"dropout": 1.0}}, r"biggest: dropout=1\.0: must be at least 0 and under 1"),
        ({"children": ["smallest", "biggest"]}, "children=.*must come first: put biggest first"),
        ({"children": []}, "must name at least one child"),
        ({"alpha": [1, -1]}, "the least first"),
        ({"threads": 0}, "threads=0"),
        ({"optimizer": "adam"}, "optimizer: .*not 'adam'"),
        ({"learning_rate": 1}, "learning_rate: is not a known key"),
    ],
)
def test_bad_configurations_are_named(change, message):
    with pytest.raises(InputError, match=message):
        TrainConfig.from_dict(short().to_dict() | change)


# ---------------------------------------------------------------- the loop


def checkpoints(folder: Path) -> list[str]:
    return sorted(path.name for path in (folder / "checkpoints").iterdir() if not path.name.startswith("."))


def test_training_learns(data, tmp_path):
    trainer = Trainer(SPACE, data, replace(CONFIG, epochs=3), tmp_path)
    batch = train_batch(data.train, 0, 32, 3, augment="none")
    _, (biggest, smallest, *_) = trainer.gradients(*batch)
    trainer.run()
    _, (biggest_now, smallest_now, *_) = trainer.gradients(*batch)
    assert biggest_now < 0.6 * biggest
    assert smallest_now < 0.8 * smallest


RICH = replace(
    CONFIG,
    optimizer="rmsprop",
    lr=0.02,
    ema=0.9,
    mixup=0.2,
    cutmix=1.0,
    augment="standard",
    biggest=Regularisation(dropout=0.2, drop_connect=0.2, label_smoothing=0.1),
    evaluate_every=0.2,
    sampling="attentive",
)


@pytest.mark.parametrize("config", [CONFIG, RICH, replace(CONFIG, precision="fp16")], ids=["plain", "rich", "fp16"])
def test_resume_is_exact(data, tmp_path, config):
    whole = Trainer(SPACE, data, config, tmp_path / "whole")
    whole.run()
    assert whole.step == whole.num_steps > 10
    part = Trainer(SPACE, data, config, tmp_path / "part")
    with closing(part.batches()) as batches:
        while part.step < 7:
            part.train_step(*next(batches))
    part.checkpoint()
    told: list[str] = []
    resumed = Trainer(SPACE, data, config, tmp_path / "part", told.append)
    assert resumed.step == 7
    assert "going on from step 7" in told[0]
    resumed.run()
    assert_same(whole.supernet, resumed.supernet)
    assert_same(whole.result, resumed.result)
    assert (whole.result is whole.supernet) == (config.ema is None)
    assert whole._scaler.state_dict() == resumed._scaler.state_dict()


def test_a_killed_run_ends_with_the_same_weights(data, tmp_path):
    """kill -9 at several moments, in a process of its own; then the same weights bit for bit."""
    script = (
        "import sys; sys.path.insert(0, sys.argv[2]); from pathlib import Path\n"
        "import test_trainer as t\n"
        "data = t.load_dataset('digits', cache=Path(sys.argv[1]), size=12)\n"
        "config = t.replace(t.CONFIG, checkpoint_every_s=0)\n"
        "trainer = t.Trainer(t.SPACE, data, config, Path(sys.argv[1]))\n"
        "def report(done, total, note=''):\n"
        "    print(done, flush=True)\n"
        "trainer.run(report)\n"
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
    finished = Trainer(SPACE, data, CONFIG, tmp_path)
    finished.run()
    whole = Trainer(SPACE, data, CONFIG, tmp_path / "whole")
    whole.run()
    assert_same(whole.supernet, finished.supernet)
    assert len(checkpoints(tmp_path)) == 2


def test_the_last_checkpoints_are_kept(data, tmp_path):
    trainer = Trainer(SPACE, data, replace(CONFIG, keep_checkpoints=3), tmp_path)
    for trainer.step in range(5):
        trainer.checkpoint()
    assert checkpoints(tmp_path) == [f"step-{step:09d}.safetensors" for step in (2, 3, 4)]


def test_threads_are_chosen_and_remembered(data, tmp_path):
    config = replace(CONFIG, threads=None, epochs=0.05)
    trainer = Trainer(SPACE, data, config, tmp_path)
    trainer.run()
    assert trainer.config.threads is not None
    assert Trainer(SPACE, data, config, tmp_path).config.threads == trainer.config.threads


def test_other_configuration_space_or_images_are_refused(data, tmp_path):
    Trainer(SPACE, data, CONFIG, tmp_path).checkpoint()
    with pytest.raises(InputError, match=r"another configuration \(lr=0\.2 there, 0\.5 now\)"):
        Trainer(SPACE, data, replace(CONFIG, lr=0.5), tmp_path)
    with pytest.raises(InputError, match="another space"):
        Trainer(replace(SPACE, resolution=(8,)), data, CONFIG, tmp_path)
    with pytest.raises(InputError, match="began with other images"):
        Trainer(SPACE, replace(data, name="mnist-5k"), CONFIG, tmp_path)


def test_what_does_not_change_the_weights_may_change(data, tmp_path):
    Trainer(SPACE, data, CONFIG, tmp_path).checkpoint()
    Trainer(SPACE, data, replace(CONFIG, threads=2, watch_images=10, keep_checkpoints=9, device="cpu"), tmp_path)
    assert len({f.name for f in fields(TrainConfig)} & set(WITHOUT_EFFECT)) == len(WITHOUT_EFFECT)


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
    with pytest.raises(InputError, match=r"loss of child \d+px .* at step \d+, learning rate .*lower train\.lr"):
        trainer.run()
    intact = Checkpoint.newest(tmp_path / "checkpoints")
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
    with pytest.raises(InputError, match=r"step 1 cannot be written \(No space left on device\): free some space"):
        trainer.checkpoint()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step-000000000.safetensors"]


def test_batches_that_cannot_be_paired_are_refused(data):
    with pytest.raises(InputError, match=r"batch_size=31: mixup and cutmix pair images: use a multiple of 2"):
        Trainer(SPACE, data, replace(CONFIG, batch_size=31, mixup=0.2), None)


# ---------------------------------------------------------------- watching


def test_watched_children_are_evaluated_every_epoch_and_at_the_end(data, tmp_path):
    watch = {"smallest": SPACE.smallest(), "mine": SPACE.sample(np.random.default_rng(0))}
    config = replace(CONFIG, epochs=2.5, watch_images=50)
    told: list[str] = []
    trainer = Trainer(SPACE, data, config, tmp_path, told.append, watch=watch)
    before = [p.detach().clone() for p in trainer.supernet.parameters()]
    trainer.evaluate()
    assert all(torch.equal(a, b) for a, b in zip(before, trainer.supernet.parameters(), strict=True))
    trainer.evaluations.clear()
    told.clear()
    trainer.run()
    epochs = [one.epoch for one in trainer.evaluations if one.child == "mine"]
    assert epochs == pytest.approx([1, 2, 2.5], abs=0.5 / trainer.steps_per_epoch)
    assert all(one.num_images == 50 for one in trainer.evaluations)
    assert len([line for line in told if "mine child" in line]) == 3
    assert trainer.evaluations[-1].accuracy > 0.3
    resumed = Trainer(SPACE, data, config, tmp_path, watch=watch)
    assert resumed.evaluations == trainer.evaluations
    whole = Trainer(SPACE, data, replace(config, evaluate_every=0), None)
    whole.run()
    assert whole.evaluations == []
    assert_same(whole.supernet, trainer.supernet)  # evaluations leave the training alone


def test_scalars_for_tensorboard(data, tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    Trainer(SPACE, data, CONFIG, tmp_path).run()
    found = events.EventAccumulator(str(tmp_path / "tensorboard"))
    found.Reload()
    tags = set(found.Tags()["scalars"])
    assert {"loss/biggest", "loss/smallest", "loss/random", "images/s", "learning rate"} <= tags
    assert [e.step for e in found.Scalars("loss/biggest")] == [10]
    assert {"accuracy/smallest", "accuracy/biggest"} <= tags


def test_plan_estimates_the_whole_run_and_keeps_nothing(data, tmp_path):
    trainer = Trainer(SPACE, data, replace(CONFIG, epochs=3), None)
    made = plan(trainer, warmup=1, steps=2)
    assert made.num_steps == trainer.num_steps
    assert made.num_evaluations == 3
    assert made.total_s == pytest.approx(made.num_steps * made.step_s + 3 * made.evaluation_s)
    assert 0 <= made.loading_s < made.step_s
    assert made.images_per_s == pytest.approx(32 / made.step_s)
    assert 50 < made.peak_memory_mb < 20_000
    assert list(tmp_path.iterdir()) == []


def test_a_resolution_that_was_never_trained_works_after_calibration(data, tmp_path):
    """BigNAS, 4.3. Here, with two small resolutions and seconds of training, far from chance is all one can ask."""
    trainer = Trainer(SPACE, data, replace(CONFIG, epochs=4), None)
    watch = {str(r): replace(SPACE.largest(), resolution=r) for r in (8, 10, 12)}
    with pytest.raises(InputError, match="resolution=10 is not one of"):
        SPACE.check(watch["10"])
    SPACE.check(watch["10"], any_resolution=True)
    trainer.run()
    found = {e.child: e.accuracy for e in Watch(trainer.result, data, watch, 10_000)(0, 0.0)}
    assert found["10"] > 0.5


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_training_on_a_gpu_follows_the_one_on_a_processor(data, precision):
    losses = []
    for device in ("cpu", "cuda"):
        config = replace(CONFIG, precision=precision if device == "cuda" else "fp32")
        with processes(device) as team:
            trainer = Trainer(SPACE, data, config, None, processes=team)
            with closing(trainer.batches()) as batches:
                losses.append([trainer.train_step(*next(batches)) for _ in range(5)])
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-3 if precision == "fp32" else 0.05)
