"""Characters that are no text: halves of surrogate pairs, controls, and marks that turn the direction of writing."""

from __future__ import annotations

import re

_SURROGATES = re.compile("[\ud800-\udfff]")
# All but line breaks and tabs of the C0 and C1 controls; line and paragraph separators;
# bidirectional controls; what is no character.
_STEERING = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def has_surrogates(text: str) -> bool:
    """Whether `text` holds half of a surrogate pair: that is what bytes that are not UTF-8 become in an argument."""
    return _SURROGATES.search(text) is not None


def visible(text: str) -> str:
    """`text` with every character that would steer a terminal, or that XML does not hold, as its escape (\\u001b).

    Line breaks and tabs stay, and so does ordinary text of any script, joiners included. JSON remains the same JSON.
    """
    return _STEERING.sub(lambda match: f"\\u{ord(match[0]):04x}", text)
