"""The rewrites themselves: what each does to the embedding, the final norm, the head and a layer.

Every rewrite is a change of basis that a later matrix undoes: permuting or rotating the residual stream, re-ordering heads and neurons,
mixing inside a head, moving factors between a norm and the matrices after it. attacks.py applies them to a checkpoint on disk.

The arithmetic is float64. Random choices come from (seed, rewrite, layer): the same whatever else is in the list.

    h       residual stream, width D          heads     H query heads in G groups, head_dim d, rows of head i: [i d, (i + 1) d)
    W       [out, in], y = W x                gamma     norm weight (1 + weight for gemma)
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

MODEL_TYPES = ("llama", "mistral", "qwen2", "qwen3", "gemma")  # separate projections, norms before attention and MLP only, gated MLP
Tensors = dict[str, torch.Tensor]  # "q" and "q.bias" for self_attn.q_proj.weight and .bias, and so on


@dataclasses.dataclass
class Shape:
    """The numbers of a model that the rewrites need; a rewrite that changes them changes them here and in `config`."""

    config: dict[str, Any]
    hidden: int
    layers: int
    heads: int
    groups: int
    head_dim: int
    width: int
    vocab: int
    tied: bool
    gamma_offset: float

    @classmethod
    def of(cls, config: dict[str, Any], source: Path) -> Shape:
        kind = config.get("model_type")
        if kind not in MODEL_TYPES:
            raise ValueError(f"{source}: model_type {kind!r} is not supported by the rewrites; supported: {', '.join(MODEL_TYPES)}")
        hidden, heads = config["hidden_size"], config["num_attention_heads"]
        return cls(config, hidden, config["num_hidden_layers"], heads, config.get("num_key_value_heads") or heads,
                   config.get("head_dim") or hidden // heads, config["intermediate_size"], config["vocab_size"],
                   bool(config.get("tie_word_embeddings", kind == "gemma")), 1.0 if kind == "gemma" else 0.0)


class Rewrite:
    """One rewrite of one model. `outer` sees embedding, final norm and head, `layer` one layer; both change the dictionaries in place."""

    lossless = True

    def __init__(self, name: str, seed: int, shape: Shape, strength: float | None):
        self.name, self.seed, self.shape, self.strength = name, seed, shape, strength

    def random(self, place: str | int) -> torch.Generator:
        digest = hashlib.blake2b(f"{self.seed}/{self.name}/{place}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)

    def outer(self, t: Tensors) -> None:
        pass

    def layer(self, index: int, t: Tensors) -> None:
        pass

    def extra_layers(self) -> int:
        return 0


READERS = ("q", "k", "v")  # what reads the residual stream behind norm1; behind norm2 it is gate and up


class ResidualPermutation(Rewrite):
    """h -> P h: columns of what reads the stream, rows of what writes it, norms."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.order = torch.randperm(self.shape.hidden, generator=self.random("order"))

    def outer(self, t: Tensors) -> None:
        for name in t.keys() & {"embedding", "head"}:
            t[name] = t[name][:, self.order]
        t["norm"] = t["norm"][self.order]

    def layer(self, index: int, t: Tensors) -> None:
        for name in ("q", "k", "v", "gate", "up"):
            t[name] = t[name][:, self.order]
        for name in t.keys() & {"o", "down", "o.bias", "down.bias", "norm1", "norm2"}:
            t[name] = t[name][self.order]


class HeadPermutation(Rewrite):
    """Groups change places, and the query heads inside each group."""

    def layer(self, index: int, t: Tensors) -> None:
        s, random = self.shape, self.random(index)
        ratio = s.heads // s.groups
        groups = torch.randperm(s.groups, generator=random)
        heads = torch.cat([g * ratio + torch.randperm(ratio, generator=random) for g in groups])
        within = torch.arange(s.head_dim)
        group_rows = (groups[:, None] * s.head_dim + within).reshape(-1)
        head_rows = (heads[:, None] * s.head_dim + within).reshape(-1)
        for name in t.keys() & {"q", "q.bias"}:
            t[name] = t[name][head_rows]
        for name in t.keys() & {"k", "v", "k.bias", "v.bias"}:
            t[name] = t[name][group_rows]
        t["o"] = t["o"][:, head_rows]


class QueryKeyScaling(Rewrite):
    """Per group and rotary pair (j, j + d/2): q times a complex c, k times 1/conj(c); keeps q conj(k) and commutes with the rotation."""

    def layer(self, index: int, t: Tensors) -> None:
        s = self.shape
        if "q_norm" in t:
            raise ValueError(f"qk_scaling: model_type {s.config['model_type']!r} normalises queries and keys per head, "
                             "so no scaling of theirs keeps the function")
        if s.config.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError("qk_scaling: partly rotated heads are not supported")
        random = self.random(index)
        size = torch.exp2(2 * torch.rand(s.groups, s.head_dim // 2, generator=random, dtype=torch.float64) - 1)
        c = torch.polar(size, 2 * math.pi * torch.rand(s.groups, s.head_dim // 2, generator=random, dtype=torch.float64))
        for name, factor in (("q", c), ("k", 1 / c.conj())):
            factor = factor.repeat_interleave(s.heads // s.groups, 0) if name == "q" else factor
            for part in t.keys() & {name, f"{name}.bias"}:
                rows = t[part].reshape(factor.shape[0], 2, s.head_dim // 2, -1)
                turned = torch.complex(rows[:, 0], rows[:, 1]) * factor[:, :, None]
                t[part] = torch.stack([turned.real, turned.imag], 1).reshape(t[part].shape)


class ValueOutputMixing(Rewrite):
    """Per group an invertible C: v -> C v, o -> o C^-1 for every head of the group."""

    def layer(self, index: int, t: Tensors) -> None:
        s, random = self.shape, self.random(index)
        for name in t.keys() & {"v", "v.bias"}:
            t[name] = t[name].clone()
        t["o"] = t["o"].clone()
        ratio = s.heads // s.groups
        for group in range(s.groups):
            # orthogonal * diagonal * orthogonal with factors in [1/2, 2]: condition number at most 4, so float32 storage stays exact enough
            stretch = torch.exp2(2 * torch.rand(s.head_dim, generator=random, dtype=torch.float64) - 1)
            left, right = _orthogonal(s.head_dim, random), _orthogonal(s.head_dim, random)
            mix, undo = left * stretch @ right, (right.T / stretch) @ left.T
            rows = slice(group * s.head_dim, (group + 1) * s.head_dim)
            for name in t.keys() & {"v", "v.bias"}:
                t[name][rows] = mix @ t[name][rows]
            for head in range(group * ratio, (group + 1) * ratio):
                columns = slice(head * s.head_dim, (head + 1) * s.head_dim)
                t["o"][:, columns] = t["o"][:, columns] @ undo


class NeuronPermutation(Rewrite):
    """Neurons of the MLP change places."""

    def layer(self, index: int, t: Tensors) -> None:
        order = torch.randperm(self.shape.width, generator=self.random(index))
        for name in t.keys() & {"gate", "up", "gate.bias", "up.bias"}:
            t[name] = t[name][order]
        t["down"] = t["down"][:, order]


class NeuronScaling(Rewrite):
    """Row of up times s, column of down divided by s, any sign: up enters the gated product linearly."""

    def layer(self, index: int, t: Tensors) -> None:
        random = self.random(index)
        size = torch.exp2(2 * torch.rand(self.shape.width, generator=random, dtype=torch.float64) - 1)
        factor = torch.where(torch.rand(self.shape.width, generator=random) < 0.5, -size, size)
        t["up"] = t["up"] * factor[:, None]
        if "up.bias" in t:
            t["up.bias"] = t["up.bias"] * factor
        t["down"] = t["down"] / factor


class _NormRewrite(Rewrite):
    """Moves a factor f per channel out of a norm into the matrices that read behind it: gamma -> gamma / f, W -> W f."""

    def move(self, t: Tensors, norm: str, readers: Sequence[str], factor: Callable[[torch.Tensor], torch.Tensor]) -> None:
        gamma = t[norm] + self.shape.gamma_offset
        f = factor(gamma)
        t[norm] = gamma / f - self.shape.gamma_offset
        for name in readers:
            t[name] = t[name] * f


class NormShift(_NormRewrite):
    """A random factor in [1/2, 2] per channel moves between each norm and the matrices after it (not the final norm of a tied head)."""

    def _factor(self, place: str) -> Callable[[torch.Tensor], torch.Tensor]:
        return lambda gamma: torch.exp2(2 * torch.rand(gamma.shape, generator=self.random(place), dtype=torch.float64) - 1)

    def outer(self, t: Tensors) -> None:
        if "head" in t:
            self.move(t, "norm", ["head"], self._factor("norm"))

    def layer(self, index: int, t: Tensors) -> None:
        self.move(t, "norm1", READERS, self._factor(f"{index}.1"))
        self.move(t, "norm2", ("gate", "up"), self._factor(f"{index}.2"))


class Rotation(_NormRewrite):
    """Norm weights are folded into the matrices behind them, then h -> Rᵀ h with R orthogonal (an RMS norm without weights commutes).

    A tied head has to be untied: the final norm's weight goes into the head and must not go into the embedding.
    """

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.turn = _orthogonal(self.shape.hidden, self.random("turn"))

    def outer(self, t: Tensors) -> None:
        if "head" not in t:
            t["head"] = t["embedding"]
            self.shape.tied = False
            self.shape.config["tie_word_embeddings"] = False
        self.move(t, "norm", ["head"], lambda gamma: gamma)
        for name in ("embedding", "head"):
            t[name] = t[name] @ self.turn

    def layer(self, index: int, t: Tensors) -> None:
        self.move(t, "norm1", READERS, lambda gamma: gamma)
        self.move(t, "norm2", ("gate", "up"), lambda gamma: gamma)
        for name in ("q", "k", "v", "gate", "up"):
            t[name] = t[name] @ self.turn
        for name in t.keys() & {"o", "down", "o.bias", "down.bias"}:
            t[name] = self.turn.T @ t[name]


class Vocabulary(Rewrite):
    """Token ids change places and `strength` (1000) unused tokens are added; the tokenizer is rewritten to match."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        added = 1000 if self.strength is None else int(self.strength)
        if added < 0:
            raise ValueError(f"strength of vocabulary is the number of added tokens, got {self.strength}")
        old = self.shape.vocab
        self.order = torch.randperm(old + added, generator=self.random("order"))  # new id -> old id (>= old: an added token)
        self.new_id = torch.empty_like(self.order)
        self.new_id[self.order] = torch.arange(old + added)
        self.added = [f"<|extra_{i}|>" for i in range(added)]
        self.shape.vocab = old + added
        config = self.shape.config
        config["vocab_size"] = old + added
        self.map_ids(config)

    def map_ids(self, config: dict[str, Any]) -> None:
        """Special token ids of a configuration, old to new, in place."""
        for key in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
            value = config.get(key)
            if value is not None:
                config[key] = [int(self.new_id[i]) for i in value] if isinstance(value, list) else int(self.new_id[value])

    def outer(self, t: Tensors) -> None:
        for name in t.keys() & {"embedding", "head"}:
            mean, spread = t[name].mean(0), t[name].std()
            extra = mean + spread * torch.randn(len(self.added), t[name].shape[1], generator=self.random(name), dtype=torch.float64)
            t[name] = torch.cat([t[name], extra])[self.order]

    def tokenizer(self, description: dict[str, Any]) -> None:
        """Rewrite a tokenizer.json in place."""
        if description["model"]["type"] != "BPE":
            raise ValueError(f"vocabulary: tokenizer model {description['model']['type']!r} is not supported (BPE is)")
        vocab = {token: int(self.new_id[index]) for token, index in description["model"]["vocab"].items()}
        old = len(self.order) - len(self.added)
        vocab |= {token: int(self.new_id[old + i]) for i, token in enumerate(self.added)}
        description["model"]["vocab"] = dict(sorted(vocab.items(), key=lambda item: item[1]))
        for token in description.get("added_tokens", []):
            token["id"] = int(self.new_id[token["id"]])
        description.get("added_tokens", []).sort(key=lambda token: token["id"])
        for processor in _walk(description.get("post_processor")):
            for special in processor.get("special_tokens", {}).values() if isinstance(processor.get("special_tokens"), dict) else ():
                special["ids"] = [int(self.new_id[i]) for i in special["ids"]]


class IdentityLayers(Rewrite):
    """Two layers (or `strength`) at the end whose output matrices are zero: the last layers say nothing about the model any more."""

    def extra_layers(self) -> int:
        return 2 if self.strength is None else int(self.strength)

    def layer(self, index: int, t: Tensors) -> None:
        if index >= self.shape.layers:
            for name in t.keys() & {"o", "down", "o.bias", "down.bias"}:
                t[name] = torch.zeros_like(t[name])


class Noise(Rewrite):
    """Gaussian noise of `strength` (0.1) times the standard deviation of each matrix."""

    lossless = False

    def _add(self, place: str, t: Tensors) -> None:
        for name in sorted(t):
            if t[name].ndim == 2:
                noise = torch.randn(t[name].shape, generator=self.random(f"{place}.{name}"), dtype=torch.float64)
                t[name] = t[name] + (0.1 if self.strength is None else self.strength) * t[name].std() * noise

    def outer(self, t: Tensors) -> None:
        self._add("outer", t)

    def layer(self, index: int, t: Tensors) -> None:
        self._add(str(index), t)


class RandomTwin(Rewrite):
    """A freshly initialised network with the same configuration and tokenizer: the copy that must not be matched."""

    lossless = False

    def _draw(self, place: str, t: Tensors) -> None:
        spread = self.shape.config.get("initializer_range", 0.02)
        for name in sorted(t):
            if t[name].ndim == 2:
                t[name] = spread * torch.randn(t[name].shape, generator=self.random(f"{place}.{name}"), dtype=torch.float64)
            else:
                t[name] = torch.full_like(t[name], 0.0 if name.endswith(".bias") else 1.0 - self.shape.gamma_offset)

    def outer(self, t: Tensors) -> None:
        self._draw("outer", t)

    def layer(self, index: int, t: Tensors) -> None:
        self._draw(str(index), t)


ATTACKS: dict[str, type[Rewrite]] = {
    "residual_permutation": ResidualPermutation, "head_permutation": HeadPermutation, "qk_scaling": QueryKeyScaling,
    "vo_mixing": ValueOutputMixing, "neuron_permutation": NeuronPermutation, "neuron_scaling": NeuronScaling,
    "rotation": Rotation, "norm_shift": NormShift, "vocabulary": Vocabulary, "identity_layers": IdentityLayers,
    "noise": Noise, "random": RandomTwin,
}
COVERED = ("residual_permutation", "head_permutation", "qk_scaling", "vo_mixing", "neuron_permutation", "neuron_scaling")
"""The rewrites that the paper's invariant terms cover; `apply(..., "all")` means these."""


def _orthogonal(size: int, random: torch.Generator) -> torch.Tensor:
    """A random orthogonal matrix (uniform: the signs of R's diagonal are taken out of Q)."""
    q, r = torch.linalg.qr(torch.randn(size, size, generator=random, dtype=torch.float64))
    return q * r.diagonal().sign()


def _walk(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for inner in value.values():
            yield from _walk(inner)
    elif isinstance(value, list):
        for inner in value:
            yield from _walk(inner)
