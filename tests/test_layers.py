from dataclasses import replace

import numpy as np
import pytest

from hwnas.layers import Layer, LayerSums, lower, total_macs, total_params
from hwnas.space import Architecture, Block, SearchSpace, Stage


def network(resolution, widths, kernels, expands, depths, head):
    """An architecture as the papers print it: one kernel and expand ratio a stage."""
    stages = zip(widths[1:], kernels, expands, depths, strict=True)
    return Architecture(
        resolution, widths[0], tuple(Stage(w, tuple(Block(k, e) for _ in range(d))) for w, k, e, d in stages), head
    )


def cost(space: SearchSpace, arch: Architecture) -> tuple[int, int]:
    layers = lower(space, arch)
    return total_macs(layers), total_params(layers)


def assert_printed(cost, macs: str, params: str) -> None:
    """Equal in the digits that the source prints, in millions."""
    for value, printed in zip(cost, (macs, params), strict=True):
        digits = len(printed.partition(".")[2])
        assert f"{value / 1e6:.{digits}f}" == printed


BIGNAS_KERNELS = [3, 3, 5, 3, 5, 5, 3]
BIGNAS_WIDTHS = [32, 16, 24, 40, 80, 112, 192, 320]


# BigNAS (arXiv 2003.11142), Table 1 and Figure 5; recomputed in closed form.
@pytest.mark.parametrize(
    ("arch", "macs", "params"),
    [
        (network(192, BIGNAS_WIDTHS, BIGNAS_KERNELS, [1] + [6] * 6, [1, 2, 2, 2, 2, 3, 1], 1280), "241.9", "4.49"),
        (network(224, BIGNAS_WIDTHS, BIGNAS_KERNELS, [1] + [6] * 6, [1, 2, 2, 2, 4, 4, 1], 1280), "417.6", "5.49"),
        (SearchSpace.load("bignas").smallest(), "217.6", "3.84"),
        (SearchSpace.load("bignas").largest(), "1891.5", "11.02"),
        (replace(SearchSpace.load("bignas").largest(), resolution=224), "928.4", "11.02"),
    ],
)
def test_bignas(arch, macs, params):
    assert_printed(cost(SearchSpace.load("bignas"), arch), macs, params)


ATTENTIVE = {  # AttentiveNAS (arXiv 2011.09011), released models: resolution, widths, kernels, expands, depths
    "A0": (192, "16 16 24 32 64 112 192 216 1792", "3333333", "1444466", "1333331", "203.39", "8.954"),
    "A1": (224, "16 16 24 32 64 112 192 216 1984", "3335353", "1444466", "1333331", "279.24", "9.453"),
    "A2": (224, "16 16 24 32 64 112 200 224 1984", "3333353", "1454466", "1333341", "316.73", "11.150"),
    "A3": (224, "16 16 24 32 64 112 208 224 1984", "3335333", "1444466", "2334351", "356.52", "12.785"),
    "A4": (256, "16 16 24 32 64 112 192 216 1984", "3335353", "1445466", "1334351", "443.53", "11.810"),
    "A5": (256, "16 16 24 32 72 112 192 216 1792", "3335333", "1454466", "1333461", "490.52", "12.597"),
    "A6": (288, "16 16 24 32 64 112 216 224 1984", "3333353", "1465466", "1334461", "709.01", "15.155"),
}


@pytest.mark.parametrize("name", ATTENTIVE)
def test_attentivenas(name):
    resolution, widths, kernels, expands, depths, macs, params = ATTENTIVE[name]
    *widths, head = map(int, widths.split())
    arch = network(resolution, widths, *([int(c) for c in s] for s in (kernels, expands, depths)), head)
    space = SearchSpace.load("attentivenas")
    assert_printed(cost(space, space.check(arch)), macs, params)


def test_attentivenas_ends():
    space = SearchSpace.load("attentivenas")
    assert_printed(cost(space, space.smallest()), "203.39", "8.954")
    assert_printed(cost(space, space.largest()), "1939.34", "23.404")


def test_once_for_all_595():
    blocks = [[(3, 1)], [(3, 3), (5, 4), (3, 3)], [(5, 4), (5, 4), (3, 6), (5, 3)],
              [(7, 6), (5, 6), (3, 3), (5, 4)], [(3, 6), (5, 6), (7, 6), (3, 4)],
              [(3, 6), (3, 6), (5, 6), (3, 3)]]  # fmt: skip
    stages = zip((24, 32, 48, 96, 136, 192), blocks, strict=True)
    arch = Architecture(236, 24, tuple(Stage(w, tuple(Block(*b) for b in bs)) for w, bs in stages), 1536)
    space = SearchSpace.load("ofa-mbv3-1.2")
    space.check(replace(arch, resolution=224))
    assert_printed(cost(space, arch), "595.2", "9.14")


def efficientnet(resolution: int, width: float, depth: float) -> tuple[SearchSpace, Architecture]:
    """EfficientNet (arXiv 1905.11946) as a space of one network: BigNAS's blocks with identity shortcuts only."""
    from math import ceil

    from hwnas.space import round_channels

    space = SearchSpace.load("bignas", shortcut="identity")
    widths = [round_channels(w * width) for w in (32, 16, 24, 40, 80, 112, 192, 320)]
    depths = [ceil(d * depth) for d in (1, 2, 2, 3, 3, 4, 1)]
    return space, network(resolution, widths, BIGNAS_KERNELS, [1] + [6] * 6, depths, round_channels(1280 * width))


@pytest.mark.parametrize(
    ("size", "macs", "params"),
    [
        ((224, 1.0, 1.0), "385.8", "5.29"),
        ((240, 1.0, 1.1), "686.8", "7.79"),
        ((260, 1.1, 1.2), "993.6", "9.11"),
        ((300, 1.2, 1.4), "1827.1", "12.23"),
    ],
)
def test_efficientnet_falls_out_of_the_same_lowering(size, macs, params):
    assert_printed(cost(*efficientnet(*size)), macs, params)


@pytest.mark.parametrize("name", SearchSpace.names())
def test_layers_fit_together(name):
    space = SearchSpace.load(name)
    rng = np.random.default_rng(0)
    for arch in (space.smallest(), space.largest(), *(space.sample(rng) for _ in range(10))):
        shapes = {"image": (space.in_channels, arch.resolution)}
        for layer in lower(space, arch):
            first = shapes[layer.inputs[0]]
            assert first == (layer.in_channels, layer.in_size)
            if layer.kind == "add":
                assert shapes[layer.inputs[1]] == first
            if layer.kind == "scale":
                assert shapes[layer.inputs[1]] == (layer.in_channels, 1)
            assert layer.in_channels % layer.groups == 0
            assert layer.name not in shapes
            shapes[layer.name] = (layer.out_channels, layer.out_size)
        assert shapes["classifier"] == (space.num_classes, 1)
        read = {name for layer in lower(space, arch) for name in layer.inputs}
        assert set(shapes) - read == {"classifier"}


def test_hand_computed_layers():
    conv = Layer(name="c", kind="conv", inputs=("image",), in_channels=3, out_channels=32, in_size=225, kernel=3,
                 stride=2, norm=True)  # fmt: skip
    assert (conv.out_size, conv.macs, conv.params) == (113, 113 * 113 * 27 * 32, 27 * 32 + 64)
    depthwise = replace(conv, in_channels=32, groups=32, kernel=5, stride=1, in_size=10)
    assert (depthwise.macs, depthwise.params) == (100 * 25 * 32, 25 * 32 + 64)
    se = Layer(name="s", kind="conv", inputs=("p",), in_channels=32, out_channels=8, in_size=1, bias=True)
    assert (se.macs, se.params) == (256, 264)


@pytest.mark.parametrize(
    "space",
    [
        *map(SearchSpace.load, SearchSpace.names()),
        SearchSpace.load("attentivenas", kernel_per="layer", expand_per="layer"),
        SearchSpace.load("bignas", kernel_per="stage"),
    ],
    ids=lambda space: f"{space.name}-{space.kernel_per}",
)
def test_batched_sums_equal_the_lowering(space):
    sums = LayerSums(space, lambda layer: (layer.macs, layer.params, 1))
    rng = np.random.default_rng(0)
    genes = space.sample_genes(40, rng)
    archs = [space.smallest(), space.largest(), *(space.decode(row) for row in genes)]
    expected = [(*cost(space, arch), len(lower(space, arch))) for arch in archs]
    assert np.array_equal(sums(space.encode(archs)), expected)
    assert np.array_equal(sums(space.encode(archs), chunk=7), expected)


def test_batched_sums_refuse_other_genes():
    space = SearchSpace.load("tiny")
    with pytest.raises(ValueError, match="num_archs"):
        LayerSums(space, lambda layer: (layer.macs,))(np.zeros((3, 4), dtype=np.int8))
