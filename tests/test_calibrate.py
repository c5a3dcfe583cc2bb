import pytest
import torch

from hwnas.calibrate import calibrate, evaluate
from hwnas.data import load_dataset
from hwnas.errors import InputError
from hwnas.evaluator import EvaluationProtocol, Evaluator
from hwnas.network import batch_norms
from hwnas.space import SearchSpace
from hwnas.store import Store
from hwnas.supernet import Supernet

SPACE = SearchSpace.load("tiny", resolution=[8, 12], in_channels=1, num_classes=10)


@pytest.fixture
def supernet() -> Supernet:
    supernet = Supernet(SPACE, seed=1)
    with torch.no_grad():
        for parameter in supernet.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)))
    return supernet


def images(count: int) -> torch.Tensor:
    return torch.randn(count, 1, 12, 12, generator=torch.Generator().manual_seed(2))


def test_statistics_are_the_plain_average_over_batches(supernet):
    child = supernet.child(SPACE.largest())
    seen = []
    stem = child.get_submodule("stem.norm")
    handle = stem.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].clone()))
    calibrate(child, images(24).split(8))
    handle.remove()
    torch.testing.assert_close(stem.running_mean, torch.stack([x.mean((0, 2, 3)) for x in seen]).mean(0))
    variances = torch.stack([x.transpose(0, 1).flatten(1).var(1) for x in seen])
    torch.testing.assert_close(stem.running_var, variances.mean(0))
    assert not child.training


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


def test_evaluator_works_a_child_out_once(supernet, tmp_path, monkeypatch):
    data = load_dataset("digits", cache=tmp_path, size=12)
    evaluator = Evaluator(supernet, data, EvaluationProtocol(calibration_images=32, batch_size=16))
    with Store(tmp_path / "run.db") as store:
        first = evaluator.accuracy(SPACE.smallest(), store)
        with torch.no_grad():
            alone = evaluate(evaluator.child(SPACE.smallest()), [(evaluator.images(data.validation, 8, 10**6),
                                                                  data.validation.labels)])  # fmt: skip
        assert first == pytest.approx(alone.accuracy)
        monkeypatch.setattr(evaluator, "child", lambda arch: pytest.fail("worked out again"))
        assert evaluator.accuracy(SPACE.smallest(), store) == first
        other = Evaluator(Supernet(SPACE, seed=9), data, evaluator.protocol)
        other.accuracy(SPACE.smallest(), store)  # other weights: an evaluation of its own
        with pytest.raises(InputError, match="split 'train' is not one of validation, test"):
            evaluator.accuracy(SPACE.smallest(), store, "train")
