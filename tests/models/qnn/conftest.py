"""Static stages run by a naive loop: caches are NumPy arrays, and new keys and values are copied where they belong."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest

from meki.models.architectures.llama import LlamaConfig
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

    def __init__(self, config: LlamaConfig, context: int, run: Run = run_on_cpu) -> None:
        self.config, self.run, self.length = config, run, 0
        shape = (config.kv_heads, config.head_dim, context)
        self.keys = [np.zeros(shape, np.float16) for _ in range(config.layers)]
        self.values = [np.zeros((shape[0], context, shape[1]), np.float16) for _ in range(config.layers)]

    def step(
        self, stages: Sequence[Path], head: Path, embedded: np.ndarray, rows: np.ndarray | None, kept: int
    ) -> np.ndarray:
        """Logits [kept, vocab_size] of the first `kept` tokens of a step; what the others leave is thrown away.

        embedded: float32 [T, hidden]; rows: float32 [layers, T, memory_dim].
        """
        hidden = {"embedding": embedded[None]}
        for stage in stages:
            graph = onnx.load(stage, load_external_data=False).graph
            inputs: dict[str, np.ndarray] = {}
            layers = sorted(
                int(value.name.split(".")[1]) for value in graph.output if value.name.startswith("new_key.")
            )
            for value in graph.input:
                name, _, layer = value.name.partition(".")
                if name == "past_length":
                    inputs[value.name] = np.array([self.length], np.int32)
                elif name == "rows":
                    assert rows is not None
                    count = value.type.tensor_type.shape.dim[0].dim_value
                    # A stage with layer 0's injection has one more layer of rows than it has layers of its own.
                    last = layers[-1] + 1 if layers else 1
                    inputs["rows"] = rows[last - count : last]
                elif name in ("past_key", "past_value"):
                    inputs[value.name] = (self.keys if name == "past_key" else self.values)[int(layer)]
                else:
                    inputs[value.name] = hidden[value.name]
            outputs = self.run(stage, inputs)
            for layer in layers:
                to = slice(self.length, self.length + kept)
                self.keys[layer][:, :, to] = outputs.pop(f"new_key.{layer}")[:, :, :kept]
                self.values[layer][:, to] = outputs.pop(f"new_value.{layer}")[:, :kept]
            hidden |= outputs
        self.length += kept
        final = hidden["final"]
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
