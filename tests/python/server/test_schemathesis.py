"""schemathesis makes requests of the server's own description, right and wrong ones: none makes the server fail."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from .running import Serve

PROGRAM = "from schemathesis.cli import schemathesis; schemathesis()"


@pytest.mark.slow
def test_no_request_makes_the_server_fail(serve: Serve, tmp_path: Path) -> None:
    options = {
        "checks": "not_a_server_error",
        "phases": "coverage,fuzzing",
        "max-examples": 50,
        "seed": 1,
        "generation-database": "none",
    }
    with serve() as served:
        command = [sys.executable, "-c", PROGRAM, "run", f"{served.url}/openapi.json", "--no-color"]
        command += [f"--{name}={value}" for name, value in options.items()]
        run = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, timeout=500)
        assert run.returncode == 0, run.stdout
        served.wait_until_idle()
