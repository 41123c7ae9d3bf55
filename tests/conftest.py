"""Small random models and packages of them, shared by all tests."""

from __future__ import annotations

import ctypes
import functools
import platform
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch

from meki.models.architectures.llama import Decoder, LlamaConfig
from meki.models.package import export_package
from meki.models.tokenizer import TokenizerSpec, train_tokenizer

SMALL = {
    "vocab_size": 300,
    "layers": 3,
    "hidden": 64,
    "ffn": 96,
    "heads": 4,
    "kv_heads": 2,
    "head_dim": 16,
    "memory_dim": 32,
    "context": 128,
    "rope_theta": 10_000.0,
}

SENTENCES = [
    "The old lighthouse keeper counted the ships and wrote their names in a blue book.",
    "A small ship came in the night, and the keeper could not read the name of the ship.",
    "In the morning the ship was there, and on it a cat that looked at the lighthouse.",
    "The cat and the keeper had fish for breakfast; then they wrote the name of the cat in the book.",
]


def random_model(config: LlamaConfig, seed: int = 7) -> Decoder:
    """Every parameter random, norms and scales included, so that none can be left out unnoticed."""
    model = Decoder(config)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name == "embed_tokens.weight":
                parameter.normal_(0.0, 0.3, generator=generator)
            elif name.endswith("embeddings.weight"):
                parameter.normal_(0.0, 1.0, generator=generator)
            elif parameter.dim() == 2:
                parameter.normal_(0.0, parameter.shape[1] ** -0.5, generator=generator)
            else:  # norms, alpha and beta
                parameter.uniform_(0.5, 1.5, generator=generator)
        for name, buffer in model.named_buffers():
            if name.endswith("canonical_ids"):
                buffer.copy_(torch.arange(len(buffer)) // 3)
    return model


@functools.cache
def qnn_is_missing() -> str | None:
    """Why Qualcomm's compiler and simulator do not run here."""
    if platform.machine() != "x86_64":
        return f"Qualcomm's simulator runs on x86-64 alone, this is {platform.machine()}"
    if find_spec("onnxruntime_qnn") is None:
        return "onnxruntime-qnn is not installed: pip install 'meki[qnn]'"
    try:
        ctypes.CDLL("libatomic.so.1")
    except OSError:
        return "libatomic.so.1, which Qualcomm's libraries need, is not there: apt install libatomic1"
    return None


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("qnn") and (reason := qnn_is_missing()):
        pytest.skip(reason)


@pytest.fixture(autouse=True)
def meki_home(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What MEKI_HOME names, so that no test meets the models of whoever runs it: a directory that is yet to be made."""
    home = tmp_path_factory.mktemp("meki") / "home"
    monkeypatch.setenv("MEKI_HOME", str(home))
    return home


@pytest.fixture(scope="session")
def make_model() -> Callable[..., Decoder]:
    """make_model(**overrides of SMALL): a random model, the same at every call."""
    return lambda **overrides: random_model(LlamaConfig.from_settings({**SMALL, **overrides}))


@pytest.fixture(scope="session")
def tokenizer_json() -> bytes:
    """A byte-level BPE tokenizer with at most 300 tokens; its end-of-story token has id 0."""
    return train_tokenizer(SENTENCES, SMALL["vocab_size"]).to_str().encode()


@pytest.fixture(scope="session")
def tokenizer_spec(tokenizer_json: bytes) -> TokenizerSpec:
    """The same with its end token."""
    return TokenizerSpec(tokenizer_json, eos_token_ids=(0,))


@pytest.fixture(scope="session")
def make_package(
    make_model: Callable[..., Decoder], tokenizer_spec: TokenizerSpec, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., Path]:
    """make_package(weights, rows, name, **overrides of SMALL): `make_model(**overrides)` as a package.

    Shared: do not modify it. `vocab_size` must be at least 300, for the tokenizer.
    """
    packages: dict[tuple[Any, ...], Path] = {}

    def make(weights: str = "float32", rows: str = "float16", name: str = "small", **overrides: Any) -> Path:
        key = (weights, rows, name, *sorted(overrides.items()))
        if key not in packages:
            path = tmp_path_factory.mktemp("package") / name
            export_package(
                make_model(**overrides),
                tokenizer_spec,
                path,
                name=name,
                weights=weights,
                rows=rows,
                provenance={"weights": "random"},
            )
            packages[key] = path
        return packages[key]

    return make
