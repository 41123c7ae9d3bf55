"""What compiled stages compute, beside the CPU: Qualcomm's HTP simulator gives the results of the chip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

from meki import _core
from meki.engine import find_onnxruntime, find_qnn_provider

TEXT = (
    "The library stands at the end of the harbour road, where the fishing boats used to unload. On windy days you can "
    "hear the ropes beat against the masts, and the woman at the desk looks up from her book as if somebody had "
    "called. She knows every reader by name. Children come after school to ask for stories about whales, and she "
    "always finds one that they have not read, although the shelves are short and there are not many whales."
)
"""Of a kind that any model has seen; repeated where more tokens are wanted."""


@dataclass(frozen=True)
class Difference:
    """Of the logits, over all tokens."""

    tokens: int
    rms: float
    largest: float
    rms_logits: float
    """Of the logits themselves, after their mean over the vocabulary is taken off."""
    same_choice: int
    """Tokens after which both have the same most probable one."""


def compare(package: Path, soc: str, tokens: int, *, memory: bool = True) -> Difference:
    """Logits of the stages compiled for a chip against the CPU's, with an exact KV cache, over `tokens` tokens.

    Half of them are computed as a prompt, the rest one by one. Errors as `Engine`'s.
    """
    onnxruntime, provider = str(find_onnxruntime()), str(find_qnn_provider())
    exact = _core.EngineOptions(onnxruntime=onnxruntime, kv_type="float32", memory=memory)
    compiled = _core.EngineOptions(
        onnxruntime=onnxruntime, provider="qnn", qnn_library=provider, soc=soc, kv_type="float16", memory=memory
    )
    text = Tokenizer.from_file(str(package / "tokenizer.json")).encode(TEXT).ids
    ids = (text * (1 + tokens // len(text)))[:tokens]
    reference = _logits(package, exact, [ids])
    half = tokens // 2
    logits = _logits(package, compiled, [ids[:half], *([token] for token in ids[half:])])
    error = logits - reference
    centred = reference - reference.mean(axis=-1, keepdims=True)
    return Difference(
        tokens,
        float(np.sqrt(np.mean(np.square(error)))),
        float(np.abs(error).max()),
        float(np.sqrt(np.mean(np.square(centred)))),
        int((logits.argmax(axis=-1) == reference.argmax(axis=-1)).sum()),
    )


def _logits(package: Path, options: _core.EngineOptions, steps: list[list[int]]) -> NDArray[np.float32]:
    """float32 [all tokens, vocab_size], of one sequence that is computed in these steps."""
    engine = _core.Engine.open(str(package), options)
    session = _core.Session(engine, _core.SessionOptions(context=sum(map(len, steps))))
    logits = []
    for step in steps:
        session.prompt(step)
        if step:
            logits.append(session.logits())
    return np.concatenate(logits)
