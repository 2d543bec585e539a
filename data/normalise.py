"""Which bytes of a text each token of a normalising SentencePiece model stands for.

SentencePiece can report this itself, but under other names in other releases (0.2.0 and
0.2.3 share none that is complete), so the normaliser is done again here: white space as
the library treats it, replacements by the compiled rules stored in the model (a Darts
double array that maps byte strings to replacements, longest match first).
"""
from __future__ import annotations

import bisect
import itertools
import re

import numpy as np

from data.shards import DataError
from data.wire import BYTE, CONTROL, NORMAL, USER_DEFINED, ModelSpec

SPACE = "\u2581"
# Printable ASCII in single-spaced words: copied, except a last character that might
# combine with the next one
_PLAIN = re.compile(rb"[!-~]+(?: [!-~]+)*")


class Normaliser:
    """Byte counts per token for one model.

    Raises DataError for models that work in another way.
    """

    def __init__(self, spec: ModelSpec):
        if not spec.escape_spaces or spec.space_as_suffix:
            raise DataError("tokenizer: spaces are treated in an unusual way "
                            "(kept visible, or after words); "
                            "use one trained with SentencePiece's defaults")
        self.spec = spec
        size = int.from_bytes(spec.charsmap[:4], "little")
        self.units = np.frombuffer(spec.charsmap[4:4 + size], "<u4").tolist()
        self.replacements = spec.charsmap[4 + size:]
        symbols = [piece for piece, kind in spec.pieces if kind == USER_DEFINED]
        symbols.sort(key=len, reverse=True)  # the longest is tried first
        self.symbols = None
        if symbols:
            patterns = [re.escape(symbol.encode()) for symbol in symbols]
            self.symbols = re.compile(b"|".join(patterns))
        self.is_byte = np.array([kind == BYTE for _, kind in spec.pieces])
        self.lengths = np.array([self.piece_length(p, kind) for p, kind in spec.pieces])
        pairs = map(bytes, itertools.product(range(33, 127), range(128)))
        self.copies = all(self.longest(pair) is None for pair in pairs)

    @staticmethod
    def piece_length(piece: str, kind: int) -> int:
        """Bytes of normalised text of a piece, a space being one byte."""
        if kind in (NORMAL, USER_DEFINED):
            return len(piece.replace(SPACE, " ").encode("utf-8"))
        return {BYTE: 1, CONTROL: 0}.get(kind, -1)

    def longest(self, data: bytes):
        """(bytes used, replacement) by the rule with the longest match at the start of
        `data`, or None."""
        units, found = self.units, None
        if not units:
            return None
        node = (units[0] >> 10) << ((units[0] & 512) >> 6)
        for i, byte in enumerate(data):
            node ^= byte
            if node >= len(units) or units[node] & 0x800000FF != byte:
                break
            unit = units[node]
            node ^= (unit >> 10) << ((unit & 512) >> 6)
            if unit & 256:
                start = units[node] & 0x7FFFFFFF
                end = self.replacements.index(b"\0", start)
                found = i + 1, self.replacements[start:end]
        return found

    def step(self, data: bytes, at: int):
        """(bytes used, replacement) of what stands at `at`: a symbol, a rule's match,
        or one character."""
        match = self.symbols.match(data, at) if self.symbols else None
        if match:
            return match.end() - at, match[0]
        found = self.longest(data[at:at + 64])
        if found:
            return found
        size = bisect.bisect((0x80, 0xE0, 0xF0), data[at]) + 1  # of a UTF-8 character
        return size, data[at:at + size]

    def normalise(self, data: bytes):
        """UTF-8 -> (normalised UTF-8 with U+2581 as a space, int64 per byte + 1: its
        origin in `data`)."""
        collapse, sign = self.spec.collapse_spaces, SPACE.encode()
        out, origin, at = bytearray(), [], 0
        after_space = collapse
        if self.spec.dummy_prefix and data:
            out += b" "
            origin.append(np.zeros(1, np.int64))
        while at < len(data):
            plain = _PLAIN.match(data, at) if self.copies else None
            if plain:
                end = plain.end()
                end -= end < len(data) and data[end] >= 0x80
                if end > at:
                    out += data[at:end]
                    origin.append(np.arange(at, end))
                    at, after_space = end, data[end - 1:end] == b" "
                    if at == len(data) or data[at] != 0x20 and data[at] < 0x80:
                        continue
            used, text = self.step(data, at)
            if after_space:
                text = text.lstrip(b" ")
            if text:
                after_space = collapse and text.endswith(b" ")
                text = text.replace(sign, b" ")
                out += text
                origin.append(np.full(len(text), at))
            at += used
        return self.strip(bytes(out), np.concatenate([*origin, [at]]).astype(np.int64))

    def strip(self, out: bytes, origin: np.ndarray):
        """Strip trailing spaces; space stripped in front belongs to no byte, the dummy
        prefix covers none."""
        if self.spec.collapse_spaces:
            kept = len(out.rstrip(b" "))
            out, origin = out[:kept], origin[:kept + 1]
        if self.spec.dummy_prefix and len(out) > 1:
            origin[0] = origin[1]
        return out, origin

    def counts(
        self, text: str, ids: np.ndarray, original: np.ndarray, whole: bool
    ) -> np.ndarray:
        """Bytes of original text per token, (n,) int64.

        text: what was encoded; ids: its tokens; original: bool per UTF-8 byte of it,
        False for bytes that no original text stands behind. whole: give stripped white
        space to the first and the last token. A character spelled in byte tokens counts
        on the last of them.
        """
        data = text.encode("utf-8")
        normal, origin = self.normalise(data)
        lengths = self.lengths[ids] if ids.size else np.zeros(0, np.int64)
        spelled = int(lengths.sum())
        if (lengths < 0).any() or spelled != len(normal):
            raise DataError(f"tokenizer: its tokens spell {spelled:,} bytes, its "
                            f"normaliser gives {len(normal):,} for the document starting "
                            f"{text[:60]!r}; this model is not supported")
        if not ids.size:
            return lengths
        ends = np.cumsum(lengths)
        codes = np.frombuffer(normal + b" ", np.uint8)
        begins = codes & 0xC0 != 0x80  # a character
        inside = self.is_byte[ids] & ~begins[ends]
        if inside.any():
            places = np.where(begins, np.arange(codes.size), 0)
            starts = np.maximum.accumulate(places)
            ends = np.where(inside, starts[ends], ends)
        total = np.concatenate([[0], np.cumsum(original)])
        edges = total[origin[np.concatenate([[0], ends])]]
        if whole:
            edges[0], edges[-1] = 0, total[-1]
        return np.diff(edges)
