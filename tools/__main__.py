"""The front door: every command of this repository, a line each.

    ./run.sh help
    python -m tools
"""

import sys

# (heading, [(command, what it does)]). A command is the shortest useful one; all have --help.
COMMANDS = (
    ("Run", (
        ("./run.sh", "set up, then train, shrink and score"),
        ("./run.sh test [quick]", "set up, then test everything"),
        ("./run.sh doctor", "is this machine fit? what to mend"),
        ("./run.sh pod --name NAME", "from a rented machine to a packed record; --plan, --rehearse"),
        ("python train_gpt.py --help", "every setting; --check judges what is set"),
    )),
    ("Understand runs", (
        ("python tools/report.py RUN…", "one page: scores, curves, times, bytes; opens offline"),
        ("python tools/compare.py A… --vs B…", "is A better than B? Welch's test and the record's rule"),
        ("python tools/diff.py A B", "what differs between two runs or two configurations"),
        ("python tools/audit.py RUN", "were the rules kept? probes the artifact with its script"),
    )),
    ("Hand runs on", (
        ("python tools/make_record.py RUN… --name NAME", "the folder to submit, or the reason why not"),
        ("python tools/export.py RUN --tensorboard DIR", "curves to TensorBoard, W&B; artifact to a hub"),
    )),
    ("Find what is better", (
        ("python tools/sweep.py SPACE --trials 20", "which settings are best? on one machine or many"),
        ("python tools/ablate.py OUT --seeds 1 2 3", "what each mechanism is worth"),
        ("python tools/ablate.py OUT --artifact FILE", "which way of adapting, on one trained artifact"),
    )),
    ("Look at speed and figures", (
        ("python tools/bench.py", "are the fast roads fast? --gpu: all that waits for one"),
        ("python tools/account.py", "a step on an H100, counted without one"),
        ("python tools/plots.py", "the pictures of docs/, from the CSV files beside them"),
    )),
    ("Data", (
        ("python data/fetch.py sp8192_caseops", "the published shards"),
        ("python data/build.py my_texts --out data/mine", "shards of your own text"),
        ("python data/check.py DIR", "is every byte accounted for?"),
        ("python data/demo.py", "a small corpus for the demo"),
    )),
)


def main() -> int:
    """Print the list."""
    if sys.argv[1:] not in ([], ["-h"], ["--help"]):
        print(f"error: {sys.argv[1]!r} is not asked for here: python -m tools lists the commands, "
              "each has its own --help", file=sys.stderr)
        return 2
    width = max(len(command) for _, commands in COMMANDS for command, _ in commands)
    for heading, commands in COMMANDS:
        print(f"{heading}:")
        for command, what in commands:
            print(f"  {command:{width}}  {what}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
