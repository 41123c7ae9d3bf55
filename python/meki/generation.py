"""One generation: the loop over its tokens, its result."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from . import _core
from .answers import AnswerForm, AnswerParser, answer_message
from .options import CheckedOptions
from .structured import Constraint
from .text import Detokenizer, StopStrings, Vocabulary


@dataclass(frozen=True)
class GenerationStats:
    """What one generation did and how long it took. None: there was nothing to measure."""

    prompt_tokens: int
    """Tokens of this prompt, with those that start a sequence; of a chat, the whole conversation."""
    cached_tokens: int
    """Prompt tokens that were not computed because their keys and values were there: what a conversation, or any
    request of an AsyncEngine, has in common with what was computed before. 0 for a prompt that is appended."""
    new_tokens: int
    seed: int
    time_to_first_token_s: float | None
    """From asking for the first token to having it."""
    prefill_tokens_per_s: float | None
    decode_tokens_per_s: float | None
    rom_requests: int
    """Bundles that were needed, also by tokens of a draft."""
    rom_hits: int
    """Of these, in the row cache. The others were read."""
    rom_bytes: int
    """Bytes read."""
    rom_access: str | None
    """The access mode in use: "mmap", "pread" or "direct"; None: the package has no memory."""
    stall_us_p50: float | None
    """Median over the decode steps of the microseconds that a step waited for its rows."""
    stall_us_p99: float | None
    """99th percentile of the same."""
    drafted_tokens: int
    """Tokens that decode steps computed as a draft's (speculative decoding); 0 without a draft."""
    accepted_tokens: int
    """Of these: became part of the text."""
    resident_bytes: int | None
    """Resident memory of the whole process, now; None: the system does not tell."""


@dataclass(frozen=True)
class TopLogprob:
    """A token that might have been chosen."""

    token_id: int
    text: bytes
    """What it adds to a text (`Vocabulary.token_bytes`), which need not be whole characters."""
    logprob: float
    """The natural logarithm of its probability; -inf: it is impossible."""


@dataclass(frozen=True)
class TokenLogprobs:
    """A token that was chosen, and what it was chosen from."""

    token_id: int
    text: bytes
    logprob: float
    """Of the token, as in `TopLogprob`: by the model's logits before penalties, bias and temperature, and of all
    tokens, also of those that a schema does not allow."""
    top: list[TopLogprob]
    """The most probable tokens, as many as `logprobs` asks for, the most probable first."""


@dataclass(frozen=True)
class GenerationResult:
    """What one generation gave."""

    text: str
    token_ids: list[int]
    """The generated tokens. After a stop string, up to and including the token with which it was complete; after one of
    `stop_token_ids`, with that."""
    finish_reason: str | None
    """"eos" (the model's end, or that of what the options allow), "length" (max_new_tokens), "context" (the KV cache is
    full), "stop" (a stop string, or one of stop_token_ids), or None: not over."""
    stop: str | None
    """The stop string that ended the text; None: another reason."""
    stats: GenerationStats
    message: dict[str, Any] | None
    """In a chat the text as a message of OpenAI's API, to be appended to the conversation: {"role": "assistant",
    "content": str}, with "reasoning_content" if the model thought, and "tool_calls" if it called tools; "content" is
    None beside calls alone. None: not a chat."""
    logprobs: list[TokenLogprobs] | None
    """Of each of `token_ids`; None without the option `logprobs`."""


class TextStream(Iterator[str]):
    """The text of one generation, piece by piece as it is computed; no piece is empty.

    Made by `Engine.stream`, `Session.stream` and `Session.stream_chat`. Stop iterating at any time: nothing runs
    between two pieces, but what finds out the next tokens that a schema or a grammar allows.
    """

    def __init__(
        self,
        core: _core.Session,
        vocabulary: Vocabulary,
        sequence: Sequence[int],
        rom_access: str | None,
        prompt_tokens: int,
        shared_tokens: int,
        options: CheckedOptions,
        constraint: Constraint | None = None,
        answer: AnswerForm | None = None,
    ) -> None:
        """sequence: all tokens so far, of which the last `prompt_tokens` are the prompt. shared_tokens: how many of
        these were in the sequence before, computed or not. constraint: of the tokens to come; None: none. answer: how
        the text is to be read; None: it is no answer of a chat."""
        self._core = core
        self._vocabulary = vocabulary
        self._rom_access = rom_access
        self._detokenizer = Detokenizer(vocabulary, sequence)
        self._stop = StopStrings(options.stop, vocabulary.special_tokens)
        self._stop_token_ids = frozenset(options.stop_token_ids)
        self._constraint = constraint
        self._answer = answer
        self._reader = AnswerParser(answer) if answer and answer.calls and answer.one_call else None
        special = answer.special_tokens(vocabulary.special_tokens) if answer else {}
        self._marks = {id: text for text, id in special.items()}
        self._seed = options.sampling.seed
        self._prompt_tokens = prompt_tokens
        self._shared_tokens = shared_tokens
        self._pieces: list[str] = []
        self._token_ids: list[int] = []
        self._logprobs: list[TokenLogprobs] | None = None if options.sampling.logprobs is None else []
        self._asked: float | None = None  # for the first token, when
        self._first_token_s: float | None = None
        self._result: GenerationResult | None = None

    def __next__(self) -> str:
        while not self.over:
            if piece := self.advance():
                return piece
        raise StopIteration

    @property
    def over(self) -> bool:
        """Whether nothing follows."""
        return self._result is not None

    @property
    def result(self) -> GenerationResult:
        """What there is so far; once the stream is over or closed, the final result."""
        return self._result or self._collect(None)

    @property
    def logprobs(self) -> Sequence[TokenLogprobs]:
        """Of the tokens so far, in a list that grows; none without the option `logprobs`. The text of the last ones may
        be held back."""
        return () if self._logprobs is None else self._logprobs

    def finish(self) -> GenerationResult:
        """Generates what is left and returns the final result."""
        for _ in self:
            pass
        return self.result

    def close(self) -> None:
        """Ends the generation where it stands. The session, if it is the caller's, keeps the tokens."""
        self._end(self.result)

    def read(self, most: int) -> bool:
        """Computes `most` tokens of the prompt, for a caller that has something else to do between its parts; whether
        any are left. The first `advance` computes those."""
        if self._asked is None:
            self._asked = time.perf_counter()
        return self._core.compute(most) > 0

    def advance(self) -> str:
        """Goes on by one token, unless it is over; the text that came with it, if any did."""
        if self.over:
            return ""
        if self._asked is None:
            self._asked = time.perf_counter()
        token, complete = self._next()
        if token is not None:
            if self._first_token_s is None:
                self._first_token_s = time.perf_counter() - self._asked
            self._token_ids.append(token)
            if self._logprobs is not None:
                self._logprobs.append(self._logprobs_of(token))
        if token is None or token in self._stop_token_ids:
            piece, stopped = self._stop.push(self._detokenizer.flush())
            piece += self._stop.flush()
            reason = "stop" if stopped or token is not None else self._core.finish_reason
        else:
            mark = self._marks.get(token) or self._stop.mark(token)
            text = self._detokenizer.flush() + mark if mark else self._detokenizer.push(token)
            piece, stopped = self._stop.push(text)
            reason = "stop" if stopped else None
        if self._reader is not None:
            self._reader.push(piece)
            complete = complete or self._reader.over
        if complete and not reason:  # as if the model's end token had followed
            rest, stopped = self._stop.push(self._detokenizer.flush())
            piece += rest + self._stop.flush()
            reason = "stop" if stopped else "eos"
        if piece:
            self._pieces.append(piece)
        if reason:
            self._end(self._collect(reason))
        return piece

    def _end(self, result: GenerationResult) -> None:
        self._result = result
        self._constraint = None  # with its thread: the session may keep this stream for long

    def _next(self) -> tuple[int | None, bool]:
        """The next token, None when there is none, and whether the text is complete with it."""
        if self._constraint is None:
            return self._core.next(), False
        self._core.step()  # the constraint finds out meanwhile what it allows
        token = self._core.next(self._constraint.allowed())
        return token, token is not None and self._constraint.accept(token)

    def _logprobs_of(self, token: int) -> TokenLogprobs:
        """Of the token that was chosen last."""
        its = self._core.logprobs
        assert its is not None
        text = self._vocabulary.token_bytes
        return TokenLogprobs(token, text(token), its.chosen, [TopLogprob(id, text(id), value) for id, value in its.top])

    def _collect(self, finish_reason: str | None) -> GenerationResult:
        core = self._core.stats
        memory = _core.resident_memory(None)
        stall_us = sorted(stall / 1000 for stall in core.stall_ns)
        p50, p99 = (_percentile(stall_us, rank) for rank in (0.50, 0.99)) if stall_us else (None, None)
        stats = GenerationStats(
            prompt_tokens=self._prompt_tokens,
            # The last tokens of the sequence before may not have been computed: those are part of this prefill.
            cached_tokens=max(0, min(self._shared_tokens, self._prompt_tokens - core.prefill_tokens)),
            new_tokens=len(self._token_ids),
            seed=self._seed,
            time_to_first_token_s=self._first_token_s,
            prefill_tokens_per_s=_per_second(core.prefill_tokens, core.prefill_ns),
            decode_tokens_per_s=_per_second(core.decode_tokens, core.decode_ns),
            rom_requests=core.rom_requests,
            rom_hits=core.rom_hits,
            rom_bytes=core.rom_bytes,
            rom_access=self._rom_access,
            stall_us_p50=p50,
            stall_us_p99=p99,
            drafted_tokens=core.drafted_tokens,
            accepted_tokens=core.accepted_tokens,
            resident_bytes=None if memory is None else memory["resident"],
        )
        text = "".join(self._pieces)
        message = None if self._answer is None else answer_message(text, self._answer)
        logprobs = None if self._logprobs is None else list(self._logprobs)
        return GenerationResult(
            text, list(self._token_ids), finish_reason, self._stop.completed, stats, message, logprobs
        )


def step_together(streams: Sequence[TextStream]) -> None:
    """Computes what `advance` of each chooses from: those of an engine in one step, as far as their prompts are read.
    What fails for one of them its `advance` raises."""
    _core.step([stream._core for stream in streams if not stream.over])


def _per_second(count: int, nanoseconds: int) -> float | None:
    return count * 1e9 / nanoseconds if count and nanoseconds else None


def _percentile(ordered: Sequence[float], rank: float) -> float:
    """Of sorted values, with linear interpolation between neighbours. rank: 0 to 1."""
    at = rank * (len(ordered) - 1)
    below = int(at)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (at - below) * (ordered[above] - ordered[below])
