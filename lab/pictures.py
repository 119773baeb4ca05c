"""Pictures with classes, to train a teacher and a judge on. Distillation itself needs no data.

    python lab/pictures.py DIR --part test --out test.npz       a reference for eval_fid.py

DIR, and the --data of lab/teachers.py, is one of

    a folder with idx files, gzipped or not, as MNIST and Fashion-MNIST have them: train-images...,
        train-labels..., t10k-images..., t10k-labels... (Debian: dataset-fashion-mnist)
    a folder with a subfolder of PNGs or JPEGs for each class
    an .npz of images, uint8 (N, H, W) or (N, H, W, C), and labels (N,), from 0 on

The files named t10k are the part `test`; of other data, a random tenth is. Pictures are grey or
RGB, square, of 16 to 64 pixels, in a multiple of four: the network halves the resolution twice.
"""
import gzip
import importlib
import math
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import numpy as np
import torch
from einops import rearrange

from common import atomic, count, one_line_errors, plain_parser, reading, require

eval_fid = importlib.import_module("eval_fid")


def read_idx(path):
    """An idx file of bytes (yann.lecun.com/exdb/mnist), gzipped or not -> a uint8 array."""
    with reading(path, "an idx file of unsigned bytes"), open(path, "rb") as plain:
        file = gzip.open(plain) if plain.peek(2)[:2] == b"\x1f\x8b" else plain
        head = file.read(4)  # two zeros, 8 for unsigned bytes, and the number of dimensions
        require(head[:3] == b"\0\0\x08" and head[3] in (1, 2, 3), "another header")
        shape = [int(n) for n in np.frombuffer(file.read(4 * head[3]), ">u4")]
        size = math.prod(shape)
        require(0 < size < 2**31, f"its shape is {shape}")
        data = file.read(size + 1)
        require(len(data) == size, f"it holds {len(data)} bytes of an array of shape {shape}")
    return np.frombuffer(data, np.uint8).reshape(shape)


def from_idx(folder, part):
    """-> images (N, H, W), labels (N,), of the files of this part."""
    prefix = {"train": "train", "test": "t10k"}[part]
    arrays = []
    for kind in ("images", "labels"):
        files = sorted(folder.glob(f"{prefix}-{kind}*"))
        require(files, f"{folder} has no file {prefix}-{kind}...: expected four idx files")
        arrays.append(read_idx(files[0]))
    return arrays


def from_folders(folder):
    """-> images (N, H, W, C), labels (N,), by the order of the subfolders' names."""
    images, labels = [], []
    for label, inner in enumerate(sorted(f for f in folder.glob("[!.]*") if f.is_dir())):
        found = eval_fid.folder_of_images(inner)
        check_size(inner, found.shape[1:])  # before all of them are in memory
        images.append(rearrange(found.read(range(found.size)).numpy(), "n c h w -> n h w c"))
        labels += [label] * found.size
    require(images, f"{folder}: expected idx files, or a subfolder of pictures for each class")
    shapes = {x.shape[1:] for x in images}
    require(len(shapes) == 1, f"{folder}: expected one size and mode, got (H, W, C) of {shapes}")
    return np.concatenate(images), np.array(labels)


def check_size(path, size):
    require(size[0] == size[1] and size[0] in range(16, 65, 4), f"{path}: pictures of {size}, "
            "expected squares of 16 to 64 pixels, a multiple of four")


def load_pictures(path, part="train"):
    """--data -> images (N, C, H, W) uint8, labels (N,) int64, of the part "train" or "test".
    UserError for data that no teacher of stage 2 can learn from."""
    path = Path(path)
    has_idx = any(path.glob("train-images*"))
    if path.suffix == ".npz":
        arrays = eval_fid.read_npz(path)
        require({"images", "labels"} <= arrays.keys(), f"{path}: expected images and labels")
        images, labels = arrays["images"], arrays["labels"]
    elif has_idx:
        images, labels = from_idx(path, part)
    else:
        images, labels = from_folders(path)
    shape = images.shape
    require(images.dtype == np.uint8 and (images.ndim == 3 or shape[3:] in ((1,), (3,))),
            f"{path}: images {images.dtype} {shape}, expected uint8 (N, H, W), or (N, H, W, C) of "
            "one channel or three")
    check_size(path, shape[1:3])
    require(shape[0] >= 20, f"{path}: {shape[0]} pictures, expected at least 20")
    require(labels.shape == shape[:1] and labels.dtype.kind in "iu" and
            0 <= labels.min() <= labels.max() < 1000, f"{path}: labels {labels.dtype} "
            f"{labels.shape}, expected {shape[0]} numbers from 0 to at most 999")
    images = torch.from_numpy(images.reshape(*shape[:3], -1).copy()).movedim(-1, 1)
    labels = torch.from_numpy(labels.astype(np.int64))
    if not has_idx:
        order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
        tenth = len(order) // 10
        chosen = order[:tenth] if part == "test" else order[tenth:]
        images, labels = images[chosen], labels[chosen]
    return images, labels


@one_line_errors
def main(argv=None):
    parser = plain_parser(__doc__)
    add = parser.add_argument
    add("data", help="DIR")
    add("--part", choices=("train", "test"), default="test", help="of the data")
    add("--n", type=count, help="the first n pictures; all unless given")
    add("--out", default="test.npz", help="the file")
    args = parser.parse_args(argv)
    require(args.out.endswith(".npz"), f"--out {args.out}: expected an .npz file")
    images, labels = [v[:args.n] for v in load_pictures(args.data, args.part)]
    with atomic(args.out) as temporary:
        np.savez(temporary, images=rearrange(images, "n c h w -> n h w c"), labels=labels)
    print(f"{len(images)} pictures of {int(labels.max()) + 1} classes: {args.out}")


if __name__ == "__main__":
    main()
