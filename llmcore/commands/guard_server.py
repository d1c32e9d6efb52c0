"""`llmcore guard serve`: an OpenAI-compatible proxy that detects before it answers.

One worker thread owns the model and runs detection and local answers of all requests in one batch; the event loop only waits. Whatever goes
wrong before a verdict (an exception, a timeout, a full house) is an error to the client and never an answer: the proxy fails closed.
"""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import logging
import threading
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any

from llmcore.decoding import Row
from llmcore.endpoints import EndpointError, Upstream, chunk, completion, event
from llmcore.generation import pieces
from llmcore.methods.gradient_cuff.config import CuffConfig, CuffVerdict
from llmcore.methods.gradient_cuff.detector import Detector
from llmcore.methods.gradient_cuff.judge import REJECTION
from llmcore.methods.gradient_cuff.query import Query, start_answer, verdict_of
from llmcore.sampling import Sampling

LOG = logging.getLogger("llmcore.guard")


@dataclass(frozen=True)
class Limits:
    """What one client may ask for: body size, time until the verdict and between pieces, requests in flight, tokens of a local answer."""

    body_bytes: int = 1 << 20
    seconds: float = 120.0
    requests: int = 64
    answer_tokens: int = 512


class Ticket:
    """One request inside the worker: items reach the event loop through an asyncio queue."""

    def __init__(self, messages: list[dict[str, Any]], query_id: int, answer: Sampling | None, flag: bool):
        self.messages, self.query_id, self.answer, self.flag = messages, query_id, answer, flag
        self.loop = asyncio.get_running_loop()
        self.items: asyncio.Queue = asyncio.Queue()
        self.cancelled = False
        self.query: Query | None = None
        self.row: Row | None = None
        self.states: list[list[int]] = []
        self.sent = 0

    def put(self, item: Any) -> None:
        """From the worker thread."""
        with contextlib.suppress(RuntimeError):  # the loop is gone: so is the client
            self.loop.call_soon_threadsafe(self.items.put_nowait, item)


@dataclass
class Worker:
    """The thread that owns the model."""

    model: Any
    config: CuffConfig
    threshold: float
    inbox: list[Ticket] = field(default_factory=list)
    live: list[Ticket] = field(default_factory=list)
    answering: list[Ticket] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.condition = threading.Condition()
        self.stopping = False
        self.detector = self._detector()
        self.thread = threading.Thread(target=self._run, name="llmcore-guard", daemon=True)
        self.thread.start()

    def _detector(self) -> Detector:
        return Detector(self.model, self.config, threshold=self.threshold, keep=True)

    def submit(self, ticket: Ticket) -> None:
        with self.condition:
            self.inbox.append(ticket)
            self.condition.notify()

    def stop(self) -> None:
        with self.condition:
            self.stopping = True
            self.condition.notify()
        self.thread.join(timeout=30)

    def _run(self) -> None:
        while True:
            with self.condition:
                while not (self.inbox or self.live or self.answering or self.stopping):
                    self.condition.wait()
                if self.stopping:
                    return
                arrived, self.inbox = self.inbox, []
            try:
                self._turn(arrived)
            except Exception as error:
                # No verdict can be trusted now, whatever broke: every request in the batch fails, and a fresh detector takes the next ones.
                LOG.exception("detection failed; %d requests refused", len(arrived))
                failure = EndpointError(500, f"detection failed: {type(error).__name__}: {error}", "detection_failed")
                for ticket in {id(t): t for t in [*arrived, *self.live, *self.answering]}.values():
                    ticket.put(failure)
                self.live, self.answering = [], []
                self.detector = self._detector()

    def _turn(self, arrived: list[Ticket]) -> None:
        detector = self.detector
        for ticket in arrived:
            if ticket.cancelled:
                continue
            try:
                ticket.query = detector.prepare(ticket.messages, ticket.query_id)
            except (ValueError, TypeError) as error:
                ticket.put(EndpointError(400, str(error), "invalid_messages"))
                continue
            detector.submit(ticket.query)
            self.live.append(ticket)
        for ticket in [t for t in [*self.live, *self.answering] if t.cancelled]:
            detector.cancel(ticket.query)  # type: ignore[arg-type]
            if ticket.row is not None:
                detector.batch.release(ticket.row)
            self.live = [t for t in self.live if t is not ticket]
            self.answering = [t for t in self.answering if t is not ticket]
        if not detector.idle:
            done = {id(query) for query in detector.advance()}
        else:
            detector.batch.step()
            done = set()
        for ticket in [t for t in self.live if id(t.query) in done]:
            self.live.remove(ticket)
            query = ticket.query
            assert query is not None
            verdict = verdict_of(query)
            ticket.put(verdict)
            if ticket.answer is None or (verdict.rejected and not ticket.flag):
                detector.cancel(query)
                continue
            if verdict.rejected:
                # Flag mode answers anyway; the row was let go with the rejection, so its prompt is prefilled again.
                row = Row(
                    query.full_embeddings(), len(query.prompt.input_ids), sampling=ticket.answer,
                    stream=(query.query_id, query.answer_stream),
                    stop_rule=query.answer_rule(ticket.answer),
                )  # fmt: skip
                detector.batch.admit([row])
                ticket.row = row
            else:
                ticket.row = start_answer(query, ticket.answer)
            self.answering.append(ticket)
        for ticket in list(self.answering):
            row = ticket.row
            assert row is not None
            if len(row.tokens[0]) > ticket.sent or row.done:
                ticket.sent = len(row.tokens[0])
                ticket.put((list(row.tokens[0]), row.finish[0] if row.done else None))
            if row.done:
                self.answering.remove(ticket)
                detector.cancel(ticket.query)  # type: ignore[arg-type]


class Guard:
    """The proxy's behaviour, independent of the web framework.

    Args:
        action: "refuse" answers a rejected prompt with `message`; "flag" answers it and marks the response.
        upstream: who answers; None answers from the protected model itself.
    """

    def __init__(
        self, model: Any, threshold: float, config: CuffConfig, *, action: str = "refuse", message: str = REJECTION,
        upstream: Upstream | None = None, limits: Limits | None = None, name: str = "llmcore-guard",
    ):  # fmt: skip
        if action not in ("refuse", "flag"):
            raise ValueError(f"action must be 'refuse' or 'flag', got {action!r}")
        self.worker = Worker(model, config, threshold)
        self.action, self.message, self.upstream, self.limits, self.name = action, message, upstream, limits or Limits(), name
        self.config = config
        self.tokenizer = model.tokenizer
        self.in_flight = 0

    def parse(self, raw: bytes) -> dict[str, Any]:
        """A request body, or EndpointError 400 saying what is wrong with it."""
        try:
            body = json.loads(raw)
        except (ValueError, RecursionError) as error:
            raise EndpointError(400, f"the body must be JSON: {str(error)[:200]}", "invalid_json") from None
        if not isinstance(body, dict):
            raise EndpointError(400, f"the body must be an object, got {type(body).__name__}", "invalid_body")
        messages = body.get("messages")
        if not isinstance(messages, list) or not messages or not all(isinstance(m, dict) for m in messages):
            raise EndpointError(400, "messages must be a non-empty list of objects", "invalid_messages")
        if not isinstance(body.get("stream", False), bool):
            raise EndpointError(400, f"stream must be true or false, got {body['stream']!r}", "invalid_stream")
        return body

    def sampling(self, body: dict[str, Any]) -> Sampling:
        """How a local answer is drawn."""
        if body.get("n") not in (None, 1):
            raise EndpointError(400, f"n must be 1, got {body['n']!r}", "invalid_n")
        tokens = body.get("max_completion_tokens", body.get("max_tokens")) or 128
        stop = body.get("stop") or ()
        seed = body.get("seed")
        try:
            return Sampling(
                temperature=float(body.get("temperature", self.config.temperature) or 0.0), top_k=self.config.top_k,
                top_p=float(body.get("top_p") or self.config.top_p), max_new_tokens=min(int(tokens), self.limits.answer_tokens),
                seed=int(seed) if seed is not None else self.config.seed, stop=(stop,) if isinstance(stop, str) else tuple(stop),
            )  # fmt: skip
        except (ValueError, TypeError) as error:
            raise EndpointError(400, str(error), "invalid_sampling") from None

    async def detect(self, ticket: Ticket) -> CuffVerdict:
        """The verdict, or EndpointError."""
        self.worker.submit(ticket)
        return await self.next(ticket)

    async def next(self, ticket: Ticket) -> Any:
        """The worker's next word on a ticket, within the time limit."""
        try:
            item = await asyncio.wait_for(ticket.items.get(), self.limits.seconds)
        except asyncio.TimeoutError:
            raise EndpointError(504, f"no verdict or text within {self.limits.seconds:.0f} seconds", "timeout") from None
        if isinstance(item, EndpointError):
            raise item
        return item

    def ticket(self, body: dict[str, Any]) -> Ticket:
        # Equal conversations draw equal samples: asking again does not give a second chance.
        key = json.dumps(body["messages"], sort_keys=True).encode()
        query_id = int.from_bytes(hashlib.blake2b(key, digest_size=8, key=str(self.config.seed).encode()[:64]).digest(), "little")
        local = self.upstream is None
        return Ticket(body["messages"], query_id, self.sampling(body) if local else None, self.action == "flag")

    async def answer(self, body: dict[str, Any], ticket: Ticket) -> dict[str, Any]:
        """A whole response."""
        verdict = await self.detect(ticket)
        note = {"llmcore_guard": {"rejected": verdict.rejected, "stage": verdict.stage}}
        if verdict.rejected and self.action == "refuse":
            return completion(self.name, self.message, "content_filter", **note)
        if self.upstream is not None:
            try:
                return {**await asyncio.wait_for(self.upstream.chat(body), self.limits.seconds), **note}
            except asyncio.TimeoutError:
                raise EndpointError(504, f"upstream took more than {self.limits.seconds:.0f} seconds", "timeout") from None
        tokens, reason = [], None
        while reason is None:
            tokens, reason = await self.next(ticket)
        assert ticket.answer is not None
        text = "".join(pieces(self.tokenizer, iter([tokens]), ticket.answer.stop))
        return completion(self.name, text, "length" if reason == "length" else "stop", **note)

    async def stream(self, body: dict[str, Any], ticket: Ticket, verdict: CuffVerdict) -> AsyncIterator[bytes]:
        """Events of a streamed response; the verdict is already known. Errors become an event, and no [DONE] follows them."""
        note = {"llmcore_guard": {"rejected": verdict.rejected, "stage": verdict.stage}}
        stream_id = f"chatcmpl-{uuid.uuid4().hex}"
        try:
            # First the guard's own mark: a flagged answer must be recognisable whoever gives it.
            yield event(chunk(stream_id, self.name, {"role": "assistant", "content": ""}, **note))
            if self.upstream is not None and not (verdict.rejected and self.action == "refuse"):
                source = self.upstream.stream(body).__aiter__()
                while True:
                    try:
                        yield await asyncio.wait_for(source.__anext__(), self.limits.seconds)
                    except StopAsyncIteration:
                        return
                    except asyncio.TimeoutError:
                        raise EndpointError(504, f"upstream was silent for {self.limits.seconds:.0f} seconds", "timeout") from None
            if verdict.rejected and self.action == "refuse":
                yield event(chunk(stream_id, self.name, {"content": self.message}))
                yield event(chunk(stream_id, self.name, {}, "content_filter"))
            else:
                assert ticket.answer is not None
                sent, tokens, reason = "", [], None
                while reason is None:
                    tokens, reason = await self.next(ticket)
                    # Only text that later tokens cannot change: `pieces` holds back half characters and beginnings of stop strings.
                    parts = pieces(self.tokenizer, iter([tokens]), ticket.answer.stop)
                    text = "".join(parts) if reason is not None else next(parts, "")
                    if len(text) > len(sent):
                        yield event(chunk(stream_id, self.name, {"content": text[len(sent) :]}))
                        sent = text
                yield event(chunk(stream_id, self.name, {}, "length" if reason == "length" else "stop"))
            yield event("[DONE]")
        except EndpointError as error:
            yield event(error.body())
        except Exception as error:  # the boundary of one stream: headers are sent, so the error is an event
            LOG.exception("stream failed")
            yield event(EndpointError(500, f"{type(error).__name__}: {error}", "internal_error").body())
        finally:
            self.leave(ticket)

    def enter(self) -> None:
        if self.in_flight >= self.limits.requests:
            raise EndpointError(429, f"more than {self.limits.requests} requests in flight; try again", "too_many_requests")
        self.in_flight += 1

    def leave(self, ticket: Ticket | None) -> None:
        self.in_flight -= 1
        if ticket is not None:
            ticket.cancelled = True
            with self.worker.condition:
                self.worker.condition.notify()


def application(guard: Guard) -> Any:
    """The FastAPI application around a Guard."""
    from fastapi import FastAPI
    from fastapi.responses import JSONResponse, StreamingResponse

    @contextlib.asynccontextmanager
    async def lifespan(_: Any) -> AsyncIterator[None]:
        yield
        guard.worker.stop()
        if guard.upstream is not None:
            await guard.upstream.close()

    app = FastAPI(title="llmcore guard", lifespan=lifespan, openapi_url=None)

    async def read(request: Any) -> bytes:
        limit = guard.limits.body_bytes
        too_large = EndpointError(413, f"the body must be at most {limit} bytes", "body_too_large")
        declared = request.headers.get("content-length")
        if declared is not None and declared.isdigit() and int(declared) > limit:
            raise too_large
        data = bytearray()
        source = request.stream().__aiter__()
        ends = time.monotonic() + min(30.0, guard.limits.seconds)
        while True:
            try:
                part = await asyncio.wait_for(source.__anext__(), max(0.01, ends - time.monotonic()))
            except StopAsyncIteration:
                return bytes(data)
            except asyncio.TimeoutError:
                raise EndpointError(408, "the body did not arrive in time", "timeout") from None
            data += part
            if len(data) > limit:
                raise too_large

    async def chat(request: Any) -> Any:
        try:
            guard.enter()
        except EndpointError as error:
            return JSONResponse(error.body(), error.status)
        ticket: Ticket | None = None
        streaming = False
        try:
            body = guard.parse(await read(request))
            ticket = guard.ticket(body)
            if body.get("stream", False):
                verdict = await guard.detect(ticket)
                streaming = True  # from here on the stream itself leaves
                return StreamingResponse(guard.stream(body, ticket, verdict), media_type="text/event-stream")
            return JSONResponse(await guard.answer(body, ticket))
        except EndpointError as error:
            return JSONResponse(error.body(), error.status)
        except Exception as error:  # the boundary of one request: the client gets an error instead of an answer, the log the traceback
            LOG.exception("request failed")
            failure = EndpointError(500, f"{type(error).__name__}: {error}", "internal_error")
            return JSONResponse(failure.body(), 500)
        finally:
            if not streaming:
                guard.leave(ticket)

    app.add_route("/v1/chat/completions", chat, methods=["POST"])  # the raw request: its body is read here, within limits

    @app.get("/healthz")
    async def health() -> dict[str, Any]:
        return {"status": "ok" if guard.worker.thread.is_alive() else "dead", "in_flight": guard.in_flight}

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [{"id": guard.name, "object": "model", "created": 0, "owned_by": "llmcore"}]}

    return app
