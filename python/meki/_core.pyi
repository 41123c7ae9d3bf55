"""
The C++ engine. Private: use meki.Engine. Every blocking call releases the GIL.
"""
from __future__ import annotations
import collections.abc
import numpy
import numpy.typing
import os
import typing
import typing_extensions
__all__: list[str] = ['Block', 'Case', 'Engine', 'EngineOptions', 'Logprobs', 'MakeDrafter', 'Measurement', 'PackageError', 'Plan', 'Rom', 'RomInfo', 'SamplingOptions', 'Session', 'SessionOptions', 'Snapshot', 'Stats', 'cpu_kernels', 'crc32c', 'measure', 'profile_decode', 'read_manifest', 'resident_memory', 'step', 'with_rows_in_ram']
class PackageError(OSError):
    """
    A package, or a file of one, that cannot be used: missing, damaged, inconsistent, or changed while in
    use.
    """
class EngineOptions:
    """
    How to open a package.
    """
    def __init__(self, *, onnxruntime: os.PathLike | str | bytes, threads: typing.SupportsInt | typing.SupportsIndex = 0, rom_access: str = 'pread', kv_type: str | None = None, memory: bool = True, row_cache: typing.SupportsInt | typing.SupportsIndex = 16777216, rom_delay_us: typing.SupportsInt | typing.SupportsIndex = 0, profile: os.PathLike | str | bytes = '', provider: str = 'cpu', qnn_library: os.PathLike | str | bytes = '', soc: str = '') -> None:
        """
        onnxruntime: path of the ONNX Runtime shared library. qnn_library: with the provider "qnn", that of
        libonnxruntime_providers_qnn.so. row_cache: bytes. rom_delay_us: microseconds that every read of the ROM takes longer.
        soc: the compiled chip; empty: the only one there is. The others are as of meki.Engine. ValueError for a
        name that does not exist.
        """
class SamplingOptions:
    """
    How the next token is chosen. Applied in this order: repetition penalty, presence and frequency penalty, logit
    bias, temperature, top-k, top-p, min-p.
    """
    MOST_LOGPROBS: typing.ClassVar[int] = 20
    def __init__(self, *, temperature: typing.SupportsFloat | typing.SupportsIndex = 0.8, top_k: typing.SupportsInt | typing.SupportsIndex = 0, top_p: typing.SupportsFloat | typing.SupportsIndex = 0.95, min_p: typing.SupportsFloat | typing.SupportsIndex = 0.0, repetition_penalty: typing.SupportsFloat | typing.SupportsIndex = 1.0, presence_penalty: typing.SupportsFloat | typing.SupportsIndex = 0.0, frequency_penalty: typing.SupportsFloat | typing.SupportsIndex = 0.0, logit_bias: collections.abc.Sequence[tuple[typing.SupportsInt | typing.SupportsIndex, typing.SupportsFloat | typing.SupportsIndex]] = (), logprobs: typing.SupportsInt | typing.SupportsIndex | None = None, seed: typing.SupportsInt | typing.SupportsIndex = 0) -> None:
        ...
    def check(self, vocab_size: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        ValueError if an option is outside its range, or a token id outside the vocabulary.
        """
    @property
    def frequency_penalty(self) -> float:
        """
        The same, times how often it has them; 0: off.
        """
    @property
    def logit_bias(self) -> list[tuple[int, float]]:
        """
        Token ids, and what is added to their logits.
        """
    @property
    def logprobs(self) -> int | None:
        """
        Tell log-probabilities, and of how many most probable tokens, at most MOST_LOGPROBS; None: none.
        """
    @property
    def min_p(self) -> float:
        """
        Drop tokens less probable than this times the most probable one's; 0: none.
        """
    @property
    def presence_penalty(self) -> float:
        """
        Subtracted from logits of tokens that the generation has; 0: off.
        """
    @property
    def repetition_penalty(self) -> float:
        """
        Divide positive and multiply negative logits of tokens already in the sequence; 1: off.
        """
    @property
    def seed(self) -> int:
        """
        Seed of the random generator, 0 to 2**64 - 1.
        """
    @property
    def temperature(self) -> float:
        """
        0: the most probable token.
        """
    @property
    def top_k(self) -> int:
        """
        Keep the k most probable tokens; 0: all.
        """
    @property
    def top_p(self) -> float:
        """
        Keep the fewest most probable tokens whose probabilities sum to at least this; 1: all.
        """
class RomInfo:
    """
    What a ROM's header says (docs/rom-format.md).
    """
    @property
    def bundle_bytes(self) -> int:
        ...
    @property
    def bundle_stride(self) -> int:
        ...
    @property
    def content_id(self) -> str:
        ...
    @property
    def entries(self) -> int:
        ...
    @property
    def file_bytes(self) -> int:
        ...
    @property
    def layers(self) -> int:
        ...
    @property
    def row_dim(self) -> int:
        ...
    @property
    def row_type(self) -> str:
        """
        One of "float32", "float16", "int8" and "int4".
        """
class Rom:
    """
    A ROM file. Immutable and thread-safe.
    """
    def __init__(self, path: os.PathLike | str | bytes) -> None:
        """
        PackageError if the file is not a valid ROM.
        """
    def verify(self, first: typing.SupportsInt | typing.SupportsIndex, count: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Checks the checksums of `count` bundles from `first` on. PackageError names the first bad bundle.
        """
    @property
    def info(self) -> RomInfo:
        ...
class Engine:
    """
    An opened package. Immutable and thread-safe.
    """
    @staticmethod
    def open(path: os.PathLike | str | bytes, options: EngineOptions) -> Engine:
        """
        PackageError if the package is unusable; ValueError for bad options, such as a chip that the package is
        not compiled for; RuntimeError if ONNX Runtime or its provider cannot be loaded.
        """
    def row_indices(self, token_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> numpy.typing.NDArray[numpy.int64]:
        """
        Numbers in the ROM of the parts that each token of a sequence needs, int64 [tokens, parts]. ValueError
        without a memory, and for an id out of the vocabulary.
        """
    @property
    def context(self) -> int:
        """
        Longest sequence that the model supports, in tokens; compiled stages may support less.
        """
    @property
    def eos_token_ids(self) -> list[int]:
        ...
    @property
    def kv_type(self) -> str:
        ...
    @property
    def provider(self) -> str:
        ...
    @property
    def rom_access(self) -> str | None:
        """
        The access mode in use, which differs from the requested one after a fallback; None without a memory.
        """
    @property
    def shared_memory(self) -> bool:
        """
        Whether the KV cache is in memory that the NPU shares; if not, an NPU copies all of it each step.
        """
    @property
    def simulated(self) -> bool:
        """
        Whether a simulator of the NPU computes: results as on the chip, speed is not.
        """
    @property
    def soc(self) -> str | None:
        """
        The chip whose compiled stages run; None with the provider "cpu".
        """
    @property
    def threads(self) -> int:
        ...
    @property
    def vocab_size(self) -> int:
        ...
class MakeDrafter:
    """
    How sessions get a drafter, for speculative decoding. Immutable.
    """
    @staticmethod
    def draft_model(model: Engine) -> MakeDrafter:
        """
        Drafts the most probable tokens of a smaller model. A session that takes it raises ValueError if their
        vocabularies have other sizes.
        """
    @staticmethod
    def prompt_lookup() -> MakeDrafter:
        """
        Drafts what followed the last tokens where they occurred before.
        """
class SessionOptions:
    """
    What one session needs.
    """
    DEFAULT_DRAFT_TOKENS: typing.ClassVar[int] = 7
    MOST_DRAFT_TOKENS: typing.ClassVar[int] = 15
    def __init__(self, *, context: typing.SupportsInt | typing.SupportsIndex = 0, prefetch: bool = True, chunk: typing.SupportsInt | typing.SupportsIndex = 256, drafter: MakeDrafter | None = None, draft_tokens: typing.SupportsInt | typing.SupportsIndex = 7) -> None:
        """
        context: capacity in tokens, 0 for the engine's, at most 4096. prefetch: read rows on the I/O thread
        ahead of their use; False reads them on the compute thread. chunk: prompt tokens of one prefill step;
        with the provider "qnn" at most those it is compiled for. drafter: None: no speculative decoding.
        draft_tokens: of a draft at most, 1 to MOST_DRAFT_TOKENS.
        """
class Stats:
    """
    Counters of one session since it was made or last reset. A copy: it does not change.
    """
    @property
    def accepted_tokens(self) -> int:
        """
        Of these: became part of the sequence.
        """
    @property
    def decode_ns(self) -> int:
        ...
    @property
    def decode_tokens(self) -> int:
        """
        That decode steps made: one each, more where drafted tokens were accepted.
        """
    @property
    def drafted_tokens(self) -> int:
        """
        That decode steps computed beyond the pending token.
        """
    @property
    def prefill_ns(self) -> int:
        ...
    @property
    def prefill_stall_ns(self) -> int:
        ...
    @property
    def prefill_tokens(self) -> int:
        ...
    @property
    def rom_bytes(self) -> int:
        """
        Bytes read: bundles without their padding (with O_DIRECT, the blocks around them).
        """
    @property
    def rom_hits(self) -> int:
        """
        Of these: were in the row cache. The others were read.
        """
    @property
    def rom_requests(self) -> int:
        """
        Bundles that were needed: of one token in a step once.
        """
    @property
    def sample_ns(self) -> int:
        """
        Of decode_ns: choosing tokens.
        """
    @property
    def stall_ns(self) -> list[int]:
        """
        Nanoseconds that each decode step waited for its rows; empty in a dense model.
        """
class Logprobs:
    """
    Natural logarithms of probabilities, all that one token was chosen from: by the logits before
    penalties, bias and temperature, and of all tokens.
    """
    @property
    def chosen(self) -> float:
        """
        Of the token itself.
        """
    @property
    def top(self) -> list[tuple[int, float]]:
        """
        Of the most probable tokens, by their ids.
        """
class Snapshot:
    """
    What a session was at one moment: see Session.snapshot. Immutable.
    """
    @property
    def state(self) -> memoryview:
        """
        Their state, read-only.
        """
    @property
    def tokens(self) -> bytes:
        """
        Those that were computed, int32, as bytes.
        """
class Session:
    """
    One sequence: its tokens, KV cache and prefetcher. Use from one thread at a time; RuntimeError tells a
    second one.
    """
    def __init__(self, engine: Engine, options: SessionOptions) -> None:
        ...
    def append(self, token_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex]) -> None:
        """
        Appends tokens, to be computed by the next call, and ends a running generation. ValueError for an id out
        of the vocabulary or a sequence that would exceed the context (the message has both numbers).
        """
    def compute(self, most: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Computes `most` pending tokens, or all if there are fewer, as a part of a prompt; how many are left. What
        `step` and `next` compute of a prompt is then less. KeyboardInterrupt is raised between two prefill chunks.
        """
    def fill_synthetic(self, count: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Appends `count` arbitrary tokens with pseudo-random keys and values, as if computed: for measurements at
        a depth. ValueError if they exceed the context or tokens are pending.
        """
    def kv_bytes(self, tokens: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes of the KV cache, all layers together, that a step reads after `tokens` tokens.
        """
    def logits(self, start: typing.SupportsInt | typing.SupportsIndex | None = None) -> numpy.typing.NDArray[numpy.float32]:
        """
        Computes all pending tokens; float32 [tokens from position `start` on, vocab_size], None standing for
        the first pending one. ValueError for a position that is not pending.
        """
    def next(self, allowed: bytes | None = None) -> int | None:
        """
        The next token, or None when the generation is over (see finish_reason). The rows of a returned token
        are already being fetched. allowed: a set of tokens to choose from, a bit each, uint32
        [(vocab_size + 31) / 32]: bit i % 32 of word i / 32 is token i; None: all. ValueError for a set that is
        too short or has no token; the next call goes on. KeyboardInterrupt is raised between two prefill chunks.
        """
    def reset_stats(self) -> None:
        ...
    def restore(self, snapshot: Snapshot) -> None:
        """
        Becomes what `snapshot` holds, of a session of the same package, provider, KV type and, with the provider
        "qnn", context. ValueError if it does not fit, or a token is outside the vocabulary; then nothing changes.
        """
    def restore_parts(self, tokens: bytes, state: typing_extensions.Buffer) -> None:
        """
        The same of a snapshot's `tokens` and `state`, each in bytes of whoever has kept them.
        """
    def rewind(self, length: typing.SupportsInt | typing.SupportsIndex) -> None:
        """
        Keeps the first `length` tokens of the sequence. Where a layer with a window does not reach back so far, all
        of them are pending.
        """
    def snapshot(self, length: typing.SupportsInt | typing.SupportsIndex | None = None) -> Snapshot:
        """
        A copy of the first `length` tokens and their state, None: of all that are computed. Where a layer with a
        window does not reach back so far, it is of no token. ValueError if fewer are computed.
        """
    def snapshot_bytes(self, length: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Bytes of the state in a snapshot of `length` tokens. ValueError for more than the context holds.
        """
    def start(self, sampling: SamplingOptions, max_new_tokens: typing.SupportsInt | typing.SupportsIndex, end_token_ids: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex] | None = None) -> None:
        """
        Begins a generation after the current sequence. 0 tokens: until the context is full. Each of
        `end_token_ids` ends it, None: each of the manifest's. ValueError if the sequence is empty.
        """
    def step(self) -> None:
        """
        Computes what `next` chooses from, for a caller to whom the allowed tokens become known meanwhile.
        """
    @property
    def context(self) -> int:
        """
        Capacity in tokens.
        """
    @property
    def finish_reason(self) -> str | None:
        """
        None while running, "eos", "length" (max_new_tokens reached) or "context" (cache full).
        """
    @property
    def logprobs(self) -> Logprobs | None:
        """
        Of the token that `next` returned last; None if the generation was started without.
        """
    @property
    def pending(self) -> int:
        """
        How many tokens at the end of the sequence are yet to be computed.
        """
    @property
    def stats(self) -> Stats:
        ...
    @property
    def tokens(self) -> list[int]:
        """
        The sequence so far: prompts and generated tokens.
        """
class Plan:
    """
    What to measure. Counts are of tokens.
    """
    GROUP: typing.ClassVar[int] = 8
    TURN: typing.ClassVar[int] = 4
    def __init__(self, *, depths: collections.abc.Sequence[typing.SupportsInt | typing.SupportsIndex], prefill: typing.SupportsInt | typing.SupportsIndex, tokens: typing.SupportsInt | typing.SupportsIndex, repetitions: typing.SupportsInt | typing.SupportsIndex, synthetic_depth: bool = False, compare: bool = False, cold: bool = False) -> None:
        """
        depths: in the cache when decode begins. prefill: 0 for none. tokens: decode steps of each contender in one
        run of a test, at least 1; to compare, a multiple of GROUP. repetitions: rounds. compare: two contenders,
        which take turns; if not, each of any number makes all of its steps in a row. cold: drop the contenders'
        rows from the page cache before every step.
        """
    def context(self, depth: typing.SupportsInt | typing.SupportsIndex) -> int:
        """
        Context that the test of decode at `depth` needs.
        """
    @property
    def compare(self) -> bool:
        ...
    @property
    def depths(self) -> list[int]:
        ...
    @property
    def prefill(self) -> int:
        ...
    @property
    def repetitions(self) -> int:
        ...
    @property
    def synthetic_depth(self) -> bool:
        ...
    @property
    def tokens(self) -> int:
        ...
    @property
    def turn(self) -> int:
        """
        Decode steps in a row.
        """
    @property
    def units(self) -> int:
        """
        How often measure() calls `progress`.
        """
class Block:
    """
    What one prefill, or some decode steps in a row, took.
    """
    @property
    def ns(self) -> int:
        """
        Inside the engine, without Python.
        """
    @property
    def rom_hits(self) -> int:
        """
        As of Stats.
        """
    @property
    def rom_requests(self) -> int:
        """
        As of Stats.
        """
    @property
    def sample_ns(self) -> int:
        """
        Of `ns`: in the sampler.
        """
    @property
    def stall_ns(self) -> list[int]:
        """
        The wait for rows: of each decode step, or of a prefill the mean of its tokens; empty in a dense
        model.
        """
    @property
    def storage_bytes(self) -> int | None:
        """
        What the whole process fetched from storage meanwhile; None: the system does not tell.
        """
    @property
    def tokens(self) -> int:
        ...
class Case:
    """
    A test: prefill of `tokens` tokens, or as many decode steps, from `depth` tokens on.
    """
    @property
    def depth(self) -> int:
        ...
    @property
    def kind(self) -> str:
        """
        "prefill" or "decode".
        """
    @property
    def kv_bytes(self) -> int | None:
        """
        Bytes of keys and values that a decode step reads in the middle of the test; None for prefill.
        """
    @property
    def tokens(self) -> int:
        ...
class Measurement:
    """
    What measure() found.
    """
    @property
    def bandwidths(self) -> dict[int, list[float]]:
        """
        Bytes/s before the first round and after each, by the number of threads, for each that a contender has.
        """
    @property
    def cases(self) -> list[Case]:
        ...
    @property
    def memory(self) -> dict | None:
        """
        resident_memory() after every test has run once.
        """
    @property
    def rounds(self) -> list[list[list[list[Block]]]]:
        """
        [repetition][case][contender]: blocks, one a turn.
        """
def cpu_kernels() -> str:
    """
    The instruction set that attention and linear layers use: "avx512vnni", "avx2", "neon-i8mm",
    "neon-dotprod" or "portable".
    """
def crc32c(data: typing_extensions.Buffer) -> int:
    """
    CRC-32C (Castagnoli, RFC 3720) of a contiguous buffer.
    """
def measure(engines: collections.abc.Sequence[Engine], plan: Plan, progress: collections.abc.Callable[[str], None], bandwidth_bytes: typing.SupportsInt | typing.SupportsIndex) -> Measurement:
    """
    Runs every test once to warm up, then `plan.repetitions` rounds of all tests; before the first round and after
    each, reads `bandwidth_bytes` of memory with as many threads as a contender has. `progress` is told what comes next. KeyboardInterrupt is raised
    between two steps. ValueError for a plan that does not fit the number of engines, its contenders.
    """
def profile_decode(engine: Engine, plan: Plan, depth: typing.SupportsInt | typing.SupportsIndex) -> tuple[Block, list[bool]]:
    """
    `plan.tokens` decode steps in one block, from a cache that is filled with `depth` tokens; and for every step of
    one token that was made, the last ones of the engine: whether the block counts it.
    """
def read_manifest(path: os.PathLike | str | bytes, provider: str = 'cpu', soc: str = '') -> str:
    """
    Checks the package at `path` as Engine.open does with this provider and chip, without loading a graph;
    returns the manifest's JSON text. With "cpu" the compiled files may be missing, with "qnn" all but those
    and the ROM.
    """
def resident_memory(rom: os.PathLike | str | bytes | None) -> dict | None:
    """
    Bytes of this process: "resident", of it "anonymous" (heap and caches), "file" (mapped files) and
    "shared"; "peak", the greatest that "resident" ever was; and "rom", what of "file" is the file `rom`,
    with "without_rom", what of "resident" is not. None where the system does not tell.
    """
def step(sessions: collections.abc.Sequence[Session]) -> None:
    """
    Session.step of distinct sessions at once: those of an engine that have one pending token and no draft are
    computed together, whose weights are then read once; the others one after the other. The results are those of
    single steps. Where a step fails for lack of a good package, the session's own `next` raises PackageError.
    ValueError for a session that is there twice or has no generation, RuntimeError for one that is in use.
    """
def with_rows_in_ram(engine: Engine) -> Engine:
    """
    The same engine on the same weights, with every row in memory: what reading them from storage is measured
    beside, and nothing that meki.Engine offers. Takes the ROM's size of memory. ValueError for a dense model,
    RuntimeError if there is not as much, PackageError for a damaged row.
    """
