"""Every launch of the zeroth-order kernels on odd shapes: dimensions that are no multiple of a block, ragged token shares, strided output,
drawn and stored directions, shared and own seeds. Run with triton-sanitizer; nothing is computed."""

import torch
from llmcore.kernels import zeroth_order_triton as kernels

for batch, num_directions, length, dim, dtype in (
    (2, 4, 19, 1037, torch.bfloat16),
    (1, 2, 1, 1, torch.float32),
    (3, 2, 16, 33, torch.float64),
):
    seeds = torch.arange(batch)
    embeddings, mask = torch.zeros(batch, length, dim, dtype=dtype), torch.ones(batch, length, dtype=torch.bool)
    out = torch.zeros(batch, num_directions, length, dim, dtype=dtype)
    kernels.perturb(embeddings, mask, seeds, None, 0.1, "antithetic", out)
    kernels.perturb(embeddings, mask, seeds[:1], None, 0.1, "gaussian", out)
    kernels.perturb(embeddings, mask, seeds[:1], torch.zeros(1, num_directions, dim), 0.1, "orthogonal", out)
    kernels.perturb(embeddings, mask, seeds, torch.zeros(batch, num_directions, dim), 0.1, "sphere", out)
    kernels.directions(seeds, num_directions, dim, "gaussian")
    coefficients = torch.zeros(batch, num_directions, dtype=torch.float64)
    kernels.combine(seeds, coefficients, dim, "antithetic", True)
    kernels.combine(seeds, coefficients, dim, "gaussian", False)
