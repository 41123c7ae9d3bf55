"""The command `meki-convert`; its work is done by meki.models.convert, which needs the extra `models`."""

from __future__ import annotations

import sys

from .errors import INTERRUPTED


def main(argv: list[str] | None = None) -> int:
    try:
        from meki.models.convert import main as convert
    except ModuleNotFoundError as error:
        print(
            f"meki-convert: error: the Python package {error.name!r} is missing; "
            "install what conversion needs: pip install 'meki[models]'",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:  # loading PyTorch takes seconds
        return INTERRUPTED
    return convert(argv)
