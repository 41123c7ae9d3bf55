"""What `meki-bench` does: measures prefill and decode of one package (docs/benchmark.md)."""
