"""The engines that compare.py compares: each measures tokens/s of one workload at a time."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .llama_model import PeerConfig

PROBE_REPETITIONS, PROBE_PREFILL, PROBE_DECODE = 3, 128, 8
STDERR_LINES = 8


class PeerError(RuntimeError):
    """An engine that is missing, failed or answered what cannot be understood."""


@dataclass(frozen=True)
class Workload:
    """`tokens` tokens of prefill or decode with `depth` tokens in the KV cache."""

    kind: str
    """`prefill` or `decode`."""
    depth: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.kind} {self.tokens} at depth {self.depth:,}"


@dataclass(frozen=True)
class Setting:
    """What llama.cpp lets one choose for attention on a CPU."""

    flash_attention: bool
    key_type: str
    value_type: str

    def __str__(self) -> str:
        return f"flash attention {'on' if self.flash_attention else 'off'}, K {self.key_type}, V {self.value_type}"

    @property
    def options(self) -> list[str]:
        return ["-fa", str(int(self.flash_attention)), "-ctk", self.key_type, "-ctv", self.value_type]


# llama.cpp quantises V only with flash attention.
SETTINGS = [
    Setting(False, "f16", "f16"),
    Setting(False, "q8_0", "f16"),
    Setting(True, "f16", "f16"),
    Setting(True, "q8_0", "f16"),
    Setting(True, "q8_0", "q8_0"),
]


def find_binary(name: str, remedy: str) -> str:
    """The path of a command: beside this Python first, so that a virtual environment need not be activated."""
    found = shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    if found is None:
        raise PeerError(f"{name}: no such executable; {remedy}")
    return found


def failure(binary: str, status: int, stderr: str) -> PeerError:
    how = f"was ended by signal {-status}" if status < 0 else f"ended with exit status {status}"
    last = "\n  ".join(stderr.strip().splitlines()[-STDERR_LINES:]) or "(nothing)"
    return PeerError(f"{binary} {how}; the last of its stderr:\n  {last}")


def positive_speed(value: object, source: str) -> float:
    if not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise PeerError(f"{source}: got {value!r}, expected tokens/s, a positive number")
    return float(value)


class Meki:
    """Ours: one `meki-bench` process a round makes all workloads."""

    def __init__(self, binary: str, package: Path, workloads: Sequence[Workload], threads: int, kv_type: str) -> None:
        self.binary, self.workloads = binary, workloads
        depths = ",".join(str(workload.depth) for workload in workloads if workload.kind == "decode")
        lengths = {workload.kind: workload.tokens for workload in workloads}
        self.command = [binary, str(package), "--depths", depths, "--synthetic-depth"]
        self.command += ["--prefill", str(lengths["prefill"]), "--tokens", str(lengths["decode"])]
        self.command += ["--repetitions", "1", "--threads", str(threads), "--kv-type", kv_type]
        self.reports: list[dict[str, Any]] = []

    def round(self) -> list[float]:
        """tokens/s of each workload, in their order."""
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory) / "bench.json"
            done = subprocess.run([*self.command, "--json", str(path)], capture_output=True, text=True)
            if done.returncode:
                raise failure(self.binary, done.returncode, done.stderr)
            try:
                report = json.loads(path.read_text(encoding="utf-8"))
                found = {(result["test"], result["depth"]): result["samples"] for result in report["results"]}
                samples = []
                for workload in self.workloads:
                    (sample,) = found[workload.kind, workload.depth]
                    samples.append(positive_speed(sample, self.binary))
            except (OSError, ValueError, KeyError, TypeError) as error:
                raise PeerError(f"{self.binary}: its --json file lacks one sample of each test: {error!r}") from error
        self.reports.append(report)
        return samples


class LlamaBench:
    """One llama-bench process that measures one workload several times and stands still in between.

    It prints a line of JSON after each measurement. It is stopped when that line arrives, in the pause that it was told
    to make before the next one's warm-up, and so keeps the KV cache that it has filled. Use it as a context manager.
    """

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
        lengths = ",".join([str(workload.tokens)] * measurements)
        prompt, generated = (lengths, "0") if workload.kind == "prefill" else ("0", lengths)
        self.command = [binary, "-m", str(model), "-t", str(threads), "-p", prompt, "-n", generated]
        self.command += ["-d", str(workload.depth), "-r", str(repetitions), *setting.options]
        self.command += ["-o", "jsonl", "--delay", "1"]  # seconds before each measurement's warm-up
        self.stderr = tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace")  # noqa: SIM115 (see __exit__)
        self.process: subprocess.Popen[str] | None = None

    def __enter__(self) -> LlamaBench:
        return self

    def __exit__(self, *exception: object) -> None:
        if self.process:
            if self.process.poll() is None:
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.communicate()
        self.stderr.close()

    def measure(self) -> dict[str, Any]:
        """llama-bench's record of the next measurement; `samples_ts` are tokens/s."""
        started = time.monotonic_ns()
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
        elapsed = time.monotonic_ns() - started
        if (not line or not self.left) and (status := self.process.wait()):
            self.stderr.seek(0)
            raise failure(self.binary, status, self.stderr.read())
        try:
            record = json.loads(line)
            done = (record["n_prompt"], record["n_gen"], record["n_depth"])
            _ = record["build_commit"], record["build_number"], record["cpu_info"]
            samples = [positive_speed(sample, self.binary) for sample in record["samples_ts"]]
            spent = sum(record["samples_ns"])
        except (ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{self.binary}: got {line[:200]!r}, expected a line of llama-bench -o jsonl") from error
        lengths = (self.workload.tokens, 0) if self.workload.kind == "prefill" else (0, self.workload.tokens)
        if done != (*lengths, self.workload.depth) or not samples:
            raise PeerError(f"{self.binary} measured {done} (prompt, generated, depth), expected {self.workload}")
        if spent > elapsed:
            raise PeerError(f"{self.binary} was stopped within a measurement: this machine is too busy to measure")
        return dict(record)


def best_setting(
    measure: Callable[[Workload, Setting], list[float]], workload: Workload, settings: Sequence[Setting] = SETTINGS
) -> tuple[Setting, dict[str, list[float]]]:
    """The setting with the greatest median tokens/s in a shortened workload, and what all of them reached."""
    short = replace(
        workload, tokens=min(workload.tokens, PROBE_PREFILL if workload.kind == "prefill" else PROBE_DECODE)
    )
    reached = {setting: measure(short, setting) for setting in settings}
    best = max(settings, key=lambda setting: float(np.median(reached[setting])))
    return best, {str(setting): samples for setting, samples in reached.items()}


class Genai:
    """onnxruntime-genai in this process: real prefill of random tokens, once for each workload; greedy search."""

    PIECE = 512  # of the prefill that fills a cache: attention's scratch grows with the square of it

    def __init__(self, folder: Path, config: PeerConfig, threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise PeerError(f"onnxruntime-genai is not installed ({error}); pip install onnxruntime-genai") from error
        self.genai, self.vocab_size = onnxruntime_genai, config.vocab_size
        path = folder / "genai_config.json"
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            decoder = model["decoder"]
            names = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"]
            got = [model["vocab_size"], *(decoder[name] for name in names)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{path}: not a model of onnxruntime-genai: {error!r}") from error
        expected = [config.vocab_size, config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim]
        if got != expected:
            raise PeerError(f"{path}: vocab_size, {', '.join(names)} are {got}, expected the package's {expected}")
        with self.errors():
            options = onnxruntime_genai.Config(str(folder))
            options.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
            self.model = onnxruntime_genai.Model(options)
        self.generators: dict[Workload, Any] = {}
        self.rng = np.random.default_rng(0)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the binding raises RuntimeError and its own types
            raise PeerError(f"onnxruntime-genai: {error}") from error

    def append(self, generator: Any, tokens: int) -> None:
        for start in range(0, tokens, self.PIECE):
            piece = self.rng.integers(0, self.vocab_size, min(self.PIECE, tokens - start))
            generator.append_tokens(piece.astype(np.int32))

    def measure(self, workload: Workload) -> float:
        """tokens/s."""
        with self.errors():
            return self.prefill(workload) if workload.kind == "prefill" else self.decode(workload)

    def generator(self, workload: Workload, depth: int) -> Any:
        """The workload's own, with at least `depth` tokens in its cache."""
        if workload not in self.generators:
            length = depth + workload.tokens + 1
            parameters = self.genai.GeneratorParams(self.model)
            # As long at least as at most: no end-of-text token ends it.
            parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
            self.generators[workload] = self.genai.Generator(self.model, parameters)
            self.append(self.generators[workload], depth)
        return self.generators[workload]

    def prefill(self, workload: Workload) -> float:
        generator = self.generator(workload, 0)
        tokens = self.rng.integers(0, self.vocab_size, workload.tokens).astype(np.int32)
        seconds = 0.0
        for _ in range(2):  # the first is the warm-up
            generator.rewind_to(0)
            started = time.perf_counter()
            generator.append_tokens(tokens)
            seconds = time.perf_counter() - started
        return workload.tokens / seconds

    def decode(self, workload: Workload) -> float:
        depth = max(workload.depth, 1)  # it needs a token to begin with
        generator = self.generator(workload, depth)
        generator.rewind_to(depth - 1)
        self.append(generator, 1)  # the warm-up
        generator.generate_next_token()  # samples from what is computed; each further call computes one token
        started = time.perf_counter()
        for _ in range(workload.tokens):
            generator.generate_next_token()
        return workload.tokens / (time.perf_counter() - started)
