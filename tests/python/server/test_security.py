"""Who may call a server."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from .running import Running, Serve

BODY = {"model": "meki-tiny", "prompt": "x", "max_tokens": 1}


@pytest.fixture(scope="module")
def guarded(serve: Serve) -> Iterator[Running]:
    origins = ("https://good.example",)
    with serve(api_key="sesame-ü", allowed_hosts=("Models.example",), cors_origins=origins) as server:
        yield server


KEY = {"authorization": "Bearer sesame-ü".encode()}


@pytest.mark.parametrize(
    "key", [KEY, {"x-api-key": "sesame-ü".encode()}, {"authorization": "bearer  sesame-ü".encode()}]
)
def test_with_the_key(guarded: Running, key: dict[str, bytes]) -> None:
    assert guarded.http.get("/v1/models", headers=key).status_code == 200


@pytest.mark.parametrize(
    "key", [{}, {"authorization": "Bearer sesame"}, {"authorization": "Basic sesame-u"}, {"x-api-key": ""}]
)
@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/openapi.json", "/v1/none"])
def test_without_the_key(guarded: Running, key: dict[str, str], path: str) -> None:
    answer = guarded.http.get(path, headers=key)
    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert "sesame" not in answer.text
    assert answer.headers["www-authenticate"] == "Bearer"


def test_a_key_whose_bytes_look_like_spaces(serve: Serve) -> None:
    """The last byte of "à" is a no-break space in Latin-1."""
    with serve(api_key="secretà") as server:
        for key in ({"authorization": "Bearer secretà".encode()}, {"x-api-key": "secretà".encode()}):
            assert server.http.get("/v1/models", headers=key).status_code == 200


def test_health_needs_no_key(guarded: Running) -> None:
    assert guarded.http.get("/health").json() == {"status": "ok"}


def test_without_the_key_no_body_is_read(guarded: Running) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 1000000\r\n\r\n"
    with guarded.raw(head) as connection, connection.makefile("rb") as file:
        answer = file.read()
    assert answer.startswith(b"HTTP/1.1 401 ")


@pytest.mark.parametrize(
    "host",
    [
        "localhost",
        "LOCALHOST:1234",
        "127.0.0.1",
        "[::1]:80",
        "192.168.1.7:8080",
        "models.example.",
        "models.example:80",
    ],
)
def test_names_that_a_request_may_use(guarded: Running, host: str) -> None:
    assert guarded.http.get("/health", headers={"host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    [
        "evil.example",
        "localhost.evil.example",
        "127.0.0.1.evil.example",
        "",
        "[::1",
        "models.example@evil.example",
        "1.2.3.4.5",
    ],
)
def test_names_that_lead_here_by_somebody_elses_hand(guarded: Running, host: str) -> None:
    """DNS rebinding: a page of evil.example, whose name has come to mean this machine, may read all that it likes."""
    answer = guarded.http.get("/health", headers={"host": host})
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "host_not_allowed"


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://127.0.0.1:1", "https://good.example.evil.example"]
)
def test_other_pages_are_kept_out(guarded: Running, origin: str) -> None:
    answer = guarded.post("/v1/completions", BODY, origin=origin)
    assert answer.status_code == 403 and answer.json()["error"]["code"] == "origin_not_allowed"
    assert "access-control-allow-origin" not in answer.headers


def test_a_page_of_the_server_itself(guarded: Running) -> None:
    assert guarded.http.get("/health", headers={"origin": guarded.url}).status_code == 200


def test_a_page_that_is_allowed(guarded: Running) -> None:
    origin = {"origin": "https://good.example"}
    asked = {**origin, "access-control-request-method": "POST", "access-control-request-headers": "authorization"}
    answer = guarded.http.options("/v1/completions", headers=asked)
    assert answer.status_code == 200 and answer.headers["access-control-allow-origin"] == "https://good.example"
    for key in ({}, KEY):  # a refusal can be read, too
        answer = guarded.http.get("/v1/models", headers={**origin, **key})
        assert answer.status_code == (200 if key else 401)
        assert answer.headers["access-control-allow-origin"] == "https://good.example"


def test_pages_are_not_allowed_by_default(served: Running) -> None:
    asked = {"origin": "https://good.example", "access-control-request-method": "POST"}
    answer = served.http.options("/v1/completions", headers=asked)
    assert answer.status_code == 403 and "access-control-allow-origin" not in answer.headers


def test_errors_have_the_form_of_the_api_that_was_called(guarded: Running) -> None:
    answer = guarded.post("/v1/messages", {})
    assert answer.json()["type"] == "error" and answer.json()["error"]["type"] == "authentication_error"
