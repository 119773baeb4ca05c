"""The run kit: folders that survive a kill, errors in one line; and the shape of the code."""
import ast
import fcntl
import importlib
import json
import os
import signal
import subprocess
import sys
import textwrap
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

import common
from common import (Run, UserError, atomic, image_grid, one_line_errors, save, save_picture,
                    seed_step)

TOP = sorted(path.name for path in ROOT.glob("*.py"))
STAGES = ["01_toy_2d.py", "02_edm_cifar.py", "03_pixart_t2i.py"]
SCRIPTS = TOP + sorted(str(path.relative_to(ROOT)) for path in ROOT.glob("lab/*.py"))


class Killed(BaseException):
    """Stands for a kill: nothing catches this exception."""


def small_run(folder, die=None, facts=None, **changes):
    """A run of six updates of a small network, with its log, pictures aside. -> the Run"""
    args = Namespace(**{"steps": 6, "batch": 4, "save_every": 2, "seed": 0, "t_star": 2.5,
                        "lr": 0.1, "fresh": False, "out": str(folder), "batch_gpu": None} | changes)
    torch.manual_seed(1)
    net = torch.nn.Linear(2, 2)
    optimiser = torch.optim.Adam(net.parameters())
    run = Run(args, folder, facts or {"teacher": "x"}, net, {"size": 2}, net=net, opt=optimiser)
    if run.finished():
        return run
    for step in run.steps():
        loss = net(torch.randn(4, 2, generator=seed_step(args.seed, step))).square().mean()
        run.add(loss=loss)
        loss.backward()
        common.update(optimiser, args.lr)
        if step == die:
            raise Killed
        if run.due(every=1):
            run.write(extra=step)
    save({"steps": args.steps}, folder / "metrics.json")
    return run


def same(a, b):
    """Two folders hold the same networks, optimisers and log, bit for bit; times aside."""
    times = ("seconds", "eta", "images_s")
    for name in ("ckpt.pt", "g_ema.pt"):
        states = [torch.load(folder / name, weights_only=True) for folder in (a, b)]
        a_text, b_text = [json.dumps(state | {"seconds": 0}, default=torch.Tensor.tolist)
                          for state in states]
        assert a_text == b_text
    logs = [[json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
            for folder in (a, b)]
    for log in logs:
        for line in log:
            [line.pop(name) for name in times]
    assert logs[0] == logs[1]


def content(folder):
    return {path: path.read_bytes() for path in folder.rglob("*")
            if path.is_file() and path.name != ".lock"}


# ---- a run and its folder ----
def test_a_run_leaves_what_it_promises(tmp_path, capsys):
    run = small_run(tmp_path / "run")
    saved = torch.load(tmp_path / "run" / "g_ema.pt", weights_only=True)
    assert saved["net_args"] == {"size": 2} and saved["t_star"] == 2.5
    assert saved["meta"] == {"teacher": "x", "step": 6}
    assert torch.equal(saved["state_dict"]["weight"], run.net.weight)
    lines = run.lines()
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and lines[2]["images"] == 12
    assert lines[-1].keys() == {"step", "loss", "extra", "images", "images_s", "seconds", "eta"}
    recorded = json.loads((tmp_path / "run" / "args.json").read_text())
    assert recorded == {"steps": 6, "batch": 4, "seed": 0, "t_star": 2.5, "lr": 0.1, "teacher": "x"}
    assert {path.name for path in (tmp_path / "run").iterdir()} == {
        "args.json", "ckpt.pt", "g_ema.pt", "log.jsonl", "metrics.json", ".lock"}
    assert "step 6/6  loss" in capsys.readouterr().out


@pytest.mark.parametrize("when", ["before", "after"])
def test_killed_at_every_moment_of_writing(tmp_path, monkeypatch, when, capsys):
    """Killed at each rename in turn, and continued: the same as never killed, bit for bit."""
    small_run(tmp_path / "whole")
    rename, renames = os.replace, iter(())

    def replace(source, target):
        die = next(renames, False)
        if not die or when == "after":
            rename(source, target)
        if die:
            Path(source).write_bytes(b"half")  # what a kill leaves under the temporary name
            raise Killed
    monkeypatch.setattr(os, "replace", replace)
    for number in range(8):  # args.json, log.jsonl, then g_ema.pt and ckpt.pt three times
        renames, folder = iter([False] * number + [True]), tmp_path / str(number)
        with pytest.raises(Killed):
            small_run(folder)
        small_run(folder)
        same(folder, tmp_path / "whole")
        assert not list(folder.glob(".tmp*"))
    assert capsys.readouterr().out.count("goes on from step") == 4  # 2 twice, 4 twice


def test_killed_in_an_update(tmp_path, capsys):
    small_run(tmp_path / "whole")
    for step in (1, 4, 5):  # the log has lines past the checkpoint then
        with pytest.raises(Killed):
            small_run(tmp_path / "run", die=step)
        with (tmp_path / "run" / "log.jsonl").open("a") as file:
            file.write('{"step": 5, "lo')  # what a kill leaves of a line
    assert "run goes on from step 4 of 6" in capsys.readouterr().out
    small_run(tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole")


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM])
def test_signals(tmp_path, monkeypatch, kind, capsys):
    """The update ends, is saved, and status 130 says so; the same command goes on."""
    small_run(tmp_path / "whole")
    write = Run.write
    monkeypatch.setattr(Run, "write", lambda run, **values: (
        write(run, **values), run.step == 3 and os.kill(os.getpid(), kind)))
    with pytest.raises(SystemExit) as stop:
        one_line_errors(lambda argv: small_run(tmp_path / "run"))()
    error = capsys.readouterr().err
    assert stop.value.code == 130 and "step 3 is saved in" in error and "goes on" in error
    assert torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)["step"] == 3
    assert error.count("\n") == 1 and signal.getsignal(kind) == signal.SIG_DFL  # a second one kills
    monkeypatch.setattr(Run, "write", write)
    small_run(tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole")


def test_a_finished_run_says_so_and_trains_no_more(tmp_path, capsys):
    small_run(tmp_path / "run")
    before = content(tmp_path)
    capsys.readouterr()
    small_run(tmp_path / "run")
    out = capsys.readouterr().out
    assert "is finished" in out and "--fresh" in out and "step 6/6" not in out
    assert content(tmp_path) == before
    (tmp_path / "run" / "metrics.json").unlink()  # a result that is missing is measured again
    small_run(tmp_path / "run")
    assert content(tmp_path).keys() == before.keys()


def test_fresh_moves_the_old_run_aside(tmp_path, capsys):
    for i in range(3):
        small_run(tmp_path / "run", fresh=True, seed=i)
    seeds = [json.loads((tmp_path / name / "args.json").read_text())["seed"]
             for name in ("run.old-1", "run.old-2", "run")]
    assert seeds == [0, 1, 2] and capsys.readouterr().out.count("moved the older run to") == 2


def test_the_arguments_of_another_run(tmp_path):
    small_run(tmp_path / "run")
    before = content(tmp_path)
    for changes, text in (({"lr": 0.2}, "lr is 0.1 there and 0.2 here"),
                          ({"facts": {"teacher": "y"}}, "teacher is x there and y here"),
                          ({"more": 1}, "more is None there and 1 here")):
        with pytest.raises(UserError, match=f"another run .{text}.*--fresh"):
            small_run(tmp_path / "run", **changes)
    small_run(tmp_path / "run", save_every=1, batch_gpu=2)  # is no other run
    assert content(tmp_path) == before
    foreign = tmp_path / "folder"
    foreign.mkdir()
    (foreign / "thesis.txt").write_text("text")
    with pytest.raises(UserError, match="no run's folder"):
        small_run(foreign, fresh=True)
    assert len(list(foreign.iterdir())) == 1


HOLD = "import fcntl,sys; f=open(sys.argv[1],'w'); fcntl.lockf(f,fcntl.LOCK_EX|fcntl.LOCK_NB); " \
       "print('held',flush=True); sys.stdin.read()"  # another process that holds a lock


@pytest.mark.parametrize("fresh", [False, True])
def test_two_processes_never_share_a_folder(tmp_path, fresh):
    lock = tmp_path / "run" / ".lock"
    small_run(tmp_path / "run")
    run = small_run(tmp_path / "run", fresh=fresh)  # while this object lives, its lock is held
    other = [sys.executable, "-c", HOLD, lock]
    assert "Resource temporarily" in subprocess.run(other, capture_output=True, text=True).stderr
    run.lock_file.close()
    with subprocess.Popen(other, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as held:
        assert held.stdout.readline() == "held\n"
        before = content(tmp_path)
        with pytest.raises(UserError, match="in use by another process"):
            small_run(tmp_path / "run", fresh=fresh)
        held.communicate("")
    assert content(tmp_path) == before and (tmp_path / "run.old-1").exists() == fresh


@pytest.mark.parametrize("error", [PermissionError(13, "Permission denied"),
                                   OSError(30, "Read-only file system")])
def test_a_folder_that_cannot_be_written_is_not_in_use(tmp_path, monkeypatch, error, refused):
    def no_lock(path, *args, **kwargs):
        raise type(error)(error.errno, error.strerror, str(path))
    (tmp_path / "file").write_text("")
    line = refused(one_line_errors(lambda argv: small_run(tmp_path / "file" / "run")), [])
    assert "in use" not in line and "file" in line
    for place, name in ((fcntl, "lockf"), (Path, "open")):
        monkeypatch.setattr(place, name, no_lock)
        line = refused(one_line_errors(lambda argv: small_run(tmp_path / "run")), [])
        assert error.strerror in line and "in use" not in line
    assert "run/.lock" in line


def test_losses_and_weights_that_are_not_finite(tmp_path, monkeypatch):
    add, update = Run.add, common.update
    with monkeypatch.context() as patch:
        patch.setattr(Run, "add", lambda run, loss: add(run, loss=loss / (run.step != 5)))
        with pytest.raises(UserError, match="step 5: loss is inf; .* step 4 in .*run"):
            small_run(tmp_path / "run")
    good = content(tmp_path)
    monkeypatch.setattr(common, "update", lambda opt, lr: update(opt, float("inf")))
    with pytest.raises(UserError, match="step 6: weights .*not finite; .* step 4 in .*run"):
        monkeypatch.setattr(Run, "add", lambda run, loss: None)
        small_run(tmp_path / "run")
    for name in ("ckpt.pt", "g_ema.pt"):
        assert (tmp_path / "run" / name).read_bytes() == good[tmp_path / "run" / name]


@pytest.mark.parametrize("damage", ["cut", "foreign", "other network", "pickle", "list",
                                    "moments", "log"])
def test_damaged_checkpoints(damage, tmp_path):
    small_run(tmp_path / "run")
    path = tmp_path / "run" / ("log.jsonl" if damage == "log" else "ckpt.pt")
    if damage in ("cut", "log"):
        path.write_bytes(path.read_bytes()[:1000] if damage == "cut" else b"not json\n")
    else:
        state = torch.load(path, weights_only=True)
        adam = state["opt"]["state"][0] | {"exp_avg": torch.zeros(3)}  # a fused Adam would crash
        broken = state["opt"] | {"state": state["opt"]["state"] | {0: adam}}
        torch.save({"foreign": {"model": torch.ones(3)}, "list": [1, 2],
                    "moments": state | {"opt": broken}, "pickle": state | {"step": Path("x")},
                    "other network": state | {"net": {"weight": torch.ones(3, 3)}}}[damage], path)
    before = content(tmp_path)
    with pytest.raises(UserError, match=f"{path.name} cannot be used .*--fresh"):
        small_run(tmp_path / "run")
    assert content(tmp_path) == before


# ---- files ----
def test_a_crash_during_a_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save({"step": 1}, path)
    old = path.read_bytes()
    with pytest.raises(AttributeError):  # a local function cannot be pickled
        save({"big": torch.zeros(100_000), "bad": lambda: 0}, path)
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        raise ZeroDivisionError
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_names_the_file(tmp_path, monkeypatch, refused):
    """A rename that fails, a file that cannot be written, and what torch makes of the latter."""
    no_space, torch_s_own = OSError(28, "No space left on device"), RuntimeError("[enforce]\n2\n3")
    for module, name, error in ((os, "replace", no_space), (torch, "save", no_space),
                                (torch, "save", torch_s_own)):
        small_run(folder := tmp_path / f"{name} {type(error).__name__}", steps=2)
        before = content(folder)

        def full(*args, error=error):
            raise error
        with monkeypatch.context() as patch:
            patch.setattr(module, name, full)
            fails = one_line_errors(lambda argv, path=folder / "ckpt.pt": save({}, path))
            line = refused(fails, [])
        assert f"{folder}/ckpt.pt could not be written" in line and str(error)[:9] in line
        assert content(folder) == before


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",)
    torch.save({"net_args": Evil(), "state_dict": {}, "t_star": 1.0, "meta": {}}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="cannot be used"):
        common.load_generator(tmp_path / "x.pt", lambda: torch.nn.Linear(1, 1))
    assert not (tmp_path / "ran").exists()


def test_pictures(tmp_path):
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 5) + 100
    grid = np.array(image_grid(images, columns=2))
    assert grid.shape == (8, 10, 3) and (grid[4:, 5:] == 255).all() and (grid[:4, :5] == 100).all()
    assert (grid[:4, 5:] == 101).all() and (grid[4:, :5] == 102).all()
    grey = torch.linspace(-1, 1, 24).reshape(2, 2, 3, 2)[:, :1]  # of two channels the first one
    assert (np.array(image_grid(grey)) == common.to_uint8(grey).reshape(6, 2).numpy()).all()
    save_picture(image_grid(images[:1]), tmp_path / "a.gif",
                 [image_grid(images[1:2]), image_grid(images[2:])])
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
    levels = torch.tensor([-2, -1, 0, 0.999, 1, 2])
    assert common.to_uint8(levels).tolist() == [0, 0, 128, 255, 255, 255]  # as EDM does it


def test_where_samples_go(tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    place = lambda out=None, run=run: common.sample_path(Namespace(out=out, n=5, seed=3), run)
    assert place() == place(run=run / "g_ema.pt") == run / "samples-5-seed-3.png"
    for name in ("a/x.png", "b/x.npz", "c"):
        assert place(str(tmp_path / name)) == tmp_path / name
    assert (tmp_path / "b").is_dir() and (tmp_path / "c").is_dir()
    for name in ("c/0.png", "a/x.png", "run/samples-5-seed-3.png"):
        (tmp_path / name).write_text("")
    assert place() == run / "samples-5-seed-3.png"  # the same samples, drawn once more
    for out, text in (("c", "exists"), ("a/x.png", "exists"), ("x.jpg", "expected .png"),
                      ("c/0.png/y.png", "written")):
        with pytest.raises(UserError, match=text):
            place(str(tmp_path / out))


# ---- errors ----
@pytest.mark.parametrize("error", [TypeError("x"), ValueError("x"), KeyError("x"), IndexError("x"),
                                   RuntimeError("shapes differ"), AttributeError("x"), Killed()])
def test_programmers_errors_keep_their_traceback(error):
    def main(argv):
        raise error
    with pytest.raises(type(error)):
        one_line_errors(main)()


@pytest.mark.parametrize("error, status, text", [
    (UserError("wrong"), 2, "error: wrong"), (FileNotFoundError(2, "No such file", "x"), 2, "'x'"),
    (MemoryError(), 2, "out of memory"), (RuntimeError("[enforce] can't allocate memory: 9"), 2,
                                          "out of memory"),
    (torch.OutOfMemoryError("CUDA out of memory. Tried"), 2, "--batch-gpu"),
    (KeyboardInterrupt(), 130, "stopped: ")])
def test_users_errors_are_one_line(error, status, text, capsys):
    def main(argv):
        raise error
    with pytest.raises(SystemExit) as stop:
        one_line_errors(main)()
    line = capsys.readouterr().err
    assert stop.value.code == status and text in line and line.count("\n") == 1


# ---- the code ----
def tree(script):
    return ast.parse((ROOT / script).read_text())


def imports(script):
    """-> the names of modules, those of importlib.import_module("name") too."""
    names = []
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [node.module]
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names += [arg.value for arg in node.args if isinstance(arg, ast.Constant)]
    return {name.split(".")[0] for name in names}


@pytest.mark.parametrize("script", TOP)
def test_imports_run_one_way(script):
    """lab -> stages -> common, eval_fid -> stage 2 -> common; matplotlib is for lab/ alone."""
    may = {"common.py": set(), "eval_fid.py": {"common", "02_edm_cifar"}}.get(script, {"common"})
    names = imports(script)
    ours = {Path(name).stem for name in TOP} | {"lab"} | {p.stem for p in ROOT.glob("lab/*.py")}
    assert names & ours <= may and "matplotlib" not in names


@pytest.mark.parametrize("script", SCRIPTS)
def test_functions_and_lines_are_short(script):
    """And args is written by the parser alone."""
    for node in ast.walk(tree(script)):
        if isinstance(node, ast.FunctionDef):
            assert node.end_lineno - node.lineno < 45, node.name
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        assert not [ast.unparse(t) for t in targets if isinstance(t, ast.Attribute)
                    and ast.unparse(t.value) == "args"]
        assert not ast.unparse(node).startswith(("setattr(args", "vars(args)[", "vars(args).u"))
    assert max(len(line) for line in (ROOT / script).read_text().split("\n")) <= 100


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_imports_few_names(script):
    (names,) = [node.names for node in tree(script).body if isinstance(node, ast.ImportFrom)
                and node.module == "common"]
    assert len(names) <= 36


def algorithm_2(script):
    """-> the lines between the two markers, and the number of lines of the loop around them"""
    lines = (ROOT / script).read_text().split("\n")
    begin, end = [[i for i, line in enumerate(lines) if f"# ---- Algorithm 2: {word} ----" in line]
                  for word in ("begin", "end")]
    assert len(begin) == len(end) == 1
    (loop,) = [node for node in ast.walk(tree(script)) if isinstance(node, ast.For)
               and ast.unparse(node.iter) == "run.steps()" and node.lineno < begin[0]
               and node.end_lineno > end[0]]
    return textwrap.dedent("\n".join(lines[begin[0]:end[0]])), loop.end_lineno - loop.lineno + 1


@pytest.mark.parametrize("script", STAGES)
def test_algorithm_2_is_the_same_in_each_stage(script):
    text, lines = algorithm_2(script)
    assert text == algorithm_2(STAGES[0])[0] and text.count("\n") > 15 and lines < 45


@pytest.mark.parametrize("script", STAGES)
def test_help_and_an_unknown_flag(script, capsys, refused):
    main = importlib.import_module(Path(script).stem).main
    with pytest.raises(SystemExit) as stop:
        main(["--help"])
    shown = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0 and "(default: phuber)" in shown and "(Table 5: 2.5)" in shown
    for flags in (["--no-such-flag"], ["--step", "5"], ["--distance", "l3"]):
        assert flags[-1] in refused(main, flags)
