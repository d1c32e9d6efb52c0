"""Batched decoding in which nothing about a prompt is computed or stored twice.

A `Row` is one prompt (token embeddings behind an optional shared `Prefix`) with N samples. Three levels of sharing:

    prefix   its keys and values exist once, batch 1, and every row of every query attends to them in place
    row      prefilled once; its N samples attend to one copy (the prompt cache is never repeated N times)
    trie     samples of one row with equal tokens so far are one node: one forward row; they split when their draws differ

Layout of a pool (rows prefilled together), per layer: keys and values (S slots, kv heads, prompt + tail, head_dim). The tail takes one
position per trie node; a node sees the prompt, its ancestors and itself (a mask shared by all layers). Attention over the prefix and
over the
slot are two partial softmaxes, merged by their log-sum-exps:   o = Σ_i o_i·exp(lse_i − lse),  lse = log Σ_i exp(lse_i).

The model's own code runs: tokens of all rows are packed into one (1, M) batch with explicit positions, and only the attention function is
replaced, through transformers' AttentionInterface. A family that does not go through it, or for which a short comparison with the
model's own forward fails, is decoded by recomputing the whole sequence each step: slow, right, and reported (`Decoder.path`,
`Decoder.why`).
"""

# S slots (rows) of a pool, M forward rows of a step, H heads, G kv heads, D head_dim, R rows of equal length L

from llmcore.decoding.batch import Batch
from llmcore.decoding.decoder import Decoder, decoder_for, stop_ids
from llmcore.decoding.rows import Counters, Prefix, Row, StopRule

__all__ = ["Batch", "Counters", "Decoder", "Prefix", "Row", "StopRule", "decoder_for", "stop_ids"]
