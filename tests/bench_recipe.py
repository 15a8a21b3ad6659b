"""Studies of train.py: sets of options, each with some seeds, beside each other in one table.

Usage: python tests/bench_recipe.py STUDY [--data=FOLDER] [--seeds=3] [--threads=2] [--only=LABEL] [-- more words]

optimizers  each optimizer of hidden matrices at equal tokens, over a sweep of its learning rate
tokens      tokens after which our default, with tables of n-grams and without, has the loss that a GPT-2 shape of as many
            parameters with AdamW ends with, at the best of three rates
ablations   the default without each of its ingredients, after the same steps (or, with `-- --minutes=2`, the same minutes)
dial        budgets of 1, 2, 5, 10 minutes, and the same in FLOPs
knee        steps to one loss by batch size, the critical batch that fits them, and the noise scale that train.py measures
tokenizer   kinds of tokenizer and sizes of the vocabulary at equal FLOPs, each from the text (--data is not used)
patches     bytes, patches of them (tests/patches.py) and BPE at equal FLOPs, likewise; 128 patches or tokens to a block

A run is `python train.py` in a process of its own; a row gives median, lowest and highest of the seeds' last records.
Without --data the token files of the default corpus are made once, in a temporary folder. Runs are taken in turns over
the seeds, so that a slow minute of the machine does not meet one row alone. Losses do not depend on the machine's speed
where the budget is in tokens; where it is in minutes, leave the machine alone.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
GPT2 = "--norm=layernorm --position=learned --ffn=gelu --qk_norm=False --bias=True --tie_embeddings=True --init=gpt2 " \
       "--optimizer=adamw --schedule=cosine --warmup_iters=40"
RATES = {"muon": (0.005, 0.01, 0.02), "soap": (0.0025, 0.005, 0.01), "adamw": (0.0025, 0.005, 0.01)}
STUDIES = {
    "optimizers": {f"{name} {rate}": f"--optimizer={name} --learning_rate={rate}"
                   for name, rates in RATES.items() for rate in rates},
    "tokens": {"default": "", "without tables": "--ngram=0",
               **{f"gpt2 {rate}": f"{GPT2} --learning_rate={rate} --ngram=0 --n_embd=96 --n_head=2" for rate in (0.0005, 0.001, 0.002)}},
    "ablations": {
        "default": "",
        "adamw": "--optimizer=adamw",
        "soap": "--optimizer=soap",
        "without tables": "--ngram=0",
        "swiglu": "--ffn=swiglu",
        "gelu": "--ffn=gelu",
        "relu": "--ffn=relu",
        "without QK-norm": "--qk_norm=False",
        "tied": "--tie_embeddings=True",
        "gpt2's start": "--init=gpt2",
        "cosine": "--schedule=cosine",
        "without decay": "--weight_decay=0",
        "without clipping": "--grad_clip=0",
        "learned positions": "--position=learned",
        "value embeddings": "--mixer=attention,valued",
        "scaled residuals": "--residual=scaled",
        "soft-cap": "--softcap=15",
    },
    "dial": {f"{minutes} min": f"--minutes={minutes}" for minutes in (1, 2, 5, 10)},
    # the rate follows the root of the batch, and stays; each run is long enough for the loss of the others
    "knee": {f"batch {rows}": f"--batch_size={rows} --max_iters={steps} --learning_rate={0.005 * (rows / 8)**0.5:.3g} --noise_scale "
                              f"--schedule=constant --warmup_iters=20 --eval_interval={steps // 25} --eval_tokens=32768"
             for rows, steps in ((2, 2000), (4, 1100), (8, 600), (16, 400), (32, 260), (64, 180), (128, 125), (256, 100))},
    "tokenizer": {name: f"--flops=1e12 --ngram=0 {words}" for name, words in (
        ("bytes", "--tokenizer=byte"), ("characters", "--tokenizer=char"),
        *((f"BPE {size:,}", f"--vocab_size={size}") for size in (512, 1024, 2048, 4096, 8192, 16384)))},
    "patches": {name: f"--flops=1e12 --ngram=0 {words}" for name, words in (
        ("bytes", "--tokenizer=byte"), ("bytes, blocks of 512", "--tokenizer=byte --block_size=512"),
        *((f"patches of {P} bytes", f"--patch={P} --tokenizer=byte --block_size={128 * P}") for P in (2, 4, 8)),
        ("BPE 2,048", "--vocab_size=2048"))},
}
FROM_TEXT = ("tokenizer", "patches")


def records(folder):
    """Those of a run's log, without the first, which is about the run."""
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()][1:]


def spread(values):
    """Median, and the range where there are several."""
    text = f"{statistics.median(values):.4f}"
    return text if len(values) == 1 else f"{text} ({min(values):.4f} to {max(values):.4f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--data", default="")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--only", default="", help="rows whose label begins with one of these (a comma list)")
    cut = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)  # what follows are words for every run
    o, more = parser.parse_args(sys.argv[1:cut]), sys.argv[cut + 1:]
    wanted = tuple(o.only.split(","))
    rows = {label: words for label, words in STUDIES[o.study].items() if label.startswith(wanted)}
    found = {label: [] for label in rows}
    with tempfile.TemporaryDirectory() as folder:
        data = "" if o.study in FROM_TEXT else o.data or f"{folder}/data"
        if data and not o.data:
            subprocess.run([sys.executable, ROOT / "data.py", f"--output={data}", "--vocab_size=2048", "--pattern=code"], check=True)
        for seed in range(o.seeds):
            for label, words in rows.items():
                run = Path(folder) / f"{label} {seed}"
                script = "tests/patches.py" if "--patch=" in words else "train.py"
                command = [sys.executable, ROOT / script, f"--data={data}", f"--output={run}", f"--seed={seed}", "--sample_tokens=0", *words.split(), *more]
                done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": str(o.threads)})
                if done.returncode:
                    print(f"{label}, seed {seed}: {done.stderr.strip()}", flush=True)
                    continue
                found[label].append(records(run))
                last = found[label][-1][-1]
                print(f"{label:20} seed {seed}: {last['step']:6} steps, {last['tokens']:11,} tokens, {last['flops']:.3g} FLOPs, {last['seconds']:6.1f} s, "
                      f"loss {last['val_loss']:.4f}, {last['bpb']:.4f} bits a byte", flush=True)
    print(f"\n| {o.study} | bits a byte: median and range of {o.seeds} seeds | seconds | tokens | FLOPs |\n|---|---|---|---|---|")
    for label, runs in found.items():
        if runs:
            last = [run[-1] for run in runs]
            noise = f", noise scale {statistics.median(one['noise_scale'] for one in last):,.0f}" if "noise_scale" in last[0] else ""
            print(f"| {label}{noise} | {spread([one['bpb'] for one in last])} | {statistics.median(one['seconds'] for one in last):.0f} "
                  f"| {statistics.median(one['tokens'] for one in last):,.0f} | {statistics.median(one['flops'] for one in last):.3g} |")
    if o.study in ("tokens", "knee"):  # when does each run reach a loss that all reach, or the best of GPT-2's?
        ends = {label: statistics.median(run[-1]["val_loss"] for run in runs) for label, runs in found.items() if runs}
        goal = max(ends.values()) if o.study == "knee" else min(loss for label, loss in ends.items() if label.startswith("gpt2"))
        needed = {}
        for label, runs in found.items():
            reached = [next(((one["step"], one["tokens"]) for one in run if one["val_loss"] <= goal), (float("inf"),) * 2) for run in runs]
            if reached and np.isfinite(reached).all():
                needed[label] = statistics.median(steps for steps, _ in reached), statistics.median(tokens for _, tokens in reached)
                print(f"{label}: {needed[label][0]:,.0f} steps, {needed[label][1]:,.0f} tokens to {goal:.4f} nats")
        if o.study == "knee":  # steps = least (1 + critical / batch), McCandlish et al. 2018, in tokens
            steps, tokens = np.array(list(needed.values())).T
            slope, least = np.polyfit(steps / tokens, steps, 1, w=1 / steps)
            print(f"at least {least:,.0f} steps and {slope:,.0f} tokens; critical batch {slope / least:,.0f} tokens")


if __name__ == "__main__":
    main()
