"""Every command of README's tables of results, run one after the other, into one file that README can quote.

Usage: python tests/bench.py --all --set=shakespeare.txt=PATH,NEWS=PATH --output=results.md
       python tests/bench.py --list
       python tests/bench.py --only=bench_bpe,bench_loop --minutes=10

A row is what README says, what the command printed last, when, for how long, on what, and under what load. Words such as
TARGET stand for data of one's own: a command with one that --set leaves open is left out by name, and so is one that needs a GPU.
One that takes longer than --minutes is stopped. What is in the file already is not run again. All run in a copy of the house.
"""
import argparse
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from datetime import datetime
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
OPEN = re.compile(r"\b([A-Z]{4,}(?!_)|val\.npy|shakespeare\.txt|isoflops_curves\.json)\b")  # what a reader has to put in
GPU = ("bench_gpu", "kernels.py")


def rows(readme: str) -> list[tuple[str, str]]:
    """Command and subject of each row of the tables below the heading Results; "the same" is not run twice."""
    found = {}
    for line in readme.partition("\n## Results\n")[2].partition("\n## ")[0].splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        for command in re.findall(r"`([^`]+)`", cells[1] if line.startswith("|") and len(cells) > 1 else ""):
            if re.match(r"(time |OMP_NUM_THREADS=\d+ )*python ", command):
                found.setdefault(command, cells[0])
    return [*found.items()]


def filled(command: str, values: dict) -> tuple[str, list[str]]:
    """The command with what --set gives, and the words that it leaves open."""
    for name, value in values.items():
        command = re.sub(rf"(?<![\w/.]){re.escape(name)}\b", lambda found, value=value: value, command)
    given = [*values.values()]
    return command, [word for word in OPEN.findall(command) if word != "OMP_NUM_THREADS" and not any(word in value for value in given)]


def machine() -> str:
    """Processor, cores, versions"""
    names = re.findall(r"model name\s*: (.*)", Path("/proc/cpuinfo").read_text()) if os.path.exists("/proc/cpuinfo") else []
    return f"{(names or [platform.processor()])[0]}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--all", action="store_true")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--only", default="", help="commands that hold one of these (a comma list)")
    parser.add_argument("--set", default="", help="NAME=VALUE, a comma list")
    parser.add_argument("--minutes", type=float, default=60, help="of a command, at most")
    parser.add_argument("--output", default="results.md")
    o = parser.parse_args()
    values = dict(pair.split("=", 1) for pair in o.set.split(",") if pair)
    wanted = [(command, what) for command, what in rows((ROOT / "README.md").read_text())
              if o.all or o.list or any(part in command for part in o.only.split(",") if part)]
    if not wanted:
        parser.error("say --all, --list, or --only=PART of a command")
    before = Path(o.output).read_text() if os.path.exists(o.output) else f"# Results\n{machine()}\n"
    house = Path(tempfile.mkdtemp()) / "house"
    shutil.copytree(ROOT, house, ignore=shutil.ignore_patterns(".git", "out*", "scaling", "__pycache__", ".*cache"))
    for command, what in wanted:
        line, open_words = filled(command, values)
        print(f"{command}\n    {what}")
        if o.list or f"`{command}`" in before:
            continue
        if open_words or not torch.cuda.is_available() and any(part in command for part in GPU):
            print(f"    left out: {', '.join(open_words) or 'no GPU'}")
            continue
        began, load = time.time(), os.getloadavg()[0]
        shell = ["bash", "-c", re.sub(r"(^|time |\d )python ", lambda found: f"{found[1]}{sys.executable} ", line)]
        child = subprocess.Popen(shell, cwd=house, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True)
        stop = threading.Timer(60 * o.minutes, os.killpg, (child.pid, signal.SIGKILL))  # with what it has started
        stop.start()
        said, _ = child.communicate()
        stop.cancel()
        end = f"exit code {child.returncode}" + f", stopped after {o.minutes:g} minutes" * (child.returncode == -signal.SIGKILL)
        last = "\n".join(said.strip().splitlines()[-40:])
        before += (f"\n## {what}\n`{command}`\n\n{datetime.now():%Y-%m-%d %H:%M}, {time.time() - began:.0f} s, load {load:.1f} before, {end}\n\n"
                   f"```\n{last}\n```\n")
        Path(o.output).write_text(before)
        print("    " + json.dumps(last.splitlines()[-1] if last else "")[:150], flush=True)
    shutil.rmtree(house.parent)


if __name__ == "__main__":
    main()
