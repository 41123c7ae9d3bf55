"""What callers of a server see: time to first token, time from token to token, tokens/s, by how many call at once.

    python -m benchmarks.serving NAME=URL [NAME=URL ...] [--concurrency 1 4 8 16] [--requests 4] [--words 150]
        [--tokens 64]

Each URL is one of an OpenAI-compatible server, up to and with /v1. As many callers as --concurrency says ask at once
for greedy completions of --tokens tokens at most, each for --requests, one after the other; the prompts are --words
words, drawn anew for every request, so that no server has seen one of many words before. Servers take turns, in the
reverse order every other round; each cell is of all requests of all rounds. A chunk with text counts as a token. The
callers run in this process and take their share of the machine.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import httpx
from tqdm import tqdm

from meki.bench.markdown import head, row
from meki.bench.stats import percentiles
from meki.cli.arguments import integer
from meki.cli.errors import run_command

COLUMNS = ("server", "callers", "tokens/s", "first token, ms, p50", "p95", "ms a token, p50", "p95")
WORDS = ["the", "fox", "hen", "river", "old", "small", "ran", "sang", "under", "hill", "moon", "bread", "king", "cold"]


@dataclass
class Seen:
    """By the callers of one server, all rounds together."""

    tokens_per_s: list[float] = field(default_factory=list)
    """Of each round."""
    first_ms: list[float] = field(default_factory=list)
    gaps_ms: list[float] = field(default_factory=list)

    def add(self, begun: Sequence[float], times: Sequence[Sequence[float]]) -> None:
        """A round. begun: when each request was sent, in seconds; times: when its tokens came, at least one each."""
        elapsed = max(its[-1] for its in times) - min(begun)
        self.tokens_per_s.append(sum(map(len, times)) / elapsed)
        self.first_ms += [1000 * (its[0] - sent) for sent, its in zip(begun, times, strict=True)]
        self.gaps_ms += [1000 * (after - before) for its in times for before, after in pairwise(its)]


def lines(seen: Mapping[tuple[str, int], Seen]) -> Iterator[list[str]]:
    """The table, of servers by their names and numbers of callers."""
    for (name, callers), its in seen.items():
        times = (*percentiles(its.first_ms, 50, 95), *percentiles(its.gaps_ms, 50, 95))
        yield [name, str(callers), f"{median(its.tokens_per_s):.0f}", *(f"{value:.1f}" for value in times)]


async def ask(client: httpx.AsyncClient, url: str, model: str, prompt: str, tokens: int) -> list[float]:
    """When the tokens of one completion came."""
    body = {"model": model, "prompt": prompt, "max_tokens": tokens, "temperature": 0, "stream": True}
    times: list[float] = []
    async with client.stream("POST", f"{url}/completions", json=body) as response:
        if response.status_code != 200:
            raise RuntimeError(f"{url}: {response.status_code} {(await response.aread()).decode()[:200]}")
        async for line in response.aiter_lines():
            if line.startswith("data: {") and json.loads(line[6:])["choices"][0]["text"]:
                times.append(time.perf_counter())
    if not times:
        raise RuntimeError(f"{url}: an answer without text; choose a model that goes on with any prompt")
    return times


async def one_round(
    url: str, callers: int, requests: int, words: int, tokens: int, chance: random.Random, seen: Seen
) -> None:
    begun: list[float] = []
    times: list[list[float]] = []
    # A connection each: some servers close one behind an answer without saying so.
    limits = httpx.Limits(max_connections=None, max_keepalive_connections=0)
    async with httpx.AsyncClient(timeout=600, limits=limits) as client:
        model = (await client.get(f"{url}/models")).json()["data"][0]["id"]

        async def call() -> None:
            for _ in range(requests):
                prompt = " ".join(chance.choices(WORDS, k=words))
                sent = time.perf_counter()
                came = await ask(client, url, model, prompt, tokens)
                begun.append(sent)
                times.append(came)

        await asyncio.gather(*(call() for _ in range(callers)))
    seen.add(begun, times)


def server(text: str) -> tuple[str, str]:
    """The type of an argument: a server's name and URL."""
    name, separator, url = text.partition("=")
    if not separator:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=URL; give meki=http://127.0.0.1:8080/v1, for example")
    return name, url.rstrip("/")


def run(arguments: argparse.Namespace) -> None:
    servers = dict(arguments.servers)
    seen = {(name, callers): Seen() for callers in arguments.concurrency for name in servers}
    chance = random.Random(1)
    with tqdm(total=len(seen) * (1 + arguments.rounds), unit="run", leave=False, disable=None) as progress:
        for number in range(1 + arguments.rounds):
            for name, callers in reversed(seen) if number % 2 else seen:
                its = seen[name, callers] if number > 0 else Seen()  # the first warms up
                settings = (callers, arguments.requests, arguments.words, arguments.tokens)
                try:
                    asyncio.run(one_round(servers[name], *settings, chance, its))
                except httpx.HTTPError as error:
                    raise RuntimeError(f"{servers[name]}: {error}; see whether the server still runs") from error
                progress.update()
    print("\n".join([*head(COLUMNS, "l"), *(row(line) for line in lines(seen))]))


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="serving", description="Measure servers as their callers see them.")
    add = parser.add_argument
    add("servers", type=server, metavar="NAME=URL", nargs="+")
    add("--concurrency", type=integer(1), nargs="+", default=[1, 4, 8, 16], metavar="N", help="(default: 1 4 8 16)")
    add("--requests", type=integer(1), default=4, metavar="N", help="of each caller, a round (default: %(default)s)")
    add("--words", type=integer(1), default=150, metavar="N", help="of a prompt (default: %(default)s)")
    add("--tokens", type=integer(2), default=64, metavar="N", help="of an answer at most (default: %(default)s)")
    add("--rounds", type=integer(1), default=3, metavar="N", help="(default: %(default)s)")
    return run_command(parser.prog, lambda: run(parser.parse_args(argv)))


if __name__ == "__main__":
    sys.exit(main())
