"""The entry points of meki-convert and meki-compile."""

from __future__ import annotations

import sys

import pytest

from meki.models import commands


def test_without_the_extra_the_message_names_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in [name for name in sys.modules if name.startswith("meki.models.") and name != commands.__name__]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "safetensors", None)  # as if it were not installed
    assert commands.convert(["checkpoint.safetensors", "-o", "package"]) == 1
    error = capsys.readouterr().err
    assert "'safetensors' is missing" in error
    assert "pip install 'meki[models]'" in error


def test_with_it_the_command_runs(capsys: pytest.CaptureFixture[str]) -> None:
    assert commands.convert(["no-such-checkpoint.safetensors", "-o", "package"]) != 0
    assert "no-such-checkpoint.safetensors" in capsys.readouterr().err
