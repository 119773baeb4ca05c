"""Speed and memory of an update, at any size. Time and memory do not depend on the weights.

    python lab/machine.py speed 2 --teacher fashion --steps 12
    python lab/machine.py speed 2 --teacher uncond --batch 4 --steps 2 --amp bf16
    python lab/machine.py speed 3 --teacher miniature
    python lab/machine.py memory 3 --teacher pixart --batch-gpu 8

`speed` times the teacher's forward and both updates as the stage itself does them: milliseconds and
images/s, and the share of the rate that this machine reaches in a product of square matrices.
`memory` runs the same updates on tensors without contents and counts the bytes that are alive.
The options that follow the number of the stage are the stage's own.
"""
import importlib
import sys
import tempfile
import time
import warnings
import weakref
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parent.parent)]

import numpy as np
import torch
from teachers import unet_args
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from common import EDMPrecond, as_denoiser, one_line_errors, pick_device, require

GIB = 2**30


# ---- What is measured: one of these for each stage ----
def stage_2(args, device):
    """-> forward(n): the teacher on n images; passes: an update of psi and of theta, in forwards (a
    backward is two, or one where weights are frozen); make_run(folder) and train(run)."""
    edm = importlib.import_module("02_edm_cifar")
    require(args.teacher in edm.CIFAR or args.teacher == "fashion",
            f"--teacher {args.teacher}: expected fashion or {', '.join(edm.CIFAR)}")
    fashion = unet_args(side=28, channels=1, classes=10)
    with torch.device(device):
        d_q = edm.make_unet(**edm.CIFAR.get(args.teacher, fashion))
    d_q.eval().requires_grad_(False)
    if args.amp == "bf16":
        d_q = d_q.to(memory_format=torch.channels_last)

    def forward(n):
        x = torch.randn(n, *d_q.image_shape, device=device)
        denoiser = edm.bind_labels(d_q, x.new_zeros(n, d_q.label_dim), args.amp)
        denoiser(x, torch.ones_like(x[:, :1, :1, :1]))

    theta = 3 + 1 + 1 if args.method == "di" else 3 + 2 + 2  # g, d_psi and d_q
    return SimpleNamespace(forward=forward, passes=(args.psi_updates * (1 + 3), theta),
                           make_run=lambda folder: edm.prepare(args, folder, d_q, {"teacher": "-"}),
                           train=lambda run: edm.train(args, d_q, run, dict))


class AnyCaption:
    """Captions of noise, of full length: what the words are changes neither time nor memory."""
    def __init__(self, tokens, channels):
        self.tokens, self.channels = tokens, channels

    def __len__(self):
        return 1

    def __getitem__(self, k):
        return torch.randn(self.tokens, self.channels)


def stage_3(args, device):
    """The same of stage 3. The teacher is guided, which takes two forwards; checkpointing costs one
    more forward of each network that a gradient passes through."""
    t2i = importlib.import_module("03_pixart_t2i")
    require(args.teacher in ("miniature", "pixart"), "--teacher: expected miniature or pixart")
    with torch.device(device):
        net = (t2i.PixArtPrecond(t2i.PixArt()) if args.teacher == "pixart" else
               EDMPrecond(t2i.PixArt(**t2i.MINI_NET)))
    net.eval().requires_grad_(False)
    d_q = t2i.Guided(net, args.guidance)
    captions = AnyCaption(d_q.tokens, net.model.net_args["caption_channels"])

    def forward(n):
        x, cond = torch.randn(n, *d_q.image_shape), t2i.pad([captions[0]] * n, d_q.tokens, device)
        x = x.to(device)
        as_denoiser(net, args.amp, *cond)(x, torch.ones_like(x[:, :1, :1, :1]))

    def train(run):
        for some in (run.d_psi, run.g, net):
            some.model.checkpointing = args.checkpointing
        t2i.train(args, d_q, captions, run, dict)

    again, q = int(args.checkpointing), 1 if args.guidance == 1 else 2
    theta = 3 + again + (1 + q if args.method == "di" else (2 + again) * (1 + q))
    return SimpleNamespace(
        forward=forward, passes=(args.psi_updates * (1 + 3 + again), theta), train=train,
        make_run=lambda folder: t2i.prepare(args, folder, SimpleNamespace(net=net), {}))


# ---- Speed ----
def seconds(device):
    """The time, with nothing under way on the device."""
    if device.type != "cpu":
        torch.accelerator.synchronize()
    return time.perf_counter()


def count_flops(forward):
    """The floating-point operations of forward(1), as torch counts them."""
    with FlopCounterMode(display=False) as counter, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        forward(1)
    return counter.get_total_flops()


def matmul_peak(device, dtype, tries=6):
    """Operations per second of the best of some products of square matrices."""
    size = 8192 if device.type == "cuda" else 1536
    a, times = torch.randn(size, size, device=device).to(dtype), []
    for _ in range(tries):
        begun = seconds(device)
        a @ a
        times.append(seconds(device) - begun)
    return 2 * size**3 / min(times)


def time_updates(args, case, device):
    """-> seconds for an image: of the teacher's forward, of psi's updates, of theta's update."""
    forwards, ends = [], []
    for _ in range(args.steps + 2):
        begun = seconds(device)
        with torch.no_grad():
            case.forward(args.batch_gpu or args.batch)
        forwards.append((seconds(device) - begun) / (args.batch_gpu or args.batch))
    with tempfile.TemporaryDirectory() as folder:
        run = case.make_run(Path(folder))
        for optimiser in (run.opt_psi, run.opt_theta):
            optimiser.register_step_post_hook(lambda *_: ends.append(seconds(device)))
        case.train(run)
    ends = np.array(ends).reshape(-1, args.psi_updates + 1) / args.batch  # one row for each step
    psi = np.median(ends[1:, -2] - ends[:-1, -1])  # the first step is a warm-up
    theta = np.median(ends[1:, -1] - ends[1:, -2])
    return np.median(forwards[2:]), psi, theta


def report_speed(args, case, device):
    """Print the table of `speed`."""
    forward, psi, theta = time_updates(args, case, device)
    dtype = torch.bfloat16 if args.amp == "bf16" else torch.float32
    peak, flops = matmul_peak(device, dtype), count_flops(case.forward)
    cost_psi, cost_theta = case.passes
    print(f"{'':24}ms/image  images/s   GFLOP/s  of the peak  forwards")
    for name, time_image, cost in (("teacher's forward", forward, 1), ("psi update", psi, cost_psi),
                                   ("theta update", theta, cost_theta),
                                   ("both", psi + theta, cost_psi + cost_theta)):
        rate = flops * cost / time_image
        print(f"{name:22}{1e3 * time_image:10.3f}{1 / time_image:10.1f}{rate / 1e9:10.1f}"
              f"{rate / peak:12.1%}{time_image / forward:8.2f} ({cost})")
    print(f"peak {peak / 1e9:.0f} GFLOP/s in {dtype}; {flops / 1e9:.2f} GFLOP an image; "
          f"{memory_in_use(device):.2f} GiB; batch {args.batch}, {args.batch_gpu or args.batch} "
          "at once")


def memory_in_use(device):
    """The peak memory of this process in GiB; on a GPU, that of the GPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / GIB
    import resource  # not on Windows
    unit = GIB if sys.platform == "darwin" else 2**20  # bytes there, KiB on Linux
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


# ---- Memory ----
class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all tensors made inside: of those alive now, and the most there were."""
    def __init__(self):
        super().__init__()
        self.bytes = self.peak = 0
        self.seen = weakref.WeakSet()

    def forget(self, size):
        self.bytes -= size

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage() not in self.seen:
                storage = tensor.untyped_storage()
                self.seen.add(storage)
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.forget, storage.nbytes())
        self.peak = max(self.peak, self.bytes)
        return out


def peak_memory(make_case, args):
    """-> GiB of the weights, after an update (with gradients and Adam's moments), and at the peak.
    What the device's own libraries need comes on top."""
    kept = []
    try:
        with (FakeTensorMode(allow_non_fake_inputs=True), LiveBytes() as live,
              warnings.catch_warnings(), tempfile.TemporaryDirectory() as folder):
            warnings.simplefilter("ignore")  # of copying tensors without contents
            case = make_case(args, torch.device("cpu"))
            run = case.make_run(Path(folder))
            weights = live.bytes
            run.add = lambda **_: None  # which reads the contents of tensors
            run.save = lambda: kept.append(live.bytes)
            case.train(run)
    finally:
        clear_caches()
    return [size / GIB for size in (weights, kept[-1], live.peak)]


def clear_caches():
    """Stage 3 caches two small tables; those made of tensors without contents must not stay."""
    if (t2i := sys.modules.get("03_pixart_t2i")) is not None:
        t2i.position_embedding.cache_clear()
        t2i.noise_table.cache_clear()


def report_memory(args, make_case):
    """Print the line of `memory`."""
    weights, between, peak = peak_memory(make_case, args)
    print(f"batch {args.batch}, {args.batch_gpu or args.batch} at once, --amp {args.amp}: weights "
          f"{weights:.1f} GiB, between updates {between:.1f}, peak {peak:.1f}")


# ---- The command line ----
STAGES = {"2": ("02_edm_cifar", stage_2, "fashion"), "3": ("03_pixart_t2i", stage_3, "miniature")}


def parse(parser, presets, small, words):
    """The stage's options, with the preset `small` for the teacher of this name, else the paper's;
    and three updates, of two micro-batches if --batch-gpu is given."""
    args = parser.parse_args(words)
    preset = args.preset or (small if args.teacher in ("auto", small) else "paper")
    parser.set_defaults(**presets[preset], teacher=small)
    parser.set_defaults(steps=3, log_every=10**9, save_every=1)
    if args.batch_gpu or presets[preset].get("batch_gpu"):
        parser.set_defaults(batch=2 * (args.batch_gpu or presets[preset]["batch_gpu"]))
    return parser.parse_args(words)


@one_line_errors
def main(argv=None):
    words = sys.argv[1:] if argv is None else argv
    if not words or words[0] in ("-h", "--help"):
        return print(__doc__)
    require(words[0] in ("speed", "memory") and words[1:2] and words[1] in STAGES,
            "expected speed or memory, then 2 or 3, as in: python lab/machine.py speed 2")
    module, make_case, small = STAGES[words[1]]
    stage = importlib.import_module(module)
    args = parse(stage.stage_parser(), stage.PRESETS, small, words[2:])
    device = pick_device(args.device, args.tf32)
    if words[0] == "memory":
        return report_memory(args, make_case)
    report_speed(args, make_case(args, device), device)


if __name__ == "__main__":
    main()
