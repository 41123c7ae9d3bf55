"""Runs a target of targets.py under atheris, which is libFuzzer for Python.

python -m fuzz.guided TARGET [LIBFUZZER_OPTION...] CORPUS...
"""

from __future__ import annotations

import resource
import sys

import atheris

# What reads the bytes; PyTorch and numpy would only be slower.
with atheris.instrument_imports(include=["meki", "gguf", "jinja2", "zipfile"]):
    from fuzz.targets import TARGETS

ADDRESS_SPACE = 6 << 30
"""Bytes; what asks for more gets a MemoryError, as it would on a small machine, and does not take this one's."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))
    _, target, *options = sys.argv
    atheris.Setup([f"fuzz.{target}", *options], TARGETS[target])
    atheris.Fuzz()


if __name__ == "__main__":
    main()
