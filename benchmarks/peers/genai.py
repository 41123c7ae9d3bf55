"""onnxruntime-genai, in this process."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np

from .llama_model import PeerConfig
from .workload import PeerError, Workload


class Genai:
    """Real prefill of random tokens, once for each workload; greedy search."""

    name = "onnxruntime-genai"
    PIECE = 512  # of the prefill that fills a cache: attention's scratch grows with the square of it

    def __init__(self, folder: Path, config: PeerConfig, workloads: Sequence[Workload], threads: int) -> None:
        try:
            import onnxruntime_genai
        except ImportError as error:
            raise PeerError(f"onnxruntime-genai is not installed ({error}); pip install onnxruntime-genai") from error
        self.genai, self.vocab_size = onnxruntime_genai, config.vocab_size
        self.folder, self.workloads = folder, workloads
        path = folder / "genai_config.json"
        try:
            model = json.loads(path.read_text(encoding="utf-8"))["model"]
            decoder = model["decoder"]
            names = ["num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "head_size"]
            got = [model["vocab_size"], *(decoder[name] for name in names)]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise PeerError(f"{path}: not a model of onnxruntime-genai: {error!r}") from error
        expected = [config.vocab_size, config.layers, config.hidden, config.heads, config.kv_heads, config.head_dim]
        if got != expected:
            raise PeerError(f"{path}: vocab_size, {', '.join(names)} are {got}, expected the package's {expected}")
        with self.errors():
            options = onnxruntime_genai.Config(str(folder))
            options.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
            self.model = onnxruntime_genai.Model(options)
        self.generators: dict[Workload, Any] = {}
        self.rng = np.random.default_rng(0)

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:  # the binding raises RuntimeError and its own types
            raise PeerError(f"onnxruntime-genai: {error}") from error

    def prepare(self) -> None:
        """It has one setting."""

    def round(self) -> list[float]:
        return [self.measure(workload) for workload in self.workloads]

    def settings(self) -> list[str]:
        return [""] * len(self.workloads)

    def describe(self) -> str:
        return f"{metadata.version('onnxruntime-genai')}, model {self.folder.resolve().name}"

    def figures(self) -> dict[str, Any]:
        return {}

    def close(self) -> None:
        self.generators.clear()

    def append(self, generator: Any, tokens: int) -> None:
        for start in range(0, tokens, self.PIECE):
            piece = self.rng.integers(0, self.vocab_size, min(self.PIECE, tokens - start))
            generator.append_tokens(piece.astype(np.int32))

    def measure(self, workload: Workload) -> float:
        """tokens/s."""
        with self.errors():
            return self.prefill(workload) if workload.kind == "prefill" else self.decode(workload)

    def generator(self, workload: Workload, depth: int) -> Any:
        """The workload's own, with at least `depth` tokens in its cache."""
        if workload not in self.generators:
            length = depth + workload.tokens + 1
            parameters = self.genai.GeneratorParams(self.model)
            # As long at least as at most: no end-of-text token ends it.
            parameters.set_search_options(max_length=length, min_length=length, do_sample=False)
            self.generators[workload] = self.genai.Generator(self.model, parameters)
            self.append(self.generators[workload], depth)
        return self.generators[workload]

    def prefill(self, workload: Workload) -> float:
        generator = self.generator(workload, 0)
        tokens = self.rng.integers(0, self.vocab_size, workload.tokens).astype(np.int32)
        seconds = 0.0
        for _ in range(2):  # the first is the warm-up
            generator.rewind_to(0)
            started = time.perf_counter()
            generator.append_tokens(tokens)
            seconds = time.perf_counter() - started
        return workload.tokens / seconds

    def decode(self, workload: Workload) -> float:
        depth = max(workload.depth, 1)  # it needs a token to begin with
        generator = self.generator(workload, depth)
        generator.rewind_to(depth - 1)
        self.append(generator, 1)  # the warm-up
        generator.generate_next_token()  # samples from what is computed; each further call computes one token
        started = time.perf_counter()
        for _ in range(workload.tokens):
            generator.generate_next_token()
        return workload.tokens / (time.perf_counter() - started)
