"""Where reference log-probabilities come from: cached scores, a second model, or the policy without its adapters."""
# S sequences, P pairs, N scored rows (tokens), D hidden, V vocab, E examples

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from llmcore.methods.direct_alignment.config import Config
from llmcore.methods.direct_alignment.scoring import sequence_scores

from llmcore import adapters, data, training


def model_hash(model: Any) -> str:
    """Sixteen hex digits of the weights below any adapter: names, dtypes, shapes, every byte. About half a second per gigabyte."""
    digest = hashlib.blake2b(digest_size=8)
    for name, p in sorted(adapters.base_model(model).named_parameters()):
        if "lora_" in name:
            continue
        p = p.full_tensor() if hasattr(p, "full_tensor") else p
        digest.update(f"{name.replace('.base_layer', '')} {p.dtype} {tuple(p.shape)}".encode())
        digest.update(p.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def reference_fingerprint(
    model: Any, tokenizer: Any, examples: Sequence[data.Example], config: Config, *, layout: str, isolate: bool
) -> dict[str, Any]:
    """Everything that decides a cached reference score."""
    return {
        "model": model_hash(model),
        "tokenizer": data.tokenizer_hash(tokenizer),
        "examples": data.examples_hash(examples),
        "max_length": config.max_length,
        "truncation": config.truncation,
        "ld_alpha": config.ld_alpha,
        "dtype": str(next(adapters.base_model(model).parameters()).dtype),
        "trunk": layout + ("/isolated" if isolate else ""),
    }


class CachedRef:
    """Reference log-probabilities computed once: one float32 number per sequence, with the fingerprint of what made them.

    Args:
        logp: (E, sequences per example). ids: example ids. fingerprint: see reference_fingerprint.

    Raises ValueError for NaN scores or a wrong length.
    """

    def __init__(self, logp: torch.Tensor, ids: Sequence[str], fingerprint: Mapping[str, Any]) -> None:
        logp = torch.as_tensor(logp, dtype=torch.float32).cpu()
        if logp.dim() != 2 or len(logp) != len(ids):
            raise ValueError(f"ref_logp must be ({len(ids)}, sequences per example), one row per example, got {tuple(logp.shape)}")
        if not bool(logp.isfinite().all()):
            bad = int((~logp.isfinite()).any(dim=1).nonzero()[0])
            raise ValueError(f"ref_logp of example {ids[bad]} is {logp[bad].tolist()}; score the reference again with a finite model")
        self.logp, self.ids, self.fingerprint = logp, tuple(ids), dict(fingerprint)
        self._place = {name: i for i, name in enumerate(ids)}

    def __len__(self) -> int:
        return len(self.logp)

    def save(self, path: str | Path) -> None:
        from llmcore.files import write_safetensors

        write_safetensors(path, {"logp": self.logp}, {"fingerprint": json.dumps(self.fingerprint), "ids": json.dumps(self.ids)})

    @classmethod
    def load(cls, path: str | Path) -> CachedRef:
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            if not {"fingerprint", "ids"} <= set(metadata):
                raise ValueError(f"{path} is not a file of cached reference scores (no fingerprint)")
            return cls(file.get_tensor("logp"), json.loads(metadata["ids"]), json.loads(metadata["fingerprint"]))

    def check(self, fingerprint: Mapping[str, Any], where: str = "cached reference scores") -> None:
        """Raise ValueError unless these scores were made by exactly this model, tokenizer, data and settings."""
        for name, wanted in fingerprint.items():
            if self.fingerprint.get(name) != wanted:
                raise ValueError(
                    f"{where} were made with another {name} ({self.fingerprint.get(name)!r}, now {wanted!r}); delete them to score again"
                )

    def of(self, batch: data.Batch) -> torch.Tensor:
        """(S,) scores of a batch, by example id."""
        missing = [name for name in batch.ids if name not in self._place]
        if missing:
            raise ValueError(f"ref_logp has no score for example {missing[0]}; score the reference on the same data")
        rows = self.logp[[self._place[name] for name in batch.ids]]
        if rows.numel() != batch.cu_seqlens.numel() - 1:
            raise ValueError(
                f"ref_logp holds {rows.shape[1]} scores per example, the batch has {batch.cu_seqlens.numel() - 1} sequences"
            )
        return rows.flatten().to(batch.labels.device)

    @classmethod
    def compute(
        cls,
        model: Any,
        examples: Sequence[data.Example],
        *,
        fingerprint: Mapping[str, Any],
        path: str | Path | None = None,
        batch_size: int = 8,
        layout: str = "padded",
        isolate: bool = True,
        ld_alpha: float | None = None,
        accelerator: Any = None,
        progress: bool = True,
        backend: str = "auto",
    ) -> CachedRef:
        """Score every example with the model (its adapters off), dividing the work over ranks; with a path, load what is there and resume
        what is half done.

        Raises:
            ValueError: the file at `path` was made by something else, or a score is not finite.
        """
        path = Path(path) if path is not None else None
        ids = [example.id for example in examples]
        if path is not None and path.is_file():
            cached = cls.load(path)
            cached.check(fingerprint, str(path))
            return cached
        rank, world = (accelerator.process_index, accelerator.num_processes) if accelerator is not None else (0, 1)
        device = next(adapters.unwrap(model).parameters()).device
        mine = list(range(rank, len(examples), world))
        width = len(examples[0].sequences)
        scores = torch.zeros(len(examples), width, dtype=torch.float64)
        known: set[int] = set()
        partial = path.with_name(f".{path.name}.part-{rank}-of-{world}") if path is not None else None
        if partial is not None:
            partial.parent.mkdir(parents=True, exist_ok=True)
            lines = training.read_metrics(partial)
            if lines and lines[0] == json.loads(json.dumps(dict(fingerprint))):
                for line in lines[1:]:
                    scores[line["example"]] = torch.tensor(line["logp"], dtype=torch.float64)
                    known.add(line["example"])
            else:
                partial.unlink(missing_ok=True)
                training.append_line(partial, dict(fingerprint))
        todo = [i for i in mine if i not in known]
        module = adapters.unwrap(model)
        was_training = module.training
        module.eval()
        try:
            with training.Progress(len(mine), "reference", done=len(known), show=progress and rank == 0) as bar:
                for begin in range(0, len(todo), batch_size):
                    part = todo[begin : begin + batch_size]
                    batch = data.batch_of([examples[i] for i in part], layout=layout, isolate=isolate).to(device)
                    values = _reference_pass(model, batch, ld_alpha, backend).view(len(part), width).cpu()
                    for i, row in zip(part, values, strict=True):
                        if not bool(row.isfinite().all()):
                            raise ValueError(
                                f"the reference model gives example {ids[i]} the log-probability {row.tolist()}; "
                                "its weights or this example are damaged"
                            )
                        scores[i] = row.double()
                        if partial is not None:
                            training.append_line(partial, {"example": i, "logp": row.tolist()})
                    bar.update(len(known) + begin + len(part))
        finally:
            module.train(was_training)
        if world > 1:
            scores = accelerator.reduce(scores.to(accelerator.device), reduction="sum").cpu()
        cached = cls(scores.float(), ids, fingerprint)
        if path is not None:
            if rank == 0:
                cached.save(path)
            if accelerator is not None:
                accelerator.wait_for_everyone()
            if partial is not None:
                partial.unlink(missing_ok=True)
        return cached


@dataclass(frozen=True)
class RefModel:
    """A frozen second model as the reference."""

    model: Any

    def of(self, batch: data.Batch, ld_alpha: float | None = None, backend: str = "auto") -> torch.Tensor:
        with torch.no_grad():
            return sequence_scores(self.model, batch, ld_alpha=ld_alpha, backend=backend).logp


@dataclass(frozen=True)
class AdapterOff:
    """The policy itself without its adapters as the reference: one set of weights serves both."""


def _reference_pass(model: Any, batch: data.Batch, ld_alpha: float | None, backend: str) -> torch.Tensor:
    """The model without adapters, if it has any."""
    with torch.no_grad():
        if not adapters.has_adapters(model):
            return sequence_scores(model, batch, ld_alpha=ld_alpha, backend=backend).logp
        with adapters.adapter_off(model):
            return sequence_scores(model, batch, ld_alpha=ld_alpha, backend=backend).logp


def reference_logp(
    ref: CachedRef | RefModel | AdapterOff | None, model: Any, batch: data.Batch, *, ld_alpha: float | None = None, backend: str = "auto"
) -> torch.Tensor | None:
    """(S,) reference scores of a batch; without `ref` those the batch carries, or None."""
    if ref is None:
        scores = batch.ref_logp
        if scores is not None and not bool(scores.isfinite().all()):
            bad = int((~scores.isfinite()).nonzero()[0])
            raise ValueError(f"ref_logp[{bad}] is {scores[bad].item()}; reference scores must be finite")
        return scores
    if isinstance(ref, CachedRef):
        if ld_alpha != ref.fingerprint.get("ld_alpha"):
            raise ValueError(
                f"ref_logp was made with ld_alpha {ref.fingerprint.get('ld_alpha')!r}, now {ld_alpha!r}; score the reference again"
            )
        return ref.of(batch)
    if isinstance(ref, RefModel):
        return ref.of(batch, ld_alpha, backend)
    if isinstance(ref, AdapterOff):
        with torch.no_grad(), adapters.adapter_off(model):
            return sequence_scores(model, batch, ld_alpha=ld_alpha, backend=backend).logp
    raise TypeError(f"ref must be CachedRef, RefModel, AdapterOff or None, got {type(ref).__name__}")
