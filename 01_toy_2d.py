"""Stage 1: Score Implicit Matching where everything can be checked: points in the plane, exact scores.

    python 01_toy_2d.py                    the theorem, then a distillation: about two minutes on two cores
    python 01_toy_2d.py --mixture spiral --out runs/spiral
    python 01_toy_2d.py --sample runs/toy_2d-sim-phuber-0 --n 5000

A. Theorem 3.1 to machine precision: both sides of (3.6), by quadrature, as gradients of a small network's weights.
B. Algorithm 2: a diffusion model of a Gaussian mixture (35 evaluations per sample) becomes a generator that takes one.
   Expect every mode with its share of the samples, and a sliced Wasserstein distance about that of exact samples.
"""
import copy
import math
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image
from torch import nn
from tqdm import tqdm

from common import (DISTANCES, MLP, Distance, EDMPrecond, Log, Parser, UserError, add_method_arguments, atomic,
                    batch_sum, diffuse, dsm_loss, edm_sampler, ema_beta, ema_update, first_line, image_grid,
                    lambda_edm, load, load_state, make_distance, make_generator_loss, number, one_line_errors,
                    open_run, p_edm, pick_device, save, save_gif, save_state, sim_loss, train_only)


# ---- Gaussian mixtures: the teacher, and (std = 0) the student of the theorem --------------------------------------
@dataclass
class Mixture:
    """Equal Gaussians at means (K, D), of standard deviation std, diffused to x_t = a x_0 + s eps (VE: a = 1, s = t)."""
    means: torch.Tensor
    std: float

    def denoise(self, x, s, a=1.0):
        """E[x_0 | x_t], exactly. x (B, D) -> (B, D). With std = 0, (6) of Karras et al. 2022's optimal denoiser."""
        v = (a * self.std)**2 + s**2
        logits = (a * x @ self.means.T - a**2 * (self.means**2).sum(1) / 2) / v  # |x|^2 cancels in the softmax
        return (s**2 * logits.softmax(1) @ self.means + a * self.std**2 * x) / v

    def score(self, x, s, a=1.0):
        """grad log p_t(x) from the denoiser, (B.3) for any a."""
        return (a * self.denoise(x, s, a) - x) / s**2

    def log_density(self, x):
        """log p_0(x): (B, D) -> (B,)."""
        square = (x[:, None] - self.means).square().sum(2)  # (B, K)
        norm = math.log(len(self.means)) + x.shape[1] * math.log(self.std * math.sqrt(2 * math.pi))
        return (-square / (2 * self.std**2)).logsumexp(1) - norm

    def sample(self, n, generator=None):
        """(n, D) exact samples."""
        where = {"device": self.means.device, "generator": generator}
        means = self.means[torch.randint(len(self.means), (n,), **where)]
        return means + self.std * torch.randn(means.shape, **where)


def polar(radius, angle):
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1)


def make_mixture(name):
    if name == "ring":
        return Mixture(polar(torch.ones(8), torch.arange(8) * math.pi / 4), 0.1)
    if name == "grid":
        return Mixture(torch.cartesian_prod(*[torch.linspace(-1, 1, 5)] * 2), 0.05)
    if name == "spiral":
        u = torch.linspace(0, 1, 48).sqrt()  # equal steps along the arm
        return Mixture(polar(0.2 + u, 1.5 * 2 * math.pi * u), 0.05)
    u = torch.linspace(0, math.pi, 24)
    upper = polar(torch.ones(24), u) * 0.8 - torch.tensor([0.4, 0.2])
    return Mixture(torch.cat([upper, -upper]), 0.06)


# ---- A. The theorem ------------------------------------------------------------------------------------------------
# With N fixed latents the student's p_t is a mixture of N Gaussians around g(z_i), so its score is exact and both sides
# of (3.6) are averages over i and eps, which quadrature does to machine precision.
PROCESSES = {"VE": lambda t: (1.0, t), "VP": lambda t: ((1 + t**2)**-0.5, t * (1 + t**2)**-0.5)}  # t -> (a, s)
THEOREM = [("l2", {}, 2), ("power", {"alpha": 4}, 2), ("exp", {"alpha": 2, "beta": 0.1}, 2),  # distance, parameters, D
           ("smoothl1", {"scale": 0.5}, 2), ("phuber", {"c": 0.5}, 2), ("phuber", {"c": 0.001}, 1),
           ("huber", {"delta": 0.7}, 2), ("l1", {}, 2)]


def sim_loss_score(s_psi, s_q, x_0, a, s, distance, eps):
    """(3.7) in scores, for any x_t = a x_0 + s eps: there grad log q_t(x_t | x_0) = -eps / s. -> (loss (B,), y_t)"""
    x_t = a * x_0 + s * eps
    s_p = s_psi(x_t)
    y_t = s_p - s_q(x_t)
    return -batch_sum(distance.d_prime(y_t) * (s_p + eps / s)), y_t.detach()


def detach_d_prime(d_psi, d_q, x_0, t, distance, eps):
    return sim_loss(d_psi, d_q, x_0, t, Distance(distance.d, lambda y: distance.d_prime(y.detach())), eps)


def detach_d_q(d_psi, d_q, x_0, t, distance, eps):
    return sim_loss(d_psi, lambda x_t, t: d_q(x_t, t).detach(), x_0, t, distance, eps)


def backpropagate_d(d_psi, d_q, x_0, t, distance, eps):
    x_t = diffuse(x_0, t, eps)
    y_t = d_psi(x_t, t) - d_q(x_t, t)
    return distance.d(y_t), y_t.detach()


CONTROLS = {"d' detached": detach_d_prime, "d_q detached": detach_d_q, "d(y) back-propagated": backpropagate_d}


def small_generator(dim):
    """-> a float64 tanh network, 4 latents (4, 2), and a teacher in dim dimensions. Any would do."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = random(4, 2)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
    for weights in g.parameters():
        nn.init.zeros_(weights).data += 0.5 * random(weights.shape)
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.7], [0.3, -1.2], [-0.8, -0.6]], dtype=torch.float64)
    return g, z, Mixture(means[:, :dim], 0.4)


def trapezoid(dim, nodes, half_width=8.5):
    """Nodes eps (M, dim) and weights (M,) of E over N(0, I). For smooth integrands the error falls exponentially."""
    axis = torch.linspace(-half_width, half_width, nodes, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return eps, torch.softmax(-(eps**2).sum(1) / 2, dim=0)


def theorem_error(t, process, space, distance, dim, nodes, loss=sim_loss):
    """|left - right| / |left| of (3.6) as gradients with respect to all of g's weights."""
    g, z, teacher = small_generator(dim)
    a, s = PROCESSES[process](t)
    eps, weight = trapezoid(dim, nodes)
    x = g(z)
    atoms = x.detach().requires_grad_()
    field = "denoise" if space == "denoiser" else "score"
    student, frozen, q = [partial(getattr(m, field), s=s, a=a)
                          for m in (Mixture(atoms, 0.0), Mixture(atoms.detach(), 0.0), teacher)]
    left, right = torch.zeros_like(x), torch.zeros_like(x)
    for x_0 in atoms:
        x_t = (a * x_0 + s * eps).detach()  # pi_t = p_sg[theta]: (3.5) differentiates the score only
        left += torch.autograd.grad(weight @ distance.d(student(x_t) - q(x_t)), atoms)[0]
        x_0 = x_0.expand_as(eps)
        if space == "denoiser":
            value, _ = loss(lambda x, t: frozen(x), lambda x, t: q(x), x_0, t, distance, eps)
        else:
            value, _ = sim_loss_score(frozen, q, x_0, a, s, distance, eps)
        right += torch.autograd.grad(weight @ value, atoms)[0]
    left, right = [torch.cat([w.flatten() for w in torch.autograd.grad(x, g.parameters(), side, retain_graph=True)])
                   for side in (left, right)]
    return ((left - right).norm() / left.norm()).item()


def theorem(thorough=False):
    """Check (3.6) for every distance, process and time; print a line per three times. -> rows of theorem.json"""
    cases = [(*case, process, space, "theorem", sim_loss) for case in THEOREM
             for process, space in (("VE", "denoiser"), ("VE", "score"), ("VP", "score"))]
    cases += [(*case, "VE", "denoiser", variant, loss) for case in (THEOREM[0], THEOREM[4])
              for variant, loss in CONTROLS.items()]
    times = (0.25, 0.5, 1.0, 2.5, 5.0) if thorough else (0.5, 1.0, 2.5)
    nodes = {2: 601, 1: 400_001} if thorough else {2: 273, 1: 80_001}
    print("Theorem 3.1: |left - right| / |left| of (3.6)".ljust(68) + "".join(f"t = {t:<7}" for t in times))
    rows = []
    for name, params, dim, process, space, variant, loss in cases:
        for t in times:
            a, s = PROCESSES[process](t)
            unit = a / s**2 if space == "score" else 1.0  # of y: a scale counts in the same unit
            scaled = {k: v * unit if k in ("c", "scale", "delta") else v for k, v in params.items()}
            error = theorem_error(t, process, space, DISTANCES[name](**scaled), dim, nodes[dim], loss)
            rows.append({"process": process, "space": space, "distance": name, "params": scaled, "t": t, "dim": dim,
                         "variant": variant, "relative_error": error})
        label = f"{name} {' '.join(f'{k}={v}' for k, v in params.items())}"
        errors = "".join(f"{row['relative_error']:<11.1e}" for row in rows[-len(times):])
        print(f"  {process} {space:9} {dim}-D  {label:22} {variant:21}".ljust(68) + errors, flush=True)
    print("l1 fails because sign(y) jumps where y_i = 0: (3.6) needs that jump, and autograd gives it derivative 0.")
    return rows


NET_ARGS = {"dim": 2, "width": 128, "depth": 3, "waves": 16}


# ---- B. Distillation -----------------------------------------------------------------------------------------------
def pretrain(mixture, args, device):
    """A denoiser of the mixture from dsm_loss: g and d_psi start from it; with --teacher learned it is d_q too."""
    net = EDMPrecond(MLP(**NET_ARGS)).to(device)
    optimiser = torch.optim.Adam(net.parameters())
    for step in tqdm(range(args.pretrain_steps), "pretraining", disable=None):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / args.pretrain_steps)
        loss = dsm_loss(net, mixture.sample(args.batch), p_edm((args.batch, 1), device=device)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def share_on_modes(x, mixture):
    """-> share of the samples within 4 standard deviations of a mode, and (K,) shares nearest to each mode."""
    distance, nearest = torch.cdist(x, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=len(mixture.means)) / len(x)
    return (distance < 4 * mixture.std).float().mean().item(), shares.tolist()


def sliced_w2(x, y, projections=200):
    """Sliced Wasserstein-2 distance of two sets (N, 2): root mean square over directions of the 1-D distances."""
    directions = polar(torch.ones(projections), math.pi * torch.arange(projections) / projections).T.to(x)
    return ((x @ directions).sort(0)[0] - (y @ directions).sort(0)[0]).square().mean().sqrt().item()


def panel(mixture, x, title):
    """A picture of samples (N, 2) over the mixture's density. -> uint8 (3, H, W)"""
    reach = mixture.means.abs().max().item() + 6 * mixture.std
    axis = torch.linspace(-reach, reach, 160)
    plane = torch.cartesian_prod(-axis, axis).flip(1)  # rows from the top down, (x, y)
    density = Mixture(mixture.means.cpu(), 1.5 * mixture.std).log_density(plane).exp().reshape(160, 160)
    figure = Figure(figsize=(3.6, 3.9), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.88))
    axes.imshow(density, extent=(-reach, reach) * 2, cmap="Blues", vmax=1.8 * density.max().item())
    axes.scatter(*x.cpu().T, s=3, c="#d1495b", alpha=0.5, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
    axes.set_title(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def plot_divergence(log, floor, path):
    """E d(y) and the sliced Wasserstein distance over the steps, from log.jsonl's lines."""
    figure = Figure(figsize=(6.4, 3.6), dpi=100, layout="constrained")
    axes = figure.subplots()
    curves = [("divergence", "E d(y), estimate of (3.3)", "#d1495b"), ("sw2", "sliced Wasserstein-2", "#00798c")]
    for key, label, colour in curves:
        points = [(line["step"], line[key]) for line in log if key in line]
        axes.plot(*zip(*points), label=label, color=colour)
    axes.axhline(floor, ls=":", color="#00798c", label="the same between two exact sample sets")
    axes.set(xlabel="step", yscale="log")
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def evaluate(g, d_q, mixture, args, folder, log, seed=12345, n=10_000, pairs=5):
    """Sample the finished generator and its teacher beside exact data; write metrics.json, g_ema.pt and the pictures."""
    device = mixture.means.device
    random = torch.Generator(device).manual_seed(seed)
    normal = lambda: torch.randn(n, 2, device=device, generator=random)
    data = [mixture.sample(n, random) for _ in range(pairs + 1)]
    with torch.no_grad():
        one_step = [g(args.t_star * normal(), args.t_star) for _ in range(pairs)]
    teacher = [edm_sampler(d_q, normal()) for _ in range(pairs)]
    sw2 = lambda sets: sum(sliced_w2(x, y) for x, y in zip(sets, data)) / pairs
    share, shares = share_on_modes(one_step[0], mixture)
    teacher_share, teacher_shares = share_on_modes(teacher[0], mixture)
    metrics = {"method": args.method, "distance": args.distance, "mixture": args.mixture, "seed": args.seed,
               "steps": args.steps, "seconds": round(log.elapsed(), 1), "share_on_modes": share, "mode_shares": shares,
               "sw2": sw2(one_step), "sw2_exact": sw2(data[1:]), "sw2_teacher": sw2(teacher),
               "teacher_share_on_modes": teacher_share, "teacher_mode_shares": teacher_shares}
    panels = zip((data[0], teacher[0], one_step[0]), ("data", "teacher, 35 evaluations", "one step"))
    with atomic(folder / "samples.png") as temporary:
        image_grid(torch.stack([panel(mixture, x[:4000], title) for x, title in panels]), 3).save(temporary)
    save_gif([Image.open(path) for path in sorted((folder / "samples").glob("[0-9]*.png"))], folder / "animation.gif")
    plot_divergence(log.read(), metrics["sw2_exact"], folder / "divergence.png")
    save(metrics, folder / "metrics.json")
    return metrics


def report(log, g, mixture, args, folder):
    """A log line every 50 steps, and the animation's frames: many early, where the samples still move."""
    frames = {round(args.steps * (i / 40)**2) for i in range(41)}
    line = log.step % 50 == 0 or log.step == args.steps
    if not line and log.step not in frames:
        return
    random = torch.Generator(mixture.means.device).manual_seed(0)  # the same noise and data each time
    with torch.no_grad():
        x = g(args.t_star * torch.randn(2000, 2, device=mixture.means.device, generator=random), args.t_star)
    if line:
        log.write(sw2=sliced_w2(x, mixture.sample(2000, random), 50))
    if log.step in frames:
        with atomic(folder / "samples" / f"{log.step:06}.png") as temporary:
            image_grid(panel(mixture, x, f"step {log.step}")[None], 1).save(temporary)


def save_generator(path, g, args, step):
    save({"net_args": NET_ARGS, "state_dict": g.state_dict(), "t_star": args.t_star,
          "meta": {**{k: getattr(args, k) for k in ("mixture", "method", "distance", "seed")}, "step": step}}, path)


def distil(args, folder, device):
    """Algorithm 2 from a pretrained denoiser to a one-step generator, in args.steps steps. -> metrics"""
    mixture, distance = make_mixture(args.mixture), make_distance(args)
    mixture.means = mixture.means.to(device)
    generator_loss = make_generator_loss(args, distance)
    log = Log(folder / "log.jsonl", args.steps)
    checkpoint = folder / "ckpt.pt"
    torch.manual_seed(args.seed)
    net = EDMPrecond(MLP(**NET_ARGS)).to(device) if checkpoint.exists() else pretrain(mixture, args, device)
    g, d_psi, g_ema, d_q = [copy.deepcopy(net) for _ in range(4)]
    opt_psi, opt_theta = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.999)) for net in (d_psi, g)]  # Table 5
    parts = {"d_psi": d_psi, "g": g, "g_ema": g_ema, "d_q": d_q, "opt_psi": opt_psi, "opt_theta": opt_theta, "log": log}
    if checkpoint.exists():
        load_state(checkpoint, **parts)
    else:
        (folder / "samples").mkdir(exist_ok=True)
        report(log, g_ema, mixture, args, folder)
        save_state(checkpoint, **parts)
    d_q = mixture.denoise if args.teacher == "exact" else d_q.requires_grad_(False)
    p_psi, p_theta = p_edm, partial(p_edm, mean=args.p_mean, std=args.p_std)
    weight_psi, accumulate = lambda_edm, 1

    def draw(p):  # the micro-batches of one update, here a single one: (z, t, eps, condition)
        normal = partial(torch.randn, args.batch, 2, device=device)
        yield args.t_star * normal(), p((args.batch, 1), device=device), normal(), None

    def generate(g, z, cond):  # (B.4)
        return g(z, args.t_star)

    def given(denoiser, cond):  # (x_t, t) -> denoised; here there is no condition to close over
        return denoiser

    while log.step < args.steps:
        for optimiser in (opt_psi, opt_theta):
            optimiser.param_groups[0]["lr"] = args.lr * (1 - log.step / args.steps)
        # ---- Algorithm 2: begin ----
        for _ in range(args.psi_updates):
            train_only(d_psi, frozen=g)
            opt_psi.zero_grad()
            for z, t, eps, cond in draw(p_psi):
                with torch.no_grad():
                    x_0 = generate(g, z, cond)
                loss_psi = dsm_loss(given(d_psi, cond), x_0, t, eps, weight_psi).mean()  # (B.2)
                (loss_psi / accumulate).backward()
                log.add(loss_psi=loss_psi)
            opt_psi.step()

        train_only(g, frozen=d_psi)
        opt_theta.zero_grad()
        for z, t, eps, cond in draw(p_theta):
            x_0 = generate(g, z, cond)
            loss_theta, y_t = generator_loss(given(d_psi, cond), given(d_q, cond), x_0, t, eps=eps)  # (B.13)
            (loss_theta.mean() / accumulate).backward()
            log.add(loss_theta=loss_theta, divergence=distance.d(y_t), y_norm=batch_sum(y_t**2).sqrt())  # (3.3)
        opt_theta.step()
        ema_update(g_ema, g, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        log.advance()
        report(log, g_ema, mixture, args, folder)
        if log.step % args.save_every == 0 or log.step == args.steps:
            save_state(checkpoint, **parts)
            save_generator(folder / "g_ema.pt", g_ema, args, log.step)
    return evaluate(g_ema, d_q, mixture, args, folder, log)


def load_generator(path):
    """g_ema.pt, or the run's folder it lies in -> (g, t_star, meta)."""
    path = Path(path) / "g_ema.pt" if Path(path).is_dir() else Path(path)
    saved = load(path, ("net_args", "state_dict", "t_star", "meta"))
    try:
        g = EDMPrecond(MLP(**saved["net_args"]))
        g.load_state_dict(saved["state_dict"])
        return g, float(saved["t_star"]), make_mixture(saved["meta"]["mixture"])
    except (TypeError, KeyError, ValueError, AttributeError, RuntimeError) as error:
        raise UserError(f"{path} is no generator of this script ({first_line(error)[:80]})") from None


@torch.no_grad()
def sample(args):
    """--sample: n points of a trained generator, as an array and a picture beside the checkpoint or in --out."""
    g, t_star, mixture = load_generator(args.sample)
    x = g(t_star * torch.randn(args.n, 2, generator=torch.Generator().manual_seed(args.seed)), t_star)
    folder = Path(args.out or (args.sample if Path(args.sample).is_dir() else Path(args.sample).parent))
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"drawn-{args.n}-seed{args.seed}"
    with atomic(f"{name}.npy") as temporary:
        np.save(temporary, x.numpy())
    with atomic(f"{name}.png") as temporary:
        image_grid(panel(mixture, x, f"{args.n} samples, one step each")[None], 1).save(temporary)
    print(f"{share_on_modes(x, mixture)[0]:.1%} of {args.n} samples on a mode: {name}.npy, {name}.png")


def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--part", choices=("both", "theorem", "distil"), default="both", help="A, B or both")
    parser.add_argument("--thorough", action="store_true", help="A on a finer grid and at more times (minutes)")
    parser.add_argument("--mixture", choices=("ring", "grid", "spiral", "moons"), default="ring", help="the data")
    parser.add_argument("--teacher", choices=("exact", "learned"), default="exact", help="d_q: closed form, or an MLP")
    add_method_arguments(parser)
    group = parser.add_argument_group("training (defaults by measurement on the ring)")
    group.add_argument("--steps", type=number(int), default=4000, help="updates of the generator")
    group.add_argument("--batch", type=number(int), default=512, help="samples per update")
    group.add_argument("--lr", type=number(float), default=2e-3, help="Adam's, annealed linearly to zero")
    group.add_argument("--t-star", type=number(float), default=2.5, help="t* of (B.4); Table 5")
    group.add_argument("--p-mean", type=float, default=-1.5, help="theta's log t; (B.10) has -3.5, too low for points")
    group.add_argument("--p-std", type=number(float), default=1.5, help="theta's log t; (B.10) has 2.5")
    group.add_argument("--psi-updates", type=number(int), default=1, help="per theta update; Listing 1 has 2")
    group.add_argument("--ema-half-life", type=number(float), default=35e3, help="of the generator's EMA, in samples")
    group.add_argument("--pretrain-steps", type=number(int), default=3000, help="updates of the first denoiser")
    group.add_argument("--seed", type=number(int, zero=True), default=0, help="of everything random")
    group = parser.add_argument_group("runs")
    group.add_argument("--device", default="auto", help="cpu, cuda, mps, or the first that is there")
    group.add_argument("--out", help="the run's folder; runs/toy_2d-<method>-<distance>-<seed> unless given")
    group.add_argument("--fresh", action="store_true", help="move an older run in the folder aside")
    group.add_argument("--save-every", type=number(int), default=500, help="steps between checkpoints")
    group.add_argument("--sample", metavar="CKPT", help="only draw from a finished run: its folder or g_ema.pt")
    group.add_argument("--n", type=number(int), default=10_000, help="how many, with --sample")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more only slow networks this small down
    if args.sample:
        return sample(args)
    device = pick_device(args.device)
    make_distance(args)  # so that a mistake there ends the run before it writes anything
    args.out = args.out or f"runs/toy_2d-{args.method}-{args.distance}-{args.seed}"
    folder = open_run(args, ignore=("out", "fresh", "device", "part", "sample", "n"))
    if args.part != "distil" and not (folder / "theorem.json").exists():
        save(theorem(args.thorough), folder / "theorem.json")
    if args.part == "theorem":
        return
    m = distil(args, folder, device)
    print(f"{args.mixture}, {m['seconds']:.0f} s      on modes  share per mode   sliced W2 (exact sets: {m['sw2_exact']:.4f})")
    for name, on, shares, w2 in (("one step", m["share_on_modes"], m["mode_shares"], m["sw2"]),
                                 ("teacher", m["teacher_share_on_modes"], m["teacher_mode_shares"], m["sw2_teacher"])):
        print(f"{name:16} {on:9.1%}  {min(shares):.1%} - {max(shares):.1%}  {w2:.4f}")
    print(f"pictures: {folder}/samples.png, animation.gif, divergence.png")
    print(f"next: python 01_toy_2d.py --sample {folder} --n 5000")


if __name__ == "__main__":
    main()
