"""Rows in, token batches out: preference pairs, unpaired feedback and instructions.

    rows.py     read_rows   JSONL (also .gz), Parquet, Hugging Face datasets -> Row; a bad input is an error with file, line and field
    tokens.py   tokenize    Row -> Example: prefix-safe, the model's real stop id, truncation and empty completions by stated policy
    batches.py  collate     sequences -> Batch: padded, packed or prefix-shared; masks from lengths, never from token ids
                Batches     Example -> Batch per optimiser step, a pure function of (seed, step): resuming needs no data state

Column names and the conversational format are TRL's. A preference row has `chosen`, `rejected` and optionally `prompt`; without one the
prompt is what both sides share: whole messages, or for text the common characters (up to the last "\n\nAssistant:" in a dialogue of that
format).

A token is scored when its completion mask is 1 and it has a predecessor in its own sequence; n of a sequence is the number of its scored
tokens, everywhere.
"""

from llmcore.data.batches import LAYOUTS, Batch, Batches, TrunkInput, batch_of, collate
from llmcore.data.rows import ASSISTANT, COLUMNS, Row, Text, read_rows
from llmcore.data.tokens import ON_EMPTY, TRUNCATION, Example, Tokenized, Tokens, examples_hash, tokenize, tokenizer_hash

__all__ = [
    "ASSISTANT",
    "COLUMNS",
    "LAYOUTS",
    "ON_EMPTY",
    "TRUNCATION",
    "Batch",
    "Batches",
    "Example",
    "Row",
    "Text",
    "Tokenized",
    "Tokens",
    "TrunkInput",
    "batch_of",
    "collate",
    "examples_hash",
    "read_rows",
    "tokenize",
    "tokenizer_hash",
]
