"""A fake phone with what hwnas needs there: some of Android's programs, and LiteRT's benchmark_model."""

import shlex
import sys
from pathlib import Path

from tests.adb_daemon import Phone

TOOL = Path(__file__).with_name("fake_benchmark_model.py")

GETPROP = """[ro.build.id]: [UQ1A.240205.004]
[ro.build.version.release]: [14]
[ro.board.platform]: [zuma]
[ro.product.model]: [{model}]
[ro.soc.model]: [Tensor G3]
"""

# Of a Pixel 8 (Android 14).
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Dock powered: false
  Max charging current: 500000
  status: 2
  health: 2
  present: true
  level: 83
  scale: 100
  voltage: 4312
  temperature: 287
  technology: Li-ion
"""
THERMAL = """IsStatusOverride: false
ThermalEventListeners:
\tcallbacks: 1
Thermal Status: 0
Cached temperatures:
\tTemperature{mValue=31.2, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
HAL Ready: true
HAL connection:
\tThermalHAL AIDL 1  connected: yes
Current temperatures from HAL:
\tTemperature{mValue=36.5, mType=0, mName=BIG, mStatus=0}
\tTemperature{mValue=32.1, mType=3, mName=VIRTUAL-SKIN, mStatus=0}
"""


class AndroidPhone(Phone):
    """A phone whose programs and files are in a folder on this machine.

    Args:
        root: the folder.
        model: the phone's.
        options: of `Phone`.

    Attributes:
        temporary: stands in for /data/local/tmp.
        tool: benchmark_model.
    """

    def __init__(self, root: Path, model: str = "Pixel 8", **options) -> None:
        self.temporary, self._texts, programs = root / "tmp", root / "texts", root / "bin"
        for folder in (self.temporary, self._texts, programs):
            folder.mkdir(parents=True)
        self.say("getprop", GETPROP.format(model=model))
        self.say("battery", BATTERY)
        self.say("thermalservice", THERMAL)
        self.tool = programs / "benchmark_model"
        texts = shlex.quote(str(self._texts))
        for path, script in (
            (programs / "getprop", f"cat {texts}/getprop"),
            (programs / "dumpsys", f'cat {texts}/"$1"'),
            (self.tool, f'exec {shlex.quote(sys.executable)} {shlex.quote(str(TOOL))} "$@"'),
        ):
            path.write_text(f"#!/bin/sh\n{script}\n")
            path.chmod(0o755)
        super().__init__(model, programs, **options)

    def say(self, service: str, text: str) -> None:
        """Set what `getprop`, or `dumpsys` of a service, prints."""
        (self._texts / service).write_text(text)
