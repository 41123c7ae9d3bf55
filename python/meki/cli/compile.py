"""The command `meki-compile`; its work is done by meki.models.qnn, which needs the extras `models` and `qnn`."""

from __future__ import annotations

import sys

from .errors import INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    try:
        import onnxruntime_qnn  # noqa: F401 - the compiler, which its own process imports later

        from meki.models.qnn.compile import main as compile_main
    except ModuleNotFoundError as error:
        print(
            f"meki-compile: error: the Python package {error.name!r} is missing; "
            "install what compiling needs: pip install 'meki[models,qnn]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return INTERRUPTED
    return compile_main(argv)
