"""A process that was forked while an engine lives: it ends, cannot use that engine, and can open its own."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

# In a process of its own: pytest's would have other threads than ours. `child` prints what it finds.
SCRIPT = """
import multiprocessing, os, signal, sys
from meki import Engine

LIMIT = 60  # seconds, for what would wait for ever

def open_own(package, results):
    signal.alarm(LIMIT)
    results.put(Engine(package, threads=2).generate("The cat", max_new_tokens=4, temperature=0).token_ids)

package = sys.argv[1]
engine = Engine(package, threads=2)
session = engine.session()
expected = session.generate("The cat", max_new_tokens=4, temperature=0).token_ids
if sys.argv[2] == "own engine":
    fork = multiprocessing.get_context("fork")
    results = fork.Queue()
    child = fork.Process(target=open_own, args=(package, results))
    child.start()
    assert results.get(timeout=LIMIT) == expected
    child.join(LIMIT)
    assert child.exitcode == 0, child.exitcode
else:
    if pid := os.fork():
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        assert code == 3, code
        again = engine.generate("The cat", max_new_tokens=4, temperature=0).token_ids
        assert again == expected  # the parent noticed nothing
    else:
        signal.alarm(LIMIT)
        uses = {
            "nothing": [],
            "deleted": [lambda: globals().pop("session"), lambda: globals().pop("engine")],
            "used": [
                engine.session,
                lambda: engine.generate("A"),
                lambda: session.generate("A"),
                lambda: session.logits([1]),
            ],
        }
        for use in uses[sys.argv[2]]:
            try:
                use()
            except RuntimeError as error:
                assert "open an engine here" in str(error), error
            else:
                assert sys.argv[2] == "deleted"
        sys.exit(3)
"""


@pytest.mark.parametrize("weights", ["int8", "float32"])
@pytest.mark.parametrize("child", ["nothing", "deleted", "used", "own engine"])
def test_forked_child(make_package: Callable[..., Path], child: str, weights: str) -> None:
    package = make_package(weights)
    command = [sys.executable, "-c", SCRIPT, str(package), child]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
