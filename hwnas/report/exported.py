"""The bundles in a run's exports folder, by what their manifests say; their other files are not looked at."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from hwnas.bundles.load import manifest_bytes
from hwnas.bundles.manifest import MANIFEST, Manifest, read_manifest
from hwnas.errors import ExportError, InputError
from hwnas.space import Architecture


def exported(folder: Path) -> Iterator[tuple[str, tuple[Manifest, Architecture] | str]]:
    """Folders and zip files in order of their names: each with what it holds, or what is wrong with it."""
    for path in sorted(folder.glob("*")):
        if (path / MANIFEST).is_file() or (path.suffix == ".zip" and path.is_file()):
            try:
                manifest = read_manifest(manifest_bytes(path), str(path))
                source = f"{path}: {MANIFEST}: architecture"
                yield path.name, (manifest, Architecture.from_dict(manifest.architecture, source))
            except (ExportError, InputError) as error:
                yield path.name, str(error).removeprefix(f"{path}: ")
