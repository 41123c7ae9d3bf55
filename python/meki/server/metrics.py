"""Numbers for Prometheus. No label takes its values from callers."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..async_engine import AsyncEngine
from ..generation import GenerationResult

_SECONDS = (0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100)
_SPEEDS = (1, 3, 10, 30, 100, 300, 1000, 3000)
_STALLS = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)


class Metrics:
    """Of one server."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        registry = self.registry
        self.requests = Counter("meki_requests", "Requests that were answered", ["route", "status"], registry=registry)
        self._running = Gauge("meki_running_generations", "Now", ["model"], registry=registry)
        self._waiting = Gauge("meki_waiting_generations", "Now", ["model"], registry=registry)
        self._generations = Counter("meki_generations", "Generations by how they ended", ["end"], registry=registry)
        self._prompt = Counter("meki_prompt_tokens", "Tokens of prompts", registry=registry)
        self._cached = Counter("meki_cached_tokens", "Of these, not computed again", registry=registry)
        self._generated = Counter("meki_generated_tokens", "Tokens that were generated", registry=registry)
        self.first_token = Histogram(
            "meki_time_to_first_token_seconds",
            "From the request to the first piece of text",
            buckets=_SECONDS,
            registry=registry,
        )
        self._speed = Histogram(
            "meki_decode_tokens_per_second", "Of one generation", buckets=_SPEEDS, registry=registry
        )
        self._stall = Histogram(
            "meki_rom_stall_seconds",
            "What a decode step waited for its memory rows, the median of a generation",
            buckets=_STALLS,
            registry=registry,
        )
        self._rom_requests = Counter("meki_rom_requests", "Bundles of memory rows that were needed", registry=registry)
        self._rom_hits = Counter("meki_rom_hits", "Of these, in the row cache", registry=registry)

    def watch(self, model: str, runner: AsyncEngine) -> None:
        """Shows how many generations of a model run and wait."""
        self._running.labels(model).set_function(lambda: runner.running)
        self._waiting.labels(model).set_function(lambda: runner.waiting)

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)

    def count(self, result: GenerationResult) -> None:
        """A generation that has ended."""
        stats = result.stats
        self._generations.labels(result.finish_reason or "cancelled").inc()
        self._prompt.inc(stats.prompt_tokens)
        self._cached.inc(stats.cached_tokens)
        self._generated.inc(stats.new_tokens)
        self._rom_requests.inc(stats.rom_requests)
        self._rom_hits.inc(stats.rom_hits)
        if stats.decode_tokens_per_s is not None:
            self._speed.observe(stats.decode_tokens_per_s)
        if stats.stall_us_p50 is not None:
            self._stall.observe(stats.stall_us_p50 / 1e6)


class RequestCounter:
    """Middleware that counts answers, by the path of the endpoint."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self._app = app
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def counting(message: Message) -> None:
            if message["type"] == "http.response.start":
                self._metrics.requests.labels(scope.get("meki.route", "other"), str(message["status"])).inc()
            await send(message)

        await self._app(scope, receive, counting)
