"""The runtimes that read ONNX files: their contract, parity, and what they refuse."""

import shutil
from contextlib import ExitStack
from dataclasses import replace

import numpy as np
import onnx
import pytest
import torch

from hwnas.devices.runtimes import onnxruntime as onnxruntime_file
from hwnas.devices.runtimes import openvino as openvino_file
from hwnas.devices.runtimes import pytorch as pytorch_file
from hwnas.devices.transports.host import Host
from hwnas.devices.worker_device import WorkerDevice
from hwnas.errors import DeviceError
from hwnas.exporters.base import exporter, random_tensors
from hwnas.layers import Layer, lower
from hwnas.space import SearchSpace
from hwnas.testing import QUICK, DeviceContract, tiny_space


def host(runtime, precision="fp32", **options):
    return WorkerDevice(runtime, Host(), runtime, precision=precision, options=options)


@pytest.fixture(scope="module")
def opened():
    """Devices that stay open for the module's tests."""
    with ExitStack() as stack:
        devices = {}

        def device(runtime, precision="fp32"):
            if (runtime, precision) not in devices:
                devices[runtime, precision] = stack.enter_context(host(runtime, precision))
            return devices[runtime, precision]

        yield device


def file_of(space, arch, folder, precision="fp32"):
    layers = lower(space, arch)
    tensors = random_tensors(layers, np.random.default_rng(0))
    return exporter("onnx", precision).write(layers, tensors, folder / "network.onnx").path


@pytest.fixture
def network(tmp_path):
    space = tiny_space()
    return file_of(space, space.smallest(), tmp_path)


@pytest.fixture
def quantised(tmp_path):
    space = tiny_space()
    return file_of(space, space.smallest(), tmp_path, "int8-symmetric")


# -------------------------------------------------------------------- onnxruntime


class TestOnnxruntimeInt8(DeviceContract):
    @pytest.fixture
    def device(self, opened):
        return opened("onnxruntime", "int8")


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_onnxruntime_without_the_provider(provider, network):
    import onnxruntime

    if onnxruntime_file.PROVIDERS[provider] in onnxruntime.get_available_providers():
        pytest.skip("this onnxruntime is one for GPUs")
    message = r"has no (CUDA|Tensorrt)ExecutionProvider, only .*CPUExecutionProvider.*: install onnxruntime-gpu"
    with pytest.raises(RuntimeError, match=message):
        onnxruntime_file.Runtime("fp32", provider=provider).load(str(network), 1)
    with pytest.raises(RuntimeError, match=message):
        onnxruntime_file.Runtime("fp32", provider=provider).versions()


@pytest.mark.parametrize(
    ("precision", "provider", "message"),
    [
        ("fp32", "rocm", "provider='rocm': must be one of cpu, cuda, tensorrt"),
        ("fp16", "cpu", "precision fp16 needs provider tensorrt"),
        ("fp16", "cuda", "precision fp16 needs provider tensorrt"),
        ("int8", "cuda", "precision int8 needs provider cpu"),
        ("int8", "tensorrt", "precision int8 needs provider cpu"),
    ],
)
def test_onnxruntime_options(precision, provider, message):
    with pytest.raises(ValueError, match=message):
        onnxruntime_file.Runtime(precision, provider=provider)


@pytest.mark.gpu
def test_onnxruntime_on_a_gpu(network):
    import onnxruntime

    if "CUDAExecutionProvider" not in onnxruntime.get_available_providers():
        pytest.skip("onnxruntime-gpu is not installed")
    with host("onnxruntime", provider="cuda") as device:
        assert device.run(network, QUICK).latency_ms > 0
        assert "NVIDIA" in device.versions()["device"]


# -------------------------------------------------------------------- OpenVINO


class TestOpenvino(DeviceContract):
    @pytest.fixture(params=["fp32", "bf16", "int8"])
    def device(self, request, opened):
        openvino = pytest.importorskip("openvino")
        has = openvino.Core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
        if openvino_file.CAPABILITIES[request.param] not in has:
            pytest.skip(f"this processor has no {request.param}")
        return opened("openvino", request.param)


def compiled_by(monkeypatch, path, precision, threads=1):
    """What the runtime compiles, and its output on its own input."""
    openvino = pytest.importorskip("openvino")
    kept = []
    compile_model = openvino.Core.compile_model

    def keep(self, *arguments):
        kept.append(compile_model(self, *arguments))
        return kept[-1]

    monkeypatch.setattr(openvino.Core, "compile_model", keep)
    run = openvino_file.Runtime(precision).load(str(path), threads)
    return kept[0], next(iter(run().values()))


def test_openvino_computes_what_onnxruntime_does(network, monkeypatch):
    compiled, logits = compiled_by(monkeypatch, network, "fp32")
    images = np.random.default_rng(0).standard_normal(list(compiled.inputs[0].shape), dtype=np.float32)
    np.testing.assert_allclose(logits, exporter("onnx").infer(network, images), rtol=1e-4, atol=1e-5)
    assert compiled.get_property("INFERENCE_NUM_THREADS") == 1
    assert compiled.get_property("ENABLE_CPU_PINNING") is False


def test_openvino_computes_int8_on_integers(quantised, monkeypatch):
    compiled, _ = compiled_by(monkeypatch, quantised, "int8")
    kernels = [node.get_rt_info() for node in compiled.get_runtime_model().get_ops()]
    ran = [
        kernel["runtimePrecision"].astype(str)
        for kernel in kernels
        if kernel["layerType"].astype(str) in ("Convolution", "FullyConnected")
    ]
    space = tiny_space()
    assert len(ran) == sum(layer.kind in ("conv", "linear") for layer in lower(space, space.smallest()))
    assert set(ran) <= {"i8", "u8"}  # which, depends on the processor


def test_openvino_refuses_floats_as_int8(network):
    pytest.importorskip("openvino")
    with pytest.raises(RuntimeError, match="OpenVINO would run convolutions in f32, not int8"):
        openvino_file.Runtime("int8").load(str(network), 1)


def test_openvino_devices(network):
    openvino = pytest.importorskip("openvino")
    with pytest.raises(ValueError, match="device='TPU': must be one of CPU, GPU, NPU"):
        openvino_file.Runtime("fp32", device="TPU")
    if "NPU" in openvino.Core().available_devices:
        pytest.skip("this machine has an NPU")
    missing = pytest.raises(DeviceError, match="OpenVINO finds no NPU on this machine, only CPU")
    with host("openvino", device="NPU") as device, missing:
        device.versions()


# -------------------------------------------------------------------- PyTorch


class TestPytorch(DeviceContract):
    @pytest.fixture
    def device(self, opened):
        return opened("pytorch")


@pytest.mark.parametrize("name", SearchSpace.names())
def test_pytorch_computes_what_onnxruntime_does(name, tmp_path):
    space = SearchSpace.load(name, num_classes=10)
    path = file_of(space, replace(space.sample(np.random.default_rng(0)), resolution=65), tmp_path)
    images = np.random.default_rng(1).standard_normal((1, 3, 65, 65), dtype=np.float32)
    with torch.inference_mode():
        logits = pytorch_file.network(onnx.load(path).graph)(torch.tensor(images))
    np.testing.assert_allclose(logits, exporter("onnx").infer(path, images), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_pytorch_precisions(precision, network):
    logits = pytorch_file.Runtime(precision).load(str(network), 1)()
    expected = pytorch_file.Runtime("fp32").load(str(network), 1)()
    assert str(logits.dtype) == f"torch.{pytorch_file.PRECISIONS[precision]}"
    assert np.corrcoef(logits.float().ravel(), expected.ravel())[0, 1] > 0.99


@pytest.mark.slow
def test_pytorch_compiled(tmp_path):
    if shutil.which("g++") is None:
        pytest.skip("no C++ compiler")
    sizes = {"in_channels": 4, "out_channels": 4}
    layers = (
        Layer(name="a", kind="conv", inputs=("image",), in_size=8, kernel=3, norm=True, activation="swish", **sizes),
        Layer(name="b", kind="global_pool", inputs=("a",), in_size=8, **sizes),
        Layer(name="c", kind="linear", inputs=("b",), in_size=1, bias=True, **sizes),
    )
    network = tmp_path / "network.onnx"
    exporter("onnx").write(layers, random_tensors(layers, np.random.default_rng(0)), network)
    logits = pytorch_file.Runtime("fp32", compiled=True).load(str(network), 1)()
    expected = pytorch_file.Runtime("fp32").load(str(network), 1)()
    np.testing.assert_allclose(logits, expected, rtol=1e-3, atol=1e-5)


def test_pytorch_refuses_quantised_files(quantised):
    with pytest.raises(ValueError, match="operator QuantizeLinear: quantised files are not for PyTorch"):
        pytorch_file.Runtime("fp32").load(str(quantised), 1)


def test_pytorch_devices(network):
    with pytest.raises(ValueError, match="device='tpu': must be one of cpu, cuda"):
        pytorch_file.Runtime("fp32", device="tpu")
    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    for ask in (lambda runtime: runtime.load(str(network), 1), lambda runtime: runtime.versions()):
        with pytest.raises(RuntimeError, match="finds no CUDA device on this machine"):
            ask(pytorch_file.Runtime("fp32", device="cuda"))


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_pytorch_on_a_gpu(precision, network):
    with host("pytorch", precision, device="cuda") as device:
        assert device.run(network, QUICK).latency_ms > 0
