"""Hugging Face folders: config.json, safetensors, tokenizer.json. Dense decoders, and MeKi in the same layout."""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from huggingface_hub import save_torch_state_dict
from numpy.typing import NDArray

from meki.package.files import read_object, replace_directory

from ..architectures.base import Architecture, Model
from ..blocks import BLOCK
from ..ffns.swiglu import SwiGLUConfig
from ..source import model_source
from ..tokenizer import TokenizerSpec, parse_tokenizer, read_tokenizer
from .checkpoint import Checkpoint, CheckpointError, Part, TensorFile, checkpoint_model, make_config
from .gemma_config import GEMMA, gemma_gain, unused_weights
from .huggingface_config import FEATURES, FIELDS, MIXTURE_FIELDS, OWN, OWN_FIELDS, config_fields, language_model
from .quantized_files import quantized_files
from .safetensors_files import SafetensorsFiles

CONFIG = "config.json"
WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEAD = "lm_head.weight"
_ROWS_AT_ONCE = 4096


def is_huggingface(path: Path) -> bool:
    return os.path.lexists(path / CONFIG)  # a link to nothing is named as such


def open_huggingface(path: Path, overrides: Mapping[str, Any]) -> Checkpoint:
    """The model in the folder `path`. CheckpointError for what cannot be converted."""
    file = path / CONFIG
    whole = _read_object(file)
    values = language_model(file, whole)
    stored = SafetensorsFiles(weight_files(path))
    quantization = values.get("quantization_config")
    quantized = None if quantization is None else quantized_files(file, quantization, stored)
    tensors = quantized or stored
    prefix, head = _prefix(tensors.shapes), next((name for name in tensors.shapes if name.endswith(_HEAD)), _HEAD)
    try:
        fields = config_fields(file, values, overrides, has_head=head in tensors.shapes)
    except CheckpointError:
        raise
    except (TypeError, ValueError, LookupError, AttributeError, ArithmeticError) as error:
        raise CheckpointError(f"{file}: has a value of another kind than expected: {error!r}") from error
    config = make_config(file, fields, overrides, tensors, GEMMA.get(values.get("model_type", ""), "llama"))
    folded = any(name.endswith(".folded_table") for name in tensors.shapes)
    parts = {
        name: Part(head if name == _HEAD else prefix + name, shape, _add_one if gemma_gain(name, config) else None)
        for name, shape in config.shapes(folded).items()
    }
    unused = {prefix + name for name in unused_weights(config)}
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
        # What follows from rope_theta; the same as the embedding; what is for images and sound; what adds nothing.
        ignored=lambda name: (
            name.endswith("rotary_emb.inv_freq")
            or name in unused
            or (name == head and config.tied_embeddings)
            or (values is not whole and not name.startswith(prefix))
            or (quantized is not None and quantized.is_zero_bias(name))
        ),
        folded=folded,
        trimmed="vocab_size" in overrides,
        blocks=quantized.blocks if quantized and quantized.has_blocks else None,
        rounded=lambda name: len(tensors.shapes[name]) == 2 and tensors.shapes[name][1] % BLOCK == 0,
    )


def _add_one(gain: NDArray[Any]) -> NDArray[Any]:
    return gain + 1


def weight_files(path: Path) -> list[Path]:
    """The files with the weights of the model in the folder `path`, whether they are there or not. CheckpointError."""
    if os.path.lexists(path / WEIGHTS):
        return [path / WEIGHTS]
    if os.path.lexists(path / INDEX):
        listed = _read_object(path / INDEX).get("weight_map")
        # A name with directories would lead out of the model's folder.
        if not isinstance(listed, dict) or any(Path(str(name)).name != name for name in listed.values()):
            raise CheckpointError(f"{path / INDEX}: weight_map is not an object of file names; download it again")
        return [path / name for name in sorted(set(listed.values()))]
    raise CheckpointError(
        f"{path}: neither {WEIGHTS} nor {INDEX} is there; expected the weights as safetensors, which transformers' "
        "save_pretrained makes of a pytorch_model.bin"
    )


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


def _check_tied(path: Path, tensors: TensorFile, head: str, embedding: str) -> None:
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


def _provenance(path: Path, values: Mapping[str, Any]) -> dict[str, str]:
    """What a model saved by `save_pretrained` says about itself; who quantised it."""
    stated = values.get("provenance") or {}
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise CheckpointError(f"{path}: provenance is {stated!r}, expected an object of strings")
    quantization = values.get("quantization_config")
    return stated | {"quantization": quantization["quant_method"]} if quantization else stated


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
        memory, kept = model.config.memory, model.config.shapes(folded=True)
        rows = np.concatenate(list(model_source(model).row_blocks()), axis=1)
        cut = zip(memory.tables(model.config), memory.cut(model.config, rows), strict=True)
        tables = {name: torch.from_numpy(table.copy()) for name, table in cut}
        state = {name: tensor for name, tensor in state.items() if name in kept} | tables
    named = {name if name == _HEAD else f"model.{name}": tensor for name, tensor in state.items()}
    with replace_directory(path, CONFIG, overwrite) as directory:
        tensors = {name: (t.to(dtype) if t.is_floating_point() else t).contiguous() for name, t in named.items()}
        save_torch_state_dict(tensors, directory, filename_pattern="model{suffix}.safetensors")
        config = _config_json(model.config)
        config |= {"dtype": str(dtype).removeprefix("torch."), "provenance": dict(provenance)}
        if tokenizer is not None:
            _save_tokenizer(directory, tokenizer)
        (directory / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _config_json(config: Architecture) -> dict[str, Any]:
    settings = config.settings()
    values = {name: settings[field] for field, name in FIELDS.items()}
    activation = config.feed_forward.hidden_act
    values |= {"rope_theta": settings["rope_theta"], "hidden_act": activation, "attention_bias": False}
    plain = {"ffn_kind": SwiGLUConfig.kind}
    kinds = [kind for kind, its in FEATURES.items() if {**settings, **plain, **its} == settings]
    if config.memory or settings["rope_factors"] or settings["nope_layers"] or not kinds:
        own = {name: settings[name] for name in OWN_FIELDS if name in settings}
        return {"model_type": OWN, "architectures": ["MeKiForCausalLM"], **values, **own}
    if kinds[0] == "qwen3_moe":
        values |= {name: settings[field] for field, name in MIXTURE_FIELDS.items()}
    architecture = kinds[0].title().replace("_", "")
    return {"model_type": kinds[0], "architectures": [f"{architecture}ForCausalLM"], **values}


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
    return checkpoint_model(checkpoint), checkpoint.provenance
