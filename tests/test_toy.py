"""01_toy_2d.py: the theorem, the exact denoiser, Algorithm 2 by hand, and runs as typed."""
import contextlib
import copy
import functools
import io
import json
import math
import subprocess
from argparse import Namespace

import numpy as np
import pytest
import torch
from conftest import (DEFAULTS, FLAGS, ROOT, algorithm_2, changed, difference, logged,
                      quick_command, toy, trained, vector)
from PIL import Image

import common
from common import DISTANCES

SHORT = ["--part", "distil", "--steps", "3", "--batch", "64", "--pretrain-steps", "5",
         "--save-every", "2", "--device", "cpu"]


@pytest.fixture
def quick(monkeypatch):
    """Few looks at the generator, without pictures; closing measures on few points."""
    monkeypatch.setattr(toy, "LOOKS", 4)
    monkeypatch.setattr(toy, "summarise", functools.partial(toy.summarise, n=200, sets=2))
    monkeypatch.setattr(toy, "panel", lambda *args: Image.new("RGB", (8, 8)))


# ---- the theorem ----
@pytest.mark.parametrize("name, params, limit", [
    ("l2", {}, 1e-12), ("power", {"alpha": 4}, 1e-11), ("exp", {"alpha": 2, "beta": 0.1}, 1e-11),
    ("smoothl1", {"scale": 0.5}, 1e-11), ("phuber", {"c": 0.5}, 1e-11),
    ("huber", {"delta": 0.7}, 1e-3)])
@pytest.mark.parametrize("process, space, t", [("VE", "denoiser", 1.0), ("VP", "score", 2.5)])
def test_theorem(name, params, limit, process, space, t):
    distance = DISTANCES[name](**params)
    assert toy.theorem_error(t, process, space, distance, 2, nodes=201) < limit


def test_theorem_with_the_default_c():
    error = toy.theorem_error(1.0, "VE", "denoiser", DISTANCES["phuber"](0.001), 1, nodes=40_001)
    assert error < 1e-8


def test_theorem_fails_under_autograd_for_l1_on_any_grid():
    errors = [toy.theorem_error(1.0, "VE", "denoiser", DISTANCES["l1"](), 2, nodes)
              for nodes in (141, 281)]
    assert min(errors) > 0.03 and abs(errors[0] - errors[1]) < 0.01


@pytest.mark.parametrize(("t", "expected"), [(0.5, 0.320), (1.0, 0.153), (2.5, 0.077)])
def test_how_far_the_frozen_gradient_is_from_the_whole_one(t, expected):
    """The numbers of another script, which differentiates both integrals as wholes."""
    found = toy.theorem_error(t, "VE", "denoiser", DISTANCES["l2"](), 2, 141, moving=True)
    assert found == pytest.approx(expected, abs=6e-4)


@pytest.mark.parametrize("variant", toy.WRONG)
@pytest.mark.parametrize("t", [0.5, 1.0, 2.5])
def test_negative_controls(variant, t):
    for distance in (DISTANCES["l2"](), DISTANCES["phuber"](0.5)):
        assert toy.theorem_error(t, "VE", "denoiser", distance, 2, 141, toy.WRONG[variant]) > 0.03


def test_the_sides_of_the_theorem_differ_for_another_teacher():
    other = lambda d_psi, d_q, *rest: common.sim_loss(d_psi, lambda x, t: 0.9 * d_q(x, t), *rest)
    assert toy.theorem_error(1.0, "VE", "denoiser", DISTANCES["l2"](), 2, 141, other) > 0.03


def test_theorem_rows(monkeypatch, capsys):
    """All forms and controls are in the table, and a score's scale goes with it."""
    monkeypatch.setattr(toy, "theorem_error", lambda *args, moving: 0.0)
    rows = toy.theorem()
    have = lambda *keys: {tuple(row[key] for key in keys) for row in rows}
    assert have("process", "space") == {("VE", "denoiser"), ("VE", "score"), ("VP", "score")}
    assert have("variant") == {("theorem",), ("whole_gradient",), *[(name,) for name in toy.WRONG]}
    assert have("t") == {(0.5,), (1.0,), (2.5,)} and have("distance") == {(d,) for d in DISTANCES}
    c, s = [row["params"]["c"] for row in rows if row["distance"] == "phuber" and row["dim"] == 2
            and (row["process"], row["t"]) == ("VP", 2.5)][0], 2.5 * (1 + 2.5**2)**-0.5
    assert c == pytest.approx(0.5 * (1 + 2.5**2)**-0.5 / s**2)


def test_the_score_projection_identity():
    """(A.1): E u(x_t)^T (s_p(x_t) - grad log q(x_t | x_0)) = 0 for every u, where s_p is the score
    of x_t, by quadrature. For denoisers it is E u(x_t)^T (d_p(x_t) - x_0) = 0. So the value of
    SIM's loss is 0 where d_psi is right, whatever distance and teacher, and not where it is not."""
    atoms = torch.tensor([[-1.3], [0.2], [0.9]], dtype=torch.float64)  # x_0 is one of them
    eps = torch.linspace(-12, 12, 6001, dtype=torch.float64)[:, None]
    weights = (-eps**2 / 2).exp() / (-eps**2 / 2).exp().sum() / len(atoms)
    u = lambda x: (3 * x).sin() + x**2 / (1 + x.exp())
    teacher = lambda x, *_: torch.tanh(x - 0.4)
    for a, s in ((1.0, 0.3), (1.0, 2.0), (0.6, 0.8)):
        def right(x, *_, a=a, s=s):  # E[x_0 | x_t = x] by Bayes
            return (-(x - a * atoms.T)**2 / (2 * s**2)).softmax(1) @ atoms

        def score(x, *_, a=a, s=s, right=right):
            return (a * right(x) - x) / s**2

        def mean(value, a=a, s=s):
            pairs = [value(x_0.expand_as(eps), a * x_0 + s * eps) for x_0 in atoms]
            return sum((weights * v.reshape(eps.shape)).sum().item() for v in pairs)

        identity = mean(lambda x_0, x_t, f=score, s=s: u(x_t) * (f(x_t) + eps / s))
        of_denoisers = mean(lambda x_0, x_t, f=right: u(x_t) * (f(x_t) - x_0))
        assert max(abs(identity), abs(of_denoisers)) < 1e-12
        for d in (DISTANCES["l2"](), DISTANCES["smoothl1"](), DISTANCES["phuber"](0.5)):
            loss = lambda k, d=d, a=a, s=s, score=score: mean(lambda x_0, _: toy.sim_loss_score(
                lambda *x: k * score(*x), teacher, x_0, a, s, d, eps)[0])
            assert abs(loss(1)) < 1e-12 < 1e-3 < abs(loss(0.8))
            loss = lambda k, d=d, s=s, right=right: mean(lambda x_0, _: common.sim_loss(
                lambda *x: k * right(*x), teacher, x_0, s, d, eps)[0])
            assert a < 1 or abs(loss(1)) < 1e-12 < 1e-3 < abs(loss(0.8))


# ---- the mixtures ----
@pytest.mark.parametrize("a, s", [(1.0, 0.3), (1.0, 2.0), (0.6, 0.8)])
@pytest.mark.parametrize("std", [0.0, 0.1])
def test_exact_score_is_the_gradient_of_the_log_density(a, s, std):
    means = toy.make_mixture("spiral").means.double()
    x = torch.randn(50, 2, dtype=torch.float64).requires_grad_()
    each = torch.distributions.Normal(a * means, math.sqrt((a * std)**2 + s**2))
    density = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(len(means))),
        torch.distributions.Independent(each, 1))
    (score,) = torch.autograd.grad(density.log_prob(x).sum(), x)
    mixture = toy.Mixture(means, std)
    torch.testing.assert_close(mixture.score(x, s, a), score)
    torch.testing.assert_close(mixture.denoiser(x, s, a), (x + s**2 * score) / a)  # Tweedie


@pytest.mark.parametrize("name", toy.MIXTURES)
def test_exact_denoiser_is_the_posterior_mean_of_the_samples(name):
    torch.manual_seed(0)
    mixture = toy.make_mixture(name)
    x_0 = mixture.sample(400_000)
    x_t = x_0 + 0.3 * torch.randn_like(x_0)
    near = (x_t - mixture.means[3] - 0.1).norm(dim=1) < 0.05
    error = (mixture.denoiser(x_t[near], 0.3) - x_0[near]).mean(0)
    assert (error.abs() < 4 * x_0[near].std(0) / near.sum().sqrt()).all() and near.sum() > 300


def test_mixtures():
    mixtures = {name: toy.make_mixture(name) for name in toy.MIXTURES}
    assert {name: (len(m.means), m.std) for name, m in mixtures.items()} == {
        "ring": (8, 0.1), "grid": (9, 0.1), "spiral": (48, 0.05), "moons": (48, 0.06)}
    for m in mixtures.values():
        assert m.means.abs().max() < 1.3 and m.means.std() == pytest.approx(0.7, abs=0.2)
        x = m.sample(20_000, torch.Generator().manual_seed(0))
        variance = torch.cov(m.means.T, correction=0) + m.std**2 * torch.eye(2)
        torch.testing.assert_close(torch.cov(x.T), variance, rtol=0.03, atol=0.01)
        torch.testing.assert_close(x.mean(0), m.means.mean(0), rtol=0, atol=0.02)


def test_measures():
    mixture, random = toy.make_mixture("ring"), torch.Generator().manual_seed(0)
    x = mixture.sample(8000, random)
    on_modes, shares = toy.mode_shares(x, mixture)
    assert on_modes == pytest.approx(1 - math.exp(-8), abs=1e-3)
    at_3_9_and_4_1_std = mixture.means[:2] * torch.tensor([[1.39], [1.41]])
    assert toy.mode_shares(at_3_9_and_4_1_std, mixture) == (0.5, [0.5, 0.5, *[0.0] * 6])
    assert max(abs(np.array(shares) - 0.125)) < 0.015
    to_mode = torch.cdist(x, mixture.means).min(1)[0].square().mean()
    assert to_mode.item() == pytest.approx(2 * 0.1**2, rel=0.05)
    shift = torch.tensor([0.3, 0.4])  # mean over directions of (shift . direction)^2: |shift|^2 / 2
    moved = toy.sliced_w2(toy.projections(x), toy.projections(x + shift))
    assert moved == pytest.approx(0.5 / math.sqrt(2), rel=1e-4)
    mixed = x[torch.randperm(len(x), generator=random)]  # the same set in another order
    assert toy.sliced_w2(toy.projections(x), toy.projections(mixed)) < 1e-6


def test_sets_meet_those_of_other_numbers():
    """A set that met itself would have the distance 0, and the exact sets' own figure would lie."""
    mixture = toy.make_mixture("ring")
    a, b, c = sets = [mixture.sample(100) for _ in range(3)]
    w2 = lambda x, y: toy.sliced_w2(toy.projections(x), toy.projections(y))
    expected = (w2(b, a) + w2(c, a) + w2(c, b)) / 3
    assert toy.measure(sets, sets, mixture)["sw2"] == pytest.approx(expected)
    moved = [x + 5 for x in sets]
    expected = (w2(moved[1], a) + w2(moved[2], a) + w2(moved[2], b)) / 3
    assert toy.measure(moved, sets, mixture)["sw2"] == pytest.approx(expected)


def test_pretraining_by_hand():
    """Denoising score matching with EDM's noise levels and weight; the lr falls from 2e-3 to 0."""
    args, mixture = Namespace(pretrain_steps=3, batch=16, mixture="ring"), toy.make_mixture("ring")
    torch.manual_seed(0)
    net = toy.make_denoiser()
    by_hand = copy.deepcopy(net)
    adam = torch.optim.Adam(by_hand.parameters())
    torch.manual_seed(1)
    toy.pretrain(args, net, mixture)
    torch.manual_seed(1)
    for step in range(3):
        x_0 = mixture.sample(16)
        t = torch.exp(-1.2 + 1.2 * torch.randn(16, 1))
        x_t = x_0 + t * torch.randn(16, 2)
        loss = ((t**2 + 0.25) / (0.5 * t)**2 * (by_hand(x_t, t) - x_0)**2).sum(1).mean()
        adam.zero_grad()
        loss.backward()
        adam.param_groups[0]["lr"] = 2e-3 * (3 - step) / 3
        adam.step()
    a, b = vector(net.parameters()), vector(by_hand.parameters())
    torch.testing.assert_close(a, b, rtol=0, atol=1e-5)


# ---- Algorithm 2 ----
RING = DEFAULTS | {"batch": 64, "lr": 2e-3, "anneal": "linear", "p_mean": -1.5, "p_std": 1.5,
                   "ema_half_life": 7e4, "mixture": "ring", "teacher": "exact"}
OWN_FLAGS = ["--method d_prime_detached", "--method d_q_detached", "--method d_backpropagated",
             "--distance exp,alpha=4,beta=0.5", "--distance l1", "--anneal none",
             "--mixture moons", "--teacher learned", "--batch-gpu 40"]


@pytest.fixture(scope="module")
def unchanged(tmp_path_factory):
    """What a run without any flag leaves."""
    folder = tmp_path_factory.mktemp("toy") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(toy, "summarise", lambda *args: None)
        toy.main([*SHORT, "--out", str(folder)])
    return trained(folder)


@pytest.mark.parametrize("options", FLAGS + OWN_FLAGS)
def test_train_is_algorithm_2(options, tmp_path, quick, unchanged, monkeypatch):
    """Three updates of each network by hand: each flag does what it says, and changes the run."""
    monkeypatch.setattr(toy, "summarise", lambda *args: None)
    monkeypatch.setattr(toy, "projections", lambda x, directions: x)
    toy.main([*SHORT, "--save-every", "9", "--out", str(tmp_path), *options.split()])
    learned, state = toy.make_denoiser(), torch.load(tmp_path / "ckpt.pt", weights_only=True)
    learned.load_state_dict(state["learned"])  # what all networks start from
    learned.requires_grad_(False)
    settings = changed(RING, options)
    mixture = toy.make_mixture(settings["mixture"])
    d_q = mixture.denoiser if settings["teacher"] == "exact" else learned
    by_hand, figures = algorithm_2(learned, d_q, (2,), **settings)
    run = trained(tmp_path, start=vector(learned.state_dict().values()))
    assert difference(run, by_hand) < 2e-5
    if "--batch-gpu" not in options:
        assert logged(tmp_path) == pytest.approx(figures, rel=1e-4)
    if options and "--batch-gpu" not in options:
        assert not all(map(torch.equal, trained(tmp_path), unchanged))


def test_numbers_of_part_b_do_not_depend_on_part_a(tmp_path, quick, monkeypatch):
    monkeypatch.setattr(toy, "theorem", lambda thorough: [torch.randn(3).tolist()])
    both = [word for word in SHORT if word not in ("--part", "distil")]
    toy.main([*both, "--out", str(tmp_path / "both")])
    toy.main([*SHORT, "--out", str(tmp_path / "b")])
    assert (tmp_path / "both" / "theorem.json").exists()
    assert all(map(torch.equal, trained(tmp_path / "both"), trained(tmp_path / "b")))


def test_part_b_has_one_thread(tmp_path, quick):
    torch.set_num_threads(2)  # conftest.py restores the number
    toy.main([*SHORT, "--out", str(tmp_path)])
    assert torch.get_num_threads() == 1


# ---- runs ----
@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run of 120 updates, never interrupted. -> its folder and what it said"""
    folder, said = tmp_path_factory.mktemp("toy") / "run", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said):
        patch.setattr(toy, "summarise", functools.partial(toy.summarise, n=500, sets=2))
        patch.setattr(toy, "LOOKS", 4)
        toy.main([*LONGER, "--out", str(folder)])
    return folder, said.getvalue()


LONGER = [*SHORT, "--steps", "120", "--save-every", "20"]


def test_a_run_leaves_what_it_promises(finished):
    folder, output = finished
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics.keys() >= {"method", "distance", "mixture", "seed", "steps", "seconds", "sw2",
                              "share_on_modes", "mode_shares", "sw2_exact", "sw2_teacher"}
    assert len(metrics["mode_shares"]) == 8 and sum(metrics["mode_shares"]) == pytest.approx(1)
    assert metrics["share_on_modes_teacher"] > 0.98 and metrics["sw2_exact"] < 0.15
    with Image.open(folder / "animation.gif") as gif, Image.open(folder / "samples.png") as image:
        assert gif.n_frames == 5 and image.width == 3 * 360
    saved = torch.load(folder / "g_ema.pt", weights_only=True)
    assert saved.keys() == {"net_args", "state_dict", "t_star", "meta"} and saved["t_star"] == 2.5
    recorded = json.loads((folder / "args.json").read_text())
    assert recorded["steps"] == 120 and recorded["distance"] == "phuber,c=0.001"
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [0, 8, 30, 68, 120]
    assert lines[-1].keys() >= {"loss_psi", "loss_theta", "divergence", "y_norm", "sw2"}
    assert f"python 01_toy_2d.py --sample {folder}" in output
    assert not list(folder.rglob(".tmp*"))


def test_kill_9_then_the_same_command(finished, tmp_path, quick, monkeypatch, capsys):
    """Killed at a moment that nobody chose, then continued: the same as never killed."""
    argv = [*LONGER, "--out", str(tmp_path / "run")]
    typed = quick_command("01_toy_2d.py", *argv)
    with subprocess.Popen(typed, stdout=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 30/"):
                run.kill()
    assert run.returncode == -9 and not (tmp_path / "run" / "metrics.json").exists()
    toy.main(argv)
    assert "goes on from step" in capsys.readouterr().out
    assert all(map(torch.equal, trained(tmp_path / "run"), trained(finished[0])))
    before = (tmp_path / "run" / "ckpt.pt").read_bytes()
    toy.main(argv)
    out = capsys.readouterr().out
    assert "is finished" in out and "--fresh" in out and "step" not in out
    assert before == (tmp_path / "run" / "ckpt.pt").read_bytes()


def test_samples(finished, tmp_path, monkeypatch, refused, capsys):
    folder, _ = finished
    toy.main(["--sample", str(folder), "--n", "300", "--seed", "3"])
    assert "300 samples lie on a mode" in capsys.readouterr().out
    a = np.load(folder / "samples-300-seed-3.npz")["one_step"]
    with Image.open(folder / "samples-300-seed-3.png") as image:
        assert image.width == 360
    toy.main(["--sample", str(folder / "g_ema.pt"), "--n", "300", "--seed", "3",
              "--out", str(tmp_path / "b.npz")])
    toy.main(["--sample", str(folder), "--n", "9", "--out", str(tmp_path / "new")])
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["samples.npz",
                                                                          "samples.png"]
    assert a.shape == (300, 2) and (a == np.load(tmp_path / "b.npz")["one_step"]).all()
    saved = torch.load(folder / "g_ema.pt", weights_only=True)
    net = toy.make_denoiser()
    net.load_state_dict(saved["state_dict"])
    z = torch.randn(300, 2, generator=torch.Generator().manual_seed(3))
    np.testing.assert_allclose(a, net(2.5 * z, 2.5).detach(), atol=1e-6)  # (B.4)
    common.save(saved | {"meta": {"mixture": "cube"}}, tmp_path / "x.pt")
    assert "cube" in refused(toy.main, ["--sample", tmp_path / "x.pt"])


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path, quick, refused):
    line = refused(toy.main, [*SHORT, "--distance", "exp,beta=1e6", "--out", tmp_path / "run"])
    assert "step 1" in line and "last good checkpoint is step 0" in line and "--lr" in line


def test_a_type_error_of_ours_keeps_its_traceback(tmp_path, quick, monkeypatch):
    def broken(*args):
        raise TypeError("ours")
    for name in ("ema_beta", "mode_shares"):  # in train, and at the end
        monkeypatch.setattr(toy, name, broken)
        with pytest.raises(TypeError, match="ours"):
            toy.main([*SHORT, "--out", str(tmp_path / name)])
        monkeypatch.undo()


# ---- mistakes: one line, status 2, nothing written ----
@pytest.mark.parametrize("options", [
    "--distance l3", "--distance phuber,c=0", "--distance phuber,c=nan", "--distance phuber,c=x",
    "--distance power,alpha=3", "--distance l2,c=0.1", "--distance exp,beta=0", "--steps -5",
    "--steps 0", "--steps 1.5", "--batch 0", "--lr -1", "--lr nan", "--seed -1", "--device tpu",
    "--device cuda:99", "--device meta", "--mixture cube", "--no-such-flag", "--step 5",
    "--out /proc/nowhere/run", "--out README.md", "--out tests", "--out README.md/run",
    "--sample no-such-file.pt", "--sample README.md", "--sample tests", "--n 0", "--p-mean nan",
    "--sid-alpha inf", f"--seed {10**30}", "--batch-gpu 65", "--p-theta x", "--t-star 0"])
def test_mistakes(options, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(ROOT)
    tests = sorted(path for path in ROOT.rglob("*") if ".git" not in path.parts)
    where = [] if "--out" in options else ["--out", tmp_path / "run"]
    refused(toy.main, [*SHORT, *where, *options.split()])
    assert not list(tmp_path.iterdir())
    assert tests == sorted(path for path in ROOT.rglob("*") if ".git" not in path.parts)


def test_the_folder_is_named_after_the_run():
    for options, name in (("", "ring-sim-phuber-0"),
                          ("--distance phuber,c=0.001", "ring-sim-phuber-0"),
                          ("--mixture grid --method sid --seed 4", "grid-sid-phuber-4"),
                          ("--distance phuber,c=.5", "ring-sim-phuber-c=0.5-0")):
        args = toy.parse(options.split())
        assert str(common.Run.default_folder(args, args.mixture)) == f"runs/{name}"
