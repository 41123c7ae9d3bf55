"""An adb server of this test run's own, and the stand-in phone that it is connected to."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.android import files

from ..compiled import compiled_package
from .adb_device import Phone
from .case import Case

TIMEOUT = 120.0  # seconds; what is waited for takes milliseconds, on a machine that does other work some seconds


def wait_until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, f"still not so after {TIMEOUT:.0f} s: {what}"
        time.sleep(0.02)


def adb(*arguments: str) -> str:
    done = subprocess.run(["adb", *arguments], capture_output=True, text=True, timeout=TIMEOUT)
    return done.stdout + done.stderr


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


@pytest.fixture(scope="session")
def adb_environment(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """Variables with which every adb client talks to a server that ends with the tests."""
    if shutil.which("adb") is None:
        pytest.skip("needs adb (Debian: apt install adb)")
    home = tmp_path_factory.mktemp("adb")
    changes = {
        "ANDROID_ADB_SERVER_PORT": str(free_port()),
        "ADB_LOCAL_TRANSPORT_MAX_PORT": "5553",  # below the ports where it would look for emulators
        "ANDROID_SDK_HOME": str(home),
        "HOME": str(home),  # its keys
    }
    with (home / "log").open("wb") as log:
        server = subprocess.Popen(
            ["adb", "server", "nodaemon"],
            env={key: value for key, value in os.environ.items() if key != "ANDROID_SERIAL"} | changes,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
        )
    try:
        address = ("127.0.0.1", int(changes["ANDROID_ADB_SERVER_PORT"]))

        def answers() -> bool:
            with socket.socket() as probe:
                return probe.connect_ex(address) == 0

        wait_until(answers, f"adb server listens:\n{(home / 'log').read_text()}")
        yield changes
    finally:
        server.kill()
        server.wait()


@pytest.fixture
def adb_server(adb_environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ANDROID_SERIAL", raising=False)
    for key, value in adb_environment.items():
        monkeypatch.setenv(key, value)


def connect(phone: Phone) -> None:
    adb("disconnect", phone.serial)  # or it would wait 10 s for one that was unplugged
    adb("connect", phone.serial)
    wait_until(lambda: f"{phone.serial}\tdevice" in adb("devices"), f"{phone.serial} is connected: {adb('devices')}")


@pytest.fixture
def phones(adb_server: None, tmp_path: Path) -> Iterator[Callable[[], Phone]]:
    """Makes phones of the right kind: cool, with much room."""
    made: list[Phone] = []

    def make() -> Phone:
        phone = Phone(tmp_path / f"phone{len(made)}")
        made.append(phone)
        phone.set("getprop", ro__soc__model="SM8750", ro__product__model="Stand-in 8 Elite")
        phone.set("getprop", ro__product__cpu__abi="arm64-v8a", ro__build__version__sdk="35")
        phone.set("getprop", ro__build__version__release="15")
        phone.set("dumpsys", thermalservice="IsStatusOverride: false\nThermal Status: 0\nCached temperatures:")
        phone.set("dumpsys", battery=battery())
        free = "Filesystem 1K-blocks Used Available Use% Mounted on\n/dev/block/dm-9 9000000 1000000 {} 12% /data\n"
        phone.path("df").write_text(free.format(8_000_000))
        supply = phone.path("/sys/class/power_supply/battery")
        supply.mkdir()
        for name, value in {"current_now": -812_000, "voltage_now": 4_100_000, "temp": 305}.items():
            (supply / name).write_text(f"{value}\n")
        return phone

    yield make
    for phone in made:
        adb("disconnect", phone.serial)
        phone.close()


def battery(celsius: float = 30.5, level: int = 80, usb: bool = False) -> str:
    return (
        f"Current Battery Service state:\n  AC powered: false\n  USB powered: {str(usb).lower()}\n"
        f"  level: {level}\n  scale: 100\n  voltage: 4100\n  temperature: {celsius * 10:.0f}"
    )


@pytest.fixture
def phone(phones: Callable[[], Phone]) -> Phone:
    made = phones()
    connect(made)
    return made


@pytest.fixture
def case(tmp_path: Path, make_package: Callable[..., Path]) -> Case:
    package = compiled_package(make_package("int8", context=600), tmp_path / "my small model", context=512)
    return Case(tmp_path, package)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a piece, so small that the ROM has several."""
    monkeypatch.setattr(files, "PIECE", 1 << 14)
    return 1 << 14
