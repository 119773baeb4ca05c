"""Mutations of the code, one at a time: which test notices each of them?

    python lab/mutants.py                          all of them, about a quarter of an hour
    python lab/mutants.py --list                   their names
    python lab/mutants.py "SIM: the sign" "l2: d' without its factor"

A mutation replaces a text that occurs once in a file by a wrong one: a sign, a factor, a constant
of the paper, a flag that is ignored. It is made in a copy of the tracked files, in a temporary
folder, where the tests that should notice it are run until the first one fails. A mutation that no
test notices has SURVIVED, and is the reason for a new test. The tests have to pass without any
mutation first. The result is a table in Markdown; the exit status is 0 only if all were killed.
"""
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from common import (atomic, count, one_line_errors, plain_parser, progress, reading, require)

PAPER, TOY, IMAGES = [f"tests/test_{name}.py -k " for name in ("paper", "toy", "edm")]
TEXT, NEXT_TO, JUDGES = [f"tests/test_{name}.py -k " for name in ("t2i", "neighbours", "eval")]
BY_HAND, NUMBERS = "train_is_algorithm_2", f"{PAPER}numbers"

# {(file, pytest's arguments for the tests that should notice): [(name, right text, wrong text)]}
MUTATIONS = {
    ("common.py", f"{PAPER}d_and_d_prime"): [
        ("l2: d' without its factor", "lambda y: 2 * y)", "lambda y: y)"),
        ("power: y^alpha in d'", "alpha * y**(alpha - 1))", "alpha * y**alpha)"),
        ("exp: beta missing in d', as in Table 4", "y: beta * expand_as(", "y: expand_as("),
        ("smoothl1: scale for scale^2", "y / (y**2 + scale**2).sqrt())", "y / (y**2 + scale).sqrt())"),
        ("huber: delta ignored in d", '"none", delta)', '"none", 1.0)'),
        ("phuber: d' twice as large, as in Table 4", "y: y / expand_as(n", "y: 2 * y / expand_as(n"),
        ("phuber: c for c^2", "(batch_sum(y**2) + c**2)", "(batch_sum(y**2) + c)"),
        ("phuber: c = 0.01", "def phuber(c=0.001)", "def phuber(c=0.01)"),
        ("mean for sum", "v.reshape(len(v), -1).sum(1)", "v.reshape(len(v), -1).mean(1)")],
    ("common.py", f"{PAPER}'times or truncation'"): [
        ("(B.6): mean -1.1", "p_edm(shape, mean=-1.2", "p_edm(shape, mean=-1.1"),
        ("noise levels: variance for std", "std * torch.randn(shape, ", "std**2 * torch.randn(shape, "),
        ("--truncate resample clamps", 'while truncate == "resample"', 'while truncate == ""'),
        ("resample: at the lower end alone", "(t < t_min) | (t > t_max)", "(t < t_min)"),
        ("Karras: r up to 1", "r_max=0.8", "r_max=1.0"),
        ("Karras: rho = 5", "rho=7, r_max", "rho=5, r_max"),
        ("Karras: r for 1 - r", "+ (1 - r) * (sigma_min", "+ r * (sigma_min")],
    ("common.py", f"{PAPER}'loss or lambda'"): [
        ("lambda: not squared", "/ (t * sigma_data)**2", "/ (t * sigma_data)"),
        ("lambda: sigma_data = 1", "def lambda_edm(t, sigma_data=0.5)", "def lambda_edm(t, sigma_data=1)"),
        ("sidwgt: sum for mean", ".abs()) / x_0[0].numel())", ".abs()))"),
        ("sidwgt: not detached", ").detach().clamp(min=1e-5)", ").clamp(min=1e-5)"),
        ("sidwgt: not clamped", ").detach().clamp(min=1e-5)", ").detach()"),
        ("(B.12): t^2 for t", "return x_0 + t * (torch", "return x_0 + t**2 * (torch"),
        ("(B.2): no weight", "batch_sum(weight(t) * (d_psi", "batch_sum((d_psi"),
        ("SIM: the sign", "loss = -batch_sum(distance.d", "loss = batch_sum(distance.d"),
        ("SIM: y reversed", "y_t = student - teacher\n    loss = -batch_sum(dis",
         "y_t = teacher - student\n    loss = -batch_sum(dis"),
        ("SIM: the teacher in place of d_psi", "d_prime(y_t) * (student - x", "d_prime(y_t) * (teacher - x"),
        ("SIM: d' detached", "d_prime(y_t) *", "d_prime(y_t.detach()) *"),
        ("SIM: x_t detached", 'falls."""\n    x_t = diffuse(x_0, t, eps)',
         'falls."""\n    x_t = diffuse(x_0, t, eps).detach()'),
        ("SiD: the sign of alpha", "+ (1 - alpha) *", "+ (1 + alpha) *"),
        ("SiD: without its weight", "alpha, eps=None, weight=sidwgt)", "alpha, eps=None, weight=nowgt)"),
        ("Diff-Instruct: the sign", "* batch_sum(y_t * x_0), y_t", "* -batch_sum(y_t * x_0), y_t"),
        ("Diff-Instruct: nothing stopped", "with torch.no_grad():\n        x_t", "if True:\n        x_t"),
        ("--method di runs SIM", '"di": di_loss,', '"di": functools.partial(sim_loss, distance=distance),'),
        ("--sid-alpha ignored", "alpha=args.sid_alpha", "alpha=1.0"),
        ("--weight ignored", 'if args.weight != "own"', "if False")],
    ("common.py", f"{PAPER}'sampler or dpm or precond'"): [
        ("schedule: rho = 5", "sigma_max=80, rho=7):", "sigma_max=80, rho=5):"),
        ("schedule: one step short", "/ max(num_steps - 1, 1)", "/ num_steps"),
        ("Heun: Euler", "if torch.as_tensor(t_next).all()", "if False"),
        ("Heun: the second slope at the first point", "slope(x_next, t_next))", "slope(x, t_next))"),
        ("Heun: in float32", "x if x.device.type == \"mps\" else x.double()", "x"),
        ("DPM-Solver: r inverted", "math.log(t[i - 1] / t[i]) / math.log(t[i] / t[i + 1])",
         "math.log(t[i] / t[i + 1]) / math.log(t[i - 1] / t[i])"),
        ("DPM-Solver: no extrapolation", "extrapolated = d + (d - d_last)", "extrapolated = d + 0 * (d - d_last)"),
        ("DPM-Solver: r for 2 r", "/ (2 * r)", "/ r"),
        ("sampler: z not scaled", "heun(denoise, times[0] * z", "heun(denoise, z"),
        ("EDM: c_skip", "= self.sigma_data**2 / var,", "= self.sigma_data / var,"),
        ("EDM: c_noise", "log() / 4", "log() / 2")],
    ("common.py", f"{PAPER}'frechet or ema or frozen or seed_step or latents or micro or update'"): [
        ("Frechet: one root for two", "- 2 * trace_of_root", "- trace_of_root"),
        ("covariance over n", "torch.cov(features.double().T)", "torch.cov(features.double().T, correction=0)"),
        ("frozen weights get gradients", "frozen.eval().requires_grad_(False)", "frozen.eval()"),
        ("what learns is in eval mode", "net.train().requires_grad_", "net.eval().requires_grad_"),
        ("gradients never cleared", "optimiser.step()\n    optimiser.zero_grad()", "optimiser.step()"),
        ("EMA: half-life of 1e5", "half_life=5e5, ramp", "half_life=1e5, ramp"),
        ("EMA: ramp-up ignored", "min(half_life, ramp_up * images)", "half_life"),
        ("EMA: ramp-up 0.5", "ramp_up=0.05", "ramp_up=0.5"),
        ("EMA: decay for 1 - decay", "list(net.parameters()), 1 - beta)", "list(net.parameters()), beta)"),
        ("every update draws the same", "number(seed, step, 0)", "number(seed, 0, 0)"),
        ("every rank draws its own batch", "number(seed, step, 0)", "number(seed, step, rank_and_ranks()[0])"),
        ("every rank has the first rows", "draw.chunk(ranks)[rank]", "draw.chunk(ranks)[0]")],
    ("common.py", f"{TOY}'{BY_HAND}'"): [
        ("Adam: beta_1 = 0.9", "betas=(0.0, 0.999)", "betas=(0.9, 0.999)"),
        ("Adam: beta_2 = 0.99", "betas=(0.0, 0.999)", "betas=(0.0, 0.99)"),
        ("--lr ignored", '["lr"] = lr', '["lr"] = 2e-3'),
        ("--p-theta karras ignored", 'if args.p_theta == "karras"', "if False"),
        ("psi's times from theta's flags", "args.psi_mean, args.psi_std, **", "args.p_mean, args.p_std, **")],
    ("common.py", f"{IMAGES}two_ranks"): [
        ("gradients of ranks averaged twice", "part.view_as(grad))", "part.view_as(grad) / 2)")],
    ("common.py", "tests/test_runs.py -k pictures"): [
        ("bytes: rounded half down", "x * 127.5 + 128", "x * 127.5 + 127.5"),
        ("grid: column by column", '"(r c) ch h w -> (r h)', '"(c r) ch h w -> (r h)')],
    ("common.py", f"{JUDGES}files_change"): [
        ("PNGs: BGR for RGB", "images = images[:, :channels]", "images = images[:, :channels].flip(1)")],
    ("01_toy_2d.py", f"{TOY}'theorem or exact'"): [
        ("mixture: a factor in the posterior", "(self.means**2).sum(1) / 2) / var", "(self.means**2).sum(1)) / var"),
        ("(3.7): the score of eps / s^2", "-eps / s  # of q", "-eps / s**2  # of q"),
        ("a score's scale: 1 / s^2", "unit = a / s**2 if", "unit = 1 / s**2 if")],
    ("01_toy_2d.py", f"{TOY}'{BY_HAND} or pretrain'"): [
        ("stage 1: z not times t*", "(args.t_star * z, t", "(z, t"),
        ("stage 1: psi's weight 1", "weight_psi, device = lambda_edm,", "weight_psi, device = torch.ones_like,"),
        ("stage 1: --psi-updates ignored", "range(args.psi_updates)", "range(1)"),
        ("stage 1: theta draws psi's times", 'draw("theta", random)', 'draw("psi", random)'),
        ("stage 1: mean of a micro-batch", "(loss_theta.sum() / args.batch)", "loss_theta.mean()"),
        ("stage 1: --anneal one step ahead", "(1 - step / args.steps if", "(1 - (step + 1) / args.steps if"),
        ("stage 1: EMA one batch ahead", "ema_beta(step * args.b", "ema_beta((step + 1) * args.b"),
        ("stage 1: --teacher learned runs exact", 'if args.teacher == "exact" else run.learned', ""),
        ("stage 1: log of another divergence", "divergence=distance.d(y_t)", "divergence=batch_sum(y_t**2)"),
        ("stage 1: log of |y|^2", "batch_sum(y_t**2).sqrt())\n", "batch_sum(y_t**2))\n"),
        ("pretraining: the lr never falls", "2e-3 * (1 - step / args.pretrain_steps)", "2e-3"),
        ("pretraining: one noise level a batch", "p_edm((len(x_0), 1), dev", "p_edm((1, 1), dev")],
    ("01_toy_2d.py", f"{TOY}measures"): [
        ("sliced W2: points not sorted", "@ around.T.to(x)).sort(dim=0)[0]", "@ around.T.to(x))"),
        ("sliced W2: exact sets meet themselves", "for j in range(i)]", "for j in range(i + 1)]"),
        ("on modes: within 5 std", "distance < 4 * mixture.std", "distance < 5 * mixture.std")],
    ("02_edm_cifar.py", NUMBERS): [
        ("Table 5: batch 128", '"batch": 256, "lr"', '"batch": 128, "lr"'),
        ("Table 5: lr 1e-4", '"lr": 1e-5,', '"lr": 1e-4,'),
        ("Table 5: t* = 1", '"anneal": "none", "t_star": 2.5', '"anneal": "none", "t_star": 1.0'),
        ("(B.10): mean -1.2", '"p_mean": -3.5', '"p_mean": -1.2'),
        ("(B.10): std 1.2", '"p_std": 2.5', '"p_std": 1.2'),
        ("(B.6): std 2.5", '"psi_std": 1.2, "psi_up', '"psi_std": 2.5, "psi_up'),
        ("Algorithm 2: two updates of psi", '"psi_updates": 1', '"psi_updates": 2'),
        ("SiD's code: dropout 0", '"dropout": 0.13,\n    "adam', '"dropout": 0.0,\n    "adam'),
        ("SiD's code: alpha = 1", '"sid_alpha": 1.2, "p_theta": "karras"', '"sid_alpha": 1.0, "p_theta": "karras"'),
        ("SiD's code: log-normal times", '"sid_alpha": 1.2, "p_theta": "karras"', '"sid_alpha": 1.2')],
    ("02_edm_cifar.py", f"{IMAGES}'{BY_HAND}'"): [
        ("stage 2: z not times t*", "(args.t_star * z, t", "(z, t"),
        ("stage 2: psi's weight 1", "weight_psi, device = lambda_edm,", "weight_psi, device = torch.ones_like,"),
        ("stage 2: always class 0", "torch.randint(d_q.label_dim, (args", "torch.randint(1, (args"),
        ("stage 2: no classes", '{"class_labels": labels} if labels.shape[1] else {}', "{}"),
        ("stage 2: --dropout ignored", "layer.dropout = args.dropout", "layer.dropout = 0.0"),
        ("stage 2: --anneal ignored", 'if args.anneal == "linear" else 1', "if False else 1")],
    ("02_edm_cifar.py", f"{IMAGES}'outputs or labels or sampling or judge'"): [
        ("U-Net: one-hot not scaled", "labels * labels.shape[1]**0.5", "labels"),
        ("U-Net: label dropout inverted", ">= self.label_dropout", "< self.label_dropout"),
        ("U-Net: residuals not scaled", "(self.skip(x) + h) * 0.5**0.5", "(self.skip(x) + h)"),
        ("teacher: 33 evaluations", "labels, num_steps=18", "labels, num_steps=17"),
        ("judge: images in [0, 1]", "images / 127.5 - 1)", "images / 255)"),
        ("judge: the share of wrong classes", "logits.argmax(1) == l", "logits.argmax(1) != l")],
    ("03_pixart_t2i.py", NUMBERS): [
        ("B.3: batch 512", '"batch": 1024', '"batch": 512'),
        ("B.3: lr 5e-5", '"lr": 5e-6', '"lr": 5e-5'),
        ("B.3: mean -1.2", '"p_mean": -2.0,', '"p_mean": -1.2,'),
        ("B.3: psi's std 1.2", '"psi_std": 2.0', '"psi_std": 1.2'),
        ("B.3: t_max 80", '"t_max": 156.6155', '"t_max": 80.0'),
        ("B.3: psi's weight lambda", '"weight_psi": "one"', '"weight_psi": "edm"'),
        ("B.3: no checkpointing", '"checkpointing": True', '"checkpointing": False'),
        ("B.3: no bfloat16", '"amp": "bf16"', '"amp": "none"'),
        ("noise table: beta_end 0.03", "beta = 0.02 + (1e-4 - 0.02)", "beta = 0.03 + (1e-4 - 0.03)")],
    ("03_pixart_t2i.py", f"{TEXT}'{BY_HAND} or b15'"): [
        ("stage 3: z not times t*", "(args.t_star * z, t", "(z, t"),
        ("stage 3: the whole run unguided", "d_q = Guided(pipeline.net, args.guidance, b", "d_q = Guided(pipeline.net, 1.0, b"),
        ("stage 3: psi's weights swapped", 'if args.weight_psi == "edm"', 'if args.weight_psi == "one"'),
        ("stage 3: theta's times from psi's flags", 'if phase == "psi" else (args.p_mean, args.p_std)', ""),
        ("stage 3: --truncate ignored", "args.t_max, args.truncate, **", "args.t_max, **"),
        ("stage 3: always caption 0", "torch.randint(len(captions), (args", "torch.randint(1, (args"),
        ("stage 3: guidance of the wrong sign", "self.guidance * (guided - free)", "self.guidance * (free - guided)"),
        ("stage 3: --adam-eps ignored", "make_parts(pipeline.net, args.adam_eps)", "make_parts(pipeline.net)"),
        ("(B.14): t rounded too", "t = t.to(x.dtype).reshape(-1,", "t = noise_table(x.device)[999 - timestep].to(x.dtype).reshape(-1,"),
        ("(B.14): sigma_data = 0.5", "(t**2 + 1).sqrt(), timestep", "(t**2 + 0.25).sqrt(), timestep")],
    ("03_pixart_t2i.py", f"{TEXT}'not slow and (timestep or noise or masks or guidance or t5 or decoder or spelling or own_times or generator or options or embedded)'"): [
        ("(B.14): one timestep off", "timestep = 999 -", "timestep = 1000 -"),
        ("attention without the mask", "scaled_dot_product_attention(q, k, v, mask)", "scaled_dot_product_attention(q, k, v)"),
        ("padding is a valid token", "torch.arange(tokens) < len(v)", "torch.arange(tokens) <= len(v)"),
        ("T5 without its mask", "encoder(text.input_ids, text.attention_mask)", "encoder(text.input_ids)"),
        ("guidance of three channels", "return free + self.guidance * (guided - free)",
         "return torch.cat([(free + self.guidance * (guided - free))[:, :3], guided[:, 3:]], 1)"),
        ("latents multiplied by their scale", "latents / self.scaling_factor", "latents * self.scaling_factor"),
        ("VAE: scale 0.18", 'config.get("scaling_factor", 0.18215)', 'config.get("scaling_factor", 0.18)'),
        ("features at another noise level", "def token_features(net, images, t=0.2)", "def token_features(net, images, t=0.3)"),
        ("sample: --t-star ignored", "sample_one_step(g, args.t_star or t_star, z", "sample_one_step(g, t_star, z"),
        ("sample: --guidance ignored", "guidance if args.guidance is None else args.guidance", "guidance")],
    ("eval_fid.py", f"{JUDGES}'kernel or precision or inception_score or batches or trials or judges'"): [
        ("FID: covariances over n", "torch.outer(mu, mu)) / (n - 1)", "torch.outer(mu, mu)) / n"),
        ("IS: 5 splits", "SPLITS = 10", "SPLITS = 5"),
        ("IS: splits off by one", "((index + 1) * SPLITS - 1) // n", "(index * SPLITS) // n"),
        ("KID: kernel of degree 2", "/ a.shape[1] + 1)**3", "/ a.shape[1] + 1)**2"),
        ("KID: biased", "(size * (size - 1))", "(size * size)"),
        ("precision: the nearest neighbour", "centres, k=3)", "centres, k=2)"),
        ("precision and recall swapped", "return share_in_balls(fake, real), share_in_balls(real, fake)",
         "return share_in_balls(real, fake), share_in_balls(fake, real)"),
        ("trials: std over n", "np.std(values, ddof=1)", "np.std(values)"),
        ("trials: the same seeds", "args.seed + args.trials * n, n)", "args.seed + args.trials, 1)"),
        ("--nfe 3 takes two steps more", "num_steps=(args.nfe + 1) // 2", "num_steps=args.nfe")],
    ("lab/neighbours.py", f"{NEXT_TO}'not killed and not run'"): [
        ("CD: target not detached", "with torch.no_grad():\n            target = jump(self.g, heun", "if True:\n            target = jump(self.g, heun"),
        ("CD: two steps of the grid", "grid[i], grid[i + 1], grid[(i", "grid[i], grid[i + 2], grid[(i"),
        ("CT: target not detached", "with torch.no_grad():\n            target = jump(self.g, diffuse", "if True:\n            target = jump(self.g, diffuse"),
        ("CT: no 1 / (t - s)", ".d(y) / (t - s).flatten()", ".d(y)"),
        ("DMD: the regression's weight", "loss + 0.25 *", "loss + 2.5 *"),
        ("ADD: target not detached", "with torch.no_grad():\n            target = self.d_q", "if True:\n            target = self.d_q"),
        ("PaGoDA: the discriminator's sign", "F.softplus(-self.logit(x)) + F.softplus(self", "F.softplus(self.logit(x)) + F.softplus(-self"),
        ("flow: tau in [0, 0.5]", "torch.rand_like(x_0[:, :1])", "0.5 * torch.rand_like(x_0[:, :1])"),
        ("flow: the velocity reversed", "(v - (eps - x_0))", "(v - (x_0 - eps))")],
    ("lab/neighbours.py", f"{NEXT_TO}'run or train or flow_as'"): [
        ("neighbours: --anneal ignored", 'if args.anneal == "linear" else 1', "if False else 1"),
        ("neighbours: EMA one batch ahead", "ema_beta(step * args.b", "ema_beta((step + 1) * args.b"),
        ("--teacher flow runs exact", 'args.teacher == "flow", toy', "False, toy")],
}
# (name, file, right text, another text, why no test can tell them apart)
EQUIVALENT = [
    ("(B.12): -eps for eps", "common.py", "return x_0 + t * (torch", "return x_0 - t * (torch",
     "eps is symmetric: the noise that is not given has the same distribution")]


class Mutant:
    """One row of MUTATIONS. source() is the text of its file with the mutation in it."""
    def __init__(self, file, tests, name, old, new):
        self.file, self.tests, self.name, self.old, self.new = file, tests, name, old, new

    def source(self):
        text = (ROOT / self.file).read_text()
        found = text.count(self.old)
        require(found == 1, f"{self.name}: {self.old!r} occurs {found} times in {self.file}")
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(*where, *what) for where, some in MUTATIONS.items() for what in some]


def copy_project(folder):
    """The tracked files, as they stand in the working tree, in a new folder."""
    with reading(ROOT, "a git repository, whose tracked files are copied"):
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, text=True,
                               capture_output=True).stdout.split("\0")
    for name in [name for name in files if name and (ROOT / name).exists()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def run_tests(folder, tests, limit):
    """-> pytest's exit status, or None after `limit` seconds; and the first test that failed."""
    typed = [sys.executable, "-m", "pytest", *shlex.split(tests), "-x", "-rfE", "--tb=no",
             "--durations=0", "-p", "no:cacheprovider", "--color=no"]
    # Python recompiles a file by its time in seconds and its size: two mutations may share both.
    settings = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(typed, cwd=folder, env=settings, text=True, stdout=subprocess.PIPE,
                          stderr=subprocess.STDOUT, start_new_session=True) as process:
        try:
            said, _ = process.communicate(timeout=limit)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what the tests have started
            return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) (\S+?)(?:\[| |$)", said, re.MULTILINE)
    return process.returncode, failed[1].removeprefix("tests/") if failed else ""


def verdict(folder, mutant, limit):
    """What became of a mutation: "killed by ...", or "SURVIVED" and why."""
    (folder / mutant.file).write_text(mutant.source())
    status, test = run_tests(folder, mutant.tests, limit)
    shutil.copyfile(ROOT / mutant.file, folder / mutant.file)
    if status == 1 and test:
        return test
    return {0: "SURVIVED", None: f"SURVIVED ({limit} s were not enough)"}.get(
        status, f"SURVIVED (no test ran: pytest's status is {status})")


def write_table(path, rows):
    """{(mutation, file): verdict} as a table in Markdown; the equivalent ones below."""
    lines = ["| mutation | file | killed by |", "|---|---|---|"]
    lines += [f"| {name} | `{file}` | {by} |" for (name, file), by in rows.items()]
    lines += [f"| {name} | `{file}` | equivalent: {why} |" for name, file, *_, why in EQUIVALENT]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(lines).replace("|^", "\\|^") + "\n")


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="all of them unless given")
    parser.add_argument("--list", action="store_true", help="only print their names")
    parser.add_argument("--limit", type=count, default=300, help="seconds for a mutation")
    parser.add_argument("--out", default="runs/mutants.md", help="the table")
    args = parser.parse_args(argv)
    known = {mutant.name: mutant for mutant in MUTANTS}
    for name in args.names:
        require(name in known, f"there is no mutation {name!r}: --list prints their names")
    chosen = [known[name] for name in args.names or known]
    if args.list:
        return print("\n".join(f"{m.file:18} {m.name}" for m in chosen))
    rows, begun = {}, time.time()
    with tempfile.TemporaryDirectory() as folder:
        copy_project(Path(folder))
        for tests in dict.fromkeys(m.tests for m in chosen):
            status, test = run_tests(folder, tests, args.limit)
            require(status == 0, f"{tests}: pytest's status is {status} without a mutation {test}")
        for mutant in progress(chosen, "mutations"):
            rows[mutant.name, mutant.file] = by = verdict(Path(folder), mutant, args.limit)
            print(f"{mutant.name:45} {by}", flush=True)
            write_table(args.out, rows)
    survived = [name for (name, _), by in rows.items() if by.startswith("SURVIVED")]
    print(f"{len(rows) - len(survived)} of {len(rows)} killed in {time.time() - begun:.0f} s; "
          f"survived: {survived or 'none'}; equivalent: {len(EQUIVALENT)}; {args.out}")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
