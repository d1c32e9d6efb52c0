"""The answer in a finished text: where it stands, and when two answers are the same."""

from __future__ import annotations

import re
from collections.abc import Callable

_NUMBER = r"[-+]?[^\S\n]*[$€£]?[^\S\n]*\d[\d,]*(?:\.\d+)?(?:[^\S\n]*/[^\S\n]*\d+)?(?:[^\S\n]*%)?"
_CUE = r"(?:answer\s*(?:is|:|=)|####|\\boxed\s*\{)\s*(?:is\b|:)?"
_END = r"(?=[^\d=\n]*(?:\n|$))"  # nothing but a unit or a full stop behind it
# answer family -> expression with one filled group, the answer; a cue is required, a delimiter must follow (never "1" of "18")
PATTERNS = {
    # "=" is a cue only at the end of a line whose left side computes ("3 + 4 = 7"): "x = 3, y = 4" states what is given
    "number": re.compile(rf"(?i){_CUE}[^\d\n+\-$€£]{{0,20}}({_NUMBER})(?!\d)|[\d)%]\s*[-+*/x×÷^][^=\n]*=[^\S\n]*({_NUMBER})(?!\d){_END}"),
    "option": re.compile(r"(?i)(?:answer\s*(?:is|:)|####|\\boxed\s*\{)\s*(?:is\b|:)?\s*(?:option\s+)?\(?([A-Z])(?![A-Za-z'])"),
    "yesno": re.compile(r"(?i)(?:answer\s*(?:is|:)|####|\\boxed\s*\{)\s*(?:is\b|:)?\W{0,3}(yes|no|true|false|valid|invalid)\b"),
}


def find_answer(text: str, family: str | Callable[[str], tuple[int, int] | None], *, last_number: bool = False) -> tuple[int, int] | None:
    """(start, end) of the answer in the finished text: the last match behind a cue, or None."""
    if callable(family):
        return family(text)
    matches = list(PATTERNS[family].finditer(text))
    if not matches and last_number and family == "number":
        matches = list(re.finditer(rf"({_NUMBER})(?!\d)", text))
    if not matches:
        return None
    start, end = matches[-1].span(matches[-1].lastindex or 0)
    while start < end and text[start] in " +$€£":
        start += 1
    return start, start + len(text[start:end].rstrip(" ,\n"))


def normalise(answer: str) -> str:
    """Equal answers become equal strings: numbers as numbers (5.0 = 5, 1,000 = 1000, 50 % = 50), letters and words in lower case."""
    plain = answer.strip().rstrip(".").lower()
    number = re.sub(r"[\s,$€£%]", "", plain)
    try:
        if "/" in number:
            above, below = number.split("/")
            return f"{float(above) / float(below):.12g}"
        return f"{float(number):.12g}"
    except (ValueError, ZeroDivisionError):
        return plain.strip("() ")
