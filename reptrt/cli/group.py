"""The group of all commands: how failures are printed, and what is logged."""

import logging
import os
from collections.abc import Callable
from typing import Any

import click

from reptrt import __version__
from reptrt.core.errors import ReptrtError, flag_of

_INTERRUPTED = 130  # what a shell gives for a process that SIGINT ended


class Cli(click.Group):
    """A group that prints a stated failure, or that it was stopped, as one line."""

    def invoke(self, ctx: click.Context) -> Any:
        """Run a command."""
        try:
            return super().invoke(ctx)
        except ReptrtError as err:
            click.echo(f"error: {' '.join(err.on_cli(_flag_in(self, ctx)).split())}", err=True)
            ctx.exit(1)
        except MemoryError as err:
            click.echo(f"error: not enough memory ({' '.join(str(err).split())})", err=True)
            ctx.exit(1)
        except RuntimeError as err:
            if type(err).__name__ != "OutOfMemoryError":  # torch's, which may not be loaded
                raise
            click.echo(
                "error: the memory of the device is used up; end other programs that use it, or "
                "give --device cpu",
                err=True,
            )
            ctx.exit(1)
        except KeyboardInterrupt:
            click.echo("Aborted! No file is half-written.", err=True)
            ctx.exit(_INTERRUPTED)


def _flag_in(group: click.Group, ctx: click.Context) -> Callable[[str], str]:
    """Return a function from a parameter's name to its flag in the command that was called."""
    called = group.commands.get(ctx.invoked_subcommand or "")
    options = [p for p in called.params if isinstance(p, click.Option)] if called else []
    flags = {option.name: max(option.opts, key=len) for option in options}
    return lambda name: flags.get(name) or flag_of(name)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__)
@click.option("-v", "--verbose", is_flag=True, help="Log progress in detail, to stderr.")
def main(verbose: bool) -> None:
    """Re-parameterized CNNs from a PyTorch checkpoint to an accurate INT8 TensorRT engine.

    One command per stage: export -> calibrate -> build-engine -> eval, bench. `reptrt run` does
    them all.
    """
    # Threads that spin while they wait multiply the time on cores that are shared with other work.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger = logging.getLogger("reptrt")
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if verbose else logging.WARNING)
    # What takes long is announced before it starts; the result of each unit needs -v.
    announced = ("quantize.reconstruct", "quantize.calib.sensitivity", "search", "sweeping")
    for name in (f"reptrt.{room}" for room in announced):
        logging.getLogger(name).setLevel(logging.DEBUG if verbose else logging.INFO)
