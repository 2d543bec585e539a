"""Pack: exact round trips, every damage refused, bounded cost."""

import copy
import dataclasses
import json
import re
import resource
import types

import brotli
import numpy as np
import pytest
import torch
from conftest import ROOT, settings, sine_model, tg

UserError = tg.UserError
DAMAGED = (ValueError, brotli.error)      # what decoders raise


def gaussian(shapes, sigma, seed=0):
    rng = np.random.default_rng(seed)
    return [np.rint(sigma * rng.standard_normal(s)).clip(-127, 127).astype(np.int8) for s in shapes]


def plain_sides(codes, contexts=3, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(0, contexts, c.shape[0]), rng.integers(0, contexts, c.shape[1])) for c in codes]


def entropy_bytes(codes):
    n = np.bincount(np.concatenate([c.ravel() for c in codes]).view(np.uint8))
    n = n[n > 0]
    return -(n * np.log2(n / n.sum())).sum() / 8


# ---- codes


@pytest.mark.parametrize("walk", [False, True])
@pytest.mark.parametrize("sigma", [0, 0.1, 2.4, 4.5, 40, 400])
def test_codes_round_trip(sigma, walk):
    codes = gaussian([(5, 7), (64, 48), (1, 48), (48, 7), (3, 1), (1, 1)], sigma)
    sides = plain_sides(codes)
    blob = tg.encode_codes(codes, sides, walk)
    assert blob == tg.encode_codes(codes, sides, walk)
    for a, b in zip(codes, tg.decode_codes(blob, sides, walk), strict=True):
        assert b.dtype == np.int8 and np.array_equal(a, b)


def test_codes_every_value_and_many_lanes():
    rng = np.random.default_rng(1)
    codes = [rng.integers(-128, 128, (1500, 96)).astype(np.int8), np.arange(-128, 128, dtype=np.int8)[None]]
    heavy = np.rint(2.4 * rng.standard_t(2, (700, 96))).clip(-127, 127).astype(np.int8)  # many escapes
    codes.append(heavy)
    sides = plain_sides(codes)
    for a, b in zip(codes, tg.decode_codes(tg.encode_codes(codes, sides), sides), strict=True):
        assert np.array_equal(a, b)


def test_codes_frozen_bytes():
    """The format itself: a file written today must be read tomorrow, on any machine and numpy."""
    rng = np.random.RandomState(0)
    codes = [rng.choice([-9, 0, 9, 100], (16, 12), p=[0.3, 0.4, 0.29, 0.01]).astype(np.int8),
             rng.randint(-3, 4, (6, 12)).astype(np.int8)]
    sides = [(np.arange(16) % 2, np.zeros(12, int)), (np.full(6, 2), np.zeros(12, int))]
    factors = {0: rng.randint(-2, 3, (8, 12)).astype(np.int8)}
    blob = bytes.fromhex(
        "01000600000000005a000000ffffffff18191fff07e887876fe7bbea5f7789640126960c6486c9744613de08060e39b0"
        "4425022b400ca4ed8c0396e74ecf325d00875ef35d801be023cb09324d801f60834c1b60007490e901a80019342a0001"
        "50f08335850c5800b4d39500a433f50061c39a1e96c2ab9085a5bcaf5f8e242f7f707c525194e546895aa2bec9f172d0"
        "dde4184ca019519653172884b6565f4dc24c94eacfe4d770217bacd34f2c36c3"
    )
    for a, b in zip(codes, tg.decode_codes(blob, sides, True, factors), strict=True):
        assert np.array_equal(a, b)
    assert tg.encode_codes(codes, sides, True, factors)[-8:] == blob[-8:]  # brotli's may differ


def test_codes_near_entropy():
    codes = gaussian([(2048, 512)], 2.4)
    blob = tg.encode_codes(codes, [(np.zeros(2048, int), np.zeros(512, int))])
    assert len(blob) < 1.0015 * entropy_bytes(codes) + 256


def test_contexts_pay_for_a_scale_field():
    rng = np.random.default_rng(3)
    columns = np.exp2(0.5 * rng.standard_normal(512))
    codes = [np.rint(2.4 * columns * rng.standard_normal((1024, 512))).clip(-127, 127).astype(np.int8)]
    known = np.zeros(1024, int), np.rint(tg.OCTAVE * np.log2(columns)).astype(int)  # e.g. stored steps
    blind = np.zeros(1024, int), np.zeros(512, int)
    flat = tg.encode_codes(codes, [blind])
    sizes = []
    for sides in (known, blind):
        levels = tg.code_levels(codes[0], *sides)
        aware = tg.encode_codes(codes, [tg.scale_contexts(levels, *sides)])
        sizes.append(len(aware) + len(tg.brotli_pack(levels.tobytes())))
    assert sizes[0] < sizes[1] < 0.97 * len(flat)  # what the decoder knows need not be sent


def shared(rows, columns, strength, seed=0):
    """Codes whose rows share two directions, and levels that differ from row to row."""
    rng = np.random.default_rng(seed)
    common = rng.standard_normal((rows, 2)) @ rng.standard_normal((2, columns))
    size = 3 * np.exp2(rng.random((rows, 1)))
    values = size * (strength * common + rng.standard_normal((rows, columns)))
    return np.rint(values).clip(-128, 127).astype(np.int8)


@pytest.mark.parametrize("walk", [False, True])
def test_what_rows_share_is_guessed(walk):
    """Residues take fewer bytes, the codes come back, and plain noise is left alone."""
    codes = [shared(1500, 64, 0.5), *gaussian([(200, 64), (30, 7)], 2.4)]
    factors = {0: tg.shared_factors(codes[0])}

    def contexts(codes):
        zeros = [(0 * x[:, 0].astype(int), 0 * x[0].astype(int)) for x in codes]
        return [tg.scale_contexts(tg.code_levels(x, *z), *z) for x, z in zip(codes, zeros, strict=True)]

    plain, sides = contexts(codes), contexts([tg.residues(codes[0], factors[0]), *codes[1:]])
    blob = tg.encode_codes(codes, sides, walk, factors)
    assert len(blob) + factors[0].size < 0.97 * len(tg.encode_codes(codes, plain, walk))
    for a, b in zip(codes, tg.decode_codes(blob, sides, walk, factors), strict=True):
        assert np.array_equal(a, b)
    with pytest.raises(DAMAGED):
        tg.decode_codes(blob, sides, walk)
    assert tg.shared_factors(gaussian([(1500, 64)], 2.4)[0]) is None
    with np.errstate(all="raise"):
        assert tg.shared_factors(np.zeros((1500, 64), np.int8)) is None


@pytest.mark.parametrize("trellis", [False, True])
def test_codes_are_as_wide_as_they_need(trellis):
    """Rows beyond int8 come back and cost what a Gaussian does; the others as if they were alone."""
    rng = np.random.default_rng(0)
    narrow = gaussian([(64, 96)], 3.0)[0]
    sigma = np.array([3, 30, 100, 900, 7000] * 60)[:, None]
    wide = np.rint(sigma * rng.standard_normal((300, 256))).clip(-32768, 32767).astype(np.int16)
    codes = [narrow, wide, np.array([[-32768, 32767, 0]], np.int16)]
    predicted = [(np.zeros(len(c), int), np.zeros(c.shape[1], int)) for c in codes]
    streams, tall = tg.pack_codes(codes, predicted, trellis)
    for a, b in zip(codes, tg.unpack_codes(streams, tall, predicted, trellis), strict=True):
        assert a.dtype == b.dtype and np.array_equal(a, b)
    bits = wide.size * np.log2(sigma * np.sqrt(2 * np.pi * np.e)).mean() + narrow.size * 3.6
    assert 8 * sum(map(len, streams.values())) == pytest.approx(bits, rel=0.03)
    for change in (lambda x: x[:-1], lambda x: x + b"0"):
        with pytest.raises(DAMAGED):
            tg.unpack_codes({**streams, "low_bits": change(streams["low_bits"])}, tall, predicted, trellis)
    impossible = tg.brotli_pack(bytes([9]) * sum(map(len, codes)))
    with pytest.raises(DAMAGED, match="wider than any"):
        tg.unpack_codes({**streams, "wide": impossible}, tall, predicted, trellis)


def test_residues_wrap_and_escapes_are_guessed_through():
    """Codes over the whole range: residues modulo 256, listed ones among them."""
    codes = [(shared(600, 40, 2.0).astype(int) * 9).clip(-128, 127).astype(np.int8)]
    factors = {0: np.random.default_rng(0).integers(-127, 128, (8, 40)).astype(np.int8)}
    sides = plain_sides(codes)
    blob = tg.encode_codes(codes, sides, True, factors)
    assert np.array_equal(tg.decode_codes(blob, sides, True, factors)[0], codes[0])


def test_normal_tables_are_frozen():
    """Tables that decoder and encoder compute on any machine: their digest is part of the format."""
    tables = [tg.normal_table(level, odd) for level in range(0, 255, 5) for odd in (0, 1)]
    assert all(t.sum() == tg.PROB_ONE and t.min() >= 0 for t in tables)
    assert tg.digest_of(np.stack(tables).astype("<u2").tobytes()).hex() == "d2329f2e610df015"


def test_guesses_are_frozen():
    factors = np.random.default_rng(0).integers(-127, 128, (8, 512)).astype(np.int8)
    gains = np.stack(tg.Guesser(factors, 1).gains)
    assert tg.digest_of(gains.astype("<i8").tobytes()).hex() == "d981eb089c6ab01c"


def test_contexts_are_small_integers():
    rng = np.random.default_rng(4)
    for level in (-128, 0, 127):
        levels = rng.integers(-128, 128, 1 + 99 + 9).astype(np.int8)
        levels[0] = level
        rows, columns = rng.integers(-128, 128, 99), rng.integers(-128, 128, 9)
        a, b = tg.scale_contexts(levels, rows, columns)
        assert a.min() >= 0 and b.min() >= 0 and 2 * (a.max() + b.max() + 1) <= 256


def test_wrong_side_information_is_refused():
    codes = gaussian([(64, 64), (32, 64)], 2.4)
    sides = [
        tg.scale_contexts(np.zeros(len(c) + 65, np.int8), np.arange(len(c)) % 20, np.zeros(64, int))
        for c in codes
    ]
    blob = tg.encode_codes(codes, sides)
    for wrong in (
        [sides[1], sides[0]],
        sides[:1],
        [(s[0][::-1], s[1]) for s in sides],
        [(s[0] + 1, s[1]) for s in sides],
    ):
        with pytest.raises(DAMAGED):
            tg.decode_codes(blob, wrong)
    with pytest.raises(DAMAGED):
        tg.decode_codes(blob, sides, True)


def test_lanes_are_not_the_files_to_choose():
    """One lane for a large model would take minutes."""
    codes = gaussian([(300, 200)], 2.4)
    blob = bytearray(tg.encode_codes(codes, plain_sides(codes)))
    for lanes in (1, 3, 5, 1024):
        blob[:2] = lanes.to_bytes(2, "little")
        with pytest.raises(DAMAGED, match="header"):
            tg.decode_codes(bytes(blob), plain_sides(codes))


def test_damaged_codes_never_do_worse_than_refuse():
    codes = gaussian([(9, 32), (8, 16)], 2.4)
    sides = plain_sides(codes)
    blob, rng, refused = tg.encode_codes(codes, sides), np.random.default_rng(5), 0
    for i in range(300):
        bad = bytearray(blob)
        if i % 3 == 0:
            bad = bad[: rng.integers(len(bad))]
        else:  # half of the hits go to the front, where sizes and tables live
            bad[rng.integers(len(bad) if i % 3 == 1 else 64)] ^= 1 << rng.integers(8)
        try:
            out = tg.decode_codes(bytes(bad), sides)
            assert [o.shape for o in out] == [c.shape for c in codes]
        except DAMAGED:
            refused += 1
    assert refused > 290  # what slips through (bits nobody reads) is the container's checksum to find


# ---- bytes and scales


@pytest.mark.parametrize("stride", [1, 2, 3, 7])
@pytest.mark.parametrize("size", [0, 1, 5, 64, 1001])
def test_byte_shuffle(size, stride):
    data = np.random.default_rng(size).bytes(size)
    assert tg.byte_unshuffle(tg.byte_shuffle(data, stride), stride) == data
    assert tg.byte_shuffle(b"aAbBc", 2) == b"abcAB"


@pytest.mark.parametrize("size", [0, 1, 70_000, 1 << 20])
def test_brotli_pack(size):
    data = np.random.default_rng(size).integers(0, 4, size, dtype=np.uint8).tobytes()
    blob = tg.brotli_pack(data, 2)
    assert tg.brotli_unpack(blob, size, 2) == data
    for wrong in (size + 1, max(size - 1, 0), 3 * size):
        if wrong != size:
            with pytest.raises(DAMAGED):
                tg.brotli_unpack(blob, wrong, 2)
    for cut in range(0, len(blob), 1 + len(blob) // 20):
        with pytest.raises(DAMAGED):
            tg.brotli_unpack(blob[:cut] if size else b"x", size, 2)


def test_brotli_bomb_stays_small():
    blob = brotli.compress(bytes(1 << 28), quality=1)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DAMAGED):
        tg.brotli_unpack(blob, 1000)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB: the bomb is 256 MiB


# ---- container

HEADER = {"settings": {"model_dim": 64, "name": "größe"}, "meta": [1, 2.5, None]}


def craft(table, tail=b"", text=None):
    """A file whose header checksum is right: what somebody would write on purpose."""
    text = json.dumps({"header": {}, "streams": table}).encode() if text is None else text
    prefix = tg.PREFIX.pack(tg.MAGIC, tg.ARTIFACT_VERSION, len(text), tg.digest_of(text + tail))
    return prefix + text + tail


CRAFTED = [
    craft([["a", 1 << 60]]),
    craft([["a", -5], ["b", 5]]),
    craft([["a", "x"]]),
    craft([["a"]]),
    craft(7),
    craft(None),
    craft([[1, 2, 3]]),
    craft([], b"x"),
    craft([["a", 4]], b"abc"),
    craft([["a", None]], b"abc"),
    craft([], text=b"[" * 200_000),
    craft([], text=b"\xff"),
    craft([], text=b"[]"),
    craft([], text=b""),
    craft([], text=b'{"header": 5, "streams": []}'),
    craft([], text=b'{"header": {}, "streams": [["a", 1e999]]}'),
    craft([], text=b'{"header": {}, "streams": [["a", ' + b"9" * 5000 + b"]]}"),
    b"",
    b"\x93",
    tg.MAGIC,
    tg.MAGIC.replace(b"\r\n", b"\n") + bytes(99),
    b"PK\x03\x04" + bytes(99),
    b"\x80\x04." + bytes(40),
    b"\x89PNG\r\n\x1a\n" + bytes(50),
    bytes(5000),
    b"{}",
]


def small_artifact():
    rng = np.random.default_rng(6)
    streams = {"codes": rng.bytes(700), "scales": rng.bytes(90), "empty": b"", "small": rng.bytes(33)}
    return tg.artifact_to_bytes(HEADER, streams), streams


def test_artifact_round_trip():
    blob, streams = small_artifact()
    header, back = tg.artifact_from_bytes(blob, "a.ptz")
    assert header == HEADER and back == streams and list(back) == list(streams)
    assert blob == tg.artifact_to_bytes(dict(reversed(HEADER.items())), streams)
    with pytest.raises(ValueError):
        tg.artifact_to_bytes({"x": float("nan")}, streams)


def mutated(good, count):
    """Mutated, cut, grown, foreign and crafted files, `count` in all."""
    rng, cases = np.random.default_rng(7), list(CRAFTED)
    cases += [good[:n] for n in range(0, len(good), 2)] + [good + rng.bytes(n) for n in (1, 2, 1000)]
    while len(cases) < count:
        bad, kind = bytearray(good), len(cases) % 5
        at, to = sorted(rng.integers(0, len(good), 2))
        if kind == 0:
            bad[at] ^= 1 << rng.integers(8)
        elif kind == 1:
            bad[at : at + 8] = rng.bytes(len(bad[at : at + 8]))
        elif kind == 2:
            del bad[at : to + 1]
        elif kind == 3:
            bad[at:at] = good[at : to + 1]
        else:  # inside prefix and header, where the sizes are
            bad[rng.integers(22, 22 + 200)] = rng.integers(256)
        if bytes(bad) != good:
            cases.append(bytes(bad))
    return cases


def test_every_damaged_or_foreign_file_is_refused():
    for case in mutated(small_artifact()[0], 2500):
        with pytest.raises(UserError, match="again|write"):
            tg.artifact_from_bytes(case, "a.ptz")


# ---- the model


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(QUANT_TRELLIS=0, VOCAB_SIZE=600),
        dict(QUANT_ALLOCATION="hand", LQER_ENABLED=1),
        dict(LQER_ENABLED=1, LQER_ASYM_ENABLED=0),
        dict(LQER_ENABLED=1, LQER_RANK=100),  # more than a matrix has
        dict(QUANT_ALLOCATION="hand", NUM_LOOPS=0),
    ],
)
def test_a_model_is_read_back_bit_for_bit(monkeypatch, changes):
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(**changes)
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    q = tg.Quantiser(s, weights, tg.Curvature({}))(0.01)
    blob = tg.pack_model(s, q)
    back = tg.read_artifact(s, blob, "test").model
    assert back.forms == q.forms and set(back.tensors) == set(q.tensors)
    assert all(
        torch.equal(back.tensors[k], v) and back.tensors[k].dtype == v.dtype for k, v in q.tensors.items()
    )
    assert blob == tg.pack_model(s, q)
    with pytest.raises(UserError, match="another configuration: .*MODEL_DIM=64 there, 128 here"):
        tg.read_artifact(dataclasses.replace(s, model_dim=128), blob, "test")


NONSENSE = {  # changes to a good header that leave the file itself well-formed
    "no base step": lambda h: h.pop("base_step"),
    "base step 0": lambda h: h.update(base_step=0),
    "base step text": lambda h: h.update(base_step="1"),
    "no sizes": lambda h: h.pop("sizes"),
    "strange sizes": lambda h: h["sizes"].update(nothing=1),
    "sizes of nothing": lambda h: h.update(sizes={}),
    "another setting": lambda h: h["sizes"].update(vocab_size=300),
    "a group of 0": lambda h: h["sizes"].update(lqer_asym_group=0),
    "a rank of text": lambda h: h["sizes"].update(lqer_rank="4"),
    "a rank of 0.5": lambda h: h["sizes"].update(lqer_rank=0.5),
    "a huge rank": lambda h: h["sizes"].update(lqer_rank=3_000_000),
    "architecture 5": lambda h: h.update(architecture=5),
    "a base step beyond floats": lambda h: h.update(base_step=1e300),
    "forms in a list": lambda h: h.update(forms=[]),
    "one tensor more": lambda h: h["forms"]["passthrough (float16)"].append("more"),
    "a tensor twice": lambda h: h["forms"].update(gate_int8_row=["skip_weights"]),
    "a vector by rows": lambda h: h.update(forms={
        "gate_int8_row": ["smear_lambda"],
        **{form: [n for n in names if n != "smear_lambda"] for form, names in h["forms"].items()}}),
    "a mark of numbers": lambda h: h.update(not_compliant=5),
    "no tensors": lambda h: h.update(forms={}),
    "all forms twice": lambda h: h.update(forms={
        f"{form}+{form}": names for form, names in h["forms"].items()}),
    "other forms": lambda h: h.update(forms={"passthrough (float16)": sum(h["forms"].values(), [])}),
    "no factors": lambda h: h.pop("factors"),
    "factors of nothing": lambda h: h.update(factors=[1000]),
    "factors of another": lambda h: h.update(factors=[1]),
    "factors again and again": lambda h: h.update(factors=h["factors"] * 1000),
    "factors that are none": lambda h: h.update(factors=5),
    "no rank": lambda h: h["sizes"].pop("lqer_rank"),
    "an unknown form": lambda h: h["forms"].update(zip=h["forms"].pop("passthrough (float16)")),
}


@pytest.fixture(scope="module")
def packed():
    """A model's header and streams: two layers, a tall embedding with factors, LQER on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tg, "SMALL_TENSOR", 1000)
        return small_pack(settings(LQER_ENABLED=1, **SMALL))


SMALL = dict(NUM_LAYERS=2, LOOP_END=1, MODEL_DIM=32, VOCAB_SIZE=600)


def small_pack(s, hessians={}):
    """Header and streams of a model with all that the settings turn on."""
    weights = tg.matrix_views({n: p.detach() for n, p in sine_model(s).named_parameters()})
    blob = tg.pack_model(s, tg.Quantiser(s, weights, tg.Curvature(hessians))(0.05))
    return tg.artifact_from_bytes(blob, "x")


@pytest.mark.parametrize("what", NONSENSE)
def test_a_well_formed_file_of_nonsense_is_refused(packed, what):
    s = settings(LQER_ENABLED=1, **SMALL)  # the file says how it is packed
    header, streams = copy.deepcopy(packed)
    tg.read_artifact(s, tg.artifact_to_bytes(header, streams), "test")
    NONSENSE[what](header)
    with pytest.raises(UserError, match="again|it names no settings"):
        tg.read_artifact(s, tg.artifact_to_bytes(header, streams), "test")


STREAMS = {
    "NaN": ("half", lambda x: brotli.compress(b"\xff" * len(brotli.decompress(x)))),
    "no halves": ("half", lambda x: b""),
    "no codes": ("codes", lambda x: b""),
    "3 bytes of calibration": ("calibration", lambda x: bytes(3)),
    "2 numbers of calibration": ("calibration", lambda x: bytes(8)),
    "no numbers of calibration": ("calibration", lambda x: b""),
    "NaN as calibration": ("calibration", lambda x: b"\xff" * 60),
    "huge calibration": ("calibration", lambda x: np.full(15, 1e38, "<f4").tobytes()),
}


@pytest.mark.parametrize("what", STREAMS)
def test_streams_of_nonsense_are_refused(packed, what):
    s, (header, streams) = settings(LQER_ENABLED=1, **SMALL), packed
    good = {**streams, "calibration": bytes(60)}
    assert tg.read_artifact(s, tg.artifact_to_bytes(header, good), "x").calibration.tolist() == [0] * 15
    name, change = STREAMS[what]
    good[name] = change(good[name])
    with pytest.raises(UserError, match="again"):
        tg.read_artifact(s, tg.artifact_to_bytes(header, good), "x")


STRANGE = [None, True, 0, -1, 5, 0.5, 1e300, 1 << 40, 1 << 70, "", "half", [], {}, [[]], [0] * 99, {"a": 1}]


def altered(rng, node):
    """JSON with one value somewhere below it replaced, dropped, doubled or renamed."""
    keys = list(node) if isinstance(node, dict) else list(range(len(node)))
    if not keys:
        return STRANGE[rng.integers(len(STRANGE))]
    key, node = keys[rng.integers(len(keys))], node.copy()
    if isinstance(node[key], (dict, list)) and rng.random() < 0.7:
        node[key] = altered(rng, node[key])
    elif (kind := rng.integers(5)) == 0:
        del node[key]
    elif kind == 1 and isinstance(node, dict):
        node[str(STRANGE[rng.integers(len(STRANGE))])] = node.pop(key)
    elif kind == 2 and isinstance(node, list):
        node += node
    else:
        node[key] = STRANGE[rng.integers(len(STRANGE))]
    return node


def damaged(rng, data):
    """A stream with bytes altered, in what brotli holds where it is that, or cut, emptied or foreign."""
    try:
        raw, wrap = bytearray(brotli.decompress(data)), rng.random() < 0.8
    except brotli.error:
        raw, wrap = bytearray(data), False
    raw = raw if wrap else bytearray(data)
    for _ in range(rng.integers(1, 4) if raw else 0):
        at = rng.integers(len(raw) if rng.random() < 0.5 else min(len(raw), 64))
        raw[at] = rng.choice([0, 255, rng.integers(256)])
    kind = rng.integers(6)
    raw = raw[: rng.integers(len(raw) + 1)] if kind == 0 else raw + rng.bytes(60) if kind == 1 else raw
    raw = bytearray(rng.bytes(len(raw))) if kind == 2 else raw
    return brotli.compress(bytes(raw), quality=1) if wrap else bytes(raw)


@pytest.mark.parametrize(
    "changes",
    [
        dict(),
        dict(QUANT_ALLOCATION="hand", LQER_ENABLED=1, SPARSE_ATTN_GATE_ENABLED=0, GATED_ATTN_ENABLED=1,
             GATED_ATTN_QUANT_GATE=1),
        dict(QUANT_ALLOCATION="hand", AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_SIZE=16, LQER_ENABLED=1,
             LQER_ASYM_ENABLED=0),
    ],
)
def test_a_file_made_to_do_harm_is_refused_or_harmless(monkeypatch, changes):
    """Files with a right checksum whatever they hold: finite weights or a UserError, and no memory taken."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    monkeypatch.setattr(tg, "lane_count", lambda size: 200)  # few rounds of Python's loop
    s = settings(**SMALL, **changes)
    shapes = {n: torch.empty(shape, device="meta") for n, shape in tg.GPT.shapes(s).items()}
    hessians = {n: torch.eye(w.shape[1]) for n, w in tg.matrix_views(shapes).items() if ".mlp." in n}
    header, streams = small_pack(s, hessians)
    streams["calibration"] = bytes(60)
    assert header["factors"] or changes
    tg.read_artifact(s, tg.artifact_to_bytes(header, streams), "x")
    rng, refused = np.random.default_rng(8), 0
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for i in range(100):
        bad_header, bad = header, dict(streams)
        if i % 2:
            bad_header = altered(rng, header)
        else:
            name = list(streams)[rng.integers(len(streams))]
            bad[name] = damaged(rng, streams[name])
        try:
            found = tg.read_artifact(s, tg.artifact_to_bytes(bad_header, bad), "x")
            assert all(w.isfinite().all() for w in found.weights.values())
            assert found.calibration is None or found.calibration.isfinite().all()
            assert isinstance(found.mark, str)
        except UserError:
            refused += 1
    assert refused > 50
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 64 << 10  # KiB


def random_model(s, seed):
    """Weights of rows and columns of unlike sizes, and a curvature unlike in rows."""
    rng = torch.Generator().manual_seed(seed)
    shapes = {n: p.detach() for n, p in sine_model(s).named_parameters()}
    weights = {
        n: torch.randn(w.shape, generator=rng) * torch.randn(w.shape[-1], generator=rng).exp() * 0.02
        for n, w in tg.matrix_views(shapes).items()
    }
    fisher = {n: torch.randn(len(w), generator=rng).exp() for n, w in weights.items() if w.dim() == 2}
    return weights, tg.Curvature({}, fisher)


class Log:
    def __init__(self):
        self.rows = []

    def log(self, event, **values):
        self.rows.append(values)


@pytest.mark.parametrize(
    "changes, shares",
    [
        (dict(), [0.7]),
        pytest.param(dict(QUANT_TRELLIS=0), [0.5, 0.9, 1.1], marks=pytest.mark.long),
        (dict(QUANT_ALLOCATION="hand"), [0.8, 1.1]),
    ],
)
def test_the_fitter_lands_just_under_the_limit(monkeypatch, changes, shares):
    """At several limits: never over, at most FIT_MARGIN_BYTES under, or all codes at their finest."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(LQER_ENABLED=0, FIT_MARGIN_BYTES=512, NUM_LAYERS=2, LOOP_END=1, **changes)
    weights, curvature = random_model(s, 0)
    quantiser = tg.Quantiser(s, weights, curvature)
    whole = len(tg.pack_model(s, quantiser(quantiser.finest)))
    for share in shares:
        run = Log()
        monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes() + int(share * whole))
        fitted = tg.quantise_to_fit(s, tg.World(), run, weights, curvature)
        left = tg.ARTIFACT_LIMIT - tg.code_bytes() - tg.MARK_BYTES - len(fitted)
        assert 0 <= left and (left <= s.fit_margin_bytes or run.rows[-1]["base_step"] == quantiser.finest)
        assert len(fitted) in [row["bytes"] for row in run.rows]
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes())
    with pytest.raises(UserError, match="over the limit"):
        tg.quantise_to_fit(s, tg.World(), Log(), weights, curvature)


@pytest.mark.parametrize("before", [{}, {"not_compliant": "a study"}])
def test_a_mark_fits_into_the_room_that_the_fitter_leaves(before):
    blob = tg.artifact_to_bytes(before, {"codes": b"123"})
    for why in ("training took 601.0 s, more than is allowed", "x" * 1000, 20 * "x" + 1000 * "é\""):
        whole = tg.marked(blob, why)
        header, streams = tg.artifact_from_bytes(whole, "test")
        assert 0 < len(whole) - len(blob) <= tg.MARK_BYTES and streams == {"codes": b"123"}
        assert header["not_compliant"].startswith(before.get("not_compliant", why[:20]))
        assert why[:20] in header["not_compliant"]


@pytest.mark.parametrize("sigma", [1, 2.4, 12])
def test_the_estimate_is_what_a_gaussian_costs(sigma):
    codes, spread = gaussian([(512, 512)], sigma), np.zeros(511)
    spread[255] = codes[0].size
    weights = {"w": torch.from_numpy(codes[0] / sigma).float()}
    quantiser = types.SimpleNamespace(weights=weights, columns_of=lambda name: torch.ones(512),
                                      planned_rows=lambda name: torch.ones(512))
    counted = tg.deviations_of(quantiser, "w")      # all of a deviation about 1, in the middle
    assert counted.sum() == spread.sum()
    assert tg.estimate_bytes(counted, 1 / sigma) == pytest.approx(entropy_bytes(codes), rel=0.02)
    assert tg.estimate_bytes(spread, 1 / sigma) == pytest.approx(entropy_bytes(codes), rel=0.01)
    base_step = tg.base_step_for(spread, 0.4 * codes[0].size, 1e-3)
    assert tg.estimate_bytes(spread, base_step) == pytest.approx(0.4 * codes[0].size, rel=1e-3)


def test_expected_size_is_what_trained_like_weights_take(monkeypatch):
    """Hand clips, and inputs whose directions differ as much as trained ones do."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 4096)
    s = settings(MODEL_DIM=128, NUM_LAYERS=2, LOOP_END=1, QUANT_ALLOCATION="hand", LQER_ENABLED=0)
    weights, hessians = random_model(s, 0)[0], {}
    for i, (name, w) in enumerate(weights.items()):
        w.copy_(0.02 * torch.randn(w.shape, generator=torch.Generator().manual_seed(i)))
        if tg.precision_of(s, name, w).coded and tg.input_of(name) == name:
            x = torch.randn(2048, 24, generator=torch.Generator().manual_seed(i))
            mix = torch.randn(24, w.size(1), generator=torch.Generator().manual_seed(99 + i))
            x = x @ mix + 3 * torch.randn(2048, w.size(1), generator=torch.Generator().manual_seed(i))
            hessians[name] = x.mT @ x
    blob = tg.pack_model(s, tg.Quantiser(s, weights, tg.Curvature(hessians))())
    told = int(re.match(r"about ([\d,]+) bytes", tg.expected_size(s))[1].replace(",", ""))
    assert len(blob) == pytest.approx(told, rel=0.02)


def test_expected_size_of_a_model_below_the_limit(monkeypatch):
    """What its weights take at their finest, matrices and all else as halves; or halves alone."""
    monkeypatch.setattr(tg, "SMALL_TENSOR", 4096)
    s = settings(MODEL_DIM=128, NUM_LAYERS=2, LOOP_END=1, LQER_ENABLED=0)
    generator = torch.Generator().manual_seed(0)
    weights = {n: 0.02 * torch.randn(w.shape, generator=generator) for n, w in random_model(s, 0)[0].items()}
    for small in (4096, 1 << 30):
        monkeypatch.setattr(tg, "SMALL_TENSOR", small)
        quantiser, told = tg.Quantiser(s, weights, tg.Curvature({})), tg.expected_size(s)
        blob = tg.pack_model(s, quantiser(quantiser.finest))
        assert tg.fitter_tries(quantiser, 2 * len(blob)) == 1
        assert small > 4096 or tg.fitter_tries(quantiser, len(blob)) == 3
        assert len(blob) == pytest.approx(int(told.split()[1].replace(",", "")), rel=0.03)
        assert told.endswith("under the limit" if small > 4096 else "weights at their finest")
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes() + 200_000)
    monkeypatch.setattr(tg, "SMALL_TENSOR", 4096)
    assert tg.expected_size(s).startswith("about 200,000 bytes: 267,776 weights fitted to the limit")


def test_the_counted_form_of_the_script():
    """A packed script leaves the difference to the weights, and counts what self_extracting makes."""
    source = (ROOT / "train_gpt.py").read_bytes()
    assert tg.code_bytes() == len(source)
    assert tg.code_bytes("packed") == len(tg.self_extracting(source)) < len(source) / 3
    assert tg.check_size(100, "packed") == 100 + tg.code_bytes("packed")


@pytest.mark.parametrize("chosen, form", [
    ("readable", "readable"), ("packed", "packed"), ("lean_packed", "lean_packed"), ("auto", "lean_packed")])
def test_the_fitter_leaves_room_for_the_form_that_is_shipped(monkeypatch, chosen, form):
    monkeypatch.setattr(tg, "SMALL_TENSOR", 1000)
    s = settings(NUM_LAYERS=2, LOOP_END=1, LQER_ENABLED=0, QUANT_TRELLIS=0, CODE_FORM=chosen)
    weights, curvature = random_model(s, 0)
    monkeypatch.setattr(tg, "ARTIFACT_LIMIT", tg.code_bytes(form) + 40_000)
    run = Log()
    blob = tg.quantise_to_fit(s, tg.World(), run, weights, curvature)
    slack = tg.MARK_BYTES + 256 * form.endswith("packed")  # another liblzma may pack it worse
    assert 40_000 - slack - s.fit_margin_bytes <= len(blob) <= 40_000 - slack
    assert run.rows[-1]["code_bytes"] == tg.code_bytes(form) and len(run.rows) <= 3


def test_new_tensors_survive_quantising_and_packing():
    s = settings(
        BIGRAM_VOCAB_SIZE=800, BIGRAM_DIM=96, VE_ENABLED=1, VE_DIM=256, VE_LAYERS="1,3", MLP_MULT=17,
        AWQ_LITE_ENABLED=1, AWQ_LITE_GROUP_SIZE=16, AWQ_LITE_GROUP_TOP_K=3, ASYM_LOGIT_RESCALE=1,
        PARALLEL_LANES="separate", SMEAR_GATE_KIND="channels", LQER_GAIN_SELECT=1,
    )
    model = sine_model(s)
    weights = tg.matrix_views({n: p.detach() for n, p in model.named_parameters()})
    hessians = {n: torch.eye(w.shape[1]) for n, w in weights.items() if ".mlp." in n}
    q = tg.Quantiser(s, weights, tg.Curvature(hessians))()
    back = tg.read_artifact(s, tg.pack_model(s, q), "test").model
    restored = tg.dequantise(back)
    assert back.forms == q.forms and set(restored) == set(weights)
    for key, want in tg.dequantise(q).items():
        assert torch.equal(restored[key], want), key
    assert all(q.forms[f"{n}.embed.weight"].startswith("gptq (int7)") for n in ("bigram", "ve_shared"))
    assert sum(x.sum() for key, x in q.tensors.items() if key.endswith(".awqg_fine")) == 3 * 16
    protected = next(n for n, form in q.forms.items() if "awqgrp" in form)
    fine = q.tensors[f"{protected}.awqg_fine"].bool()
    error = (restored[protected] - weights[protected]).abs()
    assert error[:, fine].mean() < 0.5 * error.mean()
    tg.load_weights(model, restored, "test")
