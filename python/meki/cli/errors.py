"""What every command line does alike: its standard streams, exit codes, and one line for an error."""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections.abc import Callable
from typing import TextIO

from ..package import ModelNotFoundError

USAGE, FAILURE, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


def note(text: str) -> None:
    """Writes to stderr; no command fails for want of somebody who listens there."""
    with contextlib.suppress(OSError):
        print(text, file=sys.stderr, flush=True)


def report(program: str, kind: str, message: object) -> None:
    """One line on stderr, whatever line breaks the message has."""
    note(f"{program}: {kind}: {' '.join(str(message).split())}")


def run_command(program: str, command: Callable[[], None], extras: str = "") -> int:
    """Runs `command`, which parses its arguments first, and returns the exit code of the process; reports expected
    errors on stderr. extras: of the distribution, such as "[models]", that have what the command imports."""
    _open_closed_streams()
    if sys.stdout is None:  # `>&-`
        report(program, "error", "standard output is closed; open or redirect it")
        return FAILURE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    silent = signal.getsignal(signal.SIGINT) is signal.SIG_DFL  # as the installed commands begin
    try:
        if silent:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:  # the reader has left (`| head`)
        return PIPE_CLOSED
    except (ModelNotFoundError, ValueError) as error:
        report(program, "error", error)
        return USAGE
    except ModuleNotFoundError as error:
        remedy = f"install what {program} needs: pip install 'meki{extras}'"
        report(program, "error", f"the Python package {error.name!r} is missing; {remedy}")
        return FAILURE
    except (OSError, RuntimeError, ImportError, MemoryError) as error:
        report(program, "error", str(error) or type(error).__name__)
        return FAILURE
    finally:
        if silent:
            signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C, or one while the interpreter ends
        for stream in (sys.stdout, sys.stderr):
            _empty(stream)
    return 0


def _open_closed_streams() -> None:
    """Leads those of the descriptors 0 to 2 that are closed to nowhere: the next file that is opened would get such a
    number, and what a library prints. `print` takes stdout for a stderr of None."""
    while (descriptor := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    if sys.stderr is None:
        sys.stderr = open(os.devnull, "w")  # noqa: SIM115 (as long as the process lives)


def _empty(stream: TextIO | None) -> None:
    """Writes what is buffered, or drops it: the interpreter fails at exit for what it cannot write then."""
    if stream is None:
        return
    try:
        stream.flush()
    except OSError:
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)
