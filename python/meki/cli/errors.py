"""What every command line does alike: exit codes, and one line for an error."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable

from ..package import ModelNotFoundError

USAGE, FAILURE, INTERRUPTED, PIPE_CLOSED = 2, 1, 130, 141


def report(program: str, kind: str, message: object) -> None:
    """One line on stderr, whatever line breaks the message has."""
    print(f"{program}: {kind}: {' '.join(str(message).split())}", file=sys.stderr, flush=True)


def run_command(program: str, command: Callable[[], None], extras: str = "") -> int:
    """Runs `command` and returns the exit code of the process; reports expected errors on stderr. extras: of the
    distribution, such as "[models]", that have what the command imports."""
    if sys.stdout is None:  # `>&-`
        report(program, "error", "standard output is closed; open or redirect it")
        return FAILURE
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a character shows a question mark
    try:
        command()
        sys.stdout.flush()
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # The reader has left (`| head`). What is still buffered must not fail again when the interpreter exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
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
    return 0
