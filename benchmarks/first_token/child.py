"""One process from its start to a model's first token, on the way of `meki-run`; `__main__.py` runs it as a file.

    python child.py STARTED MODEL THREADS PROMPT [TRACE]

STARTED: time.monotonic() before the process was started. TRACE: prefix of ONNX Runtime's traces, if there are to be
some. Prints a JSON object of seconds: by part, in their order; "engine" and "tokenizer", which are read beside each
other and together "opening"; "prefill", of "first token"; and "total". Imports nothing that `meki-run` does not.
"""

from __future__ import annotations

import time

LOADED = time.monotonic()

import sys  # noqa: E402 (what is imported counts)

TYPE_CHECKING = False
if TYPE_CHECKING:  # typing takes a while to load, which is a part of what is measured
    from typing import Any


def timed(parts: dict[str, float], part: str, function: Any) -> Any:
    """`function`, whose time is added to that of `part`."""

    def run(*args: Any, **kwargs: Any) -> Any:
        begin = time.monotonic()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] = parts.get(part, 0.0) + time.monotonic() - begin

    return run


class Core:
    """The module meki._core, with `Engine.open` replaced."""

    def __init__(self, core: Any, open_engine: Any) -> None:
        self._core = core
        self.Engine = type("Engine", (), {"open": staticmethod(open_engine)})

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


def main(started: str, model: str, threads: str, prompt: str, trace: str = "") -> None:
    parts = {"interpreter": LOADED - float(started)}
    timed(parts, "imports", __import__)("meki.cli.run")
    module: Any = sys.modules["meki.engine"]
    for name in ("find_model", "read_manifest", "check_parsed_files"):
        setattr(module, name, timed(parts, "manifest and checksums", getattr(module, name)))
    module._core = Core(module._core, timed(parts, "engine", module._core.Engine.open))
    module.PromptEncoder = timed(parts, "tokenizer", module.PromptEncoder)
    begin = time.monotonic()
    engine = module.Engine(model, threads=int(threads), profile=trace)
    parts["opening"] = time.monotonic() - begin - parts["manifest and checksums"]
    begin = time.monotonic()
    stream = engine.session().stream(prompt, max_new_tokens=1, temperature=0.0, ignore_eos=True)
    stream.finish()
    end = time.monotonic()
    parts["first token"] = end - begin
    parts["prefill"] = stream._core.stats.prefill_ns / 1e9
    parts["total"] = end - float(started)

    import json

    print(json.dumps(parts))


if __name__ == "__main__":
    main(*sys.argv[1:])
