"""Which tokens a text can go on with, if it is to be one of a grammar."""

from __future__ import annotations

import json
import threading
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from tokenizers import Tokenizer

from ..options import Form
from ..prompt import PromptEncoder, tokenizer_errors

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

KEPT = 16
"""Compiled grammars of an engine."""
WHITESPACE = r"\x20|\n[\x20\t]{0,20}"
"""Between the tokens of JSON, or nothing: enough to indent it, and a model cannot go on with it forever."""
_SAMPLE = "A word, 1 number.\n"
_MESSAGE = 240
"""Characters of an error, at most."""


class Grammars:
    """The grammars that were in use with a tokenizer, compiled. Thread-safe."""

    def __init__(self, prompts: PromptEncoder, vocab_size: int) -> None:
        """vocab_size: of the model, which may have more ids than the tokenizer; those are never allowed."""
        self._prompts = prompts
        self._vocab_size = vocab_size
        self._lock = threading.Lock()
        self._tokenizer: LLTokenizer | None = None
        # Before their first tokens; the last used at the end.
        self._compiled: OrderedDict[Form, LLMatcher] = OrderedDict()

    def constraint(self, form: Form) -> Constraint:
        """What holds one generation to `form`. ValueError for what is no schema, regular expression or grammar, has no
        text, or takes too long to compile, and for a tokenizer or a model that it does not work with; ImportError
        without llguidance."""
        with self._lock:
            matcher = self._compiled.get(form)
        if matcher is None:
            matcher = self._compile(form)
        with self._lock:
            self._compiled[form] = matcher
            self._compiled.move_to_end(form)
            if len(self._compiled) > KEPT:
                self._compiled.popitem(last=False)
            return Constraint(self, form, matcher.deep_copy())

    def forget(self, form: Form) -> None:
        """Lets `form` be compiled anew when it is used next: its matchers share what they find out, and the limits."""
        with self._lock:
            self._compiled.pop(form, None)

    def _compile(self, form: Form) -> LLMatcher:
        try:
            from llguidance import LLMatcher, LLParserLimits
        except ImportError as error:
            raise ImportError(
                f"{form.option} needs the package llguidance; run `pip install 'meki[structured]'`"
            ) from error
        from .trial import try_grammar  # and with it subprocess, which takes milliseconds to load

        grammar = _grammar(form)
        with self._lock:
            if self._tokenizer is None:
                self._tokenizer = self._load_tokenizer(form)
        special = self._prompts.vocabulary.special_tokens
        ends = {f"<end {token_id}>": token_id for token_id in self._prompts.end_token_ids}
        if wrong := try_grammar(grammar, self._vocab_size, special or ends):
            raise refusal(form, wrong)
        matcher = LLMatcher(self._tokenizer, grammar, log_level=0, limits=LLParserLimits(verbose_errors=False))
        if matcher.is_error():
            raise refusal(form, matcher.get_error())
        return matcher

    def _load_tokenizer(self, form: Form) -> LLTokenizer:
        from llguidance import LLTokenizer

        ends = self._prompts.end_token_ids
        if not ends:
            raise ValueError(f"{form.option}: the model has no end token, with which such a text ends; omit it")
        plain = _without_normalization(self._prompts.continuing)
        with tokenizer_errors(
            lambda error: ValueError(f"{form.option} does not work with this model's tokenizer: {error}; omit it")
        ):
            tokenizer = LLTokenizer(plain, n_vocab=self._vocab_size, eos_token=ends)
            ids = tokenizer.tokenize_str(_SAMPLE)
            text, expected = tokenizer.decode_str(ids), self._prompts.vocabulary.decode(ids)
            if text.lstrip() != expected.lstrip():
                raise ValueError(f"llguidance takes {expected!r} for {text!r}")
        return tokenizer


class Constraint:
    """The tokens that may come next in one generation. For one thread at a time.

    They are worked out on a thread of the constraint's own while the model computes their probabilities.
    """

    def __init__(self, grammars: Grammars, form: Form, matcher: LLMatcher) -> None:
        self._grammars = grammars
        self._form = form
        self._matcher = matcher
        self._helper = ThreadPoolExecutor(1, "meki-grammar")  # ends with the constraint
        self._allowed = self._helper.submit(self._find_allowed)

    def allowed(self) -> bytes:
        """A bit for each token: bit i % 8 of byte i // 8 is token i, as `_core.Session.next` takes it. ValueError if
        that is more work than llguidance's limits let one token have, or no token goes on with the text."""
        return self._allowed.result()

    def accept(self, token_id: int) -> bool:
        """Goes on to the token after `token_id`, one of `allowed()`. True: the text is complete, nothing can follow."""
        self._matcher.consume_token(token_id)
        self._check()
        if self._matcher.is_stopped():
            return True
        self._allowed = self._helper.submit(self._find_allowed)
        return False

    def _find_allowed(self) -> bytes:
        mask = self._matcher.compute_bitmask()
        self._check()
        return mask

    def _check(self) -> None:
        if self._matcher.is_error():
            self._grammars.forget(self._form)
            wrong = self._matcher.get_error()
            if wrong.startswith("NoExtension"):
                wrong = "the model has no token with which the text could go on"
            raise refusal(self._form, wrong)


def _without_normalization(tokenizer: Tokenizer) -> str:
    """A tokenizer.json for the text of a grammar, which is what it is: of its normalizers only those that write a
    space as another character."""
    parts = json.loads(tokenizer.to_str())
    normalizer = parts["normalizer"] or {"type": "Sequence", "normalizers": []}
    steps = normalizer["normalizers"] if normalizer["type"] == "Sequence" else [normalizer]
    parts["normalizer"] = {"type": "Sequence", "normalizers": [step for step in steps if step["type"] == "Replace"]}
    return json.dumps(parts)


def refusal(form: Form, wrong: str) -> ValueError:
    """An error of one line."""
    line = " ".join(wrong.replace("<non-verbose/>", "").split())
    if len(line) > _MESSAGE:
        line = f"{line[: _MESSAGE // 2]} ... {line[-_MESSAGE // 2 :]}"
    return ValueError(f"{form.option} cannot be used: {line}")


def _grammar(form: Form) -> str:
    """In the one form that llguidance compiles; whether it can is seen then."""
    from llguidance import LLMatcher

    if form.option == "json_schema":
        try:
            return LLMatcher.grammar_from_json_schema(form.text, defaults={"whitespace_pattern": WHITESPACE})
        except ValueError as error:  # JSON that Python reads and Rust does not
            raise refusal(form, str(error)) from error
    if form.option == "regex":
        return LLMatcher.grammar_from_regex(form.text)
    return LLMatcher.grammar_from_lark(form.text)
