"""What several test files share: commands as typed, and Algorithm 2 once more, by hand."""
import copy
import importlib
import json
import os
import signal
import sys
from pathlib import Path
from types import SimpleNamespace

# The networks of the tests are tiny: a second thread only waits. Commands in processes of their own
# inherit the number, so that their weights are those of this process, bit for bit.
os.environ["OMP_NUM_THREADS"] = "1"

import pytest
import torch

import common
from common import DISTANCES, seed_step

ROOT = Path(__file__).parent.parent
toy, edm = importlib.import_module("01_toy_2d"), importlib.import_module("02_edm_cifar")
TINY = {"img_resolution": 8, "model_channels": 4, "channel_mult": [1, 2], "num_blocks": 1,
        "attn_resolutions": [4], "channel_mult_emb": 2, "label_dim": 3, "dropout": 0.0}


@pytest.fixture(autouse=True)
def restored():
    """A run installs handlers of signals and numbers of threads: every test starts without."""
    threads, kinds = torch.get_num_threads(), (signal.SIGINT, signal.SIGTERM)
    handlers = [signal.getsignal(kind) for kind in kinds]
    yield
    torch.set_num_threads(threads)
    for kind, handler in zip(kinds, handlers):
        signal.signal(kind, handler)


@pytest.fixture
def refused(capsys):
    """refused(main, argv): the command ends in one line on stderr and status 2. -> the line"""
    def call(main, argv):
        capsys.readouterr()
        with pytest.raises(SystemExit) as stop:
            main([str(word) for word in argv])
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        return line
    return call


def command(script, *argv):
    return [sys.executable, str(ROOT / script), *map(str, argv)]


def quick_command(script, *argv):
    """The same with few looks at the generator, and stage 1's closing measures on few points."""
    code = f"""if True:
        import functools, importlib, sys
        sys.path.insert(0, {str(ROOT)!r})
        stage = importlib.import_module({Path(script).stem!r})
        stage.LOOKS = 4
        if "toy" in {script!r}:
            stage.summarise = functools.partial(stage.summarise, n=500, sets=2)
        stage.main()"""
    return [sys.executable, "-c", code, *map(str, argv)]


def save_teacher(path, net_args=TINY):
    """A small network for stage 2, random but always the same, as a file. -> the path"""
    torch.manual_seed(0)
    net = edm.make_unet(**net_args)
    torch.nn.init.normal_(net.model.dec["8x8_aux_conv"].weight, std=0.1)
    common.save({"net_args": net_args, "state_dict": net.state_dict(), "t_star": 2.5, "meta": {}},
                path)
    return path


def save_judge(path, image_shape, classes=3):
    """A judge that has learned nothing, and the moments of pictures of noise. -> the path"""
    torch.manual_seed(1)
    net_args = {"channels": image_shape[0], "side": image_shape[1], "classes": classes, "width": 4}
    judge = edm.Judge(**net_args)
    features = judge(torch.randint(256, (50, *image_shape)))[0].detach()
    mu, sigma = common.moments(features)
    meta = {"mu": mu, "sigma": sigma,
            "floor": {"fd_floor": 0.5, "class_accuracy_floor": 0.9}}
    common.save({"net_args": net_args, "state_dict": judge.state_dict(), "meta": meta}, path)
    return path


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    return save_teacher(tmp_path_factory.mktemp("teacher") / "tiny.pt")


def vector(weights):
    return torch.cat([w.detach().flatten() for w in weights])


def trained(folder, start=0):
    """What a run did: how far d_psi, g and g_ema are from their start, and the last gradients of
    d_psi and g, one vector each. Adam keeps the gradients themselves, since its beta_1 is 0."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    nets = [vector(state[name].values()) - start for name in ("d_psi", "g", "g_ema")]
    adams = [state[name]["state"].values() for name in ("opt_psi", "opt_theta")]
    return nets + [vector(weight["exp_avg"] for weight in adam) for adam in adams]


def logged(folder):
    """{name: mean} of the last update, as the last line of log.jsonl has them."""
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    return {name: line[name] for name in ("loss_psi", "loss_theta", "divergence", "y_norm")}


def difference(a, b):
    """The largest |a - b| / |b| of two runs."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b))


# ---- Algorithm 2 by hand, with torch's own pieces and the paper's formulas ----
DEFAULTS = {"method": "sim", "distance": "phuber", "weight": "own", "sid_alpha": 1.0, "steps": 3,
            "batch": 8, "lr": 1e-3, "lr_psi": 0.0, "anneal": "none",
            "t_star": 2.5, "p_theta": "lognormal", "p_mean": -3.5, "p_std": 2.5, "psi_mean": -1.2,
            "psi_std": 1.2, "psi_updates": 1,
            "ema_half_life": 5e5, "adam_eps": 1e-8, "dropout": 0.0, "seed": 0}
FLAGS = ["", "--method sid", "--method sid --sid-alpha 1.2", "--method di", "--weight sidwgt",
         "--method sid --weight nowgt", "--distance phuber,c=0.5", "--p-theta karras",
         "--p-mean 0", "--p-std 0.5", "--psi-mean 0", "--psi-std 0.3", "--psi-updates 2",
         "--t-star 1", "--ema-half-life 0.001", "--lr 1e-4", "--lr-psi 1e-4",
         "--seed 7", "--batch-gpu 3"]


def by_sample(v):
    return v.flatten(1).sum(1)


def norm(y, c=0.0):
    return (by_sample(y**2) + c**2).sqrt().reshape(-1, *[1] * (y.ndim - 1))


def distance_of(s):
    name, *pairs = s.distance.split(",")
    return DISTANCES[name](**{k: float(v) for k, v in (pair.split("=") for pair in pairs)})


def loss_theta(s, f, q, x_0):
    """f is d_psi(x_t), q is d_q(x_t). -> (B,)"""
    y, distance = f - q, distance_of(s)
    d_prime = (lambda y: y / norm(y, 0.001)) if s.distance == "phuber" else distance.d_prime
    weight = 1 / (x_0 - q).abs().flatten(1).mean(1).detach()
    own = s.weight == "own" and s.method == "sid"
    weight = weight if own or s.weight == "sidwgt" else 1
    return weight * {
        "sim": lambda: -by_sample(d_prime(y) * (f - x_0)),
        "sid": lambda: by_sample((q - f) * ((q - x_0) - s.sid_alpha * (q - f))),
        "di": lambda: by_sample(y.detach() * x_0),
        "d_prime_detached": lambda: -by_sample(d_prime(y).detach() * (f - x_0)),
        "d_q_detached": lambda: -by_sample(d_prime(f - q.detach()) * (f - x_0)),
        "d_backpropagated": lambda: distance.d(y)}[s.method]()


def times_by_hand(s, phase, column, random):
    """(B.6) for psi; (B.8), in SiD's form, or (B.10) for theta. -> t, of shape `column`"""
    if phase == "theta" and s.p_theta == "karras":
        low, high = 0.002**(1 / 7), 80**(1 / 7)
        return (high + (1 - 0.8 * torch.rand(column, generator=random)) * (low - high))**7
    mean, std = (s.psi_mean, s.psi_std) if phase == "psi" else (s.p_mean, s.p_std)
    return (mean + std * torch.randn(column, generator=random)).exp()


def average_by_hand(g_ema, g, seen, batch, half_life):
    beta = 0.5**(batch / min(half_life, 0.05 * seen)) if seen else 0
    for a, b in zip(g_ema.parameters(), g.parameters()):
        a.data = beta * a.data + (1 - beta) * b.data


def algorithm_2(start, d_q, shape, classes=0, **settings):
    """-> what `trained` and `logged` return of a run with these settings from the net `start`."""
    s, gradients, figures = SimpleNamespace(**settings), [None, None], {}
    d_psi, g, g_ema = [copy.deepcopy(start).requires_grad_(True) for _ in range(3)]
    opt_psi, opt_theta = [torch.optim.Adam(net.parameters(), s.lr, (0.0, 0.999), s.adam_eps)
                          for net in (d_psi, g)]
    for layer in [layer for net in (d_psi, g) for layer in net.modules()]:
        if hasattr(layer, "dropout"):
            layer.dropout.p = s.dropout
    for step in range(s.steps):
        random, batch, losses = seed_step(s.seed, step), s.batch, {"psi": [], "theta": []}
        draw = lambda *size, random=random: torch.randn(size, generator=random)
        for phase in ["psi"] * s.psi_updates + ["theta"]:
            z, eps, column = draw(batch, *shape), draw(batch, *shape), (batch, *[1] * len(shape))
            t = times_by_hand(s, phase, column, random)
            c = ()
            if classes:
                c = (torch.eye(classes)[torch.randint(classes, (batch,), generator=random)],)
            learns, optimiser, still = ((d_psi, opt_psi, g) if phase == "psi" else
                                        (g, opt_theta, d_psi))
            learns.train()
            still.eval()
            x_0 = g(s.t_star * z, s.t_star, *c)
            x_0 = x_0.detach() if phase == "psi" else x_0
            x_t = x_0 + t * eps
            f = d_psi(x_t, t, *c)
            if phase == "psi":
                loss = by_sample((t**2 + 0.25) / (t * 0.5)**2 * (f - x_0)**2)
            else:
                q = d_q(x_t, t, *c)
                loss, y = loss_theta(s, f, q, x_0), (f - q).detach()
                figures |= {"divergence": distance_of(s).d(y).mean().item(),
                            "y_norm": y.flatten(1).norm(dim=1).mean().item()}
            losses[phase].append(loss.mean().item())
            figures[f"loss_{phase}"] = sum(losses[phase]) / len(losses[phase])
            lr = s.lr_psi if phase == "psi" and s.lr_psi else s.lr
            optimiser.param_groups[0]["lr"] = lr * (1 - step / s.steps * (s.anneal == "linear"))
            optimiser.zero_grad()
            (loss.sum() / batch).backward()
            gradients[phase == "theta"] = vector(w.grad for w in learns.parameters())
            optimiser.step()
        average_by_hand(g_ema, g, batch * step, batch, s.ema_half_life)
    begun = vector(start.state_dict().values())
    nets = [vector(net.state_dict().values()) - begun for net in (d_psi, g, g_ema)]
    return nets + gradients, figures


def changed(defaults, options):
    """{"lr": 1e-3, ...} and "--p-mean -1 --method sid" -> the settings of that command."""
    words = options.split()
    pairs = {key[2:].replace("-", "_"): value for key, value in zip(words[::2], words[1::2])}
    return defaults | {key: type(defaults[key])(v) for key, v in pairs.items() if key in defaults}
