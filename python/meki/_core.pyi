"""The C++ engine. Private: use `meki.Engine`. Every blocking call releases the GIL."""

from collections.abc import Sequence
from os import PathLike

import numpy as np
from numpy.typing import NDArray

class PackageError(OSError):
    """A package, or a file of one, that cannot be used: missing, damaged, inconsistent, or changed while in use."""

class EngineOptions:
    """How to open a package. Keyword arguments set the fields."""

    onnxruntime: str
    """Path of the ONNX Runtime shared library."""
    threads: int
    """Compute threads; 0: one per available core."""
    rom_access: str
    """One of "pread" (default), "mmap" and "direct" (O_DIRECT)."""
    kv_type: str | None
    """How keys and values are stored: "float32", "float16", "int8" or "int4"; None: int8 with the provider "cpu", and
    float16 with "qnn", which has no other."""
    provider: str
    """What computes: "cpu" (default), or "qnn": the stages that are compiled for a chip, on its NPU."""
    soc: str
    """The compiled chip, by its name in the manifest; empty: the only one there is."""
    def __init__(
        self,
        *,
        onnxruntime: str | PathLike[str],
        threads: int = 0,
        rom_access: str = "pread",
        kv_type: str | None = None,
        memory: bool = True,
        rom_delay_us: int = 0,
        profile: str | PathLike[str] = "",
        provider: str = "cpu",
        qnn_library: str | PathLike[str] = "",
        soc: str = "",
    ) -> None:
        """memory: False runs the package's backbone without its memory. rom_delay_us: microseconds that every bundle
        read takes longer, to imitate slow storage. profile: ONNX Runtime writes a trace of each stage, in Chrome's
        format, into a file whose name begins so; complete when the engine and its sessions are gone. qnn_library:
        libonnxruntime_providers_qnn.so, for the provider "qnn"."""

class SessionOptions:
    """What one session needs."""

    context: int
    """Capacity of the KV cache in tokens; 0: the engine's context, at most 4096."""
    prefetch: bool
    """Read rows on the I/O thread ahead of their use; False reads them on the compute thread."""
    chunk: int
    """Prompt tokens of one prefill step; with the provider "qnn" at most those it is compiled for."""
    def __init__(self, *, context: int = 0, prefetch: bool = True, chunk: int = 256) -> None: ...

class SamplingOptions:
    """How the next token is chosen. Applied in this order: repetition penalty, temperature, top-k, top-p, min-p."""

    temperature: float
    """0: the most probable token."""
    top_k: int
    """Keep the k most probable tokens; 0: all."""
    top_p: float
    """Keep the fewest most probable tokens whose probabilities sum to at least this; 1: all."""
    min_p: float
    """Drop tokens less probable than this times the most probable one's; 0: none."""
    repetition_penalty: float
    """Divide positive and multiply negative logits of tokens already in the sequence; 1: off."""
    seed: int
    """Seed of the random generator, 0 .. 2**64 - 1."""
    def __init__(
        self,
        *,
        temperature: float = 0.8,
        top_k: int = 0,
        top_p: float = 0.95,
        min_p: float = 0.0,
        repetition_penalty: float = 1.0,
        seed: int = 0,
    ) -> None: ...

class Sampler:
    """Chooses token ids. Not thread-safe."""

    def __init__(self, options: SamplingOptions, vocab_size: int) -> None:
        """ValueError if an option is outside its range."""
    def sample(self, logits: NDArray[np.float32], sequence: Sequence[int]) -> int:
        """One token id. logits: float32 [vocab_size]; sequence: the tokens so far, for the repetition penalty."""

class Stats:
    """Counters of one session since it was made or last reset. A copy: it does not change."""

    prefill_tokens: int
    prefill_ns: int
    decode_tokens: int
    decode_ns: int
    sample_ns: int
    """Of decode_ns: choosing tokens."""
    rom_requests: int
    """Bundles read."""
    rom_bytes: int
    """Bytes read: bundles without their padding (with O_DIRECT, the blocks around them)."""
    stall_ns: list[int]
    """Nanoseconds that each decode step waited for its rows; empty in a dense model."""
    prefill_stall_ns: int

class Engine:
    """An opened package. Immutable and thread-safe."""

    @staticmethod
    def open(path: str | PathLike[str], options: EngineOptions) -> Engine:
        """PackageError if the package is unusable; ValueError for bad options, such as a chip that the package is not
        compiled for; RuntimeError if ONNX Runtime or its provider cannot be loaded."""
    @property
    def vocab_size(self) -> int: ...
    @property
    def context(self) -> int:
        """Longest sequence that the model supports, in tokens; compiled stages may support less."""
    @property
    def eos_token_ids(self) -> list[int]: ...
    @property
    def rom_access(self) -> str | None:
        """The access mode in use, which differs from the requested one after a fallback; None for a dense model."""
    @property
    def threads(self) -> int: ...
    @property
    def kv_type(self) -> str: ...
    @property
    def provider(self) -> str: ...
    @property
    def simulated(self) -> bool:
        """Whether a simulator of the NPU computes: results as on the chip, speed is not."""
    @property
    def shared_memory(self) -> bool:
        """Whether the KV cache is in memory that the NPU shares; if not, an NPU copies all of it each step."""
    @property
    def soc(self) -> str | None:
        """The chip whose compiled stages run; None with the provider "cpu"."""
    def drop_rom_cache(self) -> None:
        """Asks the system to forget its cached pages of the ROM, so that the next reads go to storage. Best effort."""

class Session:
    """One sequence: its tokens, KV cache and prefetcher. Use from one thread at a time."""

    def __init__(self, engine: Engine, options: SessionOptions) -> None: ...
    @property
    def context(self) -> int:
        """Capacity in tokens."""
    @property
    def tokens(self) -> list[int]:
        """The sequence so far: prompts and generated tokens."""
    def prompt(self, token_ids: Sequence[int]) -> None:
        """Appends tokens, to be computed by the next call, and ends a running generation. ValueError for an id out of
        the vocabulary or a sequence that would exceed the context (the message has both numbers)."""
    def start(self, sampling: SamplingOptions, max_new_tokens: int) -> None:
        """Begins a generation after the current sequence. 0 tokens: until the context is full. ValueError if the
        sequence is empty."""
    def next(self) -> int | None:
        """The next token, or None when the generation is over (see finish_reason). The rows of a returned token are
        already being fetched. KeyboardInterrupt is raised between two prefill chunks."""
    @property
    def finish_reason(self) -> str | None:
        """None while running, "eos", "length" (max_new_tokens reached) or "context" (cache full)."""
    def logits(self) -> NDArray[np.float32]:
        """Computes all pending tokens and returns float32 [pending, vocab_size], one row a pending token."""
    def rewind(self, length: int) -> None:
        """Keeps the first `length` tokens of the sequence."""
    def fill_synthetic(self, count: int) -> None:
        """Appends `count` arbitrary tokens with pseudo-random keys and values, as if computed: for measurements at a
        depth. ValueError if they exceed the context or tokens are pending."""
    def kv_bytes(self, tokens: int) -> int:
        """Bytes of the KV cache, all layers together, that a step reads after `tokens` tokens."""
    @property
    def stats(self) -> Stats: ...
    def reset_stats(self) -> None: ...

class RomInfo:
    """What a ROM's header says."""

    vocab_size: int
    layers: int
    row_dim: int
    row_type: str
    """One of "float32", "float16", "int8" and "int4"."""
    bundle_bytes: int
    bundle_stride: int
    file_bytes: int
    content_id: str

class Rom:
    """A ROM file. Immutable and thread-safe."""

    def __init__(self, path: str | PathLike[str], access: str = "pread") -> None:
        """PackageError if the file is not a valid ROM."""
    @property
    def info(self) -> RomInfo: ...
    @property
    def access(self) -> str:
        """The access mode in use."""
    def rows(self, token_ids: Sequence[int]) -> NDArray[np.float32]:
        """float32 [layers, len(token_ids), row_dim], each bundle checked. ValueError for an unknown id."""
    def verify(self, first: int, count: int) -> None:
        """Checks the checksums of `count` bundles from `first`. PackageError names the first bad token."""

def cpu_kernels() -> str:
    """The instruction set that attention and linear layers use: "avx512vnni", "avx2", "neon-i8mm", "neon-dotprod" or
    "portable"."""

def read_bandwidth(threads: int, bytes: int) -> float:
    """Bytes per second that `threads` threads read together, once through a buffer of `bytes` bytes in memory."""

def read_manifest(path: str | PathLike[str], provider: str = "cpu", soc: str = "") -> str:
    """Checks the package at `path` as Engine.open does with this provider and chip, without loading a graph; returns
    the manifest's JSON text. With "cpu" the compiled files may be missing, with "qnn" all but those and the ROM."""
