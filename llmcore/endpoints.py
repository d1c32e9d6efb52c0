"""OpenAI-compatible endpoints: calling one (`Upstream`), and the wire format for being one.

Errors keep the shape that OpenAI clients raise from: {"error": {"message", "type", "code"}}; inside a stream the same object is one
event, and the
stream then ends without its [DONE], so that a cut answer is never taken for a whole one.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator
from typing import Any


class EndpointError(Exception):
    """A request that cannot be served: HTTP status, message for the client, machine-readable code."""

    def __init__(self, status: int, message: str, code: str):
        super().__init__(message)
        self.status, self.message, self.code = status, message, code

    def body(self) -> dict[str, Any]:
        kind = "invalid_request_error" if self.status < 500 else "server_error"
        return {"error": {"message": self.message, "type": kind, "param": None, "code": self.code}}


def event(value: dict[str, Any] | str) -> bytes:
    """One server-sent event."""
    return b"data: " + (value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)).encode() + b"\n\n"


def completion(model: str, text: str, finish_reason: str, **extra: Any) -> dict[str, Any]:
    """Body of a finished chat completion."""
    message = {"role": "assistant", "content": text}
    return {
        "id": f"chatcmpl-{uuid.uuid4().hex}", "object": "chat.completion", "created": int(time.time()), "model": model,
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason, "logprobs": None}],
        "usage": {"prompt_tokens": 0, "completion_tokens": 0, "total_tokens": 0}, **extra,
    }  # fmt: skip


def chunk(stream_id: str, model: str, delta: dict[str, Any], finish_reason: str | None = None, **extra: Any) -> dict[str, Any]:
    """Body of one event of a streamed chat completion."""
    choice = {"index": 0, "delta": delta, "finish_reason": finish_reason, "logprobs": None}
    return {"id": stream_id, "object": "chat.completion.chunk", "created": int(time.time()), "model": model, "choices": [choice], **extra}


def _finishes(data: str) -> bool:
    """Whether one event of a streamed completion carries a finish reason."""
    try:
        choices = json.loads(data)["choices"]
        return any(choice.get("finish_reason") for choice in choices)
    except (ValueError, TypeError, KeyError, AttributeError):  # an error event, or no completion at all: the answer is not whole
        return False


class Upstream:
    """An OpenAI-compatible server that answers.

    Args:
        base_url: such as http://127.0.0.1:8000/v1. model: replaces the client's model name when given. api_key: sent as a bearer token.
        timeout: seconds without a byte before the upstream counts as dead.
    """

    def __init__(self, base_url: str, *, model: str | None = None, api_key: str | None = None, timeout: float = 60.0):
        import httpx

        if not base_url.startswith(("http://", "https://")):
            raise ValueError(f"base_url must be an http(s) address such as http://127.0.0.1:8000/v1, got {base_url!r}")
        headers = {"authorization": f"Bearer {api_key}"} if api_key else {}
        self.model = model
        limits = httpx.Limits(max_connections=None)
        self.client = httpx.AsyncClient(
            base_url=base_url.rstrip("/") + "/", headers=headers, limits=limits, timeout=httpx.Timeout(timeout, connect=min(10.0, timeout))
        )

    def _body(self, body: dict[str, Any]) -> dict[str, Any]:
        return {**body, "model": self.model} if self.model else body

    async def chat(self, body: dict[str, Any]) -> dict[str, Any]:
        """The upstream's completion. Raises EndpointError 502 when it is down, cut off or not JSON, its own status for its own refusals."""
        import httpx

        try:
            response = await self.client.post("chat/completions", json=self._body(body))
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(502, f"upstream failed: {type(error).__name__} {error}", "upstream_error") from error
        self._raise_for(response.status_code, response.content)
        try:
            value = response.json()
        except ValueError as error:
            raise EndpointError(502, "upstream did not answer in JSON", "upstream_error") from error
        if not isinstance(value, dict):
            raise EndpointError(502, "upstream did not answer with an object", "upstream_error")
        return value

    async def stream(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        """The upstream's events, as they come. EndpointError when it fails, also in the middle.

        An answer is whole when a finish reason or [DONE] came; `transformers serve` sends only the first, and [DONE] is added.
        """
        import httpx

        finished = done = False
        try:
            async with self.client.stream("POST", "chat/completions", json=self._body(body)) as response:
                if response.status_code >= 400:
                    self._raise_for(response.status_code, await response.aread())
                async for line in response.aiter_lines():
                    if line.startswith("data:"):
                        done = line[5:].strip() == "[DONE]"
                        finished = finished or done or _finishes(line[5:])
                        yield line.encode() + b"\n\n"
        except (httpx.HTTPError, httpx.InvalidURL) as error:
            raise EndpointError(502, f"upstream failed: {type(error).__name__} {error}", "upstream_error") from error
        if not finished:
            raise EndpointError(502, "upstream ended its answer early", "upstream_error")
        if not done:
            yield event("[DONE]")

    @staticmethod
    def _raise_for(status: int, content: bytes) -> None:
        if status >= 400:
            text = content[:500].decode("utf-8", "replace")
            raise EndpointError(status if status < 500 else 502, f"upstream answered {status}: {text}", "upstream_error")

    async def close(self) -> None:
        """Close the connections."""
        await self.client.aclose()
