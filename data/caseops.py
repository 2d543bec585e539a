"""CaseOps: a lossless transform of capitals in ASCII words into operator characters.

Only maximal runs of ASCII letters change:
    all capitals, two or more (HTTP)        U+E002 + lower case
    first letter capital only (The, I)      U+E001 + lower case
    other capitals (McDonald, iPhone)       lower case, U+E001 before a capital that begins
                                            the word and U+E003 before every later one
A literal U+E001..U+E004 in the text is preceded by U+E004. All other characters stay.
decode(encode(s)) == s for every str, lone surrogates included.

A text is searched once for capitals (or operators) as an array; all decisions are made
at those few places.
"""
from __future__ import annotations

import numpy as np

OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
_TITLE, _ALLCAPS, _CAPNEXT, _ESCAPE = map(ord, OPERATORS)
_CHUNK = 1 << 15  # characters worked on at once: the cache holds them
_LETTER = np.zeros(0x110000, bool)  # by code point: ASCII letters
_LETTER[[*range(65, 91), *range(97, 123)]] = True
# by code point: the operator of a capital behind it
_BEHIND = np.where(_LETTER, _CAPNEXT, _TITLE).astype(np.uint32)


class CaseOpsError(ValueError):
    """A text that is no transformed text: an operator has nothing to act on, or is in a
    wrong place."""


def encode(text: str) -> str:
    """Transform a text. Never fails."""
    if len(text) <= 2 * _CHUNK:
        return _encode(text)
    return "".join(map(_encode, _chunks(text)))


def _encode(text: str) -> str:
    units = _units(text)
    at = (units - 65 < 26).nonzero()[0]  # unsigned: wraps round, one comparison does
    codes = _BEHIND[units[at - 1]]
    units[at] |= 32
    adjacent = np.zeros(at.size + 1, bool)   # to the capital before it
    np.equal(at[1:], at[:-1] + 1, out=adjacent[1:-1])
    if np.count_nonzero(adjacent):           # several times as fast as any()
        at, codes = _join_capitals(units, at, codes, adjacent)
    if not text.isascii() and any(map(text.__contains__, OPERATORS)):
        literal = (units - _TITLE < 4).nonzero()[0]
        escapes = np.full(literal.size, _ESCAPE)
        at, codes = np.append(at, literal), np.append(codes, escapes)
        order = at.argsort()
        at, codes = at[order], codes[order]
    if not at.size:
        return text
    places = at + np.arange(at.size)
    out = np.empty(units.size + at.size, np.uint32)
    original = np.ones(out.size, bool)
    original[places] = False
    out[original] = units
    out[places] = codes
    return _text(out)


def _join_capitals(
    units: np.ndarray, at: np.ndarray, codes: np.ndarray, adjacent: np.ndarray
):
    """(positions, operators) with one operator for each word of capitals only."""
    edges = (~adjacent).nonzero()[0]
    begin, end = edges[:-1], edges[1:] - 1   # first and last of each stretch of capitals
    whole = (end > begin) & (codes[begin] == _TITLE) & ~_LETTER[units[at[end] + 1]]
    codes[begin[whole]] = _ALLCAPS
    kept = ~(adjacent[:-1] & whole.repeat(end - begin + 1))
    return at[kept], codes[kept]


def _chunks(text: str):
    """Cut a text in front of spaces, where no word is cut, into parts that fit the
    processor's cache."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + _CHUNK)
        end = end if end >= 0 else len(text)
        yield text[start:end]
        start = end


def decode(text: str) -> str:
    """Invert `encode`; unusual but unambiguous use of operators is accepted, else
    CaseOpsError."""
    if text.isascii():
        return text
    units = _units(text)
    at = (units - _TITLE < 4).nonzero()[0]
    if not at.size:
        return text
    codes, drop = units[at], at
    if np.count_nonzero(codes == _ESCAPE):
        at, drop = _resolve_escapes(at, codes)
        codes = units[at]
    capital = None if drop is None else _capitals(units, at, codes)
    if capital is None:
        return _decode_spelled_out(text)
    units[capital] &= ~np.uint32(32)
    kept = np.ones(units.size, bool)
    kept[drop] = False
    return _text(units[kept])


def original_bytes(encoded: bytes) -> np.ndarray:
    """UTF-8 of a transformed text -> bool per byte: False for operators that act and
    for escapes.

    The number of True in a slice is the number of bytes of original text behind it; an
    escaped operator counts 3.
    """
    data = np.frombuffer(encoded, np.uint8)
    original = np.ones(data.size, bool)
    if b"\xee\x80" not in encoded:
        return original
    at = np.flatnonzero(data[:-2] == 0xEE)
    at = at[(data[at + 1] == 0x80) & (data[at + 2] - 0x81 < 4)]
    escaped = -1
    for position in at.tolist():
        if position != escaped:
            original[position:position + 3] = False
            escaped = position + 3 if encoded[position + 2] == 0x84 else -1
    return original


def _units(text: str) -> np.ndarray:
    """Code points (n + 2,) uint32 of a text with a space at either end."""
    return np.array([f" {text} "]).view(np.uint32)


def _text(units: np.ndarray) -> str:
    """Inverse of _units."""
    return units.view(f"<U{units.size}").item()[1:-1]


def _resolve_escapes(at: np.ndarray, codes: np.ndarray):
    """Split operators: (those that act, all to be dropped). (at, None) for an escape
    before no operator."""
    acts, drop, escape = [], [], None
    for position, code in zip(at.tolist(), codes.tolist(), strict=True):
        if escape is not None:
            if position != escape + 1:
                return at, None
            escape = None
            continue
        drop.append(position)
        if code == _ESCAPE:
            escape = position
        else:
            acts.append(position)
    if escape is not None:
        return at, None
    return np.array(acts, np.int64), np.array(drop, np.int64)


def _capitals(units: np.ndarray, at: np.ndarray, codes: np.ndarray):
    """Positions of the letters that acting operators turn into capitals; None if any
    operator is unusual."""
    first = at + 1
    # each operator directly before a letter; CAPNEXT inside a word, the other two not
    usual = _LETTER[units[first]] & ((codes == _CAPNEXT) == _LETTER[units[at - 1]])
    if np.count_nonzero(usual) < at.size:
        return None
    run = first[codes == _ALLCAPS]
    if not run.size:
        return first
    ends = ((units | 32) - 97 >= 26).tobytes()  # of words; the last space ends one, too
    stop = np.array([ends.find(1, begin) for begin in run.tolist()])
    if np.count_nonzero(units[stop] == _CAPNEXT):  # the capitals would go on behind it
        return None
    lengths = stop - run
    shift = np.repeat(run - lengths.cumsum() + lengths, lengths)
    return np.concatenate([first, shift + np.arange(shift.size)])


def _fault(at: int, reason: str) -> CaseOpsError:
    return CaseOpsError(f"character {at}: {reason}")


def _decode_spelled_out(text: str) -> str:
    """Decode character by character: the definition of what operators mean, and the
    source of messages."""
    out = []
    in_word = capitals = False  # capitals: inside a word opened by ALLCAPS
    mode, following, escaped = None, False, False  # operators that wait for their letter
    for i, char in enumerate(text):
        letter = char.isascii() and char.isalpha()
        if escaped:
            if (mode or following) and not letter:
                raise _fault(i, f"escaped {char!r} where an operator needs a letter")
            out.append(char)
            escaped, in_word, capitals = False, letter, capitals and letter
        elif char == ESCAPE:
            if mode or following:
                raise _fault(i, "escape where an operator needs a letter")
            escaped = True
        elif char in (TITLE, ALLCAPS):
            if mode or following or in_word:
                reason = "inside a word or after another operator"
                raise _fault(i, f"{char!r} {reason}")
            mode = char
        elif char == CAPNEXT:
            if following:
                raise _fault(i, f"two {char!r} in a row")
            following = True
        elif letter:
            capitals = capitals or mode == ALLCAPS
            out.append(char.upper() if capitals or mode or following else char)
            in_word, mode, following = True, None, False
        elif mode or following:
            raise _fault(i, f"{char!r} where an operator needs a letter")
        else:
            out.append(char)
            in_word = capitals = False
    if mode or following or escaped:
        raise CaseOpsError("the text ends after an operator")
    return "".join(out)
