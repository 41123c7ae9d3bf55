"""A stand-in for a phone: the device's side of adb's protocol on loopback, for the real adb client.

Serves `shell,v2` and `sync` (STAT, SEND, RECV) to one adb server at a time. Commands run in the host's /bin/sh; the
paths of the phone that benchmarks use are replaced by paths below a private directory, and what only a phone has
(getprop, dumpsys, df) are scripts there that print what the test has written. The processor is an interpreter: a file
with an aarch64 ELF header runs the Python source behind its header.

Protocol: packages/modules/adb of AOSP, protocol.txt, SYNC.TXT and shell_protocol.h.
"""

from __future__ import annotations

import contextlib
import errno
import os
import queue
import re
import signal
import socket
import stat
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

VERSION, MAX_DATA = 0x01000001, 256 * 1024  # from this version on, packets need no checksum
BANNER = b"device::ro.product.name=standin;ro.product.model=Stand-in;features=shell_v2,cmd"
TOKEN, PUBLIC_KEY = 1, 3
STDOUT, STDERR, EXIT = 1, 2, 3
MOUNTS = "/data/local/tmp", "/sys/class/power_supply"


def elf(body: str = "", machine: int = 183) -> bytes:
    """A 64-bit ELF header of this machine, and what the stand-in's processor runs: Python source."""
    return b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HHI", 3, machine, 1) + bytes(40) + body.encode()


def _read(connection: socket.socket, size: int) -> bytes:
    data = b""
    while len(data) < size:
        block = connection.recv(size - len(data))
        if not block:
            raise ConnectionError("closed")
        data += block
    return data


class Stream:
    """One service that the server has opened: a thread of ours on a pair of queues."""

    def __init__(self, phone: Phone, local: int, remote: int) -> None:
        self.phone, self.local, self.remote = phone, local, remote
        self.inbox: queue.Queue[bytes | None] = queue.Queue()
        self.acknowledged = threading.Semaphore(0)
        self.buffer = b""
        self.closed = False
        self.writing = threading.Lock()

    def write(self, data: bytes) -> None:
        with self.writing:
            for start in range(0, len(data), MAX_DATA):
                if self.closed:
                    raise ConnectionError("closed")
                self.phone.send(b"WRTE", self.local, self.remote, data[start : start + MAX_DATA])
                self.acknowledged.acquire()

    def read(self, size: int) -> bytes:
        while len(self.buffer) < size:
            block = self.inbox.get()
            if block is None:
                raise ConnectionError("closed")
            self.buffer += block
        data, self.buffer = self.buffer[:size], self.buffer[size:]
        return data

    def close(self) -> None:
        self.closed = True
        self.inbox.put(None)
        self.acknowledged.release()


class Phone:
    """The stand-in and its wires. Files of the phone are below `root`; attributes may be changed at any time."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.authorized = True
        self.space: int | None = None
        """Bytes that the phone takes before its storage is full."""
        self.unplug_after: int | None = None
        """Bytes that the phone takes before the cable is pulled."""
        self.received: list[tuple[str, int]] = []
        """Path and bytes of each file that arrived, in order."""
        self.commands: list[str] = []
        self._connection: socket.socket | None = None
        self._sending = threading.Lock()
        self._streams: dict[int, Stream] = {}
        self._children: set[subprocess.Popen[bytes]] = set()
        for path in MOUNTS:
            (root / path[1:]).mkdir(parents=True)
        (root / "bin").mkdir()
        self._processor = self._script(
            "processor",
            "import sys\nsource = open(sys.argv[1], 'rb').read()[64:]\nsys.argv = sys.argv[1:]\nexec(source)",
            sys.executable,
        )
        for name in ("getprop", "dumpsys"):
            self._script(name, f'cat "{root}/{name}/$1" 2>/dev/null || true')
            (root / name).mkdir()
        self._script("df", f'cat "{root}/df"')
        self._script("sync", ":")  # the host's own would wait for everything that is written on it
        self._port = 0
        self.plug()
        self.serial = f"127.0.0.1:{self._port}"

    def path(self, name: str) -> Path:
        """Where a file of the phone is on the host."""
        return self.root / name.lstrip("/")

    def set(self, kind: str, **values: object) -> None:
        """What `getprop` or `dumpsys` answers; in names `__` stands for a dot."""
        for name, value in values.items():
            (self.root / kind / name.replace("__", ".")).write_text(f"{value}\n")

    def plug(self) -> None:
        """Can be connected to from now on, at the same address each time."""
        self._listener = socket.create_server(("127.0.0.1", self._port))
        self._port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def unplug(self) -> None:
        """Cannot be reached any more; what runs on the phone goes on."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)  # wakes the thread in accept
        self._listener.close()
        if connection := self._connection:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self.unplug()
        for child in list(self._children):
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
            child.wait()

    def send(self, command: bytes, first: int, second: int, data: bytes = b"") -> None:
        (code,) = struct.unpack("<I", command)
        header = struct.pack("<6I", code, first, second, len(data), 0, code ^ 0xFFFFFFFF)
        with self._sending:
            if self._connection is None:
                raise ConnectionError("unplugged")
            self._connection.sendall(header + data)

    def _script(self, name: str, body: str, interpreter: str = "/bin/sh") -> Path:
        path = self.root / "bin" / name
        path.write_text(f"#!{interpreter}\n{body}\n")
        path.chmod(0o755)
        return path

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            with connection:
                connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # or small answers wait 40 ms
                self._connection = connection
                with contextlib.suppress(OSError):  # ConnectionError is one
                    self._serve(connection)
                self._connection = None
                for stream in list(self._streams.values()):
                    stream.close()
                self._streams.clear()

    def _serve(self, connection: socket.socket) -> None:
        while True:
            command, first, second, size, _, _ = struct.unpack("<4s5I", _read(connection, 24))
            data = _read(connection, size)
            stream = self._streams.get(second)
            if command == b"CNXN":
                if self.authorized:
                    self.send(b"CNXN", VERSION, MAX_DATA, BANNER)
                else:
                    self.send(b"AUTH", TOKEN, 0, bytes(range(20)))
            elif command == b"AUTH" and first != PUBLIC_KEY:  # no signature is good; its public key waits for the owner
                self.send(b"AUTH", TOKEN, 0, bytes(range(20)))
            elif command == b"OPEN":
                local = len(self.commands) + 1
                self.commands.append(data.rstrip(b"\0").decode())
                stream = self._streams[local] = Stream(self, local, first)
                self.send(b"OKAY", local, first)
                threading.Thread(target=self._service, args=(stream, self.commands[-1]), daemon=True).start()
            elif stream and command == b"OKAY":
                stream.acknowledged.release()
            elif stream and command == b"WRTE":
                stream.inbox.put(data)
                self.send(b"OKAY", second, first)
            elif stream and command == b"CLSE":
                stream.close()
                del self._streams[second]

    def _service(self, stream: Stream, name: str) -> None:
        with contextlib.suppress(OSError):
            try:
                if name.startswith("shell,v2"):
                    self._shell(stream, name.split(":", 1)[1])
                elif name.startswith("sync:"):
                    self._sync(stream)
            finally:
                self.send(b"CLSE", stream.local, stream.remote)

    def _localize(self, text: str) -> str:
        for path in MOUNTS:
            text = text.replace(path, str(self.root) + path)
        return text

    def _shell(self, stream: Stream, command: str) -> None:
        command = re.sub(r"(?<=\s)(?=\./\w+ )", f"{self._processor} ", self._localize(command))
        child = subprocess.Popen(
            ["/bin/sh", "-c", command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env={"PATH": f"{self.root / 'bin'}:/usr/bin:/bin"},
            process_group=0,
        )
        self._children.add(child)
        readers = [
            threading.Thread(target=self._forward, args=(stream, kind, pipe.fileno()), daemon=True)
            for kind, pipe in ((STDOUT, child.stdout), (STDERR, child.stderr))
            if pipe
        ]
        for reader in readers:
            reader.start()
        for reader in readers:
            reader.join()
        with child:  # closes the pipes
            status = child.wait()
        self._children.discard(child)
        stream.write(struct.pack("<BIB", EXIT, 1, status & 0xFF))

    def _forward(self, stream: Stream, kind: int, pipe: int) -> None:
        """Whether or not anybody still listens, the pipe is emptied, as a phone's process goes on after unplugging."""
        while data := os.read(pipe, 4096):
            with contextlib.suppress(OSError):
                stream.write(struct.pack("<BI", kind, len(data)) + data)

    def _sync(self, stream: Stream) -> None:
        while True:
            request, size = struct.unpack("<4sI", stream.read(8))
            if request == b"QUIT":
                return
            name = stream.read(size).decode()
            if request == b"STAT":
                try:
                    found = self.path(name).stat()
                    answer = found.st_mode, found.st_size, int(found.st_mtime)
                except OSError:
                    answer = 0, 0, 0
                stream.write(struct.pack("<4s3I", b"STAT", *answer))
            elif request == b"SEND":
                self._receive(stream, name)
            elif request == b"RECV":
                try:
                    data = self.path(name).read_bytes()
                except OSError as error:
                    self._fail(stream, error)
                    continue
                for start in range(0, len(data), 65536):
                    block = data[start : start + 65536]
                    stream.write(struct.pack("<4sI", b"DATA", len(block)) + block)
                stream.write(struct.pack("<4sI", b"DONE", 0))

    def _receive(self, stream: Stream, request: str) -> None:
        name, mode = request.rsplit(",", 1)
        path, failed, total = self.path(name), None, 0
        with contextlib.ExitStack() as stack:
            try:
                file = stack.enter_context(path.open("wb"))
            except OSError as error:
                failed = error
            for block in self._blocks(stream):
                self._count(len(block))
                total += len(block)
                if failed is None and self.space is not None:
                    self.space -= len(block)
                    if self.space < 0:
                        failed = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                if failed is None:
                    file.write(block)
        if failed:
            self._fail(stream, failed)
            return
        path.chmod(stat.S_IMODE(int(mode)))
        self.received.append((name, total))
        stream.write(struct.pack("<4sI", b"OKAY", 0))

    def _count(self, size: int) -> None:
        if self.unplug_after is not None:
            self.unplug_after -= size
            if self.unplug_after < 0:
                self.unplug_after = None
                self.unplug()
                raise ConnectionError("unplugged")

    @staticmethod
    def _blocks(stream: Stream) -> Iterator[bytes]:
        while True:
            kind, size = struct.unpack("<4sI", stream.read(8))
            if kind == b"DONE":  # its size is the time of modification
                return
            yield stream.read(size)

    @staticmethod
    def _fail(stream: Stream, error: OSError) -> None:
        message = (error.strerror or str(error)).encode()
        stream.write(struct.pack("<4sI", b"FAIL", len(message)) + message)
