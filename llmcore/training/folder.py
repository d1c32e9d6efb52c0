"""A run folder: metrics one line at a time, checkpoints that are whole or not there."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from llmcore.adapters import unwrap
from llmcore.files import atomic_directory, write_json


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Lines of a metrics file; a last line cut by a kill is left out."""
    if not path.is_file():
        return []
    lines = []
    for line in path.read_text().splitlines():
        try:
            lines.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return lines


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Append one JSON line; made first when the file is not there. A kill leaves the line whole or absent."""
    # One write to a file opened for appending: a line is there or not.
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(handle, (json.dumps(record) + "\n").encode())
    finally:
        os.close(handle)


def whole(t: torch.Tensor) -> torch.Tensor:
    """The tensor on the CPU, contiguous, detached; a sharded one (DTensor) is gathered, which every rank must join."""
    t = t.detach()
    return (t.full_tensor() if hasattr(t, "full_tensor") else t).cpu().contiguous()


def _assign(target: torch.Tensor, value: torch.Tensor) -> None:
    if hasattr(target, "device_mesh"):
        from torch.distributed.tensor import DTensor, distribute_tensor

        assert isinstance(target, DTensor)

        value = distribute_tensor(value.to(target.device), target.device_mesh, target.placements)
    target.copy_(value)


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """Parameters with requires_grad by name, below data-parallel and compile wrappers, so that names do not depend on the launch."""
    return {name: p for name, p in unwrap(model).named_parameters() if p.requires_grad}


def save_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any], writes: bool) -> None:
    """Write trained parameters, optimiser state, random-number state and `state` to `folder`, aside first and then by one rename.

    Every rank calls it (sharded tensors are gathered); only the one with `writes` touches the disk.
    """
    from safetensors.torch import save_file

    parameters = trainable(model)
    tensors = {f"model.{name}": whole(p) for name, p in parameters.items()}
    for name, p in parameters.items():
        for key, value in optimizer.state.get(p, {}).items():
            tensors[f"optimizer.{key}.{name}"] = whole(value) if isinstance(value, torch.Tensor) else torch.tensor(value)
    tensors["rng.cpu"] = torch.get_rng_state()
    if torch.cuda.is_available():
        tensors["rng.cuda"] = torch.cuda.get_rng_state()
    if writes:
        with atomic_directory(folder, replace=True) as temporary:
            save_file(tensors, temporary / "state.safetensors")
            write_json(temporary / "state.json", state)


def load_checkpoint(folder: Path, model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Restore in place what `save_checkpoint` wrote; returns its `state`.

    Raises:
        ValueError: a trained parameter of this model is not in the checkpoint.
    """
    from safetensors import safe_open

    parameters = trainable(model)
    with safe_open(folder / "state.safetensors", "pt") as file, torch.no_grad():
        names = set(file.keys())
        missing = [name for name in parameters if f"model.{name}" not in names]
        if missing:
            raise ValueError(f"{folder} does not hold parameter {missing[0]}: it belongs to another model; choose another output_dir")
        for name, p in parameters.items():
            _assign(p, file.get_tensor(f"model.{name}"))
        for entry in sorted(n for n in names if n.startswith("optimizer.")):
            _, key, name = entry.split(".", 2)
            value, p = file.get_tensor(entry), parameters[name]
            slot = optimizer.state[p]
            if value.shape == p.shape and value.dim() > 0:
                slot[key] = torch.zeros_like(p, dtype=value.dtype)
                _assign(slot[key], value)
            else:
                slot[key] = value
        torch.set_rng_state(file.get_tensor("rng.cpu"))
        if "rng.cuda" in names and torch.cuda.is_available():
            torch.cuda.set_rng_state(file.get_tensor("rng.cuda"))
    return json.loads((folder / "state.json").read_text())


def checkpoints(output_dir: Path) -> list[tuple[int, Path]]:
    """Complete checkpoints of a run folder, oldest first."""
    found = [(int(p.name.split("-")[1]), p) for p in output_dir.glob("checkpoint-*") if (p / "state.json").is_file()]
    return sorted(found)
