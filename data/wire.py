"""Just enough protobuf wire format to read SentencePiece models and write a tiny one.

The library itself does not tell which normaliser a model uses, and its own parser needs
another package.
"""
from __future__ import annotations

import struct
from dataclasses import dataclass

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)      # types of pieces


@dataclass(frozen=True)
class ModelSpec:
    """What a model says about its pieces and its normaliser."""
    pieces: tuple                     # (piece, type) by id
    normaliser: str                   # "identity", "nmt_nfkc", …
    charsmap: bytes                   # compiled replacement rules
    dummy_prefix: bool
    collapse_spaces: bool
    escape_spaces: bool
    space_as_suffix: bool

    def is_lossless(self) -> bool:
        """True if decoding gives back every text that was encoded."""
        spelled = sum(kind == BYTE for _, kind in self.pieces) == 256
        # a space anywhere but in front would join what the word cache keeps apart
        texts = [name for name, kind in self.pieces if kind in (NORMAL, USER_DEFINED)]
        in_front = all("\u2581" not in text[1:] for text in texts)
        changes = self.charsmap or self.dummy_prefix or self.collapse_spaces
        spaces_shown = self.escape_spaces and not self.space_as_suffix
        return spelled and in_front and not changes and spaces_shown


def read_varint(data: bytes, at: int):
    """(value, next position) of the variable-length integer at `at`."""
    value = shift = 0
    while True:
        byte = data[at]
        value |= (byte & 127) << shift
        at, shift = at + 1, shift + 7
        if byte < 128:
            return value, at


def read_fields(data: bytes):
    """(field number, value) pairs of a message: int for varints, bytes otherwise.
    ValueError if damaged."""
    at = 0
    while at < len(data):
        key, at = read_varint(data, at)
        number, kind = key >> 3, key & 7
        if kind == 0:
            value, at = read_varint(data, at)
        elif kind in (1, 2, 5):
            size = 8 if kind == 1 else 4
            if kind == 2:
                size, at = read_varint(data, at)
            value, at = data[at:at + size], at + size
            if at > len(data):
                raise ValueError(f"field {number} runs over the end of the message")
        else:
            raise ValueError(f"unknown wire type {kind} at byte {at}")
        yield number, value


def write_field(number: int, value) -> bytes:
    """One field: bytes, float (32 bits) or a non-negative int."""
    if isinstance(value, bytes):
        return write_varint(number << 3 | 2) + write_varint(len(value)) + value
    if isinstance(value, float):
        return write_varint(number << 3 | 5) + struct.pack("<f", value)
    return write_varint(number << 3) + write_varint(value)


def write_varint(value: int) -> bytes:
    """A non-negative int in groups of seven bits, lowest first."""
    out = bytearray()
    while value > 127:
        out.append(value & 127 | 128)
        value >>= 7
    return bytes([*out, value])


def parse_model(model: bytes) -> ModelSpec:
    """Pieces and normaliser of a serialised SentencePiece model. Raises ValueError if
    it is none."""
    pieces, trainer, normaliser = [], {}, {}
    for number, value in read_fields(model):
        if number == 1:
            piece = dict(read_fields(value))
            pieces.append((piece[1].decode("utf-8"), piece.get(3, NORMAL)))
        elif number == 2:
            trainer = dict(read_fields(value))
        elif number == 3:
            normaliser = dict(read_fields(value))
    if not pieces:
        raise ValueError("no pieces")
    return ModelSpec(
        pieces=tuple(pieces),
        normaliser=normaliser.get(1, b"").decode(),
        charsmap=normaliser.get(2, b""),
        dummy_prefix=bool(normaliser.get(3, 1)),
        collapse_spaces=bool(normaliser.get(4, 1)),
        escape_spaces=bool(normaliser.get(5, 1)),
        space_as_suffix=bool(trainer.get(24, 0)),
    )
