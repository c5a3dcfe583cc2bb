from dataclasses import replace

import pytest
import torch

from hwnas.calibrate import calibrate, evaluate, fold, logits
from hwnas.network import batch_norms
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet

SPACE = SearchSpace.load("tiny", resolution=[8, 12], in_channels=1, num_classes=10)


@pytest.fixture
def supernet() -> Supernet:
    return noisy(Supernet(SPACE, seed=1))


def noisy(supernet: Supernet) -> Supernet:
    """No gamma is zero, so that every layer matters."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return supernet


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(2))


def test_statistics_are_the_plain_average_over_batches(supernet):
    """As torch's own modules find them in training mode, with their cumulative average."""
    archs = [SPACE.smallest(), SPACE.largest()]
    for arch in archs:
        expected = supernet.child(arch).train()
        for norm in batch_norms(expected):
            norm.momentum = None
        with torch.no_grad():
            for batch in images(24).split(8):
                expected(batch)
        child = calibrate(supernet.child(arch), images(24).split(8))
        for mine, theirs in zip(batch_norms(child), batch_norms(expected), strict=True):
            torch.testing.assert_close(mine.running_mean, theirs.running_mean, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine.running_var, theirs.running_var, rtol=1e-4, atol=1e-5)
            assert mine.num_batches_tracked == theirs.num_batches_tracked == 3
        assert not child.training
    seen = torch.stack([child.get_submodule("stem.conv")(batch) for batch in images(24).split(8)])
    stem = child.get_submodule("stem.norm")
    torch.testing.assert_close(stem.running_mean, seen.mean((1, 3, 4)).mean(0))
    torch.testing.assert_close(stem.running_var, seen.transpose(1, 2).flatten(2).var(2).mean(0))


@pytest.mark.parametrize("activation", ["relu", "swish", "h-swish"])
@pytest.mark.parametrize("gate", ["sigmoid", "h-sigmoid"])
def test_folded_logits_are_the_childs(activation, gate):
    squeeze = replace(SPACE.squeeze_excite, gate=gate, activation=activation)
    space = replace(SPACE, activation=activation, squeeze_excite=squeeze)
    supernet = noisy(Supernet(space))
    batch = images(20)
    before = batch.clone()
    for arch in (space.smallest(), space.largest()):
        child = calibrate(supernet.child(arch), [batch])
        with torch.no_grad():
            expected = child(batch)
        found = logits(child.layers, fold(child.layers, child.state_dict()), batch)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    assert torch.equal(batch, before)  # what is done in place is done to our own values


def test_calibration_starts_anew_and_leaves_the_weights(supernet):
    child = supernet.child(SPACE.largest())
    before = [p.clone() for p in child.parameters()]
    calibrate(child, images(16).split(8))
    first = [n.running_mean.clone() for n in batch_norms(child)]
    calibrate(child, [100 * images(8)])
    calibrate(child, images(16).split(8))
    assert all(torch.equal(a, n.running_mean) for a, n in zip(first, batch_norms(child), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(before, child.parameters(), strict=True))
    assert {n.momentum for n in batch_norms(child)} == {0.1}
    assert all(parameter.grad is None for parameter in child.parameters())


def test_calibration_makes_evaluation_agree_with_training_mode(supernet):
    """On the calibration batch itself, evaluation gives what training mode gave."""
    child = supernet.child(SPACE.largest())
    batch = images(64)
    with torch.no_grad():
        expected = child.train()(batch)
    calibrate(child, [batch])
    with torch.no_grad():
        found = child(batch)
    torch.testing.assert_close(found, expected, rtol=0.05, atol=0.05 * float(expected.abs().max()))
    uncalibrated = supernet.child(SPACE.largest()).eval()
    with torch.no_grad():
        assert (uncalibrated(batch) - expected).abs().max() > 5 * (found - expected).abs().max()


def test_evaluate_counts():
    logits = torch.tensor([[2.0, 0.0], [0.0, 1.0], [3.0, 1.0]])
    score = evaluate(torch.nn.Identity(), [(logits[:2], torch.tensor([0, 0])), (logits[2:], torch.tensor([0]))])
    assert score.accuracy == pytest.approx(2 / 3)
    assert score.num_images == 3
    by_hand = torch.nn.functional.cross_entropy(logits, torch.tensor([0, 0, 0])).item()
    assert score.loss == pytest.approx(by_hand)


def test_nothing_to_work_with_is_refused(supernet):
    with pytest.raises(ValueError, match="at least one batch"):
        calibrate(supernet.child(SPACE.smallest()), [])
    with pytest.raises(ValueError, match="at least one image"):
        evaluate(supernet.child(SPACE.smallest()), [])
