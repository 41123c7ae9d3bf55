"""One run of meki_bench on a phone: the command, its figures, and what the battery did meanwhile."""

from __future__ import annotations

import json
import math
import re
import shlex
import signal
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .device import AndroidError, Device, State, last_lines
from .files import BIN, ONNXRUNTIME, PROGRAM, QNN_PROVIDER

REPETITIONS = 3
"""Rounds within one process, after its warm-up."""
TIMEOUT = 3600.0
BATTERY = "/sys/class/power_supply/battery"

_POWER = {"current_ua": "current_now", "voltage_uv": "voltage_now", "temperature_tenths": "temp"}
_FILES = "run.json", "power.txt", "run.pid"


@dataclass(frozen=True)
class Variant:
    memory: str
    """The kind, or "dense"."""
    rom: str | None
    """"warm" or "cold"; None for dense."""

    def __str__(self) -> str:
        return f"MeKi, {self.rom} ROM" if self.rom else "dense"


@dataclass(frozen=True)
class Run:
    variant: Variant
    round: int
    before: State
    after: State
    power: list[dict[str, int | None]]
    """About one sample a second, the time of loading included: microamperes (the sign is the phone's choice),
    microvolts and tenths of a degree of the battery. None: the phone does not let one read it."""
    report: dict[str, Any]
    """meki_bench's JSON."""

    @property
    def milliamperes(self) -> list[float]:
        """Between battery and phone, after loading; without sign."""
        samples = self.power[math.ceil(self.report["load_s"]) :]
        return [abs(sample["current_ua"]) / 1000 for sample in samples if sample["current_ua"] is not None]


@dataclass(frozen=True)
class Bench:
    """Runs meki_bench on the phone. Counts are of tokens."""

    device: Device
    package: str
    """Absolute path on the phone."""
    provider: str
    soc: str | None
    depth: int | None
    """None: meki_bench's own choice, 10,240 or what fits."""
    tokens: int
    prefill: int | None
    """None: meki_bench's own choice, 512 or what fits; 0: none."""

    def run(self, variant: Variant, number: int) -> Run:
        before = self.device.state()
        output = self.device.shell(self.command(variant), TIMEOUT)
        if status := output.returncode:
            raise AndroidError(f"{variant}, round {number}: {_death(status)}:\n  {last_lines(output.stderr)}")
        after = self.device.state()
        report, power = (self.device.check(f"cat {BIN}/{name}") for name in ("run.json", "power.txt"))
        return Run(variant, number, before, after, parse_power(power), parse_report(report, variant, self))

    def command(self, variant: Variant) -> str:
        """A shell command that ends with meki_bench's exit status. The battery is sampled on the phone itself, without
        traffic over the cable."""
        options = {
            "--onnxruntime": f"{BIN}/{ONNXRUNTIME}",
            "--provider": self.provider,
            "--qnn-library": f"{BIN}/{QNN_PROVIDER}" if self.soc else None,
            "--soc": self.soc,
            "--depth": self.depth,
            "--prefill": self.prefill,
            "--tokens": self.tokens,
            "--repetitions": REPETITIONS,
            "--json": "run.json",
            "--memory": "on" if variant.rom else "off",
            "--rom": variant.rom,
        }
        given = [text for name, value in options.items() if value is not None for text in (name, str(value))]
        bench = shlex.join([f"./{PROGRAM}", self.package, *given])
        fields = " ".join(f"$(cat {BATTERY}/{name} 2>/dev/null || echo -)" for name in _POWER.values())
        return (
            f"cd {BIN} && rm -f {' '.join(_FILES)} && {{\n"
            f"while kill -0 $$ 2>/dev/null; do echo {fields}; sleep 1; done > power.txt 2>/dev/null &\n"
            "sampler=$!\n"
            f"LD_LIBRARY_PATH={BIN} ADSP_LIBRARY_PATH={BIN} {bench} >/dev/null &\n"
            "echo $! > run.pid; wait $!; status=$?; kill $sampler; rm -f run.pid; (exit $status)\n}"
        )

    def clean(self) -> None:
        """Ends a meki_bench that an interrupted run has left on the phone, and removes what runs leave behind, but not
        what was pushed."""
        self.device.check(
            f"cd {BIN} && if [ -f run.pid ]; then pid=$(cat run.pid); "
            f"if grep -q {PROGRAM} /proc/$pid/cmdline 2>/dev/null; then kill -9 $pid; fi; fi; "
            f"rm -f {' '.join(_FILES)}"
        )


def _death(status: int) -> str:
    if status == 128 + signal.SIGKILL:
        return (
            f"{PROGRAM} was killed (signal 9): most often Android takes a process that needs too much memory. Close "
            "apps, restart the phone, or take a smaller model or depth. The last of its stderr"
        )
    if status > 128:
        return f"{PROGRAM} was ended by signal {status - 128}; the last of its stderr"
    return f"{PROGRAM} ended with exit status {status}; the last of its stderr"


def parse_power(text: str) -> list[dict[str, int | None]]:
    """The sampler's lines, each of numbers or "-"."""
    lines = [line.split() for line in text.splitlines()]
    return [
        {name: int(value) if re.fullmatch(r"-?\d+", value) else None for name, value in zip(_POWER, line, strict=True)}
        for line in lines
        if len(line) == len(_POWER)
    ]


def parse_report(text: str, variant: Variant, bench: Bench) -> dict[str, Any]:
    """meki_bench's JSON, checked: the variant that was asked for, with figures."""
    try:
        report = json.loads(text)
        if not isinstance(report, dict):
            raise ValueError("not an object")
    except ValueError as error:
        raise AndroidError(f"{PROGRAM}: its JSON cannot be read ({error}): {text[:200]!r}") from error

    def check(good: bool, name: str, expected: str) -> None:
        if not good:
            raise AndroidError(f"{PROGRAM}: {name} is {report.get(name)!r} in its JSON, expected {expected}")

    asked = {"memory": variant.memory, "rom": variant.rom, "provider": bench.provider, "tokens": bench.tokens}
    for name, value in (asked | {"repetitions": REPETITIONS, "soc": bench.soc}).items():
        check(report.get(name) == value, name, repr(value))
    for name, value in {"depth": bench.depth, "prefill_tokens": bench.prefill, "load_s": None}.items():
        check(value in (None, report.get(name)), name, str(value))
        check(_numbers([report.get(name)], 1, least=0.0), name, "a number")
    check(_numbers(report.get("decode_tokens_per_s"), REPETITIONS), "decode_tokens_per_s", f"{REPETITIONS} speeds")
    prefills = REPETITIONS if report["prefill_tokens"] else 0
    check(_numbers(report.get("prefill_tokens_per_s"), prefills), "prefill_tokens_per_s", f"{prefills} speeds")
    steps = REPETITIONS * bench.tokens if variant.rom else 0
    check(_numbers(report.get("stall_us"), steps, least=0.0), "stall_us", f"{steps} times")
    for name in ("random_weights", "simulated", "shared_memory", "synthetic_depth"):
        check(isinstance(report.get(name), bool), name, "true or false")
    return report


def _numbers(values: object, count: int, least: float = 1e-9) -> bool:
    if not isinstance(values, list) or len(values) != count:
        return False
    return all(type(value) in (int, float) and least <= value < math.inf for value in values)


def order(variants: Sequence[Variant], number: int) -> list[Variant]:
    """Who runs when in round `number`: A B C C B A, which a linear drift does not favour, and C B A A B C in turn."""
    turn = list(variants) if number % 2 else list(reversed(variants))
    return [*turn, *reversed(turn)]
