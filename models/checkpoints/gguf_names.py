"""What the decoder's weights are called in GGUF files."""

from __future__ import annotations

_COMMON = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_LLAMA = {**_COMMON, "post_attention_layernorm": "ffn_norm"}
_GEMMA = {
    **_COMMON,
    "post_attention_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "layer_scalar": "layer_output_scale",
    "per_layer_input_gate": "inp_gate",
    "per_layer_projection": "proj",
    "post_per_layer_input_norm": "post_norm",
}
"""Of a layer's tensors: the decoder's and the file's."""
_OUTER = {
    "embed_tokens": "token_embd",
    "norm": "output_norm",
    "lm_head": "output",
    "embed_tokens_per_layer": "per_layer_token_embd",
    "per_layer_model_projection": "per_layer_model_proj",
    "per_layer_projection_norm": "per_layer_proj_norm",
}


def stored_name(name: str, gemma: bool) -> str:
    """Of the decoder's weight `name`. gemma: the decoder is one of Gemma's; else it is of the Llama family."""
    stem, _, kind = name.rpartition(".")
    if kind == "layer_scalar":  # a parameter of the layer itself
        stem, kind = name, "weight"
    if not stem.startswith("layers."):
        return f"{_OUTER[stem]}.{kind}"
    _, layer, inner = stem.split(".", 2)
    names = _GEMMA if gemma else _LLAMA
    return f"blk.{layer}.{names[inner]}.{kind}" if inner in names else name
