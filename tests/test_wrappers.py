"""lab/wrappers.py: each kind of network, in closed form for one Gaussian, gives the denoiser.
lab/check_teacher.py: wrong teachers are named, and the settings suit a Gaussian."""
import importlib
import json
import math
import os
import sys

import pytest
import torch
from PIL import Image
from torch import nn

from common import UserError

edm = importlib.import_module("02_edm_cifar")
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


def test_where_a_sampler_begins_and_ends():
    """At the noise levels of a table's ends, in the units of stage 2; or where one says so."""
    table = wrappers.DDPM(Exact(of_step("eps")), ABAR, "eps", (1, 4, 4), scale=2.0)
    assert table.sigma_range == pytest.approx((0.0001**0.5 / 2, 999**0.5 / 2), rel=1e-3)
    ends = wrappers.DDPM(Exact(of_step("eps")), [0.9, 0.1, 0.0], "eps", (1, 4, 4))
    assert ends.sigma_range == pytest.approx(((1 / 9)**0.5, 3.0))  # no sampler starts at infinity
    flow = CASES["flow"](sigma_range=(0.1, 10.0), image_range=(0, 8))
    seen, z = [], torch.randn(2, 1, 4, 4)
    flow.denoise, inner = lambda u, t: (seen.append(t), inner(u, t))[1], flow.denoise
    edm.sample_teacher(flow, z, z.new_zeros(2, 0), num_steps=4)
    assert seen[0].max() == pytest.approx(10) and seen[-1].min() == pytest.approx(0.1)
    assert edm.on_screen(flow, torch.tensor([0.0, 4.0, 8.0])).tolist() == [-1, 0, 1]
    assert edm.on_screen(edm.make_unet(img_resolution=8, model_channels=4), z) is not None


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_a_teacher_of_diffusers(kind, tmp_path, monkeypatch, refused):
    """A folder that diffusers wrote; the denoised image is what its own scheduler computes."""
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    unet = diffusers.UNet2DModel(sample_size=8, in_channels=1, out_channels=1, layers_per_block=1,
                                 block_out_channels=(8, 16), norm_num_groups=4, num_class_embeds=3,
                                 down_block_types=("DownBlock2D", "AttnDownBlock2D"),
                                 up_block_types=("AttnUpBlock2D", "UpBlock2D"))
    schedule = diffusers.DDPMScheduler(beta_schedule="squaredcos_cap_v2", prediction_type=kind,
                                       clip_sample=False)
    # A pipeline's layout, or, as google/ddpm-cifar10-32 has it, all in one folder.
    parts = ("unet", "scheduler") if kind == "epsilon" else ("", "")
    unet.save_pretrained(tmp_path / parts[0])
    schedule.save_pretrained(tmp_path / parts[1])
    net = wrappers.diffusers_unet(tmp_path)
    assert net.image_shape == (1, 8, 8) and net.label_dim == 3
    for step in (5, 400, 900):
        abar = schedule.alphas_cumprod[step]
        y, label = torch.randn(1, 1, 8, 8), torch.tensor([step % 3])
        with torch.no_grad():
            out = unet(y, step, class_labels=label).sample
            x = net(y / abar.sqrt(), ((1 - abar) / abar).sqrt(), torch.eye(3)[label])
        expected = schedule.step(out, step, y).pred_original_sample
        torch.testing.assert_close(x, expected, rtol=1e-3, atol=1e-3)
    monkeypatch.setenv("FOLDER", str(tmp_path))
    edm.main(["--teacher", f"{__name__}:from_diffusers", "--steps", "1", "--batch", "2", "--judge",
              "none", "--device", "cpu", "--out", str(tmp_path / "run")])
    with pytest.raises(UserError, match="expected a local folder of diffusers"):
        wrappers.diffusers_unet(tmp_path / "run")
    diffusers.FlowMatchEulerDiscreteScheduler().save_pretrained(tmp_path / parts[1])
    with pytest.raises(UserError, match="expected a DDPM, DDIM or PNDM scheduler"):
        wrappers.diffusers_unet(tmp_path)
    monkeypatch.setitem(sys.modules, "diffusers", None)
    line = refused(edm.main, ["--teacher", f"{__name__}:from_diffusers"])
    assert "pip install diffusers" in line


from_diffusers = lambda: wrappers.diffusers_unet(os.environ["FOLDER"])


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
                                   "v": a * eps - a * t * u_0, "score_of_vp": -eps,
                                   "identity": x}[kind]
        return Net()
    return function


denoiser, eps, score, v, score_of_vp, identity = [
    unwrapped(kind) for kind in ("x_0", "eps", "score", "v", "score_of_vp", "identity")]


@pytest.mark.parametrize("kind, text", [("eps", "a network that predicts eps"), ("v", "predicts v"),
                                        ("score", "a score"), ("missing", "missing"),
                                        ("score_of_vp", "a score of a VP process")])
def test_what_is_no_denoiser_is_named(kind, text, tmp_path, refused):
    line = refused(check.main, [f"{__name__}:{kind}", "--n", 64, "--out", tmp_path / "x.png"])
    assert text in line


def test_where_a_teacher_is_worse_than_the_mean_is_said(tmp_path, capsys):
    """The identity is right at small t, and no denoiser: no command to train is suggested."""
    check.main([f"{__name__}:identity", "--n", "16", "--out", str(tmp_path / "x.png")])
    text = capsys.readouterr().out
    assert "the mean of the data would have 1" in text and "02_edm_cifar.py" not in text
    check.main([f"{__name__}:denoiser", "--n", "16", "--out", str(tmp_path / "x.png")])
    assert "the mean of the data would have 1" not in capsys.readouterr().out


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
             for name in ("--p-mean", "--p-std", "--psi-mean", "--psi-std", "--t-max", "--t-star")}
    low, high = 0.5 * (0.01 / 0.99)**0.5, 0.5 * 9**0.5  # the errors there are 1 % and 90 %
    assert found["--p-mean"] == pytest.approx(math.log(low * high) / 2, abs=0.15)
    assert found["--p-std"] == pytest.approx(math.log(high / low) / 3.7, abs=0.1)
    assert found["--t-star"] == pytest.approx(high / 2, rel=0.2)
    assert found["--t-max"] == pytest.approx(high, rel=0.2)
    assert found["--psi-mean"] == found["--p-mean"] and "std 0.5" in lines[0]
    with Image.open(picture) as image:
        assert image.width == image.height
    importlib.import_module("02_edm_cifar").stage_parser().parse_args(words[3:])


# ---- from a foreign score network to a one-step generator ----
class Blobs(nn.Module):
    """A score network (variance preserving, continuous time) that knows nothing of this project:
    images of 8 x 8 pixels and one channel, a blob of height 6 to 8 on a background of 0."""
    def __init__(self, width=256):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(64 + 16, width), nn.SiLU(), nn.Linear(width, width),
                                    nn.SiLU(), nn.Linear(width, width), nn.SiLU(),
                                    nn.Linear(width, 64))

    def eps(self, y, tau):
        waves = (tau[:, None] * 2.0**torch.arange(8)).mul(math.pi / 2)
        inputs = torch.cat([y.flatten(1), waves.sin(), waves.cos()], dim=1)
        return y + self.layers(inputs).reshape(y.shape)

    def forward(self, y, tau):
        return -self.eps(y, tau) / column(deviation(tau))


def deviation(tau):
    return (1 - torch.exp(-(0.1 * tau + 19.9 * tau**2 / 2))).sqrt()


def draw_blobs(n):
    place, axis = 2 + 3 * torch.rand(n, 2, 1), torch.arange(8.0)
    row, col = torch.exp(-(axis - place)**2 / 2).unbind(1)
    return ((6 + 2 * torch.rand(n, 1, 1)) * row[:, :, None] * col[:, None, :])[:, None]


@pytest.fixture(scope="session")
def blobs(tmp_path_factory):
    """Denoising score matching of the network, in its own units. -> the file of its weights"""
    torch.manual_seed(0)
    net, steps = Blobs(), 4000
    adam = torch.optim.Adam(net.parameters())
    for step in range(steps):
        adam.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        tau, u_0 = 1e-3 + 0.999 * torch.rand(256), draw_blobs(256)
        eps, s = torch.randn_like(u_0), column(deviation(tau))
        adam.zero_grad()
        (net.eps((1 - s**2).sqrt() * u_0 + s * eps, tau) - eps).square().sum(1).mean().backward()
        adam.step()
    path = tmp_path_factory.mktemp("blobs") / "blobs.pt"
    torch.save(net.state_dict(), path)
    return path


def blobs_teacher():
    net = Blobs()
    net.load_state_dict(torch.load(os.environ["BLOBS"], weights_only=True))
    return wrappers.VPScore(net, (1, 8, 8), scale=7.0, image_range=(0, 1), sigma_range=(0.01, 20))


@pytest.mark.slow
def test_from_check_teacher_to_a_generator(blobs, tmp_path, monkeypatch, capsys):
    """As the README says: the page about the teacher, then the command that the page ends with."""
    monkeypatch.setenv("BLOBS", str(blobs))
    own = f"{__name__}:blobs_teacher"
    check.main([own, "--n", "400", "--out", str(tmp_path / "x.png"), "--device", "cpu"])
    command = capsys.readouterr().out.splitlines()[-1].split()[3:]
    edm.main([*command, "--out", str(tmp_path / "run"), "--device", "cpu"])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["sw2"] < 2 * metrics["sw2_teacher"], metrics
