"""Fuzz targets in Python: what reads other programs' files. Each takes any bytes; what it raises is a finding.

An input is accepted, or refused with the errors that the reader documents. Time, memory and the death of the process
are the caller's to watch: fuzz/guided.py, or tests/fuzz/test_seeds.py for the inputs that are kept.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import io
import resource
import shutil
import signal
import struct
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from meki import Engine, PackageError, SessionFileError, _core
from meki.chat import ChatTemplate, parse_template
from meki.models.checkpoints import CheckpointError, open_checkpoint
from meki.models.checkpoints.checkpoint import checkpoint_source
from meki.models.tokenizer import parse_tokenizer
from meki.prompt import PromptEncoder

SEEDS = Path(__file__).with_name("seeds")
MOST_MEMORY = 4 << 30
"""Bytes, far beyond any input; PyTorch takes some."""


@functools.cache
def scratch(name: str) -> Path:
    """A directory of this process, which goes away when it ends."""
    path = Path(tempfile.mkdtemp(prefix=f"meki-fuzz-{name}-"))
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return path


def convert(path: Path) -> None:
    """What `meki-convert` does with a checkpoint before it writes: every weight is read, and the tokenizer."""
    with contextlib.suppress(CheckpointError):
        checkpoint = open_checkpoint(path, {})
        source = checkpoint_source(checkpoint)
        for name in checkpoint.parts:
            source.weights(name)
            if source.blocks is not None:
                source.blocks.read(name)
    with contextlib.suppress(ValueError):  # of the tokenizer and what stands beside it
        open_checkpoint(path, {}).read_tokenizer()


def safetensors(data: bytes) -> None:
    """As model.safetensors beside a good config.json."""
    folder = scratch("safetensors")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_bytes((SEEDS / "config" / "llama").read_bytes().partition(b"\0")[0])
    (folder / "model.safetensors").write_bytes(data)
    convert(folder)


def quantized(data: bytes) -> None:
    """As config.json, and, behind the first zero byte, as model.safetensors."""
    folder = scratch("quantized")
    text, _, tensors = data.partition(b"\0")
    (folder / "config.json").write_bytes(text)
    (folder / "model.safetensors").write_bytes(tensors)
    convert(folder)


CONFIGS = ("config.json", "tokenizer_config.json", "generation_config.json", "special_tokens_map.json")


def config(data: bytes) -> None:
    """As the CONFIGS, a zero byte between two, beside good weights and a good tokenizer.json."""
    folder = scratch("config")
    if not (folder / "tokenizer.json").exists():
        shutil.copy(SEEDS / "safetensors" / "llama", folder / "model.safetensors")
        shutil.copy(SEEDS / "tokenizer" / "bpe", folder / "tokenizer.json")
    texts = data.split(b"\0")
    for name, text in zip(CONFIGS, texts + [b"{}"] * len(CONFIGS), strict=False):
        (folder / name).write_bytes(text)
    convert(folder)


def index(data: bytes) -> None:
    """As model.safetensors.index.json of a folder whose weights are in two files."""
    folder = scratch("index")
    if not (folder / "config.json").exists():
        (folder / "config.json").write_bytes((SEEDS / "config" / "llama").read_bytes().partition(b"\0")[0])
        shutil.copy(SEEDS / "safetensors" / "llama", folder / "a.safetensors")
        shutil.copy(SEEDS / "safetensors" / "head", folder / "b.safetensors")
    (folder / "model.safetensors.index.json").write_bytes(data)
    convert(folder)


def gguf(data: bytes) -> None:
    """As a GGUF file."""
    path = scratch("gguf") / "model.gguf"
    path.write_bytes(data)
    convert(path)


def torch_zip(data: bytes) -> None:
    """As a file of torch.save; what is no zip, as the pickle in one."""
    path = scratch("torch_zip") / "model_optim_rng.pt"
    if not data.startswith(b"PK"):
        file = io.BytesIO()
        with zipfile.ZipFile(file, "w") as archive:
            members = {"data.pkl": data, "byteorder": b"little", "version": b"3\n"}
            members |= {f"data/{storage}": bytes(256) for storage in range(8)}
            for name, content in members.items():
                archive.writestr(f"archive/{name}", content)
        data = file.getvalue()
    path.write_bytes(data)
    convert(path)


MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hello <|im_start|> {{ 1 }}"},
    {"role": "assistant", "content": "Yes?\n"},
    {"role": "user", "content": ""},
]


class TooLongError(BaseException):
    """A template may compute as long as it likes: that is no finding, and not to be caught by it."""


@contextlib.contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """Of the processor."""

    def end(number: int, frame: FrameType | None) -> None:
        raise TooLongError

    before = signal.signal(signal.SIGVTALRM, end)  # SIGALRM is libFuzzer's
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


@contextlib.contextmanager
def memory_limit(more: int) -> Iterator[None]:
    """What makes the address space grow by so many bytes is a MemoryError, as on a small machine."""
    before, most = resource.getrlimit(resource.RLIMIT_AS)
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + more, most))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (before, most))


def chat_template(data: bytes) -> None:
    """As a package's chat template, on a conversation."""
    path = scratch("chat_template") / "chat_template.jinja"
    path.write_bytes(data)
    if b"**" in data:  # a power may take for ever, and no signal ends it: it is parsed alone
        with contextlib.suppress(ValueError):
            parse_template(data.decode())
        return
    # MemoryError: of a template that makes a huge text.
    with contextlib.suppress(ValueError, PackageError, TooLongError, MemoryError), time_limit(2):
        text = ChatTemplate(path, {"bos_token": "<s>", "eos_token": "</s>"}).render(MESSAGES)
        assert isinstance(text, str)


def tokenizer(data: bytes) -> None:
    """As tokenizer.json, of a checkpoint and of a package.

    The tokenizers library aborts the process where it finds no memory, which cannot be caught; so left out is what asks
    for as much as it says.
    """
    if b"precompiled_charsmap" in data:
        return
    with contextlib.suppress(ValueError):
        parse_tokenizer(data)
    folder = scratch("tokenizer")
    (folder / "tokenizer.json").write_bytes(data)
    manifest = {
        "tokenizer": {"file": "tokenizer.json", "bos_token_id": None, "eos_token_ids": [0], "chat_template": None},
        "architecture": {"vocab_size": 1 << 20},
    }
    with contextlib.suppress(PackageError):
        encoder = PromptEncoder(folder, manifest)
        for text in ("", "A word, 1 number.\n", "\u00e9\U0001f600 <s>"):
            encoder.encode(text, first=True)


TINY = SEEDS.parents[1] / "models" / "packages" / "meki-tiny"


@functools.cache
def tiny() -> Engine:
    return Engine(TINY, threads=1, kv_type="int4")


def sealed_session(data: bytes) -> bytes:
    """A session file of `tiny()` whose header has the sizes that the input begins with, and right checksums, and whose
    tokens and state are the rest."""
    path = scratch("session") / "empty"
    if not path.exists():
        tiny().session().save(path)
    head, content = bytearray(path.read_bytes()[:252]), data[32:]
    sizes = head[16:48] = data[:32].ljust(32, b"\0")
    tokens, _, state_bytes, _ = struct.unpack("<4Q", sizes)
    ids, state = content[: 4 * tokens], content[4 * tokens : 4 * tokens + state_bytes]
    struct.pack_into("<I", head, 116, _core.crc32c(ids))
    checksums = [_core.crc32c(state[begin : begin + (1 << 20)]) for begin in range(0, len(state), 1 << 20)]
    parts = (head, struct.pack("<I", _core.crc32c(head)), content, struct.pack(f"<{len(checksums)}I", *checksums))
    return b"".join(parts)


def session(data: bytes) -> None:
    """As a session file of a small model, as it is and sealed; what is accepted goes on, whatever its state is."""
    path = scratch("session") / "file"
    for content in (data, sealed_session(data)):
        path.write_bytes(content)
        its = tiny().session(context=64)
        its.logits([1, 2, 3])
        try:
            its.load(path)
        except (SessionFileError, ValueError):
            assert its.tokens == [1, 2, 3]
            continue
        with contextlib.suppress(PackageError):  # of values that are not finite
            its.generate([1], max_new_tokens=2)


TARGETS: dict[str, Callable[[bytes], None]] = {
    target.__name__: target
    for target in (safetensors, config, index, quantized, gguf, torch_zip, chat_template, tokenizer, session)
}
