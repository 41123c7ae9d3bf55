"""Megatron-LM core 0.12 checkpoints (`--ckpt-format torch`): dense decoders, and MeKi as its training code saves it."""

from __future__ import annotations

import argparse
import functools
import operator
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from numpy.typing import NDArray
from torch import Tensor

from ..architectures.base import Architecture
from ..config import ConfigError
from ..memories import MEMORIES
from .checkpoint import Checkpoint, CheckpointError, Part, make_config
from .torch_file import TorchFile, is_torch_zip, load_torch_file

_FILE = "model_optim_rng.pt"
_TRACKER = "latest_checkpointed_iteration.txt"
_DISTRIBUTED = (".metadata", "common.pt", "*.distcp")
"""What a checkpoint directory of the formats torch_dist, torch_dcp and zarr has."""

_CLASSES = {
    "_io": "BytesIO",  # extra states of Transformer Engine
    "builtins": "getattr",  # as Python 3.11.0 to 3.11.3 pickle members of enumerations
    "numpy": "dtype ndarray",  # random number generators
    "numpy.core.multiarray": "_reconstruct scalar",
    "numpy._core.multiarray": "_reconstruct scalar",
    "pathlib": "PosixPath",
    "signal": "Signals SIGINT SIGTERM SIGUSR1 SIGUSR2",  # the latter as the same Pythons do
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
    "apply_layernorm_1p": (False, "norms whose weight is centred on zero are not supported"),
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
    "qk_l2_norm": (False, "QK-norm without weights is not supported"),
    "window_size": (None, "windowed attention is not supported"),
    "mtp_num_layers": (0, "multi-token prediction is not supported"),
    "hybrid_override_pattern": (None, "hybrids with state-space layers are not supported"),
}
"""What an argument that changes the arithmetic must be, where it is stored, and what is wrong otherwise."""

_EMBEDDING = "embedding.word_embeddings.weight"
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
    config = make_config(file, _fields(file, args, tensors.shapes), overrides, tensors)
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
    """Settings, None where the checkpoint does not say."""
    heads = args.get("num_attention_heads")
    untied = args.get("untie_embeddings_and_output_weights", "output_layer.weight" in shapes)
    if len(shapes[_EMBEDDING]) != 2:
        raise CheckpointError(
            f"{path}: tensor {_EMBEDDING} has shape {list(shapes[_EMBEDDING])}, expected [tokens, width]"
        )
    memory: dict[str, Any] = {}
    try:
        for kind in MEMORIES.values():
            memory |= kind.megatron_settings(shapes)
    except ConfigError as error:
        raise CheckpointError(f"{path}: {error}") from error
    return {
        "vocab_size": shapes[_EMBEDDING][0],
        "layers": args.get("num_layers"),
        "hidden": args.get("hidden_size"),
        "ffn": args.get("ffn_hidden_size"),
        "heads": heads,
        "kv_heads": args.get("num_query_groups") if args.get("group_query_attention") else heads,
        "head_dim": args.get("kv_channels"),
        **memory,
        "context": args.get("max_position_embeddings") or args.get("seq_length"),
        "rope_theta": args.get("rotary_base"),
        "norm_eps": args.get("norm_epsilon"),
        # The presence of a tensor in one layer asks for it in all: where it lacks, it is an error that names it.
        "qk_norm": bool(args.get("qk_layernorm")) or any(name.endswith(".q_layernorm.weight") for name in shapes),
        "qkv_bias": bool(args.get("add_qkv_bias")) or any(name.endswith(".linear_qkv.bias") for name in shapes),
        "tied_embeddings": not untied,
    }


def _parts(config: Architecture, shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    wanted = config.shapes()
    outer = {
        "embed_tokens.weight": _EMBEDDING,
        "norm.weight": "decoder.final_layernorm.weight",
        "lm_head.weight": "output_layer.weight",
    }
    parts = {name: Part(stored, wanted[name]) for name, stored in outer.items() if name in wanted}
    for layer in range(config.layers):
        prefix, stored_prefix = f"layers.{layer}.", f"decoder.layers.{layer}."
        its = {name.removeprefix(prefix): shape for name, shape in wanted.items() if name.startswith(prefix)}
        # Dense models have the norm before the FFN as part of its first linear layer.
        fused_norm = f"{stored_prefix}mlp.{_LINEAR_NORM}" in shapes
        names = _NAMES | {"post_attention_layernorm.weight": f"mlp.{_LINEAR_NORM}"} if fused_norm else _NAMES
        if config.memory:
            names = names | config.memory.megatron_names()
        packed = {name: part for name, part in _attention(config).items() if name in its}
        stored = _stacked({name: names.get(name, name) for name in its if name not in packed}, its)
        for name, part in {**packed, **stored}.items():
            shape = (1,) if part.shape == () and shapes.get(stored_prefix + part.name) == (1,) else part.shape
            parts[prefix + name] = Part(stored_prefix + part.name, shape, part.convert)
    return parts


_NAMES = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "self_attn.q_norm.weight": "self_attention.q_layernorm.weight",
    "self_attn.k_norm.weight": "self_attention.k_layernorm.weight",
    "self_attn.o_proj.weight": "self_attention.linear_proj.weight",
    "post_attention_layernorm.weight": "pre_mlp_layernorm.weight",
    "mlp.gate_proj.weight": "mlp.linear_fc1.weight",
    "mlp.up_proj.weight": "mlp.linear_fc1.weight",
    "mlp.down_proj.weight": "mlp.linear_fc2.weight",
}
"""Of a layer's weights; what several share has their rows one below the other, in this order."""


def _stacked(names: Mapping[str, str], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, Part]:
    """names: where each weight is stored, in the order of their rows; shapes: of the weights."""
    parts = {}
    for stored in dict.fromkeys(names.values()):
        ours = [name for name, its in names.items() if its == stored]
        if shapes[ours[0]] == ():
            parts[ours[0]] = Part(stored, (), lambda scalar: scalar.reshape(()))
            continue
        rows, start = sum(shapes[name][0] for name in ours), 0
        for name in ours:
            count, *rest = shapes[name]
            take = operator.itemgetter(slice(start, start + count)) if count < rows else None
            parts[name] = Part(stored, (rows, *rest), take)
            start += count
    return parts


def _attention(config: Architecture) -> dict[str, Part]:
    """Each group's query heads are followed by its key head and its value head."""
    queries = config.heads // config.kv_heads
    rows, parts = config.kv_heads * (queries + 2) * config.head_dim, {}
    for name, heads in (("q", slice(queries)), ("k", slice(queries, queries + 1)), ("v", slice(queries + 1, None))):
        unpack = functools.partial(_unpack_heads, groups=config.kv_heads, head_dim=config.head_dim, heads=heads)
        for kind, shape in (("weight", (rows, config.hidden)), ("bias", (rows,))):
            parts[f"self_attn.{name}_proj.{kind}"] = Part(f"self_attention.linear_qkv.{kind}", shape, unpack)
    return parts


def _unpack_heads(packed: NDArray[Any], groups: int, head_dim: int, heads: slice) -> NDArray[Any]:
    """Some heads of every group. packed: [groups * heads a group * head_dim, ...]."""
    grouped = packed.reshape(groups, -1, head_dim, *packed.shape[1:])
    return grouped[:, heads].reshape(-1, *packed.shape[1:])
