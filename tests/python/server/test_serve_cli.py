"""meki-serve as a process: how it starts and how it ends."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from meki.cli.serve import main

from .running import wait_for

ENDLESS = {"model": "meki-tiny", "prompt": "Once upon a time", "max_tokens": 450, "n": 8, "stream": True}


class Process:
    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        assert process.stdout is not None
        self.line = process.stdout.readline()
        self.url = re.match(r"http://\S+", self.line)[0]  # type: ignore[index]
        self.http = httpx.Client(base_url=self.url, timeout=60, trust_env=False)

    def end(self) -> tuple[int, str]:
        """The exit code, and what it said."""
        _, errors = self.process.communicate(timeout=60)
        return self.process.returncode, errors


@contextmanager
def process(*arguments: str, **environment: str) -> Iterator[Process]:
    command = [sys.executable, "-c", "from meki.cli.commands import serve; import sys; sys.exit(serve())"]
    with subprocess.Popen(
        [*command, "meki-tiny", *arguments, "--threads", "1", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, **environment},
    ) as started:
        try:
            process = Process(started)
            with process.http:
                yield process
        finally:
            started.kill()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 0), (signal.SIGINT, 130)])
def test_it_serves_until_it_is_told_to_stop(sent: signal.Signals, code: int) -> None:
    with process() as server:
        assert re.fullmatch(r"http://127\.0\.0\.1:\d+ serves meki-tiny\n", server.line)
        assert server.http.get("/health").json() == {"status": "ok"}
        server.process.send_signal(sent)
        assert server.end() == (code, "")


def test_what_runs_may_end() -> None:
    with process() as server, server.http.stream("POST", "/v1/completions", json=ENDLESS) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGTERM)
        assert [line for line in lines if line][-1] == "data: [DONE]"
        assert server.end() == (0, "")


def test_a_second_signal_ends_it() -> None:
    with process() as server, server.http.stream("POST", "/v1/completions", json={**ENDLESS, "n": 16}) as answer:
        lines = answer.iter_lines()
        next(lines)
        server.process.send_signal(signal.SIGINT)

        def refused() -> bool:
            with socket.socket() as other:
                return other.connect_ex(("127.0.0.1", server.http.base_url.port or 0)) != 0

        wait_for(refused)
        server.process.send_signal(signal.SIGINT)
        code, errors = server.end()
        assert code == 130 and "Traceback" not in errors, errors
        with pytest.raises(httpx.HTTPError):
            list(lines)


def test_the_key_of_the_environment() -> None:
    with process(MEKI_API_KEY="sesame\n") as server:
        assert server.http.get("/v1/models").status_code == 401
        assert server.http.get("/v1/models", headers={"x-api-key": "sesame"}).status_code == 200


@pytest.mark.parametrize(("key", "said"), [((), "give an --api-key"), (("--api-key", "x"), "other machines can reach")])
def test_other_machines(key: tuple[str, ...], said: str) -> None:
    with process("--host", "0.0.0.0", *key) as server:
        assert re.match(r"http://0\.0\.0\.0:\d+ serves", server.line)
        server.process.send_signal(signal.SIGTERM)
        code, errors = server.end()
        assert code == 0 and errors.startswith("meki-serve: warning: other machines") and said in errors


def test_an_origin_may_end_with_a_slash() -> None:
    with process("--cors-origin", "https://good.example/") as server:
        answer = server.http.get("/health", headers={"origin": "https://good.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_any_origin_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["meki-tiny", "--port", "0", "--cors-origin", "*"])
    assert "'*' would let in any page; name the origins" in capsys.readouterr().err


def test_a_port_that_is_taken(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        assert main(["meki-tiny", "--port", str(port)]) == 1
    assert f"cannot listen on 127.0.0.1, port {port}: Address already in use" in capsys.readouterr().err


def test_models_of_one_name(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["meki-tiny", "meki-tiny", "--port", "0"]) == 2
    assert "two of the models have the same name" in capsys.readouterr().err


def test_without_the_extra(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.startswith("meki.server")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert main(["meki-tiny", "--port", "0"]) == 1
    assert "pip install 'meki[serve]'" in capsys.readouterr().err


def test_random_weights_are_told(package: Path) -> None:
    """As everywhere: nobody is to take what such a model says for an answer."""
    with process(str(package)) as server:
        assert server.line.endswith(" serves meki-tiny, small (random weights)\n")
        models = json.loads(server.http.get("/v1/models").text)["data"]
        assert [(model["id"], model["random_weights"]) for model in models] == [("meki-tiny", False), ("small", True)]
