"""The front door lists every command that there is, and nothing that there is not."""

import re
import subprocess
import sys

from conftest import ROOT

from tools.__main__ import COMMANDS

# of other tools: no commands of their own
PARTS = {"__init__", "__main__", "common", "gpu_day", "lowering", "page", "pretend"}
LISTED = [command for _, commands in COMMANDS for command, _ in commands]


def run(command):
    """A command as it is typed in the repository."""
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def test_every_tool_is_listed_once_and_every_listed_one_exists():
    files = [word for command in LISTED for word in command.split() if word.endswith((".py", ".sh"))]
    assert not [file for file in files if not (ROOT / file).is_file()]
    tools = {path.stem for path in (ROOT / "tools").glob("*.py")} - PARTS
    listed = {file.split("/")[1][:-3] for file in files if file.startswith("tools/")}
    assert listed == tools - {"doctor", "pod"}      # these two by run.sh, which sets up first
    assert len(set(LISTED)) == len(LISTED)


def test_all_three_doors_open_without_a_package():
    doors = (["./run.sh", "help"], [sys.executable, "-S", "-m", "tools"], [sys.executable, "-S", "tools"])
    said = [run(door).stdout for door in doors]
    assert said[0] == said[1] == said[2]
    assert all(len(line) <= 110 for line in said[0].splitlines())
    assert all(command in said[0] for command in LISTED)
    wrong = run([*doors[1], "comapre"])
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: 'comapre'") and not wrong.stdout


def test_run_sh_names_its_own_commands():
    script = (ROOT / "run.sh").read_text()
    cases = set(re.findall(r"^([a-z]+)\)$", script, re.M)) | {"help"}
    assert cases == {"test", "doctor", "pod", "help"}
    listed = {command.split()[1] for command in LISTED if command.startswith("./run.sh ")} | {"help"}
    assert listed == cases
    wrong = run(["bash", "-c", "VIRTUAL_ENV=x ./run.sh nonsense"])
    assert wrong.returncode == 2 and "one of test, doctor, pod, help" in wrong.stderr


def test_the_readme_leads_to_the_door():
    assert "./run.sh help" in (ROOT / "README.md").read_text()
