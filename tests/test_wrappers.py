"""lab/wrappers.py: each kind of network, in closed form for one Gaussian, gives the denoiser.
lab/check_teacher.py: wrong teachers are named, and the settings suit a Gaussian."""
import importlib
import math

import pytest
import torch
from PIL import Image
from torch import nn

wrappers, check = [importlib.import_module(f"lab.{name}") for name in ("wrappers", "check_teacher")]
MEAN, STD = 3.0, 2.0  # of the data in the network's units
ABAR = torch.linspace(0.9999, 0.001, 1000, dtype=torch.float64)
column = lambda v: v.reshape(-1, 1, 1, 1)


class Exact(nn.Module):
    """A network without weights: `answer` (y, time) -> what such a network would say."""
    def __init__(self, answer):
        super().__init__()
        self.answer = answer

    def forward(self, y, time, labels=None):
        assert time.shape == (len(y),)
        out = self.answer(y, column(time))
        return out if labels is None else out + labels.sum()


def posterior_mean(y, a, s):
    """E[u_0 | a u_0 + s eps = y] of u_0 ~ N(MEAN, STD^2)"""
    return (s**2 * MEAN + a * STD**2 * y) / (a**2 * STD**2 + s**2)


def predict(kind, y, a, s):
    u_0 = posterior_mean(y, a, s)
    eps = (y - a * u_0) / s
    return {"eps": eps, "x_0": u_0, "v": a * eps - s * u_0, "score": -eps / s,
            "velocity": eps - u_0}[kind]


def of_step(kind):
    def answer(y, step):
        abar = ABAR[step.long()].to(y.dtype)
        return predict(kind, y, abar.sqrt(), (1 - abar).sqrt())
    return answer


def vp_score(y, tau):
    alpha = torch.exp(-(0.1 * tau + 19.9 * tau**2 / 2) / 2)
    return predict("score", y, alpha, (1 - alpha**2).sqrt())


LEVELS = ((1 - ABAR) / ABAR).sqrt()[[3, 200, 900]]
CASES = {**{kind: lambda kind=kind, **o: wrappers.DDPM(Exact(of_step(kind)), ABAR, kind, (1, 4, 4),
                                                       **o) for kind in ("eps", "v", "x_0")},
         "VP score": lambda **o: wrappers.VPScore(Exact(vp_score), (1, 4, 4), **o),
         "VE score": lambda **o: wrappers.VEScore(
             Exact(lambda y, t: predict("score", y, 1, t)), (1, 4, 4), **o),
         "flow": lambda **o: wrappers.RectifiedFlow(
             Exact(lambda y, tau: predict("velocity", y, 1 - tau, tau)), (1, 4, 4), **o)}


@pytest.mark.parametrize("scale, shift", [(1.0, 0.0), (7.0, 0.0), (2.0, -1.5)])
@pytest.mark.parametrize("name", CASES)
def test_the_exact_denoiser(name, scale, shift):
    """In the units of stage 2, x = (u - shift) / scale, where the noise level is t / scale too."""
    net = CASES[name](scale=scale, shift=shift)
    t = column(LEVELS / scale)
    x = (torch.randn(3, 1, 4, 4, dtype=torch.float64) * 3).requires_grad_()
    mean, var = (MEAN - shift) / scale, (STD / scale)**2
    exact = (t**2 * mean + var * x) / (t**2 + var)
    torch.testing.assert_close(net(x, t), exact, rtol=2e-4, atol=2e-4)
    gradient = torch.autograd.grad(net(x, t).sum(), x)[0]
    torch.testing.assert_close(gradient, (var / (t**2 + var)).expand_as(x), rtol=2e-4, atol=2e-4)
    assert net.image_shape == (1, 4, 4) and net.label_dim == 0


def test_labels_reach_the_network():
    net = wrappers.VEScore(Exact(lambda y, t: 0 * y), (1, 4, 4), label_dim=2, scale=2.0)
    x, t = torch.zeros(3, 1, 4, 4), column(torch.ones(3))
    assert (net(x, t) == 0).all() and (net(x, t, torch.ones(3, 2)) == 4 * 6 / 2).all()


# ---- check_teacher ----
def unwrapped(kind):
    """A network of this kind, taken for a denoiser of data N(0, 0.5^2)."""
    def function():
        class Net(nn.Module):
            image_shape, label_dim = (1, 4, 4), 0

            def __init__(self):
                super().__init__()
                self.one = nn.Parameter(torch.ones(()))

            def forward(self, x, t):
                u_0 = 0.25 * x / (0.25 + t**2)
                eps, a = (x - u_0) / t, 1 / (1 + t**2).sqrt()
                return self.one * {"x_0": u_0, "eps": eps, "score": -eps / t,
                                   "v": a * eps - a * t * u_0}[kind]
        return Net()
    return function


denoiser, eps, score, v = [unwrapped(kind) for kind in ("x_0", "eps", "score", "v")]


@pytest.mark.parametrize("kind, text", [("eps", "a network that predicts eps"), ("v", "predicts v"),
                                        ("score", "a score"), ("missing", "missing")])
def test_what_is_no_denoiser_is_named(kind, text, tmp_path, refused):
    line = refused(check.main, [f"{__name__}:{kind}", "--n", 64, "--out", tmp_path / "x.png"])
    assert text in line


def test_a_page_about_a_teacher(tmp_path, capsys):
    """Of N(0, 0.5^2) the denoising error over variance is t^2 / (t^2 + 0.25), in closed form."""
    picture = tmp_path / "x.png"
    check.main([f"{__name__}:denoiser", "--n", "400", "--out", str(picture), "--device", "cpu"])
    lines = capsys.readouterr().out.splitlines()
    table = [list(map(float, line.split())) for line in lines if line[:1].isdigit()]
    assert len(table) == 9
    for t, error, _ in table:
        assert error == pytest.approx(t**2 / (t**2 + 0.25), rel=0.15)
    words = lines[-1].split()
    found = {name: float(words[words.index(name) + 1])
             for name in ("--p-mean", "--p-std", "--psi-mean", "--psi-std", "--t-star")}
    low, high = 0.5 * (0.01 / 0.99)**0.5, 0.5 * 9**0.5  # the errors there are 1 % and 90 %
    assert found["--p-mean"] == pytest.approx(math.log(low * high) / 2, abs=0.15)
    assert found["--p-std"] == pytest.approx(math.log(high / low) / 3.7, abs=0.1)
    assert found["--t-star"] == pytest.approx(high / 2, rel=0.2)
    assert found["--psi-mean"] == found["--p-mean"] and "std 0.5" in lines[0]
    with Image.open(picture) as image:
        assert image.width == image.height
    importlib.import_module("02_edm_cifar").stage_parser().parse_args(words[3:])
