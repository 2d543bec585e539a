"""CaseOps: a lossless transform that moves capital letters of ASCII words into operator characters.

    "The HTTP router of McDonald"  ->  "Tthe AHTTP..."   with operators instead of the capitals:
    U+E001 + "the", U+E002 + "http", "router", "of", U+E001 + "mc" + U+E003 + "donald"

Only maximal runs of ASCII letters change:
    all capitals, two or more letters      U+E002 + lower case            HTTP
    first letter capital, the rest lower   U+E001 + lower case            The, I
    anything else with capitals            U+E001 before a first letter that is a capital, U+E003 before every
                                           later capital, all in lower case   McDonald, iPhone
A literal U+E001..U+E004 in the text is preceded by U+E004. All other characters stay. `decode(encode(s))
== s` for every str, lone surrogates included.
"""
from __future__ import annotations

import numpy as np

OPERATORS = TITLE, ALLCAPS, CAPNEXT, ESCAPE = "\ue001", "\ue002", "\ue003", "\ue004"
_TITLE, _ALLCAPS, _CAPNEXT, _ESCAPE = map(ord, OPERATORS)
_CHUNK = 1 << 15                                          # characters worked on at once: the cache holds them


class CaseOpsError(ValueError):
    """A text that is no transformed text: an operator has nothing to act on, or is in a wrong place."""


def encode(text: str) -> str:
    """Transform a text. Never fails."""
    if len(text) <= 2 * _CHUNK:
        return _encode(text)
    return "".join(map(_encode, _chunks(text)))


def _encode(text: str) -> str:
    units = _units(text)
    capital = units - 65 < 26            # unsigned arithmetic wraps round, so one comparison does
    at, codes = _capital_operators(units, capital)
    plain = text.isascii()
    if not plain:
        literal = np.flatnonzero(_is_operator(units))
        if literal.size:
            at, codes = np.append(at, literal), np.append(codes, np.full(literal.size, _ESCAPE))
            order = at.argsort()
            at, codes = at[order], codes[order]
    if not at.size:
        return text
    out = np.empty(units.size + at.size, np.uint32 if units.dtype == np.uint32 else np.uint16)
    original = np.ones(out.size, bool)
    places = at + np.arange(at.size)
    original[places] = False
    out[places] = codes
    out[original] = _units(text.lower()) if plain else units + capital * np.uint16(32)
    return _text(out)


def _chunks(text: str):
    """Cut a text in front of spaces, where no word is cut, into parts that fit the processor's cache."""
    start = 0
    while start < len(text):
        end = text.find(" ", start + _CHUNK)
        end = end if end >= 0 else len(text)
        yield text[start:end]
        start = end


def decode(text: str) -> str:
    """Invert `encode`; unusual but unambiguous use of operators is accepted, else CaseOpsError."""
    if text.isascii():
        return text
    units = _units(text)
    at = np.flatnonzero(_is_operator(units))
    if not at.size:
        return text
    codes, drop = units[at], at
    if (codes == _ESCAPE).any():
        at, drop = _resolve_escapes(at, codes)
        codes = units[at]
    capital = None if drop is None else _capitals(units, at, codes)
    if capital is None:
        return _decode_spelled_out(text)
    out = units.copy()
    out[capital] &= 0xFFDF
    keep = np.ones(units.size, bool)
    keep[drop] = False
    return _text(out[keep])


def original_bytes(encoded: bytes) -> np.ndarray:
    """UTF-8 of a transformed text -> bool per byte: False for operators that act and for escapes.

    The number of True in a slice is the number of bytes of original text behind it; an escaped operator
    counts 3.
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
    """Characters as unsigned integers: ASCII, UTF-16, or code points where surrogates stand alone."""
    if text.isascii():
        return np.frombuffer(text.encode("ascii"), np.uint8)
    try:
        return np.frombuffer(text.encode("utf-16-le"), "<u2")
    except UnicodeEncodeError:
        return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), "<u4")


def _text(units: np.ndarray) -> str:
    """Inverse of _units for 16- and 32-bit units."""
    if units.dtype == np.uint32:
        return units.tobytes().decode("utf-32-le", "surrogatepass")
    return units.tobytes().decode("utf-16-le")


def _is_letter(units: np.ndarray) -> np.ndarray:
    """True for ASCII letters; unsigned arithmetic wraps round, so one comparison does."""
    return (units | 32) - 97 < 26


def _is_operator(units: np.ndarray) -> np.ndarray:
    return units - np.asarray(_TITLE, units.dtype) < 4


def _capital_operators(units: np.ndarray, capital: np.ndarray):
    """(positions, operators) to insert in front of capitals."""
    letter = np.zeros(units.size + 2, bool)               # with a non-letter at either end
    np.logical_or(capital, units - 97 < 26, out=letter[1:-1])
    pairs = capital[:-1] & capital[1:]
    begin = np.flatnonzero(pairs > letter[:-3]) if units.size > 1 else np.zeros(0, np.int64)
    if begin.size:
        # words of capitals: those that begin with two, and whose stretch of capitals ends where the word does
        last = capital.copy()
        last[:-1] ^= pairs
        ends = np.flatnonzero(last)
        end = ends[np.searchsorted(ends, begin)]
        whole = ~letter[end + 2]
        begin, lengths = begin[whole], (end - begin)[whole]
        shift = np.repeat(begin + 1 - np.cumsum(lengths) + lengths, lengths)
        capital = capital.copy()
        capital[shift + np.arange(shift.size)] = False
    at = np.flatnonzero(capital)
    codes = np.where(letter[at], _CAPNEXT, _TITLE)
    codes[np.searchsorted(at, begin)] = _ALLCAPS
    return at, codes


def _resolve_escapes(at: np.ndarray, codes: np.ndarray):
    """Split operators: (those that act, all to be dropped). (at, None) for an escape before no operator."""
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
    """Positions of the letters that acting operators turn into capitals; None if any operator is unusual."""
    if not at.size:
        return at
    letter = _is_letter(units)
    first = at + 1
    inside = letter[at - 1]
    inside[0] &= at[0] > 0
    # each operator directly before a letter; CAPNEXT inside a word, the other two not
    if first[-1] >= units.size or not letter[first].all() or ((codes == _CAPNEXT) != inside).any():
        return None
    run = first[codes == _ALLCAPS]
    if not run.size:
        return first
    ends = np.append(np.flatnonzero(~letter), units.size)
    stop = ends[np.searchsorted(ends, run)]
    if (units.take(stop, mode="clip") == _CAPNEXT).any():   # then the capitals would go on behind it
        return None
    lengths = stop - run
    shift = np.repeat(run - np.cumsum(lengths) + lengths, lengths)
    return np.concatenate([first, shift + np.arange(shift.size)])


def _decode_spelled_out(text: str) -> str:
    """Decode character by character: the definition of what operators mean, and the source of messages."""
    out, in_word, capitals = [], False, False             # capitals: inside a word opened by ALLCAPS
    mode, following, escaped = None, False, False         # operators that wait for their letter
    for i, char in enumerate(text):
        letter = char.isascii() and char.isalpha()
        if escaped:
            if (mode or following) and not letter:
                raise CaseOpsError(f"character {i}: escaped {char!r} where an operator needs a letter")
            out.append(char)
            escaped, in_word, capitals = False, letter, capitals and letter
        elif char == ESCAPE:
            if mode or following:
                raise CaseOpsError(f"character {i}: escape where an operator needs a letter")
            escaped = True
        elif char in (TITLE, ALLCAPS):
            if mode or following or in_word:
                raise CaseOpsError(f"character {i}: {char!r} inside a word or after another operator")
            mode = char
        elif char == CAPNEXT:
            if following:
                raise CaseOpsError(f"character {i}: two {char!r} in a row")
            following = True
        elif letter:
            capitals = capitals or mode == ALLCAPS
            out.append(char.upper() if capitals or mode or following else char)
            in_word, mode, following = True, None, False
        elif mode or following:
            raise CaseOpsError(f"character {i}: {char!r} where an operator needs a letter")
        else:
            out.append(char)
            in_word = capitals = False
    if mode or following or escaped:
        raise CaseOpsError("the text ends after an operator")
    return "".join(out)
