"""Engines that run in this process, on fakes of their packages."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest

from benchmarks.peers.genai import Genai
from benchmarks.peers.ov_genai import OpenVino
from benchmarks.peers.workload import PeerError, Workload

from .case import DECODE, PREFILL, SMALL

# onnxruntime-genai


class FakeGenerator:
    """Counts tokens as onnxruntime-genai does: logits of the last token are there after append_tokens, and
    generate_next_token computes those of the token before it only if they are not."""

    def __init__(self, calls: list[tuple[str, int]], max_length: int) -> None:
        self.calls, self.max_length, self.sequence, self.computed = calls, max_length, 0, 0

    def append_tokens(self, tokens: np.ndarray) -> None:
        assert tokens.dtype == np.int32 and tokens.min() >= 0 and tokens.max() < SMALL.vocab_size
        self.sequence += len(tokens)
        assert self.sequence < self.max_length
        self.calls.append(("append", len(tokens)))
        self.computed = self.sequence

    def rewind_to(self, length: int) -> None:
        self.sequence = self.computed = length

    def generate_next_token(self) -> None:
        if self.computed < self.sequence:
            self.calls.append(("step at", self.computed))
            self.computed = self.sequence
        self.sequence += 1
        assert self.sequence <= self.max_length


@pytest.fixture
def fake_genai(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """A fake of the package, a model folder of SMALL's shapes in tmp_path, and the list of the fake's calls."""
    calls: list[tuple[str, int]] = []
    module = ModuleType("onnxruntime_genai")
    module.Config = lambda path: SimpleNamespace(overlay=json.loads)  # type: ignore[attr-defined]
    module.Model = lambda config: None  # type: ignore[attr-defined]

    class Parameters(SimpleNamespace):
        def set_search_options(self, max_length: int, min_length: int, do_sample: bool) -> None:
            assert min_length == max_length and not do_sample
            self.max_length = max_length

    module.GeneratorParams = lambda model: Parameters()  # type: ignore[attr-defined]
    module.Generator = lambda model, parameters: FakeGenerator(calls, parameters.max_length)  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", module)
    decoder = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    model = {"vocab_size": 96, "decoder": {**decoder, "head_size": 32}}
    (tmp_path / "genai_config.json").write_text(json.dumps({"model": model}))
    return calls


def test_genai_decodes_at_its_depth_and_fills_it_once(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    workload = Workload("decode", 1100, 3)
    genai = Genai(tmp_path, SMALL, [workload], 2)
    steps = [("append", 1), ("step at", 1100), ("step at", 1101), ("step at", 1102)]
    assert genai.round()[0] > 0
    assert fake_genai == [("append", 512), ("append", 512), ("append", 76), *steps]
    fake_genai.clear()
    assert genai.round()[0] > 0
    assert fake_genai == steps


def test_genai_prefill(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    assert Genai(tmp_path, SMALL, [Workload("prefill", 0, 700)], 2).round()[0] > 0
    assert fake_genai == [("append", 700), ("append", 700)]  # a warm-up, and what is measured


def test_genai_of_other_shapes_or_without_a_model(tmp_path: Path, fake_genai: list[tuple[str, int]]) -> None:
    with pytest.raises(PeerError, match=r"are \[96, 2, 64, 4, 2, 32\], expected the package's \[96, 3, 64, 4, 2, 32\]"):
        Genai(tmp_path, replace(SMALL, layers=3), [], 2)
    with pytest.raises(PeerError, match="not a model of onnxruntime-genai"):
        Genai(tmp_path / "nowhere", SMALL, [], 2)


def test_genai_errors_are_named(tmp_path: Path, fake_genai: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("eos_token_id out of range")

    genai = Genai(tmp_path, SMALL, [DECODE], 2)
    monkeypatch.setattr(sys.modules["onnxruntime_genai"], "Generator", broken)
    with pytest.raises(PeerError, match="onnxruntime-genai: eos_token_id out of range"):
        genai.round()
    monkeypatch.setitem(sys.modules, "onnxruntime_genai", None)
    with pytest.raises(PeerError, match=r"not installed.*pip install onnxruntime-genai"):
        Genai(tmp_path, SMALL, [], 2)


# openvino-genai


@pytest.fixture
def fake_openvino(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[tuple[int, int, int]]:
    """Fakes of the packages, a model of SMALL's shapes in tmp_path, and of each prompt that is run: its first token,
    its length and the tokens that are generated. A prompt takes a second, a token 10 ms."""
    calls: list[tuple[int, int, int]] = []

    class Pipeline:
        def __init__(self, path: str, device: str, **options: int) -> None:
            assert (path, device, options) == (str(tmp_path), "CPU", {"INFERENCE_NUM_THREADS": 2})

        def generate(self, prompt: np.ndarray, config: SimpleNamespace) -> SimpleNamespace:
            assert prompt.dtype == np.int64 and prompt.min() >= 0 and prompt.max() < SMALL.vocab_size
            assert config.ignore_eos and not config.do_sample and config.min_new_tokens == config.max_new_tokens
            calls.append((int(prompt[0, 0]), prompt.shape[1], config.max_new_tokens))
            first, others = SimpleNamespace(mean=1000.0), SimpleNamespace(mean=10.0)
            return SimpleNamespace(perf_metrics=SimpleNamespace(get_ttft=lambda: first, get_tpot=lambda: others))

    openvino, genai = ModuleType("openvino"), ModuleType("openvino_genai")
    openvino.Tensor = lambda array: array  # type: ignore[attr-defined]
    genai.LLMPipeline, genai.GenerationConfig = Pipeline, SimpleNamespace  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "openvino", openvino)
    monkeypatch.setitem(sys.modules, "openvino_genai", genai)
    model = {"vocab_size": 96, "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4}
    (tmp_path / "config.json").write_text(json.dumps({**model, "num_key_value_heads": 2, "head_dim": 32}))
    return calls


def test_openvino_has_a_new_prompt_each_time_and_keeps_its_depth(
    tmp_path: Path, fake_openvino: list[tuple[int, int, int]]
) -> None:
    engine = OpenVino(tmp_path, SMALL, [PREFILL, Workload("decode", 0, 16), DECODE], 2)
    for _ in range(2):
        assert engine.round() == [128.0, 100.0, 100.0]
    assert [call[1:] for call in fake_openvino] == [(128, 1), (128, 1), (1, 4), (1, 17), (64, 4), (64, 17)] * 2
    firsts = [call[0] for call in fake_openvino]
    assert len(set(firsts[i] for i in (0, 1, 6, 7))) > 1  # four of 96 tokens, of a fixed seed
    assert firsts[2:6] == firsts[8:]


def test_openvino_of_other_shapes_or_without_a_model(
    tmp_path: Path, fake_openvino: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(PeerError, match=r"are \[96, 2, 64, 4, 2, 32\], expected the package's \[96, 3, 64, 4, 2, 32\]"):
        OpenVino(tmp_path, replace(SMALL, layers=3), [], 2)
    with pytest.raises(PeerError, match="not a model that optimum-cli exported"):
        OpenVino(tmp_path / "nowhere", SMALL, [], 2)
    monkeypatch.setitem(sys.modules, "openvino_genai", None)
    with pytest.raises(PeerError, match=r"not installed.*pip install openvino-genai"):
        OpenVino(tmp_path, SMALL, [], 2)
