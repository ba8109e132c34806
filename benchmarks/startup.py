"""How long does the command line take to answer what needs no model: help, the version, a call that is wrong?

The CPU time of a fresh process for each call (user and system, of all its threads), beside that of `python -c pass`
and of the import of PEFT, which a command that trains cannot do without. Rounds go through all calls in turn.

    python benchmarks/startup.py
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys

from rich.console import Console
from rich.table import Table

REDPEFT = ["-m", "redpeft"]
CALLS = {
    "python -c pass": ["-c", "pass"],
    "redpeft --help": [*REDPEFT, "--help"],
    "redpeft train --help": [*REDPEFT, "train", "--help"],
    "redpeft --version": [*REDPEFT, "--version"],
    "redpeft trian": [*REDPEFT, "trian"],
    "redpeft train --nosuch": [*REDPEFT, "train", "--nosuch"],
    "redpeft train --lr 1e-2": [*REDPEFT, "train", "--lr", "1e-2"],
    "redpeft train rows.csv": [*REDPEFT, "train", __file__],  # a file that is no recipe
    "import redpeft": ["-c", "import redpeft"],
    "import peft": ["-c", "import peft"],
}


def cpu_seconds(arguments: list[str]) -> float:
    """CPU seconds of a Python process with these arguments."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run([sys.executable, *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", choices=CALLS, action="append", help="a call; may be given several times")
    parser.add_argument("--json", action="store_true")
    options = parser.parse_args(arguments)
    calls = options.only or list(CALLS)
    seconds: dict[str, list[float]] = {call: [] for call in calls}
    for _ in range(options.rounds):
        for call in calls:
            seconds[call].append(cpu_seconds(CALLS[call]))
    if options.json:
        print(json.dumps(seconds))
        return
    table = Table("call", "CPU seconds, median", "least", "most")
    for call, found in seconds.items():
        table.add_row(call, *(f"{value:.2f}" for value in (statistics.median(found), min(found), max(found))))
    Console().print(table)


if __name__ == "__main__":
    main()
