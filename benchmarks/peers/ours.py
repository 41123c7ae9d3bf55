"""Our side of the comparison."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

from meki.package import has_random_weights, read_manifest

from .workload import PeerError, Workload, failure, find_binary, positive_speed


class Meki:
    """One `meki-bench` process a round makes all workloads."""

    def __init__(self, name: str, package: Path, workloads: Sequence[Workload], threads: int, kv_type: str) -> None:
        self.name, self.package, self.workloads, self.kv_type = name, package, workloads, kv_type
        self.binary = find_binary("meki-bench", "install this package: pip install .")
        depths = ",".join(str(workload.depth) for workload in workloads if workload.kind == "decode")
        lengths = {workload.kind: workload.tokens for workload in workloads}
        self.command = [self.binary, str(package), "--depths", depths, "--synthetic-depth"]
        self.command += ["--prefill", str(lengths["prefill"]), "--tokens", str(lengths["decode"])]
        self.command += ["--repetitions", "1", "--threads", str(threads), "--kv-type", kv_type]
        self.reports: list[dict[str, Any]] = []

    def prepare(self) -> None:
        """What it cannot do is known before minutes are spent on others; its files are warm."""
        self.round()
        self.reports.clear()

    def round(self) -> list[float]:
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

    def settings(self) -> list[str]:
        return [""] * len(self.workloads)

    def describe(self) -> str:
        manifest = read_manifest(self.package)
        weights = f"{'random ' * has_random_weights(manifest)}{manifest['weights']['type']} weights"
        memory = f"a memory ({manifest['memory']['kind']})" if manifest["memory"] else "no memory"
        return f"{metadata.version('meki')}, {manifest['name']}, {weights}, {memory}, {self.kv_type} KV"

    def figures(self) -> dict[str, Any]:
        return {"meki_bench": self.reports}

    def close(self) -> None:
        """Nothing runs between rounds."""


def same_bits(gguf: Path, package: Path) -> Path:
    """A package of the very weights in `gguf`, bit by bit, beside that file; converts it if it is not there yet.
    package: whose tokenizer it gets."""
    target = gguf.with_suffix(".package")
    if not target.is_dir():
        convert = find_binary("meki-convert", "install this package: pip install '.[models]'")
        tokenizer = package / read_manifest(package)["tokenizer"]["file"]
        command = [convert, str(gguf), "--tokenizer", str(tokenizer), "-o", str(target)]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise failure(convert, done.returncode, done.stderr)
    return target
