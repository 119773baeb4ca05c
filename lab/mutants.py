"""Mutations of the code, one at a time: which test notices each of them?

    python lab/mutants.py                          all of them, ten minutes or more on two cores
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

import pytest
import scipy.stats  # noqa: F401  what the tests need is loaded once, for all of the mutations

from common import atomic, one_line_errors, plain_parser, progress, require

LIMIT = 300  # seconds for the tests of one mutation
# "a<<b => c>>d" replaces abd by acd. {"file  pytest's arguments": {name of a mutation: change}}
MUTATIONS = {
    "common.py  tests/test_paper.py -k 'd_and_d_prime or distance'": {
        "l2: d' without its factor": "lambda y: <<2 * y => y>>)",
        "exp: no beta in d', as in Table 4": "y: <<beta *  => >>expand_as(torch",
        "phuber: d' twice as large, as in Table 4": "lambda y: <<y => 2 * y>> / expand_as(n",
        "mean for sum": "v.reshape(len(v), -1).<<sum => mean>>(1)"},
    "common.py  tests/test_paper.py -k 'times or truncation or loss or lambda or numbers'": {
        "phuber: c = 0.01": "def phuber(c=<<0.001 => 0.01>>)",
        "noise levels: the variance for the std": "mean + std<< => **2>> * torch.randn(shape",
        "--truncate resample clamps": 'while truncate == "<<resample => >>"',
        "resample: at the lower end alone": "(t < t_min)<< | (t > t_max) => >>",
        "sidwgt: not detached": "mean<<.detach() => >>.clamp(min=1e-5)",
        "(B.2): no weight": "batch_sum(<<weight(t) *  => >>(d_psi",
        "SIM: the sign": "loss = <<- => >>batch_sum(distance",
        "SIM: d' detached": "distance.d_prime(y_t<< => .detach()>>) *",
        "SIM: x_t detached": 'falls."""\n    x_t = diffuse(x_0, t, eps)<< => .detach()>>',
        "SiD: the sign of alpha": "+ (1 <<- => +>> alpha) *",
        "Diff-Instruct: nothing stopped": "with torch.<<no_grad => enable_grad>>():\n        x_t",
        "--method di: SIM": '"di": <<di_loss => functools.partial(sim_loss, distance=distance)>>',
        "--sid-alpha ignored": "alpha=<<args.sid_alpha => 1.0>>",
        "--weight ignored": 'if <<args.weight != "own" => False>>',
        "Adam: beta_1 = 0.9": "betas=(<<0.0 => 0.9>>, 0.999)"},
    "common.py  tests/test_paper.py -k 'sampl or dpm or heun or precond'": {
        "schedule: rho = 5": "sigma_max=80, rho=<<7 => 5>>):",
        "Heun: Euler": "if <<torch.as_tensor(t_next).all() => False>>",
        "Heun: in float32": "else x<<.double() => >>\n    for t_cur",
        "DPM-Solver: r inverted": "r = <<math => 1 / math>>.log(t[i - 1] / t[i]) <</ => *>> math",
        "EDM: c_noise": "log() / <<4 => 2>>"},
    "common.py  tests/test_paper.py -k 'ema or frozen or seed_step or micro or update_takes'": {
        "frozen weights get gradients": "frozen.eval()<<.requires_grad_(False) => >>",
        "--lr ignored": '["lr"] = <<lr => 2e-3>>',
        "EMA: half-life of 1e5": "half_life=<<5e5 => 1e5>>, ramp",
        "EMA: the decay for 1 - decay": "list(net.parameters()), <<1 - beta => beta>>)",
        "every rank draws its own batch": "number(seed, step, <<0 => rank_and_ranks()[0]>>)"},
    "common.py  tests/test_edm.py -k two_ranks": {
        "gradients of two ranks halved": "part.view_as(grad)<< =>  / 2>>)"},
    "common.py  tests/test_runs.py tests/test_eval.py -k 'pictures or files_change'": {
        "PNGs: BGR for RGB": "images = images[:, :channels]<< => .flip(1)>>"},
    "01_toy_2d.py  tests/test_toy.py -k 'theorem or exact or projection or measures or numbers'": {
        "(3.7): -eps for -eps / s": "-eps<< / s => >>  # of q",
        "sliced W2: points not sorted": "torch.from_numpy(<<np.sort(lines, axis=0) => lines>>)",
        "sliced W2: exact sets meet themselves": "for j in range(i<< =>  + 1>>)]",
        "on modes: within 5 std": "distance < <<4 => 5>> * mixture.std"},
    "01_toy_2d.py  tests/test_toy.py -k 'train_is_algorithm_2 or pretrain'": {
        "stage 1: --psi-updates ignored": "range(<<args.psi_updates => 1>>)",
        "stage 1: a micro-batch's mean": "(loss_theta.<<sum() / args.batch => mean()>>)",
        "stage 1: --lr-psi ignored": "<<(args.lr_psi or args.lr) => args.lr>> * fall",
        "stage 1: --anneal one step ahead": "fall = 1 - <<step => (step + 1)>> / args.steps",
        "stage 1: EMA one batch ahead": "ema_beta(<<step => (step + 1)>> * args.b",
        "stage 1: always the exact teacher": '<<if args.teacher == "exact" else run. => #>>learned',
        "stage 1: l2's divergence in the log": "divergence=<<distance.d => batch_sum>>(y_t)",
        "stage 1: y_norm without its root": "y_t.flatten(1).norm(dim=1)<< => **2>>)",
        "pretraining: the lr never falls": "2e-3<< * (1 - step / args.pretrain_steps) => >>"},
    "02_edm_cifar.py  tests/test_paper.py tests/test_edm.py -k 'numbers or presets'": {
        "Table 5: batch 128": '"batch": <<256 => 128>>, "lr"',
        "Table 5: lr 1e-4": '"lr": <<1e-5 => 1e-4>>,',
        "Table 5: t* = 1": '"none", "t_star": <<2.5 => 1.0>>',
        "(B.10): mean -1.2": '"p_mean": <<-3.5 => -1.2>>',
        "SiD's code: alpha = 1": '"sid_alpha": <<1.2 => 1.0>>'},
    "common.py  tests/test_edm.py -k train_is": {
        "z not times t*": "(<<args.t_star *  => >>z, t",
        "always class 0": "torch.randint(<<kinds => 1>>, (args"},
    "02_edm_cifar.py  tests/test_edm.py -k train_is": {
        "stage 2: --dropout ignored": "layer.dropout.p = <<args.dropout => 0.0>>"},
    "02_edm_cifar.py  tests/test_edm.py -k 'labels or test_sampling'": {
        "U-Net: label dropout inverted": "<<>= => <>> self.label_dropout)",
        "teacher: 33 evaluations": "labels, num_steps=<<18 => 17>>"},
    "03_pixart_t2i.py  tests/test_paper.py -k numbers": {
        "B.3: batch 512": '"batch": <<1024 => 512>>',
        "B.3: lr 5e-5": '"lr": <<5e-6 => 5e-5>>',
        "B.3: mean -1.2": '"p_mean": <<-2.0 => -1.2>>,',
        "B.3: no checkpointing": '"checkpointing": <<True => False>>',
        "noise table: beta_end 0.03": "torch.linspace(1e-4, <<0.02 => 0.03>>, 1001"},
    "common.py  tests/test_t2i.py -k update_draws": {
        "theta's times from psi's flags": '<<if phase == "psi" else => #>> (args.p_mean',
        "--truncate ignored": "args.t_max, <<args.truncate,  => >>**"},
    "03_pixart_t2i.py  tests/test_t2i.py -k update_draws": {
        "stage 3: always caption 0": "image_shape, <<len(captions) => 1>>, phase"},
    "03_pixart_t2i.py  tests/test_t2i.py -k 'train_is or b15 or run_of_a_miniature'": {
        "stage 3: the whole run unguided": "Guided(pipeline.net, <<args.guidance => 1>>, blank)",
        "stage 3: psi's weights swapped": 'if args.weight_psi == "<<edm => one>>"',
        "stage 3: guidance of the wrong sign": "(<<guided - free => free - guided>>)",
        "(B.14): sigma_data = 0.5": "(t**2 + <<1 => 0.25>>).sqrt(), timestep",
        "sample: --t-star ignored": "sample_one_step(g, <<args.t_star or  => >>t_star, z",
        "sample: --guidance ignored": "guidance if <<args.guidance is None => True>>"},
    "03_pixart_t2i.py  tests/test_t2i.py -k 'timestep or masks or test_guidance or _equals'": {
        "(B.14): one timestep off": "timestep = <<999 => 1000>> -",
        "attention without the mask": "product_attention(q, k, v<<, mask => >>)",
        "padding is a valid token": "torch.arange(tokens) <<< => <=>> len(v)",
        "no guidance of channel 3": "(guided - free)<< => .index_fill(1, torch.tensor(3), 0)>>",
        "latents times their scale": "latents <</ => *>> self.scaling_factor"},
    "03_pixart_t2i.py  tests/test_lab.py -k captions_and": {
        "features at another noise level": "def token_features(net, images, t=<<0.2 => 0.3>>)"},
    "eval_fid.py  tests/test_eval.py -k 'kernel or recall or definition or change_nothing'": {
        "FID: covariances over n": "torch.outer(mu, mu)) / <<(n - 1) => n>>",
        "IS: 5 splits": "SPLITS = <<10 => 5>>",
        "IS: splits off by one": "(<<(index + 1) => index>> * SPLITS<< - 1 => >>) // n",
        "KID: a kernel of degree 2": "/ a.shape[1] + 1)**<<3 => 2>>",
        "precision: the second neighbour": "centres, k=<<3 => 2>>)"},
    "lab/neighbours.py  tests/test_neighbours.py -k 'reward or realuid or ratio or f_div or kls'": {
        "reward: the sign": "self.d_psi) <<- => +>> self.args.reward",
        "RealUID: data scaled as samples": "1 - self.alpha, 1 - <<self.beta => self.alpha>>)",
        "Uni-Instruct: 1 / t^2": "loss / (t**<<3 => 2>> * density)",
        "Uni-Instruct: w detached": "weight = self.weight(x_0, <<diffuse(x_0, t, eps) => "
                                    "diffuse(x_0, t, eps).detach()>>, t)",
        "Uni-Instruct: any density of t": "(t**3<< * density => >>).flatten()",
        "f-divergences: r upside down": "[self.args.divergence](<<log_r => -log_r>>)",
        "f-divergences: Jeffreys without 1": '"jeffreys": lambda log_r:<< 1 + => >>'},
    "lab/neighbours.py  tests/test_neighbours.py -k 'sida or cd_with or dmd or few'": {
        "SiDA: g pleases nobody": "super().theta() + self.gan(<<1 => -1>>)",
        "SiDA: the GAN counts once": "0.1 *<< math.prod(self.shape) * => >>",
        "several steps: the noise is z": "manual_seed(<<2**32 - 1 => 0>>)",
        "few: always the last step": "<<torch.randint(self => (lambda n, *_, **k: torch.tensor("
                                     "n - 1))(self>>.args.segments, (), **",
        "DMD: no pairs": "DMDKL.theta(self)<< + DMDPairs.theta(self) => >>"},
    "lab/neighbours_images.py  tests/test_neighbours.py -k 'on_images'": {
        "images: always class 0": "F.one_hot(<<self.labels => 0 * self.labels>>, classes)",
        "images: data of another class": "self.images[<<places => places.flip(0)>>]",
        "images: SiDA at the first layer": "enc.values()][<<-1 => 0>>]",
        "images: few sampled by one step": "equal_parts(t_star, <<segments => 1>>)"},
    "lab/reward_t2i.py  tests/test_t2i.py -k 'reward'": {
        "stage 3's reward: the sign": "return loss <<- => +>> self.scale",
        "stage 3's reward: another caption's colour": "sums).<<argmin => argmax>>(1)",
        "stage 3's reward: SIM": 'set_defaults(method="<<reward => sim>>"'},
    "lab/neighbours.py  tests/test_neighbours.py -k 'detached or add or loss or hand or flow_as'": {
        "CD: target not detached": "<<no => enable>>_grad():\n            target = jump(self.g, h",
        "CT: target not detached": "<<no => enable>>_grad():\n            target = jump(self.g, d",
        "ADD: target not detached": "<<no => enable>>_grad():\n            target = self.d_q",
        "flow: tau in [0, 0.5]": "<< => 0.5 * >>torch.rand_like(x_0[:, :1])",
        "neighbours: --anneal ignored": 'if <<args.anneal == "linear" => False>> else 1',
        "neighbours: EMA one batch ahead": "ema_beta(<<step => (step + 1)>> * args.b",
        "--teacher flow runs exact": '<<args.teacher == "flow" => False>>, toy'},
}
# name: (file, change, why no test can tell the two apart)
EQUIVALENT = {
    "(B.12): -eps for eps": ("common.py", "return x_0 <<+ => ->> t * (torch",
                             "noise that is drawn has the same distribution with either sign"),
    "sliced W2: around the whole circle": ("01_toy_2d.py", "directions), << => 2 * >>math.pi",
                                           "a direction and its opposite give the same distance")}
TABLE = {name: (*where.split("  "), change) for where, some in MUTATIONS.items()
         for name, change in some.items()}  # {name: (file, pytest's arguments, change)}


def mutate(name, file, change):
    """-> the file's text with the change in it. UserError unless the old text occurs once."""
    old, new = [re.sub("<<(.*?) => (.*?)>>", rf"\{i}", change, flags=re.DOTALL) for i in (1, 2)]
    text = (ROOT / file).read_text()
    require(text.count(old) == 1, f"{name}: {old!r} occurs {text.count(old)} times in {file}")
    return text.replace(old, new)


def copy_project(folder):
    """The files that git tracks, as they stand in the working tree, in a new folder."""
    tracked = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True)
    for name in tracked.stdout.decode().strip("\0").split("\0"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, folder / name)


def be_pytest(folder, tests):
    """For a process that was forked: run the tests of the copy, write what they say, and end."""
    os.setsid()  # a group of processes, with those that the tests start
    said = os.open(folder.with_suffix(".txt"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(said, 1), os.dup2(said, 2)
    os.chdir(folder)
    sys.path[:] = [path for path in sys.path if not Path(path).resolve().is_relative_to(ROOT)]
    for name in [name for name in sys.modules if name.split(".")[0] in ("common", "lab")]:
        del sys.modules[name]  # the copy's own take their place
    # Python tells compiled files by size and second of the source, which mutations may share.
    sys.dont_write_bytecode = True
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONDONTWRITEBYTECODE": "1"}
    status = 99
    try:
        quiet = ["-x", "-rfE", "--tb=no", "--color=no", "-p", "no:cacheprovider"]
        status = int(pytest.main([*shlex.split(tests), *quiet]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def run_tests(folder, tests):
    """-> pytest's exit status, or None after LIMIT seconds; and the first test that failed."""
    child, begun, ended = os.fork(), time.time(), 0
    if child == 0:
        be_pytest(folder, tests)
    while not ended:
        time.sleep(0.05)
        ended, status = os.waitpid(child, os.WNOHANG)
        if not ended and time.time() - begun > LIMIT:
            os.killpg(child, signal.SIGKILL)
            os.waitpid(child, 0)
            return None, ""
    said = folder.with_suffix(".txt").read_text()
    failed = re.search(r"^(?:FAILED|ERROR) tests/(\S+?)(?:\[| |$)", said, re.MULTILINE)
    return os.waitstatus_to_exitcode(status), failed[1] if failed else ""


def write_table(path, rows):
    """rows (mutation, file, killed by), then the equivalent mutations, as a table in Markdown."""
    equivalent = [(name, file, f"equivalent: {why}") for name, (file, _, why) in EQUIVALENT.items()]
    lines = [f"| {name} | `{file}` | {by} |\n" for name, file, by in rows + equivalent]
    with atomic(path) as temporary:
        temporary.write_text("".join(["| mutation | file | killed by |\n|---|---|---|\n", *lines]))


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="of mutations; all unless given")
    parser.add_argument("--list", action="store_true", help="only print the names")
    parser.add_argument("--out", default="runs/mutants.md", help="the table")
    args = parser.parse_args(argv)
    for name in args.names:
        require(name in TABLE, f"there is no mutation {name!r}: --list prints their names")
    chosen, rows, begun = args.names or list(TABLE), [], time.time()
    if args.list:
        return print("\n".join(f"{TABLE[name][0]:18} {name}" for name in chosen))
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place).resolve() / "copy"
        copy_project(folder)
        for tests in progress(list(dict.fromkeys(TABLE[name][1] for name in chosen)), "unchanged"):
            status, failed = run_tests(folder, tests)
            require(status == 0, f"pytest {tests}: status {status} without a mutation {failed}")
        for name in progress(chosen, "mutations"):
            file, tests, change = TABLE[name]
            (folder / file).write_text(mutate(name, file, change))
            status, failed = run_tests(folder, tests)
            shutil.copyfile(ROOT / file, folder / file)
            killed = status == 1 and failed  # 0: all passed; 2 to 5: pytest could not run them
            rows.append((name, file, failed if killed else f"SURVIVED (status {status})"))
            print(f"{name:42} {rows[-1][2]}", flush=True)
            write_table(args.out, rows)
    survived = [name for name, _, by in rows if by.startswith("SURVIVED")]
    print(f"{len(rows) - len(survived)} of {len(rows)} killed in {time.time() - begun:.0f} s, "
          f"{len(survived)} survived: {survived}. The table is {args.out}")
    sys.exit(1 if survived else 0)


if __name__ == "__main__":
    main()
