"""The engine: an opened package, which sessions run on."""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from reprlib import repr as shown
from typing import TYPE_CHECKING, Any, Literal, Unpack

from . import _core
from .generation import GenerationResult, TextStream
from .options import (
    DEFAULT_PREFIX_CACHE,
    DEFAULT_ROW_CACHE,
    ChatOptions,
    GenerationOptions,
    check_flag,
    check_integer,
    check_number,
    check_path,
    check_text,
    check_token_ids,
)
from .package import check_parsed_files, compiled_targets, find_model, has_random_weights, read_manifest
from .prefix_cache import PrefixCache
from .prompt import PromptEncoder
from .requests import Requests
from .scheduler import Event, Piece, Scheduler
from .session import Session
from .session_file import Origin, model_digest
from .session_pool import SessionPool

if TYPE_CHECKING:  # a text needs no numpy, which takes 0.1 s to load
    import numpy as np
    from numpy.typing import NDArray


class Engine:
    """A model, opened once. Immutable: any number of threads may use it, each generation has its own session.

    The options of `generate`, `stream` and `chat` are those of `meki.options.GenerationOptions`.
    """

    def __init__(
        self,
        model: str | os.PathLike[str],
        *,
        threads: int = 0,
        rom_access: str = "pread",
        kv_type: str | None = None,
        provider: str = "cpu",
        soc: str | None = None,
        chat_template: str | os.PathLike[str] | None = None,
        row_cache: int = DEFAULT_ROW_CACHE,
        prefix_cache: int = DEFAULT_PREFIX_CACHE,
        memory: bool = True,
        rom_delay_ms: float = 0.0,
        profile: str | os.PathLike[str] = "",
    ) -> None:
        """Opens a package by name or path.

        threads: compute threads of one step, 0 for one per core that affinity and CPU quota leave; more than the
        affinity's cores are not used. rom_access: "pread", "mmap", or "direct" (past the page cache). kv_type: how
        keys and values are stored, "float32", "float16", "int8" or "int4"; None: "int8", and with the provider "qnn"
        "float16", which has no other. provider: "cpu", or "qnn" for what meki-compile has made of the package: it runs
        on the NPU of a Qualcomm chip, on x86-64 in its simulator. soc: the compiled chip, such as "sm8750"; None: the
        only one there is. chat_template: a Jinja file in place of the package's own chat template. row_cache: MiB of
        memory at most in which memory rows that were read are kept, for all sessions; 0: none are. prefix_cache:
        MiB of memory at most in which the state of conversations is kept that `chat` and `AsyncEngine` have no session
        for any more; 0: none is.

        For measurements: memory: False runs the backbone without its memory. rom_delay_ms: milliseconds that every
        read of the ROM takes longer, 0 to 10,000, to imitate slow storage. profile: ONNX Runtime writes a trace of each
        stage, in Chrome's format, into a file whose path begins so; it is complete when the engine and its sessions are
        gone.

        Raises ModelNotFoundError, PackageError for a package that cannot be used, TypeError for an option of a wrong
        type, ValueError for one out of range, a chip that the package is not compiled for and a `chat_template` that
        cannot be used, ImportError or RuntimeError if ONNX Runtime or its provider is missing or fails.
        """
        if not 0 <= check_number("rom_delay_ms", rom_delay_ms) <= 10_000:
            raise ValueError(f"rom_delay_ms must be from 0 to 10000, got {rom_delay_ms}")
        options = _core.EngineOptions(
            onnxruntime=str(find_onnxruntime()),
            threads=check_integer("threads", threads, 1024),
            rom_access=check_text("rom_access", rom_access),
            kv_type=None if kv_type is None else check_text("kv_type", kv_type),
            memory=check_flag("memory", memory),
            row_cache=check_integer("row_cache", row_cache, 2**20) << 20,
            rom_delay_us=round(rom_delay_ms * 1000),
            profile=check_path("profile", profile),
            provider=check_text("provider", provider),
            qnn_library=str(find_qnn_provider()) if provider == "qnn" else "",
            soc="" if soc is None else check_text("soc", soc),
        )
        template = None if chat_template is None else Path(check_path("chat_template", chat_template)).expanduser()
        self.path = find_model(check_path("model", model))
        self.manifest = read_manifest(self.path, provider, soc or "")
        chip = soc or next(iter(compiled_targets(self.manifest))) if provider == "qnn" else None
        check_parsed_files(self.path, self.manifest, chip)
        with ThreadPoolExecutor(1) as beside:  # the engine needs no interpreter: the tokenizer is read meanwhile
            opening = beside.submit(_core.Engine.open, str(self.path), options)
            try:
                prompts = PromptEncoder(self.path, self.manifest, template)
            finally:
                self._core = opening.result()  # what it refuses comes first
        self.tokenizer = prompts.tokenizer
        self.requests = Requests(prompts, self.manifest["sampling"], self.vocab_size)
        self._origin = Origin(
            model=model_digest(self.manifest, chip),
            provider=self.provider,
            kv_type=self.kv_type,
            memory=memory and self.manifest["memory"] is not None,
            vocab_size=self.vocab_size,
            context=self.context,
        )
        self._lock = threading.Lock()
        most = check_integer("prefix_cache", prefix_cache, 2**20) << 20
        windows = [cache["window"] for cache in self.manifest.get("kv_caches") or () if cache.get("window")]
        self.prefix_cache = PrefixCache(most, min(windows, default=0))
        """What sessions of several generations have computed before."""
        self._pool: tuple[tuple[Any, ...], SessionPool] | None = None  # of chats, by what the last one's was made with

    @property
    def name(self) -> str:
        """The model's name in its manifest."""
        return str(self.manifest["name"])

    @property
    def vocab_size(self) -> int:
        return self._core.vocab_size

    @property
    def context(self) -> int:
        """The longest sequence that the model supports, or is compiled for, in tokens."""
        return self._core.context

    @property
    def provider(self) -> str:
        """What computes: "cpu" or "qnn"."""
        return self._core.provider

    @property
    def soc(self) -> str | None:
        """The chip whose compiled stages run; None with the provider "cpu"."""
        return self._core.soc

    @property
    def simulated(self) -> bool:
        """True if a simulator of the chip's NPU computes: results are as on the chip, speed is not."""
        return self._core.simulated

    @property
    def shared_memory(self) -> bool:
        """True if the KV cache is in memory that the NPU shares. If not, an NPU copies all of it each step."""
        return self._core.shared_memory

    @property
    def threads(self) -> int:
        """Compute threads of one step."""
        return self._core.threads

    @property
    def kv_type(self) -> str:
        """How keys and values are stored."""
        return self._core.kv_type

    @property
    def rom_access(self) -> str | None:
        """The access mode in use, "mmap", "pread" or "direct"; None: the package has no memory."""
        return self._core.rom_access

    @property
    def can_chat(self) -> bool:
        """Whether there is a chat template."""
        return self.requests.prompts.chat_template is not None

    @property
    def random_weights(self) -> bool:
        """True if nobody trained this model: its speed can be measured, its text means nothing."""
        return has_random_weights(self.manifest)

    def session(
        self,
        *,
        context: int = 0,
        prefetch: bool = True,
        draft: Draft = None,
        draft_tokens: int | None = None,
    ) -> Session:
        """A new sequence. context: capacity in tokens, 0 for the engine's, at most 4096. prefetch: read rows ahead
        on the I/O thread; False reads them on the compute thread, which is for measurements.

        draft: speculative decoding. "lookup": what followed the last tokens where they occurred before is taken for a
        guess, which suits texts that repeat parts of their prompt; an Engine: a smaller model with the same tokenizer
        guesses. One step computes all guessed tokens, and those that would have been generated anyway stand: the text
        is the same, sampled ones as well, but for near ties where a package has float32 weights. draft_tokens: guessed
        for a step at most, 1 to 15; None: 7. ValueError for a model with another tokenizer, and for draft_tokens
        without a draft."""
        settings = _core.SessionOptions(
            context=check_integer("context", context, 2**31 - 1),
            prefetch=check_flag("prefetch", prefetch),
            drafter=_make_drafter(self, draft),
            draft_tokens=_check_draft_tokens(draft, draft_tokens),
        )
        # Not the engine itself: it keeps a session, and a cycle would outlive both.
        return Session(self._core, settings, self.requests, self.rom_access, self._origin)

    def generate(
        self,
        prompt: str | Sequence[int],
        *,
        context: int = 0,
        prefetch: bool = True,
        draft: Draft = None,
        draft_tokens: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> GenerationResult:
        """Continues `prompt`, a text or token ids, in a session of its own, as `session` makes it. ValueError if it
        does not fit the context."""
        session = self.session(context=context, prefetch=prefetch, draft=draft, draft_tokens=draft_tokens)
        return session.generate(prompt, **options)

    def stream(
        self,
        prompt: str | Sequence[int],
        *,
        context: int = 0,
        prefetch: bool = True,
        draft: Draft = None,
        draft_tokens: int | None = None,
        **options: Unpack[GenerationOptions],
    ) -> TextStream:
        """As `generate`, piece by piece: an iterator of str, with the `result` so far."""
        session = self.session(context=context, prefetch=prefetch, draft=draft, draft_tokens=draft_tokens)
        return session.stream(prompt, **options)

    def generate_batch(
        self,
        prompts: Sequence[str | Sequence[int]],
        *,
        parallel: int = 8,
        context: int = 0,
        **options: Unpack[GenerationOptions],
    ) -> list[GenerationResult]:
        """Continues each of several prompts as `generate` does, `parallel` at once, which are computed together: that
        takes less time than one after the other. The results come in the order of the prompts; the first error of one
        of them is raised, and ends the others."""
        requests = [self.requests.text(prompt, first=True, whole=True, **options) for prompt in prompts]
        ends: SimpleQueue[tuple[int, Event]] = SimpleQueue()
        results: dict[int, GenerationResult] = {}

        def deliver(index: int, event: Event) -> None:
            if not isinstance(event, Piece):
                ends.put((index, event))

        scheduler = Scheduler(
            lambda: self.session(context=context),
            self.prefix_cache,
            parallel=check_integer("parallel", parallel, 1024, 1),
            waiting=len(requests),
        )
        try:
            for index, request in enumerate(requests):
                scheduler.submit(request, partial(deliver, index))
            while len(results) < len(requests):
                index, end = ends.get()
                if isinstance(end, Exception):
                    raise end
                assert isinstance(end, GenerationResult)
                results[index] = end
        finally:
            scheduler.close()
        return [results[index] for index in range(len(requests))]

    def chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        *,
        context: int = 0,
        prefetch: bool = True,
        draft: Draft = None,
        draft_tokens: int | None = None,
        **options: Unpack[ChatOptions],
    ) -> GenerationResult:
        """The model's answer to a conversation; messages, options and errors as in `Session.stream_chat`.

        The session of the last chat is kept, and in the `prefix_cache` the state of conversations before it, so that
        one which goes on computes only what is new (`cached_tokens` of the stats). That saves time and changes nothing
        else; it costs the memory of one KV cache, and of the prefix cache, until the engine goes. Chats at the same
        moment have a session each, of which the last to end is kept. A chat with another `context`, `prefetch`, `draft`
        or `draft_tokens` than the last has a new session.
        """
        request = self.requests.chat(messages, **options)
        pool = self._pool_of((context, prefetch, draft, draft_tokens))

        def make_session() -> Session:
            return self.session(context=context, prefetch=prefetch, draft=draft, draft_tokens=draft_tokens)

        session = pool.take(request.token_ids, make_session)
        assert session is not None
        try:
            return session.run(request).finish()
        finally:
            pool.give(session)

    def _pool_of(self, key: tuple[Any, ...]) -> SessionPool:
        with self._lock:
            if self._pool is not None and self._pool[0] != key:
                self._pool[1].close()  # frees its memory before the new one's session takes some
                self._pool = None
            if self._pool is None:
                self._pool = key, SessionPool(self.prefix_cache, 1)
            return self._pool[1]

    def logits(self, token_ids: Sequence[int], start: int = 0) -> NDArray[np.float32]:
        """float32 [len(token_ids) - start, vocab_size]: row i predicts the token after token_ids[: start + i + 1].
        Nothing is added to the tokens. ValueError if there are none, too many for the model, or one is out of the
        vocabulary, and for a `start` that is none of their positions."""
        token_ids = check_token_ids("token_ids", token_ids)
        if len(token_ids) > self.context:
            raise ValueError(f"{len(token_ids)} tokens do not fit the model's context of {self.context}; pass fewer")
        return self.session(context=len(token_ids)).logits(token_ids, start)


Draft = Engine | Literal["lookup"] | None
"""Where the guesses of speculative decoding come from: see `Engine.session`."""


def _make_drafter(engine: Engine, draft: Draft) -> _core.MakeDrafter | None:
    """ValueError for a draft that cannot be one of `engine`."""
    if isinstance(draft, Engine):
        if draft.requests.prompts.tokens_digest != engine.requests.prompts.tokens_digest:
            raise ValueError(
                f"{draft.path}: a draft model needs the tokenizer of {engine.path}, whose tokens are others; "
                "choose a smaller model of the same family"
            )
        return _core.MakeDrafter.draft_model(draft._core)
    if draft == "lookup":
        return _core.MakeDrafter.prompt_lookup()
    if draft is None:
        return None
    error = ValueError if isinstance(draft, str) else TypeError
    raise error(f'draft must be an Engine, "lookup" or None, got {shown(draft)}')


def _check_draft_tokens(draft: Draft, draft_tokens: int | None) -> int:
    if draft_tokens is None:
        return _core.SessionOptions.DEFAULT_DRAFT_TOKENS
    if draft is None:
        raise ValueError('draft_tokens is of a draft, and there is none; add draft="lookup" or a draft model')
    return check_integer("draft_tokens", draft_tokens, _core.SessionOptions.MOST_DRAFT_TOKENS, 1)


def find_onnxruntime() -> Path:
    """The shared library inside the `onnxruntime` distribution; the Python package itself is never imported."""
    spec = find_spec("onnxruntime")
    roots = spec.submodule_search_locations if spec and spec.submodule_search_locations else []
    libraries = sorted(library for root in roots for library in Path(root, "capi").glob("libonnxruntime.so*"))
    if not libraries:
        where = roots[0] if roots else "no such package is installed"
        raise ImportError(
            f"ONNX Runtime's libonnxruntime.so not found ({where}); run `pip install --force-reinstall onnxruntime`"
        )
    return libraries[0]


def find_qnn_provider() -> Path:
    """The shared library of ONNX Runtime's QNN provider, in the distribution `onnxruntime-qnn`."""
    try:
        import onnxruntime_qnn
    except ImportError as error:
        raise ImportError(
            "the provider qnn needs the package onnxruntime-qnn; run `pip install 'meki[qnn]'`"
        ) from error
    return Path(onnxruntime_qnn.get_library_path())
