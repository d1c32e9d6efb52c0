"""An index of many fingerprints: add checkpoints one by one, ask which of them a suspect is most like.

One file a model, written atomically, so adding is resumable and a checkpoint that fails is recorded and does not stop the rest. A query is
one pass over half-precision sketches, packed once: b numbers a channel, by arithmetic 123 MB for 10,000 models and one variant of the
terms at the defaults. No approximate-neighbour structure is needed below a million models.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from llmcore.kernels.invariants import sketch_scores
from llmcore.methods.huref.comparison import RELATED, SAME_BASE, verdict_of
from llmcore.methods.huref.fingerprints import Fingerprint, check_alike, fingerprint, load

from llmcore import files

_SUFFIX = ".huref.safetensors"


@dataclasses.dataclass(frozen=True)
class Match:
    """One model of the index. score: the better of ics (paper) and ics_hardened. per_channel: channel name -> correlation."""

    model: str
    score: float
    ics: float
    ics_hardened: float
    verdict: str
    per_channel: dict[str, float]

    def to_json(self) -> dict[str, Any]:
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in dataclasses.asdict(self).items()}


@dataclasses.dataclass(frozen=True)
class Added:
    """What an `add_tree` did. failed: path -> reason."""

    added: list[str]
    present: list[str]
    failed: dict[str, str]

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


class Index:
    """A folder of fingerprints made under one set of conventions; those of the first model that is added.

    Args:
        folder: where the index lives; made when missing. settings: arguments of `fingerprint` for the first model (K, layers, terms ...).

    Example:
        index = Index("zoo-index")
        index.add_tree("models/")
        print(index.query("suspect-dir", top=5)[0].model)
    """

    def __init__(self, folder: str | Path, **settings: Any):
        self.folder = Path(folder).expanduser()
        self._settings = settings
        self._conventions: Fingerprint | None = None
        self._packed: tuple[torch.Tensor, torch.Tensor, list[str]] | None = None
        (self.folder / "models").mkdir(parents=True, exist_ok=True)

    def __len__(self) -> int:
        return len(self._entries())

    def _entries(self) -> list[str]:
        with os.scandir(self.folder / "models") as found:
            return sorted(e.name for e in found if e.name.endswith(_SUFFIX) and not e.name.startswith("."))

    @property
    def failed(self) -> dict[str, str]:
        """Checkpoints that could not be added, and why; an entry goes away when the checkpoint is added after all."""
        path = self.folder / "failed.json"
        return json.loads(path.read_text()) if path.exists() else {}

    def _record(self, name: str, reason: str | None) -> None:
        with files.locked(self.folder / "failed.json"):
            table = self.failed
            if reason is None and name not in table:
                return
            table.pop(name, None) if reason is None else table.update({name: reason})
            files.write_json(self.folder / "failed.json", table)

    def _file(self, name: str) -> Path:
        digest = hashlib.blake2b(name.encode(), digest_size=6).hexdigest()
        readable = "".join(c if c.isalnum() or c in "-_." else "_" for c in Path(name).name)[:80]
        return self.folder / "models" / f"{readable}-{digest}{_SUFFIX}"

    def conventions(self) -> Fingerprint | None:
        """The fingerprint whose conventions hold for the whole index (None: empty)."""
        if self._conventions is None and (self.folder / "conventions.safetensors").exists():
            self._conventions = load(self.folder / "conventions.safetensors")
        return self._conventions

    def _fingerprint(self, path: str | Path) -> Fingerprint:
        first = self.conventions()
        return fingerprint(path, **(first.settings() if first is not None else self._settings))

    def add(self, path: str | Path | Fingerprint, *, name: str | None = None) -> Path:
        """Fingerprint a checkpoint (or take a Fingerprint) and store it; returns its file. An entry of the same name is replaced."""
        found = path if isinstance(path, Fingerprint) else self._fingerprint(path)
        name = name or (found.header["model"] if isinstance(path, Fingerprint) else str(path))
        with files.locked(self.folder / "conventions"):
            first = self.conventions()
            if first is None:
                found.save(self.folder / "conventions.safetensors")
            else:
                check_alike(first.header, found.header)
                if set(first.header["terms"]) != set(found.header["terms"]):
                    raise ValueError(f"terms must be those of the index ({first.header['terms']}), got {found.header['terms']}")
        target = self._file(name)
        dataclasses.replace(found, header={**found.header, "model": name}).save(target)
        self._packed = None
        return target

    def add_many(self, paths: Iterable[str | Path], *, progress: Callable[[str], None] | None = None) -> Added:
        """Add checkpoints one after the other: those already in the index are passed over, those that fail are recorded in `failed`."""
        added, present, failed = [], [], {}
        for path in paths:
            name = str(path)
            if self._file(name).exists():
                present.append(name)
                continue
            if progress is not None:
                progress(name)
            try:
                self.add(path, name=name)
                added.append(name)
                self._record(name, None)
            except Exception as error:  # whatever one checkpoint holds must not stop the others; it is reported
                failed[name] = f"{type(error).__name__}: {error}"
                self._record(name, failed[name])
        return Added(added, present, failed)

    def add_tree(self, folder: str | Path, *, progress: Callable[[str], None] | None = None) -> Added:
        """Add every checkpoint below a folder: directories with a config.json, and .gguf files."""
        return self.add_many(find_checkpoints(Path(folder)), progress=progress)

    def _pack(self) -> tuple[torch.Tensor, torch.Tensor, list[str]]:
        """(N, C · b) float16 sketches, (N, C) which channels exist, names: from the packed file when it is as new as the entries."""
        if self._packed is not None:
            return self._packed
        names = self._entries()
        stamp = hashlib.blake2b(digest_size=16)
        for entry in names:
            status = (self.folder / "models" / entry).stat()
            stamp.update(f"{entry} {status.st_mtime_ns} {status.st_size}\n".encode())
        packed, listing = self.folder / "packed.npy", self.folder / "packed.json"
        with contextlib.suppress(OSError, ValueError, KeyError):
            known = json.loads(listing.read_text())
            if known["stamp"] == stamp.hexdigest():
                stored = np.load(packed, mmap_mode="c")
                self._packed = (
                    torch.from_numpy(np.ascontiguousarray(stored)),
                    torch.tensor(known["valid"], dtype=torch.bool),
                    known["models"],
                )
                return self._packed
        first = self.conventions()
        if first is None or not names:
            raise ValueError(f"the index {self.folder} is empty; add checkpoints first")
        sketches = torch.empty(len(names), first.sketches.numel(), dtype=torch.float16)
        valid = torch.empty(len(names), len(first.channels), dtype=torch.bool)
        models = []
        for i, entry in enumerate(names):
            found = load(self.folder / "models" / entry)
            check_alike(first.header, found.header)
            sketches[i] = found.sketches.view(-1)
            valid[i] = found.sketches.any(1)
            models.append(found.header["model"])
        with files.atomic_path(packed) as temporary:
            with open(temporary, "wb") as out:
                np.save(out, sketches.numpy())
        files.write_json(listing, {"stamp": stamp.hexdigest(), "models": models, "valid": valid.tolist()}, indent=None)
        self._packed = sketches, valid, models
        return self._packed

    def query(
        self, path: str | Path | Fingerprint, *, top: int = 10, same_base: float = SAME_BASE, related: float = RELATED
    ) -> list[Match]:
        """The models most like a checkpoint (or a Fingerprint), best first, by the better of the paper's and the hardened score."""
        if top < 1:
            raise ValueError(f"top must be at least 1, got {top}")
        found = path if isinstance(path, Fingerprint) else self._fingerprint(path)
        first = self.conventions()
        if first is None:
            raise ValueError(f"the index {self.folder} is empty; add checkpoints first")
        check_alike(first.header, found.header)
        order = {channel: i for i, channel in enumerate(found.channels)}
        if set(order) != set(first.channels):
            raise ValueError(f"channels must be those of the index, {first.channels}, got {found.channels}")
        asked = found.sketches[[order[c] for c in first.channels]]
        sketches, valid, models = self._pack()
        scores = sketch_scores(sketches, asked.reshape(-1), channels=len(first.channels))
        usable = valid & asked.any(1)
        kinds = torch.tensor([[c[0] == kind for kind in ("paper", "hardened")] for c in first.channels], dtype=torch.float32)
        means = torch.where(usable, scores, 0.0) @ kinds / (usable.float() @ kinds)  # NaN where no channel of a kind is usable
        best = means.nan_to_num(nan=-math.inf).amax(1)
        ranked = torch.topk(best, min(top, len(models))).indices
        rows = zip(ranked.tolist(), best[ranked].tolist(), means[ranked].tolist(), scores[ranked].tolist(), strict=True)
        return [
            Match(
                models[i],
                score,
                paper,
                hardened,
                verdict_of(score, same_base=same_base, related=related),
                {f"{name} {layer}": value for (_, name, layer), value in zip(first.channels, by_channel, strict=True)},
            )
            for i, score, (paper, hardened), by_channel in rows
        ]


def find_checkpoints(folder: Path) -> Iterator[Path]:
    """Directories that hold a config.json or adapter and weights, and single .gguf files, in sorted order."""
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such directory")
    for current, folders, names in os.walk(folder):
        folders.sort()
        if any(n.endswith((".safetensors", ".bin", ".index.json")) for n in names):
            yield Path(current)
        yield from (Path(current) / n for n in sorted(names) if n.endswith(".gguf"))
