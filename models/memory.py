"""The MeKi memory of one layer in training form, and its folding into a table.

Source: "MeKi: Memory-based Expert Knowledge Injection for Efficient LLM Scaling" (arXiv 2602.03359). Parameter names
are those of the published module, so that its state dicts load as they are.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class SwiGLU(nn.Module):
    """Bias-free SwiGLU: down(SiLU(gate(x)) * up(x)); `inputs` -> `intermediate` -> `outputs`."""

    def __init__(self, inputs: int, intermediate: int, outputs: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(inputs, intermediate, bias=False)
        self.up_proj = nn.Linear(inputs, intermediate, bias=False)
        self.down_proj = nn.Linear(intermediate, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Projector(SwiGLU):
    """G: word embedding [.., d] -> [.., m] through d/2, with the training code's optional RMSNorm before it."""

    def __init__(self, hidden: int, memory_dim: int, eps: float, norm: bool) -> None:
        super().__init__(hidden, hidden // 2, memory_dim)
        if norm:
            self.fc1_norm = nn.RMSNorm(hidden, eps=eps)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.fc1_norm(x) if hasattr(self, "fc1_norm") else x)


class MeKi(nn.Module):
    """One layer's memory.

    expert   e = alpha * RMSNorm_m(M[id] + beta * G(E[id]))      looked up by token id; what folding tabulates
    gate     g = sigmoid(W_gate h)
    output   y = RMSNorm_d(W_out (e + g))
    """

    def __init__(self, vocab_size: int, hidden: int, memory_dim: int, eps: float, projector_norm: bool = False) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(vocab_size, memory_dim)
        self.word_emb_projection = Projector(hidden, memory_dim, eps, projector_norm)
        self.gate_proj = nn.Linear(hidden, memory_dim, bias=False)
        self.out_proj = nn.Linear(memory_dim, hidden, bias=False)
        self.mix_norm = nn.RMSNorm(memory_dim, eps=eps)
        self.post_norm = nn.RMSNorm(hidden, eps=eps)
        self.alpha_scale = nn.Parameter(torch.ones(()))
        self.beta_scale = nn.Parameter(torch.ones(()))

    def experts(self, ids: Tensor, word_embedding: Tensor) -> Tensor:
        """Rows of the folded table. ids: int64 [n]; word_embedding: E[ids], [n, d] -> [n, m]."""
        return self.mix(self.embeddings(ids), word_embedding)

    def mix(self, static: Tensor, word_embedding: Tensor) -> Tensor:
        """The same from the table's own rows. static: M[ids], [n, m]; word_embedding: E[ids], [n, d] -> [n, m]."""
        return self.alpha_scale * self.mix_norm(static + self.beta_scale * self.word_emb_projection(word_embedding))

    def inject(self, rows: Tensor, h: Tensor) -> Tensor:
        """The part that stays at inference. rows: [.., m]; h: the FFN's normed input, [.., d] -> y [.., d]."""
        return self.post_norm(self.out_proj(rows + torch.sigmoid(self.gate_proj(h))))

    def forward(self, ids: Tensor, word_embedding: Tensor, h: Tensor) -> Tensor:
        """Training form. ids: int64 [..]; word_embedding: E[ids], [.., d]; h: [.., d] -> y [.., d]."""
        return self.inject(self.experts(ids, word_embedding), h)

    @torch.no_grad()
    def fold(self, word_embeddings: Tensor, block: int = 4096) -> Tensor:
        """The folded table [V, m] in float32, computed in blocks of tokens. word_embeddings: E, [V, d]."""
        device = self.embeddings.weight.device
        table = torch.empty(len(word_embeddings), self.embeddings.embedding_dim, dtype=torch.float32, device=device)
        for start in range(0, len(table), block):
            ids = torch.arange(start, min(start + block, len(table)), device=device)
            table[ids] = self.experts(ids, word_embeddings[ids]).float()
        return table
