"""The neighbours, the one Gaussian, the flow teacher and the studies of their runs, against closed forms."""

import importlib
import json
import shutil
import sys

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import eval_fid
from common import WEIGHTS, heun, l2, save_state, sidwgt, sim_loss

toy = importlib.import_module("01_toy_2d")
SHORT = ["--part", "distil", "--steps", "3", "--batch", "64", "--pretrain-steps", "20", "--save-every", "20"]
STD = 0.7  # of the one Gaussian that stands for the data below


def flow_map(x, t, s):
    """Where the probability flow of N(0, STD^2) takes x from t to s: a straight scaling."""
    return x * ((STD**2 + s**2) / (STD**2 + t**2)) ** 0.5


def posterior_mean(x, t):
    return x * STD**2 / (STD**2 + t**2)


def make(method, g, segments=1, d_psi=None, batch=2000):
    """A neighbour whose data are N(0, STD^2) in the plane."""
    flags = [*SHORT, "--method", method, "--batch", str(batch)]
    args = toy.parse(flags + (["--segments", str(segments)] if segments > 1 else []))
    args.segments = segments
    mixture = toy.Mixture(torch.zeros(1, 2), STD)
    return toy.NEIGHBOURS[method](args, mixture, posterior_mean, {"g": g, "d_psi": d_psi})


def consistent(segments):
    """The denoiser-like network whose jump() from t to the end b of its segment is the exact flow."""
    grid = make("cd", None).grid(toy.STEPS * segments)

    def g(x, t):
        b = max((end for end in grid[:: toy.STEPS].tolist()[1:] if end <= float(t) * 0.9999), default=0.0)
        return (flow_map(x, t, b) - b / t * x) / (1 - b / t)

    return lambda x, t: torch.stack([g(*pair) for pair in zip(x, torch.as_tensor(t).expand(len(x), 1))])


# ---- the probability flow ----
@pytest.mark.parametrize("times", [[80.0, 5.0, 0.5], [0.1, 0.5, 2.0]])
def test_heun_follows_the_flow_up_and_down_with_times_of_its_own_for_each_sample(times):
    x = torch.randn(6, 2, dtype=torch.float64)
    fine = np.exp(np.interp(np.linspace(0, 2, 401), range(3), np.log(times))).tolist()
    torch.testing.assert_close(
        heun(posterior_mean, x, fine), flow_map(x, times[0], times[-1]), rtol=1e-3, atol=0
    )
    each = [torch.tensor([[t], [t]], dtype=torch.float64) for t in fine]
    torch.testing.assert_close(heun(posterior_mean, x[:2], each), heun(posterior_mean, x[:2], fine))


def test_few_step_sampling_of_an_exact_consistency_function():
    z = torch.randn(50, 2)
    for segments in (1, 3):
        x = toy.few_steps(consistent(segments), z, 80.0, segments)
        torch.testing.assert_close(x, flow_map(80 * z, 80.0, 0.0), rtol=2e-2, atol=4e-3)
    assert torch.equal(toy.few_steps(posterior_mean, z, 2.5), posterior_mean(2.5 * z, 2.5))


# ---- the losses ----
@pytest.mark.parametrize("segments", [1, 3])
def test_consistency_distillation_is_least_for_the_consistency_function(segments):
    method = "cd" if segments == 1 else "mcm"
    right = make(method, consistent(segments), segments, batch=300).theta().mean()
    wrong = make(method, posterior_mean, segments, batch=300).theta().mean()
    assert right < 1e-4 and wrong > 20 * right


@pytest.mark.parametrize("progress, steps", [(0.0, 10), (0.5, 160), (0.999, 1280)])
def test_consistency_training(progress, steps):
    """Of a single point every flow ends there: the loss of g(x, t) = 0 is 0; of another g it is iCT's."""
    neighbour = make("ct", lambda x, t: 0 * x)
    neighbour.mixture, neighbour.progress = toy.Mixture(torch.zeros(1, 2), 0.0), progress
    assert neighbour.theta().max() < 1e-3 * 0.002 and len(neighbour.grid(steps)) == steps + 1
    seen = []
    neighbour.g = lambda x, t: seen.append((x, t)) or 0.5 * x
    neighbour.begin(1)
    neighbour.progress = progress
    loss = neighbour.theta()
    (x_s, s), (x_t, t) = seen
    torch.testing.assert_close(x_s / s, x_t / t)  # the same eps
    index = [(neighbour.grid(steps)[:, None] - time.T).abs().argmin(0) for time in (t, s)]
    assert torch.equal(index[0] + 1, index[1])
    low = 0.002 / torch.cat([t, s], 1)  # b / t
    apart = (0.5 * x_t + low[:, :1] * 0.5 * x_t) - (0.5 * x_s + low[:, 1:] * 0.5 * x_s)
    c = 0.00054 * 2**0.5
    expected = ((apart.square().sum(1) + c**2).sqrt() - c) / (t - s).flatten()
    torch.testing.assert_close(loss, expected, rtol=1e-3, atol=1e-5)
    log_t = (t * s).log().flatten() / 2
    assert abs(log_t.mean() + 1.1) < 0.35 and abs(log_t.std() - 2) < 0.35


class Affine(torch.nn.Module):
    """g(z) = scale z, and a discriminator whose logit is linear in x."""

    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.model = lambda x, c_noise: x @ torch.tensor([[1.5, 0.0], [0.5, 0.0]])

    def forward(self, x, t):
        return self.scale * x


def gradient(loss, g):
    return torch.autograd.grad(loss.mean(), g.scale)[0].item()


def test_dmd():
    """At the optimum d_psi the KL gradient points back to the data's scale; the pairs are the flow's."""
    g = Affine(0.5)  # samples N(0, (0.5 * 2.5)^2), wider than STD
    psi = lambda x, t: x * 1.25**2 / (1.25**2 + t**2)
    neighbour = make("dmd", g, d_psi=psi)
    torch.testing.assert_close(neighbour.x, flow_map(80 * neighbour.z, 80.0, 0.0), rtol=5e-2, atol=1e-3)
    assert gradient(neighbour.theta(), g) > 0
    neighbour.x = 2.5 * 0.5 * neighbour.z  # nothing to regress: what is left is the KL gradient
    neighbour.begin(0)
    x_0 = g(2.5 * neighbour.normal(), 2.5)
    t, eps = neighbour.time("theta"), neighbour.normal()
    q = posterior_mean(x_0 + t * eps, t)
    y = (psi(x_0 + t * eps, t) - q) / (x_0 - q).abs().mean(1, keepdim=True).clamp(min=1e-5)
    expected = (y.detach() * x_0).sum(1).mean()
    neighbour.begin(0)
    loss = neighbour.theta()
    assert gradient(loss, g) == pytest.approx(gradient(expected, g), rel=1e-4)
    neighbour.x = neighbour.x + 1
    neighbour.begin(0)
    torch.testing.assert_close(neighbour.theta(), loss + 0.25 * 2, rtol=1e-4, atol=1e-5)
    neighbour.begin(0)
    x_0 = (1.25 * neighbour.normal()).detach()
    t, eps = neighbour.time("psi"), neighbour.normal()
    weight = (t**2 + 0.25) / (0.5 * t) ** 2
    neighbour.begin(0)
    torch.testing.assert_close(neighbour.psi(), (weight * (psi(x_0 + t * eps, t) - x_0) ** 2).sum(1))


def test_add():
    g = Affine(0.5)
    neighbour = make("add", g, d_psi=Affine(1.0))
    real, fake = neighbour.data(), 1.25 * neighbour.normal()
    logit = lambda x: x @ torch.tensor([1.5, 0.5])
    expected = (1 - logit(real)).clamp(min=0) + (1 + logit(fake)).clamp(min=0)
    neighbour.begin(neighbour.args.steps)
    torch.testing.assert_close(neighbour.psi(), expected)
    neighbour.begin(0)
    x_0 = g(2.5 * neighbour.normal(), 2.5)
    t = neighbour.time("theta")
    target = posterior_mean(x_0 + t * neighbour.normal(), t).detach()
    neighbour.begin(0)
    loss = neighbour.theta()
    torch.testing.assert_close(loss, 2.5 * ((x_0 - target) ** 2).sum(1) - logit(x_0))
    assert gradient(loss, g) == pytest.approx(
        gradient(2.5 * ((x_0 - target) ** 2).sum(1) - logit(x_0), g), rel=1e-5
    )


def test_pagoda():
    g = Affine(0.5)
    neighbour = make("pagoda", g, d_psi=Affine(1.0))
    torch.testing.assert_close(80 * neighbour.z, flow_map(neighbour.x, 0.002, 80.0), rtol=5e-2, atol=1e-3)
    neighbour.begin(0)
    real, fake = neighbour.data(), g(80 * neighbour.normal(), 80.0).detach()
    logit = lambda x: x @ torch.tensor([1.5, 0.5])
    reference = lambda x, label: F.binary_cross_entropy_with_logits(
        logit(x), torch.full((2000,), label), reduction="none"
    )
    neighbour.begin(0)
    torch.testing.assert_close(neighbour.psi(), reference(real, 1.0) + reference(fake, 0.0))
    neighbour.g = lambda z, t: flow_map(z, 80.0, 0.0)  # brings every point back where it came from
    neighbour.begin(0)
    neighbour.pick()
    cheat = reference(flow_map(80 * neighbour.normal(), 80.0, 0.0), 1.0)
    neighbour.begin(0)
    assert (neighbour.theta() - cheat).abs().max() < 0.15 * STD
    neighbour.x = neighbour.x + 3
    neighbour.begin(0)
    assert (neighbour.theta() - cheat - 3 * 2**0.5).abs().max() < 0.15 * STD


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights_of_figure_2(name):
    x_0, eps, t = torch.randn(5, 2), torch.randn(5, 2), torch.rand(5, 1) + 0.1
    psi = lambda x, t: 0.3 * x
    plain, _ = sim_loss(psi, posterior_mean, x_0, t, l2(), eps)
    weighted, _ = sim_loss(psi, posterior_mean, x_0, t, l2(), eps, WEIGHTS[name])
    w = 1 / (x_0 - posterior_mean(x_0 + t * eps, t)).abs().mean(1) if name == "sidwgt" else 1
    torch.testing.assert_close(weighted, w * plain)
    assert sidwgt(x_0.requires_grad_(), 0 * x_0).grad_fn is None


# ---- one Gaussian: 5.3.1 of the notes ----
@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize(
    "mean, std, psi_mean, psi_std", [(0.7, 1.3, 0.7, 1.3), (0.7, 1.3, 0.2, 0.9), (0.7, 1, -0.2, 1)]
)
def test_one_gaussian(mean, std, psi_mean, psi_std, t):
    """y = A x + B is linear, so every gradient is a moment of x_t ~ N(mean, std^2 + t^2)."""
    a, b = psi_std**2 / (psi_std**2 + t**2), t**2 * psi_mean / (psi_std**2 + t**2)
    A, B = a - 1 / (1 + t**2), b
    naive = [2 * A * (A * mean + B), 2 * A**2 * std]
    sim = [2 * ((1 - a) * (2 * A * mean + B) - A * b), 4 * A * std * (1 - a)]
    sid = [s / 2 - 0.2 * n for s, n in zip(sim, naive)]
    di = [A * mean + B, A * std]
    expected = {"SIM, l2": sim, "Diff-Instruct, DMD": di}
    expected |= {"SiD, alpha = 1.2, no weight": sid, "d(y) back-propagated": naive}
    assert expected.keys() == toy.LOSSES.keys()
    for name, loss in toy.LOSSES.items():
        found = toy.gaussian_gradient(loss, mean, std, psi_mean, psi_std, t)
        assert found.tolist() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


def test_the_naive_loss_has_no_gradient_and_the_others_the_right_one():
    """Where d_psi is right: (3.5) for SIM, the KL's for Diff-Instruct, and by the mean none for L^1."""
    t, mean, std, k = 2.0, 0.7, 1.0, 4 / 5  # k = t^2 / (1 + t^2)
    at = lambda name: toy.gaussian_gradient(toy.LOSSES[name], mean, std, mean, std, t)[0].item()
    assert at("d(y) back-propagated") == pytest.approx(0, abs=1e-12)
    assert at("SIM, l2") == pytest.approx(2 * k**2 * mean)  # d/d mean of (k mean)^2, (76) squared
    assert at("SiD, alpha = 1.2, no weight") == pytest.approx(k**2 * mean)
    assert at("Diff-Instruct, DMD") == pytest.approx(t**2 * mean / (1 + t**2))  # t^2 d KL / d mean


# ---- rectified flow ----
def test_velocity_and_score():
    """v from the denoiser transports p_tau (continuity), and gives the score of an independent density."""
    mixture = toy.make_mixture("ring")
    mixture = toy.Mixture(mixture.means.double(), 0.3)
    velocity = lambda x, tau: (x - mixture.denoiser(x, tau[:, None], 1 - tau[:, None])) / tau[:, None]
    x = 0.8 * torch.randn(40, 2, dtype=torch.float64)
    tau = torch.linspace(0.2, 0.8, 40, dtype=torch.float64)

    def log_p(x, tau):
        means = (1 - tau)[:, None, None] * mixture.means
        var = ((1 - tau) ** 2 * 0.3**2 + tau**2)[:, None, None]
        return (-(((x[:, None] - means) ** 2 / var).sum(2) / 2) - var[..., 0].log()).logsumexp(1)

    x.requires_grad_(), tau.requires_grad_()
    d_x, d_tau = torch.autograd.grad(log_p(x, tau).sum(), (x, tau))
    v = velocity(x, tau)
    divergence = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    torch.testing.assert_close(
        d_tau + divergence + (v * d_x).sum(1), torch.zeros(40).double(), atol=1e-9, rtol=0
    )
    torch.testing.assert_close(-(x + (1 - tau)[:, None] * v) / tau[:, None], d_x)
    d_q = toy.FlowPrecond(velocity)
    for t in (0.1, 1.0, 5.0):
        torch.testing.assert_close(d_q(x, t), mixture.denoiser(x, t))


def test_flow_loss_is_least_for_the_velocity():
    x_0, eps = torch.randn(3, 2), torch.randn(3, 2)
    tau = torch.tensor([[0.2], [0.5], [1.0]])
    seen = []
    loss = toy.flow_loss(lambda x, tau: seen.append((x, tau)) or 0 * x, x_0, tau, eps)
    torch.testing.assert_close(loss, ((eps - x_0) ** 2).sum(1))
    torch.testing.assert_close(seen[0][0], x_0 + tau * (eps - x_0))
    assert toy.flow_loss(lambda x, tau: eps - x_0, x_0, tau, eps).max() == 0


# ---- runs ----
@pytest.mark.parametrize(
    "options",
    [
        ["--method", "dmd", "--teacher", "flow"],
        ["--method", "mcm"],
        *[
            pytest.param(["--method", name], marks=pytest.mark.slow)
            for name in ("add", "cd", "ct", "pagoda", "d_q_detached")
        ],
    ],
    ids=" ".join,
)
def test_runs(options, tmp_path, capsys):
    out = tmp_path / "run"
    toy.main([*SHORT, *options, "--out", str(out)])
    metrics = json.loads((out / "metrics.json").read_text())
    assert metrics["evaluations"] == (4 if "mcm" in options else 1) and metrics["sw2"] > 0
    toy.main(["--sample", str(out), "--n", "100"])
    assert np.isfinite(np.load(out / "drawn-100-seed-0.npy")).all()


@pytest.mark.parametrize("method", toy.NEIGHBOURS)
def test_what_learns_and_that_a_killed_run_continues(method, tmp_path):
    """g always, and the second network where there is one; the same after a stop, bit for bit."""
    args = toy.parse([*SHORT, "--method", method, "--pretrain-steps", "1", "--batch", "16"])
    mixture = toy.make_mixture("ring")

    def run(folder, report):
        (folder / "samples").mkdir(parents=True, exist_ok=True)
        parts = toy.prepare(args, folder, mixture)
        neighbour = toy.NEIGHBOURS[method](args, mixture, mixture.denoiser, parts)
        toy.train_neighbour(args, neighbour, parts, lambda: report(parts))
        return parts

    def kill(parts):
        if parts["log"].step == 2:
            save_state(tmp_path / "killed" / "ckpt.pt", **parts)
            raise KeyboardInterrupt

    parts = run(tmp_path / "whole", lambda parts: None)
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "killed", kill)
    again = run(tmp_path / "killed", lambda parts: None)
    same = lambda a, b: all(torch.equal(v, w) for v, w in zip(a.parameters(), b.parameters()))
    assert same(parts["g"], again["g"]) and same(parts["d_psi"], again["d_psi"])
    assert not same(parts["g"], parts["d_q"])
    assert same(parts["d_psi"], parts["d_q"]) == (method not in ("dmd", "add", "pagoda"))


@pytest.mark.parametrize(
    "options",
    [
        ["--segments", "2"],
        ["--method", "cd", "--weight", "sidwgt"],
        ["--method", "cd", "--p-theta", "karras"],
        ["--method", "dmd", "--distance", "l2"],
        ["--method", "ct", "--teacher", "flow"],
        ["--sid-alpha", "1.2"],
    ],
)
def test_flags_that_a_method_does_not_take(options, capsys):
    with pytest.raises(SystemExit) as stop:
        toy.parse(options)
    assert stop.value.code == 2 and "is not for --method" in capsys.readouterr().err


def test_cells_run_in_order_as_a_notebook(monkeypatch):
    first, *cells, last = open(toy.__file__).read().split("\n# %%")
    names = {"__name__": "__main__"}
    exec(first, names)
    for cell in cells:
        exec("#" + cell, names)
    error = names["theorem_error"](1.0, "VE", "denoiser", l2(), 1, 401)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    names["main"] = (called := []).append
    exec("#" + last, names)
    assert len(cells) > 5 and error < 1e-10 and called == [[]]


# ---- studies ----
@pytest.mark.parametrize("words", [[], ["shapes", "--study", "teachers"], ["--study", "no-such"]])
def test_a_source_or_a_study(words, capsys):
    with pytest.raises(SystemExit) as stop:
        eval_fid.main(words)
    assert stop.value.code == 2 and capsys.readouterr().err.count("\n") == 1


@pytest.mark.parametrize("name", eval_fid.STUDIES)
def test_the_readme_shows_what_the_results_say(name, tmp_path, monkeypatch, capsys):
    results = tmp_path / "assets" / "results"
    shutil.copytree(eval_fid.RESULTS, results)
    monkeypatch.setattr(eval_fid, "RESULTS", results)
    eval_fid.main(["--study", name, "--draw"])
    readme = (eval_fid.HERE / "README.md").read_text().splitlines()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 3 and [line for line in lines if line not in readme] == []
    assert (results.parent / f"{name}.png").exists() != eval_fid.STUDIES[name].samples
    rows = json.loads((results / f"{name}.json").read_text())
    assert {row["seed"] for row in rows} >= {0, 1, 2}


@pytest.fixture
def study(tmp_path, monkeypatch):
    panels = {"one": {"SIM": "", "iCT": "--method ct"}, "another": {"too fast": "--lr 1e15", "SIM again": ""}}
    stage = f"01_toy_2d.py {' '.join(SHORT)}"
    monkeypatch.setitem(
        eval_fid.STUDIES, "tiny", eval_fid.Study(stage, "sw2", "sliced W2", panels, samples=True)
    )
    monkeypatch.setattr(eval_fid, "RESULTS", tmp_path / "assets" / "results")
    monkeypatch.setattr(eval_fid, "RUNS", tmp_path / "runs")
    (tmp_path / "assets").mkdir()


@pytest.mark.slow
def test_a_study_runs_what_is_missing_and_reports_it(study, tmp_path, capsys):
    eval_fid.run_study("tiny", 1, 2)
    rows = json.loads((tmp_path / "assets" / "results" / "tiny.json").read_text())
    assert [row["flags"] for row in rows] == ["", "--method ct", "--lr 1e15"]
    assert "not finite" in rows[2]["stopped"] or "is nan" in rows[2]["stopped"] or "inf" in rows[2]["stopped"]
    assert rows[0]["curve"][-1][0] == 3 * 64 and rows[0]["stopped"] is None
    times = lambda: {path: path.stat().st_mtime_ns for path in tmp_path.rglob("metrics.json")}
    before = times()
    eval_fid.run_study("tiny", 1, 2)
    assert len(before) == 2 and before == times()
    eval_fid.report_study("tiny")
    assert "| too fast | 1 stopped |" in capsys.readouterr().out
    assert (tmp_path / "assets" / "tiny.png").exists()
