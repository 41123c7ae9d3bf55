"""Mixed sessions for a long time: python tests/soak.py --minutes 30. Nothing may grow, and no word may change.

Threads generate, abandon, rewind, fail and open engines anew, as an application does in a month. Every result is
compared with the first of its kind; memory, descriptors and threads of the process are noted every second. Exit code 1
if a result differs, or if what the process has grows, by a line through its last two thirds.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import os
import random
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np

from meki import Engine
from meki.package import bundled_models

WORKERS = 3
MODES = [(kv_type, access) for kv_type in ("float16", "int8", "int4") for access in ("pread", "mmap", "direct")]
PROMPTS = ["Once upon a time", "The cat sat on the mat and", "x", "Tom and Lily went to the park. " * 40, "", "ünï 🦙"]
ALLOWED_BYTES = 16 << 20
"""Of growth, for an allocator's own pools."""

Sample = tuple[int, int, int]
"""Resident bytes, open descriptors, threads."""


class Soak:
    """What the workers share."""

    def __init__(self, package: Path) -> None:
        self.package = package
        self.done: Counter[str] = Counter()
        self.failures: list[str] = []
        self.stop = threading.Event()
        self._expected: dict[object, object] = {}
        self._lock = threading.Lock()

    def check(self, key: object, got: object) -> None:
        with self._lock:
            if self._expected.setdefault(key, got) != got:
                self.failures.append(f"{key}: got {got!r}, first {self._expected[key]!r}")

    def work(self, seed: int) -> None:
        chance = random.Random(seed)
        turns: list[Callable[[Engine, random.Random], None]] = [
            self.generate, self.abandon, self.converse, self.rewind, self.refuse
        ]  # fmt: skip
        while not self.stop.is_set():
            kv_type, access = chance.choice(MODES)
            cache, threads = chance.choice((0, 1)), chance.choice((1, 2))
            engine = Engine(self.package, kv_type=kv_type, rom_access=access, threads=threads, row_cache=cache)
            for _ in range(chance.randrange(1, 40)):
                if self.stop.is_set():
                    break
                turn = chance.choice(turns)
                turn(engine, chance)
                self.done[turn.__name__] += 1
            self.done["engine"] += 1

    def generate(self, engine: Engine, chance: random.Random) -> None:
        prompt, seed = chance.choice(PROMPTS), chance.randrange(4)
        result = engine.generate(prompt, max_new_tokens=24, seed=seed, prefetch=chance.random() < 0.8)
        self.check((engine.kv_type, prompt, seed), result.token_ids)

    def abandon(self, engine: Engine, chance: random.Random) -> None:
        stream = engine.stream(chance.choice(PROMPTS), max_new_tokens=50, seed=1)
        for _ in range(chance.randrange(4)):
            next(stream, None)

    def converse(self, engine: Engine, chance: random.Random) -> None:
        session = engine.session(context=512)
        for turn in range(chance.randrange(1, 5)):
            session.generate(PROMPTS[turn], max_new_tokens=8, temperature=0, stop=["."])
        self.check((engine.kv_type, "turns", turn), session.tokens)

    def rewind(self, engine: Engine, chance: random.Random) -> None:
        """What comes after a rewind is what would have come without what was taken back."""
        session = engine.session(context=256)
        ids = engine.tokenizer.encode(PROMPTS[1]).ids
        session.logits(ids)
        session.generate(PROMPTS[chance.randrange(2)], max_new_tokens=chance.randrange(1, 20), seed=1)
        session._core.rewind(len(ids))
        self.check((engine.kv_type, "rewound"), session.logits(ids[:3])[-1].tobytes())

    def refuse(self, engine: Engine, chance: random.Random) -> None:
        with contextlib.suppress(ValueError):
            engine.generate("word " * 5000)
            self.failures.append("a prompt beyond the context was taken")


def sample() -> Sample:
    gc.collect()
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["VmRSS"].split()[0]) << 10, len(os.listdir("/proc/self/fd")), int(fields["Threads"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--package", type=Path, default=bundled_models()["meki-tiny"])
    arguments = parser.parse_args()
    soak = Soak(arguments.package)
    workers = [threading.Thread(target=soak.work, args=(seed,)) for seed in range(WORKERS)]
    for worker in workers:
        worker.start()
    samples: list[Sample] = []
    begin = time.monotonic()
    try:
        while (elapsed := time.monotonic() - begin) < arguments.minutes * 60 and all(w.is_alive() for w in workers):
            time.sleep(1)
            samples.append(sample())
            if sys.stderr.isatty():
                print(f"\r{elapsed:6.0f} s, {soak.done.total():,} turns", end="", file=sys.stderr)
        failed = not all(worker.is_alive() for worker in workers)
    finally:
        soak.stop.set()
        for worker in workers:
            worker.join()
    if failed:
        print("wrong: a worker ended with an exception")
        return 1
    return report(soak, np.array(samples))


def report(soak: Soak, samples: np.ndarray) -> int:
    """Prints what happened; 1 if something did that must not."""
    print(", ".join(f"{count:,} x {name}" for name, count in sorted(soak.done.items())))
    samples = samples[len(samples) // 3 :]  # warm
    minutes = np.arange(len(samples)) / 60
    slopes = np.polyfit(minutes, samples, 1)[0]
    for name, first, slope in zip(("resident bytes", "descriptors", "threads"), samples[0], slopes, strict=True):
        print(f"{name:<16}{first:15,.0f} when warm, {slope:+15,.3f} a minute")
    # Engines come and go, and each has descriptors and threads: their number is never still.
    leaks = bool(np.any(slopes * minutes[-1] > (ALLOWED_BYTES, 5, 5)))
    for failure in soak.failures[:5]:
        print(f"wrong: {failure}")
    return int(leaks or bool(soak.failures))


if __name__ == "__main__":
    sys.exit(main())
