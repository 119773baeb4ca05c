"""Before you distil a teacher of your own: is it a denoiser, and which settings suit it?

    python lab/check_teacher.py my_file:my_teacher           a minute for a small network on a CPU
    python lab/check_teacher.py runs/fashion_teacher/teacher.pt --n 80 --out check.png

Prints facts about the teacher that 02_edm_cifar.py would get by --teacher, draws a grid of its
samples (35 evaluations), and ends with a command to type. Nothing is trained.
"""
import importlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch

from common import (count, draw_latents, one_line_errors, pick_device, plain_parser, require,
                    save_picture)

edm = importlib.import_module("02_edm_cifar")

LEVELS = [0.01, 0.03, 0.1, 0.3, 1, 3, 10, 30, 100]  # in standard deviations of the samples
LOW, HIGH = 0.01, 0.9  # where a teacher knows something and not everything: errors over variance


def correlation(a, b):
    return torch.corrcoef(torch.stack([a.flatten(), b.flatten()])).nan_to_num()[0, 1].item()


def denoise(d_q, x, t, labels, amp="none"):
    """The teacher at one noise level, for x (B, C, H, W)."""
    return edm.bind_labels(d_q, labels, amp)(x, x.new_full((len(x), 1, 1, 1), t))


@torch.no_grad()
def check_large_noise(d_q, labels):
    """UserError if the output is the noise, where the input is nothing but noise. The output of a
    denoiser, too, may follow the noise, but its size is another one: small if the teacher is good
    there (the variance of the data over t), or large, an error times t, if the teacher is not."""
    t = getattr(d_q, "sigma_range", (0.002, 80.0))[1]
    eps = torch.randn(len(labels), *d_q.image_shape, device=labels.device)
    y = denoise(d_q, t * eps, t, labels)
    require(y.isfinite().all(), f"the output at t = {t:g} is not finite")
    follows = correlation(y, eps)
    for kind, sign, size in (("a network that predicts eps, or a flow's velocity", 1, 1),
                             ("a score", -1, 1 / t), ("a score of a VP process", -1, 1)):
        require(sign * follows < 0.9 or not 0.7 < y.std() / size < 1.4, f"at t = {t:g} the output "
                f"is the noise times {sign * size:.2g} (correlation {follows:.2f}): {kind}; "
                "lab/wrappers.py makes a denoiser of it")


@torch.no_grad()
def errors(d_q, x_0, labels):
    """-> rows (t, denoising error over variance, error of bfloat16 against float32 over variance).
    UserError if at the smallest t the output is not the image."""
    rows, var, std = [], x_0.var().item(), x_0.std().item()
    for level in LEVELS:
        t = level * std
        x_t = x_0 + t * torch.randn_like(x_0)
        y = denoise(d_q, x_t, t, labels)
        rounded = denoise(d_q, x_t, t, labels, "bf16")
        rows.append((t, (y - x_0).square().mean().item() / var,
                     (rounded - y).square().mean().item() / var))
        if level == LEVELS[0]:
            follows = correlation(y - x_0, x_t - x_0)
            require(rows[0][1] < 0.5, f"at t = {t:.2g} the output is {rows[0][1]:.1f} variances "
                    f"from the image (its correlation with the noise is {follows:.2f}): expected "
                    "the image itself. If the network predicts v or a score, use lab/wrappers.py")
    return rows


def crossing(rows, error):
    """-> the noise level at which the error over variance passes `error`, between two rows."""
    for (t0, e0, _), (t1, e1, _) in zip(rows, rows[1:]):
        if e0 <= error < e1:
            return math.exp(math.log(t0) + (error - e0) / (e1 - e0) * math.log(t1 / t0))
    return rows[0][0] if rows[0][1] > error else rows[-1][0]


def suggest(rows):
    """-> {option: value}: noise levels of both networks over the range where the teacher has
    something to say, and t* near its upper end, where an error is 90 % of the largest one. Errors
    above 1 do not count: there the teacher is worse than the mean of the data. Beyond --t-max a
    teacher's errors are most of y_t, and a few updates of such noise can ruin a generator."""
    largest = min(1.0, max(error for _, error, _ in rows))
    low, high = crossing(rows, LOW), crossing(rows, HIGH * largest)
    mean, std = math.log(low * high) / 2, math.log(high / low) / 3.7  # +- 1.85: 94 % of N(0, 1)
    return {"--p-mean": mean, "--p-std": std, "--psi-mean": mean, "--psi-std": std,
            "--t-max": high, "--t-star": high / 2}


def report(args, x_0, rows):
    print(f"samples: min {x_0.min():.3g}, max {x_0.max():.3g}, mean {x_0.mean():.3g}, "
          f"std {x_0.std():.3g}; pictures: {args.out}")
    some = x_0.abs().flatten()[::max(1, x_0.numel() // 10**6)]  # quantile takes 16 M numbers
    if (largest := some.quantile(0.999).item()) > 1.5:
        print(f"stage 2 expects [-1, 1]: divide by {largest:.2g} "
              "(scale= of lab/wrappers.py); a background at 0 or at -1 stays where it is")
    if x_0.mean().abs() > 2 * x_0.std():
        print(f"these data are far from centred: shift by {x_0.mean():.2g} first (shift=)")
    print("t         error / variance   bf16's error / variance")
    for t, error, rounded in rows:
        print(f"{t:<9.3g} {error:<18.3g} {rounded:.2g}")
    if (worst := rows[-1][1]) > 2:
        print(f"at the largest t the error is {worst:.2g} variances, and the mean of the data "
              "would have 1: no denoiser, or one that was not trained there (keep --t-max)")
    safe = all(rounded < 0.01 * error for _, error, rounded in rows)
    print("--amp bf16 adds less than a hundredth to these errors" if safe else
          "--amp bf16 may cost quality: its rounding is more than a hundredth of the error")
    if largest > 10:
        print("next: scale the data or train the teacher further, and then check again")
        return
    options = " ".join(f"{name} {value:.2g}" for name, value in suggest(rows).items())
    print(f"next: python 02_edm_cifar.py --teacher {args.teacher} {options} --lr 3e-4 "
          "--anneal linear --ema-half-life 2000 --dropout 0 --batch 32 --steps 2000")


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("teacher", help="as 02_edm_cifar.py's --teacher")
    add("--n", type=count, default=40, help="samples")
    add("--device", default="auto", help="auto (the best one here), cpu, cuda or mps")
    add("--out", default="check_teacher.png", help="the grid of samples")
    args = parser.parse_args(argv)
    require(args.out.endswith(".png"), f"--out {args.out}: expected a .png")
    device = pick_device(args.device)
    d_q = edm.load_teacher(args.teacher)[0].to(device)
    torch.manual_seed(0)
    z, labels = draw_latents(range(args.n), d_q.image_shape, d_q.label_dim, device=device)
    check_large_noise(d_q, labels)
    x_0 = edm.sample_teacher(d_q, z, labels)
    require(x_0.isfinite().all() and x_0.std() > 0, "samples of the teacher are not finite, or "
            "all the same: expected a trained denoiser")
    rows = math.ceil(args.n**0.5)
    save_picture(edm.picture(d_q, x_0, rows=rows), args.out)
    report(args, x_0, errors(d_q, x_0, labels))


if __name__ == "__main__":
    main()
