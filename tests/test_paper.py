"""The first half of common.py, against autograd, differences, closed forms and scipy."""
import importlib
import math
import resource
import time
from argparse import Namespace

import numpy as np
import pytest
import scipy.linalg
import torch
from conftest import edm, save_teacher
from scipy import integrate, stats
from torch import nn

import common
from common import (DISTANCES, EDMPrecond, UserError, check_batch, di_loss, draw_latents, dsm_loss,
                    edm_sampler, ema_beta, ema_update, exp, frechet_distance, huber, l1, l2,
                    lambda_edm, load_frozen, load_generator, make_generator_loss, micro_batches,
                    moments, p_edm, p_karras, parse_distance, phuber, power, reading, seed_step,
                    sid_loss, sidwgt, sim_loss, smoothl1, train_only, update)


t2i = importlib.import_module("03_pixart_t2i")


def random(*shape, seed=0):
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


# ---- distances ----
VALUES = {  # Table 4 and A.3 typed again, for a y (B, D)
    "l2": (l2(), lambda y: (y**2).sum(1)),
    "power": (power(), lambda y: (y**4).sum(1)),
    "power 2": (power(2), lambda y: (y**2).sum(1)),
    "power 6": (power(6), lambda y: (y**6).sum(1)),
    "exp": (exp(), lambda y: (0.1 * (y**2).sum(1)).exp() - 1),
    "exp 4": (exp(4, 0.3), lambda y: (0.3 * (y**4).sum(1)).exp() - 1),
    "l1": (l1(), lambda y: y.abs().sum(1)),
    "smoothl1": (smoothl1(), lambda y: ((y**2 + 0.25).sqrt() - 0.5).sum(1)),
    "smoothl1 2": (smoothl1(2), lambda y: ((y**2 + 4).sqrt() - 2).sum(1)),
    "huber": (huber(), lambda y: torch.where(y.abs() <= 1, y**2 / 2, y.abs() - 0.5).sum(1)),
    "huber 0.2": (huber(0.2), lambda y: torch.where(
        y.abs() <= 0.2, y**2 / 2, 0.2 * (y.abs() - 0.1)).sum(1)),
    "phuber": (phuber(), lambda y: ((y**2).sum(1) + 1e-6).sqrt() - 1e-3),
    "phuber 0.5": (phuber(0.5), lambda y: ((y**2).sum(1) + 0.25).sqrt() - 0.5)}


@pytest.mark.parametrize("name", VALUES)
@pytest.mark.parametrize("shape", [(4,), (4, 2), (3, 3, 4, 4)])
def test_d_and_d_prime(name, shape):
    distance, by_hand = VALUES[name]
    y = (0.5 * random(*shape)).requires_grad_()
    d = distance.d(y)
    assert d.shape == shape[:1] and distance.d_prime(y).shape == shape
    torch.testing.assert_close(d, by_hand(y.reshape(len(y), -1)))
    torch.testing.assert_close(distance.d_prime(y), torch.autograd.grad(d.sum(), y)[0])
    v, h = random(*shape, seed=1), 1e-6  # the derivative of d once more, without autograd
    numeric = (distance.d(y + h * v) - distance.d(y - h * v)) / (2 * h)
    along_v = (distance.d_prime(y) * v).flatten(1).sum(1) if y.ndim > 1 else distance.d_prime(y) * v
    torch.testing.assert_close(along_v, numeric, rtol=1e-6, atol=1e-8)
    for dtype in (torch.float32, torch.float64):  # d is 0 at 0 alone, in float32 too
        zero, small = torch.zeros(2, 3, dtype=dtype), 1e-3 * random(100, 3).to(dtype)
        assert (distance.d(zero) == 0).all() and (distance.d_prime(zero) == 0).all()
        assert (distance.d(small) > 0).all()


@pytest.mark.parametrize("text, full, same_as", [
    ("phuber", "phuber,c=0.001", phuber(0.001)), ("phuber,c=0.5", "phuber,c=0.5", phuber(0.5)),
    ("l2", "l2", l2()), ("exp,beta=.2", "exp,alpha=2,beta=0.2", exp(2, 0.2)),
    ("exp,beta=1e-2,alpha=4", "exp,alpha=4,beta=0.01", exp(4, 0.01)),
    ("huber,delta=0.3", "huber,delta=0.3", huber(0.3)),
    ("smoothl1", "smoothl1,scale=0.5", smoothl1()), ("power", "power,alpha=4", power())])
def test_parse_distance(text, full, same_as):
    written, distance = parse_distance(text)
    y = random(5, 3)
    assert written == full and torch.equal(distance.d_prime(y), same_as.d_prime(y))
    assert parse_distance(full)[0] == full


@pytest.mark.parametrize("text, names", [
    ("l3", "'l3' is no distance: expected l2, power"), ("", "is no distance"),
    ("phuber,x=1", "phuber takes c, no 'x'"), ("l2,c=1", "l2 takes no parameter, no 'c'"),
    ("phuber,c=a", "c, got 'a'"), ("phuber,c", "c, got ''"), ("phuber,", "takes c"),
    ("phuber,c=-1", "positive number for phuber's c"),
    ("phuber,c=0", "positive"), ("phuber,c=nan", "positive"), ("phuber,c=inf", "positive"),
    ("exp,beta=nan", "positive"), ("exp,beta=0", "positive"), ("exp,alpha=3", "even"),
    ("power,alpha=3", "even"), ("power,alpha=0", "positive"), ("power,alpha=-2", "positive"),
    ("power,alpha=2.5", "even"), ("power,alpha=nan", "positive"), ("huber,delta=0", "positive"),
    ("smoothl1,scale=-1", "positive")])
def test_parse_distance_refuses(text, names):
    with pytest.raises(UserError, match=names) as error:
        parse_distance(text)
    assert "\n" not in str(error.value)


# ---- noise levels ----
def test_log_normal_times():
    torch.manual_seed(0)
    for mean, std in ((-1.2, 1.2), (-3.5, 2.5), (-2, 2)):
        t = p_edm((20_000,), mean, std)
        assert stats.kstest(t.log().numpy(), "norm", (mean, std)).pvalue > 1e-3
    assert stats.kstest(p_edm((20_000,)).log().numpy(), "norm", (-1.2, 1.2)).pvalue > 1e-3
    assert p_edm((5, 1, 1, 1), generator=torch.Generator()).shape == (5, 1, 1, 1)


def test_truncation():
    torch.manual_seed(0)
    low, high = 0.01, 156.6155  # B.3
    clamped = p_edm((50_000,), -2, 2, low, high)
    assert clamped.min() == torch.tensor(low)
    share = (clamped == torch.tensor(low)).float().mean()
    assert share == pytest.approx(stats.norm.cdf((math.log(low) + 2) / 2), abs=0.005)
    t = p_edm((50_000, 1), -2, 2, low, high, truncate="resample").flatten()
    assert low <= t.min() and t.max() <= high and (t == torch.tensor(low)).float().mean() < 1e-3
    ends = [(math.log(end) + 2) / 2 for end in (low, high)]
    assert stats.kstest(t.log().numpy(), "truncnorm", (*ends, -2, 2)).pvalue > 1e-3
    near = p_edm((20_000,), 0, 1, 0.5, 2, truncate="resample")  # much of it lies beyond both ends
    ends = math.log(0.5), math.log(2)
    assert stats.kstest(near.log().numpy(), "truncnorm", ends).pvalue > 1e-3
    for ends in ({"t_min": 2, "t_max": 1}, {"t_min": -1}):
        with pytest.raises(UserError):
            p_edm((3,), **ends)


def test_karras_times():
    """The sampler's noise levels at the places r = 0 to 0.8, which SiD's code gives as 0 to 800."""
    torch.manual_seed(0)
    t, ends = p_karras((100_000,)), [0.002**(1 / 7), 80**(1 / 7)]
    r = (t**(1 / 7) - ends[0]) / (ends[1] - ends[0])  # falls to the lowest t at r = 0
    assert stats.kstest(r.numpy(), "uniform", (0, 0.8)).pvalue > 1e-3
    assert 0.002 <= t.min() < 0.0021 and 24.3 < t.max() <= 24.411


def test_edm_precond_and_lambda():
    """EDM's Table 1: the network's input and its target have variance 1, and lambda is 1 / c_out^2,
    for data of variance sigma_data^2."""
    seen = {}

    def model(x, c_noise, *cond):
        seen.update(x=x, c_noise=c_noise, cond=cond)
        return 0 * x

    net, t = EDMPrecond(model), torch.tensor([0.01, 0.5, 3.0], dtype=torch.float64).reshape(3, 1)
    x_0, eps = 0.5 * random(3, 200_000), random(3, 200_000, seed=1)
    skipped = net(x_0 + t * eps, t, "label")
    torch.testing.assert_close(seen["c_noise"], t.flatten().log() / 4)
    assert seen["cond"] == ("label",)
    target = (x_0 - skipped) * lambda_edm(t).sqrt()
    for v in (seen["x"], target):
        torch.testing.assert_close(v.var(1), torch.ones(3).double(), rtol=0.02, atol=0)
    assert torch.equal(net(x_0, 0.5), net(x_0, torch.full((3,), 0.5).double()))
    torch.testing.assert_close(EDMPrecond(lambda x, *_: x + 1)(0 * x_0, t)[:, 0] ** -2,
                               lambda_edm(t).flatten())


# ---- losses ----
def linear_denoiser(seed, dim=6):
    m = random(dim, dim, seed=seed)
    return lambda x, t: torch.tanh(x.flatten(1) @ m).reshape(x.shape) / (1 + t)


X_0, EPS, T = random(7, 2, 3, seed=5), random(7, 2, 3, seed=6), random(7, 1, 1, seed=7).exp()
PSI, Q = linear_denoiser(1), linear_denoiser(2)
X_T = X_0 + T * EPS


def test_dsm_loss():
    plain = ((PSI(X_T, T) - X_0)**2).flatten(1).sum(1)
    weight = ((T**2 + 0.25) / (T * 0.5)**2).flatten()  # (B.7)
    torch.testing.assert_close(dsm_loss(PSI, X_0, T, EPS), weight * plain)
    torch.testing.assert_close(dsm_loss(PSI, X_0, T, EPS, weight=torch.ones_like), plain)


@pytest.mark.parametrize("name", DISTANCES)
def test_sim_loss_is_b13_and_detaches_nothing(name):
    distance, x_0 = DISTANCES[name](), X_0.clone().requires_grad_()

    def formula(x_0):  # (B.13) written out again
        x_t = x_0 + T * EPS
        y = PSI(x_t, T) - Q(x_t, T)
        return -(distance.d_prime(y) * (PSI(x_t, T) - x_0)).flatten(1).sum(1)

    loss, y_t = sim_loss(PSI, Q, x_0, T, distance, EPS)
    torch.testing.assert_close(loss, formula(X_0))
    assert not y_t.requires_grad and torch.equal(y_t, PSI(X_T, T) - Q(X_T, T))
    v, h = random(7, 2, 3, seed=8), 1e-6  # without autograd: a detach would show as a difference
    numeric = (formula(X_0 + h * v) - formula(X_0 - h * v)).sum() / (2 * h)
    along_v = (torch.autograd.grad(loss.sum(), x_0)[0] * v).sum()
    torch.testing.assert_close(along_v, numeric, rtol=1e-6, atol=1e-8)
    weighted, _ = sim_loss(PSI, Q, X_0, T, distance, EPS, sidwgt)
    by_hand = formula(X_0) / (X_0 - Q(X_T, T)).abs().mean((1, 2))  # (B.11)
    torch.testing.assert_close(weighted, by_hand)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 1.2])
def test_sid_loss_as_in_its_paper(alpha):
    x_0 = X_0.clone().requires_grad_()
    f, q = PSI(x_0 + T * EPS, T), Q(x_0 + T * EPS, T)
    w = (x_0 - q).abs().mean((1, 2), keepdim=True).detach()
    expected = ((q - f) * ((q - x_0) - alpha * (q - f)) / w).sum((1, 2))
    loss, y_t = sid_loss(PSI, Q, x_0, T, alpha, EPS)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(*[torch.autograd.grad(v.sum(), x_0)[0] for v in (loss, expected)])
    assert torch.equal(y_t, (f - q).detach())
    same = Q(X_T, T)  # samples that equal what the teacher says: the weight stays finite
    assert sid_loss(PSI, lambda x, t: same, same, T, alpha, EPS)[0].isfinite().all()


def test_di_loss_has_the_gradient_y():
    x_0 = X_0.clone().requires_grad_()
    loss, y_t = di_loss(PSI, Q, x_0, T, EPS)
    y = PSI(X_T, T) - Q(X_T, T)
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), x_0)[0], y)
    assert torch.equal(y_t, y) and not y_t.requires_grad


def test_the_flags_choose_the_loss(capsys):
    """--method and --weight, and the loss that each stands for."""
    flags = lambda **more: Namespace(**{"method": "sim", "weight": "own", "sid_alpha": 1.2,
                                        "distance": "l2"} | more)
    call = lambda **more: make_generator_loss(flags(**more))[0](PSI, Q, X_0, T, eps=EPS)[0]
    assert torch.equal(call(), sim_loss(PSI, Q, X_0, T, l2(), EPS)[0])
    assert torch.equal(call(weight="sidwgt"), sim_loss(PSI, Q, X_0, T, l2(), EPS, sidwgt)[0])
    assert torch.equal(call(method="sid"), sid_loss(PSI, Q, X_0, T, 1.2, EPS)[0])
    plain = sid_loss(PSI, Q, X_0, T, 1.2, EPS, common.nowgt)[0]
    assert torch.equal(call(method="sid", weight="nowgt"), plain)
    assert torch.equal(call(method="di"), di_loss(PSI, Q, X_0, T, EPS)[0])
    other = lambda psi, q, x_0, t, distance, eps: (distance.d(x_0), None)
    loss, distance = make_generator_loss(flags(method="x", distance="huber,delta=2"), {"x": other})
    assert torch.equal(loss(PSI, Q, X_0, T, eps=EPS)[0], huber(2).d(X_0))
    assert torch.equal(distance.d_prime(X_0), huber(2).d_prime(X_0))
    with pytest.raises(UserError, match="not for x"):
        make_generator_loss(flags(method="x", weight="nowgt"), {"x": other})
    assert not capsys.readouterr().out
    call(distance="l1")
    out = capsys.readouterr().out
    assert "wrong under autograd" in out and out.count("\n") == 1


def test_frozen_weights_stay_frozen_and_pass_gradients_on():
    net, frozen = [nn.Sequential(nn.Linear(2, 8), nn.Dropout(0.5), nn.Linear(8, 2))
                   for _ in range(2)]
    train_only(net, frozen=frozen)
    assert net.training and not frozen.training
    x_0 = net(torch.randn(16, 2))
    loss, _ = sim_loss(lambda x, t: frozen(x), lambda x, t: 0 * x, x_0, torch.ones(16, 1), phuber())
    loss.sum().backward()
    assert all(p.grad is None for p in frozen.parameters())
    assert all(p.grad.abs().sum() > 0 for p in net.parameters())
    train_only(frozen, frozen=net)
    assert frozen.training and all(p.requires_grad for p in frozen.parameters())
    assert not any(p.requires_grad for p in net.parameters())


# ---- samplers ----
def shrink(x, t):
    """The denoiser of a Gaussian of std 0.5; its flow scales x by sqrt(0.25 + t^2)."""
    return x * 0.25 / (0.25 + t**2)


def test_sampler_on_a_gaussian():
    calls = []

    def denoise(x, t):
        calls.append(t)
        assert x.dtype == torch.float32 and t.shape == (8, 1, 1)
        return shrink(x, t)

    z = torch.randn(8, 2, 3)
    x = edm_sampler(denoise, z)
    assert len(calls) == 35 and x.dtype == torch.float32
    assert calls[0].max() == 80 and calls[-1].max() == pytest.approx(0.002)
    torch.testing.assert_close(x, 80 * z * 0.5 / math.sqrt(0.25 + 80**2), rtol=0.06, atol=0)


def test_sampling_times():
    """Karras et al. 2022, (5), with the settings of their Table 1, in numpy."""
    for n, ends in ((18, (80, 0.002)), (14, (156.6155, 0.01)), (1, (80, 80))):
        by_hand = np.linspace(*[end**(1 / 7) for end in ends], n)**7
        times = common.sampling_times(n, **{} if n == 18 else {"sigma_min": ends[1],
                                                               "sigma_max": ends[0]})
        np.testing.assert_allclose(times, [*by_hand, 0], rtol=1e-12)


def data_to_noise(denoise, z, num_steps, sigma_min):
    """heun along rising times, from the end of a flow to its beginning."""
    return common.heun(denoise, z, common.sampling_times(num_steps, sigma_min=sigma_min)[-2::-1])


@pytest.mark.parametrize("sampler", [edm_sampler, common.dpm_solver, data_to_noise])
def test_samplers_are_of_second_order(sampler):
    """Half the step, a quarter of the error, on a Gaussian's flow: std(t) scales its points."""
    calls = []
    count = lambda x, t: calls.append(t) or shrink(x, t)
    z, std = random(8, 2, 3), lambda t: math.sqrt(0.25 + t**2)
    exact = z * std(80) / std(0.01)
    if sampler is not data_to_noise:  # whose last step, from 0.01 to 0, gives what denoise says
        exact = shrink(80 * z * std(0.01) / std(80), 0.01)
    errors = [(sampler(count, z, n, sigma_min=0.01) - exact).abs().max() for n in (64, 128)]
    each, last = {edm_sampler: (2, 1), common.dpm_solver: (1, 0), data_to_noise: (2, 2)}[sampler]
    assert len(calls) == each * (64 + 128) - 2 * last and calls[0].shape == (8, 1, 1)
    assert 3.4 < errors[0] / errors[1] < 4.6 and errors[1] < 0.01 * exact.abs().max()


def test_heun_adds_up_in_float64():
    """Where all is denoised to 1, the flow is 1 + a t. A step of 1e-7 is one bit of float32."""
    start = torch.full((1, 1), 1.0001)
    x = common.heun(lambda x, t: torch.ones_like(x), start, torch.linspace(1, 2, 1001).tolist())
    torch.testing.assert_close(x - 1, 2 * (start - 1), rtol=2e-3, atol=0)


def test_dpm_solver_by_hand():
    """Lu et al. 2022, Algorithm 2, at three noise levels whose logarithms are not evenly spaced."""
    z, (t_0, t_1, t_2, _) = random(4, 2), common.sampling_times(3)
    x = t_0 * z
    d_0 = shrink(x, t_0)
    x = d_0 + t_1 / t_0 * (x - d_0)
    d_1 = shrink(x, t_1)
    d = d_1 + (d_1 - d_0) * math.log(t_1 / t_2) / (2 * math.log(t_0 / t_1))
    x = d + t_2 / t_1 * (x - d)
    torch.testing.assert_close(common.dpm_solver(shrink, z, 3), shrink(x, t_2))


def test_sampler_against_scipy():
    denoise = lambda x, t: torch.tanh(x / (0.2 + t**2)) / (1 + 0.1 * t)  # like two modes
    z = random(4, 1)

    def flow(t, x):
        return (x - denoise(torch.from_numpy(x)[:, None], torch.tensor(t)).numpy()[:, 0]) / t
    exact = integrate.solve_ivp(flow, (80, 0.002), 80 * z[:, 0].numpy(), rtol=1e-9, atol=1e-10)
    x = edm_sampler(denoise, z, num_steps=400)
    np.testing.assert_allclose(x[:, 0], exact.y[:, -1], atol=4e-3)


# ---- averages, random numbers, batches ----
def test_ema():
    assert ema_beta(10**9, 5e5) == pytest.approx(0.5)  # a half-life of images halves
    assert ema_beta(10**9, 256) == pytest.approx(0.5**(256 / 5e5))
    assert ema_beta(10**9, 256, 1000) == pytest.approx(0.5**0.256)
    assert ema_beta(2000, 100) == pytest.approx(0.5)  # at first 5 % of the images so far
    assert ema_beta(0, 256) == 0
    ema, net = nn.Linear(2, 1), nn.Linear(2, 1)
    expected = 0.75 * ema.weight + 0.25 * net.weight
    ema_update(ema, net, 0.75)
    torch.testing.assert_close(ema.weight, expected)


def test_update_takes_one_step_of_this_size_and_clears():
    net = nn.Linear(2, 1)
    optimiser, old = torch.optim.Adam(net.parameters(), lr=1.0), net.weight.detach().clone()
    net(torch.ones(1, 2)).sum().backward()
    update(optimiser, 0.01)
    torch.testing.assert_close(old - net.weight, torch.full((1, 2), 0.01))
    assert net.weight.grad is None


def test_seed_step(monkeypatch):
    def draws(*key):
        return torch.randn(2, generator=seed_step(*key)).tolist(), torch.randn(2).tolist()
    assert draws(1, 2) == draws(1, 2)
    (a, own_a), (b, own_b), (c, own_c) = draws(1, 2), draws(1, 3), draws(2, 2)
    assert len({tuple(v) for v in (a, own_a, b, own_b, c, own_c)}) == 6
    monkeypatch.setattr(common, "rank_and_ranks", lambda: (1, 2))
    second, own_second = draws(1, 2)
    assert second == a and own_second != own_a  # the ranks draw alike; their dropout differs


def test_micro_batches_share_and_cover_the_batch(monkeypatch):
    draws = torch.arange(8), torch.arange(8)[:, None]
    parts = micro_batches(draws, 3)
    assert [len(a) for a, _ in parts] == [3, 3, 2] and len(micro_batches(draws)) == 1
    assert torch.equal(torch.cat([b for _, b in parts]), draws[1])
    shares = []
    for rank in range(2):
        monkeypatch.setattr(common, "rank_and_ranks", lambda rank=rank: (rank, 2))
        shares += [a for a, _ in micro_batches(draws, 3)]
        check_batch(Namespace(batch=8, batch_gpu=4))
    assert torch.equal(torch.cat(shares), draws[0]) and len(shares) == 4
    for batch, batch_gpu in ((7, None), (8, 5)):
        with pytest.raises(UserError, match="--batch"):
            check_batch(Namespace(batch=batch, batch_gpu=batch_gpu))


def test_latents_depend_on_their_seed_alone():
    z, labels = draw_latents(range(7), (3, 4, 4), 5)
    z3, labels3 = draw_latents([3], (3, 4, 4), 5)
    assert torch.equal(z[3], z3[0]) and torch.equal(labels[3], labels3[0]) and labels.sum() == 7
    _, fixed = draw_latents(range(5), (1,), 5, [4, 0])
    assert fixed.argmax(1).tolist() == [4, 0, 4, 0, 4]
    assert draw_latents(range(2), (1,))[1].shape == (2, 0)


# ---- the Frechet distance ----
def test_frechet_distance_against_scipy():
    features = [random(40, 6, seed=i) @ random(6, 6, seed=i + 2) + i for i in range(2)]
    (mu1, sigma1), (mu2, sigma2) = [moments(f.float()) for f in features]
    np.testing.assert_allclose(sigma1, np.cov(features[0].numpy().T), rtol=1e-5)
    root = scipy.linalg.sqrtm(sigma1.numpy() @ sigma2.numpy()).real
    expected = ((mu1 - mu2)**2).sum() + (sigma1 + sigma2 - 2 * torch.tensor(root)).trace()
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item())
    assert frechet_distance(mu1.numpy(), sigma1.numpy(), mu1, sigma1) == pytest.approx(0, abs=1e-9)
    flat = torch.diag(torch.tensor([4.0, 0.0])), torch.diag(torch.tensor([1.0, 9.0]))  # singular
    assert frechet_distance(torch.zeros(2), flat[0], torch.ones(2), flat[1]) == 2 + 1 + 9


def test_frechet_distance_refuses():
    mu, sigma = torch.zeros(2), torch.eye(2)
    for moments_2, text in (((torch.zeros(3), torch.eye(3)), "expected as many"),
                            ((mu, torch.eye(3)), "expected as many"),
                            ((mu, sigma[:1]), "expected as many"),
                            ((mu + math.nan, sigma), "finite and real"),
                            ((mu, sigma * math.inf), "finite and real"),
                            ((mu, -3 * sigma), "expected covariances")):
        for pair in ((mu, sigma, *moments_2), (*moments_2, mu, sigma)):
            with pytest.raises(UserError, match=text):
                frechet_distance(*pair)


# ---- the paper's numbers ----
STAGE_2 = {  # typed from arXiv 2410.16794v1; what the paper leaves open is from SiD's code
    "Table 5": {"lr": 1e-5, "batch": 256, "t_star": 2.5},
    "(B.6) for psi": {"psi_mean": -1.2, "psi_std": 1.2},
    "(B.10) for theta": {"p_mean": -3.5, "p_std": 2.5, "p_theta": "lognormal"},
    "(B.13)": {"method": "sim", "distance": "phuber,c=0.001", "weight": "own"},
    "Algorithm 2": {"psi_updates": 1, "anneal": "none"},
    "SiD's code": {"ema_half_life": 5e5, "dropout": 0.13, "adam_eps": 1e-8, "amp": "none"}}
STAGE_3 = {
    "B.3: optimisers": {"lr": 5e-6, "batch": 1024, "steps": 16_000},
    "B.3: memory": {"checkpointing": True, "amp": "bf16"},
    "B.3: the same noise levels for both": {"psi_mean": -2.0, "psi_std": 2.0, "p_mean": -2.0,
                                            "p_std": 2.0, "t_min": 0.01, "t_max": 156.6155},
    "B.3: both weights are 1": {"weight_psi": "one", "weight": "own"},
    "(B.15)": {"t_star": 2.5}, "PixArt's own": {"guidance": 4.5},
    "Algorithm 2": {"psi_updates": 1, "anneal": "none"},
    "(B.13)": {"method": "sim", "distance": "phuber,c=0.001"},
    "SiD's code": {"ema_half_life": 5e5, "adam_eps": 1e-8}}


@pytest.mark.parametrize("teacher", ["uncond", "cond", "pixart"])
def test_numbers_of_the_paper(teacher, monkeypatch):
    """What a command with a published teacher and no other option trains with."""
    seen, stage = [], t2i if teacher == "pixart" else edm
    teachers = {edm: lambda name: (nn.Linear(1, 1), {}, {}), t2i: lambda *_: (
        Namespace(encode=None), {"prompts": ["a cat"]}, {"teacher": "pixart"})}
    monkeypatch.setattr(stage, "load_teacher", teachers[stage])
    monkeypatch.setattr(t2i, "encode_once", lambda pipeline, texts: texts)
    monkeypatch.setattr(t2i.Test, "__init__", lambda *_: None)
    monkeypatch.setattr(stage, "prepare", lambda args, *rest: seen.append(vars(args)) or Namespace(
        finished=lambda: True))
    stage.main(["--teacher", teacher, "--device", "cpu"])
    for place, numbers in (STAGE_3 if stage is t2i else STAGE_2).items():
        assert {name: seen[0][name] for name in numbers} == numbers, place


def test_numbers_of_the_optimisers_and_of_the_noise_table():
    """Table 5's Adam, for both networks; and B.3: beta rises from 0.0001 to 0.02 in 1000 steps,
    and the noise level of step i is that of variance-preserving diffusion."""
    parts = common.make_parts(nn.Linear(1, 1), 1e-6)
    for adam in (parts["opt_psi"], parts["opt_theta"]):
        assert adam.param_groups[0]["betas"] == (0.0, 0.999)
        assert adam.param_groups[0]["eps"] == 1e-6
    beta = np.linspace(0.02, 1e-4, 1001)[1:]  # of u[999], ..., u[0], from the last backwards
    kept = np.cumprod(1 - beta[::-1])  # alpha bar
    u = np.sqrt((1 - kept) / kept)[::-1]
    np.testing.assert_allclose(t2i.noise_table()[:1000], u, rtol=1e-5)
    assert [u[0], u[-1]] == pytest.approx([156.6155, 0.01], rel=1e-4)


# ---- networks from files ----
def linear(size=3):
    return nn.Linear(size, 2)


def test_load_frozen():
    state = {"weight": torch.ones(2, 3).half(), "bias": torch.zeros(2)}
    net = load_frozen(linear, {}, state)
    assert not net.training and net.weight.dtype == torch.float32 and net.weight.is_leaf
    assert not any(w.requires_grad for w in net.parameters())
    state["bias"] += 1  # the network has numbers of its own
    assert net.bias.sum() == 0 and load_frozen(linear, {"size": 3}, state).bias.sum() == 2


@pytest.mark.parametrize("change, text", [
    ({"weight": None}, 'Missing key.*"weight"'),
    ({"more": torch.ones(1)}, 'Unexpected key.*"more"'),
    ({"weight": torch.ones(2, 4)}, "size mismatch for weight"),
    ({"bias": torch.tensor([0.0, math.nan])}, "not finite"),
    ({"bias": torch.tensor([0.0, math.inf])}, "not finite")])
def test_load_frozen_refuses(change, text):
    state = {"weight": torch.ones(2, 3), "bias": torch.zeros(2)} | change
    with pytest.raises(UserError, match=text), reading("a file", "a network"):
        load_frozen(linear, {}, {name: w for name, w in state.items() if w is not None})


def test_load_generator(tmp_path):
    saved = {"net_args": {"size": 3}, "state_dict": linear().state_dict(), "t_star": 2.5,
             "meta": {"teacher": "x"}}
    common.save(saved, tmp_path / "g_ema.pt")
    for path in (tmp_path, tmp_path / "g_ema.pt"):
        net, t_star, meta = load_generator(path, linear)
        assert torch.equal(net.weight, saved["state_dict"]["weight"])
        assert (t_star, meta) == (2.5, {"teacher": "x"})
    for change in ({"t_star": 0.0}, {"t_star": math.nan}, {"t_star": "x"}, {"meta": 3},
                   {"net_args": {"size": 4}}, {"net_args": {"depth": 1}}, {"state_dict": [1]}):
        common.save(saved | change, tmp_path / "other.pt")
        with pytest.raises(UserError, match="other.pt cannot be used .*: expected a generator"):
            load_generator(tmp_path / "other.pt", linear)


def test_a_file_that_declares_more_than_it_holds_costs_nothing(tmp_path):
    small = {"img_resolution": 8, "model_channels": 4}
    path = save_teacher(tmp_path / "x.pt", small | {"channel_mult": [1, 1], "num_blocks": 1})
    saved, begun = torch.load(path, weights_only=True), time.time()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for declared in ({"img_resolution": 32, "model_channels": 2048}, {"num_blocks": 10**9},
                     {"channel_mult": [2] * 1000}, {"model_channels": 2**40}):
        common.save(saved | {"net_args": saved["net_args"] | declared}, path)
        with pytest.raises(UserError, match="cannot be used"):
            edm.load_denoiser(path)
    wide = small | {"model_channels": 512}
    with torch.device("meta"):
        state = edm.make_unet(**wide).state_dict()
    state = {name: torch.zeros(1).expand(w.shape) for name, w in state.items()}  # all one number
    common.save(saved | {"net_args": wide, "state_dict": state}, path)
    with pytest.raises(UserError, match="cannot be used .*repeat"):
        edm.load_denoiser(path)
    assert time.time() - begun < 20
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # kB on Linux
