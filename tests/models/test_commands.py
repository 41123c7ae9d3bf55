"""What meki-convert and meki-compile load, and what they say if it is missing."""

from __future__ import annotations

import subprocess
import sys

import pytest

from meki.models import convert


def test_without_the_extra_the_message_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("meki.models.") and name != convert.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    assert convert.main(["checkpoint.safetensors", "-o", "package"]) == 1
    error = capsys.readouterr().err
    assert "'safetensors' is missing" in error
    assert "pip install 'meki[models]'" in error


def test_with_it_the_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert convert.main(["no-such-checkpoint.safetensors", "-o", "package"]) != 0
    assert "no-such-checkpoint.safetensors" in capsys.readouterr().err


COMMANDS = [
    *("cli.run", "cli.info", "cli.list", "cli.rm", "cli.bench"),
    *("models.check", "models.convert", "models.qnn.compile", "models.train.command"),
]


@pytest.mark.parametrize("command", COMMANDS)
def test_help_waits_for_nothing_large(command: str) -> None:
    code = f"import sys, meki.{command} as command\ntry: command.main(['--help'])\nfinally: print(*sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert shown.startswith("usage: ")
    assert not {"torch", "onnx", "matplotlib"} & set(shown.split())
