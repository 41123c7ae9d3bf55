"""Writes the seeds of the fuzz targets that are made, of the bundled meki-tiny where that is possible.

    python -m fuzz.seeds

What a run has found is beside them, under names that begin with "found-", and stays as it is.
"""

from __future__ import annotations

import argparse
import io
import json
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnx
import torch
from safetensors.numpy import save as save_safetensors

from fuzz.targets import tiny
from meki.models.architectures.llama import LlamaConfig

HERE = Path(__file__).parent
TINY = HERE.parent / "models" / "packages" / "meki-tiny"

PACKAGE_FILES = ("manifest.json", "stage0.onnx", "stage1.onnx", "dense.onnx", "weights.bin", "memory.rom")
"""As package.cc counts them."""
REPLACE, INSERT, ERASE, TRUNCATE = range(4)
RESTATE, SEAL, DENSE, INLINE, MMAP, INT4, FLOAT16 = 1, 2, 4, 8, 16, 32, 64


def rom_headers() -> Iterator[tuple[str, bytes]]:
    """The fields of a header, and where the file is small the first bytes of a bundle (docs/rom-format.md)."""
    yield "meki-tiny", (TINY / "memory.rom").read_bytes()[:96]
    bits = {1: 16, 2: 8, 3: 4, 4: 32}
    vocab_size, layers, row_dim = 3, 2, 33
    types = ((1, 0, "float16"), (2, row_dim, "int8"), (2, 32, "int8-grouped"), (3, 32, "int4"), (4, 0, "float32"))
    for row_type, group, name in types:
        groups = -(-row_dim // group) if group else 0
        bundle = layers * (2 * groups + (row_dim * bits[row_type] + 7) // 8) + 4
        stride = -(-bundle // 64) * 64
        size = -(-(4096 + vocab_size * stride) // 4096) * 4096
        fields = struct.pack("<IIQIIIIQQQQ", 1, 0x01020304, vocab_size, layers, row_dim, row_type, group,
                             bundle, stride, 4096, size)  # fmt: skip
        yield name, b"MEKIROM\n" + fields + bytes(16) + bytes(8) + bytes(range(64))


def nodes() -> Iterator[tuple[str, bytes]]:
    yield "values", json.dumps({"a": [1, -1, 2**64 - 1, 1e300, True, None, "x", "a/b", "..", {"a": []}]}).encode()
    yield "texts", json.dumps(["\ud83d\ude00", "\u0000", "\\", "x" * 256, "\x7f"]).encode()
    yield "deep", b"[" * 64 + b"]" * 64


def target(stages: list[dict[str, Any]]) -> dict[str, Any]:
    dense = [{"file": "a.onnx", "rows": None}]
    files = ["e.onnx", *(f"{name}{end}" for name in "ahsd" for end in (".onnx", "_qnn.bin"))]
    return {
        **{"chip": "A chip", "soc_model": 69, "htp_arch": 79, "precision": "int4", "context": 256, "chunk": 32},
        **{"embed": "e.onnx", "head": "h.onnx", "decode": stages, "prefill": stages},
        **{"dense_decode": dense, "dense_prefill": dense, "files": {name: {"bytes": 1} for name in files}},
    }


STAGES: list[dict[str, Any]] = [{"file": "d.onnx", "rows": None}, {"file": "s.onnx", "rows": [0, 4]}]


def qnn_targets() -> Iterator[tuple[str, bytes]]:
    yield "one", json.dumps({"sm8750": target(STAGES)}).encode()
    plain = {**target(STAGES), "dense_decode": None, "dense_prefill": None}
    yield "two", json.dumps({"sm8750": plain, "sm8650": plain}).encode()


def manifests() -> Iterator[tuple[str, bytes]]:
    text = (TINY / "manifest.json").read_bytes()
    yield "meki-tiny", text
    manifest = json.loads(text)
    template = {"file": "chat_template.jinja", "variables": {"eos_token": "</s>"}}
    manifest["tokenizer"]["chat_template"] = template
    manifest["files"]["chat_template.jinja"] = {"bytes": 1, "sha256": "0" * 64}
    yield "compiled", json.dumps({**manifest, "qnn": {"sm8750": target(STAGES)}}).encode()
    numbers = {"multipliers": [3, 5, 7], "primes": [2, 3, 5, 7], "offsets": [0, 2, 5, 10]}
    address = {"kind": "ngram_hash", "ngram": 3, "heads": 2, "pad": 0, "reset": [0], "layers": [numbers] * 8,
               "canonical": {"file": "canonical_ids.bin", "crc32c": 0}}  # fmt: skip
    files = {**manifest["files"], "canonical_ids.bin": {"bytes": 1, "sha256": "0" * 64}}
    memory = {**manifest["memory"], "kind": "engram", "address": address}
    yield "n-grams", json.dumps({**manifest, "memory": memory, "files": files}).encode()
    dense = {**manifest, "memory": None, "dense_stages": None, "stages": [{"file": "dense.onnx", "rows": None}]}
    yield "dense", json.dumps(dense).encode()
    own = {"kv_heads": 1, "head_dim": 32, "window": 4}
    caches = [own, {**own, "window": 0}, *({"shared": layer % 2} for layer in range(6))]
    yield "caches", json.dumps({**manifest, "version": 6, "kv_caches": caches}).encode()


def graphs() -> Iterator[tuple[str, bytes]]:
    yield "stage0", (TINY / "stage0.onnx").read_bytes()
    text = {"ep_cache_context": "decode.0_qnn.bin", "source": "QNN"}
    node = onnx.helper.make_node("EPContext", ["x"], ["y"], domain="com.microsoft", embed_mode=0, **text)
    compiled = onnx.helper.make_model(onnx.helper.make_graph([node], "decode", [], []), ir_version=9)
    yield "compiled", compiled.SerializeToString()


def edit(file: str, action: int, where: int, data: bytes = b"") -> bytes:
    return bytes([PACKAGE_FILES.index(file), action, *where.to_bytes(3, "big"), len(data)]) + data


def packages() -> Iterator[tuple[str, bytes]]:
    for name, options in (("as-it-is", 0), ("dense-float32", DENSE | INT4 | FLOAT16), ("int4-mmap", INT4 | MMAP)):
        yield name, bytes([options])
    manifest = (TINY / "manifest.json").read_bytes()

    def field(text: str, value: bytes, options: int = 0) -> bytes:
        where = manifest.index(text.encode()) + len(text)
        return bytes([options]) + edit("manifest.json", REPLACE, where, value)

    yield "context", field('"context": ', b"9")
    yield "head-dim", field('"head_dim": ', b"64")
    yield "eos", field('"eos_token_ids": [\n      ', b"7")
    for file in PACKAGE_FILES[1:]:
        yield f"truncated-{file}", bytes([RESTATE]) + edit(file, TRUNCATE, 4096)
    graph = (TINY / "stage1.onnx").read_bytes()
    for name in ("heads", "epsilon", "gate_proj_type", "parts", "past.1"):
        text = name.encode()
        yield f"graph-{name}", bytes([FLOAT16]) + edit("stage1.onnx", REPLACE, graph.index(text), text[::-1])
    yield "graph-longer", bytes([RESTATE]) + edit("stage1.onnx", INSERT, 100, b"abcdef")
    yield "graph-shorter", bytes([RESTATE | DENSE]) + edit("dense.onnx", ERASE, 300, b"abcdef")
    yield "weights-nan", bytes([INLINE]) + edit("weights.bin", REPLACE, 512, b"\xff" * 32)  # scales
    yield "rows-nan", bytes([SEAL]) + edit("memory.rom", REPLACE, 4096, b"\xff" * 255)
    yield "rows-damaged", bytes([MMAP]) + edit("memory.rom", REPLACE, 4200, b"\x00\x01")


CONFIG = {
    **{"model_type": "llama", "vocab_size": 8, "num_hidden_layers": 1, "hidden_size": 4, "intermediate_size": 4},
    **{"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 16},
    **{"rms_norm_eps": 1e-6, "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": True},
}
SHAPES = LlamaConfig.from_settings(
    {"vocab_size": 8, "layers": 1, "hidden": 4, "ffn": 4, "heads": 2, "kv_heads": 1, "head_dim": 2, "context": 16,
     "rope_theta": 10000.0, "qk_norm": False, "memory_dim": 0}
).shapes()  # fmt: skip


def configs() -> Iterator[tuple[str, bytes]]:
    """Several files, as targets.py has them."""

    def files(config: dict[str, Any], *others: dict[str, Any]) -> bytes:
        return b"\0".join(json.dumps(values).encode() for values in (config, *others))

    token = {"content": "<|story|>", "special": True}
    yield "llama", files(CONFIG, {"eos_token": token, "chat_template": "{{ messages }}", "add_bos_token": True})
    scaling = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 8, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0}  # fmt: skip
    sampling = {"do_sample": True, "temperature": 0.5, "top_k": 3, "eos_token_id": [0, 1]}
    yield "llama3", files({**CONFIG, "rope_scaling": scaling}, {}, sampling, {"bos_token": "a"})
    templates = [{"name": "default", "template": "{{ messages }}"}]
    yield "qwen", files({**CONFIG, "model_type": "qwen3", "use_sliding_window": False}, {"chat_template": templates})
    mixture = {"moe_intermediate_size": 4, "num_experts": 4, "num_experts_per_tok": 2, "norm_topk_prob": True}
    yield "qwen-moe", files({**CONFIG, "model_type": "qwen3_moe", **mixture, "mlp_only_layers": []})
    gemma = {"hidden_activation": "gelu_pytorch_tanh", "sliding_window": 4, "num_hidden_layers": 4}
    rope = {kind: {"rope_type": "default", "rope_theta": 1e4} for kind in ("sliding_attention", "full_attention")}
    yield "gemma3", files({**CONFIG, **gemma, "model_type": "gemma3_text", "rope_parameters": rope})
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "num_kv_shared_layers": 2}
    ple = {"hidden_size_per_layer_input": 2, "vocab_size_per_layer_input": 8, "final_logit_softcapping": 30.0}
    text = {**CONFIG, **gemma, **kinds, **ple, "model_type": "gemma4_text", "global_head_dim": 4}
    yield "gemma4", files({"model_type": "gemma4", "text_config": text}, {"eos_token": "<turn|>"})
    own = {"model_type": "meki", "qk_norm": True, "qkv_bias": False, "memory_dim": 4, "projector_norm": False}
    yield "meki", files({**CONFIG, **own, "rope_factors": [1.5]})
    numbers = {
        "engram_dim": 4,
        "engram_layers": [0],
        "engram_ngram": 2,
        "engram_heads": 1,
        "engram_multipliers": [[5, 7]],
        "engram_primes": [[3]],
    }
    yield "engram", files({**CONFIG, **own, "memory_dim": 0, **numbers, "engram_reset": [2]})
    for kind in ("linear", "llama3"):
        yield f"huge-head-{kind}", files({**CONFIG, "head_dim": 10**12, "rope_scaling": {**scaling, "rope_type": kind}})
    yield "many-layers", files({**CONFIG, "num_hidden_layers": 65535})


def weights() -> dict[str, Any]:
    return {f"model.{name}": np.ones(shape, np.float16) for name, shape in SHAPES.items()}


def safetensors() -> Iterator[tuple[str, bytes]]:
    yield "llama", save_safetensors(weights())
    yield "head", save_safetensors({"lm_head.weight": np.ones((8, 4), np.float32)})


def quantized() -> Iterator[tuple[str, bytes]]:
    """config.json and model.safetensors, of matrices with 64 inputs or 32."""
    wide = {"hidden_size": 64, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16}
    names = ("vocab_size", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "context")
    settings = dict(zip(names, (8, 1, 64, 32, 2, 1, 16, 16), strict=True))
    shapes = LlamaConfig.from_settings({**settings, "rope_theta": 10000.0, "qk_norm": False, "memory_dim": 0}).shapes()
    generator = np.random.default_rng(0)

    def words(*shape: int) -> Any:
        return generator.integers(-(2**31), 2**31, shape, dtype=np.int32)

    def gptq(n: int, k: int) -> dict[str, Any]:
        groups = np.arange(k, dtype=np.int32)[::-1] % (k // 32)
        scales = np.full((k // 32, n), 0.01, np.float16)
        return {"qweight": words(k // 8, n), "qzeros": words(k // 32, n // 8), "scales": scales, "g_idx": groups}

    def awq(n: int, k: int) -> dict[str, Any]:
        scales = np.full((k // 32, n), 0.01, np.float16)
        return {"qweight": words(k, n // 8), "qzeros": words(k // 32, n // 8), "scales": scales}

    def compressed(n: int, k: int) -> dict[str, Any]:
        packed = {"weight_packed": words(n, k // 4), "weight_zero_point": words(n // 4, 1)}
        return {**packed, "weight_scale": np.full((n, 1), 0.01, np.float16), "weight_shape": np.array([n, k])}

    weights = {"num_bits": 8, "group_size": None, "symmetric": False, "strategy": "channel", "actorder": None}
    kinds: dict[str, tuple[Callable[[int, int], dict[str, Any]], dict[str, Any]]] = {
        "gptq": (gptq, {"group_size": 32, "desc_act": True, "sym": False, "checkpoint_format": "gptq"}),
        "awq": (awq, {"group_size": 32, "version": "gemm", "zero_point": True}),
        "auto-round": (awq, {"group_size": 32, "packing_format": "auto_round:auto_awq", "extra_config": {"a": {}}}),
        "compressed-tensors": (compressed, {"format": "pack-quantized", "config_groups": {"a": {"weights": weights}}}),
    }
    for method, (pack, its) in kinds.items():
        tensors: dict[str, Any] = {}
        for name, shape in shapes.items():
            if name.endswith("proj.weight"):
                stem = f"model.{name.removesuffix('weight')}"
                tensors |= {stem + field: values for field, values in pack(*shape).items()}
            else:
                tensors[f"model.{name}"] = np.ones(shape, np.float16)
        config = {**CONFIG, **wide, "quantization_config": {"quant_method": method, **its}}
        yield method, json.dumps(config).encode() + b"\0" + save_safetensors(tensors)


def indexes() -> Iterator[tuple[str, bytes]]:
    names = dict.fromkeys(weights(), "a.safetensors") | {"lm_head.weight": "b.safetensors"}
    yield "two", json.dumps({"metadata": {"total_size": 1}, "weight_map": names}).encode()


def gguf_file(architecture: str, fill: Callable[[gguf.GGUFWriter], None]) -> bytes:
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "model.gguf")
        writer = gguf.GGUFWriter(path, architecture)
        fill(writer)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path.read_bytes()


def ggufs() -> Iterator[tuple[str, bytes]]:
    tokens = ["<unk>", "<s>", "</s>", "\u2581", "a", "b", "ab", "<0x0A>"]

    def fill(writer: gguf.GGUFWriter, model: str) -> None:
        writer.add_block_count(1)
        writer.add_embedding_length(4)
        writer.add_feed_forward_length(4)
        writer.add_head_count(2)
        writer.add_head_count_kv(1)
        writer.add_key_length(2)
        writer.add_context_length(16)
        writer.add_layer_norm_rms_eps(1e-6)
        writer.add_tokenizer_model(model)
        writer.add_tokenizer_pre("llama-bpe")
        writer.add_token_list(tokens)
        writer.add_token_merges(["a b"])
        writer.add_token_scores([-float(id) for id in range(len(tokens))])
        writer.add_token_types([2, 3, 3, 1, 1, 1, 1, 6])
        writer.add_eos_token_id(2)
        writer.add_chat_template("{{ messages }}")
        names = {"embed_tokens": "token_embd", "norm": "output_norm"}
        inner = {"input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm"}
        inner |= {f"self_attn.{a}_proj": f"attn_{b}" for a, b in (*zip("qkv", "qkv", strict=True), ("o", "output"))}
        inner |= {f"mlp.{name}_proj": f"ffn_{name}" for name in ("gate", "up", "down")}
        for name, shape in SHAPES.items():
            stem = name.removesuffix(".weight").removeprefix("layers.0.")
            stored = names[stem] if stem in names else f"blk.0.{inner[stem]}"
            writer.add_tensor(f"{stored}.weight", np.ones(shape, np.float16))

    def gemma4(writer: gguf.GGUFWriter) -> None:
        fill(writer, "gemma4")
        writer.add_embedding_length_per_layer_input(2)
        writer.add_shared_kv_layers(0)
        writer.add_sliding_window(4)
        writer.add_sliding_window_pattern([False])
        writer.add_key_length_swa(2)
        writer.add_final_logit_softcapping(30.0)

    yield "llama", gguf_file("llama", lambda writer: fill(writer, "llama"))
    yield "gpt2", gguf_file("qwen2", lambda writer: fill(writer, "gpt2"))
    yield "gemma4", gguf_file("gemma4", gemma4)
    yield "layers-with-a-point", gguf_file("smollm3", lambda writer: writer.add_float32("smollm3.block_count", 1.0))


def torch_zips() -> Iterator[tuple[str, bytes]]:
    """A whole file of torch.save, and the pickle of one."""
    args = argparse.Namespace(num_layers=1, hidden_size=4, ffn_hidden_size=4, num_attention_heads=2, kv_channels=2,
                              max_position_embeddings=16, rotary_base=10000, norm_epsilon=1e-6)  # fmt: skip
    model = {
        "embedding.word_embeddings.weight": torch.ones(8, 4),
        "decoder.final_layernorm.weight": torch.ones(4),
        "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight": torch.ones(4),
        "decoder.layers.0.self_attention.linear_qkv.weight": torch.ones(12, 4),
        "decoder.layers.0.self_attention.linear_proj.weight": torch.ones(4, 4),
        "decoder.layers.0.mlp.linear_fc1.layer_norm_weight": torch.ones(4),
        "decoder.layers.0.mlp.linear_fc1.weight": torch.ones(8, 4),
        "decoder.layers.0.mlp.linear_fc2.weight": torch.ones(4, 4),
    }
    file = io.BytesIO()
    torch.save({"args": args, "model": model, "iteration": 7}, file)
    yield "megatron", file.getvalue()
    with zipfile.ZipFile(file) as archive:
        yield "pickle", archive.read("archive/data.pkl")


def chat_templates() -> Iterator[tuple[str, bytes]]:
    turns = (
        "{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif -%}\n"
        "{%- for message in messages %}{{- '<|im_start|>' + message['role'] + '\\n' + message.content | trim -}}\n"
        "{%- if not loop.last %}{{ eos_token }}{% endif %}{%- endfor -%}\n"
        "{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    yield "turns", turns.encode()
    functions = (
        b"{% macro f(x) %}{{ x | tojson(indent=2) }}{% endmacro %}{% set ns = namespace(n=0) %}"
        b"{% for m in messages[::-1] %}{% set ns.n = ns.n + 1 %}{{ f(m) }}{% break %}{% endfor %}"
        b"{{ strftime_now('%d %b %Y') }}{% generation %}{{ ns.n }}{% endgeneration %}"
    )
    yield "functions", functions
    yield "power", b"{{ 9**(9**9) }}"
    yield "refusal", b"{{ raise_exception('roles must alternate') if messages | length > 1 }}"


def tokenizers() -> Iterator[tuple[str, bytes]]:
    tokens = {"<|story|>": 0, "a": 1, "b": 2, "ab": 3, "\u0120": 4}
    added = [{"id": 0, "content": "<|story|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False,
              "normalized": False}]  # fmt: skip
    parts: dict[str, Any] = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": {"type": "NFC"},
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
    }  # fmt: skip
    bpe = {"type": "BPE", "vocab": tokens, "merges": ["a b"], "unk_token": "a", "byte_fallback": False}
    yield "bpe", json.dumps({**parts, "model": bpe}).encode()
    split = {"type": "Split", "pattern": {"Regex": r"\p{L}+|\s"}, "behavior": "Isolated", "invert": False}
    words = {"type": "WordLevel", "vocab": tokens, "unk_token": "a"}
    replace = {"type": "Replace", "pattern": {"String": " "}, "content": "b"}
    yield "words", json.dumps({**parts, "model": words, "pre_tokenizer": split, "normalizer": replace}).encode()
    unigram = {"type": "Unigram", "unk_id": 0, "vocab": [["a", 0.0], ["b", -1.5]], "byte_fallback": True}
    yield "unigram", json.dumps({**parts, "model": unigram, "decoder": None, "pre_tokenizer": None}).encode()


def sessions() -> Iterator[tuple[str, bytes]]:
    """A file, and what sealed_session() of targets.py makes one of."""
    core = tiny().session()
    core.logits([5, 6, 7])
    core._core.append([8])
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory, "file")
        core.save(path)
        whole = path.read_bytes()
    yield "whole", whole
    sizes, content = whole[16:48], whole[256:-4]
    yield "sealed", sizes + content
    state = len(content) - 4 * 4
    yield "not-finite", sizes + content[:16] + b"\xff" * state
    yield "huge-tokens", struct.pack("<4Q", 2**62, 3, state, 2**64 - 1) + content[:99]
    yield "huge-state", struct.pack("<4Q", 4, 3, 2**64 - 1, 2**64 - 1) + content[:99]
    yield "outside", sizes + struct.pack("<4i", -1, 2**31 - 1, 0, 0) + content[16:]


SEEDS = {
    "config": configs,
    "safetensors": safetensors,
    "index": indexes,
    "quantized": quantized,
    "gguf": ggufs,
    "torch_zip": torch_zips,
    "chat_template": chat_templates,
    "tokenizer": tokenizers,
    "session": sessions,
    "graph": graphs,
    "rom_header": rom_headers,
    "node": nodes,
    "qnn_target": qnn_targets,
    "manifest": manifests,
    "package": packages,
}


def main() -> None:
    for name, seeds in SEEDS.items():
        directory = HERE / "seeds" / name
        directory.mkdir(parents=True, exist_ok=True)
        for made in directory.iterdir():
            if not made.name.startswith("found-"):
                made.unlink()
        for seed, data in seeds():
            (directory / seed).write_bytes(data)


if __name__ == "__main__":
    main()
