"""Time every row that the Triton configuration table can hold on the GPU at hand, and print the rows to paste into
kernels/linear_logprob_configs.py. Nothing is stored: a row enters the table together with the device, the date and these figures.

    python bench/tune_linear_logprob.py --rows 8192 --hidden 4096 --vocab 128256
    TRITON_INTERPRET=1 python bench/tune_linear_logprob.py --rows 9 --hidden 32 --vocab 600        runs each candidate, times none
"""

from __future__ import annotations

import argparse
import statistics
import sys
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent.parent)]

from llmcore.kernels import linear_logprob_configs as configs  # noqa: E402 - the checkout first
from llmcore.kernels import linear_logprob_triton as implementation  # noqa: E402
from llmcore.kernels.linear_logprob_core import Head  # noqa: E402


def _milliseconds(step, rounds: int, timed: bool) -> float | None:
    step()
    if not timed:
        return None
    times = []
    flush = torch.empty(256 << 20, dtype=torch.uint8, device="cuda")
    for _ in range(rounds):
        flush.zero_()
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        step()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in (("rows", 8192), ("hidden", 4096), ("vocab", 128256), ("rounds", 30)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    given = parser.parse_args()
    timed = torch.cuda.is_available()
    if not timed and not implementation.interpreting():
        parser.exit(2, "needs a GPU (or TRITON_INTERPRET=1, which times nothing)\n")
    device, dtype = torch.device("cuda" if timed else "cpu"), getattr(torch, given.dtype)
    target, width = configs.architecture(device), "half" if dtype.itemsize == 2 else "full"
    generator = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(given.rows, given.hidden, generator=generator, device=device).to(dtype)
    weight = (torch.randn(given.vocab, given.hidden, generator=generator, device=device) / given.hidden**0.5).to(dtype)
    labels = torch.randint(given.vocab, (given.rows,), generator=generator, device=device)
    head = Head(hidden, torch.arange(given.rows, device=device), weight, None, labels, 0, 1.0, 0.0, 1.0)
    ones = torch.ones(given.rows, device=device)
    unit = 2.0 * given.rows * given.hidden * given.vocab
    name = torch.cuda.get_device_name() if timed else "interpreter"
    print(f"{name}, {target}, {given.dtype}, rows {given.rows}, torch {torch.__version__}")
    for step, units in (("forward", 1), ("backward", 3)):
        key = (step, width, target)
        found = []
        for config in (configs.CONFIGS[key], *configs.CANDIDATES.get(key, ())):
            configs.CONFIGS[key] = config
            stats = implementation.forward(head, 0)
            lse, score = stats.lse, stats.target
            if step == "forward":
                took = _milliseconds(lambda: implementation.forward(head, 0), given.rounds, timed)
            else:
                took = _milliseconds(
                    lambda lse=lse, score=score: implementation.backward(head, lse, score, ones, ones, None), given.rounds, timed
                )
            found.append((took or 0.0, config))
            figure = "not timed" if took is None else f"{took:.3f} ms, {units * unit / took / 1e9:.1f} TFLOP/s"
            print(f"  {step:<8} {config}: {figure}", flush=True)
        configs.CONFIGS[key] = min(found, key=lambda pair: pair[0])[1]
        if timed:
            print(f"    {key!r}: {configs.CONFIGS[key]!r},")
    return 0


if __name__ == "__main__":
    sys.exit(main())
