"""The command lines and the streams they are given: closed, full, in another encoding, and Ctrl-C."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

COMMANDS = ["run", "info", "bench", "eval", "convert", "compile"]
CALL = "import sys; from meki.cli import commands; sys.exit(commands."
ONE_LINE = ["--seed", "7", "--max-new-tokens", "12", "--temperature", "0"]


def python(*arguments: str, redirect: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    """Runs Python under a shell that redirects its streams, as in 2>&-."""
    shell = ["sh", "-c", f'exec "$@" {redirect}', "sh", sys.executable, *arguments]
    return subprocess.run(shell, capture_output=True, text=True, timeout=120, **options)  # type: ignore[call-overload]


def run(package: Path, *arguments: str, redirect: str = "", **options: object) -> subprocess.CompletedProcess[str]:
    command = ("-c", CALL + "run())", "--model", str(package), "--threads", "1", *ONE_LINE, *arguments)
    return python(*command, redirect=redirect, **options)


@pytest.fixture(scope="module")
def text(package: Path) -> str:
    return run(package, "The fox").stdout


@pytest.mark.parametrize("arguments", [["--interactive"], ["--chat", "--interactive"], [], ["-"], ["--file", "-"]])
def test_standard_input_is_closed(package: Path, arguments: list[str]) -> None:
    done = run(package, *arguments, redirect="<&-")
    assert (done.returncode, done.stdout, done.stderr.count("\n")) == (2, "", 1)
    assert done.stderr.startswith("meki-run: error: ") and "closed" in done.stderr


@pytest.mark.parametrize("redirect", ["2>&-", "2>/dev/full", "2>&- <&-"])
def test_nobody_hears_what_is_said(package: Path, text: str, redirect: str) -> None:
    """Neither does it go elsewhere, nor does the text fail for it."""
    done = run(package, "--stats", "The fox", redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (0, text, "")


@pytest.mark.parametrize(
    ("command", "redirect"), [*((command, "2>&-") for command in COMMANDS), ("run", "2>/dev/full")]
)
def test_an_error_that_nobody_hears(command: str, redirect: str) -> None:
    done = python("-c", CALL + command + "())", "--no-such-option", redirect=redirect)
    assert (done.returncode, done.stdout, done.stderr) == (2, "", "")


@pytest.mark.parametrize(("command", "redirect"), [*((command, ">/dev/full") for command in COMMANDS), ("run", ">&-")])
def test_nobody_takes_the_output(command: str, redirect: str) -> None:
    done = python("-c", CALL + command + "())", "--help", redirect=redirect)
    assert (done.returncode, done.stderr.count("\n")) == (1, 1)
    assert ": error: " in done.stderr


def test_a_text_that_nobody_takes(package: Path) -> None:
    done = run(package, "The fox", redirect=">/dev/full")
    assert done.returncode == 1
    assert done.stderr.endswith("meki-run: error: [Errno 28] No space left on device\n")


@pytest.mark.parametrize("redirect", ["<&-", "2>&-", "<&- 2>&-"])
def test_no_file_is_taken_for_a_standard_stream(redirect: str) -> None:
    code = "import os; from meki.cli.errors import run_command\n"
    code += "run_command('x', lambda: print(os.open(os.devnull, os.O_RDONLY)))"
    assert int(python("-c", code, redirect=redirect).stdout) > 2


def test_another_encoding(package: Path) -> None:
    """A prompt is UTF-8, whatever the locale is; what the output cannot show is a question mark."""
    expected = run(package, "Thé fox").stdout
    for arguments in ([], ["--interactive"]):
        for environment in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0"}):
            done = run(package, *arguments, input="Thé fox\n", env={**os.environ, **environment})
            assert (done.returncode, done.stdout) == (0, expected.encode("ascii", "replace").decode())


INTERRUPTED = """\
import importlib.abc, os, signal, sys
class Interrupting(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name == "meki._core":
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Interrupting())
signal.signal(signal.SIGINT, signal.default_int_handler)
from meki.cli import commands
commands.COMMAND()
"""


@pytest.mark.parametrize("command", COMMANDS)
def test_ctrl_c_while_a_command_loads(command: str) -> None:
    done = python("-c", INTERRUPTED.replace("COMMAND", command))
    assert (done.returncode, done.stdout, done.stderr) == (-signal.SIGINT, "", "")


def test_ctrl_c_is_ignored_where_it_was() -> None:
    ignoring = INTERRUPTED.replace("signal.default_int_handler", "signal.SIG_IGN").replace("COMMAND", "info")
    assert python("-c", ignoring, "meki-tiny").returncode == 0
