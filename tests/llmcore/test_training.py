"""The training loop as processes see it: killed and resumed, two ranks, steps that are not finite, other settings."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch import nn

from llmcore.training import StepOutput, TrainingConfig, checkpoints, read_metrics, train

ROWS = [
    {"prompt": f"Count to {n}:", "chosen": f" {n} it is", "rejected": f" no, {n + 1} rather"} for n in range(3, 11)
]


def arguments(model: str, rows: Path, out: Path, steps: int) -> list[str]:
    return ["align", "train", "--data", str(rows), "--model", model, "--out", str(out), "--steps", str(steps), "--batch-size", "4",
            "--micro-batch-size", "2", "--checkpoint-every", "3", "--lora-rank", "4", "--lr", "1e-3", "--device", "cpu", "--json"]


@pytest.fixture
def rows(tmp_path) -> Path:
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return path


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.getcwd(), "CUDA_VISIBLE_DEVICES": ""}


def curves(out: Path) -> list[dict]:
    return [{k: v for k, v in line.items() if k != "seconds"} for line in read_metrics(out / "metrics.jsonl")]


def run(command: list[str]) -> None:
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-2000:]


def test_killed_and_resumed_is_undisturbed_and_two_ranks_are_one(tiny_model, rows, tmp_path):
    steps = 24
    module = [sys.executable, "-m", "llmcore"]
    run([*module, *arguments(tiny_model, rows, tmp_path / "whole", steps)])
    whole = curves(tmp_path / "whole")
    assert [line["step"] for line in whole] == list(range(1, steps + 1))
    assert whole[-1]["loss"] < whole[0]["loss"]

    out = tmp_path / "killed"
    with open(tmp_path / "log", "wb") as log:
        process = subprocess.Popen([*module, *arguments(tiny_model, rows, out, steps)], env=environment(), stdout=log, stderr=log)
        end = time.monotonic() + 200
        while len(read_metrics(out / "metrics.jsonl")) < 5 and process.poll() is None and time.monotonic() < end:
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL, "the run ended before it could be killed"
    found = checkpoints(out)
    assert found
    assert found[-1][0] < steps
    assert not (out / "final").exists()
    run([*module, *arguments(tiny_model, rows, out, steps)])
    assert curves(out) == whole
    name = "adapter_model.safetensors"
    assert (out / "final" / name).read_bytes() == (tmp_path / "whole" / "final" / name).read_bytes()

    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "llmcore"]
    short = arguments(tiny_model, rows, tmp_path / "ranks", steps)
    run([*launch, *short])
    ranks = curves(tmp_path / "ranks")
    assert [line["step"] for line in ranks] == [line["step"] for line in whole]
    for ours, theirs in zip(ranks, whole, strict=True):
        for key in ("loss", "rewards/margins", "logps/chosen", "grad_norm"):
            assert ours[key] == pytest.approx(theirs[key], rel=1e-4, abs=1e-5), (ours["step"], key)


class Line:
    """A micro-batch of numbers with names."""

    def __init__(self, ids: tuple[str, ...], values: torch.Tensor) -> None:
        self.ids, self.values, self.num_items = ids, values, len(values)


def step(model: nn.Module, batch: Line, _context: object) -> StepOutput:
    errors = (model(batch.values[:, None])[:, 0] - 1).square()
    return StepOutput(errors.sum() / 2, {"error": errors})


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(1, 1)


def lines(bad: set[int], count: int = 6) -> list[list[Line]]:
    return [[Line((f"rows:{i}a",), torch.tensor([1.0])), Line((f"rows:{i}b",), torch.tensor([float("nan") if i in bad else 2.0]))]
            for i in range(count)]


def test_a_nan_step_is_skipped_and_names_its_rows(tmp_path):
    net = model()
    config = TrainingConfig(learning_rate=0.1)
    result = train(net, lines({2}), step, config=config, output_dir=tmp_path / "run", progress=False)
    assert result.skipped == 1
    line = result.history[2]
    assert line["step"] == 3
    assert line["ids"] == ["rows:2b"]
    assert "not finite" in line["skipped"]
    assert "loss" not in line
    assert result.history[-1]["loss"] < result.history[0]["loss"]
    # The bad step changed nothing: the same run without it ends with the same weights.
    other = model()
    train(other, [b for i, b in enumerate(lines(set())) if i != 2], step, config=config, output_dir=tmp_path / "other", progress=False)
    assert torch.equal(net.weight, other.weight)


def test_a_run_of_nothing_but_nan_stops(tmp_path):
    with pytest.raises(RuntimeError, match=r"10 consecutive steps up to step 10 .*ids in"):
        train(model(), lines(set(range(20)), 20), step, output_dir=tmp_path, progress=False)


def test_other_settings_in_the_same_folder_are_refused(tmp_path):
    config = TrainingConfig(learning_rate=0.1)
    train(model(), lines(set()), step, config=config, output_dir=tmp_path, settings={"loss": "a"}, progress=False, stop_after=2)
    before = (tmp_path / "metrics.jsonl").read_bytes()
    for other, settings, name in ((TrainingConfig(learning_rate=0.2), {"loss": "a"}, "learning_rate"), (config, {"loss": "b"}, "loss")):
        with pytest.raises(ValueError, match=rf"other settings \({name}: "):
            train(model(), lines(set()), step, config=other, output_dir=tmp_path, settings=settings, progress=False)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before
    result = train(model(), lines(set()), step, config=config, output_dir=tmp_path, settings={"loss": "a"}, progress=False)
    assert result.resumed_from == 2
    assert [line["step"] for line in result.history] == [1, 2, 3, 4, 5, 6]
