"""Static stages run by a naive loop: caches are NumPy arrays, and new keys and values are copied where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from meki.models.architectures.base import Architecture
from meki.models.qnn.stages import Options, plan, write_stage
from meki.models.qnn.weights import PackageWeights

Run = Callable[[Path, dict[str, np.ndarray]], dict[str, np.ndarray]]


def run_on_cpu(stage: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """ONNX Runtime's CPU provider, which rounds to float16 after each operator."""
    options = onnxruntime.SessionOptions()
    session = onnxruntime.InferenceSession(str(stage), options, providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


class NaiveStages:
    """A sequence on stages, in files that are run in order, with the caches that they share."""

    def __init__(self, config: Architecture, context: int, run: Run = run_on_cpu) -> None:
        self.config, self.run, self.length = config, run, 0
        alike = [{"kv_heads": config.kv_heads, "head_dim": config.head_dim}] * config.layers
        self.cache: dict[str, np.ndarray] = {}
        """By the names of the inputs."""
        for layer, its in enumerate(config.kv_caches() or alike):
            if "shared" not in its:
                heads, dim = its["kv_heads"], its["head_dim"]
                self.cache[f"past_key.{layer}"] = np.zeros((heads, dim, context), np.float16)
                self.cache[f"past_value.{layer}"] = np.zeros((heads, context, dim), np.float16)

    def step(
        self, stages: Sequence[Path], head: Path, embedded: np.ndarray, rows: np.ndarray | None, kept: int
    ) -> np.ndarray:
        """Logits [kept, vocab_size] of the first `kept` tokens of a step; what the others leave is thrown away.

        embedded: float32 [T, hidden]; rows: float32 [layers, T, memory_dim].
        """
        made = {"embedding": embedded[None]}
        first_row = 0
        for stage in stages:
            graph = onnx.load(stage, load_external_data=False).graph
            inputs: dict[str, np.ndarray] = {}
            for value in graph.input:
                name = value.name
                if name == "past_length":
                    inputs[name] = np.array([self.length], np.int32)
                elif name == "rows":
                    assert rows is not None
                    last_row = first_row + value.type.tensor_type.shape.dim[0].dim_value
                    inputs[name], first_row = rows[first_row:last_row], last_row
                else:
                    its = name.removeprefix("shared_")
                    inputs[name] = self.cache[its] if its in self.cache else made[its]
            made |= self.run(stage, inputs)
        assert rows is None or first_row == len(rows)
        to = slice(self.length, self.length + kept)
        for name in made:
            if name.startswith("new_key."):
                self.cache[name.replace("new_", "past_")][:, :, to] = made[name][:, :, :kept]
            elif name.startswith("new_value."):
                self.cache[name.replace("new_", "past_")][:, to] = made[name][:, :kept]
        self.length += kept
        final = made["final"]
        return np.concatenate([self.run(head, {"final": final[:, t : t + 1]})["logits"] for t in range(kept)])


def open_weights(package: Path) -> PackageWeights:
    return PackageWeights(package, json.loads((package / "manifest.json").read_text()))


def write_stages(package: Path, options: Options, directory: Path) -> list[Path]:
    """All stages as ONNX, not compiled."""
    weights = open_weights(package)
    stages = [stage for stages in plan(weights, options).values() for stage in stages]
    return [write_stage(weights, stage, directory) for stage in stages]


@pytest.fixture
def naive_stages() -> type[NaiveStages]:
    return NaiveStages
