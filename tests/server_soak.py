"""meki-serve under load: python tests/server_soak.py --minutes 30 [--model PACKAGE]. Nothing may grow, no word change.

Clients ask, leave in the middle of an answer, read slowly, send what is no request. Every complete answer is compared
with that of the same request when nobody else asked; memory, descriptors and threads of the server are noted every
second. Exit code 1 if an answer differs, a request fails, a generation goes on that nobody waits for, or if what the
server has grows, by a line through the last two thirds.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

import httpx
import numpy as np

CLIENTS = 16
ALLOWED_BYTES = 16 << 20
"""Of growth, for an allocator's own pools."""
TEMPLATE = """\
{% for message in messages %}{{ message.role + ": " + message.content + "\\n" }}{% endfor %}assistant: """
TEXTS = ["Once upon a time", "The cat sat on the mat and", "x", "Tom and Lily went to the park. " * 20, "ünï 🦙"]
PROMPT = {"temperature": 0, "max_tokens": 40}
REQUESTS: list[tuple[str, dict[str, Any]]] = [
    *(("/v1/completions", {**PROMPT, "prompt": text}) for text in TEXTS),
    *(("/v1/chat/completions", {**PROMPT, "messages": [{"role": "user", "content": text}]}) for text in TEXTS),
    ("/v1/completions", {**PROMPT, "prompt": TEXTS[:2], "n": 2}),
    ("/v1/chat/completions", {**PROMPT, "messages": [{"role": "user", "content": "x"}], "stop": ["."], "n": 2}),
]
WRONG = [b"", b"{", b"[" * 5000, b"\xff", b'{"model": "NAME"}', b'{"model": "NAME", "prompt": "\\ud800"}']


class Load:
    """What the clients share."""

    def __init__(self, http: httpx.AsyncClient, port: int, model: str) -> None:
        self.http = http
        self.model = model
        self.port = port
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stop = False
        self.alone: list[list[str]] = []

    async def work(self, seed: int) -> None:
        chance = random.Random(seed)
        turns = [self.ask, self.ask, self.ask_for_pieces, self.ask_for_pieces, self.leave, self.dawdle, self.babble]
        while not self.stop:
            turn = chance.choice(turns)
            try:
                await turn(chance)
            except httpx.HTTPError as error:
                self.failures.append(f"{turn.__name__}: {error!r}")
            self.done[turn.__name__] += 1

    def request(self, index: int) -> tuple[str, dict[str, Any]]:
        path, body = REQUESTS[index]
        return path, {"model": self.model, **body}

    async def ask(self, chance: random.Random) -> None:
        index = chance.randrange(len(REQUESTS))
        path, body = self.request(index)
        answer = await self.http.post(path, json=body)
        if self._answered(answer):
            choices = answer.json()["choices"]
            self._compare(index, [choice.get("text") or choice["message"]["content"] for choice in choices])

    async def ask_for_pieces(self, chance: random.Random) -> None:
        index = chance.randrange(len(REQUESTS))
        path, body = self.request(index)
        texts: dict[int, str] = {}
        async with self.http.stream("POST", path, json={**body, "stream": True}) as answer:
            if not self._answered(answer):
                return
            async for line in answer.aiter_lines():
                if line == "data: [DONE]":
                    self._compare(index, [texts[at] for at in sorted(texts)])
                elif line:
                    (choice,) = json.loads(line.removeprefix("data: "))["choices"]
                    piece = choice.get("text") or choice.get("delta", {}).get("content") or ""
                    texts[choice["index"]] = texts.get(choice["index"], "") + piece

    async def leave(self, chance: random.Random) -> None:
        path, body = self.request(chance.randrange(len(REQUESTS)))
        stream = chance.random() < 0.5
        with contextlib.suppress(TimeoutError, httpx.ReadError):
            async with asyncio.timeout(chance.random() / 20):
                async with self.http.stream("POST", path, json={**body, "stream": stream}) as answer:
                    async for _ in answer.aiter_raw():
                        if chance.random() < 0.3:
                            break

    async def dawdle(self, chance: random.Random) -> None:
        path, body = self.request(0)
        data = json.dumps({**body, "stream": True, "max_tokens": 200}).encode()
        head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}\r\n\r\n".encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", self.port, limit=64)
        writer.write(head + data[: len(data) if chance.random() < 0.8 else 9])
        for _ in range(20):
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(reader.read(16), 0.02)
            await asyncio.sleep(0.02)
        writer.close()

    async def babble(self, chance: random.Random) -> None:
        path, _ = chance.choice(REQUESTS)
        answer = await self.http.post(path, content=chance.choice(WRONG).replace(b"NAME", self.model.encode()))
        if answer.status_code != 400:
            self.failures.append(f"a wrong request: {answer.status_code} {answer.text}")

    def _answered(self, answer: httpx.Response) -> bool:
        if answer.status_code == 429:
            self.done["told to come back later"] += 1
        elif answer.status_code != 200:
            self.failures.append(f"{answer.request.url}: {answer.status_code}")
        return answer.status_code == 200

    def _compare(self, index: int, texts: list[str]) -> None:
        if index == len(self.alone):
            self.alone.append(texts)
        elif self.alone[index] != texts:
            self.failures.append(f"{REQUESTS[index]}: got {texts!r}, alone {self.alone[index]!r}")


def sample(pid: int) -> tuple[int, int, int]:
    """Resident bytes, open descriptors and threads of the server."""
    fields = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10, len(os.listdir(f"/proc/{pid}/fd")), int(fields["Threads"])


async def run(minutes: float, url: str, pid: int) -> int:
    limits = httpx.Limits(max_connections=4 * CLIENTS)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as http:
        name = (await http.get("/v1/models")).json()["data"][0]["id"]
        load = Load(http, int(url.rpartition(":")[2]), name)
        for index in range(len(REQUESTS)):  # alone
            path, body = load.request(index)
            choices = (await http.post(path, json=body)).json()["choices"]
            load._compare(index, [choice.get("text") or choice["message"]["content"] for choice in choices])
        clients = [asyncio.create_task(load.work(seed)) for seed in range(CLIENTS)]
        samples = []
        begin = time.monotonic()
        while time.monotonic() - begin < minutes * 60 and not any(client.done() for client in clients):
            await asyncio.sleep(1)
            samples.append(sample(pid))
        load.stop = True
        await asyncio.gather(*clients)
        async with asyncio.timeout(60):
            while re.search(r"^meki_(running|waiting)_generations.* [^0]", (await http.get("/metrics")).text, re.M):
                await asyncio.sleep(0.1)
    return report(load, np.array(samples))


def report(load: Load, samples: np.ndarray) -> int:
    """Prints what happened; 1 if something did that must not."""
    print(", ".join(f"{count:,} x {name}" for name, count in sorted(load.done.items())))
    samples = samples[len(samples) // 3 :]  # warm
    minutes = np.arange(len(samples)) / 60
    slopes = np.polyfit(minutes, samples, 1)[0]
    for name, first, slope in zip(("resident bytes", "descriptors", "threads"), samples[0], slopes, strict=True):
        print(f"{name:<16}{first:15,.0f} when warm, {slope:+15,.3f} a minute")
    # Connections come and go: the number of descriptors is never still.
    leaks = bool(np.any(slopes * minutes[-1] > (ALLOWED_BYTES, 2 * CLIENTS, 5)))
    for failure in load.failures[:5]:
        print(f"wrong: {failure}")
    return int(leaks or bool(load.failures))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--model", default="meki-tiny", metavar="PACKAGE")
    arguments = parser.parse_args()
    with tempfile.NamedTemporaryFile("w", suffix=".jinja") as template:
        template.write(TEMPLATE)
        template.flush()
        command = [sys.executable, "-m", "meki.cli.serve", arguments.model, "--chat-template", template.name]
        command += ["--port", "0", "--threads", "1", "--parallel", "6", "--queue", "20"]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                assert server.stdout is not None
                url = server.stdout.readline().split()[0]
                wrong = asyncio.run(run(arguments.minutes, url, server.pid))
            finally:
                server.terminate()
    if server.returncode != 0:
        print(f"wrong: the server ended with {server.returncode}")
    return wrong or int(server.returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
