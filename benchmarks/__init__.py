"""What measures: run from the repository's root, as in `python -m benchmarks.peers.compare`."""
