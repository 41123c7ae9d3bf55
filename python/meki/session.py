"""A session: one sequence of tokens, and the generations that extend it."""

from __future__ import annotations

import os
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Unpack

from . import _core
from .generation import GenerationResult, TextStream
from .options import ChatOptions, GenerationOptions, check_integer, check_path, check_token_ids
from .prefix_cache import common_prefix
from .requests import Request, Requests
from .session_file import Origin, open_session, write_session

if TYPE_CHECKING:  # a text needs no numpy, which takes 0.1 s to load
    import numpy as np
    from numpy.typing import NDArray


class Session:
    """One sequence of tokens with its KV cache: each call goes on where the last one ended; a chat also replaces
    what is not its conversation. For one thread at a time.

    Made by `Engine.session`. What a stop string or an abandoned stream has generated stays in the sequence.
    """

    def __init__(
        self,
        engine: _core.Engine,
        settings: _core.SessionOptions,
        requests: Requests,
        rom_access: str | None,
        origin: Origin,
    ) -> None:
        self.origin = origin
        """What a file with this session's state belongs to."""
        self._requests = requests
        self._rom_access = rom_access
        self._core = _core.Session(engine, settings)
        self._stream: TextStream | None = None
        self.prompt_length = 0
        """Tokens of the sequence up to the end of the last prompt."""

    @property
    def context(self) -> int:
        """Capacity in tokens."""
        return self._core.context

    @property
    def tokens(self) -> list[int]:
        """The sequence so far: prompts and generated tokens."""
        return self._core.tokens

    @property
    def computed_tokens(self) -> list[int]:
        """Of the sequence so far, those whose state is there: all but the last ones."""
        tokens = self._core.tokens
        return tokens[: len(tokens) - self._core.pending]

    def generate(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> GenerationResult:
        """Appends `prompt` and generates. Options and errors as in `stream`."""
        return self.stream(prompt, **options).finish()

    def stream(self, prompt: str | Sequence[int], **options: Unpack[GenerationOptions]) -> TextStream:
        """Appends `prompt` and generates while the result is iterated over; ends an earlier stream of this session.

        The prompt is a text, or token ids, to which nothing is added. The text is that of the whole sequence behind the
        prompt: `tokenizer.decode` of all tokens without what it has in common with that of those before. An empty
        prompt goes on with the sequence; at its start it stands for the token that begins a text: the
        manifest's bos_token_id, or else its first end token, after which a new text begins. ValueError for an option
        out of range, a prompt that does not fit the context, a token id out of the vocabulary, a schema, regular
        expression or grammar that cannot be used, and an empty prompt where there is no such token; TypeError for a
        value of a wrong type. The sequence is then as before.
        """
        return self.run(self._requests.text(prompt, first=not self._core.tokens, **options))

    def chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> GenerationResult:
        """The model's answer to a conversation. Messages, options and errors as in `stream_chat`."""
        return self.stream_chat(messages, **options).finish()

    def stream_chat(self, messages: Sequence[Mapping[str, Any]], **options: Unpack[ChatOptions]) -> TextStream:
        """Answers a conversation while the result is iterated over; ends an earlier stream of this session.

        messages: at least one {"role": "system" | "user" | "assistant" | "tool", "content": str}, in the forms of
        OpenAI's API: a content may be a list of text parts, or None beside `tool_calls`; further roles and keys are
        the chat template's concern. The options are those of `ChatOptions`. The sequence becomes the
        conversation as the template writes it, with the beginning of an answer, which is no part of the result: what
        it has in common with the sequence before is not computed again. Without a `temperature`, here or in the
        package, the answer is the most probable one. ValueError if there is no chat template, for messages that are
        not such or that the template refuses, for an option out of range and a conversation that does not fit the
        context; the sequence is then as before.
        """
        return self.run(self._requests.chat(messages, **options))

    def run(self, request: Request) -> TextStream:
        """Generates what is asked for while the result is iterated over; ends an earlier stream of this session.
        ValueError if it does not fit; the sequence is then as before."""
        token_ids, shared = request.token_ids, 0
        if request.whole:
            if len(token_ids) > self.context:
                chat = request.answer is not None
                what, less = ("conversation", "leave out early messages") if chat else ("prompt", "shorten it")
                raise ValueError(
                    f"the {what} has {len(token_ids)} tokens, the context holds {self.context}; "
                    f"{less} or choose a larger context"
                )
            # The last token is computed in any case: the answer begins with its logits.
            shared = common_prefix(self._core.tokens, token_ids[:-1])
            self._core.rewind(shared)
        self._core.append(token_ids[shared:])  # the last that can refuse: from here on the earlier stream is over
        self._begin()
        self.prompt_length = len(self._core.tokens)
        options = request.options
        ends = [] if options.ignore_eos else self._requests.prompts.end_token_ids
        self._core.start(options.sampling, options.max_new_tokens, ends)
        self._stream = TextStream(
            self._core,
            self._requests.prompts.vocabulary,
            self._core.tokens,
            self._rom_access,
            len(token_ids),
            shared,
            options,
            request.constraint,
            request.answer,
        )
        return self._stream

    def logits(self, token_ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """Appends tokens as they are; float32 [len(token_ids) - start, vocab_size], row i predicting the token after
        token_ids[start + i]. ValueError as for `Engine.logits`."""
        token_ids = check_token_ids("token_ids", token_ids)
        if not token_ids:
            raise ValueError("no tokens to compute logits of; pass at least one")
        first = len(self._core.tokens) + check_integer("start", start, len(token_ids) - 1)
        self._core.append(token_ids)
        self._begin()
        return self._core.logits(first)

    def rewind(self, length: int) -> None:
        """Keeps the first `length` tokens of the sequence, and what is computed of them; ends an earlier stream of this
        session. A layer with a window may not reach back so far: then all is computed again when it is needed.
        ValueError if there are fewer."""
        self._core.rewind(check_integer("length", length, len(self._core.tokens)))
        self._begin()

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the sequence and what is computed of it to a file, for `load`: a few KB to 100 KB a token, by the
        model's keys and values. What stood there is replaced when all is written. OSError if it cannot be."""
        write_session(_path(path), self.origin, self._core.tokens, self._core.snapshot())

    def load(self, path: str | os.PathLike[str]) -> None:
        """The sequence becomes that of a file, with what is computed of it; ends an earlier stream of this session.

        A session has saved it of the same model, provider and `kv_type`, with its memory if this one has it; context,
        prefetching and drafts may differ. SessionFileError, which is an OSError, for a file that is damaged or of
        another kind of session, OSError if it cannot be read, ValueError if it does not fit the context: the sequence
        is then as before.
        """
        with open_session(_path(path), self.origin) as file:
            if len(file.tokens) > self.context:
                raise ValueError(
                    f"{file.path}: has {len(file.tokens)} tokens, the context holds {self.context}; "
                    "choose a larger context"
                )
            state = file.read(self._core.snapshot_bytes(file.computed))
        self._core.restore_parts(array("i", file.tokens[: file.computed]).tobytes(), state)
        self._core.append(file.tokens[file.computed :])
        self._begin()
        self.prompt_length = len(file.tokens)

    def snapshot_bytes(self, length: int) -> int:
        """Bytes of the state in a snapshot of `length` tokens. ValueError for more than the context holds."""
        return self._core.snapshot_bytes(length)

    def snapshot(self, length: int | None = None) -> _core.Snapshot:
        """A copy of the first `length` tokens and their state, None: of all that are computed. Of no token where a
        layer with a window does not reach back so far. ValueError if fewer are computed."""
        return self._core.snapshot(length)

    def become(self, snapshot: _core.Snapshot) -> None:
        """The sequence becomes that of a snapshot, of a session of the same engine; ends an earlier stream of this
        session. ValueError if it does not fit the context; the sequence is then as before."""
        self._core.restore(snapshot)
        self._begin()
        self.prompt_length = len(self._core.tokens)

    def _begin(self) -> None:
        if self._stream is not None:
            self._stream.close()
        self._core.reset_stats()


def _path(path: str | os.PathLike[str]) -> Path:
    return Path(check_path("path", path)).expanduser()
