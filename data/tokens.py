"""Tokenizers with a byte account: text -> ids, and for every id its bytes of text.

Our own tokenizers are lossless: decoding the ids of a document gives its very text:
  * the identity normaliser, with white space neither collapsed nor stripped;
  * byte fallback, so that any character can be spelled;
  * no dummy prefix. SentencePiece's dummy prefix puts a space before a text and drops
    one when decoding, which is exact only for texts encoded in one go. But a text with
    a literal U+2581 (the sign SentencePiece uses for a space) must be encoded in parts,
    as the library cannot tell the sign from a space; we spell the sign in its three
    bytes, which decode to the sign itself.
Published tokenizers normalise: they collapse and strip white space and replace some
characters, so their ids do not determine the text. They are supported with the field's
byte account (see normalise.py).
"""
from __future__ import annotations

import io
import itertools
import struct

import numpy as np

from data import caseops
from data.normalise import Normaliser
from data.shards import BOS, EOS, MAX_VALUE, PAD, TOKENIZER, UNK, DataError, need
from data.wire import BYTE, CONTROL, NORMAL, UNKNOWN, USER_DEFINED, parse_model, write_field

SPACE = "\u2581"                        # SentencePiece's visible space
BYTE_VOCAB = 260                        # 4 special ids and 256 bytes
PLAIN, CASEOPS, BYTES = "sentencepiece", "caseops", "byte"


# ----------------------------------------------------------------------------------------------------
# Making tokenizers
# ----------------------------------------------------------------------------------------------------
def train_bpe(
    texts, vocab_size: int, case_operators: bool = False, limit: int = 100_000_000
) -> bytes:
    """Train a lossless SentencePiece BPE on texts; returns the serialised model.

    case_operators: transform the texts with CaseOps and give its operators ids 4 to 7.
    Reading stops after `limit` bytes of UTF-8. The result depends only on the texts and
    the arguments.
    """
    symbols = list(caseops.OPERATORS) if case_operators else []
    low, high = BYTE_VOCAB + len(symbols) + 12, 16384
    if not low <= vocab_size <= high:
        raise DataError(f"vocabulary of {vocab_size}: must be {low}..{high}, of which "
                        f"{low - 12} are bytes, special ids and operators; "
                        "for smaller ones use the byte tokenizer (vocabulary 260)")
    spm = need("sentencepiece", "training a tokenizer")
    if case_operators:
        texts = map(caseops.encode, texts)
    sentences = list(training_sentences(texts, limit))
    lossless = {
        "normalization_rule_name": "identity",
        "add_dummy_prefix": False,
        "remove_extra_whitespaces": False,
        "byte_fallback": True,
    }
    ids = {"pad_id": PAD, "bos_id": BOS, "eos_id": EOS, "unk_id": UNK}
    problem = ""
    for coverage in (0.9995, 0.99, 0.98):  # rare characters are left to the byte tokens
        model = io.BytesIO()
        try:
            spm.SentencePieceTrainer.train(
                sentence_iterator=iter(sentences),
                model_writer=model,
                model_type="bpe",
                vocab_size=vocab_size,
                split_digits=True,
                character_coverage=coverage,
                required_chars=SPACE,
                max_sentence_length=1 << 16,
                user_defined_symbols=symbols,
                num_threads=1,
                minloglevel=3,
                **lossless,
                **ids,
            )
            return model.getvalue()
        except RuntimeError as error:
            problem = str(error).strip()[-160:]
            if "required_chars" not in problem:
                break
    remedy = "usually there is too little text: lower the vocabulary or add documents"
    if "required_chars" in problem:
        remedy = "the alphabet alone needs more: raise the vocabulary"
    raise DataError(f"SentencePiece could not train {vocab_size} pieces ({problem}); "
                    f"{remedy}")


def training_sentences(texts, limit: int):
    """Sentences of at most 4,000 characters, until `limit` bytes are used up."""
    for text in texts:
        for start in range(0, len(text), 4000):
            # U+2581 means a space to the trainer, and NUL ends its strings; both are
            # spelled in bytes anyway
            piece = text[start:start + 4000].replace(SPACE, " ").replace("\0", " ")
            limit -= len(piece.encode("utf-8", "replace"))
            yield piece
            if limit <= 0:
                return


def byte_model() -> bytes:
    """The byte tokenizer as a SentencePiece model, for any program: id 4 + b is byte b."""
    specials = [("<pad>", CONTROL), ("<s>", CONTROL), ("</s>", CONTROL), ("<unk>", UNKNOWN)]
    pieces = specials + [(f"<0x{b:02X}>", BYTE) for b in range(256)]
    model = b""
    for name, kind in pieces:
        piece = write_field(1, name.encode()) + write_field(2, 0.0) + write_field(3, kind)
        model += write_field(1, piece)
    trainer = {3: 2, 4: len(pieces), 35: 1}  # BPE, size, byte fallback
    trainer |= {40: UNK, 41: BOS, 42: EOS, 43: PAD}
    # a visible space would be spelled in three bytes
    normaliser = {1: b"identity", 3: 0, 4: 0, 5: 0}
    for number, spec in ((2, trainer), (3, normaliser)):
        model += write_field(number, b"".join(write_field(k, v) for k, v in spec.items()))
    return model


# ----------------------------------------------------------------------------------------------------
# Using them
# ----------------------------------------------------------------------------------------------------
class Tokenizer:
    """A serialised SentencePiece model with exact byte counts.

    Raises DataError where it cannot serve. Attributes: kind ("sentencepiece", "caseops"
    or "byte", found out from the pieces), vocab_size, normaliser (its name), lossless,
    bytes_of ((V,) int64: bytes of text per id; operators and special ids 0).
    field_rule: for normalising tokenizers, leave white space stripped from a document's
    ends uncounted, as published sidecars do; by default it goes to the first and last
    token, so that every byte is counted.
    """

    def __init__(self, model: bytes, field_rule: bool = False):
        spm = need("sentencepiece", "encoding text")
        try:
            self.spm = spm.SentencePieceProcessor(model_proto=model)
            self.spec = parse_model(model)
        except (RuntimeError, ValueError, IndexError, struct.error) as error:
            reason = str(error).strip()[-120:]
            raise DataError(f"tokenizer: not a SentencePiece model ({reason}); "
                            "check the file") from None
        self.vocab_size = self.spm.get_piece_size()
        if self.spm.bos_id() != BOS:
            raise DataError(f"tokenizer: BOS has id {self.spm.bos_id()}, "
                            f"shards need {BOS}; use one trained so")
        if self.vocab_size - 1 > MAX_VALUE:
            raise DataError(f"tokenizer: {self.vocab_size:,} pieces do not fit uint16; "
                            f"at most {MAX_VALUE + 1:,}")
        self.kind = self.find_kind()
        self.normaliser = self.spec.normaliser or "?"
        self.lossless = self.kind == BYTES or self.spec.is_lossless()
        self.field_rule = field_rule
        self.bytes_of = self.piece_bytes()
        self.sign = [self.spm.piece_to_id(f"<0x{b:02X}>") for b in SPACE.encode()]
        self.escape = self.spm.piece_to_id(caseops.ESCAPE) if self.kind == CASEOPS else -1
        if self.kind != BYTES:
            self.words = WordEncoder(self.encode_words, self.count) if self.lossless else None
            self.surfaces = None if self.lossless else Normaliser(self.spec)

    def describe(self, info: dict) -> dict:
        """The tokenizer's entry in a manifest; info: size and sha256 of its file."""
        return {
            "file": TOKENIZER,
            "kind": self.kind,
            "vocab_size": self.vocab_size,
            "normaliser": self.normaliser,
            "lossless": self.lossless,
            "size": info["size"],
            "sha256": info["sha256"],
        }

    def find_kind(self) -> str:
        """The kind of tokenizer, from its pieces."""
        types = {name: kind for name, kind in self.spec.pieces}
        if not any(kind in (NORMAL, USER_DEFINED) for kind in types.values()):
            return BYTES
        operators = [types.get(operator) for operator in caseops.OPERATORS]
        return CASEOPS if set(operators) == {USER_DEFINED} else PLAIN

    def piece_bytes(self) -> np.ndarray:
        """(V,) bytes of text per id: spaces count, special ids and operators are 0."""
        silent = caseops.OPERATORS if self.kind == CASEOPS else ()
        sizes = np.zeros(self.vocab_size, dtype=np.int64)
        for i, (name, kind) in enumerate(self.spec.pieces):
            if kind == BYTE:
                sizes[i] = 1
            elif kind in (NORMAL, USER_DEFINED) and name not in silent:
                sizes[i] = len(name.replace(SPACE, " ").encode("utf-8"))
        return sizes

    def encode(self, texts: list[str]):
        """texts -> (ids uint16, bytes uint16, tokens per text int64): all in a row.

        BOS stands in front of each. Texts must be free of lone surrogates. Raises
        DataError for bytes that are not accounted for.
        """
        if self.kind == BYTES:
            return encode_bytes(texts)
        if self.words:
            return self.words.encode(texts)
        rows = [self.encode_normalising(text) for text in texts]
        lengths = np.array([len(ids) for ids, _ in rows], dtype=np.int64)
        none = np.zeros(0, np.uint16)  # there may be no text
        ids = np.concatenate([none, *(ids for ids, _ in rows)])
        counts = np.concatenate([none, *(counts for _, counts in rows)])
        return ids, counts, lengths

    def encode_words(self, words: list[str]):
        """words -> (ids (n,) of all in a row, ids per word (W,)), int64.

        Words have spaces only in front.
        """
        if self.kind == CASEOPS:
            # NUL is no letter, so words joined by it do not touch
            joined = "\0".join(words)
            if joined.count("\0") >= len(words):  # some word holds one
                words = [caseops.encode(word) for word in words]
            else:
                words = caseops.encode(joined).split("\0")
        found = self.spm.encode(words, num_threads=1)
        for i, word in enumerate(words):
            if SPACE in word:
                found[i] = self.encode_with_sign(word)
        flat = np.array(list(itertools.chain.from_iterable(found)), np.int64)
        return flat, np.array([len(ids) for ids in found], np.int64)

    def encode_with_sign(self, text: str) -> list[int]:
        """Ids of a text with literal U+2581, in bytes: the library would read a space."""
        first, *rest = text.split(SPACE)
        ids = self.spm.encode(first)
        for part in rest:
            ids += self.sign + self.spm.encode(part)
        return ids

    def count(self, ids: np.ndarray) -> np.ndarray:
        """Bytes of original text per id (n,) of a lossless tokenizer, int64."""
        counts = self.bytes_of[ids]
        if self.kind == CASEOPS:
            escaped = -1  # an operator behind an escape stands for itself
            for at in np.flatnonzero(ids == self.escape).tolist():
                if at != escaped and at + 1 < len(ids):
                    escaped = at + 1
                    counts[escaped] = len(caseops.ESCAPE.encode())
        return counts

    def encode_normalising(self, text: str):
        """(ids, bytes) of one document, BOS in front, for a tokenizer that normalises."""
        if self.kind == CASEOPS:
            text = caseops.encode(text)
        utf8 = text.encode("utf-8")
        ids = np.array(self.spm.encode(text), dtype=np.int64)
        original = caseops.original_bytes(utf8) if self.kind == CASEOPS else np.ones(len(utf8), bool)
        counts = within_uint16(self.surfaces.counts(text, ids, original, whole=not self.field_rule), text)
        return (np.concatenate([[BOS], ids]).astype(np.uint16),
                np.concatenate([[0], counts]).astype(np.uint16))

    def decode(self, ids) -> str:
        """Text of one document's ids, without special ids. Exact for lossless tokenizers."""
        if self.kind == BYTES:
            return bytes(int(i) - 4 for i in ids if i > UNK).decode("utf-8", "replace")
        text = self.spm.decode([int(i) for i in ids if i > UNK])
        return caseops.decode(text) if self.kind == CASEOPS else text

    def decodable_bytes(self, ids) -> int:
        """UTF-8 bytes of original text that one document's ids determine."""
        if self.lossless:
            return int(self.count(np.asarray(ids, np.int64)).sum())
        utf8 = self.spm.decode([int(i) for i in ids if i > UNK]).encode("utf-8")
        return int(caseops.original_bytes(utf8).sum()) if self.kind == CASEOPS else len(utf8)


def within_uint16(counts: np.ndarray, text: str) -> np.ndarray:
    """The same bytes per token with none above 65,535: what is too much goes to the tokens beside, the next
    ones first. DataError when there are too few of them."""
    if not counts.size or counts.max() <= MAX_VALUE:
        return counts
    for order in (slice(None), slice(None, None, -1)):
        counts, excess = counts[order].copy(), 0
        for i, count in enumerate(counts.tolist()):
            counts[i] = min(count + excess, MAX_VALUE)
            excess += count - counts[i]
        counts = counts[order]
        if not excess:
            return counts
        counts[order][-1] += excess
    raise DataError(f"a document of {counts.size:,} tokens and {counts.sum():,} bytes (it starts with "
                    f"{text[:40]!r}): a sidecar holds at most {MAX_VALUE:,} bytes a token; shorten its white "
                    "space")


def encode_bytes(texts: list[str]):
    """The byte tokenizer: BOS, then 4 + byte for every byte of UTF-8. Returns what Tokenizer.encode does."""
    utf8 = [text.encode("utf-8") for text in texts]
    lengths = np.array([1 + len(b) for b in utf8], dtype=np.int64)
    joined = np.frombuffer(b"".join(b"\0" + b for b in utf8), np.uint8).astype(np.uint16)
    ids, counts = joined + np.uint16(4), np.ones(joined.size, np.uint16)
    first = np.cumsum(lengths) - lengths
    ids[first], counts[first] = BOS, 0
    return ids, counts, lengths


class Words(dict):
    """Word -> row of the tables; unseen words get the next row and go to `fresh`."""

    def __init__(self):
        super().__init__()
        self.fresh, self.rows = [], 1            # row 0 is BOS

    def __missing__(self, word):
        row = self[word] = self.rows
        self.rows += 1
        self.fresh.append(word)
        return row


class WordEncoder:
    """Encodes documents word by word through a cache: several times as fast.

    A "word" is a maximal stretch without spaces together with the one space before it. A
    lossless BPE never joins across a space (its pieces have one in front only), and
    CaseOps never looks across one, so encoding words apart gives exactly the tokens of
    the whole text; tests compare. A kind of tokenizer supplies `encode_words` (list of
    str -> ids in a row, ids per word) and `count` (ids -> bytes of text per id).
    """

    def __init__(
        self,
        encode_words,
        count,
        cache_words: int = 1_000_000,
        cache_characters: int = 32_000_000,
    ):
        self.encode_words, self.count = encode_words, count
        self.limits = cache_words, cache_characters
        self.reset()

    def reset(self):
        """Forget all words: bounds memory; the output does not depend on it."""
        self.words, self.characters = Words(), 0
        # row 0 is BOS
        self.ids, self.bytes = Growing(BOS, np.uint16), Growing(0, np.uint16)
        self.start, self.length = Growing(0, np.int64), Growing(1, np.int64)

    def encode(self, texts: list[str]):
        """As Tokenizer.encode."""
        if not texts:
            return np.zeros(0, np.uint16), np.zeros(0, np.uint16), np.zeros(0, np.int64)
        rows, counts, row_of = [], [], self.words.__getitem__
        for text in texts:
            before = len(rows)
            first, *rest = text.split(" ")
            # no part contains a space, so " x" is free to name the x that has none in front of it
            rows += (0, row_of(" " + first))
            rows.extend(map(row_of, rest))
            counts.append(len(rows) - before)
        self.learn()
        rows = np.array(rows, dtype=np.int64)
        lengths = self.length.values[rows]
        ends = np.cumsum(lengths)
        source = np.repeat(self.start.values[rows] - ends + lengths, lengths)
        source += np.arange(source.size)
        per_text = np.diff(ends[np.cumsum(counts) - 1], prepend=0)
        ids, sizes = self.ids.values[source], self.bytes.values[source]
        if len(self.words) > self.limits[0] or self.characters > self.limits[1]:
            self.reset()
        return ids, sizes, per_text

    def learn(self):
        """Encode the words seen for the first time and append them to the tables."""
        fresh, self.words.fresh = self.words.fresh, []
        if not fresh:
            return
        self.characters += sum(map(len, fresh))
        ids, lengths = self.encode_words([w[1:] if w[:1] == " " else " " + w for w in fresh])
        self.start.add(self.ids.size + np.cumsum(lengths) - lengths)
        self.length.add(lengths)
        self.ids.add(ids)
        self.bytes.add(self.count(ids))


class Growing:
    """A one-dimensional array that can be added to cheaply; `values` is what is in it."""

    def __init__(self, first: int, dtype):
        self.room, self.size = np.full(1024, first, dtype), 1

    @property
    def values(self) -> np.ndarray:
        """The part in use (a view, valid until the next `add`)."""
        return self.room[:self.size]

    def add(self, values: np.ndarray) -> None:
        """Append; the room doubles when it is full."""
        end = self.size + len(values)
        if end > len(self.room):
            more = np.empty(max(end, len(self.room)), self.room.dtype)
            self.room = np.concatenate([self.room, more])
        self.room[self.size:end] = values
        self.size = end
