"""`hwnas search`."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from hwnas import __version__
from hwnas.api.catalogue import open_device
from hwnas.api.evaluating import open_evaluator
from hwnas.api.profiling import last_measurements
from hwnas.devices import device_name
from hwnas.files import write_text
from hwnas.measuring.measure import measure
from hwnas.progress import Notice, Report, silent, unheard
from hwnas.run import Run

if TYPE_CHECKING:
    from hwnas.data.torch_dataset import TorchDatasets
    from hwnas.searching.result import Result


def search(
    device: str,
    latency_ms: float,
    run: str | Path | None = None,
    *,
    evaluations: int = 100,
    confidence: float = 0.95,
    baseline: bool = True,
    data: TorchDatasets | None = None,
    seed: int = 0,
    report: Report = silent,
    notice: Notice = unheard,
) -> Result:
    """Find the most accurate child that keeps a latency limit on a device. Saved as `results/<device>-<limit>ms.json`.

    Accuracies are on the validation images. What an earlier search evaluated or measured is not worked out again.

    Args:
        device: a device with a predictor in the run.
        latency_ms: the limit, milliseconds.
        run: the run folder.
        evaluations: children to evaluate.
        confidence: with which a child that was not measured has to keep the limit.
        baseline: whether to run random search with as many evaluations beside it.
        data: what the run was trained on, if that was a dataset of PyTorch.
        seed: of all chance.
        report: told the progress.
        notice: told what a user should know.

    Raises:
        InputError: bad numbers, no trained supernet, no predictor.
        LimitError: no child keeps the limit.
        DeviceError: the device cannot be used.
    """
    from hwnas.searching.searcher import Searcher
    from hwnas.searching.strategies import Scored

    opened = Run(run)
    predictor = opened.predictor(device_name(device))
    with opened.store() as store, open_device(device, opened) as target:
        evaluator = open_evaluator(opened, notice, data)
        bench = partial(measure, space=opened.space, device=target, timing=target.timing, store=store)
        searcher = Searcher(
            opened.space,
            predictor,
            device=target.name,
            limit_ms=latency_ms,
            confidence=confidence,
            evaluate=lambda archs: evaluator.accuracies(archs, store),
            measure=partial(bench, role="finalist"),
            measurements=[m for m in last_measurements(target.name, target.timing, store, "fit") if m.trusted],
            storage_url=opened.storage_url,
            known=lambda: [
                Scored(arch, accuracy)
                for arch, accuracy in evaluator.known(store)
                if arch.resolution in opened.space.resolution
            ],
            seed=seed,
            notice=notice,
        )
        result = searcher.run(evaluations, baseline=baseline, report=report)
    document = {**result.to_dict(), "weights": evaluator.supernet.identity(), "hwnas": __version__}
    write_text(opened.result_path(f"{target.name}-{latency_ms:g}ms"), json.dumps(document, indent=2) + "\n")
    return result
