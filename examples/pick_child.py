"""The child for a new device, in a deployment script: measured if the device is at hand, else predicted and said so."""

import sys

import hwnas


def pick(run: str, device: str, ms: float) -> hwnas.Candidate:
    """The most accurate child under a latency limit; what was evaluated for other devices is not evaluated again."""
    result = hwnas.search(hwnas.LatencyLimit(device, ms), run, evaluations=20, baseline=False, notice=print)
    latency = result.best.latency[device]
    how = "measured" if result.measured else f"predicted to {result.devices[device].error_pct:.0f}%"
    print(
        f"{device}: {result.best.accuracy:.2%}, {latency.value:.3g} ms ({how}): {result.best.architecture.describe()}"
    )
    return result.best


if __name__ == "__main__":
    pick(sys.argv[1], sys.argv[2], float(sys.argv[3]))
