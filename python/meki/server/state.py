"""What all requests to a server share."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.metadata import version

from ..async_engine import AsyncEngine
from ..engine import Engine
from .errors import ApiError
from .metrics import Metrics
from .settings import Settings


@dataclass
class Model:
    """A model that callers know by its name."""

    name: str
    runner: AsyncEngine
    context: int
    """Tokens of a prompt and its answer, at most."""

    @property
    def engine(self) -> Engine:
        return self.runner.engine

    @cached_property
    def fingerprint(self) -> str:
        """Changes with the package and the runtime: the same seed gives the same text where this is the same."""
        described = json.dumps([version("meki"), self.engine.manifest, self.engine.kv_type], sort_keys=True)
        return f"fp_{hashlib.sha256(described.encode()).hexdigest()[:12]}"


@dataclass(frozen=True)
class Server:
    models: Sequence[Model]
    settings: Settings = field(default_factory=Settings)
    metrics: Metrics = field(default_factory=Metrics)
    started: int = field(default_factory=lambda: int(time.time()))
    """Seconds since 1970."""

    def __post_init__(self) -> None:
        for model in self.models:
            self.metrics.watch(model.name, model.runner)

    def model(self, name: str) -> Model:
        """ApiError if there is no such model."""
        for model in self.models:
            if model.name == name:
                return model
        known = ", ".join(model.name for model in self.models)
        raise ApiError(
            404, f"the model {name[:100]!r} does not exist; there is: {known}", code="model_not_found", param="model"
        )

    async def close(self) -> None:
        """Ends what is generated."""
        for model in self.models:
            await model.runner.close()
