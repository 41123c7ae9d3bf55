"""The commands as they are installed. Until one listens to Ctrl-C (`run_command`), it ends the process, untold."""

import signal
from importlib import import_module


def run() -> int:
    return _main("meki.cli.run")


def info() -> int:
    return _main("meki.cli.info")


def list() -> int:
    return _main("meki.cli.list")


def rm() -> int:
    return _main("meki.cli.rm")


def bench() -> int:
    return _main("meki.cli.bench")


def convert() -> int:
    return _main("meki.models.convert")


def check() -> int:
    return _main("meki.models.check")


def compile() -> int:
    return _main("meki.models.qnn.compile")


def train() -> int:
    return _main("meki.models.train.command")


def study() -> int:
    return _main("meki.models.study.command")


def eval() -> int:
    return _main("meki.cli.eval")


def serve() -> int:
    return _main("meki.cli.serve")


def _main(module: str) -> int:
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:  # not where it is ignored, as by nohup
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    code: int = import_module(module).main()
    return code
