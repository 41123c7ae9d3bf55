"""Checkpoints on the Hugging Face Hub: what a conversion reads of a repository is brought into the Hub's own cache."""

from __future__ import annotations

import contextlib
import errno
import logging
import re
import sys
from collections.abc import Iterator
from pathlib import Path

from huggingface_hub import HfApi, constants, hf_hub_download
from huggingface_hub.utils import (
    GatedRepoError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
    disable_progress_bars,
)

from meki.package.store import HUB

from .checkpoints.checkpoint import CheckpointError
from .checkpoints.gguf_file import part_names
from .checkpoints.huggingface import CONFIG, INDEX, WEIGHTS, weight_files
from .tokenizer import TOKENIZER_FILES

_SOURCE = re.compile(rf"{HUB}(?P<name>[\w.-]+/[\w.-]+)(@(?P<revision>[^@/]+))?(/(?P<file>[^@]+\.gguf))?")


def is_remote(source: Path) -> bool:
    """Whether it names a checkpoint on the Hub; what is here comes first."""
    return str(source).startswith(HUB) and not source.exists()


def download(source: Path) -> tuple[Path, dict[str, str]]:
    """The checkpoint hf:ORG/NAME[@REVISION] or hf:ORG/NAME[@REVISION]/FILE.gguf as a local folder or file, and its
    provenance. Shows progress on a terminal; goes on where a connection broke. What the cache has is not loaded again.

    FileNotFoundError for a source of another form; CheckpointError for whatever the Hub does not give.
    """
    parts = _SOURCE.fullmatch(str(source))
    if parts is None:
        raise FileNotFoundError(
            f"{source}: no checkpoint on the Hugging Face Hub; expected {HUB}ORG/NAME or {HUB}ORG/NAME/FILE.gguf, "
            f"or of a branch, tag or commit {HUB}ORG/NAME@REVISION or {HUB}ORG/NAME@REVISION/FILE.gguf"
        )
    name, file = parts["name"], parts["file"]
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it warns of every try
    if not sys.stderr.isatty():
        disable_progress_bars()
    with _hub_errors(source, name):
        info = HfApi().model_info(name, revision=parts["revision"])
    files = {entry.rfilename for entry in info.siblings or ()}

    def fetch(file: str) -> Path:
        """One after the other: threads of snapshot_download would load on after Ctrl-C."""
        with _hub_errors(source, name):
            return Path(hf_hub_download(name, file, revision=info.sha))

    if file is not None:
        _check_parts(source, file, files)
        local, *_ = [fetch(part) for part in part_names(file)]
    elif CONFIG in files and {WEIGHTS, INDEX} & files:
        local = fetch(CONFIG).parent
        for beside in (*TOKENIZER_FILES, WEIGHTS if WEIGHTS in files else INDEX):
            if beside in files:
                fetch(beside)
        weights = [path.name for path in weight_files(local)]
        if missing := [weight for weight in weights if weight not in files]:
            raise CheckpointError(
                f"{source}: its {INDEX} names {missing[0]}, which is not there; choose another revision"
            )
        for weight in weights:
            fetch(weight)
    else:
        raise CheckpointError(f"{source}: has no {CONFIG} with safetensors; {_gguf_files(source, files)}")
    return local, {"source": str(source), "commit": str(info.sha)}


def _check_parts(source: Path, file: str, files: set[str]) -> None:
    """CheckpointError unless the repository has the file, or of a split model all with this one as the first."""
    parts = part_names(file)
    if file in files and file != parts[0]:
        raise CheckpointError(f"{source}: is a part of a split model; give the first, {parts[0]}")
    if missing := [part for part in parts if part not in files]:
        raise CheckpointError(f"{source}: the repository has no {missing[0]}; {_gguf_files(source, files)}")


def _gguf_files(source: Path, files: set[str]) -> str:
    """What there is to choose from, of split models their first parts."""
    found = sorted(file for file in files if file.endswith(".gguf") and part_names(file)[0] == file)
    if not found:
        return f"nor has it GGUF files, but {', '.join(sorted(files)) or 'nothing'}; choose another repository"
    return f"give one of its GGUF files, as {HUB}ORG/NAME/FILE.gguf: {', '.join(found)}"


@contextlib.contextmanager
def _hub_errors(source: Path, name: str) -> Iterator[None]:
    """CheckpointError for whatever goes wrong in there."""
    login = "log in (hf auth login), or set HF_TOKEN"
    again = "files that are complete are not loaded again"
    try:
        yield
    except GatedRepoError as error:
        conditions = f"{constants.ENDPOINT}/{name}"
        raise CheckpointError(f"{source}: is gated: accept its conditions at {conditions}, then {login}") from error
    except RepositoryNotFoundError as error:
        raise CheckpointError(
            f"{source}: {constants.ENDPOINT} has no model {name}, or it is private; check the name, or {login}"
        ) from error
    except RevisionNotFoundError as error:
        raise CheckpointError(
            f"{source}: {name} has no such revision; expected a branch, tag or commit, or none for its main branch"
        ) from error
    except Exception as error:  # of requests, httpx or hf-xet, as huggingface_hub's version has it
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise CheckpointError(
                f"{source}: there is no space left in {constants.HF_HUB_CACHE}; free some, or name a directory of "
                f"another disk in HF_HUB_CACHE, and give the command again: {again}"
            ) from error
        why = error.__cause__ or error
        raise CheckpointError(
            f"{source}: the download from {constants.ENDPOINT} failed: {type(why).__name__}: {why}; check the network "
            f"and give the command again: {again}"
        ) from error
