"""Stage 1: Score Implicit Matching where all can be checked: points in the plane, exact scores.

    python 01_toy_2d.py                                     both parts, about a minute on two cores
    python 01_toy_2d.py --mixture spiral --distance l2
    python 01_toy_2d.py --sample runs/ring-sim-phuber-0 --n 5000

A. Theorem 3.1 to machine precision: both sides of (3.6), as gradients of a network's weights, by
   quadrature. Expect relative errors below 1e-10, except for huber (a kink: 1e-4) and l1 (a jump:
   0.3). The wrong variants are off by 0.1 to 1.
B. Algorithm 2: a diffusion model of a Gaussian mixture, 35 evaluations for a sample, becomes a
   one-step generator. Expect 99 % of its samples on the modes, an equal share on each.
"""
import copy
import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import nn

from common import (DISTANCES, Distance, EDMPrecond, Run, atomic, batch_sum, count, diffuse,
                    draw_batch, dsm_loss, edm_sampler, ema_beta, ema_update, lambda_edm,
                    load_generator, make_generator_loss, make_parser, make_parts, one_line_errors,
                    p_edm, pick_device, progress, reading, sample_path, save, save_picture,
                    seed_step, sim_loss, sliced_w2, train_only, update)

# What Algorithm 2 needs for these mixtures, measured on the ring. Stage 2 has the paper's settings.
RING = {"method": "sim", "sid_alpha": 1.0, "steps": 4000, "batch": 1024, "lr": 2e-3,
        "anneal": "linear", "t_star": 2.5, "p_mean": -1.5, "p_std": 1.5, "psi_mean": -1.2,
        "psi_std": 1.2, "t_min": 0.0, "t_max": 1e9, "psi_updates": 1, "ema_half_life": 7e4,
        "save_every": 500, "log_every": 1000, "n": 10_000}
LOOKS = 60  # at the generator during a run: the frames of the animation


# ---- Gaussian mixtures: the teacher and, with std = 0, the student of the theorem ----
@dataclass
class Mixture:
    """Equal Gaussians of means (K, D) and one std; x_t = a x_0 + s eps (paper: x_0 + t eps)."""
    means: torch.Tensor
    std: float

    def denoiser(self, x, s, a=1.0):
        """E[x_0 | x_t = x] exactly, (B, D) -> (B, D). Each Gaussian's has its posterior weight."""
        var = (a * self.std)**2 + s**2
        # The term |x|^2 of each log-density is the same for all Gaussians, and cancels.
        logits = (a * x @ self.means.T - a**2 * (self.means**2).sum(1) / 2) / var
        posterior = logits.T.softmax(0).T  # softmax(1) is slow where rows are as short as here
        return (s**2 * posterior @ self.means + a * self.std**2 * x) / var

    def score(self, x, s, a=1.0):
        """grad log p_t(x), from the denoiser: (B.3) for any a. (B, D) -> (B, D)"""
        return (a * self.denoiser(x, s, a) - x) / s**2

    def sample(self, n, generator=None):
        """-> (n, D), exact samples of p_0."""
        where = {"device": self.means.device, "generator": generator}
        component = torch.randint(len(self.means), (n,), **where)
        return self.means[component] + self.std * torch.randn(n, self.means.shape[1], **where)


def polar(radius, angle):
    return torch.view_as_real(torch.polar(radius, angle))  # (K,), (K,) -> (K, 2)


arm = torch.linspace(0.04, 1, 48).sqrt()
moon = 0.8 * polar(torch.ones(24), torch.linspace(0, math.pi, 24)) - torch.tensor([0.4, 0.2])
MIXTURES = {  # means (K, 2) and std: to add a mixture, add a line
    "ring": (polar(torch.ones(8), torch.arange(8) * math.pi / 4), 0.1),
    "grid": (torch.cartesian_prod(*[torch.linspace(-1, 1, 3)] * 2), 0.1),
    "spiral": (polar(1.2 * arm, 3 * math.pi * arm), 0.05),
    "moons": (torch.cat([moon, -moon]), 0.06)}


def make_mixture(name, device="cpu"):
    means, std = MIXTURES[name]
    return Mixture(means.to(device), std)


# ---- A. The theorem ----
# With N fixed latents, the student's p_t is a mixture of N Gaussians around the points g(z_i). Its
# score is a closed form, and both sides of (3.6) are means over i of integrals over eps.
PROCESSES = {"VE": lambda t: (1.0, t),  # t -> a, s
             "VP": lambda t: ((1 + t**2)**-0.5, t * (1 + t**2)**-0.5)}
THEOREM = [("l2", {}, 2), ("power", {"alpha": 4}, 2), ("exp", {"alpha": 2, "beta": 0.1}, 2),
           ("smoothl1", {"scale": 0.5}, 2), ("phuber", {"c": 0.5}, 2), ("phuber", {"c": 0.001}, 1),
           ("huber", {"delta": 0.7}, 2), ("l1", {}, 2)]  # distance, its parameters, dimension


def sim_loss_score(s_psi, s_q, x_0, a, s, distance, eps):
    """(3.7) as printed, for scores and x_t = a x_0 + s eps. -> loss (B,); y_t detached"""
    x_t = a * x_0 + s * eps
    student, grad_log_q = s_psi(x_t, s, a), -eps / s  # of q(x_t | x_0)
    y_t = student - s_q(x_t, s, a)
    return -batch_sum(distance.d_prime(y_t) * (student - grad_log_q)), y_t.detach()


def backpropagate_d(d_psi, d_q, x_0, t, distance, eps=None):
    """What (3.3) seems to ask for: its value, differentiated. -> loss (B,); y_t detached"""
    x_t = diffuse(x_0, t, eps)
    y_t = d_psi(x_t, t) - d_q(x_t, t)
    return distance.d(y_t), y_t.detach()


def d_prime_detached(d_psi, d_q, x_0, t, distance, eps=None):
    """sim_loss without a gradient through d'(y_t)."""
    detached = Distance(distance.d, lambda y: distance.d_prime(y.detach()))
    return sim_loss(d_psi, d_q, x_0, t, detached, eps)


def d_q_detached(d_psi, d_q, x_0, t, distance, eps=None):
    """sim_loss without a gradient through the teacher."""
    return sim_loss(d_psi, lambda x_t, t: d_q(x_t, t).detach(), x_0, t, distance, eps)


WRONG = {"d_prime_detached": d_prime_detached, "d_q_detached": d_q_detached,
         "d_backpropagated": backpropagate_d}  # what the theorem's "nothing is detached" is worth


def small_generator(dim):
    """-> a tanh network g, four latents for it, and a teacher in dim dimensions. All in float64."""
    random = partial(torch.randn, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = random(4, 2)
    g = nn.Sequential(nn.Linear(2, 16), nn.Tanh(), nn.Linear(16, dim)).double()
    for weights in g.parameters():
        weights.data = 0.5 * random(weights.shape)
    means = torch.tensor([[1.0, 1.0], [-1.0, 0.7], [0.3, -1.2], [-0.8, -0.6]], dtype=torch.float64)
    return g, z, Mixture(means[:, :dim], 0.4)


def trapezoid(dim, nodes, reach=8.5):
    """-> eps (M, dim) and weights (M,) of a mean over N(0, I), with an error that falls
    exponentially with the number of nodes for smooth integrands that vanish at the ends."""
    axis = torch.linspace(-reach, reach, nodes, dtype=torch.float64)
    eps = torch.cartesian_prod(*[axis] * dim).reshape(-1, dim)
    return eps, torch.softmax(-(eps**2).sum(1) / 2, dim=0)


def theorem_error(t, process, space, distance, dim, nodes, loss=sim_loss, moving=False):
    """The relative error |left - right| / |left| of (3.6), both sides as gradients with respect to
    all weights of g. `space` says what the networks return: "denoiser" or "score". With `moving`
    the left side is the gradient of the whole divergence, in which theta moves the x_t too."""
    g, z, teacher = small_generator(dim)
    (a, s), (eps, weights) = PROCESSES[process](t), trapezoid(dim, nodes)
    g_of_z = g(z)
    points = g_of_z.detach().requires_grad_()
    mixtures = Mixture(points, 0.0), Mixture(points.detach(), 0.0), teacher
    student, frozen_student, teacher = [
        mixture.denoiser if space == "denoiser" else mixture.score for mixture in mixtures]
    left_at_points, right_at_points = torch.zeros_like(points), torch.zeros_like(points)
    for x_0 in points:
        x_t = a * x_0 + s * eps
        x_t = x_t if moving else x_t.detach()  # in (3.5) theta moves the score, and not the x_t
        divergence = weights @ distance.d(student(x_t, s, a) - teacher(x_t, s, a))
        left_at_points += torch.autograd.grad(divergence, points)[0]
        x_0 = x_0.expand_as(eps)
        if space == "denoiser":
            values, _ = loss(frozen_student, teacher, x_0, s, distance, eps)
        else:
            values, _ = sim_loss_score(frozen_student, teacher, x_0, a, s, distance, eps)
        right_at_points += torch.autograd.grad(weights @ values, points)[0]
    to_weights = partial(torch.autograd.grad, g_of_z, list(g.parameters()), retain_graph=True)
    left, right = [nn.utils.parameters_to_vector(to_weights(at_points))
                   for at_points in (left_at_points, right_at_points)]
    return ((left - right).norm() / left.norm()).item()


def theorem(thorough=False):
    """(3.6) for every distance, process and time; then what is wrong. -> rows of theorem.json"""
    forms = (("VE", "denoiser"), ("VE", "score"), ("VP", "score"))
    cases = [(*case, *form, "theorem", sim_loss) for case in THEOREM for form in forms]
    variants = [*WRONG.items(), ("whole_gradient", sim_loss)]
    cases += [(*case, *forms[0], *variant) for case in (THEOREM[0], THEOREM[4])
              for variant in variants]
    times = (0.3, 0.5, 1.0, 2.5, 5.0) if thorough else (0.5, 1.0, 2.5)
    nodes = {1: 800_001, 2: 601} if thorough else {1: 80_001, 2: 289}
    print(f"{'Theorem 3.1: |left - right| / |left| of (3.6)':62}", *[f"t = {t:<7}" for t in times])
    rows = []
    for name, settings, dim, process, space, variant, loss in cases:
        for t in times:
            a, s = PROCESSES[process](t)
            # A difference of scores is a / s^2 times that of denoisers, and so is its scale.
            unit = a / s**2 if space == "score" else 1.0
            scaled = {key: value * unit if key in ("c", "scale", "delta") else value
                      for key, value in settings.items()}
            distance = DISTANCES[name](**scaled)
            error = theorem_error(t, process, space, distance, dim, nodes[dim], loss,
                                  moving=variant == "whole_gradient")
            rows.append({"process": process, "space": space, "distance": name, "params": scaled,
                         "t": t, "dim": dim, "variant": variant, "relative_error": error})
        parameters = " ".join(f"{key}={value}" for key, value in settings.items())
        label = f"{process} {space:8} {dim}-D {name} {parameters}"
        errors = [f"{row['relative_error']:<11.1e}" for row in rows[-len(times):]]
        print(f"{label:43} {variant:18}", *errors, flush=True)
    print("l1 fails since sign(y_i) jumps at 0: (3.6) needs the jump, autograd's derivative is 0.")
    print("whole_gradient: so far is (3.5), with x_t frozen, from the gradient of (3.3) itself.")
    return rows


# ---- B. Distillation ----
class MLP(nn.Module):
    """A perceptron of x (B, dim), c_noise (B,) or (1,), and cosines and sines of both -> (B, dim).
    Without the waves of x the network is too smooth for the fine structure of its own samples."""
    def __init__(self, dim=2, width=64, depth=4, waves=16):
        super().__init__()
        sizes = [dim + 2 * waves * (dim + 1)] + [width] * depth
        layers = [layer for a, b in zip(sizes, sizes[1:]) for layer in (nn.Linear(a, b), nn.SiLU())]
        self.layers = nn.Sequential(*layers, nn.Linear(width, dim))
        self.register_buffer("frequencies", math.pi * torch.linspace(0.25, 4, waves))

    def forward(self, x, c_noise):
        inputs = torch.cat([x, c_noise[:, None].expand(len(x), 1)], dim=1)  # (B, dim + 1)
        angles = (inputs[:, :, None] * self.frequencies).flatten(1)  # (B, (dim + 1) waves)
        return self.layers(torch.cat([x, angles.cos(), angles.sin()], dim=1))


def make_denoiser():
    return EDMPrecond(MLP())


def denoising_loss(net, x_0):
    return dsm_loss(net, x_0, p_edm((len(x_0), 1), device=x_0.device))  # (B.2)


def pretrain(args, net, mixture, loss_of=denoising_loss):
    """net learns the denoiser that g and d_psi start from, and that --teacher learned means."""
    optimiser = torch.optim.Adam(net.parameters(), fused=True)
    for step in progress(range(args.pretrain_steps), f"pretraining on the {args.mixture}"):
        loss_of(net, mixture.sample(args.batch)).mean().backward()
        optimiser.param_groups[0]["lr"] = 2e-3 * (1 - step / args.pretrain_steps)
        optimiser.step()
        optimiser.zero_grad()


def prepare(args, folder, net, net_args=None, **facts):
    """-> the run, new or as ckpt.pt has it. g and d_psi are copies of net, to be pretrained."""
    parts = make_parts(net)
    learned = copy.deepcopy(net).eval().requires_grad_(False)
    return Run(args, folder, {"mixture": args.mixture, **facts}, parts["g_ema"], net_args or {},
               **parts, learned=learned)


def train(args, d_q, run, evaluate):
    """Algorithm 2. d_q is frozen; d_psi and g started as copies of the pretrained denoiser."""
    d_psi, g, g_ema = run.d_psi, run.g, run.g_ema
    generator_loss, distance = make_generator_loss(args, WRONG)
    weight_psi, t_star, device = lambda_edm, args.t_star, next(g.parameters()).device
    draw = partial(draw_batch, args, (2,), 0)  # points in the plane, without classes
    bind = lambda denoiser, cond: denoiser  # -> (x_t, t) -> denoised; points have no condition

    for step in run.steps():
        random = seed_step(args.seed, step, device)
        fall = 1 - step / args.steps if args.anneal == "linear" else 1
        # ---- Algorithm 2: begin ----
        train_only(d_psi, frozen=g)
        for _ in range(args.psi_updates):
            for z, t, eps, cond in draw("psi", random):
                with torch.no_grad():
                    x_0 = bind(g, cond)(z, t_star)
                loss_psi = dsm_loss(bind(d_psi, cond), x_0, t, eps, weight_psi)  # (B.2)
                run.add(loss_psi=loss_psi)
                (loss_psi.sum() / args.batch).backward()
            update(run.opt_psi, (args.lr_psi or args.lr) * fall)

        train_only(g, frozen=d_psi)
        for z, t, eps, cond in draw("theta", random):
            x_0 = bind(g, cond)(z, t_star)  # (B.4), (B.15)
            loss_theta, y_t = generator_loss(bind(d_psi, cond), bind(d_q, cond), x_0, t, eps=eps)
            run.add(loss_theta=loss_theta, divergence=distance.d(y_t),
                    y_norm=y_t.flatten(1).norm(dim=1))
            (loss_theta.sum() / args.batch).backward()  # (B.13)
        update(run.opt_theta, args.lr * fall)
        ema_update(g_ema, g, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        # ---- Algorithm 2: end ----
        if run.due(args.log_every, LOOKS):
            run.write(**evaluate())


# ---- Measures and pictures ----
def mode_shares(x, mixture):
    """-> the share of x (N, 2) within 4 std of a mode; the shares nearest to each mode, a list."""
    distance, nearest = torch.cdist(x, mixture.means).min(1)
    shares = torch.bincount(nearest, minlength=len(mixture.means)) / len(x)
    return (distance < 4 * mixture.std).float().mean().item(), shares.tolist()


def projections(x, directions=200):
    """x (N, 2) -> (N, directions), the points projected on directions all around, each sorted."""
    around = polar(torch.ones(directions), math.pi * torch.arange(directions) / directions)
    lines = (x @ around.T.to(x)).cpu().numpy()
    return torch.from_numpy(np.sort(lines, axis=0))  # on a CPU NumPy sorts faster than torch


def measure(sets, exact_sets, mixture):
    """Sets of points against as many exact sets. sliced W2 is the mean over all pairs of sets with
    different numbers, so that exact sets, too, never meet themselves."""
    on_modes, shares = mode_shares(torch.cat(sets), mixture)
    lines, exact = [[projections(x) for x in group] for group in (sets, exact_sets)]
    pairs = [sliced_w2(lines[i], exact[j]) for i in range(len(sets)) for j in range(i)]
    return {"share_on_modes": on_modes, "mode_shares": shares, "sw2": sum(pairs) / len(pairs)}


def panel(mixture, x, title, size=360):
    """Up to 4000 points x (N, 2), red, over the mixture's density, blue. -> a Pillow image"""
    reach = mixture.means.abs().max().item() + 6 * mixture.std
    axis = torch.linspace(-reach, reach, size)
    grid = torch.cartesian_prod(-axis, axis).flip(1)  # row by row from the top, (x, y)
    density = torch.exp(-torch.cdist(grid, mixture.means.cpu())**2 / (2 * mixture.std**2)).sum(1)
    blue = density.reshape(size, size, 1) / density.max() * torch.tensor([0.62, 0.44, 0.2])
    x = x[:4000].cpu().numpy()
    points, _, _ = np.histogram2d(-x[:, 1], x[:, 0], size, [[-reach, reach]] * 2)  # row, column
    points = nn.functional.max_pool2d(torch.from_numpy(points)[None], 3, 1, 1)  # 3 x 3 a point
    opacity = 1 - 0.6**points[0, :, :, None]
    rgb = (1 - blue) * (1 - opacity) + torch.tensor([0.82, 0.29, 0.36]) * opacity
    picture = Image.new("RGB", (size, size + 26), "white")
    picture.paste(Image.fromarray((255 * rgb).byte().numpy()), (0, 26))
    ImageDraw.Draw(picture).text((size // 2, 13), title, "black", anchor="mm", font_size=15)
    return picture


def one_step(g, z, t_star):
    """(B.4): z (N, 2) standard normal -> (N, 2)"""
    return g(t_star * z, t_star)


def distil(args, run, mixture, net, train=train, pretrain=pretrain, sample=one_step):
    """B as a whole: pretrain, train, measure, draw. lab/neighbours.py brings other functions."""
    torch.set_num_threads(1)  # two threads gain little, and wait long if another program is busy
    g, device = run.g_ema, mixture.means.device
    if run.step == 0:
        pretrain(args, net, mixture)
        for part in (run.d_psi, run.g, run.g_ema, run.learned):
            part.load_state_dict(net.state_dict())
    d_q = mixture.denoiser if args.teacher == "exact" else run.learned

    random = torch.Generator(device).manual_seed(0)
    z = torch.randn(10_000, 2, device=device, generator=random)
    exact = projections(mixture.sample(10_000, random), 20)

    @torch.no_grad()
    def evaluate():
        """A picture and the sliced W2 of 10,000 points, from the same latents at each look."""
        x = sample(g, z, args.t_star)
        picture = panel(mixture, x, f"step {run.step}")
        save_picture(picture, run.folder / "samples" / f"{run.step:06}.png")
        return {"sw2": sliced_w2(projections(x, 20), exact)}

    if run.step == 0 and run.is_first:
        run.write(**evaluate())
    train(args, d_q, run, evaluate)
    if run.is_first:
        summarise(run, mixture, d_q, partial(sample, g, t_star=args.t_star))


@torch.no_grad()
def summarise(run, mixture, d_q, student, n=10_000, sets=8):
    """metrics.json, samples.png, animation.gif, and what they say."""
    random = torch.Generator(mixture.means.device).manual_seed(1)
    normal = partial(torch.randn, n, 2, device=mixture.means.device, generator=random)
    exact = [mixture.sample(n, random) for _ in range(sets)]
    teacher = [edm_sampler(d_q, normal()) for _ in range(sets)]
    samples = {"data": exact, "teacher, 35 evaluations": teacher,
               "generator": [student(normal()) for _ in range(sets)]}
    results = {name: measure(group, exact, mixture) for name, group in samples.items()}
    figures = {f"{key}_teacher": v for key, v in results["teacher, 35 evaluations"].items()}
    figures |= {f"{key}_exact": v for key, v in results["data"].items()}
    panels = [np.array(panel(mixture, group[0], name)) for name, group in samples.items()]
    save_picture(Image.fromarray(np.hstack(panels)), run.folder / "samples.png")
    paths = sorted((run.folder / "samples").glob("[0-9]*.png"))
    if frames := [Image.open(path, formats=["PNG"]) for path in paths]:  # or samples/ is gone
        save_picture(frames[0], run.folder / "animation.gif", frames[1:])
    seconds = run.finish(**results["generator"], **figures)["seconds"]
    print(f"{seconds:.0f} s".ljust(25) + "on modes  share of each mode  sliced W2")
    for name, r in results.items():
        low, high = min(r["mode_shares"]), max(r["mode_shares"])
        print(f"{name:25}{r['share_on_modes']:8.1%}  {low:6.1%} to {high:.1%}     {r['sw2']:.4f}")
    print(f"pictures: {run.folder}/samples.png, animation.gif")


@torch.no_grad()
def sample(args, build=make_denoiser, sampler=one_step):
    """--sample: n points of a trained generator, as a picture (.png) and an array (.npz)."""
    g, t_star, meta = load_generator(args.sample, build)
    out = sample_path(args, args.sample)
    out = out if out.suffix else out / "samples.png"
    z = torch.randn(args.n, 2, generator=torch.Generator().manual_seed(args.seed))
    x = sampler(g, z, t_star)
    with reading(args.sample, "a generator of this stage"):
        mixture = make_mixture(meta["mixture"])
    with atomic(out.with_suffix(".npz")) as temporary:
        np.savez(temporary, one_step=x)
    save_picture(panel(mixture, x, f"{args.n} samples"), out.with_suffix(".png"))
    print(f"{mode_shares(x, mixture)[0]:.1%} of {args.n} samples lie on a mode: "
          f"{out.with_suffix('.npz')}, {out.with_suffix('.png')}")


# ---- The command line ----
def add_toy_options(parser, teachers=("exact", "learned")):
    """What this stage takes besides; lab/neighbours.py takes it too."""
    add = parser.add_argument
    add("--mixture", choices=MIXTURES, default="ring", help="the data")
    add("--teacher", choices=teachers, default="exact", help="exact scores, or a network")
    add("--pretrain-steps", type=count, default=3000, help="of the first denoiser")


def parse(argv):
    parser = make_parser(__doc__, WRONG, **RING)
    add_toy_options(parser)
    add = parser.add_argument
    add("--part", choices=("both", "theorem", "distil"), default="both", help="A, B or both")
    add("--thorough", action="store_true", help="A at more times, on finer grids: minutes")
    return parser.parse_args(argv)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.sample:
        return sample(args)
    device, folder = pick_device(args.device), Run.default_folder(args, args.mixture)
    if args.part == "theorem":
        folder.mkdir(parents=True, exist_ok=True)
        return save(theorem(args.thorough), folder / "theorem.json")
    torch.manual_seed(args.seed)
    net = make_denoiser().to(device)
    run = prepare(args, folder, net)
    if run.is_first and args.part == "both" and not (folder / "theorem.json").exists():
        with torch.random.fork_rng():  # the numbers that B draws are the same without A
            save(theorem(args.thorough), folder / "theorem.json")
    if not run.finished():
        distil(args, run, make_mixture(args.mixture, device), net)
        print(f"next: python 01_toy_2d.py --sample {folder} --n 5000")


if __name__ == "__main__":
    main()
