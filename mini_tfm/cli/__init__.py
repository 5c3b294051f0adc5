"""The command line, `mini-tfm`: one file per command, imported when it is needed.

    train.py             text files -> a model folder: the options
      -> training.py     the run: new or resumed, its progress and result
      -> training_data.py   its data
    demo.py compare.py   memories side by side (../compare/)
      -> results.py      shared by the two: options, the results folder, the table
    average.py convert.py quantize.py    averages models of a run; writes a model in another layout; packed in int8 or bfloat16
    generate.py chat.py score.py embed.py read.py    commands that use a saved model
      -> already_read.py     what a memory on disk has read
    plugins.py info.py   installed memories; versions, kernels, a model folder
    options.py           the fields of an options class as options of a command
    shared.py            for all commands: options, tables, JSON, files, Ctrl-C

All commands behave alike. Results go to standard output, everything else to standard error. An error is one line and
exit code 2 (`MINI_TFM_DEBUG=1` adds the traceback), Ctrl-C is 130, a closed pipe 141. Before a command runs, only click is
imported, so that `--help` is quick.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import warnings
from importlib import import_module
from typing import Any

import click

from .. import __version__

COMMANDS = ("demo", "train", "average", "generate", "chat", "score", "embed", "read", "compare", "convert", "quantize", "plugins", "info")
INTERRUPTED = 128 + signal.SIGINT
PIPE_CLOSED = 128 + getattr(signal, "SIGPIPE", 13)


class CommandLine(click.Group):
    """A group whose commands are modules of this package; it turns every error into one line."""

    def list_commands(self, context: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, context: click.Context, name: str) -> click.Command | None:
        return getattr(import_module("." + name, __name__), name) if name in COMMANDS else None

    def resolve_command(self, context: click.Context, args: list[str]) -> Any:
        import difflib

        is_known = args[0] in COMMANDS or context.resilient_parsing  # the latter: a shell completes the line
        if not is_known and (near := difflib.get_close_matches(args[0], COMMANDS, 1)):
            context.fail(f"No such command {args[0]!r}. Did you mean {near[0]!r}?")
        return super().resolve_command(context, args)

    def main(self, *args: Any, **more: Any) -> Any:
        _open_closed_streams()
        return super().main(*args, **more)

    def make_context(self, *args: Any, **more: Any) -> click.Context:
        """`--help` is printed here, and may meet a closed pipe, too."""
        try:
            return super().make_context(*args, **more)
        except KeyboardInterrupt:
            _say("stopped")
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            _nobody_reads()
            sys.exit(PIPE_CLOSED)
        except OSError as error:
            _say(f"error: {error}")
            _nobody_reads()
            sys.exit(2)

    def invoke(self, context: click.Context) -> Any:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("default", UserWarning)
                warnings.showwarning = _one_line
                _never_fail_at_a_letter()
                result = super().invoke(context)
                sys.stdout.flush()
                return result
        except KeyboardInterrupt as stop:
            _say(("\n" if sys.stderr.isatty() else "") + f"stopped: {str(stop) or 'nothing was left half done'}")
            context.exit(INTERRUPTED)
        except BrokenPipeError:
            _nobody_reads()
            context.exit(PIPE_CLOSED)
        except Exception as error:
            from ..errors import MiniTfmError

            if not isinstance(error, MiniTfmError | OSError | MemoryError):
                raise  # a bug: the traceback is needed
            if os.environ.get("MINI_TFM_DEBUG") == "1":
                import traceback

                traceback.print_exc()
            message = str(error) or ("not enough memory" if isinstance(error, MemoryError) else type(error).__name__)
            _say("error: " + " ".join(message.splitlines()))
            if isinstance(error, OSError) and not isinstance(error, MiniTfmError):
                _nobody_reads()  # it may be the output that failed, on a full disk
            context.exit(2)


def _one_line(message: Warning | str, *place: Any, **more: Any) -> None:
    _say("warning: " + " ".join(str(message).splitlines()))


def _say(line: str) -> None:
    """A line on standard error, if anybody listens: work is not lost because nobody does."""
    with contextlib.suppress(OSError):
        click.echo(line, err=True)


def _open_closed_streams() -> None:
    """A standard stream that is closed (`>&-`) becomes the null device, or the next file that is opened would be written to as if it
    were the stream. `sys.stdin` stays None: see `stdin_text`."""
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # the lowest number that is free
    if sys.stdout is None:
        sys.stdout = open(1, "w", encoding="utf-8", closefd=False)  # noqa: SIM115  # until the process ends
    if sys.stderr is None:
        sys.stderr = open(2, "w", encoding="utf-8", closefd=False)  # noqa: SIM115


def _nobody_reads() -> None:
    """What Python still buffers for a stream that failed must not fail again at exit."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _never_fail_at_a_letter() -> None:
    """A terminal without Unicode shows a question mark instead of ending the command."""
    for stream in (sys.stdout, sys.stderr):
        if getattr(stream, "errors", None) == "strict" and hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


@click.command(cls=CommandLine, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(__version__, prog_name="mini-tfm", message="%(prog)s %(version)s")
def main() -> None:
    """The minimal Transformer whose memory is a plugin. Trains and runs on a CPU.

    \b
    Start with:
      mini-tfm demo --quick                train and compare the built-in memories, in minutes
      mini-tfm train --text notes/*.txt    train a model on your own text
      mini-tfm plugins new my-memory       start a memory of your own
    """
