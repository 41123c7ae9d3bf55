"""Decoders of the Llama family: RMSNorm, rotary positions, grouped queries, a gated FFN, and a memory if there is one.

Without a memory it is Hugging Face's LlamaForCausalLM, with `qkv_bias` Qwen2's, with `qk_norm` Qwen3's (with
experts Qwen3-MoE's), with `nope_layers` SmolLM3's. Parameter names are theirs without the prefix "model.".
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import FLAG, POSITIVE, WIDTH, ConfigError, Rule, integer, is_positive, one_of
from ..ffns import FFNS
from ..graph.primitives import Attention as AttentionSpec
from ..graph.primitives import KeyBias, Matrix, Primitives, Value
from ..memories.base import MemoryLayer, Tokens
from .base import Architecture, Model

MOST_LAYERS = 65_535
"""That the package format holds."""


@dataclass(frozen=True, kw_only=True)
class LlamaConfig(Architecture):
    """The defaults are Qwen3's, as the MeKi paper has it."""

    ffn: int
    """Width of the FFN; of one expert, if it is a mixture of them."""
    rope_theta: float = 500_000.0
    qk_norm: bool = True
    """RMSNorm over the head dimension of queries and keys, before RoPE (Qwen3 has it)."""
    qkv_bias: bool = False
    """The query, key and value projections have biases (Qwen2.5 has them)."""
    rope_factors: tuple[float, ...] = ()
    """What the rotary frequencies are divided by, head_dim / 2 numbers (Llama 3's long context); empty: nothing."""
    nope_layers: tuple[int, ...] = ()
    """Layers whose attention knows no positions (SmolLM3 has them)."""

    kind = "llama"
    RULES: ClassVar = {
        "vocab_size": integer(1, 2**31 - 1),
        "layers": integer(1, MOST_LAYERS),
        **dict.fromkeys(("hidden", "ffn", "heads", "kv_heads", "head_dim"), integer(1, WIDTH)),
        "context": integer(1, 2**31 - 1),
        "rope_theta": POSITIVE,
        "norm_eps": POSITIVE,
        "qk_norm": FLAG,
        "qkv_bias": FLAG,
        "tied_embeddings": FLAG,
        "rope_factors": Rule("positive numbers", lambda its: isinstance(its, tuple) and all(map(is_positive, its))),
        "nope_layers": Rule(
            "layers' numbers, from 0",
            lambda its: isinstance(its, tuple) and all(map(integer(0, MOST_LAYERS).holds, its)),
        ),
        "ffn_kind": one_of(FFNS),
    }
    # The defaults of the last three are the paper's, not another model's.
    STATED = (
        *("vocab_size", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim"),
        *("context", "rope_theta", "norm_eps"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for RoPE, got {self.head_dim}")
        factors = len(self.rope_factors)
        if factors not in (0, self.head_dim // 2):
            raise ConfigError(f"rope_factors must be head_dim / 2 = {self.head_dim // 2} numbers, got {factors}")
        if max(self.nope_layers, default=0) >= self.layers:
            raise ConfigError(f"nope_layers must be below layers ({self.layers}), got {max(self.nope_layers)}")

    @property
    def residual(self) -> tuple[str, ...]:
        return ("o_proj.weight", *self.feed_forward.residual, *(self.memory.RESIDUAL if self.memory else ()))

    def widths(self) -> dict[str, int]:
        return {"hidden": self.hidden, "ffn": self.ffn, "heads * head_dim": self.heads * self.head_dim}

    @property
    def active_parameters(self) -> int:
        idle = self.feed_forward.idle_parameters(self.hidden, self.ffn, self.hidden)
        return self.ram_parameters - self.layers * idle

    def module(self) -> Decoder:
        return Decoder(self)

    def rope_tables(self, positions: int) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [positions, head_dim / 2], of t * theta^(-2i / head_dim) / factor_i, in float64."""
        exponent = torch.arange(0, self.head_dim, 2, dtype=torch.float64) / self.head_dim
        frequencies = self.rope_theta**-exponent
        if self.rope_factors:
            frequencies /= torch.tensor(self.rope_factors, dtype=torch.float64)
        angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
        return angles.cos().float(), angles.sin().float()

    def program(self, g: Primitives) -> None:
        words = x = g.embedding("embed_tokens")
        for layer in range(self.layers):
            g.begin_layer(layer)
            x = self._layer(g, layer, x, words)
        head = "embed_tokens" if self.tied_embeddings else "lm_head"
        g.logits(g.head(g.norm(g.selected(x), "norm"), head))

    def _layer(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        """As `Layer` has it."""
        prefix, dim, memory = f"layers.{layer}", self.head_dim, self.memory
        attention = f"{prefix}.self_attn"
        if memory:
            x = memory.before_attention(g, layer, x, words)
        heads = {"q": self.heads, "k": self.kv_heads, "v": self.kv_heads}
        projections = [Matrix(f"{attention}.{name}_proj", count * dim) for name, count in heads.items()]
        h = g.norm(x, f"{prefix}.input_layernorm")
        qkv = g.linear(h, *projections, name=f"{attention}.qkv", bias=self.qkv_bias)
        norms = (f"{attention}.q_norm", f"{attention}.k_norm") if self.qk_norm else ()
        its = AttentionSpec(
            layer=layer,
            name=attention,
            heads=self.heads,
            kv_heads=self.kv_heads,
            head_dim=dim,
            norms=norms,
            rotary=None if layer in self.nope_layers else self.rope_tables,
            bias=KeyBias(f"{attention}.k_proj", f"{prefix}.input_layernorm") if self.qkv_bias else None,
        )
        attended = g.attention(qkv, its)
        x = g.add(x, g.linear(attended, Matrix(f"{attention}.o_proj", self.hidden)), f"{prefix}.attended")
        if memory:
            x = memory.after_attention(g, layer, x, h, words)
        h = g.norm(x, f"{prefix}.post_attention_layernorm")
        ffn = self.feed_forward.program(g, h, f"{prefix}.mlp", self.ffn, self.hidden)
        x = g.add(x, ffn, f"{prefix}.fed")
        return memory.after_ffn(g, layer, x, h, words) if memory else x


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves (not interleaved pairs). x: [b, heads, t, head_dim]; cos, sin: [t, head_dim / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with optional QK-norm and biases."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.shape = (config.heads, config.kv_heads, config.head_dim)
        self.rotated = layer not in config.nope_layers
        self.q_proj = nn.Linear(config.hidden, config.heads * config.head_dim, bias=config.qkv_bias)
        self.k_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.v_proj = nn.Linear(config.hidden, config.kv_heads * config.head_dim, bias=config.qkv_bias)
        self.o_proj = nn.Linear(config.heads * config.head_dim, config.hidden, bias=False)
        norm = lambda: nn.RMSNorm(config.head_dim, eps=config.norm_eps) if config.qk_norm else nn.Identity()  # noqa: E731
        self.q_norm, self.k_norm = norm(), norm()

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        batch, length, _ = x.shape
        heads, kv_heads, head_dim = self.shape
        q = self.q_norm(self.q_proj(x).view(batch, length, heads, head_dim)).transpose(1, 2)
        k = self.k_norm(self.k_proj(x).view(batch, length, kv_heads, head_dim)).transpose(1, 2)
        v = self.v_proj(x).view(batch, length, kv_heads, head_dim).transpose(1, 2)
        if self.rotated:
            q, k = apply_rope(q, cos, sin), apply_rope(k, cos, sin)
        k, v = (x.repeat_interleave(heads // kv_heads, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, heads * head_dim))


class Layer(nn.Module):
    """A = x + Attention(norm(x));  h = norm(A);  A' = A + FFN(h);  and what the memory adds."""

    def __init__(self, config: LlamaConfig, layer: int) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = config.feed_forward.module(config.hidden, config.ffn, config.hidden)
        memory = config.memory and config.memory.module(config, layer)
        self.memory = config.memory.kind if config.memory and memory else None
        if config.memory and memory:
            self.add_module(config.memory.kind, memory)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, tokens: Tokens) -> Tensor:
        memory = cast(MemoryLayer, self.get_submodule(self.memory)) if self.memory else None
        if memory:
            x = memory.before_attention(x, tokens)
        h = self.input_layernorm(x)
        x = x + self.self_attn(h, cos, sin)
        if memory:
            x = memory.after_attention(x, h, tokens)
        h = self.post_attention_layernorm(x)
        x = x + self.mlp(h)
        return memory.after_ffn(x, h, tokens) if memory else x


class Decoder(Model):
    """Token ids int64 [b, t] -> logits [b, t, vocab]."""

    def __init__(self, config: LlamaConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.rope_tables = config.rope_tables
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def begin(self, ids: Tensor) -> tuple[Tensor, tuple[Tensor, Tensor, Tokens]]:
        x = self.embed_tokens(ids)
        cos, sin = (table.to(ids.device) for table in self.rope_tables(ids.shape[1]))
        return x, (cos, sin, Tokens(ids, x, self.embed_tokens))

    def logits(self, x: Tensor) -> Tensor:
        head = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens
        return F.linear(self.norm(x), head.weight)
