"""llama.cpp and ik_llama.cpp, by their programs of the name llama-bench."""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from tqdm import tqdm

from .workload import PeerError, Workload, failure, find_binary, positive_speed

PROBE_REPETITIONS, PROBE_PREFILL, PROBE_DECODE = 3, 128, 8


@dataclass(frozen=True)
class Setting:
    """What a llama-bench lets one choose on a CPU."""

    flash_attention: bool
    key_type: str
    value_type: str
    repack: bool = False
    """Matrices are laid out for this processor when they are loaded (ik_llama.cpp; llama.cpp always does it)."""
    merge: bool = False
    """Query, key and value are one product (ik_llama.cpp)."""

    def __str__(self) -> str:
        extra = ", repacked" * self.repack + ", QKV merged" * self.merge
        flash = "on" if self.flash_attention else "off"
        return f"flash attention {flash}, K {self.key_type}, V {self.value_type}{extra}"

    @property
    def options(self) -> list[str]:
        common = ["-fa", str(int(self.flash_attention)), "-ctk", self.key_type, "-ctv", self.value_type]
        return common + ["-rtr", "1"] * self.repack + ["-mqkv", "1"] * self.merge


# Both quantise V only with flash attention.
LLAMA_SETTINGS = (
    Setting(False, "f16", "f16"),
    Setting(False, "q8_0", "f16"),
    Setting(True, "f16", "f16"),
    Setting(True, "q8_0", "f16"),
    Setting(True, "q8_0", "q8_0"),
)
IK_SETTINGS = tuple(
    replace(setting, repack=repack, merge=merge)
    for setting, (repack, merge) in itertools.product(
        (*LLAMA_SETTINGS, Setting(True, "q8_KV", "q8_0")),  # it keeps no V so
        ((False, False), (True, False), (True, True)),
    )
)


class Bench(ABC):
    """A llama-bench that measures one workload, again and again. Use it as a context manager."""

    fills_once: ClassVar[bool]
    """Whether repetitions keep the depth that the first one has filled."""

    def __init__(
        self,
        binary: str,
        model: Path,
        workload: Workload,
        setting: Setting,
        threads: int,
        measurements: int,
        repetitions: int,
    ) -> None:
        self.binary, self.workload, self.left = binary, workload, measurements
        self.command = [binary, "-m", str(model), "-t", str(threads), *self.lengths(measurements)]
        self.command += ["-r", str(repetitions), *setting.options, *self.output]

    def __enter__(self) -> Bench:
        return self

    @abstractmethod
    def __exit__(self, *exception: object) -> None:
        """Nothing of it runs any more."""

    output: ClassVar[Sequence[str]]
    """Options that make it print a record."""

    @abstractmethod
    def lengths(self, measurements: int) -> list[str]:
        """Options that name the workload, as often as it is measured."""

    @abstractmethod
    def expected(self) -> dict[str, int]:
        """Fields of a record of the workload."""

    @abstractmethod
    def read(self) -> str:
        """Makes the next measurement; the JSON of its record. PeerError if the program fails."""

    def measure(self) -> dict[str, Any]:
        """The record of the next measurement; `samples_ts` are tokens/s."""
        started = time.monotonic_ns()
        text = self.read()
        elapsed = time.monotonic_ns() - started
        try:
            record = json.loads(text)
            done = {field: record[field] for field in self.expected()}
            _ = record["build_commit"], record["build_number"]
            samples = [positive_speed(sample, self.binary) for sample in record["samples_ts"]]
            spent = sum(record["samples_ns"])
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{self.binary}: got {text[:200]!r}, expected a record of llama-bench in JSON") from error
        if done != self.expected() or not samples:
            raise PeerError(f"{self.binary} measured {done}, expected {self.workload}, which is {self.expected()}")
        if spent > elapsed:
            raise PeerError(f"{self.binary} was stopped within a measurement: this machine is too busy to measure")
        return dict(record)


class StandingBench(Bench):
    """llama.cpp's: one process that measures several times and stands still in between.

    It prints a line of JSON after each measurement. It is stopped when that line arrives, in the pause that it was told
    to make before the next one's warm-up, and so keeps the KV cache that it has filled.
    """

    fills_once = True
    output = ("-o", "jsonl", "--delay", "1")  # seconds before each measurement's warm-up

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see __exit__)
        self.process: subprocess.Popen[str] | None = None

    def __exit__(self, *exception: object) -> None:
        if self.process:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        self.stderr.close()

    def lengths(self, measurements: int) -> list[str]:
        tokens = ",".join([str(self.workload.tokens)] * measurements)
        prompt, generated = (tokens, "0") if self.workload.kind == "prefill" else ("0", tokens)
        return ["-p", prompt, "-n", generated, "-d", str(self.workload.depth)]

    def expected(self) -> dict[str, int]:
        prompt, generated = (self.workload.tokens, 0) if self.workload.kind == "prefill" else (0, self.workload.tokens)
        return {"n_prompt": prompt, "n_gen": generated, "n_depth": self.workload.depth}

    def read(self) -> str:
        if self.process is None:
            # A group of its own, so that what a wrapper script starts is stopped with it.
            self.process = subprocess.Popen(
                self.command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=self.stderr,
                text=True,
                process_group=0,
            )
        else:
            os.killpg(self.process.pid, signal.SIGCONT)
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        self.left -= 1
        if line and self.left:
            os.killpg(self.process.pid, signal.SIGSTOP)
        elif status := self.process.wait():
            self.stderr.seek(0)
            raise failure(self.binary, status, self.stderr.read())
        return line


class FreshBench(Bench):
    """ik_llama.cpp's: a process for each measurement. It would fill a depth again for every one anyway, and has no
    pause to be stopped in."""

    fills_once = False
    output = ("-o", "json")

    def __exit__(self, *exception: object) -> None:
        """Nothing runs between measurements."""

    def lengths(self, measurements: int) -> list[str]:
        tokens, depth = self.workload.tokens, self.workload.depth
        if self.workload.kind == "decode" and depth:
            return ["-p", "0", "-n", "0", "-gp", f"{depth},{tokens}"]
        prompt, generated = (tokens, 0) if self.workload.kind == "prefill" else (0, tokens)
        return ["-p", str(prompt), "-n", str(generated)]

    def expected(self) -> dict[str, int]:
        if self.workload.kind == "prefill":
            return {"n_prompt": self.workload.tokens, "n_gen": 0}
        return {"n_prompt": self.workload.depth, "n_gen": self.workload.tokens}

    def read(self) -> str:
        done = subprocess.run(
            self.command, stdin=subprocess.DEVNULL, capture_output=True, encoding="utf-8", errors="replace"
        )
        if done.returncode:
            raise failure(self.binary, done.returncode, done.stderr)
        # The engine may print lines of its own before the record.
        record = re.search(r"^  \{$.*?^  \}", done.stdout, re.MULTILINE | re.DOTALL)
        return record[0] if record else done.stdout


def best_setting(
    measure: Callable[[Workload, Setting], list[float]], workload: Workload, settings: Sequence[Setting]
) -> tuple[Setting, dict[str, list[float]]]:
    """The setting with the greatest median tokens/s in a shortened workload, and what all of them reached: nothing,
    where the program fails. PeerError if it fails with every one."""
    short = replace(
        workload, tokens=min(workload.tokens, PROBE_PREFILL if workload.kind == "prefill" else PROBE_DECODE)
    )
    reached: dict[Setting, list[float]] = {}
    errors = []
    for setting in settings:
        try:
            reached[setting] = measure(short, setting)
        except PeerError as error:
            reached[setting] = []
            errors.append(error)
    if len(errors) == len(settings):
        raise errors[0]
    best = max(settings, key=lambda setting: float(np.median(reached[setting] or [0.0])))
    return best, {str(setting): samples for setting, samples in reached.items()}


class LlamaBench:
    """An engine that is measured with its llama-bench: of each workload with the best of its settings."""

    def __init__(
        self,
        name: str,
        bench: type[Bench],
        tried: Sequence[Setting],
        binary: str,
        model: Path,
        workloads: Sequence[Workload],
        threads: int,
        rounds: int,
    ) -> None:
        """binary: a path or a command. model: a GGUF file. PeerError if there is no such binary."""
        self.name, self.bench, self.tried = name, bench, tried
        self.binary = find_binary(binary, f"build it from {name}'s sources and name its path")
        self.model, self.workloads, self.threads, self.rounds = model, workloads, threads, rounds
        self.found: list[tuple[Setting, dict[str, list[float]]]] = []
        self.benches: list[Bench] = []
        self.record: dict[str, Any] = {}
        self.stack = contextlib.ExitStack()

    def prepare(self) -> None:
        with tqdm(desc=self.name, total=len(self.workloads) * len(self.tried), disable=None) as progress:

            def probe(workload: Workload, setting: Setting) -> list[float]:
                repetitions = PROBE_REPETITIONS if self.bench.fills_once or not workload.depth else 1
                told = "failed"
                try:
                    with self.bench(self.binary, self.model, workload, setting, self.threads, 1, repetitions) as bench:
                        samples: list[float] = bench.measure()["samples_ts"]
                    told = f"{np.median(samples):.1f} tokens/s"
                finally:
                    progress.write(f"{self.name}, {workload}, {setting}: {told}", file=sys.stderr)
                    progress.update()
                return samples

            self.found = [best_setting(probe, workload, self.tried) for workload in self.workloads]
        for workload, (setting, _) in zip(self.workloads, self.found, strict=True):
            bench = self.bench(self.binary, self.model, workload, setting, self.threads, self.rounds, 1)
            self.benches.append(self.stack.enter_context(bench))

    def round(self) -> list[float]:
        speeds = []
        for bench in self.benches:
            self.record = bench.measure()
            speeds += self.record["samples_ts"]
        return speeds

    def settings(self) -> list[str]:
        return [str(setting) for setting, _ in self.found]

    def describe(self) -> str:
        return f"{self.record['build_commit']} ({self.record['build_number']}), random Q4_0 weights"

    def figures(self) -> dict[str, Any]:
        return {"settings_tried": [tried for _, tried in self.found], "last_record": self.record}

    def close(self) -> None:
        self.stack.close()
