"""The first half of common.py against independent references: autograd, differences, closed forms, scipy."""

import math

import numpy as np
import pytest
import torch
from scipy import integrate, stats

from common import (
    DISTANCES,
    di_loss,
    dsm_loss,
    edm_sampler,
    ema_beta,
    ema_update,
    exp,
    huber,
    l2,
    lambda_edm,
    p_edm,
    p_karras,
    p_sim,
    phuber,
    power,
    sid_loss,
    sim_loss,
    smoothl1,
    train_only,
)

ALL = [make() for make in DISTANCES.values()] + [
    phuber(0.5),
    power(2),
    power(6),
    exp(4, 0.3),
    huber(0.2),
    smoothl1(2),
]
SHAPES = [(4,), (4, 2), (3, 3, 4, 4)]


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("index", range(len(ALL)))
def test_d_prime_is_the_gradient_of_d(index, shape):
    distance, y = ALL[index], (0.5 * random(*shape)).requires_grad_()
    d = distance.d(y)
    assert d.shape == shape[:1] and distance.d_prime(y).shape == shape
    (gradient,) = torch.autograd.grad(d.sum(), y)
    torch.testing.assert_close(distance.d_prime(y), gradient, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("index", range(len(ALL)))
def test_d_prime_against_finite_differences(index):
    distance, y, v, h = ALL[index], 0.5 * random(5, 2, 3), random(5, 2, 3, seed=1), 1e-6
    numeric = (distance.d(y + h * v) - distance.d(y - h * v)) / (2 * h)
    torch.testing.assert_close((distance.d_prime(y) * v).sum((1, 2)), numeric, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("index", range(len(ALL)))
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_distances_are_proper(index, dtype):
    zero, y = torch.zeros(2, 3, 4, dtype=dtype), 1e-3 * random(100, 3, 4).to(dtype)
    assert (ALL[index].d(zero) == 0).all() and (ALL[index].d_prime(zero) == 0).all()
    assert (ALL[index].d(y) > 0).all()


def test_phuber_takes_the_norm_of_the_whole_sample():
    y = random(2, 3, 4, 4)
    norm = y.flatten(1).norm(dim=1)
    torch.testing.assert_close(phuber(0.3).d(y), (norm**2 + 0.09).sqrt() - 0.3)
    torch.testing.assert_close(phuber(0.3).d_prime(y).flatten(1).norm(dim=1), norm / (norm**2 + 0.09).sqrt())
    assert phuber().d_prime(y).flatten(1).norm(dim=1).max() < 1  # the misprinted 2 y / sqrt(.) has norm 2


@pytest.mark.parametrize(
    "make",
    [
        lambda: phuber(0),
        lambda: phuber(-1),
        lambda: phuber(math.nan),
        lambda: phuber(math.inf),
        lambda: power(3),
        lambda: power(0),
        lambda: power(-2),
        lambda: power(2.5),
        lambda: power(math.nan),
        lambda: exp(2, 0),
        lambda: exp(3, 1),
        lambda: huber(0),
        lambda: smoothl1(-1),
        lambda: p_edm(3, t_min=2, t_max=1),
        lambda: p_edm(3, truncate="drop"),
    ],
)
def test_arguments_are_checked(make):
    with pytest.raises(ValueError):
        make()


# ---- times ----
def test_log_normal_times():
    torch.manual_seed(0)
    for p, mean, std in ((p_edm, -1.2, 1.2), (p_sim, -3.5, 2.5), (lambda n: p_edm(n, -2, 2), -2, 2)):
        assert stats.kstest(p((20_000,)).log().numpy(), "norm", (mean, std)).pvalue > 1e-3
    assert (p_sim(100_000) < 0.01).float().mean() == pytest.approx(
        0.33, abs=0.01
    )  # the shares that facts of the
    assert (p_edm(100_000) < 0.01).float().mean() == pytest.approx(
        0.002, abs=0.001
    )  # paper's constants imply
    assert p_edm((5, 1, 1, 1)).shape == (5, 1, 1, 1)


def test_truncation():
    torch.manual_seed(0)
    low, high = 0.01, 156.6155  # B.3
    clamped = p_edm(50_000, -2, 2, low, high)
    assert clamped.min() == low and (clamped == low).float().mean() == pytest.approx(0.0964, abs=0.005)
    t = p_edm((50_000, 1), -2, 2, low, high, truncate="resample").flatten()
    assert low <= t.min() and t.max() <= high and (t == low).float().mean() < 1e-3
    ends = [(math.log(end) + 2) / 2 for end in (low, high)]
    assert stats.kstest(t.log().numpy(), "truncnorm", (*ends, -2, 2)).pvalue > 1e-3


def test_karras_times():
    torch.manual_seed(0)
    t = p_karras(100_000)
    assert 0.002 <= t.min() < 0.0021 and 24.3 < t.max() <= 24.411
    assert t.median() == pytest.approx(0.965, rel=0.02)


def test_lambda_edm_makes_the_target_of_unit_variance():
    t = torch.tensor([0.01, 0.5, 3.0])
    torch.testing.assert_close(
        lambda_edm(t), 1 / (t * 0.5 / (t**2 + 0.25).sqrt()) ** 2
    )  # 1 / c_out^2, EDM's Table 1


# ---- losses ----
def linear_denoiser(seed, dim=6):
    m = random(dim, dim, seed=seed)
    return lambda x, t: torch.tanh(x.flatten(1) @ m).reshape(x.shape) / (1 + t)


X_0, EPS, T = random(7, 2, 3, seed=5), random(7, 2, 3, seed=6), random(7, 1, 1, seed=7).exp()
PSI, Q = linear_denoiser(1), linear_denoiser(2)


def test_dsm_loss():
    x_t = X_0 + T * EPS
    expected = ((PSI(x_t, T) - X_0) ** 2).flatten(1).sum(1) * lambda_edm(T).flatten()
    torch.testing.assert_close(dsm_loss(PSI, X_0, T, EPS), expected)
    torch.testing.assert_close(
        dsm_loss(PSI, X_0, T, EPS, weight=torch.ones_like), expected / lambda_edm(T).flatten()
    )


@pytest.mark.parametrize("name", DISTANCES)
def test_sim_loss_is_b13_and_detaches_nothing(name):
    distance, x_0 = DISTANCES[name](), X_0.clone().requires_grad_()

    def formula(x_0):  # (B.13) written out again
        x_t = x_0 + T * EPS
        y = PSI(x_t, T) - Q(x_t, T)
        return -(distance.d_prime(y) * (PSI(x_t, T) - x_0)).flatten(1).sum(1)

    loss, y_t = sim_loss(PSI, Q, x_0, T, distance, EPS)
    torch.testing.assert_close(loss, formula(X_0))
    assert not y_t.requires_grad and y_t.shape == X_0.shape
    v, h = random(7, 2, 3, seed=8), 1e-6
    numeric = (formula(X_0 + h * v) - formula(X_0 - h * v)).sum() / (
        2 * h
    )  # a detach would show as a difference
    assert (torch.autograd.grad(loss.sum(), x_0)[0] * v).sum().item() == pytest.approx(
        numeric.item(), rel=1e-6
    )


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_loss_as_in_its_paper(alpha):
    x_0 = X_0.clone().requires_grad_()
    x_t = x_0 + T * EPS
    f, q = PSI(x_t, T), Q(x_t, T)
    w = (x_0 - q).abs().mean((1, 2), keepdim=True).detach()
    expected = ((q - f) * ((q - x_0) - alpha * (q - f)) / w).sum((1, 2))
    loss, _ = sid_loss(PSI, Q, x_0, T, alpha, EPS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(v.sum(), x_0)[0] for v in (loss, expected)])


def test_sid_with_alpha_1_is_sim_with_l2():
    sid, y_t = sid_loss(PSI, Q, X_0, T, 1.0, EPS)
    w = (X_0 - Q(X_0 + T * EPS, T)).abs().mean((1, 2))
    torch.testing.assert_close(2 * w * sid, sim_loss(PSI, Q, X_0, T, l2(), EPS)[0])


def test_di_loss_has_the_gradient_y():
    x_0 = X_0.clone().requires_grad_()
    loss, y_t = di_loss(PSI, Q, x_0, T, EPS)
    x_t = X_0 + T * EPS
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x_0)[0], PSI(x_t, T) - Q(x_t, T))
    torch.testing.assert_close(y_t, PSI(x_t, T) - Q(x_t, T))


def test_frozen_weights_stay_frozen_and_pass_gradients_on():
    net, frozen = [
        torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Dropout(0.5), torch.nn.Linear(8, 2))
        for _ in range(2)
    ]
    train_only(net, frozen=frozen)
    assert net.training and not frozen.training
    x_0 = net(torch.randn(16, 2))
    loss, _ = sim_loss(lambda x, t: frozen(x), lambda x, t: 0 * x, x_0, torch.ones(16, 1), phuber(1.0))
    loss.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())


# ---- sampler and EMA ----
def test_sampler_on_a_gaussian():
    s, calls = 0.5, []

    def denoise(x, t):
        calls.append(t)
        assert x.dtype == torch.float32 and t.shape == (8, 1, 1)
        return x * s**2 / (s**2 + t**2)

    z = torch.randn(8, 2, 3)
    exact = 80 * z * s / math.sqrt(s**2 + 80**2)  # the flow scales x by sqrt(s^2 + t^2)
    torch.testing.assert_close(edm_sampler(denoise, z), exact, rtol=0.06, atol=0)  # 18 steps leave 5.5 %
    assert len(calls) == 35
    errors = [
        (edm_sampler(lambda x, t: x * s**2 / (s**2 + t**2), z.double(), num_steps=n) - exact).abs().max()
        for n in (64, 128)
    ]
    assert errors[0] < 0.01 and 3.5 < errors[0] / errors[1] < 4.5  # Heun: second order


def test_sampler_against_scipy():
    denoise = lambda x, t: torch.tanh(x / (0.2 + t**2)) / (1 + 0.1 * t)  # not linear, like two modes
    z = random(4, 1)
    flow = lambda t, x: (x - denoise(torch.from_numpy(x)[:, None], torch.tensor(t)).numpy()[:, 0]) / t
    exact = integrate.solve_ivp(flow, (80, 0.002), 80 * z[:, 0].numpy(), rtol=1e-9, atol=1e-10).y[:, -1]
    np.testing.assert_allclose(edm_sampler(denoise, z, num_steps=400)[:, 0], exact, atol=4e-3)


def test_ema():
    assert ema_beta(10**9, 5e5) == pytest.approx(0.5)  # a half-life of images halves
    assert ema_beta(10**9, 256) == pytest.approx(0.5 ** (256 / 5e5))
    assert ema_beta(2000, 100) == pytest.approx(0.5)  # ramp-up: 5 % of the images so far
    assert ema_beta(0, 256) == 0
    ema, net = torch.nn.Linear(2, 1), torch.nn.Linear(2, 1)
    expected = 0.75 * ema.weight + 0.25 * net.weight
    ema_update(ema, net, 0.75)
    torch.testing.assert_close(ema.weight, expected)
