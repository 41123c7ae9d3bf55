"""What a phone needs for a run, and bringing it there: by content, in pieces, resumable."""

from __future__ import annotations

import hashlib
import shlex
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from tqdm import tqdm

from meki.package import compiled_targets, file_sha256, target_directory

from .device import TRANSFER_TIMEOUT, AndroidError, Device, Phone

REMOTE = "/data/local/tmp/meki"
BIN = f"{REMOTE}/bin"
"""Of program and libraries; meki_bench runs here."""
PROGRAM, ONNXRUNTIME, QNN_PROVIDER = "meki_bench", "libonnxruntime.so", "libonnxruntime_providers_qnn.so"
PIECE = 64 << 20
MARGIN = 256 << 20
"""Bytes that have to stay free: one piece is there twice, and Android wants some itself."""

_AARCH64, _HEXAGON = 183, 164  # e_machine of the ELF specification
_MACHINES = {3: "x86", 40: "32-bit ARM", 62: "x86-64", _AARCH64: "aarch64", _HEXAGON: "Hexagon"}


@dataclass(frozen=True)
class Item:
    local: Path
    remote: str
    """Absolute path on the phone."""
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Target:
    """What a package was compiled for: a member of its manifest's "qnn"."""

    soc: str
    members: dict[str, Any]


def find_target(manifest: dict[str, Any], package: Path, phone: Phone, soc: str | None) -> Target:
    """The compiled target for `soc`, or for the phone's chip."""
    compiled = compiled_targets(manifest)
    key = soc or phone.chip.lower()
    if not key:
        raise AndroidError(f"{phone.model} does not name its chip (ro.soc.model): name the target with --soc")
    if key not in compiled:
        has = f"compiled for {', '.join(compiled)}" if compiled else "not compiled for any chip"
        raise AndroidError(
            f"{package}: {has}, expected {key} ({phone.model}): run `meki-compile {shlex.quote(str(package))} --soc "
            f"{key} --dense`, or name a target that runs on this chip with --soc"
        )
    return Target(key, compiled[key])


def package_items(package: Path, manifest: dict[str, Any], target: Target | None, remote: str) -> list[Item]:
    """The package's files that a run reads: what is compiled for `target` and where its rows are, or without one all.

    Sizes and sums are the manifest's; nobody has compared the files with them.
    """
    files: dict[str, dict[str, Any]] = dict(manifest["files"])
    if target:
        memory = manifest["memory"]
        rows = [memory["file"]] if memory else []
        if memory and (canonical := memory["address"].get("canonical")):
            rows.append(canonical["file"])
        files = {name: files[name] for name in rows}
        compiled = target_directory(Path(), target.soc)
        files |= {str(compiled / name): entry for name, entry in target.members["files"].items()}
    items = [Item(package / name, f"{remote}/{name}", entry["bytes"], entry["sha256"]) for name, entry in files.items()]
    return [*items, local_item(package / "manifest.json", f"{remote}/manifest.json")]


def progress(doing: str, items: Sequence[Item]) -> tqdm:
    return tqdm(desc=doing, total=sum(item.bytes for item in items), unit="B", unit_scale=True, disable=None)


def local_item(path: Path, remote: str) -> Item:
    return Item(path, remote, path.stat().st_size, file_sha256(path, lambda size: None))


def qnn_libraries(directory: Path, htp_arch: int) -> list[Path]:
    """The libraries of ONNX Runtime's QNN provider for a Hexagon of this version, from one directory."""
    version = f"libQnnHtpV{htp_arch}"
    needed = [QNN_PROVIDER, "libQnnHtp.so", "libQnnSystem.so", f"{version}Stub.so", f"{version}Skel.so"]
    missing = [name for name in needed if not (directory / name).is_file()]
    if missing:
        raise AndroidError(
            f"{directory}: lacks {', '.join(missing)}. {QNN_PROVIDER} is in the Android archive "
            "com.qualcomm.qti:onnxruntime-android-qnn of Maven Central, under jni/arm64-v8a; the others are in "
            "com.qualcomm.qti:qnn-runtime, or in the QAIRT SDK under lib/aarch64-android and "
            f"lib/hexagon-v{htp_arch}/unsigned"
        )
    # Compiled binaries need no libQnnHtpPrepare.so; what else is there belongs to the same release.
    optional = [f"{version}.so", "libQnnHtpPrepare.so", "libc++_shared.so"]
    libraries = [directory / name for name in [*needed, *optional] if (directory / name).is_file()]
    for path in libraries:
        check_elf(path, _HEXAGON if path.name in (f"{version}Skel.so", f"{version}.so") else _AARCH64)
    return libraries


def check_elf(path: Path, machine: int = _AARCH64) -> None:
    """AndroidError if the phone could not load this program or library."""
    remedy = "build it with `cmake --preset android-arm64`" if path.name == PROGRAM else "take the one for arm64-v8a"
    content = path.read_bytes()
    if len(content) < 64 or content[:4] != b"\x7fELF":
        raise AndroidError(f"{path}: not an ELF file, expected one for {_MACHINES[machine]}: {remedy}")
    got = int.from_bytes(content[18:20], "little")
    if got != machine:
        name = _MACHINES.get(got, f"machine {got}")
        raise AndroidError(f"{path}: built for {name}, expected {_MACHINES[machine]}: {remedy}")
    # The symbol version that all that is linked with glibc on aarch64 asks for; Android's libc has none so named.
    if b"GLIBC_2.17\0" in content:
        raise AndroidError(f"{path}: built for Linux with glibc, expected Android: {remedy}")


def push_items(device: Device, items: Sequence[Item]) -> None:
    """Brings files to the phone that are not there with the same content. One that was interrupted goes on after the
    last whole piece that arrived. A file has its name on the phone only when all of it is there and its sum is right.
    """
    names = shlex.join(item.remote for item in items)
    command = f'for file in {names}; do if [ -f "$file" ]; then sha256sum < "$file"; else echo; fi; done'
    sums = device.check(command, TRANSFER_TIMEOUT).splitlines()
    if len(sums) != len(items):
        raise AndroidError(f"{device.serial}: sha256sum gave {len(sums)} lines for {len(items)} files")
    missing = [item for item, line in zip(items, sums, strict=True) if line[:64] != item.sha256]
    with progress("pushing", missing) as bar:
        for item, start in zip(missing, _find_starts(device, missing), strict=True):
            _push(device, item, start, bar.update)
    device.check("sync", TRANSFER_TIMEOUT)  # pages that are not written back cannot be dropped for a cold ROM


def _find_starts(device: Device, items: Sequence[Item]) -> list[int]:
    """How many bytes of each file are there in whole pieces. AndroidError if there is no room for the others."""
    if not items:
        return []
    directories = shlex.join(sorted({str(PurePosixPath(item.remote).parent) for item in items}))
    names = shlex.join(f"{item.remote}.part" for item in items)
    sizes = f'for file in {names}; do stat -c %s "$file" 2>/dev/null || echo 0; done'
    parts = [int(line) for line in device.check(f"mkdir -p {directories} && {sizes}").splitlines()]
    starts = [min(part, item.bytes) // PIECE * PIECE for item, part in zip(items, parts, strict=True)]
    left = sum(item.bytes for item in items) - sum(starts)
    free = device.free_bytes(REMOTE)
    if free < left + MARGIN:
        raise AndroidError(
            f"{device.serial}: {free / 1e6:,.0f} MB free on the phone, expected {(left + MARGIN) / 1e6:,.0f} MB: "
            f"{left / 1e6:,.0f} to push and {MARGIN / 1e6:,.0f} to spare; free some"
        )
    return starts


def _push(device: Device, item: Item, start: int, advance: Callable[[int], object]) -> None:
    """Makes the .part file whole, of which `start` bytes are there, and renames it. Only a piece whose sum is right is
    added. `advance` is called with each piece's size in bytes."""
    part, piece = (shlex.quote(item.remote + suffix) for suffix in (".part", ".piece"))
    with item.local.open("rb") as file, tempfile.TemporaryDirectory() as directory:
        expected = hashlib.sha256()
        for _ in range(0, start, PIECE):
            expected.update(file.read(PIECE))
        there = device.check(f"truncate -s {start} {part} && sha256sum < {part}", TRANSFER_TIMEOUT)
        if there[:64] != expected.hexdigest():
            device.check(f"truncate -s 0 {part}")
            start = 0
        advance(start)
        local = Path(directory) / "piece"
        file.seek(start)
        while data := file.read(PIECE):
            local.write_bytes(data)
            device.push(local, f"{item.remote}.piece")
            _check_sum(device, item, piece, hashlib.sha256(data).hexdigest())
            device.check(f"cat {piece} >> {part} && rm {piece}", TRANSFER_TIMEOUT)
            advance(len(data))
    _check_sum(device, item, part, item.sha256)
    device.check(f"chmod 755 {part} && mv -f {part} {shlex.quote(item.remote)}")


def _check_sum(device: Device, item: Item, path: str, expected: str) -> None:
    """Removes a file of the phone that is damaged. path: quoted."""
    if device.check(f"sha256sum < {path}", TRANSFER_TIMEOUT)[:64] != expected:
        device.check(f"rm {path}")
        raise AndroidError(
            f"{item.local.name}: its SHA-256 on the phone is not that of {item.local}: the file changed, or cable or "
            "storage damage data. Repeat the command"
        )
