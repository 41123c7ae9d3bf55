"""From a prompt, or the messages of a conversation, to the tokens that the model is given."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenizers import Tokenizer

from ._core import PackageError
from .options import check_text

if TYPE_CHECKING:
    from .chat import ChatTemplate


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
        self.chat_template: ChatTemplate | None = None
        """None: the package has none."""
        chat = settings["chat_template"]
        if chat or chat_template:
            from .chat import ChatTemplate  # Jinja takes 0.1 s to load: only who needs it waits

            variables = chat["variables"] if chat else self._special_tokens()
            path = chat_template or directory / chat["file"]
            self.chat_template = ChatTemplate(path, variables, given=chat_template is not None)

    def encode(self, prompt: str, *, first: bool) -> list[int]:
        """The tokens of a prompt; first: with those that begin a sequence. ValueError for text that is not Unicode, and
        for an empty first prompt where no token begins a text."""
        ids = self._tokenize(prompt, add_special_tokens=first)
        if not first:
            return ids
        if self._bos is not None and ids[:1] != [self._bos]:
            return [self._bos, *ids]
        if not ids and not self._eos:
            raise ValueError("the prompt is empty and the model has no token that begins a text; give a prompt")
        return ids or self._eos[:1]

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **arguments: Any) -> list[int]:
        """The tokens of a conversation, up to where the answer begins; nothing is added to what the template writes.
        Arguments and errors as of `ChatTemplate.render`; ValueError if the package has no template."""
        if self.chat_template is None:
            raise no_chat_template(self._directory)
        ids = self._tokenize(self.chat_template.render(messages, **arguments), add_special_tokens=False)
        if not ids:
            raise ValueError(f"{self._directory}: the chat template makes no text of these messages; give others")
        return ids

    def _special_tokens(self) -> dict[str, str]:
        """What templates know the tokens by that begin and end a text, as far as the package names such tokens."""
        begins: list[int | None] = [*self._tokenize("", add_special_tokens=True), self._bos]
        ids = {"bos_token": begins[0], "eos_token": next(iter(self._eos), None)}
        tokens = {name: None if id is None else self.tokenizer.id_to_token(id) for name, id in ids.items()}
        return {name: token for name, token in tokens.items() if token is not None}

    def _tokenize(self, text: str, *, add_special_tokens: bool) -> list[int]:
        check_text("prompt", text)
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(f"the prompt is not valid Unicode: {error}; give text that UTF-8 can hold") from error
        with _guarded(self._directory):
            ids: list[int] = self.tokenizer.encode(text, add_special_tokens=add_special_tokens).ids
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
    except (KeyboardInterrupt, SystemExit, MemoryError):
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
    largest = max(tokenizer.get_vocab(with_added_tokens=True).values(), default=-1)
    if largest >= vocab_size:
        raise PackageError(
            f"{path}: its largest token id is {largest}, the model has {vocab_size} tokens; "
            "convert with the model's tokenizer"
        )
    tokenizer.no_truncation()
    tokenizer.no_padding()
    with _guarded(path):
        check_encodes(tokenizer)
    return tokenizer
