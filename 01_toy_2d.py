"""Stage 1: Score Implicit Matching where everything can be checked: points in the plane, exact scores.

    python 01_toy_2d.py                                         both parts, about a minute on two cores
    python 01_toy_2d.py --mixture spiral --out runs/spiral
    python 01_toy_2d.py --sample runs/toy_2d-sim-phuber-0 --n 5000

A. Theorem 3.1 to machine precision: both sides of (3.6), as gradients of a network's weights, by quadrature.
   Expect relative errors below 1e-10, but for huber (a kink: 1e-4) and l1 (a jump: 0.3); 0.1 to 1 if wrong.
B. Algorithm 2: a diffusion model of a Gaussian mixture, 35 evaluations a sample, becomes a one-step one.
   Expect 99 % of its samples on the modes, an equal share on each, and pictures of it in the run's folder.
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

from common import (DISTANCES, MLP, Distance, EDMPrecond, Log, Parser, Stop, accumulate, add_method_arguments,
                    add_run_arguments, annealed, atomic, batch_sum, blame, diffuse, dsm_loss, edm_sampler,
                    ema_beta, ema_update, image_grid, lambda_edm, load_generator, make_distance,
                    make_generator_loss, make_times, number, one_line_errors, open_run, p_edm, pick_device,
                    plot_log, resume, save, save_generator, save_if_due, save_picture, seed_step, sim_loss,
                    train_only)


# ---- Gaussian mixtures: the teacher, and with std = 0 the student of the theorem ----
@dataclass
class Mixture:
    """Equal Gaussians of means (K, D) and one std, diffused to x_t = a x_0 + s eps (VE: a = 1, s = t)."""
    means: torch.Tensor
    std: float

    def denoiser(self, x, s, a=1.0):
        """E[x_0 | x_t = x] exactly: each Gaussian's posterior mean, by its posterior. (B, D) -> (B, D)"""
        var = (a * self.std)**2 + s**2
        logits = (a * x @ self.means.T - a**2 * (self.means**2).sum(1) / 2) / var  # |x|^2 cancels
        return (s**2 * logits.softmax(1) @ self.means + a * self.std**2 * x) / var

    def score(self, x, s, a=1.0):
        """grad log p_t(x), from the denoiser: (B.3) for any a. (B, D) -> (B, D)"""
        return (a * self.denoiser(x, s, a) - x) / s**2

    def sample(self, n, generator=None):
        """-> (n, D) exact samples of p_0."""
        where = {"device": self.means.device, "generator": generator}
        which = torch.randint(len(self.means), (n,), **where)
        return self.means[which] + self.std * torch.randn(n, self.means.shape[1], **where)


def polar(radius, angle):
    return torch.view_as_real(torch.polar(radius, angle))  # (K,), (K,) -> (K, 2)


def make_mixture(name, device="cpu"):
    half_turn, arm = torch.linspace(0, math.pi, 24), torch.linspace(0.04, 1, 48).sqrt()
    moon = 0.8 * polar(torch.ones(24), half_turn) - torch.tensor([0.4, 0.2])
    means, std = {"ring": (polar(torch.ones(8), torch.arange(8) * math.pi / 4), 0.1),
                  "grid": (torch.cartesian_prod(*[torch.linspace(-1, 1, 3)] * 2), 0.1),
                  "spiral": (polar(1.2 * arm, 3 * math.pi * arm), 0.05),
                  "moons": (torch.cat([moon, -moon]), 0.06)}[name]
    return Mixture(means.to(device), std)


# ---- A. The theorem ----
# With N fixed latents the student's p_t is a mixture of N Gaussians around the g(z_i). So its score is exact,
# and both sides of (3.6) are means over i of integrals over eps.
PROCESSES = {"VE": lambda t: (1.0, t), "VP": lambda t: ((1 + t**2)**-0.5, t * (1 + t**2)**-0.5)}  # (a, s)
THEOREM = [("l2", {}, 2), ("power", {"alpha": 4}, 2), ("exp", {"alpha": 2, "beta": 0.1}, 2),  # ..., D
           ("smoothl1", {"scale": 0.5}, 2), ("phuber", {"c": 0.5}, 2), ("phuber", {"c": 0.001}, 1),
           ("huber", {"delta": 0.7}, 2), ("l1", {}, 2)]


def sim_loss_score(s_psi, s_q, x_0, a, s, distance, eps):
    """(3.7) as printed, in scores, for x_t = a x_0 + s eps. -> (loss (B,), y_t detached)"""
    x_t = a * x_0 + s * eps
    s_p = s_psi(x_t, s, a)
    y_t = s_p - s_q(x_t, s, a)
    return -batch_sum(distance.d_prime(y_t) * (s_p + eps / s)), y_t.detach()  # grad log q = -eps / s


def backpropagate_d(d_psi, d_q, x_0, t, distance, eps):
    """What (3.3) seems to ask for: its value, differentiated. -> (loss (B,), y_t detached)"""
    x_t = diffuse(x_0, t, eps)
    y_t = d_psi(x_t, t) - d_q(x_t, t)
    return distance.d(y_t), y_t.detach()


WRONG = {  # sim_loss with one thing wrong: what the theorem's "nothing detached" is worth
    "d' detached": lambda d_psi, d_q, x_0, t, distance, eps: sim_loss(
        d_psi, d_q, x_0, t, Distance(distance.d, lambda y: distance.d_prime(y.detach())), eps),
    "d_q detached": lambda d_psi, d_q, x_0, t, distance, eps: sim_loss(
        d_psi, lambda x_t, t: d_q(x_t, t).detach(), x_0, t, distance, eps),
    "d(y) back-propagated": backpropagate_d}


def small_generator(dim):
    """-> g, a tanh network; 4 latents for it; a teacher (D = dim). Any would do. All in float64."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = random(4, 2)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
    for weights in g.parameters():
        weights.data = 0.5 * random(weights.shape)
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.7], [0.3, -1.2], [-0.8, -0.6]], dtype=torch.float64)
    return g, z, Mixture(means[:, :dim], 0.4)


def trapezoid(dim, nodes, reach=8.5):
    """-> eps (M, dim), weights (M,) of E over N(0, I): exponentially accurate for smooth integrands."""
    axis = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return eps, torch.softmax(-(eps**2).sum(1) / 2, dim=0)


def theorem_error(t, process, space, distance, dim, nodes, loss=sim_loss):
    """|left - right| / |left| of (3.6), both as gradients with respect to all weights of g."""
    g, z, teacher = small_generator(dim)
    (a, s), (eps, weights) = PROCESSES[process](t), trapezoid(dim, nodes)
    x = g(z)
    atoms = x.detach().requires_grad_()
    p, p_sg, q = [getattr(m, space) for m in (Mixture(atoms, 0.0), Mixture(x.detach(), 0.0), teacher)]
    left, right = torch.zeros_like(x), torch.zeros_like(x)  # gradients with respect to the atoms
    for x_0 in atoms:
        x_t = (a * x_0 + s * eps).detach()  # pi_t = p_sg[theta],t: only the score depends on theta
        left += torch.autograd.grad(weights @ distance.d(p(x_t, s, a) - q(x_t, s, a)), atoms)[0]  # (3.5)
        x_0 = x_0.expand_as(eps)
        value, _ = (loss(p_sg, q, x_0, s, distance, eps) if space == "denoiser" else
                    sim_loss_score(p_sg, q, x_0, a, s, distance, eps))
        right += torch.autograd.grad(weights @ value, atoms)[0]
    gradient = lambda side: torch.autograd.grad(x, g.parameters(), side, retain_graph=True)
    left, right = [nn.utils.parameters_to_vector(gradient(side)) for side in (left, right)]
    return ((left - right).norm() / left.norm()).item()


def theorem(thorough=False):
    """(3.6) for every distance, process and time; beside it, what is wrong. -> the rows of theorem.json"""
    forms = (("VE", "denoiser"), ("VE", "score"), ("VP", "score"))
    cases = [(*case, *form, "theorem", sim_loss) for case in THEOREM for form in forms]
    cases += [(*case, *forms[0], *wrong) for case in (THEOREM[0], THEOREM[4]) for wrong in WRONG.items()]
    times = (0.3, 0.5, 1.0, 2.5, 5.0) if thorough else (0.5, 1.0, 2.5)
    nodes = {1: 800_001, 2: 601} if thorough else {1: 80_001, 2: 289}
    print("Theorem 3.1: |left - right| / |left| of (3.6)".ljust(66), *[f"t = {t:<7}" for t in times], sep="")
    rows = []
    for name, params, dim, process, space, variant, loss in cases:
        for t in times:
            a, s = PROCESSES[process](t)
            unit = a / s**2 if space == "score" else 1.0  # y_score = (a / s^2) y_denoiser: scales go with y
            scaled = {k: v * unit if k in ("c", "scale", "delta") else v for k, v in params.items()}
            error = theorem_error(t, process, space, DISTANCES[name](**scaled), dim, nodes[dim], loss)
            rows.append({"process": process, "space": space, "distance": name, "params": scaled, "t": t,
                         "dim": dim, "variant": variant, "relative_error": error})
        label = f"{process} {space:9}{dim}-D {name} {' '.join(f'{k}={v}' for k, v in params.items())}"
        errors = [f"{row['relative_error']:<11.1e}" for row in rows[-len(times):]]
        print(label.ljust(43), variant.ljust(23), *errors, sep="", flush=True)
    print("l1 fails since sign(y_i) jumps at 0: (3.6) needs the jump, and autograd has 0 for its derivative.")
    return rows


# ---- B. Distillation ----
NET_ARGS = {"dim": 2, "width": 64, "depth": 4, "waves": 16}
make_denoiser = lambda **net_args: EDMPrecond(MLP(**net_args))


def pretrain(mixture, args):
    """A denoiser of the mixture, by dsm_loss: what g and d_psi start from, and d_q with --teacher learned."""
    net = make_denoiser(**NET_ARGS).to(mixture.means.device)
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    print(f"pretraining a denoiser of the {args.mixture}: {args.pretrain_steps} steps", flush=True)
    for step in tqdm(range(args.pretrain_steps), disable=None):
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / args.pretrain_steps)
        x_0 = mixture.sample(args.batch)
        loss = dsm_loss(net, x_0, p_edm((args.batch, 1), device=x_0.device)).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return net


def prepare(args, folder, mixture):
    """The parts of a run: new, or as ckpt.pt has them."""
    torch.manual_seed(args.seed)
    checkpoint, device = folder / "ckpt.pt", mixture.means.device
    net = make_denoiser(**NET_ARGS).to(device) if checkpoint.exists() else pretrain(mixture, args)
    d_psi, g, g_ema, d_q = [copy.deepcopy(net) for _ in range(4)]
    for frozen in (g_ema, d_q):
        frozen.eval().requires_grad_(False)
    opt_psi, opt_theta = [torch.optim.Adam(net.parameters(), betas=(0.0, 0.999), fused=True)  # Table 5
                          for net in (d_psi, g)]
    parts = {"d_psi": d_psi, "g": g, "g_ema": g_ema, "opt_psi": opt_psi, "opt_theta": opt_theta,
             "log": Log(folder / "log.jsonl", args.steps), "d_q": d_q}
    resume(folder, parts)
    return parts


def train(args, d_q, parts, report):
    """Algorithm 2, up to args.steps updates of g; report() is called after each."""
    d_psi, g, g_ema, opt_psi, opt_theta, log, _ = parts.values()
    device = next(g.parameters()).device
    distance = make_distance(args)
    generator_loss = make_generator_loss(args, distance)
    weight_psi, rows = lambda_edm, args.batch  # samples in an update
    times = make_times(args)

    def draw(phase):  # -> [(z, t, eps, cond)], the micro-batches; points come without a condition
        where = {"device": device, "generator": random}
        z, eps = args.t_star * torch.randn(args.batch, 2, **where), torch.randn(args.batch, 2, **where)
        return [(z, times[phase]((args.batch, 1), **where), eps, None)]

    def generate(g, z, cond):
        return g(z, args.t_star)  # (B.4)

    def given(denoiser, cond):  # -> (x_t, t) -> denoised, the condition closed over
        return denoiser

    while log.step < args.steps:
        for optimiser in (opt_psi, opt_theta):
            optimiser.param_groups[0]["lr"] = annealed(args, log.step)
        random = seed_step(args.seed, log.step, device)
        # ---- Algorithm 2: begin ----
        train_only(d_psi, frozen=g)
        for _ in range(args.psi_updates):
            opt_psi.zero_grad()
            for z, t, eps, cond in accumulate(d_psi, draw("psi")):
                with torch.no_grad():
                    x_0 = generate(g, z, cond)
                loss_psi = dsm_loss(given(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                log.add(loss_psi=loss_psi)
                (loss_psi.sum() / rows).backward()
            opt_psi.step()

        train_only(g, frozen=d_psi)
        opt_theta.zero_grad()
        for z, t, eps, cond in accumulate(g, draw("theta")):
            x_0 = generate(g, z, cond)
            loss_theta, y_t = generator_loss(given(d_psi, cond), given(d_q, cond), x_0, t, eps=eps)  # (B.13)
            log.add(loss_theta=loss_theta, divergence=distance.d(y_t), y_norm=batch_sum(y_t**2).sqrt())
            (loss_theta.sum() / rows).backward()
        opt_theta.step()
        ema_update(g_ema, g, ema_beta(log.step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        log.advance()
        report()


@torch.no_grad()
def look(args, folder, mixture, g, log):
    """A log line and a picture of the generator so far."""
    random = torch.Generator(mixture.means.device).manual_seed(0)  # the same latents and data each time
    z = torch.randn(10_000, 2, device=mixture.means.device, generator=random)
    x, data = g(args.t_star * z, args.t_star), mixture.sample(10_000, random)
    log.write(sw2=sliced_w2(projections(x, 20), projections(data, 20)))
    picture = image_grid(panel(mixture, x, f"step {log.step}")[None])
    save_picture(picture, folder / "samples" / f"{log.step:06}.png")


# ---- Measures and pictures ----
def mode_shares(x, mixture):
    """-> the share of x (N, 2) within 4 std of a mode; a list of the shares nearest to each mode."""
    distance, nearest = torch.cdist(x, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=len(mixture.means)) / len(x)
    return (distance < 4 * mixture.std).float().mean().item(), shares.tolist()


def projections(x, directions=200):
    """x (N, 2) projected on directions all around, (N, directions), each projection sorted."""
    around = polar(torch.ones(directions), math.pi * torch.arange(directions) / directions)
    return (x @ around.T.to(x)).sort(dim=0)[0]


def sliced_w2(a, b):
    """The sliced Wasserstein-2 distance of two sets, from their projections."""
    return (a - b).square().mean().sqrt().item()


@torch.no_grad()
def evaluate(args, mixture, g, d_q, seconds, n=10_000, sets=8):
    """Exact, the teacher's and one-step samples, against exact ones in pairs of sets. -> metrics, samples"""
    random = torch.Generator(mixture.means.device).manual_seed(1)
    normal = partial(torch.randn, n, 2, device=mixture.means.device, generator=random)
    points = {"_exact": [mixture.sample(n, random) for _ in range(sets)],
              "_teacher": [edm_sampler(d_q, normal()) for _ in range(sets)],
              "": [g(args.t_star * normal(), args.t_star) for _ in range(sets)]}
    lines = {end: [projections(x) for x in many] for end, many in points.items()}
    metrics = {key: getattr(args, key) for key in ("method", "distance", "mixture", "seed", "steps")}
    metrics["seconds"] = round(seconds, 1)
    for end, many in points.items():
        w2 = [sliced_w2(lines[end][i], lines["_exact"][j]) for i in range(sets) for j in range(i)]
        metrics[f"share_on_modes{end}"], metrics[f"mode_shares{end}"] = mode_shares(torch.cat(many), mixture)
        metrics[f"sw2{end}"] = sum(w2) / len(w2)
    return metrics, [many[0] for many in points.values()]


def panel(mixture, x, title):
    """Up to 4000 of the samples x (N, 2) over the mixture's density. -> uint8 (3, H, W)"""
    reach = mixture.means.abs().max().item() + 6 * mixture.std
    axis = torch.linspace(-reach, reach, 160)
    square = torch.cdist(torch.cartesian_prod(axis, axis), mixture.means.cpu())**2
    density = torch.exp(-square / (2 * mixture.std**2)).sum(1).reshape(160, 160).T.numpy()
    figure = Figure(figsize=(3.6, 3.9), dpi=100)
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.89))
    axes.imshow(density, extent=(-reach, reach) * 2, origin="lower", cmap="Blues", vmax=1.5 * density.max())
    axes.scatter(*x[:4000].cpu().numpy().T, s=3, c="#d1495b", alpha=0.4, linewidths=0)
    axes.set(xlim=(-reach, reach), ylim=(-reach, reach), xticks=[], yticks=[])
    axes.set_title(title, fontsize=11)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return torch.from_numpy(np.array(canvas.buffer_rgba())[..., :3]).permute(2, 0, 1)


def distil(args, folder, mixture):
    """B as a whole: train, measure, draw."""
    (folder / "samples").mkdir(exist_ok=True)
    parts, stop = prepare(args, folder, mixture), Stop()
    g, log, d_q = parts["g_ema"], parts["log"], mixture.denoiser if args.teacher == "exact" else parts["d_q"]

    def keep(name):
        save_generator(folder / name, g, NET_ARGS, args.t_star, mixture=args.mixture, step=log.step)

    def report():
        if log.step in {round(args.steps * (i / 60)**2) for i in range(61)}:  # often at first
            look(args, folder, mixture, g, log)
        save_if_due(args, folder, parts, stop, keep)

    if log.new:
        report()
    train(args, d_q, parts, report)
    keep("g_ema.pt")  # again, should it have been lost
    m, samples = evaluate(args, mixture, g, d_q, log.elapsed())
    save(m, folder / "metrics.json")
    titles = {"_exact": "data", "_teacher": "teacher, 35 evaluations", "": "one step"}
    panels = torch.stack([panel(mixture, x, title) for x, title in zip(samples, titles.values())])
    save_picture(image_grid(panels, columns=3), folder / "samples.png")
    frames = [Image.open(path) for path in sorted((folder / "samples").glob("[0-9]*.png"))]
    save_picture(frames[0], folder / "animation.gif", frames[1:])
    plot_log(folder / "divergence.png", log.read(), {"divergence": "E d(y), the estimate of (3.3)",
                                                     "sw2": "sliced Wasserstein-2 to exact samples"})
    print(f"{m['seconds']:.0f} s".ljust(25) + "on modes  share of each mode  sliced W2")
    for end, title in titles.items():
        shares, on_modes, sw2 = [m[key + end] for key in ("mode_shares", "share_on_modes", "sw2")]
        print(f"{title:25}{on_modes:8.1%}  {min(shares):6.1%} to {max(shares):.1%}     {sw2:.4f}")
    print(f"pictures: {folder}/samples.png, animation.gif, divergence.png")
    print(f"next: python 01_toy_2d.py --sample {folder} --n 5000")


def sample(args):
    """--sample: n points of a trained generator as array and picture, beside the checkpoint or in --out."""
    g, t_star, meta = load_generator(args.sample, make_denoiser)
    with blame(f"{args.sample} is no generator of this stage ({{}})"):
        mixture, path = make_mixture(meta["mixture"]), Path(args.sample)
    x = g(t_star * torch.randn(args.n, 2, generator=torch.Generator().manual_seed(args.seed)), t_star)
    folder = Path(args.out or (path if path.is_dir() else path.parent))
    folder.mkdir(parents=True, exist_ok=True)
    name = folder / f"drawn-{args.n}-seed-{args.seed}"
    with atomic(f"{name}.npy") as temporary:
        np.save(temporary, x.numpy())
    save_picture(image_grid(panel(mixture, x, f"{args.n} samples, one step")[None]), f"{name}.png")
    print(f"{mode_shares(x, mixture)[0]:.1%} of {args.n} samples lie on a mode: {name}.npy, {name}.png")


# ---- The command line ----
def parse(argv):
    parser = Parser(__doc__)
    parser.add_argument("--part", choices=("both", "theorem", "distil"), default="both", help="A, B or both")
    parser.add_argument("--thorough", action="store_true", help="A at more times, on finer grids: minutes")
    parser.add_argument("--mixture", choices=("ring", "grid", "spiral", "moons"), default="ring", help="data")
    parser.add_argument("--teacher", choices=("exact", "learned"), default="exact", help="or an MLP")
    parser.add_argument("--p-theta", choices=("lognormal", "karras"), default="lognormal",
                        help="g's times: (B.10) or (B.8)")
    parser.add_argument("--pretrain-steps", type=number(int), default=3000, help="of the first denoiser")
    add_method_arguments(parser)
    add_run_arguments(parser, method="sim", sid_alpha=1.0, steps=4000, batch=1024, lr=2e-3, anneal="linear",
                      t_star=2.5, p_mean=-1.5, p_std=1.5, psi_mean=-1.2, psi_std=1.2, psi_updates=1,
                      ema_half_life=7e4, save_every=500, n=10_000)  # measured on the ring
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    torch.set_num_threads(min(2, torch.get_num_threads()))  # more only slow networks this small down
    if args.sample is not None:
        return sample(args)
    device, _ = pick_device(args.device), make_distance(args)  # mistakes stop here
    args.out = args.out or f"runs/toy_2d-{args.method}-{args.distance}-{args.seed}"
    ignore = ("out", "fresh", "device", "save_every", "part", "thorough", "sample", "n")
    folder = open_run(args, ignore)
    if args.part == "theorem" or args.part == "both" and not (folder / "theorem.json").exists():
        save(theorem(args.thorough), folder / "theorem.json")
    if args.part != "theorem":
        distil(args, folder, make_mixture(args.mixture, device))


if __name__ == "__main__":
    main()
