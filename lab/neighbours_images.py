"""Methods of lab/neighbours.py that are said to beat their teacher, on Fashion-MNIST.

    python lab/neighbours_images.py --method sida --data DIR       also realuid: both need data
    python lab/neighbours_images.py --method few --segments 4      several evaluations of g
    python lab/neighbours_images.py --sample runs/fashion-few-phuber-0 --n 64

DIR as in lab/pictures.py. The teacher, the judge and all settings are those of stage 2, so that the
figures stand beside those of `python 02_edm_cifar.py`.
"""
import importlib
import sys
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import torch
from torch.nn import functional as F

from common import (Run, count, one_line_errors, pick_device, rank_and_ranks, reading, require)

from lab import neighbours, pictures

edm = importlib.import_module("02_edm_cifar")
LOOKS = 12  # at the generator, as in stage 2


class Pictures:
    """Data (N, C, H, W), uint8, and their classes (N,), to draw from."""
    def __init__(self, images, labels):
        self.images = images[labels.argsort()]  # class by class
        self.counts = labels.bincount()
        self.starts = self.counts.cumsum(0) - self.counts

    def of_classes(self, labels, where):
        """A random picture of each of these classes (B,). -> (B, C, H, W) in [-1, 1]"""
        share = torch.rand(len(labels), **where)
        places = self.starts[labels] + (share * self.counts[labels]).long()
        return self.images[places] / 127.5 - 1


class OnImages:
    """The first base class of a method on images: what it defines replaces the points of stage 1 by
    images (B, C, H, W). Each phase draws its classes, as stage 2 does. Samples, data, the teacher
    and the second network have the same ones."""
    def __init__(self, args, data, d_q, run):
        self.teacher, self.run, self.shape = d_q, run, d_q.image_shape
        super().__init__(args, data, d_q, run)

    def device(self):
        return next(self.teacher.parameters()).device

    def draw_classes(self):
        classes = self.teacher.label_dim
        self.labels = torch.randint(classes, (self.args.batch,), **self.where)
        one_hot = F.one_hot(self.labels, classes).float()
        networks = self.run.d_psi, self.run.g, self.teacher
        self.d_psi, self.g, self.d_q = [edm.bind_labels(net, one_hot, self.args.amp)
                                        for net in networks]

    def psi(self):
        self.draw_classes()
        return super().psi()

    def theta(self):
        self.draw_classes()
        return super().theta()

    def data(self):
        return self.mixture.of_classes(self.labels, self.where)


class SiDA(OnImages, neighbours.SiDA):
    """As on the ring, with another layer."""
    def inner_layer(self):
        return [*self.d_psi.model.enc.values()][-1]  # as in the paper: the end of the encoder


class RealUID(OnImages, neighbours.RealUID):
    """As on the ring."""


class Few(OnImages, neighbours.Few):
    """As on the ring."""


METHODS = {"sida": SiDA, "realuid": RealUID, "few": Few}


@torch.no_grad()
def sample(g, t_star, z, labels, segments=1, batch=200):
    """stage 2's sample_one_step with `segments` evaluations of g."""
    where = neighbours.own_noise(z.device)
    steps = partial(neighbours.renoised_steps, times=neighbours.equal_parts(t_star, segments))
    pairs = zip(z.split(batch), labels.split(batch))
    return torch.cat([steps(edm.bind_labels(g, c), x, where=where) for x, c in pairs])


READ_ONLY_BY = {"sida few": "distance", "few": "segments", "sida realuid": "data"}
UNREAD = ("weight", "sid_alpha", "psi_updates", "batch_gpu", "preset")  # by all methods here


def parse(argv):
    parser = edm.stage_parser(__doc__, METHODS)
    parser.add_argument("--data", metavar="DIR", help="pictures with classes; few needs none")
    parser.add_argument("--segments", type=count, default=2, help="evaluations of g, with few")
    parser.set_defaults(method="sida", log_every=10**8)  # no lines but those of the looks
    args = parser.parse_args(argv)
    if args.sample:
        parser.set_defaults(t_star=None, teacher=None)  # those of the file
        return parser.parse_args(argv)
    require(args.method in METHODS, f"--method {args.method} is for 02_edm_cifar.py")
    neighbours.refuse_unread(parser, args, READ_ONLY_BY)
    for name in UNREAD:
        require(getattr(args, name) == parser.get_default(name),
                f"--{name.replace('_', '-')} is for 02_edm_cifar.py")
    require(args.data or args.method == "few", f"--method {args.method} needs --data DIR")
    return args


def draw_samples(args, device):
    """--sample: pictures of a run, with as many evaluations of g as the run was trained for."""
    _, _, meta = edm.load_denoiser(args.sample, args.teacher, several=True)
    with reading(args.sample, "a run of this script"):
        several = partial(sample, segments=int(meta["segments"]))
    edm.sample(args, device, several)


@one_line_errors
def main(argv=None):
    args = parse(argv)
    device = pick_device(args.device, args.tf32)
    if args.sample:
        return draw_samples(args, device)
    require(rank_and_ranks()[1] == 1, "this script is for one process: start it without torchrun")
    d_q, meta, facts = edm.load_teacher(args.teacher)
    require(d_q.label_dim and isinstance(getattr(d_q, "model", None), edm.SongUNet),
            f"--teacher {args.teacher}: expected a SongUNet with classes")
    d_q, segments = d_q.to(device), args.segments if args.method == "few" else 1
    examiner, data = edm.find_judge(args, d_q, meta), None
    if args.data:
        data = Pictures(*[v.to(device) for v in pictures.load_pictures(args.data)])
        require(data.images.shape[1:] == d_q.image_shape and len(data.counts) == d_q.label_dim
                and (data.counts > 0).all(), f"--data {args.data}: expected images "
                f"{d_q.image_shape}, and some of each of {d_q.label_dim} classes")
    folder = Run.default_folder(args, args.teacher)
    run = edm.prepare(args, folder, d_q, facts | {"segments": segments})
    if not run.finished():
        loop = partial(neighbours.train, mixture=data, methods=METHODS, looks=LOOKS)
        edm.distil(args, run, d_q, examiner, loop, partial(sample, segments=segments))
        if segments > 1:
            print(f"with {segments} evaluations: python lab/neighbours_images.py --sample {folder}")


if __name__ == "__main__":
    main()
