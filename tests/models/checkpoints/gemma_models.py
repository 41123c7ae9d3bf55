"""Random models of Gemma 3 and 4 by transformers, the independent reference, with every feature they have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

from meki import Engine
from meki.models.checkpoints import open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec
from tests.engine.gemma_models import SHAPE

IDS = [2, 17, 299, 4, 4, 250, 31, 8, 100, 77, 3, 212, 90, 91, 92, 5, 5, 6, 7, 100, 2, 250]

COMMON: dict[str, Any] = {
    **SHAPE,
    "max_position_embeddings": 128,
    "sliding_window": 5,
    "initializer_range": 0.2,  # so that logits differ far beyond rounding
    "pad_token_id": None,
}
GEMMA3: dict[str, Any] = {**COMMON, "num_hidden_layers": 7, "query_pre_attn_scalar": 24}
TYPES4 = ["sliding_attention", "full_attention"] * 4
"""Of a Gemma 4 with eight layers, whose last four see the keys and values of the second and the third."""
GEMMA4: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 8,
    "layer_types": TYPES4,
    "global_head_dim": 32,
    "num_kv_shared_layers": 4,
    "use_double_wide_mlp": True,
    "hidden_size_per_layer_input": 16,
    "vocab_size_per_layer_input": 300,
    "final_logit_softcapping": 30.0,
}


def random_gemma(kind: str, **overrides: Any) -> torch.nn.Module:
    """kind: a model type. Gains, tables and the layers' scalars are random, too."""
    shape = GEMMA3 if kind.startswith("gemma3") else GEMMA4
    config = transformers.AutoConfig.for_model(kind, **{**shape, **overrides})
    torch.manual_seed(11)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                low = -0.5 if kind.startswith("gemma3") else 0.5  # whose gain is 1 more
                parameter.uniform_(low, low + 1)
            elif "embed_tokens" in name:
                parameter.normal_(std=0.5)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.uniform_(0.5, 1.5)
    return model.eval()


def save_gemma(kind: str, path: Path, **overrides: Any) -> torch.nn.Module:
    model = random_gemma(kind, **overrides)
    model.save_pretrained(path)
    return model


@torch.no_grad()
def logits_of(model: torch.nn.Module) -> torch.Tensor:
    """Of IDS, [n, vocab], by a model of transformers or one of ours."""
    logits = model(torch.tensor([IDS]))
    return (logits if isinstance(logits, torch.Tensor) else logits.logits)[0]


def export(source: Path, out: Path, tokenizer: TokenizerSpec) -> Engine:
    """A package of the checkpoint, all in float32, in the engine."""
    checkpoint = open_checkpoint(source, {})
    options: dict[str, Any] = {"weights": "float32", "provenance": checkpoint.provenance}
    export_package(checkpoint_source(checkpoint), tokenizer, out, name="p", rows="float32", **options)
    return Engine(out, kv_type="float32", threads=1)
