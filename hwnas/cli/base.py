"""What all commands share: the group, common options, and how they end."""

from __future__ import annotations

import json
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import click

from hwnas.errors import InputError, printable

if TYPE_CHECKING:
    from rich.table import Table

# Under torchrun, which takes --run for an abbreviation of its own --run-path, the long form is needed.
RUN = click.option("--run", "--run-folder", "run", metavar="FOLDER", help="Run folder [default: $HWNAS_RUN, or ./run].")
JSON = click.option("--json", "as_json", is_flag=True, help="One JSON document on stdout.")
DEVICE = click.option("--device", metavar="NAME", required=True, help="A device's name or file: see `hwnas devices`.")
SEED = click.option("--seed", default=0, show_default=True, type=click.IntRange(min=0), help="Seed of all chance.")


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(package_name="hwnas")
def cli() -> None:
    """One training run, the right network for every device."""


def command(*options: Callable[..., Any], group: click.Group = cli) -> Callable[[Callable[..., Any]], click.Command]:
    """A command with some options."""

    def decorate(function: Callable[..., Any]) -> click.Command:
        for option in reversed(options):
            function = option(function)
        return group.command()(function)

    return decorate


def notice(text: str) -> None:
    """Tell the user, beside the result."""
    click.echo(printable(text), err=True)


def finish(as_json: bool, document: dict[str, Any], *show: Table | str) -> None:
    """The end of a command: the document, or the tables and lines for people."""
    if as_json:
        click.echo(json.dumps(document, indent=2))
        return
    from rich.console import Console

    # In a file or a pipe nothing is wrapped; a terminal folds what is too wide for it.
    console = Console(highlight=False, width=None if sys.stdout.isatty() else 200)
    for item in show:
        console.print(item, soft_wrap=isinstance(item, str), markup=False)


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]]) -> Table:
    """A table for people; numbers to the right."""
    from rich import box
    from rich.table import Table

    made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    for index, name in enumerate(columns):
        numbers = all(re.fullmatch(r"[-\d.,%±\s]*", str(row[index])) for row in rows)
        made.add_column(name, justify="right" if numbers else "left", overflow="fold")
    for row in rows:
        made.add_row(*(f"{cell:,}" if isinstance(cell, int) else str(cell) for cell in row))
    return made


def next_line(verb: str, run: object, *words: str) -> str:
    """The command to run next, ready to paste."""
    from hwnas.run import DEFAULT

    where = [] if str(run) == DEFAULT else ["--run", str(run)]
    return "next: " + shlex.join(["hwnas", verb, *where, *words])


def parse_changes(pairs: Sequence[str], config: str | None) -> dict[str, Any]:
    """`("train.lr=0.1",)`, and a YAML file of the same keys, as a dict; a pair overrides the file."""
    import yaml

    from hwnas.config import read_yaml

    changes: dict[str, Any] = {}
    if config is not None:
        from pathlib import Path

        content, _ = read_yaml(Path(config))
        if not isinstance(content, dict) or not all(isinstance(part, dict) for part in content.values()):
            raise InputError(f"{config}: a configuration has the keys train, data and space, each with keys below it")
        changes = {f"{part}.{key}": value for part, keys in content.items() for key, value in keys.items()}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals:
            raise InputError(f"-o {pair}: write key=value, such as -o train.lr=0.1")
        try:
            changes[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            raise InputError(f"-o {pair}: the value is not YAML") from None
    return changes
