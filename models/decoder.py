"""The PyTorch reference: a decoder of the Llama family with a MeKi memory beside every FFN, in training form.

With `memory_dim == 0` it is Hugging Face's LlamaForCausalLM, with `qkv_bias` Qwen2's, with `qk_norm` Qwen3's. Parameter
names are theirs without the prefix "model.", and `layers.N.meki.*` follows the published module.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .config import ModelConfig
from .memory import MeKi, SwiGLU


def rope_tables(config: ModelConfig, positions: int) -> tuple[Tensor, Tensor]:
    """cos and sin, float32 [positions, head_dim / 2], of t * theta^(-2i / head_dim) / factor_i, in float64."""
    exponent = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    frequencies = config.rope_theta**-exponent
    if config.rope_factors:
        frequencies /= torch.tensor(config.rope_factors, dtype=torch.float64)
    angles = torch.arange(positions, dtype=torch.float64)[:, None] * frequencies
    return angles.cos().float(), angles.sin().float()


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate halves (not interleaved pairs). x: [b, heads, t, head_dim]; cos, sin: [t, head_dim / 2]."""
    low, high = x.chunk(2, dim=-1)
    return torch.cat((low * cos - high * sin, high * cos + low * sin), dim=-1)


class Attention(nn.Module):
    """Causal grouped-query attention with optional QK-norm and biases."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.shape = (config.heads, config.kv_heads, config.head_dim)
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
        k = apply_rope(k, cos, sin).repeat_interleave(heads // kv_heads, dim=1)
        v = v.repeat_interleave(heads // kv_heads, dim=1)
        out = F.scaled_dot_product_attention(apply_rope(q, cos, sin), k, v, is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, heads * head_dim))


class Layer(nn.Module):
    """A = x + Attention(norm(x));  h = norm(A);  A' = FFN(h) + MeKi(h) + A."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        self.mlp = SwiGLU(config.hidden, config.ffn, config.hidden)
        if config.memory_dim:
            self.meki = MeKi(
                config.vocab_size, config.hidden, config.memory_dim, config.norm_eps, config.projector_norm
            )

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, rows: Tensor | None) -> Tensor:
        """rows: this layer's memory rows of every token, [b, t, m], or None without a memory."""
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        h = self.post_attention_layernorm(x)
        y = self.mlp(h)
        if rows is not None:
            y = y + self.meki.inject(rows, h)
        return y + x


class Decoder(nn.Module):
    """Token ids int64 [b, t] -> logits [b, t, vocab]."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.layers))
        self.norm = nn.RMSNorm(config.hidden, eps=config.norm_eps)
        if not config.tied_embeddings:
            self.lm_head = nn.Linear(config.hidden, config.vocab_size, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed_tokens(ids)
        cos, sin = rope_tables(self.config, ids.shape[1])
        # A row depends on the token id alone: each distinct id is computed once.
        unique, inverse = ids.unique(return_inverse=True) if self.config.memory_dim else (None, None)
        for module in self.layers:
            layer = cast(Layer, module)  # a ModuleList does not know what it holds
            rows = None if unique is None else layer.meki.experts(unique, self.embed_tokens(unique))[inverse]
            x = layer(x, cos, sin, rows)
        head = self.embed_tokens if self.config.tied_embeddings else self.lm_head
        return F.linear(self.norm(x), head.weight)

    @torch.no_grad()
    def initialise(self, seed: int, std: float = 0.02) -> Decoder:
        """Normal initialisation; what writes to the residual stream shrinks with depth, the memory's norm included."""
        generator = torch.Generator().manual_seed(seed)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                residual = name.endswith(("o_proj.weight", "mlp.down_proj.weight"))
                scale = std / (2 * self.config.layers) ** 0.5 if residual else std
                parameter.normal_(0.0, scale, generator=generator)
            elif name.endswith("meki.post_norm.weight"):
                parameter.fill_((2 * self.config.layers) ** -0.5)
            elif name.endswith(".bias"):
                parameter.zero_()
        return self
