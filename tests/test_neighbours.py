"""lab/neighbours.py: the other methods, the one Gaussian and the flow, against closed forms."""
import functools
import importlib
import json
import math
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn import functional as F

import common
from common import load_generator, nowgt, sid_loss

toy = importlib.import_module("01_toy_2d")
lab = importlib.import_module("lab.neighbours")
images = importlib.import_module("lab.neighbours_images")
SHORT = ["--steps", "4", "--batch", "16"]
STD = 0.7  # of the one Gaussian that stands for the data below


def flow_map(x, t, s):
    """Where the probability flow of N(0, STD^2) takes x from t to s: a scaling."""
    return x * ((STD**2 + s**2) / (STD**2 + t**2))**0.5


def posterior_mean(x, t):
    return x * STD**2 / (STD**2 + t**2)


def make(method, g, segments=1, d_psi=None, batch=2000, flags=()):
    """A method whose data are N(0, STD^2) in the plane."""
    flags = [*flags, "--segments", str(segments)] if method in ("mcm", "few", "cd_steps") else flags
    args = lab.parse([*SHORT, "--method", method, "--batch", str(batch), *flags])
    mixture = toy.Mixture(torch.zeros(1, 2), STD)
    return lab.NEIGHBOURS[method](args, mixture, posterior_mean, SimpleNamespace(g=g, d_psi=d_psi))


def consistent(segments):
    """The network whose jump() from t to the end b of t's segment is the exact flow."""
    ends = make("cd", None).grid(lab.STEPS * segments)[lab.STEPS::lab.STEPS]

    def g(x, t):
        t = t + 0 * x[:, :1]
        b = torch.where(ends < 0.9999 * t, ends, 0).amax(1, keepdim=True)
        return (flow_map(x, t, b) - b / t * x) / (1 - b / t)

    return g


def test_few_step_sampling_of_an_exact_consistency_function():
    z = torch.randn(50, 2)
    for segments in (1, 3):
        x = lab.few_steps(consistent(segments), z, 80.0, segments)
        torch.testing.assert_close(x, flow_map(80 * z, 80.0, 0.0), rtol=2e-2, atol=4e-3)
    assert torch.equal(lab.few_steps(posterior_mean, z, 2.5), posterior_mean(2.5 * z, 2.5))


# ---- The losses ----
class Affine(torch.nn.Module):
    """g(z) = scale z, and a discriminator whose logit is linear in x."""
    def __init__(self, scale):
        super().__init__()
        self.scale = torch.nn.Parameter(torch.tensor(scale))
        self.model = lambda x, c_noise: x @ torch.tensor([[1.5, 0.0], [0.5, 0.0]])

    def forward(self, x, t):
        return self.scale * x


def logit(x):
    return x @ torch.tensor([1.5, 0.5])


def gradient(loss, g):
    return torch.autograd.grad(loss.mean(), g.scale)[0].item()


@pytest.mark.parametrize("method, segments", [("cd", 1), ("mcm", 3)])
def test_consistency_distillation_is_least_for_the_consistency_function(method, segments):
    right = make(method, consistent(segments), segments, batch=300).theta().mean()
    wrong = make(method, posterior_mean, segments, batch=300).theta().mean()
    assert right < 1e-4 and wrong > 20 * right


def see_theta(method, step=1, point=None):
    """theta() of g(x, t) = 0.4 x at this step of four, for the data or for one point. -> the loss,
    its gradient by the factor 0.4, and what the loss saw: x_t, t of g, x_s, s of the target, and
    the difference of the two jumps to 0.002."""
    g, seen = Affine(0.4), []
    neighbour = make(method, lambda x, t: seen.append((x.detach(), t)) or g(x, t))
    neighbour.step = step
    if point is not None:
        neighbour.mixture = toy.Mixture(point, 0.0)
    loss = neighbour.theta()
    (x_s, s), (x_t, t) = seen
    jumped = lambda x, t: (0.4 + 0.6 * 0.002 / t) * x
    return loss, gradient(loss, g), x_t, t, x_s, s, jumped(x_t, t) - jumped(x_s, s)


def test_the_target_of_cd_is_detached_and_one_step_of_the_flow_away():
    loss, found, x_t, t, x_s, s, y = see_theta("cd")
    torch.testing.assert_close(loss, (y**2).sum(1), rtol=1e-3, atol=1e-5)
    assert found == pytest.approx((2 * y * x_t * (1 - 0.002 / t)).sum(1).mean().item(), rel=1e-4)
    torch.testing.assert_close(x_s, flow_map(x_t, t, s), rtol=2e-2, atol=1e-4)
    grid = make("cd", None).grid(lab.STEPS)
    at = [(grid - time).abs().argmin(1) for time in (t, s)]
    assert torch.equal(at[0] + 1, at[1]) and len(at[0].unique()) == lab.STEPS


@pytest.mark.parametrize("step, steps", [(0, 10), (2, 160), (3.999, 1280)])
def test_ct_is_icts_loss_with_a_detached_target(step, steps):
    point = torch.tensor([[3.0, -2.0]])
    loss, found, x_t, t, x_s, s, y = see_theta("ct", step, point)
    torch.testing.assert_close((x_s - point) / s, (x_t - point) / t, rtol=0, atol=1e-3)  # eps
    root, span = ((y**2).sum(1) + 0.00054**2 * 2).sqrt(), (t - s).flatten()
    torch.testing.assert_close(loss, (root - 0.00054 * 2**0.5) / span, rtol=1e-3, atol=1e-2)
    expected = ((y * x_t * (1 - 0.002 / t)).sum(1) / root / span).mean().item()
    assert found == pytest.approx(expected, rel=1e-2)
    grid = make("ct", None).grid(steps)
    at = [(grid - time).abs().argmin(1) for time in (t, s)]
    assert torch.equal(at[0] + 1, at[1])
    log_t = (t * s).log().flatten() / 2
    assert abs(log_t.mean() + 1.1) < 0.35 and abs(log_t.std() - 2) < 0.35


def test_dmd():
    """The KL gradient points back to the data's scale; the pairs are the flow's."""
    g = Affine(0.5)  # samples N(0, (0.5 * 2.5)^2), wider than STD
    psi = lambda x, t: x * 1.25**2 / (1.25**2 + t**2)
    method = make("dmd", g, d_psi=psi)
    assert len(method.z) == 20_000
    torch.testing.assert_close(method.x, flow_map(80 * method.z, 80.0, 0.0), rtol=5e-2, atol=1e-3)
    assert gradient(method.theta(), g) > 0
    method.x = 2.5 * 0.5 * method.z  # nothing to regress: the KL gradient is left
    method.begin(0)
    x_0 = g(2.5 * method.normal(), 2.5)
    t, eps = method.time(), method.normal()
    q = posterior_mean(x_0 + t * eps, t)
    y = (psi(x_0 + t * eps, t) - q) / (x_0 - q).abs().mean(1, keepdim=True).clamp(min=1e-5)
    expected = gradient((y.detach() * x_0).sum(1), g)
    method.begin(0)
    loss = method.theta()
    assert gradient(loss, g) == pytest.approx(expected, rel=1e-4)
    method.x = method.x + 1
    method.begin(0)
    torch.testing.assert_close(method.theta(), loss + 0.25 * 2, rtol=1e-4, atol=1e-5)
    method.begin(0)
    x_0 = (1.25 * method.normal()).detach()
    t = torch.exp(-1.2 + 1.2 * torch.randn(2000, 1, generator=method.where["generator"]))
    expected = (t**2 + 0.25) / (0.5 * t)**2 * (psi(x_0 + t * method.normal(), t) - x_0)**2
    method.begin(0)
    torch.testing.assert_close(method.psi(), expected.sum(1))


def test_add():
    g = Affine(0.5)
    method = make("add", g, d_psi=Affine(1.0))
    real, fake = method.data(), 1.25 * method.normal()
    expected = (1 - logit(real)).clamp(min=0) + (1 + logit(fake)).clamp(min=0)
    method.begin(method.args.steps)
    torch.testing.assert_close(method.psi(), expected)
    method.begin(0)
    x_0 = g(2.5 * method.normal(), 2.5)
    t = torch.exp(-1.5 + 1.5 * torch.randn(2000, 1, generator=method.where["generator"]))
    target = posterior_mean(x_0 + t * method.normal(), t).detach()
    expected = 2.5 * ((x_0 - target)**2).sum(1) - logit(x_0)
    method.begin(0)
    loss = method.theta()
    torch.testing.assert_close(loss, expected)
    assert gradient(loss, g) == pytest.approx(gradient(expected, g), rel=1e-5)


def test_pagoda():
    method = make("pagoda", Affine(0.5), d_psi=Affine(1.0))
    torch.testing.assert_close(80 * method.z, flow_map(method.x, 0.002, 80.0), rtol=5e-2, atol=1e-3)
    assert len(method.x) == 20_000 and abs(method.x.std() - STD) < 0.02
    cross_entropy = lambda x, label: F.binary_cross_entropy_with_logits(
        logit(x), torch.full((len(x),), label), reduction="none")
    method.begin(0)
    real, fake = method.data(), 40 * method.normal()
    method.begin(0)
    expected = cross_entropy(real, 1.0) + cross_entropy(fake, 0.0)
    torch.testing.assert_close(method.psi(), expected)
    method.g = lambda z, t: flow_map(z, 80.0, 0.0)  # leads every point back to where it came from
    method.begin(0)
    method.pick()
    cheat = cross_entropy(flow_map(80 * method.normal(), 80.0, 0.0), 1.0)
    for shift in (0, 3):
        method.x = method.x + shift
        method.begin(0)
        assert (method.theta() - cheat - shift * 2**0.5).abs().max() < 0.15 * STD


# ---- One Gaussian: 5.3.1 of the notes ----
@pytest.mark.parametrize("t", [0.5, 2.0])
@pytest.mark.parametrize("mean, std, psi_mean, psi_std", [
    (0.7, 1.3, 0.7, 1.3), (0.7, 1.3, 0.2, 0.9), (0.7, 1, -0.2, 1), (0.7, 1, 0.7, 1)])
def test_one_gaussian(mean, std, psi_mean, psi_std, t):
    """y = A x + b is linear, so that every gradient is a moment of x_t ~ N(mean, std^2 + t^2). In
    the last case d_psi is right: back-propagating d(y) has no gradient by the mean, and SIM's is
    that of (k mean)^2 with k = t^2 / (1 + t^2), [76] squared."""
    a, b = psi_std**2 / (psi_std**2 + t**2), t**2 * psi_mean / (psi_std**2 + t**2)
    A = a - 1 / (1 + t**2)
    naive = [2 * A * (A * mean + b), 2 * A**2 * std]
    sim = [2 * ((1 - a) * (2 * A * mean + b) - A * b), 4 * A * std * (1 - a)]
    sid = [s / 2 - 0.2 * n for s, n in zip(sim, naive)]
    expected = {"SIM, l2": sim, "Diff-Instruct, DMD": [A * mean + b, A * std],
                "SiD, alpha = 1.2, no weight": sid, "d(y) back-propagated": naive}
    assert expected.keys() == lab.LOSSES.keys()
    for name, loss in lab.LOSSES.items():
        found = lab.gaussian_gradient(loss, mean, std, psi_mean, psi_std, t)
        assert found.tolist() == pytest.approx(expected[name], rel=1e-9, abs=1e-12), name


# ---- The rectified flow ----
def test_velocity_and_score():
    """v from the denoiser transports p_tau (continuity); FlowPrecond makes the denoiser from v."""
    mixture = toy.Mixture(toy.make_mixture("ring").means.double(), 0.3)
    column = lambda tau: tau[:, None]
    velocity = lambda x, tau: (x - mixture.denoiser(x, column(tau), 1 - column(tau))) / column(tau)
    x = 0.8 * torch.randn(40, 2, dtype=torch.float64)
    tau = torch.linspace(0.2, 0.8, 40, dtype=torch.float64)

    def log_p(x, tau):
        means = (1 - tau)[:, None, None] * mixture.means
        var = ((1 - tau)**2 * 0.3**2 + tau**2)[:, None, None]
        return (-((x[:, None] - means)**2 / var).sum(2) / 2 - var[..., 0].log()).logsumexp(1)

    x.requires_grad_(), tau.requires_grad_()
    d_x, d_tau = torch.autograd.grad(log_p(x, tau).sum(), (x, tau))
    v = velocity(x, tau)
    div = sum(torch.autograd.grad(v[:, i].sum(), x, retain_graph=True)[0][:, i] for i in range(2))
    change = d_tau + div + (v * d_x).sum(1)
    torch.testing.assert_close(change, torch.zeros(40).double(), atol=1e-9, rtol=0)
    torch.testing.assert_close(-(x + column(1 - tau) * v) / column(tau), d_x)  # the score
    for t in (0.1, 1.0, 5.0):
        torch.testing.assert_close(lab.FlowPrecond(velocity)(x, t), mixture.denoiser(x, t))


@pytest.mark.parametrize("method", ["kernel", "drifting"])
def test_without_a_second_network_the_gradient_is_that_of_the_batch(method):
    """For g(x, t) = scale x the samples are N(0, (2.5 scale)^2), and the gradient points to the
    data's STD from both sides. In kernel it is that of SIM with the denoiser of 1500 points."""
    found = {}
    for std in (0.5 * STD, STD, 2 * STD):
        g = Affine(std / 2.5)
        neighbour = make(method, g, batch=1500)
        found[std] = gradient(neighbour.theta(), g)
    assert found[0.5 * STD] < 0 < found[2 * STD]
    assert abs(found[STD]) < 0.5 * min(abs(found[0.5 * STD]), found[2 * STD])
    neighbour.begin(4)  # draws the same numbers again, for the loss by hand
    z, t, eps = neighbour.normal(), neighbour.time(), None
    data = neighbour.data() if method == "drifting" else None
    x_0, eps = g(2.5 * z, 2.5), neighbour.normal()
    x_t = x_0 + t * eps
    mean = lambda points: torch.softmax(-torch.cdist(x_t, points)**2 / (2 * t**2), 1) @ points
    teacher = mean(data) if method == "drifting" else posterior_mean(x_t, t)
    y = mean(x_0.detach()) - teacher
    if method == "drifting":
        by_hand = (y.detach() * x_0).sum(1)
    else:
        unit = y / (y.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()
        by_hand = -(unit * (mean(x_0.detach()) - x_0)).sum(1)
    assert gradient(by_hand, g) == pytest.approx(found[2 * STD], rel=1e-2)


def test_sida_is_sim_and_a_gan_on_d_psis_last_hidden_layer():
    torch.manual_seed(0)
    g, d_psi = Affine(0.4), toy.make_denoiser()
    sida = make("sida", g, d_psi=d_psi, batch=50)
    loss = sida.psi()
    sida.begin(4)
    x_0 = (0.4 * 2.5 * sida.normal()).detach()
    t = (-1.2 + 1.2 * torch.randn(50, 1, **sida.where)).exp()
    hidden = {}
    d_psi.model.layers[-1].register_forward_pre_hook(
        lambda layer, inputs: hidden.update(h=inputs[0].mean(1)))
    weight = ((t**2 + 0.25) / (t * 0.5)**2)
    dsm = (weight * (d_psi(x_0 + t * sida.normal(), t) - x_0)**2).sum(1)
    fake, t = hidden["h"], (-1.2 + 1.2 * torch.randn(50, 1, **sida.where)).exp()
    d_psi(sida.data() + t * sida.normal(), t)
    expected = dsm + 0.1 * 2 * (F.softplus(fake) + F.softplus(-hidden["h"]))  # 2: the numbers of x
    torch.testing.assert_close(loss, expected)
    sida.begin(4)
    loss = sida.theta()
    sida.begin(4)
    z, t = sida.normal(), sida.time()
    x_0 = g(2.5 * z, 2.5)
    x_t = x_0 + t * sida.normal()
    student = d_psi(x_t, t)
    y = student - posterior_mean(x_t, t)
    unit = y / (y.pow(2).sum(1, keepdim=True) + 1e-6).sqrt()
    by_hand = -(unit * (student - x_0)).sum(1) + 0.1 * 2 * F.softplus(-hidden["h"])
    torch.testing.assert_close(loss, by_hand)
    assert gradient(loss, g) == pytest.approx(gradient(by_hand, g), rel=1e-4)


def begun(method, batch, *flags):
    """A method and what its next theta() draws, with g(x, t) = 0.4 x and d_psi(x, t) = 0.9 x, whose
    weights get gradients. -> method, g, d_psi, x_0, x_t, t"""
    g, d_psi = Affine(0.4), Affine(0.9)
    neighbour = make(method, g, d_psi=d_psi, batch=batch, flags=flags)
    z, t = neighbour.normal(), neighbour.time()
    x_0 = g(2.5 * z, 2.5)
    x_t = x_0 + t * neighbour.normal()
    neighbour.begin(4)
    return neighbour, g, d_psi, x_0, x_t, t


def test_reward_is_sim_less_lambda_times_the_first_coordinate():
    reward, g, d_psi, x_0, x_t, t = begun("reward", 50, "--reward", "0.3", "--distance", "l2")
    y = d_psi(x_t, t) - posterior_mean(x_t, t)
    expected = -(2 * y * (d_psi(x_t, t) - x_0)).sum(1) - 0.3 * x_0[:, 0]
    found = reward.theta()
    torch.testing.assert_close(found, expected)
    assert gradient(found, g) == pytest.approx(gradient(expected, g), rel=1e-4)


def test_realuid_without_data_is_sid_and_with_data_its_optimum_is_their_denoiser():
    realuid, g, d_psi, x_0, x_t, t = begun("realuid", 20_000)
    realuid.alpha = realuid.beta = 1.0
    f, q = d_psi(x_t, t), posterior_mean(x_t, t)
    by_hand = 2 * ((q - f) * ((q - x_0) - 0.5 * (q - f))).sum(1)  # SiD's loss, alpha = 1/2
    assert gradient(realuid.theta(), g) == pytest.approx(gradient(by_hand, g), rel=1e-4)

    class Scaled(Affine):  # scale times the denoiser of the data
        def forward(self, x, t):
            return self.scale * posterior_mean(x, t)

    as_data, d_psi = Affine(STD / 2.5), Scaled(1.0)
    for alpha, beta in ((0.8, 0.9), (0.9, 0.6)):
        realuid = make("realuid", as_data, d_psi=d_psi, batch=100_000,
                       flags=["--psi-mean", "0", "--psi-std", "0.3"])
        realuid.alpha, realuid.beta = alpha, beta
        slope = torch.autograd.grad(realuid.psi().mean(), d_psi.scale)[0].item()
        assert abs(slope) < 0.02, slope  # with beta = 1 it would be -0.2 and below


F_DIVERGENCES = {  # f(r) of D_f(p | q) = E_q f(p / q), by definition
    "reverse_kl": lambda r: r * r.log(), "forward_kl": lambda r: -r.log(),
    "jeffreys": lambda r: (r - 1) * r.log(), "chi2": lambda r: (r - 1)**2,
    "js": lambda r: r * r.log() - (1 + r) * ((1 + r) / 2).log()}


@pytest.mark.parametrize("name", lab.F_WEIGHTS)
def test_an_f_divergence_is_an_integral_over_the_noise_levels(name):
    """D_f at t = 0.3, by its definition, is the integral of E w(r) |y|^2 / t^3 from there on. The
    data are N(0, 1), and the samples N(0, 0.8^2)."""
    log_t = torch.linspace(math.log(0.3), 8, 400, dtype=torch.float64)[:, None]
    t = log_t.exp()
    x = torch.linspace(-9, 9, 401, dtype=torch.float64) * (1 + t**2).sqrt()
    p, q = [torch.distributions.Normal(0.0, (v + t**2).sqrt()).log_prob(x).exp() for v in (0.64, 1)]
    y = x * (0.64 / (0.64 + t**2) - 1 / (1 + t**2))
    inner = torch.trapezoid(p * lab.F_WEIGHTS[name]((p / q).log()) * y**2, x)
    inner = inner / t[:, 0]**2  # dt = t d log t
    expected = torch.trapezoid(q[0] * F_DIVERGENCES[name](p[0] / q[0]), x[0])
    assert torch.trapezoid(inner, log_t[:, 0]).item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("name", lab.F_WEIGHTS)
def test_gradients_of_an_f_divergence_at_one_noise_level(name):
    """The gradients are by the std of samples N(0, 0.5^2); the data are N(0, 1), and t is 0.5.
    Diff-Instruct times w(r) has the gradient of D_f. SIM for l2 times w(r) has (3.5), if w passes
    the gradient to x_t."""
    t, std = 0.5, torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    density = lambda x, std: torch.distributions.Normal(0.0, (std**2 + t**2)**0.5).log_prob(x).exp()
    denoiser = lambda x, std: x * std**2 / (std**2 + t**2)
    points, weights = toy.trapezoid(2, 161)
    z, eps = points.T
    x_0, frozen = std * z, std.detach()
    x_t = x_0 + t * eps
    w = lab.F_WEIGHTS[name]((density(x_t, frozen) / density(x_t, 1.0)).log())
    student, y = denoiser(x_t, frozen), denoiser(x_t, frozen) - denoiser(x_t, 1.0)
    slope = lambda value: torch.autograd.grad(value, std, retain_graph=True)[0].item()

    grid = torch.linspace(-9, 9, 4001, dtype=torch.float64)
    q = density(grid, 1.0)
    divergence = torch.trapezoid(q * F_DIVERGENCES[name](density(grid, std) / q), grid)
    found = slope(weights @ ((w * y).detach() * x_0)) / t**2
    assert found == pytest.approx(slope(divergence), rel=1e-4)

    moving = denoiser(x_t.detach(), std)  # in (3.5) theta moves the score, and not the x_t
    expected = slope(weights @ (w * 2 * y).detach().mul(moving))
    assert slope(weights @ (-w * 2 * y * (student - x_0))) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("method", ["uni", "f_distill"])
@pytest.mark.parametrize("name", lab.F_WEIGHTS)
def test_weights_by_the_ratio_of_densities(method, name):
    """The methods have the losses of the test above, where p_t is a mixture around the batch; uni
    divides by the density of its log-normal times."""
    flags = ["--divergence", name, "--p-mean", "-1", "--p-std", "1.2"]
    neighbour, g, d_psi, x_0, x_t, t = begun(method, 50, *flags)
    batch = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(50, 50)),
        torch.distributions.Independent(torch.distributions.Normal(x_0.detach(), t[:, None]), 1))
    data = torch.distributions.Normal(0.0, (STD**2 + t**2).sqrt())
    w = lab.F_WEIGHTS[name](batch.log_prob(x_t) - data.log_prob(x_t).sum(1))
    y = d_psi(x_t, t) - posterior_mean(x_t, t)
    if method == "uni":
        assert t.min() > 0.3
        density = torch.distributions.LogNormal(-1, 1.2).log_prob(t).exp()
        by_hand = -w * (2 * y * (d_psi(x_t, t) - x_0)).sum(1) / (t**3 * density).flatten()
    else:
        by_hand = w.detach() * (y.detach() * x_0).sum(1)
    loss = neighbour.theta()
    ratio = (loss / by_hand).detach()  # one positive factor, which Adam takes out
    assert ratio[0] > 0
    torch.testing.assert_close(ratio, ratio[:1].expand(50), rtol=1e-4, atol=0)
    assert gradient(loss, g) == pytest.approx(ratio[0].item() * gradient(by_hand, g), rel=1e-3)


def integral_over_times(loss, v):
    """The derivative by v of the integral of the loss / t^3 over t, for samples of N(0, v), data of
    N(0, 1) and a d_psi that is right."""
    log_t = torch.linspace(-7, 7, 141, dtype=torch.float64)
    slopes = torch.tensor([lab.gaussian_gradient(loss, 0.0, v**0.5, 0.0, v**0.5, t)[1]
                           for t in log_t.exp()])
    return torch.trapezoid(slopes / log_t.exp()**2, log_t).item() / (2 * v**0.5)  # dt = t d log t


def test_sims_gradient_with_the_kls_weight_is_not_the_kls():
    """One Gaussian N(0, v) against N(0, 1). KL = (v - 1 - log v) / 2 is the integral of E|y|^2/t^3
    over t, and its derivative by v is (1 - 1/v) / 2. What SIM follows is (3.5): for v = 2 the
    integral of du / ((2 + u)^2 (1 + u)), u = t^2, which is log 2 - 1/2."""
    found = integral_over_times(lab.LOSSES["SIM, l2"], v=2.0)
    assert found == pytest.approx(math.log(2) - 0.5, rel=1e-3)
    assert abs(found - (1 - 1 / 2) / 2) > 0.05
    found = integral_over_times(lab.LOSSES["SIM, l2"], v=0.25)  # and the KL's is -1.5
    assert found == pytest.approx(0.75 * (16 / 9 * math.log(4) - 16 / 3), rel=1e-3)


def test_sid_with_alpha_one_half_has_the_kls_gradient():
    """SiD's loss is half of SIM's for l2, plus |y|^2 / 2, which moves x_t: together half of the
    whole gradient of E|y|^2, and so of the KL."""
    sid = functools.partial(sid_loss, alpha=0.5, weight=nowgt)
    assert integral_over_times(sid, v=2.0) == pytest.approx(0.5 * (1 - 1 / 2) / 2, rel=1e-3)
    assert integral_over_times(sid, v=0.25) == pytest.approx(0.5 * (1 - 4) / 2, rel=1e-3)


def test_few_trains_each_of_its_steps_and_samples_by_all():
    """With the exact denoiser as g: the samples of each step, from noise added anew."""
    seen = []

    def g(x, t):
        seen.append((x, t))
        return x * torch.tensor(0.5)

    few = make("few", g, segments=4, batch=20_000)
    numbers = set()
    for step in range(40):
        few.begin(step)
        seen.clear()
        few.generate(few.normal())
        numbers.add(len(seen))
    assert numbers == {1, 2, 3, 4}
    seen.clear()
    z = torch.randn(20_000, 2)
    x = lab.renoised_steps(g, z, lab.equal_parts(2.5, 4))
    assert [t for _, t in seen] == pytest.approx([2.5, 1.875, 1.25, 0.625])
    assert torch.equal(seen[0][0], 2.5 * z) and torch.equal(x, seen[-1][0] * 0.5)
    for (before, _), (after, t) in zip(seen, seen[1:]):  # x_0 of the step before, and new noise
        noise = (after - 0.5 * before) / t
        assert abs(noise.std() - 1) < 0.02 and abs((noise * before).mean()) < 0.05


def test_cd_with_several_steps_samples_from_data_if_its_function_is_exact():
    """Each step but the first begins with noise of its own, which is not z drawn again."""
    sample = lab.sampler_of({"segments": 3, "steps_of": "cd_steps"})
    z = torch.randn(20_000, 2, generator=torch.Generator().manual_seed(0))
    seen = []
    x = sample(lambda x, t: seen.append(t) or flow_map(x, t, 0.0), z, 80.0)
    assert seen == lab.segment_starts(80.0, 3) and seen[0] == 80 and len(seen) == 3
    kept = np.prod([STD / (STD**2 + t**2)**0.5 for t in seen[1:]]) * STD  # of z, 0.04
    assert x.std() == pytest.approx(STD, rel=0.01)
    assert (x * z).mean() == pytest.approx(kept, abs=0.015)


def test_dmds_terms():
    """One term is that of Diff-Instruct with sidwgt, and the other the distance to the pairs."""
    make_one = lambda method: make(method, Affine(0.4), d_psi=lambda x, t: 0.9 * x, batch=50)
    dmd, kl, pairs = map(make_one, ("dmd", "dmd_kl", "dmd_pairs"))
    torch.testing.assert_close(kl.theta() + 0.25 * ((1.0 * dmd.z - dmd.x)**2).sum(1)[picked(dmd)],
                               dmd.theta())
    pairs.begin(4)
    picks = torch.randint(500, (50,), **pairs.where)
    pairs.begin(4)
    expected = 0.25 * ((0.4 * 2.5 * pairs.z - pairs.x)**2).sum(1)[picks]
    torch.testing.assert_close(pairs.theta(), expected)
    assert pairs.psi is None and dmd.psi and kl.psi


def picked(dmd):
    """The places of the pairs that DMD's next theta() draws, after what its KL term draws."""
    dmd.begin(4)
    dmd.normal(), dmd.time(), dmd.normal()
    places = dmd.pick()
    dmd.begin(4)
    return places


# ---- Images ----
class OfClass(torch.nn.Module):
    """A denoiser of images (1, 4, 4) that depends on the class: x times a weight of each class."""
    image_shape, label_dim = (1, 4, 4), 3

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.tensor([0.1, 0.2, 0.3]))

    def forward(self, x, t, class_labels):
        return x * (class_labels @ self.weight)[:, None, None, None]


def on_images(method, *flags):
    """A method on images of three classes: pictures of class k are 50 k grey; g, d_psi and the
    teacher are OfClass."""
    args = images.parse(["--method", method, "--batch", "64", *flags])
    values = (50 * torch.arange(3).repeat(9)).byte()[:, None, None, None]
    data = images.Pictures(values.expand(27, 1, 4, 4), torch.arange(3).repeat(9))
    run = SimpleNamespace(d_psi=OfClass(), g=OfClass())
    return images.METHODS[method](args, data, OfClass(), run), run


def drawn(method, number):
    """Begin, and draw the classes as a phase does. -> OfClass's weight for each image"""
    method.begin(number)
    labels = torch.randint(3, (64,), **method.where)
    return (labels + 1)[:, None, None, None] / 10


def test_few_on_images_is_sim_given_the_class():
    few, run = on_images("few", "--segments", "1")
    with torch.no_grad():
        run.d_psi.weight *= 2
    scale, z = drawn(few, 3), few.normal()
    torch.randint(1, (), **few.where)  # which of the steps: here there is one
    x_0, t = scale * 5 * z, (1.6 * torch.randn(64, 1, 1, 1, **few.where)).exp()
    x_t = x_0 + t * few.normal()
    y = scale * x_t
    unit = y / (y.pow(2).sum((1, 2, 3), keepdim=True) + 1e-6).sqrt()
    by_hand = -(unit * (2 * scale * x_t - x_0)).sum((1, 2, 3))
    few.begin(3)
    torch.testing.assert_close(few.theta(), by_hand, rtol=1e-4, atol=1e-4)


def test_realuid_on_images_sees_data_of_the_class():
    """d_psi's loss: samples and data of the same classes, each with noise of its own."""
    method, _ = on_images("realuid", "--data", "x")
    scale, z = drawn(method, 3), method.normal()
    x = (500 * scale - 50) / 127.5 - 1
    torch.rand(64, **method.where)  # which picture of the class
    expected = 0.0
    for x_0, a, b in ((scale * 5 * z, 0.94, 0.96), (x.expand(-1, 1, 4, 4), 0.06, 0.04)):
        t = (1.6 * torch.randn(64, 1, 1, 1, **method.where)).exp()
        x_t = x_0 + t * method.normal()
        weight = (t**2 + 0.25) / (t * 0.5)**2
        expected += a * (weight * (scale * x_t - b / a * x_0)**2).sum((1, 2, 3))
    method.begin(3)
    torch.testing.assert_close(method.psi(), expected, rtol=1e-4, atol=1e-4)


def test_sida_on_images_takes_the_end_of_the_encoder():
    teacher, _, _ = images.edm.load_teacher("fashion")
    args = images.parse(["--method", "sida", "--batch", "2", "--data", "x"])
    run = SimpleNamespace(d_psi=teacher, g=teacher)
    sida, x, t = images.SiDA(args, None, teacher, run), torch.randn(2, 1, 28, 28), torch.ones(2)
    one_hot = F.one_hot(torch.tensor([1, 2]), 10).float()
    seen, decoder = [], next(iter(teacher.model.dec.values()))
    see = lambda layer, inputs: seen.append(inputs[0])
    with torch.no_grad(), decoder.register_forward_pre_hook(see):
        teacher(x, t[:, None, None, None], one_hot)
    (deepest,) = seen
    torch.testing.assert_close(sida.logits, deepest.flatten(1).mean(1), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(sida.gan(1), 78.4 * F.softplus(-sida.logits))


@pytest.mark.parametrize("method", ["sida", "realuid", "few"])
def test_a_run_on_images(method, tmp_path, monkeypatch, refused):
    monkeypatch.setattr(images.edm, "FINAL", 20)
    monkeypatch.setattr(images.edm, "LOOK", 20)
    monkeypatch.setattr(images, "LOOKS", 1)
    monkeypatch.setattr(images.edm, "sample_teacher", lambda net, z, labels: z)
    torch.manual_seed(0)
    np.savez(tmp_path / "data.npz", images=torch.randint(256, (100, 28, 28)).byte().numpy(),
             labels=np.arange(100) % 10)
    flags = ["--method", method, "--steps", "2", "--batch", "2", "--out", str(tmp_path / "run")]
    flags += ["--data", str(tmp_path / "data.npz")] if method != "few" else []
    images.main(flags)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["method"] == method and metrics["fd"] > 0
    assert metrics["segments"] == (2 if method == "few" else 1)
    g, t_star, _ = images.edm.load_denoiser(tmp_path / "run", several=True)
    labels = F.one_hot(torch.arange(10)).float()
    z = torch.randn(10, 1, 28, 28)
    one, two = [images.sample(g, t_star, z, labels, segments) for segments in (1, 2)]
    torch.testing.assert_close(one, images.edm.sample_one_step(g, t_star, z, labels))
    assert (one - two).abs().mean() > 0.01
    draw = ["--sample", str(tmp_path / "run"), "--n", "4", "--out", str(tmp_path / "x.npz")]
    images.main(draw)
    z, labels = common.draw_latents(range(4), (1, 28, 28), 10)
    by_hand = images.sample(g, 5.0, z, labels, metrics["segments"])
    drawn = np.load(tmp_path / "x.npz")["one_step_values"]
    torch.testing.assert_close(torch.from_numpy(drawn), by_hand)
    if method == "few":
        assert "neighbours_images.py" in refused(images.edm.main, draw)
        eval_fid = importlib.import_module("eval_fid")
        judge = [str(tmp_path / "run"), "--features", "judge", "--n", "4"]
        assert "neighbours_images.py" in refused(eval_fid.main, judge)


@pytest.mark.parametrize("flags, message", [
    ("--method sida", "needs --data"), ("--method sid", "02_edm_cifar.py"),
    ("--method few --psi-updates 2", "--psi-updates"), ("--method few --data x", "--data is not"),
    ("--method realuid --data x --distance l2", "--distance is not"),
    ("--method sida --data x --segments 3", "--segments is not")])
def test_mistakes_on_images(flags, message, refused):
    assert message in refused(images.main, flags.split())


def test_the_teacher_of_images_has_classes(monkeypatch, refused):
    monkeypatch.setattr(images.edm, "load_teacher", lambda name: (
        images.edm.make_unet(img_resolution=8, img_channels=1, model_channels=8), {}, {}))
    assert "with classes" in refused(images.main, ["--method", "few"])


def test_pictures_of_each_class(tmp_path, refused):
    np.savez(tmp_path / "x.npz", images=np.zeros((30, 28, 28), np.uint8),
             labels=np.array([0] * 20 + [9] * 10))
    argv = ["--method", "sida", "--data", str(tmp_path / "x.npz"), "--out", str(tmp_path / "run")]
    assert "some of each of 10 classes" in refused(images.main, argv)


def test_flow_loss_is_least_for_the_velocity_and_tau_spans_0_to_1():
    x_0, seen = torch.randn(4000, 2, dtype=torch.float64), []
    net = SimpleNamespace(net=lambda x, tau: seen.append((x, tau)) or 0 * x)
    torch.manual_seed(0)
    loss = lab.flow_loss(net, x_0)
    (x, tau), = seen
    eps = x_0 + (x - x_0) / tau[:, None]
    torch.testing.assert_close(loss, ((eps - x_0)**2).sum(1))
    assert (tau.sort().values - torch.linspace(0, 1, 4000)).abs().max() < 0.04
    assert eps.mean().abs() < 0.06 and abs(eps.std() - 1) < 0.04
    torch.manual_seed(0)
    assert lab.flow_loss(SimpleNamespace(net=lambda x, tau: eps - x_0), x_0).max() < 1e-20


# ---- Runs ----
@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Runs with two looks at the generator, no pictures, and closing measures on few points."""
    monkeypatch.setattr(toy, "LOOKS", 1)
    monkeypatch.setattr(toy, "panel", lambda *arguments: Image.new("RGB", (9, 9)))
    monkeypatch.setattr(toy, "summarise", functools.partial(toy.summarise, n=500, sets=2))


def same(a, b):
    return all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("method", lab.NEIGHBOURS)
def test_what_learns_and_that_a_killed_run_continues(method, tmp_path, monkeypatch):
    """g always, and the second network where there is one; the same after SIGTERM, bit for bit."""
    flags = [*SHORT, "--method", method, *(["--pretrain-steps", "9"] if method != "ct" else [])]
    lab.main([*flags, "--out", str(tmp_path / "at once")])
    begin = lab.Neighbour.begin
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(lab.Neighbour, "begin", lambda self, step: (
            begin(self, step), signal.raise_signal(signal.SIGTERM) if step == 2 else None))
        lab.main([*flags, "--out", str(tmp_path / "killed")])
    assert stop.value.code == 130
    parts, killed = [torch.load(tmp_path / name / "ckpt.pt") for name in ("at once", "killed")]
    assert killed["step"] == 3 and not same(parts["g"], killed["g"])
    lab.main([*flags, "--out", str(tmp_path / "killed")])
    again = torch.load(tmp_path / "killed" / "ckpt.pt")
    assert all(same(parts[name], again[name]) for name in ("g", "g_ema", "d_psi", "learned"))
    assert not same(parts["g"], parts["learned"])
    without_d_psi = ("dmd_pairs", "cd", "cd_steps", "ct", "mcm", "kernel", "drifting")
    assert same(parts["d_psi"], parts["learned"]) == (method in without_d_psi)
    torch.manual_seed(0)
    assert same(lab.make_denoiser().state_dict(), parts["learned"]) == (method == "ct")


@pytest.mark.parametrize("method", ["cd", "add"])
def test_train_by_hand(method, tmp_path):
    """Four updates with the method's own losses, which are tested above: Adam without momentum, a
    learning rate that falls to 0, and EDM's average of g. dmd and pagoda differ in the losses."""
    lab.main([*SHORT, "--method", method, "--pretrain-steps", "9", "--out", str(tmp_path / "run")])
    state = torch.load(tmp_path / "run" / "ckpt.pt", weights_only=True)
    args, mixture = lab.parse([*SHORT, "--method", method]), toy.make_mixture("ring")
    g, d_psi, g_ema = [lab.make_denoiser() for _ in range(3)]
    for net in (g, d_psi, g_ema):
        net.load_state_dict(state["learned"])
    by_hand = lab.NEIGHBOURS[method](args, mixture, mixture.denoiser,
                                     SimpleNamespace(g=g, d_psi=d_psi))
    adams = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.999)) for net in (d_psi, g)]
    for step in range(4):
        by_hand.begin(step)
        for loss, net, adam in zip((by_hand.psi, by_hand.theta), (d_psi, g), adams):
            if loss:
                d_psi.requires_grad_(net is d_psi)
                g.requires_grad_(net is g)
                adam.param_groups[0]["lr"] = 2e-3 * (4 - step) / 4
                adam.zero_grad()
                loss().mean().backward()
                adam.step()
        beta = 0.5**(16 / (0.05 * 16 * step)) if step else 0
        for a, b in zip(g_ema.parameters(), g.parameters()):
            a.data = beta * a.data + (1 - beta) * b.data
    for name, net in (("g", g), ("g_ema", g_ema), ("d_psi", d_psi)):
        for key, w in net.state_dict().items():
            torch.testing.assert_close(state[name][key], w, rtol=0, atol=2e-6)


@pytest.mark.parametrize("method", ["dmd", "sim"])
def test_a_flow_as_the_teacher(method, tmp_path, monkeypatch):
    calls, flow_loss = [], lab.flow_loss
    monkeypatch.setattr(lab, "flow_loss", lambda *a: calls.append(a) or flow_loss(*a))
    lab.main([*SHORT, "--method", method, "--teacher", "flow", "--pretrain-steps", "9",
              "--out", str(tmp_path / "run")])
    assert len(calls) == 9 and isinstance(calls[0][0], lab.FlowPrecond)
    g, t_star, _ = load_generator(tmp_path / "run", lab.make_denoiser)
    assert isinstance(g, lab.FlowPrecond) and t_star == 2.5


def test_a_run_its_samples_and_its_metrics(tmp_path, refused):
    run = tmp_path / "run"
    lab.main([*SHORT, "--method", "mcm", "--pretrain-steps", "9", "--out", str(run)])
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["segments"] == 4 and metrics["method"] == "mcm" and metrics["sw2"] > 0
    lab.main(["--sample", str(run), "--n", "100"])
    g, t_star, meta = load_generator(run, lab.make_denoiser)
    assert (t_star, meta["segments"], meta["mixture"]) == (80, 4, "ring")
    z = torch.randn(100, 2, generator=torch.Generator().manual_seed(0))
    x = np.load(run / "samples-100-seed-0.npz")["one_step"]
    assert np.array_equal(x, lab.few_steps(g, z, 80.0, 4).numpy())
    refused(toy.main, ["--sample", run])  # one step of this generator would be no sample


def test_the_gaussian_figure(tmp_path, refused):
    lab.main(["--gaussian", str(tmp_path / "g.png")])
    assert Image.open(tmp_path / "g.png").size == (960, 340)
    assert "none" in refused(lab.main, ["--gaussian", tmp_path / "g.png" / "none.png"])


# ---- The command line ----
def test_defaults_follow_the_method():
    for method in ("sim", *lab.NEIGHBOURS):
        args = lab.parse(["--method", method])
        assert args.t_star == (80 if method in ("cd", "cd_steps", "ct", "mcm", "pagoda") else 2.5)
        assert args.segments == {"mcm": 4, "few": 2, "cd_steps": 2}.get(method, 1)
    args = lab.parse("--method mcm --t-star 3 --segments 2".split())
    assert args.t_star == 3 and args.segments == 2


@pytest.mark.parametrize("flags", [
    "--segments 2", "--sid-alpha 1.2", "--method cd --weight sidwgt", "--method dmd --distance l2",
    "--method cd --p-theta karras", "--method add --psi-mean 0", "--method ct --teacher flow",
    "--method ct --pretrain-steps 9", "--method pagoda --psi-updates 2",
    "--method cd --batch-gpu 8", "--method uni --distance l2", "--method few --reward 1",
    "--method kernel --lr-psi 1", "--method drifting --teacher flow", "--divergence js",
    "--method uni --p-theta karras", "--method cd --t-min 0.1"])
def test_flags_that_a_method_does_not_read(flags, refused):
    assert "is not for --method" in refused(lab.main, flags.split())


@pytest.mark.parametrize("flags", [
    "--distance l2 --weight sidwgt --psi-updates 2 --batch-gpu 8", "--method sid --sid-alpha 1.2",
    "--method dmd --psi-mean 0 --p-mean 0", "--method add --p-theta karras --p-std 1",
    "--method pagoda --teacher flow --pretrain-steps 9"])
def test_flags_that_a_method_reads(flags):
    lab.parse(flags.split())
