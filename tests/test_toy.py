"""01_toy_2d.py: the theorem, the exact denoiser, and runs as a user types them."""

import copy
import importlib
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import DISTANCES, seed_step

toy = importlib.import_module("01_toy_2d")
ROOT = Path(__file__).parent.parent
SHORT = ["--part", "distil", "--steps", "60", "--batch", "64", "--pretrain-steps", "20", "--save-every", "20"]


def script(*arguments, cwd=ROOT, **options):
    return subprocess.run(
        [sys.executable, ROOT / "01_toy_2d.py", *map(str, arguments)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=120,
        **options,
    )


# ---- the theorem ----
@pytest.mark.parametrize(
    "name, params, limit",
    [
        ("l2", {}, 1e-12),
        ("power", {"alpha": 4}, 1e-11),
        ("exp", {"alpha": 2, "beta": 0.1}, 1e-11),
        ("smoothl1", {"scale": 0.5}, 1e-11),
        ("phuber", {"c": 0.5}, 1e-11),
        ("huber", {"delta": 0.7}, 1e-3),
    ],
)
@pytest.mark.parametrize("process, space, t", [("VE", "denoiser", 1.0), ("VP", "score", 2.5)])
def test_theorem(name, params, limit, process, space, t):
    assert toy.theorem_error(t, process, space, DISTANCES[name](**params), 2, nodes=261) < limit


def test_theorem_with_the_papers_c():
    assert toy.theorem_error(1.0, "VE", "denoiser", DISTANCES["phuber"](0.001), 1, nodes=40_001) < 1e-8


def test_theorem_fails_under_autograd_for_l1_on_any_grid():
    errors = [toy.theorem_error(1.0, "VE", "denoiser", DISTANCES["l1"](), 2, nodes) for nodes in (141, 281)]
    assert min(errors) > 0.03 and abs(errors[0] - errors[1]) < 0.01


@pytest.mark.parametrize("variant", toy.WRONG)
@pytest.mark.parametrize("t", [0.5, 1.0, 2.5])
def test_negative_controls(variant, t):
    for distance in (DISTANCES["l2"](), DISTANCES["phuber"](0.5)):
        assert toy.theorem_error(t, "VE", "denoiser", distance, 2, 141, toy.WRONG[variant]) > 0.03


# ---- the mixture ----
@pytest.mark.parametrize("a, s", [(1.0, 0.3), (1.0, 2.0), (0.6, 0.8)])
@pytest.mark.parametrize("std", [0.0, 0.1])
def test_exact_score_is_the_gradient_of_the_log_density(a, s, std):
    means = toy.make_mixture("spiral").means.double()
    x = torch.randn(50, 2, dtype=torch.float64).requires_grad_()
    each = torch.distributions.Normal(a * means, math.sqrt((a * std) ** 2 + s**2))
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(len(means))), torch.distributions.Independent(each, 1)
    )
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    mixture = toy.Mixture(means, std)
    torch.testing.assert_close(mixture.score(x, s, a), score)
    torch.testing.assert_close(mixture.denoiser(x, s, a), (x + s**2 * score) / a)  # Tweedie


def test_exact_denoiser_is_the_posterior_mean():
    torch.manual_seed(0)
    mixture = toy.make_mixture("ring")
    x_0 = mixture.sample(1_000_000)
    x_t = x_0 + 0.3 * torch.randn_like(x_0)
    near = (x_t - torch.tensor([0.7, 0.2])).norm(dim=1) < 0.05
    error = (mixture.denoiser(x_t[near], 0.3) - x_0[near]).mean(0)
    assert (error.abs() < 4 * x_0[near].std(0) / near.sum().sqrt()).all() and near.sum() > 1000


def test_measures():
    mixture, random = toy.make_mixture("ring"), torch.Generator().manual_seed(0)
    x = mixture.sample(20_000, random)
    on_modes, shares = toy.mode_shares(x, mixture)
    assert on_modes == pytest.approx(1 - math.exp(-8), abs=1e-3) and max(abs(np.array(shares) - 0.125)) < 0.01
    shift = torch.tensor([0.3, 0.4])  # the mean over directions of (shift . direction)^2 is |shift|^2 / 2
    assert toy.sliced_w2(toy.projections(x), toy.projections(x + shift)) == pytest.approx(
        0.5 / math.sqrt(2), rel=1e-4
    )


# ---- runs ----
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy") / "run"
    done = script(*SHORT, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done.stdout


def test_a_run_leaves_what_it_promises(finished):
    folder, output = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() >= {
        "method",
        "distance",
        "mixture",
        "seed",
        "steps",
        "seconds",
        "share_on_modes",
        "mode_shares",
        "sw2",
        "sw2_exact",
        "sw2_teacher",
    }
    assert len(metrics["mode_shares"]) == 8 and sum(metrics["mode_shares"]) == pytest.approx(1)
    assert metrics["share_on_modes_teacher"] > 0.99 and metrics["sw2_exact"] < 0.05 and metrics["steps"] == 60
    for name in ("samples.png", "divergence.png", "animation.gif"):
        with Image.open(folder / name) as image:
            image.verify()
    with Image.open(folder / "animation.gif") as gif:
        assert gif.n_frames > 10
    saved = torch.load(folder / "g_ema.pt", weights_only=True)
    assert saved.keys() == {"net_args", "state_dict", "t_star", "meta"} and saved["t_star"] == 2.5
    assert json.loads((folder / "args.json").read_text())["steps"] == 60
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1]["step"] == 60 and lines[-1].keys() >= {
        "loss_psi",
        "loss_theta",
        "divergence",
        "y_norm",
        "sw2",
    }
    assert f"python 01_toy_2d.py --sample {folder}" in output
    assert not list(folder.rglob(".tmp*"))


def test_sample_draws_the_same_from_folder_and_file(finished, tmp_path):
    folder, _ = finished
    for source, place in ((folder, tmp_path / "a"), (folder / "g_ema.pt", tmp_path / "b")):
        toy.main(["--sample", str(source), "--n", "300", "--seed", "3", "--out", str(place)])
    a, b = [np.load(tmp_path / place / "drawn-300-seed-3.npy") for place in "ab"]
    assert a.shape == (300, 2) and (a == b).all() and np.isfinite(a).all()


def same_run(a, b):
    """Checkpoints equal bit for bit, logs equal but for times."""
    a_state, b_state = [torch.load(folder / "ckpt.pt", weights_only=True) for folder in (a, b)]
    for state in (a_state, b_state):
        del state["log"]["seconds"]
    torch.testing.assert_close(a_state, b_state, rtol=0, atol=0)
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k not in ("seconds", "eta")}
            for line in (folder / "log.jsonl").read_text().splitlines()
        ]
        for folder in (a, b)
    ]
    assert logs[0] == logs[1]


def test_resume_after_kill_9(finished, tmp_path):
    """Killed twice at moments nobody chose, then continued: the same as never killed."""
    command = [sys.executable, ROOT / "01_toy_2d.py", *SHORT, "--out", tmp_path / "killed"]
    for moment in (7, 27):  # of 60 steps
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        for line in process.stdout:
            if line.startswith("step") and int(line.split()[1].split("/")[0]) > moment:
                os.kill(process.pid, signal.SIGKILL)
                break
        process.wait()
    assert not (tmp_path / "killed" / "metrics.json").exists()
    assert torch.load(tmp_path / "killed" / "ckpt.pt", weights_only=True)["log"]["step"] < 60
    subprocess.run(command, check=True, capture_output=True)
    same_run(finished[0], tmp_path / "killed")


def test_train_is_algorithm_2(tmp_path):
    """Two updates of each network by hand; the teacher stays as it is."""
    args = toy.parse([*SHORT, "--steps", "2", "--psi-updates", "2", "--anneal", "none", "--distance", "l2"])
    (tmp_path / "samples").mkdir()
    mixture = toy.make_mixture("ring")
    parts = toy.prepare(args, tmp_path, mixture)
    d_psi, g, g_ema, d_q = [copy.deepcopy(parts[name]) for name in ("d_psi", "g", "g_ema", "d_q")]
    toy.train(args, parts["d_q"], parts, lambda: None)
    opt_psi, opt_g = [torch.optim.Adam(net.parameters(), 2e-3, (0.0, 0.999)) for net in (d_psi, g)]
    for step in range(2):
        random = seed_step(0, step)
        for phase in ("psi", "psi", "theta"):
            z, eps = torch.randn(64, 2, generator=random), torch.randn(64, 2, generator=random)
            mean, std = (-1.5, 1.5) if phase == "theta" else (-1.2, 1.2)
            t = (mean + std * torch.randn(64, 1, generator=random)).exp()
            x_0 = g(2.5 * z, 2.5)
            if phase == "psi":
                x_0 = x_0.detach()
                loss = (t**2 + 0.25) / (t * 0.5) ** 2 * (d_psi(x_0 + t * eps, t) - x_0) ** 2
            else:
                f = d_psi(x_0 + t * eps, t)
                loss = -2 * (f - d_q(x_0 + t * eps, t)) * (f - x_0)
            optimiser = opt_psi if phase == "psi" else opt_g
            optimiser.zero_grad()
            (loss.sum() / 64).backward()
            optimiser.step()
        beta = 0.5 ** (64 / max(min(7e4, 0.05 * 64 * step), 1e-8))
        for a, b in zip(g_ema.parameters(), g.parameters()):
            a.data = beta * a.data + (1 - beta) * b.data
    for name, net in (("d_psi", d_psi), ("g", g), ("g_ema", g_ema), ("d_q", d_q)):
        for a, b in zip(parts[name].parameters(), net.parameters()):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


def test_theorem_rows(monkeypatch, capsys):
    """All forms and controls are in the table, and a score's scale goes with it."""
    monkeypatch.setattr(toy, "theorem_error", lambda *args: 0.0)
    rows = toy.theorem()
    assert {(row["process"], row["space"]) for row in rows} == {
        ("VE", "denoiser"),
        ("VE", "score"),
        ("VP", "score"),
    }
    assert {row["variant"] for row in rows} == {"theorem", *toy.WRONG} and {row["t"] for row in rows} == {
        0.5,
        1.0,
        2.5,
    }
    assert {row["distance"] for row in rows} == set(DISTANCES)
    (row,) = [
        r
        for r in rows
        if (r["distance"], r["dim"], r["space"], r["process"], r["t"]) == ("phuber", 2, "score", "VP", 2.5)
    ]
    a, s = (1 + 2.5**2) ** -0.5, 2.5 * (1 + 2.5**2) ** -0.5
    assert row["params"]["c"] == pytest.approx(0.5 * a / s**2)


def test_a_lost_generator_is_written_again(finished, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", finished[0], folder], check=True)
    (folder / "g_ema.pt").unlink()
    toy.main([*SHORT, "--out", str(folder)])
    a, b = [
        torch.load(place / "g_ema.pt", weights_only=True)["state_dict"] for place in (folder, finished[0])
    ]
    torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_other_arguments_in_a_run_folder(finished, tmp_path):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", finished[0], folder], check=True)
    read = lambda: {
        path: path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.name != ".lock"
    }
    before = read()
    refused = script(*SHORT, "--lr", "0.001", "--out", folder)
    assert (
        refused.returncode == 2 and refused.stderr.count("\n") == 1 and "lr is 0.002 there" in refused.stderr
    )
    assert before == read()
    again = script(*SHORT, "--lr", "0.001", "--steps", "2", "--out", folder, "--fresh")
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run.old-1" / "ckpt.pt").read_bytes() == before[folder / "ckpt.pt"]


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "sid", "--sid-alpha", "1.2", "--mixture", "grid"],
        pytest.param(["--method", "di", "--mixture", "moons"], marks=pytest.mark.slow),
        ["--distance", "exp", "--alpha", "4", "--beta", "0.5", "--mixture", "spiral", "--teacher", "learned"],
        pytest.param(["--distance", "huber", "--delta", "0.3", "--psi-updates", "2"], marks=pytest.mark.slow),
    ],
)
def test_methods_mixtures_and_teachers(options, tmp_path, capsys):
    toy.main([*SHORT, *options, "--steps", "3", "--out", str(tmp_path / "run")])
    assert json.loads((tmp_path / "run" / "metrics.json").read_text())["steps"] == 3


# ---- user mistakes: one line, exit status 2, nothing written ----
@pytest.mark.parametrize(
    "options",
    [
        ["--distance", "l3"],
        ["--c", "0"],
        ["--c", "-1"],
        ["--c", "nan"],
        ["--c", "inf"],
        ["--c", "x"],
        ["--distance", "power", "--alpha", "3"],
        ["--distance", "l2", "--c", "0.1"],
        ["--distance", "exp", "--beta", "0"],
        ["--steps", "-5"],
        ["--steps", "0"],
        ["--steps", "1.5"],
        ["--batch", "0"],
        ["--lr", "-1"],
        ["--lr", "nan"],
        ["--seed", "-1"],
        ["--device", "tpu"],
        ["--device", "cuda:99"],
        ["--mixture", "cube"],
        ["--no-such-flag"],
        ["--step", "5"],
        ["--out", "/proc/nowhere/run"],
        ["--out", "README.md"],
        ["--out", "tests"],
        ["--sample", "no-such-file.pt"],
        ["--sample", "README.md"],
        ["--sample", "tests"],
        ["--n", "0"],
        ["--p-mean", "nan"],
        ["--sid-alpha", "inf"],
        ["--seed", str(10**30)],
        ["--device", "meta"],
    ],
)
def test_mistakes(options, tmp_path, monkeypatch, capsys):
    before = sorted(ROOT.rglob("*"))
    where = [] if "--out" in options else ["--out", str(tmp_path / "run")]
    with pytest.raises(SystemExit) as stop:
        toy.main([*SHORT, *where, *options])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert not list(tmp_path.iterdir()) and sorted(ROOT.rglob("*")) == before


@pytest.mark.parametrize("damage", ["truncated", "foreign", "other network", "pickle", "not a dict"])
def test_damaged_checkpoints(damage, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    subprocess.run(["cp", "-r", finished[0], folder], check=True)
    for name in ("ckpt.pt", "g_ema.pt"):
        value, path = torch.load(folder / name, weights_only=True), folder / name
        if damage == "truncated":
            path.write_bytes(path.read_bytes()[:1000])
        elif damage == "foreign":
            torch.save({"model": torch.ones(3)}, path)
        elif damage == "other network":
            part = value["g"] if name == "ckpt.pt" else value["state_dict"]
            part["model.layers.0.weight"] = torch.ones(3, 3)
            torch.save(value, path)
        elif damage == "pickle":
            torch.save({"rng": Path("code"), "net_args": os.getcwd}, path)
        else:
            torch.save([1, 2], path)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for options in ([*SHORT, "--out", str(folder)], ["--sample", str(folder)]):
        with pytest.raises(SystemExit) as stop:
            toy.main(options)
        captured = capsys.readouterr()
        assert stop.value.code == 2 and captured.err.count("\n") == 1 and str(folder) in captured.err
    assert before == {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = script(*SHORT, "--distance", "exp", "--beta", "1e6", "--out", tmp_path / "run")
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert "step 1" in done.stderr and "last good checkpoint is step 0" in done.stderr
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    assert all(value.isfinite().all() for value in state["g"].values())


def test_interrupt_says_how_to_go_on(tmp_path):
    process = subprocess.Popen(
        [sys.executable, ROOT / "01_toy_2d.py", *SHORT, "--steps", "100000", "--out", tmp_path],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while not (tmp_path / "ckpt.pt").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert process.returncode == 130 and error.count("\n") == 1 and "goes on" in error
