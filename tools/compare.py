"""Is A better than B? Welch's test on the seeds of two groups of results, in nats and bits per byte.

    python tools/compare.py runs/new_* --vs runs/old_*
    python tools/compare.py runs/new_* --vs pr2135
    python tools/compare.py 1.0571 1.0566 1.0569 --vs pr1855 pr1924
    python tools/compare.py --list

A and B are run folders, record folders, published systems (see --list), or plain figures in bits per byte.
The competition's written rule asks for a gain of at least 0.005 nats at p < 0.01. It is judged strictly (the
tested hypothesis is that the gain is below 0.005) and as many read it (a mean gain of 0.005, and p < 0.01 of
being better at all). The leaderboard's later practice is one-sided p < 0.25 of being better at all.
Exit status: 0 when the strict rule is met, 1 when it is not, 2 on a mistake.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable from anywhere
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import ToolError, command_line, load_run, need, published, relative, run_cli, table

RULE_NATS, RULE_P, PRACTICE_P = 0.005, 0.01, 0.25
DEFAULT_RATIO = 2.18837  # nats per token / bits per byte of CaseOps SP8192 validation text (published logs)
MOST_SEEDS = 100
FULL_TEXT = 100_000_000  # bytes; less than this is not the competition's validation text (50,000 documents)


@dataclass(frozen=True)
class Result:
    """One finished run: bits per byte, and nats per token where they are known."""

    label: str
    seed: int | None
    bpb: float
    nats: float | None
    text: int | None = None  # bytes of the validation text that was scored


@dataclass(frozen=True)
class Verdict:
    """B's mean minus A's mean (positive: A is better), with Welch's test."""

    gain: float
    low: float
    high: float
    p: float
    p_rule: float
    t: float
    df: float


def record_results(folder: Path) -> list[Result]:
    """The seeds of a record folder's submission.json."""
    try:
        known = json.loads((folder / "submission.json").read_text())
        text = known.get("bytes_scored")
        return [Result(f"{folder.name}/{seed}", int(seed), r["val_bpb"], r.get("val_loss"), text)
                for seed, r in known["seed_results"].items()]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise ToolError(
            f"{relative(folder / 'submission.json')} has no readable seed_results ({error})") from None


def system_name(word: str) -> str:
    """The published system that a word of the command line names; empty when it names none."""
    name = word.lower().replace("#", "pr")
    return name if name in published() else ""


def read_results(word: str) -> list[Result]:
    """The results that one word of the command line stands for."""
    if name := system_name(word):
        return [Result(f"{name}/{r['seed']}", r["seed"], r["val_bpb"], r.get("val_loss"))
                for r in published()[name]["runs"]]
    try:
        value = float(word)
    except ValueError:
        value = None
    if value is not None:
        if not 0.1 < value < 16:
            raise ToolError(f"{word} is no plausible score: bits per byte are expected, between 0.1 and 16")
        return [Result(word, None, value, None)]
    folder = Path(word)
    if (folder / "submission.json").is_file():
        return record_results(folder)
    if not folder.is_dir():
        raise ToolError(
            f"{word} is no folder, no figure and no published system: known are {', '.join(published())}")
    run = load_run(folder)
    if "val_bpb" not in run.summary:
        raise ToolError(f"{relative(folder / 'summary.json')} has no val_bpb: that run was not scored")
    if not run.summary.get("compliant", False):
        print(f"warning: {relative(folder)} is NON-COMPLIANT; the comparison says nothing about a submission",
              file=sys.stderr)
    return [Result(run.name, run.summary["seed"], run.summary["val_bpb"], run.summary.get("val_loss"),
                   run.summary.get("bytes_scored"))]


def read_group(words: list[str], name: str) -> list[Result]:
    """All results of one side; at least two, since a spread is needed."""
    group: list[Result] = []
    folders, taken = set(), {}
    for word in words:
        system = system_name(word)
        if not system and Path(word).is_dir():
            if Path(word).resolve() in folders:
                raise ToolError(f"{name} names {relative(word)} twice: a run counts once")
            folders.add(Path(word).resolve())
        for r in read_results(word):
            other = taken.setdefault((system, r.seed), r)      # published systems may be put together
            if r.seed is not None and other is not r:
                raise ToolError(f"{name} has seed {r.seed} twice ({other.label}, {other.bpb:.8f} BPB, and "
                                f"{r.label}, {r.bpb:.8f}): every result needs a seed of its own")
            group.append(r)
    if len(group) < 2:
        raise ToolError(
            f"{name} has {len(group)} result: a spread needs at least 2, and a claim at least 3 seeds")
    return group


def text_warning(a: list[Result], b: list[Result]) -> str:
    """A line when the two sides did not score the same text; published systems scored all of it."""
    sizes = [{r.text for r in side if r.text} for side in (a, b)]
    small = [s for s in (*sizes[0], *sizes[1]) if s < FULL_TEXT]
    if (sizes[0] and sizes[1] and sizes[0] != sizes[1]) or (small and any(r.text is None for r in a + b)):
        return (
            f"WARNING: the two sides did not score the same validation text ({sorted(sizes[0]) or '?'} and "
            f"{sorted(sizes[1]) or '?'} bytes): this comparison means nothing")
    return ""


def ratio_of(group: list[Result]) -> float | None:
    """Nats per token over bits per byte, where the group knows both."""
    known = [r.nats / r.bpb for r in group if r.nats]
    return statistics.fmean(known) if known else None


def same_tokens(a: list[Result], b: list[Result]) -> bool:
    """Both sides know their nats, and a token has as many bytes on both: nats compare directly."""
    if any(r.nats is None for r in a + b):
        return False
    return abs(ratio_of(a) / ratio_of(b) - 1) < 1e-3


def welch(a: list[float], b: list[float], required: float) -> Verdict:
    """Welch's one-sided tests that mean(b) - mean(a) exceeds 0, and `required`; 95 % interval."""
    stats = need("scipy.stats", "compare")
    if statistics.pvariance(a) == 0 and statistics.pvariance(b) == 0:
        raise ToolError("both sides have no spread at all: their seeds are copies of one another")
    plain = stats.ttest_ind(b, a, equal_var=False, alternative="greater")
    shifted = stats.ttest_ind([x - required for x in b], a, equal_var=False, alternative="greater")
    interval = stats.ttest_ind(b, a, equal_var=False).confidence_interval(0.95)
    return Verdict(statistics.fmean(b) - statistics.fmean(a), float(interval.low), float(interval.high),
                   float(plain.pvalue), float(shifted.pvalue), float(plain.statistic), float(plain.df))


def paired(a: list[Result], b: list[Result]) -> tuple[list[int], float, float, float] | None:
    """(seeds, gain, one-sided p, correlation) on the two or more seeds that both sides have, each once."""
    left, right = ({r.seed: r.bpb for r in side if r.seed is not None} for side in (a, b))
    seeds = sorted(set(left) & set(right))
    if len(seeds) < 2 or len(left) != len(a) or len(right) != len(b):
        return None
    stats, x, y = need("scipy.stats", "compare"), [left[s] for s in seeds], [right[s] for s in seeds]
    differences = [q - p for p, q in zip(x, y, strict=False)]
    if statistics.pvariance(differences) == 0:
        return None
    p = float(stats.ttest_rel(y, x, alternative="greater").pvalue)
    return seeds, statistics.fmean(differences), p, statistics.correlation(x, y)


def seeds_needed(a: list[float], b: list[float], required: float, level: float) -> int | None:
    """Seeds that A would need in all for Welch's p < level, if means and spreads stay as they are and B gets
    no more; None when no number up to MOST_SEEDS is enough."""
    stats, gain = need("scipy.stats", "compare"), statistics.fmean(b) - statistics.fmean(a) - required
    va, vb = statistics.variance(a), statistics.variance(b) / len(b)
    if gain <= 0:
        return None
    for n in range(2, MOST_SEEDS + 1):
        error = va / n + vb
        df = error**2 / ((va / n) ** 2 / (n - 1) + vb**2 / (len(b) - 1))
        if stats.t.sf(gain / math.sqrt(error), df) < level:
            return n
    return None


def more_seeds(have: int, needed: int | None) -> str:
    """A sentence about how many more seeds it would take."""
    if needed is None:
        return f"no number of further seeds (up to {MOST_SEEDS}) would, at the present means and spreads"
    return (
        "it has enough seeds"
        if needed <= have
        else (f"{needed - have} more seed(s) of A, {needed} in all, would, at the present means and spreads")
    )


def analyse(a: list[Result], b: list[Result]) -> dict:
    """Every figure of the comparison. Nats are measured where both sides have them for the same tokens, else
    they are bits per byte times B's nats per token over bits per byte."""
    measured = same_tokens(a, b)
    ratio = ratio_of(b) or ratio_of(a) or DEFAULT_RATIO
    bpb = [[r.bpb for r in side] for side in (a, b)]
    nats = ([[r.nats for r in side] for side in (a, b)] if measured
            else [[x * ratio for x in side] for side in bpb])
    in_nats, in_bpb = welch(*nats, RULE_NATS), welch(*bpb, RULE_NATS / ratio)
    return {"bpb": in_bpb, "nats": in_nats, "measured": measured, "ratio": ratio, "values": bpb,
            "rule": in_nats.p_rule < RULE_P, "mean_rule": in_nats.gain >= RULE_NATS and in_nats.p < RULE_P,
            "practice": in_bpb.p < PRACTICE_P, "paired": paired(a, b),
            "need_rule": seeds_needed(*nats, RULE_NATS, RULE_P),
            "need_practice": seeds_needed(*bpb, 0.0, PRACTICE_P)}


def describe(a: list[Result], b: list[Result], r: dict) -> str:
    """The comparison as text."""

    def side(name, group):
        x = [g.bpb for g in group]
        n = [g.nats for g in group if g.nats is not None]
        return [name, len(x), f"{statistics.fmean(x):.8f}", f"{statistics.stdev(x):.8f}",
                f"{statistics.fmean(n):.8f}" if len(n) == len(x) else "-", "  ".join(f"{v:.8f}" for v in x)]

    def unit(name, v, digits):
        return [name, f"{v.gain:+.{digits}f}", f"{v.low:+.{digits}f} … {v.high:+.{digits}f}", f"{v.t:.3f}",
                f"{v.df:.2f}", f"{v.p:.3g}", f"{v.p_rule:.3g}"]

    note = "measured" if r["measured"] else f"bits per byte x {r['ratio']:.5f}"
    lines = [
        table(
            ["side", "seeds", "mean BPB", "std", "mean nats", "bits per byte by seed"],
            [side("A", a), side("B", b)],
        ),
        "",
        table(
            ["B - A", "gain of A", "95 % interval", "t", "df", "p (gain > 0)", "p (gain > 0.005 nats)"],
            [unit("BPB", r["bpb"], 6), unit("nats/token", r["nats"], 6)],
        ),
        f"(nats per token: {note}; 0.005 nats are {RULE_NATS / r['ratio']:.6f} BPB; one-sided Welch tests)",
    ]
    if r["paired"]:
        seeds, gain, p, correlation = r["paired"]
        lines += [
            f"paired on the shared seeds {', '.join(map(str, seeds))}: gain {gain:+.6f} BPB, p = {p:.3g}, "
            f"correlation {correlation:+.2f} (a pair only where both draw the same data and weights)"]
    warning = [text_warning(a, b), ""] if text_warning(a, b) else []
    return "\n".join([*warning, *lines, "", *verdicts(a, b, r)])


def verdicts(a: list[Result], b: list[Result], r: dict) -> list[str]:
    """What the rules say, and what to be careful about."""
    small = min(len(a), len(b))
    met = {True: "MET", False: "not met"}
    lines = [f"strict rule (p < 0.01 that the gain is >= 0.005 nats):        {met[r['rule']]}"
             + ("" if r["rule"] else f"; {more_seeds(len(a), r['need_rule'])}"),
             f"loose reading (mean gain >= 0.005 nats, p < 0.01 of a gain):  {met[r['mean_rule']]}",
             f"leaderboard practice (p < 0.25 of a gain):                    {met[r['practice']]}"
             + ("" if r["practice"] else f"; {more_seeds(len(a), r['need_practice'])}")]
    if small < 3:
        lines.append(f"note: {small} seeds on one side; the competition asks for 3")
    if 0 < r["bpb"].gain < 0.0005:
        lines.append(
            "note: pods and seeds differ by 0.0003 to 0.001 BPB; less than 0.0005 on few seeds is no evidence"
        )
    return lines


def list_published() -> str:
    """The systems that are built in."""
    rows = [[name, len(s["runs"]), f"{statistics.fmean(r['val_bpb'] for r in s['runs']):.5f}", s["standing"],
             s["title"]] for name, s in published().items()]
    return table(["name", "seeds", "mean BPB", "standing", "what it is"],
                 sorted(rows, key=lambda row: row[2]))


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    parser.add_argument("a", nargs="*", metavar="A", help="results of the new system")
    parser.add_argument("--vs", nargs="+", metavar="B", default=[], help="results it is compared with")
    parser.add_argument("--list", action="store_true", help="show the published systems and stop")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(arguments)
    if args.list:
        print(list_published())
        return 0
    if not args.a or not args.vs:
        raise ToolError("two sides are needed: python tools/compare.py A… --vs B…   (see --help)")
    a, b = read_group(args.a, "A"), read_group(args.vs, "B")
    result = analyse(a, b)
    if args.json:
        print(json.dumps({**result, "bpb": vars(result["bpb"]), "nats": vars(result["nats"])}))
    else:
        print(describe(a, b, result))
    return 0 if result["rule"] else 1


if __name__ == "__main__":
    run_cli(main)
