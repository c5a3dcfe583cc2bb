from dataclasses import replace

import numpy as np
import pytest

from hwnas.layers import (
    SPARE_TENSORS,
    Layer,
    LayerPeaks,
    LayerSums,
    lower,
    peak_activation_bytes,
    total_macs,
    total_params,
)
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


# -------------------------------------------------------------------- memory


def conv(name, source, channels, out_channels, size, **options):
    return Layer(
        name=name,
        kind="conv",
        inputs=(source,),
        in_channels=channels,
        out_channels=out_channels,
        in_size=size,
        **options,
    )


def test_peak_of_a_chain():
    """Input and output of each layer, a swish with a tensor of its own; the image is gone after the first layer."""
    layers = [
        conv("a", "image", 3, 8, 10, stride=2, kernel=3, activation="relu"),  # 300 + 200
        conv("b", "a", 8, 16, 5, activation="relu"),  # 200 + 400
        conv("c", "b", 16, 4, 5),  # 400 + 100
    ]
    assert peak_activation_bytes(layers, 1) == 600
    assert peak_activation_bytes(layers) == 4 * 600
    swish = [layers[0], replace(layers[1], activation="swish"), layers[2]]
    assert peak_activation_bytes(swish, 1) == 800  # the 400 of b before and after
    assert peak_activation_bytes(swish, 1, {"swish": 2}) == 1200
    assert peak_activation_bytes(swish, 1, {}) == 600


def test_what_is_read_again_stays():
    layers = [
        conv("a", "image", 1, 10, 4),  # 16 + 160
        conv("b", "a", 10, 20, 4),  # 160 + 320
        conv("c", "b", 20, 10, 4),  # 160 + 320 + 160: a waits for the sum
        Layer(name="sum", kind="add", inputs=("c", "a"), in_channels=10, out_channels=10, in_size=4),
        Layer(name="pool", kind="global_pool", inputs=("sum",), in_channels=10, out_channels=10, in_size=4),
        Layer(name="gate", kind="conv", inputs=("pool",), in_channels=10, out_channels=10, in_size=1),
        Layer(name="scale", kind="scale", inputs=("sum", "gate"), in_channels=10, out_channels=10, in_size=4),
    ]
    assert peak_activation_bytes(layers, 1) == 640
    assert peak_activation_bytes(layers[:3], 1) == 480  # nobody reads a then
    assert peak_activation_bytes(layers[4:], 1) == 160 + 10 + 160  # what comes from before is there from the start
    assert peak_activation_bytes(layers[:1] + layers[3:], 1) == 160 + 160 + 160


def simulated_peak(layers, spare):
    """The same by brute force: at each step, all that exists and that any later step reads."""
    sizes = {"image": layers[0].in_channels * layers[0].in_size ** 2}
    sizes |= {layer.name: layer.out_channels * layer.out_size**2 for layer in layers}
    peak = 0
    for step, layer in enumerate(layers):
        there = {"image"} | {before.name for before in layers[: step + 1]}
        read_now = {name for later in layers[step:] for name in later.inputs}
        peak = max(peak, sum(sizes[name] for name in there & (read_now | {layer.name})))
        if layer.activation:
            read_later = {name for later in layers[step + 1 :] for name in later.inputs}
            extra = spare.get(layer.activation, 0) * sizes[layer.name]
            peak = max(peak, extra + sum(sizes[name] for name in there & (read_later | {layer.name})))
    return 4 * peak


@pytest.mark.parametrize("name", SearchSpace.names())
@pytest.mark.parametrize("spare", [SPARE_TENSORS, {}, {"swish": 2, "h-swish": 1, "relu": 1, "sigmoid": 1}])
def test_peaks_are_exact_one_by_one_and_in_a_batch(name, spare):
    space = SearchSpace.load(name)
    genes = space.sample_genes(30, np.random.default_rng(0))
    archs = [space.smallest(), space.largest(), *(space.decode(row) for row in genes)]
    expected = [simulated_peak(lower(space, arch), spare) for arch in archs]
    assert [peak_activation_bytes(lower(space, arch), spare=spare) for arch in archs] == expected
    peaks = LayerPeaks(space, spare=spare)
    assert np.array_equal(peaks(space.encode(archs)), expected)
    assert np.array_equal(peaks(space.encode(archs), chunk=7), expected)
    assert len(set(expected)) > 3


def test_memory_in_int8_is_a_quarter():
    space = SearchSpace.load("tiny")
    genes = space.sample_genes(5, np.random.default_rng(0))
    assert np.array_equal(4 * LayerPeaks(space, bytes_per_element=1)(genes), LayerPeaks(space)(genes))
