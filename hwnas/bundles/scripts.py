"""The programs of a bundle: `run.py`, and a snippet for C++ or Kotlin where a format's runtime is usually met there."""

from __future__ import annotations

import inspect
import json
import shlex
from collections.abc import Iterable
from importlib.resources import files
from textwrap import dedent

from hwnas import __version__
from hwnas.bundles.manifest import Manifest
from hwnas.devices.tools import trtexec
from hwnas.exporters.base import Exporter

RUN_PY = '''"""Classify images with {name} ({format}, {precision}), and nothing but its runtime, numpy and Pillow.

    pip install {packages} numpy pillow
    python run.py IMAGE...

Written by hwnas {version}, Apache-2.0. The preprocessing is that of manifest.json beside it.
"""
'''

RUN_CC = """\
// Classifies an image with {name}, in ncnn (https://github.com/Tencent/ncnn). Written by hwnas {version}, Apache-2.0.
// In this folder; the program goes elsewhere, as `hwnas verify` refuses a bundle with a file more:
//   g++ -O2 run.cc -o ../classify -I"$(pkg-config --variable=includedir ncnn)/ncnn" $(pkg-config --libs ncnn) -fopenmp
//   ../classify pixels.raw    prints the likeliest class and its probability
// pixels.raw: {size} x {size} x {channels} bytes, {order} by pixel: the image after every resize of manifest.json, as
// the function `pixels` of run.py gives it. ncnn's own resizing has no antialiasing.
#include "net.h"

#include <cmath>
#include <cstdio>
#include <vector>

static const char* kClasses[] = {{{classes}}};

static int fail(const char* what) {{
  std::fprintf(stderr, "%s\\n", what);
  return 1;
}}

int main(int argc, char** argv) {{
  std::vector<unsigned char> pixels({size} * {size} * {channels});
  FILE* file = argc == 2 ? std::fopen(argv[1], "rb") : nullptr;
  const bool whole = file && std::fread(pixels.data(), 1, pixels.size(), file) == pixels.size();
  if (file) std::fclose(file);
  if (!whole) return fail("usage: ../classify pixels.raw    of {size} x {size} x {channels} bytes");

  ncnn::Net net;
  net.opt.num_threads = 1;
  net.opt.use_fp16_packed = net.opt.use_fp16_storage = net.opt.use_fp16_arithmetic = false;  // as it was checked
  if (net.load_param("{name}") || net.load_model("{weights}")) return fail("{name} and {weights} cannot be read");

  ncnn::Mat image = ncnn::Mat::from_pixels(pixels.data(), ncnn::Mat::{pixel}, {size}, {size});
{normalise}
  ncnn::Extractor extractor = net.create_extractor();
  ncnn::Mat logits;
  if (extractor.input("{input}", image) || extractor.extract("{output}", logits)) return fail("{name} cannot be run");
  int best = 0;
  for (int i = 1; i < logits.w; i++)
    if (logits[i] > logits[best]) best = i;
  double sum = 0;
  for (int i = 0; i < logits.w; i++) sum += std::exp(logits[i] - logits[best]);
  std::printf("%s %.1f%%\\n", kClasses[best], 100 / sum);
}}
"""
NORMALISE_CC = """\
  const float mean[] = {{{mean}}};  // of bytes
  const float norm[] = {{{norm}}};  // 1 / (255 * std)
  image.substract_mean_normalize(mean, norm);
"""

RUN_KT = """\
// Classifies an image with {name}, in LiteRT on Android. Written by hwnas {version}, Apache-2.0.
//   implementation("com.google.ai.edge.litert:litert:1.4.0")
// pixels: {size} x {size} x {channels} bytes, {order} by pixel: the image after every resize of manifest.json, as the
// function `pixels` of run.py gives it. Android's own scaling has no bicubic filter.
import java.io.File
import java.nio.ByteBuffer
import java.nio.ByteOrder
import org.tensorflow.lite.Interpreter

class Classifier(model: File, private val classes: List<String>) : AutoCloseable {{
    private val interpreter = Interpreter(model, Interpreter.Options().setNumThreads(1))

    /** The likeliest of the manifest's classes. */
    fun classify(pixels: ByteArray): String {{
        require(pixels.size == {num_pixels}) {{ "${{pixels.size}} bytes, not {size} x {size} x {channels}" }}
        val input = ByteBuffer.allocateDirect({bytes} * pixels.size).order(ByteOrder.nativeOrder())
{fill}
        input.rewind()
        val logits = Array(1) {{ FloatArray({num_classes}) }}
        interpreter.run(input, logits)
        var best = 0
        for (i in logits[0].indices) if (logits[0][i] > logits[0][best]) best = i
        return classes[best]
    }}

    override fun close() = interpreter.close()
}}
"""

FILL_KT = {
    "normalised": """\
        val mean = floatArrayOf({mean})
        val std = floatArrayOf({std})
        for (i in pixels.indices) {{
            val value = (pixels[i].toInt() and 0xFF) / 255f
            input.putFloat((value - mean[i % {channels}]) / std[i % {channels}])
        }}""",
    "pixels": "        input.put(pixels)",
}

BUILD_SH = """\
#!/bin/sh
# Builds a TensorRT engine from {name}, for the GPU of this machine: an engine runs on no other kind, and in no other
# version of TensorRT. Kernels' times are kept in timing.cache, which makes the next engine quick to build.
# Written by hwnas {version}, Apache-2.0. The input, {input}, is what run.py's `preprocess` gives.
#   sh build.sh TENSORRT_VERSION {precisions}     for example: sh build.sh 10 {last}
{batches}set -eu
cd "$(dirname "$0")"
trtexec=${{TRTEXEC:-/usr/src/tensorrt/bin/trtexec}}
case "${{1:-}} ${{2:-}}" in
{cases}
  *) echo "usage: sh build.sh {versions} {precisions}" >&2; exit 2 ;;
esac
"""

BATCHES_SH = """\
# A call takes N images, 1 to MAX_BATCH ({most} unless set); the engine is tuned for BATCH of them ({usual} unless set).
"""
USUAL_BATCH, MAX_BATCH = 8, 32


def scripts(manifest: Manifest, exporter: Exporter) -> dict[str, str]:
    """The programs of a bundle, by the names of their files.

    `run.py` is the source of `hwnas.bundles.classify` and of the format's `Exporter.load`: what is tested is what is
    shipped.
    """
    what: dict[str, str] = {
        "name": manifest.file.name,
        "format": manifest.file.format,
        "precision": manifest.file.precision,
        "packages": " ".join(exporter.packages),
        "version": __version__,
    }
    shared = files("hwnas.bundles").joinpath("classify.py").read_text(encoding="utf-8")
    shared = shared.partition('"""\n')[2].lstrip("\n")  # without its docstring
    load = dedent(inspect.getsource(type(exporter).load)).removeprefix("@staticmethod\n")
    load = load.replace('"""See `Exporter`."""', '"""The network in a file, as a function."""')
    end = 'if __name__ == "__main__":\n    main(load, Path(__file__).parent, sys.argv[1:])\n'
    made = {"run.py": "\n\n".join([RUN_PY.format(**what) + shared.rstrip() + "\n", load, end])}
    if manifest.file.format in SNIPPETS and manifest.input.shape[0] == 1:  # they classify an image at a time
        name, template, constants = SNIPPETS[manifest.file.format]
        made[name] = template.format(**what, **_constants(manifest), **constants(manifest))
    if manifest.file.format == "tensorrt":
        made["build.sh"] = BUILD_SH.format(**{**what, **_builds(manifest)})
    return made


def _builds(manifest: Manifest) -> dict[str, str]:
    """What devices that run trtexec are given, for each version and precision; and a range of batches.

    An fp32 file also makes engines in fp16, up to version 10; from 11 on, networks run in the types of the file.
    """
    own = manifest.file.precision
    precisions = ("fp32", "fp16") if own == "fp32" else (own,)
    batch, *sides = manifest.input.shape
    image = "x".join(map(str, sides))
    ranges = ""
    if batch is None:  # the shell puts in what is set; the rest is hwnas's own names and numbers
        counts = ("min", "1"), ("opt", f"${{BATCH:-{USUAL_BATCH}}}"), ("max", f"${{MAX_BATCH:-{MAX_BATCH}}}")
        ranges = "".join(f' "--{end}Shapes={manifest.input.name}:{count}x{image}"' for end, count in counts)
    cases = []
    for number in trtexec.VERSIONS:
        for precision in precisions:
            typed = number >= 11
            if typed and precision != own:
                continue
            program = trtexec.Program("fp32" if typed else precision, version=number)
            command = program.build_command("trtexec", manifest.file.name, f"model-{precision}.engine", ".")
            flags = " ".join(shlex.quote(word) for word in command[1:])
            cases.append(f'  "{number} {precision}") exec "$trtexec" {flags}{ranges} ;;')
    return {
        "input": f"{manifest.input.dtype} {batch or 'N'}x{image} ({manifest.input.layout})",
        "batches": BATCHES_SH.format(usual=USUAL_BATCH, most=MAX_BATCH) if batch is None else "",
        "cases": "\n".join(cases),
        "precisions": "|".join(precisions),
        "last": precisions[-1],
        "versions": "|".join(map(str, trtexec.VERSIONS)),
    }


def _constants(manifest: Manifest) -> dict[str, object]:
    """What all snippets are made of."""
    how = manifest.preprocessing
    return {
        "size": how.resolution,
        "channels": how.channels,
        "order": "grey" if how.channels == 1 else "red, green, blue",
        "input": manifest.input.name,
        "output": manifest.output.name,
    }


def _cc(manifest: Manifest) -> dict[str, object]:
    """What a C++ snippet is made of beside that, which normalises bytes."""
    how = manifest.preprocessing
    mean = _numbers(255 * value for value in how.mean)
    norm = _numbers(1 / (255 * value) for value in how.std)
    return {
        "pixel": "PIXEL_GRAY" if how.channels == 1 else "PIXEL_RGB",
        "classes": ", ".join(json.dumps(name, ensure_ascii=False) for name in manifest.classes),  # also C++
        "weights": next(part for part in manifest.file.parts if part != manifest.file.name),
        "normalise": "" if manifest.input.values == "pixels" else NORMALISE_CC.format(mean=mean, norm=norm),
    }


def _kt(manifest: Manifest) -> dict[str, object]:
    """What a Kotlin snippet is made of beside that."""
    how = manifest.preprocessing
    mean, std = (_numbers(values, "f") for values in (how.mean, how.std))
    return {
        "num_pixels": how.resolution**2 * how.channels,
        "bytes": 1 if manifest.input.dtype == "uint8" else 4,
        "num_classes": len(manifest.classes),
        "fill": FILL_KT[manifest.input.values].format(mean=mean, std=std, channels=how.channels),
    }


def _numbers(values: Iterable[float], suffix: str = "") -> str:
    return ", ".join(f"{value:.9g}{suffix}" for value in values)


SNIPPETS = {"ncnn": ("run.cc", RUN_CC, _cc), "tflite": ("run.kt", RUN_KT, _kt)}
