"""How long `import hwnas` and `hwnas --help` take, as whole processes.

python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import statistics
import subprocess
import sys
import time
from pathlib import Path

from environment import heading

ROUNDS = 9
COMMANDS = {
    "python -c pass": ["-c", "pass"],
    "python -c 'import hwnas'": ["-c", "import hwnas"],
    "hwnas --help": ["-m", "hwnas", "--help"],
}


def seconds(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, check=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, help="write the results there too")
    output = parser.parse_args().output
    times: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(ROUNDS):
        for name, arguments in COMMANDS.items():
            times[name].append(seconds(arguments))
    lines = heading("Start-up", f"whole processes, alternating; median of {ROUNDS - 1} after a warm-up")
    lines += ["| command | seconds |", "|---|---|"]
    lines += [f"| `{name}` | {statistics.median(found[1:]):.3f} |" for name, found in times.items()]
    text = "\n".join(lines) + "\n"
    print(text)
    if output is not None:
        output.write_text(text, encoding="utf-8")
