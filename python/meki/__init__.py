"""MeKi runtime: language models whose memory rows live in storage and are fetched while the model computes.

from meki import Engine
print(Engine("meki-tiny").generate("Once upon a time").text)
"""

from importlib.metadata import version

from ._core import PackageError
from .engine import Engine, Session
from .generation import GenerationResult, GenerationStats
from .package import ModelNotFoundError

__all__ = [
    "Engine",
    "GenerationResult",
    "GenerationStats",
    "ModelNotFoundError",
    "PackageError",
    "Session",
    "__version__",
]

__version__ = version("meki")
