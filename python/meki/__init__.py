"""MeKi runtime: language models whose memory rows live in storage and are fetched while the model computes.

from meki import Engine
print(Engine("meki-tiny").generate("Once upon a time").text)
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from ._core import PackageError
    from .async_engine import AsyncEngine
    from .engine import Engine
    from .generation import GenerationResult, GenerationStats, TokenLogprobs, TopLogprob
    from .package import ModelNotFoundError
    from .session import Session
    from .session_file import SessionFileError

__all__ = [
    "AsyncEngine",
    "Engine",
    "GenerationResult",
    "GenerationStats",
    "ModelNotFoundError",
    "PackageError",
    "Session",
    "SessionFileError",
    "TokenLogprobs",
    "TopLogprob",
    "__version__",
]

_HOMES = {
    "AsyncEngine": "async_engine",
    "Engine": "engine",
    "GenerationResult": "generation",
    "GenerationStats": "generation",
    "ModelNotFoundError": "package",
    "PackageError": "_core",
    "Session": "session",
    "SessionFileError": "session_file",
    "TokenLogprobs": "generation",
    "TopLogprob": "generation",
}

if not TYPE_CHECKING:

    def __getattr__(name: str) -> object:
        """Loads what is asked for: the command lines see to Ctrl-C before anything takes its time (cli/commands.py)."""
        if name == "__version__":
            value = import_module("importlib.metadata").version(__name__)
        elif name in _HOMES:
            value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
        else:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        globals()[name] = value
        return value
