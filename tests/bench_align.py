"""How many demonstrations does fine-tuning need? The demonstration's base model after 10, 100, 1,000 and all of them.

Usage: python tests/bench_align.py ALIGNED [--seeds=3]      (the folder that `python align.py` wrote)

Each row is `python align.py --algorithm=sft` as in the demonstration, on the first rows of demonstrations.jsonl, another part of
them for each seed, for the same number of steps. Then the 300 held-out sums are graded: strict, and lenient about the form.
"""
import argparse
import os
import re
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HOW = "--template=bare --max_new_tokens=20 --verifier=gsm8k"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=lambda name: Path(name).resolve() / "sums-0")
    parser.add_argument("--seeds", type=int, default=3)
    o = parser.parse_args()
    rows = (o.folder / "demonstrations.jsonl").read_text().splitlines(keepends=True)

    def run(*words):
        command = [sys.executable, ROOT / "align.py", *HOW.split(), *words]
        done = subprocess.run(command, capture_output=True, text=True, env={"OMP_NUM_THREADS": "1", **os.environ})
        assert done.returncode == 0, done.stderr
        return done.stdout

    print("| demonstrations | held-out sums right, strict | lenient |\n|---|---|---|")
    for n in (10, 100, 1000, len(rows)):
        found = []
        for seed in range(o.seeds):
            with tempfile.TemporaryDirectory() as folder:
                first = seed * n % len(rows)
                (Path(folder) / "some.jsonl").write_text("".join((rows + rows)[first:first + n]))
                run("--algorithm=sft", "--optimizer=muon", "--learning_rate=0.003", "--max_iters=150", f"--data={folder}/some.jsonl",
                    f"--ckpt={o.folder}/base/ckpt.pt", f"--output={folder}/sft", f"--seed={seed}")
                said = run("--eval=verify", f"--ckpt={folder}/sft/ckpt.pt", f"--data={o.folder}/test.jsonl")
                found.append([100 * float(share) for share in re.findall(r"(?:strict|lenient) +([\d.]+)", said)])
        spread = [f"{statistics.median(part):.1f}% ({min(part):.1f} to {max(part):.1f})" for part in zip(*found)]
        print(f"| {n:,} | {' | '.join(spread)} |", flush=True)


if __name__ == "__main__":
    main()
