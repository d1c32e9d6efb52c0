"""Every launch of the saliency-flow kernels on odd shapes: few and many segments, tokens of none, ragged tiles, padded and chunked head
sizes, strided operands, every output. Run with triton-sanitizer; nothing is computed.

The kernels read tile lists inside loops; the sanitizer cannot follow an address whose index was loaded at a symbolic loop counter. Loops
therefore run round by round, their counters concrete. It also keeps a loaded scalar as a list of one, which it cannot add to a vector: such
lists are unwrapped.
"""

import torch
from llmcore.kernels import saliency_flow_tiles as lists
from llmcore.kernels import saliency_flow_triton as kernels
from llmcore.kernels.saliency_flow_operator import Problem
from llmcore.kernels.visibility import visible_ranges
from triton_viz.clients.sanitizer.sanitizer import ConstSymbolicExpr, SymbolicSanitizer
from triton_viz.core.callbacks import ForLoopCallbacks

_register = SymbolicSanitizer.register_for_loop_callback
_to_z3 = ConstSymbolicExpr._to_z3_impl


def _unwrapped(self):
    expression, constraints = _to_z3(self)
    one = isinstance(expression, list) and len(expression) == 1
    return (expression[0] if one else expression), constraints


ConstSymbolicExpr._to_z3_impl = _unwrapped
SymbolicSanitizer.register_for_loop_callback = lambda self: ForLoopCallbacks(range_wrapper_factory=_register(self).range_wrapper_factory)

kernels._CONFIGS = {key: kernels.Config(16, 16, 4, 1) for key in kernels._CONFIGS}


def sweep(dtype: torch.dtype, few: int, outputs: int, n: int, m: int, size: int, value_size: int, **options) -> None:
    lists.FEW = few
    batch, heads, kv_heads = 1, 2, 1
    query, grad = torch.ones(batch, n, heads, size, dtype=dtype).transpose(1, 2), torch.ones(batch, heads, n, value_size, dtype=dtype)
    key, value = torch.ones(batch, kv_heads, m, size, dtype=dtype), torch.ones(batch, m, kv_heads, value_size, dtype=dtype).transpose(1, 2)
    visible = visible_ranges(batch, n, m, device=query.device, **options)
    rows, columns = (torch.arange(batch * k).view(batch, k).int() * 7 % 5 - 1 for k in (n, m))
    rows, columns = rows.clamp(max=2).contiguous(), columns.contiguous()
    pairs = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0], [0, 0, 0, 1]], dtype=torch.uint8)
    valid = (torch.arange(batch * m).view(batch, m) % 11 != 3).to(torch.uint8)
    lse = torch.zeros(batch, heads, n)
    kernels.forward(Problem(query, key, value, grad, lse, *visible, valid, rows, columns, pairs, 0.3, 2.0, outputs))


sweep(torch.float32, 8, 255, 5, 19, 33, 20)
sweep(torch.bfloat16, 0, 255, 17, 17, 17, 16, window=5)
sweep(torch.float16, 8, 1, 19, 19, 16, 24)
