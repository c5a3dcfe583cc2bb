"""ExecuTorch files compute what the network does, wholly in XNNPACK, and its bindings time them."""

import hashlib
import sys
import warnings
from collections import Counter
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from hwnas.bundles.parity import correlation
from hwnas.bundles.quantise import within_drop
from hwnas.devices import load_device
from hwnas.errors import DeviceError, ExportError
from hwnas.exporters.base import Pixels, exporter, random_tensors
from hwnas.exporters.executorch import ExecutorchExporter
from hwnas.layers import Layer, lower
from hwnas.space import Activation, SearchSpace
from hwnas.testing import (
    QUICK,
    DeviceContract,
    ExporterContract,
    random_images,
    tensors_with_ranges,
    tiny_space,
    trained_network,
)

pytest.importorskip("executorch")


class TestExecutorchExporter(ExporterContract):
    @pytest.fixture(params=["fp32", "fp16", "int8"])
    def exporter(self, request):
        return exporter("executorch", request.param)


@pytest.fixture(scope="module")
def bindings(tmp_path_factory):
    path = tmp_path_factory.mktemp("devices") / "bindings.yaml"
    path.write_text("transport: host\nruntime: executorch\n")
    with load_device(path) as device:
        yield device


class TestBindings(DeviceContract):
    @pytest.fixture
    def device(self, bindings):
        return bindings


# -------------------------------------------------------------------- what the files compute


def write(layers, tensors, folder):
    path = folder / "model.pte"
    ExecutorchExporter().write(layers, tensors, path)
    return path


def test_h_sigmoid_ends_where_it_should(tmp_path):
    layer = {"in_channels": 4, "out_channels": 4, "in_size": 1}
    layers = (
        Layer(name="a", kind="conv", inputs=("image",), activation="h-sigmoid", **layer),
        Layer(name="b", kind="linear", inputs=("a",), **layer),
    )
    eye = np.eye(4, dtype=np.float32)
    path = write(layers, {"a.conv.weight": eye[:, :, None, None], "b.weight": eye}, tmp_path)
    images = np.array([-3.5, -1.5, 1, 4], dtype=np.float32).reshape(1, 4, 1, 1)
    np.testing.assert_allclose(ExecutorchExporter().infer(path, images)[0], [0, 0.25, 2 / 3, 1], atol=1e-6)


@pytest.mark.parametrize("size", range(1, 10))
def test_average_pool_of_every_size(size, tmp_path):
    channels = 16
    layer = {"in_channels": channels, "out_channels": channels}
    layers = (
        Layer(name="a", kind="conv", inputs=("image",), in_size=size, **layer),
        Layer(name="b", kind="avg_pool", inputs=("a",), in_size=size, kernel=2, stride=2, **layer),
        Layer(name="c", kind="global_pool", inputs=("b",), in_size=-(-size // 2), **layer),
        Layer(name="d", kind="linear", inputs=("c",), in_size=1, **layer),
    )
    eye = np.eye(channels, dtype=np.float32)
    path = write(layers, {"a.conv.weight": eye[:, :, None, None], "d.weight": eye}, tmp_path)
    images = torch.randn(2, channels, size, size, generator=torch.Generator().manual_seed(size))
    pooled = torch.nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False)(images)
    found = ExecutorchExporter().infer(path, images.numpy())
    np.testing.assert_allclose(found, pooled.mean((2, 3)).numpy(), atol=1e-6)


def test_networks_of_one_process_keep_their_weights(tmp_path):
    space = tiny_space()
    layers = lower(space, space.smallest())
    images = random_images(layers, 1, seed=0)
    paths = [tmp_path / f"{seed}.pte" for seed in range(2)]
    for seed, path in enumerate(paths):
        ExecutorchExporter().write(layers, random_tensors(layers, np.random.default_rng(seed)), path)
    first, second, again = (ExecutorchExporter().infer(path, images) for path in (*paths, paths[0]))
    np.testing.assert_array_equal(first, again)
    assert not np.allclose(first, second)


# -------------------------------------------------------------------- lower precision


def compared(layers, precision, path, images=16, **changes):
    """What a file makes of images, and what its network does; the ranges are those of the same images."""
    network, images = trained_network(layers), random_images(layers, images, seed=1)
    writer = exporter("executorch", precision, changes.pop("keep", ()))
    writer.write(layers, tensors_with_ranges(layers, network, images) | changes, path)
    return writer.infer(path, images), network(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("activation", get_args(Activation))
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.995), ("fp16", 0.9999)])
def test_activations_of_lower_precisions(activation, precision, least, tmp_path):
    space = replace(tiny_space(), activation=activation)
    arch = replace(space.smallest(), resolution=33)  # feature maps with odd sides
    found, expected = compared(lower(space, arch), precision, tmp_path / "m.pte")
    assert correlation(found, expected) > least


@pytest.mark.parametrize("name", ["bignas", "attentivenas", "ofa-mbv3", "tiny"])
@pytest.mark.parametrize(("precision", "least"), [("int8", 0.9), ("fp16", 0.9995)])  # untrained networks lose much
def test_lower_precisions_of_every_space(name, precision, least, tmp_path):
    space = SearchSpace.load(name, num_classes=10)
    layers = lower(space, replace(space.smallest(), resolution=64))
    found, expected = compared(layers, precision, tmp_path / "m.pte", images=4)
    assert correlation(found, expected) > least


@pytest.fixture(scope="module")
def largest():
    """The layers of tiny's largest child, its network, the tensors of that, images, and its logits."""
    space = tiny_space()
    layers = lower(space, space.largest())
    network, images = trained_network(layers), random_images(layers, 32, seed=1)
    tensors = tensors_with_ranges(layers, network, images)
    return layers, network, tensors, images, network(torch.from_numpy(images)).numpy()


def test_kept_layers_compute_in_float(largest, tmp_path):
    """The more of them, the closer; all of them is the network itself."""
    layers, _, tensors, images, expected = largest
    errors = []
    for share in (0, 0.5, 1):
        keep = [layer.name for layer in layers[: round(share * len(layers))]]
        writer = exporter("executorch", "int8", keep)
        found = writer.infer(writer.write(layers, tensors, tmp_path / "m.pte").path, images)
        errors.append(float(((found - expected) ** 2).mean()))
    assert errors[0] > errors[1] > errors[2]
    assert errors[2] < 1e-8


@pytest.mark.parametrize("name", ["stage1.block1.add", "stage3.block1.se.scale", "stem", "head.pool", "classifier"])
def test_any_layer_can_be_kept(largest, name, tmp_path):
    layers, _, tensors, images, expected = largest
    writer = exporter("executorch", "int8", [name])
    found = writer.infer(writer.write(layers, tensors, tmp_path / "m.pte").path, images)
    assert correlation(found, expected) > 0.99


def test_sensitive_blocks_stay_in_float32(largest):
    layers, network, tensors, images, expected = largest
    tensors = {**tensors, "stage2.block1.depthwise.range": np.float32([-1e4, 1e4])}  # steps far too coarse
    whole = exporter("executorch", "int8")

    def accuracy(writer, path):
        return correlation(writer.infer(path, images), expected)

    writer, found = within_drop(network, tensors, whole, images[:8], accuracy, least=0.98)
    assert found >= 0.98
    assert "stage2.block1.depthwise" in writer.form.keep
    assert len(writer.form.keep) < len(layers)


@pytest.mark.parametrize(
    "name",
    [
        "stem.preactivation",  # of a convolution
        "stage1.block1.depthwise",  # of a product, and of what reads it
        "stage1.block1.se.reduce",
        "stage2.block1.add",
        "stage2.block1.shortcut.pool",
        "head.pool",
        "classifier",
        "image",
    ],
)
def test_what_xnnpack_refuses_is_never_written(name, tmp_path):
    """It limits how far steps of inputs and outputs are apart, and executorch does not survive its refusal."""
    space = tiny_space()
    layers = lower(space, space.smallest())
    names = {layer.name for layer in layers}
    assert name.removesuffix(".preactivation") in {*names, "image"}
    for limit in (0, 1e-6, 1e4):
        wrong = {f"{name}.range": np.float32([-limit, limit])}
        found, _ = compared(layers, "int8", tmp_path / "m.pte", images=2, **wrong)
        assert np.isfinite(found).all()


def test_weights_beyond_half_precision_are_named(layers, tmp_path):
    tensors = random_tensors(layers, np.random.default_rng(0))
    tensors["stage2.block1.project.norm.bias"][3] = 1e5
    writer = exporter("executorch", "fp16")
    with pytest.raises(ExportError, match=r"stage2\.block1\.project reaches 100000, and fp16 ends at 65504"):
        writer.write(layers, tensors, tmp_path / "m.pte")
    assert not list(tmp_path.iterdir())
    exporter("executorch").write(layers, tensors, tmp_path / "m.pte")


# -------------------------------------------------------------------- what the files are


@pytest.fixture
def layers():
    space = tiny_space()
    return lower(space, space.smallest())


@pytest.fixture
def network(layers, tmp_path):
    return write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path)


def test_artifact_holds_the_hash_of_the_file(layers, tmp_path):
    path = tmp_path / "model.pte"
    artifact = ExecutorchExporter().write(layers, random_tensors(layers, np.random.default_rng(0)), path)
    assert artifact.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_takes_images_as_torch_lays_them_out(network):
    from executorch.runtime import Runtime

    meta = Runtime.get().load_program(network).metadata("forward")
    assert meta.num_inputs() == meta.num_outputs() == 1
    assert meta.input_tensor_meta(0).sizes() == (1, 1, 28, 28)
    assert meta.output_tensor_meta(0).sizes() == (1, 10)


def test_takes_bytes_as_cameras_give_them(layers, tmp_path):
    from executorch.runtime import Runtime

    writer = exporter("executorch", batch=2, pixels=Pixels((0.5,), (0.2,)))
    path = writer.write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path / "m.pte").path
    meta = Runtime.get().load_program(path).metadata("forward")
    assert meta.input_tensor_meta(0).sizes() == (2, 28, 28, 1)
    assert meta.input_tensor_meta(0).dtype() == 0  # torch's ScalarType of uint8
    assert meta.output_tensor_meta(0).sizes() == (2, 10)


def test_running_leaves_the_input_alone(network, layers):
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(network).load_method("forward")._method
    method.set_inputs([torch.from_numpy(random_images(layers, 1, seed=0))])
    method.execute()
    first = method.get_outputs()[0].numpy()
    method.execute()
    np.testing.assert_array_equal(method.get_outputs()[0].numpy(), first)


def partly_portable(path):
    """A copy of a file with an operator that XNNPACK does not run, as the usual road writes them."""
    from executorch.exir import schema
    from executorch.exir._serialize._program import deserialize_pte_binary, serialize_pte_binary

    read = deserialize_pte_binary(path.read_bytes())
    read.program.execution_plan[0].operators.append(schema.Operator("aten::avg_pool2d", "out"))
    other = path.with_name("portable.pte")
    other.write_bytes(bytes(serialize_pte_binary(read, extract_delegate_segments=True)))
    return other


def test_refuses_other_kernels(network, bindings):
    path = partly_portable(network)
    with pytest.raises(ExportError, match=r"portable\.pte: it does not run as a whole in XNNPACK"):
        ExecutorchExporter().infer(path, np.zeros((1, 1, 28, 28), dtype=np.float32))
    with pytest.raises(DeviceError, match=r"the file has aten::avg_pool2d: it has to run as a whole in XnnpackBackend"):
        bindings.run(path, QUICK)


@pytest.mark.slow
def test_one_thread_pool_a_process(network, tmp_path):
    (tmp_path / "two.yaml").write_text("transport: host\nruntime: executorch\ntiming: {threads: 2}\n")
    with load_device(tmp_path / "two.yaml") as device:
        assert device.run(network, replace(QUICK, threads=2)).latency_ms > 0
        with pytest.raises(DeviceError, match=r"threads=1: networks were loaded with 2, and share one pool"):
            device.run(network, QUICK)


def test_without_executorch(layers, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "executorch.exir._serialize._program", None)
    with pytest.raises(ExportError, match=r"executorch is not installed: pip install 'hwnas\[executorch\]'"):
        write(layers, random_tensors(layers, np.random.default_rng(0)), tmp_path)
    with pytest.raises(ExportError, match=r"pip install 'hwnas\[executorch\]'"):
        ExecutorchExporter().infer(tmp_path / "model.pte", np.zeros((1, 1, 28, 28), dtype=np.float32))


@pytest.mark.slow
def test_is_what_the_usual_road_writes(tmp_path, monkeypatch):
    # No average pool with partial windows, for which the usual road leaves XNNPACK, and no h-sigmoid, for which it
    # writes six operators in place of a clamp. The stem of grey images it calls depthwise.
    space = replace(SearchSpace.load("tiny", num_classes=10), shortcut="identity", activation="h-swish")
    layers = lower(space, space.smallest())
    network = trained_network(layers)
    images = random_images(layers, 1, seed=1)
    inputs = (torch.from_numpy(images),)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from executorch.backends.xnnpack import xnnpack_preprocess
        from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
        from executorch.backends.xnnpack.serialization import xnnpack_graph_serialize
        from executorch.exir import to_edge_transform_and_lower
        from executorch.runtime import Runtime

        kinds = []

        def spy(graph, data, serialize=xnnpack_graph_serialize.serialize_xnnpack_binary):
            names = [
                node["xnode_union_type"] if isinstance(node, dict) else type(node.xnode_union).__name__
                for node in graph.xnodes
            ]
            kinds.append(Counter(names))
            return serialize(graph, data)

        for module in (xnnpack_preprocess, xnnpack_graph_serialize):
            monkeypatch.setattr(module, "serialize_xnnpack_binary", spy)
        exported = torch.export.export(network, inputs)
        usual = to_edge_transform_and_lower(exported, partitioner=[XnnpackPartitioner()]).to_executorch()
        expected = Runtime.get().load_program(usual.buffer).load_method("forward").execute(inputs)[0].numpy()
    path = write(layers, tensors_with_ranges(layers, network, images), tmp_path)
    np.testing.assert_allclose(ExecutorchExporter().infer(path, images), expected, rtol=1e-4, atol=1e-5)
    usual_kinds, ours = kinds
    # It turns the pooled features, of one pixel, to torch's layout and back.
    assert usual_kinds.pop("XNNStaticTranspose") >= ours.pop("XNNStaticTranspose") == 1
    assert ours == usual_kinds
