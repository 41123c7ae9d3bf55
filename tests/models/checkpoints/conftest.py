"""Writes Megatron-LM checkpoints in the layout of the published training code, naively; and a Hugging Face folder."""

from __future__ import annotations

import enum
import io
import random
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.checkpoints.huggingface import save_pretrained

State = dict[str, Any]


def packed_heads(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, config: LlamaConfig) -> torch.Tensor:
    """Row by row: a group's query heads, its key head, its value head, then the next group."""
    rows, size, queries = [], config.head_dim, config.heads // config.kv_heads
    for group in range(config.kv_heads):
        for head in range(group * queries, (group + 1) * queries):
            rows += [q[head * size + i] for i in range(size)]
        rows += [k[group * size + i] for i in range(size)]
        rows += [v[group * size + i] for i in range(size)]
    return torch.stack(rows)


def make_state(model: Decoder, fused_norm: bool = False, scalar_shape: tuple[int, ...] = ()) -> State:
    """fused_norm: the norm before the FFN is part of its first layer, as dense models of the same code have it."""
    config, ours, state = model.config, model.state_dict(), {}
    state["embedding.word_embeddings.weight"] = ours["embed_tokens.weight"]
    for n in range(config.layers):
        its = {name.removeprefix(f"layers.{n}."): x for name, x in ours.items() if name.startswith(f"layers.{n}.")}
        new: State = {}
        new["self_attention.linear_qkv.layer_norm_weight"] = its["input_layernorm.weight"]
        for kind in ("weight", "bias")[: 1 + config.qkv_bias]:
            q, k, v = (its[f"self_attn.{name}_proj.{kind}"] for name in "qkv")
            new[f"self_attention.linear_qkv.{kind}"] = packed_heads(q, k, v, config)
        if config.qk_norm:
            new["self_attention.q_layernorm.weight"] = its["self_attn.q_norm.weight"]
            new["self_attention.k_layernorm.weight"] = its["self_attn.k_norm.weight"]
        new["self_attention.linear_proj.weight"] = its["self_attn.o_proj.weight"]
        norm = "mlp.linear_fc1.layer_norm_weight" if fused_norm else "pre_mlp_layernorm.weight"
        new[norm] = its["post_attention_layernorm.weight"]
        new["mlp.linear_fc1.weight"] = torch.cat([its["mlp.gate_proj.weight"], its["mlp.up_proj.weight"]])
        new["mlp.linear_fc2.weight"] = its["mlp.down_proj.weight"]
        if config.memory:
            for name in ("embeddings", "gate_proj", "out_proj", "mix_norm", "post_norm"):
                new[f"meki_module.{name}.weight"] = its[f"meki.{name}.weight"]
            for name in ("alpha_scale", "beta_scale"):
                new[f"meki_module.{name}"] = its[f"meki.{name}"].reshape(scalar_shape)
            old, fresh = "meki.word_emb_projection", "meki_module.word_emb_projection"
            new[f"{fresh}.linear_fc1.weight"] = torch.cat(
                [its[f"{old}.gate_proj.weight"], its[f"{old}.up_proj.weight"]]
            )
            new[f"{fresh}.linear_fc2.weight"] = its[f"{old}.down_proj.weight"]
            if config.memory.projector_norm:
                new[f"{fresh}.linear_fc1.layer_norm_weight"] = its[f"{old}.fc1_norm.weight"]
        # Transformer Engine's, in each of the forms that its versions have.
        new["self_attention.linear_qkv._extra_state"] = io.BytesIO(b"pickled")
        new["self_attention.core_attention._extra_state"] = None
        new["mlp.linear_fc1._extra_state"] = torch.zeros(5, dtype=torch.uint8)
        state |= {f"decoder.layers.{n}.{name}": x for name, x in new.items()}
    state["decoder.final_layernorm.weight"] = ours["norm.weight"]
    state["decoder.final_layernorm._extra_state"] = None
    state["output_layer._extra_state"] = None
    if not config.tied_embeddings:
        state["output_layer.weight"] = ours["lm_head.weight"]
    return state


def make_args(config: LlamaConfig, **changes: Any) -> Namespace:
    """What Megatron-LM 0.12 stores of the published training script; of some hundred arguments, those that matter."""
    args = {
        "num_layers": config.layers,
        "hidden_size": config.hidden,
        "ffn_hidden_size": config.ffn,
        "num_attention_heads": config.heads,
        "group_query_attention": config.kv_heads != config.heads,
        "num_query_groups": 1 if config.kv_heads == config.heads else config.kv_heads,
        "kv_channels": config.head_dim,
        "max_position_embeddings": config.context,
        "seq_length": config.context,
        "rotary_base": int(config.rope_theta),
        "norm_epsilon": config.norm_eps,
        "qk_layernorm": config.qk_norm,
        "add_qkv_bias": config.qkv_bias,
        "untie_embeddings_and_output_weights": not config.tied_embeddings,
        "padded_vocab_size": config.vocab_size,
        **{"tensor_model_parallel_size": 1, "pipeline_model_parallel_size": 1, "num_experts": None},
        **{"normalization": "RMSNorm", "apply_layernorm_1p": False, "add_bias_linear": False, "swiglu": True},
        **{"position_embedding_type": "rope", "rotary_percent": 1.0, "rotary_interleaved": False},
        **{"rotary_seq_len_interpolation_factor": None, "use_rope_scaling": False, "mtp_num_layers": None},
        **{"multi_latent_attention": False, "squared_relu": False, "params_dtype": torch.bfloat16},
        **changes,
    }
    return Namespace(**args)


@pytest.fixture
def megatron_classes() -> Iterator[dict[str, type]]:
    """Megatron-LM's enumerations, importable only while a checkpoint is written."""
    wanted = {
        "megatron.core.enums": "ModelType",
        "megatron.core.transformer.enums": "AttnBackend",
        "megatron.core.rerun_state_machine": "RerunMode",
    }
    kinds: dict[str, type] = {}
    for module, name in wanted.items():
        kinds[name] = enum.Enum(name, ["first", "second"], module=module)  # type: ignore[assignment]
        parts = module.split(".")
        for i in range(1, len(parts) + 1):
            sys.modules.setdefault(".".join(parts[:i]), types.ModuleType(".".join(parts[:i])))
        setattr(sys.modules[module], name, kinds[name])
    yield kinds
    for module in [name for name in sys.modules if name.partition(".")[0] == "megatron"]:
        del sys.modules[module]


@pytest.fixture
def megatron_state() -> Callable[..., State]:
    return make_state


@pytest.fixture
def write_megatron(tmp_path: Path, megatron_classes: dict[str, Any]) -> Callable[..., Path]:
    """write(state, config, where, entries, **arguments): a checkpoint as a training run leaves it.

    where: its directory; entries: of the file, instead of the usual ones, None to leave one out.
    """

    def write(
        state: State,
        config: LlamaConfig,
        where: str = "run/iter_0000200/mp_rank_00",
        entries: dict[str, Any] | None = None,
        **arguments: Any,
    ) -> Path:
        args = make_args(config, **arguments)
        args.attention_backend = megatron_classes["AttnBackend"].second
        args.model_type = megatron_classes["ModelType"].first
        rng = {
            "random_rng_state": random.getstate(),
            "np_rng_state": np.random.get_state(),
            "torch_rng_state": torch.get_rng_state(),
            "rng_tracker_states": {"model-parallel-rng": torch.get_rng_state()},
        }
        weights = [x.float() for x in state.values() if isinstance(x, torch.Tensor)]
        usual = {
            "args": args,
            "checkpoint_version": 3.0,
            "iteration": 200,
            "model": state,
            "optimizer": {"optimizer": {"state": {0: {"exp_avg": weights[0]}}}, "fp32_from_fp16_params": [weights]},
            "opt_param_scheduler": {"max_lr": 4e-4, "lr_decay_style": "cosine", "num_steps": 200},
            "rerun_state_machine": {"mode": megatron_classes["RerunMode"].first, "sharded": {"max_values": {}}},
            "rng_state": [rng],
        }
        path = tmp_path / where / "model_optim_rng.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save({name: value for name, value in (usual | (entries or {})).items() if value is not None}, path)
        return path

    return write


@pytest.fixture
def saved(make_model: Callable[..., Decoder], tmp_path: Path) -> Path:
    """A Hugging Face folder of a random model with a memory."""
    save_pretrained(tmp_path / "saved", make_model(), provenance={})
    return tmp_path / "saved"
