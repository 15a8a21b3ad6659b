"""Small experiments in; a recipe, and a prediction with its uncertainty, out: scaling laws on runs of train.py.

Reads: token files; past runs from .jsonl, .json or .csv: parameters N, tokens D or FLOPs C, and loss.
Writes: OUTPUT/runs.jsonl (one row a run), fit.json, recipe.json, report.md; prediction.json with --preregister.
Usage: python scaling.py
       python scaling.py --fit=runs.csv --predict=1e23
References: Kaplan et al. 2020; Hoffmann et al. 2022 (Chinchilla); Besiroglu et al. 2024 (its third fit redone).
"""
import argparse
import csv
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import inspect
import itertools
import json
import math
import os
import re
import shlex
import subprocess
import sys
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Callable

import numpy as np

import model
from model import Config, replacing, require


@dataclasses.dataclass
class Options:
    output: str = "scaling"  # folder of the study
    data: str = ""  # folder of token files for the runs (empty: made of the standard library's text)
    budgets: str = "1e11..3e12:5"  # FLOPs of a run: a comma list, or from..to:how many
    sizes: int = 5  # runs at a budget, of different sizes; more where the best is not between two others
    n_seeds: int = 2  # runs of the best size at each budget
    batch_size: int = 4  # sequences of a step
    block_size: int = 256  # context in tokens
    learning_rate: float = 0.01  # of all runs
    total: float = 1e14  # FLOPs that the study may spend, at most
    workers: int = 1  # runs at a time
    launch: str = "{command}"  # how a run is started, such as "srun -c 2 {command}"
    plan: bool = False  # print the runs and their price, start none
    fit: str = ""  # fit this table of past runs instead of running a study
    predict: float = 0.0  # FLOPs of a run: print its size, tokens and loss
    inference_tokens: float = 0.0  # tokens that the model will serve, which favours smaller models
    preregister: bool = False  # write the prediction for --predict, with hash and time, before the run
    check: str = ""  # folder of a run: compare its loss with the preregistered prediction
    resamples: int = 500  # bootstrap samples behind each interval
    seed: int = 0  # of the bootstrap


# ---- tables of runs

NAMES = {
    "N": ("N", "parameters", "params"),
    "D": ("D", "tokens"),
    "C": ("C", "flops", "compute_budget", "compute"),
    "loss": ("loss", "final_loss", "val_loss"),
}


def rows_of(path: Path) -> list[dict]:
    """The rows of a .csv, .json or .jsonl file. Raises OSError, or ValueError where it is something else."""
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".csv":
        return list(csv.DictReader(text.splitlines()))
    if path.suffix == ".jsonl":  # the last line may have been cut short by a kill
        text = f"[{','.join(line for line in text.splitlines() if line.endswith('}'))}]"
    rows = json.loads(text)
    require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), f"{path} is no table of runs")
    return rows


def read_runs(path: Path) -> np.ndarray:
    """Runs as the rows N, D, C, loss of an array (4, n); where D or C is missing it follows from C = 6 N D.

    N counts parameters in matrix products, D tokens, C FLOPs; loss is in nats a token. Raises ValueError for bad
    numbers.
    """
    table = set()
    for i, row in enumerate(rows_of(path)):
        run = {key: float(row[name]) for key, names in NAMES.items() for name in names if row.get(name)}
        require({"N", "loss"} < run.keys(), f"{path}: run {i} needs N, loss, and D or C; it has {', '.join(row)}")
        D = run.get("C", 0) / 6 / (run["N"] or math.nan)
        C = 6 * run["N"] * run.get("D", 0)
        run = {"D": D, "C": C, **run}
        require(all(0 < value < math.inf for value in run.values()), f"{path}: run {i}: {run} must all be above 0")
        table.add(tuple(run[key] for key in NAMES))
    require(len(table) >= 5, f"{path} holds {len(table)} different runs, a fit needs 5 or more")
    runs = np.array(sorted(table)).T
    require(np.median(runs[0]) >= 1e3, f"{path}: the median N is {np.median(runs[0]):g}; is it in millions?")
    return runs


# ---- least squares

def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2, but a straight line beyond delta, so that outliers pull less (Huber 1964)."""
    size = np.abs(r)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


@np.errstate(all="ignore")  # a step too far may overflow; it is taken back
def minimise(residual: Callable, starts: np.ndarray, weights: np.ndarray, delta: float = math.inf,
             steps: int = 300) -> np.ndarray:
    """From each start (S, P), the parameters where the sum of weights * huber(residual) is least; the best one first.

    Damped Gauss-Newton (Levenberg 1944, Marquardt 1963), all starts at once. `residual` takes p (S, P) to (S, n), also
    for complex p: a step of 1e-30 i has the exact derivative as its imaginary part (Squire and Trapp 1998). `weights`
    is (n,), or (S, n) with other weights for each start; then the order of the starts is kept.
    """
    def cost(p):
        return (weights * huber(residual(p), delta)).sum(1)

    p, now = starts, cost(starts)
    damping = np.full((len(p), 1, 1), 1e-3)
    eye = np.eye(p.shape[1])
    for _ in range(steps):
        r = residual(p)
        slopes = np.stack([residual(p + 1e-30j * axis).imag / 1e-30 for axis in eye], 2)  # (S, n, P)
        pull = weights * np.minimum(1, delta / np.abs(r))  # of the parabola that touches huber where r is
        hessian = np.einsum("snp,sn,snq->spq", slopes, pull, slopes)
        hessian += (damping * hessian + 1e-30) * eye
        gradient = np.einsum("snp,sn->sp", slopes, pull * r)
        trial = p - np.linalg.solve(hessian, gradient[:, :, None])[:, :, 0]
        then = cost(trial)
        better = then < now
        done = np.where(better, now - then <= 1e-13 * now, damping[:, 0, 0] > 1e6)
        if done.all():
            break
        p = np.where(better[:, None], trial, p)
        now = np.where(better, then, now)
        damping = damping * np.where(better, 0.2, 3)[:, None, None]
        damping = damping.clip(1e-12, 1e12)
    return p[np.argsort(now)] if weights.ndim == 1 else p


def resampled(residual: Callable, starts: np.ndarray, n: int, o: Options, delta: float = math.inf) -> np.ndarray:
    """The best fit to n runs in row 0, then o.resamples fits to other weights of the runs (Rubin 1981), (S, P).

    Weights are exponential with mean 1, as in the Bayesian bootstrap, so that no run is ever left out.
    """
    best = minimise(residual, starts, np.ones(n), delta)[:1]
    weights = np.random.default_rng(o.seed).exponential(size=(o.resamples, n))
    others = minimise(residual, best.repeat(o.resamples, 0), weights, delta, steps=60)
    return np.concatenate((best, others))


def summarise(found: dict[str, np.ndarray]) -> dict[str, list[float]]:
    """Each quantity (S,) as [value of the fit, low, high]: the middle 90% of the other rows."""
    return {
        name: [float(x[0]), *np.quantile(x[1:], (0.05, 0.95)).tolist()]
        for name, x in found.items()
    }


# ---- the laws

class Chinchilla:
    """Hoffmann et al. 2022, third approach: L(N, D) = E + A / N^alpha + B / D^beta, Huber loss on logarithms."""

    def __init__(self, runs: np.ndarray, o: Options):
        n, d, _, y = np.log(runs)
        self.k = np.exp(np.median(np.log(runs[2]) - n - d))  # FLOPs for each parameter and token, about 6
        self.inference = o.inference_tokens

        def residual(p):
            a, alpha, b, beta, e = p.T[:, :, None]
            loss = np.exp(a - alpha * n) + np.exp(b - beta * d) + np.exp(e)
            return np.log(loss) - y

        starts = []  # small, middling and large exponents; a third to nine tenths of the least loss in E
        small_to_large = (0.2, 0.4, 0.8)
        for alpha, beta, share in itertools.product(small_to_large, small_to_large, (0.3, 0.6, 0.9)):
            rest = math.log((1 - share) / 2)
            rest += y.mean()
            a = rest + alpha * n.mean()
            b = rest + beta * d.mean()
            starts.append((a, alpha, b, beta, math.log(share) + y.min()))
        self.p = resampled(residual, np.array(starts), len(n), o, 1e-3)
        sigma = residual(self.p[:1]).std()
        sigma *= math.sqrt(len(n) / max(1, len(n) - 5))  # five of the degrees of freedom are the law's
        normal = np.random.default_rng(o.seed).normal(size=len(self.p))
        self.noise = np.exp(sigma * normal)  # of one run
        self.noise[0] = 1

    def constants(self) -> dict:
        """The constants; N grows as C^N_exponent, D as C^D_exponent (closed form of the optimum)."""
        a, alpha, b, beta, e = self.p.T
        share = beta / (alpha + beta)
        return summarise(dict(
            A=np.exp(a), alpha=alpha, B=np.exp(b), beta=beta, E=np.exp(e),
            N_exponent=share,
            D_exponent=1 - share,
        ))

    def predict(self, C: float) -> dict:
        """N, D, loss where C FLOPs do most; the loss's interval holds the noise of one run.

        --inference_tokens are paid out of the same C, at a third of the price of trained ones (Sardana et al. 2023).
        """
        a, alpha, b, beta, e = self.p.T[:, :, None]
        n = math.log(C / self.k) / 2 + np.linspace(-8, 8, 8001)
        tokens = C / self.k / np.exp(n) - self.inference / 3
        d = np.log(np.maximum(tokens, 1e-9))
        loss = np.exp(a - alpha * n) + np.exp(b - beta * d) + np.exp(e)  # (S, 8001)
        at = loss.argmin(1)
        return summarise(dict(
            N=np.exp(n[at]),
            D=np.exp(d[at]),
            loss=loss.min(1) * self.noise,
        ))


class IsoFLOP:
    """Hoffmann et al. 2022, second approach: at each budget a parabola in log N, and power laws of C through them."""

    def __init__(self, runs: np.ndarray, o: Options):
        n, d, c, _ = np.log(runs)
        self.k, bottoms = np.exp(np.median(c - n - d)), []
        random = np.random.default_rng(o.seed)
        order = np.argsort(c)
        others = np.flatnonzero(np.diff(c[order]) > 0.1) + 1  # 10% more is another budget
        for at in np.split(order, others):
            x = n[at] - n[at].mean()
            weights = random.exponential(size=(o.resamples + 1, len(at)))
            weights[0] = 1  # the fit itself
            powers = np.vander(x, 3)  # x^2, x, 1
            left = np.einsum("sn,ni,nj->sij", weights, powers, powers)
            right = (weights * runs[3, at]) @ powers
            solved = np.linalg.solve(left + 1e-12 * np.eye(3), right[:, :, None])
            p2, p1, _ = solved[:, :, 0].T
            bottom = -p1 / 2 / p2
            if p2[0] > 0 and x.min() < bottom[0] < x.max():
                bottoms.append((c[at].mean(), bottom + n[at].mean()))
            else:
                print(f"at {np.exp(c[at].mean()):.3g} FLOPs the best size is not between two others: left out")
        require(len(bottoms) >= 2, "an IsoFLOP fit needs two budgets with the best size between two others")
        c, n = (np.stack(column) for column in zip(*bottoms))  # (G,), (G, S)
        self.slope, self.height = np.polyfit(c, n, 1)

    def constants(self) -> dict:
        """The exponents of N and D in C."""
        return summarise(dict(N_exponent=self.slope, D_exponent=1 - self.slope))

    def predict(self, C: float) -> dict:
        """N and D where C FLOPs do most."""
        N = np.exp(self.slope * math.log(C) + self.height)
        return summarise(dict(N=N, D=C / self.k / N))


FITS = {"parametric": Chinchilla, "isoflop": IsoFLOP}


# ---- the training API: loss = run(hyperparameters), each run paid for once

HERE = Path(__file__).parent
WIDTHS = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024)
LEAST = 20  # steps; a run of fewer says little


def spread(text: str) -> list[float]:
    """The numbers of "1,2,5", or of "1e11..3e12:5": five, evenly spaced in logarithms. Raises ValueError."""
    if ".." not in text:
        return list(map(float, text.split(",")))
    ends, _, count = text.partition(":")
    low, high = map(float, ends.split(".."))
    return np.geomspace(low, high, int(count)).tolist()


class Ledger:
    """The runs of a study and what they cost, in OUTPUT/runs.jsonl: one line each, written when the run has ended.

    What was asked before is answered from there. An interrupted run is resumed from its own checkpoint; it is charged
    when it ends, so once, however often it was started. A lock keeps a second study out of the folder.
    """

    def __init__(self, o: Options):
        self.o, self.folder = o, Path(o.output)
        self.path = self.folder / "runs.jsonl"
        self.lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another study is at work in {self.folder}") from None
        self.rows = {row["key"]: row for row in rows_of(self.path)} if self.path.exists() else {}
        with replacing(self.path) as file:  # without a last line that a kill cut short
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.rows.values())
        data = Path(o.data or self.folder / "tokens")
        if not o.data:
            words = [f"--output={data}", "--vocab_size=2048", "--pattern=code"]
            done = subprocess.run([sys.executable, HERE / "data.py", *words], capture_output=True, text=True)
            require(done.returncode == 0, done.stderr.strip())
        tokens = np.load(data / "train.npy", mmap_mode="r")
        self.vocab_size = 1 + int(tokens.max())
        self.fixed = dict(data=str(data), batch_size=o.batch_size, learning_rate=o.learning_rate, ngram=0)

    @functools.cache
    def price(self, width: int) -> tuple[dict, int, int]:
        """The shape of a model of a width, its N (parameters in matrix products, head included), FLOPs of a step."""
        shape = dict(n_embd=width, n_layer=max(2, width // 64), n_head=width // 64 or 1, block_size=self.o.block_size,
                     ffn="relu2", tie_embeddings=False)
        cost = model.account(Config(vocab_size=self.vocab_size, **shape), 1)
        N = sum(cost["roles"][role] for role in ("matrix", "output", "head"))
        return shape, N, 3 * self.o.batch_size * cost["forward_flops"]

    def plan(self, width: int, C: float, seed: int = 0) -> dict:
        """A run of about C FLOPs at a width: options of train.py, N, FLOPs, and a key that names it."""
        shape, N, step = self.price(width)
        iters = round(C / step)
        options = {**self.fixed, **shape, "max_iters": iters, "seed": seed}
        key = hashlib.sha256(json.dumps(options).encode()).hexdigest()[:12]
        return dict(key=key, N=N, C=iters * step, options=options)

    def ask(self, plans: list[dict]) -> list[dict]:
        """The rows of planned runs; those that the ledger lacks are trained. Raises ValueError if that is too dear."""
        todo = {plan["key"]: plan for plan in plans if plan["key"] not in self.rows}
        cost = sum(plan["C"] for plan in todo.values())
        left = self.o.total - sum(row["C"] for row in self.rows.values())
        reason = f"{len(todo)} runs cost {cost:.3g} FLOPs; of --total={self.o.total:g} {left:.3g} are left"
        require(cost <= left, reason)
        with ThreadPoolExecutor(self.o.workers) as pool:
            for row in pool.map(self.train, todo.values()):
                self.rows[row["key"]] = row
                with open(self.path, "ab") as file:
                    file.write(json.dumps(row).encode() + b"\n")
                    file.flush()
                    os.fsync(file.fileno())
                print(f"C {row['C']:9.3g}  N {row['N']:9,}  D {row['D']:11,}  loss {row['loss']:.4f}  "
                      f"{row['seconds']:6.1f} s", flush=True)
        return [self.rows[plan["key"]] for plan in plans]

    def train(self, plan: dict) -> dict:
        """Run train.py as a process, by --launch; its row for the ledger. Raises ValueError if it fails."""
        folder = self.folder / "runs" / plan["key"]
        words = [f"--{name}={value}" for name, value in plan["options"].items()]
        every = plan["options"]["max_iters"] // 8 + 1
        words += [f"--output={folder}", f"--eval_interval={every}", "--resume"]
        command = shlex.join([sys.executable, str(HERE / "train.py"), *words])
        command = shlex.split(self.o.launch.format(command=command))
        done = subprocess.run(command, capture_output=True, text=True)
        require(done.returncode == 0, f"the run in {folder} failed: {done.stderr.strip()}")
        curve = [row for row in rows_of(folder / "log.jsonl") if "val_loss" in row]
        last = curve[-1]
        return dict(
            plan,
            D=last["tokens"],
            C=last["flops"],
            loss=last["val_loss"],
            bpb=last["bpb"],
            seconds=last["seconds"],
            curve=[[row["flops"], row["val_loss"]] for row in curve],
        )


# ---- the study

def nearest(plans: list[dict], N: float) -> dict:
    """The plan whose N is nearest."""
    return min(plans, key=lambda plan: abs(math.log(plan["N"] / N)))


def study(o: Options, ledger: Ledger) -> None:
    """IsoFLOP runs: some sizes at each budget, more while the best is at an edge, --n_seeds of the best."""
    budgets = spread(o.budgets)
    guess = (budgets[0] / 60) ** 0.5  # of N: ten tokens a parameter, to begin with
    for i, C in enumerate(budgets):
        plans = [ledger.plan(width, C) for width in WIDTHS]
        plans = [plan for plan in plans if plan["options"]["max_iters"] >= LEAST]
        require(len(plans) > 2, f"--budgets: {C:g} FLOPs are fewer than {LEAST} steps of three sizes")
        near = plans.index(nearest(plans, guess))
        low = max(0, near - o.sizes // 2)
        high = near + o.sizes // 2 + 1
        best = plans[near]
        if o.plan:
            sizes = ", ".join(f"{plan['N']:,}" for plan in plans[low:high])
            print(f"C {C:.3g}: N {sizes}")
        while not o.plan:
            rows = ledger.ask(plans[low:high])
            best = min(rows, key=lambda row: row["loss"])
            if best is rows[0] and low > 0:
                low -= 1
            elif best is rows[-1] and high < len(plans):
                high += 1
            else:
                width = best["options"]["n_embd"]
                ledger.ask([ledger.plan(width, C, seed) for seed in range(1, o.n_seeds)])
                break
        following = budgets[min(i + 1, len(budgets) - 1)]
        guess = best["N"] * (following / C) ** 0.5


# ---- what comes out

def lines(found: dict[str, list[float]]) -> str:
    """Quantities with their 90% intervals, a line each."""
    return "".join(
        f"\n  {name:11} {value:10.4g}  ({low:.4g} to {high:.4g})"
        for name, (value, low, high) in found.items()
    )


def write(path: Path, found: dict | list) -> None:
    """Write something as JSON, whole or not at all."""
    with replacing(path) as file:
        file.write(json.dumps(found, indent=1).encode())


def fit(path: Path, o: Options) -> dict:
    """Each approach's fit to a table of runs, by name, and fit.json; an approach that fails says why in a line."""
    runs = read_runs(path)
    fits, found = {}, {}
    print(f"{path}: {runs.shape[1]} runs of {runs[2].min():.3g} to {runs[2].max():.3g} FLOPs")
    if runs[2].max() < 10 * runs[2].min():
        print("the budgets span less than a factor of 10: the exponents say little")
    for name, kind in FITS.items():
        try:
            fits[name] = kind(runs, o)
            found[name] = fits[name].constants()
            print(name + lines(found[name]))
        except ValueError as error:
            print(f"{name}: {error}")
    require(len(found) > 0, f"no law could be fitted to {path}")
    write(Path(o.output) / "fit.json", found)
    return fits


def predict(fits: dict, o: Options, table: Path) -> None:
    """Print what each fit says of --predict FLOPs; with --preregister keep it in prediction.json, hashed and dated."""
    found = {name: law.predict(o.predict) for name, law in fits.items()}
    for name, values in found.items():
        print(f"{name} at {o.predict:.4g} FLOPs{lines(values)}")
    if o.preregister:
        path = Path(o.output) / "prediction.json"
        require(not path.exists(), f"{path} is there already; a prediction is made once")
        data = hashlib.sha256(table.read_bytes()).hexdigest()
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write(path, dict(FLOPs=o.predict, found=found, data_sha256=data, time=now))
        print(f"{path} holds this; after the run: python scaling.py --output={o.output} --check=RUN")


def check(o: Options) -> None:
    """Compare the last loss of the run in the folder --check with the preregistered one."""
    stored = json.loads((Path(o.output) / "prediction.json").read_bytes())
    last = rows_of(Path(o.check) / "log.jsonl")[-1]
    wanted, used = stored["FLOPs"], last["flops"]
    loss = last["val_loss"]
    require(abs(used / wanted - 1) < 0.05, f"{o.check} took {used:.3g} FLOPs; the prediction is for {wanted:.3g}")
    value, low, high = stored["found"]["parametric"]["loss"]
    inside = "inside" if low <= loss <= high else "outside"
    print(f"predicted {value:.4f} ({low:.4f} to {high:.4f}) on {stored['time']}")
    print(f"measured  {loss:.4f}, {loss / value - 1:+.2%}, {inside} the interval")


def best_runs(ledger: Ledger, law: Chinchilla) -> list[dict]:
    """The best plan at 16 budgets, from the largest that was measured to a thousand times that."""
    rows = []
    largest = max(row["C"] for row in ledger.rows.values())
    for C in largest * np.geomspace(1, 1000, 16):
        plans = [ledger.plan(width, C) for width in WIDTHS]
        rows.append(nearest(plans, law.predict(C)["N"][0]))
    return rows


def options(kind: type, words: list[str]):
    """Fill the dataclass `kind` from --key=value words; a field's trailing comment is its help. A bad word exits 2."""
    source = "".join(map(inspect.getsource, kind.__mro__[-2::-1]))
    notes = dict(re.findall(r"^    (\w+): .*  # (.+)", source, re.MULTILINE))
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__, usage="%(prog)s [--key=value ...]",
                                     formatter_class=argparse.RawDescriptionHelpFormatter, add_help=False)
    parser.add_argument("--help", action="help", help=argparse.SUPPRESS)
    parser.epilog = "options:"
    parser.error = lambda message: sys.exit(print(f"{parser.prog}: {message}", file=sys.stderr) or 2)
    for field in dataclasses.fields(kind):
        def read(text, of=field.type):
            value = ("false", "true").index(text.lower()) if of is bool else float(text) if of is int else of(text)
            most = float("inf" if of is float else 2**63)
            return of(value) if of is str or abs(value) < most and of(value) == value else float("none")
        read.__name__ = field.type.__name__  # argparse names it where the text is not of this type
        parser.add_argument(f"--{field.name}", type=read, default=field.default, nargs="?",
                            const=field.type is bool or "", help=argparse.SUPPRESS)
        head = f"\n  --{field.name}={field.default} ".ljust(31)
        parser.epilog += head + ("\n" + " " * 30).join(textwrap.wrap(notes[field.name], 49))
    for flag, word in zip(["", *words], words):
        name = word.lstrip("-").partition("=")[0]
        if not word.startswith("--") or name not in (*notes, "help"):
            near = f"{flag}={word}" if flag[2:] in notes else f"--{difflib.get_close_matches(name, notes, 1, 0)[0]}=..."
            parser.error(f"{word!r} is no option; options are written --key=value, the nearest is {near}")
    return kind(**vars(parser.parse_args(words)))


def run(main: Callable[[], None]) -> None:
    """Call main; a mistake of the user's ends in one line and exit code 1 (`python -X dev` shows the traceback)."""
    def check(event, args):
        if event == "open" and Path(str(args[0])).is_fifo():
            raise ValueError(f"{args[0]} is a pipe, which may wait for ever: give a file")
    sys.addaudithook(check)
    try:
        main()
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except (OSError, ValueError, MemoryError, RuntimeError) as error:
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.stdout = sys.stderr  # Python flushes it: not one on a full disk, or whose reader left, as in `| head`
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"{Path(sys.argv[0]).name}: {str(error) or 'no memory'}")


def main() -> None:
    o = options(Options, sys.argv[1:])
    Path(o.output).mkdir(parents=True, exist_ok=True)
    if o.check:
        return check(o)
    table = Path(o.fit or Path(o.output) / "runs.jsonl")
    if not o.fit:
        ledger = Ledger(o)
        study(o, ledger)
        if o.plan:
            return
    fits = fit(table, o)
    if not o.fit and "parametric" in fits:
        rows = best_runs(ledger, fits["parametric"])
        write(Path(o.output) / "recipe.json", rows)
        words = " ".join(f"--{name}={value}" for name, value in rows[3]["options"].items())
        print(f"next: python train.py {words}")
    if o.predict:
        predict(fits, o, table)


if __name__ == "__main__":
    run(main)
