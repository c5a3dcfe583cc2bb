"""The command line: a table of commands, each a thin layer over a function of `hwnas.api`.

Every command takes `--json` (one document on stdout, everything else on stderr) and ends with what it made and the
next command to run. Exit codes: 0 done, 1 bug, 2 wrong input, 3 limit not satisfiable, 4 device unavailable,
5 export failed its parity check.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

import click

# Each module adds its commands to the group.
from hwnas.cli import catalogue as catalogue
from hwnas.cli import costs as costs
from hwnas.cli import exporting as exporting
from hwnas.cli import profiling as profiling
from hwnas.cli import reporting as reporting
from hwnas.cli import searching as searching
from hwnas.cli import training as training
from hwnas.cli.base import cli as cli
from hwnas.cli.base import finish as finish
from hwnas.cli.base import notice
from hwnas.cli.base import table as table
from hwnas.cli.limits import limit_options as limit_options
from hwnas.errors import HwnasError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; the exit code."""
    try:
        cli.main(args=None if arguments is None else list(arguments), prog_name="hwnas", standalone_mode=False)
    except click.exceptions.Abort:
        return 130
    except click.exceptions.Exit as stop:
        return stop.exit_code
    except click.ClickException as error:
        click.echo(f"hwnas: {error.format_message()}".replace("\n", " "), err=True)
        return 2
    except HwnasError as error:
        notice(f"hwnas: {error}")
        return error.exit_code
    except KeyboardInterrupt:
        click.echo("hwnas: interrupted: the same command goes on from here", err=True)
        return 130
    except BrokenPipeError:
        sys.stderr.close()
        return 0
    return 0
