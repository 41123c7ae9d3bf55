"""Runs a target of targets.py under atheris, which is libFuzzer for Python.

python -m fuzz.guided TARGET [LIBFUZZER_OPTION...] CORPUS...
"""

from __future__ import annotations

import sys

import atheris

# What reads the bytes; PyTorch and numpy would only be slower.
with atheris.instrument_imports(include=["meki", "gguf", "jinja2", "zipfile"]):
    from fuzz.targets import MOST_MEMORY, TARGETS, memory_limit


def main() -> None:
    _, target, *options = sys.argv
    atheris.Setup([f"fuzz.{target}", *options], TARGETS[target])
    with memory_limit(MOST_MEMORY):
        atheris.Fuzz()


if __name__ == "__main__":
    main()
