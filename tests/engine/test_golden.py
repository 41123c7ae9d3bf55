"""The published module's own outputs through everything: fold, ROM file, prefetcher, stages, session."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto
from tokenizers import Tokenizer, models

from meki import Engine
from meki.models.architectures.llama import LlamaConfig
from meki.models.graph.cpu import CpuGraph
from meki.models.graph.tensors import TensorFile
from meki.models.graph.weights import WEIGHTS_FILE, WeightStore
from meki.models.memories.meki import MeKi, MeKiConfig
from meki.models.rom import RomLayout, write_rom

DATA = Path(__file__).parent.parent / "data"


def golden_module(golden: dict[str, np.ndarray]) -> MeKi:
    vocab_size, memory_dim = golden["meki.embeddings.weight"].shape
    hidden = golden["word_emb"].shape[1]
    config = MeKiConfig(memory_dim, "meki.word_emb_projection.fc1_norm.weight" in golden)
    module = MeKi(vocab_size, hidden, float(golden["eps"]), config)
    prefix = "meki."
    state = {name[len(prefix) :]: torch.from_numpy(value) for name, value in golden.items() if name.startswith(prefix)}
    module.load_state_dict(state)
    return module


def golden_package(directory: Path, golden: dict[str, np.ndarray], hidden: np.ndarray, row_type: str) -> None:
    """A package whose "decoder" is the golden module alone: stage 0 gives the golden hidden states, float32
    [vocab_size, width], by token, stage 1 is the exporter's own injection, and the module's output y, padded to the
    vocabulary, stands for the logits."""
    module = golden_module(golden)
    vocab_size, memory_dim = module.embeddings.weight.shape
    width = hidden.shape[1]
    memory = module.memory
    config = LlamaConfig(
        vocab_size=vocab_size, layers=1, hidden=width, ffn=1, heads=1, kv_heads=1, head_dim=16, context=64,
        norm_eps=float(golden["eps"]), memory=memory,
    )  # fmt: skip
    state = {f"layers.0.meki.{name}": value.numpy() for name, value in module.state_dict().items()}

    with (directory / WEIGHTS_FILE).open("wb") as file:
        store = WeightStore(state.__getitem__, TensorFile(file), config.ram_parameters)
        g = CpuGraph(config, store)
        ids = g.input("token_ids", [1, "T"], TensorProto.INT64)
        cache: list[int | str] = ["blocks", 1, "block_bytes"]
        past = g.input("past.0", cache, TensorProto.UINT8)
        g.op("Cast", [past], g.stages[-1].output("present.0", cache, TensorProto.UINT8), to=TensorProto.UINT8)
        h = g.op("Gather", [g.array("table", lambda: hidden), ids], "h")
        zero = g.op("Mul", [h, g.array("nothing", lambda: np.zeros(1, np.float32))], "zero")
        y = memory.after_ffn(g, 0, zero, h, h)
        padding = lambda: np.eye(width, vocab_size, dtype=np.float32)  # noqa: E731 (a product with it is exact)
        g.logits(g.op("MatMul", [g.selected(y), g.array("padding", padding)], "padded"))
        for index, stage in enumerate(g.stages):
            stage.save(directory / f"stage{index}.onnx")

    state["embed_tokens.weight"] = golden["word_emb"]
    blocks = memory.folded_rows(config, lambda name, rows: state[name][rows] if state[name].ndim else state[name])
    summary = write_rom(directory / "memory.rom", RomLayout(vocab_size, 1, memory_dim, row_type), blocks)
    (directory / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
    }
    manifest = {
        "format": "meki-package", "version": 5, "name": "golden", "architecture": config.manifest(),
        "memory": {
            **memory.manifest(config, {}), "file": "memory.rom", "row_type": row_type, "content_id": summary.content_id,
        },
        "parameters": {"ram": config.ram_parameters, "rom": config.rom_parameters},
        "stages": [{"file": "stage0.onnx", "rows": None}, {"file": "stage1.onnx", "rows": [0, 1]}],
        "dense_stages": [{"file": "stage0.onnx"}], "weights": {"type": "float32", "block": None, "types": {}},
        "tokenizer": {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": [], "chat_template": None},
        "files": files, "sampling": {}, "quantization_error": {}, "provenance": {},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))


# Float32 rows are exact. Float16 rounds a row to 2^-11 of its value; the sum with the gate, W_out and the norm that
# follow keep the error of y (whose RMS is about its norm's weight, 1) of that order.
@pytest.mark.parametrize(("row_type", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("name", ["meki_module", "meki_module_fc1norm"])
def test_golden_outputs_through_the_engine(tmp_path: Path, name: str, row_type: str, tolerance: float) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        golden = dict(file)
    for batch, ids in enumerate(golden["input_ids"]):
        directory = tmp_path / str(batch)
        directory.mkdir()
        hidden = np.zeros_like(golden["word_emb"])
        hidden[ids] = golden["hidden"][batch]
        assert len(set(ids.tolist())) == len(ids)  # a token has one hidden state
        golden_package(directory, golden, hidden, row_type)
        y = Engine(directory).logits(ids.tolist())[:, : golden["word_emb"].shape[1]]
        np.testing.assert_allclose(y, golden["y_folded"][batch], rtol=0, atol=tolerance)
        np.testing.assert_allclose(y, golden["y_train"][batch], rtol=0, atol=tolerance)
