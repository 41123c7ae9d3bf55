"""Megatron-LM checkpoints with random weights, through conversion and engine; every refusal."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from meki import Engine
from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.checkpoints.megatron import is_megatron, open_megatron
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec

IDS = np.random.default_rng(5).integers(0, 300, 60).tolist()
FILE = "model_optim_rng.pt"
State = dict[str, Any]


def rounded(model: Decoder, dtype: torch.dtype) -> Decoder:
    model.load_state_dict({name: x.to(dtype).float() for name, x in model.state_dict().items()})
    return model


def in_dtype(state: State, dtype: torch.dtype) -> State:
    return {
        name: x.to(dtype) if isinstance(x, torch.Tensor) and x.is_floating_point() else x for name, x in state.items()
    }


def engine_logits(path: Path, tokenizer: TokenizerSpec, out: Path, **overrides: Any) -> np.ndarray:
    source = checkpoint_source(open_megatron(path, overrides))
    export_package(
        source, tokenizer, out, name="m", weights="float32", rows="float32", provenance={"weights": "random"}
    )
    return Engine(out, kv_type="float32").logits(IDS)


def torch_logits(model: Decoder) -> np.ndarray:
    with torch.no_grad():
        logits: np.ndarray = model(torch.tensor([IDS]))[0].numpy()
    return logits


BFLOAT16, FLOAT32 = torch.bfloat16, torch.float32


@pytest.mark.parametrize(
    ("overrides", "layout", "dtype"),
    [
        ({"qk_norm": False, "projector_norm": True}, {}, BFLOAT16),  # the published training script
        ({"qk_norm": False}, {}, BFLOAT16),
        ({"qk_norm": True, "projector_norm": True}, {"scalar_shape": (1,)}, FLOAT32),
        ({"kv_heads": 4, "head_dim": 32}, {}, FLOAT32),
        ({"kv_heads": 1, "qkv_bias": True}, {}, BFLOAT16),
        ({"memory_dim": 0}, {"fused_norm": True}, BFLOAT16),
        ({"memory_dim": 0, "qkv_bias": True, "qk_norm": False}, {}, FLOAT32),
        ({"tied_embeddings": False, "norm_eps": 1e-3}, {}, BFLOAT16),
    ],
    ids=["published", "no-fc1-norm", "qk-norm", "multi-head", "bias-one-group", "dense-fused", "dense", "untied"],
)
def test_equals_the_training_form(
    make_model: Callable[..., Decoder],
    megatron_state: Callable[..., State],
    tokenizer_spec: TokenizerSpec,
    write_megatron: Callable[..., Path],
    tmp_path: Path,
    overrides: dict[str, Any],
    layout: dict[str, Any],
    dtype: torch.dtype,
) -> None:
    model = rounded(make_model(**overrides), dtype)
    path = write_megatron(in_dtype(megatron_state(model, **layout), dtype), model.config)
    assert open_megatron(path, {}).config == model.config
    weights = checkpoint_source(open_megatron(path, {})).weights
    assert all(weights(name).shape == tensor.shape for name, tensor in model.state_dict().items())
    # Float32 on both sides: what differs is the order of sums of up to 100 terms, about 1e-6 of logits that reach 10.
    got = engine_logits(path, tokenizer_spec, tmp_path / "package")
    np.testing.assert_allclose(got, torch_logits(model), rtol=0, atol=1e-4)


def test_padded_vocabulary(
    make_model: Callable[..., Decoder],
    megatron_state: Callable[..., State],
    tokenizer_spec: TokenizerSpec,
    write_megatron: Callable[..., Path],
    tmp_path: Path,
) -> None:
    """Kept as it is, and cut to the tokenizer's size."""
    model = make_model(vocab_size=384)
    path = write_megatron(megatron_state(model), model.config)
    expected = torch_logits(model)
    whole = engine_logits(path, tokenizer_spec, tmp_path / "whole")
    np.testing.assert_allclose(whole, expected, rtol=0, atol=1e-4)
    cut = engine_logits(path, tokenizer_spec, tmp_path / "cut", vocab_size=300)
    np.testing.assert_allclose(cut, expected[:, :300], rtol=0, atol=1e-4)


@pytest.fixture
def state(make_model: Callable[..., Decoder], megatron_state: Callable[..., State]) -> State:
    return megatron_state(make_model())


@pytest.fixture
def config(make_model: Callable[..., Decoder]) -> LlamaConfig:
    return make_model().config


@pytest.fixture
def refused(write_megatron: Callable[..., Path], state: State, config: LlamaConfig) -> Callable[..., str]:
    """refused(overrides, **arguments): the error's message without the path, with which it must begin."""

    def refused(overrides: dict[str, Any] | None = None, **args: Any) -> str:
        path = write_megatron(state, config, **args)
        with pytest.raises(CheckpointError) as error:
            checkpoint_source(open_megatron(path, overrides or {}))
        message = str(error.value)
        assert message.startswith(f"{path}: ")
        return message.removeprefix(f"{path}: ")

    return refused


@pytest.mark.parametrize("tracked", ["200", "release"])
def test_places(
    write_megatron: Callable[..., Path], state: State, config: LlamaConfig, tmp_path: Path, tracked: str
) -> None:
    root, directory = tmp_path / "run", "release" if tracked == "release" else "iter_0000200"
    file = write_megatron(state, config, f"run/{directory}/mp_rank_00")
    (root / "latest_checkpointed_iteration.txt").write_text(f"{tracked}\n")
    for path in (root, root / directory, root / directory / "mp_rank_00", file):
        assert is_megatron(path)
        checkpoint = open_checkpoint(path, {})
        assert checkpoint.config == config
        assert checkpoint.provenance == {"source": path.name, "format": "megatron", "iteration": "200"}
        assert checkpoint.read_tokenizer() is None
    assert is_megatron(file.rename(tmp_path / "renamed.pt"))
    assert not is_megatron(tmp_path)


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (
            ["iter_0000200/mp_rank_00/x", "iter_0000200/mp_rank_01/x"],
            "parallel checkpoint.*mp_rank_00, mp_rank_01.*merge",
        ),
        (["iter_0000200/mp_rank_00_000/x", "iter_0000200/mp_rank_00_001/x"], "pipeline-.*mp_rank_00_000.*merge"),
        (
            ["iter_0000200/common.pt", "iter_0000200/__0_0.distcp"],
            "distributed checkpoint.*expected .*--ckpt-format torch",
        ),
        (["iter_0000200/.metadata"], "distributed checkpoint.*expected .*--ckpt-format torch"),
        (["iter_0000200/x"], "no model_optim_rng.pt there"),
        (["iter_0000300/x"], r"latest_checkpointed_iteration\.txt: names iter_0000200, which is not there"),
    ],
)
def test_directories_that_are_refused(tmp_path: Path, made: list[str], message: str) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("200")
    for name in made:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(CheckpointError, match=message):
        open_checkpoint(tmp_path, {})


def test_one_rank_of_several(write_megatron: Callable[..., Path], state: State, config: LlamaConfig) -> None:
    """Naming the first file does not make the others dispensable."""
    path = write_megatron(state, config)
    write_megatron(state, config, "run/iter_0000200/mp_rank_01")
    for name in (path, path.parent):
        with pytest.raises(CheckpointError, match="parallel checkpoint"):
            open_megatron(name, {})


def test_tracker_that_is_no_tracker(tmp_path: Path) -> None:
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("../../etc")
    with pytest.raises(CheckpointError, match=r"got '\.\./\.\./etc', expected an iteration or 'release'"):
        open_megatron(tmp_path, {})


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="gone"):
        open_megatron(tmp_path / "gone", {})


@pytest.mark.parametrize(
    ("name", "value", "remedy"),
    [
        ("tensor_model_parallel_size", 2, "merge it to size 1 first"),
        ("pipeline_model_parallel_size", 4, "merge it to size 1 first"),
        ("num_experts", 8, "mixtures of experts"),
        ("normalization", "LayerNorm", "LayerNorm is not supported"),
        ("apply_layernorm_1p", True, "centred on zero"),
        ("add_bias_linear", True, "--add-qkv-bias"),
        ("swiglu", False, "SwiGLU"),
        ("position_embedding_type", "learned_absolute", "rotary"),
        ("rotary_percent", 0.5, "partly rotated"),
        ("rotary_interleaved", True, "interleaved"),
        ("rotary_seq_len_interpolation_factor", 2, "scaled"),
        ("use_rope_scaling", True, "scaled"),
        ("multi_latent_attention", True, "latent attention"),
        ("mtp_num_layers", 1, "multi-token"),
    ],
)
def test_architectures_that_are_refused(refused: Callable[..., str], name: str, value: Any, remedy: str) -> None:
    message = refused(**{name: value})
    assert message.startswith(f"{name} is {value!r} in its args, expected ") and remedy in message


@pytest.mark.parametrize(
    ("added", "message"),
    [
        ("decoder.layers.0.self_attention.linear_qkv.layer_norm_bias", "LayerNorm is not supported"),
        ("decoder.final_layernorm.bias", "LayerNorm is not supported"),
        ("decoder.layers.1.mlp.linear_fc2.bias", "biases of all linear layers"),
        ("decoder.layers.0.mlp.experts.linear_fc1.weight0", "mixtures of experts"),
        ("decoder.layers.9.meki_module.gate_proj.weight", "has no place in a decoder with layers=3"),
        ("output_layer.weight", "has no place in a decoder"),
    ],
)
def test_tensors_that_are_refused(refused: Callable[..., str], state: State, added: str, message: str) -> None:
    state[added] = torch.ones(2)
    got = refused()
    assert added in got and message in got


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({"model": None}, "no state dict under 'model', only .*'args', .*expected .*--ckpt-format torch"),
        ({"model": None, "model0": {}, "model1": {}}, "virtual pipeline stages"),
        ({"model": {"language_model": {"encoder": {}}}}, "'language_model' in its model is a dict, expected a tensor"),
        ({"model": {}}, r"no tensor embedding\.word_embeddings\.weight"),
        ({"args": {"num_layers": 3}}, "args is a dict, expected an argparse.Namespace"),
    ],
)
def test_files_that_are_refused(
    write_megatron: Callable[..., Path], state: State, config: LlamaConfig, entries: dict[str, Any], message: str
) -> None:
    path = write_megatron(state, config, entries=entries)
    with pytest.raises(CheckpointError, match=message):
        open_megatron(path, {})


@pytest.mark.parametrize(
    "name",
    [
        "decoder.final_layernorm.weight",
        "decoder.layers.1.self_attention.linear_qkv.weight",
        "decoder.layers.2.pre_mlp_layernorm.weight",
        "decoder.layers.0.self_attention.k_layernorm.weight",  # the other layers have theirs
        "decoder.layers.2.meki_module.beta_scale",
        "decoder.layers.0.meki_module.embeddings.weight",
    ],
)
def test_missing_tensor(refused: Callable[..., str], state: State, name: str) -> None:
    shape, message = list(state.pop(name).shape), refused()
    assert message.startswith(f"no tensor {name}") and f"needs with shape {shape}" in message


def test_projector_norm_in_one_layer_only(refused: Callable[..., str], state: State) -> None:
    state["decoder.layers.1.meki_module.word_emb_projection.linear_fc1.layer_norm_weight"] = torch.ones(64)
    assert "no tensor decoder.layers.0.meki_module.word_emb_projection.linear_fc1.layer_norm_weight" in refused()


@pytest.mark.parametrize(
    ("name", "wrong", "expected"),
    [
        ("decoder.layers.1.self_attention.linear_qkv.weight", (96, 64), (128, 64)),
        ("decoder.layers.0.mlp.linear_fc1.weight", (96, 64), (192, 64)),  # as without a gate
        ("decoder.layers.2.meki_module.alpha_scale", (2,), ()),
        ("decoder.layers.2.meki_module.embeddings.weight", (299, 32), (300, 32)),
        ("embedding.word_embeddings.weight", (300, 65), (300, 64)),
    ],
)
def test_wrong_shape(
    refused: Callable[..., str], state: State, name: str, wrong: tuple[int, ...], expected: tuple[int, ...]
) -> None:
    state[name] = torch.ones(wrong)
    message = refused()
    assert f"tensor {name} has shape {list(wrong)}" in message and f"needs {list(expected)}" in message
    assert "--set" in message


def test_more_padding_than_the_memory_has(refused: Callable[..., str]) -> None:
    message = refused({"vocab_size": 301})
    assert "shape [300, 64]" in message and "needs [301, 64]" in message


def test_each_argument_can_be_overridden(
    write_megatron: Callable[..., Path], state: State, config: LlamaConfig
) -> None:
    wrong = {"num_layers": 1, "hidden_size": 1, "ffn_hidden_size": 1, "num_attention_heads": 4, "kv_channels": 6}
    path = write_megatron(state, config, **wrong, rotary_base=3, norm_epsilon=0.5, max_position_embeddings=9)
    given = {name: getattr(config, name) for name in ("layers", "hidden", "ffn", "head_dim", "context")}
    checkpoint = open_megatron(path, given | {"rope_theta": config.rope_theta, "norm_eps": config.norm_eps})
    assert checkpoint.config == config
    checkpoint_source(checkpoint)


def test_without_args(write_megatron: Callable[..., Path], state: State, config: LlamaConfig) -> None:
    """Each value that the tensors do not tell is asked for, none is guessed."""
    path = write_megatron(state, config, entries={"args": None})
    given: dict[str, Any] = {}
    for name in ("layers", "hidden", "ffn", "heads", "kv_heads", "head_dim", "context", "rope_theta", "norm_eps"):
        with pytest.raises(CheckpointError, match=f"does not say what {name} is; give it with --set {name}=VALUE"):
            open_megatron(path, given)
        given[name] = getattr(config, name)
    assert open_megatron(path, given).config == config


def test_arguments_that_are_no_plain_values(refused: Callable[..., str], megatron_classes: dict[str, Any]) -> None:
    kind = megatron_classes["RerunMode"].first
    assert refused(num_layers=kind).startswith("layers must be an integer from 1 to 65535, got 'Inert'")
    assert refused(normalization=torch.ones(3)).startswith(
        "normalization is 'FakeTensor' in its args, expected 'RMSNorm'"
    )


class OldMember:
    """A member of an enumeration, as Python 3.11.0 to 3.11.3 pickle it."""

    def __init__(self, kind: type, name: str) -> None:
        self.kind, self.name = kind, name

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.kind, self.name)


def test_members_as_older_pythons_pickle_them(refused: Callable[..., str], megatron_classes: dict[str, Any]) -> None:
    kind = OldMember(megatron_classes["RerunMode"], "first")
    assert refused(num_layers=kind).startswith("layers must be an integer from 1 to 65535, got 'Inert'")


class Plugin:
    """Something of the user's own in the arguments."""


def test_unknown_class_in_the_arguments(refused: Callable[..., str]) -> None:
    message = refused(plugin=Plugin())
    assert message.startswith("refused, its pickle wants ") and "test_megatron.Plugin'; expected tensors" in message


def test_another_file_of_torch_save(tmp_path: Path) -> None:
    torch.save([1, 2], tmp_path / "x.pt")
    with pytest.raises(CheckpointError, match="holds a list, expected the dict of a Megatron-LM checkpoint"):
        open_checkpoint(tmp_path / "x.pt", {})


def test_truncated_download(tmp_path: Path) -> None:
    (tmp_path / FILE).write_bytes(b"PK\x03\x04")
    with pytest.raises(CheckpointError, match=r"not a complete file of torch\.save"):
        open_checkpoint(tmp_path / FILE, {})
