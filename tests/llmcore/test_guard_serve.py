"""The guarded endpoint over real HTTP: the OpenAI client in front, a second server of ours or `transformers serve` as upstream, upstreams
that stop or die in the middle of an answer, limits, hostile bodies."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
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


def _free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextlib.contextmanager
def serving(guard):
    import uvicorn

    port = _free_port()
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


@contextlib.contextmanager
def transformers_serve(folder):
    """A real upstream in a process of its own, so that it can be stopped and killed."""
    port = _free_port()
    process = subprocess.Popen(
        [sys.executable, "-c", "from transformers.cli.transformers import main; main()", "serve", folder, "--device", "cpu", "--dtype",
         "float32", "--host", "127.0.0.1", "--port", str(port)],
        env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        ends = time.monotonic() + 120
        while True:
            assert process.poll() is None, "transformers serve ended at once"
            assert time.monotonic() < ends, "transformers serve did not come up"
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"http://127.0.0.1:{port}/health", timeout=1).status_code == 200:
                    break
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}/v1", process
    finally:
        process.kill()
        process.wait(timeout=20)


def test_a_real_upstream_answers_stalls_and_is_killed_in_the_middle(smollm2):
    """`transformers serve`: whole and streamed answers, flag mode; stopped (SIGSTOP) or killed it costs an error, never a hang."""
    from llmcore.models import embedded_path

    folder = str(embedded_path())
    limits = Limits(seconds=60, answer_tokens=8)
    with transformers_serve(folder) as (upstream_url, process), contextlib.ExitStack() as stack:
        urls = []
        for action, patience in (("refuse", 60.0), ("flag", 60.0), ("refuse", 1.0)):
            guard = Guard(smollm2, 1e9, SMALL, action=action, limits=limits,
                          upstream=Upstream(upstream_url, model=folder, timeout=patience))  # fmt: skip
            urls.append(stack.enter_context(serving(guard))[0])
        front, flagging, hasty = (openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=90) for url in urls)

        def ask(client, messages, tokens=6, **options):
            return client.chat.completions.create(model="m", messages=messages, temperature=0, max_tokens=tokens, **options)

        def text(parts):
            return "".join(part.choices[0].delta.content or "" for part in parts)

        whole = ask(front, CALM)
        assert whole.choices[0].message.content
        assert whole.llmcore_guard == {"rejected": False, "stage": None}
        assert text(ask(front, CALM, stream=True)) == whole.choices[0].message.content
        assert ask(front, SORRY).choices[0].message.content == REJECTION
        flagged = ask(flagging, SORRY)
        assert flagged.llmcore_guard == {"rejected": True, "stage": "stage1"}
        parts = list(ask(flagging, SORRY, stream=True))
        assert parts[0].llmcore_guard == {"rejected": True, "stage": "stage1"}
        assert text(parts) == flagged.choices[0].message.content != REJECTION

        process.send_signal(signal.SIGSTOP)
        begin = time.monotonic()
        with pytest.raises(openai.InternalServerError, match="ReadTimeout"):
            ask(hasty, CALM)
        with pytest.raises(openai.APIError, match="ReadTimeout"):
            list(ask(hasty, CALM, stream=True))
        assert time.monotonic() - begin < 60
        process.send_signal(signal.SIGCONT)

        seen: list[str] = []

        def read_and_kill():
            for part in ask(front, [{"role": "user", "content": "Count from one to two hundred."}], 400, stream=True):
                seen.extend(filter(None, [part.choices[0].delta.content]))
                if len(seen) == 2:
                    process.kill()

        with pytest.raises(openai.APIError, match="upstream"):
            read_and_kill()
        assert 2 <= len(seen) < 400
        with pytest.raises(openai.InternalServerError, match="upstream failed"):
            ask(front, CALM)
        assert ask(front, SORRY).choices[0].message.content == REJECTION


def test_limits_of_time_and_number(smollm2):
    """One request in flight: the next gets 429. A verdict or a body that takes too long is an error, and nothing stays behind."""
    long = [{"role": "user", "content": "The harbour town keeps its old boats along the grey wall. " * 50}]
    narrow = Guard(smollm2, 1e9, SMALL, limits=Limits(requests=1, answer_tokens=2))
    with serving(narrow) as (url, _, _):
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=90)
        first: list = []
        thread = threading.Thread(
            target=lambda: first.append(client.chat.completions.create(model="m", messages=long, max_tokens=2, temperature=0))
        )
        thread.start()
        while narrow.in_flight == 0 and thread.is_alive():
            time.sleep(0.005)
        with pytest.raises(openai.RateLimitError, match="in flight"):
            client.chat.completions.create(model="m", messages=CALM)
        thread.join(timeout=90)
        assert first[0].choices[0].finish_reason in ("stop", "length")
        assert narrow.in_flight == 0
    hasty = Guard(smollm2, 1e9, SMALL, limits=Limits(seconds=0.3))
    with serving(hasty) as (url, _, _):
        for stream in (False, True):
            reply = httpx.post(f"{url}/chat/completions", json={"messages": long, "stream": stream}, timeout=90)
            assert (reply.status_code, reply.json()["error"]["code"]) == (504, "timeout")
        host, port = url.removeprefix("http://").removesuffix("/v1").split(":")
        with socket.create_connection((host, int(port)), timeout=30) as slow:
            slow.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\n{")
            assert b" 408 " in slow.recv(200)
        assert hasty.in_flight == 0


def test_flag_mode_answers_and_marks(smollm2):
    guard = Guard(smollm2, 1e9, SMALL, action="flag", limits=Limits(answer_tokens=4))
    with serving(guard) as (url, _, _):
        client = openai.OpenAI(base_url=url, api_key="x", max_retries=0, timeout=60)
        for messages, expected in ((SORRY, {"rejected": True, "stage": "stage1"}), (CALM, {"rejected": False, "stage": None})):
            whole = client.chat.completions.create(model="m", messages=messages, temperature=0)
            assert whole.llmcore_guard == expected
            assert whole.choices[0].message.content != REJECTION
            parts = list(client.chat.completions.create(model="m", messages=messages, temperature=0, stream=True))
            assert parts[0].llmcore_guard == expected
            assert "".join(part.choices[0].delta.content or "" for part in parts) == whole.choices[0].message.content
