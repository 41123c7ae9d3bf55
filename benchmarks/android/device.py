"""A phone through the adb client: which it is, what state it is in, commands and files.

The client is told the serial number and nothing else: it reads ANDROID_ADB_SERVER_PORT and its other variables itself.
"""

from __future__ import annotations

import os
import re
import shlex
import subprocess
from dataclasses import dataclass
from pathlib import Path
from subprocess import CompletedProcess

PROPERTIES = (
    *("ro.soc.model", "ro.product.model", "ro.product.cpu.abi"),
    *("ro.build.version.sdk", "ro.build.version.release"),
)
"""Of Android, in the order of `Phone`'s fields."""
ABI, SDK = "arm64-v8a", 31
HOT_CELSIUS = 38.0
"""Of the battery. Phones slow down when their surface is some 40 degrees warm."""
COMMAND_TIMEOUT, TRANSFER_TIMEOUT = 60.0, 900.0  # seconds; a piece of 64 MiB takes USB 2 some 3
STDERR_LINES = 8

_MARKER = "meki-status"


class AndroidError(RuntimeError):
    """A phone, a file or a run that cannot be used. The message says what to do."""


@dataclass(frozen=True)
class Phone:
    chip: str
    """As Android names it, such as SM8750; "" if it does not."""
    model: str
    abi: str
    sdk: int
    """API level."""
    release: str
    """Android's version."""


@dataclass(frozen=True)
class State:
    """None: the phone does not tell."""

    thermal_status: int | None
    """0: no throttling, 1: light ... 6: shutdown (android.os.PowerManager)."""
    battery_percent: int | None
    battery_celsius: float | None
    plugged: bool | None

    @property
    def hot(self) -> bool:
        return (self.thermal_status or 0) > 0 or (self.battery_celsius or 0.0) >= HOT_CELSIUS

    def __str__(self) -> str:
        status = "unknown" if self.thermal_status is None else self.thermal_status
        celsius = "unknown" if self.battery_celsius is None else f"{self.battery_celsius:.1f} C"
        return f"thermal status {status}, battery {celsius}"


def last_lines(text: str) -> str:
    return "\n  ".join(text.strip().splitlines()[-STDERR_LINES:]) or "(nothing)"


class Device:
    """One phone. Every method raises AndroidError when adb no longer reaches it. Not for two threads at a time."""

    def __init__(self, adb: str, serial: str) -> None:
        self.adb, self.serial = adb, serial

    def shell(self, command: str, timeout: float = COMMAND_TIMEOUT) -> CompletedProcess[str]:
        """Runs a command in the phone's shell; its names have to be quoted for that. Exit status 128 + n: ended by
        signal n.

        The exit status comes as a last line of stdout: what adb returns does not tell a command that has ended from a
        phone that was unplugged.
        """
        done = self._run("shell", f"( {command}\n); printf '\\n{_MARKER} %d\\n' $?", timeout=timeout)
        found = re.search(rf"\r?\n{_MARKER} (\d+)\r?\n\Z", done.stdout)
        if not found:
            raise self._lost("a command", done)
        return CompletedProcess(command, int(found[1]), done.stdout[: found.start()], done.stderr)

    def check(self, command: str, timeout: float = COMMAND_TIMEOUT) -> str:
        """stdout of a command that has to succeed."""
        output = self.shell(command, timeout)
        if not output.returncode:
            return output.stdout
        if "No space left" in output.stderr:
            raise self._disk_full()
        last = last_lines(output.stderr)
        raise AndroidError(f"{self.serial}: `{command}` ended with exit status {output.returncode}:\n  {last}")

    def push(self, local: Path, remote: str) -> None:
        done = self._run("push", str(local), remote, timeout=TRANSFER_TIMEOUT)
        if not done.returncode:
            return
        if "No space left" in done.stderr + done.stdout:
            raise self._disk_full()
        # The phone may be back already, so that its state alone does not tell.
        state = self._run("get-state", timeout=COMMAND_TIMEOUT)
        if state.stdout.strip() != "device" or re.search("couldn't read|closed|offline|protocol fault", done.stderr):
            raise self._lost(f"pushing {local.name}", done)
        last = last_lines(done.stderr or done.stdout)
        raise AndroidError(f"{self.serial}: pushing {local.name} failed; adb says:\n  {last}")

    def phone(self) -> Phone:
        """AndroidError for one that cannot run meki_bench."""
        lines = self.check("; ".join(f"getprop {name}" for name in PROPERTIES)).splitlines()
        values = [line.strip() for line in lines]
        if len(values) != len(PROPERTIES) or not values[3].isdecimal():
            raise AndroidError(f"{self.serial}: getprop answered {values}, expected {', '.join(PROPERTIES)}")
        chip, model, abi, sdk, release = values
        if abi != ABI:
            raise AndroidError(f"{model}: its ABI is {abi}, expected {ABI}: meki_bench is built for that alone")
        if int(sdk) < SDK:
            raise AndroidError(f"{model}: API level {sdk} (Android {release}), expected {SDK} (Android 12) or newer")
        return Phone(chip, model, abi, int(sdk), release)

    def state(self) -> State:
        told = self.shell("dumpsys thermalservice; dumpsys battery").stdout
        tenths = _number(r"^\s*temperature: (-?\d+)", told)
        powered = re.findall(r"^\s*\w+ powered: (true|false)", told, re.MULTILINE)
        return State(
            thermal_status=_number(r"^\s*Thermal Status: (\d+)", told),
            battery_percent=_number(r"^\s*level: (\d+)", told),
            battery_celsius=None if tenths is None else tenths / 10,
            plugged="true" in powered if powered else None,
        )

    def free_bytes(self, directory: str) -> int:
        lines = self.check(f"df -k {shlex.quote(directory)}").strip().splitlines()
        found = re.search(r"\s\d+\s+\d+\s+(\d+)\s+\d+%", lines[-1] if lines else "")
        if not found:
            raise AndroidError(f"{self.serial}: df -k answered {lines}, expected the free space of {directory}")
        return int(found[1]) * 1024

    def _run(self, *arguments: str, timeout: float) -> CompletedProcess[str]:
        return run_adb(self.adb, "-s", self.serial, *arguments, timeout=timeout)

    def _disk_full(self) -> AndroidError:
        return AndroidError(
            f"{self.serial}: no space left on the phone. Free some and repeat the command: what has arrived is not "
            "sent again"
        )

    def _lost(self, doing: str, done: CompletedProcess[str]) -> AndroidError:
        said = last_lines(done.stderr or done.stdout)
        return AndroidError(
            f"{self.serial}: lost during {doing}: unplugged, restarted or out of reach. Connect it again and repeat "
            f"the command: what has arrived is not sent again. adb says:\n  {said}"
        )


def run_adb(adb: str, *arguments: str, timeout: float) -> CompletedProcess[str]:
    try:
        return subprocess.run(
            [adb, *arguments],
            stdin=subprocess.DEVNULL,
            capture_output=True,
            encoding="utf-8",
            errors="replace",
            timeout=timeout,
        )
    except FileNotFoundError as error:
        raise AndroidError(
            f"{adb}: no such program; install Android's platform-tools (Debian: apt install adb) or name it with --adb"
        ) from error
    except subprocess.TimeoutExpired as error:
        raise AndroidError(
            f"{' '.join(arguments[:3])}: no answer from the phone within {timeout:.0f} s; connect it again, or restart "
            "adb with `adb kill-server`"
        ) from error


def find_device(adb: str, serial: str | None) -> Device:
    """The phone with this serial number, or with ANDROID_SERIAL's, or the only one."""
    listed = run_adb(adb, "devices", timeout=COMMAND_TIMEOUT)
    if listed.returncode:
        raise AndroidError(f"adb devices failed:\n  {last_lines(listed.stderr)}")
    states: dict[str, str] = dict(re.findall(r"^(\S+)\t(.+?)\s*$", listed.stdout, re.MULTILINE))
    serial = serial or os.environ.get("ANDROID_SERIAL") or None
    if not states:
        raise AndroidError(
            "no phone: `adb devices` lists none. Switch on USB debugging (Settings, System, Developer options), "
            "connect it with a cable that carries data, and unlock it"
        )
    if serial is None and len(states) > 1:
        raise AndroidError(f"{len(states)} phones are connected ({', '.join(states)}): name one with --serial")
    serial = serial or next(iter(states))
    if serial not in states:
        raise AndroidError(f"{serial}: no such phone; `adb devices` lists {', '.join(states)}")
    remedies = {
        "unauthorized": 'unlock it and answer "Allow USB debugging?" with yes',
        "authorizing": "wait a moment and try again",
        "offline": "connect it again, or restart adb with `adb kill-server`",
        "no permissions": "this user may not use the USB device: see the udev rules that `adb devices` points to",
    }
    state = states[serial]
    if state != "device":
        remedy = next((text for key, text in remedies.items() if state.startswith(key)), "start Android on it")
        raise AndroidError(f"{serial} is in state {state!r}, expected 'device': {remedy}")
    return Device(adb, serial)


def _number(pattern: str, text: str) -> int | None:
    found = re.search(pattern, text, re.MULTILINE)
    return int(found[1]) if found else None
