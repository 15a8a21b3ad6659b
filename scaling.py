"""From small runs of train.py to a recipe and a prediction with its uncertainty.

Reads: token files; past runs from .jsonl, .json or .csv: parameters N, tokens D
       or FLOPs C, and loss.
Writes: OUTPUT/runs.jsonl (one row a run), fit.json, recipe.json, report.md;
       prediction.json with --preregister.
Usage: python scaling.py --plot=scaling.png
       python scaling.py --fit=runs.csv --predict=1e23
       python scaling.py --sweep=learning_rate:1e-3..1e-1:5 --budgets=3e11
       python scaling.py --runs=out,other --to_loss=3.9 --plot=curves.png

N counts parameters in matrix products, the head's among them, the input
embedding's not; C is counted FLOPs; loss is in nats a token.
References: Kaplan et al. 2020; Hoffmann et al. 2022 (Chinchilla);
Besiroglu et al. 2024 (its third fit redone); Yang et al. 2022 (muP);
Hu et al. 2024 (branches of one stable run).
"""
import argparse
import csv
import dataclasses
import difflib
import fcntl
import functools
import hashlib
import importlib.util
import inspect
import itertools
import json
import math
import os
import platform
import re
import shlex
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

import model
from model import Config, replacing, require


@dataclasses.dataclass
class Options:
    output: str = "scaling"  # folder of the study
    data: str = ""  # folder of token files for the runs (empty: made of the standard library's text)
    total: float = 4e13  # FLOPs that the study may spend, at most
    budgets: str = ""  # FLOPs of a run: a comma list, or from..to:how many (empty: five that --total pays for)
    sizes: int = 5  # runs at a budget, of different sizes; more where the best is not between two others
    tuned: int = 3  # budgets, the smallest, at which learning rate and batch are varied too
    n_seeds: int = 2  # runs of the best size at each budget
    batch_size: int = 8  # sequences of a step, before it is varied
    block_size: int = 128  # context in tokens
    learning_rate: float = 0.014  # before it is varied
    ngram: int = 3  # longest n-gram that has an embedding of its own (0: none)
    reuse: float = 0.0  # share of the steps that decays, with one stable run for all budgets of a size (0: none)
    workers: int = 0  # runs at a time (0: one for each core, at most 8)
    launch: str = "{command}"  # how a run is started, such as "srun -c 2 {command}"
    table: str = ""  # answer from this table of past runs instead of training
    plan: bool = False  # print the runs and their price, start none
    sweep: str = ""  # run a grid: name:values,name:values, values like those of --budgets or words
    mup: bool = False  # best learning rates at four widths, for --init=gpt2 and --init=mup
    runs: str = ""  # folders of train.py's runs, a comma list: compare their curves
    to_loss: float = 0.0  # with --runs: tokens, FLOPs and seconds to this loss (0: one that all reach)
    fit: str = ""  # fit this table of past runs instead of running a study
    predict: float = 0.0  # FLOPs of a run: print its size, tokens, loss, learning rate, memory and days
    machine: str = "8xh100"  # what --predict counts days of: a100, h100, h200 or b200
    inference_tokens: float = 0.0  # tokens that the model will serve, which favours smaller models
    preregister: bool = False  # write the prediction for --predict, with hash and time, before the run
    check: str = ""  # folder of a run: compare its loss with the preregistered one; it is trained if there is none
    plot: str = ""  # picture to write: of a study, --fit, --mup or --runs
    resamples: int = 500  # bootstrap samples behind each interval
    seed: int = 0  # of the bootstrap


# ---- tables of runs

NAMES = {
    "N": ("n", "parameters", "params", "model_size"),
    "D": ("d", "tokens", "training_tokens"),
    "C": ("c", "flops", "compute_budget", "compute", "training_flop"),
    "loss": ("loss", "final_loss", "val_loss"),
}


# Tables come from elsewhere: numbers under other names, missing, infinite, or as text; files that are something else.

def rows_of(path: Path) -> list[dict]:
    """The rows of a .csv, .json or .jsonl file. Raises OSError, or ValueError where it is something else."""
    try:
        text = path.read_text(encoding="utf-8-sig")  # of spreadsheets, too, which begin with a byte order mark
        if path.suffix == ".csv":
            return list(csv.DictReader(text.splitlines(), restkey="more"))
        if path.suffix == ".jsonl":  # the last line may have been cut short by a kill
            text = f"[{','.join(line for line in text.splitlines() if line.endswith('}'))}]"
        rows = json.loads(text)
    except (ValueError, RecursionError, csv.Error) as error:
        raise ValueError(f"{path} is no table of runs: {str(error)[:100]}") from None
    require(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), f"{path} is no table of runs")
    return rows


def evaluations(folder: str, names: tuple = ("val_loss", "tokens", "flops", "seconds")) -> np.ndarray:
    """What a log of train.py says of these at each evaluation, (names, evaluations). Raises ValueError."""
    path = Path(folder) / "log.jsonl"
    rows = [row for row in rows_of(path) if set(names) <= row.keys()]
    require(rows, f"{path} holds no evaluation yet")
    try:
        columns = np.array([[row[name] for name in names] for row in rows], float).T
        require(np.isfinite(columns).all(), "numbers are not finite")
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{path} is damaged: {str(error)[:100]}") from None
    return columns


def field_of(row: dict, key: str, where: str) -> float:
    """What a row says of N, D, C or loss, under any of its names; nan where it says nothing. Raises ValueError."""
    plain = {re.sub(r"\W+", "_", str(name).strip().lower()): value for name, value in row.items()}
    values = [plain[name] for name in NAMES[key] if plain.get(name) not in (None, "")]
    try:
        return float(values[0]) if values else math.nan
    except (ValueError, TypeError, OverflowError):
        raise ValueError(f"{where}: {key} is {str(values[0])[:40]!r}, which is no number") from None


class Runs:
    """Runs, the cheapest first: arrays (n,) of N parameters, D tokens, C FLOPs and loss, and the rows they stood in."""

    def __init__(self, rows: list[dict]):
        self.rows = sorted(rows, key=lambda row: (row["C"], row["N"]))
        columns = [[row[key] for row in self.rows] for key in NAMES]
        self.N, self.D, self.C, self.loss = np.array(columns, float)

    def __len__(self):
        return len(self.rows)

    def keep(self, which: np.ndarray | list) -> "Runs":
        """Some of them, by a mask or by places."""
        places = np.arange(len(self))[which]
        return Runs([self.rows[i] for i in places])

    def values(self, axis: str) -> np.ndarray:
        """N, or a hyperparameter, of each run; nan where it is not known."""
        if axis == "N":
            return self.N
        return np.array([row.get("options", {}).get(axis, math.nan) for row in self.rows], float)

    def budgets(self) -> list[np.ndarray]:
        """Places of the runs of each budget: a step of 10% in FLOPs begins another."""
        steps = np.diff(np.log(self.C))
        return np.split(np.arange(len(self)), 1 + np.flatnonzero(steps >= 0.1))

    def valleys(self, axis: str = "N") -> list[np.ndarray]:
        """Of each budget the places of the most runs that share all hyperparameters but this one, seed and length."""
        free = ("seed", "max_iters", *(SIZE if axis == "N" else (axis,)))
        values = self.values(axis)
        found = []
        for budget in self.budgets():
            families = {}
            for i in budget:
                options = self.rows[i].get("options", {})
                fixed = {name: value for name, value in options.items() if name not in free}
                families.setdefault(key_of(fixed), []).append(i)
            found.append(max(families.values(), key=lambda at: len(np.unique(values[at]))))
        return found

    def main(self) -> "Runs":
        """The runs that differ in size alone."""
        return self.keep(np.concatenate(self.valleys()))

    def flops_each(self) -> float:
        """FLOPs for each parameter and token, about 6."""
        return float(np.median(self.C / self.N / self.D))


def key_of(options: dict) -> str:
    """A name for hyperparameters."""
    text = json.dumps(options, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read_runs(path: Path, least: int = 5) -> Runs:
    """A table's runs. Where D or C is missing it follows from C = 6 N D; what stands there twice counts once.

    Raises ValueError for a number that no run can have; a run without a finite loss, which diverged, is left out.
    """
    table, lost = {}, 0
    for i, row in enumerate(rows_of(path)):
        where = f"{path}: run {i}"
        N, D, C, loss = (field_of(row, key, where) for key in NAMES)
        D = C / 6 / N if math.isnan(D) and N > 0 else D
        C = 6 * N * D if math.isnan(C) else C
        require(not math.isnan(N * D), f"{where} needs N, loss, and D or C; it has {', '.join(map(str, row))[:80]}")
        if not math.isfinite(loss):
            lost += 1
            continue
        require(all(0 < x < 1e40 for x in (N, D, C, loss)), f"{where}: {N=:g}, {D=:g}, {C=:g}, {loss=:g} cannot be")
        options = row.get("options")
        run = dict(N=N, D=D, C=C, loss=loss, options=options if isinstance(options, dict) else {})
        table.setdefault(str(row | run), row | run)  # of another learning rate, too, it is another run
    if lost:
        print(f"{path}: {lost} runs without a finite loss are left out")
    require(len(table) >= least, f"{path} holds {len(table)} different runs; {least} or more are needed")
    runs = Runs(list(table.values()))
    for name in ("N", "D"):
        median = np.median(getattr(runs, name))
        require(median >= 1e3, f"{path}: the median {name} is {median:g}; is it in millions?")
    return runs


# ---- least squares

def huber(r: np.ndarray, delta: float) -> np.ndarray:
    """r^2 / 2, but a straight line beyond delta, so that outliers pull less (Huber 1964)."""
    size = np.abs(r)
    return np.where(size < delta, size**2 / 2, delta * (size - delta / 2))


def slopes_of(residual: Callable, p: np.ndarray) -> np.ndarray:
    """Derivatives of residuals (S, n) by the parameters (S, P): (S, n, P).

    A step of 1e-30 i has the exact derivative as its imaginary part (Squire and Trapp 1998).
    """
    step = 1e-30j
    columns = [residual(p + step * axis).imag / step.imag for axis in np.eye(p.shape[1])]
    return np.stack(columns, 2)


@np.errstate(all="ignore")  # a step too far may overflow; it is taken back
def minimise(residual: Callable, starts: np.ndarray, weights: np.ndarray, delta: float = math.inf,
             steps: int = 300) -> np.ndarray:
    """From each start (S, P), the parameters where the sum of weights * huber(residual) is least; the best one first.

    Damped Gauss-Newton (Levenberg 1944, Marquardt 1963), all starts at once. `residual` takes p (S, P) to (S, n), also
    for complex p. `weights` is (n,), or (S, n) with other weights for each start; then the order of the starts is kept.
    """
    def cost(p):
        return (weights * huber(residual(p), delta)).sum(1)

    p, now = starts, cost(starts)
    damping = np.full((len(p), 1, 1), 1e-3)
    eye = np.eye(p.shape[1])
    for _ in range(steps):
        r = residual(p)
        slopes = slopes_of(residual, p)  # (S, n, P)
        pull = weights * np.minimum(1, delta / np.abs(r))  # of the parabola that touches huber where r is
        pulled = (slopes * pull[:, :, None]).swapaxes(1, 2)  # (S, P, n)
        hessian = pulled @ slopes
        hessian += (damping * hessian + 1e-30) * eye
        gradient = pulled @ r[:, :, None]  # (S, P, 1)
        trial = p - np.linalg.solve(hessian, gradient)[:, :, 0]
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


def resampled(residual: Callable, starts: np.ndarray, n: int, o: Options, delta: float) -> np.ndarray:
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


# ---- laws of N and D: one residual function each
# A law says what loss a model of N parameters has after D tokens. With C = k N D it also says which N is best for C
# FLOPs: a smaller model would have learned more tokens but could not use them, a larger one could but saw too few.
# What the law's constants, or its predictions, are worth is seen by fitting it again and again to other weights of the
# same runs; the middle 90% of what comes out is the interval.

class Law:
    """A loss of N and D, fitted by Huber loss on its logarithm: what the laws below share.

    A law's n, d and loss are logarithms over the runs' mean, so that one grid of starts is good for runs of all sizes.
    """

    grid: dict[str, tuple]  # the parameters p, in the order of log_loss, and values to start from

    def __init__(self, runs: Runs, o: Options):
        self.runs = runs = runs.main()
        n = len(runs)
        least = 1 + len(self.grid)  # with fewer the fit goes through all, and intervals would be empty
        require(n >= least, f"it needs {least} runs that differ in size alone, there are {n}")
        self.inference = o.inference_tokens
        self.k = runs.flops_each()
        logs = np.log((runs.N, runs.D, runs.loss))
        self.middle = logs.mean(1, keepdims=True)
        self.n, self.d, self.y = logs - self.middle
        starts = np.array(list(itertools.product(*self.grid.values())))
        self.p = resampled(self.residual, starts, n, o, DELTA)
        self.freedom = n - len(self.grid)
        doubt = f"{n} runs for {len(self.grid)} constants: these intervals are too narrow"
        self.doubts = [doubt] * (n < 2 * len(self.grid))  # the fit bends to each run, and so do the resampled ones
        sigma = self.residual(self.p[:1]).std() * math.sqrt(n / self.freedom)
        normal = np.random.default_rng(o.seed).normal(size=len(self.p))
        self.noise = np.exp(sigma * normal)  # of one run
        self.noise[0] = 1

    def residual(self, p: np.ndarray) -> np.ndarray:
        """How far the law lies above the runs, (S, n), for parameters p (S, P)."""
        return self.log_loss(p, self.n, self.d) - self.y

    @np.errstate(over="ignore")  # far from the best size a law of few runs may rise without end
    def losses(self, N: np.ndarray, D: np.ndarray) -> np.ndarray:
        """The losses of single runs, (S, n): row 0 is the fit, the others have the runs' noise in them."""
        n, d, y = self.middle
        clean = self.log_loss(self.p, np.log(N) - n, np.log(D) - d)
        return np.exp(clean + y) * self.noise[:, None]

    def predict(self, C: float) -> dict:
        """N, D, loss where C FLOPs do most; the loss's interval holds the noise of one run.

        --inference_tokens are paid out of the same C, at a third of the price of trained ones (Sardana et al. 2023).
        """
        N = math.sqrt(C / self.k) * np.exp(np.linspace(-8, 8, 4001))
        D = np.maximum(C / self.k / N - self.inference / 3, 1e-9)
        losses = self.losses(N, D)  # (S, 4001)
        at = losses.argmin(1)
        return summarise(dict(N=N[at], D=D[at], loss=losses.min(1)))

    def profile(self, name: str) -> tuple[float, float, float]:
        """An exponent and its 90% interval by likelihood: where the best fit with it held still is good enough.

        Good enough: the cost, in units of the least cost a degree of freedom, rises by less than 2.71, the 90% point
        of chi-squared. Unlike the bootstrap it needs no cloud of fits, and it sees directions in which nothing changes.
        """
        i = list(self.grid).index(name)
        values = self.p[0, i] * np.geomspace(1 / 3, 3, 241)
        held = np.arange(len(self.grid)) == i

        def residual(p):
            return self.residual(np.where(held, values[:, None], p))

        starts = self.p[:1].repeat(len(values), 0)
        weights = np.ones((len(values), len(self.runs)))
        found = minimise(residual, starts, weights, DELTA, steps=60)
        costs = huber(residual(found), DELTA).sum(1)
        rise = (costs / max(costs[120], 1e-30) - 1) * self.freedom
        good = values[rise <= 2.71]  # neighbours: the cost has one valley
        return self.p[0, i], good.min(), good.max()


class Chinchilla(Law):
    """Hoffmann et al. 2022, third approach: L(N, D) = E + A / N^alpha + B / D^beta."""

    grid = dict(
        a=(-1.0,),
        alpha=(0.2, 0.4, 0.8),
        b=(-1.0,),
        beta=(0.2, 0.4, 0.8),
        e=(-1.2, -0.5, -0.1),
    )

    def log_loss(self, p, n, d):
        a, alpha, b, beta, e = p.T[:, :, None]
        by_size = np.exp(a - alpha * n)
        by_data = np.exp(b - beta * d)
        return np.log(by_size + by_data + np.exp(e))

    def constants(self) -> dict:
        """The constants; N grows as C^N_exponent, D as C^D_exponent (closed form of the optimum)."""
        n, d, y = self.middle
        a, alpha, b, beta, e = self.p.T
        share = beta / (alpha + beta)
        return summarise(dict(
            A=np.exp(a + alpha * n + y),
            alpha=alpha,
            B=np.exp(b + beta * d + y),
            beta=beta,
            E=np.exp(e + y),
            N_exponent=share,
            D_exponent=1 - share,
        ))


class Kaplan(Law):
    """Kaplan et al. 2020, equation 1.5: L(N, D) = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D, with no E."""

    grid = dict(
        alpha_N=(0.05, 0.1, 0.3),
        log_N_c=(0.0,),
        alpha_D=(0.05, 0.1, 0.3),
        log_D_c=(0.0,),
    )

    def log_loss(self, p, n, d):
        alpha_n, n_c, alpha_d, d_c = p.T[:, :, None]
        by_size = np.exp(alpha_n / alpha_d * (n_c - n))
        by_data = np.exp(d_c - d)
        return alpha_d * np.log(by_size + by_data)

    def constants(self) -> dict:
        """alpha_N and alpha_D. The optimum's exponents follow from alpha_N N-term = alpha_D D-term, N D = C / k."""
        alpha_n, _, alpha_d, _ = self.p.T
        share = alpha_d / (alpha_n + alpha_d)
        return summarise(dict(alpha_N=alpha_n, alpha_D=alpha_d, N_exponent=share, D_exponent=1 - share))


# ---- laws of C: a power law through the best value at each budget
# These ask no form of the loss, only that the best size, learning rate or batch moves as a power of C. They need runs
# on both sides of the best, and say which budgets have none.

class Powers:
    """Lowest points at some C (each with its S resamples), and value = exp(height) C^slope through them."""

    axis = "N"  # what the value is
    doubts = ()  # what these runs cannot tell

    def fit(self, c: np.ndarray | list, values: list, k: float) -> None:
        """Fit log value (G, S) against log C (G,); k is FLOPs for each parameter and token."""
        self.k = k
        self.slope, self.height = np.polyfit(c, np.stack(values), 1)

    def at(self, C: float) -> np.ndarray:
        """The best value for C FLOPs, (S,)."""
        return np.exp(self.slope * math.log(C) + self.height)

    def constants(self) -> dict:
        """The exponents of N and D in C, or that of the learning rate or batch."""
        if self.axis != "N":
            return summarise(dict(exponent=self.slope))
        return summarise(dict(N_exponent=self.slope, D_exponent=1 - self.slope))

    def predict(self, C: float) -> dict:
        """N and D where C FLOPs do most, or the learning rate or batch."""
        best = self.at(C)
        found = {self.axis: best}
        if self.axis == "N":
            found["D"] = C / self.k / best
        return summarise(found)


class Valleys(Powers):
    """At each budget a parabola in the log of N, learning rate or batch; power laws through their lowest points.

    For N this is the second approach of Hoffmann et al. 2022, IsoFLOP. Runs of a valley share all else but the seed.
    """

    def __init__(self, runs: Runs, o: Options, axis: str = "N"):
        self.axis = axis
        self.doubts = []
        self.parabolas = []  # log values, losses: points of each for a picture
        random = np.random.default_rng(o.seed)
        logs = np.log(runs.values(axis))
        centres, bottoms = [], []
        for at in runs.valleys(axis):
            where = f"at {runs.C[at].mean():.3g} FLOPs"
            x, y = logs[at], runs.loss[at]
            if len(np.unique(x)) < 3:
                self.doubts += [f"{where} there are not three sizes: left out"] * (axis == "N")
                continue
            weights = random.exponential(size=(o.resamples + 1, len(at)))
            weights[0] = 1  # the fit itself
            middle = x.mean()
            powers = np.array([np.polyfit(x - middle, y, 2, w=np.sqrt(each)) for each in weights])
            bend, tilt, _ = powers.T
            bottom = middle - tilt / 2 / np.where(bend == 0, 1, bend)
            if bend[0] > 0 and x.min() < bottom[0] < x.max():
                centres.append(np.log(runs.C[at]).mean())
                bottom = np.where(bend > 0, bottom, bottom[0])
                bottoms.append(bottom.clip(x.min(), x.max()))
                x = np.linspace(x.min(), x.max(), 99)
                self.parabolas.append((x, np.polyval(powers[0], x - middle)))
            else:
                self.doubts.append(f"{where} the best {WORDS[axis]} is not between two others: left out")
        require(len(bottoms) >= 2, f"it needs two budgets with the best {WORDS[axis]} between two others")
        self.fit(centres, bottoms, runs.flops_each())


class Envelope(Powers):
    """Hoffmann et al. 2022, first approach: the size whose training curve is lowest, at 200 numbers of FLOPs.

    Points before a learning rate has fallen lie higher than a run that ends there would; so do those of all sizes.
    """

    def __init__(self, runs: Runs, o: Options):
        runs = runs.main()
        runs = runs.keep([len(row.get("curve", ())) > 2 for row in runs.rows])
        require(len(set(runs.N)) >= 3, "it needs training curves of three sizes")
        curves = [np.log(np.array(row["curve"], float)).T for row in runs.rows]  # each (2, points)
        begin = np.median([flops[0] for flops, _ in curves])
        end = max(flops[-1] for flops, _ in curves)
        c = np.linspace(begin, end, 200)
        heights = np.stack([np.interp(c, x, y, left=math.inf, right=math.inf) for x, y in curves])  # (R, 200)
        covered = np.isfinite(heights).any(0)
        c, heights = c[covered], heights[:, covered]
        # Runs are drawn anew with repetition here: a weight would not move the lowest of some curves.
        random = np.random.default_rng(o.seed)
        chosen = random.integers(len(runs), size=(o.resamples + 1, len(runs)))  # (S, R), with repetition
        chosen[0] = np.arange(len(runs))  # the fit itself
        best = np.stack([some[heights[some].argmin(0)] for some in chosen])  # (S, 200)
        reached = np.stack([np.isfinite(heights[some].min(0)) for some in chosen])
        best = np.where(reached, best, best[0])  # no run that was drawn is as long
        self.fit(c, list(np.log(runs.N)[best].T), runs.flops_each())


DELTA = 1e-3  # of huber, in the logarithm of the loss (Hoffmann et al. 2022)
SIZE = ("n_embd", "n_layer", "n_head", "weight_decay")  # hyperparameters that follow from a model's size
WORDS = dict(N="size", learning_rate="learning rate", batch_size="batch")
FITS = {
    "parametric": Chinchilla,
    "isoflop": Valleys,
    "envelope": Envelope,
    "kaplan": Kaplan,
    "learning_rate": functools.partial(Valleys, axis="learning_rate"),
    "batch_size": functools.partial(Valleys, axis="batch_size"),
}


# ---- the training API: loss = run(hyperparameters), each run paid for once
# A plan is a run that could be made: its options, its size and its exact price, known from shapes alone. A row is a
# plan with what came of it. The ledger makes sure that all runs of a question can be paid for before it starts any.

HERE = Path(__file__).parent
WIDTHS = (8, 12, 16, 24, 32, 48, 64, 80, 96, 128, 160, 192, 256, 320, 384, 512, 640, 768, 1024)
LEAST = 20  # steps; a run of fewer says little
ROW: dict = dict(  # what a row of the ledger holds, and its types
    key=str,
    paid=(int, float),
    N=(int, float),
    D=(int, float),
    C=(int, float),
    loss=(int, float, type(None)),
    options=dict,
)


def spread(text: str) -> list[float]:
    """The numbers of "1,2,5", or of "1e11..3e12:5": five, evenly spaced in logarithms. Raises ValueError."""
    if ".." not in text:
        return list(map(float, text.split(",")))
    ends, _, count = text.partition(":")
    low, high = map(float, ends.split(".."))
    require(0 < low < high and int(count) > 1, f"{text} is no range like 1e11..3e12:5")
    return np.geomspace(low, high, int(count)).tolist()


class Ledger:
    """The runs of a study and what they cost, in OUTPUT/runs.jsonl: one line each, written when the run has ended.

    What was asked before is answered from there. An interrupted run is resumed from its own checkpoint; it is charged
    when it ends, so once, however often it was started. A lock keeps a second study out of the folder.
    """

    def __init__(self, o: Options):
        self.o, self.folder = o, Path(o.output)
        self.path = self.folder / "runs.jsonl"
        given = o.data or o.table
        if given:  # what is refused there leaves no folder behind
            self.prepare()
        self.folder.mkdir(parents=True, exist_ok=True)
        self.lock = open(self.folder / "lock", "w")
        try:
            fcntl.lockf(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise ValueError(f"another study is at work in {self.folder}") from None
        # Row by row in memory, line by line on the disk; `paid` is what a row was charged.
        self.rows = {}
        if self.path.exists():
            for row in rows_of(self.path):
                whole = all(isinstance(row.get(name, ()), kind) for name, kind in ROW.items())
                require(whole, f"{self.path} is no ledger of a study, or is damaged")
                self.rows[row["key"]] = row
        with replacing(self.path) as file:  # without a last line that a kill cut short
            file.writelines(json.dumps(row).encode() + b"\n" for row in self.rows.values())
        self.writing = threading.Lock()
        self.workers = o.workers or min(8, os.cpu_count() or 1)
        if not given:
            self.prepare()

    def prepare(self) -> None:
        """Find or make the token files of the runs."""
        self.data = data = Path(self.o.data or self.folder / "tokens")
        if not self.o.data:
            words = [f"--output={data}", "--vocab_size=2048", "--pattern=code"]
            done = subprocess.run([sys.executable, HERE / "data.py", *words], capture_output=True, text=True)
            require(done.returncode == 0, done.stderr.strip())
        path = data / "tokenizer.json"  # its vocabulary is that of train.py's models
        require(path.exists(), f"{path} is not there; data.py writes it beside the tokens")
        try:
            self.vocab_size = len(json.loads(path.read_bytes())["vocab"])
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{path} is damaged: {str(error)[:100]}") from error

    def run(self, **hyperparameters) -> float:
        """The loss of a run of train.py with these options (max_iters is its length); inf if it diverged."""
        return loss_of(self.ask([self.plan(**hyperparameters)])[0])

    @functools.cache
    def price(self, shape: tuple) -> tuple[int, int]:
        """N of a model, given as pairs of option and value, and the FLOPs of training on a sequence."""
        cost = model.account(Config(vocab_size=self.vocab_size, **dict(shape)), 1)
        N = sum(cost["roles"][role] for role in ("matrix", "output", "head"))
        return N, 3 * cost["forward_flops"]

    def plan(self, C: float = 0, **changes) -> dict:
        """A run of about C FLOPs: options of train.py, N, tokens, FLOPs, and a key that names it.

        `changes` are options that win over the study's own; among them max_iters is the length, and C is not needed.
        """
        width = int(changes.get("n_embd", 64))
        options = dict(
            data=str(self.data),
            n_embd=width,
            n_layer=max(1, width // 64),
            n_head=model.usual_heads(width),
            block_size=self.o.block_size,
            ffn="relu2",
            tie_embeddings=False,
            ngram=self.o.ngram,
            batch_size=self.o.batch_size,
            learning_rate=self.o.learning_rate,
            weight_decay=0.1 * min(1, (64 / width) ** 2),
            eval_tokens=2**17,
            seed=0,
        )
        options |= changes
        shape = {name: options[name] for name in options if name in Config.__annotations__}
        N, sequence = self.price(tuple(sorted(shape.items())))
        step = sequence * options["batch_size"]
        require(step > 0 and options.get("max_iters", 1) > 0, "batch_size and max_iters of a run: 1 or more")
        options.setdefault("max_iters", max(1, round(C / step)))
        C = options["max_iters"] * step
        return dict(key=key_of(options), N=N, D=C // sequence * options["block_size"], C=C, options=options)

    def sizes(self, C: float, **changes) -> list[dict]:
        """Runs of C FLOPs, the smallest model first."""
        plans = [self.plan(C, n_embd=width, **changes) for width in WIDTHS]
        return [plan for plan in plans if plan["options"]["max_iters"] >= LEAST]

    def budgets(self) -> list[float]:
        """FLOPs of a study's runs: --budgets, or five over a factor of 30 that --total pays for, below --predict."""
        if self.o.budgets:
            return spread(self.o.budgets)
        shares = np.geomspace(1 / 30, 1, 5)
        counts = self.o.sizes + self.o.n_seeds - 1 + 4 * (np.arange(5) < self.o.tuned)
        top = 0.8 * self.o.total / (counts @ shares)  # a fifth is left for sizes that will be added
        return (min(top, self.o.predict / 3 or top) * shares).tolist()

    def left(self) -> float:
        """FLOPs of --total that are not spent."""
        return self.o.total - sum(row["paid"] for row in self.rows.values())

    def lacking(self, plans: list[dict]) -> dict[str, dict]:
        """Those of some plans that have no row yet, by key."""
        return {plan["key"]: plan for plan in plans if plan["key"] not in self.rows}

    def cost(self, plans: list[dict]) -> float:
        """FLOPs that the ledger would be charged for these runs."""
        return sum(plan["C"] for plan in self.lacking(plans).values())

    def ask(self, plans: list[dict]) -> list[dict]:
        """The rows of planned runs; those that the ledger lacks are trained. Raises ValueError if that is too dear."""
        todo, cost, left = self.lacking(plans), self.cost(plans), self.left()
        reason = f"{len(todo)} runs cost {cost:.3g} FLOPs; of --total={self.o.total:g} {left:.3g} are left"
        require(cost <= left, reason)
        queues: dict = {}
        for plan in todo.values():
            queues.setdefault(self.trunk(plan) if self.o.reuse else plan["key"], []).append(plan)
        # Threads that wait for processes. A terminal's Ctrl-C reaches these too: they save what they have, and --resume
        # goes on from it; those that have not begun are not started.
        with ThreadPoolExecutor(self.workers) as pool:
            list(pool.map(self.settle_all, queues.values()))
        return [self.rows[plan["key"]] for plan in plans]

    def settle_all(self, plans: list[dict]) -> None:
        """Settle one run after the other, the shortest first, as what branches off one stable run must."""
        for plan in sorted(plans, key=lambda plan: plan["C"]):
            self.settle(plan)

    def settle(self, plan: dict) -> None:
        """Train a planned run, and write its row."""
        row = self.train(plan)
        with self.writing:
            self.rows[row["key"]] = row
            with open(self.path, "ab") as file:
                file.write(json.dumps(row).encode() + b"\n")
                file.flush()
                os.fsync(file.fileno())
            for name in ("ckpt.pt", "best.pt"):  # the log says all that a study needs
                (self.folder / "runs" / row["key"] / name).unlink(missing_ok=True)
            spent = 1 - self.left() / self.o.total
            print(f"C {row['C']:8.3g}  N {row['N']:10,.0f}  D {row['D']:12,.0f}  loss {loss_of(row):7.4f}  "
                  f"{row.get('seconds', 0):6.1f} s  {spent:4.0%} spent", flush=True)

    def train(self, plan: dict) -> dict:
        """Run train.py as a process; its row for the ledger, with loss None where it diverged."""
        folder, options = self.folder / "runs" / plan["key"], plan["options"]
        words = [f"--eval_interval={options['max_iters'] // 4 + 1}"]
        plan = dict(plan, paid=plan["C"])
        if self.o.reuse:
            plan, words = self.branch(plan, folder)
        error = self.launch(options, folder, *words)
        if error:
            return dict(plan, loss=None)
        losses, tokens, flops, seconds = evaluations(folder)
        return dict(
            plan,
            D=tokens[-1],
            C=flops[-1],
            loss=losses[-1],
            seconds=seconds[-1],
            curve=np.stack((flops, losses), 1).tolist(),
        )

    def trunk(self, plan: dict) -> str:
        """A name for the stable run that this one branches off: all lengths of a model have the same."""
        return key_of(plan["options"] | dict(max_iters="any"))

    def branch(self, plan: dict, folder: Path) -> tuple[dict, list[str]]:
        """Take the stable run of a model to where this run decays: what is paid for, and the words that branch there.

        The runs of a model come with rising length; one that comes too late is trained from its beginning.
        """
        steps = plan["options"]["max_iters"]
        start = max(1, min(steps - 1, round(steps * (1 - self.o.reuse))))
        options = plan["options"] | dict(max_iters=start)
        name = self.trunk(plan)
        starts = [row["start"] for row in self.rows.values() if row.get("trunk") == name]
        before = max(starts, default=0)
        trunk = self.folder / "runs" / name
        words = ["--schedule=wsd", f"--decay_from={start}"]
        if start < before or self.launch(options, trunk, "--schedule=constant"):
            return plan, words
        if not (folder / "ckpt.pt").exists():
            words.append(f"--ckpt={trunk / 'ckpt.pt'}")
        paid = plan["C"] * (steps - before) / steps
        return dict(plan, trunk=name, start=start, paid=paid), words

    def launch(self, options: dict, folder: Path, *words: str) -> str:
        """Run train.py to its end in a folder, by --launch; what it says where it diverged. Raises ValueError.

        A run that a killed study left behind may still be at work there; it is waited for.
        """
        command = [sys.executable, str(HERE / "train.py"), *words_of(options)]
        command += [f"--output={folder}", "--resume", "--sample_tokens=0", *words]
        command = shlex.split(self.o.launch.replace("{command}", shlex.join(command)))
        threads = (os.cpu_count() or 1) // self.workers
        environment = {"OMP_NUM_THREADS": str(max(1, threads)), **os.environ}
        pipes: dict = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while True:  # standard error is read for the reason; the log has all else
            done = subprocess.run(command, env=environment, **pipes)
            if "another run is training" not in done.stderr:
                break
            time.sleep(1)
        *_, last = done.stderr.strip().splitlines() or [""]
        fine = done.returncode == 0 or "not finite" in last
        require(fine, f"the run in {folder} failed: {last or done.returncode}")
        return last if done.returncode else ""


class Table(Ledger):
    """The same over a table of past runs: its rows are the answers, and what they cost is charged."""

    def prepare(self):
        """Read the table."""
        self.past = read_runs(Path(self.o.table), 1 if self.o.sweep else 5)  # a sweep fits nothing
        self.o.tuned, self.o.n_seeds = 0, 1  # other rates, batches and seeds may not be there

    def plan(self, C: float = 0, **changes):
        """The table's run with these hyperparameters, of C FLOPs if given. Raises ValueError where there is none."""
        fits = []
        for name in changes:
            known = any(name in row | row["options"] for row in self.past.rows)
            require(known, f"{self.o.table} has no column {name}")
        for row in self.past.rows:
            known = row | row["options"]
            same = [alike(known.get(name), value) for name, value in changes.items()]
            if all(same) and (C == 0 or math.isclose(row["C"], C, rel_tol=0.1)):
                fits.append(row)
        asked = " ".join(words_of(changes | dict(C=C or "any")))
        for name in changes:
            values = {str((row | row["options"]).get(name)) for row in self.past.rows}
            asked += f"; it has {name}: {' '.join(sorted(values)[:9])}"
        require(fits, f"{self.o.table} has no run with {asked}")
        require(len(fits) == 1, f"{self.o.table} has {len(fits)} runs with {asked}; name more hyperparameters")
        return dict(fits[0], key=key_of(fits[0]))

    def sizes(self, C, **_):
        """The table's runs of C FLOPs that differ in size alone."""
        rows = [row for row in self.past.main().rows if math.isclose(row["C"], C, rel_tol=0.1)]
        return [dict(row, key=key_of(row)) for row in rows]

    def budgets(self):
        """Those of --budgets, or of the table."""
        if self.o.budgets:
            return spread(self.o.budgets)
        return [self.past.C[at].mean() for at in self.past.budgets()]

    def train(self, plan):
        """What the table says of it."""
        return dict(plan, paid=plan["C"])


def alike(stored: Any, asked: Any) -> bool:
    """Whether a table's value is the one asked for; numbers may be written in another way."""
    try:
        return math.isclose(float(stored), float(asked), rel_tol=1e-6)
    except (TypeError, ValueError):
        return str(stored) == str(asked)


def words_of(options: dict) -> list[str]:
    """Options as they are written on a command line."""
    return [f"--{name}={value}" for name, value in options.items()]


def loss_of(row: dict) -> float:
    """A run's loss; inf where it diverged."""
    return math.inf if row["loss"] is None else row["loss"]


# ---- the study: walk down into valleys
# The question is always the same: of runs that cost the same and differ in one thing, which is best? Ask some in a row;
# while the best one is the first or last of them, ask one more beyond it. So the size of each budget is found, and the
# learning rate and batch of the small ones.

RATIO = (6 * 15) ** -0.5  # N to C^0.5 where a parameter has 15 tokens


def nearest(plans: list[dict], N: float) -> int:
    """Place of the plan whose N is nearest."""
    distances = [abs(math.log(plan["N"] / N)) for plan in plans]
    return distances.index(min(distances))


def around(near: int, count: int, length: int) -> int:
    """The first of `count` places out of `length`, with `near` in their middle or as near to it as the ends allow."""
    return max(0, min(near - count // 2, length - count))


def valley(ledger: Ledger, plans: list[dict], near: int, count: int) -> dict:
    """Train `count` plans around plans[near], and more while the best is the first or last; the best one's row."""
    # A run more costs what the others do; a valley whose bottom is not between two runs says nothing.
    low = around(near, count, len(plans))
    high = low + count
    while True:
        rows = ledger.ask(plans[low:high])
        best = min(rows, key=loss_of)
        below = best is rows[0] and low > 0
        above = best is rows[-1] and high < len(plans)
        if not below and not above:
            return best
        low, high = low - below, high + above
        price = ledger.cost(plans[low:high])
        if price > ledger.left():
            print(f"--total={ledger.o.total:g} has no room for another run of {price:.3g} FLOPs")
            return best


def outline(o: Options, ledger: Ledger) -> None:
    """Print what a study will do first at each budget, and its price; it adds runs where a best is not bracketed."""
    # The first runs alone: how many will be added beyond an edge nobody knows before.
    price = 0
    for i, C in enumerate(ledger.budgets()):
        plans = ledger.sizes(C)
        reason = f"--budgets: a valley needs 3 sizes; {C:g} FLOPs have {len(plans)}, of {LEAST} steps or more"
        require(len(plans) > 2, reason)
        low = around(nearest(plans, RATIO * C**0.5), o.sizes, len(plans))
        some = plans[low:low + o.sizes]
        first, last = some[0], some[-1]
        count = len(some) + o.n_seeds - 1 + 4 * (i < o.tuned)
        price += count * C
        print(fold(f"{C:.3g} FLOPs: {count} runs, N {first['N']:,.0f} to {last['N']:,.0f}, "
                   f"{first['D'] / first['N']:.3g} to {last['D'] / last['N']:.3g} tokens a parameter"))
    print(fold(f"about {price:.3g} FLOPs of --total={o.total:g}, of which {ledger.left():.3g} are left; "
               f"{len(ledger.rows)} runs are in {ledger.path}"), flush=True)


def study(o: Options, ledger: Ledger) -> None:
    """At each budget: learning rate and batch, if it is one of the small ones, then some sizes, and seeds of the best.

    A budget begins with what was best at the one before, a size larger as C^0.5.
    """
    settings = dict(learning_rate=o.learning_rate, batch_size=o.batch_size)
    ratio = RATIO
    for i, C in enumerate(ledger.budgets()):
        guess = ratio * C**0.5
        # First the settings, at the size that is most likely best, so that all sizes are trained with good ones.
        plans = ledger.sizes(C, **settings)
        near = plans[nearest(plans, guess)]
        for axis in settings if i < o.tuned else ():
            values = settings[axis] * 2.0 ** np.arange(-3, 4)
            if axis == "batch_size":
                values = [max(1, round(value)) for value in values]
            same = dict(n_embd=near["options"]["n_embd"], **settings)
            plans = [ledger.plan(C, **same | {axis: value}) for value in values]
            settings[axis] = valley(ledger, plans, 3, 3)["options"][axis]
        plans = ledger.sizes(C, **settings)
        best = valley(ledger, plans, nearest(plans, guess), o.sizes)
        ratio = best["N"] / C**0.5
        seeds = [ledger.plan(**best["options"] | dict(seed=seed)) for seed in range(1, o.n_seeds)]
        if ledger.cost(seeds) <= ledger.left():
            ledger.ask(seeds)


def grid(text: str) -> list[dict]:
    """The points of "learning_rate:1e-3..1e-1:5,optimizer:muon,adamw": one dict a point. Raises ValueError."""
    # A comma parts values as well as axes: a piece with a name and a colon begins an axis, all others add to it.
    axes, name = {}, ""
    for part in text.split(","):
        head, colon, value = part.partition(":")
        if colon and head.isidentifier():
            name, part = head, value
        require(name, f"--sweep={text}: write name:values,name:values, such as learning_rate:1e-3..1e-1:5")
        try:
            numbers: list = [int(x) if x == int(x) else x for x in spread(part)]
        except (ValueError, OverflowError):
            good = re.fullmatch(r"[A-Za-z][\w-]*", part)
            require(good, f"--sweep: {part!r} is neither a number, a range nor a word")
            numbers = [part]
        axes.setdefault(name, []).extend(numbers)
    return [dict(zip(axes, point)) for point in itertools.product(*axes.values())]


def sweep(o: Options, ledger: Ledger) -> None:
    """Run a grid at each of --budgets (at the first alone if they are not given) and print it."""
    points = grid(o.sweep)
    require(not (o.budgets and "max_iters" in points[0]), "--sweep: max_iters is the length; leave out --budgets")
    budgets = ledger.budgets()[:1]
    if o.budgets:
        budgets = spread(o.budgets)
    elif o.table or "max_iters" in points[0]:
        budgets = [0]
    # Every point is a plan before any is run, so that the whole grid's price is known.
    points = [dict(C=C, **point) for C in budgets for point in points]
    plans = [ledger.plan(**point) for point in points]
    print(f"{len(plans)} runs, {ledger.cost(plans):.3g} FLOPs of {ledger.left():.3g} that are left", flush=True)
    if o.plan:
        return
    rows = ledger.ask(plans)
    names = list(points[0])
    print("  ".join(name.rjust(14) for name in (*names, "loss")))
    for point, row in sorted(zip(points, rows), key=lambda pair: (pair[1]["C"], loss_of(pair[1]))):
        point["C"] = float(row["C"])
        cells = [f"{value:.4g}" if isinstance(value, float) else str(value) for value in point.values()]
        print("  ".join(cell.rjust(14) for cell in (*cells, f"{loss_of(row):.4f}")))


RATES = range(-12, 1)  # powers of two


def mup(o: Options, ledger: Ledger) -> None:
    """The best AdamW learning rate at four widths, for one standard parametrisation and muP, and what moving it costs.

    The rate is the bottom of a parabola through the best three of rates a factor of 2 apart; the drift is that of the
    widest to the narrowest model in powers of two; lost is what the narrowest model's best rate costs a wider one.
    """
    panels = []
    for init in ("gpt2", "mup"):
        lines, best_rates = [], []
        near, places = 4, []
        # Few steps of small batches, so that the rate matters; depth and head width are the same at all widths.
        for width in (32, 64, 128, 256):
            fixed: dict = dict(
                init=init, base_width=32, n_embd=width, n_layer=2, n_head=width // 32, ngram=0, block_size=64,
                optimizer="adamw", weight_decay=0.0, batch_size=8, max_iters=150, warmup_iters=10, eval_tokens=2**15,
            )
            plans = [ledger.plan(**fixed, learning_rate=2.0**k) for k in RATES]
            best = valley(ledger, plans, near, 5)
            near = [plan["key"] for plan in plans].index(best["key"])
            places.append(near)
            moved, = ledger.ask([plans[places[0]]])  # what a tuner at width 32 would have chosen
            rows = [ledger.rows[plan["key"]] for plan in plans if plan["key"] in ledger.rows]
            rates = [row["options"]["learning_rate"] for row in rows]
            lines.append((f"width {width}", "o-", rates, list(map(loss_of, rows))))
            middle = min(max(near, 1), len(plans) - 2)
            three = [min(99, loss_of(row)) for row in ledger.ask(plans[middle - 1:middle + 2])]
            bend, tilt, _ = np.polyfit((-1, 0, 1), three, 2)
            best_rates.append(RATES[middle] - tilt / 2 / bend)
            print(f"{init:5} width {width:4}: best learning rate {2 ** best_rates[-1]:.4f}, loss {loss_of(best):.4f},\n"
                  f"    lost with that of width 32: {loss_of(moved) - loss_of(best):.4f}", flush=True)
        print(f"{init:5} drift of the best learning rate: {best_rates[-1] - best_rates[0]:+.2f} powers of two")
        panels.append((f"--init={init}", "learning rate", NATS, lines))
    if o.plot:
        picture(o.plot, panels)


def compare_runs(o: Options) -> None:
    """A table of the runs in some folders of train.py: what each took to reach one loss; with --plot their curves."""
    # By default the loss is the least that the worst of them reached, so that all have an answer.
    curves = {folder: evaluations(folder) for folder in o.runs.split(",") if folder}
    target = o.to_loss or max(losses.min() for losses, *_ in curves.values())
    print(f"to a validation loss of {target:.4f}:")
    print(f"{'run':24} {'least loss':>10} {'tokens':>14} {'FLOPs':>10} {'seconds':>9}")
    for folder, (losses, *others) in curves.items():
        reached = np.flatnonzero(losses <= target)
        cells = ["never", "", ""]
        if len(reached):  # between two evaluations in a straight line
            upto = slice(max(0, reached[0] - 1), reached[0] + 1)
            tokens, flops, seconds = (np.interp(-target, -losses[upto], other[upto]) for other in others)
            cells = [f"{tokens:,.0f}", f"{flops:.3g}", f"{seconds:.1f}"]
        print(f"{folder:24} {losses.min():10.4f} {cells[0]:>14} {cells[1]:>10} {cells[2]:>9}")
    if o.plot:
        lines = [(folder, "o-", flops, losses) for folder, (losses, _, flops, _) in curves.items()]
        picture(o.plot, [("training curves", "FLOPs", NATS, lines)])


# ---- what comes out

MACHINES = {  # peak of dense bfloat16 in FLOP/s, bytes of memory; NVIDIA's data sheets
    "a100": (312e12, 80e9),
    "h100": (989e12, 80e9),
    "h200": (989e12, 141e9),
    "b200": (2250e12, 180e9),
}


def devices(machine: str) -> tuple[int, float, float]:
    """How many devices a --machine such as 8xh100 has, the peak of one and its memory. Raises ValueError."""
    count, _, kind = machine.rpartition("x")
    known = kind in MACHINES and (count or "1").isdecimal() and int(count or 1)
    require(known, f"--machine={machine}: write 8xh100 or such; there are {', '.join(MACHINES)}")
    return int(count or 1), *MACHINES[kind]


def fold(text: str) -> str:
    """A text in lines of 80 columns, all but the first indented."""
    return textwrap.fill(text, 80, subsequent_indent="    ", break_on_hyphens=False)


def continued(command: str) -> str:
    """A command in lines of 80 columns that a shell reads as one."""
    lines = textwrap.wrap(command, 78, subsequent_indent="    ", break_long_words=False, break_on_hyphens=False)
    return " \\\n".join(lines)


def duration(seconds: float) -> str:
    """A time in the largest unit of which it is one or more.

    >>> duration(90), duration(86400 * 12.5)
    ('1.5 minutes', '12.5 days')
    """
    for unit, size in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= size:
            return f"{seconds / size:.3g} {unit}"
    return f"{seconds:.3g} seconds"


def quantities(found: dict[str, list[float]]) -> str:
    """Quantities with their 90% intervals, a line each."""
    return "".join(
        f"\n  {name:13} {value:10.4g}  ({low:.4g} to {high:.4g})"
        for name, (value, low, high) in found.items()
    )


def write(path: Path, found: dict | list | str) -> None:
    """Write something as JSON, or a text, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        file.write((found if isinstance(found, str) else json.dumps(found, indent=1)).encode())


def back_test(runs: Runs, o: Options) -> str:
    """Fit the law without the largest budget and predict its runs: how far off, and how many inside their intervals."""
    # This is the honest form of "within how much does it predict": no run of that size was seen.
    *rest, last = runs.budgets()
    below = np.concatenate([last[:0], *rest])
    few = len(rest) < 2
    if few or len(runs.keep(below).main()) < 6:
        return "back-test: it needs three budgets, and six runs below the largest"
    last = runs.keep(last).main()
    found = Chinchilla(runs.keep(below), o).losses(last.N, last.D)
    low, high = np.quantile(found[1:], (0.05, 0.95), axis=0)
    inside = np.sum((low <= last.loss) & (last.loss <= high))
    error = np.abs(found[0] / last.loss - 1)
    return fold(f"back-test: without the largest budget the law is {error.mean():.2%} off its {len(last)} runs, "
                f"{error.max():.2%} at most; {inside} are inside their intervals")


def fit(runs: Runs, o: Options, name: str) -> tuple[dict, str]:
    """Each law that these runs can tell of, by name, and what is to be said of them; writes fit.json."""
    fits, found, lost = {}, {}, []
    said = [f"{name}: {len(runs)} runs of {runs.C[0]:.3g} to {runs.C[-1]:.3g} FLOPs"]
    if runs.C[-1] < 10 * runs.C[0]:
        said.append("the budgets span less than a factor of 10: the exponents say little")
    said += [f"no law looks at the column {name}; `options` of a .jsonl's rows are read"
             for name in ("learning_rate", "batch_size") if name in runs.rows[0]]  # all its values count as one
    for key, kind in FITS.items():
        try:
            fits[key] = kind(runs, o)
            found[key] = fits[key].constants()
            said.append(key + quantities(found[key]))
            said += [f"  {doubt}" for doubt in fits[key].doubts]
        except ValueError as error:
            lost.append(f"{key} ({error})")
    if lost:
        said.append(fold("not fitted: " + "; ".join(lost)))
    require(len(found) > 0, f"no law could be fitted to {name}")
    if "parametric" in fits:
        for key in ("alpha", "beta"):
            value, low, high = fits["parametric"].profile(key)
            hardly = "; these runs hardly tell it" if high - low > value else ""
            said.append(fold(f"{key} by its profile likelihood {value:.4g} ({low:.4g} to {high:.4g}){hardly}"))
        value, low, _ = found["parametric"]["E"]
        if low < 0.6 * value:
            said.append(fold("E is uncertain by a third or more: the runs do not reach to where the loss flattens"))
        said.append(back_test(runs, o))
    C = o.predict or runs.C[-1]
    for key in found:
        found[key]["optimum"] = dict(C=C, **fits[key].predict(C))
    write(Path(o.output) / "fit.json", found)
    print("\n".join(said), flush=True)
    return fits, "\n".join(said)


def best_plan(ledger: Ledger, fits: dict, C: float, trained: float = 0.0) -> dict:
    """The best plan for C FLOPs by the laws, of which `trained` are those of training (0: all).

    Its size is the parametric law's, its learning rate and batch are those of the valleys, where they were varied.
    """
    best = fits["parametric"].predict(C)["N"][0]
    changes = {axis: fits[axis].at(C)[0] for axis in ("learning_rate", "batch_size") if axis in fits}
    if "batch_size" in changes:
        changes["batch_size"] = max(1, round(changes["batch_size"]))
    plans = [ledger.plan(trained or C, n_embd=width, **changes) for width in WIDTHS]
    return plans[nearest(plans, best)]


def predict(fits: dict, o: Options, ledger: Ledger | None, sha256: str) -> str:
    """What each fit says of --predict FLOPs, printed; with --preregister kept in prediction.json, hashed and dated."""
    found = {name: law.predict(o.predict) for name, law in fits.items()}
    law = fits["parametric"]
    said = [f"{name} at {o.predict:.4g} FLOPs{quantities(values)}" for name, values in found.items()]
    times = o.predict / law.runs.C[-1]
    if times > 100:
        said.append(fold(f"this is {times:,.0f} times the largest run: no interval knows what happens on the way"))
    N, D = found["parametric"]["N"][0], found["parametric"]["D"][0]
    off = found.get("isoflop", {}).get("N", [N])[0] / N - 1
    if o.inference_tokens:
        knows = ", ".join(name for name in fits if isinstance(fits[name], Law))
        said.append(fold(f"the served tokens are paid out of these FLOPs in {knows}, not in the others"))
    elif abs(off) > 0.01:
        said.append(fold(f"isoflop's N is {off:+.0%} from the parametric law's: its parabolas are symmetric and see "
                         "one budget at a time, the law's valleys are not and see all budgets"))
    # Days and memory are arithmetic, not measurements: 40% of the peak, and 16 bytes a parameter.
    count, peak, memory = devices(o.machine)
    trained = o.predict - law.k * N * o.inference_tokens / 3
    require(trained > 0, "--inference_tokens cost more than --predict pays for")
    seconds = trained / (count * peak * 0.4)
    said.append(fold(f"{D / N:.3g} tokens a parameter; {duration(seconds)} on {o.machine} at 40% of its peak; weights, "
                     f"gradients and AdamW in float32 take {16 * N / 1e9:.3g} GB, one device has {memory / 1e9:.0f}"))
    # What will be trained has a width of WIDTHS, not the best N itself: the loss is that of the nearest such model.
    stored = dict(FLOPs=trained, found=found, loss=found["parametric"]["loss"])
    if ledger and not o.table:
        plan = best_plan(ledger, fits, o.predict, trained)
        losses = law.losses(plan["N"], plan["D"])[:, 0]
        stored |= dict(plan, **summarise(dict(loss=losses)))
        value, low, high = stored["loss"]
        command = f"python train.py {' '.join(words_of(plan['options']))}"
        said.append(f"the nearest model has N {plan['N']:,} and loss {value:.4f} ({low:.4f} to {high:.4f})\n"
                    f"{continued(command)}")
    if o.preregister:
        path = Path(o.output) / "prediction.json"
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        write(path, stored | dict(data_sha256=sha256, time=now))
        trains = "which trains it in RUN if nothing is there" if "options" in stored else "with a run in RUN"
        said.append(f"{path} holds this; next, {trains}:\n"
                    f"python scaling.py --output={o.output} --check=RUN")
    print("\n".join(said))
    return "\n".join(said)


def check(o: Options) -> tuple[float, float]:
    """Compare the last loss of the run in the folder --check with the preregistered one; first train it if need be.

    Returns its FLOPs and loss.
    """
    path = Path(o.output) / "prediction.json"
    require(path.exists(), f"{path} is not there: a study with --preregister writes it")
    try:
        stored = json.loads(path.read_bytes())
        value, low, high = map(float, stored["loss"])
        wanted = float(stored["FLOPs"])
    except (ValueError, TypeError, KeyError) as error:
        raise ValueError(f"{path} is no prediction, or is damaged") from error
    log = Path(o.check) / "log.jsonl"
    # Nothing of the study is asked again: the options, the price and the interval are those that were written down.
    wished = stored.get("options", {})
    rows = rows_of(log) if log.exists() else []
    begun = rows[0].get("options") if rows else wished
    same = begun and all(alike(begun.get(name), wished[name]) for name in wished)
    ended = any(row.get("step") == wished.get("max_iters") for row in rows)
    if not rows or wished and same and not ended:  # it is not there, or was killed
        require(wished, f"{log} is not there, and {path} does not say how to train it")
        print(f"training for {stored['C']:.4g} FLOPs in {o.check}", flush=True)
        error = Ledger(o).launch(wished, Path(o.check))
        require(not error, error)
    # A run of other FLOPs would say nothing of the prediction, however good its loss.
    used, loss = evaluations(o.check, ("flops", "val_loss"))[:, -1]
    reason = f"{o.check} took {used:.3g} FLOPs; the prediction is for {wanted:.3g}"
    require(abs(used / wanted - 1) < 0.05, reason + f" (stopped? train.py --resume --output={o.check} goes on)")
    inside = "inside" if low <= loss <= high else "outside"
    print(f"predicted {value:.4f} ({low:.4f} to {high:.4f}) on {stored.get('time')}")
    print(f"measured  {loss:.4f}, {loss / value - 1:+.2%}, {inside} the interval")
    return used, loss


def write_page(o: Options, said: list[str], sha256: str) -> None:
    """OUTPUT/report.md: one page with all that is needed to redo the study."""
    versions = f"Python {platform.python_version()}, numpy {np.__version__}"
    machine = f"{platform.machine()}, {os.cpu_count()} cores"
    command = shlex.join(["python", "scaling.py", *sys.argv[1:]])
    # Whoever reads the page can run the command, compare the hash, and refit the same rows.
    parts = [
        "# A scaling study",
        f"`{command}` on {time.strftime('%Y-%m-%d', time.gmtime())} ({versions}, {machine}).",
        f"`runs.jsonl` (SHA-256 {sha256}) has options, price and curve of all runs; `--fit` of it gives this:",
        "```\n" + "\n\n".join(said) + "\n```",
    ]
    if o.plot:
        plot = os.path.relpath(o.plot, o.output)
        parts.append(f"![curves, runs of equal FLOPs, best sizes, least losses]({plot})")
    path = Path(o.output) / "report.md"
    write(path, "\n\n".join(parts) + "\n")
    print(f"{path} holds this")


# ---- pictures, with matplotlib where it is installed

NATS = "validation loss, nats a token"


def picture(path: str, panels: list[tuple[str, str, str, list]]) -> None:
    """Panels, two in a row: (title, what x is, what y is, series); all x are logarithmic.

    A series is (label, style, x, y), or (label, style, x, y, low, high) with a band.
    """
    from matplotlib import pyplot
    names = {y_name for _, _, y_name, _ in panels}
    shape = math.ceil(len(panels) / 2), min(2, len(panels))
    size = 6.5 * shape[1], 4.5 * shape[0]
    figure, grid = pyplot.subplots(*shape, figsize=size, sharey=len(names) == 1, squeeze=False, layout="tight")
    for axes, (title, x_name, y_name, series) in zip(grid.flat, panels):
        for label, style, x, y, *band in series:
            line, = axes.plot(x, y, style, label=label, linewidth=1.2, markersize=4)
            if band:
                axes.fill_between(x, *band, alpha=0.15, color=line.get_color())
        scale = "linear" if y_name == NATS else "log"
        axes.set(title=title, xlabel=x_name, ylabel=y_name, xscale="log", yscale=scale)
        axes.legend(fontsize=8)
        axes.grid(alpha=0.3)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"{path} written")


def draw_study(path: str, runs: Runs, fits: dict, target: float, measured: tuple = ()) -> None:
    """Four panels: training curves, parabolas, the best sizes and the least losses over FLOPs, with their bands.

    `target` is the FLOPs of a prediction (0: none), `measured` FLOPs and loss of a run that was predicted.
    """
    main = runs.main()
    budgets = main.budgets()
    curves, valleys, sizes, losses = [], [], [], []
    for at in budgets:
        label: Any = f"{main.C[at].mean():.2g} FLOPs"
        valleys.append((label, "o", main.N[at], main.loss[at]))
        points = []
        for i in at:
            points += main.rows[i].get("curve") or [[main.C[i], main.loss[i]]]
            points.append([math.nan, math.nan])  # lifts the pen
        curves.append((label, ".-", *np.transpose(points)))
    for n, loss in getattr(fits.get("isoflop"), "parabolas", ()):
        valleys.append((None, "k-", np.exp(n), loss))
    # Only laws of N and D say how low the loss will be; all of these say which size.
    C = np.geomspace(main.C[0], max(3 * main.C[-1], target), 40)
    for name in ("parametric", "isoflop", "envelope"):
        found = [fits[name].predict(c) for c in C if name in fits]
        for series, key in ((sizes, "N"), (losses, "loss")):
            band = [each[key] for each in found if key in each]
            if band:
                series.append((name, "-", C, *np.transpose(band)))
    best = [at[main.loss[at].argmin()] for at in budgets]
    sizes.append(("best run", "k.", main.C[best], main.N[best]))
    losses.append(("best run", "k.", main.C[best], main.loss[best]))
    if target and "parametric" in fits:
        value, low, high = fits["parametric"].predict(target)["loss"]
        losses.append(("predicted", "k_:", [target] * 3, [low, value, high]))
    if measured:
        losses.append(("measured", "r*", *measured))
    picture(path, [
        ("training curves", "FLOPs", NATS, curves),
        ("runs of equal FLOPs", "N, parameters", NATS, valleys),
        ("best size, 90% bands", "FLOPs", "N, parameters", sizes),
        ("least loss, 90% bands", "FLOPs", NATS, losses),
    ])


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
        alone: dict = dict(nargs="?", const=True) if field.type is bool else {}
        parser.add_argument(f"--{field.name}", type=read, default=field.default, help=argparse.SUPPRESS, **alone)
        shown = f"{field.default:g}" if field.type is float else field.default
        head = f"\n  --{field.name}={shown} ".ljust(31)
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
    except (OSError, ValueError, MemoryError, RuntimeError, ModuleNotFoundError) as error:
        scarce = re.search("memory|new thread|unavailable|Storage size|bad_alloc", str(error))
        if sys.flags.dev_mode or isinstance(error, RuntimeError) and not scarce:
            raise
        if not getattr(error, "filename", "-"):  # stdout's disk is full, or its reader left, as in `| head`
            sys.stdout = sys.stderr  # for Python flushes it at the end
        sys.exit(0 if isinstance(error, BrokenPipeError) else f"{Path(sys.argv[0]).name}: {str(error) or 'no memory'}")


# questions that are answered alone, and those that would be left open
APART = {
    "runs": "fit table sweep mup check predict",
    "fit": "table sweep mup plan",
    "mup": "sweep plan",
}


def main() -> None:
    o = options(Options, sys.argv[1:])
    good = Path(o.plot).suffix in ("", ".png", ".pdf", ".svg", ".jpg")
    require(good, f"--plot={o.plot} is no picture; .png, .pdf, .svg and .jpg are")
    require(not (o.plot and o.sweep), "--plot is of a study, --fit, --mup or --runs, not of --sweep")
    found = not o.plot or importlib.util.find_spec("matplotlib")
    require(found, "--plot needs matplotlib: pip install matplotlib")
    require("{command}" in o.launch, "--launch has no {command} in it")
    require(o.resamples >= 20, "--resamples: an interval needs 20 or more")
    require(o.sizes >= 3, "--sizes: a valley needs 3 or more")
    require(min(o.n_seeds, o.batch_size, o.block_size) > 0, "--n_seeds, --batch_size, --block_size: 1 or more")
    least = min(o.predict, o.inference_tokens, o.workers, o.seed)
    require(least >= 0, "--predict, --inference_tokens, --workers, --seed: 0 or more")
    require(0 <= o.reuse < 1, "--reuse is a share of the steps, below 1")
    require(o.predict or not o.preregister, "--preregister needs --predict")
    require(o.runs or not o.to_loss, "--to_loss needs --runs")
    for first, others in APART.items():
        for other in others.split():
            both = getattr(o, first) and getattr(o, other)
            require(not both, f"--{first} has no --{other}: leave one of them out")
    devices(o.machine)
    if o.runs:
        return compare_runs(o)
    measured = check(o) if o.check else ()
    if measured and not o.plot:
        return
    path = Path(o.output) / "prediction.json"
    require(not (o.preregister and path.exists()), f"{path} is there already; a prediction is made once")
    if measured:  # the picture of the study, with what came of its prediction
        o.fit = o.fit or str(Path(o.output) / "runs.jsonl")
    ledger: Any = None if o.fit else Table(o) if o.table else Ledger(o)
    if o.sweep or o.mup:
        return sweep(o, ledger) if o.sweep else mup(o, ledger)
    if ledger:
        outline(o, ledger)
        if o.plan:
            return
        study(o, ledger)
    table = Path(o.fit or ledger.path)
    runs = read_runs(table)
    sha256 = hashlib.sha256(table.read_bytes()).hexdigest()
    fits, text = fit(runs, o, str(table))
    said = [text]
    if o.predict:
        require("parametric" in fits, "there is no fit to predict a loss from")
        said.append(predict(fits, o, ledger, sha256))
    if o.plot:
        draw_study(o.plot, runs, fits, o.predict, measured)
    if ledger:
        write_page(o, said, sha256)
    if ledger and not o.table and "parametric" in fits:
        rows = [best_plan(ledger, fits, C) for C in np.geomspace(runs.C[0], 1000 * runs.C[-1], 40)]
        write(Path(o.output) / "recipe.json", rows)
        print(f"next: python train.py --flops={3 * runs.C[-1]:.2g}, which reads {Path(o.output) / 'recipe.json'}")


if __name__ == "__main__":
    run(main)
