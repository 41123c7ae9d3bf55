"""Compiles a grammar in a process of its own, which may run out of time, memory or stack.

llguidance limits what it does for a token, and most of what it does before. But it follows references by recursion,
however many there are, and may look forever for a text that several regular expressions have in common. As this file is
run as a program, it imports nothing of meki.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

CPU_SECONDS = 5
MEMORY_BYTES = 2**30
STACK_BYTES = 2**21
"""A quarter of what threads have, for what compiles here compiles there."""


def try_grammar(grammar: str, vocab_size: int, special_tokens: Mapping[str, int]) -> str:
    """What is wrong with a grammar in llguidance's form; empty: it can be compiled here, too. special_tokens: at least
    one, ids below `vocab_size` by their texts, which grammars may name."""
    import llguidance

    library = Path(llguidance.__file__).parents[1]
    command = [sys.executable, "-I", "-S", __file__, str(library)]
    what = json.dumps([grammar, vocab_size, dict(special_tokens)])
    trial = subprocess.run(command, input=what.encode(), capture_output=True)
    said, complete, _ = trial.stdout.decode(errors="replace").rpartition("\0")
    if complete:
        return said
    if trial.returncode > 0:
        last_line = trial.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        raise RuntimeError(f"{sys.executable} cannot try out a grammar: {last_line}")
    limits = f"{CPU_SECONDS} s, {MEMORY_BYTES >> 20} MiB of memory or {STACK_BYTES >> 20} MiB of stack"
    return f"it takes more than {limits} to compile; make it simpler"


class _Bytes:
    """A tokenizer of bytes and special tokens, in the form that llguidance takes."""

    bos_token_id = None

    def __init__(self, vocab_size: int, special_tokens: dict[str, int]) -> None:
        self.tokens = [b""] * max(vocab_size, 256 + len(special_tokens))
        self.special_token_ids = sorted(special_tokens.values())
        self.eos_token_id = self.special_token_ids[0]
        for text, token_id in special_tokens.items():
            self.tokens[token_id] = text.encode()
        others = (token_id for token_id, token in enumerate(self.tokens) if not token)
        self._ids = dict(zip(range(256), others, strict=False))
        for byte, token_id in self._ids.items():
            self.tokens[token_id] = bytes((byte,))

    def __call__(self, text: bytes) -> list[int]:
        return [self._ids[byte] for byte in text]


def _main() -> None:
    sys.path.append(sys.argv[1])
    from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper

    def compile_grammar() -> None:
        tokenizer: Any = LLTokenizer(TokenizerWrapper(_Bytes(vocab_size, special_tokens)))
        matcher = LLMatcher(tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        wrong = matcher.get_error()
        if not wrong:
            matcher.compute_bitmask()  # of the first byte
            wrong = matcher.get_error()
            if wrong.startswith("NoExtension"):
                wrong = "there is no text of this kind"
        print(wrong + "\0", end="", flush=True)

    grammar, vocab_size, special_tokens = json.load(sys.stdin.buffer)
    for limit, most in (
        (resource.RLIMIT_CPU, CPU_SECONDS),
        (resource.RLIMIT_AS, MEMORY_BYTES),
        (resource.RLIMIT_CORE, 0),
    ):
        resource.setrlimit(limit, (most, most))
    threading.stack_size(STACK_BYTES)
    thread = threading.Thread(target=compile_grammar)
    thread.start()
    thread.join()


if __name__ == "__main__":
    _main()
