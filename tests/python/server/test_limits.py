"""Bad, slow and vanishing clients, over plain sockets."""

from __future__ import annotations

import contextlib
import json
import socket
import struct
from typing import Any

import anthropic
import pytest

from meki.server import run

from .running import Running, Serve, wait_for

LONG = {"model": "meki-tiny", "prompt": "Once upon a time", "max_tokens": 400, "temperature": 0, "seed": 1}


def request(body: Any, path: str = "/v1/completions") -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    head = b"POST %s HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n" % path.encode()
    return head + b"Content-Length: %d\r\n\r\n%s" % (len(data), data)


def answer_of(connection: socket.socket) -> bytes:
    """All that comes until the server closes the connection."""
    with connection, connection.makefile("rb") as file:
        return file.read()


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"\xff\xfe{}",
        b'{"model": "meki-tiny", "prompt": "\xc3"}',
        b'{"model": "meki-tiny", "prompt": "x", "temperature": NaN}',
        b'{"model": "meki-tiny", "prompt": "x", "temperature": 1e999}',
        b'{"model": "meki-tiny", "prompt": "x", "max_tokens": 1' + b"0" * 5000 + b"}",
        b'{"model": "meki-tiny", "prompt": "\\ud800"}',
        b'{"model": "meki-tiny", "prompt": "\xed\xa0\x80"}',
        b'{"model": "\\udfff", "prompt": "x"}',
        b'{"\\ud800": 1}',
        b"[" * 100_000,
        b'{"a":' * 100_000,
        b"[" * 900 + b"]" * 900,
        b"[]",
        b"null",
        b"1",
        b'{"model": 1}',
        b'{"model": "meki-tiny", "prompt": {"a": 1}}',
        b'{"model": "meki-tiny", "prompt": [1, "a"]}',
        b'{"model": "meki-tiny", "prompt": [[]]}',
        b'{"model": "meki-tiny", "prompt": []}',
        b'{"model": "meki-tiny", "prompt": "x", "stop": [[]]}',
        b'{"model": "meki-tiny", "prompt": "x", "seed": 1.5}',
        b'{"model": "meki-tiny", "prompt": "x", "stream": "yes"}',
        b'{"model": "meki-tiny", "prompt": "x", "n": 1e3}',
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize"])
def test_bad_bodies(served: Running, body: bytes, path: str) -> None:
    answer = served.post(path, body)
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["type"] == "invalid_request_error" and answer.json()["error"]["message"]


def test_deep_schemas_and_messages(served: Running) -> None:
    deep: Any = {}
    for _ in range(400):
        deep = {"properties": {"a": deep}}
    body = {"model": "meki-tiny", "messages": [{"role": "user", "content": "x", "more": deep}], "max_tokens": 1}
    assert served.post("/v1/chat/completions", body).status_code in (200, 400)
    del body["messages"][0]["more"]
    body["response_format"] = {"type": "json_schema", "json_schema": {"name": "x", "schema": deep}}
    assert served.post("/v1/chat/completions", body).status_code in (200, 400)


def test_no_such_place(served: Running) -> None:
    for method, path, status in (("GET", "/v1/none", 404), ("GET", "/v1/completions", 405), ("POST", "/health", 405)):
        answer = served.http.request(method, path)
        assert answer.status_code == status and answer.json()["error"]["message"]


def test_a_body_that_is_too_large(serve: Serve) -> None:
    with serve(body_bytes=1000) as served:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\n"
        declared = served.raw(head + b"Content-Length: 1001\r\n\r\n")
        assert answer_of(declared).startswith(b"HTTP/1.1 413 ")
        chunked = served.raw(head + b"Transfer-Encoding: chunked\r\n\r\n3e9\r\n" + b" " * 1001 + b"\r\n")
        assert answer_of(chunked).startswith(b"HTTP/1.1 413 ")
        assert served.post("/v1/completions", b" " * 1000).status_code == 400


def test_a_body_that_nobody_reads(serve: Serve) -> None:
    """The connection is closed, however slowly the body comes."""
    with serve(receive_s=0.2) as served:
        for line in (b"POST /v1/none", b"POST /health"):
            head = line + b" HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
            answer = answer_of(served.raw(head))
            assert answer.startswith(b"HTTP/1.1 40") and b"connection: close" in answer.lower()


def test_a_body_that_goes_on_behind_its_answer(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever answers without a word of closing: a body that ends in time leaves the connection as it was."""

    async def answer(_scope: Any, _receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": [(b"content-length", b"2")]})
        await send({"type": "http.response.body", "body": b"ok"})

    monkeypatch.setattr(run, "make_app", lambda _server: answer)
    head = b"POST / HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n"
    with serve(receive_s=0.5) as served, served.raw(head) as connection:
        got = b""
        with contextlib.suppress(ConnectionError):
            while data := connection.recv(1000):
                got += data
                connection.sendall(b"1\r\nx\r\n")
        assert got.endswith(b"ok")
        wait_for(lambda: not served.connections)
    with serve(receive_s=60) as served, served.raw(head) as connection:
        for _ in range(2):
            while not got.endswith(b"\r\n\r\nok"):
                got += connection.recv(1000)
            got = b""
            connection.sendall(b"1\r\nx\r\n0\r\n\r\n" + head)


def test_half_a_request(serve: Serve) -> None:
    """A client who stops in the head is dropped; one who stops in the body is told."""
    with serve(receive_s=0.2) as served:
        for begun in (b"", b"GET /health HT", b"GET /health HTTP/1.1\r\nHost: localhost\r\n"):
            assert answer_of(served.raw(begun)) == b""
        answer = answer_of(served.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{"))
        assert answer.startswith(b"HTTP/1.1 408 ")
        left = served.raw(b"POST /tokenize HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9\r\n\r\n{")
        left.close()
        assert served.http.get("/health").status_code == 200


def test_what_is_no_http(served: Running) -> None:
    for data in (
        b"\x16\x03\x01\x02\x00\x01",
        b"HELLO\r\n\r\n",
        b"GET / HTTP/9\r\n\r\n",
        b"GET / HTTP/1.1\r\n" + b"a" * 100_000,
    ):
        assert answer_of(served.raw(data)).startswith(b"HTTP/1.1 4")


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("reset", [True, False])
def test_a_client_that_leaves_ends_the_generation(served: Running, stream: bool, reset: bool) -> None:
    before = served.server.metrics.registry.get_sample_value("meki_generations_total", {"end": "cancelled"}) or 0
    connection = served.raw(request({**LONG, "stream": stream}))
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200 OK")
    wait_for(lambda: served.runner.running)
    if reset:  # closed without a word of farewell
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    connection.close()
    served.wait_until_idle()
    registry = served.server.metrics.registry
    wait_for(lambda: registry.get_sample_value("meki_generations_total", {"end": "cancelled"}) == before + 1)


def test_a_client_that_leaves_the_queue(serve: Serve) -> None:
    with serve(parallel=1, waiting=2) as served:
        clients = []
        for running, waiting in ((1, 0), (1, 1), (1, 2)):
            clients.append(served.raw(request({**LONG, "stream": True, "prompt": "A fox"})))
            wait_for(lambda now=(running, waiting): (served.runner.running, served.runner.waiting) == now)
        refused = served.post("/v1/completions", LONG)
        assert refused.status_code == 429 and refused.headers["retry-after"] == "1"
        assert refused.json()["error"]["code"] == "rate_limit_exceeded"
        clients[1].close()  # one that waits
        wait_for(lambda: served.runner.waiting == 1)
        clients[0].close()  # the one that runs
        assert b"[DONE]" in answer_of(clients[2])
        served.wait_until_idle()


@pytest.mark.parametrize(
    ("path", "body", "ping", "end"),
    [
        ("/v1/completions", {"prompt": "x"}, b": still here\n\n", b"data: [DONE]"),
        (
            "/v1/messages",
            {"messages": [{"role": "user", "content": "x"}]},
            b'event: ping\ndata: {"type":"ping"}\n\n',
            b"event: message_stop",
        ),
        ("/v1/responses", {"input": "x"}, b"event: response.in_progress\n", b"event: response.incomplete"),
    ],
)
def test_a_client_that_waits_is_told_so(serve: Serve, path: str, body: dict[str, Any], ping: bytes, end: bytes) -> None:
    with serve(parallel=1, ping_s=0.005) as served, served.raw(request(LONG)):  # another, that it waits for
        wait_for(lambda: served.runner.running)
        most = "max_output_tokens" if "input" in body else "max_tokens"
        asked = {"model": "meki-tiny", most: 3, "stream": True, **body}
        answer = answer_of(served.raw(request(asked, path)))
    assert answer.startswith(b"HTTP/1.1 200 OK") and answer.count(ping) >= 2 and end in answer


def test_clients_pass_over_what_tells_them_to_wait(serve: Serve) -> None:
    message: Any = {"role": "user", "content": "x"}
    asked: dict[str, Any] = {"model": "meki-tiny", "max_tokens": 3, "messages": [message]}
    asked["extra_body"] = {"temperature": 0}  # Anthropic's newest client has no parameter for it
    with serve(parallel=1, ping_s=0.001) as served:
        texts = []
        for _ in range(2):
            chunks = served.openai.chat.completions.create(**asked, stream=True)
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
            client = anthropic.Anthropic(base_url=served.url, api_key="none", max_retries=0)
            with client, client.messages.stream(**asked) as stream:
                texts.append("".join(stream.text_stream))
        with served.raw(request(LONG)):
            wait_for(lambda: served.runner.running)
            chunks = served.openai.chat.completions.create(**asked, stream=True)
            texts.append("".join(chunk.choices[0].delta.content or "" for chunk in chunks))
    assert texts[0] and texts == texts[:1] * 5


def test_a_client_that_reads_nothing(serve: Serve) -> None:
    """Others are answered meanwhile, its own generation comes to its end, and the connection is dropped."""
    with serve(parallel=9, send_s=0.5) as served:
        alone = served.post("/v1/completions", LONG).json()["choices"][0]["text"]
        slow = socket.socket()
        slow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        slow.settimeout(30)
        with slow:
            slow.connect(("127.0.0.1", served.port))
            slow.sendall(request({**LONG, "n": 8, "stream": True, "max_tokens": 500}))
            for _ in range(3):
                assert served.post("/v1/completions", LONG).json()["choices"][0]["text"] == alone
            served.wait_until_idle()
            wait_for(lambda: served.connections == 1)  # that of the other client
            got = bytearray()
            with contextlib.suppress(ConnectionResetError):
                while data := slow.recv(1 << 16):
                    got += data
            assert got.startswith(b"HTTP/1.1 200 OK") and b"[DONE]" not in got


def test_too_many_connections(serve: Serve) -> None:
    with serve(connections=2) as served:
        first, second = served.raw(b""), served.raw(b"")
        assert answer_of(served.raw(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")).startswith(b"HTTP/1.1 503 ")
        first.close()
        second.close()
