"""The published module's own outputs through everything: fold, ROM file, prefetcher, stages, session."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from onnx import TensorProto, numpy_helper
from tokenizers import Tokenizer, models

from meki import Engine
from meki.models.architectures.llama import LlamaConfig
from meki.models.graph import Stage
from meki.models.graph.tensors import TensorFile
from meki.models.graph.weights import WEIGHTS_FILE, WeightStore
from meki.models.memories.meki import MeKi
from meki.models.rom import RomLayout, write_rom

DATA = Path(__file__).parent.parent / "data"


def golden_module(golden: dict[str, np.ndarray]) -> MeKi:
    vocab_size, memory_dim = golden["meki.embeddings.weight"].shape
    hidden = golden["word_emb"].shape[1]
    norm = "meki.word_emb_projection.fc1_norm.weight" in golden
    module = MeKi(vocab_size, hidden, memory_dim, float(golden["eps"]), norm)
    prefix = "meki."
    state = {name[len(prefix) :]: torch.from_numpy(value) for name, value in golden.items() if name.startswith(prefix)}
    module.load_state_dict(state)
    return module


def golden_package(directory: Path, golden: dict[str, np.ndarray], hidden: np.ndarray, row_type: str) -> None:
    """A package whose "decoder" is the golden module alone: stage 0 gives the golden hidden states by position, stage 1
    is the exporter's own injection, and the module's output y, padded to the vocabulary, stands for the logits."""
    module = golden_module(golden)
    vocab_size, memory_dim = module.embeddings.weight.shape
    width, length = hidden.shape[1], len(hidden)
    config = LlamaConfig(
        vocab_size=vocab_size, layers=1, hidden=width, ffn=1, heads=1, kv_heads=1, head_dim=16, memory_dim=memory_dim,
        context=length, norm_eps=float(golden["eps"]),
    )  # fmt: skip
    state = {f"layers.0.meki.{name}": value.numpy() for name, value in module.state_dict().items()}

    def constant(stage: Stage, name: str, value: np.ndarray) -> str:
        return stage.constant(numpy_helper.from_array(value, name))

    with (directory / WEIGHTS_FILE).open("wb") as file:
        store = WeightStore(state.__getitem__, "float32", TensorFile(file, WEIGHTS_FILE), config.ram_parameters)
        stage = Stage(config, store)
        total = stage.input("total_sequence_length", [], TensorProto.INT32)
        ids = stage.input("token_ids", [1, "T"], TensorProto.INT64)
        cache = ["blocks", 1, "block_bytes"]
        past = stage.input("past.0", cache, TensorProto.UINT8)
        stage.op("Identity", [past], stage.output("present.0", cache, TensorProto.UINT8))
        count = stage.op("Size", [ids], "count")
        last = stage.op("Cast", [total], "last", to=TensorProto.INT64)
        one = constant(stage, "one", np.array(1, np.int64))
        positions = stage.op("Range", [stage.op("Sub", [last, count], "first"), last, one], "positions")
        h = stage.op("Gather", [constant(stage, "table", hidden), positions], "h.flat")
        axis = constant(stage, "axis", np.array([0], np.int64))
        normed = "layers.0.post_attention_layernorm.out"  # the FFN's input, where the exporter looks for it
        stage.op("Unsqueeze", [h, axis], stage.output(normed, [1, "T", width]))
        stage.save(directory / "stage0.onnx")

        stage = Stage(config, store)
        rows = stage.input("rows", [1, "T", memory_dim])
        h = stage.input(normed, [1, "T", width])
        index = stage.input("logit_index", ["K"], TensorProto.INT64)
        y = stage.inject(constant(stage, "zero", np.zeros(1, np.float32)), h, "", rows, 0)
        axis = constant(stage, "axis", np.array([0], np.int64))
        y = stage.op("Gather", [stage.op("Squeeze", [y, axis], "y.flat"), index], "y.selected")
        pads = constant(stage, "pads", np.array([0, 0, 0, vocab_size - width], np.int64))
        stage.op("Pad", [y, pads], stage.output("logits", ["K", vocab_size]))
        stage.save(directory / "stage1.onnx")

    table = module.fold(torch.from_numpy(golden["word_emb"]), block=40).numpy()
    summary = write_rom(directory / "memory.rom", RomLayout(vocab_size, 1, memory_dim, row_type), [table[None]])
    (directory / "tokenizer.json").write_text(Tokenizer(models.BPE()).to_str())
    files = {
        path.name: {"bytes": path.stat().st_size, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
        for path in directory.iterdir()
    }
    manifest = {
        "format": "meki-package", "version": 3, "name": "golden", "architecture": config.to_dict(),
        "memory": {"kind": "meki", "file": "memory.rom", "row_type": row_type, "content_id": summary.content_id},
        "stages": [{"file": "stage0.onnx", "rows": None}, {"file": "stage1.onnx", "rows": [0, 1]}],
        "dense_stages": [{"file": "stage0.onnx"}], "weights": {"type": "float32", "block": None},
        "tokenizer": {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": [], "chat_template": None},
        "files": files, "sampling": {}, "quantization_error": {}, "provenance": {},
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))


# Float32 rows are exact. Float16 rounds a row to 2^-11 of its value; the sum with the gate, W_out and the norm that
# follow keep the error of y (whose RMS is about its gain, 1) of that order.
@pytest.mark.parametrize(("row_type", "tolerance"), [("float32", 1e-5), ("float16", 2e-3)])
@pytest.mark.parametrize("name", ["meki_module", "meki_module_fc1norm"])
def test_golden_outputs_through_the_engine(tmp_path: Path, name: str, row_type: str, tolerance: float) -> None:
    with np.load(DATA / f"{name}.npz") as file:
        golden = dict(file)
    for batch, ids in enumerate(golden["input_ids"]):
        directory = tmp_path / str(batch)
        directory.mkdir()
        golden_package(directory, golden, golden["hidden"][batch], row_type)
        y = Engine(directory).logits(ids.tolist())[:, : golden["word_emb"].shape[1]]
        np.testing.assert_allclose(y, golden["y_folded"][batch], rtol=0, atol=tolerance)
        np.testing.assert_allclose(y, golden["y_train"][batch], rtol=0, atol=tolerance)
