"""meki-serve: models behind HTTP."""

from __future__ import annotations

import argparse
import ipaddress
import os
import sys
from collections.abc import Sequence
from contextlib import closing

from ..async_engine import AsyncEngine
from ..engine import Engine
from .arguments import Parser, add_engine_options, engine_options, integer, text_file
from .errors import note, run_command

API_KEY = "MEKI_API_KEY"


def main(argv: Sequence[str] | None = None) -> int:
    """The exit code: 0, 1 failure, 2 usage, 130 interrupted."""
    parser = _parser()
    return run_command(parser.prog, lambda: _serve(parser.parse_args(argv), parser.prog), "[serve]")


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "meki-serve",
        description="Serve models over HTTP, in the form of OpenAI's API.",
        epilog="Needs pip install 'meki[serve]'. Reference: docs/server.md",
    )
    parser.add_argument("models", nargs="+", metavar="MODEL", help="name or package directory")
    add = parser.add_argument_group("server").add_argument
    add("--host", default="127.0.0.1", help="address or name to listen on (default: %(default)s, this machine alone)")
    add("--port", type=integer(0, 65535), default=8080, metavar="N", help="default: %(default)s; 0: a free one")
    add(
        "--api-key", metavar="KEY", help=f"what callers must show (default: {API_KEY} of the environment, if it is set)"
    )
    add(
        "--allowed-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a name that callers know this server by, besides localhost and addresses; may be repeated",
    )
    add(
        "--cors-origin",
        type=_origin,
        action="append",
        default=[],
        metavar="URL",
        help="an origin whose pages may use the server, as in https://example.org; may be repeated (default: none)",
    )
    add(
        "--parallel",
        type=integer(1, 256),
        default=4,
        metavar="N",
        help="generations of a model at once, each with a KV cache (default: %(default)s)",
    )
    add(
        "--queue",
        type=integer(0, 4096),
        default=64,
        metavar="N",
        help="generations of a model that may wait; more are told to come back later (default: %(default)s)",
    )
    add = add_engine_options(parser)
    add(
        "--context",
        type=integer(1),
        metavar="N",
        help="tokens of a prompt and its answer (default: the model's, at most 4096)",
    )
    add("--chat-template", type=text_file, metavar="FILE", help="a Jinja template in place of the packages' own")
    return parser


def _origin(text: str) -> str:
    """As browsers write it."""
    if text == "*":
        raise argparse.ArgumentTypeError("'*' would let in any page; name the origins, as in https://example.org")
    return text.rstrip("/")


def _serve(arguments: argparse.Namespace, program: str) -> None:
    from ..server.run import HttpServer, listen
    from ..server.settings import Settings
    from ..server.state import Model, Server

    def open_model(name: str) -> Model:
        engine = Engine(name, chat_template=arguments.chat_template, **engine_options(arguments))
        context = min(arguments.context or 4096, engine.context)
        runner = AsyncEngine(engine, parallel=arguments.parallel, waiting=arguments.queue, context=context)
        return Model(engine.name if os.path.isdir(name) else name, runner, context)

    settings = Settings(
        host=arguments.host,
        api_key=(arguments.api_key or os.environ.get(API_KEY) or "").strip() or None,
        allowed_hosts=tuple(arguments.allowed_host),
        cors_origins=tuple(arguments.cors_origin),
    )
    with closing(listen(arguments.host, arguments.port)) as listener:
        models = [open_model(name) for name in arguments.models]
        names = [model.name for model in models]
        if len(set(names)) < len(names):
            raise ValueError(
                f"two of the models have the same name, of {', '.join(names)}; callers could not tell them"
            )
        if not _is_loopback(listener.getsockname()[0]):
            open_to_all = "" if settings.api_key else ", and nothing keeps them out: give an --api-key"
            note(f"{program}: warning: other machines can reach this server{open_to_all}")
        address, port = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        described = ", ".join(m.name + (" (random weights)" if m.engine.random_weights else "") for m in models)
        print(f"http://{shown}:{port} serves {described}", flush=True)
        HttpServer(Server(models, settings)).run([listener])


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback


if __name__ == "__main__":
    sys.exit(main())
