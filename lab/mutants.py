"""Mutations of the code, one at a time: which test notices each of them?

    python lab/mutants.py                          all of them, some ten minutes on two cores
    python lab/mutants.py --list                   their names
    python lab/mutants.py "SIM: the sign" "EMA: half-life of 1e5"

A mutation makes a text that occurs once in a file wrong: a sign, a factor, a constant of the paper,
a flag that is ignored. The change is made in a copy of the tracked files, in a temporary folder,
where the tests that should notice it run until the first one fails. A mutation that no test notices
has SURVIVED, and is the reason for a new test. The same tests have to pass without a mutation. The
result is a table in Markdown; the exit status is 0 only if all were killed.
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

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from common import atomic, count, one_line_errors, plain_parser, progress, reading, require

import pytest
import scipy.stats  # noqa: F401  the libraries that the tests need are loaded once for all mutations
import torch  # noqa: F401

# "a<<b => c>>d" replaces abd by acd. {"file  pytest's arguments for the tests": {name: change}}
MUTATIONS = {
    "common.py  tests/test_paper.py -k 'd_and_d_prime or distance'": {
        "l2: d' without its factor": "lambda y: <<2 * y => y>>)",
        "power: y^alpha in d'": "alpha * y**<<(alpha - 1) => alpha>>)",
        "exp: no beta in d', as in Table 4": "y: <<beta *  => >>expand_as(torch",
        "smoothl1: scale for scale^2": "lambda y: y / (y**2 + scale<<**2 => >>)",
        "huber: delta ignored": '"none", <<delta => 1.0>>)',
        "phuber: d' twice as large, as in Table 4": "lambda y: <<y => 2 * y>> / expand_as(n",
        "phuber: c for c^2": "(batch_sum(y**2) + c<<**2 => >>)",
        "mean for sum": "v.reshape(len(v), -1).<<sum => mean>>(1)",
        "Frechet: one root for two": "- <<2 *  => >>trace_of_root",
        "covariance over n": "torch.cov(features.double().T<< => , correction=0>>)"},
    "common.py  tests/test_paper.py -k 'times or truncation or loss or lambda or numbers'": {
        "phuber: c = 0.01": "def phuber(c=<<0.001 => 0.01>>)",
        "(B.6): mean -1.1": "p_edm(shape, mean=<<-1.2 => -1.1>>",
        "noise levels: the variance for the std": "mean + std<< => **2>> * torch.randn(shape",
        "--truncate resample clamps": 'while truncate == "<<resample => >>"',
        "resample: at the lower end alone": "(t < t_min)<< | (t > t_max) => >>",
        "Karras: r up to 1": "r_max=<<0.8 => 1.0>>",
        "Karras: rho = 5": "rho=<<7 => 5>>, r_max",
        "Karras: r for 1 - r": "+ <<(1 - r) => r>> * (sigma_min",
        "lambda: not squared": "/ (t * sigma_data)<<**2 => >>",
        "sidwgt: sum for mean": ".abs())<< / x_0[0].numel() => >>)",
        "sidwgt: not detached": ")<<.detach() => >>.clamp(min=1e-5)",
        "sidwgt: not clamped": ").detach()<<.clamp(min=1e-5) => >>",
        "(B.12): t^2 for t": "return x_0 + t<< => **2>> * (torch",
        "(B.2): no weight": "batch_sum(<<weight(t) *  => >>(d_psi",
        "SIM: the sign": "loss = <<- => >>batch_sum(distance",
        "SIM: the teacher in place of d_psi": "d_prime(y_t) * (<<student => teacher>> - x_0)",
        "SIM: d' detached": "distance.d_prime(y_t<< => .detach()>>) *",
        "SIM: x_t detached": 'falls."""\n    x_t = diffuse(x_0, t, eps)<< => .detach()>>',
        "SiD: the sign of alpha": "+ (1 <<- => +>> alpha) *",
        "SiD: without its weight": "alpha, eps=None, weight=<<sidwgt => nowgt>>)",
        "Diff-Instruct: the sign": "* << => ->>batch_sum(y_t * x_0), y_t",
        "Diff-Instruct: nothing stopped": "with torch.<<no_grad => enable_grad>>():\n        x_t",
        "--method di runs SIM": '"di": <<di_loss => functools.partial(sim_loss, distance=distance)>>',
        "--sid-alpha ignored": "alpha=<<args.sid_alpha => 1.0>>",
        "--weight ignored": 'if <<args.weight != "own" => False>>',
        "Adam: beta_1 = 0.9": "betas=(<<0.0 => 0.9>>, 0.999)"},
    "common.py  tests/test_paper.py -k 'sampl or dpm or heun or precond'": {
        "schedule: rho = 5": "sigma_max=80, rho=<<7 => 5>>):",
        "schedule: one step short": "/ max(num_steps<< - 1 => >>, 1)",
        "Heun: Euler": "if <<torch.as_tensor(t_next).all() => False>>",
        "Heun: the second slope at the first point": "slope(x<<_next => >>, t_next))",
        "Heun: in float32": "else x<<.double() => >>\n    for t_cur",
        "DPM-Solver: r inverted": "r = <<math => 1 / math>>.log(t[i - 1] / t[i]) <</ => *>> math",
        "DPM-Solver: r for 2 r": "/ <<(2 * r) => r>>",
        "sampler: z not scaled": "heun(denoise, <<times[0] *  => >>z",
        "EDM: c_noise": "log() / <<4 => 2>>"},
    "common.py  tests/test_paper.py -k 'ema or frozen or seed_step or micro or update_takes'": {
        "frozen weights get gradients": "frozen.eval()<<.requires_grad_(False) => >>",
        "what learns is in eval mode": "net.<<train => eval>>().requires_grad_",
        "gradients never cleared": "optimiser.step()\n    <<optimiser.zero_grad() => pass>>",
        "--lr ignored": '["lr"] = <<lr => 2e-3>>',
        "EMA: half-life of 1e5": "half_life=<<5e5 => 1e5>>, ramp",
        "EMA: no ramp-up": "<<min(half_life, ramp_up * images) => half_life>>",
        "EMA: the decay for 1 - decay": "list(net.parameters()), <<1 - beta => beta>>)",
        "every update draws the same": "number(seed, <<step => 0>>, 0)",
        "every rank draws its own batch": "number(seed, step, <<0 => rank_and_ranks()[0]>>)",
        "every rank has the first rows": "draw.chunk(ranks)[<<rank => 0>>]"},
    "common.py  tests/test_edm.py -k two_ranks": {
        "gradients of two ranks halved": "part.view_as(grad)<< =>  / 2>>)"},
    "common.py  tests/test_runs.py tests/test_eval.py -k 'pictures or files_change'": {
        "PNGs: BGR for RGB": "images = images[:, :channels]<< => .flip(1)>>",
        "grid: column by column": '"(<<r c => c r>>) ch h w -> (r h)'},
    "01_toy_2d.py  tests/test_toy.py -k 'theorem or exact or projection or measures or numbers'": {
        "mixture: a factor in the posterior": "(self.means**2).sum(1)<< / 2 => >>) / var",
        "(3.7): -eps for -eps / s": "-eps<< / s => >>  # of q",
        "a score's scale: 1 / s^2": "unit = <<a => 1>> / s**2 if",
        "sliced W2: points not sorted": "@ around.T.to(x))<<.sort(dim=0)[0] => >>",
        "sliced W2: exact sets meet themselves": "for j in range(i<< =>  + 1>>)]",
        "on modes: within 5 std": "distance < <<4 => 5>> * mixture.std"},
    "01_toy_2d.py  tests/test_toy.py -k 'train_is_algorithm_2 or pretrain'": {
        "stage 1: psi's weight 1": "weight_psi, device = <<lambda_edm => torch.ones_like>>,",
        "stage 1: --psi-updates ignored": "range(<<args.psi_updates => 1>>)",
        "stage 1: theta draws psi's times": 'draw("<<theta => psi>>", random)',
        "stage 1: a micro-batch's mean": "(loss_theta.<<sum() / args.batch => mean()>>)",
        "stage 1: --anneal one step ahead": "(1 - <<step => (step + 1)>> / args.steps if",
        "stage 1: EMA one batch ahead": "ema_beta(<<step => (step + 1)>> * args.b",
        "stage 1: --teacher learned runs exact": '<<if args.teacher == "exact" else run. => #>>learned',
        "stage 1: |y|^2 for the divergence": "divergence=<<distance.d => batch_sum>>(y_t)",
        "stage 1: |y|^2 for |y| in the log": "y_norm=batch_sum(y_t**2)<<.sqrt() => >>",
        "pretraining: the lr never falls": "2e-3<< * (1 - step / args.pretrain_steps) => >>",
        "pretraining: one noise level a batch": "p_edm((<<len(x_0) => 1>>, 1), dev"},
    "02_edm_cifar.py  tests/test_paper.py tests/test_edm.py -k 'numbers or presets'": {
        "Table 5: batch 128": '"batch": <<256 => 128>>, "lr"',
        "Table 5: lr 1e-4": '"lr": <<1e-5 => 1e-4>>,',
        "Table 5: t* = 1": '"none", "t_star": <<2.5 => 1.0>>',
        "(B.10): mean -1.2": '"p_mean": <<-3.5 => -1.2>>',
        "(B.10): std 1.2": '"p_std": <<2.5 => 1.2>>',
        "(B.6): std 2.5": '"psi_std": <<1.2 => 2.5>>, "psi_up',
        "Algorithm 2: two updates of psi": '"psi_updates": <<1 => 2>>',
        "SiD's code: dropout 0": '"dropout": <<0.13 => 0.0>>,\n    "adam',
        "SiD's code: alpha = 1": '"sid_alpha": <<1.2 => 1.0>>'},
    "02_edm_cifar.py  tests/test_edm.py -k 'train_is or outputs or labels or sampling or judge'": {
        "stage 2: z not times t*": "(<<args.t_star *  => >>z, t",
        "stage 2: always class 0": "torch.randint(<<d_q.label_dim => 1>>, (args",
        "stage 2: no classes": '<<**{"class_labels": labels} if labels.shape[1] else {} => >>)',
        "stage 2: --dropout ignored": "layer.dropout = <<args.dropout => 0.0>>",
        "U-Net: one-hot not scaled": "labels<< * labels.shape[1]**0.5 => >>",
        "U-Net: label dropout inverted": "<<>= => <>> self.label_dropout)",
        "U-Net: residuals not scaled": "(self.skip(x) + h)<< * 0.5**0.5 => >>",
        "teacher: 33 evaluations": "labels, num_steps=<<18 => 17>>",
        "judge: the share of wrong classes": "logits.argmax(1) <<== => !=>> l"},
    "03_pixart_t2i.py  tests/test_paper.py -k numbers": {
        "B.3: batch 512": '"batch": <<1024 => 512>>',
        "B.3: lr 5e-5": '"lr": <<5e-6 => 5e-5>>',
        "B.3: mean -1.2": '"p_mean": <<-2.0 => -1.2>>,',
        "B.3: psi's std 1.2": '"psi_std": <<2.0 => 1.2>>',
        "B.3: t_max 80": '"t_max": <<156.6155 => 80.0>>',
        "B.3: psi's weight lambda": '"weight_psi": "<<one => edm>>"',
        "B.3: no checkpointing": '"checkpointing": <<True => False>>',
        "noise table: beta_end 0.03": "beta = <<0.02 => 0.03>> + (1e-4 - <<0.02 => 0.03>>)"},
    "03_pixart_t2i.py  tests/test_t2i.py -k 'train_is or b15 or update_draws or miniature'": {
        "stage 3: z not times t*": "(<<args.t_star *  => >>z, t",
        "stage 3: the whole run unguided": "d_q = Guided(pipeline.net, <<args.guidance => 1>>,",
        "stage 3: psi's weights swapped": 'if args.weight_psi == "<<edm => one>>"',
        "stage 3: theta's times from psi's flags": '<<if phase == "psi" else => #>> (args.p_mean',
        "stage 3: --truncate ignored": "args.t_max, <<args.truncate,  => >>**",
        "stage 3: always caption 0": "torch.randint(<<len(captions) => 1>>, (args",
        "stage 3: guidance of the wrong sign": "(<<guided - free => free - guided>>)",
        "stage 3: --adam-eps ignored": "make_parts(pipeline.net<<, args.adam_eps => >>)",
        "(B.14): sigma_data = 0.5": "(t**2 + <<1 => 0.25>>).sqrt(), timestep",
        "sample: --t-star ignored": "sample_one_step(g, <<args.t_star or  => >>t_star, z",
        "sample: --guidance ignored": "<<guidance if args.guidance is None else args. => >>guidance,"},
    "03_pixart_t2i.py  tests/test_t2i.py tests/test_lab.py -k 'release or masks or guidance or t5_eq "
    "or decoder or spelling or captions_and or timestep'": {
        "(B.14): one timestep off": "timestep = <<999 => 1000>> -",
        "(B.14): t rounded, too": "t = <<t => noise_table(x.device)[999 - timestep]>>.to(x.dtype)",
        "attention without the mask": "product_attention(q, k, v<<, mask => >>)",
        "padding is a valid token": "torch.arange(tokens) <<< => <=>> len(v)",
        "T5 without its mask": "encoder(text.input_ids<<, text.attention_mask => >>)",
        "guidance of three channels": "<<guided -  => F.pad(guided[:, :3], (0, 0) * 2 + (0, 1)) - >>free)",
        "latents times their scale": "latents <</ => *>> self.scaling_factor",
        "VAE: scale 0.18": '"scaling_factor", <<0.18215 => 0.18>>',
        "features at another noise level": "def token_features(net, images, t=<<0.2 => 0.3>>)"},
    "eval_fid.py  tests/test_eval.py -k 'not bad'": {
        "FID: covariances over n": "torch.outer(mu, mu)) / <<(n - 1) => n>>",
        "IS: 5 splits": "SPLITS = <<10 => 5>>",
        "IS: splits off by one": "(<<(index + 1) => index>> * SPLITS<< - 1 => >>) // n",
        "KID: a kernel of degree 2": "/ a.shape[1] + 1)**<<3 => 2>>",
        "KID: biased": "(size * <<(size - 1) => size>>)",
        "precision: the second neighbour": "centres, k=<<3 => 2>>)",
        "precision and recall swapped": "return <<share_in_balls(fake, real),  => >>share_in_balls(real"
                                        ", fake)<< => , share_in_balls(fake, real)>>",
        "trials: std over n": "np.std(values<<, ddof=1 => >>)",
        "trials: the same seeds": "args.seed + args.trials<< * n, n => , 1>>)",
        "--nfe 3 takes five evaluations": "num_steps=<<(args.nfe + 1) // 2 => args.nfe>>)"},
    "lab/neighbours.py  tests/test_neighbours.py": {
        "CD: target not detached": "with torch.<<no => enable>>_grad():\n            target = jump(self.g, h",
        "CD: two steps of the grid": "grid[i], grid[i + <<1 => 2>>], grid[(i",
        "CT: target not detached": "with torch.<<no => enable>>_grad():\n            target = jump(self.g, d",
        "CT: no 1 / (t - s)": ".d(y)<< / (t - s).flatten() => >>",
        "DMD: the weight of the regression": "loss + <<0.25 => 2.5>> *",
        "ADD: target not detached": "with torch.<<no => enable>>_grad():\n            target = self.d_q",
        "PaGoDA: the discriminator's sign": "F.softplus(<<- => >>self.logit(x)) + F",
        "flow: tau in [0, 0.5]": "<< => 0.5 * >>torch.rand_like(x_0[:, :1])",
        "flow: the velocity reversed": "(v <<- => +>> (eps - x_0))",
        "neighbours: --anneal ignored": 'if <<args.anneal == "linear" => False>> else 1',
        "neighbours: EMA one batch ahead": "ema_beta(<<step => (step + 1)>> * args.b",
        "--teacher flow runs exact": '<<args.teacher == "flow" => False>>, toy'},
}
# (name, file, change, why no test can tell the two apart)
EQUIVALENT = [
    ("(B.12): -eps for eps", "common.py", "return x_0 <<+ => ->> t * (torch",
     "only the noise is left to itself, and it has the same distribution with either sign"),
    ("directions: all around", "01_toy_2d.py", "polar(torch.ones(directions), << => 2 * >>math.pi",
     "a projection and its mirror image have the same distance")]


class Mutant:
    """A file, pytest's arguments, the name of the mutation and its change."""
    def __init__(self, where, name, change):
        self.name, (self.file, self.tests) = name, where.split("  ")
        self.old, self.new = [re.sub("<<(.*?) => (.*?)>>", rf"\{i}", change, flags=re.DOTALL)
                              for i in (1, 2)]

    def source(self):
        """The file's text with the mutation in it. UserError unless the old text occurs once."""
        text = (ROOT / self.file).read_text()
        found = text.count(self.old)
        require(found == 1, f"{self.name}: {self.old!r} occurs {found} times in {self.file}")
        return text.replace(self.old, self.new)


MUTANTS = [Mutant(where, *pair) for where, some in MUTATIONS.items() for pair in some.items()]


def copy_project(folder):
    """The tracked files, as they stand in the working tree, in a new folder."""
    with reading(ROOT, "a git repository, whose tracked files are copied"):
        files = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, text=True,
                               capture_output=True).stdout.split("\0")
    for name in [name for name in files if name and (ROOT / name).exists()]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def in_a_child(folder, tests):
    """Runs the tests of the copy in this process, which was forked for it, and ends it."""
    os.setsid()  # a group of its own, with what the tests start
    said = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "lab")]:
        del sys.modules[name]  # the copy's own are imported
    # Python would keep compiled code by a file's size and time in seconds: mutations may share both.
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    status = 99
    try:
        status = int(pytest.main([*shlex.split(tests), "-x", "-rfE", "--tb=no", "--color=no", "-p",
                                  "no:cacheprovider"]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_tests(folder, tests, limit):
    """-> pytest's exit status, or None after `limit` seconds; and the first test that failed."""
    sys.stdout.flush()
    child, end = os.fork() or in_a_child(folder, tests), time.time() + limit
    while not (ended := os.waitpid(child, os.WNOHANG))[0]:
        time.sleep(0.05)
        if time.time() > end:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| |$)",
                       folder.with_suffix(".txt").read_text(), re.MULTILINE)
    return os.waitstatus_to_exitcode(ended[1]), failed[1] if failed else ""


def verdict(folder, mutant, limit):
    """-> the test that killed the mutation, or "SURVIVED" and how."""
    (folder / mutant.file).write_text(mutant.source())
    status, test = run_tests(folder, mutant.tests, limit)
    shutil.copyfile(ROOT / mutant.file, folder / mutant.file)
    if status == 1 and test:  # 2 to 5: pytest has run no test
        return test
    return f"SURVIVED ({f'status {status}' if status is not None else f'{limit} s'})"


def write_table(path, rows):
    """rows of (mutation, file, killed by), then the equivalent mutations, as a Markdown table."""
    rows = rows + [(name, file, f"equivalent: {why}") for name, file, _, why in EQUIVALENT]
    lines = [f"| {name} | `{file}` | {by} |".replace("|y|", "\\|y\\|") for name, file, by in rows]
    with atomic(path) as temporary:
        temporary.write_text("\n".join(["| mutation | file | killed by |", "|---|---|---|", *lines])
                             + "\n")


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("names", nargs="*", metavar="NAME", help="of mutations; all of them unless given")
    add("--list", action="store_true", help="only print the names")
    add("--limit", type=count, default=300, help="seconds for the tests of a mutation")
    add("--out", default="runs/mutants.md", help="the table")
    args = parser.parse_args(argv)
    known, rows, begun = {mutant.name: mutant for mutant in MUTANTS}, [], time.time()
    for name in args.names:
        require(name in known, f"there is no mutation {name!r}: --list prints their names")
    chosen = [known[name] for name in args.names or known]
    if args.list:
        return print("\n".join(f"{mutant.file:18} {mutant.name}" for mutant in chosen))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "copy"
        copy_project(folder)
        for tests in progress(list(dict.fromkeys(mutant.tests for mutant in chosen)), "unchanged"):
            status, test = run_tests(folder, tests, args.limit)
            require(status == 0, f"pytest {tests}: status {status} without a mutation. {test}")
        for mutant in progress(chosen, "mutations"):
            rows.append((mutant.name, mutant.file, verdict(folder, mutant, args.limit)))
            print(f"{mutant.name:45} {rows[-1][2]}", flush=True)
            write_table(args.out, rows)
    survived = [name for name, _, by in rows if by.startswith("SURVIVED")]
    print(f"{len(rows) - len(survived)} of {len(rows)} killed, {time.time() - begun:.0f} s; "
          f"survived: {', '.join(survived) or 'none'}; {args.out}")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
