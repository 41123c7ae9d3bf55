"""What the tests of AI Hub have in common: the command line on a compiled package, and the profiles of a stand-in."""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from qai_hub import client
from qai_hub.util import session

from benchmarks.aihub import profile as hub

from ..compiled import SOC, STAGES
from .stub import TOKEN, StubHub, profile_detail

DEVICE = "Snapdragon 8 Elite QRD"
# Medians are not the fastest runs, and neither are they symmetric.
TIMES = {name: [1000 * (i + 2), 1000 * (i + 1) + 1, 1000 * (i + 5)] for i, name in enumerate(STAGES)}
MEDIANS = {name: statistics.median(times) for name, times in TIMES.items()}


@contextmanager
def running_stub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StubHub]:
    """A stand-in with three devices, and the client configured for it."""
    with StubHub() as server:
        server.add_device("Samsung Galaxy S24 (Family)", "14", "chipset:sm8650", "hexagon:v75", "framework:qnn")
        server.add_device(DEVICE, "14", "chipset:sm8750", "hexagon:v79", "framework:qnn")
        server.add_device(DEVICE, "15", "chipset:sm8750", "hexagon:v79", "framework:qnn")
        server.profiles = {name: profile_detail(times) for name, times in TIMES.items()}
        configure(tmp_path, monkeypatch, server.url)
        yield server


def configure(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, url: str, token: str = TOKEN) -> None:
    ini = tmp_path / "client.ini"
    ini.write_text(f"[api]\napi_token = {token}\napi_url = {url}\nweb_url = {url}\n")
    monkeypatch.setenv("QAIHUB_CLIENT_INI", str(ini))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(session, "MAX_RETRIES", 1)  # the client's own, which takes half a minute
    monkeypatch.setattr(session, "BACKOFF_FACTOR", 0)
    monkeypatch.setattr(client.Job, "_polling_interval", 1 / 1024)  # seconds


def profile(package: Path, *args: str, device: str = DEVICE) -> int:
    return hub.main([str(package), "--device", device, *args])


def binary(package: Path, name: str) -> bytes:
    return (package / "qnn" / SOC / f"{name}_qnn.bin").read_bytes()


def error_of(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line on stderr, but for progress bars."""
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.startswith("aihub: ")]
    return line
