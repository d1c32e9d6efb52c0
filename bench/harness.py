"""Measuring, shared by every bench file: interleaved rounds, peak resident memory in a fresh process, the machine's own GEMM rate, JSON
results.

rows = interleaved({"ours": step_a, "peer": step_b}, rounds=7)        median and percentiles of each, in the order a, b, a, b, …
bytes = peak_memory(build_step, args)                                 peak resident bytes of one step above its resident inputs
with Remote(build_step, args) as step: step.run()                     a step in a process of its own: times, peak bytes, result
save("linear_logprob", rows)                                          bench/results/<device>/linear_logprob.json
"""

from __future__ import annotations

import contextlib
import datetime
import importlib.metadata
import json
import math
import multiprocessing
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

RESULTS = Path(__file__).resolve().parent / "results"
PACKAGES = ("torch", "triton", "transformers", "trl", "liger-kernel", "cut-cross-entropy")


def device_name() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    model = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text()) if Path("/proc/cpuinfo").exists() else None
    return model.group(1).strip() if model else platform.processor() or platform.machine()


def _threads() -> str:
    count = torch.get_num_threads()
    return f"{count}-thread{'s' if count > 1 else ''}"


def device_slug() -> str:
    level = {0: "baseline", 1: "avx2", 2: "avx512", 3: "avx512-bf16"}
    name = device_name()
    if not torch.cuda.is_available() and name == "Intel(R) Xeon(R) Processor":  # a virtual machine that hides the model: say what it has
        flags = Path("/proc/cpuinfo").read_text().split("flags", 1)[-1].split("\n", 1)[0].split()
        return f"intel-xeon-{'amx' if 'amx_tile' in flags else 'avx512' if 'avx512f' in flags else 'avx2'}-{_threads()}"
    if not torch.cuda.is_available():
        from llmcore.kernels import backends

        name += f" {level[torch.ops.llmcore.extension_info()]}" if backends.extension_error() is None else ""
        count = torch.get_num_threads()
        name += f" {count} thread{'s' if count > 1 else ''}"
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


def header() -> dict[str, Any]:
    """Device, versions, threads, commit and date: what every result file states."""

    def version(package: str) -> str | None:
        try:
            return importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            return None

    def git(*args: str) -> str:
        return subprocess.run(["git", *args], cwd=RESULTS.parent, capture_output=True, text=True).stdout.strip()

    return {
        "device": device_name(),
        "threads": torch.get_num_threads(),
        "versions": {name: found for name in PACKAGES if (found := version(name))},
        "python": platform.python_version(),
        "commit": git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--", "kernels", "csrc") else ""),
        "date": datetime.date.today().isoformat(),
        "load_average_at_start": os.getloadavg()[0],
    }


def _synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def _timed(step: Callable[[], Any] | Remote) -> tuple[float, float]:
    """Wall and CPU milliseconds of one run."""
    if isinstance(step, Remote):
        run = step.run()
        return run.wall_ms, run.cpu_ms
    _synchronize()
    begin, begin_cpu = time.perf_counter(), time.process_time()
    step()
    _synchronize()
    return (time.perf_counter() - begin) * 1e3, (time.process_time() - begin_cpu) * 1e3


def interleaved(
    steps: Mapping[str, Callable[[], Any] | Remote],
    *,
    rounds: int = 7,
    warmup: int = 1,
    slow_rounds: int = 3,
    slow_factor: float = 3.0,
    once_above_s: float = math.inf,
) -> dict[str, dict[str, Any]]:
    """Run the steps in turn, round after round, so that drift of the machine hits all alike.

    A step slower than slow_factor times the fastest runs only slow_rounds rounds, and not again at all when its warm-up took more than
    once_above_s seconds: then the warm-up is its one round. Its number of rounds is in the result.
    Returns name -> {median_ms, p20_ms, p80_ms, min_ms, cpu_ms (process time, median), rounds}.
    """
    first: dict[str, tuple[float, float]] = {}
    for name, step in steps.items():
        for _ in range(max(warmup, 1)):
            first[name] = _timed(step)
    fastest = min(elapsed for elapsed, _ in first.values())
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for name, (elapsed, spent) in first.items():
        if elapsed > slow_factor * fastest and elapsed > 1e3 * once_above_s:
            wall[name], cpu[name] = [elapsed], [spent]
    once = {name for name, times in wall.items() if times}
    for turn in range(rounds):
        for name, step in steps.items():
            if name in once or (turn >= slow_rounds and first[name][0] > slow_factor * fastest):
                continue
            elapsed, spent = _timed(step)
            wall[name].append(elapsed)
            cpu[name].append(spent)

    def at(values: list[float], share: float) -> float:
        ordered = sorted(values)
        return ordered[min(len(ordered) - 1, round(share * (len(ordered) - 1)))]

    return {
        name: {"median_ms": statistics.median(t), "p20_ms": at(t, 0.2), "p80_ms": at(t, 0.8), "min_ms": min(t), "cpu_ms":
        statistics.median(cpu[name]),
               "rounds": len(t)}
        for name, t in wall.items()
    }  # fmt: skip


def _status(field: str) -> int:
    return int(re.search(rf"{field}:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024  # type: ignore[index]


class Run(NamedTuple):
    """One run of a step in its own process."""

    wall_ms: float
    cpu_ms: float
    peak_bytes: int  # above what was resident before the step
    result: Any


def _serve(connection: Any, build: Callable[..., Callable[[], Any]], args: tuple) -> None:
    try:
        step = build(*args)
        connection.send(None)
        while (want_result := connection.recv()) is not None:
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            else:
                Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts again at the present resident size
                before = _status("VmRSS")
            begin, begin_cpu = time.perf_counter(), time.process_time()
            result = step()
            _synchronize()
            wall, cpu = time.perf_counter() - begin, time.process_time() - begin_cpu
            peak = (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else _status("VmHWM")) - before
            connection.send(Run(wall * 1e3, cpu * 1e3, peak, result if want_result else None))
            del result
    except EOFError:  # the measuring process went away
        return
    except Exception as error:  # raised again in the measuring process
        connection.send(f"{type(error).__name__}: {error}")


class Remote:
    """A step in a fresh process of its own, which times itself: what it holds and what its allocator keeps touches no other step's figures.

    build(*args) makes the inputs and returns the step; both must be picklable. `first` is the first run, with the step's result where
    `result` asks for it; of later runs the result is dropped. In `interleaved` its own times count. The process ends with the `with` block.
    """

    def __init__(
        self,
        build: Callable[..., Callable[[], Any]],
        args: tuple = (),
        *,
        result: bool = False,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        self._result = result
        self.first: Run | None = None
        context = multiprocessing.get_context("spawn")
        self._connection, sender = context.Pipe()
        before = {key: os.environ.get(key) for key in environment or {}}
        os.environ.update(environment or {})
        try:
            self._process = context.Process(target=_serve, args=(sender, build, args))
            self._process.start()
        finally:
            for key, value in before.items():
                if value is None:
                    os.environ.pop(key, None)
                else:
                    os.environ[key] = value
        sender.close()
        self._receive()

    def _receive(self) -> Any:
        try:
            answer = self._connection.recv()
        except EOFError:
            self._process.join()
            code = self._process.exitcode
            answer = f"the measuring process died with exit code {code}" + (", as when memory runs out" if code == -9 else "")
        if isinstance(answer, str):
            raise RuntimeError(answer)
        return answer

    def run(self) -> Run:
        self._connection.send(self._result and self.first is None)
        run = self._receive()
        self.first = self.first or run
        return run

    def __enter__(self) -> Remote:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(OSError):  # a process that died has closed its end
            self._connection.send(None)
        self._process.join()


def peak_memory(build: Callable[..., Callable[[], Any]], args: tuple = (), *, warm: bool = True, threads: int | None = None) -> int:
    """Peak bytes of one step above its resident inputs, in a fresh process: resident set on CPU, allocator on a GPU.

    build(*args) makes the inputs and returns the step; both must be picklable (module-level). The step's results must be dropped by itself.
    glibc's allocator is told to give freed blocks back, or the warm step's memory would count as resident before the measured one.
    """
    settings = {"MALLOC_TRIM_THRESHOLD_": "65536", "MALLOC_MMAP_THRESHOLD_": "65536"}
    if threads is not None:
        settings["OMP_NUM_THREADS"] = str(threads)
    with Remote(build, args, environment=settings) as remote:
        if warm:  # one step outside the measurement: compilation, thread pools
            remote.run()
        return remote.run().peak_bytes


def gemm_step(m: int, n: int, k: int, dtype: torch.dtype, device: str = "cpu") -> Callable[[], Any]:
    """One library product (m, k) · (n, k)ᵀ, to be interleaved with what is measured: 2·m·n·k FLOP at the rate this machine really has."""
    a, b = torch.randn(m, k, dtype=dtype, device=device), torch.randn(n, k, dtype=dtype, device=device)
    out = torch.empty(m, n, dtype=dtype, device=device)
    return lambda: torch.mm(a, b.T, out=out)


def save(name: str, content: Mapping[str, Any]) -> Path:
    """Write bench/results/<device>/<name>.json whole or not at all."""
    path = RESULTS / device_slug() / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({**header(), **content}, indent=1) + "\n")
    temporary.replace(path)
    return path
