"""What every results file says: date, hardware, versions, command."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

RUNTIMES = ("onnxruntime", "openvino", "ai-edge-litert", "executorch", "ncnn")


def processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def commit() -> str:
    done = subprocess.run(["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False)
    return done.stdout.strip() or "unknown"


def heading(title: str, how: str) -> list[str]:
    """The lines above a table of results."""
    versions = []
    for package in ("numpy", "torch", *RUNTIMES, "optuna", "xgboost-cpu"):
        try:
            versions.append(f"{package} {version(package)}")
        except PackageNotFoundError:
            continue
    command = shlex.join(["python", str(Path(sys.argv[0])), *sys.argv[1:]])
    return [
        f"# {title}",
        "",
        f"- {datetime.now(UTC):%Y-%m-%d}, commit {commit()}, `{command}`",
        f"- {processor()}, {os.cpu_count()} processors, {platform.system()}, Python {platform.python_version()}",
        f"- {', '.join(versions)}",
        f"- {how}",
        "",
    ]
