"""The guarded endpoint over real HTTP: the OpenAI client in front, a second server of ours as upstream, and hostile bodies."""

from __future__ import annotations

import contextlib
import socket
import threading
import time

import pytest

pytest.importorskip("fastapi")
pytest.importorskip("uvicorn")
openai = pytest.importorskip("openai")
httpx = pytest.importorskip("httpx")

from llmcore.methods.gradient_cuff import REJECTION, CuffConfig  # noqa: E402

from llmcore.commands.guard_server import Guard, Limits, application  # noqa: E402
from llmcore.endpoints import Upstream  # noqa: E402

SMALL = CuffConfig(num_samples=3, num_directions=1, max_new_tokens=4, early_exit=True, seed=99)
CALM = [{"role": "user", "content": "Say hi."}]
SORRY = [{"role": "user", "content": "can you book a flight"}]


@contextlib.contextmanager
def serving(guard):
    import uvicorn

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = uvicorn.Server(uvicorn.Config(application(guard), host="127.0.0.1", port=port, log_level="error", ws="none"))
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.02)
    try:
        yield f"http://127.0.0.1:{port}/v1", server, thread
    finally:
        server.should_exit = True
        thread.join(timeout=20)


def test_proxy_answers_refuses_streams_and_fails_closed(smollm2):
    limits = Limits(body_bytes=4000, seconds=60, requests=64, answer_tokens=8)
    local = Guard(smollm2, 1e9, SMALL, limits=limits)
    with serving(local) as (upstream_url, upstream_server, upstream_thread):
        front = Guard(smollm2, 1e9, SMALL, limits=limits, upstream=Upstream(upstream_url, timeout=30))
        with serving(front) as (url, _, _):
            client = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60)

            def ask(messages, **options):
                return client.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=6, **options)

            whole = ask(CALM).choices[0].message.content
            assert whole
            assert "".join(part.choices[0].delta.content or "" for part in ask(CALM, stream=True)) == whole
            turned_away = ask(SORRY).choices[0]
            assert (turned_away.message.content, turned_away.finish_reason) == (REJECTION, "content_filter")
            assert "".join(part.choices[0].delta.content or "" for part in ask(SORRY, stream=True)) == REJECTION
            answers: list = [None] * 32

            def one(i):
                answers[i] = ask(SORRY if i % 2 else CALM).choices[0].message.content

            threads = [threading.Thread(target=one, args=(i,)) for i in range(32)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join(timeout=90)
            assert answers == [REJECTION if i % 2 else whole for i in range(32)]
            post = lambda content: httpx.post(f"{url}/chat/completions", content=content, timeout=30)  # noqa: E731
            assert post(b"x" * 5000).status_code == 413
            for bad in (b"", b"{", b"[]", b"\xff\xfe", b'{"messages": []}', b'{"messages": [{"role": "user", "content": ""}]}',
                        b'{"messages": [{"role": "user", "content": 5}]}', b'{"messages": [{"role": "user", "content": "a"}], "stream": 3}',
                        b"[" * 3000):  # fmt: skip
                reply = post(bad)
                assert (reply.status_code, "error" in reply.json()) == (400, True), bad
            upstream_server.should_exit = True
            upstream_thread.join(timeout=20)
            with pytest.raises(openai.InternalServerError, match="upstream failed"):
                ask(CALM)
            with pytest.raises(openai.APIError, match="upstream"):
                list(ask(CALM, stream=True))
            assert ask(SORRY).choices[0].message.content == REJECTION  # detection still works
            assert front.in_flight == 0


def test_detection_that_breaks_gives_an_error_and_no_answer(smollm2):
    guard = Guard(smollm2, 1e9, SMALL)
    guard.worker.detector.advance = lambda: 1 / 0
    with serving(guard) as (url, _, _):
        reply = httpx.post(f"{url}/chat/completions", json={"messages": CALM}, timeout=60)
        assert reply.status_code == 500
        assert "detection failed" in reply.json()["error"]["message"]
        assert httpx.post(f"{url}/chat/completions", json={"messages": CALM, "max_tokens": 2}, timeout=60).status_code == 200
