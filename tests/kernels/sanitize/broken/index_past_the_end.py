"""A gather whose index tensor names a row that does not exist: the address depends on data, and the sanitizer must still report it."""

import torch
import triton
import triton.language as tl


@triton.jit
def _gather_kernel(values, rows, output, num_rows, num_columns, BLOCK: tl.constexpr):
    row = tl.load(rows + tl.program_id(0)).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    inside = columns < num_columns
    found = tl.load(values + row * num_columns + columns, mask=inside, other=0.0)
    tl.store(output + tl.program_id(0).to(tl.int64) * num_columns + columns, found, mask=inside)


_gather_kernel[(2,)](torch.zeros(5, 7), torch.tensor([4, 5]), torch.zeros(2, 7), 5, 7, BLOCK=8)
