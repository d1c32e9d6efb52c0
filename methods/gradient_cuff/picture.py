"""The paper's picture: the refusal loss on a plane of two directions around a query."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from llmcore.kernels.zeroth_order import directions
from llmcore.methods.gradient_cuff.config import CuffConfig
from llmcore.methods.gradient_cuff.detector import Detector
from llmcore.methods.gradient_cuff.prompt import Messages

from llmcore.decoding import Row
from llmcore.generation import run_rows


def landscape(
    model: Any, query: Messages, config: CuffConfig | None = None, *, extent: float = 0.1, resolution: int = 7
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """f on the plane E + α u_1 + β u_2 around a query: (alphas, betas, f), f[i, j] at alphas[i], betas[j].

    Args: extent: half width of the square, in units of the directions (the detector looks at distance μ). resolution: points a side.
    """
    config = config or CuffConfig()
    if not (math.isfinite(extent) and extent > 0):
        raise ValueError(f"extent must be finite and > 0, got {extent!r}")
    if resolution < 1 or resolution**2 >= 2**15:
        raise ValueError(f"resolution must lie in 1 … 181, got {resolution}")
    detector = Detector(model, config)
    prompt = detector.prepare(query, 0).prompt
    decoder = detector.decoder
    plain = decoder.embed(prompt.query_ids + prompt.suffix_ids)
    first, second = directions(config.seed, 2, detector.dim, device=decoder.device)[0]
    mask = torch.zeros(len(plain), 1, device=plain.device)
    mask[: len(prompt.mask), 0] = torch.tensor(prompt.mask, device=plain.device, dtype=mask.dtype)
    alphas = np.linspace(-extent, extent, resolution)
    prefix = decoder.prefix(prompt.prefix_ids)
    rows = []
    for i, alpha in enumerate(alphas):
        for j, beta in enumerate(alphas):

            def shifted(alpha: float = alpha, beta: float = beta) -> torch.Tensor:
                return (plain.float() + mask * (alpha * first + beta * second)).to(plain.dtype)

            rows.append(
                Row(shifted, len(plain), prefix=prefix, num_samples=config.num_samples, sampling=config.sampling, stream=(0, i *
                resolution + j),
                    stop_rule=detector.rule, share=config.share_samples)
            )  # fmt: skip
    run_rows(decoder, rows, max_rows=max(1, detector.max_samples // config.num_samples), memory_budget=config.memory_budget)
    refusals = np.array([row.count("match") for row in rows]).reshape(resolution, resolution)
    return alphas, alphas.copy(), (config.num_samples - refusals) / config.num_samples
