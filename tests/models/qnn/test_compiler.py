"""Qualcomm's compiler and its HTP simulator on stages of a small model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from meki.models.architectures.llama import Decoder
from meki.models.config import CompileError
from meki.models.graph.builder import GraphBuilder
from meki.models.qnn.chips import CHIPS
from meki.models.qnn.compiler import compile_stage, open_provider, provider_options
from meki.models.qnn.stages import Options

from .conftest import write_stages

pytestmark = pytest.mark.qnn

ELITE = CHIPS["sm8750"]
CONTEXT, CHUNK = 24, 6


def simulate(stage: Path, inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """A stage on the HTP simulator; what is not compiled is compiled in memory."""
    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_cpu_ep_fallback", "1")
    options.add_provider_for_devices(open_provider(), provider_options(ELITE))
    session = onnxruntime.InferenceSession(str(stage), options)
    names = [output.name for output in session.get_outputs()]
    return dict(zip(names, session.run(names, inputs), strict=True))


def random_inputs(stage: Path) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(5)
    types: dict[int, Any] = {1: np.float32, 10: np.float16}
    inputs = {}
    for value in onnx.load(stage, load_external_data=False).graph.input:
        shape = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
        if value.name == "past_length":
            inputs[value.name] = np.array([9], np.int32)
        else:
            kind = types[value.type.tensor_type.elem_type]
            inputs[value.name] = generator.standard_normal(shape).astype(kind)
    return inputs


@pytest.mark.parametrize("soc", CHIPS)
@pytest.mark.parametrize(("weights", "precision"), [("float32", "float16"), ("int4", "int4")])
def test_every_chip_takes_all_nodes(
    soc: str, weights: str, precision: str, make_package: Callable[..., Path], tmp_path: Path
) -> None:
    write_stages(make_package(weights), Options(CONTEXT, CHUNK, precision, dense=False), tmp_path)
    for name in ("decode.1", "prefill.1", "head"):  # in the second stage all kinds of nodes are
        compiled = compile_stage(tmp_path / f"{name}.onnx", tmp_path / f"{name}.out.onnx", CHIPS[soc])
        binary = tmp_path / f"{name}.out_qnn.bin"
        assert compiled.binary_bytes == binary.stat().st_size
        assert compiled.nodes >= 4  # the head: casts, norm and product
        assert f"arch={CHIPS[soc].htp_arch}".encode() in binary.read_bytes()
        (node,) = onnx.load(tmp_path / f"{name}.out.onnx").graph.node
        assert node.op_type == "EPContext"


@pytest.mark.parametrize(("weights", "precision"), [("float32", "float16"), ("int4", "int4")])
def test_reloaded_binaries_equal_direct_compilation_bit_for_bit(
    weights: str, precision: str, make_package: Callable[..., Path], tmp_path: Path
) -> None:
    stages = write_stages(make_package(weights), Options(CONTEXT, CHUNK, precision, dense=True), tmp_path)
    assert len(stages) == 7  # decode and prefill in two stages each, the dense ones in one, and the head
    for stage in stages:
        compiled = tmp_path / f"compiled.{stage.name}"
        compile_stage(stage, compiled, ELITE)
        inputs = random_inputs(stage)
        direct, reloaded = simulate(stage, inputs), simulate(compiled, inputs)
        assert direct.keys() == reloaded.keys()
        for name in direct:
            assert np.isfinite(direct[name]).all() and direct[name].any()
            np.testing.assert_array_equal(direct[name], reloaded[name])


def test_simulator_equals_pytorch(
    make_model: Callable[..., Decoder], make_package: Callable[..., Path], naive_stages: Any, tmp_path: Path
) -> None:
    """As on the CPU provider, but with the arithmetic of the chip."""
    model = make_model(layers=2)
    package = make_package("float32", "float32", layers=2)
    write_stages(package, Options(CONTEXT, CHUNK, "float16", dense=False), tmp_path)
    ids = [5, 17, 17, 250, 3, 99, 8, 1]
    tensor = torch.tensor(ids)
    with torch.no_grad():
        expected = model(tensor[None])[0].numpy()
        embedded = model.embed_tokens(tensor)
        rows = torch.stack([layer.meki.experts(tensor, embedded) for layer in model.layers]).numpy()
    naive, head = naive_stages(model.config, CONTEXT, simulate), tmp_path / "head.onnx"
    first = slice(0, CHUNK)
    prefill = sorted(tmp_path.glob("prefill.*.onnx"))
    got = [naive.step(prefill, head, embedded.numpy()[first], rows[:, first], CHUNK)]
    for t in range(CHUNK, len(ids)):
        decode = sorted(tmp_path.glob("decode.*.onnx"))
        got.append(naive.step(decode, head, embedded.numpy()[[t]], rows[:, [t]], 1))
    scale = np.sqrt(np.mean(np.square(expected)))
    # As for the CPU provider (test_stages.py); the simulator rounds every intermediate result.
    assert np.abs(np.concatenate(got) - expected).max() < 0.015 * scale


def test_nodes_that_the_npu_does_not_take_are_named(tmp_path: Path) -> None:
    graph = GraphBuilder()
    x = graph.input("x", [1, 4, 8])
    graph.op("Det", [graph.op("MatMul", [x, graph.op("Transpose", [x], "turned", perm=[0, 2, 1])], "square")], "y")
    graph.output("y", [1])
    graph.save(tmp_path / "stage.onnx")
    with pytest.raises(CompileError, match=r"stage.onnx: Snapdragon 8 Elite does not take the nodes y \(Det\)"):
        compile_stage(tmp_path / "stage.onnx", tmp_path / "out.onnx", ELITE)


def test_a_compiler_that_dies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "python"
    program.write_text("#!/bin/sh\necho half a message >&2\nkill -9 $$\n")
    program.chmod(0o755)
    monkeypatch.setattr("sys.executable", str(program))
    with pytest.raises(CompileError, match=r"decode.0.onnx: .* ended with SIGKILL \(half a message"):
        compile_stage(tmp_path / "decode.0.onnx", tmp_path / "out.onnx", ELITE)


def test_a_binary_that_no_npu_loads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("meki.models.qnn.compiler._BINARY_LIMIT", 1000)
    graph = GraphBuilder()
    graph.op("Relu", [graph.input("x", [1, 4])], graph.output("y", [1, 4]))
    graph.save(tmp_path / "stage.onnx")
    with pytest.raises(CompileError, match=r"stage.onnx: its binary has [\d,]+ bytes, an NPU loads less than 1,000"):
        compile_stage(tmp_path / "stage.onnx", tmp_path / "out.onnx", ELITE)


def test_a_graph_that_is_none(tmp_path: Path) -> None:
    (tmp_path / "stage.onnx").write_bytes(b"no graph")
    with pytest.raises(CompileError, match=r"stage.onnx: .*[Pp]rotobuf"):
        compile_stage(tmp_path / "stage.onnx", tmp_path / "out.onnx", ELITE)
