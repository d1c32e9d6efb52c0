"""Rewrites of a checkpoint that keep its function and change its weights: what a disguised copy looks like.

Every rewrite here is a change of basis that a later matrix undoes: permuting or rotating the residual stream, re-ordering heads and
neurons, mixing inside a head, moving factors between a norm and the matrices after it. `apply` writes a real checkpoint directory, one
layer in memory at a time; `logit_change` runs both models on the same texts and says how far their logits are apart. Rewrites marked
lossless keep the logits up to the rounding of the stored type; noise, a random network and narrow storage are there for calibration and
are marked lossy.

The arithmetic is float64 and rounds once, to the stored type. Random choices come from (seed, rewrite, layer): the same whatever else is
in the list.

    h       residual stream, width D          heads     H query heads in G groups, head_dim d, rows of head i: [i d, (i + 1) d)
    W       [out, in], y = W x                gamma     norm weight (1 + weight for gemma)
"""

from __future__ import annotations

import dataclasses
import json
import math
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from llmcore.methods.huref.rewrites import ATTACKS, COVERED, MODEL_TYPES, Rewrite, Shape, Vocabulary

from llmcore import files, models
from llmcore.checkpoints import CheckpointReader

__all__ = ["ATTACKS", "COVERED", "DTYPES", "MODEL_TYPES", "AttackReport", "LogitChange", "apply", "logit_change"]

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "float8_e4m3": torch.float8_e4m3fn}
_REPORT = "attack.json"
_COMPANIONS = ("tokenizer", "generation_config", "chat_template", "special_tokens", "vocab", "merges", "added_tokens")
_LAYER = {"norm1": "input_layernorm", "norm2": "post_attention_layernorm", "q": "self_attn.q_proj", "k": "self_attn.k_proj",
          "v": "self_attn.v_proj", "o": "self_attn.o_proj", "gate": "mlp.gate_proj", "up": "mlp.up_proj", "down": "mlp.down_proj",
          "q_norm": "self_attn.q_norm", "k_norm": "self_attn.k_norm"}
_OUTER = {"embedding": "model.embed_tokens.weight", "norm": "model.norm.weight", "head": "lm_head.weight"}
_TEXTS = ("The capital of France is Paris, and 17 + 25 = 42.", "def area(r):\n    return 3.14159 * r ** 2\n")


@dataclasses.dataclass(frozen=True)
class AttackReport:
    """What was written: directory, rewrites in order, seed, whether the function is kept, stored type, number of files."""

    path: str
    source: str
    attacks: tuple[str, ...]
    seed: int
    lossless: bool
    dtype: str
    num_shards: int

    def to_json(self) -> dict[str, Any]:
        return dataclasses.asdict(self)


@dataclasses.dataclass(frozen=True)
class LogitChange:
    """Largest absolute change of a logit, the logits' own standard deviation, and over how many positions."""

    max_abs: float
    std: float
    num_positions: int

    @property
    def relative(self) -> float:
        return self.max_abs / self.std


def apply(path: str | Path, out: str | Path, attacks: str | Sequence[str], *, seed: int = 0, dtype: str | None = None,
          num_shards: int | None = None, strength: float | None = None) -> AttackReport:
    """Write a rewritten copy of a checkpoint to the directory `out` (which must not exist).

    Args:
        path: "smollm2", a safetensors directory or a .gguf file of a model type in MODEL_TYPES.
        out: new directory; written beside its place and renamed, so that it is whole or absent.
        attacks: names from ATTACKS, applied in this order; "all" stands for the six of COVERED.
        seed: of every random choice.
        dtype: stored type: "float32", "bfloat16", "float16", or "float8_e4m3" (one scale per matrix); the source's type by default.
        num_shards: number of weight files; one per 2 GB by default.
        strength: of noise (times the standard deviation), or the count for vocabulary and identity_layers.

    Returns:
        AttackReport; also written to `out`/attack.json.

    Memory: one shard plus one layer in float64.

    Example:
        apply("smollm2", "copy", ["rotation", "head_permutation"], seed=1)
        print(logit_change("smollm2", "copy"))
    """
    names = [one for name in ([attacks] if isinstance(attacks, str) else attacks) for one in (COVERED if name == "all" else (name,))]
    if unknown := [name for name in names if name not in ATTACKS]:
        raise ValueError(f"attacks must be among {', '.join(ATTACKS)} or 'all', got {unknown[0]!r}")
    if dtype is not None and dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, got {dtype!r}")
    out = Path(out)
    if out.exists():
        raise FileExistsError(f"{out} exists already; rewritten copies are written to a new directory")
    source = models.checkpoint_directory(path)
    with CheckpointReader(source) as reader, files.atomic_directory(out) as folder:
        config = json.loads(json.dumps(reader.config))
        shape = Shape.of(config, source)
        rewrites = [ATTACKS[name](name, seed, shape, strength) for name in names]
        if dtype is None:
            stored = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
            dtype = stored.get(reader.dtype("model.layers.0.self_attn.q_proj.weight"), "float32")
        count = _write_weights(reader, folder, shape, rewrites, dtype, num_shards)
        config["num_hidden_layers"] = shape.layers + sum(rewrite.extra_layers() for rewrite in rewrites)
        if isinstance(config.get("layer_types"), list):
            config["layer_types"] += [config["layer_types"][-1]] * (config["num_hidden_layers"] - len(config["layer_types"]))
        config["dtype"] = "float32" if dtype == "float8_e4m3" else dtype
        config.pop("torch_dtype", None)
        files.write_json(folder / "config.json", config)
        _write_companions(source, folder, [rewrite for rewrite in rewrites if isinstance(rewrite, Vocabulary)])
        report = AttackReport(str(out), str(path), tuple(names), seed, all(rewrite.lossless for rewrite in rewrites), dtype, count)
        files.write_json(folder / _REPORT, report.to_json())
    return report


def logit_change(original: str | Path | models.LanguageModel, copy: str | Path, *, texts: Sequence[str] | None = None) -> LogitChange:
    """Largest change of a logit between a model and its copy, float32 on the CPU, over the tokens that both vocabularies have.

    original: anything `load_model` takes, or a model that it returned. Each text is tokenised by each model's own tokenizer, and a copy
    whose ids were permuted is compared token by token.
    """
    texts = list(texts) if texts is not None else list(_TEXTS)
    first, second = (m if isinstance(m, models.LanguageModel) else models.load_model(m, device="cpu", dtype=torch.float32)
                     for m in (original, copy))
    vocabulary = second.tokenizer.get_vocab()
    pairs = torch.tensor([(index, vocabulary[token]) for token, index in first.tokenizer.get_vocab().items() if token in vocabulary])
    # A tokenizer may know tokens that its model has no row for.
    pairs = pairs[(pairs[:, 0] < first.config.vocab_size) & (pairs[:, 1] < second.config.vocab_size)]
    largest, squares, total, positions = 0.0, 0.0, 0, 0
    for text in texts:
        logits = []
        for lm, column in ((first, 0), (second, 1)):
            ids = torch.tensor([lm.tokenizer(text).input_ids])
            with torch.no_grad():
                logits.append(lm.model(input_ids=ids).logits[0][:, pairs[:, column]].double())
        if logits[0].shape != logits[1].shape:
            raise ValueError(f"the two tokenizers cut {text[:40]!r} into {len(logits[0])} and {len(logits[1])} tokens")
        largest = max(largest, (logits[0] - logits[1]).abs().max().item())
        squares += (logits[0] - logits[0].mean()).square().sum().item()
        total, positions = total + logits[0].numel(), positions + len(logits[0])
    return LogitChange(largest, math.sqrt(squares / total), positions)


def _units(reader: CheckpointReader, shape: Shape, rewrites: list[Rewrite]) -> Iterator[dict[str, torch.Tensor]]:
    """Rewritten tensors by full name: first embedding, final norm and head, then layer after layer."""
    wanted = [short for short in _OUTER if not (short == "head" and shape.tied)]
    t = {short: reader.read(_OUTER[short], dtype=torch.float64) for short in wanted if _OUTER[short] in reader}
    for rewrite in rewrites:
        rewrite.outer(t)
    yield {_OUTER[short]: value for short, value in t.items()}
    for index in range(shape.layers + sum(rewrite.extra_layers() for rewrite in rewrites)):
        prefix = f"model.layers.{min(index, shape.layers - 1)}."  # added layers start as copies of the last one
        t = {}
        for short, module in _LAYER.items():
            for part in ("weight", "bias"):
                if f"{prefix}{module}.{part}" in reader:
                    t[short if part == "weight" else f"{short}.bias"] = reader.read(f"{prefix}{module}.{part}", dtype=torch.float64)
        for rewrite in rewrites:
            rewrite.layer(index, t)
        yield {f"model.layers.{index}.{_LAYER[short.removesuffix('.bias')]}.{'bias' if short.endswith('.bias') else 'weight'}": value
               for short, value in t.items()}


def _write_weights(reader: CheckpointReader, folder: Path, shape: Shape, rewrites: list[Rewrite], dtype: str,
                   num_shards: int | None) -> int:
    known = set(_OUTER.values()) | {f"model.layers.{i}.{module}.{part}" for i in range(shape.layers) for module in _LAYER.values()
                                    for part in ("weight", "bias")}
    beside = (".weight_scale", ".weight_scale_inv", "rotary_emb.inv_freq")
    stored = [name for name in reader.huggingface_names() if not name.endswith(beside)]
    if foreign := sorted(set(stored) - known):
        raise ValueError(f"{reader.path}: tensor {foreign[0]!r} is not part of a {shape.config['model_type']} model that the rewrites know")
    size = torch.finfo(DTYPES[dtype]).bits // 8
    total = size * sum(math.prod(reader.shape(name)) for name in stored)
    units = 1 + shape.layers + sum(rewrite.extra_layers() for rewrite in rewrites)
    count = num_shards if num_shards is not None else max(1, math.ceil(total / 2e9))
    if not 1 <= count <= units:
        raise ValueError(f"num_shards must lie in [1, {units}] for this model, got {count}")
    weight_map: dict[str, str] = {}
    pending: dict[str, torch.Tensor] = {}
    shard = 0
    for index, tensors in enumerate(_units(reader, shape, rewrites)):
        for name, value in tensors.items():
            pending |= _store(name, value, dtype)
        if (index + 1) * count // units > shard:
            shard += 1
            file = "model.safetensors" if count == 1 else f"model-{shard:05d}-of-{count:05d}.safetensors"
            files.write_safetensors(folder / file, pending, {"format": "pt"})
            weight_map |= dict.fromkeys(pending, file)
            pending = {}
    if count > 1:
        files.write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": total}, "weight_map": weight_map})
    return count


def _store(name: str, value: torch.Tensor, dtype: str) -> dict[str, torch.Tensor]:
    if not bool(value.isfinite().all()):
        raise ValueError(f"tensor {name!r} is not finite after the rewrite; a norm weight of zero cannot be moved")
    if dtype != "float8_e4m3":
        return {name: value.to(DTYPES[dtype]).contiguous()}
    if value.ndim < 2:
        return {name: value.float().contiguous()}
    scale = (value.abs().max() / torch.finfo(torch.float8_e4m3fn).max).clamp(min=1e-30)
    return {name: (value / scale).float().to(torch.float8_e4m3fn).contiguous(), f"{name}_scale": scale.float()}


def _write_companions(source: Path, folder: Path, vocabularies: list[Vocabulary]) -> None:
    """Tokenizer and generation files, rewritten when token ids moved."""
    if not vocabularies:
        for file in source.iterdir():
            if file.is_file() and file.name.startswith(_COMPANIONS):
                shutil.copyfile(file, folder / file.name)
        return
    if not (source / "tokenizer.json").is_file():
        raise ValueError(f"{source}: vocabulary needs a tokenizer.json")
    description = json.loads((source / "tokenizer.json").read_text())
    generation = json.loads((source / "generation_config.json").read_text()) if (source / "generation_config.json").is_file() else None
    for rewrite in vocabularies:
        rewrite.tokenizer(description)
        if generation is not None:
            rewrite.map_ids(generation)
    files.write_json(folder / "tokenizer.json", description, indent=None)
    if generation is not None:
        files.write_json(folder / "generation_config.json", generation)
    for name in ("tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"):
        if (source / name).is_file():
            shutil.copyfile(source / name, folder / name)
