"""What compiled stages compute, beside the CPU: Qualcomm's HTP simulator gives the results of the chip."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from meki import Engine

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
    exact = Engine(package, kv_type="float32", memory=memory)
    text = exact.tokenizer.encode(TEXT).ids
    ids = (text * (1 + tokens // len(text)))[:tokens]
    reference = exact.logits(ids)
    del exact  # its weights go before the compiled ones come
    session = Engine(package, provider="qnn", soc=soc, memory=memory).session(context=tokens)
    half = tokens // 2
    steps = [ids[:half], *([token] for token in ids[half:])]
    logits = np.concatenate([session.logits(step) for step in steps if step])
    error = logits - reference
    centred = reference - reference.mean(axis=-1, keepdims=True)
    return Difference(
        tokens,
        float(np.sqrt(np.mean(np.square(error)))),
        float(np.abs(error).max()),
        float(np.sqrt(np.mean(np.square(centred)))),
        int((logits.argmax(axis=-1) == reference.argmax(axis=-1)).sum()),
    )
