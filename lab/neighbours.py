"""Other ways to one and few steps, in stage 1's frame: the same networks, and as many updates.

    python lab/neighbours.py --method dmd      also add, cd, ct, mcm, pagoda, and with one change
                                               dmd_kl, dmd_pairs, cd_steps
    python lab/neighbours.py --method few      after SIM: also drifting, f_distill, realuid, reward,
                                               sida, uni; and kernel, which is ours
    python lab/neighbours.py --method mcm --segments 2
    python lab/neighbours.py --method sim --teacher flow
    python lab/neighbours.py --sample runs/ring-exact-dmd-phuber-0 --n 5000
    python lab/neighbours.py --gaussian gaussian.png

A run takes from half a minute to four minutes on one core. cd, cd_steps, ct, mcm and pagoda start
from t* = 80, and all others from SIM's t*. Plain distances stand for the papers' LPIPS.

Numbers in [] are equations of the notes "Distilled Diffusion Models" (July 2024). SiD is [83], and
Diff-Instruct is [63]. The notes' misprints: in [83] the first factor is reversed (x_psi - x_phi is
right, as in [82], where psi is the teacher); [76] lacks the squares; [67] and [71] have sigma^2 eps
for sigma eps; [55] has 1 - log D for log(1 - D).
"""
import importlib
import math
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from matplotlib.figure import Figure
from torch.nn import functional as F

from common import (Run, atomic, batch_sum, count, di_loss, diffuse, draw_times, dsm_loss,
                    edm_sampler, ema_beta, ema_update, heun, l2, lambda_edm, load_generator,
                    make_parser, nowgt, one_line_errors, parse_distance, phuber, pick_device,
                    positive, rank_and_ranks, reading, real, require, sampling_times,
                    seed_step, sid_loss, sidwgt, sim_loss, train_only, update)

from lab.wrappers import RectifiedFlow

toy = importlib.import_module("01_toy_2d")
STEPS = 18  # of a teacher's flow, or of a segment: CIFAR-10's N in Song et al. 2023, Table 3


# ---- A rectified flow as the teacher ----
class FlowPrecond(RectifiedFlow):
    """A velocity net(x, tau) of points in the plane, as a denoiser."""
    def __init__(self, net):
        super().__init__(net, image_shape=(2,))


def flow_loss(net, x_0):
    """Flow matching, in the place of dsm_loss: net.net learns the velocity. -> (B,)"""
    tau, eps = torch.rand_like(x_0[:, :1]), torch.randn_like(x_0)  # tau ~ U[0, 1]
    v = net.net((1 - tau) * x_0 + tau * eps, tau.flatten())
    return batch_sum((v - (eps - x_0))**2)


def make_denoiser(flow=False):
    return FlowPrecond(toy.MLP()) if flow else toy.make_denoiser()


# ---- The methods ----
def jump(denoise, x, t, b):
    """[51]: from time t to b on the straight line to the denoised x. b = 0 is denoise itself."""
    x_0 = denoise(x, t)
    return x_0 + b / t * (x - x_0)


def segment_starts(t_star, segments):
    """-> the times, from t* on, at which the segments of the flow begin."""
    return sampling_times(STEPS * segments + 1, sigma_max=t_star)[::STEPS][:segments]


def few_steps(g, z, t_star, segments=1):
    """Standard normal z (B, 2) -> samples, by `segments` evaluations of g; one is (B.4)."""
    starts, x = segment_starts(t_star, segments), t_star * z
    for t, b in zip(starts, [*starts[1:], 0.0]):
        x = jump(g, x, t, b)
    return x


class Neighbour:
    """A method: theta() is the loss (B,) of g, and psi(), where there is one, that of a second
    network d_psi. In each phase the other network is frozen. x is (B, *shape)."""
    psi, shape = None, (2,)

    def __init__(self, args, mixture, d_q, run):
        self.args, self.mixture, self.d_q = args, mixture, d_q
        self.d_psi, self.g = run.d_psi, run.g
        self.begin(args.steps)  # for what is drawn once, which shares its numbers with no update

    def device(self):
        return self.mixture.means.device

    def begin(self, step):
        """What is drawn from now on depends on the seed and on `step` alone."""
        random = seed_step(self.args.seed, step, self.device())
        self.step, self.where = step, {"device": self.device(), "generator": random}

    def normal(self):
        return torch.randn(self.args.batch, *self.shape, **self.where)

    def data(self, batches=1):
        return self.mixture.sample(batches * self.args.batch, self.where["generator"])

    def time(self, phase="theta"):
        """The noise levels (B, 1, ...) of the stages' updates of g, or of d_psi."""
        return draw_times(self.args, phase, (self.args.batch, *[1] * len(self.shape)), **self.where)

    def generate(self, z):
        return toy.one_step(self.g, z, self.args.t_star)

    def pick(self):
        """Places in what was drawn once, (B,)."""
        return torch.randint(len(self.z), (self.args.batch,), **self.where)

    def grid(self, steps):
        """-> (steps + 1,) falling times of the flow, from t* to 0.002."""
        times = sampling_times(steps + 1, sigma_max=self.args.t_star)[:-1]
        return torch.tensor(times, device=self.where["device"])

    def logit(self, x):
        """The discriminator, x (B, 2) -> (B,): the first output of the second perceptron."""
        return self.d_psi.model(x, x.new_zeros(1))[:, 0]


class Matching(Neighbour):
    """SIM as stage 1 trains it, for the methods that change one thing of it."""
    def psi(self):
        x_0, t = self.generate(self.normal()), self.time("psi")
        return dsm_loss(self.d_psi, x_0, t, self.normal())

    def theta(self):
        return self.sim(self.generate(self.normal()), self.d_psi)

    def sim(self, x_0, d_psi):
        _, distance = parse_distance(self.args.distance)
        return sim_loss(d_psi, self.d_q, x_0, self.time(), distance, self.normal())[0]


class CD(Neighbour):
    """Consistency distillation (Song et al. 2023): |f(x_t, t) - f(x_s, s)|^2 [12]. The flow of the
    teacher leads x_t to x_s in one Heun step. The second f is detached and has no EMA. f(x, t) is
    jump(g, x, t, b) to the end b of all times, so that f(x, b) = x [8].

    In mcm, multistep consistency (Heek et al. 2024), b is the end of t's segment [52]. cd_steps is
    CD, sampled by several evaluations: Song et al. 2023, Algorithm 1."""
    def theta(self):
        steps = STEPS * (self.args.segments if self.args.method == "mcm" else 1)
        grid, i = self.grid(steps), torch.randint(steps, (self.args.batch, 1), **self.where)
        t, s, b = grid[i], grid[i + 1], grid[(i // STEPS + 1) * STEPS]
        x_t = diffuse(self.data(), t, self.normal())
        with torch.no_grad():
            target = jump(self.g, heun(self.d_q, x_t, [t, s]), s, b)
        return batch_sum((jump(self.g, x_t, t, b) - target)**2)


class CT(Neighbour):
    """Improved consistency training (Song and Dhariwal 2024), from scratch:
    d(f(x_0 + t eps, t) - f(x_0 + s eps, s)) / (t - s) [27]. The same eps makes an Euler step [20].
    The second f is detached and has no EMA [42]; d is Pseudo-Huber [43] with iCT's c. t and s
    are the ends of one step of the grid, drawn so that log t is about N(-1.1, 2^2). The grid has 10
    steps at first, and this number doubles seven times during the run."""
    def theta(self):
        grid = self.grid(10 * 2**int(8 * self.step / self.args.steps))
        share = torch.special.ndtr((grid.log() + 1.1) / 2).diff().abs()  # of N(-1.1, 2^2)
        i = torch.multinomial(share, self.args.batch, True, generator=self.where["generator"])
        t, s = grid[i, None], grid[i + 1, None]
        x_0, eps = self.data(), self.normal()
        with torch.no_grad():
            target = jump(self.g, diffuse(x_0, s, eps), s, grid[-1])
        y = jump(self.g, diffuse(x_0, t, eps), t, grid[-1]) - target
        return phuber(0.00054 * x_0.shape[1]**0.5).d(y) / (t - s).flatten()


class DMDKL(Matching):
    """The gradient of the KL divergence [63] with the weight sidwgt: one of DMD's two terms."""
    def theta(self):
        x_0, t = self.generate(self.normal()), self.time()
        return di_loss(self.d_psi, self.d_q, x_0, t, self.normal(), sidwgt)[0]


class DMDPairs(Neighbour):
    """0.25 |g(z) - x|^2, where x is the end of the teacher's flow from z: DMD's other term. The
    pairs (z, x) are made once."""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.z = torch.cat([self.normal() for _ in range(10)])
        self.x = edm_sampler(self.d_q, self.z)

    def theta(self):
        i = self.pick()
        return 0.25 * batch_sum((self.generate(self.z[i]) - self.x[i])**2)


class DMD(DMDPairs, DMDKL):
    """Distribution matching distillation (Yin et al. 2024): the sum of both terms. d_psi learns as
    in SIM [66]."""
    def theta(self):
        return DMDKL.theta(self) + DMDPairs.theta(self)


class ADD(Neighbour):
    """Adversarial diffusion distillation (Sauer et al. 2023): 2.5 |g(z) - d_q(x_t, t)|^2 [67] with
    d_q(x_t, t) detached [68], and a GAN with the hinge loss. The paper has three things more:
    diffused data as another input of g, the penalty R1 and a weight of t."""
    def psi(self):
        x, x_0 = self.data(), self.generate(self.normal())
        return F.relu(1 - self.logit(x)) + F.relu(1 + self.logit(x_0))

    def theta(self):
        x_0, t = self.generate(self.normal()), self.time()
        with torch.no_grad():
            target = self.d_q(diffuse(x_0, t, self.normal()), t)
        return 2.5 * batch_sum((x_0 - target)**2) - self.logit(x_0)


class PaGoDA(Neighbour):
    """PaGoDA (Kim et al. 2024) without its growing resolution: |x - g(E(x))|, where E(x) is the
    noise to which the teacher's flow leads data x, and a GAN [55], in which g minimises
    -log D(g(z)). The pairs (x, E(x)) are made once."""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.x = self.data(10)
        self.z = heun(self.d_q, self.x, self.grid(STEPS).flip(0)) / self.args.t_star

    def psi(self):
        x, x_0 = self.data(), self.generate(self.normal())  # -log D(x) - log(1 - D(x_0)):
        return F.softplus(-self.logit(x)) + F.softplus(self.logit(x_0))

    def theta(self):
        i, x_0 = self.pick(), self.generate(self.normal())
        return (self.generate(self.z[i]) - self.x[i]).norm(dim=1) + F.softplus(-self.logit(x_0))


# ---- After the paper ----
class Kernel(Matching):
    """SIM without d_psi: given x_t, the mean of a batch of g's samples is a closed form, a softmax
    of distances. No network follows g, so that no network lags behind g. Ours."""
    psi = None

    def theta(self):
        x_0 = self.generate(self.normal())
        return self.sim(x_0, toy.Mixture(x_0.detach(), 0.0).denoiser)


class Drifting(Neighbour):
    """Both denoisers in closed form, one over a batch of samples and one over a batch of data, and
    the gradient of Diff-Instruct: drifting (arXiv 2602.04770) with a Gaussian kernel of width t.
    There is no teacher: data take the teacher's place."""
    def theta(self):
        x_0, t = self.generate(self.normal()), self.time()
        student, data = [toy.Mixture(x, 0.0).denoiser for x in (x_0.detach(), self.data())]
        return di_loss(student, data, x_0, t, self.normal())[0]


class Reward(Matching):
    """Diff-Instruct* (arXiv 2410.20898): SIM's loss minus lambda times a reward of the sample, here
    r(x_0), its first coordinate, so that the right half of the plane is worth more. lambda is
    --reward."""
    def theta(self):
        x_0 = self.generate(self.normal())
        return self.sim(x_0, self.d_psi) - self.args.reward * x_0[:, 0]


class SiDA(Matching):
    """SIM and a GAN without a network of its own (SiDA, arXiv 2410.14919): the mean of what a layer
    inside d_psi returns for x_t is the logit of "x_t comes from data". As in the paper, the GAN's
    loss counts once for each number of x, and so keeps pace with SIM's sum."""
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.inner_layer().register_forward_hook(self.keep)

    def inner_layer(self):
        return self.d_psi.model.layers[-2]  # the last hidden layer of a perceptron

    def keep(self, layer, inputs, features):
        self.logits = features.flatten(1).mean(1)  # (B,), of the last x_t that d_psi has seen

    def gan(self, sign):  # -log of the probability of data (1) or of samples (-1)
        return 0.1 * math.prod(self.shape) * F.softplus(-sign * self.logits)  # 0.1 is ours

    def psi(self):
        loss = super().psi() + self.gan(-1)
        t = self.time("psi")
        self.d_psi(diffuse(self.data(), t, self.normal()), t)
        return loss + self.gan(1)

    def theta(self):
        return super().theta() + self.gan(1)  # of the x_t that d_psi has just seen


class RealUID(Neighbour):
    """Data without a discriminator (RealUID, arXiv 2509.22459, as denoisers): g minimises, and
    d_psi maximises, L(d_q) - L(d_psi), where L(d) = E alpha |d(x_t) - beta / alpha x_0|^2 over
    samples, plus the same over data with 1 - alpha and 1 - beta. Once samples are as data, d_psi
    is their denoiser. Without data, alpha = beta = 1, this is SiD with its alpha = 1/2."""
    alpha, beta = 0.94, 0.96  # ours

    def misfit(self, denoiser, x, t, eps, alpha, beta):
        return alpha * batch_sum((denoiser(diffuse(x, t, eps), t) - beta / alpha * x)**2)

    def psi(self):
        loss = 0.0
        for x, alpha, beta in ((self.generate(self.normal()), self.alpha, self.beta),
                               (self.data(), 1 - self.alpha, 1 - self.beta)):
            t, eps = self.time("psi"), self.normal()
            loss += lambda_edm(t).flatten() * self.misfit(self.d_psi, x, t, eps, alpha, beta)
        return loss

    def theta(self):
        batch = self.generate(self.normal()), self.time(), self.normal(), self.alpha, self.beta
        return self.misfit(self.d_q, *batch) - self.misfit(self.d_psi, *batch)


# The weight w(r) = r f''(r) of D_f(p | q) = E_q f(r), where r = p / q. Each function takes log r,
# since r itself is infinite in float32 for samples far from the data.
F_WEIGHTS = {
    "reverse_kl": torch.ones_like,                  # 1, of KL(p | q), f = r log r
    "forward_kl": lambda log_r: (-log_r).exp(),     # 1 / r, of KL(q | p), f = -log r
    "jeffreys": lambda log_r: 1 + (-log_r).exp(),   # 1 + 1 / r, of the sum of both
    "js": lambda log_r: torch.sigmoid(-log_r),      # 1 / (1 + r), of twice Jensen-Shannon
    "chi2": lambda log_r: 2 * log_r.exp()}          # 2 r, f = (r - 1)^2


class FDistill(Matching):
    """f-distill (arXiv 2502.15681): the gradient of D_f(p_t | q_t) at each t, which is that of
    Diff-Instruct with the weight w(r) of F_WEIGHTS. r is the ratio p_t / q_t of the densities of
    samples and of data at x_t, a closed form here. The batch stands for all samples: x_t lies near
    its own x_0, which makes r too large at small t. The paper learns r with a discriminator, and
    normalises w."""
    def weight(self, x_0, x_t, t):
        log_p = log_density(toy.Mixture(x_0.detach(), 0.0), x_t, t)
        log_r = log_p - log_density(self.mixture, x_t, t)
        return F_WEIGHTS[self.args.divergence](log_r)

    def theta(self):
        x_0, t, eps = self.generate(self.normal()), self.time(), self.normal()
        loss, _ = di_loss(self.d_psi, self.d_q, x_0, t, eps)
        return self.weight(x_0, diffuse(x_0.detach(), t, eps), t) * loss


class Uni(FDistill):
    """Uni-Instruct (arXiv 2505.20755): D_f at the noise level --t-min is the integral of
    E w(r) |y_t|^2 / t^3 over all t above --t-min. The loss is that of SIM for l2, with this weight,
    over the density of t, which is right for --truncate resample, the default here. The loss has
    the gradient (3.5), and not that of D_f: for this, w passes gradients to x_t, as d' does in
    sim_loss. The paper's gradient has a part like SIM's and a part like Diff-Instruct's, with
    weights of its own."""
    def theta(self):
        x_0, t, eps = self.generate(self.normal()), self.time(), self.normal()
        loss, _ = sim_loss(self.d_psi, self.d_q, x_0, t, l2(), eps)
        deviation = (t.log() - self.args.p_mean) / self.args.p_std
        density = torch.exp(-deviation**2 / 2) / t  # up to a factor, which Adam takes out
        weight = self.weight(x_0, diffuse(x_0, t, eps), t)
        return weight * loss / (t**3 * density).flatten()


def log_density(mixture, x, t):
    """log p_t(x) of a Mixture in the plane, x (B, 2) and t (B, 1) -> (B,)"""
    var = mixture.std**2 + t**2
    distances = torch.cdist(x, mixture.means, compute_mode="donot_use_mm_for_euclid_dist")
    gaussians = -distances**2 / (2 * var) - torch.log(2 * math.pi * var)  # log-densities (B, K)
    return gaussians.logsumexp(1) - math.log(len(mixture.means))


class Few(Matching):
    """SIM for a generator of several steps (SiD, arXiv 2505.12674): each step but the first adds
    new noise to the sample of the step before. An update trains the samples of one step, drawn
    uniformly, and the steps before get no gradient."""
    def generate(self, z):
        steps = torch.randint(self.args.segments, (), **self.where).item() + 1
        times = equal_parts(self.args.t_star, self.args.segments)
        return renoised_steps(self.g, z, times[:steps], self.where)


def equal_parts(t_star, segments):
    return [t_star * (1 - i / segments) for i in range(segments)]


def own_noise(device):
    """-> where to draw the noise between the steps of a sample. The seed is one that nobody types:
    from the seed of z would come z, once more, in the place of new noise."""
    return {"device": device, "generator": torch.Generator(device).manual_seed(2**32 - 1)}


def renoised_steps(g, z, times, where=None):
    """Standard normal z (B, ...) -> samples, by an evaluation of g at each of the falling times.
    Between two of them the sample gets new noise. The gradient is that of the last evaluation."""
    x_0 = g(times[0] * z, times[0])
    where = where or own_noise(z.device)
    for t in times[1:]:
        x_0 = g(diffuse(x_0.detach(), t, torch.randn(z.shape, **where)), t)
    return x_0


def sampler_of(meta):
    """-> the function (g, z, t_star) that draws samples of a run, by what its file says."""
    segments, kind = int(meta.get("segments", 1)), meta.get("steps_of")
    require(0 < segments <= 1000, f"{segments} segments")
    require("few" not in meta, "a run of an older version: make the run anew")
    if kind == "few":
        return lambda g, z, t_star: renoised_steps(g, z, equal_parts(t_star, segments))
    if kind == "cd_steps":
        return lambda g, z, t_star: renoised_steps(g, z, segment_starts(t_star, segments))
    return partial(few_steps, segments=segments)


NEIGHBOURS = {"dmd": DMD, "dmd_kl": DMDKL, "dmd_pairs": DMDPairs, "add": ADD, "cd": CD,
              "cd_steps": CD, "ct": CT, "mcm": CD, "pagoda": PaGoDA,
              "kernel": Kernel, "drifting": Drifting, "reward": Reward, "sida": SiDA,
              "realuid": RealUID, "f_distill": FDistill, "uni": Uni, "few": Few}


def train(args, d_q, run, evaluate, mixture, methods=NEIGHBOURS, looks=toy.LOOKS):
    """In the place of Algorithm 2: an update of the second network, if any, and one of g."""
    neighbour = methods[args.method](args, mixture, d_q, run)
    for step in run.steps():
        neighbour.begin(step)
        fall = 1 - step / args.steps if args.anneal == "linear" else 1
        if neighbour.psi:
            train_only(run.d_psi, frozen=run.g)
            loss_psi = neighbour.psi()
            run.add(loss_psi=loss_psi)
            loss_psi.mean().backward()
            update(run.opt_psi, (args.lr_psi or args.lr) * fall)
        train_only(run.g, frozen=run.d_psi)
        loss_theta = neighbour.theta()
        run.add(loss_theta=loss_theta)
        loss_theta.mean().backward()
        update(run.opt_theta, args.lr * fall)
        ema_update(run.g_ema, run.g, ema_beta(step * args.batch, args.batch, args.ema_half_life))
        if run.due(args.log_every, looks):
            run.write(**evaluate())


# ---- One Gaussian, with a closed form for everything: 5.3.1 of the notes, [76] to [83] ----
LOSSES = {"SIM, l2": partial(sim_loss, distance=l2()), "Diff-Instruct, DMD": di_loss,
          "SiD, alpha = 1.2, no weight": partial(sid_loss, alpha=1.2, weight=nowgt),
          "d(y) back-propagated": partial(toy.backpropagate_d, distance=l2())}


def gaussian_gradient(loss, mean, std, psi_mean, psi_std, t=2.0):
    """The gradient of a loss by (mean, std) of g(z) = mean + std z, (2,) in float64: a mean over z
    and eps, by quadrature. The data are N(0, 1); d_psi denoises N(psi_mean, psi_std^2)."""
    theta = torch.tensor([mean, std], dtype=torch.float64, requires_grad=True)
    denoiser = lambda mean, std: lambda x_t, t: (std**2 * x_t + t**2 * mean) / (std**2 + t**2)
    points, weights = toy.trapezoid(2, 61)
    z, eps = points[:, :1], points[:, 1:]
    x_0 = theta[0] + theta[1] * z
    values, _ = loss(denoiser(psi_mean, psi_std), denoiser(0.0, 1.0), x_0, t, eps=eps)
    return torch.autograd.grad(weights @ values, theta)[0]


def gaussian_figure(path):
    """--gaussian: the gradient of each loss, by the mean and by the std where d_psi is right, and
    by the std where d_psi lags. The first panel shows a lag too: by the mean, all gradients except
    the last one depend on d_psi's mean and not on g's."""
    panels = (("by the mean; $d_\\psi$ right", "mean of both", lambda v: (v, 1, v, 1), 0),
              ("by the std; $d_\\psi$ right", "std of both", lambda v: (0, 1 + v / 2) * 2, 1),
              ("by the std; g has 0.5", "std of $d_\\psi$", lambda v: (0, 0.5, 0, 1 + v / 2), 1))
    figure = Figure(figsize=(9.6, 3.4), dpi=100, layout="constrained")
    places = torch.linspace(-1.5, 1.5, 25).tolist()
    for axes, (title, label, at, i) in zip(figure.subplots(1, 3), panels):
        for (name, loss), style in zip(LOSSES.items(), ("-", "--", "-.", ":")):
            gradients = [gaussian_gradient(loss, *at(v))[i].item() for v in places]
            axes.plot([at(v)[2 + i] for v in places], gradients, style, label=name)
        axes.set(title=title, xlabel=label)
        axes.axhline(0, color="0.8", zorder=0)
    figure.axes[0].set(ylabel="gradient")
    figure.axes[0].legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png")


# ---- The command line ----
FROM_NOISE = {"t_star": 80.0}
PRESETS = {"cd": FROM_NOISE, "cd_steps": {"segments": 2, **FROM_NOISE},
           "mcm": {"segments": 4, **FROM_NOISE}, "pagoda": FROM_NOISE,
           "ct": {"pretrain_steps": 0, **FROM_NOISE},  # ct has no teacher to start from
           "few": {"segments": 2},
           "uni": {"t_min": 0.3, "truncate": "resample"}}  # 1 / t^3 ruins smaller t: RESULTS.md
# Methods with a d_psi that denoises g's samples. uni is another: it has log-normal times alone.
FOLLOWED = "sim sid di dmd dmd_kl reward sida realuid f_distill few"
TAUGHT = f"{FOLLOWED} uni dmd_pairs add cd cd_steps mcm pagoda kernel"
READ_ONLY_BY = {  # methods -> options that no other method reads
    "mcm few cd_steps": "segments", "sid": "sid_alpha", "reward": "reward",
    "sim sid di": "weight psi_updates batch_gpu",
    "sim sid di kernel reward sida few": "distance",
    "f_distill uni": "divergence",
    f"{FOLLOWED} uni": "psi_mean psi_std",
    f"{FOLLOWED} uni add pagoda": "lr_psi",
    f"{FOLLOWED} add kernel drifting": "p_theta",
    f"{FOLLOWED} uni add kernel drifting": "p_mean p_std truncate t_min",
    TAUGHT: "teacher", f"{TAUGHT} drifting": "pretrain_steps"}


def refuse_unread(parser, args, read_only_by):
    """An option that --method does not read is an error, so that nobody compares what the option
    did not change. read_only_by is {methods: options that no other method reads}."""
    defaults = parser.parse_args([])
    for methods, names in read_only_by.items():
        for name in names.split():
            changed = getattr(args, name) != getattr(defaults, name)
            if changed and args.method not in methods.split():
                parser.error(f"--{name.replace('_', '-')} is not for --method {args.method}, "
                             f"but for {methods.replace(' ', ', ')}")


def sample(args):
    """--sample: as in stage 1, with as many evaluations of g as the run has segments."""
    _, _, meta = load_generator(args.sample, make_denoiser)
    with reading(args.sample, "a run of this script or of stage 1"):
        sampler = sampler_of(meta)
    toy.sample(args, make_denoiser, sampler)


def parse(argv):
    """-> args, with the defaults of --method."""
    parser = make_parser(__doc__, NEIGHBOURS, **toy.RING)
    toy.add_toy_options(parser, teachers=("exact", "learned", "flow"))
    parser.add_argument("--segments", type=count, default=1,
                        help="evaluations of g for a sample: 4 with mcm, 2 with few and cd_steps")
    parser.add_argument("--reward", type=positive, default=0.1, help="lambda of --method reward")
    parser.add_argument("--divergence", choices=F_WEIGHTS, default="reverse_kl",
                        help="f of --method f_distill or uni")
    parser.add_argument("--t-min", type=real, help="least noise level of g and d_psi: 0.3 with uni")
    parser.add_argument("--gaussian", metavar="FILE", help="only draw section 5.3.1 of the notes")
    parser.set_defaults(**PRESETS.get(parser.parse_args(argv).method, {}))
    args = parser.parse_args(argv)
    refuse_unread(parser, args, READ_ONLY_BY)
    return args


@one_line_errors
def main(argv=None):
    args = parse(argv)
    if args.gaussian:
        return gaussian_figure(args.gaussian)
    if args.sample:
        return sample(args)
    # Stage 1 names its runs after the mixture alone, so that these never meet.
    folder = Run.default_folder(args, f"{args.mixture}-{args.teacher}")
    device = pick_device(args.device)
    require(args.method not in NEIGHBOURS or rank_and_ranks()[1] == 1,
            f"--method {args.method} is for one process: start the script without torchrun")
    torch.manual_seed(args.seed)
    flow, mixture = args.teacher == "flow", toy.make_mixture(args.mixture, device)
    net = make_denoiser(flow).to(device)
    steps = {"segments": args.segments, "steps_of": args.method}
    run = toy.prepare(args, folder, net, {"flow": flow}, **steps)
    if not run.finished():
        loop = partial(train, mixture=mixture) if args.method in NEIGHBOURS else toy.train
        pretrain = partial(toy.pretrain, loss_of=flow_loss) if flow else toy.pretrain
        toy.distil(args, run, mixture, net, loop, pretrain, sampler_of(steps))
        print(f"next: python lab/neighbours.py --sample {folder} --n 5000")


if __name__ == "__main__":
    main()
