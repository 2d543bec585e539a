"""The recorded reference numbers hold, packed without loss; and other sets of the schema are run as well."""

import dataclasses
import itertools
import json
import math
import re

import fixtures
import numpy as np
import parity
import pytest
import torch
from conftest import ROOT, settings, write_shard

PLAIN = ROOT.parent / "shared" / "parity"


def test_the_reference_numbers_hold(capsys):
    status = parity.main([])
    said = capsys.readouterr().out
    assert status == 0 and " 0 failed" in said, said


# --------------------------------------------------------------------------------------
# Packing
# --------------------------------------------------------------------------------------
def bits(tensor: torch.Tensor) -> tuple:
    kind, raw = fixtures.to_raw(tensor)
    return kind, tuple(tensor.shape), raw.tobytes()


def every_type() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(5)
    floats = torch.randn(70, 31, generator=generator)
    arrays = {
        "odd": torch.tensor([0.0, -0.0, math.nan, math.inf, 2.0**-24, 65504.0, 65520.0]),
        "half": floats.half(),
        "half in single": floats.half().float(),
        "single": floats,
        "double": floats.double() / 3,
        "brain": floats.bfloat16(),
        "none": torch.zeros(0, 4),
        "number": torch.tensor(1.5),
        "bool": floats > 0,
        "far": torch.tensor([-(2**63), 2**63 - 1, 2**40]),
        "bytes": torch.arange(256, dtype=torch.uint8),
    }
    for kind in ("int8", "int16", "int32", "int64"):
        arrays[kind] = torch.tensor([-128, 127, 0, 5], dtype=getattr(torch, kind))
    for top in (255, 256, 65535, 65536):
        arrays[f"up to {top}"] = torch.tensor([0, top], dtype=torch.int64)
    return arrays


def write_set(root, folder: str, stem: str, meta: dict, arrays: dict[str, torch.Tensor]):
    """A plain set, or one more fixture of it."""
    path = root / folder
    path.mkdir(parents=True, exist_ok=True)
    (path / f"{stem}.json").write_text(json.dumps(meta))
    if arrays:
        fixtures.write_safetensors(path / f"{stem}.safetensors", arrays)
    return path


def repack(root, target, step: int = 1, thin: set = frozenset()):
    """Pack all arrays of the only folder of a plain set."""
    target.mkdir()
    (path,) = [p for p in root.iterdir() if p.is_dir()]
    folder = fixtures.Folder(path)
    keep = {stem: set(folder.load(stem)) for stem in folder.texts}
    packed = target / f"{path.name}.xz"
    fixtures.pack_folder(folder, packed, keep, dict.fromkeys(keep, thin), step)
    fixtures.pack_files(root, target / fixtures.FILES)


def test_packing_gives_every_bit_and_file_back(tmp_path):
    arrays = every_type()
    path = write_set(tmp_path / "plain", "some", "x", {"fixture": "some"}, arrays)
    write_set(tmp_path / "plain", "some", "y", {"fixture": "none"}, {})
    (path / "shards").mkdir()
    write_shard(path / "shards" / "fineweb_val_000000.bin", np.arange(9))
    repack(tmp_path / "plain", tmp_path / "packed")
    with fixtures.FixtureSet(tmp_path / "packed") as found:
        (folder,) = found.folders()
        restored = folder.arrays("x")
        assert {k: bits(v) for k, v in restored.items()} == {k: bits(v) for k, v in arrays.items()}
        assert not folder.thinned and not folder.arrays("y")
        assert json.loads(folder.texts["y"]) == {"fixture": "none"}
        assert (folder.path / "shards/fineweb_val_000000.bin").read_bytes() == (
            path / "shards/fineweb_val_000000.bin"
        ).read_bytes()
    assert not folder.path.exists()


def test_what_is_thinned_keeps_its_bits(tmp_path):
    arrays = every_type()
    write_set(tmp_path / "plain", "some", "x", {"fixture": "some"}, arrays)
    repack(tmp_path / "plain", tmp_path / "packed", 7, {"single", "number"})
    with fixtures.FixtureSet(tmp_path / "packed") as found:
        (folder,) = found.folders()
        thinned = folder.arrays("x")
    assert folder.thinned
    known = ~thinned["single"].isnan()
    assert bits(thinned["single"][known]) == bits(arrays["single"][known])
    assert known.flatten()[::7].all() and known.flatten()[arrays["single"].abs().argmax()]
    assert known.sum() <= arrays["single"].numel() // 7 + 2
    for name in set(arrays) - {"single"}:
        assert bits(thinned[name]) == bits(arrays[name])


@pytest.mark.parametrize("step, kept", [(1, 77), (5, 17)])
def test_a_set_is_run_packed_and_run_again(tmp_path, capsys, step, kept):
    meta, arrays = made_up_corrector()
    arrays["unread"] = torch.ones(5)
    write_set(tmp_path / "plain", "ngram_corrector", "x", meta, arrays)
    assert parity.main(["--pack", str(tmp_path / "plain"), str(tmp_path / "packed"), str(step)]) == 0
    for root, choice in itertools.product(("plain", "packed"), ([], ["ngram_*"], ["*/x"])):
        assert parity.main([str(tmp_path / root), *choice]) == 0
        assert capsys.readouterr().out.endswith("1 passed, 0 failed, 0 skipped\n")
    assert parity.main([str(tmp_path / "packed"), "another"]) == 1
    with fixtures.FixtureSet(tmp_path / "packed") as found:
        (folder,) = found.folders()
        restored = folder.arrays("x")
    assert set(restored) == set(arrays) - {"unread"}
    assert (~restored["mine.nll"].isnan()).sum() in (kept - 1, kept)
    assert all(bits(restored[name]) == bits(arrays[name]) for name in ("tokens", "logits"))


@pytest.fixture(scope="module")
def packed():
    """The packed folders by name."""
    with fixtures.FixtureSet(parity.PACKED) as found:
        yield {folder.name: folder for folder in found.folders()}


def test_packed_types_and_shapes_are_those_recorded(packed):
    for folder, stem in [(f, stem) for f in packed.values() for stem in f.texts]:
        recorded = json.loads(folder.texts[stem]).get("arrays", {})
        for name, tensor in folder.arrays(stem).items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert recorded[name] == {"dtype": dtype, "shape": list(tensor.shape)}, name


@pytest.mark.skipif(not PLAIN.is_dir(), reason="no plain reference numbers beside the repository")
def test_packed_numbers_are_the_plain_ones(packed):
    for name, folder in packed.items():
        plain = fixtures.Folder(PLAIN / name)
        for stem in folder.texts:
            assert folder.texts[stem] == plain.texts[stem]
            whole = plain.load(stem)
            for key, tensor in folder.arrays(stem).items():
                known = (
                    ~tensor.isnan() if folder.thinned and tensor.dtype.is_floating_point else ...
                )
                assert bits(tensor[known]) == bits(whole[key][known]), (name, stem, key)
        folder.forget()


# --------------------------------------------------------------------------------------
# Other sets: other names, sizes, orders, uneven ends; their numbers follow from the
# packed ones, or from a few lines that follow the description
# --------------------------------------------------------------------------------------
def verdicts(root, thinned: bool = False) -> dict[str, str]:
    """By fixture; `thinned` if its arrays come from a set of which not all entries were kept."""
    with fixtures.FixtureSet(root) as found:
        chosen = parity.find_fixtures(found, [])
        for fx in chosen:
            fx.source.thinned = thinned
        return {fx.name: parity.run(fx) for fx in chosen}


def meta_of(folder, stem: str) -> dict:
    meta = json.loads(folder.texts[stem])
    meta.pop("arrays", None)
    return meta


def arrays_of(folder, stem: str) -> dict[str, torch.Tensor]:
    return dict(folder.load(stem))


def one_fixture(tmp_path, folder: str, meta: dict, arrays: dict, thinned: bool = False) -> str:
    """The verdict on a set of one fixture."""
    write_set(tmp_path, folder, "mine", meta, arrays)
    (verdict,) = verdicts(tmp_path, thinned).values()
    return verdict


def odd_stream(seed: int, vocab: int, size: int) -> np.ndarray:
    """Tokens with several documents of one token in a row."""
    rng = np.random.default_rng(seed)
    tokens = np.where(rng.random(size) < 0.15, 1, rng.integers(2, vocab, size))
    tokens[:3] = tokens[size // 2 : size // 2 + 4] = 1
    return tokens.astype(np.uint16)


def segments(tokens: np.ndarray, limit: int) -> tuple[list[int], int]:
    """Bounds of a row's documents, cut every `limit` tokens, and the longest piece."""
    starts = sorted({0, *np.flatnonzero(tokens == 1).tolist(), len(tokens)})
    bounds = [x for a, b in itertools.pairwise(starts) for x in range(a, b, limit)] + [len(tokens)]
    return bounds, int(np.diff(bounds).max())


@pytest.mark.parametrize("whole_rows, row", [(False, 96), (True, 96), (True, 32)])
def test_another_evaluation_with_an_uneven_tail(tmp_path, whole_rows, row):
    vocab, length, world = 40, 32, 3
    stream, rng = odd_stream(3, vocab, 707), np.random.default_rng(4)
    table = torch.from_numpy(rng.normal(size=(vocab, vocab))).half()
    nbytes = rng.integers(0, 7, len(stream))
    nll = torch.nn.functional.cross_entropy(
        table.double()[stream[:-1].astype(int)],
        torch.from_numpy(stream[1:].astype(int)),
        reduction="none",
    )
    targets = (len(stream) - 1) // length * length if whole_rows else len(stream) - 1
    ranks = []
    for rank in range(world):
        unit = length if whole_rows else 1
        at, end = (targets // unit * r // world * unit for r in (rank, rank + 1))
        batches, first = [], at
        while at < end:
            n = min(row, end - at)
            if whole_rows and n < row:
                break
            bounds, longest = segments(stream[at : at + n], length)
            batches.append({"n": n, "boundaries": bounds, "max_seqlen": longest})
            at += n
        ranks.append(
            {
                "rank": rank,
                "batches": batches,
                "loss_sum": float(nll[first:at].sum()),
                "bytes": float(nbytes[first + 1 : at + 1].sum()),
                "tokens": at - first,
            }
        )
    loss, size = (sum(rank[key] for rank in ranks) for key in ("loss_sum", "bytes"))
    case = {
        "seq_len": length,
        "val_batch_tokens_per_rank": row,
        "world_size": world,
        "ranks": ranks,
        "val_tokens_kept": targets + 1,
        "targets_scored": sum(rank["tokens"] for rank in ranks),
        "loss_sum": loss,
        "byte_sum": size,
        "bpb": loss / size / math.log(2),
    }
    meta = {
        "fixture": "eval_tail",
        "shards": "data/ (made up)",
        "n_tokens": len(stream),
        "cases": {"some name": case},
        "tolerance": {"loss_sum": {"rtol": 1e-6}, "bpb": {"rtol": 1e-6}},
    }
    (tmp_path / "eval_tail/data").mkdir(parents=True)
    write_shard(tmp_path / "eval_tail/data/fineweb_val_000007.bin", stream)
    write_shard(tmp_path / "eval_tail/data/fineweb_val_bytes_000007.bin", nbytes)
    assert one_fixture(tmp_path, "eval_tail", meta, {"logits_table": table}).startswith("ok")
    ranks[1]["loss_sum"] *= 1 + 1e-5
    assert "rank 1 loss" in one_fixture(tmp_path, "eval_tail", meta, {"logits_table": table})


def corrected(
    tokens: list[int], orders: list[int], alpha: float, vocab: int, chunk: int
) -> np.ndarray:
    """Bias before every token, as the description counts; a chunk's tokens are learned after it."""
    unigrams, tables, past, rows = np.ones(vocab), {}, [], []
    for at, token in enumerate(tokens):
        if at % chunk == 0:
            log_q = np.log(unigrams / unigrams.sum())
            bias = alpha * log_q
            for n in orders if past else ():
                seen = tables.get(
                    (n, tuple(past[max(len(past) - n + 1, 0) :] if n > 1 else ())), {}
                )
                for v, count in seen.items():
                    bias[v] += alpha * (
                        math.log((count + 1) / (sum(seen.values()) + vocab)) - log_q[v]
                    )
        rows.append(bias)
        if at % chunk == chunk - 1:
            for learned in tokens[at - chunk + 1 : at + 1]:
                for n in orders:
                    key = n, tuple(past[max(len(past) - n + 1, 0) :] if n > 1 else ())
                    seen = tables.setdefault(key, {})
                    seen[learned] = seen.get(learned, 0) + 1
                unigrams[learned] += 1
                past.append(learned)
    return np.stack(rows)


def made_up_corrector() -> tuple[dict, dict]:
    """A fixture of a corrector with other orders, chunks and sizes."""
    vocab, alpha, orders = 24, 0.45, [4, 2, 1]
    tokens = np.resize(odd_stream(8, vocab, 41), 77)
    z = torch.from_numpy(np.random.default_rng(2).normal(size=(77, vocab))).half()
    y = torch.from_numpy(tokens.astype(np.int64))

    def nll(bias):
        return torch.nn.functional.cross_entropy(z.double() + bias, y, reduction="none").float()

    one, five = (
        torch.from_numpy(corrected(tokens.tolist(), orders, alpha, vocab, n)) for n in (1, 5)
    )
    at = torch.tensor([0, 1, 40, 76])
    arrays = {
        "tokens": y,
        "logits": z,
        "positions": at,
        "nll_base": nll(0),
        "mine.bias": one[at].float(),
        "mine.corrected_logits": (z + one)[at].float(),
        "mine.nll": nll(one),
        "mine.nll_chunk5": nll(five),
        "mine.nll_with_bfloat16_bias": nll(one.bfloat16().double()),
        "mine.bias_after_reset": torch.full((vocab,), -alpha * math.log(vocab)),
    }
    tolerance = {
        "bias": {"atol": 1e-5},
        "nll": {"atol": 2e-5},
        "nll_with_bfloat16_bias": {"atol": 2e-3},
    }
    config = {"alpha": alpha, "orders": orders, "orders_as_used": sorted(orders)}
    meta = {"fixture": "x", "vocab": vocab, "configs": {"mine": config}, "tolerance": tolerance}
    return meta, arrays


def test_another_corrector(tmp_path):
    meta, arrays = made_up_corrector()
    assert one_fixture(tmp_path, "ngram_corrector_two", meta, arrays).startswith("ok")
    arrays["mine.nll_chunk5"][3] += 1e-3
    assert "mine nll_chunk5" in one_fixture(tmp_path, "ngram_corrector_two", meta, arrays)


def agreement(tmp_path, folder, meta: dict, arrays: dict, thinned: bool) -> str:
    """The verdict on a made-up agreement of experts with the packed tokenizer."""
    (tmp_path / "ngram_agreement").mkdir(exist_ok=True)
    (tmp_path / "ngram_agreement/tokenizer.model").symlink_to(folder.path / "tokenizer.model")
    return one_fixture(tmp_path, "ngram_agreement", meta, arrays, thinned)


def test_agreement_under_other_names_on_a_shorter_stream(tmp_path, packed):
    folder, size = packed["ngram_agreement"], 331
    meta, arrays = meta_of(folder, "ngram_agreement"), arrays_of(folder, "ngram_agreement")
    config, case = next(iter(meta["configs"].items()))
    variants = {
        "causal_prev_token": "by_the_last",
        "causal_open_word": "open",
        "token_expert_only": "",
    }
    kept = {k: arrays[k] for k in ("base_logits_table", "boundary")}
    kept |= {
        "tokens": arrays["tokens"][: size + 1],
        "bytes_per_target": arrays["bytes_per_target"][:size],
    }
    for old, new in variants.items():
        start, new = f"{config}.{old}.", new or old
        kept |= {
            f"mine.{new}.{k[len(start) :]}": v[:size]
            for k, v in arrays.items()
            if k.startswith(start)
        }
    meta["configs"] = {"mine": case}
    assert agreement(tmp_path, folder, meta, kept, thinned=True).startswith("ok")


def test_windows_beyond_an_uneven_end(tmp_path, packed):
    folder, size, length, stride = packed["ngram_agreement"], 203, 40, 8
    meta, arrays = meta_of(folder, "ngram_agreement"), arrays_of(folder, "ngram_agreement")
    table = arrays["base_logits_table"]
    tokens = torch.from_numpy(odd_stream(6, len(table), size + 1).astype(np.int32))
    nll = torch.nn.functional.cross_entropy(
        table.double()[tokens[:-1].long()], tokens[1:].long(), reduction="none"
    )
    nbytes = arrays["bytes_per_target"][:size]
    scored = [
        range(length),
        *(range(end - stride, end) for end in range(length + stride, size + 1, stride)),
    ]
    starts = range(0, size - stride + 1, stride)
    scored += [range(size - stride, size)] * (len(starts) - len(scored))
    at = [i for window in scored for i in window]
    never = {
        "TOKEN_ORDER": 16,
        "TOKEN_THRESHOLD": 1,
        "WITHIN_TAU": 99,
        "WORD_TAU": 99,
    }  # no gate opens
    whole = {
        "seq_len": length,
        "stride": stride,
        "windows": len(starts),
        "distinct_positions": size,
        "scored_positions_counted": len(at),
        "mean_nll": float(nll[at].mean()),
        "bpb": float(nll[at].sum() / nbytes.double()[at].sum() / math.log(2)),
    }
    (case, *_) = meta["configs"].values()
    meta["configs"] = {"none": {"settings": {**case["settings"], **never}, "full_eval": whole}}
    kept = {
        "tokens": tokens,
        "bytes_per_target": nbytes,
        "base_logits_table": table,
        "boundary": arrays["boundary"],
        "none.reference.hint": torch.full((size,), -1),
        "none.reference.beta": torch.zeros(size),
        "none.reference.nll": nll.float(),
        "none.token_expert_only.nll": nll.float(),
    }
    assert agreement(tmp_path, folder, meta, kept, thinned=False).startswith("ok")


NAMED = ("cases", "configs", "masks", "modes", "runs", "schedules", "tokenizers", "trajectories", "variants")


def renamed(meta: dict, arrays: dict) -> tuple[dict, dict]:
    """The same fixture with its variants under other names, and everything in the opposite order."""
    names = {}
    for key in NAMED:
        if isinstance(meta.get(key), dict):
            names.update((name, f"other {name}") for name in meta[key])
            meta[key] = {names[name]: value for name, value in reversed(meta[key].items())}
    if "first_variant" in meta:
        meta["first_variant"] = names[meta["first_variant"]]
    moved = {}
    for name, array in reversed(arrays.items()):
        first, dot, rest = name.partition(".")
        moved[names.get(first, first) + dot + rest] = array
    return meta, moved


@pytest.mark.parametrize(
    "name",
    [
        "bigram_hash",
        "gpt_forward_1550",
        "gptq_percentile",
        "lqer_variants",
        "ngram_corrector",
        "progressive_context",
        "ttt_masks",
    ],
)
def test_other_names_and_orders(tmp_path, packed, name):
    folder = packed[name]
    (stem,) = folder.texts
    meta, arrays = renamed(meta_of(folder, stem), arrays_of(folder, stem))
    (tmp_path / name).mkdir()
    if (folder.path / "shards").exists():
        (tmp_path / name / "shards").symlink_to(folder.path / "shards")
    assert one_fixture(tmp_path, name, meta, arrays, thinned=True).startswith("ok")


def test_a_warm_up_that_no_schedule_gives_fails(tmp_path, packed):
    folder = packed["progressive_context"]
    meta, arrays = meta_of(folder, folder.name), arrays_of(folder, folder.name)
    meta["compile_warmup_items"]["auto"].pop()
    (tmp_path / folder.name).mkdir()
    (tmp_path / folder.name / "shards").symlink_to(folder.path / "shards")
    verdict = one_fixture(tmp_path, folder.name, meta, arrays, thinned=True)
    assert verdict.startswith("FAIL pairs warmed up")


def test_some_matrices_in_one_precision(tmp_path, packed):
    folder = packed["muon"]
    stem = next(stem for stem in folder.texts if stem.startswith("steps"))
    meta, arrays = meta_of(folder, stem), arrays_of(folder, stem)
    lower = {k: v[..., 1:2, :, :] for k, v in arrays.items() if not k.startswith("bf16")}
    assert any(re.match(r"f32\.step\d", k) for k in lower)
    assert one_fixture(tmp_path, "muon_small", meta, lower, thinned=True).startswith("ok")


def test_ranks_of_another_number(tmp_path):
    edges = [10 * rank // 3 for rank in range(4)]
    ranks = [
        {"rank": r, "first_sequence": a, "last_sequence_exclusive": b}
        for r, (a, b) in enumerate(itertools.pairwise(edges))
    ]
    assert one_fixture(tmp_path, "prequant_ttt", {"n_seq": 10, "ranks": ranks}, {}).startswith("ok")


@pytest.mark.parametrize("tokens", [33, 34, 64, 65, 97, 129, 130, 257, 258, 290])
def test_overlapping_batches_of_a_stream_of_any_length(tokens):
    length, size = 32, 4
    want = []
    for start in range(0, tokens - 1 - length, length * size):
        last = min(start + length * size, tokens - 1 - length)
        want.append(list(range(start, last + 1, length)))
    s = settings(TRAIN_SEQ_LEN=length)
    s = dataclasses.replace(s, prequant_ttt_batch_seqs=size, prequant_ttt_form="overlapping")
    got = parity.tg.prequant_batches(s, tokens, parity.tg.World())
    assert [(rows * length).tolist() for rows in got] == want


def test_what_cannot_be_read_fails_by_name(tmp_path):
    write_set(tmp_path, "muon", "good", {"cases": []}, {})
    (tmp_path / "muon/bad.json").write_text("{")
    write_set(tmp_path, "unheard_of", "x", {"fixture": "x"}, {})
    found = verdicts(tmp_path)
    assert found["muon/bad"].startswith("FAIL bad.json is not JSON")
    assert found["muon/good"] == "FAIL nothing was compared"
    assert found["unheard_of/x"].startswith("skip")
