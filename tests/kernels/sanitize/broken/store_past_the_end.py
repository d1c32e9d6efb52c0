"""A store whose mask allows one element too many: the sanitizer must report it."""

import torch
import triton
import triton.language as tl


@triton.jit
def _fill_kernel(output, size, BLOCK: tl.constexpr):
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    tl.store(output + offsets, 1.0, mask=offsets <= size)


_fill_kernel[(3,)](torch.zeros(37), 37, BLOCK=16)
