"""The engines that compare.py can measure beside ours. A new one is a class, and a line here."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from .genai import Genai
from .llama_bench import IK_SETTINGS, LLAMA_SETTINGS, FreshBench, LlamaBench, StandingBench
from .llama_model import PeerConfig
from .ov_genai import OpenVino
from .workload import Engine, Workload


@dataclass(frozen=True)
class Job:
    """What all peers have to measure."""

    gguf: Path
    """A model of the package's shapes."""
    config: PeerConfig
    """The package's."""
    workloads: Sequence[Workload]
    threads: int
    rounds: int


@dataclass(frozen=True)
class Peer:
    option: str
    """That names it, and the file or folder it needs."""
    metavar: str
    help: str
    open: Callable[[str, Job], Engine]
    """The engine, by the option's value. PeerError if it cannot be used."""


def _llama_bench(name: str, bench: type, settings: Sequence, value: str, job: Job) -> Engine:
    return LlamaBench(name, bench, settings, value, job.gguf, job.workloads, job.threads, job.rounds)


def _in_process(engine: Callable[..., Engine], value: str, job: Job) -> Engine:
    return engine(Path(value), job.config, job.workloads, job.threads)


PEERS = (
    Peer(
        *("--llama-bench", "PATH", "llama-bench of llama.cpp, built for this machine"),
        partial(_llama_bench, "llama.cpp", StandingBench, LLAMA_SETTINGS),
    ),
    Peer(
        *("--ik-llama-bench", "PATH", "llama-bench of ik_llama.cpp, built for this machine"),
        partial(_llama_bench, "ik_llama.cpp", FreshBench, IK_SETTINGS),
    ),
    Peer(
        *("--genai", "DIR", "a model of onnxruntime-genai with the same shapes"),
        partial(_in_process, Genai),
    ),
    Peer(
        *("--openvino", "DIR", "a model of openvino-genai with the same shapes"),
        partial(_in_process, OpenVino),
    ),
)
