"""What machines say of themselves is read exactly, and garbage is read as nothing."""

import random
import re

import pytest

from hwnas.devices.readings import Phone, adb_devices, battery, getprop, tegrastats, thermal
from tests.samples import sample

THERMAL = """IsStatusOverride: false
Thermal Status: 2
Cached temperatures:
	Temperature{mValue=55.5, mType=0, mName=AP, mStatus=0}
	Temperature{mValue=23.8, mType=2, mName=BAT, mStatus=0}
HAL Ready: true
Current temperatures from HAL:
	Temperature{mValue=25.6, mType=0, mName=AP, mStatus=0}
	Temperature{mValue=-3.5, mType=3, mName=skin, front, mStatus=0}
	Temperature{mValue=NaN, mType=4, mName=USB, mStatus=0}
	Temperature{mValue=4123.0, mType=6, mName=vbat, mStatus=0}
Current cooling devices from HAL:
	CoolingDevice{mValue=12, mType=2, mName=cpu}
Temperature static thresholds from HAL:
	TemperatureThreshold{mType=0, mName=AP, mHotThrottlingThresholds=[NaN, 95.0], mColdThrottlingThresholds=[NaN]}
"""
BATTERY = """Current Battery Service state:
  AC powered: false
  USB powered: true
  Wireless powered: false
  Charge counter: 1000
  status: 2
  present: true
  level: 42
  scale: 50
  voltage: 4063
  temperature: 326
  technology: Li-ion
SEC section
  level: 7
"""


# -------------------------------------------------------------------- tegrastats


def orin(*celsius):
    return dict(zip(("cpu", "soc2", "soc0", "gpu", "tj", "soc1"), celsius, strict=True))


TEGRASTATS = [
    {
        "ram_mb": 775, "ram_total_mb": 7620, "mhz": 729, "gpu_pct": 0, "celsius": 49.156, "power_mw": 4761,
        "zones_celsius": orin(48.468, 47.531, 48.062, 48.562, 49.156, 49.156),
    },
    {
        "ram_mb": 779, "ram_total_mb": 7620, "mhz": 1344, "gpu_pct": 0, "celsius": 50.562, "power_mw": 6626,
        "zones_celsius": orin(50.125, 49.125, 49.25, 50.562, 50.562, 50.437),
    },
    {
        "ram_mb": 6185, "ram_total_mb": 7620, "mhz": 729, "gpu_pct": 63, "gpu_mhz": 621, "celsius": 53.968,
        "power_mw": 12479, "zones_celsius": orin(53.968, 52.437, 50.75, 53.343, 53.968, 51.656),
    },
    {
        "ram_mb": 3276, "ram_total_mb": 7859, "mhz": 2034, "gpu_pct": 0, "gpu_mhz": 114, "celsius": 42.5,
        "power_mw": 5297,
        "zones_celsius": {
            "pll": 42.5, "mcpu": 42.5, "tboard": 38, "gpu": 39.5, "bcpu": 42.5, "thermal": 41.3, "tdiode": 39.25
        },
    },
    {
        "ram_mb": 20642, "ram_total_mb": 62817, "mhz": 2201, "gpu_pct": 12, "gpu_mhz": 1300, "celsius": 52.968,
        "power_mw": 5139 + 3268 + 5500,
        "zones_celsius": {"cpu": 52.968, "soc2": 48.406, "soc0": 49.531, "gpu": 47.625},
    },
    {
        "ram_mb": 2432, "ram_total_mb": 15598, "mhz": 1036, "gpu_pct": 0, "celsius": 59.687, "power_mw": 7280,
        "zones_celsius": {
            "cv0": 56.281, "cpu": 57.156, "soc2": 56.593, "soc0": 57.781, "cv1": 56.125, "gpu": 55.343, "tj": 59.687,
            "soc1": 59.687, "cv2": 56.281,
        },
    },
    {
        "ram_mb": 1276, "ram_total_mb": 3956, "mhz": 1479, "gpu_pct": 22, "gpu_mhz": 921, "celsius": 28,
        "power_mw": 3478, "zones_celsius": {"pll": 21, "cpu": 23, "gpu": 22.5, "ao": 28, "thermal": 22.5},
    },
    {"ram_mb": 4722, "ram_total_mb": 7844, "gpu_mhz": 1000},
]  # fmt: skip


@pytest.mark.parametrize("number", range(len(TEGRASTATS)))
def test_tegrastats_samples(number):
    lines = sample("tegrastats.txt").splitlines()
    assert len(lines) == len(TEGRASTATS)
    assert tegrastats(lines[number]) == TEGRASTATS[number]


def test_tegrastats():
    line = "RAM 10/20MB CPU [off,1%@700,2%@900,off] GR3D_FREQ 5%@[300,400] PMIC@100C cpu@40.5C/41C CV0@-256C Tboard@-5C"
    assert tegrastats(f"{line} VDD_IN 7mW/9mW VIN_SYS_5V0 3mW/3mW") == {
        "ram_mb": 10,
        "ram_total_mb": 20,
        "mhz": 900,
        "gpu_pct": 5,
        "gpu_mhz": 400,
        "celsius": 40.5,
        "zones_celsius": {"cpu": 40.5, "tboard": -5},
        "power_mw": 7,
    }


@pytest.mark.parametrize("line", ["", "CPU [off,off]", "PMIC@100C", "VIN_SYS_5V0 5500mW/5500mW", "GR3D_FREQ"])
def test_tegrastats_without_values(line):
    assert tegrastats(line) == {}


# -------------------------------------------------------------------- adb


def test_adb_devices_sample():
    assert adb_devices(sample("adb_devices_l.txt")) == [
        Phone("R5CT31ABCDE", "device", "SM_S918N", "dm3qksx", "dm3q"),
        Phone("192.168.0.23:5555", "device", "Pixel_8_Pro", "husky", "husky"),
        Phone("ZY22H7KQ9P", "unauthorized"),
        Phone("adb-3A241FDJH000GR-vWgJpq._adb-tls-connect._tcp", "device", "Pixel_8", "shiba", "shiba"),
        Phone("a0737173", "device", "MI_8", "dipper", "dipper"),
        Phone("49281FDAQ0011J", "device", "Pixel_9", "tokay", "tokay"),
        Phone("emulator-5554", "offline"),
    ]


def test_adb_devices():
    text = (
        "adb server version (39) doesn't match this client (41); killing...\n"
        "* daemon started successfully\nList of devices attached\n"
        "adb-R5-x (2)._adb-tls-connect._tcp device product:a model:b:c device:d\r\n"
        "????????????  no permissions (missing udev rules?); see [http://developer.android.com/x] usb:1-1\n"
        "one\tdevice\n\n"
    )
    phones = adb_devices(text)
    assert phones == [
        Phone("adb-R5-x (2)._adb-tls-connect._tcp", "device", "b:c", "a", "d"),
        Phone("????????????", "no permissions"),
        Phone("one", "device"),
    ]
    assert [phone.usable for phone in phones] == [True, False, True]
    assert adb_devices("error: device offline\n") == []


def test_getprop_samples():
    television = getprop(sample("adb_getprop.txt"))
    assert len(television) == 13
    assert television["ro.build.date"] == "Wed Apr  8 16:03:56 CST 2020"
    assert television["ro.board.platform"] == "bigfish"
    assert getprop(sample("adb_getprop_skia_pixel3a.txt")) == {
        "ro.product.manufacturer": "Google",
        "ro.product.model": "Pixel 3a",
        "ro.build.id": "QQ2A.200305.002",
        "ro.product.brand": "google",
        "ro.build.type": "user",
        "ro.product.device": "sargo",
        "ro.build.product": "sargo",
        "ro.product.system.brand": "google",
    }


def test_getprop():
    text = "[a.b]: [x [y]: z]\r\n[empty]: []\n[many]: [lines\nare left]\nwarning: [c]: [d]\n[e]: [f]\n"
    assert getprop(text) == {"a.b": "x [y]: z", "empty": "", "e": "f"}


def test_battery():
    assert battery(BATTERY) == {"battery_pct": 84, "battery_celsius": 32.6, "powered": True, "charging": True}
    unplugged = BATTERY.replace("true", "false").replace("status: 2", "status: 3").replace("326", "-12")
    assert battery(unplugged) == {"battery_pct": 84, "battery_celsius": -1.2, "powered": False, "charging": False}
    assert battery("level: 7\nscale: 0\n") == {}


def test_thermal():
    assert thermal(THERMAL) == {
        "thermal_status": 2,
        "celsius": 25.6,
        "zones_celsius": {"AP": 25.6, "skin, front": -3.5},
    }
    cached, _, _ = THERMAL.partition("HAL Ready")
    assert thermal(cached) == {"thermal_status": 2, "celsius": 55.5, "zones_celsius": {"AP": 55.5, "BAT": 23.8}}
    assert thermal("Thermal Status: 9\n") == {}


# -------------------------------------------------------------------- garbage


@pytest.mark.parametrize("read", [tegrastats, adb_devices, getprop, battery, thermal])
def test_garbage_gives_nothing_else(read):
    good = f"{THERMAL}{BATTERY}List of devices attached\na device model:b\n[c]: [d]\nCPU [1%@700] cpu@40C VDD_IN 7/9\n"
    rng = random.Random(0)
    assert not read("")
    for _ in range(300):
        at, length = rng.randrange(len(good)), rng.randrange(40)
        read(good[:at] + "".join(rng.choices("9:@[]{}=,.%\0\n ²é\U0001f4f1", k=length)) + good[at + length :])
    long = "9" * 5000  # more digits than Python reads
    read(re.sub(r"\d+", long, good))
    read(good * 200)


@pytest.mark.parametrize(
    ("read", "text"),
    [
        (tegrastats, "CPU [" * 50_000),
        (adb_devices, "List of devices attached\nx" + " " * 50_000 + "y"),
        (getprop, "[a]: [" * 50_000),
        (battery, ":" * 50_000),
        (thermal, "Temperature{mValue=1, mType=1, mName=" * 5_000),
    ],
)
@pytest.mark.timeout(5)
def test_long_garbage_is_read_in_no_time(read, text):
    assert not read(text)
