"""Every launch of the fused linear log-probability on odd shapes: gathered rows, ragged tiles, all options, resident and recomputed,
one and two vocabulary chunks. Run with triton-sanitizer; nothing is computed."""

import torch
from llmcore.kernels import linear_logprob_configs as configs
from llmcore.kernels import linear_logprob_triton as kernels
from llmcore.kernels.linear_logprob_core import ARGMAX, ENTROPY, MEAN, SUM_SQ, Head

configs.CHUNK_BYTES = 1  # the smallest chunk, so that ragged last chunks occur


def sweep(dtype: torch.dtype, num_rows: int, vocab_size: int, hidden_size: int, options: bool) -> None:
    source = torch.zeros(2 * num_rows + 1, hidden_size, dtype=dtype)
    rows = torch.arange(num_rows) * 2 + 1
    labels = torch.arange(num_rows) % vocab_size + 7
    labels[-1] = vocab_size + 6
    bias = torch.zeros(vocab_size, dtype=dtype) if options else None
    head = Head(source, rows, torch.zeros(vocab_size, hidden_size, dtype=dtype), bias, labels, 7, 1.3, 20.0 * options, 0.7)
    want = (ENTROPY | SUM_SQ | MEAN | ARGMAX) if options else 0
    kept_rows = num_rows // 2
    # float32 operands keep logits, 16-bit ones exponentials with offsets
    stats = kernels.forward(head, want, resident_rows=kept_rows)
    kernels.forward(head, 0, direction=True)
    slots = torch.full((num_rows,), -1)
    slots[:kept_rows] = torch.arange(kept_rows)
    column = torch.zeros(num_rows)
    kernels.backward(
        head,
        column.double(),
        column,
        column,
        column,
        column if options else None,
        slots=slots,
        need_bias=options,
        resident=stats.resident if kept_rows else None,
        offsets=stats.offsets,
    )


sweep(torch.bfloat16, 11, 613, 45, True)
sweep(torch.float16, 1, 1, 64, False)
sweep(torch.float32, 11, 613, 45, True)

# The backward over the vendor GEMM's products.
for width in ("half", "full"):
    configs.CONFIGS["backward", width, "sm_90"] = configs.PRODUCT
sweep(torch.bfloat16, 11, 613, 45, True)
