"""`llmcore guard`: calibrate a jailbreak detector on benign prompts, check prompts, serve a guarded endpoint."""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import typer

app = typer.Typer(add_completion=False, no_args_is_help=True, help="Gradient Cuff: calibrate, check, serve.")

MODEL = typer.Option("smollm2", help="directory, hub id, .gguf file or 'smollm2'")
DEVICE = typer.Option(None, help="cpu, cuda, …; default: the GPU when there is one")
DTYPE = typer.Option(None, help="float32, bfloat16, …; default: the checkpoint's")
PHRASES = typer.Option("official", help="refusal phrases: official, extended, or a text file with one phrase a line")
SEED_FILE = typer.Option(None, help="file with the secret seed (an integer); default: LLMCORE_GUARD_SEED, else the published 13")


def record(line: str) -> Any:
    """The query of one input line: a JSON string, {"user_query": …}, {"messages": […]}, {"prompt": …}, or plain text."""
    text = line.strip()
    if not text.startswith(("{", '"', "[")):
        return text
    value = json.loads(text)
    if isinstance(value, (str, list)):
        return value
    for name in ("messages", "user_query", "prompt"):
        if name in value:
            return value[name]
    raise ValueError(f"a record must have user_query, messages or prompt, got {sorted(value)}")


def _lines(path: str) -> list[str]:
    if path != "-" and not Path(path).is_file():
        raise FileNotFoundError(f"{path} is not a file; name a file of prompts (one a line) or - for standard input")
    text = sys.stdin.read() if path == "-" else Path(path).read_text(encoding="utf-8")
    return [line for line in text.split("\n") if line.strip()]


def _queries(path: str) -> list[Any]:
    queries = []
    for number, line in enumerate(_lines(path), 1):
        try:
            queries.append(record(line))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
    return queries


def _load(model: str, device: str | None, dtype: str | None) -> Any:
    import torch

    from llmcore.models import load_model

    return load_model(model, device=device, dtype=getattr(torch, dtype) if dtype else None)


def _seed(path: Path | None) -> int:
    text = path.read_text() if path else os.environ.get("LLMCORE_GUARD_SEED", "13")
    try:
        return int(text.strip(), 0)
    except ValueError:
        raise ValueError(f"the seed must be an integer, in {path or 'LLMCORE_GUARD_SEED'}") from None


def _refusal(phrases: str) -> Any:
    if phrases in ("official", "extended"):
        return phrases
    from llmcore.methods.gradient_cuff import RefusalMatcher

    return RefusalMatcher(_lines(phrases))


def _profile(path: Path, phrases: str, seed_file: Path | None, **changes: Any) -> tuple[Any, Any]:
    """A calibration and the configuration it was made for."""
    from llmcore.methods.gradient_cuff import Calibration, CuffConfig

    calibration = Calibration.load(path)
    known = {name for name in CuffConfig.__dataclass_fields__ if name != "refusal"}
    stored = {name: value for name, value in calibration.fingerprint.items() if name in known}
    return calibration, CuffConfig(**stored, refusal=_refusal(phrases), seed=_seed(seed_file), **changes)


class _Progress:
    """A counter on standard error: one line that is rewritten on a terminal, a line every ten seconds otherwise."""

    def __init__(self, total: int, label: str):
        self.total, self.label, self.done = total, label, 0
        self.begin = self.last = time.monotonic()

    def __call__(self, *_: Any) -> None:
        self.done += 1
        now = time.monotonic()
        terminal = sys.stderr.isatty()
        if terminal or now - self.last > 10 or self.done == self.total:
            self.last = now
            left = (now - self.begin) / self.done * (self.total - self.done)
            end = "\r" if terminal and self.done < self.total else "\n"
            print(f"{self.label} {self.done}/{self.total}, {left:.0f} s left ", end=end, file=sys.stderr, flush=True)


@app.command()
def calibrate(
    prompts: str = typer.Argument(..., help="benign prompts, one record a line (- for standard input)"),
    out: Path = typer.Option(Path("guard-profile.json"), help="where to write the profile"),
    must_refuse: str = typer.Option(None, help="prompts that the model plainly refuses: the positive control"),
    sigma: float = typer.Option(0.05, help="target false-positive rate"),
    method: str = typer.Option("plugin", help="plugin or conformal"),
    num_samples: int = typer.Option(10, help="N, samples a row"),
    num_directions: int = typer.Option(10, help="P, shifted copies of the prompt"),
    smoothing: float = typer.Option(0.02, help="size of the shift"),
    max_new_tokens: int = typer.Option(16, help="tokens of a sample"),
    kind: str = typer.Option("gaussian", help="gaussian, sphere, antithetic or orthogonal"),
    model: str = MODEL, device: str = DEVICE, dtype: str = DTYPE, phrases: str = PHRASES, seed_file: Path = SEED_FILE,
    as_json: bool = typer.Option(False, "--json", help="print the profile"),
) -> None:  # fmt: skip
    """Choose the threshold on benign prompts and write a profile.

    Example: llmcore guard calibrate benign.jsonl --must-refuse refused.jsonl --out profile.json
    """
    import warnings

    from llmcore.methods import gradient_cuff as gc

    config = gc.CuffConfig(
        num_samples=num_samples, num_directions=num_directions, smoothing=smoothing, max_new_tokens=max_new_tokens, kind=kind,
        refusal=_refusal(phrases), seed=_seed(seed_file),
    )  # fmt: skip
    queries = _queries(prompts)
    control = _queries(must_refuse) if must_refuse else None
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        result = gc.calibrate(
            _load(model, device, dtype), queries, config, sigma=sigma, method=method, must_refuse=control,
            on_done=_Progress(len(queries), "calibrate"),
        )
    for warning in caught:
        if issubclass(warning.category, UserWarning):
            print(f"warning: {warning.message}", file=sys.stderr)
    result.save(out)
    if as_json:
        print(json.dumps(result.to_json()))
        return
    low, high = result.interval
    print(f"threshold {result.threshold:.6g}{'' if result.feasible else ' (the target cannot be met)'}")
    print(f"benign prompts turned away: {result.rejected} of {result.n} = {result.rate:.1%}, 95 % interval {low:.1%} … {high:.1%}")
    print(f"at stage 1 already: {result.stage1_rejected}; distinct norms {result.distinct_norms}, share of zeros {result.zero_share:.0%}")
    print(f"written to {out}")


def finished(path: Path) -> int:
    """Complete records of an earlier run; a half-written last line is cut off."""
    if not path.exists():
        return 0
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) != len(data):
        with open(path, "rb+") as file:
            file.truncate(len(whole))
    count = 0
    for line in whole.decode("utf-8").splitlines():
        if json.loads(line).get("index") != count:
            raise ValueError(f"{path} must hold the records 0, 1, … of an earlier run, line {count + 1} does not; name another output file")
        count += 1
    return count


def judged(model: Any, lines: list[str], threshold: float, config: Any, start: int = 0, group: int = 16) -> Iterator[dict[str, Any]]:
    """One result a line, in order; a line that fails is reported in its place and costs no other."""
    from llmcore.methods.gradient_cuff.detector import Detector
    from llmcore.methods.gradient_cuff.query import verdict_of

    for begin in range(start, len(lines), group):
        results: dict[int, dict[str, Any]] = {}
        detector = Detector(model, config, threshold=threshold)
        queries: dict[int, Any] = {}
        for index in range(begin, min(begin + group, len(lines))):
            try:
                queries[index] = detector.prepare(record(lines[index]), index)
            except (ValueError, TypeError) as error:
                results[index] = {"index": index, "error": f"{type(error).__name__}: {error}"}
        try:
            for query in queries.values():
                detector.submit(query)
            while not detector.idle:
                detector.advance()
        except RuntimeError:
            # One query broke the batch: ask each alone, so that only it is reported.
            for index, query in queries.items():
                single = Detector(model, config, threshold=threshold)
                try:
                    queries[index] = single.prepare(record(lines[index]), query.query_id)
                    single.submit(queries[index])
                    while not single.idle:
                        single.advance()
                except RuntimeError as error:
                    results[index] = {"index": index, "error": f"{type(error).__name__}: {error}"}
        for index, query in queries.items():
            if index not in results:
                results[index] = {"index": index, **verdict_of(query).to_json()}
        for index in sorted(results):
            yield results[index]


def write_all(results: Iterable[dict[str, Any]], out: Path | None, progress: Any) -> tuple[int, int, int]:
    """Append records as they come; returns (records, rejected, failed)."""
    total = rejected = failed = 0
    target = open(out, "a", encoding="utf-8") if out else sys.stdout  # noqa: SIM115
    try:
        for result in results:
            target.write(json.dumps(result, ensure_ascii=False) + "\n")
            target.flush()
            total, rejected, failed = total + 1, rejected + bool(result.get("rejected")), failed + ("error" in result)
            progress()
    finally:
        if out:
            target.close()
    return total, rejected, failed


@app.command()
def check(
    prompts: str = typer.Argument("-", help="prompts, one record a line (- for standard input)"),
    profile: Path = typer.Option(..., help="profile written by calibrate"),
    out: Path = typer.Option(None, help="JSONL results; an existing file is continued; default: standard output"),
    early_exit: bool = typer.Option(True, help="stop a query as soon as its verdict is certain (the verdict never changes)"),
    model: str = MODEL, device: str = DEVICE, dtype: str = DTYPE, phrases: str = PHRASES, seed_file: Path = SEED_FILE,
) -> None:  # fmt: skip
    """Judge prompts. Exit code 1 when a record failed.

    Example: echo 'Say hi.' | llmcore guard check --profile profile.json
    """
    from llmcore.methods.gradient_cuff.config import require_match

    calibration, config = _profile(profile, phrases, seed_file, early_exit=early_exit)
    lines = _lines(prompts)
    start = finished(out) if out else 0
    if start > len(lines):
        raise ValueError(f"{out} holds {start} records, {prompts} only {len(lines)}; name another output file")
    loaded = _load(model, device, dtype)
    require_match(calibration, loaded, config)
    results = judged(loaded, lines, calibration.threshold, config, start)
    total, rejected, failed = write_all(results, out, _Progress(len(lines) - start, "check"))
    print(f"{total} checked ({start} before), {rejected} rejected, {failed} failed", file=sys.stderr)
    if failed:
        raise typer.Exit(1)


@app.command()
def serve(
    profile: Path = typer.Option(..., help="profile written by calibrate"),
    host: str = typer.Option("127.0.0.1"), port: int = typer.Option(8080),
    upstream: str = typer.Option(None, help="OpenAI-compatible server that answers (http://127.0.0.1:8000/v1); default: the model itself"),
    upstream_model: str = typer.Option(None, help="model name sent upstream; default: the client's"),
    upstream_key: str = typer.Option("UPSTREAM_API_KEY", help="environment variable with the upstream's key"),
    action: str = typer.Option("refuse", help="refuse, or flag (answer, and mark the response)"),
    message: str = typer.Option(None, help="what a refused client reads"),
    max_body_bytes: int = typer.Option(1 << 20),
    timeout: float = typer.Option(120.0, help="seconds until a verdict or the next piece of text"),
    max_requests: int = typer.Option(64, help="requests in flight; more are turned away with 429"),
    max_answer_tokens: int = typer.Option(512),
    model: str = MODEL, device: str = DEVICE, dtype: str = DTYPE, phrases: str = PHRASES, seed_file: Path = SEED_FILE,
) -> None:  # fmt: skip
    """Serve an OpenAI-compatible chat endpoint behind the detector; it fails closed.

    Example: llmcore guard serve --profile profile.json --upstream http://127.0.0.1:8000/v1
    """
    try:
        import uvicorn

        from llmcore.commands.guard_server import Guard, Limits, application
    except ImportError as error:
        raise ValueError(f"guard serve needs fastapi, uvicorn and httpx ({error}); run pip install 'llmcore-kernels[serve]'") from None
    from llmcore.endpoints import Upstream
    from llmcore.methods.gradient_cuff import REJECTION
    from llmcore.methods.gradient_cuff.config import require_match

    calibration, config = _profile(profile, phrases, seed_file, early_exit=True)
    if config.seed == 13:
        print(
            "warning: the published seed 13 is in use; an attacker can optimise against its directions: use --seed-file",
            file=sys.stderr,
        )
    loaded = _load(model, device, dtype)
    require_match(calibration, loaded, config)
    target = Upstream(upstream, model=upstream_model, api_key=os.environ.get(upstream_key), timeout=timeout) if upstream else None
    guard = Guard(
        loaded, calibration.threshold, config, action=action, message=message or REJECTION, upstream=target,
        limits=Limits(body_bytes=max_body_bytes, seconds=timeout, requests=max_requests, answer_tokens=max_answer_tokens), name=model,
    )  # fmt: skip
    uvicorn.run(application(guard), host=host, port=port, log_level="warning", timeout_keep_alive=30)
