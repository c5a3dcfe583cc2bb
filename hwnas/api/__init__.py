"""The verbs: what the commands of `hwnas` do, as functions, one module for what belongs together.

Each works on a run folder and finds there what the one before left. Heavy packages load when a verb needs them.
"""

from hwnas.api.catalogue import add_device as add_device
from hwnas.api.catalogue import check_device as check_device
from hwnas.api.catalogue import devices as devices
from hwnas.api.catalogue import remove_device as remove_device
from hwnas.api.catalogue import show_device as show_device
from hwnas.api.costs import cost as cost
from hwnas.api.costs import read_architecture as read_architecture
from hwnas.api.costs import space_report as space_report
from hwnas.api.data import inspect_data as inspect_data
from hwnas.api.data import load_data as load_data
from hwnas.api.evaluating import accuracy as accuracy
from hwnas.api.exporting import export as export
from hwnas.api.exporting import export_all as export_all
from hwnas.api.exporting import last_results as last_results
from hwnas.api.exporting import verify as verify
from hwnas.api.profiling import Profile as Profile
from hwnas.api.profiling import fit as fit
from hwnas.api.profiling import predict as predict
from hwnas.api.profiling import profile as profile
from hwnas.api.profiling import profile_all as profile_all
from hwnas.api.reporting import dashboard as dashboard
from hwnas.api.reporting import report as report
from hwnas.api.searching import result_name as result_name
from hwnas.api.searching import search as search
from hwnas.api.searching import search_all as search_all
from hwnas.api.training import plan as plan
from hwnas.api.training import train as train
