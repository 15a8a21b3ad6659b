"""The fits of scaling.py beside scipy's: the same objective, starts and runs, in alternation.

    python tests/bench_scaling.py [--rounds=5]

54 runs of a known law with 1% of noise, 27 starts, Huber loss of 1e-3 on the logarithm. scipy minimises from each start
by L-BFGS-B, with finite differences and with exact gradients. Prints medians, the least cost that each reached, and how
long 500 bootstrap fits take here.
"""
import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
import itertools
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import numpy as np
from test_scaling import made

import scaling


def main():
    rounds = int(dict(word.lstrip("-").split("=") for word in sys.argv[1:]).get("rounds", 5))
    try:
        from scipy import optimize
    except ImportError:
        sys.exit("bench_scaling.py: scipy is not installed, and it is the rival")
    law = scaling.Chinchilla(made(0.01), scaling.Options(resamples=20))
    starts = np.array(list(itertools.product(*law.grid.values())))
    delta = scaling.DELTA

    def cost(p):
        return scaling.huber(law.residual(p[None])[0], delta).sum()

    def cost_and_gradient(p):
        r = law.residual(p[None])[0]
        slopes = scaling.slopes_of(law.residual, p[None])[0]
        return scaling.huber(r, delta).sum(), np.clip(r, -delta, delta) @ slopes

    def ours():
        return cost(scaling.minimise(law.residual, starts, np.ones(len(law.runs)), delta)[0])

    def theirs(function, exact):
        settings = dict(maxiter=3000, maxfun=100_000, ftol=1e-15, gtol=1e-12)
        with np.errstate(all="ignore"):
            found = [optimize.minimize(function, start, jac=exact, method="L-BFGS-B", options=settings) for start in starts]
        return min(each.fun for each in found)

    sides = {
        "scaling.minimise": ours,
        "scipy, differences": lambda: theirs(cost, False),
        "scipy, exact gradients": lambda: theirs(cost_and_gradient, True),
    }
    took, least = {name: [] for name in sides}, {}
    for _ in range(rounds):
        for name, side in sides.items():
            began = time.process_time()
            least[name] = side()
            took[name].append(time.process_time() - began)
    for name, times in took.items():
        print(f"{name:24} {statistics.median(times):8.3f} s of processor time ({min(times):.3f} to {max(times):.3f}), "
              f"cost {least[name]:.12g}")
    base = statistics.median(took["scaling.minimise"])
    ratios = [f"{statistics.median(times) / base:.1f} x" for name, times in took.items() if name != "scaling.minimise"]
    print("scipy takes " + " and ".join(ratios))
    began = time.process_time()
    scaling.resampled(law.residual, law.p[:1], len(law.runs), scaling.Options(resamples=500), delta)
    print(f"500 bootstrap fits: {time.process_time() - began:.2f} s of processor time")


if __name__ == "__main__":
    if "--help" in sys.argv:
        sys.exit(print(__doc__))
    main()
