"""Servers as their callers see them: the arithmetic of the table, and this project's own server in it."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn

from benchmarks.serving import Seen, lines, main
from meki import AsyncEngine, Engine
from meki.server.app import make_app
from meki.server.settings import Settings
from meki.server.state import Model, Server


def test_lines() -> None:
    seen = Seen()
    # 5 tokens from 10.0 to 12.0; the first of each after 0.5 and 0.2 s; gaps of 0.5, 1.0 and 0.8 s.
    seen.add([10.0, 10.1], [[10.5, 11.0, 12.0], [10.3, 11.1]])
    seen.add([20.0], [[20.2, 21.0]])  # 2 tokens in 1 s; gaps of 0.8 s
    ((name, callers, *numbers),) = lines({("x", 2): seen})
    assert (name, callers) == ("x", "2")
    assert [float(number) for number in numbers] == pytest.approx([2, 200, 470, 800, 970], abs=0.5)


@pytest.fixture
def url() -> Iterator[str]:
    engine = Engine("meki-tiny", threads=1)
    app = make_app(Server([Model("meki-tiny", AsyncEngine(engine, parallel=2), engine.context)], Settings()))
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off"))
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        while not server.started:
            time.sleep(0.01)
        yield f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        server.should_exit = True
        thread.join()


def test_a_server(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"meki={url}", "--concurrency", "1", "2", "--requests", "1", "--rounds", "1", "--tokens", "8"]) == 0
    table = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in table[2:]] == [["meki", "1"], ["meki", "2"]]
    with pytest.raises(SystemExit, match="2"):
        main(["http://127.0.0.1"])
    assert "NAME=URL" in capsys.readouterr().err
