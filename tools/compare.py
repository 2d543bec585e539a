"""Is A better than B? Welch's test on two groups of results, in nats and bits per byte.

    python tools/compare.py runs/new_* --vs runs/old_*
    python tools/compare.py runs/new_* --vs pr2135
    python tools/compare.py 1.0571 1.0566 1.0569 --vs pr1855 pr1924
    python tools/compare.py --list

A and B are run folders, record folders, published systems (see --list), or plain
figures in bits per byte. Its first line is the answer. What cannot be compared is
refused: a side of several configurations or scripts, or two sides that differ in
validation text, data, hardware or time budgets; --unlike compares it all the same.

The competition's written rule asks for a gain of at least 0.005 nats at p < 0.01. It is
judged strictly (the tested hypothesis is that the gain is below 0.005) and as many read
it (a mean gain of 0.005, and p < 0.01 of being better at all). The leaderboard's later
practice is one-sided p < 0.25 of being better at all.
Exit status: 0 when the strict rule is met, 1 when it is not, 2 on a mistake.
"""

from __future__ import annotations

import json
import math
import statistics
import sys
from dataclasses import dataclass, field
from pathlib import Path

if __package__ in (None, ""):  # run as a script: make `tools` importable
    sys.path[0] = str(Path(__file__).resolve().parent.parent)

from tools.common import (
    FULL_TEXT,
    UNLIKE_IS_FINE,
    ToolError,
    command_line,
    json_object,
    load_run,
    need,
    published,
    relative,
    run_cli,
    table,
)

RULE_NATS = 0.005  # the gain that the competition's written rule asks for
RULE_P = 0.01
PRACTICE_P = 0.25
DEFAULT_RATIO = 2.18837  # nats per token / bits per byte of CaseOps text (published logs)
MOST_SEEDS = 100
BUDGETS = {"training seconds": "MAX_WALLCLOCK_SECONDS", "evaluation seconds": "EVAL_MAX_SECONDS"}
OF_PUBLISHED = {"hardware": "8 x H100", "training seconds": 600.0, "evaluation seconds": 600.0}
SAME_ON_BOTH_SIDES = ("data", "hardware", *BUDGETS)


@dataclass(frozen=True)
class Result:
    """One finished run: bits per byte, and nats per token where they are known."""

    label: str
    seed: int | None
    bpb: float
    nats: float | None
    text: int | None = None  # bytes of the validation text that was scored
    facts: dict = field(default_factory=dict)  # what else is known of the run


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
    path = folder / "submission.json"
    results = []
    try:
        known = json.loads(path.read_text())
        text = known.get("bytes_scored")
        for seed, scores in known["seed_results"].items():
            label = f"{folder.name}/{seed}"
            bpb, nats = scores["val_bpb"], scores.get("val_loss")
            facts = facts_of(seed_summary(folder, seed), known.get("code_sha256", ""))
            results.append(Result(label, int(seed), bpb, nats, text, facts))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        reason = f"has no readable seed_results ({error})"
        raise ToolError(f"{relative(path)} {reason}") from None
    return results


def seed_summary(folder: Path, seed: str) -> dict:
    """A seed's summary in a record folder; empty where there is none."""
    path = folder / f"summary_seed{seed}.json"
    return (json_object(path.read_bytes()) or {}) if path.is_file() else {}


def facts_of(summary: dict, script: str) -> dict:
    """What a summary knows of a run besides its score. script: its SHA-256."""
    settings = summary.get("settings")
    settings = settings if isinstance(settings, dict) else {}
    facts = {"script": script[:12], "data": summary.get("data_fingerprint"), "settings": settings}
    if device := summary.get("device"):
        kind = "H100" if "H100" in device else device
        facts["hardware"] = f"{summary.get('world_size', 1)} x {kind}"
    for label, key in BUDGETS.items():
        facts[label] = settings.get(key)
    return {key: value for key, value in facts.items() if value not in (None, "", {})}


def system_name(word: str) -> str:
    """The published system that a word names; empty when it names none."""
    name = word.lower().replace("#", "pr")
    return name if name in published() else ""


def run_result(folder: Path) -> Result:
    """The score of one run's folder; one that is NON-COMPLIANT is warned about."""
    run = load_run(folder)
    scores = run.summary
    if "val_bpb" not in scores:
        path = relative(folder / "summary.json")
        raise ToolError(f"{path} has no val_bpb: that run was not scored")
    if not scores.get("compliant", False):
        print(f"warning: {relative(folder)} is NON-COMPLIANT; "
              "the comparison says nothing about a submission", file=sys.stderr)
    text = scores.get("bytes_scored")
    facts = facts_of(scores, run.last("code").get("sha256", ""))
    return Result(run.name, scores["seed"], scores["val_bpb"], scores.get("val_loss"), text, facts)


def figure_result(word: str) -> Result | None:
    """A plain figure in bits per byte; None when the word is no number."""
    try:
        value = float(word)
    except ValueError:
        return None
    if not 0.1 < value < 16:
        raise ToolError(f"{word} is no plausible score: "
                        "bits per byte are expected, between 0.1 and 16")
    return Result(word, None, value, None)


def system_results(name: str) -> list[Result]:
    """The runs of a published system."""
    results = []
    for run in published()[name]["runs"]:
        seed = run["seed"]
        label, facts = f"{name}/{seed}", OF_PUBLISHED
        results.append(Result(label, seed, run["val_bpb"], run.get("val_loss"), facts=facts))
    return results


def read_results(word: str) -> list[Result]:
    """The results that one word of the command line stands for."""
    if name := system_name(word):
        return system_results(name)
    if figure := figure_result(word):
        return [figure]
    folder = Path(word)
    if (folder / "submission.json").is_file():
        return record_results(folder)
    if not folder.is_dir():
        raise ToolError(f"{word} is no folder, no figure and no published system: "
                        f"known are {', '.join(published())}")
    return [run_result(folder)]


def read_group(words: list[str], name: str) -> list[Result]:
    """All results of one side; at least two, since a spread is needed."""
    group: list[Result] = []
    folders: set[Path] = set()
    taken: dict[tuple, Result] = {}
    for word in words:
        system = system_name(word)
        folder = Path(word).resolve()
        if not system and folder.is_dir():
            if folder in folders:
                raise ToolError(f"{name} names {relative(word)} twice: a run counts once")
            folders.add(folder)
        for result in read_results(word):
            # of every system one result a seed: published systems may be put together
            other = taken.setdefault((system, result.seed), result)
            if result.seed is not None and other is not result:
                raise ToolError(
                    f"{name} has seed {result.seed} twice "
                    f"({other.label}, {other.bpb:.8f} BPB, and "
                    f"{result.label}, {result.bpb:.8f}): "
                    "every result needs a seed of its own")
            group.append(result)
    if len(group) < 2:
        raise ToolError(f"{name} has {len(group)} result: "
                        "a spread needs at least 2, and a claim at least 3 seeds")
    return group


def unlike_text(a: list[Result], b: list[Result]) -> str:
    """How the texts differ that A and B scored; published systems scored all of it."""
    left = {r.text for r in a if r.text}
    right = {r.text for r in b if r.text}
    unlike = bool(left and right) and left != right
    partial = any(size < FULL_TEXT for size in left | right)
    if not unlike and not (partial and any(r.text is None for r in a + b)):
        return ""
    return ("the two sides did not score the same validation text "
            f"({sorted(left) or '?'} and {sorted(right) or '?'} bytes)")


def unlike_sides(a: list[Result], b: list[Result]) -> list[str]:
    """In what the two sides differ that a comparison needs to be the same."""
    found = [text] if (text := unlike_text(a, b)) else []
    for name in SAME_ON_BOTH_SIDES:
        left = {r.facts[name] for r in a if name in r.facts}
        right = {r.facts[name] for r in b if name in r.facts}
        if left and right and left != right:
            found.append(f"{name}: {join(left)} and {join(right)}")
    return found


def unlike_within(group: list[Result], name: str) -> list[str]:
    """In what the runs of one side differ that a mean needs to be the same."""
    known = [r for r in group if "settings" in r.facts]
    found = []
    for run in known[1:]:
        first, script = known[0], run.facts.get("script")
        if script and script != first.facts.get("script", script):
            found.append(f"{name}: {first.label} and {run.label} ran different scripts")
        for key, value in run.facts["settings"].items():
            other = first.facts["settings"].get(key, value)
            if value != other and key not in UNLIKE_IS_FINE:
                found.append(f"{name}: {first.label} has {key}={other}, {run.label} has {value}")
    return found


def join(values: set) -> str:
    """Values of a set, in order."""
    return ", ".join(sorted(map(str, values)))


def check_alike(a: list[Result], b: list[Result]) -> None:
    """ToolError where the comparison would mean nothing."""
    within = unlike_within(a, "A") + unlike_within(b, "B")
    if found := within + unlike_sides(a, b):
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ToolError(f"unlike runs: {'; '.join(found[:3])}{more}; sort them "
                        "(python tools/diff.py A B shows all), or --unlike to compare all the same")


def ratio_of(group: list[Result]) -> float | None:
    """Nats per token over bits per byte, where the group knows both."""
    known = [r.nats / r.bpb for r in group if r.nats]
    return statistics.fmean(known) if known else None


def same_tokens(a: list[Result], b: list[Result]) -> bool:
    """All nats are known, and tokens have as many bytes on both sides: nats compare."""
    if any(r.nats is None for r in a + b):
        return False
    return abs(ratio_of(a) / ratio_of(b) - 1) < 1e-3


def welch(a: list[float], b: list[float], required: float) -> Verdict:
    """Welch's one-sided tests that mean(b) - mean(a) exceeds 0, and `required`."""
    stats = need("scipy.stats", "compare")
    if statistics.pvariance(a) == 0 and statistics.pvariance(b) == 0:
        raise ToolError("both sides have no spread at all: "
                        "their seeds are copies of one another")

    def greater(values: list[float]):
        return stats.ttest_ind(values, a, equal_var=False, alternative="greater")

    plain = greater(b)
    shifted = greater([x - required for x in b])
    two_sided = stats.ttest_ind(b, a, equal_var=False)
    interval = two_sided.confidence_interval(0.95)
    return Verdict(
        gain=statistics.fmean(b) - statistics.fmean(a),
        low=float(interval.low),
        high=float(interval.high),
        p=float(plain.pvalue),
        p_rule=float(shifted.pvalue),
        t=float(plain.statistic),
        df=float(plain.df),
    )


def bpb_by_seed(group: list[Result]) -> dict[int, float]:
    """Bits per byte of the results whose seed is known."""
    return {r.seed: r.bpb for r in group if r.seed is not None}


def paired(
    a: list[Result], b: list[Result]
) -> tuple[list[int], float, float, float] | None:
    """(seeds, gain, one-sided p, correlation) on the seeds that both sides have.

    None unless there are two such seeds, each once, and a spread of the differences.
    """
    left, right = bpb_by_seed(a), bpb_by_seed(b)
    seeds = sorted(set(left) & set(right))
    if len(seeds) < 2 or len(left) != len(a) or len(right) != len(b):
        return None
    stats = need("scipy.stats", "compare")
    x = [left[seed] for seed in seeds]
    y = [right[seed] for seed in seeds]
    differences = [right[seed] - left[seed] for seed in seeds]
    if statistics.pvariance(differences) == 0:
        return None
    p = float(stats.ttest_rel(y, x, alternative="greater").pvalue)
    return seeds, statistics.fmean(differences), p, statistics.correlation(x, y)


def seeds_needed(
    a: list[float], b: list[float], required: float, level: float
) -> int | None:
    """Seeds that A would need in all for Welch's p < level.

    Means and spreads are taken to stay, and B gets no more seeds. None when no number
    up to MOST_SEEDS is enough.
    """
    stats = need("scipy.stats", "compare")
    gain = statistics.fmean(b) - statistics.fmean(a) - required
    if gain <= 0:
        return None
    variance_a = statistics.variance(a)
    error_b = statistics.variance(b) / len(b)
    for n in range(2, MOST_SEEDS + 1):
        error_a = variance_a / n
        error = error_a + error_b
        df = error**2 / (error_a**2 / (n - 1) + error_b**2 / (len(b) - 1))
        if stats.t.sf(gain / math.sqrt(error), df) < level:
            return n
    return None


def more_seeds(have: int, needed: int | None) -> str:
    """A sentence about how many more seeds it would take."""
    if needed is None:
        return (f"no number of further seeds (up to {MOST_SEEDS}) would, "
                "at the present means and spreads")
    if needed <= have:
        return "it has enough seeds"
    return (f"{needed - have} more seed(s) of A, {needed} in all, would, "
            "at the present means and spreads")


def analyse(a: list[Result], b: list[Result]) -> dict:
    """Every figure of the comparison.

    Nats are measured where both sides have them for the same tokens, else they are bits
    per byte times B's nats per token over bits per byte.
    """
    measured = same_tokens(a, b)
    ratio = ratio_of(b) or ratio_of(a) or DEFAULT_RATIO
    bpb_a = [r.bpb for r in a]
    bpb_b = [r.bpb for r in b]
    nats_a = [r.nats if measured else r.bpb * ratio for r in a]
    nats_b = [r.nats if measured else r.bpb * ratio for r in b]
    in_nats = welch(nats_a, nats_b, RULE_NATS)
    in_bpb = welch(bpb_a, bpb_b, RULE_NATS / ratio)
    return {
        "bpb": in_bpb,
        "nats": in_nats,
        "measured": measured,
        "ratio": ratio,
        "values": [bpb_a, bpb_b],
        "rule": in_nats.p_rule < RULE_P,
        "mean_rule": in_nats.gain >= RULE_NATS and in_nats.p < RULE_P,
        "practice": in_bpb.p < PRACTICE_P,
        "paired": paired(a, b),
        "need_rule": seeds_needed(nats_a, nats_b, RULE_NATS, RULE_P),
        "need_practice": seeds_needed(bpb_a, bpb_b, 0.0, PRACTICE_P),
    }


def side_row(name: str, group: list[Result]) -> list:
    """One side's row of the first table; mean nats only where every seed has them."""
    scores = [r.bpb for r in group]
    nats = [r.nats for r in group if r.nats is not None]
    mean_nats = f"{statistics.fmean(nats):.8f}" if len(nats) == len(group) else "-"
    return [
        name,
        len(group),
        f"{statistics.fmean(scores):.8f}",
        f"{statistics.stdev(scores):.8f}",
        mean_nats,
        "  ".join(f"{score:.8f}" for score in scores),
    ]


def gain_row(unit: str, v: Verdict) -> list:
    """One unit's row of the second table."""
    return [
        unit,
        f"{v.gain:+.6f}",
        f"{v.low:+.6f} … {v.high:+.6f}",
        f"{v.t:.3f}",
        f"{v.df:.2f}",
        f"{v.p:.3g}",
        f"{v.p_rule:.3g}",
    ]


def describe(a: list[Result], b: list[Result], r: dict) -> str:
    """The comparison as text."""
    lines = [headline(a, b, r), ""]
    head = ["side", "seeds", "mean BPB", "std", "mean nats", "bits per byte by seed"]
    lines += [table(head, [side_row("A", a), side_row("B", b)]), ""]
    head = ["B - A", "gain of A", "95 % interval", "t", "df"]
    head += ["p (gain > 0)", "p (gain > 0.005 nats)"]
    rows = [gain_row("BPB", r["bpb"]), gain_row("nats/token", r["nats"])]
    note = "measured" if r["measured"] else f"bits per byte x {r['ratio']:.5f}"
    lines += [
        table(head, rows),
        f"(nats per token: {note}; 0.005 nats are {RULE_NATS / r['ratio']:.6f} BPB; "
        "one-sided Welch tests)",
    ]
    if r["paired"]:
        seeds, gain, p, correlation = r["paired"]
        lines.append(
            f"paired on the shared seeds {', '.join(map(str, seeds))}: "
            f"gain {gain:+.6f} BPB, p = {p:.3g}, correlation {correlation:+.2f} "
            "(a pair only where both draw the same data and weights)")
    return "\n".join([*lines, "", *verdicts(a, b, r)])


def headline(a: list[Result], b: list[Result], r: dict) -> str:
    """The answer in one sentence."""
    v = r["bpb"]
    within = unlike_within(a, "A") + unlike_within(b, "B")
    unlike = "; ".join([*within[:1], *unlike_sides(a, b)])
    word = "better" if v.gain > 0 else "worse"
    found = f"A is {word} by {abs(v.gain):.4f} BPB, p = {v.p:.2g}"
    if unlike:
        return f"WARNING: {found}, but this comparison means nothing: {unlike}."
    return f"{found}: {judgement(len(a), min(len(a), len(b)), r)}."


def judgement(have: int, fewest: int, r: dict) -> str:
    """What the gain is worth by the written rule, in words. have: seeds of A."""
    if r["bpb"].gain <= 0:
        return "no gain"
    if r["bpb"].p >= 0.25:
        return "no difference is shown"
    if r["nats"].gain < RULE_NATS:
        return f"less than the {RULE_NATS} nats that the record rule asks for"
    if r["rule"]:
        return "the record rule is met" if fewest >= 3 else "enough, but the rules ask for three seeds"
    more = (r["need_rule"] or 0) - have
    if r["need_rule"] is None:
        return "not yet a record, and more seeds of A alone would not make it one"
    return f"not yet a record, {more} more seed{'s' * (more != 1)} of A" if more > 0 else "not yet a record"


def verdicts(a: list[Result], b: list[Result], r: dict) -> list[str]:
    """What the rules say, and what to be careful about."""

    def judged(met: bool, needed: int | None) -> str:
        return "MET" if met else f"not met; {more_seeds(len(a), needed)}"

    strict = judged(r["rule"], r["need_rule"])
    loose = "MET" if r["mean_rule"] else "not met"
    practice = judged(r["practice"], r["need_practice"])
    lines = [
        f"strict rule (p < 0.01 that the gain is >= 0.005 nats):        {strict}",
        f"loose reading (mean gain >= 0.005 nats, p < 0.01 of a gain):  {loose}",
        f"leaderboard practice (p < 0.25 of a gain):                    {practice}",
    ]
    fewest = min(len(a), len(b))
    if fewest < 3:
        lines.append(f"note: {fewest} seeds on one side; the competition asks for 3")
    if 0 < r["bpb"].gain < 0.0005:
        lines.append("note: pods and seeds differ by 0.0003 to 0.001 BPB; "
                     "less than 0.0005 on few seeds is no evidence")
    return lines


def list_published() -> str:
    """The systems that are built in, best first."""
    rows = []
    for name, system in published().items():
        mean = statistics.fmean(run["val_bpb"] for run in system["runs"])
        seeds = len(system["runs"])
        rows.append([name, seeds, f"{mean:.5f}", system["standing"], system["title"]])
    rows.sort(key=lambda row: row[2])
    return table(["name", "seeds", "mean BPB", "standing", "what it is"], rows)


def main(arguments=None) -> int:
    """Command line."""
    parser = command_line(__doc__)
    add = parser.add_argument
    add("a", nargs="*", metavar="A", help="results of the new system")
    add("--vs", nargs="+", metavar="B", default=[], help="what it is compared with")
    add("--unlike", action="store_true", help="compare what cannot be compared, with a warning")
    add("--list", action="store_true", help="show the published systems and stop")
    add("--json", action="store_true", help="print the figures as JSON")
    args = parser.parse_args(arguments)
    if args.list:
        print(list_published())
        return 0
    if not args.a or not args.vs:
        raise ToolError("two sides are needed: "
                        "python tools/compare.py A… --vs B…   (see --help)")
    a, b = read_group(args.a, "A"), read_group(args.vs, "B")
    if not args.unlike:
        check_alike(a, b)
    result = analyse(a, b)
    if args.json:
        verdict = {unit: vars(result[unit]) for unit in ("bpb", "nats")}
        print(json.dumps({**result, **verdict}))
    else:
        print(describe(a, b, result))
    return 0 if result["rule"] else 1


if __name__ == "__main__":
    run_cli(main)
