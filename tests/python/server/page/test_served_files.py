"""The chat page's files, as the server gives them out, and Markdown that it renders for the page."""

from __future__ import annotations

import asyncio
import json
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from meki.server import page as served_page

from ..running import Running, Serve

FILES = sorted(path.name for path in Path(served_page.__file__).with_name("page").iterdir())


@pytest.mark.parametrize("path", ["/", *(f"/page/{name}" for name in FILES)])
def test_files_come_with_a_strict_policy_and_without_a_key(serve: Serve, path: str) -> None:
    with serve(api_key="sesame") as server:
        answer = server.http.get(path)
        assert answer.status_code == 200
        policy = dict(part.split(" ", 1) for part in answer.headers["content-security-policy"].split("; "))
        assert policy["default-src"] == "'none'"
        assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
        assert policy["img-src"] == "'self' data:"
        assert policy["base-uri"] == policy["form-action"] == policy["frame-ancestors"] == "'none'"
        assert answer.headers["x-content-type-options"] == "nosniff"
        kinds = {"js": "text/javascript", "css": "text/css", "svg": "image/svg+xml", "html": "text/html"}
        assert (
            answer.headers["content-type"].split(";")[0] == kinds[(path.rpartition(".")[2] if path != "/" else "html")]
        )
        again = server.http.get(path, headers={"if-none-match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")


def test_nothing_in_the_page_is_inline_or_from_elsewhere() -> None:
    html = (Path(served_page.__file__).with_name("page") / "index.html").read_text()
    assert "style=" not in html and "<style" not in html and " on" + "click" not in html
    assert html.count("<script") == html.count("<script src=") + html.count('<script type="module" src=')
    for name in FILES:
        text = (
            (Path(served_page.__file__).with_name("page") / name).read_text().replace("http://www.w3.org/2000/svg", "")
        )
        assert "://" not in text


@pytest.mark.parametrize("path", ["/page/none.js", "/page/..%2fapp.py", "/page/%2e%2e/app.py", "/page/", "/page/a%00b"])
def test_there_are_no_other_files(served: Running, path: str) -> None:
    assert served.http.get(path).status_code == 404


def test_rendering_needs_the_key_and_has_a_limit(serve: Serve) -> None:
    with serve(api_key="sesame") as server:
        assert server.post("/markdown", {"text": "*a*"}).status_code == 401
        key = {"authorization": "Bearer sesame"}
        assert server.post("/markdown", {"text": "*a*"}, **key).json() == {"html": "<p><em>a</em></p>\n"}
        assert server.post("/markdown", {"text": "a" * (served_page.MAX_CHARACTERS + 1)}, **key).status_code == 400


def test_rendering_leaves_the_threads_of_others_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generations start in the event loop's own threads, here one."""
    go = threading.Event()
    monkeypatch.setattr(served_page, "to_html", lambda text: text if go.wait(60) else "")

    async def render() -> bytes:
        asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(1))
        body = served_page.MarkdownBody(text="a")
        rendering = asyncio.create_task(served_page.markdown(None, body))  # type: ignore[arg-type]
        await asyncio.sleep(0)  # it has begun
        await asyncio.to_thread(go.set)
        return bytes((await rendering).body)

    assert json.loads(asyncio.run(render())) == {"html": "a"}
