"""The protocol: rounds of all tests, in which every contender takes its turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from .contender import Contender
from .machine import resident_memory
from .sequence import Block, DecodeSequence, PrefillSequence, capacity

TURN = 4
"""Decode steps that a contender measures before it is the other one's turn."""
GROUP = 2 * TURN
"""Steps of each contender in one group of turns, A B B A."""

Blocks = dict[str, list[Block]]
"""What each contender, by its `memory`, measured in one run of a test."""


@dataclass(frozen=True)
class Plan:
    """What to measure. Counts are of tokens."""

    depths: tuple[int, ...]
    prefill: int
    """0: none."""
    tokens: int
    """Decode steps of each contender in one run of a test; with two contenders a multiple of GROUP."""
    repetitions: int
    synthetic_depth: bool
    compare: bool
    """Two contenders, which take turns."""

    @property
    def turn(self) -> int:
        return TURN if self.compare else self.tokens

    @property
    def steps(self) -> int:
        """Decode steps from one rewind to the next: one before each turn is not measured."""
        return self.tokens + self.tokens // self.turn

    def mean_depth(self, depth: int) -> int:
        """Tokens in the cache at the middle step of a test at `depth`, which is what the step reads."""
        return max(depth, 1) + (self.steps + 1) // 2

    @property
    def units(self) -> int:
        """Calls of `advance` in `measure`."""
        tests = len(self.depths) + bool(self.prefill)
        return len(self.depths) + tests * (1 + self.repetitions)


@dataclass(frozen=True)
class Case:
    """Prefill of `tokens` tokens, or as many decode steps, from `depth` tokens on."""

    kind: str
    depth: int
    tokens: int
    run: Callable[[bool], Blocks]
    """Measures all contenders once; True: in the reverse order."""
    kv_bytes: int | None
    """Bytes of keys and values that a decode step reads in the middle of the test; None for prefill."""

    @property
    def title(self) -> str:
        return f"{self.kind} {self.tokens} at {self.depth:,}"


@dataclass(frozen=True)
class Measurement:
    cases: list[Case]
    rounds: list[list[Blocks]]
    """[repetition][case]"""
    bandwidths: list[float]
    """Bytes/s, before the first round and after each."""
    memory: dict[str, int] | None
    """`machine.resident_memory` after every test has run once."""


def measure(
    contenders: Sequence[Contender],
    plan: Plan,
    *,
    read_bandwidth: Callable[[], float],
    before_step: Callable[[], None],
    advance: Callable[[str], None],
    rom: Path | None,
) -> Measurement:
    """Runs every test once to warm up, then `plan.repetitions` rounds of all tests. `advance` is told what comes next.
    rom: the file whose share of the resident memory is of interest.

    Round r runs every test once, so that a drift of the machine hits all alike; the contenders' order is reversed in
    every other round.
    """
    cases = _make_cases(contenders, plan, before_step, advance)

    def run_round(name: str, reverse: bool) -> list[Blocks]:
        results = []
        for case in cases:
            advance(f"{name}: {case.title}")
            results.append(case.run(reverse))
        return results

    run_round("warm-up", False)
    memory = resident_memory(rom)  # before the buffer of the first bandwidth measurement
    bandwidths = [read_bandwidth()]
    rounds = []
    for repetition in range(plan.repetitions):
        rounds.append(run_round(f"round {repetition + 1}", repetition % 2 == 1))
        bandwidths.append(read_bandwidth())
    return Measurement(cases, rounds, bandwidths, memory)


def _make_cases(
    contenders: Sequence[Contender], plan: Plan, before_step: Callable[[], None], advance: Callable[[str], None]
) -> list[Case]:
    cases: list[Case] = []
    if plan.prefill:
        prefills = {
            contender.memory: PrefillSequence(
                contender.new_session(plan.prefill + 1),
                plan.prefill,
                contender.vocab_size,
                has_rows=contender.row_bytes > 0,
                before_step=before_step,
            )
            for contender in contenders
        }

        def run_prefill(reverse: bool) -> Blocks:
            return {name: [prefills[name].run()] for name in (reversed(prefills) if reverse else prefills)}

        cases.append(Case("prefill", 0, plan.prefill, run_prefill, None))
    for depth in plan.depths:
        advance(f"filling {depth:,} tokens")
        cases.append(_decode_case(contenders, plan, depth, before_step))
    return cases


def _decode_case(contenders: Sequence[Contender], plan: Plan, depth: int, before_step: Callable[[], None]) -> Case:
    sessions = [contender.new_session(capacity(depth, plan.steps)) for contender in contenders]
    sequences = {
        contender.memory: DecodeSequence(
            session, depth, contender.vocab_size, synthetic=plan.synthetic_depth, before_step=before_step
        )
        for contender, session in zip(contenders, sessions, strict=True)
    }

    def run(reverse: bool) -> Blocks:
        for sequence in sequences.values():
            sequence.rewind()
        blocks: Blocks = {name: [] for name in sequences}
        for name in turns(list(sequences), plan, reverse):
            blocks[name].append(sequences[name].decode(plan.turn))
        return blocks

    return Case("decode", depth, plan.tokens, run, sessions[0].kv_bytes(plan.mean_depth(depth)))


def turns(names: Sequence[str], plan: Plan, reverse: bool) -> list[str]:
    """Who measures when, in one run of a decode test: alone, or A B B A, which a linear drift does not favour."""
    if not plan.compare:
        return list(names)
    first, second = reversed(names) if reverse else names
    return [first, second, second, first] * (plan.tokens // GROUP)
