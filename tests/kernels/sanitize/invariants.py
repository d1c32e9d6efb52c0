"""Every launch of kernels/invariants_triton.py on odd shapes."""

import torch
from llmcore.kernels import invariants_triton as it

K, R_A, R_B = 67, 35, 3
left_a, right_a, left_b, right_b = torch.randn(K, R_A), torch.randn(K, R_A), torch.randn(K, R_B), torch.randn(K, R_B)
it.tile_sums(left_a, right_a, left_b, right_b)
it.tile_sums(left_a.mT, left_b.mT, right_a.mT, right_b.mT)
mean, scale = torch.zeros((), dtype=torch.float64), torch.ones((), dtype=torch.float64)
it.product(left_a, right_a, mean, scale, torch.empty(K, K))
it.stored_sums(torch.randn(K, K), torch.randn(K, K))
it.count_sketch(left_a, torch.randint(0, 7, (K,)), torch.ones(K), 7)
