"""What a server tells of itself."""

from __future__ import annotations

import math
import socket

import pytest
from prometheus_client.parser import text_string_to_metric_families

from meki.answers import Content, Reasoning
from meki.generation import TokenLogprobs, TopLogprob
from meki.server.logprobs import IMPOSSIBLE, CompletionLogprobs, PartTokens, chat_logprobs
from meki.server.run import listen

from .running import Running, Serve, wait_for

BODY = {"model": "meki-tiny", "prompt": "Once upon a time", "max_tokens": 5, "temperature": 0}


def samples(served: Running) -> dict[tuple[str, ...], float]:
    """By name and values of labels."""
    families = text_string_to_metric_families(served.http.get("/metrics").text)
    return {(s.name, *s.labels.values()): s.value for family in families for s in family.samples}


def test_numbers_for_prometheus(serve: Serve) -> None:
    with serve(parallel=1) as served:
        for _ in range(2):
            prompt = served.post("/v1/completions", BODY).json()["usage"]["prompt_tokens"]
        served.post("/v1/completions", {})
        for path in ("/v1/models/a", "/v1/models/b", "/a", "/b"):
            served.http.get(path)
        got = samples(served)
    assert got["meki_requests_total", "/v1/completions", "200"] == 2
    assert got["meki_requests_total", "/v1/completions", "400"] == 1
    assert got["meki_requests_total", "/v1/models/{model:path}", "404"] == 2
    assert got["meki_requests_total", "other", "404"] == 2
    assert got["meki_generations_total", "length"] == 2
    assert got["meki_prompt_tokens_total",] == 2 * prompt
    assert got["meki_cached_tokens_total",] == prompt - 1
    assert got["meki_generated_tokens_total",] == 10
    assert got["meki_time_to_first_token_seconds_count",] == 2
    assert got["meki_decode_tokens_per_second_count",] == 2
    assert got["meki_rom_stall_seconds_count",] == 2
    assert got["meki_rom_requests_total",] >= got["meki_rom_hits_total",] > 0


def test_what_runs_and_waits(serve: Serve) -> None:
    with serve(parallel=1) as served:
        data = b'{"model": "meki-tiny", "prompt": "x", "max_tokens": 450, "n": 3}'
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n" % len(data)
        with served.raw(head + data):
            wait_for(lambda: served.runner.waiting == 2)
            got = samples(served)
            assert got["meki_running_generations", "meki-tiny"] == 1
            assert got["meki_waiting_generations", "meki-tiny"] in (1, 2)  # the first may have ended meanwhile
        served.wait_until_idle()
        got = samples(served)
        assert got["meki_running_generations", "meki-tiny"] == got["meki_waiting_generations", "meki-tiny"] == 0


def test_the_description_names_all(served: Running) -> None:
    described = served.http.get("/openapi.json").json()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models/{model}", "/health"} <= described["paths"].keys()
    assert described["components"]["schemas"]["ChatBody"]["properties"]["model"]["enum"] == ["meki-tiny"]
    for path in described["paths"].values():
        assert all(operation["summary"] for operation in path.values())


def test_small_answers_are_sent_at_once() -> None:
    """asyncio turns off Nagle's algorithm for sockets that say that they are TCP's."""
    with listen("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP


def test_logprobs_that_json_has_no_words_for() -> None:
    """A character's parts, and what is impossible."""
    snow, man = "☃".encode()[:1], "☃".encode()[1:]
    tokens = [TokenLogprobs(1, snow, -0.5, [TopLogprob(2, b"a", -math.inf)]), TokenLogprobs(3, man, -0.25, [])]
    first, second = chat_logprobs(tokens)["content"]
    assert (first["token"], first["bytes"], second["bytes"]) == ("bytes:\\xe2", [0xE2], [0x98, 0x83])
    assert first["top_logprobs"] == [{"token": "a", "logprob": IMPOSSIBLE, "bytes": [97]}]
    assert CompletionLogprobs().take(tokens) == {
        "tokens": ["bytes:\\xe2", "bytes:\\x98\\x83"],
        "token_logprobs": [-0.5, -0.25],
        "top_logprobs": [{"a": IMPOSSIBLE, "bytes:\\xe2": -0.5}, {"bytes:\\x98\\x83": -0.25}],
        "text_offset": [0, 0],
    }


def tokens_of(*texts: bytes) -> list[TokenLogprobs]:
    return [TokenLogprobs(id, text, -1.0, []) for id, text in enumerate(texts)]


def test_tokens_of_an_answers_parts() -> None:
    """Those of markers, and of spaces beside them, are of no part."""
    tokens = [tokens_of(b"<think>", b"\n", b"Hm", b".", b"\n</", b"think>", b"\n\nIt", b" is", b"<tool_call>")]
    its = PartTokens(lambda: tokens.pop() if tokens else [])
    parts = [Reasoning("Hm"), Reasoning("."), Content("It"), Content(" is")]
    assert [[token.token_id for token in its.of(part)] for part in parts] == [[2], [3], [6], [7]]


@pytest.mark.parametrize("text", [">", "think", "i", "k>"])
def test_a_marker_may_have_the_text_that_follows_it(text: str) -> None:
    tokens = [tokens_of(b"Hm"), tokens_of(b"</think>", b"\n\n", text.encode()), tokens_of(text.encode())]
    its = PartTokens(lambda: tokens.pop(0))
    parts = [Reasoning("Hm"), Content(text), Content(text)]
    assert [[token.token_id for token in its.of(part)] for part in parts] == [[0], [2], [0]]


def test_tokens_that_are_no_characters_or_two_texts() -> None:
    tokens = [tokens_of(b"a<", b"b"), tokens_of(b"\xe2", b"\x98"), []]
    its = PartTokens(lambda: tokens.pop(0))
    assert [token.text for token in its.of(Content("a"))] == [b"a<"]  # the marker that it may be is held back
    assert [token.text for token in its.of(Content("<b"))] == [b"b", b"\xe2", b"\x98"]
    assert its.of(Content("\ufffd")) == []
