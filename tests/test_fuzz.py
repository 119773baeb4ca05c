"""Every file that a script reads, mutated with a seed: it loads and works, or ends in one line."""
import copy
import importlib
import io
import json
import math
import os
import random
import shutil
import sys
import time
import warnings
from argparse import Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import ROOT, save_judge, save_teacher
from test_edm import peak_mib

sys.path.insert(0, str(ROOT / "lab"))

import common
import eval_fid
import neighbours
import scores
from common import UserError

toy, edm, t2i = [importlib.import_module(name) for name in ("01_toy_2d", "02_edm_cifar",
                                                            "03_pixart_t2i")]
FIXTURES = ROOT / "tests" / "fixtures"
ODD = [None, True, -1, 0, 1, 3, 2**31, 2**62, -2**62, 10**7, 0.5, 1e300, math.nan, math.inf, "",
       "x", "\udcff", "os:abort", [], {}, [5], [[]], {"a": 1}, b"x", torch.ones(2)]


# ---- Mutations ----
def places(value, path=()):
    """-> the path of each value in nested dicts and lists"""
    inner = (value.items() if isinstance(value, dict) else
             enumerate(value) if isinstance(value, list) else ())
    return [path, *(place for key, v in inner for place in places(v, (*path, key)))]


def odd_tensor(w, draw):
    """A tensor of another shape, dtype or content; or of 2^33 numbers that are all the same one."""
    flat = w.flatten()
    return draw.choice([
        lambda: w[None], lambda: flat, lambda: flat[:-1], lambda: flat[:0],
        lambda: w.movedim(0, -1).clone(), lambda: w.half(), lambda: w.double(),
        lambda: w.int(), lambda: w.to(torch.complex64),
        lambda: w != 0, lambda: w * math.nan, lambda: w / 0, lambda: w * 1e30, lambda: w.to("meta"),
        lambda: flat[:1].expand(2**33), lambda: flat[:1].reshape([1] * w.ndim).expand(w.shape),
        lambda: w.to_sparse(), lambda: torch.nn.Parameter(w * 0.5)])()


def mutated(value, draw):
    """A copy of nested dicts and lists in which one value is another, gone, or beside a new one."""
    value = copy.deepcopy(value)
    *above, key = draw.choice(places(value)[1:])
    holder = value
    for step in above:
        holder = holder[step]
    kind = draw.random()
    if isinstance(holder[key], torch.Tensor) and kind < 0.8 and holder[key].ndim:
        holder[key] = odd_tensor(holder[key], draw)
    elif kind < 0.8:
        holder[key] = draw.choice(ODD)
    elif kind < 0.9 or isinstance(holder, list):
        del holder[key]
    else:
        holder[draw.choice(["x", 5, f"{key}.x"])] = holder[key]
    return value


def damaged(data, draw):
    """Bytes in which some are others, or gone."""
    data, at = bytearray(data), draw.randrange(len(data))
    kind = draw.randrange(5)
    if kind < 2:
        for _ in range(draw.choice([1, 1, 30])):
            data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    elif kind == 2:
        del data[draw.choice([0, 1, at]):]
    elif kind == 3:
        del data[at:at + draw.choice([1, 100])]
    else:
        data[at:at] = draw.randbytes(draw.choice([1, 100]))
    return bytes(data)


def plain(value):
    """What JSON has no form for, as a text."""
    return json.dumps(value, default=str)


# ---- Formats: the honest file, how it is written, how it is read and used ----
class Format:
    """An honest file in a folder, which is mutated again and again."""
    def __init__(self, path, read, write=None, value=None):
        self.path, self.read, self.data = Path(path), read, Path(path).read_bytes()
        self.write, self.value = write, value

    def mutate(self, draw):
        if self.write and draw.random() < 0.8:
            with warnings.catch_warnings(action="ignore"):
                self.write(mutated(self.value, draw), self.path)
        elif self.write == write_json and draw.random() < 0.2:
            self.path.write_text(draw.choice(["[" * 50_000, "null", "5", "", '{"a":' * 50_000]))
        else:
            self.path.write_bytes(damaged(self.data, draw))


def write_json(value, path):
    path.write_text(plain(value))


def saved(path, read):
    return Format(path, read, lambda value, path: torch.save(value, path),
                  torch.load(path, weights_only=True))


def text(path, read):
    return Format(path, read, write_json, json.loads(path.read_text()))


def tensors(path, read):
    def write(value, path):
        try:
            save_file({name: v.contiguous() for name, v in value.items()}, path)
        except Exception:  # not everything can be written
            path.write_bytes(b"\x10" * 100)
    return Format(path, read, write, load_file(path))


def of_toy(folder):
    """Of stage 1, and of its neighbours."""
    def make(name, net_args, build, read):
        torch.manual_seed(0)
        common.save({"net_args": net_args, "state_dict": build(**net_args).state_dict(),
                     "t_star": 2.5, "meta": {"mixture": "ring", "segments": 2}}, folder / name)
        typed = Namespace(sample=str(folder / name), n=3, seed=0, out=None)
        return saved(folder / name, lambda: read(typed))
    return [make("a.pt", {}, toy.make_denoiser, toy.sample),
            make("b.pt", {"flow": False}, neighbours.make_denoiser, neighbours.sample)]


def of_stage_2(folder):
    path = save_teacher(folder / "teacher.pt")
    value = torch.load(path, weights_only=True)
    common.save(value | {"meta": {"teacher": "fashion", "judge_sha256": "x", "judged":
                                  {"fd_teacher": 1.0, "class_accuracy_teacher": 0.5}}}, path)

    def read():
        net, t_star, meta = edm.load_denoiser(path)
        net.train()
        z, labels = common.draw_latents(range(2), net.image_shape, net.label_dim)
        edm.sample_one_step(net, t_star, z, labels)
        known = meta.get("judged", {})
        assert all(isinstance(math.isfinite(v), bool) for v in known.values())
        assert isinstance(":" in meta.get("teacher", ""), bool)
    return saved(path, read)


def of_judge(folder):
    path = save_judge(folder / "judge.pt", (3, 8, 8))

    def read():
        judge = edm.load_judge(path, (3, 8, 8))
        figures = edm.grade(judge, torch.randn(4, 3, 8, 8), torch.eye(4, 3))
        assert math.isfinite(figures["fd"] + judge.meta["floor"]["fd_floor"])
    return saved(path, read)


def of_miniature(folder):
    torch.manual_seed(0)
    sizes = {"net": t2i.MINI_NET | {"hidden_size": 8, "depth": 1, "num_heads": 2, "input_size": 4,
                                    "caption_channels": 8},
             "text": t2i.MINI_TEXT | {"d_model": 8, "d_kv": 4, "d_ff": 8, "num_layers": 1}}
    meta = {"prompts": ["a", "b"], "tested": ["a", "b"], "mu": torch.zeros(8),
            "sigma": torch.eye(8), "fd_real": 0.5, "guidance": 1.5, "teacher": "miniature"}
    common.save({"net_args": sizes, "state_dict": t2i.Miniature(**sizes).state_dict(),
                 "t_star": 5.0, "meta": meta}, folder / "g_ema.pt")

    def read():
        pipeline, meta, facts = t2i.load_teacher(str(folder / "g_ema.pt"))
        captions = pipeline.encode([*meta.get("prompts", []), ""])
        test = t2i.Test(pipeline, ["a"], captions[:1], meta)
        guided = t2i.Guided(pipeline.net, meta.get("guidance", 4.5), captions[-1])
        test(lambda z, *cond: t2i.sample_teacher(guided, z, *cond, num_steps=1))
        f"{meta.get('fd_real', 0):8.4g}, {Path(meta.get('teacher', 'x'))}"
    return saved(folder / "g_ema.pt", read)


def of_pth(folder):
    path = Path(shutil.copy(FIXTURES / "pixart" / "original-plain-release.pth", folder / "a.pth"))
    return saved(path, lambda: t2i.load_pixart(path, num_heads=4))


def of_vae(folder):
    shutil.copytree(FIXTURES / "pixart" / "vae", folder / "vae")

    def read():
        t2i.load_vae_decoder(folder)(torch.zeros(1, 4, 2, 2))
    return [text(folder / "vae" / "config.json", read),
            tensors(folder / "vae" / "diffusion_pytorch_model.safetensors", read)]


def of_diffusers(folder):
    from test_t2i import diffusers_folder
    diffusers_folder(folder / "a")

    def read():
        net = t2i.load_pixart(folder / "a")
        assert math.isfinite(net.image_shape[1])
    path = folder / "a" / "transformer"
    return [text(path / "config.json", read),
            tensors(path / "diffusion_pytorch_model.safetensors", read)]


def of_t5(folder):
    shutil.copytree(FIXTURES / "t5", folder / "t5")
    read = lambda: t2i.encode_prompts(folder / "t5", ["a cat"], tokens=8)
    return [text(folder / "t5" / "config.json", read),
            text(folder / "t5" / "tokenizer_config.json", read),
            saved(folder / "t5" / "pytorch_model-00002-of-00002.bin", read)]


def of_clip(folder):
    shutil.copytree(FIXTURES / "clip", folder / "clip")
    files = sorted((FIXTURES / "scored").glob("*.png"))[:2]
    read = lambda: scores.embed(folder / "clip", files, ["a", "b"], "cpu")
    return [text(folder / "clip" / name, read) for name in ("config.json", "tokenizer_config.json",
                                                            "preprocessor_config.json")]


def of_run(folder):
    from test_runs import small_run
    small_run(folder / "run", steps=2)
    for name in ("metrics.json",):  # the run is in its closing
        (folder / "run" / name).unlink()
    kept = {path: path.read_bytes() for path in (folder / "run").iterdir()}

    def read():
        now = {path: path.read_bytes() for path in kept if path.exists()}
        try:
            small_run(folder / "run", steps=2)
        finally:
            for path, data in kept.items():
                if now.get(path) == data:
                    path.write_bytes(data)
            (folder / "run" / "metrics.json").unlink(missing_ok=True)

    def write_lines(value, path):
        path.write_text("".join(plain(line) + "\n" for line in value) if isinstance(value, list)
                        else plain(value) + "\n")
    log = folder / "run" / "log.jsonl"
    lines = [json.loads(line) for line in log.read_text().splitlines()]
    return [saved(folder / "run" / "ckpt.pt", read), text(folder / "run" / "args.json", read),
            Format(log, read, write_lines, lines)]


def of_arrays(folder):
    def as_array(v):
        try:
            return np.asarray(v) if getattr(v, "nbytes", 0) < 10**6 else np.zeros(3)
        except Exception:  # not everything is an array
            return np.array([repr(v)], dtype=object)

    def write(value, path):
        np.savez(path, **{str(name): as_array(v) for name, v in value.items()})
    images = torch.randint(256, (5, 8, 8, 3), dtype=torch.uint8)
    stats = {"mu": torch.zeros(16), "sigma": torch.eye(16), "features": "judge"}
    judge = save_judge(folder / "judge.pt", (3, 8, 8))
    args = Namespace(source="x", reference=str(folder / "stats.npz"), features="judge",
                     judge=str(judge))
    known = eval_fid.Images("x", None, (3, 8, 8), 5, None)

    def read_images():
        found = eval_fid.open_images(folder / "images.npz")
        found.read([0])

    def read_stats():
        arrays, _ = eval_fid.load_reference(args, known, 16, common.sha256(judge), lambda *_: {})
        if "mu" in arrays:
            eval_fid.frechet_distance(arrays["mu"], arrays["sigma"], torch.zeros(16), torch.eye(16))
    write({"images": images, "labels": torch.arange(5)}, folder / "images.npz")
    write(stats, folder / "stats.npz")
    return [Format(folder / "images.npz", read_images, write, {"images": images, "labels":
                                                               torch.arange(5)}),
            Format(folder / "stats.npz", read_stats, write, stats)]


def of_others(folder):
    """Pictures, prompts, and the results of earlier evaluations."""
    (folder / "images").mkdir()
    for k in range(2):
        Image.new("RGB", (8, 8)).save(folder / "images" / f"{k}.png")
    (folder / "prompts.txt").write_text("a cat\nein Haus am See — größer\n")
    eval_fid.save([{"metrics": {"FID-5": {"mean": 1.0}}}], folder / "fid.json")

    def encode():
        prompts = t2i.read_prompts(folder / "prompts.txt")
        "\n".join(prompts).encode()

    def add():
        eval_fid.add_result(folder / "fid.json", {"n": 5}, None)
    read = lambda: eval_fid.open_images(folder / "images").read([0, 1])
    return [Format(folder / "images" / "1.png", read), Format(folder / "prompts.txt", encode),
            text(folder / "fid.json", add)]


def of_pickle(folder):
    path = Path(shutil.copy(FIXTURES / "ddpmpp-uncond.pkl", folder / "x.pkl"))
    return Format(path, lambda: edm.load_edm_pickle(path))


FORMATS = {  # how many mutations of each file: fewer where a network takes long to build
    of_toy: 30, of_stage_2: 30, of_judge: 60, of_miniature: 30, of_pth: 60, of_vae: 15,
    of_diffusers: 30, of_t5: 10, of_clip: 5, of_run: 60, of_arrays: 60, of_others: 60,
    of_pickle: 10}


@pytest.mark.parametrize("make", FORMATS, ids=lambda make: make.__name__)
def test_a_mutated_file_loads_or_is_refused_in_one_line(make, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(toy, "panel", lambda *_: Image.new("L", (1, 1)))  # takes its time
    monkeypatch.setattr(os, "fsync", lambda file: None)
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 100))
    formats = make(tmp_path)
    begun, before = time.process_time(), peak_mib(reset=True) if sys.platform == "linux" else 0
    refused = total = 0
    for number, file in enumerate(formats if isinstance(formats, list) else [formats]):
        file.read()  # the honest file
        for seed in range(FORMATS[make]):
            draw = random.Random(f"{number}-{seed}")
            file.mutate(draw)
            total += 1
            try:
                with warnings.catch_warnings(action="ignore"):
                    file.read()
            except UserError as error:
                refused += 1
                assert "\n" not in str(error) and len(str(error)) < 600, str(error)
            except Exception as error:
                raise AssertionError(f"{file.path.name}, mutation {number}-{seed}: "
                                     f"{type(error).__name__}: {error}") from error
        file.path.write_bytes(file.data)
    assert 0.1 * total < refused
    assert sys.platform != "linux" or peak_mib() - before < 500
    print(f"{make.__name__}: {refused} of {total} refused, {time.process_time() - begun:.1f} s")
