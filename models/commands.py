"""Entry points of the commands of meki.models, which say what to install if something is missing."""

from __future__ import annotations

import importlib

from meki.cli.errors import FAILURE, INTERRUPTED, report


def convert(argv: list[str] | None = None) -> int:
    return _run("meki-convert", "models", "meki.models.convert", argv)


def compile(argv: list[str] | None = None) -> int:
    # The compiler is imported by a process of its own, later.
    return _run("meki-compile", "models,qnn", "onnxruntime_qnn meki.models.qnn.compile", argv)


def _run(program: str, extras: str, modules: str, argv: list[str] | None) -> int:
    """The exit code of `main` of the last of the modules."""
    try:
        *_, command = map(importlib.import_module, modules.split())
    except ModuleNotFoundError as error:
        remedy = f"install what {program} needs: pip install 'meki[{extras}]'"
        report(program, "error", f"the Python package {error.name!r} is missing; {remedy}")
        return FAILURE
    except KeyboardInterrupt:  # loading PyTorch takes seconds
        return INTERRUPTED
    code: int = command.main(argv)
    return code
