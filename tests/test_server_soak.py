"""A short soak of the server (server_soak.py), as test_soak.py has one of the engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.slow
def test_clients_of_all_kinds() -> None:
    command = [sys.executable, str(Path(__file__).with_name("server_soak.py")), "--minutes", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert run.returncode == 0, run.stdout + run.stderr
