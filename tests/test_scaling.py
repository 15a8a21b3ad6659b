"""Tests of scaling.py: known laws found again, an optimiser beside scipy's, a ledger whose runs are a stub of train.py."""
import csv
import itertools
import json
import math
import subprocess
import sys
import time

import numpy as np
import pytest

import model
import scaling
from conftest import ROOT

LAW = dict(A=406.4, alpha=0.34, B=410.7, beta=0.28, E=1.69)  # Hoffmann et al. 2022, equation 10


def loss_of(N, D, A=406.4, alpha=0.34, B=410.7, beta=0.28, E=1.69):
    return E + A / N**alpha + B / D**beta


def made(noise=0.0, seed=0, budgets=6, sizes=9):
    """Runs of a known law: (4, n), N and D spread around 20 tokens a parameter."""
    C, share = np.meshgrid(np.geomspace(1e18, 1e20, budgets), np.geomspace(1 / 6, 6, sizes))
    N = np.sqrt(C / 120) * share
    D = C / 6 / N
    loss = loss_of(N, D) * np.exp(noise * np.random.default_rng(seed).normal(size=N.shape))
    return np.array([column.ravel() for column in (N, D, C, loss)])


# ------------------------------------------------------------------------------------------------------------------- fits

def test_huber_by_its_definition():
    for r, delta in itertools.product((-3.0, -0.5, 0.0, 0.5, 1.0, 7.0), (0.25, 1.0, math.inf)):
        expected = r * r / 2 if abs(r) <= delta else delta * (abs(r) - delta / 2)
        with np.errstate(invalid="ignore"):
            assert scaling.huber(np.array(r), delta) == pytest.approx(expected)


def test_minimise_solves_a_linear_problem_exactly():
    """Weighted linear least squares have a closed form."""
    random = np.random.default_rng(0)
    X, y, weights = random.normal(size=(20, 3)), random.normal(size=20), random.uniform(0.1, 2, size=(5, 20))
    found = scaling.minimise(lambda p: p @ X.T - y, random.normal(size=(5, 3)), weights)
    for p, w in zip(found, weights):
        assert p == pytest.approx(np.linalg.solve(X.T * w @ X, X.T * w @ y), rel=1e-9)


def test_minimise_resists_an_outlier_with_huber():
    y = np.array([1.0, 1.01, 0.99, 1.0, 50.0])
    def residual(p):
        return p - y
    mean, = scaling.minimise(residual, np.zeros((1, 1)), np.ones(5))[0]
    robust, = scaling.minimise(residual, np.zeros((1, 1)), np.ones(5), delta=1e-3)[0]
    assert mean == pytest.approx(y.mean()) and abs(robust - 1) < 0.02


@pytest.mark.parametrize("delta", [1e-3, math.inf])
def test_minimise_is_never_worse_than_scipy(delta):
    optimize = pytest.importorskip("scipy.optimize", reason="scipy is not installed")
    for noise in (0.0, 0.01):
        n, d, _, y = np.log(made(noise))
        def residual(p):
            a, alpha, b, beta, e = p.T[:, :, None]
            return np.log(np.exp(a - alpha * n) + np.exp(b - beta * d) + np.exp(e)) - y
        def cost(p):
            with np.errstate(invalid="ignore"):
                return scaling.huber(residual(np.array([p]))[0], delta).sum()
        starts = np.array([(a, 0.3, b, 0.3, 0.3) for a in (3.0, 6.0) for b in (3.0, 6.0)])
        ours = cost(scaling.minimise(residual, starts, np.ones(len(n)), delta)[0])
        theirs = min(optimize.minimize(cost, start, method="L-BFGS-B", options=dict(maxiter=3000, maxfun=30000, ftol=1e-15)).fun
                     for start in starts)
        assert ours <= theirs * (1 + 1e-9)


@pytest.mark.parametrize("noise, tolerance", [(0.0, 0.005), (0.002, 0.05)])
def test_a_known_law_is_found_again(noise, tolerance):
    found = scaling.Chinchilla(made(noise), scaling.Options(resamples=20)).constants()
    for name in ("alpha", "beta") + (("A", "B", "E") if noise == 0 else ()):
        assert found[name][0] == pytest.approx(LAW[name], rel=tolerance), name
    share = LAW["beta"] / (LAW["alpha"] + LAW["beta"])
    assert found["N_exponent"][0] == pytest.approx(share, rel=tolerance)
    assert found["N_exponent"][0] + found["D_exponent"][0] == pytest.approx(1)


@pytest.mark.slow
def test_intervals_of_noisy_runs_hold_the_truth():
    """Over 30 noisy studies the 90% intervals hold the exponents, and a new run's loss, about as often as they say."""
    hits = dict.fromkeys(("alpha", "beta", "loss"), 0)
    for seed in range(30):
        law = scaling.Chinchilla(made(0.01, seed), scaling.Options(resamples=40, seed=seed))
        found, at = law.constants(), law.predict(1e21)
        for name in ("alpha", "beta"):
            hits[name] += found[name][1] <= LAW[name] <= found[name][2]
        new = loss_of(at["N"][0], at["D"][0]) * math.exp(0.01 * np.random.default_rng(1000 + seed).normal())
        hits["loss"] += at["loss"][1] <= new <= at["loss"][2]
    assert all(22 <= count <= 30 for count in hits.values()), hits


def test_the_optimum_is_the_closed_form():
    """N = G (C / k)^(beta / (alpha + beta)), G = (alpha A / (beta B))^(1 / (alpha + beta))."""
    law = scaling.Chinchilla(made(), scaling.Options(resamples=5))
    total = LAW["alpha"] + LAW["beta"]
    G = (LAW["alpha"] * LAW["A"] / LAW["beta"] / LAW["B"]) ** (1 / total)
    for C in (1e19, 1e23):
        N = G * (C / 6) ** (LAW["beta"] / total)
        found = law.predict(C)
        assert found["N"][0] == pytest.approx(N, rel=0.01) and found["D"][0] == pytest.approx(C / 6 / N, rel=0.01)
        assert found["loss"][0] == pytest.approx(loss_of(N, C / 6 / N), rel=1e-6)


def test_tokens_that_are_served_make_the_model_smaller():
    plain = scaling.Chinchilla(made(), scaling.Options(resamples=5)).predict(1e21)
    served = scaling.Chinchilla(made(), scaling.Options(resamples=5, inference_tokens=1e12)).predict(1e21)
    assert served["N"][0] < 0.8 * plain["N"][0]
    N, D = served["N"][0], served["D"][0]
    assert 6 * N * D + 2 * N * 1e12 == pytest.approx(1e21, rel=1e-6)  # the whole bill


def test_isoflop_finds_exact_parabolas():
    """Bottoms at N = 3 C^0.45: parabolas in log N, so the exponent is exact; an edge is left out and said."""
    C, offset = np.meshgrid(np.geomspace(1e18, 1e21, 4), (-1.0, -0.3, 0.2, 0.9))
    n = np.log(3) + 0.45 * np.log(C) + offset
    runs = np.array([np.exp(n).ravel(), (C / 6 / np.exp(n)).ravel(), C.ravel(), (2 + offset**2).ravel()])
    law = scaling.IsoFLOP(runs, scaling.Options(resamples=10))
    assert law.constants()["N_exponent"][0] == pytest.approx(0.45, rel=1e-6)
    assert law.predict(1e22)["N"][0] == pytest.approx(3 * 1e22**0.45, rel=1e-6)
    assert law.predict(1e22)["D"][0] == pytest.approx(1e22 / 6 / law.predict(1e22)["N"][0], rel=1e-6)


def test_isoflop_leaves_out_what_is_not_bracketed(capsys):
    runs = made()
    falling = runs[2] < 2e18  # at the least budget only the sizes below the best
    best = np.sqrt(1e18 / 120) * 0.9
    kept = ~falling | (runs[0] < best)
    scaling.IsoFLOP(runs[:, kept], scaling.Options(resamples=5))
    assert "at 1e+18 FLOPs the best size is not between two others" in capsys.readouterr().out
    only = made(budgets=1)
    with pytest.raises(ValueError, match="two budgets"):
        scaling.IsoFLOP(only, scaling.Options(resamples=5))


def test_the_course_data(test_data, capsys, tmp_path):
    """72 noise-free runs: both approaches agree on N and D at 1e23 and 1e24 within 2%."""
    fits = scaling.fit(test_data / "scaling/isoflops_curves.json", scaling.Options(output=str(tmp_path), resamples=20))
    for C in (1e23, 1e24):
        by_law, by_parabola = fits["parametric"].predict(C), fits["isoflop"].predict(C)
        assert by_parabola["N"][0] == pytest.approx(by_law["N"][0], rel=0.02)
        assert by_law["N"][0] * by_law["D"][0] * 6 == pytest.approx(C, rel=1e-6)
    assert json.loads((tmp_path / "fit.json").read_text())["parametric"]["alpha"][0] == pytest.approx(0.34, rel=0.01)


# ----------------------------------------------------------------------------------------------------------------- tables

def table(path, rows):
    if path.suffix == ".csv":
        with open(path, "w", newline="") as file:
            writer = csv.DictWriter(file, rows[0].keys())
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text(json.dumps(rows) if path.suffix == ".json" else "".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("suffix", [".csv", ".json", ".jsonl"])
@pytest.mark.parametrize("names", [("N", "D", "C", "loss"), ("parameters", "tokens", "compute_budget", "final_loss")])
def test_tables_of_all_kinds(suffix, names, tmp_path):
    runs = made()
    rows = [dict(zip(names, map(float, run)), note="x") for run in runs.T]
    path = table(tmp_path / f"runs{suffix}", rows + rows[:3])  # three stand there twice
    if suffix == ".jsonl":
        path.write_text(path.read_text() + '{"N": 12')  # cut short by a kill
    assert scaling.read_runs(path) == pytest.approx(np.array(sorted(map(tuple, runs.T))).T)


@pytest.mark.parametrize("missing", ["D", "C"])
def test_a_missing_column_follows(missing, tmp_path):
    runs = made()
    rows = [{name: float(value) for name, value in zip(("N", "D", "C", "loss"), run) if name != missing} for run in runs.T]
    found = scaling.read_runs(table(tmp_path / "runs.json", rows))
    assert found[2] == pytest.approx(6 * found[0] * found[1])


GOOD = [dict(N=1e6 * (i + 1), D=1e8, loss=3.0) for i in range(6)]


@pytest.mark.parametrize("rows, part", [
    (GOOD[:4], "4 different runs"), (GOOD + [dict(N=0.0, D=1e8, loss=3.0)], "run 6"),
    (GOOD + [dict(N=1e6, D=1e8, loss=float("nan"))], "run 6"), (GOOD + [dict(N=1e6, D=1e8)], "run 6 needs"),
    (GOOD + [dict(N=1e6, loss=3.0)], "run 6 needs"), (GOOD + [dict(N="0", D=1e8, loss=3.0)], "above 0"), (GOOD + [dict(N=1e6, D=-5.0, loss=3.0)], "run 6"),
    (GOOD + [dict(N="many", D=1e8, loss=3.0)], "many"),
    ([dict(N=i + 1.0, D=1e8, loss=3.0) for i in range(6)], "in millions"), ({"N": 3}, "no table"), ([1, 2], "no table")])
def test_tables_that_are_refused(rows, part, tmp_path):
    path = tmp_path / "runs.json"
    path.write_text(json.dumps(rows))
    with pytest.raises(ValueError, match=part):
        scaling.read_runs(path)


def test_what_is_no_table(tmp_path, run_script):
    (tmp_path / "runs.json").write_text("import os; os.system('touch hacked')")
    done = run_script("scaling.py", "--fit=runs.json", cwd=tmp_path)
    assert done.returncode == 1 and done.stderr.startswith("scaling.py: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "hacked").exists()


def test_spread():
    assert scaling.spread("1,2.5,1e3") == [1, 2.5, 1000] and scaling.spread("7") == [7]
    assert scaling.spread("1e11..1e13:3") == pytest.approx([1e11, 1e12, 1e13])
    for bad in ("a,b", "1..2", "1..2:x", ""):
        with pytest.raises(ValueError):
            scaling.spread(bad)


# ----------------------------------------------------------------------------------------------------------------- ledger

STUB = '''
import json, os, sys, pathlib
words = dict(word[2:].split("=", 1) for word in sys.argv[1:] if word.startswith("--") and "=" in word)
folder = pathlib.Path(words["output"]); folder.mkdir(parents=True, exist_ok=True)
with open(os.environ["CALLS"], "a") as file: file.write(json.dumps(words) + "\\n")
if os.environ.get("FAIL"): sys.exit("stub: it failed")
tokens = int(words["max_iters"]) * int(words["batch_size"]) * int(words["block_size"])
N, each = json.loads(os.environ["PRICES"])[words["n_embd"]]
loss = 2 + 60 / N**0.3 + 300 / tokens**0.4 + 1e-4 * int(words["seed"])
rows = [dict(options={}), dict(step=int(words["max_iters"]), tokens=tokens, flops=tokens * each, seconds=1.0, val_loss=loss, bpb=1.0)]
(folder / "log.jsonl").write_text("".join(json.dumps(row) + "\\n" for row in rows))
'''


@pytest.fixture
def ledger(tmp_path, monkeypatch):
    """A function that opens a ledger (options) whose runs are the stub; .calls() are the runs that were started."""
    (tmp_path / "stub.py").write_text(STUB)
    (tmp_path / "tokens").mkdir()
    np.save(tmp_path / "tokens/train.npy", np.arange(512, dtype=np.uint16))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setattr(scaling, "WIDTHS", scaling.WIDTHS[:9])
    opened = []
    def go(**changes):
        for other in opened:
            other.lock.close()
        o = scaling.Options(**{**dict(output=str(tmp_path / "study"), data=str(tmp_path / "tokens"), block_size=32, resamples=20,
                                      launch=f"{sys.executable} {tmp_path / 'stub.py'} {{command}}"), **changes})
        (tmp_path / "study").mkdir(exist_ok=True)
        book = scaling.Ledger(o)
        opened.append(book)
        prices = {}
        for width in scaling.WIDTHS:
            _, N, step = book.price(width)
            prices[width] = N, step // o.batch_size // o.block_size
        monkeypatch.setenv("PRICES", json.dumps(prices))
        return book
    go.calls = lambda: [json.loads(line) for line in (tmp_path / "calls").read_text().splitlines()]
    return go


def test_price_is_the_accounting(ledger):
    book = ledger()
    shape, N, step = book.price(128)
    gpt = model.GPT(model.Config(vocab_size=512, **shape))
    assert N == sum(p.numel() for name, p in gpt.named_parameters() if p.ndim == 2 and not name.startswith("embedding"))
    cost = model.account(gpt.config, 1)
    assert step == 3 * cost["forward_flops"] * book.o.batch_size  # a batch of block_size tokens each
    plan = book.plan(128, 1e9)
    assert plan["C"] == plan["options"]["max_iters"] * step and abs(plan["C"] / 1e9 - 1) < 0.5 * step / 1e9


def test_a_run_is_paid_for_once(ledger, tmp_path):
    book = ledger()
    plans = [book.plan(width, 1e9) for width in (32, 48)]
    first = book.ask(plans + plans[:1])
    assert [row["N"] for row in first] == [plan["N"] for plan in plans + plans[:1]] and len(ledger.calls()) == 2
    assert book.ask(plans) == first[:2] and len(ledger.calls()) == 2
    again = ledger()  # another process
    assert again.ask(plans) == json.loads(json.dumps(first[:2])) and len(ledger.calls()) == 2
    assert sum(row["C"] for row in again.rows.values()) == sum(plan["C"] for plan in plans)
    assert ledger.calls()[0]["learning_rate"] == "0.01" and "resume" not in ledger.calls()[0]


def test_a_cut_line_is_a_run_that_is_asked_again(ledger, tmp_path):
    """kill -9 in the middle of a line: the rows before it stand, the run itself is asked for again and charged once."""
    book = ledger()
    plans = [book.plan(width, 1e9) for width in (32, 48)]
    rows = book.ask(plans)
    whole = (tmp_path / "study/runs.jsonl").read_bytes()
    for cut in (len(whole) - 1, len(whole) - 9, whole.index(b"\n") + 5, whole.index(b"\n") + 1, 3):
        (tmp_path / "study/runs.jsonl").write_bytes(whole[:cut])
        again = ledger()
        assert again.ask(plans) == json.loads(json.dumps(rows)), cut
        assert (tmp_path / "study/runs.jsonl").read_bytes() == whole


def test_the_budget_cannot_be_overspent(ledger):
    book = ledger(total=2.5e9)
    book.ask([book.plan(32, 1e9)])
    with pytest.raises(ValueError, match="--total=2.5e.09"):
        book.ask([book.plan(48, 1e9), book.plan(64, 1e9)])
    assert len(ledger.calls()) == 1  # none of them was started
    book.ask([book.plan(48, 1e9)])


def test_a_run_that_fails_charges_nothing(ledger, monkeypatch):
    book = ledger()
    monkeypatch.setenv("FAIL", "1")
    with pytest.raises(ValueError, match="stub: it failed"):
        book.ask([book.plan(32, 1e9)])
    assert book.rows == {} and ledger().rows == {}


def test_a_second_study_in_the_folder_is_refused(ledger, tmp_path, run_script):
    ledger()
    done = run_script("scaling.py", f"--output={tmp_path / 'study'}", f"--data={tmp_path / 'tokens'}", "--plan", cwd=tmp_path)
    assert done.returncode == 1 and "another study is at work" in done.stderr


def test_the_study_brackets_and_predicts(ledger, tmp_path, capsys):
    book = ledger(budgets="3e9..1e12:5", sizes=3)
    o = book.o
    scaling.study(o, book)
    by_budget = {}
    for row in book.rows.values():
        by_budget.setdefault(round(math.log(row["C"]) * 2), []).append(row)
    seeds = [row["options"]["seed"] for row in book.rows.values()]
    assert seeds.count(1) == 5 and max(seeds) == 1  # two seeds at each budget's best
    fits = scaling.fit(book.path, o)
    assert fits["parametric"].constants()["alpha"][0] == pytest.approx(0.3, abs=0.02)
    assert "left out" not in capsys.readouterr().out  # every budget's best lies between two others
    rows = scaling.best_runs(book, fits["parametric"])
    assert [row["C"] for row in rows] == sorted(row["C"] for row in rows) and len(rows) == 16
    assert rows[0]["N"] <= rows[8]["N"] <= rows[-1]["N"] and rows[0]["N"] < rows[-1]["N"]


def test_plan_starts_nothing(ledger, tmp_path, capsys):
    book = ledger(plan=True, budgets="3e9..1e11:3")
    scaling.study(book.o, book)
    assert len(capsys.readouterr().out.splitlines()) == 3 and not (tmp_path / "calls").exists()
    with pytest.raises(ValueError, match="20 steps of three sizes"):
        scaling.study(scaling.Options(budgets="1e6"), book)


@pytest.mark.slow
def test_preregistration(tmp_path, run_script):
    path = table(tmp_path / "runs.csv", [dict(zip("NDC", map(float, run[:3])), loss=float(run[3])) for run in made(0.001).T])
    words = [f"--fit={path}", "--output=study", "--predict=1e21", "--preregister", "--resamples=50"]
    done = run_script("scaling.py", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    stored = json.loads((tmp_path / "study/prediction.json").read_text())
    N, D = stored["found"]["parametric"]["N"][0], stored["found"]["parametric"]["D"][0]
    (tmp_path / "run").mkdir()
    def measured(loss, C=1e21):
        (tmp_path / "run/log.jsonl").write_text('{"options": {}}\n' + json.dumps(dict(flops=C, val_loss=loss)) + "\n")
        return run_script("scaling.py", "--output=study", "--check=run", cwd=tmp_path)
    good = measured(loss_of(N, D))
    assert good.returncode == 0 and "inside the interval" in good.stdout and " +0." in good.stdout.replace("-0.", "+0.")
    assert "outside the interval" in measured(1.1 * loss_of(N, D)).stdout
    assert "the prediction is for 1e+21" in measured(3.0, 1e19).stderr
    again = run_script("scaling.py", *words, cwd=tmp_path)  # a prediction is made once
    assert again.returncode == 1 and "a prediction is made once" in again.stderr


@pytest.mark.slow
def test_kill_at_random_moments(tmp_path):
    """A real study killed again and again charges each run once."""
    import random
    words = [sys.executable, str(ROOT / "scaling.py"), "--budgets=1e9,2e9", "--sizes=3", "--n_seeds=1", "--output=study",
             "--batch_size=1", "--block_size=32"]
    for _ in range(6):
        process = subprocess.Popen(words, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        time.sleep(random.uniform(3, 25))
        process.kill()
        process.wait()
    done = subprocess.run(words, cwd=tmp_path, capture_output=True, text=True)
    rows = [json.loads(line) for line in (tmp_path / "study/runs.jsonl").read_text().splitlines()]
    assert len({row["key"] for row in rows}) == len(rows) >= 6, done.stderr
