"""Published data sets: where they are, what is known of them; fetch and check read it."""
from __future__ import annotations

from dataclasses import dataclass

from data.shards import VAL_DOCS

FIELD, CLARK = "willdepueoai/parameter-golf", "kevclark/parameter-golf"
ROMEERP = "romeerp/parameter-golf-caseops-v1"
FOLDERS, MODELS = "datasets/datasets", "datasets/tokenizers"
CASED = "lossless_caps_caseops_v1_reserved"


@dataclass(frozen=True)
class Variant:
    """One published data set, paths inside the hub repository; counts of 0: not known."""
    name: str
    repository: str                 # "" if it was announced but is not on the hub
    folder: str
    tokenizer: str
    vocab: int
    sidecar: bool = False
    val_docs: int = VAL_DOCS
    val_targets: int = 0            # validation tokens but the first
    train_docs: int = 0


VARIANTS = (
    Variant(
        "sp1024", FIELD, f"{FOLDERS}/fineweb10B_sp1024",
        f"{MODELS}/fineweb_1024_bpe.model", 1024, val_targets=62_021_845),
    Variant(
        "sp4096", CLARK, f"{FOLDERS}/fineweb10B_sp4096",
        f"{MODELS}/fineweb_4096_bpe.model", 4096),
    Variant(
        "sp8192", CLARK, f"{FOLDERS}/fineweb10B_sp8192",
        f"{MODELS}/fineweb_8192_bpe.model", 8192),
    Variant(
        "sp8192_caseops", ROMEERP, f"{FOLDERS}/fineweb10B_sp8192_{CASED}",
        f"{MODELS}/fineweb_8192_bpe_{CASED}.model", 8192, sidecar=True,
        val_targets=47_853_343, train_docs=8_181_945),
    Variant("byte260", "", "", "", 260),
)


def by_name(name: str):
    """The variant of that name, or None."""
    return next((v for v in VARIANTS if v.name == name), None)
