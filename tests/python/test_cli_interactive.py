"""meki-run --interactive on a real terminal."""

from __future__ import annotations

import os
import pty
import select
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

# Makes the terminal on stdin the controlling one of this new session, so that its Ctrl-C reaches the process.
# What runs in the background has Ctrl-C ignored: hence the handler.
LAUNCH = (
    "import fcntl, signal, sys, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0);"
    "signal.signal(signal.SIGINT, signal.default_int_handler);"
    "from meki.cli.run import main; sys.exit(main(sys.argv[1:]))"
)
CTRL_C, CTRL_D = b"\x03", b"\x04"


class Terminal:
    """The user's side: writes keys, waits for what appears."""

    def __init__(self, process: subprocess.Popen[bytes], descriptor: int) -> None:
        self.process = process
        self.descriptor = descriptor
        self.screen = b""

    def press(self, keys: bytes) -> None:
        self.screen = b""
        os.write(self.descriptor, keys)

    def wait_for(self, condition: Callable[[bytes], bool], again: bytes = b"") -> None:
        """`again`: keys that are pressed once more as long as nothing happens."""
        deadline = time.monotonic() + 60  # only a hang ever comes this far
        while not condition(self.screen):
            ready, _, _ = select.select([self.descriptor], [], [], 1.0)
            if ready:
                self.screen += os.read(self.descriptor, 65536)
            elif time.monotonic() > deadline:
                pytest.fail(f"the terminal shows only {self.screen!r}")
            else:
                os.write(self.descriptor, again)

    def wait_for_prompt(self) -> None:
        self.wait_for(lambda screen: screen.endswith(b"> "))


@contextmanager
def terminal(package: Path, *arguments: str) -> Iterator[Terminal]:
    mine, theirs = pty.openpty()
    # TERM=dumb: readline sends no escape sequences.
    process = subprocess.Popen(
        [sys.executable, "-c", LAUNCH, "--model", str(package), "--threads", "1", *arguments],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "dumb"},
    )
    os.close(theirs)
    try:
        yield Terminal(process, mine)
    finally:
        process.kill()
        process.wait()
        os.close(mine)


@pytest.fixture
def endless(make_package: Callable[..., Path], change_package: Callable[..., Path]) -> Path:
    """No token ends a text, and the context takes far longer to fill than any test lasts: only Ctrl-C ends one."""
    no_end = {"eos_token_ids": []}
    return change_package(lambda manifest: manifest["tokenizer"].update(no_end), make_package(context=200_000))


def test_turns_and_ctrl_d(package: Path) -> None:
    with terminal(package, "--interactive", "--max-new-tokens", "5", "--stats") as user:
        user.wait_for_prompt()
        assert b"random weights" in user.screen
        user.press(b"Once upon a time\n")
        user.wait_for_prompt()
        assert b"prompt " in user.screen and b"generated " in user.screen
        user.press(b"\n")  # goes on with the text
        user.wait_for_prompt()
        assert b"prompt        0 tokens" in user.screen
        user.press(CTRL_D)
        assert user.process.wait(60) == 0


def test_a_turn_of_several_lines(package: Path) -> None:
    with terminal(package, "--interactive", "--max-new-tokens", "5", "--stats") as user:
        user.wait_for_prompt()
        for line in (
            b'"""\n',
            b"Once\n",
        ):  # one by one: Ctrl-C throws away what is typed ahead, and readline waits for it
            user.press(line)
            user.wait_for(lambda screen: screen.endswith(b"... "))
        user.press(CTRL_C)  # the turn is dropped
        user.wait_for(lambda screen: screen.endswith(b"> "), again=CTRL_C)
        user.press(b'"""\nOnce\nupon\n"""\n')
        user.wait_for(lambda screen: b"generated " in screen and screen.endswith(b"> "))
        user.press(CTRL_D)
        assert user.process.wait(60) == 0


def test_ctrl_c_stops_the_text_and_keeps_the_session(endless: Path) -> None:
    with terminal(endless, "--interactive", "--max-new-tokens", "0", "--context", "200000") as user:
        user.wait_for_prompt()
        user.press(b"Once\n")
        user.wait_for(lambda screen: len(screen) > 50)  # it writes
        user.press(CTRL_C)
        user.wait_for_prompt()
        assert b"Traceback" not in user.screen
        assert b"new session" not in user.screen
        user.press(CTRL_C)  # at the prompt: a new line, nothing else
        # input() misses a signal between showing its prompt and waiting for keys; a user then presses again.
        user.wait_for(lambda screen: screen.endswith(b"> "), again=CTRL_C)
        user.press(b" upon\n")
        user.wait_for(lambda screen: len(screen) > 50)
        user.press(CTRL_C)
        user.wait_for_prompt()
        user.press(CTRL_D)
        assert user.process.wait(60) == 0


def test_a_full_context_begins_a_new_session(package: Path) -> None:
    with terminal(package, "--interactive", "--max-new-tokens", "0", "--context", "12", "--temperature", "0") as user:
        user.wait_for_prompt()
        user.press(b"The\n")
        user.wait_for(lambda screen: b"starts a new session" in screen and screen.endswith(b"> "))
        assert b"context of 12 tokens is full" in user.screen
        user.press(b"The\n")
        user.wait_for(lambda screen: b"starts a new session" in screen and screen.endswith(b"> "))


def test_ctrl_c_without_interactive_exits_130(endless: Path) -> None:
    with terminal(endless, "--max-new-tokens", "0", "--context", "200000", "Once") as user:
        user.wait_for(lambda screen: len(screen.partition(b"nothing")[2]) > 50)
        user.press(CTRL_C)
        assert user.process.wait(60) == 130
        assert b"Traceback" not in user.screen


def test_ctrl_c_ends_an_answer_and_keeps_the_conversation(
    make_package: Callable[..., Path], change_package: Callable[..., Path], with_template: Any
) -> None:
    def edit(manifest: dict[str, Any]) -> None:
        with_template()(manifest)
        manifest["tokenizer"]["eos_token_ids"] = []

    package = change_package(edit, make_package(context=200_000))
    endless = ("--ignore-eos", "--max-new-tokens", "0", "--context", "200000")  # the template has an end of its own
    with terminal(package, "--chat", *endless, "--stats") as user:
        user.wait_for_prompt()
        user.press(b"\n")  # an empty line is no message
        user.wait_for(lambda screen: screen.endswith(b"> "))
        assert b"prompt" not in user.screen
        user.press(b"Once\n")
        user.wait_for(lambda screen: len(screen) > 200)  # it answers
        user.press(CTRL_C)
        user.wait_for_prompt()
        user.press(b"And then?\n")
        user.wait_for(lambda screen: len(screen) > 50)
        user.press(CTRL_C)
        user.wait_for_prompt()
        assert b"Traceback" not in user.screen and b"new conversation" not in user.screen
        user.press(CTRL_D)
        assert user.process.wait(60) == 0
