"""Engines in several threads at once."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

FIRST_ENGINES = """
import sys, threading
import meki

begin, opened = threading.Barrier(4), []

def work():
    begin.wait()
    opened.append(meki.Engine(sys.argv[1], threads=1))

threads = [threading.Thread(target=work) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
print(len(opened))
"""


def test_the_first_engines_of_a_process_opened_at_once(make_package: Callable[..., Path]) -> None:
    """ONNX Runtime's registration of operators is not made for that: half of such processes failed."""
    for _ in range(8):
        run = subprocess.run(
            [sys.executable, "-c", FIRST_ENGINES, str(make_package())], capture_output=True, text=True, timeout=120
        )
        assert run.stdout == "4\n", run.stderr
