"""Qualcomm's compiler for one stage, in a process of its own: it takes gigabytes, keeps them, and may crash."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from meki._core import resident_memory

from ..config import CompileError
from .chips import Chip

PROVIDER = "QNNExecutionProvider"
"""Under exactly this name: it is written into compiled models."""
_BINARY_LIMIT = 2 << 30

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before ONNX Runtime is imported; the engine does so, too


@dataclass(frozen=True)
class Compiled:
    """What became of a stage."""

    binary_bytes: int
    nodes: int
    """Of the stage, after ONNX Runtime's optimisations; all of them are on the NPU."""
    seconds: float
    peak_bytes: int
    """Of the compiler's process."""


def provider_options(chip: Chip, optimization: int = 3) -> dict[str, str]:
    """What the QNN provider is told when it compiles for `chip`. optimization: 1 (least) to 3."""
    return {
        "backend_type": "htp",
        "htp_arch": str(chip.htp_arch),
        "soc_model": str(chip.soc_model),
        "vtcm_mb": str(chip.vtcm_mb),
        "htp_graph_finalization_optimization_mode": str(optimization),
    }


def compile_stage(stage: Path, out: Path, chip: Chip, optimization: int = 3) -> Compiled:
    """Compiles the ONNX graph `stage` for `chip` to `out` (.onnx), one node, and a binary beside it, NAME_qnn.bin.

    CompileError, naming the nodes, if the NPU does not take all of them; if the compiler fails, or dies.
    """
    options = {**provider_options(chip, optimization), "enable_htp_prepare_only": "1"}
    command = [sys.executable, "-m", __name__, str(stage), str(out), json.dumps(options)]
    process = subprocess.run(command, capture_output=True, text=True, errors="replace")
    if process.returncode:
        end = f"exit code {process.returncode}"
        if process.returncode < 0:
            end = signal.Signals(-process.returncode).name
        lines = process.stderr.strip().splitlines() or ["no message"]
        raise CompileError(
            f"{stage.name}: the compiler's process ended with {end} ({lines[-1]}); if memory was short, close other "
            "programs, or choose a smaller --context or --chunk"
        )
    result: dict[str, Any] = json.loads(process.stdout.splitlines()[-1])  # the provider greets in a line before it
    if "error" in result:
        raise CompileError(f"{stage.name}: {result['error']}")
    if result["elsewhere"]:
        names = ", ".join(result["elsewhere"])
        raise CompileError(f"{stage.name}: {chip.name} does not take the nodes {names}; this model cannot run there")
    size = out.with_name(f"{out.stem}_qnn.bin").stat().st_size
    if size >= _BINARY_LIMIT:
        raise CompileError(f"{stage.name}: its binary has {size:,} bytes, an NPU loads less than {_BINARY_LIMIT:,}")
    return Compiled(size, result["nodes"], result["seconds"], result["peak_bytes"])


def open_provider() -> list[Any]:
    """Registers the QNN provider with ONNX Runtime, once a process; returns its devices."""
    import onnxruntime
    import onnxruntime_qnn

    if not any(device.ep_name == PROVIDER for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())


def _compile(stage: str, out: str, provider: dict[str, str]) -> dict[str, Any]:
    """In the compiler's process. What ONNX Runtime refuses is an "error"; "elsewhere" are nodes not on the NPU."""
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what fails is raised with the same text
    try:
        devices = open_provider()
    except Exception as error:  # ONNX Runtime's types have no other base
        remedy = "; install it (Debian, Ubuntu: apt install libatomic1)" if "libatomic" in str(error) else ""
        return {"error": _one_line(error) + remedy}
    options = onnxruntime.SessionOptions()
    for key, value in {
        "session.record_ep_graph_assignment_info": "1",
        "ep.context_enable": "1",
        "ep.context_file_path": out,
        "ep.context_embed_mode": "0",
    }.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(devices, provider)
    begin = time.monotonic()
    try:
        session = onnxruntime.InferenceSession(stage, options)
    except Exception as error:
        return {"error": _one_line(error)}
    seconds = time.monotonic() - begin
    assigned = session.get_provider_graph_assignment_info()
    memory = resident_memory(None)  # not getrusage, which after a fork counts the parent's
    assert memory is not None, "the compiler runs on Linux alone"
    elsewhere = [node for part in assigned if part.ep_name != PROVIDER for node in part.get_nodes()]
    return {
        "elsewhere": [f"{node.name} ({node.op_type})" for node in elsewhere],
        "nodes": sum(len(part.get_nodes()) for part in assigned),
        "seconds": seconds,
        "peak_bytes": memory["peak"],
    }


if __name__ == "__main__":
    print(json.dumps(_compile(sys.argv[1], sys.argv[2], json.loads(sys.argv[3]))), flush=True)
