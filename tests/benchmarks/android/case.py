"""What android.measure is given in its tests: a compiled package, libraries, and a stand-in for meki_bench."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.android import measure

from .adb_device import Phone, elf

ROOT = Path(__file__).parents[3]
REMOTE = "/data/local/tmp/meki"
LIBRARIES = ["libonnxruntime_providers_qnn.so", "libQnnHtp.so", "libQnnSystem.so", "libQnnHtpV79Stub.so"]

# What meki_bench answers: dense 10 tokens/s, MeKi 9 from a warm ROM and 8 from a cold one, each faster by 1% a run.
BENCH = """
import json, os, signal, sys, time
options = dict(zip(sys.argv[2::2], sys.argv[3::2]))
with open("calls", "a") as file:
    file.write(json.dumps([sys.argv, os.environ["LD_LIBRARY_PATH"], os.environ["ADSP_LIBRARY_PATH"]]) + "\\n")
call = len(open("calls").readlines())
rom = options.get("--rom")
repetitions, tokens = int(options["--repetitions"]), int(options["--tokens"])
prefill = int(options.get("--prefill", 512))
cpu = options["--provider"] == "cpu"
base = {None: 10.0, "warm": 9.0, "cold": 8.0}[rom] * (1 + call / 100)
report = {
    "program": "meki_bench", "version": "0.1.0", "model": "small", "random_weights": True, "simulated": False,
    "shared_memory": not cpu,
    "provider": options["--provider"], "soc": options.get("--soc"), "precision": "float16", "weights": None,
    "memory": "meki" if options["--memory"] == "on" else "dense", "rom": rom, "rom_access": rom and "pread",
    "kv_type": "float16", "threads": 8 if cpu else None, "simd": "neon_i8mm" if cpu else None, "onnxruntime": "1.29.0",
    "depth": int(options.get("--depth", 479)), "synthetic_depth": True, "tokens": tokens,
    "prefill_tokens": prefill, "repetitions": repetitions, "load_s": 0.0,
    "decode_tokens_per_s": [base + i / 10 for i in range(repetitions)],
    "prefill_tokens_per_s": [50 * base] * repetitions if prefill else [],
    "stall_us": [float(i) for i in range(repetitions * tokens)] if rom else [],
    "storage_bytes_per_token": 4096 if rom == "cold" else 0 if rom else None,
    "resident_bytes": 1000 + call, "peak_resident_bytes": 2000 + call,
}
HOOK
with open(options["--json"], "w") as file:
    json.dump(report, file)
"""


class Case:
    """A command line of android.measure, its files and its report."""

    def __init__(self, directory: Path, package: Path) -> None:
        self.json, self.bench, self.package, self.qnn = (
            directory / "r.json",
            directory / "bench",
            package,
            directory / "q",
        )
        self.qnn.mkdir()
        for name in LIBRARIES:
            (self.qnn / name).write_bytes(elf(f"# {name}"))
        (self.qnn / "libQnnHtpV79Skel.so").write_bytes(elf("# skel", machine=164))
        self.onnxruntime = directory / "libonnxruntime.so.1"
        self.onnxruntime.write_bytes(elf("# onnxruntime"))
        self.hook("")

    def hook(self, code: str) -> None:
        """What meki_bench does before it writes its report."""
        self.bench.write_bytes(elf(BENCH.replace("HOOK", code)))

    def arguments(self, *more: str) -> list[str]:
        files = ["--bench", str(self.bench), "--onnxruntime", str(self.onnxruntime), "--json", str(self.json)]
        return [str(self.package), *files, *([] if "cpu" in more else ["--qnn", str(self.qnn)]), *more]

    def install(self, phone: Phone) -> None:
        """Puts everything on the phone by itself, without adb."""
        phone.path(f"{REMOTE}/bin").mkdir(parents=True, exist_ok=True)
        libraries = {path.name: path for path in self.qnn.iterdir()}
        for name, path in (libraries | {"meki_bench": self.bench, "libonnxruntime.so": self.onnxruntime}).items():
            shutil.copy(path, phone.path(f"{REMOTE}/bin/{name}"))
        shutil.copytree(self.package, phone.path(f"{REMOTE}/packages/{self.package.name}"), dirs_exist_ok=True)

    def run(self, *more: str) -> int:
        return measure.main(self.arguments("--rounds", "1", "--tokens", "4", "--cool-down", "0", *more))

    def report(self) -> dict[str, Any]:
        report: dict[str, Any] = json.loads(self.json.read_text())
        return report


def calls(phone: Phone) -> list[Any]:
    path = phone.path(f"{REMOTE}/bin/calls")
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


@contextlib.contextmanager
def started(case: Case) -> Iterator[subprocess.Popen[str]]:
    """The command as a process, in a group of its own that ends with the block."""
    command = [sys.executable, "-m", measure.__name__]
    command += case.arguments("--rounds", "1", "--tokens", "4", "--cool-down", "0")
    with subprocess.Popen(
        ["env", "--default-signal=INT", *command],  # tests that run in a shell's background ignore the signal
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        process_group=0,
    ) as process:
        try:
            yield process
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
