"""The engine as a model of the lm-evaluation-harness."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from tqdm import tqdm

from ..engine import Engine
from ..options import SAMPLING, GenerationOptions
from ..prefix_cache import common_prefix
from .perplexity import windows
from .scorer import Scorer

Request = tuple[Any, list[int], list[int]]
"""What the harness knows it by, the tokens of the context and those of the continuation."""

_DEFAULT_NEW_TOKENS = 256
"""As the harness's own models have it."""
_PLAIN: dict[str, Any] = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "repetition_penalty": 1.0}
"""Greedy, whatever the package says."""


class MekiLM(TemplateLM):
    """`lm_eval.simple_evaluate(model=MekiLM(engine), tasks=[...])`. For one thread at a time.

    Requests are computed one by one, in the order of their tokens, so that each begins as the one before as far as it
    can: what they have in common (a few-shot header, a question with several choices) is computed once.
    """

    def __init__(self, engine: Engine, *, context: int = 0, note: Callable[[str], object] = warnings.warn) -> None:
        """context: most tokens that a request is given, 0 for the model's, at most 4,096; the beginning of a longer one
        is left out, and `note` told of how many. ValueError for a model without a token that begins or ends a text."""
        super().__init__()
        self.engine = engine
        self.max_length = engine.session(context=context).context
        self._encoder = engine.requests.prompts
        self._prefix = self._encoder.encode("", first=True)[0]
        self._begins = str(engine.tokenizer.id_to_token(self._prefix))
        self._note = note

    @property
    def eot_token_id(self) -> int:
        return int(self.engine.manifest["tokenizer"]["eos_token_ids"][0])

    @property
    def prefix_token_id(self) -> int:
        """What an empty context stands for: the token that begins a text, or else the first that ends one."""
        return self._prefix

    def get_model_info(self) -> dict[str, Any]:
        """What the harness notes beside the results."""
        return {
            "model_name": self.engine.name,
            "random_weights": self.engine.random_weights,
            "kv_type": self.engine.kv_type,
            "max_length": self.max_length,
        }

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """With the tokens that begin a text unless it begins with them itself, or `add_special_tokens` says no."""
        special = not string.startswith(self._begins) if add_special_tokens is None else add_special_tokens
        return self._encoder.encode_text(string, special=special)

    def _loglikelihood_tokens(
        self, requests: Sequence[Request], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        sequences, starts = [], []
        for _name, context, continuation in requests:
            if not 0 < len(continuation) <= self.max_length:
                raise ValueError(
                    f"a continuation has {len(continuation)} tokens, expected 1 to {self.max_length}, what the context "
                    "holds; choose a larger context, or another task"
                )
            sequences.append([*(context or [self._prefix]), *continuation])
            starts.append(len(sequences[-1]) - len(continuation))
        cut = self._cut(sequences, [self.max_length + 1] * len(sequences))
        starts = [start - len(whole) + len(kept) for start, whole, kept in zip(starts, sequences, cut, strict=True)]
        scorer = Scorer(self.engine, max((len(tokens) - 1 for tokens in cut), default=1))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(cut)
        order = sorted(range(len(cut)), key=cut.__getitem__)
        new = _new_tokens([cut[index] for index in order], [starts[index] for index in order])
        with _progress(sum(new), "loglikelihood", "tok", disable_tqdm) as bar:
            for index, tokens in zip(order, new, strict=True):
                scores, best = scorer.score(cut[index], starts[index])
                answers[index] = (float(scores.sum()), bool(best.all()))
                bar.update(tokens)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[float]:
        """ln p of each text, in windows as `perplexity.windows` cuts them. Nothing stands before a text but the token
        that begins one."""
        pieces: list[Request] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            token_ids = self.tok_encode(request.args[0], add_special_tokens=False)
            for window, start in windows(token_ids, self._prefix, self.max_length):
                pieces.append((None, window[:start], window[start:]))
                owners.append(owner)
        totals = [0.0] * len(requests)
        scores = self._loglikelihood_tokens(pieces, disable_tqdm=disable_tqdm)
        for owner, (score, _best) in zip(owners, scores, strict=True):
            totals[owner] += score
        return totals

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """The text that follows each context, up to the first stop string. ValueError for an option that the engine
        does not have, and for more new tokens than the context holds."""
        options = [_generation_options(request.args[1], seed) for seed, request in enumerate(requests)]
        rooms = [self.max_length - (each["max_new_tokens"] or 0) for each in options]
        if rooms and min(rooms) < 1:
            most = self.max_length - min(rooms)
            raise ValueError(
                f"{most} new tokens are asked for, the context holds {self.max_length} with the text before them; "
                "choose a larger context, or another task"
            )
        prompts = [self.tok_encode(request.args[0]) or [self._prefix] for request in requests]
        prompts = self._cut(prompts, rooms)
        session = self.engine.session(context=self.max_length)
        texts = [""] * len(prompts)
        with _progress(len(prompts), "generate_until", "text", disable_tqdm) as bar:
            for index in sorted(range(len(prompts)), key=prompts.__getitem__):
                session.rewind(common_prefix(session.tokens, prompts[index][:-1]))
                texts[index] = session.generate(prompts[index][len(session.tokens) :], **options[index]).text
                bar.update()
        return texts

    def _cut(self, sequences: list[list[int]], rooms: list[int]) -> list[list[int]]:
        """The last `rooms` tokens of each, as the harness's own models cut them."""
        longer = sum(len(tokens) > room for tokens, room in zip(sequences, rooms, strict=True))
        if longer:
            self._note(
                f"{longer:,} of {len(sequences):,} requests do not fit the context of {self.max_length:,} tokens: "
                "their beginnings were left out"
            )
        return [tokens[-room:] for tokens, room in zip(sequences, rooms, strict=True)]


def _progress(total: int, name: str, unit: str, disable: bool) -> Any:
    """A bar on stderr, if that is a terminal."""
    return tqdm(total=total, desc=name, unit=unit, disable=disable or None)


def _new_tokens(sequences: Sequence[list[int]], starts: Sequence[int]) -> list[int]:
    """How many tokens of each are computed when they are scored one after the other: an honest measure of progress."""
    shared = [
        common_prefix(last[:-1], tokens[: start - 1])
        for last, tokens, start in zip([[], *sequences], sequences, starts, strict=False)
    ]
    return [len(tokens) - 1 - known for tokens, known in zip(sequences, shared, strict=True)]


def _generation_options(arguments: dict[str, Any], seed: int) -> GenerationOptions:
    """The engine's options for the harness's. ValueError for one that it does not have."""
    given: dict[str, Any] = dict(normalize_gen_kwargs(arguments, _DEFAULT_NEW_TOKENS))
    most, until = given.pop("max_gen_toks"), given.pop("until")
    if not given.pop("do_sample"):
        given = {name: value for name, value in given.items() if name not in ("temperature", "top_k", "top_p", "min_p")}
    if unknown := sorted(given.keys() - set(SAMPLING)):
        raise ValueError(f"generation option {unknown[0]!r} is none of the engine's: {', '.join(SAMPLING)}")
    if most < 1:
        raise ValueError(f"max_gen_toks is {most}, expected at least 1")
    stop = [text for text in until if text]
    options = GenerationOptions(max_new_tokens=most, stop=stop, seed=seed)
    options.update(cast(GenerationOptions, {**_PLAIN, **given}))
    return options
