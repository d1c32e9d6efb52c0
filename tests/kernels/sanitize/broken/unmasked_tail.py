"""A kernel that reads past its input in the last block, inside a loop: the sanitizer must report it."""

import torch
import triton
import triton.language as tl


@triton.jit
def _row_sum_kernel(values, output, num_columns, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, num_columns, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        total += tl.load(values + row * num_columns + columns)  # the defect: no mask
    tl.store(output + row, tl.sum(total, 0))


_row_sum_kernel[(3,)](torch.zeros(3, 37), torch.zeros(3), 37, BLOCK=16)
