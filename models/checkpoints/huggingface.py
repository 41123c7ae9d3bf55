"""Hugging Face folders: config.json, safetensors, tokenizer.json. Dense decoders, and MeKi in the same layout."""

from __future__ import annotations

import json
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from torch import Tensor

from meki.package.files import read_object, replace_directory

from ..architectures.base import Architecture, Model
from ..architectures.llama import MOST_LAYERS
from ..config import as_number
from ..ffns import FFNS
from ..memories import MEMORIES
from ..memories.base import ALL
from ..source import model_source
from ..tokenizer import TokenizerSpec, parse_tokenizer, read_tokenizer
from .checkpoint import (
    Checkpoint,
    CheckpointError,
    Part,
    check_fetched,
    check_window,
    checkpoint_source,
    make_config,
)

CONFIG = "config.json"
_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_ROWS_AT_ONCE = 4096
_REOPEN_BYTES = 1 << 30  # mapped pages that were read stay resident until the file is closed

_LLAMA = {"qk_norm": False, "qkv_bias": False}
_FEATURES: dict[str, dict[str, bool]] = {
    "llama": _LLAMA,
    "mistral": _LLAMA,
    "ministral": _LLAMA,
    "smollm3": _LLAMA,
    "internlm3": _LLAMA,
    "iquestcoder": _LLAMA,
    "qwen2": {"qk_norm": False, "qkv_bias": True},
    "seed_oss": {"qk_norm": False, "qkv_bias": True},
    "qwen3": {"qk_norm": True, "qkv_bias": False},
}
"""What the model types that have no flag for it do."""
_WINDOWED = ("mistral", "ministral")
"""Have a sliding window unless they say that it is null; the others only if they say that they use it."""
_DEFAULTS: dict[str, dict[str, Any]] = {
    "smollm3": {"rope_theta": 2_000_000.0},
    **{kind: {"head_dim": 128} for kind in ("qwen3", "seed_oss", "internlm3", "iquestcoder")},
}
"""What transformers takes where a configuration of the model type says nothing."""
_UNSUPPORTED: dict[str, Any] = {
    **dict.fromkeys(("attention_bias", "attention_out_bias", "mlp_bias"), False),
    **{"partial_rotary_factor": 1, "clip_qkv": None, "quantization_config": None},
}
"""What changes the arithmetic unless it is so, or null."""
_UNSUPPORTED_IN = {"seed_oss": {"attention_bias": True}, "internlm3": {"qkv_bias": False, "bias": False}}
_OWN = "meki"
"""The model type of our own layout, with a memory or without (docs/sources/huggingface.md)."""
_OWN_FIELDS = (
    "qk_norm",
    "qkv_bias",
    "rope_factors",
    "nope_layers",
    *(name for kind in MEMORIES.values() for name in kind.SETTINGS),
)
_FIELDS = {
    "vocab_size": "vocab_size",
    "layers": "num_hidden_layers",
    "hidden": "hidden_size",
    "ffn": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_dim": "head_dim",
    "context": "max_position_embeddings",
    "norm_eps": "rms_norm_eps",
    "tied_embeddings": "tie_word_embeddings",
}
"""Settings and their names in config.json."""


class SafetensorsFiles:
    """The tensors of one or several safetensors files."""

    def __init__(self, paths: list[Path]) -> None:
        """CheckpointError for a file that is missing or damaged, and for a tensor that is in two of them."""
        self._files: dict[str, Path] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open_path: Path | None = None
        self._bytes = 0
        if missing := [path for path in paths if not path.is_file()]:
            raise CheckpointError(
                f"{missing[0]}: no such file, of the {len(paths)} with weights {len(missing)} are missing; the "
                "download is incomplete, download the model again"
            )
        for path in paths:
            check_fetched(path)
            self._open(path)
            for name in self._handle.keys():  # noqa: SIM118 (not a mapping)
                if name in self._files:
                    raise CheckpointError(
                        f"{path}: tensor {name} is also in {self._files[name].name}; expected it once"
                    )
                self._files[name] = path
                self.shapes[name] = tuple(self._handle.get_slice(name).get_shape())

    def read(self, name: str, rows: slice = ALL) -> Tensor:
        path = self._files[name]
        if path != self._open_path or self._bytes > _REOPEN_BYTES:
            self._open(path)
        stored = self._handle.get_tensor(name) if rows == ALL else self._handle.get_slice(name)[rows]
        self._bytes += stored.nbytes
        return torch.empty(stored.shape, dtype=torch.float32).copy_(stored)  # never a view of the mapping

    def _open(self, path: Path) -> None:
        try:
            self._handle = safe_open(path, framework="pt")
        except SafetensorError as error:
            raise CheckpointError(f"{path}: not a complete safetensors file: {error}; download it again") from error
        self._open_path, self._bytes = path, 0


def is_huggingface(path: Path) -> bool:
    return os.path.lexists(path / CONFIG)  # a link to nothing is named as such


def open_huggingface(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The model in the folder `path`. CheckpointError for what cannot be converted."""
    file = path / CONFIG
    whole = _read_object(file)
    values = _language_model(whole)
    tensors = SafetensorsFiles(_weight_files(path))
    prefix, head = _prefix(tensors.shapes), next((name for name in tensors.shapes if name.endswith(_HEAD)), _HEAD)
    try:
        fields = _fields(file, values, overrides, has_head=head in tensors.shapes)
    except (TypeError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: has a value of another kind than expected: {error!r}") from error
    config = make_config(file, fields, overrides)
    folded = any(name.endswith(".folded_table") for name in tensors.shapes)
    parts = {
        name: Part(head if name == _HEAD else prefix + name, shape) for name, shape in config.shapes(folded).items()
    }
    if config.tied_embeddings:
        _check_tied(file, tensors, head, parts["embed_tokens.weight"].name)
    if values is not whole:
        warnings.warn(f"{path}: of this {whole.get('model_type')} the language model alone is converted", stacklevel=2)
    tokenizer = path / "tokenizer.json"
    return Checkpoint(
        path,
        config,
        tensors,
        parts,
        read_tokenizer=lambda: read_tokenizer(tokenizer) if tokenizer.is_file() else None,
        provenance={"source": path.resolve().name, "format": "huggingface", **_provenance(file, values)},
        # What follows from rope_theta; the same as the embedding; what is for images and sound.
        ignored=lambda name: (
            name.endswith("rotary_emb.inv_freq")
            or (name == head and config.tied_embeddings)
            or (values is not whole and not name.startswith(prefix))
        ),
        folded=folded,
        trimmed="vocab_size" in overrides,
    )


def _weight_files(path: Path) -> list[Path]:
    if os.path.lexists(path / _WEIGHTS):
        return [path / _WEIGHTS]
    if os.path.lexists(path / _INDEX):
        listed = _read_object(path / _INDEX).get("weight_map")
        # A name with directories would lead out of the model's folder.
        if not isinstance(listed, dict) or any(Path(str(name)).name != name for name in listed.values()):
            raise CheckpointError(f"{path / _INDEX}: weight_map is not an object of file names; download it again")
        return [path / name for name in sorted(set(listed.values()))]
    raise CheckpointError(
        f"{path}: neither {_WEIGHTS} nor {_INDEX} is there; expected the weights as safetensors, which transformers' "
        "save_pretrained makes of a pytorch_model.bin"
    )


def _language_model(values: dict[str, Any]) -> dict[str, Any]:
    """`values`, or, of a model that also sees or hears, the configuration of its language model."""
    inner = values.get("text_config")
    if values.get("model_type") in (*_FEATURES, _OWN) or not isinstance(inner, dict):
        return values
    return {"quantization_config": values.get("quantization_config"), **inner}


def _prefix(names: Iterable[str]) -> str:
    """What stands before the names of the decoder: "model." as a rule."""
    embedding = "embed_tokens.weight"
    return next((name.removesuffix(embedding) for name in names if name.endswith(embedding)), "model.")


def _read_object(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise CheckpointError(f"{path}: a link to nothing, or no file; the download is incomplete, download it again")
    try:
        return read_object(path)
    except ValueError as error:
        raise CheckpointError(str(error)) from error


def _check_tied(path: Path, tensors: SafetensorsFiles, head: str, embedding: str) -> None:
    """CheckpointError if there is a head which is not the embedding, whatever the configuration says."""
    if head not in tensors.shapes:
        return
    same = tensors.shapes[head] == tensors.shapes.get(embedding)
    if same:
        starts = range(0, tensors.shapes[head][0], _ROWS_AT_ONCE)
        blocks = (slice(start, start + _ROWS_AT_ONCE) for start in starts)
        same = all(torch.equal(tensors.read(head, rows), tensors.read(embedding, rows)) for rows in blocks)
    if not same:
        raise CheckpointError(
            f"{path}: tie_word_embeddings is true, but {head} is not {embedding}; if the model was trained with a "
            "head of its own, give --set tied_embeddings=false"
        )


def _fields(path: Path, values: Mapping[str, Any], overrides: Mapping[str, Any], has_head: bool) -> dict[str, Any]:
    """Settings from a config.json. CheckpointError for what this runtime does not compute."""
    kind = values.get("model_type")
    if kind not in (*_FEATURES, _OWN):
        raise CheckpointError(
            f"{path}: model_type is {kind!r}; supported are {', '.join((*_FEATURES, _OWN))}: dense decoders of the "
            "Llama family and MeKi"
        )
    ffns = {ffn.hidden_act: name for name, ffn in FFNS.items()}
    activation = values.get("hidden_act") or "silu"
    activation = "silu" if activation == "swish" else activation  # two names of one function
    if activation not in ffns:
        raise CheckpointError(f"{path}: hidden_act is {activation!r}; supported is {' or '.join(map(repr, ffns))}")
    # Newer configurations have all about rotary positions in rope_parameters.
    scaling = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for name, expected in {**_UNSUPPORTED, **_UNSUPPORTED_IN.get(kind, {})}.items():
        if (got := scaling.get(name, values.get(name))) not in (None, expected):
            raise CheckpointError(f"{path}: {name} is {got!r}; supported is {expected!r}")
    defaults = {"rope_theta": 10_000.0, **_DEFAULTS.get(kind, {})}
    stated = {field: as_number(values.get(name)) for field, name in _FIELDS.items()} | {"ffn_kind": ffns[activation]}
    stated["rope_theta"] = as_number(scaling.get("rope_theta") or values.get("rope_theta"))
    stated |= {name: values.get(name) for name in _OWN_FIELDS} if kind == _OWN else _FEATURES[kind]
    fields = {field: value for field, value in stated.items() if value not in (None, [])} | dict(overrides)
    fields = {**defaults, **fields}
    if "heads" in fields:
        fields.setdefault("kv_heads", fields["heads"])
        if "hidden" in fields:
            fields.setdefault("head_dim", fields["hidden"] // fields["heads"])
    fields.setdefault("tied_embeddings", not has_head)
    fields.setdefault("rope_factors", _rope_factors(path, scaling, values, fields))
    if kind == "smollm3" and "layers" in fields:
        fields.setdefault("nope_layers", _nope_layers(values, min(fields["layers"], MOST_LAYERS)))
    _check_windows(path, values, fields)
    return fields


def _nope_layers(values: Mapping[str, Any], layers: int) -> tuple[int, ...]:
    """Layers without rotary positions."""
    interval = values.get("no_rope_layer_interval") or 4
    rotated = values.get("no_rope_layers") or [(layer + 1) % interval for layer in range(layers)]
    return tuple(layer for layer in range(layers) if not rotated[layer])


def _check_windows(path: Path, values: Mapping[str, Any], fields: Mapping[str, Any]) -> None:
    """CheckpointError if a layer does not attend to the whole context."""
    kinds = set(values.get("layer_types") or ())
    if other := kinds - {"full_attention", "sliding_attention"}:
        raise CheckpointError(f"{path}: layer_types has {other.pop()!r}; supported is 'full_attention'")
    if not (values.get("use_sliding_window") or values["model_type"] in _WINDOWED):
        return
    if kinds == {"full_attention"} and values["model_type"] != "mistral":  # which does not look at it
        return
    first = as_number(values.get("max_window_layers"))
    if first is not None and not kinds and first >= fields.get("layers", 0):
        return
    # 4096 is what model types with a window have where the configuration does not say.
    window = as_number(values.get("sliding_window", 4096))
    check_window(path, "sliding_window", window, fields.get("context"))


def _rope_factors(
    path: Path, scaling: Mapping[str, Any], values: Mapping[str, Any], fields: Mapping[str, Any]
) -> tuple[float, ...]:
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if any(isinstance(value, dict) for value in scaling.values()):
        raise CheckpointError(
            f"{path}: rotary positions differ between layers: {dict(scaling)!r}; supported is one kind"
        )
    trained = as_number(values.get(_FIELDS["context"]))
    if kind == "default" or (kind == "dynamic" and trained and fields["context"] <= trained):  # it scales beyond
        return ()
    if kind == "linear":
        factor = float(scaling["factor"])
        return (factor,) * (fields["head_dim"] // 2) if factor != 1 else ()
    if kind == "llama3":
        return llama3_factors(fields["head_dim"], fields["rope_theta"], scaling)
    raise CheckpointError(f"{path}: rope scaling {kind!r}; supported are default, linear and llama3")


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """What Llama 3.1 divides each rotary frequency by: nothing where a wave is short against the original context,
    `factor` where it is long; in between 1 / ((1 - s) / factor + s), where s goes from 0 at the long end to 1."""
    factor, context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    factors = []
    for index in range(0, head_dim, 2):
        waves = context / (2 * math.pi * theta ** (index / head_dim))  # in the original context
        smooth = min(1.0, max(0.0, (waves - low) / (high - low)))
        factors.append(1 / ((1 - smooth) / factor + smooth))
    return tuple(factors)


def _provenance(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """What a model saved by `save_pretrained` says about itself."""
    stated = values.get("provenance") or {}
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise CheckpointError(f"{path}: provenance is {stated!r}, expected an object of strings")
    return stated


def save_pretrained(
    path: Path,
    model: Model,
    tokenizer: TokenizerSpec | None = None,
    *,
    provenance: Mapping[str, str],
    dtype: torch.dtype = torch.float32,
    folded: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes `model` as a folder that `open_huggingface` reads, and `transformers`, too, if it has no memory.

    folded: the memories as folded tables, float32 before `dtype`, without what only training needs. provenance: what is
    known about the training, kept in config.json. FileExistsError as `replace_directory`.
    """
    state = {name: tensor.detach() for name, tensor in model.state_dict().items()}
    if folded and model.config.memory:
        kind, kept = model.config.memory.kind, model.config.shapes(folded=True)
        rows = torch.from_numpy(np.concatenate(list(model_source(model).row_blocks()), axis=1))
        tables = {f"layers.{layer}.{kind}.folded_table": table.clone() for layer, table in enumerate(rows)}
        state = {name: tensor for name, tensor in state.items() if name in kept} | tables
    named = {name if name == _HEAD else f"model.{name}": tensor for name, tensor in state.items()}
    with replace_directory(path, CONFIG, overwrite) as directory:
        tensors = {name: tensor.to(dtype).contiguous() for name, tensor in named.items()}
        save_torch_state_dict(tensors, directory, filename_pattern="model{suffix}.safetensors")
        config = _config_json(model.config)
        config |= {"dtype": str(dtype).removeprefix("torch."), "provenance": dict(provenance)}
        if tokenizer is not None:
            _save_tokenizer(directory, tokenizer)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_json(config: Architecture) -> dict[str, Any]:
    settings = config.settings()
    values = {name: settings[field] for field, name in _FIELDS.items()}
    activation = FFNS[settings["ffn_kind"]].hidden_act
    values |= {"rope_theta": settings["rope_theta"], "hidden_act": activation, "attention_bias": False}
    kinds = [kind for kind, its in _FEATURES.items() if all(settings[name] == value for name, value in its.items())]
    if config.memory or settings["rope_factors"] or settings["nope_layers"] or not kinds:
        own = {name: settings[name] for name in _OWN_FIELDS}
        return {"model_type": _OWN, "architectures": ["MeKiForCausalLM"], **values, **own}
    return {"model_type": kinds[0], "architectures": [f"{kinds[0].capitalize()}ForCausalLM"], **values}


def _save_tokenizer(directory: Path, tokenizer: TokenizerSpec) -> None:
    (directory / "tokenizer.json").write_bytes(tokenizer.json)
    config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    if tokenizer.bos_token_id is not None:
        config["bos_token"] = parse_tokenizer(tokenizer.json).id_to_token(tokenizer.bos_token_id)
        config["add_bos_token"] = True
    generation: dict[str, Any] = {"eos_token_id": list(tokenizer.eos_token_ids)}
    if tokenizer.sampling:
        generation |= {"do_sample": True, **tokenizer.sampling}
    for name, values in (("tokenizer_config.json", config), ("generation_config.json", generation)):
        (directory / name).write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    if tokenizer.chat_template is not None:
        (directory / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8", newline="")


def load_model(path: Path) -> tuple[Model, dict[str, str]]:
    """The model of a folder in PyTorch, float32, in training form, and its provenance. CheckpointError."""
    checkpoint = open_huggingface(path, {})
    if checkpoint.folded:
        raise CheckpointError(f"{path}: the memories are folded, which cannot be undone; give the training form")
    source = checkpoint_source(checkpoint)
    with torch.device("meta"):
        model = checkpoint.config.module()
    model.load_state_dict({name: torch.from_numpy(source.weights(name)) for name in checkpoint.parts}, assign=True)
    return model, checkpoint.provenance
