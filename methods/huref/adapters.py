"""Open a checkpoint, or a LoRA adapter on top of its base: the adapter's change is added to the rows as they are read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcore.methods.huref.layouts import Reader

from llmcore.checkpoints import CheckpointError, CheckpointReader


class AdaptedReader:
    """A base checkpoint with a LoRA adapter merged into whatever rows are asked for: W + s · B A, never written anywhere."""

    def __init__(self, base: CheckpointReader, adapter: CheckpointReader, config: dict[str, Any]):
        self._base, self._adapter = base, adapter
        self.base_path = base.path
        self.path, self.header_bytes = adapter.path, base.header_bytes + adapter.header_bytes
        if config.get("peft_type") != "LORA" or config.get("use_dora"):
            raise ValueError(f"{adapter.path}: only LoRA adapters (not DoRA) can be merged, got peft_type {config.get('peft_type')!r}")
        rank = config.get("r") or 1
        self._scale = config.get("lora_alpha", rank) / (rank**0.5 if config.get("use_rslora") else rank)
        self._transposed = bool(config.get("fan_in_fan_out"))
        self._low, self._replaced = {}, {}
        self._recent: dict[tuple[str, torch.dtype | None], tuple[torch.Tensor, torch.Tensor]] = {}
        for name in adapter.names():
            stem = name.removeprefix("base_model.model.")
            if stem.endswith(".lora_A.weight"):
                module = stem.removesuffix(".lora_A.weight")
                self._low[f"{module}.weight"] = (name, name.replace(".lora_A.", ".lora_B."))
            elif ".lora_embedding_" in stem or "lora_magnitude" in stem:
                raise ValueError(f"{adapter.path}: tensor {name!r}: adapters of embeddings are not supported; merge the adapter first")
            elif ".lora_B." not in stem:
                self._replaced[stem.replace(".modules_to_save", "")] = name
        unknown = [name for name in (*self._low, *self._replaced) if name not in base]
        if unknown:
            raise CheckpointError(f"{adapter.path}: changes {unknown[0]!r}, which the base {base.path} does not have")

    @property
    def config(self) -> dict[str, Any]:
        return self._base.config

    @property
    def metadata(self) -> dict[str, Any]:
        return self._base.metadata

    @property
    def bytes_read(self) -> int:
        return self._base.bytes_read + self._adapter.bytes_read

    def names(self) -> list[str]:
        return self._base.names()

    def __contains__(self, name: str) -> bool:
        return name in self._base

    def shape(self, name: str) -> tuple[int, ...]:
        return self._base.shape(name)

    def nbytes(self, name: str) -> int:
        return self._base.nbytes(name)

    def read(self, name: str, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        return self.rows(name, np.arange(self.shape(name)[0]), dtype=dtype)

    def slice(
        self, name: str, start: int, stop: int, *, dtype: torch.dtype | None = None, out: torch.Tensor | None = None
    ) -> torch.Tensor:
        return self.rows(name, np.arange(start, stop), dtype=dtype)

    def rows(self, name: str, ids: Any, *, dtype: torch.dtype | None = None) -> torch.Tensor:
        if name in self._replaced:
            return self._adapter.rows(self._replaced[name], ids, dtype=dtype)
        index = np.asarray(ids)
        whole = len(index) and np.array_equal(index, np.arange(index[0], index[0] + len(index)))
        values = (
            self._base.slice(name, int(index[0]), int(index[0]) + len(index), dtype=dtype)
            if whole
            else self._base.rows(name, index, dtype=dtype)
        )
        if name in self._low:
            low, high = self._factors(name, values.dtype)
            delta = (high @ low).mT[torch.from_numpy(index)] if self._transposed else high[torch.from_numpy(index)] @ low
            values = values + self._scale * delta
        return values

    def _factors(self, name: str, dtype: torch.dtype | None) -> tuple[torch.Tensor, torch.Tensor]:
        """(A, B) of a weight, read once for all blocks of its rows: those of the last two weights are kept (gate and up go in turns)."""
        if (name, dtype) not in self._recent:
            if len(self._recent) == 2:
                del self._recent[next(iter(self._recent))]
            low, high = (self._adapter.read(part, dtype=dtype) for part in self._low[name])
            self._recent[name, dtype] = low, high
        return self._recent[name, dtype]

    def close(self) -> None:
        self._base.close()
        self._adapter.close()


def open_checkpoint(path: str | Path, *, base: str | Path | None = None) -> Reader:
    """A reader of a checkpoint, or of an adapter directory on top of `base` (default: the base its configuration names, if it is here)."""
    if str(path) == "smollm2":
        from llmcore.models import embedded_path

        path = embedded_path()
    folder = Path(path).expanduser()
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        config = json.loads((folder / "adapter_config.json").read_text())
        named = base if base is not None else config.get("base_model_name_or_path")
        if named is None or not Path(named).expanduser().exists():
            raise CheckpointError(
                f"{folder}: is an adapter, not a model: give the base too (base=...); its configuration names {named!r}, "
                "which is not on this disk"
            )
        return AdaptedReader(CheckpointReader(named), CheckpointReader(folder / "adapter_model.safetensors"), config)  # type: ignore[return-value]
    return CheckpointReader(path)  # type: ignore[return-value]
