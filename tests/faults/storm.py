"""Run by test_faults.py with the shim preloaded: one engine through all kinds of faults. Prints what came of each."""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path

from meki import Engine, PackageError, Session
from meki.options import GenerationOptions

KINDS = ("io-error", "interrupted", "again", "short", "nothing", "garbage", "other-file", "stall", "no-memory")
"""As the shim numbers them, from 1."""
PROMPT = "The old lighthouse stood on the cliff. " * 3
OPTIONS: GenerationOptions = {"max_new_tokens": 24, "temperature": 0}

shim = ctypes.CDLL(None)
shim.fault_arm.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_long, ctypes.c_long]
shim.fault_disarm.restype = ctypes.c_long


def main(package: str, access: str, prefetch: bool) -> None:
    inode = Path(package, "memory.rom").stat().st_ino
    engine = Engine(package, rom_access=access, threads=2, row_cache=0)  # every row is read
    assert engine.rom_access == access

    def generate(session: Session) -> list[int]:
        session.generate(PROMPT, **OPTIONS)
        return session.tokens

    expected = generate(engine.session())
    for number, kind in enumerate(KINDS, start=1):
        for after in (0, 3, 30):  # reads, or allocations: the first, one of the prompt's, one of a generated token's
            for times in (1, 1000):
                session = None if kind == "no-memory" else engine.session(prefetch=prefetch)
                shim.fault_arm(number, inode, after, times)
                try:
                    got = "right" if generate(session or engine.session(prefetch=prefetch)) == expected else "wrong"
                except (PackageError, MemoryError, RuntimeError) as error:
                    got = f"{type(error).__name__}: {error}"
                failed = shim.fault_disarm()
                # A new session, and the one that failed, which goes on from where it is.
                again = generate(engine.session(prefetch=prefetch)) == expected
                if session is not None and got != "right":
                    session.generate("", **OPTIONS)
                    again = again and session.tokens[: len(expected)] == expected
                case = {"kind": kind, "after": after, "times": times}
                print(json.dumps({**case, "failed": failed, "got": got, "again": again}))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "prefetch")
