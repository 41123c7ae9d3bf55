"""Qualcomm's compiler for one stage, in a process of its own: it takes gigabytes, keeps them, and may crash."""

from __future__ import annotations

import multiprocessing
import resource
import time
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .chips import Chip

PROVIDER = "QNNExecutionProvider"
"""Under exactly this name: it is written into compiled models."""
_BINARY_LIMIT = 2 << 30


class CompileError(RuntimeError):
    """A stage that cannot run on the NPU."""


@dataclass(frozen=True)
class Compiled:
    """What became of a stage."""

    graph: Path
    """ONNX with one node, which refers to the binary."""
    binary: Path
    nodes: int
    """Of the stage, after ONNX Runtime's optimisations; all of them are on the NPU."""
    seconds: float
    peak_bytes: int
    """Of the compiler's process."""


def compile_stage(stage: Path, out: Path, chip: Chip) -> Compiled:
    """Compiles the ONNX graph `stage` for `chip` to `out` (.onnx) and a binary beside it, NAME_qnn.bin.

    CompileError, naming the nodes, if the NPU does not take all of them; if the compiler fails, or dies.
    """
    context = multiprocessing.get_context("spawn")
    try:
        with ProcessPoolExecutor(max_workers=1, mp_context=context) as process:
            compiled = process.submit(_compile, stage, out, chip).result()
    except BrokenProcessPool as error:
        raise CompileError(
            f"{stage.name}: the compiler's process died, most likely for lack of memory; close other programs, or "
            "choose a smaller --context or --chunk"
        ) from error
    size = compiled.binary.stat().st_size
    if size >= _BINARY_LIMIT:
        raise CompileError(f"{stage.name}: its binary has {size:,} bytes, an NPU loads less than {_BINARY_LIMIT:,}")
    return compiled


def provider_options(chip: Chip) -> dict[str, str]:
    """What the QNN provider is told when it compiles for `chip`."""
    return {
        "backend_type": "htp",
        "htp_arch": str(chip.htp_arch),
        "soc_model": str(chip.soc_model),
        "vtcm_mb": str(chip.vtcm_mb),
        "htp_graph_finalization_optimization_mode": "3",
    }


def open_provider() -> list[Any]:
    """Registers the QNN provider with ONNX Runtime, once a process; returns its devices."""
    import onnxruntime
    import onnxruntime_qnn

    if not any(device.ep_name == PROVIDER for device in onnxruntime.get_ep_devices()):
        onnxruntime.register_execution_provider_library(PROVIDER, onnxruntime_qnn.get_library_path())
    return [device for device in onnxruntime.get_ep_devices() if device.ep_name == PROVIDER]


def _compile(stage: Path, out: Path, chip: Chip) -> Compiled:
    import onnxruntime

    onnxruntime.set_default_logger_severity(4)  # what fails is raised with the same text
    options = onnxruntime.SessionOptions()
    for key, value in {
        "session.record_ep_graph_assignment_info": "1",
        "ep.context_enable": "1",
        "ep.context_file_path": str(out),
        "ep.context_embed_mode": "0",
    }.items():
        options.add_session_config_entry(key, value)
    options.add_provider_for_devices(open_provider(), {**provider_options(chip), "enable_htp_prepare_only": "1"})
    begin = time.monotonic()
    try:
        session = onnxruntime.InferenceSession(str(stage), options)
    except Exception as error:  # ONNX Runtime's own types do not survive the way to the parent
        raise CompileError(f"{stage.name}: {' '.join(str(error).split())}") from None
    seconds = time.monotonic() - begin
    assigned = session.get_provider_graph_assignment_info()
    elsewhere = [node for part in assigned if part.ep_name != PROVIDER for node in part.get_nodes()]
    if elsewhere:
        names = ", ".join(f"{node.name} ({node.op_type})" for node in elsewhere)
        raise CompileError(f"{stage.name}: {chip.name} does not take the nodes {names}; this model cannot run there")
    nodes = sum(len(part.get_nodes()) for part in assigned)
    binary = out.with_name(f"{out.stem}_qnn.bin")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return Compiled(out, binary, nodes, seconds, peak)
