"""OpenVINO GenAI, in this process."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .llama_model import PeerConfig
from .workload import PeerError, Workload

NAME = "openvino-genai"


class OpenVino:
    """Its pipeline as it comes: paged attention over an 8-bit KV cache, and prompts whose beginning is known are not
    computed again. A prefill has new random tokens each time; a decode has always the same ones before it, which are
    computed once."""

    name = NAME
    WARM_UP = 4
    """Tokens."""

    def __init__(self, folder: Path, config: PeerConfig, workloads: Sequence[Workload], threads: int) -> None:
        try:
            import openvino
            import openvino_genai
        except ImportError as error:
            raise PeerError(f"{NAME} is not installed ({error}); pip install {NAME}") from error
        self.openvino, self.genai = openvino, openvino_genai
        self.folder, self.vocab_size, self.workloads = folder, config.vocab_size, workloads
        path = folder / "config.json"
        names = ["vocab_size", "num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads"]
        try:
            model = json.loads(path.read_text(encoding="utf-8"))
            got = [model[name] for name in [*names, "head_dim"]]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{path}: not a model that optimum-cli exported: {error!r}") from error
        expected = [config.vocab_size, config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim]
        if got != expected:
            raise PeerError(f"{path}: {', '.join(names)}, head_dim are {got}, expected the package's {expected}")
        with self.errors():
            self.pipeline = openvino_genai.LLMPipeline(str(folder), "CPU", INFERENCE_NUM_THREADS=threads)
        self.rng = np.random.default_rng(0)
        self.prompts = {workload: self.tokens(max(workload.depth, 1)) for workload in workloads}

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the binding raises RuntimeError and its own types
            raise PeerError(f"{NAME}: {error}") from error

    def prepare(self) -> None:
        """It runs as it comes."""

    def round(self) -> list[float]:
        with self.errors():
            return [
                self.prefill(workload) if workload.kind == "prefill" else self.decode(workload)
                for workload in self.workloads
            ]

    def settings(self) -> list[str]:
        return [""] * len(self.workloads)

    def describe(self) -> str:
        return f"{metadata.version(NAME)}, model {self.folder.resolve().name}"

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        del self.pipeline

    def tokens(self, count: int) -> Any:
        """Random ids, int64 [1, count]."""
        return self.openvino.Tensor(self.rng.integers(0, self.vocab_size, (1, count)))

    def run(self, prompt: Any, tokens: int) -> Any:
        """Times of a prompt and `tokens` greedy tokens, whatever ends the text."""
        config = self.genai.GenerationConfig(
            max_new_tokens=tokens, min_new_tokens=tokens, ignore_eos=True, do_sample=False
        )
        return self.pipeline.generate(prompt, config).perf_metrics

    def prefill(self, workload: Workload) -> float:
        self.run(self.tokens(workload.tokens), 1)
        return workload.tokens / self.run(self.tokens(workload.tokens), 1).get_ttft().mean * 1000

    def decode(self, workload: Workload) -> float:
        self.run(self.prompts[workload], self.WARM_UP)
        # The first of the tokens is the prompt's; the mean is of those after it, in milliseconds.
        return float(1000 / self.run(self.prompts[workload], workload.tokens + 1).get_tpot().mean)
