"""Megatron-LM core 0.12 checkpoints (`--ckpt-format torch`): dense decoders, and MeKi as its training code saves it."""

from __future__ import annotations

import argparse
import functools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..config import ModelConfig
from .checkpoint import Checkpoint, CheckpointError, Part, make_config
from .torch_file import TorchFile, is_torch_zip, load_torch_file

_FILE = "model_optim_rng.pt"
_TRACKER = "latest_checkpointed_iteration.txt"
_DISTRIBUTED = (".metadata", "common.pt", "*.distcp")
"""What a checkpoint directory of the formats torch_dist, torch_dcp and zarr has."""

_CLASSES = {
    "_io": "BytesIO",  # extra states of Transformer Engine
    "numpy": "dtype ndarray",  # random number generators
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "pathlib": "PosixPath",
    "signal": "Signals",
    "torch._C": "Generator",
    "types": "SimpleNamespace",
    "megatron.core.enums": "ModelType Fp4Recipe Fp8Recipe",
    "megatron.core.optimizer.optimizer_config": "OptimizerConfig",
    "megatron.core.rerun_state_machine": "Call Caller RerunDiagnostic RerunMode RerunState RerunValidationStatus",
    "megatron.core.transformer.enums": "AttnBackend AttnMaskType AttnType CudaGraphScope LayerType ModelType",
}
_STAND_INS = frozenset(f"{module}.{name}" for module, names in _CLASSES.items() for name in names.split())
"""What checkpoints hold beside weights and arguments; none of it is needed."""

_MERGE = "merge it to size 1 first, with Megatron-LM's tools/checkpoint/convert.py"
_SUPPORTED: dict[str, tuple[Any, str]] = {
    "tensor_model_parallel_size": (1, _MERGE),
    "pipeline_model_parallel_size": (1, _MERGE),
    "num_experts": (0, "mixtures of experts are not supported"),
    "normalization": ("RMSNorm", "LayerNorm is not supported"),
    "apply_layernorm_1p": (False, "norms whose gain is centred on zero are not supported"),
    "apply_residual_connection_post_layernorm": (False, "residuals after the norm are not supported"),
    "add_bias_linear": (False, "biases of all linear layers are not supported, those of --add-qkv-bias are"),
    "swiglu": (True, "feed-forward layers other than SwiGLU are not supported"),
    "squared_relu": (False, "feed-forward layers other than SwiGLU are not supported"),
    "position_embedding_type": ("rope", "positions other than rotary ones are not supported"),
    "rotary_percent": (1.0, "partly rotated heads are not supported"),
    "rotary_interleaved": (False, "interleaved rotation is not supported"),
    "rotary_seq_len_interpolation_factor": (1, "scaled rotary frequencies are not supported"),
    "use_rope_scaling": (False, "scaled rotary frequencies are not supported"),
    "no_rope_freq": (0, "layers without rotary positions are not supported"),
    "multi_latent_attention": (False, "latent attention is not supported"),
    "qk_l2_norm": (False, "QK-norm without gains is not supported"),
    "window_size": (None, "windowed attention is not supported"),
    "mtp_num_layers": (0, "multi-token prediction is not supported"),
    "hybrid_override_pattern": (None, "hybrids with state-space layers are not supported"),
}
"""What an argument that changes the arithmetic must be, where it is stored, and what is wrong otherwise."""

_EMBEDDING = "embedding.word_embeddings.weight"
_MEMORY = "meki_module.embeddings.weight"
_LINEAR_NORM = "linear_fc1.layer_norm_weight"
_IGNORED = re.compile(r"(^|\.)_extra_state\d*$|^rotary_pos_emb\.inv_freq$")
_EXPERTS = re.compile(r"\.(experts|shared_experts|router)\.")
_BIAS = re.compile(r"(layer_?norm_bias|norm\.bias|(linear_proj|linear_fc1|linear_fc2)\.bias)$")


def is_megatron(path: Path) -> bool:
    """Whether `path` looks like a Megatron-LM checkpoint of any format, or like a file of torch.save."""
    if path.is_file():
        return path.name == _FILE or is_torch_zip(path)
    patterns = (_TRACKER, _FILE, "mp_rank_*", "iter_*", *_DISTRIBUTED)
    return any(next(path.glob(pattern), None) for pattern in patterns)


def open_megatron(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The model in `path`: a model_optim_rng.pt, or a directory above it.

    FileNotFoundError; CheckpointError for what cannot be converted.
    """
    file = _find(path)
    entries = load_torch_file(file, _STAND_INS)
    if not isinstance(entries, dict):
        raise CheckpointError(
            f"{file}: holds a {type(entries).__name__}, expected the dict of a Megatron-LM checkpoint"
        )
    args = _arguments(file, entries)
    tensors = TorchFile(file, _state_dict(file, entries))
    _check_names(file, tensors.shapes)
    config = make_config(file, _fields(file, args, tensors.shapes), overrides)
    iteration = entries.get("iteration")
    return Checkpoint(
        file,
        config,
        tensors,
        _parts(config, tensors.shapes),
        read_tokenizer=lambda: None,
        provenance={
            "source": path.resolve().name,
            "format": "megatron",
            **({"iteration": str(iteration)} if type(iteration) is int else {}),
        },
        ignored=lambda name: False,
        trimmed="vocab_size" in overrides,
    )


def _find(path: Path) -> Path:
    """The one file with the weights. CheckpointError for directories of several, and of other formats."""
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file or directory")
    if path.is_file():
        file = path
    else:
        directory = _iteration(path)
        if found := [entry.name for pattern in _DISTRIBUTED for entry in directory.glob(pattern)]:
            raise CheckpointError(
                f"{directory}: a distributed checkpoint (it has {found[0]}), expected one of --ckpt-format torch; "
                "let Megatron-LM load it with --ckpt-convert-format torch --ckpt-convert-save DIRECTORY"
            )
        ranks = sorted(entry.name for entry in directory.glob("mp_rank_*"))
        file = directory / (ranks[0] if ranks else "") / _FILE
    ranks = sorted(entry.name for entry in file.parent.parent.glob("mp_rank_*"))
    if file.parent.name in ranks and ranks != ["mp_rank_00"]:
        raise CheckpointError(
            f"{file.parent.parent}: a tensor-, pipeline- or expert-parallel checkpoint ({', '.join(ranks[:3])}"
            f"{', ...' if len(ranks) > 3 else ''}), expected mp_rank_00 alone; {_MERGE}"
        )
    if not file.is_file():
        raise CheckpointError(f"{path}: no {_FILE} there; expected it in mp_rank_00, or {_TRACKER} at the root")
    return file


def _iteration(path: Path) -> Path:
    """The directory of the checkpoint that the root `path` names as its latest; else `path`."""
    tracker = path / _TRACKER
    if not tracker.is_file():
        return path
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if text != "release" and not re.fullmatch("[0-9]{1,12}", text):
        raise CheckpointError(
            f"{tracker}: got {text[:40]!r}, expected an iteration or 'release'; name a checkpoint below"
        )
    directory = path / (text if text == "release" else f"iter_{int(text):07d}")
    if not directory.is_dir():
        raise CheckpointError(f"{tracker}: names {directory.name}, which is not there; name another checkpoint below")
    return directory


def _arguments(path: Path, entries: Mapping[Any, Any]) -> dict[str, Any]:
    """The arguments of the training run, empty if they were not saved. CheckpointError for what is not supported."""
    saved = entries.get("args", argparse.Namespace())
    if not isinstance(saved, argparse.Namespace):
        raise CheckpointError(f"{path}: args is a {type(saved).__name__}, expected an argparse.Namespace")
    # A value that is not plain (an enumeration, a tensor) becomes its type's name, which is no number and no flag.
    args = {
        name: value if isinstance(value, bool | int | float | str | None) else type(value).__name__
        for name, value in vars(saved).items()
    }
    for name, (expected, remedy) in _SUPPORTED.items():
        got = args.get(name)
        if got is not None and got != expected:
            raise CheckpointError(f"{path}: {name} is {got!r} in its args, expected {expected!r}: {remedy}")
    return args


def _state_dict(path: Path, entries: Mapping[Any, Any]) -> dict[str, Tensor]:
    if "model0" in entries:
        raise CheckpointError(
            f"{path}: has model0, model1, ... of virtual pipeline stages, expected one model; {_MERGE}"
        )
    model = entries.get("model")
    if not isinstance(model, dict):
        raise CheckpointError(
            f"{path}: no state dict under 'model', only {sorted(map(str, entries))[:8]}; expected a checkpoint that "
            "Megatron-LM saved with --ckpt-format torch"
        )
    tensors = {name: value for name, value in model.items() if not _IGNORED.search(str(name))}
    for name, value in tensors.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: {name!r} in its model is a {type(value).__name__}, expected a tensor; "
                "it is no model of Megatron-LM core"
            )
    return tensors


def _check_names(path: Path, names: Mapping[str, Any]) -> None:
    """CheckpointError for tensors that say what the arguments did not."""
    if _EMBEDDING not in names:
        raise CheckpointError(f"{path}: no tensor {_EMBEDDING}; expected a whole Megatron-LM core language model")
    for name in names:
        if _EXPERTS.search(name):
            raise CheckpointError(f"{path}: has {name}, expected a dense model: {_SUPPORTED['num_experts'][1]}")
        if match := _BIAS.search(name):
            rule = "normalization" if "norm" in match[0] else "add_bias_linear"
            raise CheckpointError(f"{path}: has {name}, expected no such bias: {_SUPPORTED[rule][1]}")


def _fields(path: Path, args: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Any]:
    """Fields of ModelConfig, None where the checkpoint does not say."""
    heads = args.get("num_attention_heads")
    untied = args.get("untie_embeddings_and_output_weights", "output_layer.weight" in shapes)
    table = next((name for name in shapes if name.endswith(_MEMORY)), None)
    for name in (_EMBEDDING, table):
        if name is not None and len(shapes[name]) != 2:
            raise CheckpointError(f"{path}: tensor {name} has shape {list(shapes[name])}, expected [tokens, width]")
    return {
        "vocab_size": shapes[_EMBEDDING][0],
        "layers": args.get("num_layers"),
        "hidden": args.get("hidden_size"),
        "ffn": args.get("ffn_hidden_size"),
        "heads": heads,
        "kv_heads": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "head_dim": args.get("kv_channels"),
        "memory_dim": shapes[table][1] if table else 0,
        "context": args.get("max_position_embeddings") or args.get("seq_length"),
        "rope_theta": args.get("rotary_base"),
        "norm_eps": args.get("norm_epsilon"),
        # The presence of a tensor in one layer asks for it in all: where it lacks, it is an error that names it.
        "qk_norm": bool(args.get("qk_layernorm")) or any(name.endswith(".q_layernorm.weight") for name in shapes),
        "projector_norm": any(name.endswith(f"word_emb_projection.{_LINEAR_NORM}") for name in shapes),
        "qkv_bias": bool(args.get("add_qkv_bias")) or any(name.endswith(".linear_qkv.bias") for name in shapes),
        "tied_embeddings": not untied,
    }


def _parts(config: ModelConfig, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    parts = {
        "embed_tokens.weight": Part(_EMBEDDING, (config.vocab_size, config.hidden)),
        "norm.weight": Part("decoder.final_layernorm.weight", (config.hidden,)),
    }
    if not config.tied_embeddings:
        parts["lm_head.weight"] = Part("output_layer.weight", (config.vocab_size, config.hidden))
    for layer in range(config.layers):
        prefix = f"decoder.layers.{layer}."
        its = {**_attention(config), **_feed_forward(config, f"{prefix}mlp.{_LINEAR_NORM}" in shapes)}
        if config.memory_dim:
            its |= _memory(config, {name: shapes.get(f"{prefix}meki_module.{name}") for name in _SCALES})
        parts |= {
            f"layers.{layer}.{name}": Part(prefix + part.name, part.shape, part.convert) for name, part in its.items()
        }
    return parts


def _attention(config: ModelConfig) -> dict[str, Part]:
    hidden, head_dim, queries = config.hidden, config.head_dim, config.heads // config.kv_heads
    packed = config.kv_heads * (queries + 2) * head_dim
    parts = {
        "input_layernorm.weight": Part("self_attention.linear_qkv.layer_norm_weight", (hidden,)),
        "self_attn.o_proj.weight": Part("self_attention.linear_proj.weight", (hidden, config.heads * head_dim)),
    }
    # Each group's query heads are followed by its key head and its value head.
    for name, heads in (("q", slice(queries)), ("k", slice(queries, queries + 1)), ("v", slice(queries + 1, None))):
        unpack = functools.partial(_unpack_heads, groups=config.kv_heads, head_dim=head_dim, heads=heads)
        parts[f"self_attn.{name}_proj.weight"] = Part("self_attention.linear_qkv.weight", (packed, hidden), unpack)
        if config.qkv_bias:
            parts[f"self_attn.{name}_proj.bias"] = Part("self_attention.linear_qkv.bias", (packed,), unpack)
        if config.qk_norm and name != "v":
            parts[f"self_attn.{name}_norm.weight"] = Part(f"self_attention.{name}_layernorm.weight", (head_dim,))
    return parts


def _unpack_heads(packed: Tensor, groups: int, head_dim: int, heads: slice) -> Tensor:
    """Some heads of every group. packed: [groups * heads a group * head_dim, ...]."""
    grouped = packed.view(groups, -1, head_dim, *packed.shape[1:])
    return grouped[:, heads].reshape(-1, *packed.shape[1:])


def _feed_forward(config: ModelConfig, fused_norm: bool) -> dict[str, Part]:
    """fused_norm: the norm before it is part of its first linear layer, as dense models have it."""
    norm = f"mlp.{_LINEAR_NORM}" if fused_norm else "pre_mlp_layernorm.weight"
    return {
        "post_attention_layernorm.weight": Part(norm, (config.hidden,)),
        **_swiglu("mlp", "mlp", config.hidden, config.ffn, config.hidden),
    }


def _swiglu(name: str, source: str, inputs: int, intermediate: int, outputs: int) -> dict[str, Part]:
    """The first linear layer has the gate's rows, then the up projection's."""
    fc1, shape = f"{source}.linear_fc1.weight", (2 * intermediate, inputs)
    return {
        f"{name}.gate_proj.weight": Part(fc1, shape, lambda rows: rows[:intermediate]),
        f"{name}.up_proj.weight": Part(fc1, shape, lambda rows: rows[intermediate:]),
        f"{name}.down_proj.weight": Part(f"{source}.linear_fc2.weight", (outputs, intermediate)),
    }


_SCALES = ("alpha_scale", "beta_scale")


def _memory(config: ModelConfig, scales: Mapping[str, tuple[int, ...] | None]) -> dict[str, Part]:
    """scales: the shapes of the scalars in the checkpoint, [] or [1]."""
    hidden, width = config.hidden, config.memory_dim
    names = {
        "embeddings.weight": (config.vocab_size, width),
        "gate_proj.weight": (width, hidden),
        "out_proj.weight": (hidden, width),
        "mix_norm.weight": (width,),
        "post_norm.weight": (hidden,),
    }
    parts = {f"meki.{name}": Part(f"meki_module.{name}", shape) for name, shape in names.items()}
    for name, shape in scales.items():
        stored = (1,) if shape == (1,) else ()
        parts[f"meki.{name}"] = Part(f"meki_module.{name}", stored, lambda scale: scale.reshape(()))
    projector = "word_emb_projection"
    parts |= _swiglu(f"meki.{projector}", f"meki_module.{projector}", hidden, hidden // 2, width)
    if config.projector_norm:
        parts[f"meki.{projector}.fc1_norm.weight"] = Part(f"meki_module.{projector}.{_LINEAR_NORM}", (hidden,))
    return parts
