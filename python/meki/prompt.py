"""From a prompt, or the messages of a conversation, to the tokens that the model is given."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ._core import PackageError
from .options import check_token_ids
from .text import Vocabulary

if TYPE_CHECKING:
    from .chat import ChatTemplate

LONG_TEXT = 10_000
"""Characters, which take some 50 ms."""


class PromptEncoder:
    """The tokenizer and the chat template of a package. Immutable and thread-safe."""

    def __init__(self, directory: Path, manifest: dict[str, Any], chat_template: Path | None = None) -> None:
        """chat_template: the user's own, in place of the package's. PackageError if a file of the package is not what
        it should be; ValueError and OSError if the user's is not."""
        settings = manifest["tokenizer"]
        self._directory = directory
        self._bos: int | None = settings["bos_token_id"]
        self._eos: list[int] = settings["eos_token_ids"]
        self.tokenizer = _load_tokenizer(directory / settings["file"], manifest["architecture"]["vocab_size"])
        self.vocabulary = Vocabulary(self.tokenizer)
        self.chat_template: ChatTemplate | None = None
        """None: the package has none."""
        chat = settings["chat_template"]
        if chat or chat_template:
            from .chat import ChatTemplate  # Jinja takes 0.1 s to load: only who needs it waits

            variables = chat["variables"] if chat else self._special_tokens()
            path = chat_template or directory / chat["file"]
            self.chat_template = ChatTemplate(path, variables, given=chat_template is not None)

    @cached_property
    def end_token_ids(self) -> list[int]:
        """Each ends a generation: the manifest's, and the token with which the chat template ends an answer."""
        end = self._end_of_answer()
        return self._eos if end is None or end in self._eos else [*self._eos, end]

    @cached_property
    def tokens_digest(self) -> bytes:
        """A digest of all tokens and their ids: that of two tokenizers is the same if their vocabularies are."""
        vocabulary = sorted(self.tokenizer.get_vocab(with_added_tokens=True).items())
        return hashlib.sha256(json.dumps(vocabulary).encode()).digest()

    def encode(self, prompt: str | Sequence[int], *, first: bool) -> list[int]:
        """The tokens of a prompt; first: with those that begin a sequence, otherwise without the space that many
        tokenizers put before a text. Token ids are taken as they are. ValueError for text that is not Unicode, and for
        an empty first prompt where no token begins a text; TypeError for what is neither text nor token ids."""
        if not isinstance(prompt, str):
            return check_token_ids("prompt, if it is not a str,", prompt)
        if not first:
            return self._encode_further(prompt)
        ids = self.encode_text(prompt, special=True)
        if not ids and not self._eos:
            raise ValueError("the prompt is empty and the model has no token that begins a text; give a prompt")
        return ids or self._eos[:1]

    def encode_text(self, text: str, *, special: bool) -> list[int]:
        """The tokens of a text alone; special: with those that begin a sequence. ValueError if it is not Unicode."""
        ids = self._tokenize(text, add_special_tokens=special)
        return [self._bos, *ids] if special and self._bos is not None and ids[:1] != [self._bos] else ids

    def render_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> str:
        """The text of a conversation, up to where the answer begins. Arguments and errors as of `ChatTemplate.render`;
        ValueError if the package has no template."""
        if self.chat_template is None:
            raise no_chat_template(self._directory)
        return self.chat_template.render(messages, **arguments)

    def encode_chat(self, text: str) -> list[int]:
        """The tokens of a conversation; nothing is added to what the template writes. ValueError if that is nothing."""
        ids = self._tokenize(text, add_special_tokens=False)
        if not ids:
            raise ValueError(f"{self._directory}: the chat template makes no text of these messages; give others")
        return ids

    def _special_tokens(self) -> dict[str, str]:
        """What templates know the tokens by that begin and end a text, as far as the package names such tokens."""
        begins: list[int | None] = [*self._tokenize("", add_special_tokens=True), self._bos]
        ids = {"bos_token": begins[0], "eos_token": next(iter(self._eos), None)}
        tokens = {name: None if id is None else self.tokenizer.id_to_token(id) for name, id in ids.items()}
        return {name: token for name, token in tokens.items() if token is not None}

    def _encode_further(self, text: str) -> list[int]:
        ids = self._tokenize(text, add_special_tokens=False, tokenizer=self.continuing)
        if self.continuing is self.tokenizer:
            return ids
        # What follows an added token is as ever: many models know it with a space in front.
        added = set(self.vocabulary.added_tokens.values())
        usual = self._tokenize(text, add_special_tokens=False)
        first, first_usual = (
            next((at for at, token_id in enumerate(tokens) if token_id in added), len(tokens))
            for tokens in (ids, usual)
        )
        return ids[:first] + usual[first_usual:]

    @cached_property
    def continuing(self) -> Tokenizer:
        """The tokenizer without what it puts before a text; the same one if that is nothing."""
        parts = {
            name: json.loads(part.__getstate__())
            for name in ("normalizer", "pre_tokenizer")
            if (part := getattr(self.tokenizer, name)) is not None
        }
        plain = {name: _without_prefix(part) for name, part in parts.items()}
        if plain == parts:
            return self.tokenizer
        with _guarded(self._directory):
            plain_tokenizer = Tokenizer.from_str(json.dumps({**json.loads(self.tokenizer.to_str()), **plain}))
        _forget_words(plain_tokenizer)
        return plain_tokenizer

    def _end_of_answer(self) -> int | None:
        """The added token that the chat template puts behind an answer, with nothing but spaces between."""
        if self.chat_template is None:
            return None
        question = {"role": "user", "content": "A question of nobody's."}
        answer = "An answer that stands in no template."
        try:
            text = self.chat_template.render([question, {"role": "assistant", "content": answer}, question])
        except (ValueError, PackageError):  # it takes no such conversation; who has one that it refuses is told then
            return None
        behind = text.partition(answer)[2].lstrip()
        added = self.vocabulary.added_tokens
        end = max((token for token in added if behind.startswith(token)), key=len, default=None)
        return None if end is None else added[end]

    def _tokenize(self, text: str, *, add_special_tokens: bool, tokenizer: Tokenizer | None = None) -> list[int]:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode: {error}; give text that UTF-8 can hold") from error
        with _guarded(self._directory):
            encoder = tokenizer or self.tokenizer
            # Of these two only the latter lets other threads run meanwhile; it has threads of its own.
            if len(text) < LONG_TEXT:
                encoding = encoder.encode(text, add_special_tokens=add_special_tokens)
            else:
                (encoding,) = encoder.encode_batch_fast([text], add_special_tokens=add_special_tokens)
            ids: list[int] = encoding.ids
        return ids


def no_chat_template(directory: Path) -> ValueError:
    """What there is to say of a package that cannot chat."""
    return ValueError(
        f"{directory}: the package has no chat template, so how the model wants a conversation written is not known; "
        "give a template (--chat-template, Engine's chat_template), or convert the model again from a source that has "
        "one, or with one (meki-convert --chat-template)"
    )


@contextlib.contextmanager
def tokenizer_errors(refusal: Callable[[BaseException], Exception]) -> Iterator[None]:
    """Whatever the tokenizers library raises, be it a panic, which is no Exception, becomes `refusal(error)`."""
    try:
        yield
    except (GeneratorExit, KeyboardInterrupt, SystemExit, MemoryError):  # the first: Ctrl-C as the block begins
        raise
    except BaseException as error:
        raise refusal(error) from error


def check_encodes(tokenizer: Tokenizer) -> None:
    """Raises what the tokenizers library raises for any text, if it does."""
    tokenizer.encode("A word, 1 number.\n")


def _guarded(path: Path) -> contextlib.AbstractContextManager[None]:
    return tokenizer_errors(
        lambda error: PackageError(f"{path}: the tokenizer fails: {error}; convert the model again")
    )


def _load_tokenizer(path: Path, vocab_size: int) -> Tokenizer:
    data = path.read_bytes()  # the library opens no path that is not UTF-8
    with _guarded(path):
        tokenizer = Tokenizer.from_buffer(data)
    # Of a vocabulary without gaps; a look at every token would take half as long as reading them.
    largest = max([tokenizer.get_vocab_size(with_added_tokens=False) - 1, *tokenizer.get_added_tokens_decoder()])
    if largest >= vocab_size:
        raise PackageError(
            f"{path}: its largest token id is {largest}, the model has {vocab_size} tokens; "
            "convert with the model's tokenizer"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    _forget_words(tokenizer)
    with _guarded(path):
        check_encodes(tokenizer)
    return tokenizer


def _forget_words(tokenizer: Tokenizer) -> None:
    """Turns off the cache of words. The library keeps what is in it until the thread ends, not the tokenizer: a process
    that opens one engine after another would grow, by what lies between those kilobytes, too. Words are cut twice as
    slowly without it, a prompt of 10,000 tokens in some 50 ms."""
    resize = getattr(tokenizer.model, "_resize_cache", None)  # of BPE and Unigram, the kinds that have one
    if resize:
        resize(0)


def _without_prefix(part: dict[str, Any]) -> dict[str, Any] | None:
    """A normalizer or pre-tokenizer, in the form of a tokenizer.json, that puts nothing before a text."""
    if part["type"] == "Prepend":
        return None
    plain = {name: _NO_PREFIX.get(name, value) for name, value in part.items()}
    for steps in {"normalizers", "pretokenizers"} & part.keys():
        plain[steps] = [kept for step in part[steps] if (kept := _without_prefix(step)) is not None]
    return plain


_NO_PREFIX = {"prepend_scheme": "never", "add_prefix_space": False}
"""Of Metaspace and ByteLevel."""
