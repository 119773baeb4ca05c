"""Many runs of the stages, as tables and pictures; and the curves of any runs.

    python lab/studies.py figure-2-toy --jobs 2       SIM, SiD, Diff-Instruct, ring: 20 minutes
    python lab/studies.py figure-2-fashion --jobs 2   the same on Fashion-MNIST: some 75 minutes
    python lab/studies.py neighbours --jobs 2         fifteen methods on the ring: 22 minutes
    python lab/studies.py bf16 --jobs 2               bfloat16: 15 minutes. --help names the others
    python lab/studies.py figure-2-toy --draw         tables and curves from assets/results alone
    python lab/studies.py plot runs/ring-sim-phuber-0 runs/ring-sim-l2-0 --keys divergence,sw2

A study starts the runs that are not finished in runs/studies, by their own commands. Remove the
runs there after a change of the code. The results go to assets/results/NAME.json, a line for each
run, and the picture to assets/NAME.png. Tables show the least and the greatest of the seeds.
"""
import importlib
import json
import math
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from common import (UserError, at_least_0, atomic, count, image_grid, load_generator,
                    one_line_errors, plain_parser, progress, reading, require, save_picture)

from lab import neighbours

RUNS, RESULTS = ROOT / "runs" / "studies", ROOT / "assets" / "results"


# ---- The studies ----
@dataclass
class Study:
    """Runs of a stage, by its command: panels {title: {label: flags}}. A run is judged by a key of
    its log, which has this name, and drawn as a curve or, with samples, as what it generates. Each
    run has these seeds. Figure 2 asks how soon a run reaches the figure `goal`."""
    command: str
    key: str
    name: str
    panels: dict
    samples: bool = False
    seeds: range = range(3)
    goal: float = 0.0


def each(runs, more):
    """-> runs {label: flags} with more flags."""
    return {label: f"{flags} {more}".strip() for label, flags in runs.items()}


TOY = ("01_toy_2d.py --part distil", "sw2", "sliced Wasserstein-2")
IMAGES = ("02_edm_cifar.py --teacher fashion --preset fashion", "fd", "FD-judge")
METHODS = {"SIM, Pseudo-Huber": "", "SIM, l2": "--distance l2", "SiD, alpha 1": "--method sid",
           "SiD, its own settings": "--method sid --sid-alpha 1.2 --p-theta karras",
           "Diff-Instruct": "--method di"}
SETTINGS = {"nowgt, log-normal": "", "nowgt, Karras": "--p-theta karras",
            "sidwgt, log-normal": "--weight sidwgt",
            "sidwgt, Karras": "--weight sidwgt --p-theta karras"}
CONSTANTS = {"c = 1": "--distance phuber,c=1", "c = 0.01": "--distance phuber,c=0.01",
             "c = 0.001": "", "c = 0.0001": "--distance phuber,c=0.0001"}
NEIGHBOURS = METHODS | {
    "DMD": "--method dmd", "ADD": "--method add", "CD": "--method cd", "iCT": "--method ct",
    "MCM, 4 evaluations": "--method mcm", "PaGoDA": "--method pagoda"}
RATES = {"0.3 times the lr": "--lr 0.0006", "the preset's lr": "", "3 times the lr": "--lr 0.006"}
# The study "rates" found these to be the best, in times the preset's lr. All others have 1.
BEST = {"SIM, l2": 0.3, "SiD, alpha 1": 0.3, "DMD": 3, "ADD": 0.3, "CD": 3, "MCM, 4 evaluations": 3,
        "PaGoDA": 0.3}
AT_THEIR_BEST = {label: f"{flags} --lr {0.002 * BEST.get(label, 1):.4g}".strip()
                 for label, flags in NEIGHBOURS.items()}
ABLATIONS = {"DMD without pairs": "--method dmd_kl --lr 0.006",
             "DMD without KL": "--method dmd_pairs --lr 0.006",
             "CD, 2 evaluations": "--method cd_steps --lr 0.006",
             "CD, 4 evaluations": "--method cd_steps --segments 4 --lr 0.006"}
AFTER = {
    "SIM": "", "SIM without d_psi": "--method kernel", "drifting": "--method drifting",
    "lr of psi 3 x g's": "--lr-psi 0.006", "5 psi updates": "--psi-updates 5",
    "SiDA": "--method sida", "RealUID": "--method realuid",
    "reward, 0.01": "--method reward --reward 0.01", "reward, 0.1": "--method reward",
    "SIM, 2 evaluations": "--method few", "SIM, 4 evaluations": "--method few --segments 4"}
F_NAMES = {"reverse KL": "reverse_kl", "forward KL": "forward_kl", "Jeffreys": "jeffreys",
           "Jensen-Shannon": "js", "chi-square": "chi2"}
F_DIVERGENCES = {"Uni, reverse KL, all t": "--method uni --t-min 0"} | {
    f"{label}, {name}": f"--method {method} --divergence {f}"
    for label, method in (("Uni", "uni"), ("f-distill", "f_distill"))
    for name, f in F_NAMES.items()}
B10, KARRAS = "--p-mean -3.5 --p-std 2.5", "--p-theta karras"
TIMES = {f"{times}, {weight}": f"{flags} --weight {weight}".strip()
         for times, flags in (("ring's times", ""), ("(B.10)", B10), ("Karras", KARRAS))
         for weight in ("nowgt", "sidwgt")}
TIMES_OF_SID = {f"SiD: {label}": f"--method sid {flags}" for label, flags in TIMES.items()}
TIMES_OF_IMAGES = {  # without "--weight nowgt", which is the default: one run for two tables
    label: flags.replace("--weight nowgt", "").strip() for label, flags in TIMES.items()}
TABLE_4 = {
    "l2": "--distance l2", "power, alpha = 4": "--distance power", "exp": "--distance exp",
    "l1": "--distance l1", "smoothl1": "--distance smoothl1", "huber": "--distance huber",
    "Pseudo-Huber, c = 1": "--distance phuber,c=1",
    "Pseudo-Huber, c = 0.1": "--distance phuber,c=0.1",
    "Pseudo-Huber, c = 0.01": "--distance phuber,c=0.01", "Pseudo-Huber, c = 0.001": "",
    "Pseudo-Huber, c = 0.0001": "--distance phuber,c=0.0001"}
SHORT = "--steps 200"  # a third of the preset's, on images
WRONG = {"SIM": "", "d' detached": "--method d_prime_detached",
         "d_q detached": "--method d_q_detached",
         "d(y) back-propagated": "--method d_backpropagated"}
T_STARS = {"t* = 0.05": "--t-star 0.05", "t* = 0.5": "--t-star 0.5", "t* = 2.5": "",
           "t* = 20": "--t-star 20"}
TEACHERS = {"exact scores": "", "diffusion model": "--teacher learned",
            "rectified flow": "--teacher flow"}
COLUMNS = {  # of a table, where a run has this figure: title and format
    "fd": ("FD-judge", ".2f"), "class_accuracy": ("right class", ".1%"),
    "sw2": ("sliced W2", ".3g"), "share_on_modes": ("on modes", ".1%"),
    "poorest": ("poorest mode", ".1%"), "richest": ("richest", ".1%"),
    "evaluations": ("evaluations", "d"), "seconds": ("seconds", ".0f")}


def on_images(runs):
    """The ring's runs {label: flags} -> the same runs for images, short, with labels that fit."""
    return {label.replace("ring", "preset"): flags for label, flags in each(runs, SHORT).items()}


def figure_2(**rates):
    """The paper's Figure 2 -> panels: METHODS with the flags of each learning rate, and SIM's
    settings with the flags of the first one."""
    first = next(iter(rates.values()))
    panels = {title.replace("_", " "): each(METHODS, flags) for title, flags in rates.items()}
    return panels | {"SIM: weight and times": each(SETTINGS, first),
                     "SIM: Pseudo-Huber's c": each(CONSTANTS, first)}


STUDIES = {
    "rates": Study(*TOY, {title: each(NEIGHBOURS, lr) for title, lr in RATES.items()},
                   seeds=range(1)),
    "neighbours": Study(*TOY, {"neighbours": AT_THEIR_BEST, "with and without": ABLATIONS},
                        samples=True, seeds=range(1, 4)),
    "after-the-paper": Study(*TOY, {"after the paper": AFTER, "f-divergences": F_DIVERGENCES},
                             samples=True),
    "times": Study(*TOY, {"SIM": TIMES, "SiD": TIMES_OF_SID}, samples=True),
    "distances": Study(*TOY, {"distances": TABLE_4}, samples=True),
    "stop-gradients": Study(*TOY, {"stop-gradients": WRONG}, samples=True),
    "teachers": Study(*TOY, {"teachers": TEACHERS}, samples=True),
    "t-star": Study(*TOY, {"t*": T_STARS}, samples=True),
    "figure-2-toy": Study(*TOY, figure_2(
        preset_lr="--anneal none --steps 1500",
        three_times_that="--anneal none --lr 0.006 --steps 1500",
        ten_times_that="--anneal none --lr 0.02 --steps 1500"), goal=0.06),
    "figure-2-fashion": Study(*IMAGES, {
        "preset lr": each(METHODS, "--anneal none --steps 100"),
        "three times that": each(METHODS, "--anneal none --lr 6e-4 --steps 100"),
        "ten times that": each(METHODS, "--anneal none --lr 2e-3 --steps 100")}, goal=50),
    "fashion": Study(*IMAGES, {
        "times and weights": on_images(TIMES_OF_IMAGES), "distances": on_images(TABLE_4)}),
    "fashion-sid": Study(*IMAGES, {"SiD on Fashion-MNIST": on_images(TIMES_OF_SID)}),
    "bf16": Study(*IMAGES, {
        "precision": each({"float32": "", "bfloat16": "--amp bf16"}, SHORT)})}


# ---- Runs ----
def command_of(study, flags):
    """The command of a run, in words. Methods and teachers that stage 1 lacks are neighbours'."""
    if {*neighbours.NEIGHBOURS, "flow"} & {*flags.split()}:
        return ["lab/neighbours.py", *flags.split()]
    return f"{study.command} {flags}".split()


def folder_of(study, flags, seed):
    words = f"{flags} --seed {seed}".replace("--", "").split()
    return RUNS / Path(command_of(study, flags)[0]).stem / "_".join(words)


def run_once(study, flags, seed, jobs):
    """A run by its own command, if it is not finished. -> why it stopped, or None. A loss that is
    not finite is a result; UserError for any other reason to stop."""
    folder = folder_of(study, flags, seed)
    if (folder / "metrics.json").exists():
        return None
    command = [*command_of(study, flags), "--seed", str(seed),
               "--out", os.path.relpath(folder, ROOT)]  # a path that NAME.json may quote
    threads = {"OMP_NUM_THREADS": str(max(1, (os.cpu_count() or 1) // jobs))}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=os.environ | threads,
                          stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    why = done.stderr.strip().split("\n")[-1]
    if done.returncode and "the last good checkpoint" not in why:
        raise UserError(f"python {shlex.join(command)} stopped: {why}")
    return why if done.returncode else None


def read_json(path):
    """A file of JSON, or of lines of JSON without a last line that a kill cut short."""
    with reading(path, "a file that a run wrote: make it anew"):
        text = path.read_text()
        if path.suffix == ".jsonl":
            return [json.loads(line) for line in text.split("\n")[:-1]]
        return json.loads(text)


def summarise_run(study, flags, seed, stopped):
    """A run's line of NAME.json: its figures, and its curve [(samples seen, value), ...]."""
    folder = folder_of(study, flags, seed)
    args, lines = read_json(folder / "args.json"), read_json(folder / "log.jsonl")
    looks = {round(args["steps"] * (i / 12)**2) for i in range(13)}  # every stage looks at these
    curve = [[line["step"] * args["batch"], float(f"{line[study.key]:.3g}")]
             for line in lines if study.key in line and line["step"] in looks]
    found = {} if stopped else read_json(folder / "metrics.json")
    if "mode_shares" in found:
        shares = found["mode_shares"]
        found |= {"poorest": min(shares), "richest": max(shares),
                  "evaluations": args.get("segments", 1)}
    figures = {key: round(found[key], 5) for key in COLUMNS if key in found}
    return {"flags": flags, "seed": seed, "stopped": stopped, **figures, "curve": curve}


def run_study(name, seeds, jobs):
    """All runs of a study, `jobs` at once, to NAME.json; and the picture of their samples."""
    study = STUDIES[name]
    flags = dict.fromkeys(flags for panel in study.panels.values() for flags in panel.values())
    runs = [(study, f, seed) for seed in dict.fromkeys(seeds or study.seeds) for f in flags]
    with ThreadPoolExecutor(jobs) as pool:
        stops = list(progress(pool.map(lambda run: run_once(*run, jobs), runs), name, len(runs)))
    rows = [json.dumps(summarise_run(*run, stopped)) for run, stopped in zip(runs, stops)]
    RESULTS.mkdir(parents=True, exist_ok=True)
    with atomic(RESULTS / f"{name}.json") as temporary:
        temporary.write_text("[" + ",\n ".join(rows) + "]\n")
    if study.samples:
        draw_samples(study, runs[0][2], RESULTS.parent / f"{name}.png")


# ---- Tables and pictures ----
def report_study(name):
    """NAME.json as tables, one for each panel; and as curves, unless the study draws samples.
    UserError if a run is missing there."""
    study, path = STUDIES[name], RESULTS / f"{name}.json"
    rows, runs = read_json(path), {}
    for row in rows:
        runs.setdefault(row["flags"], []).append(row)
    wanted = {flags for panel in study.panels.values() for flags in panel.values()}
    missing = sorted(wanted - runs.keys())
    require(not missing, f"{path} has no run of {missing[:1]}: python lab/studies.py {name} makes "
            "the file anew")
    costs = () if study.samples else ("evaluations", "seconds")  # curves compare quality alone
    keys = [key for key in COLUMNS if key not in costs and any(key in row for row in rows)]
    for title, panel in study.panels.items():
        print("", " | ".join([f"| {title}", *[COLUMNS[key][0] for key in keys]]) + " |", sep="\n")
        print("|---" * (len(keys) + 1) + "|")
        for label, flags in panel.items():
            figures = [extremes(runs[flags], key) for key in keys]
            print(" | ".join([f"| {label}", *figures]) + " |")
    if study.goal:
        report_figure_2(study, runs)
    if not study.samples:
        draw_study(study, runs, RESULTS.parent / f"{name}.png")


def report_figure_2(study, runs):
    """The paper's two claims as a table. How robust is a method? The best figure of all its runs,
    and the lr at which its worst seed ends within 2 times that figure. How fast is a method? The
    samples that are seen, at the first lr, until the goal is reached."""
    panels = {title: runs for title, runs in study.panels.items() if runs.keys() == METHODS.keys()}
    print(f"\n| method | best | lr within 2 times that | samples to {study.goal} |\n{'|---' * 4}|")
    for label in METHODS:
        ends = {title: [run.get(study.key, math.inf) for run in runs[panel[label]]]
                for title, panel in panels.items()}
        best = min(map(min, ends.values()))
        within = [title for title, values in ends.items() if max(values) <= 2 * best < math.inf]
        first = next(iter(panels.values()))[label]
        seen = [next((images for images, value in run["curve"] if value <= study.goal), math.inf)
                for run in runs[first]]
        reached = " to ".join(dict.fromkeys(f"{n:,}" for n in (min(seen), max(seen))))
        print(f"| {label} | {best:.3g} | {', '.join(within)} | {reached} |")


def extremes(runs, key):
    """The least and the greatest figure of runs, as text; and how many runs stopped without one."""
    values = sorted(run[key] for run in runs if key in run)
    text = " to ".join(dict.fromkeys(format(v, COLUMNS[key][1]) for v in values[:1] + values[-1:]))
    stopped = f"{len(runs) - len(values)} stopped" if len(values) < len(runs) else ""
    return ", ".join(filter(None, (text, stopped)))


def draw_samples(study, seed, path):
    """Samples of all runs of the toy with this seed, after exact ones."""
    toy, random = importlib.import_module("01_toy_2d"), torch.Generator().manual_seed(0)
    mixture, z = toy.make_mixture("ring"), torch.randn(4000, 2, generator=random)
    panels = [toy.panel(mixture, mixture.sample(4000, random), "data")]
    for label, flags in [run for panel in study.panels.values() for run in panel.items()]:
        folder = folder_of(study, flags, seed)
        if not (folder / "g_ema.pt").exists():  # the run stopped before its first checkpoint
            continue
        g, t_star, meta = load_generator(folder, neighbours.make_denoiser)
        x = neighbours.sampler_of(meta)(g, z, t_star)
        stopped = "" if (folder / "metrics.json").exists() else f" (stopped at {meta['step']})"
        panels.append(toy.panel(mixture, x, label + stopped))
    columns = math.ceil(len(panels) / math.ceil(len(panels) / 6))  # at most 6, and rows alike
    while len(panels) % columns:
        panels.append(Image.new("RGB", panels[0].size, "white"))
    images = torch.stack([torch.from_numpy(np.array(v)).permute(2, 0, 1) for v in panels])
    save_picture(image_grid(images, columns), path)


def draw_study(study, runs, path):
    """The curves of runs {flags: rows}, a panel of the study in each axes."""
    rows = 1 if len(study.panels) <= 2 else 2
    across = math.ceil(len(study.panels) / rows)
    figure = Figure(figsize=(5 * across, 4.4 * rows), dpi=80, layout="constrained")
    for i, (title, panel) in enumerate(study.panels.items(), 1):
        axes = figure.add_subplot(rows, across, i, title=title, xlabel="samples seen",
                                  ylabel=study.name)
        for k, (label, flags) in enumerate(panel.items()):
            style = "-" if k < 10 else "--"  # matplotlib has ten colours
            draw_curves(axes, label, style, [np.array(run["curve"]) for run in runs[flags]])
        second = runs[flags][0]["curve"][1][0]
        axes.set_xscale("symlog", linthresh=second)  # so that 0 samples have a place
        axes.set_yscale("log")
        axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary)


def draw_curves(axes, label, style, curves):
    """Curves [(samples seen, value), ...] of a run with several seeds: their median, in a band from
    the least to the greatest of those that went so far."""
    places = max(curves, key=len)[:, 0]
    values = [[curve[i, 1] for curve in curves if i < len(curve)] for i in range(len(places))]
    low, middle, high = zip(*[np.quantile(v, (0, 0.5, 1)) for v in values])
    axes.plot(places, middle, style, label=label)
    axes.fill_between(places, low, high, alpha=0.15, linewidth=0)


def plot_runs(folders, keys, path):
    """plot: these keys of the logs of runs, in one axes for each key that any log has."""
    logs = [read_json(folder / "log.jsonl") for folder in folders]
    found = {key for lines in logs for line in lines for key in line}
    keys = [key for key in keys if key in found]
    require(keys, f"no log has such a key: expected --keys among {', '.join(sorted(found))}")
    figure = Figure(figsize=(5 * len(keys), 4.4), dpi=100, layout="constrained")
    for axes, key in zip(figure.subplots(1, len(keys), squeeze=False)[0], keys):
        curves = [[(line["images"], line[key]) for line in lines if key in line] for lines in logs]
        for folder, curve in zip(folders, curves):
            axes.plot(*np.array(curve).reshape(-1, 2).T, label=folder.name)
        positive = all(value > 0 for curve in curves for _, value in curve)
        axes.set(title=key, xlabel="samples seen", yscale="log" if positive else "linear")
        axes.legend(frameon=False, fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary)
    print(path)


# ---- The command line ----
@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("name", choices=(*STUDIES, "plot"), help="a study; or plot, for the curves of runs")
    add("runs", nargs="*", metavar="RUN", type=Path, help="of plot: folders with a log.jsonl")
    add("--seeds", type=at_least_0, nargs="+", help="of each run, in place of those of the study")
    add("--jobs", type=count, default=1, help="runs at once, which share the cores")
    add("--draw", action="store_true", help="start no runs: tables and curves of NAME.json")
    add("--keys", default="divergence,sw2,fd", help="of plot, those that the logs have")
    add("--out", help="of plot: curves.png in the first run's folder unless given")
    args = parser.parse_args(argv)
    require((args.name == "plot") == bool(args.runs), "plot expects runs, and a study expects none")
    if args.name == "plot":
        return plot_runs(args.runs, args.keys.split(","), args.out or args.runs[0] / "curves.png")
    if not args.draw:
        run_study(args.name, args.seeds, args.jobs)
    report_study(args.name)


if __name__ == "__main__":
    main()
