"""The detached signature of a package: Ed25519 over the bytes of manifest.json, which has the hash of every file."""

from __future__ import annotations

from pathlib import Path

from .. import _core
from .files import MANIFEST

SIGNATURE = f"{MANIFEST}.sig"


def check_signature(directory: Path, key: Path) -> None:
    """PackageError unless the manifest of `directory` is signed with the private half of `key`.

    key: an Ed25519 public key in PEM form. ValueError if it is none, OSError if it cannot be read, ImportError without
    the extra `signatures`.
    """
    try:
        from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise ImportError("signatures need the package cryptography; run `pip install 'meki[signatures]'`") from error

    if not key.is_file():
        raise ValueError(f"{key}: no such key; {_EXPECTED}")
    try:
        public = load_pem_public_key(key.read_bytes())
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(f"{key}: not a public key in PEM form: {error}; {_EXPECTED}") from error
    if not isinstance(public, Ed25519PublicKey):
        raise ValueError(f"{key}: a key of another kind, {type(public).__name__}; {_EXPECTED}")
    path = directory / SIGNATURE
    if not path.exists():
        raise _core.PackageError(f"{path}: no such file, so nobody has signed the package; get it from who made it")
    try:
        public.verify(path.read_bytes(), (directory / MANIFEST).read_bytes())
    except InvalidSignature as error:
        raise _core.PackageError(
            f"{path}: not a signature of {MANIFEST} by {key}; the package was changed after it was signed, or another "
            "key has signed it"
        ) from error


_EXPECTED = "give an Ed25519 public key, as `openssl pkey -pubout` writes it"
