"""From one training run to the right network for every device.

The public names load on first use: `import hwnas` and `hwnas --help` stay fast and free of torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING

__version__ = "0.1.0"

# Where each public name lives. The block below repeats it for type checkers; a test holds the two together.
_MODULES = {
    "Architecture": "hwnas.space",
    "Block": "hwnas.space",
    "Candidate": "hwnas.searching.result",
    "DeviceError": "hwnas.errors",
    "EnergyLimit": "hwnas.searching.limits",
    "Estimate": "hwnas.searching.result",
    "ExportError": "hwnas.errors",
    "InputError": "hwnas.errors",
    "LatencyLimit": "hwnas.searching.limits",
    "LatencyPredictor": "hwnas.predictors",
    "Layer": "hwnas.layers",
    "LimitError": "hwnas.errors",
    "MacsLimit": "hwnas.searching.limits",
    "Measurement": "hwnas.measurement",
    "MemoryLimit": "hwnas.searching.limits",
    "Network": "hwnas.network",
    "ParamsLimit": "hwnas.searching.limits",
    "Plan": "hwnas.training.plan",
    "Portfolio": "hwnas.searching.portfolio",
    "Profile": "hwnas.api",
    "Result": "hwnas.searching.result",
    "Run": "hwnas.run",
    "SearchSpace": "hwnas.space",
    "SizeLimit": "hwnas.searching.limits",
    "Stage": "hwnas.space",
    "Supernet": "hwnas.supernet",
    "Timing": "hwnas.devices.base",
    "TrainConfig": "hwnas.training.recipes",
    "add_device": "hwnas.api",
    "check_device": "hwnas.api",
    "cost": "hwnas.api",
    "export": "hwnas.api",
    "export_all": "hwnas.api",
    "fit": "hwnas.api",
    "load_bundle": "hwnas.bundles.load",
    "lower": "hwnas.layers",
    "make_predictor": "hwnas.predictors",
    "plan": "hwnas.api",
    "predict": "hwnas.api",
    "profile": "hwnas.api",
    "profile_all": "hwnas.api",
    "remove_device": "hwnas.api",
    "search": "hwnas.api",
    "search_all": "hwnas.api",
    "train": "hwnas.api",
    "verify": "hwnas.api",
}

__all__ = ["__version__", *_MODULES]

if TYPE_CHECKING:
    from hwnas.api import Profile as Profile
    from hwnas.api import add_device as add_device
    from hwnas.api import check_device as check_device
    from hwnas.api import cost as cost
    from hwnas.api import export as export
    from hwnas.api import export_all as export_all
    from hwnas.api import fit as fit
    from hwnas.api import plan as plan
    from hwnas.api import predict as predict
    from hwnas.api import profile as profile
    from hwnas.api import profile_all as profile_all
    from hwnas.api import remove_device as remove_device
    from hwnas.api import search as search
    from hwnas.api import search_all as search_all
    from hwnas.api import train as train
    from hwnas.api import verify as verify
    from hwnas.bundles.load import load_bundle as load_bundle
    from hwnas.devices.base import Timing as Timing
    from hwnas.errors import DeviceError as DeviceError
    from hwnas.errors import ExportError as ExportError
    from hwnas.errors import InputError as InputError
    from hwnas.errors import LimitError as LimitError
    from hwnas.layers import Layer as Layer
    from hwnas.layers import lower as lower
    from hwnas.measurement import Measurement as Measurement
    from hwnas.network import Network as Network
    from hwnas.predictors import LatencyPredictor as LatencyPredictor
    from hwnas.predictors import make_predictor as make_predictor
    from hwnas.run import Run as Run
    from hwnas.searching.limits import EnergyLimit as EnergyLimit
    from hwnas.searching.limits import LatencyLimit as LatencyLimit
    from hwnas.searching.limits import MacsLimit as MacsLimit
    from hwnas.searching.limits import MemoryLimit as MemoryLimit
    from hwnas.searching.limits import ParamsLimit as ParamsLimit
    from hwnas.searching.limits import SizeLimit as SizeLimit
    from hwnas.searching.portfolio import Portfolio as Portfolio
    from hwnas.searching.result import Candidate as Candidate
    from hwnas.searching.result import Estimate as Estimate
    from hwnas.searching.result import Result as Result
    from hwnas.space import Architecture as Architecture
    from hwnas.space import Block as Block
    from hwnas.space import SearchSpace as SearchSpace
    from hwnas.space import Stage as Stage
    from hwnas.supernet import Supernet as Supernet
    from hwnas.training.plan import Plan as Plan
    from hwnas.training.recipes import TrainConfig as TrainConfig
else:  # hidden from type checkers, which would take it to mean that hwnas has any attribute

    def __getattr__(name):
        if name not in _MODULES:
            raise AttributeError(f"module 'hwnas' has no attribute {name!r}")
        return getattr(import_module(_MODULES[name]), name)

    def __dir__():
        return sorted({*globals(), *__all__})
