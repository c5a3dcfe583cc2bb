"""The bundles in a run's exports folder, by what their manifests say; their other files are not looked at."""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

from hwnas.bundles.load import MANIFEST_BYTES
from hwnas.bundles.manifest import MANIFEST, Manifest, read_manifest
from hwnas.errors import ExportError, InputError
from hwnas.space import Architecture


def exported(folder: Path) -> Iterator[tuple[str, tuple[Manifest, Architecture] | str]]:
    """Folders and zip files in order of their names: each with what it holds, or what is wrong with it."""
    for path in sorted(folder.glob("*")):
        if (path / MANIFEST).is_file() or (path.suffix == ".zip" and path.is_file()):
            try:
                manifest = read_manifest(_content(path), path.name)
                source = f"{path.name}: {MANIFEST}: architecture"
                yield path.name, (manifest, Architecture.from_dict(manifest.architecture, source))
            except (ExportError, InputError) as error:
                yield path.name, str(error).removeprefix(f"{path.name}: ")


def _content(path: Path) -> bytes:
    """Of a bundle's manifest.

    Raises:
        ExportError: it cannot be read, or is too long.
    """
    try:
        if path.is_dir():
            with (path / MANIFEST).open("rb") as file:
                content = file.read(MANIFEST_BYTES + 1)
        else:
            with zipfile.ZipFile(path) as packed:
                member = packed.getinfo(MANIFEST)
                if member.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError("packed in a way whose size zipfile cannot limit")
                with packed.open(member) as unpacked:
                    content = unpacked.read(MANIFEST_BYTES + 1)
    except Exception as error:  # what zipfile and its decoders raise on damaged files is not documented
        raise ExportError(f"{path.name}: {MANIFEST} cannot be read ({error}): export it again") from None
    if len(content) > MANIFEST_BYTES:
        raise ExportError(f"{path.name}: {MANIFEST} has more than {MANIFEST_BYTES:,} bytes: export it again")
    return content
