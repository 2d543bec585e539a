"""CaseOps: lossless on arbitrary Unicode, bit-exact with the reference, and what malformed text means."""

import json

import pytest

from data import caseops

T, A, N, E = caseops.OPERATORS

PAIRS = [
    ("", ""), ("plain text, 123!", "plain text, 123!"), ("The", T + "the"), ("I", T + "i"),
    ("HTTP", A + "http"),
    ("McDonald", T + "mc" + N + "donald"), ("iPhone", "i" + N + "phone"),
    ("LaTeX", T + "la" + N + "te" + N + "x"),
    ("aB", "a" + N + "b"), ("AB", A + "ab"), ("ABc", T + "a" + N + "bc"), ("A1B", T + "a1" + T + "b"),
    ("WI-FI", A + "wi-" + A + "fi"), ("Größe", T + "größe"), ("ÀB", "À" + T + "b"),
    ("ÉCOLE", "É" + A + "cole"),
    (T, E + T), (E, E + E), ("AB" + T + "CD", A + "ab" + E + T + A + "cd"),
    ("AB" + A + "cd", A + "ab" + E + A + "cd"),
    ("X\n\tY", T + "x\n\t" + T + "y"), ("\U0001f600OK", "\U0001f600" + A + "ok"),
    ("\ud800A\udc00", "\ud800" + T + "a\udc00"),
]
LENIENT = [("ABC", "ABC"), (T + "ABC", "ABC"), (A + "aB", "AB"), (N + "a", "A"), (T + N + "a", "A"),
           (E + "a", "a"), (A + "ab" + N + "cd", "ABCD"), (E + "ab" + N + "c", "abC"),
           (A + "a" + E + "bc", "AbC")]
WRONG = [T, A, N, E, T + " a", A + T + "a", "a" + T + "b", "a" + A + "b", N + N + "a", T + "1", A + E + T,
         "a" + N, "a" + N + " b", T + E + "ab", N + T + "a", T + "a" + T + "b", "ab" + E]


def by_definition(text):
    """The transform spelled out word by word."""
    import re
    def word(match):
        w = match[0]
        low = w.lower()
        if w == low:
            return w
        if len(w) > 1 and w == w.upper():
            return A + low
        marks = [(T if i == 0 else N) if c != d else "" for i, (c, d) in enumerate(zip(w, low, strict=True))]
        return "".join(m + c for m, c in zip(marks, low, strict=True))
    return re.sub("[A-Za-z]+", word, re.sub(f"[{T}-{E}]", lambda m: E + m[0], text))


@pytest.mark.parametrize("text, encoded", PAIRS)
def test_known_pairs(text, encoded):
    assert caseops.encode(text) == encoded
    assert caseops.decode(encoded) == text


@pytest.mark.parametrize("encoded, text", LENIENT)
def test_unusual_but_unambiguous(encoded, text):
    assert caseops.decode(encoded) == text


@pytest.mark.parametrize("encoded", WRONG)
def test_malformed_is_refused(encoded):
    with pytest.raises(caseops.CaseOpsError):
        caseops.decode(encoded)


def test_reference(recorded):
    fixture = json.loads(recorded("caseops").texts["strings"])
    for row in fixture["rows"]:
        assert caseops.encode(row["text"]) == row["encoded"]
        assert caseops.decode(row["encoded"]) == row["text"]
    for row in fixture["decode_only"]:
        if row.get("error"):
            with pytest.raises(caseops.CaseOpsError):
                caseops.decode(row["encoded"])
        else:
            assert caseops.decode(row["encoded"]) == row["decoded"]


def test_properties():
    hypothesis = pytest.importorskip("hypothesis")
    st = hypothesis.strategies
    letters = st.sampled_from("aBcXYz 1-é\u212a\u017f" + T + A + N + E + "\ud800\udc00\U0001f600")
    anything = st.one_of(st.text(letters, max_size=30), st.text(max_size=60),
                         st.text(st.characters(codec=None), max_size=30))

    @hypothesis.settings(max_examples=600, deadline=None)
    @hypothesis.given(anything)
    def lossless_and_as_defined(text):
        encoded = caseops.encode(text)
        assert encoded == by_definition(text)
        assert caseops.decode(encoded) == text
        assert not any("A" <= c <= "Z" for c in encoded)

    @hypothesis.settings(max_examples=600, deadline=None)
    @hypothesis.given(anything)
    def fast_decoding_is_the_definition(text):
        try:
            expected = caseops._decode_spelled_out(text)
        except caseops.CaseOpsError:
            with pytest.raises(caseops.CaseOpsError):
                caseops.decode(text)
        else:
            assert caseops.decode(text) == expected

    @hypothesis.settings(max_examples=200, deadline=None)
    @hypothesis.given(st.text(max_size=60))
    def bytes_of_original(text):
        mask = caseops.original_bytes(caseops.encode(text).encode())
        assert mask.sum() == len(text.encode())

    lossless_and_as_defined()
    fast_decoding_is_the_definition()
    bytes_of_original()


def test_long_texts_are_cut_without_a_trace():
    text = "The HTTP of McDonald's \ue001 AB " * 5000 + "X" * 100_000 + " end"
    assert caseops.encode(text) == by_definition(text)
    assert caseops.decode(caseops.encode(text)) == text


def test_original_bytes_of_escaped_operators():
    encoded = caseops.encode("A" + T + "B\u00e9").encode()
    mask = caseops.original_bytes(encoded)
    # TITLE a | ESCAPE T | TITLE b é
    assert mask.tolist() == [False] * 3 + [True] + [False] * 3 + [True] * 3 + [False] * 3 + [True] * 3
