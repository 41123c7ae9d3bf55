"""What several command lines print: a generation, the quality of a package."""

from __future__ import annotations

import sys
from typing import Any

from ..engine import Engine
from ..generation import GenerationStats, TextStream
from ..package import has_random_weights
from .errors import note

RANDOM_WEIGHTS = "random weights: the text means nothing"
SIMULATED = "HTP simulator: results as on the chip, speed is not"


def print_stream(stream: TextStream) -> None:
    """Writes the pieces to stdout as they come; on a terminal each is shown at once. Ends the line."""
    shown_at_once = sys.stdout.isatty()
    try:
        for piece in stream:
            sys.stdout.write(piece)
            if shown_at_once:
                sys.stdout.flush()
    finally:
        stream.close()
        sys.stdout.write("\n")


def print_stats(engine: Engine, stats: GenerationStats) -> None:
    """A table on stderr; what was not measured is left out."""
    cached = f", {stats.cached_tokens:,} of them cached" if stats.cached_tokens else ""
    rows = [
        ("model", f"{engine.name} ({RANDOM_WEIGHTS})" if engine.random_weights else engine.name),
        *([("provider", f"qnn, {engine.soc}" + (f" ({SIMULATED})" if engine.simulated else ""))] if engine.soc else []),
        ("seed", str(stats.seed)),
        ("prompt", f"{stats.prompt_tokens:,} tokens{cached}" + _rate(stats.prefill_tokens_per_s)),
        ("generated", f"{stats.new_tokens:,} tokens" + _rate(stats.decode_tokens_per_s)),
    ]
    if stats.drafted_tokens:
        share = stats.accepted_tokens / stats.drafted_tokens
        rows.append(("drafted", f"{stats.drafted_tokens:,} tokens, {stats.accepted_tokens:,} accepted ({share:.0%})"))
    if stats.time_to_first_token_s is not None:
        rows.append(("first token", f"{stats.time_to_first_token_s * 1000:,.1f} ms"))
    if stats.rom_access is not None:
        reads = f"{stats.rom_requests - stats.rom_hits:,} reads, {stats.rom_bytes:,} bytes, {stats.rom_access}"
        rows.append(("memory rows", f"{reads}; {stats.rom_hits:,} from the row cache"))
    if stats.stall_us_p50 is not None:
        rows.append(
            ("wait for rows", f"{stats.stall_us_p50:,.1f} us median, {stats.stall_us_p99:,.1f} us 99th percentile")
        )
    if stats.resident_bytes is not None:
        rows.append(("resident", f"{stats.resident_bytes / 1e6:,.1f} MB"))
    note("\n".join(f"{label:<14}{value}" for label, value in rows))


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f", {tokens_per_s:,.1f} tokens/s"


def quality_text(manifest: dict[str, Any]) -> str:
    """The line of a package that was measured (`quality` of its manifest)."""
    its = manifest["quality"]
    change = its["perplexity"] / its["reference_perplexity"] - 1
    return (
        f"perplexity {its['perplexity']:.2f} beside {its['reference_perplexity']:.2f} of {its['source']} in float32 "
        f"({change:+.2%}), KL divergence {its['kl_divergence']:.5f} ± {its['kl_standard_error']:.5f}, "
        f"{its['same_top_token']:.1%} the same next token; {its['bytes']:,} bytes of {its['text']}, "
        f"{its['kv_type']} KV cache" + ("; random weights" if has_random_weights(manifest) else "")
    )
