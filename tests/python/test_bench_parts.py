from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from meki.bench.parts import PARTS, part_of, trace_times

# Every node of a packed and of a float32 graph (models/graph.py), and what ONNX Runtime's fusions make of some.
NODES = [
    ("embedding", "Embedding", "embedding"),
    ("embedding", "Gather", "embedding"),
    ("layers.0.input_layernorm.out", "RMSNormalization", "norms and elementwise"),
    ("layers.0.self_attn.qkv.out", "Linear", "linear"),
    ("layers.0.self_attn.heads", "Attention", "attention"),
    ("layers.11.self_attn.o_proj.out", "MatMul", "linear"),
    ("layers.0.attended", "Add", "norms and elementwise"),
    ("layers.0.mlp.gate_up.out", "Linear", "linear"),
    ("layers.0.mlp.gate", "Split", "norms and elementwise"),
    ("layers.0.mlp.gate.silu/QuickGeluFusion/", "QuickGelu", "norms and elementwise"),
    ("layers.0.mlp.product", "Mul", "norms and elementwise"),
    ("layers.0.mlp.down_proj.out", "MatMul", "linear"),
    ("layers.0.mlp.out", "Experts", "linear"),
    ("layers.0.residual", "Add", "norms and elementwise"),
    ("rows.0", "Split", "injection"),
    ("layers.0.meki.gate_proj.out", "Linear", "injection"),
    ("layers.0.meki.gate", "Sigmoid", "injection"),
    ("layers.0.meki.fused", "Add", "injection"),
    ("layers.0.meki.out_proj.out", "Linear", "injection"),
    ("layers.0.meki.post_norm.out", "RMSNormalization", "injection"),
    ("layers.0.injected", "Add", "injection"),
    ("final.tokens", "Squeeze", "norms and elementwise"),
    ("final.selected", "Gather", "norms and elementwise"),
    ("norm.out", "RMSNormalization", "norms and elementwise"),
    ("logits", "Linear", "head"),
    ("logits", "Gemm", "head"),
]


@pytest.mark.parametrize(("node", "op", "part"), NODES)
def test_part_of_a_node(node: str, op: str, part: str) -> None:
    assert part_of(node, op) == part
    assert part in PARTS


def run(start: int, nodes: list[tuple[str, str, int]]) -> list[dict[str, Any]]:
    """The events of one run: its kernels one after the other, then the run itself, as the profiler writes them."""
    events, time = [], start + 1
    for name, op, duration in nodes:
        args = {"op_name": op, "provider": "CPUExecutionProvider"}
        events.append(
            {"cat": "Node", "ph": "X", "name": f"{name}_kernel_time", "ts": time, "dur": duration, "args": args}
        )
        time += duration + 1
    inner = {"cat": "Session", "ph": "X", "name": "SequentialExecutor::Execute", "ts": start, "dur": time - start}
    return [*events, inner, {**inner, "name": "model_run"}]


def write(path: Path, runs: list[list[dict[str, Any]]]) -> Path:
    start = [{"cat": "Session", "ph": "X", "name": "session_initialization", "ts": 3, "dur": 9, "args": {}}]
    path.write_text(json.dumps(start + [event for events in runs for event in events]))
    return path


def test_only_the_steps_that_count_are_summed(tmp_path: Path) -> None:
    runs = [
        run(100, [("layers.0.self_attn.heads", "Attention", 1_000), ("logits", "Linear", 5_000)]),  # at open
        run(10_000, [("layers.0.self_attn.heads", "Attention", 100), ("logits", "Linear", 500)]),  # a start
        run(20_000, [("layers.0.self_attn.heads", "Attention", 10), ("logits", "Linear", 50)]),
        run(30_000, [("layers.0.self_attn.heads", "Attention", 7), ("norm.out", "RMSNormalization", 2)]),
    ]
    times = trace_times(write(tmp_path / "trace.json", runs), [False, True, True])
    expected = {"attention": 17, "head": 50, "norms and elementwise": 2}
    assert times == {part: expected.get(part, 0) for part in PARTS}


def test_a_trace_of_fewer_runs_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path / "trace.json", [run(100, [("logits", "Linear", 5)])])
    with pytest.raises(RuntimeError, match="has 1 runs, 2 steps"):
        trace_times(path, [True, True])
