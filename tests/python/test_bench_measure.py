"""The protocol of meki-bench, on sessions that compute nothing and keep a log."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from meki import _core
from meki.bench.contender import Contender
from meki.bench.measure import Plan, measure, turns
from meki.bench.sequence import DecodeSequence, PrefillSequence, capacity

VOCAB = 97
PREFILL_NS = 10
SAMPLE_NS = 5


@dataclass
class FakeStats:
    prefill_tokens: int = 0
    prefill_ns: int = 0
    prefill_stall_ns: int = 0
    decode_tokens: int = 0
    decode_ns: int = 0
    sample_ns: int = 0
    stall_ns: list[int] = field(default_factory=list)


class FakeSession:
    """The rules of runtime/engine/session.h. A decode step with n tokens in the cache takes 1000 + n ns."""

    def __init__(self, context: int, log: list[tuple], name: str = "", ends: Collection[int] = ()) -> None:
        self.context, self.log, self.name, self.ends = context, log, name, ends
        self.tokens: list[int] = []
        self.computed = 0
        self.generating = self.started = False
        self.stats = FakeStats()

    def append(self, token_ids: Sequence[int]) -> None:
        if len(self.tokens) + len(token_ids) > self.context:
            raise ValueError("the context is full")
        assert all(0 <= token < VOCAB for token in token_ids)
        self.tokens += token_ids
        if token_ids:
            self.generating = self.started = False

    def fill_synthetic(self, tokens: int) -> None:
        assert self.computed == len(self.tokens)
        self.append([0] * tokens)
        self.computed += tokens
        self.log.append((self.name, "fill", tokens))

    def start(self, sampling: _core.SamplingOptions, max_new_tokens: int) -> None:
        assert sampling.temperature == 0
        assert self.tokens
        room = self.context - len(self.tokens)
        self.remaining = min(max_new_tokens, room) if max_new_tokens else room
        self.started = self.remaining > 0

    def next(self) -> int | None:
        if not self.started:
            return None
        pending = len(self.tokens) - self.computed
        if self.generating and pending == 1:
            self.log.append((self.name, "decode", len(self.tokens)))
            self.stats.decode_tokens += 1
            self.stats.decode_ns += 1000 + len(self.tokens)
            self.stats.sample_ns += SAMPLE_NS
            self.stats.stall_ns.append(len(self.tokens))
        elif pending:
            self.log.append((self.name, "prefill", pending))
            self.stats.prefill_tokens += pending
            self.stats.prefill_ns += pending * PREFILL_NS
            self.stats.prefill_stall_ns += pending * 3
        self.computed = len(self.tokens)
        token = (self.tokens[-1] * 31 + 7) % VOCAB
        if token in self.ends:
            self.started = False
            return None
        self.tokens.append(token)
        self.generating = True
        self.remaining -= 1
        self.started = self.remaining > 0
        return token

    def rewind(self, length: int) -> None:
        assert length <= len(self.tokens)
        if length < len(self.tokens):
            del self.tokens[length:]
            self.computed = min(self.computed, length)
            self.generating = self.started = False

    def kv_bytes(self, tokens: int) -> int:
        return 100 * tokens

    def reset_stats(self) -> None:
        self.stats = FakeStats()


def nothing() -> None:
    pass


def sequence(session: FakeSession, depth: int, *, synthetic: bool = False, before_step=nothing) -> DecodeSequence:
    return DecodeSequence(session, depth, VOCAB, synthetic=synthetic, before_step=before_step)


def decoded(log: list[tuple]) -> list[int]:
    """Tokens in the cache at each decode step, the step's own included."""
    return [entry[2] for entry in log if entry[1] == "decode"]


@pytest.mark.parametrize("synthetic", [False, True])
@pytest.mark.parametrize("depth", [0, 1, 2, 40])
def test_decode_begins_at_the_depth(depth: int, synthetic: bool) -> None:
    log: list[tuple] = []
    session = FakeSession(capacity(depth, 5 + 1), log)
    measured = sequence(session, depth, synthetic=synthetic)
    measured.rewind()
    assert session.computed == max(depth, 1)
    block = measured.decode(5)
    # One step leads in; those that count follow it.
    first = max(depth, 1) + 1
    assert decoded(log) == list(range(first, first + 6))
    assert block.ns == sum(1000 + n for n in range(first + 1, first + 6))
    assert block.stall_ns == tuple(range(first + 1, first + 6))
    assert (block.tokens, block.sample_ns) == (5, 5 * SAMPLE_NS)
    fills = [entry[2] for entry in log if entry[1] == "fill"]
    assert fills == ([depth - 1] if synthetic and depth > 1 else [])


def test_every_repetition_decodes_the_same_tokens() -> None:
    session = FakeSession(capacity(10, 8), [])
    measured = sequence(session, 10)
    runs = []
    for _ in range(3):
        measured.rewind()
        measured.decode(7)
        runs.append(list(session.tokens))
    assert runs[0] == runs[1] == runs[2]
    assert len(runs[0]) == 10 + 1 + 8


@given(
    ends=st.sets(st.integers(0, VOCAB - 1), max_size=70),
    depth=st.integers(0, 12),
    blocks=st.lists(st.integers(1, 6), min_size=1, max_size=4),
)
def test_end_tokens_change_what_is_decoded_but_not_how_much(ends: set[int], depth: int, blocks: list[int]) -> None:
    log: list[tuple] = []
    steps = sum(blocks) + len(blocks)
    session = FakeSession(capacity(depth, steps), log, ends=ends)
    measured = sequence(session, depth)
    measured.rewind()
    for tokens in blocks:
        block = measured.decode(tokens)
        assert block.tokens == tokens == len(block.stall_ns)
        assert block.ns == sum(1000 + n for n in block.stall_ns)  # decode steps and nothing else
        assert all(n > max(depth, 1) for n in block.stall_ns)
    assert measured.history.count(True) == sum(blocks)
    steps_of_one_token = [entry for entry in log if entry[1] == "decode" or entry[2] == 1]
    # A real prefill of one token fills depth 2; it is no step of the sequence.
    assert len(measured.history) == len(steps_of_one_token) - (depth == 2)


def test_a_model_that_only_ends_is_an_error() -> None:
    measured = sequence(FakeSession(50, [], ends=range(VOCAB)), 3)
    with pytest.raises(RuntimeError, match="eos_token_ids"):
        measured.rewind()


def test_steps_that_the_engine_does_not_count_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    session = FakeSession(capacity(0, 9), [])
    measured = sequence(session, 0)
    measured.rewind()
    monkeypatch.setattr(session, "reset_stats", lambda: None)  # the leading step stays in
    with pytest.raises(RuntimeError, match="counted 9 decode tokens, expected 8"):
        measured.decode(8)


def test_prefill_computes_the_same_tokens_from_nothing() -> None:
    log: list[tuple] = []
    session = FakeSession(21, log)
    prefill = PrefillSequence(session, 20, VOCAB, has_rows=True, before_step=nothing)
    blocks = []
    prompts = []
    for _ in range(3):
        blocks.append(prefill.run())
        prompts.append(session.tokens[:20])
    assert [entry[1:] for entry in log] == [("prefill", 20)] * 3
    assert prompts[0] == prompts[1] == prompts[2]
    assert len(set(prompts[0])) > 5
    assert {(block.tokens, block.ns, block.stall_ns) for block in blocks} == {(20, 20 * PREFILL_NS, (3,))}


def test_before_step_is_called_before_every_step() -> None:
    log: list[tuple] = []
    session = FakeSession(capacity(4, 4), log)
    measured = sequence(session, 4, synthetic=True, before_step=lambda: log.append(("", "before", 0)))
    measured.rewind()
    measured.decode(3)
    kinds = [entry[1] for entry in log[1:]]  # after the fill
    assert kinds == ["before", "prefill"] + ["before", "decode"] * 4


def contender(name: str, log: list[tuple], sessions: list[FakeSession] | None = None) -> Contender:
    def new_session(context: int) -> FakeSession:
        session = FakeSession(context, log, name)
        if sessions is not None:
            sessions.append(session)
        return session

    return Contender(name, VOCAB, weight_bytes=1000, row_bytes=8 * (name == "meki"), new_session=new_session)


def plan(**changes) -> Plan:
    values = {
        "depths": (0, 30),
        "prefill": 6,
        "tokens": 8,
        "repetitions": 2,
        "synthetic_depth": True,
        "compare": True,
    }
    return Plan(**{**values, **changes})


def run(contenders: list[Contender], plan: Plan, log: list[tuple], advance: Callable[[str], None] = lambda text: None):
    def read_bandwidth() -> float:
        log.append(("", "bandwidth", 0))
        return float(len(log))

    return measure(contenders, plan, read_bandwidth=read_bandwidth, before_step=nothing, advance=advance, rom=None)


def ran(log: list[tuple]) -> list[str]:
    """Who ran what, without repetition: the prefill of a test, a decode step by its depth, a bandwidth measurement."""
    names = []
    for name, kind, count in log:
        if kind == "prefill" and count == 1:
            continue  # the start of a generation
        names.append(f"{name} {kind}" + (" deep" if kind == "decode" and count > 30 else ""))
    return [name for name, _ in itertools.groupby(names)]


def test_rounds_interleave_the_tests_and_alternate_the_contenders() -> None:
    log: list[tuple] = []
    measurement = run([contender("meki", log), contender("dense", log)], plan(), log)
    abba = ["meki", "dense", "meki"]  # neighbours of the same name are one entry
    forward = ["meki prefill", "dense prefill"]
    forward += [f"{name} decode" for name in abba] + [f"{name} decode deep" for name in abba]
    swap = {"meki": "dense", "dense": "meki"}
    backward = [" ".join([swap[words[0]], *words[1:]]) for words in map(str.split, forward)]
    once = [" bandwidth"]
    fills = ["meki fill", "dense fill"]
    assert ran(log) == fills + forward + once + forward + once + backward + once
    assert len(measurement.bandwidths) == 3
    assert [len(blocks) for blocks in measurement.rounds] == [3, 3]


def test_what_a_round_measured_belongs_to_its_contender() -> None:
    log: list[tuple] = []
    sessions: list[FakeSession] = []
    measurement = run([contender("meki", log, sessions), contender("dense", log, sessions)], plan(), log)
    for case, blocks in zip(measurement.cases, measurement.rounds[1], strict=True):
        assert set(blocks) == {"meki", "dense"}
        for measured in blocks.values():
            assert sum(block.tokens for block in measured) == case.tokens
    assert [(case.kind, case.depth, case.tokens) for case in measurement.cases] == [
        ("prefill", 0, 6),
        ("decode", 0, 8),
        ("decode", 30, 8),
    ]
    prefill, decode = measurement.rounds[0][0], measurement.rounds[0][2]
    assert prefill["meki"][0].stall_ns and not prefill["dense"][0].stall_ns  # a dense model has no rows to wait for
    # Two turns of 4, each led in by a step, from 30 tokens on: what each step read is in the fake's stall.
    steps = [list(block.stall_ns) for block in decode["meki"]]
    assert steps == [[32, 33, 34, 35], [37, 38, 39, 40]]
    mean = sum(range(31, 41)) / 10  # of all steps
    assert measurement.cases[2].kv_bytes == 100 * plan().mean_depth(30)
    assert abs(plan().mean_depth(30) - mean) <= 0.5
    contexts = sorted({session.context for session in sessions})
    assert contexts == [7, capacity(0, 10), capacity(30, 10)]


def test_one_contender_decodes_in_one_block() -> None:
    log: list[tuple] = []
    measurement = run([contender("meki", log)], plan(compare=False, tokens=5, prefill=0), log)
    assert [case.kind for case in measurement.cases] == ["decode", "decode"]
    (block,) = measurement.rounds[0][0]["meki"]
    assert block.tokens == 5


@pytest.mark.parametrize("changes", [{}, {"prefill": 0}, {"compare": False, "repetitions": 1}])
def test_progress_is_told_as_often_as_announced(changes: dict) -> None:
    log: list[tuple] = []
    told: list[str] = []
    chosen = plan(**changes)
    contenders = [contender(name, log) for name in ("meki", "dense")[: 1 + chosen.compare]]
    run(contenders, chosen, log, told.append)
    assert len(told) == chosen.units
    assert told[0] == "filling 0 tokens" and told[-1].startswith(f"round {chosen.repetitions}")


def test_turns_cancel_a_linear_drift() -> None:
    chosen = plan(tokens=32)
    for reverse in (False, True):
        order = turns(["meki", "dense"], chosen, reverse)
        assert len(order) * chosen.turn == 2 * chosen.tokens
        for first in range(0, len(order), 4):
            group = order[first : first + 4]
            places = {name: [i for i in range(4) if group[i] == name] for name in group}
            assert sum(places["meki"]) == sum(places["dense"]) == 3
        assert order[0] == ("dense" if reverse else "meki")
