"""Compare the trainer with recorded reference numbers.

    python tests/parity.py [DIR [NAME…]]
    python tests/parity.py --pack SRC DST [STEP]

DIR holds fixture folders, plain or packed (fixtures.py), or is one; without it tests/parity is run. Every
`X.json` of a folder describes one fixture: the settings it ran with (`env`), its tolerances and facts; its
arrays lie beside it. One line is printed per fixture (`folder/X ok max_err=…`, `folder/X FAIL …`,
`folder/X skip …`) and a summary at the end; the exit status is 0 only when nothing failed. NAME (a folder,
or folder/X; shell patterns work) selects fixtures.

`--pack` runs a plain set and packs into DST the arrays that were read. Arrays that are only compared with
are stored by every STEP-th entry (1, the default, stores all).

Nothing is computed here that the trainer computes: a checker loads inputs, calls the trainer's own
functions and compares. A new mechanism adds one function and one row of `CHECKERS`. A folder's name says
which mechanism it is about; everything else (variants, sizes, schedules, files) is read from the JSON and
the names of the arrays, so other sets of the same schema run unchanged.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fnmatch
import importlib
import itertools
import json
import math
import os
import re
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # tiny tensors: threads only add noise and contention
import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import fixtures  # noqa: E402

import train_gpt as tg  # noqa: E402

PACKED = ROOT / "tests" / "parity"

# What the reference used for every setting a fixture does not name, unless a facts.json beside it says so.
# Settings that only concern paths, logging and launching are left out.
REFERENCE_DEFAULTS = """
    ADAM_EPS=1e-8 ADAM_WD=0.02 ATTN_CLIP_SIGMAS=13 ATTN_OUT_GATE_ENABLED=0 ATTN_OUT_GATE_SRC=proj
    BETA1=0.9 BETA2=0.95 CASEOPS_ENABLED=0 EMA_DECAY=0.9965 EMBED_BITS=8 EMBED_CLIP_SIGMAS=20
    EMBED_WD=0.085 ENABLE_LOOPING_AT=0.35 EVAL_SEQ_LEN=2048 EVAL_STRIDE=64 GATED_ATTN_ENABLED=0
    GATED_ATTN_QUANT_GATE=0 GATE_WINDOW=12 GLOBAL_TTT_BATCH_SEQS=32 GLOBAL_TTT_CHUNK_TOKENS=32768
    GLOBAL_TTT_EPOCHS=1 GLOBAL_TTT_GRAD_CLIP=1 GLOBAL_TTT_LR=0.001 GLOBAL_TTT_MOMENTUM=0.9
    GLOBAL_TTT_RESPECT_DOC_BOUNDARIES=1 GLOBAL_TTT_WARMUP_CHUNKS=0 GLOBAL_TTT_WARMUP_START_LR=0
    GPTQ_CALIBRATION_BATCHES=16 GRAD_CLIP_NORM=0.3 ITERATIONS=20000 LN_SCALE=1 LOGIT_SOFTCAP=30 LOOP_END=5
    LOOP_START=3 LQER_ASYM_ENABLED=1 LQER_ASYM_GROUP=64 LQER_ENABLED=1 LQER_FACTOR_BITS=4 LQER_RANK=4
    LQER_TOP_K=3 MATRIX_BITS=6 MATRIX_CLIP_SIGMAS=12.85 MATRIX_LR=0.026 MAX_WALLCLOCK_SECONDS=600 MIN_LR=0
    MLP_CLIP_SIGMAS=10 MLP_MULT=4 MODEL_DIM=512 MUON_BACKEND_STEPS=5 MUON_MOMENTUM=0.97
    MUON_MOMENTUM_WARMUP_START=0.92 MUON_MOMENTUM_WARMUP_STEPS=1500 MUON_ROW_NORMALIZE=1 MUON_WD=0.095
    NUM_HEADS=8 NUM_KV_HEADS=4 NUM_LAYERS=11 NUM_LOOPS=2 PARALLEL_FINAL_LANE=mean PARALLEL_START_LAYER=8
    PHASED_TTT_NUM_PHASES=1 PHASED_TTT_PREFIX_DOCS=2000 QK_GAIN_INIT=5 ROPE_BASE=10000 ROPE_DIMS=16
    ROPE_YARN=0 SCALAR_LR=0.02 SEED=1337 SKIP_GATES_ENABLED=1 SMEAR_GATE_ENABLED=0
    SPARSE_ATTN_GATE_ENABLED=0 SPARSE_ATTN_GATE_SCALE=1 TIED_EMBED_LR=0.03 TIE_EMBEDDINGS=1
    TRAIN_BATCH_TOKENS=786432 TRAIN_SEQ_LEN=2048 TTT_BATCH_SIZE=64 TTT_BETA1=0 TTT_BETA2=0.999
    TTT_CHUNK_SIZE=48 TTT_ENABLED=1 TTT_EVAL_SEQ_LEN=2048 TTT_GRAD_STEPS=1 TTT_K_LORA=1 TTT_LORA_ALPHA=144
    TTT_LORA_LR=0.0001 TTT_LORA_RANK=96 TTT_MLP_LORA=1 TTT_OPTIMIZER=adam TTT_O_LORA=1 TTT_WARM_START_A=1
    TTT_WEIGHT_DECAY=1 VAL_BATCH_TOKENS=524288 VAL_DOC_FRACTION=1 VOCAB_SIZE=8192 WARMDOWN_FRAC=0.75
    WARMUP_STEPS=20 XSA_LAST_N=11
"""
PATH_SETTINGS = ("DATA_PATH", "TOKENIZER_PATH")  # relative to the fixture folder


TOLERANCES = ("atol", "rtol", "rtol_of_max_abs")


class Skip(Exception):
    """The fixture does not concern this trainer; the message says why."""


@dataclasses.dataclass
class Fixture:
    """One `X.json` with its arrays, and what has been compared so far."""

    source: fixtures.Folder
    stem: str
    meta: dict
    defaults: dict
    max_err: float = 0.0
    compared: int = 0
    failures: list[str] = dataclasses.field(default_factory=list)
    lender: Fixture | None = None  # has the groups of arrays that this one lacks

    @property
    def name(self) -> str:
        return f"{self.source.name}/{self.stem}"

    @property
    def folder(self) -> Path:
        """Where the fixture's shards and tokenizers lie."""
        return self.source.path

    @property
    def arrays(self) -> fixtures.Arrays:
        return self.source.arrays(self.stem)

    def sibling(self, stem: str) -> Fixture:
        """Another fixture of the same folder (for weights or Hessians stored once)."""
        return Fixture(self.source, stem, json.loads(self.source.texts[stem]), self.defaults)

    def group_raw(self, prefix: str) -> dict[str, torch.Tensor]:
        """Arrays named `prefix.<rest>`, by <rest>; all arrays if there is no prefix."""
        start = prefix + "." if prefix else ""
        own = {k[len(start) :]: self.arrays[k] for k in self.arrays if k.startswith(start)}
        return own if own or not self.lender else self.lender.group_raw(prefix)

    def group(self, prefix: str) -> dict[str, torch.Tensor]:
        """The same with float16 upcast, as the conventions of the fixtures say."""
        return {
            k: v.float() if v.dtype == torch.float16 else v
            for k, v in self.group_raw(prefix).items()
        }

    def tolerance(self, *keys: str, **otherwise: float) -> dict[str, float]:
        """The tolerance stored under the first of `keys` that has numbers, else `otherwise`."""
        for key in keys:
            entry = self.meta.get("tolerance", {})
            for part in (key,) if key in entry else key.split("/"):
                entry = entry.get(part, {}) if isinstance(entry, dict) else {}
            if isinstance(entry, dict):
                numbers = {k: v for k, v in entry.items() if k in TOLERANCES}
                if numbers:
                    return numbers
        return otherwise

    def settings(self, **overrides) -> tg.Settings:
        """Reference defaults, then the fixture's `env`, then `overrides`, as the trainer's settings."""
        known = {field.name.upper() for field in dataclasses.fields(tg.Settings)}
        env = {
            k: str(v) for k, v in self.defaults.items() if k in known and "<computed" not in str(v)
        }
        env.update({k: str(v) for k, v in EXACT_ARITHMETIC.items() if k in known})
        env.update({k: str(v) for k, v in self.meta.get("env", {}).items()})
        for key in PATH_SETTINGS:
            if key in env:
                env[key] = str(self.folder / env[key])
        if "EVAL_STRIDE" not in self.meta.get("env", {}) and "EVAL_SEQ_LEN" in env:
            stride = min(
                int(env["EVAL_STRIDE"]), int(env["EVAL_SEQ_LEN"])
            )  # these fixtures do not slide
            env["EVAL_STRIDE"] = str(stride)
        env.update({k: str(v) for k, v in overrides.items()})
        return tg.Settings.from_env(env)

    def fail(self, text: str) -> None:
        self.failures.append(text)

    def other_shape(self, what: str, got: torch.Tensor, want: torch.Tensor) -> bool:
        differ = got.shape != want.shape
        if differ:
            self.fail(f"{what}: shape {tuple(got.shape)}, expected {tuple(want.shape)}")
        return differ

    def close(self, what: str, got, want, *, atol=0.0, rtol=0.0, rtol_of_max_abs=0.0) -> None:
        """|got - want| <= atol + rtol·|want| + rtol_of_max_abs·max|want|, in every entry."""
        if isinstance(want, torch.Tensor):
            self.source.compared.add((want.data_ptr(), want.numel()))
        got, want = _float64(got), _float64(want)
        self.compared += 1
        if self.other_shape(what, got, want):
            return None
        if self.source.thinned:  # NaN marks what was not stored
            got, want = got[~want.isnan()], want[~want.isnan()]
        if not want.numel():
            return None
        error = (got - want).abs()
        if not torch.isfinite(error).all():
            return self.fail(
                f"{what}: {int((~torch.isfinite(error)).sum())} entries are not finite"
            )
        self.max_err = max(self.max_err, float(error.max()))
        excess = error - (atol + rtol * want.abs() + rtol_of_max_abs * float(want.abs().max()))
        if float(excess.max()) > 0:
            at = int(excess.argmax())
            mine, theirs, off = (float(x.flatten()[at]) for x in (got, want, error))
            self.fail(
                f"{what}: {mine:.9g}, expected {theirs:.9g} (error {off:.3g}; "
                f"{int((excess > 0).sum())} of {want.numel()} out of bounds)"
            )

    def near(self, what: str, got, want, *keys: str, **otherwise: float) -> None:
        """Close within the tolerance stored under one of `keys`, else within `otherwise`."""
        self.close(what, got, want, **self.tolerance(*keys, **otherwise))

    def equal(self, what: str, got, want) -> None:
        """Exact equality of integers, bytes, texts, lists or arrays."""
        self.compared += 1
        if _is_array(got) or _is_array(want):
            got, want = _tensor(got), _tensor(want)
            if self.other_shape(what, got, want):
                return None
            differ = (got.double() != want.double()).flatten()
            if differ.any():
                at = int(differ.int().argmax())
                self.fail(
                    f"{what}: {got.flatten()[at].item()} at {at}, expected {want.flatten()[at].item()} "
                    f"({int(differ.sum())} of {differ.numel()} differ)"
                )
        elif got != want:
            self.fail(f"{what}: {_short(got)}, expected {_short(want)}")
        return None

    def mostly_equal(self, what: str, got, want, share=0.995, apart=3) -> None:
        """Quantised integers: at least `share` equal, none more than `apart` apart (rounding ties ripple)."""
        got, want = _float64(got), _float64(want)
        self.compared += 1
        if self.other_shape(what, got, want):
            return None
        same, worst = float((got == want).double().mean()), float((got - want).abs().max())
        if same < share or worst > apart:
            self.fail(
                f"{what}: {100 * same:.2f} % of the integers equal, largest difference {worst:g}"
            )
        return None


def _is_array(value) -> bool:
    return isinstance(value, (torch.Tensor, np.ndarray))


def _tensor(value) -> torch.Tensor:
    """A tensor of any array, list or number (uint16 arrays are widened, torch barely knows them)."""
    if isinstance(value, np.ndarray) and value.dtype == np.uint16:
        value = value.astype(np.int64)
    return (
        value.detach().cpu()
        if isinstance(value, torch.Tensor)
        else torch.as_tensor(np.asarray(value))
    )


def _float64(value) -> torch.Tensor:
    return _tensor(value).double()


def _short(value) -> str:
    text = repr(value)
    return text if len(text) <= 120 else text[:117] + "..."


# --------------------------------------------------------------------------------------------------
# Pieces the checkers share
# --------------------------------------------------------------------------------------------------
# Where the trainer has a choice, that of the reference runs.
# The reference's own way of adapting: full windows encoded anew, AdamW or SGD, longest documents first.
EXACT_ARITHMETIC = {
    "TTT_KV_REUSE": 0,
    "TTT_BASE_SHARE": 0,
    "TTT_SHORT_SCORE_FIRST_ENABLED": 0,
    "TTT_DOC_ORDER": "length",
    "ATTN_BACKEND": "plain",
    "COMPUTE_DTYPE": "float32",
    "MUON_DTYPE": "float32",
    "QUANT_ALLOCATION": "hand",
    "COMPILE": "0",
}


def load_model(fx: Fixture, s: tg.Settings, params: dict[str, torch.Tensor]) -> tg.GPT:
    """The trainer's model with the stored parameters; their names must be exactly the model's."""
    torch.manual_seed(0)
    model = tg.GPT(s)
    with torch.no_grad():
        views = tg.field_views(dict(model.named_parameters()))
        fx.equal("parameter names", sorted(views), sorted(params))
        for name, value in params.items():
            fx.equal(f"shape of {name}", tuple(views[name].shape), tuple(value.shape))
            views[name].copy_(value)
    return model


def adapter_views(adapter: tg.Adapter) -> dict[str, torch.Tensor]:
    """Views under the field's names: `q_loras.<slot>.A` (rows, r, in), `.B`, `lm_head_lora.A`, …"""
    views = {}
    for side, tensors in (("A", adapter.a), ("B", adapter.b)):
        for kind, p in tensors.items():
            for slot, x in enumerate(p):
                views[
                    ("lm_head_lora" if kind == "head" else f"{kind}_loras.{slot}") + f".{side}"
                ] = x
    return views


def field_grads(model: tg.GPT) -> dict[str, torch.Tensor]:
    """Gradients under the field's names; a parameter without gradient counts as zero."""
    grads = {
        n: torch.zeros_like(p) if p.grad is None else p.grad for n, p in model.named_parameters()
    }
    return tg.field_views(grads)


def checked_plan(fx: Fixture, s: tg.Settings, looping: bool = True):
    """The layer plan, compared with the stored execution order."""
    plan = tg.layer_plan(s, looping)
    fx.equal("encoder order", list(plan.encoder), fx.meta["encoder_indices"])
    fx.equal("decoder order", list(plan.decoder), fx.meta["decoder_indices"])
    return plan


def checksums(fx: Fixture, what: str, got: dict, want: dict[str, list], rel: float) -> None:
    """Compare (sum, sum of squares) of every tensor; `rel` bounds the difference as a share of its size."""
    fx.equal(f"{what} names", sorted(got), sorted(want))
    for name in sorted(set(got) & set(want)):
        value = _float64(got[name])
        total, squares = want[name]
        bound, unit = math.sqrt(value.numel() * squares) or 1.0, squares or 1.0  # |total| <= bound
        fx.close(f"{what} {name} sum / {bound:g}", value.sum() / bound, total / bound, atol=rel)
        fx.close(
            f"{what} {name} squares / {unit:g}",
            (value**2).sum() / unit,
            squares / unit,
            atol=2 * rel,
        )


def shard_files(fx: Fixture, pattern: str) -> list[Path]:
    """Sorted files of a pattern like `shards/fineweb_val_*.bin` in the fixture folder, no sidecars unless
    the pattern asks for them."""
    files = sorted(fx.folder.glob(pattern))
    if "_bytes_" not in pattern:
        files = [f for f in files if "_bytes_" not in f.name]
    if not files:
        raise FileNotFoundError(f"no shard matches {fx.source.name}/{pattern}")
    return files


def tokens_of(fx: Fixture, pattern: str) -> np.ndarray:
    """The tokens, or bytes per token, of all shards of a pattern."""
    return np.concatenate([tg.read_shard(f) for f in shard_files(fx, pattern)])


# --------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------
def check_gpt_forward(fx: Fixture) -> None:
    """Logits, losses, gradients, trace and rotary tables of a forward (packed with segments; plain rows)."""
    if "packed.input_ids" not in fx.arrays:
        return check_older_model(fx)
    s = fx.settings()
    model = load_model(fx, s, fx.group("param"))
    plan = checked_plan(fx, s, fx.meta["looping_active"])
    fx.equal(
        "number of parameters", sum(p.numel() for p in model.parameters()), fx.meta["model_params"]
    )
    fx.equal("skip rows", model.skip_weights.shape[0], fx.meta["num_skip_weights"])
    packed, batched = fx.group("packed"), fx.group("batched")
    layout = tg.Layout(packed["cu_seqlens"], fx.meta["max_seqlen"])
    check_logits(fx, "packed", model, plan, layout, packed)
    if batched:
        check_logits(fx, "batched", model, plan, None, batched)
    if (
        "logits_after_longer_call" in batched
    ):  # the reference kept the rotary table of its longest call
        model.rope_length = packed["input_ids"].numel()
        logits = model.logits(model.final_hidden(batched["input_ids"], plan))
        fx.near(
            "batched logits after a longer call",
            logits,
            batched["logits_after_longer_call"],
            "logits",
            atol=5e-5,
            rtol=1e-5,
        )
        model.rope_length = 0
    check_trace(fx, model, plan, layout, packed["input_ids"][None])
    check_rotary(fx, model)
    if fx.group("grad"):
        model.zero_grad()
        ids, targets = packed["input_ids"][None], packed["target_ids"][None]
        model.losses(ids, targets, plan, layout).mean().backward()
        check_grads(
            fx, field_grads(model), fx.group("grad"), fx.tolerance("grad", rtol_of_max_abs=1e-4)
        )


def older_settings(fx: Fixture) -> tg.Settings:
    """Settings of an older architecture: what its arrays hold is on, what its scripts always did is set."""
    given = {
        k: int(v) if isinstance(v, bool) else v
        for k, v in {**fx.meta.get("env", {}), **fx.meta.get("constructor", {})}.items()
    }
    names = {"neg_slope": "NEGATIVE_SLOPE", "dtg": "DTG_ENABLED"}
    env = {names.get(k, k.upper()): v for k, v in given.items()}
    for foreign in (
        "MTP_LOSS_WEIGHT",
        "EMBEDDING_DIM",
        *(k for k in env if k.startswith("PREQUANT_")),
    ):
        env.pop(foreign, None)
    smeared = "param.smear.gate" in fx.arrays
    older = dict(
        NUM_LOOPS=0,
        PARALLEL_START_LAYER=0,
        PARALLEL_LANES="separate",
        SKIP_ROWS="physical",
        SKIP_GATES_ENABLED=int("param.skip_gates" in fx.arrays),
        SMEAR_GATE_ENABLED=int(smeared),
        SMEAR_GATE_KIND="channels",
        SMEAR_GATE_BOS_FIX=0,
        VE_ENABLED=1,
        SKIP_INTO_LANES=int("#1487" not in fx.meta["source"] if "source" in fx.meta else 1),
    )
    if "RECUR_LAYERS" in env:
        older.pop("NUM_LOOPS")
    defaults = {
        k: v for k, v in fx.defaults.items() if k not in ("NUM_LOOPS", "LOOP_START", "LOOP_END")
    }
    return dataclasses.replace(fx, meta={"env": {**older, **env}}, defaults=defaults).settings()


def older_model(fx: Fixture, s: tg.Settings):
    """A model of an older architecture with the stored parameters, and its weights by stored name."""
    model = tg.GPT(s)
    view = tg.field_views if "param.qo_bank" in fx.arrays else tg.matrix_views
    views = view({n: p.data for n, p in model.named_parameters()})
    params = fx.group("param")
    fx.equal("parameter names", sorted(views), sorted(params))
    for name, value in params.items():
        views[name].copy_(value)
    return model, views


def check_older_model(fx: Fixture) -> None:
    """Logits, loss and gradients of the architectures before the looped one, with and without recurrence."""
    s = older_settings(fx)
    model, _ = older_model(fx, s)
    inputs = {k: fx.arrays[k] for k in ("input_ids", "target_ids")}
    ids, targets = inputs.values()
    for mode, facts in fx.meta.get("modes", {"": {}}).items():
        prefix = mode + "." if mode else ""
        plan = tg.layer_plan(s, len(facts.get("virtual_layers", ())) > s.num_layers)
        if facts:
            fx.equal(f"{mode} layers", list(plan.encoder + plan.decoder), facts["virtual_layers"])
        stored = {k: fx.arrays[prefix + k] for k in ("logits", "loss")}
        check_logits(fx, mode or "model", model, plan, None, {**inputs, **stored})
        model.zero_grad()
        model.losses(ids, targets, plan).mean().backward()
        check_grads(fx, field_grads(model), fx.group(prefix + "grad"), fx.tolerance("grad"))
        dead = [i for i, g in enumerate(model.skip_weights.grad) if not g.any()]
        want = facts.get("rows_of_skip_weights_with_zero_gradient", [])
        fx.equal(f"{mode} dead skips", dead, want)
    check_older_pieces(fx, model, ids, targets)


def check_older_pieces(fx: Fixture, model: tg.GPT, ids, targets) -> None:
    """What the value embeddings add, the smear gate alone, and the loss under soft rounding."""
    values = model.token_values(ids)
    for layer, value in values.items():
        for key in (f"value_embedding.layer{layer}", f"ve_layer{layer}"):
            if key in fx.arrays:
                fx.near(key, value, fx.arrays[key], "value_embedding", atol=1e-6)
    if "smear.in" in fx.arrays:
        fx.near(
            "smear",
            model.smear(fx.arrays["smear.in"].float(), None),
            fx.arrays["smear.out"],
            "smear",
        )
    for found in filter(None, (re.fullmatch(r"qat\.alpha([\d.]+)\.loss", k) for k in fx.arrays)):
        key, alpha = found.group(), float(found.group(1))
        model.zero_grad()
        model.sharpness = torch.tensor(alpha)
        loss = model.losses(ids, targets, tg.layer_plan(model.s, False), training=True).mean()
        model.sharpness = None
        loss.backward()
        fx.near(key, loss, fx.arrays[key][0], "loss")
        check_grads(
            fx,
            field_grads(model),
            fx.group(key.removesuffix("loss") + "grad"),
            fx.tolerance("grad"),
        )


def check_tables(fx: Fixture) -> None:
    """Hashed rows of token pairs and value embeddings alone: rows, output, gradients."""
    for name, case in fx.meta.get("cases", {"": fx.meta}).items():
        a = {k: v.clone() for k, v in fx.group(name).items()}
        ids, table, leaves = a["ids"], a.get("embed"), {}
        if "hash" in a:
            leaves["embed_used_rows"] = rows = a["embed_used_rows"].requires_grad_()
            ids = tg.pair_rows(a["ids"], case["bigram_vocab_size"])
            fx.equal(f"{name} rows", ids, a["hash"])
            table = torch.zeros(case["bigram_vocab_size"], case["bigram_dim"])
            table = table.index_put((a["used_rows"],), rows)
        for leaf in ("proj", "scale"):
            if leaf in a:
                leaves[leaf] = a[leaf].requires_grad_()
        out = tg.look_up(ids, table, leaves.get("proj"), leaves["scale"], torch.float32)
        fx.near(f"{name} output", out, a["out"], "out")
        if "out_weight" in a:
            check_backward(
                fx, name, out, a["out_weight"], leaves, fx.group(f"{name}.grad" if name else "grad")
            )


def check_value_embedding(fx: Fixture) -> None:
    (check_tables if "cases" in fx.meta else check_older_model)(fx)


def check_backward(
    fx: Fixture, what: str, out, weight, leaves: dict, want: dict, *keys: str
) -> None:
    """Stored gradients of sum(out * weight) with respect to the leaves of the same names."""
    (out * weight.float()).sum().backward()
    for name, stored in want.items():
        grad = leaves[name].grad.reshape(stored.shape)
        fx.near(f"{what} gradient of {name}", grad, stored, *keys, "grad")


def check_soft_round(fx: Fixture) -> None:
    """Softly rounded weights and their gradients, as the projections see them."""
    for case in fx.meta["cases"]:
        key, a = f"alpha{case['alpha']:g}", fx.group(f"alpha{case['alpha']:g}")
        leaves = {k: fx.arrays[k].float().requires_grad_() for k in ("weight", "x")}
        rounded = tg.soft_round(leaves["weight"], torch.tensor(case["alpha"]))
        fx.near(f"{key} weight", rounded, a["weight_fake_quant"], "weight_fake_quant")
        out = leaves["x"] @ rounded.T
        fx.close(f"{key} output", out, a["out"], atol=1e-5, rtol=1e-6)
        want = {"weight": a["grad_weight"], "x": a["grad_x"]}
        check_backward(fx, key, out, fx.arrays["out_weight"], leaves, want)


def check_leaky(fx: Fixture) -> None:
    """The MLP and its gradients for every stored slope, through the model's own call."""
    for slope in fx.meta["settings"]:
        leaves = {k: fx.arrays[k].float().requires_grad_() for k in ("x", "up", "down")}
        x, up, down = leaves.values()
        s, want = fx.settings(NEGATIVE_SLOPE=slope), fx.group(f"slope{slope}")
        rows = x.flatten(0, 1)
        # ours normalises first; what is twice as large comes out four times as large
        out = tg.leaky_square_mlp(rows, up, down, s.negative_slope) / tg.inverse_rms(rows).square()
        out = out.view(want["out"].shape)
        fx.near(f"{slope} output", out, want["out"], "out")
        check_backward(
            fx, slope, out, fx.arrays["out_weight"], leaves, fx.group(f"slope{slope}.grad")
        )


def check_asymmetric_cap(fx: Fixture) -> None:
    """The two caps alone; in evaluation; and, as published, not in the training loss."""
    pos, neg = (torch.tensor(float(fx.meta[f"softcap_{side}"])) for side in ("pos", "neg"))
    for kind in fx.meta["facts"]:
        variant = kind.rstrip(".")
        want = fx.group(variant)
        leaves = {
            "z": fx.arrays["z"].float(),
            "softcap_pos": pos.clone(),
            "softcap_neg": neg.clone(),
        }
        out = tg.soft_cap(*(leaf.requires_grad_() for leaf in leaves.values()))
        fx.near(f"{kind} function", out, want["function.out"], "function")
        grads = fx.group(f"{variant}.function.grad")
        check_backward(fx, kind, out, fx.arrays["z_weight"], leaves, grads, "function")
        env = {k: v for k, v in fx.meta["env"].items() if not k.startswith("NGRAM_")}
        masked = fx.meta["smear_gate_bos_fix"][variant] is True
        env["SMEAR_GATE_BOS_FIX"] = int(masked)
        s = dataclasses.replace(fx, meta={"env": env}).settings()
        model = load_model(fx, s, fx.group("param"))
        plan = tg.layer_plan(s, fx.meta["looping_active"])
        ids, targets = fx.arrays["input_ids"], fx.arrays["target_ids"]
        logits = model.logits(model.final_hidden(ids, plan))
        fx.near(f"{kind} logits", logits, want["forward_logits"], "forward_logits")
        scored = model.losses(ids, targets, plan, adapter=tg.Adapter(s, plan, len(ids)))
        fx.near(f"{kind} scored", scored, want["ttt_per_token_loss_with_zero_B"], "loss")
        loss = model.losses(ids, targets, plan, training=True).mean()
        fx.near(f"{kind} training loss", loss, want["train_loss_eager_path"][0], "loss")
        loss.backward()
        fx.equal(
            f"{kind} caps get a gradient",
            model.softcap_pos.grad is not None,
            fx.meta["facts"][kind]["train_loss_gives_gradient_to_caps"],
        )


def check_logits(fx: Fixture, what: str, model, plan, layout, arrays: dict) -> None:
    """Logits and mean loss of one input (rows, or one packed row); the loss through its own path."""
    ids, targets, want = (arrays[k] for k in ("input_ids", "target_ids", "logits"))
    if layout is not None:
        ids, targets = ids[None], targets[None]
    with torch.no_grad():
        logits = model.logits(model.final_hidden(ids, plan, layout)).reshape(want.shape)
        losses = model.losses(ids, targets, plan, layout)
    fx.near(f"{what} logits", logits, want, "logits", atol=5e-5, rtol=1e-5)
    fx.near(f"{what} loss", losses.mean(), arrays["loss"].flatten()[0], "loss", atol=1e-5)


def check_trace(fx: Fixture, model, plan, layout, ids) -> None:
    """Stored intermediate values, in order of execution, through the forward's hook."""
    want = fx.group("trace")
    if not want:
        return
    seen: dict[str, list] = {}

    def hook(kind: str, layer: int, x: torch.Tensor) -> None:
        seen.setdefault(kind, []).append((layer, x.detach()[0]))

    with torch.no_grad():
        model.logits(model.final_hidden(ids, plan, layout, hook=hook))
    tolerance = fx.tolerance("trace", "logits", atol=5e-5, rtol=1e-5)
    for kind, stored in want.items():
        if kind == "order":
            fx.equal("execution order", [layer for layer, _ in seen["attn_in"]], stored.tolist())
            continue
        got = torch.stack([x for _, x in seen[kind]])
        got = got[0] if stored.dim() == 2 else got
        fx.close(f"trace {kind}", got[..., : stored.shape[-2], :], stored, **tolerance)


def check_rotary(fx: Fixture, model) -> None:
    """Rotary tables stored as `rotary.cos_len<T>` / `rotary.sin_len<T>`."""
    for name, stored in fx.group("rotary").items():
        kind, length = re.fullmatch(r"(cos|sin)_len(\d+)", name).groups()
        cos, sin = model.rope(int(length), torch.device("cpu"))
        got = (cos if kind == "cos" else sin).reshape(int(length), -1)
        fx.near(f"rotary {name}", got, stored, "rotary", atol=2e-6)


def check_grads(fx: Fixture, got: dict, want: dict, tolerance: dict) -> None:
    """Gradient of every stored parameter, relative to the largest entry of that gradient."""
    for name, stored in want.items():
        if name in got:
            fx.close(f"gradient of {name}", got[name], stored, **tolerance)
        else:
            fx.fail(f"gradient of {name}: no such parameter")


# --------------------------------------------------------------------------------------------------
# Adapters
# --------------------------------------------------------------------------------------------------
def check_ttt_forward(fx: Fixture) -> None:
    """Per-row adapters: losses, gradients of every adapter matrix, and what a reset leaves."""
    s, want = fx.settings(), fx.arrays
    model = load_model(fx, s, fx.group("param"))
    plan = checked_plan(fx, s, fx.meta["looping_active"])
    ids, targets = want["input_ids"], want["target_ids"]
    adapter = tg.Adapter(s, plan, ids.shape[0])
    lora = fx.group("lora")
    with torch.no_grad():
        views = adapter_views(adapter)
        fx.equal("adapter names", sorted(views), sorted(fx.meta["lora_params"]))
        for name, value in lora.items():
            views[name].copy_(value)
    losses = model.losses(ids, targets, plan, adapter=adapter)
    (losses * want["loss_weights"]).sum().backward()
    tolerance = fx.tolerance("per_token_loss", atol=5e-5)
    fx.close("per-token loss", losses, want["per_token_loss"], **tolerance)
    grads = [p.grad if p.grad is not None else torch.zeros_like(p) for p in adapter.parameters()]
    adapter.reset()
    with torch.no_grad():
        again = model.losses(ids, targets, plan, adapter=adapter)
        fx.close(
            "per-token loss after reset", again, want["per_token_loss_after_reset"], **tolerance
        )
        check_reset(fx, adapter_views(adapter), lora)
        for parameter, grad in zip(adapter.parameters(), grads, strict=True):
            parameter.copy_(grad)  # gradients by name: put in the parameters' place, read by views
        tolerance = fx.tolerance("lora_grad", rtol_of_max_abs=1e-4)
        check_grads(fx, adapter_views(adapter), fx.group("lora_grad"), tolerance)


def check_reset(fx: Fixture, views: dict, before: dict) -> None:
    """After a reset B is zero and A kept (warm start) or redrawn within ±1/sqrt(in)."""
    for name, value in before.items():
        now = views[name]
        if name.endswith(".B"):
            fx.equal(f"{name} after reset", now.abs().max().item(), 0.0)
        elif fx.meta["reset"]["A_unchanged"]:
            fx.equal(f"{name} kept by reset", now, value)
        else:
            bound = 1 / math.sqrt(now.shape[-1])
            fx.equal(f"{name} redrawn by reset", bool((now != value).any()), True)
            fx.equal(
                f"{name} within ±1/sqrt(in)", 0.9 * bound < float(now.abs().max()) <= bound, True
            )


def check_ttt_masks(fx: Fixture) -> None:
    """Which adapters a mask leaves, their losses and gradients."""
    want = fx.arrays
    ids, targets = want["input_ids"].long(), want["target_ids"].long()
    for name, mask in fx.meta["masks"].items():
        s = fx.settings(**mask["env"])
        plan = checked_plan(fx, s, fx.meta["looping_active"])
        model, adapter = load_model(fx, s, fx.group("param")), tg.Adapter(s, plan, len(ids))
        kinds = {kind: kind in adapter.b for kind in ("q", "k", "v", "o", "mlp")}
        fx.equal(f"{name} adapters", kinds, {kind: mask[kind] for kind in kinds})
        fx.equal(
            f"{name} numbers", sum(p.numel() for p in adapter.parameters()), mask["trainable_numbers"]
        )
        lora = fx.group("lora")
        with torch.no_grad():
            for view, value in adapter_views(adapter).items():
                value.copy_(lora[view])
        losses = model.losses(ids, targets, plan, adapter=adapter)
        fx.near(f"{name} losses", losses, want[f"{name}.per_token_loss"], "per_token_loss")
        losses.mean().backward()
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(p.grad)
        check_grads(fx, adapter_views(adapter), fx.group(f"{name}.grad"), fx.tolerance("grad"))


# --------------------------------------------------------------------------------------------------
# Optimiser
# --------------------------------------------------------------------------------------------------
def check_muon(fx: Fixture) -> None:
    """Newton–Schulz alone, or whole Muon steps, in every stored precision."""
    if "cases" in fx.meta:
        return check_newton_schulz(fx)
    config = dict(fx.meta["config"])
    config["steps"] = config.pop("backend_steps")
    grads = fx.group("grad")
    for precision, bank in itertools.product(("f32", "bf16"), fx.group("init")):
        if f"{precision}.momentum_buffer.{bank}" in fx.arrays:
            dtype = torch.float32 if precision == "f32" else torch.bfloat16
            tolerance = fx.tolerance(f"{precision}.*", atol=5e-6 if precision == "f32" else 6e-3)
            start = fx.arrays[f"init.{bank}"].float()
            p, buf = start.clone(), torch.zeros_like(start, dtype=dtype)
            for k, at in enumerate(fx.meta["schedule"]):
                muon_step(p, grads[bank][k], buf, **at, **config)
                stored = fx.arrays.get(f"{precision}.step{k}.{bank}")
                if stored is not None:
                    fx.close(f"{precision} step {k} {bank}", p, stored, **tolerance)
            stored = fx.arrays[f"{precision}.momentum_buffer.{bank}"]
            fx.equal(f"{precision} buffer dtype", buf.dtype, dtype)
            fx.close(
                f"{precision} momentum of {bank}",
                buf,
                stored,
                **(tolerance if precision == "f32" else {"rtol_of_max_abs": 2e-2}),
            )


def muon_step(p, g, buf, *, lr, momentum, weight_decay, steps, **how) -> None:
    """One step of the matrices p, by the optimiser's two halves."""
    u = tg.muon_direction(g, buf, momentum, coefficients=tg.POLAR_EXPRESS[:steps], **how)
    tg.muon_apply(p, u, lr, weight_decay)


def check_split_lr(fx: Fixture) -> None:
    """The factors by layer, and steps of the optimiser with and without the split of the gradient."""
    given = dict(fx.meta["settings"])
    env = dict(
        NUM_LAYERS=given.pop("num_layers"),
        MUON_MOMENTUM=given.pop("momentum"),
        MUON_ROW_NORMALIZE=0,
        MUON_BACKEND_STEPS=given.pop("backend_steps"),
        MUON_WD=given.pop("weight_decay"),
        NUM_LOOPS=0,
        SPLIT_LR_TARGET="gradient",
        MUON_COEFFICIENTS="quintic",
        MUON_DTYPE="bfloat16",
        GRAD_CLIP_NORM=0,
        **{k: v for k, v in given.items() if k.isupper()},
    )
    for bank, want in fx.group("grad_multiplier").items():
        got = tg.split_rates(fx.settings(**env), torch.zeros(len(want), 1, 1))
        fx.near(f"factors of {bank}", got.flatten(), want, "grad_multiplier")
    for bank in {k.split(".")[1] for k in fx.arrays if k.startswith("after.")}:
        for kind in ("with_split", "without_split"):
            s = fx.settings(**{**env, **({} if kind == "with_split" else {"MATRIX_LR_EARLY": 0})})
            p = torch.nn.Parameter(fx.arrays[f"before.{bank}"].float())
            optimiser = tg.Optimiser(
                s,
                tg.World(),
                {bank: p, "q_gain": torch.nn.Parameter(torch.ones(1))},
                torch.bfloat16,
            )
            for k in range(len([g for g in fx.arrays if re.fullmatch(rf"grad\d+.{bank}", g)])):
                p.grad = fx.arrays[f"grad{k}.{bank}"].float()
                optimiser.step(1.0, s.muon_momentum)
            fx.near(f"{bank} {kind}", p, fx.arrays[f"after.{bank}.{kind}"], "after")


def check_soft_round_schedule(fx: Fixture) -> None:
    """Sharpness of soft rounding by step; it begins at a step whose learning rate is below the threshold."""
    begin = fx.meta["enabled_at_step"]
    s = fx.settings(
        LATE_QAT_THRESHOLD=0.15,
        NUM_LAYERS=2,
        NUM_LOOPS=0,
        MODEL_DIM=16,
        NUM_HEADS=2,
        NUM_KV_HEADS=1,
        ROPE_DIMS=0,
        VOCAB_SIZE=16,
    )
    trainer = tg.Trainer(s, tg.World(), tg.GPT(s))
    for steps, lr in ((1999, 0.1), (begin - 1, 0.16)):
        fx.equal(f"sharpness after {steps} steps", trainer.sharpness_after(steps, lr), None)
    for row in fx.meta["schedule"]:
        got = trainer.sharpness_after(row["step_after_increment"], 0.14)
        fx.close(
            f"sharpness after {row['step_after_increment']} steps", got, row["alpha"], rtol=1e-9
        )


def check_progressive_context(fx: Fixture) -> None:
    """Stages, their lookup, refused texts, the learning rate's ramp, warm-up pairs, batches by cap."""
    for name, case in fx.meta["schedules"].items():
        stages = tg.schedule(case["schedule"], case["default_seq_len"])
        fx.equal(f"{name} stages", [list(stage) for stage in stages], case["plan"])
        for row in case["lookup"]:
            for mode in ("", "step_mode_"):
                got = tg.stage_at(stages, row[f"{mode}progress"])
                fx.equal(f"{name} at {row[f'{mode}progress']}", got, row[f"{mode}seq_len"])
    for text in fx.meta["rejected"]:
        fx.equal(f"{text} is refused", refused(lambda text=text: tg.schedule(text, 1)), True)
    for text, want in fx.meta["divisibility"].items():
        tokens, world, accum, stages = text.split("/")
        longest = max(length for _, length in tg.schedule(stages, 1))
        s = dataclasses.replace(
            fx.settings(TRAIN_BATCH_TOKENS=tokens, GRAD_ACCUM_STEPS=accum),
            train_seq_schedule=stages,
            train_seq_len=longest,
        )
        if want == "ValueError":
            fx.equal(
                f"{text} is refused", refused(lambda s=s, n=int(world): s.batch_shape(n)), True
            )
        else:
            fx.equal(text, s.batch_shape(int(world))[1], want)
    for name, case in fx.meta["trajectories"].items():
        env = {k: v for k, v in case.items() if k.isupper()}
        s = fx.settings(
            **env, TRAIN_SEQ_SCHEDULE=case["schedule"], TRAIN_SEQ_LEN=case["default_seq_len"]
        )
        curriculum, changes, rows = tg.Curriculum(s), [], fx.arrays[f"{name}.trajectory"].tolist()
        for before, (step, _, progress, length, lr) in zip([None, *rows], rows):
            got = curriculum.advance(int(step), progress)
            fx.equal(f"{name} length at {step:g}", got[0], int(length))
            fx.near(f"{name} learning rate at {step:g}", got[2], lr, "lr_scale")
            changes += [[int(step), got[0]]] if before and before[3] != got[0] else []
        fx.equal(f"{name} changes", changes, case["changes"])
    check_warmed_pairs(fx, fx.meta["compile_warmup_items"])
    check_capped_batches(fx, fx.meta["loader"])


def check_warmed_pairs(fx: Fixture, want: dict) -> None:
    """(length, loops) pairs that are warmed up. They are those of one of the schedules, which the JSON does
    not name: one with the same lengths must give all of them."""
    modes = {"auto": {}, "inactive": {"NUM_LOOPS": 0}, "active": {"ENABLE_LOOPING_AT": 0}}
    want = {mode: want[mode] for mode in modes if mode in want}
    lengths = {length for pairs in want.values() for length, _ in pairs}
    candidates = []
    for case in fx.meta["schedules"].values():
        if {length for _, length in case["plan"]} == lengths:
            tokens = 8 * math.lcm(*lengths)  # a batch that rows of every length divide
            s = fx.settings(
                TRAIN_SEQ_SCHEDULE=case["schedule"],
                TRAIN_SEQ_LEN=max(lengths),
                TRAIN_BATCH_TOKENS=tokens,
            )
            got = {}
            for mode in want:
                change = {k.lower(): v for k, v in modes[mode].items()}
                pairs = tg.Curriculum(dataclasses.replace(s, **change)).graphs()
                got[mode] = [list(pair) for pair in pairs]
            candidates.append(got)
    found = want if want in candidates else candidates[:1]
    fx.equal("pairs warmed up", found, want)


def refused(call) -> bool:
    try:
        call()
    except tg.UserError:
        return True
    return False


def check_capped_batches(fx: Fixture, facts: dict) -> None:
    """Batches of the document-packed stream as the cap on a segment changes. The reference drops the two
    batches that it has read ahead at each change; the trainer cuts them anew and drops nothing."""
    for ranked, steps in facts["steps"].items():
        world, rank = (int(n) for n in re.fullmatch(r"ws(\d+).rank(\d+)", ranked).groups())
        stream = tg.DocPackStream(
            shard_files(fx, facts["shards"] + "fineweb_train_*.bin"),
            world_size=world,
            rank=rank,
            tokens=facts["tokens_per_rank_and_step"],
            max_len=0,
        )
        for k, row in enumerate(steps):
            ahead = 2 if k and row["cap"] != steps[k - 1]["cap"] else 0
            for _ in range(ahead):
                stream.next()
            batch, want = stream.next(), fx.group_raw(f"{ranked}.step{k}")
            tokens = batch.tokens
            bounds, longest = tg.segment_bounds(
                np.flatnonzero(tokens[:-1] == tg.BOS),
                len(tokens) - 1,
                row["cap"],
                bucket=facts["bucket"],
            )
            again = tg.packed_batch(tokens, row["cap"])
            fx.equal(
                f"{ranked} step {k} longest",
                (longest, again.max_seqlen),
                (row["longest_segment"],) * 2,
            )
            fx.equal(f"{ranked} step {k} inputs", again.x, want["x"])
            fx.equal(f"{ranked} step {k} targets", again.y, want["y"])
            fx.equal(f"{ranked} step {k} bounds", bounds, want["cu_seqlens"])


def check_newton_schulz(fx: Fixture) -> None:
    for case in fx.meta["cases"]:
        name = case["name"]
        key = f"{name}.G" if f"{name}.G" in fx.arrays else f"{name.rsplit('_steps', 1)[0]}.G"
        for precision, dtype in (
            ("f64", torch.float64),
            ("f32", torch.float32),
            ("bf16", torch.bfloat16),
        ):
            if f"{name}.out_{precision}" not in fx.arrays:
                continue
            G = fx.arrays[key].to(dtype)
            got = tg.orthogonalise(G, dtype, tg.POLAR_EXPRESS[: case["steps"]])
            fx.equal(f"{name} dtype", got.dtype, dtype)
            default = {"f64": 1e-9, "f32": 5e-5, "bf16": 0.06}[precision]
            fx.near(
                f"{name} {precision}",
                got,
                fx.arrays[f"{name}.out_{precision}"],
                precision,
                atol=default,
            )


# --------------------------------------------------------------------------------------------------
# Quantisation
# --------------------------------------------------------------------------------------------------
def check_gptq(fx: Fixture) -> None:
    """One matrix, the small packings, or a whole model; told apart by what the JSON holds."""
    if "cases" in fx.meta:
        check_gptq_weights(fx)
    elif "meta" not in fx.meta:
        check_packing(fx)
    elif "env" in fx.meta:
        check_gptq_model(fx, fx)
    else:  # only what differs from a sibling is stored, and the note says how it was made
        sibling, changes = re.search(r"as \S+/(\S+) but (.*?)[;.]", fx.meta["note"]).groups()
        overrides = dict(pair.split("=") for pair in re.findall(r"\w+=\w+", changes))
        check_gptq_model(fx, fx.sibling(sibling), **overrides)


def gptq(w, h, scale, bits, block=128):
    """Codes (…, R, C) of matrices w under the Hessians h (…, C, C), steps (…, R), by falling diagonal."""
    batch = w.float().reshape(-1, *w.shape[-2:])
    order, u, dead, _ = tg.hessian_factor(h.float().reshape(-1, *h.shape[-2:]))
    step = scale.float().reshape(len(batch), -1)
    return tg.round_in_order(batch, step, order, u, dead, 2 ** (bits - 1) - 1, block=block).reshape(
        w.shape
    )


def check_gptq_weights(fx: Fixture) -> None:
    for name, case in fx.meta["cases"].items():
        W, H, Q, scale = (fx.arrays[f"{name}.{key}"] for key in ("W", "H", "Q", "scale"))
        W = W.float()
        fx.equal(f"{name} scale", tg.row_scales(W, case["bits"], case["clip_sigmas"]), scale)
        got = gptq(W, H, scale, case["bits"], block=case["block_size"])
        fx.equal(f"{name} integer type", got.dtype, torch.int8)
        live = scale != 0  # a zero scale makes the integers meaningless: they restore to 0
        fx.mostly_equal(f"{name} integers", got[live], Q[live])
        if "hessian_weighted_err" in case:
            error = W.double() - got.double() * scale.double()[:, None]
            fx.close(
                f"{name} Hessian-weighted error",
                ((error @ H.double()) * error).sum(),
                case["hessian_weighted_err"],
                rtol=0.01,
            )


def check_awq(fx: Fixture) -> None:
    """Groups of columns with finer codes: one matrix, or the activations' rms behind the choice of groups."""
    if "cases" not in fx.meta:
        return check_input_rms(fx)
    for name, case in fx.meta["cases"].items():
        a, size = fx.group(name), case["group_size"]
        w, h, bits, high = a["W"], a["H"], case["bits"], case["protected_bits"]
        scores = tg.group_scores(w, a["act_rms"], size)
        fx.near(f"{name} scores", scores, a["group_scores"], "group_scores")
        fx.equal(f"{name} best group", int(scores.argmax()) * size, case["best_group_by_score"])
        steps = [tg.row_scales(w, n, case["clip_sigmas"]) for n in (bits, high)]
        for step, key in zip(steps, ("scale", "scale_hi")):
            fx.equal(f"{name} {key}", step, fx.arrays[f"{name}.{key}"])
        fine = torch.isin(
            torch.arange(w.shape[1]) // size * size, torch.tensor(case["protected_starts"])
        )
        codes = tg.gptq_protected(w, h, tuple(steps), (bits, high), fine)
        fx.mostly_equal(f"{name} integers", codes, a["Q"], apart=1)
        restored = codes * torch.where(fine, steps[1][:, None].float(), steps[0][:, None].float())
        error = (w - restored).double()
        fx.close(
            f"{name} error", ((error @ h.double()) * error).sum(), case["hessian_error"], rtol=0.01
        )
    return None


def check_input_rms(fx: Fixture) -> None:
    """rms of the matrices' input columns over all positions and visits, from their Hessians."""
    s = fx.settings()
    model, plan = (
        load_model(fx, s, fx.group("param")),
        checked_plan(fx, s, fx.meta["looping_active"]),
    )
    hook, batches = tg.HessianHook(s), fx.arrays["calibration.input_ids"]
    with torch.no_grad():
        for ids in batches:
            model.final_hidden(ids, plan, hook=hook)
            hook.batches += 1
    hessians = hook.finish().hessians
    for name, want in fx.group("act_rms").items():
        rms = tg.input_rms(s, name, hessians[tg.input_of(name)], batches[0].numel())
        fx.near(f"rms of {name}", rms, want, "act_rms")


def stated_number(text: str, pattern: str) -> int:
    """The number that a fixture's JSON states in words."""
    found = re.search(pattern, text)
    if not found:
        raise ValueError(f"no number like {pattern} in {text!r}")
    return int(found.group(1))


def check_lqer_variants(fx: Fixture) -> None:
    """A small model's tensors quantised as each variant has it: choice of groups and matrices, codes, steps,
    factors."""
    weights, inputs = fx.group("weight"), fx.group("inputs")
    batches, first = stated_number(fx.meta["hessian"], r"/\s*(\d+)"), fx.meta["first_variant"]
    hessians = {n: x.T @ x / batches for n, x in inputs.items()}
    for variant, case in fx.meta["variants"].items():
        s = fx.settings(**case["env"], NUM_LOOPS=0, QUANT_ALLOCATION="hand", QUANT_TRELLIS=0)
        done = tg.Quantiser(s, weights, tg.Curvature(hessians))()
        stored = {**fx.group_raw(f"{first}.quant"), **fx.group_raw(f"{variant}.quant")}
        tensors = as_published(done.tensors, s.awq_lite_group_size)
        stored = {k: v for k, v in stored.items() if not re.search(r"\.(lq|awqg)", k) or k in tensors}
        fx.equal(f"{variant} forms", done.forms, case["meta"])
        fx.equal(f"{variant} tensors", sorted(tensors), sorted(stored))
        for key in set(stored) & set(tensors):
            in_order = key.endswith("awqg_start")      # the field's: by falling score
            want = stored[key].sort().values if in_order else stored[key]
            compare_quantised(fx, f"{variant} {key}", tensors[key], want)
        restored = tg.dequantise(done)
        for name, want in case["dequantised_error"].items():
            got = float((weights[name] - restored[name]).double().norm())
            repaired = "lqer" in case["meta"][name]      # with better signs it may be smaller
            fx.close(f"{variant} error of {name}", max(got, want) if repaired else got, want, atol=1e-6,
                     rtol=0.01)
        for name, kind in case["meta"].items():
            if "lqer" in kind:
                mine, theirs = (repair_of(side, name, kind) for side in (done.tensors, stored))
                bare = _float64(weights[name] - restored[name]) + mine
                mine, theirs = (float((bare - repair).norm()) for repair in (mine, theirs))
                fx.close(f"{variant} error that the repair of {name} leaves", max(mine, theirs), theirs,
                         rtol=0.01)


def as_published(tensors: dict, size: int) -> dict:
    """Which columns are fine as the field stores it: where their groups begin, and how wide one is."""
    out = dict(tensors)
    for key in tensors:
        name, _, end = key.rpartition(".")
        if end == "awqg_fine":
            starts = out.pop(key)[::size].nonzero()[:, 0] * size
            out[f"{name}.awqg_start"] = starts.to(torch.int16)
            out[f"{name}.awqg_size"] = torch.tensor([size], dtype=torch.int16)
    return out


def check_percentile(fx: Fixture) -> None:
    """The search over five clips, with GPTQ under a Hessian or, without one, code by code."""
    cases = fx.meta.get("cases") or {key.split(".")[0]: {"clip_range": 31} for key in fx.arrays}
    for name, case in cases.items():
        a = fx.group(name)
        w, bits = a["W"][None], int(case["clip_range"]).bit_length() + 1
        h = a.get("H", torch.eye(w.shape[-1]))[None]
        order, u, dead, _ = tg.hessian_factor(h)
        codes, scale = (x[0] for x in tg.clip_search(w, order, u, dead, bits))
        fx.equal(f"{name} steps", scale, fx.arrays[f"{name}.scale"])
        fx.mostly_equal(f"{name} integers", codes, a["Q"], apart=1, share=0.995 if "H" in a else 1)
        if "mse" in case:
            error = (w[0] - codes * scale[:, None].float()).square().mean()
            fx.close(f"{name} squared error", error, case["mse"], rtol=0.01)


def check_byte_shuffle(fx: Fixture) -> None:
    """Shuffled bytes and back; the frames are the other formats' own, the artifact needs none."""
    for key, want in fx.arrays.items():
        name, *framed = key.split(".")
        if len(framed) != 2:
            continue
        data, stride = fx.arrays[name].numpy().tobytes(), int(framed[1].removeprefix("stride"))
        frame = b"BSHF" + stride.to_bytes(2 if framed[0] == "framed16" else 1, "little")
        frame = b"" if framed[0] == "framed8" and len(data) < stride else frame
        shuffled = tg.byte_shuffle(data, stride)
        fx.equal(key, frame + shuffled, want.numpy().tobytes())
        fx.equal(f"{key} back", tg.byte_unshuffle(shuffled, stride), data)


def check_packing(fx: Fixture) -> None:
    """Per-row int8 gates and the low-rank factors, symmetric and asymmetric: exact integers and scales."""
    for key in sorted({k.rsplit(".", 1)[0] for k in fx.arrays if k.endswith((".w", ".qA"))}):
        stored = fx.group(key)
        if "w" in stored:
            got = dict(zip(("q", "scale"), tg.quantise_rows(stored["w"], 8), strict=True))
        else:
            pack, kind = key.split(".")
            factors, number = fx.group(pack), int(re.search(r"\d+$", kind).group())
            packed = (
                tg.lqer_asym(factors["A"], factors["B"], number)
                if kind.startswith("asym")
                else [part for side in "AB" for part in tg.quantise_rows(factors[side], number)]
            )
            got = dict(zip(("qA", "sA", "qB", "sB"), packed, strict=True))
        for part, value in got.items():
            fx.equal(f"{key} {part}", value, stored[part])


def check_gptq_model(fx: Fixture, base: Fixture, **overrides) -> None:
    """Hessians, routing, integers, scales, factors restored weights; `base` holds weights and Hessians."""
    s = base.settings(**overrides)
    model = load_model(fx, s, base.group("param"))
    plan = checked_plan(base, s, base.meta["looping_active"])
    stored = {name: symmetric(upper) for name, upper in base.group("hessian_upper").items()}
    stored.update({name: stored[source] for name, source in base.meta["hessian_alias"].items()})
    if fx is base:
        check_hessians(fx, s, model, plan, stored)
    weights = {k: v.detach() for k, v in tg.matrix_views(dict(model.named_parameters())).items()}
    done = tg.Quantiser(s, weights, tg.Curvature(stored))()
    kinds = fx.meta["meta"]
    for name, kind in kinds.items():
        fx.equal(f"routing of {name}", done.forms.get(name), kind)
    for key, want in fx.group_raw("quant").items():
        compare_quantised(fx, key, done.tensors.get(key), want)
    restored = tg.dequantise(done)
    stored = check_dequantise(fx, base)
    for name, want in stored.items():
        mine, theirs = (
            (_float64(x) - _float64(weights[name])).norm() for x in (restored[name], want)
        )
        share = 0.03 if "lqer" in kinds[name] else 0.01
        fx.close(f"error left in {name}", mine, theirs, atol=1e-5, rtol=share)
    check_repairs(fx, done.tensors, stored_quant(fx, base))
    if fx is base:
        check_quantised_loss(fx, model, plan, stored, restored)


def check_dequantise(fx: Fixture, base: Fixture) -> dict[str, torch.Tensor]:
    """The stored integers, scales and factors restored by the trainer, against stored weights and totals."""
    stored = tg.dequantise(tg.Quantised(stored_quant(fx, base), fx.meta["meta"]))
    for name, facts in fx.meta["dequant_stats"].items():
        value = _float64(stored[name])
        fx.close(f"dequantised {name} sum", value.sum(), facts["sum"], atol=1e-4, rtol=1e-6)
        fx.close(f"dequantised {name} sum of squares", (value**2).sum(), facts["sumsq"], rtol=1e-6)
    for name, want in fx.group("dequant").items():
        fx.close(f"dequantised {name}", stored[name], want, atol=1e-6)
    return stored


def check_hessians(fx: Fixture, s, model, plan, stored: dict) -> None:
    """Sum of XᵀX over all positions of the calibration rows, divided by the number of batches."""
    hook = tg.HessianHook(s)
    with torch.no_grad():
        for ids in fx.arrays["calibration.input_ids"]:
            model.logits(model.final_hidden(ids, plan, hook=hook))
            hook.batches += 1
    hessians = hook.finish().hessians
    tolerance = fx.tolerance("hessian", rtol=1e-4)["rtol"]
    for name, want in stored.items():
        fx.close(f"Hessian of {name}", hessians[tg.input_of(name)], want, rtol_of_max_abs=tolerance)


def stored_quant(fx: Fixture, base: Fixture) -> dict[str, torch.Tensor]:
    """All stored tensors of the quantised model; only the factors of another fixture are its own."""
    shared = {k: v for k, v in base.group_raw("quant").items() if ".lq" not in k or fx is base}
    return {**shared, **fx.group_raw("quant")}


def check_repairs(fx: Fixture, got: dict, want: dict) -> None:
    """Products of the low-rank factors. Signs of singular vectors are arbitrary and the asymmetric grid is
    not symmetric, so the factors may differ; but the trainer's product must hold all of the stored one."""
    for name, kind in fx.meta["meta"].items():
        if "+" not in kind:
            continue
        mine, theirs = (repair_of(tensors, name, kind) for tensors in (got, want))
        share = (mine * theirs).sum() / (theirs * theirs).sum()
        fx.close(
            f"share of the stored repair of {name}",
            share,
            1.0,
            atol=0.05 if "asym" in kind else 0.01,
        )


def repair_of(tensors: dict, name: str, kind: str) -> torch.Tensor:
    """What the factors add."""
    form = kind.split("+")[-1]
    factors = (tensors[key] for key in tg.STORAGE[form].keys(name))
    return _float64(tg.STORAGE[form].restore(0.0, 1.0, *factors))


def check_quantised_loss(fx: Fixture, model, plan, stored: dict, restored: dict) -> None:
    """Loss of the model before quantising, with the stored restored weights, and with the trainer's own."""
    ids, targets = fx.arrays["eval.input_ids"], fx.arrays["eval.target_ids"]
    before, after = (float(fx.arrays[f"eval.loss_{when}"][0]) for when in ("before", "after_quant"))
    with torch.no_grad():
        fx.close("loss before", model.losses(ids, targets, plan).mean(), before, atol=1e-5)
        views = tg.matrix_views(dict(model.named_parameters()))
        for what, tensors, atol in (("stored", stored, 2e-5), ("own", restored, 2e-2)):
            for name, value in tensors.items():
                views[name].copy_(value)
            fx.close(
                f"loss with {what} weights",
                model.losses(ids, targets, plan).mean(),
                after,
                atol=atol,
            )


def compare_quantised(fx: Fixture, key: str, got, want) -> None:
    """One stored tensor of the quantised model; factor signs are arbitrary: there only shapes agree."""
    if got is None:
        return fx.fail(f"{key}: missing")
    part = key.rsplit(".", 1)[-1]
    fx.equal(f"{key} type", got.dtype, want.dtype)
    if part.startswith("lq"):
        fx.equal(f"{key} shape", tuple(got.shape), tuple(want.shape))
    elif part == "q":
        fx.mostly_equal(key, got, want)
    else:
        fx.equal(key, got, want)
    return None


def symmetric(upper: torch.Tensor) -> torch.Tensor:
    """A symmetric matrix from its upper triangle, stored row by row."""
    n = (math.isqrt(8 * upper.numel() + 1) - 1) // 2
    H = torch.zeros(n, n)
    H[torch.triu_indices(n, n).unbind()] = upper
    return H + H.triu(1).T


# --------------------------------------------------------------------------------------------------
# Data
# --------------------------------------------------------------------------------------------------
def check_loader(fx: Fixture) -> None:
    """Segment bounds, the document-packed stream or the shuffled stream."""
    if "cases" in fx.meta:
        for k, case in enumerate(fx.meta["cases"]):
            bos = np.array(case["bos_positions"], dtype=np.int64)
            total, limit, bucket = case["total_len"], case["max_doc_len"], case["bucket"]
            got, longest = tg.segment_bounds(bos, total, limit, bucket=bucket)
            fx.equal(f"case {k} bounds", got, fx.arrays[f"case{k}"])
            fx.equal(f"case {k} longest", int(longest), case["max_seqlen"])
    elif "files_of_rank" in fx.meta:
        check_shuffled(fx)
    else:
        check_docpack(fx)


def micro_batch_tokens(meta: dict) -> int:
    return meta["global_tokens"] // (meta["world_size"] * meta["grad_accum_steps"])


def stream_of_rank(kind: type, files: list[Path], meta: dict) -> tg.Stream:
    shape = {key: meta[key] for key in ("world_size", "rank")}
    return kind(files, tokens=micro_batch_tokens(meta), max_len=meta["train_seq_len"], **shape)


def check_docpack(fx: Fixture) -> None:
    meta, want = fx.meta, fx.arrays
    files = shard_files(fx, meta["files"].split()[0])
    fx.equal("tokens per shard", [len(tg.read_shard(f)) for f in files], meta["shard_tokens"])
    stream = stream_of_rank(tg.DocPackStream, files, meta)
    for k in range(meta["batches"]):
        batch = stream.next()
        fx.equal(f"batch {k} inputs", batch.x, want["inputs"][k][None])
        fx.equal(f"batch {k} targets", batch.y, want["targets"][k][None])
        bounds = want["cu_seqlens"][k][: int(want["cu_seqlens_len"][k])]
        fx.equal(f"batch {k} bounds", batch.cu_seqlens, bounds)
        fx.equal(f"batch {k} longest", int(batch.max_seqlen), int(want["max_seqlen"][k]))
    fx.equal("index type", batch.x.dtype, torch.int64)


def check_coprime(fx: Fixture) -> None:
    """The coprime-stride stream; its seed hangs on the paths as given, so it is opened from the folder."""
    meta, want = fx.meta, fx.arrays
    jumps = {int(k.split()[-1]): n for k, n in meta["batches_built_jumps"].items()}
    ranks = range(meta["world_size"])
    with moved_to(fx.folder):
        files = sorted(Path().glob(meta["pattern"]))
        stream = dict(meta, train_seq_len=meta["seq_len"])
        streams = [stream_of_rank(tg.CoprimeStream, files, dict(stream, rank=r)) for r in ranks]
    fx.equal("tokens per shard", [len(x) for x in streams[0].shards], meta["shard_tokens"])
    for k in range(meta["batches"]):
        for rank, stream in enumerate(streams):
            stream.batches = jumps.get(k, stream.batches)
            fx.equal(
                f"batch {k} rank {rank} inputs", stream.next().x, want[f"inputs_rank{rank}"][k]
            )
        fx.equal(f"batch {k} windows", np.array(streams[0].windows), want["windows"][k])


@contextlib.contextmanager
def moved_to(folder: Path):
    """Work in a folder (contextlib.chdir, which Python 3.10 lacks)."""
    before = os.getcwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def check_chunks(fx: Fixture) -> None:
    """Chunk of a batch by its longest document."""
    for name, case in fx.meta["cases"].items():
        table = case.pop("chunk_for_longest_document_of_batch")
        steps = tg.chunk_rules(fx.settings(**case))
        got = {length: next(c for bound, c in steps if int(length) <= bound) for length in table}
        fx.equal(name, list(got.values()), list(table.values()))
    for text in fx.meta.get("rejected", ()):
        try:
            fx.settings(TTT_SHORT_SCORE_FIRST_ENABLED=1, TTT_SHORT_SCORE_FIRST_STEPS=text)
            fx.fail(f"{text} was not refused")
        except tg.UserError:
            fx.compared += 1


def check_shuffled(fx: Fixture) -> None:
    meta, want = fx.meta, fx.arrays
    files = shard_files(fx, re.sub(r"\d+\.bin$", "*.bin", meta["files_of_rank"][0]))
    stream = stream_of_rank(tg.ShuffledStream, files, meta)
    order = []
    for k in range(meta["batches"]):
        batch = stream.next()
        order += stream.windows
        fx.equal(f"batch {k} inputs", batch.x, want["inputs"][k])
        fx.equal(f"batch {k} targets", batch.y, want["targets"][k])
        fx.equal(f"batch {k} has no segments", batch.cu_seqlens, None)
    fx.equal("order", np.array(order)[: len(want["order"])], want["order"])


def check_bpb(fx: Fixture) -> None:
    """Byte tables of a SentencePiece model, and byte counts of whole texts."""
    meta, want = fx.meta, fx.arrays
    table = tg.ByteTable.from_sentencepiece(fx.folder / meta["model"], meta["vocab_size"])
    fx.equal("base bytes", table.base, want["base_bytes"])
    fx.equal("leading space", table.lead, want["has_leading_space"])
    fx.equal("boundary", table.boundary, want["is_boundary"])
    ids, offsets = want["ids"].numpy(), want["offsets"].tolist()
    stream = table.count(ids[:-1], ids[1:])
    fx.equal("bytes of the stream", stream, want["stream_bytes"])
    fx.equal("total of the stream", int(stream.sum()), meta["stream_total"])
    for k, (begin, end) in enumerate(itertools.pairwise(offsets)):
        got = table.count(ids[begin : end - 1], ids[begin + 1 : end])
        fx.equal(f"bytes of text {k}", got, want["bytes"][begin + 1 : end])
        fx.equal(f"total of text {k}", int(got.sum()), meta["texts"][k]["total"])


# --------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------
def check_train_trajectory(fx: Fixture) -> None:
    """Training steps from stored batches: losses, gradient norms, schedules, averaged and final weights."""
    for record, want in fx.meta["records"].items():
        exact = "bf16" not in record
        dtype = "float32" if exact else "bfloat16"
        got = train_run(
            fx, fx.settings(MUON_DTYPE=dtype, GRAD_ACCUM_STEPS=fx.meta["grad_accum_steps"]), want
        )
        fx.near(
            f"{record} first loss",
            got["micro_loss"][0],
            want["micro_loss"][0],
            "first step loss",
            atol=1e-5,
        )
        loss_tolerance = fx.tolerance(f"step_loss/{record}", atol=1e-4 if exact else 1e-2)
        for key in ("micro_loss", "step_loss"):
            fx.close(f"{record} {key}", got[key], want[key], **loss_tolerance)
        fx.near(
            f"{record} grad norm",
            got["grad_norm"],
            want["grad_norm"],
            f"grad_norm/{record}",
            rtol=1e-4 if exact else 1e-2,
        )
        fx.close(f"{record} learning rate", got["lr"], want["lr"], rtol=1e-9)
        fx.close(f"{record} momentum", got["momentum"], want["momentum"], rtol=1e-9)
        for kind in ("ema", "final"):
            stored = fx.group(f"{record}.{kind}")
            for name, value in stored.items():
                fx.near(
                    f"{record} {kind} {name}",
                    got[kind][name],
                    value,
                    f"{kind}/{record}",
                    f"ema/{record}",
                    atol=5e-4,
                )
            if not stored:  # bfloat16 sums depend on the machine: only the totals are stored
                checksums(fx, f"{record} {kind}", got[kind], want[f"{kind}_checksums"], 1e-2)


def train_run(fx: Fixture, s: tg.Settings, want: dict) -> dict:
    """Drive the trainer over the stored batches as its own loop does; everything it returned, per step."""
    accum = fx.meta["grad_accum_steps"]
    model = load_model(fx, s, fx.group("param"))
    trainer = tg.Trainer(s, tg.World(), model)
    got = {key: [] for key in ("micro_loss", "step_loss", "grad_norm", "lr", "momentum")}
    for step in range(len(want["step_loss"])):
        share, momentum = tg.warmdown_share(s, step / s.iterations), tg.muon_momentum(s, step)
        looping = step / s.iterations >= s.enable_looping_at
        plan = tg.layer_plan(s, looping)
        fx.equal(
            f"loops at step {step}", looping, want["looping"][step * accum]
        )  # stored per micro-batch
        batches = [stored_batch(fx, k) for k in range(step * accum, (step + 1) * accum)]
        losses = [float(trainer.micro_step(batch, plan)) for batch in batches]
        got["micro_loss"] += losses
        got["step_loss"].append(sum(losses) / accum)
        got["grad_norm"].append(float(trainer.update(share, momentum)))
        got["lr"].append(s.matrix_lr * share)
        got["momentum"].append(momentum)
    got["final"] = tg.field_views({n: p.detach() for n, p in model.named_parameters()})
    got["ema"] = tg.field_views(trainer.ema)
    return got


def stored_batch(fx: Fixture, k: int):
    """Micro-batch k: n + 1 tokens give n inputs and n targets."""
    row, bounds = fx.arrays["batches"][k].long(), fx.arrays["cu_seqlens"][k]
    return tg.Batch(row[None, :-1], row[None, 1:], bounds, int(bounds.diff().max()))


# --------------------------------------------------------------------------------------------------
# Scoring
# --------------------------------------------------------------------------------------------------
def check_ttt_phased_eval(fx: Fixture) -> None:
    """Score-then-adapt evaluation of a whole stream, or the plain packed evaluation (`results`)."""
    if "results" in fx.meta:
        return check_eval_val(fx)
    meta, known = fx.meta, {field.name.upper() for field in dataclasses.fields(tg.Settings)}
    width = meta["env"].get("MODEL_DIM")
    fx.equal("embedding as wide as the model", meta["env"].pop("EMBEDDING_DIM", width), width)
    own = {}
    for source, ways in PUBLISHED_WAYS.items():
        if re.search(rf"#{source}\b", meta.get("source", "")):
            own.update(ways(meta["env"]))
    s = fx.settings(**{k: v for k, v in own.items() if k in known})
    if other := meta.get("shares_parameters_and_lora_with"):
        fx.lender = fx.sibling(other)
    model = load_model(fx, s, fx.group("param"))
    checked_plan(fx, s)
    val, final = validation_stream(fx, s), meta["final"]
    seen = Seen(fx, val.target_bytes)
    fx.equal("tokens of the stream", len(val.tokens), meta["val_tokens"])
    documents, want = np.stack([val.documents.start, val.documents.length], 1), fx.arrays["docs"]
    fx.equal("documents", documents, want[want[:, 1] > 1])  # one token predicts nothing
    val.documents = val.documents.sample(s.val_doc_fraction, s.seed)
    val.hints = tg.Hints.for_adapting(s, tg.World(), val)
    result = tg.PhasedTTT(s, tg.World(), model, val, trace=seen).run()
    fx.equal("tokens scored", result.tokens, int(final["token_count"]))
    fx.equal("bytes scored", int(result.byte_sum), int(final["byte_sum"]))
    fx.near("loss", result.loss, final["val_loss"], "final.val_bpb", rtol=1e-5)
    fx.near("bits per byte", result.bpb, final["val_bpb"], "final.val_bpb", rtol=1e-5)
    seen.compare()
    got = tg.field_views({n: p.detach() for n, p in model.named_parameters()})
    for name, want in fx.group("final_param").items():
        fx.near(f"final {name}", got[name], want, "final_param", atol=5e-5)
    if "final_param_checksums" in meta:
        checksums(fx, "final", got, meta["final_param_checksums"], 2e-5)


# What a published script did whatever its settings said.
PUBLISHED_WAYS = {
    1741: lambda env: {"TTT_LORA_ALPHA": env["TTT_LORA_RANK"], "TTT_WARM_START_A": 0},
    2135: lambda env: {"NGRAM_DOC_ORDER": "stream", "SMEAR_GATE_BOS_FIX": 0},
}


class Seen:
    """The evaluation's trace: hands out the stored adapters, records chunks, optimiser steps and phases."""

    def __init__(self, fx: Fixture, target_bytes: np.ndarray):
        self.fx, self.target_bytes = fx, target_bytes
        self.events = {"chunk": [], "lora": [], "reset": [], "sgd_step": [], "phase": []}

    def __call__(self, event: str, **values) -> None:
        if event in ("lora", "reset"):
            self.feed(event, values["adapter"])
            values = {"rows": next(iter(values["adapter"].parameters())).shape[1]}
        elif event == "chunk":
            values = {k: _tensor(v).clone() if _is_array(v) else v for k, v in values.items()}
            at, counted = values["at"].numpy(), values["counted"].bool()
            values["loss_sum"] = values["losses"][counted].double().sum().item()
            values["byte_sum"] = int(self.target_bytes[at[counted.numpy()]].sum())
            values["tokens"] = int(counted.sum())
        elif event == "phase":
            model = values.pop("model")
            values["params"] = {n: p.detach().clone() for n, p in model.named_parameters()}
            values["chunks"] = len(self.events["chunk"])
        self.events[event].append(values)

    def feed(self, event: str, adapter) -> None:
        """Write the stored A values of the adapter set that the reference drew at this point."""
        k = len(self.events[event])
        stored = self.fx.group(f"lora_{'init' if event == 'lora' else event}.{k}")
        if event == "reset" and not self.fx.meta.get("lora_A_redrawn"):
            return None
        if not stored:
            return self.fx.fail(f"adapter set {k} was created, which the reference did not do")
        with torch.no_grad():
            views = adapter_views(adapter)
            self.fx.equal(
                f"names of adapter set {k}", {n for n in views if n.endswith(".A")}, set(stored)
            )
            for name, value in stored.items():
                views[name].copy_(value)
        return None

    def compare(self) -> None:
        """Everything recorded, against the fixture."""
        fx, meta, chunks = self.fx, self.fx.meta, self.events["chunk"]
        fx.equal(
            "adapter rows",
            [e["rows"] for e in self.events["lora"]],
            [e["bsz"] for e in meta["loras"]],
        )
        fx.equal("number of chunks", len(chunks), len(fx.arrays["chunk_records"]))
        columns = [name.removeprefix("running ") for name in meta["chunk_records_columns"]]
        sums = dict.fromkeys(("loss_sum", "byte_sum", "token_count"), 0.0)
        for k, (chunk, record) in enumerate(
            zip(chunks, fx.arrays["chunk_records"].tolist(), strict=False)
        ):
            sums = {
                key: sums[key] + chunk["tokens" if key == "token_count" else key] for key in sums
            }
            self.compare_chunk(k, chunk, sums, dict(zip(columns, record, strict=True)))
        steps = meta.get("sgd_steps", [])
        fx.equal("number of SGD steps", len(self.events["sgd_step"]) if steps else 0, len(steps))
        for k, (got, want) in enumerate(zip(self.events["sgd_step"], steps, strict=False)):
            fx.close(f"SGD step {k} loss", got["loss"].item(), want["loss"], rtol=1e-5)
            fx.close(f"SGD step {k} norm", got["grad_norm"].item(), want["grad_norm"], rtol=1e-4)
            fx.close(f"SGD step {k} lr", got["lr"], want["lr"], atol=1e-9)
            fx.equal(f"SGD step {k} tokens", int(got["n_tokens"]), want["n_tokens"])
        fx.equal("number of phases", len(self.events["phase"]), len(meta["phases"]))
        for k, (got, want) in enumerate(zip(self.events["phase"], meta["phases"], strict=False)):
            fx.equal(f"phase {k} chunks before", got["chunks"], want["after_chunk_record"])
            if f"phase{k}.sgd_tokens" in fx.arrays:
                fx.equal(f"phase {k} tokens", got["tokens"], fx.arrays[f"phase{k}.sgd_tokens"])
            if "n_sgd_tokens" in want:
                fx.equal(f"phase {k} number of tokens", len(got["tokens"]), want["n_sgd_tokens"])
            checksums(
                fx, f"phase {k}", tg.field_views(got["params"]), want["param_checksums"], 2e-5
            )

    def compare_chunk(self, k: int, got: dict, sums: dict, record: dict) -> None:
        fx, tolerance = self.fx, self.fx.tolerance("chunk_records loss_sum", rtol=1e-5)
        fx.close(f"chunk {k} loss so far", sums["loss_sum"], record["loss_sum"], **tolerance)
        for key in ("byte_sum", "token_count"):
            fx.equal(f"chunk {k} {key} so far", sums[key], record[key])
        fx.equal(f"chunk {k} row width", got["width"], int(record["context_size"]))
        for key, mine in (("offsets", got["offsets"]), ("lens", got["counts"])):
            stored = fx.arrays[f"chunk_{key}"][k]  # -1 where a short group has no row
            fx.equal(f"chunk {k} {key}", mine, stored[: len(mine)])
            fx.equal(f"chunk {k} rows", int((stored >= 0).sum()), len(mine))
        for key in ("x", "y"):
            if f"chunk{k}.{key}" in fx.arrays:
                fx.equal(f"chunk {k} {key}", got[key], fx.arrays[f"chunk{k}.{key}"])
        for key in (f"chunk{k}.per_token_loss", f"chunk{k}.per_token_loss_as_scored"):
            if key in fx.arrays:
                fx.near(
                    f"chunk {k} losses",
                    got["losses"],
                    fx.arrays[key],
                    "chunk per_token_loss",
                    atol=5e-5,
                )


def validation_stream(fx: Fixture, s: tg.Settings) -> tg.Validation:
    """The fixture's validation shards as the trainer's scorers take them: tokens, target_bytes, documents.

    The stream is cut to k·EVAL_SEQ_LEN + 1 tokens, which the reference did and the trainer does not; and the
    byte sidecar counts only with CASEOPS_ENABLED, while the trainer uses it wherever it exists.
    """
    folder = fx.meta["env"]["DATA_PATH"]
    tokens = tokens_of(fx, f"{folder}/fineweb_val_*.bin")
    if not int(fx.meta["env"].get("EVAL_INCLUDE_TAIL", 0)):
        tokens = tokens[: (len(tokens) - 1) // s.eval_seq_len * s.eval_seq_len + 1]
    if s.caseops_enabled:
        sidecar = tokens_of(fx, f"{folder}/fineweb_val_bytes_*.bin")
        nbytes = sidecar[1 : len(tokens)].astype(np.int64)
    else:
        nbytes = tg.ByteTable.from_sentencepiece(s.tokenizer, s.vocab_size).count(
            tokens[:-1], tokens[1:]
        )
    val = tg.Validation.of(tokens)
    val.target_bytes = nbytes
    return val


def check_eval_val(fx: Fixture) -> None:
    """Packed rows of whole sequences, document segments inside each: sums of one rank's share.

    The reference drops a rank's incomplete last row; the trainer's scorer drops nothing. So the rows the
    reference did score are pushed through the trainer's segments, model and byte counts here.
    """
    source = fx.sibling(re.search(r"(\S+)\.safetensors", fx.meta["weights"]).group(1))
    s = fx.settings()
    model, plan = load_model(fx, s, source.group("param")), tg.layer_plan(s, True)
    val = validation_stream(fx, s)
    tokens, nbytes = _tensor(val.tokens), _tensor(val.target_bytes)
    for rank_name, want in fx.meta["results"].items():
        world, rank = (int(n) for n in re.fullmatch(r"ws(\d+)_rank(\d+)", rank_name).groups())
        row = s.val_batch_tokens // (
            world * (8 // world)
        )  # the reference makes 8 // world micro-batches
        begin, end = (s.eval_seq_len * (want["total_seqs"] * r // world) for r in (rank, rank + 1))
        sums = np.zeros(3)
        for at in range(begin, end - row + 1, row):
            x, y = tokens[at : at + row], tokens[at + 1 : at + row + 1]
            bounds, longest = tg.segment_bounds(
                (x == tg.BOS).nonzero()[:, 0].numpy(), row, s.eval_seq_len
            )
            layout = tg.Layout(torch.as_tensor(bounds), int(longest))
            with torch.no_grad():
                losses = model.losses(x[None], y[None], plan, layout)
            sums += [float(losses.double().sum()), row, float(nbytes[at : at + row].sum())]
        fx.equal(f"{rank_name} tokens", sums[1], want["token_count"])
        fx.equal(f"{rank_name} bytes", sums[2], want["byte_sum"])
        tolerance = fx.tolerance("val_bpb", rtol=5e-6)
        fx.close(f"{rank_name} loss", sums[0] / sums[1], want["val_loss"], **tolerance)
        fx.close(
            f"{rank_name} bits per byte",
            sums[0] / math.log(2) / sums[2],
            want["val_bpb"],
            **tolerance,
        )


def check_sliding_eval(fx: Fixture) -> None:
    """Windows and scored ranges of the sliding evaluation, and the byte total (the model is an older one)."""
    env, tokens = fx.meta["env"], fx.arrays["val_tokens"].numpy()
    total = len(tokens) - 1
    windows = tg.sliding_windows(total, env["EVAL_SEQ_LEN"], env["EVAL_STRIDE"])
    want, final = fx.arrays["windows"], fx.meta["final"]
    fx.equal("number of windows", len(windows), fx.meta["n_windows"])
    fx.equal("windows", np.array([[begin, end, first, end] for begin, end, first in windows]), want)
    fx.equal(
        "tokens scored", sum(end - first for _, end, first in windows), int(final["token_count"])
    )
    base, lead, boundary = (
        fx.arrays[k].numpy() for k in ("base_bytes", "has_leading_space", "is_boundary")
    )
    table = tg.ByteTable(base, lead.astype(bool), boundary.astype(bool))
    fx.equal(
        "bytes scored", int(table.count(tokens[:-1], tokens[1:]).sum()), int(final["byte_sum"])
    )


class TableModel(tg.GPT):
    """A stand-in whose logits are rows of a table, by the input token."""

    def __init__(self, s: tg.Settings, table: torch.Tensor):
        super().__init__(s)
        self.table = table.float()

    def init_weights(self, generator=None):
        """Nothing: no weight is used."""

    def final_hidden(self, ids, *rest, **named):
        return ids

    def raw_logits(self, hidden, adapter=None):
        return self.table[hidden]


def check_eval_tail(fx: Fixture) -> None:
    """Targets, losses and bytes of the plain packed evaluation, with and without the stream's tail.

    The trainer scores every target. Where the reference drops some, those it did score are summed up.
    """
    shards, *_ = fx.meta.get("shards", "shards").split()
    table = fx.arrays["logits_table"]
    stream = tokens_of(fx, f"{shards}/fineweb_val_*.bin")
    nbytes = tokens_of(fx, f"{shards}/fineweb_val_bytes_*.bin")[1:].astype(np.int64)
    fx.equal("tokens of the stream", len(stream), fx.meta["n_tokens"])
    for name, case in fx.meta["cases"].items():
        s = fx.settings(
            EVAL_SEQ_LEN=case["seq_len"],
            EVAL_STRIDE=case["seq_len"],
            VOCAB_SIZE=len(table),
            LOGIT_SOFTCAP=1e6,
            EVAL_INCLUDE_TAIL=int(case["val_tokens_kept"] == len(stream)),
        )
        val = tg.Validation.of(stream)
        val.target_bytes = nbytes
        scorer = tg.Scorer(s, tg.World(), TableModel(s, table))
        whole = scorer.windows(val, s.eval_stride)
        losses = scorer.ledger.loss.double().numpy()
        if case["targets_scored"] == len(stream) - 1:
            fx.equal(f"{name} targets", whole.tokens, case["targets_scored"])
            fx.equal(f"{name} bytes", whole.byte_sum, case["byte_sum"])
            fx.near(f"{name} loss", whole.loss_sum, case["loss_sum"], "loss_sum")
            fx.near(f"{name} bits per byte", whole.bpb, case["bpb"], "bpb")
        total = 0
        for rank, begin in zip(case["ranks"], first_targets(case), strict=True):
            what = f"{name} rank {rank['rank']}"
            rows = check_packed_rows(fx, what, stream[begin:], s.eval_seq_len, rank["batches"])
            end = begin + rows
            fx.near(f"{what} loss", losses[begin:end].sum(), rank["loss_sum"], "loss_sum")
            fx.equal(f"{what} bytes", int(nbytes[begin:end].sum()), int(rank["bytes"]))
            total += end - begin
        fx.equal(f"{name} targets of all ranks", total, case["targets_scored"])


def first_targets(case: dict) -> list[int]:
    """Where each rank of an evaluation begins. Either all targets are shared out, one rank after the other,
    or whole sequences, of which each rank drops what does not fill its last row."""
    targets, size, length = case["val_tokens_kept"] - 1, case["world_size"], case["seq_len"]
    if case["targets_scored"] == targets:
        shares = [sum(batch["n"] for batch in rank["batches"]) for rank in case["ranks"]]
        return list(itertools.accumulate(shares[:-1], initial=0))
    return [targets // length * rank["rank"] // size * length for rank in case["ranks"]]


def check_packed_rows(
    fx: Fixture, what: str, stream: np.ndarray, limit: int, batches: list[dict]
) -> int:
    """Segment bounds of consecutive rows from the stream's begin; how many inputs they hold."""
    at = 0
    for k, batch in enumerate(batches):
        bos = np.flatnonzero(stream[at : at + batch["n"]] == tg.BOS)
        bounds, longest = tg.segment_bounds(bos, batch["n"], limit, bucket=1)
        fx.equal(f"{what} batch {k} bounds", list(bounds), batch["boundaries"])
        fx.equal(f"{what} batch {k} longest", longest, batch["max_seqlen"])
        at += batch["n"]
    return at


# --------------------------------------------------------------------------------------------------
# Counts of earlier text
# --------------------------------------------------------------------------------------------------
GATES = {"reference": "target", "causal_prev_token": "previous", "causal_open_word": "open_word"}


def ngram_settings(fx: Fixture, values: dict, **more) -> tg.Settings:
    env = {k.upper(): v for k, v in values.items() if k != "CHUNK_TOKENS"}
    return fx.settings(
        **env,
        NGRAM_TILT_ENABLED=1,
        CASEOPS_ENABLED=0,
        LOGIT_SOFTCAP=1e6,
        **more,
        VOCAB_SIZE=fx.meta.get("vocab_size") or fx.meta["vocab"],
        TOKENIZER_PATH=fx.folder / fx.meta["tokenizer"],
    )


def check_ngram_agreement(fx: Fixture) -> None:
    """Three experts under all gates, their choice, and the tilted score of a whole evaluation."""
    want, tokens = fx.arrays, fx.arrays["tokens"].numpy()
    for config, meta in fx.meta["configs"].items():
        whole = meta["full_eval"]
        shape = dict(EVAL_STRIDE=whole["stride"], EVAL_SEQ_LEN=whole["seq_len"])
        model = TableModel(ngram_settings(fx, meta["settings"], **shape), want["base_logits_table"])
        stored = {
            name.split(".")[1] for name in want if re.fullmatch(rf"{re.escape(config)}\.\w+\.hint", name)
        }
        for variant in sorted(stored):
            name = f"{config}.{variant}"
            s = settings_of_gates(
                fx, variant, want[f"{name}.hint"], model, tokens, meta["settings"], shape
            )
            check_experts(fx, s, name, tokens)
            nll = check_tilted(fx, s, model, tokens, name)
            if s.ngram_gates == "target":
                check_whole_evaluation(fx, config, nll, whole)
        s = ngram_settings(fx, {**meta["settings"], "WITHIN_TAU": 99, "WORD_TAU": 99}, **shape)
        check_tilted(fx, s, model, tokens, f"{config}.token_expert_only")


def settings_of_gates(fx: Fixture, variant: str, hint, model, tokens, values: dict, shape: dict):
    """Settings with the gates that the variant's name means; under another name, the gates that give the
    stored hints."""
    given = [GATES[variant]] if variant in GATES else list(GATES.values())
    for gates in given:
        s = ngram_settings(fx, values, NGRAM_GATES=gates, **shape)
        if len(given) == 1 or torch.equal(choice_of(s, model, tokens)[1].long(), hint.long()):
            return s
    raise ValueError(f"no gates give the hints of {variant}")


def check_experts(fx: Fixture, s: tg.Settings, name: str, tokens: np.ndarray) -> None:
    """Boundary tokens, and every expert's hints and confidences."""
    fx.equal("boundary", tg.word_pieces(s.tokenizer, s.vocab_size)[1], fx.arrays["boundary"])
    for expert, pair in tg.ngram_experts(s, tokens).items():
        for what, got in zip(("hint", "conf"), pair, strict=True):
            if (key := f"{name}.{expert}_{what}") in fx.arrays:
                fx.equal(key, got.astype(float), fx.arrays[key].double())


def choice_of(s: tg.Settings, model, tokens: np.ndarray):
    """(hints, the chosen hint of every target or -1, its boost)"""
    hints, at = tg.Hints.of(s, tokens), np.arange(len(tokens) - 1)
    hint, confidence = hints.find(at, torch.device("cpu"))
    x = torch.from_numpy(tokens.astype(np.int64))[None, :-1]
    with torch.no_grad():
        q = torch.exp(-model.losses(x, hint[:, None], tg.layer_plan(s, True))[:, 0].double())
    chosen, _, boost = tg.Hints.choose(s, q.clamp(1e-12, 1 - 1e-12), hint, confidence)
    return hints, chosen, boost


def check_tilted(fx: Fixture, s: tg.Settings, model, tokens: np.ndarray, name: str) -> np.ndarray:
    """The choice at every position, and the losses as the books of the evaluation have them."""
    want, (hints, chosen, boost) = fx.arrays, choice_of(s, model, tokens)
    if f"{name}.hint" in want:
        fx.equal(f"{name}.hint", chosen, want[f"{name}.hint"])
        fx.near(f"{name}.beta", boost, want[f"{name}.beta"], "beta")
    model.s = s
    scorer = tg.Scorer(s, tg.World(), model)
    val = tg.Validation.of(tokens)
    val.hints = hints
    scorer.windows(val, s.eval_stride)
    fx.near(f"{name}.nll", scorer.ledger.loss, want[f"{name}.nll"], "nll")
    return scorer.ledger.loss.double().numpy()


def check_whole_evaluation(fx: Fixture, config: str, nll: np.ndarray, whole: dict) -> None:
    """As published, a window that reaches beyond the end scores the last targets again: counted here."""
    total, length, stride = len(nll), whole["seq_len"], whole["stride"]
    times, starts = np.zeros(total), range(0, total - stride + 1, stride)
    for start in starts:
        end = min(start + length, total)
        times[max(end - stride, start) if start else 0 : end] += 1
    nbytes = fx.arrays["bytes_per_target"].double().numpy()
    loss = (times * nll).sum()
    fx.equal(f"{config} windows", len(starts), whole["windows"])
    fx.equal(
        f"{config} targets with those scored again",
        int(times.sum()),
        whole["scored_positions_counted"],
    )
    fx.equal(f"{config} targets", int((times > 0).sum()), whole["distinct_positions"])
    fx.near(f"{config} mean loss", loss / times.sum(), whole["mean_nll"], "bpb")
    fx.near(
        f"{config} bits per byte", loss / (times * nbytes).sum() / math.log(2), whole["bpb"], "bpb"
    )


def check_ngram_token_only(fx: Fixture) -> None:
    """Gates, hints and boosts; as published the first target stands in for the first token."""
    targets = fx.arrays["targets"].numpy()
    for config, meta in fx.meta["configs"].items():
        s = ngram_settings(fx, meta["settings"], NGRAM_GATES="target", NGRAM_CHOICE="confidence")
        want, everywhere = fx.group_raw(config), np.arange(len(targets))
        hints = tg.Hints.of(s, np.append(targets[:1], targets))
        hint, confidence = hints.find(everywhere, torch.device("cpu"))
        chosen, _, boost = tg.Hints.choose(s, torch.zeros(hint.shape), hint, confidence)
        gate = want["gate"].bool()
        fx.equal(f"{config} gates", chosen >= 0, gate)
        fx.equal(f"{config} hints", chosen[gate], want["hint"][gate])
        fx.equal(f"{config} boosts", boost[gate], want["boost"][gate])
        fx.equal(f"{config} gated", int(gate.sum()), meta["gated"])
        if "tilt.logits" in want:
            at = want["tilt.positions"]
            z, y = want["tilt.logits"].float(), torch.from_numpy(targets).long()[at]
            losses = torch.stack(
                [
                    torch.nn.functional.cross_entropy(z, t, reduction="none")
                    for t in (y, *hint[:, at])
                ]
            )
            fx.near(
                f"{config} losses",
                tg.tilt(s, losses, y, hint[:, at], confidence[:, at]),
                want["tilt.nll"],
                "nll",
            )


def check_corrector(fx: Fixture) -> None:
    """The bias before every token, token by token and by chunks of 8, and after a reset."""
    want, tokens = fx.arrays, fx.arrays["tokens"].tolist()
    key = re.compile(r"nll_chunk(\d+)")
    logits, y = want["logits"].float(), want["tokens"]

    def loss(z):
        return torch.nn.functional.cross_entropy(z, y, reduction="none")

    fx.near("base nll", loss(logits), want["nll_base"], "nll")
    for config, meta in fx.meta["configs"].items():
        s = fx.settings(
            VOCAB_SIZE=fx.meta["vocab"],
            CORRECTOR_ALPHA=meta["alpha"],
            CORRECTOR_ORDERS=",".join(map(str, meta["orders"])),
        )
        group, at, bias = fx.group(config), want["positions"], bias_by_chunks(s, tokens, 1)
        fx.equal(f"{config} orders", tg.Corrector(s).orders, meta["orders_as_used"])
        fx.near(f"{config} bias", bias[at], group["bias"], "bias")
        fx.near(f"{config} logits", (logits + bias)[at], group["corrected_logits"], "bias")
        fx.near(f"{config} nll", loss(logits + bias), group["nll"], "nll")
        for name, stored in group.items():
            if chunk := key.fullmatch(name):
                got = loss(logits + bias_by_chunks(s, tokens, int(chunk.group(1))))
                fx.near(f"{config} {name}", got, stored, "nll")
        rounded = logits + bias.bfloat16().float()
        fx.near(
            f"{config} rounded",
            loss(rounded),
            group["nll_with_bfloat16_bias"],
            "nll_with_bfloat16_bias",
        )
        fx.near(f"{config} reset", tg.Corrector(s).bias(), group["bias_after_reset"], "bias")


def bias_by_chunks(s: tg.Settings, tokens: list[int], chunk: int) -> torch.Tensor:
    """The corrector's bias before every token (tokens, vocabulary); a chunk's tokens are learned after it."""
    corrector, rows = tg.Corrector(s), []
    for i in range(0, len(tokens), chunk):
        rows += [corrector.bias()] * len(tokens[i : i + chunk])
        corrector.update(tokens[i : i + chunk])
    return torch.from_numpy(np.stack(rows)).float()


def check_logit_calibration(fx: Fixture) -> None:
    """Token categories, the fit step by step (so the windows too), and what the calibrated model scores (in
    float32 always; the reference's bfloat16 logits have no counterpart)."""
    for name, tokenizer in fx.meta["tokenizers"].items():
        got = (
            tg.token_categories(fx.folder / tokenizer["model"], tokenizer["vocab"])
            .numpy()
            .astype(int)
        )
        bits = 1 << np.arange(len(tokenizer["names"]))
        fx.equal(f"{name} categories", got @ bits, fx.arrays[f"{name}.feature_bits"])
    tokens = tg.read_shard(shard_files(fx, "*/fineweb_train_*.bin")[0])
    table = fx.arrays["logits_table"]
    x, y = (fx.arrays[f"eval.{k}"].long()[None] for k in "xy")
    tokenizer = next(t for t in fx.meta["tokenizers"].values() if t["vocab"] == len(table))
    for name, run in fx.meta["runs"].items():
        s = fx.settings(
            **{k.upper(): v for k, v in run["settings"].items()},
            VOCAB_SIZE=tokenizer["vocab"],
            EVAL_STRIDE=run["settings"]["eval_seq_len"],
            LOGIT_SOFTCAP=1e6,
            CASEOPS_ENABLED=0,
            TOKENIZER_PATH=fx.folder / tokenizer["model"],
            LOGIT_CALIB_ENABLED=1,
        )
        want = fx.group(name)
        model = TableModel(s, table)
        raw, losses = tg.fit_calibration(s, model, tokens)
        tolerance = fx.tolerance("scale/group_weights", atol=1e-5)
        fx.near(f"{name} steps", losses, want["cross_entropy_per_step"], "nll")
        fx.close(
            f"{name} weights",
            raw,
            torch.cat((want["raw_scale"], want["group_weights"])),
            **tolerance,
        )
        scale, bias = model.calibration = tg.calibrated_by(s, raw)
        fx.close(f"{name} scale", scale, want["scale"][0], **tolerance)
        fx.close(f"{name} bias", bias, want["bias"], **tolerance)
        losses = model.losses(x, y, tg.layer_plan(s, True))[0]
        fx.near(f"{name} nll", losses, want["eval.nll"], "nll")


def check_prequant(fx: Fixture) -> None:
    """Epochs over the validation tokens: batches, losses, norms and weights; or the shares of the ranks."""
    if "n_seq" in fx.meta:
        return check_shares(fx)
    s = prequant_settings(fx)
    model, views = older_model(fx, s)
    tokens, steps = fx.arrays["val_tokens"].numpy(), []
    batches = tg.prequant_batches(s, len(tokens), tg.World())
    fx.equal("rows per batch", [len(b) for b in batches], fx.meta["rows_per_batch"])
    if "first_epoch_row_starts" in fx.arrays:
        want = fx.arrays[
            "first_epoch_row_starts"
        ].flatten()  # a shorter batch may be filled up with -1
        fx.equal("rows", np.concatenate(batches) * s.train_seq_len, want[want >= 0])
    tg.prequant_ttt(s, tg.World(), model, tokens, lambda **step: steps.append(step))
    names = {"loss": "batch_loss", "lr": "batch_lr", "grad_norm": "batch_grad_norm_before_clip"}
    for key, stored in names.items():
        got = np.array([step[key] for step in steps])
        fx.near(stored, got, fx.arrays[stored], stored, rtol=1e-3)
    for name, value in fx.group("after").items():
        fx.near(f"after {name}", views[name], value, "after")
    before = fx.group("param")
    for name in fx.meta["frozen"]:
        fx.equal(f"frozen {name}", views[name], before[name])


def check_shares(fx: Fixture) -> None:
    """The sequences of every rank, whatever their length is."""
    length, count = 32, fx.meta["n_seq"]
    s = fx.settings(TRAIN_SEQ_LEN=length, PREQUANT_TTT_BATCH_SEQS=count)
    for want in fx.meta["ranks"]:
        world = tg.World(want["rank"], len(fx.meta["ranks"]))
        rows = np.concatenate(tg.prequant_batches(s, length * count + 1, world))
        share = np.arange(want["first_sequence"], want["last_sequence_exclusive"])
        fx.equal(f"rows of rank {want['rank']}", rows, share)


def prequant_settings(fx: Fixture) -> tg.Settings:
    """Named in `env`, or, by the system whose batches overlap, in `settings` without their prefix."""
    given = {k: v for k, v in fx.meta.get("env", {}).items() if k.startswith("PREQUANT_")}
    for name, value in fx.meta.get("settings", {}).items():
        given["PREQUANT_TTT_FORM"] = "overlapping"
        given[name.upper().replace("TTT_", "PREQUANT_TTT_")] = value
    known = {field.name.upper(): field for field in dataclasses.fields(tg.Settings)}
    parsed = {k.lower(): tg.parse_setting(known[k], str(v)) for k, v in given.items()}
    return dataclasses.replace(older_settings(fx), prequant_ttt_enabled=True, **parsed)


# --------------------------------------------------------------------------------------------------
# Case operators
# --------------------------------------------------------------------------------------------------
def check_caseops(fx: Fixture) -> None:
    """Text transform, and tokens with their byte counts as the preparation script writes them."""
    try:
        caseops = importlib.import_module("data.caseops")
    except ModuleNotFoundError:
        raise Skip("data/caseops.py is not there yet") from None
    if "rows" in fx.meta:
        return check_caseops_strings(fx, caseops)
    return check_caseops_sidecar(fx)


def check_caseops_strings(fx: Fixture, caseops) -> None:
    for row in fx.meta["rows"]:
        fx.equal(f"encoding of {_short(row['text'])}", caseops.encode(row["text"]), row["encoded"])
        fx.equal(
            f"decoding of {_short(row['encoded'])}", caseops.decode(row["encoded"]), row["text"]
        )
    for row in fx.meta["decode_only"]:
        try:
            got = caseops.decode(row["encoded"])
        except ValueError:
            got = "error"
        want = "error" if row.get("error") else row["decoded"]
        fx.equal(f"decoding of {_short(row['encoded'])}", got, want)


def check_caseops_sidecar(fx: Fixture) -> None:
    """Tokens and bytes of original text per token, for documents and for the shards made of them."""
    tokens = importlib.import_module("data.tokens")
    if not any(hasattr(tokens, name) for name in ("caseops", "original_bytes")):
        raise Skip("data/tokens.py does not count bytes of transformed text yet")
    tokenizer = tokens.Tokenizer((fx.folder / fx.meta["model"]).read_bytes(), "caseops")
    offsets = fx.arrays["offsets"].tolist()
    for k, (document, begin, end) in enumerate(
        zip(fx.meta["docs"], offsets[:-1], offsets[1:], strict=True)
    ):
        ids, nbytes, _ = tokenizer.encode([document["text"]])
        fx.equal(f"document {k} tokens", ids, fx.arrays["tokens"][begin:end])
        fx.equal(f"document {k} bytes", nbytes, fx.arrays["bytes"][begin:end])
        fx.equal(f"document {k} total", int(nbytes.sum()), document["sidecar_total"])


# --------------------------------------------------------------------------------------------------
# Which checker serves which fixture, by the beginning of the folder's name
# --------------------------------------------------------------------------------------------------
def not_yet(fx: Fixture) -> None:
    raise Skip("mechanism not in the trainer yet")


def in_no_system(fx: Fixture) -> None:
    raise Skip("belongs to none of the nine systems, so it is not in the trainer")


CHECKERS = {
    "gpt_forward": check_gpt_forward,
    "bigram_hash": check_tables,
    "value_embedding": check_value_embedding,
    "soft_round_qat": check_soft_round,
    "soft_round_schedule": check_soft_round_schedule,
    "split_lr": check_split_lr,
    "progressive_context": check_progressive_context,
    "leaky_slope": check_leaky,
    "asym_logit_rescale": check_asymmetric_cap,
    "ttt_forward": check_ttt_forward,
    "ttt_masks": check_ttt_masks,
    "ttt_phased_variants": check_ttt_phased_eval,
    "ngram_agreement": check_ngram_agreement,
    "ngram_tilt_token_only": check_ngram_token_only,
    "ngram_corrector": check_corrector,
    "ngram_tilt": in_no_system,
    "eval_tail": check_eval_tail,
    "prequant_ttt": check_prequant,
    "logit_calibration": check_logit_calibration,
    "muon": check_muon,
    "gptq_percentile": check_percentile,
    "legacy_int6": check_percentile,
    "awq_lite": check_awq,
    "lqer_variants": check_lqer_variants,
    "byte_shuffle": check_byte_shuffle,
    "gated_xsa": in_no_system,
    "grad_centralize_label_smooth": in_no_system,
    "gptq": check_gptq,
    "loader": check_loader,
    "coprime_loader": check_coprime,
    "short_doc_chunks": check_chunks,
    "bpb": check_bpb,
    "train_trajectory": check_train_trajectory,
    "ttt_phased_eval": check_ttt_phased_eval,
    "sliding_eval": check_sliding_eval,
    "caseops": check_caseops,
}


def checker_of(fx: Fixture):
    """The checker of the longest name in CHECKERS that begins the folder's name, or the fixture's own."""
    for name in (fx.source.name, str(fx.meta.get("fixture", ""))):
        fitting = [known for known in CHECKERS if name.startswith(known)]
        if fitting:
            return CHECKERS[max(fitting, key=len)]
    return not_yet


def run(fx: Fixture) -> str:
    """Check one fixture; 'ok …', 'FAIL …' or 'skip …'. No exception leaves this function."""
    try:
        if not fx.failures:
            checker_of(fx)(fx)
        if not fx.compared:
            fx.fail("nothing was compared")
    except Skip as reason:
        return f"skip ({reason})"
    except Exception as error:  # noqa: BLE001 - a broken fixture or a broken trainer must not hide the others
        fx.fail(f"{type(error).__name__}: {error}")
    if fx.failures:
        more = f" (and {len(fx.failures) - 1} more)" if len(fx.failures) > 1 else ""
        return f"FAIL {' '.join(fx.failures[0].split())}{more}"
    return f"ok max_err={fx.max_err:.3g}"


def find_fixtures(found: fixtures.FixtureSet, names: list[str]) -> list[Fixture]:
    """All fixtures of a set, or those that one of `names` means."""
    defaults = found.defaults() or dict(pair.split("=") for pair in REFERENCE_DEFAULTS.split())
    wanted = []
    for source in found.folders():
        for stem, text in source.texts.items():
            fx = Fixture(source, stem, {}, defaults)
            if names and not any(
                fnmatch.fnmatch(t, n) for t in (source.name, fx.name) for n in names
            ):
                continue
            try:
                fx.meta = json.loads(text)
            except ValueError as error:
                fx.fail(f"{stem}.json is not JSON: {error}")
            if (
                source.path != found.root or "fixture" in fx.meta
            ):  # facts.json and the like are no fixtures
                wanted.append(fx)
    return wanted


def check_all(found: fixtures.FixtureSet, names: list[str]) -> dict[str, int]:
    """Run the fixtures of a set, print a line each; how many were ok, FAIL and skip."""
    counts, chosen = {"ok": 0, "FAIL": 0, "skip": 0}, find_fixtures(found, names)
    for source, group in itertools.groupby(chosen, lambda fx: fx.source):
        for fx in group:
            verdict = run(fx)
            counts[verdict.split()[0]] += 1
            print(fx.name, verdict, flush=True)
        source.forget()
    print(f"{counts['ok']} passed, {counts['FAIL']} failed, {counts['skip']} skipped")
    return counts


def pack(found: fixtures.FixtureSet, target: Path, step: int) -> None:
    """Pack a plain set: what the checkers read; what they only compared with, by every step-th entry."""
    target.mkdir(parents=True, exist_ok=True)
    fixtures.pack_files(found.root, target / fixtures.FILES)
    for source, group in itertools.groupby(find_fixtures(found, []), lambda fx: fx.source):
        for stem in source.texts:  # all at once, so that no two arrays have had one address
            source.arrays(stem)
        for fx in group:
            print(fx.name, run(fx), flush=True)
        keep = {stem: source.arrays(stem).names for stem in source.texts}
        thin = {stem: source.compared_whole(stem) for stem in source.texts}
        fixtures.pack_folder(source, target / f"{source.name}.xz", keep, thin, step)
        source.forget()


def main(argv: list[str]) -> int:
    torch.set_num_threads(1)
    if argv[:1] == ["--pack"] and len(argv) in (3, 4):
        with fixtures.FixtureSet(Path(argv[1]).absolute()) as found:
            pack(found, Path(argv[2]), int(argv[3]) if argv[3:] else 1)
        return 0
    if argv and argv[0].startswith("-"):
        print(__doc__)
        return 2
    root = Path(os.path.abspath(argv[0])) if argv else PACKED
    with fixtures.FixtureSet(root) as found:
        counts = check_all(found, argv[1:])
    if not sum(counts.values()):
        print(
            f"no fixture in {root}" + (f" matches {argv[1:]}" if argv[1:] else ""), file=sys.stderr
        )
        return 1
    return int(counts["FAIL"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
