"""What the decoders of Gemma 3 and Gemma 4 share: sandwich norms, GeGLU, and attention that differs by layer.

Names of parameters are those of transformers' text models without the prefix "model."; a norm's weight is its whole
gain, to which Gemma 3's files lack 1.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..config import FLAG, POSITIVE, WIDTH, ConfigError, Rule, integer, is_positive, one_of
from ..ffns.base import FFN
from ..ffns.geglu import GeGLUConfig
from ..graph.primitives import Attention as AttentionSpec
from ..graph.primitives import Matrix, Primitives, Value
from .base import Architecture, Model
from .llama import MOST_LAYERS, apply_rope


def frequencies(theta: float, head_dim: int, factor: float = 1.0, part: float = 1.0) -> tuple[float, ...]:
    """Of the first `part` of the pairs of a head: theta^(-2i / head_dim) / factor."""
    return tuple(theta ** (-2 * i / head_dim) / factor for i in range(int(part * head_dim // 2)))


@dataclass(frozen=True, kw_only=True)
class Gemma(Architecture):
    ffn: int
    """Width of the FFN."""
    window: int
    """Positions that a token sees, itself included, in layers that are not `full_layers`."""
    full_layers: tuple[int, ...]
    """Those whose attention sees all positions."""
    rope_theta: float = 1_000_000.0
    """Of full layers."""
    local_rope_theta: float = 10_000.0
    """Of the others."""
    logit_softcap: float = 0.0
    """Logits are c * tanh(logits / c); 0: as they are."""
    feed_forward: FFN = field(default_factory=GeGLUConfig)

    FFN_KIND = GeGLUConfig.kind
    RULES: ClassVar = {
        "vocab_size": integer(1, 2**31 - 1),
        "layers": integer(1, MOST_LAYERS),
        **dict.fromkeys(("hidden", "ffn", "heads", "kv_heads", "head_dim"), integer(1, WIDTH)),
        "context": integer(1, 2**31 - 1),
        "window": integer(1, 2**31 - 1),
        "full_layers": Rule(
            "layers' numbers, from 0",
            lambda its: isinstance(its, tuple) and all(map(integer(0, MOST_LAYERS).holds, its)),
        ),
        "rope_theta": POSITIVE,
        "local_rope_theta": POSITIVE,
        "norm_eps": POSITIVE,
        "logit_softcap": Rule(
            "a number of 0 or more", lambda its: (type(its) in (int, float) and not its) or is_positive(its)
        ),
        "tied_embeddings": FLAG,
        "ffn_kind": one_of((GeGLUConfig.kind,)),
    }
    STATED: ClassVar[tuple[str, ...]] = (
        *("vocab_size", "layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "window", "full_layers"),
        *("context", "norm_eps"),
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if max(self.full_layers, default=0) >= self.layers:
            raise ConfigError(f"full_layers must be below layers ({self.layers}), got {max(self.full_layers)}")
        if self.heads % self.kv_heads:
            raise ConfigError(f"heads ({self.heads}) must be a multiple of kv_heads ({self.kv_heads})")
        for dim in self.head_dims:
            if dim % 2:
                raise ConfigError(f"head_dim must be even for RoPE, got {dim}")

    @abstractmethod
    def attention(self, layer: int) -> AttentionSpec: ...

    @property
    def first_narrow(self) -> int:
        """The first layer that is needed for tokens alone whose logits are wanted; `layers`: none is."""
        return self.layers

    def width(self, layer: int) -> int:
        """Of the layer's FFN."""
        return self.ffn

    def is_full(self, layer: int) -> bool:
        return layer in self.full_layers

    @property
    def residual(self) -> tuple[str, ...]:
        ends = ("post_attention_layernorm.weight", "post_feedforward_layernorm.weight")
        return (*ends, *(self.memory.RESIDUAL if self.memory else ()))

    def widths(self) -> dict[str, int]:
        joined = {f"heads * {dim}": self.heads * dim for dim in self.head_dims}
        return {"hidden": self.hidden, "ffn": self.ffn, **joined}

    @property
    def active_parameters(self) -> int:
        return self.ram_parameters

    def kv_caches(self) -> list[dict[str, int]]:
        caches = []
        for its in map(self.attention, range(self.layers)):
            shape = {"kv_heads": its.kv_heads, "head_dim": its.head_dim, "window": its.window}
            caches.append(shape if its.source is None else {"shared": its.source})
        return caches

    def program(self, g: Primitives) -> None:
        words = g.embedding("embed_tokens")
        x = g.scaled(words, self.hidden**0.5 * g.STREAM)
        for layer in range(self.layers):
            if layer == self.first_narrow:
                x = g.narrow(x)
            g.begin_layer(layer)
            x = self._layer(g, layer, x, words)
        logits = g.head(g.norm(g.selected(x), "norm"), "embed_tokens" if self.tied_embeddings else "lm_head")
        g.logits(g.softcap(logits, self.logit_softcap, "softcap") if self.logit_softcap else logits)

    def _layer(self, g: Primitives, layer: int, x: Value, words: Value) -> Value:
        """As `GemmaLayer` has it."""
        its, prefix = self.attention(layer), f"layers.{layer}"
        widths = {"q": its.heads, "k": its.kv_heads, "v": its.kv_heads} if its.source is None else {"q": its.heads}
        projections = [Matrix(f"{its.name}.{part}_proj", count * its.head_dim) for part, count in widths.items()]
        qkv = g.linear(g.norm(x, f"{prefix}.input_layernorm"), *projections, name=f"{its.name}.qkv")
        out = g.linear(g.attention(qkv, its), Matrix(f"{its.name}.o_proj", self.hidden))
        x = g.add(x, g.norm(out, f"{prefix}.post_attention_layernorm", g.STREAM), f"{prefix}.attended")
        h = g.norm(x, f"{prefix}.pre_feedforward_layernorm")
        ffn = self.feed_forward.program(g, h, f"{prefix}.mlp", self.width(layer), self.hidden)
        return g.add(x, g.norm(ffn, f"{prefix}.post_feedforward_layernorm", g.STREAM), f"{prefix}.fed")


class GemmaAttention(nn.Module):
    """As its specification says; x: [b, t, hidden]."""

    def __init__(self, config: Gemma, layer: int) -> None:
        super().__init__()
        self.its = its = config.attention(layer)
        self.eps = config.norm_eps
        self.is_seen = any(config.attention(other).source == layer for other in range(config.layers))
        self.q_proj = nn.Linear(config.hidden, its.heads * its.head_dim, bias=False)
        self.q_norm = nn.RMSNorm(its.head_dim, eps=config.norm_eps)
        if its.source is None:
            self.k_proj = nn.Linear(config.hidden, its.kv_heads * its.head_dim, bias=False)
            self.v_proj = nn.Linear(config.hidden, its.kv_heads * its.head_dim, bias=False)
            self.k_norm = nn.RMSNorm(its.head_dim, eps=config.norm_eps)
        self.o_proj = nn.Linear(its.heads * its.head_dim, config.hidden, bias=False)

    def forward(self, x: Tensor, seen: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        """seen: keys and values, [b, kv_heads, t, head_dim], of those layers before that others see, too, to which it
        adds its own."""
        its, (batch, length, _) = self.its, x.shape
        turns = self._turns(length, x.device)
        q = apply_rope(self._heads(self.q_norm, self.q_proj(x)), *turns)
        if its.source is None:
            v = self._heads(nn.Identity(), self.v_proj(x))
            if its.value_norm:
                v = F.rms_norm(v, (its.head_dim,), eps=self.eps)
            own = apply_rope(self._heads(self.k_norm, self.k_proj(x)), *turns), v
            if self.is_seen:
                seen[its.layer] = own
        else:
            own = seen[its.source]
        k, v = (values.repeat_interleave(its.heads // its.kv_heads, dim=1) for values in own)
        visible = torch.ones(length, length, dtype=torch.bool, device=x.device).tril()
        if its.window:
            visible = visible.triu(1 - its.window)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=its.scale)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))

    def _heads(self, norm: nn.Module, x: Tensor) -> Tensor:
        return norm(x.unflatten(-1, (-1, self.its.head_dim))).transpose(1, 2)

    def _turns(self, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """cos and sin, float32 [t, head_dim / 2]; the angle is 0 where there is no frequency."""
        assert isinstance(self.its.rotary, tuple)
        missing = self.its.head_dim // 2 - len(self.its.rotary)
        rates = F.pad(torch.tensor(self.its.rotary, dtype=torch.float64), (0, missing))
        angles = (torch.arange(length, dtype=torch.float64)[:, None] * rates).to(device)
        return angles.cos().float(), angles.sin().float()


class GemmaLayer(nn.Module):
    """A = x + norm(Attention(norm(x)));  A + norm(FFN(norm(A)))."""

    def __init__(self, config: Gemma, layer: int) -> None:
        super().__init__()
        norm = lambda: nn.RMSNorm(config.hidden, eps=config.norm_eps)  # noqa: E731
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()
        self.self_attn = GemmaAttention(config, layer)
        self.mlp = config.feed_forward.module(config.hidden, config.width(layer), config.hidden)

    def forward(self, x: Tensor, seen: dict[int, tuple[Tensor, Tensor]]) -> Tensor:
        x = x + self.post_attention_layernorm(self.self_attn(self.input_layernorm(x), seen))
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class GemmaDecoder(Model):
    """Token ids int64 [b, t] -> logits [b, t, vocab]."""

    config: Gemma
    LAYER: ClassVar[type[GemmaLayer]] = GemmaLayer

    def __init__(self, config: Gemma) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(self.LAYER(config, layer) for layer in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def begin(self, ids: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
        return self.embed_tokens(ids) * self.config.hidden**0.5, ({},)

    def logits(self, x: Tensor) -> Tensor:
        head, cap = self.lm_head if hasattr(self, "lm_head") else self.embed_tokens, self.config.logit_softcap
        logits = F.linear(self.norm(x), head.weight)
        return cap * torch.tanh(logits / cap) if cap else logits
