from dataclasses import replace

import numpy as np
import pytest
import torch

from hwnas.layers import lower, total_params
from hwnas.network import batch_norms
from hwnas.space import SearchSpace
from hwnas.supernet import Supernet, corner

SPACES = {
    "tiny": {"resolution": (16, 24), "in_channels": 1, "num_classes": 10},
    "bignas": {"resolution": (32, 40), "num_classes": 7},
    "attentivenas": {"resolution": (32, 64), "num_classes": 7},
    "ofa-mbv3": {"resolution": (32, 48), "num_classes": 7},
}


@pytest.fixture(params=SPACES, scope="module")
def supernet(request) -> Supernet:
    supernet = Supernet(SearchSpace.load(request.param, **SPACES[request.param]), seed=1)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():  # no zeros or ones that would hide a wrong corner
        for parameter in supernet.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.05)
    return supernet


def children(space: SearchSpace, count: int = 6):
    rng = np.random.default_rng(3)
    return [space.smallest(), space.largest(), *(space.sample(rng) for _ in range(count))]


def images(space: SearchSpace, resolution: int, count: int = 3) -> torch.Tensor:
    return torch.randn(count, space.in_channels, resolution, resolution, generator=torch.Generator().manual_seed(4))


def test_child_equals_supernet_bit_for_bit(supernet):
    for arch in children(supernet.space):
        x = images(supernet.space, arch.resolution)
        child = supernet.train().child(arch)
        assert child.training
        assert torch.equal(child(x), supernet(x, arch))  # in training mode; it also fills running statistics
        statistics = {name: b for name, b in child.named_buffers() if "running" in name}
        assert all(b.abs().sum() > 0 for b in statistics.values())
        child.eval()
        supernet.eval()
        assert torch.equal(child(x), supernet(x, arch, tensors={**supernet.corners(arch), **statistics}))


def test_corners_are_exactly_the_childs_parameters(supernet):
    for arch in children(supernet.space):
        child = supernet.child(arch)
        corners = supernet.corners(arch)
        assert {name: p.shape for name, p in child.named_parameters()} == {n: c.shape for n, c in corners.items()}
        assert sum(p.numel() for p in child.parameters()) == total_params(supernet.lower(arch))


def test_gradients_stay_in_the_childs_corner(supernet):
    supernet.train()
    for arch in children(supernet.space, 3):
        supernet.zero_grad()
        supernet(images(supernet.space, arch.resolution), arch).square().sum().backward()
        shapes = {n: s for layer in supernet.lower(arch) for n, s in layer.tensors.items()}
        touched = 0
        for name, parameter in supernet.named_parameters():
            if name not in shapes:
                assert parameter.grad is None or not parameter.grad.any()
                continue
            inside = corner(parameter.grad, shapes[name])
            touched += bool(inside.any())
            outside = parameter.grad.clone()
            corner(outside, shapes[name]).zero_()
            assert not outside.any(), name
        assert touched > 0.9 * len(shapes)


def test_corner_takes_first_channels_and_the_centre():
    weight = torch.arange(2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    assert torch.equal(corner(weight, (1, 2, 3, 3)), weight[:1, :2, 1:4, 1:4])
    assert torch.equal(corner(weight, (2, 3, 1, 1)), weight[:, :, 2:3, 2:3])
    assert corner(weight, weight.shape) is weight


def test_gamma_starts_at_zero_where_a_shortcut_is_added():
    supernet = Supernet(SearchSpace.load("tiny", resolution=16))
    gammas = {name: p for name, p in supernet.named_parameters() if name.endswith("norm.weight")}
    for name, gamma in gammas.items():
        expected = 0.0 if "project" in name else 1.0
        assert torch.all(gamma == expected), name
    assert any("project" in name for name in gammas)
    # without shortcuts between unequal shapes, the first block of a stage keeps gamma one
    supernet = Supernet(SearchSpace.load("ofa-mbv3", resolution=32))
    parameters = dict(supernet.named_parameters())
    assert torch.all(parameters["stage2.block1.project.norm.weight"] == 1)
    assert torch.all(parameters["stage2.block2.project.norm.weight"] == 0)


def test_a_deep_child_starts_as_its_shortcuts():
    """With gamma zero, an untrained network's blocks add nothing: depth does not change the logits."""
    space = SearchSpace.load("tiny", resolution=16)
    supernet = Supernet(space, seed=5)
    deep = space.largest()
    shallow = replace(deep, stages=tuple(replace(s, blocks=s.blocks[:1]) for s in deep.stages))
    x = images(space, 16)
    torch.testing.assert_close(supernet(x, deep), supernet(x, shallow))


def test_same_seed_same_weights():
    space = SearchSpace.load("tiny", resolution=16)
    one, two, other = Supernet(space, seed=5), Supernet(space, seed=5), Supernet(space, seed=6)
    pairs = list(zip(one.parameters(), two.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b, _ in pairs)
    assert any(not torch.equal(a, c) for a, _, c in pairs)


def test_child_is_conventional_and_independent():
    space = SearchSpace.load("tiny", resolution=16)
    supernet = Supernet(space)
    child = supernet.child(space.smallest())
    before = supernet.stem.conv.weight.clone()
    with torch.no_grad():
        child.stem.conv.weight.add_(1)
    assert torch.equal(before, supernet.stem.conv.weight)
    assert len(list(batch_norms(child))) == sum(layer.norm for layer in lower(space, space.smallest()))
