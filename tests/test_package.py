"""The package as a whole: which module may import which, and what an import costs."""

import ast
import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from importlib.util import resolve_name
from pathlib import Path

import numpy
import pytest

import hwnas
from hwnas.machine import versions

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "hwnas"

# What each module of hwnas, or folder of modules, stands on. It may import that, what that stands on in
# turn, and nothing else. Modules of one folder may import each other.
STANDS_ON = {
    "errors": [],
    "files": [],
    "machine": [],
    "progress": ["errors"],
    "config": ["errors"],
    # what a network is
    "space": ["config"],
    "layers": ["space"],
    "network": ["layers"],
    "weights": ["errors", "files"],
    "supernet": ["network", "weights"],
    # training it
    "data": ["errors", "files", "machine"],
    "calibrate": ["network"],
    "training": ["supernet", "evaluator", "progress"],
    # measuring and predicting
    "exporters": ["network", "files"],
    "devices": ["layers", "files"],
    "measurement": ["devices"],
    "database": ["errors"],
    "store": ["measurement", "database"],
    "measuring": ["exporters", "store", "progress"],
    "predictors": ["layers", "files"],
    # searching
    "evaluator": ["supernet", "calibrate", "data", "store", "progress"],
    "searching": ["predictors", "store", "exporters", "progress"],
    # what users call
    "bundles": ["exporters", "devices", "machine"],
    "run": ["predictors", "store", "training"],
    "testing": ["measuring", "network"],
    "report": ["run", "searching", "bundles"],
    "api": ["run", "searching", "measuring", "bundles", "report"],
    "cli": ["api"],
    "__main__": ["cli"],
}

# A lab machine can fit, search, write ONNX files and run bundles without torch.
WITHOUT_TORCH = (
    "errors",
    "config",
    "space",
    "layers",
    "predictors",
    "exporters",
    "devices",
    "database",
    "store",
    "measuring",
    "run",
    "searching",
    "report",
    "bundles.load",
    "api",
)

# Importing any of these would make `hwnas --help` slow.
HEAVY = ("torch", "numpy", "sqlalchemy", "optuna", "pydantic")


def module_name(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


MODULES = {module_name(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def row(name: str) -> str:
    """The row of STANDS_ON that a name belongs to: `hwnas.devices.adb` to `devices`, `hwnas` to none (``)."""
    return name.removeprefix("hwnas").removeprefix(".").partition(".")[0]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")


def imports(module: str, path: Path) -> Iterator[tuple[int, str]]:
    """(line, name) of all that running the module imports from hwnas, in functions too."""
    package = module if path.name == "__init__.py" else module.rpartition(".")[0]
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while nodes:
        node = nodes.pop()
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = resolve_name("." * node.level + (node.module or ""), package)
            names = [f"{base}.{alias.name}" for alias in node.names]
        yield from ((node.lineno, name) for name in names if name.split(".")[0] == "hwnas")
        nodes.extend(node.orelse if is_type_checking(node) else ast.iter_child_nodes(node))


def may_import(name: str) -> set[str]:
    return {name}.union(*(may_import(below) for below in STANDS_ON[name]))


def wrong_imports(module: str, path: Path) -> list[str]:
    allowed = may_import(row(module)) if row(module) else set()
    return [
        f"{module}, line {line}, imports {name}; it may import {', '.join(sorted(allowed)) or 'nothing'}"
        for line, name in imports(module, path)
        if row(name) not in allowed and name != "hwnas.__version__"
    ]


def test_every_module_has_its_row():
    missing = sorted({row(module) for module in MODULES} - {"", *STANDS_ON})
    assert not missing, f"{missing} not in STANDS_ON in tests/test_package.py: add there what each stands on"


def test_table_has_no_cycle():
    TopologicalSorter(STANDS_ON).prepare()


@pytest.mark.parametrize("module", [module for module in MODULES if row(module) in {"", *STANDS_ON}])
def test_imports_point_one_way(module):
    wrong = wrong_imports(module, MODULES[module])
    assert not wrong, "\n".join(["against the order of STANDS_ON in tests/test_package.py:", *wrong])


@pytest.mark.parametrize(
    "code",
    [
        "import hwnas.cli",
        "from hwnas import cli",
        "from hwnas import Supernet",
        "from hwnas.cli import main",
        "from ..cli import main",
        "from .. import cli",
        "def f():\n    from hwnas.cli import main",
        "if TYPE_CHECKING:\n    import hwnas.run\nelse:\n    import hwnas.cli",
    ],
)
def test_wrong_import_is_found(tmp_path, code):
    path = tmp_path / "adb.py"
    path.write_text(code)
    assert len(wrong_imports("hwnas.devices.adb", path)) == 1


@pytest.mark.parametrize(
    "code",
    [
        "from hwnas import __version__",
        "from hwnas.devices.base import Device",
        "from .base import Device",
        "import hwnas.space",
        "if TYPE_CHECKING:\n    from hwnas.cli import main",
        "import torch",
    ],
)
def test_right_import_passes(tmp_path, code):
    path = tmp_path / "adb.py"
    path.write_text(code)
    assert wrong_imports("hwnas.devices.adb", path) == []


def loaded_by(code: str) -> set[str]:
    """Top-level modules that a fresh interpreter has loaded after running the code."""
    script = f"{code}\nimport json, sys\nprint()\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize(
    "module",
    [module for module in MODULES if any(f"{module}.".startswith(f"hwnas.{prefix}.") for prefix in WITHOUT_TORCH)],
)
def test_works_without_torch(module):
    assert "torch" not in loaded_by(f"import {module}")


HELP = """
import sys
from hwnas.cli import main
sys.argv = ["hwnas", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code, end.code
"""


@pytest.mark.parametrize(
    "code",
    [
        pytest.param("import hwnas", id="import"),
        pytest.param(HELP, id="help"),
    ],
)
def test_starts_fast(code):
    assert loaded_by(code).isdisjoint(HEAVY)


@pytest.mark.parametrize("name", hwnas._MODULES)
def test_public_name_is_importable(name):
    assert getattr(hwnas, name).__name__ == name
    assert name in dir(hwnas)


def test_type_checkers_see_the_public_names():
    tree = ast.parse((PACKAGE / "__init__.py").read_text(encoding="utf-8"))
    (block,) = [node for node in tree.body if is_type_checking(node)]
    seen = {alias.asname: node.module for node in block.body for alias in node.names}
    assert seen == hwnas._MODULES


def test_unknown_name():
    with pytest.raises(AttributeError, match="module 'hwnas' has no attribute 'nonsense'"):
        _ = hwnas.nonsense


@pytest.mark.parametrize("name", ["devices", "predictors"])
def test_links_at_the_top(name):
    assert (ROOT / name).readlink() == Path("hwnas", name)
    assert (ROOT / name / "__init__.py").is_file()


def test_versions_leave_out_what_is_not_installed():
    assert versions(["numpy", "no-package-of-this-name"]) == {
        "hwnas": hwnas.__version__,
        "python": platform.python_version(),
        "numpy": numpy.__version__,
    }
