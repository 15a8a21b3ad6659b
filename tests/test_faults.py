"""The short form of faults.py: some cases of each class and script, and offenders that the judge must complain about.

The long form: python tests/faults.py --rounds=50 --seed=0
"""
import sys

import faults
import pytest

# script -> class -> numbers of the cases that are tried: all of them different files and kinds of faults
PICKS = dict(option=range(1), spoil=range(0, 99, 50), change=range(1), stop=range(1), full=range(1), memory=range(1), place=range(1))
MORE = dict(train=dict(twice=range(1), spoil=range(0, 99, 33), change=range(1)), data=dict(twice=range(1)))
FEW = dict(kernels=dict(option=range(3)), ddp=dict(option=range(2), spoil=range(0, 12, 4), change=range(1)))  # they are slow
SEED = 1


@pytest.fixture(scope="module")
def sweep(server, tmp_path_factory):
    """A sweep with the files that all cases begin with."""
    sweep = faults.Sweep(tmp_path_factory.mktemp("faults"), SEED, server)
    faults.build(server, sweep.base)
    return sweep


@pytest.mark.parametrize("script", faults.SCRIPTS)
def test_a_fault_ends_in_a_line_and_nothing_is_lost(script, sweep):
    tried, wrong = 0, []
    for kind, numbers in (FEW.get(script) or PICKS | MORE.get(script, {})).items():
        for name in (f"{script}/{kind}/{number}" for number in numbers):
            case, found, bad = sweep.do(name) or (None, [], [])
            tried += len(found)
            wrong += [f"{case.what}: {word}\n{faults.repeat_command(name, SEED)}" for word in bad]
    assert wrong == []
    assert tried > 2


OFFENDER = """
import os, pickle, signal, subprocess, sys, time
name, what = "offender.py", sys.argv[1]
if what == "traceback":
    {}["key"]
elif what == "silent":
    sys.exit(1)
elif what == "code":
    sys.exit(7)
elif what == "lines":
    sys.exit(f"{name}: this is wrong\\n{name}: and that is wrong")
elif what == "nameless":
    sys.exit(f"{name}: this is wrong")
elif what == "crash":
    os.abort()
elif what == "waits":
    time.sleep(99)
elif what == "deaf":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    time.sleep(99)
elif what == "stays":
    subprocess.Popen(["sleep", "99"])
elif what == "loses":
    os.remove("run.json")
    sys.exit(f"{name}: the file is lost")
elif what == "cuts":
    open("run.json", "w").write("[1,")
    sys.exit(f"{name}: the file is cut")
elif what == "part":
    open("run.json.part", "w").write("[1,")
    sys.exit(f"{name}: the disk is full")
elif what == "unpickles":
    pickle.load(open("bomb.pkl", "rb"))
elif what == "once":
    if os.path.exists("mark"):
        sys.exit(f"{name}: the mark is there, remove it")
    open("mark", "w").close()
    time.sleep(1)
elif what == "moves":
    os.rename("run.json", "previous.json")
    sys.exit(f"{name}: the file of an earlier run was moved")
elif what == "good":
    sys.exit(f"{name}: --input=x is no file")
"""


@pytest.fixture(scope="module")
def offender(sweep, tmp_path_factory):
    """A function that gives the complaints about a run of the offending script."""
    folder = tmp_path_factory.mktemp("offender")
    (folder / "offender.py").write_text(OFFENDER)

    def complaints(what, names="", again=False, **job):
        place = folder / "case"
        place.mkdir(exist_ok=True)
        for path in place.iterdir():
            path.unlink()
        (place / "run.json").write_text("[1, 2]")
        (place / "bomb.pkl").write_bytes((sweep.base / "foreign" / "bomb.pkl").read_bytes())
        before = faults.snapshot(place)
        case = faults.Case(what, [what], names=names, again=again)
        job = dict(script=str(folder / "offender.py"), words=[what], cwd=str(place), patience=1, **job)
        found = sweep.server.run(job)
        bad = faults.offences(case, "offender", found[0], place, before) + faults.losses(case, found, place, before, case.words)
        if (place / "unpickled").exists():
            (place / "unpickled").rmdir()
        return bad
    return complaints


@pytest.mark.parametrize("what, complaint", [
    ("traceback", "traceback: KeyError"), ("silent", "its last line does not say"), ("code", "exit code 7"), ("lines", "2 lines"),
    ("crash", "ended by signal 6"), ("stays", "left processes"), ("loses", "run.json is lost"), ("cuts", "run.json is damaged"),
    ("part", "run.json.part is left behind"), ("unpickles", "unpickled"), ("nameless", "does not name")])
def test_the_judge_complains(what, complaint, offender):
    found = offender(what, names="corpus" if what == "nameless" else "")
    assert len(found) == 1 and complaint in found[0], found


@pytest.mark.parametrize("what", ["good", "moves"])
def test_the_judge_lets_pass(what, offender):
    assert offender(what) == []


def test_the_judge_sees_who_hangs(offender):
    assert offender("waits", idle=1)[0].startswith("hangs and does not mind Ctrl-C")
    assert offender("waits", limit=1, idle=9)[0].startswith("hangs")
    assert offender("deaf", limit=1, idle=2)[0].startswith("hangs and does not mind Ctrl-C")


def test_a_case_is_a_function_of_seed_and_name(sweep):
    first, second = [sweep.case("bpe/option/3") for _ in range(2)]
    assert first == second or (first.what, first.words) == (second.what, second.words)
    names = [*faults.names_of(2, ["bpe", "option"]), *faults.names_of(1, ["train"])]
    assert names[:2] == ["bpe/option/0", "bpe/option/1"] and {name.split("/")[1] for name in names} == {*faults.FAULTS}
    for script in faults.SCRIPTS:
        options = dict(faults.fields(script))
        assert set(options.values()) <= {int, float, str, bool} and len(options) > 5


def test_every_script_is_swept():
    assert {*faults.RUNS} == {*faults.SCRIPTS}
    sys.path.insert(0, str(faults.ROOT))
