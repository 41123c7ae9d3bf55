"""What the tests of other engines share: scripts stand in for programs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.peers.workload import Workload
from meki.models.architectures.llama import LlamaConfig

SMALL = LlamaConfig.from_settings(
    dict(vocab_size=96, layers=2, hidden=64, ffn=96, heads=4, kv_heads=2, head_dim=32, memory_dim=16, context=256)
)
PREFILL, DECODE = Workload("prefill", 0, 128), Workload("decode", 64, 16)


def script(path: Path, body: str, interpreter: str = "/bin/sh") -> str:
    """An executable file; its path."""
    path.write_text(f"#!{interpreter}\n{body}\n")
    path.chmod(0o755)
    return str(path)
