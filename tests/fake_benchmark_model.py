"""LiteRT's benchmark_model in Python: it runs the network, and prints what the real one prints (tensorflow 2.8 on)."""

import argparse
import os
import signal
import sys
import time
from pathlib import Path

import numpy as np
from ai_edge_litert.interpreter import Interpreter


def fail(*lines: str) -> None:
    print(*lines, "Benchmarking failed.", sep="\n", file=sys.stderr)
    sys.exit(1)


def number(value: float) -> str:
    return f"{value:.6g}"  # as C++ streams print a double: 2.95034e+06


def measure(run, runs: int, min_s: float, max_s: float) -> list[int]:
    print(
        f"Running benchmark for at least {runs} iterations and at least {min_s:g} seconds "
        f"but terminate if exceeding {max_s:g} seconds."
    )
    times: list[int] = []
    began = time.perf_counter()
    while len(times) < runs or time.perf_counter() < began + min_s:
        if time.perf_counter() > began + max_s:
            break
        start = time.perf_counter()
        run()
        times.append(int((time.perf_counter() - start) * 1e6))
    if min(times) == max(times):
        print(f"count={len(times)} curr={times[-1]}" + "(all same)" * (len(times) > 1))
    else:
        print(
            f"count={len(times)} first={times[0]} curr={times[-1]} min={min(times)} max={max(times)} "
            f"avg={number(np.mean(times))} std={number(np.std(times))}"
        )
    print()
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--graph", required=True)
    parser.add_argument("--num_threads", type=int, default=-1)
    parser.add_argument("--warmup_runs", type=int, default=1)
    parser.add_argument("--warmup_min_secs", type=float, default=0.5)
    parser.add_argument("--num_runs", type=int, default=50)
    parser.add_argument("--min_secs", type=float, default=1.0)
    parser.add_argument("--max_secs", type=float, default=150.0)
    parser.add_argument("--use_xnnpack", choices=["true"], required=True)
    options, others = parser.parse_known_args()
    print("STARTING!")
    if others:
        print(f"WARN: Unconsumed cmdline flags: {' '.join(others)}", file=sys.stderr)
    print(f"Num threads: [{options.num_threads}]")
    print(f"Graph: [{options.graph}]")
    if Path(options.graph).exists() and Path(options.graph).stat().st_size > int(os.environ.get("MEMORY_BYTES", 1e12)):
        os.kill(os.getpid(), signal.SIGKILL)
    started = time.perf_counter()
    try:
        interpreter = Interpreter(options.graph, num_threads=options.num_threads)
    except ValueError as error:
        fail(f"ERROR: {error}", f"ERROR: Failed to load model {options.graph}")
    print(f"Loaded model {options.graph}")
    print("INFO: Created TensorFlow Lite XNNPACK delegate for CPU.", file=sys.stderr)
    print("Explicitly applied XNNPACK delegate, and the model graph will be completely executed by the delegate.")
    interpreter.allocate_tensors()
    for tensor in interpreter.get_input_details():
        interpreter.set_tensor(tensor["index"], np.zeros(tensor["shape"], tensor["dtype"]))
    init_us = (time.perf_counter() - started) * 1e6
    print(f"The input model file size (MB): {number(Path(options.graph).stat().st_size / 1e6)}")
    print(f"Initialized session in {number(init_us / 1e3)}ms.")
    warmup = measure(interpreter.invoke, max(1, options.warmup_runs), options.warmup_min_secs, options.max_secs)
    times = measure(interpreter.invoke, options.num_runs, options.min_secs, options.max_secs)
    print(
        f"Inference timings in us: Init: {number(init_us)}, First inference: {warmup[0]}, "
        f"Warmup (avg): {number(np.mean(warmup))}, Inference (avg): {number(np.mean(times))}"
    )
    print(
        "Note: as the benchmark tool itself affects memory footprint, the following is only APPROXIMATE to the actual "
        "memory footprint of the model at runtime. Take the information at your discretion."
    )
    print("Memory footprint delta from the start of the tool (MB): init=4.21094 overall=46.0859")


if __name__ == "__main__":
    main()
