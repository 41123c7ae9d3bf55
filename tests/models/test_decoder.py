"""The PyTorch reference: its backbone against transformers' Qwen3, and causality with the memory."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from meki.models.decoder import Decoder


@pytest.mark.slow  # importing transformers takes seconds
@torch.no_grad()
def test_backbone_is_qwen3(make_model: Callable[..., Decoder]) -> None:
    import transformers

    model = make_model(memory_dim=0)
    config = model.config
    peer = transformers.Qwen3ForCausalLM(
        transformers.Qwen3Config(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden,
            intermediate_size=config.ffn,
            num_hidden_layers=config.layers,
            num_attention_heads=config.heads,
            num_key_value_heads=config.kv_heads,
            head_dim=config.head_dim,
            max_position_embeddings=config.context,
            rms_norm_eps=config.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=True,
        )
    ).eval()
    missing, unexpected = peer.load_state_dict({f"model.{k}": v for k, v in model.state_dict().items()}, strict=False)
    assert (missing, unexpected) == (["lm_head.weight"], [])  # tied: the embedding's own tensor
    ids = torch.randint(config.vocab_size, (2, 40), generator=torch.Generator().manual_seed(0))
    # The same float32 operations in another order, three layers deep, on logits of about 3.
    torch.testing.assert_close(model(ids), peer(ids).logits, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_a_token_sees_no_later_one(make_model: Callable[..., Decoder]) -> None:
    model = make_model()
    ids = torch.arange(20)[None]
    changed = ids.clone()
    changed[0, 12:] += 100
    before, after = model(ids)[0], model(changed)[0]
    torch.testing.assert_close(before[:12], after[:12], rtol=0, atol=1e-5)
    assert (before[12] - after[12]).abs().max() > 0.1
