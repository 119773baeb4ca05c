"""02_edm_cifar.py: the U-Net against the original's outputs, pickles that are read and never run,
Algorithm 2 by hand, and runs as typed."""
import http.server
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import threading
import time
import zipfile
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import (DEFAULTS, ROOT, TINY, algorithm_2, changed, command, difference, edm,
                      logged, save_judge, toy, trained, vector)
from PIL import Image
from torch import nn

import common
from common import UserError, edm_sampler

PKL = ROOT / "tests" / "fixtures" / "ddpmpp-uncond.pkl"
CASE = np.load(PKL.with_suffix(".npz"))
REAL = json.loads((PKL.parent / "edm_shapes.json").read_text())
SHORT = ["--steps", "3", "--batch", "8", "--lr", "1e-3", "--device", "cpu", "--dropout", "0",
         "--judge", "none"]


@pytest.fixture
def quick(monkeypatch):
    """The teacher's samples beside the generator's, at a run's end, cost nothing."""
    monkeypatch.setattr(edm, "sample_teacher", lambda net, z, labels: z)


def case(name, dtype):
    """The first of the fixture's inputs or outputs: one image is as good as six."""
    return torch.from_numpy(CASE[name])[:1].to(dtype)


# ---- the network ----
@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_published_checkpoints(name):
    short = name.removeprefix("edm-cifar10-32x32-").removesuffix("-vp")
    with torch.device("meta"):
        net = edm.make_unet(**edm.CIFAR[short])
    assert {key: list(w.shape) for key, w in net.state_dict().items()} == REAL[name]["shapes"]
    assert sum(w.numel() for w in net.parameters()) == REAL[name]["params"]
    assert net.image_shape == (3, 32, 32) and net.label_dim == (10 if "-cond-" in name else 0)


@pytest.mark.parametrize("preset, params", [("uncond", 61.8), ("uncond-ve", 62.8)])
def test_networks_of_64_pixels(preset, params):
    """EDM's FFHQ and AFHQv2 at 64x64: the CIFAR networks with one level more, and their sizes."""
    with torch.device("meta"):
        net = edm.make_unet(**edm.CIFAR[preset] | {"img_resolution": 64,
                                                   "channel_mult": (1, 2, 2, 2)})
        assert net(torch.randn(2, 3, 64, 64), torch.ones(2)).shape == (2, 3, 64, 64)
    assert round(sum(w.numel() for w in net.parameters()) / 1e6, 1) == params


@pytest.mark.parametrize("dtype, bits, limit", [(torch.float32, "f32", 1e-5),
                                                (torch.float64, "f64", 1e-10)])
@torch.no_grad()
def test_outputs_of_the_original(dtype, bits, limit):
    net = edm.load_edm_pickle(PKL).to(dtype)
    near = lambda out, name: (out - case(name, dtype)).norm() < limit * case(name, dtype).norm()
    x, sigma, augment = [case(name, dtype) for name in ("x", "sigma", "augment")]
    assert near(net(x, sigma), f"out_{bits}")
    assert near(net(x, sigma, augment_labels=0 * augment), f"out_{bits}")
    assert near(net(x, sigma, None, augment), f"out_aug_{bits}")
    if dtype == torch.float32:
        assert near(edm_sampler(net, case("latents", dtype)), "samp_f32")
    else:
        assert near(net.model(case("raw_in", dtype), case("raw_cnoise", dtype)), "raw_out_f64")


@torch.no_grad()
def test_labels_and_resampling():
    torch.manual_seed(0)
    ve = {"embedding_type": "fourier", "channel_mult_noise": 2, "encoder_type": "residual"}
    net = edm.make_unet(**TINY, **ve, resample_filter=[1, 3, 3, 1]).double()
    for w in net.parameters():
        nn.init.normal_(w, std=0.3)
    x, one_hot = torch.randn(3, 3, 8, 8).double(), torch.eye(3).double()
    assert torch.equal(net(x, 1.0), net(x, 1.0, 0 * one_hot))
    assert not torch.allclose(net(x, 1.0), net(x, 1.0, one_hot))
    torch.testing.assert_close(net(x, 1.0, one_hot)[1:2], net(x[1:2], torch.ones(1), one_hot[1:2]))
    unet, enc = net.model, net.model.enc
    labelled = unet.map_label.weight.T * 3**0.5 + unet.map_label.bias  # EDM: one-hot times sqrt(n)
    emb = nn.functional.silu(unet.map_layer0(unet.map_noise(torch.ones(1).double()) + labelled))
    emb = nn.functional.silu(unet.map_layer1(emb))
    torch.testing.assert_close(unet.embed(torch.ones(1).double(), one_hot, None, 3), emb)
    h = enc["4x4_down"](enc["8x8_block0"](enc["8x8_conv"](x), emb), emb)
    residual = (h + enc["4x4_aux_residual"](x)) / 2**0.5  # the picture itself, at each level
    seen, see = [], lambda layer, inputs: seen.append(inputs[0])
    with enc["4x4_block0"].register_forward_pre_hook(see):
        unet(x, torch.ones(1).double(), one_hot)
    torch.testing.assert_close(seen, [residual])
    unet.train()
    for share, labels in ((1.0, 0 * one_hot), (1e-9, one_hot)):  # EDM: of the labels in training
        unet.label_dropout = share
        expected = edm.SongUNet.embed(unet.eval(), torch.ones(1).double(), labels, None, 3)
        torch.testing.assert_close(unet.train().embed(torch.ones(1), one_hot, None, 3), expected)
    unet.eval()
    down, up = net.model.enc["4x4_down"].conv0, net.model.dec["8x8_up"].conv0
    box = edm.make_unet(**TINY).double().model.enc["4x4_down"].conv0
    for taps, conv in (([1, 3, 3, 1], down), ([1, 1], box)):
        n = len(taps)  # correlation with the filter, at every second pixel
        f, pad = np.outer(taps, taps) / np.sum(taps)**2, np.pad(x[0, 0].numpy(), n // 2 - 1)
        by_hand = [[(pad[i:i + n, j:j + n] * f).sum() for j in range(0, 8, 2)]
                   for i in range(0, 8, 2)]
        np.testing.assert_allclose(conv.change_resolution(x)[0, 0], by_hand)
    aux = net.model.enc["4x4_aux_residual"]  # fused: the order of filter and weights is free
    filtered = nn.functional.conv2d(nn.functional.pad(x, (2, 2, 2, 2)),
                                    aux.resample_filter.expand(3, 1, 4, 4), groups=3)
    by_hand = nn.functional.conv2d(filtered, aux.weight, aux.bias, stride=2)
    torch.testing.assert_close(aux(x), by_hand)
    a, small = torch.randn(1, 5, 8, 8).double(), torch.randn(1, 5, 4, 4).double()
    torch.testing.assert_close((up.change_resolution(small) * a).sum(),  # up is 4 times down's
                               4 * (small * down.change_resolution(a)).sum())  # transpose


# ---- NVIDIA's pickles ----
class Name(str):
    """Pickled as a name to call, whether there is such a function or not."""
    def __call__(self):
        pass


class Call:
    """Pickled as this call of a Name, or of a real function."""
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


class Writer(pickle._Pickler):
    def save(self, obj, **options):
        if isinstance(obj, Name):
            self.write(b"c" + "\n".join(obj.rsplit(".", 1)).encode() + b"\n")
        else:
            super().save(obj, **options)


def pickled(value):
    stream = io.BytesIO()
    Writer(stream, 4).dump(value)
    return stream.getvalue()


def storage(w=None, data=None):
    """The numbers of w, or any other bytes in their place."""
    stream = io.BytesIO()
    if data is None:
        numbers = torch.storage.TypedStorage(
            wrap_storage=w.contiguous().untyped_storage(), dtype=w.dtype, _internal=True)
        torch.save(numbers, stream, _use_new_zipfile_serialization=False)
    return Call(Name("torch.storage._load_from_bytes"), data or stream.getvalue())


def tensor(w, numbers=None, offset=0, stride=None):
    return Call(Name("torch._utils._rebuild_tensor_v2"), numbers or storage(w), offset,
                tuple(w.shape), stride or w.stride(), False, Call(Name("collections.OrderedDict")))


def module(weights=(), **modules):
    return {"_parameters": dict(weights), "_buffers": {}, "_modules": modules}


torch.manual_seed(0)
HONEST = edm.make_unet(**TINY).state_dict()
STORED = {name: tensor(w) for name, w in HONEST.items()}


def checkpoint(change=(), args=(), class_name="EDMPrecond", tree=None, **beside):
    """A small network in NVIDIA's format, with some tensors or arguments changed."""
    state = (tree or module(STORED | dict(change))) | {"_init_kwargs": TINY | dict(args)}
    meta = {"class_name": class_name, "state": state}
    top = Call(Name("torch_utils.persistence._reconstruct_persistent_obj"), meta)
    return pickled({"ema": top, **beside})


def deflated_zeros():
    """240 MB of zeros in torch's newer format, which is a zip."""
    plain, small = io.BytesIO(), io.BytesIO()
    torch.save(torch.zeros(6 * 10**7).untyped_storage(), plain)
    with zipfile.ZipFile(small, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as file:
        for item in (source := zipfile.ZipFile(plain)).namelist():
            file.writestr(item, source.read(item))
    return small.getvalue()


def hostile():
    """-> {what is wrong with a file: its bytes}"""
    conv, kernel, touch, write = (
        "model.enc.8x8_conv.weight", torch.ones(4, 3, 3, 3), "touch ran", "open('ran', 'w')")
    view = lambda shape, *where: checkpoint({conv: tensor(torch.empty(shape, device="meta"),
                                                          storage(kernel), *where)})
    wide = edm.make_unet(**TINY | {"model_channels": 64}).state_dict().items()
    one, system = storage(torch.ones(1)), pickle.dumps(Call(os.system, touch), 2)
    twice, loop, many = module({"w": tensor(kernel)}), module(), module()
    loop["_modules"]["a"] = loop
    for _ in range(60):
        many = module(a=many, b=many)
    doubled = b"".join(b"h" + bytes([i, ord("h"), i]) + b"\x86\x94" for i in range(60))
    return {
        "system": pickled({"ema": Call(os.system, touch)}),
        "eval": pickled({"ema": Call(eval, write)}),
        "partial": pickled({"ema": Call(__import__("functools").partial, os.system, touch)}),
        "torch.load": pickled({"ema": Call(torch.load, "ran")}),
        "object": pickle.dumps({"ema": np.array([os.getcwd], dtype=object)}, 4),
        "beside": checkpoint(loss_fn=Call(exec, write)),
        "import": pickled({"ema": Call(Name("this.x"))}),
        "getattr": pickled({"ema": Call(getattr, Name("numpy.dtype"), "mro")}),
        "protocol 0": pickle.dumps({"ema": Call(os.system, touch)}, 0),
        "storage": checkpoint({conv: tensor(kernel, storage(data=system))}),
        "deflated": checkpoint({conv: tensor(kernel, storage(data=deflated_zeros()))}),
        "mark": b"\x80\x04(", "no names": b"\x80\x04N\x93.", "empty stack": b"\x80\x04N0.",
        "2^56 bytes": b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00.",
        "2^33 bytes": b"\x80\x05\x96\x00\x00\x00\x00\x02\x00\x00\x00.",
        "LONG_BINPUT": b"\x80\x04Nr\xff\xff\xff\xff.",
        "LONG_BINPUT 2^27": b"\x80\x04Nr\x00\x00\x00\x08.",
        "a million": b"\x80\x04" + b"N0" * 10**6 + b".",
        "deep": b"\x80\x04" + b"]" * 199_000 + b"a" * 198_999 + b".",
        "doubled": b"\x80\x04)\x94" + doubled + b".", "html": b"<!DOCTYPE html>", "empty": b"",
        "after its end": checkpoint() + b"x", "larger than its storage": view((4, 3, 3, 3), 1),
        "huge view": view((10**6, 10**6), 0, (0, 0)), "overflow": view((4,), 0, (2**62,)),
        "negative": view((4,), 0, (-1,)), "another shape": view((4, 4)),
        "loop": checkpoint(tree=loop),
        "a module twice": checkpoint(tree=module(a=twice, b=twice)), "2^60": checkpoint(tree=many),
        "shared numbers": checkpoint({name: tensor(w, one, 0, (0,) * w.ndim) for name, w in wide},
                                     {"model_channels": 64}),
        "superfluous": checkpoint({"more": tensor(kernel)}), "missing": checkpoint(tree=module()),
        "not finite": checkpoint({conv: tensor(kernel / 0)}),
        "another class": checkpoint(class_name="VPPrecond")}


def altered():
    """-> {what was altered in a checkpoint, or cut off: its bytes}"""
    files = {}
    for name, value in (("model_channels", 2048), ("num_blocks", 10**9), ("img_resolution", "8"),
                        ("channel_mult", [1] * 10**6), ("code", 1), ("sigma_data", 1.0),
                        ("model_type", "DhariwalUNet")):
        files[name] = checkpoint(args={name: value})
    for name in edm.CALLS:  # BUILD sets attributes of a function
        names, state = "\n".join(name.rsplit(".", 1)), b"N}X\x03\x00\x00\x00ranNs\x86b."
        files[f"BUILD {name}"] = b"\x80\x04c" + names.encode() + b"\n" + state
    for old, new in ((b"EDMPrecond", b"VPPrecondX"), (b"SongUNet", b"EvilUNet"),
                     (b"_rebuild_tensor_v2", b"_rebuild_tensor_v3"),
                     (b"torch.storage", b"torch.serials"), (b"FloatStorage", b"LongyStorage")):
        files[new.decode()] = PKL.read_bytes().replace(old, new)
    cuts = {f"{part} of it": int(part * PKL.stat().st_size) for part in (0.001, 0.3, 0.9, 0.9999)}
    return files | {name: PKL.read_bytes()[:length] for name, length in cuts.items()}


HOSTILE = hostile() | altered()


def peak_mib(reset=False):
    """The most memory that this process had since the last reset. Linux only."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    return int(re.search(r"VmHWM:\s+(\d+)", Path("/proc/self/status").read_text())[1]) / 1024


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_pickles(name, tmp_path, monkeypatch, capfd):
    """Refused in one line, within seconds and 200 MiB, and nothing is run."""
    monkeypatch.chdir(tmp_path)
    Path("x.pkl").write_bytes(HOSTILE[name])
    linux = Path("/proc/self/clear_refs").exists()
    begun, before = time.time(), peak_mib(reset=True) if linux else 0
    with pytest.raises(UserError, match="x.pkl cannot be used .*: expected an EDM ") as error:
        edm.load_edm_pickle("x.pkl")
    assert not linux or peak_mib() - before < 200
    assert time.time() - begun < 20 and "\n" not in str(error.value) and len(str(error.value)) < 400
    assert not Path("ran").exists() and "this" not in sys.modules and not capfd.readouterr().out
    assert not any(hasattr(function, "ran") for function in edm.CALLS.values())


def test_honest_and_other_files(tmp_path):
    (tmp_path / "x.pkl").write_bytes(checkpoint(beside=1))
    net = edm.load_edm_pickle(tmp_path / "x.pkl")
    assert all(torch.equal(w, HONEST[name]) for name, w in net.state_dict().items())
    assert not any(w.requires_grad for w in net.parameters()) and not net.training
    torch.save({"ema": torch.ones(3)}, tmp_path / "zip.pkl")
    for path in (tmp_path / "zip.pkl", tmp_path / "missing.pkl", tmp_path):
        with pytest.raises(UserError, match="cannot be used"):
            edm.load_edm_pickle(path)


# ---- Algorithm 2 ----
SETTINGS = [  # each flag that changes what is learned stands in one of these
    "", "--method sid --sid-alpha 1.2 --p-theta karras --psi-updates 2 --anneal linear --seed 7",
    "--method di --weight sidwgt --psi-mean 0 --psi-std 0.3 --p-mean 0 --p-std 0.5 --dropout 0.3",
    "--distance exp,alpha=4,beta=0.5 --weight sidwgt --t-star 1 --adam-eps 1e-2 --lr 1e-2",
    "--distance phuber,c=0.5 --ema-half-life 0.001 --batch-gpu 3 --lr-psi 1e-4"]


def small_run(tiny, folder, *options):
    """A run from the tiny teacher, as typed. -> its folder"""
    edm.main(["--teacher", str(tiny), *SHORT, "--out", str(folder), *options])
    return folder


def train_alone(args, run, d_q, examiner):
    edm.train(args, d_q, run, evaluate=dict)


@pytest.mark.parametrize("options", SETTINGS)
def test_train_is_algorithm_2(options, tiny, tmp_path, monkeypatch):
    """Three updates of each network by hand: a flag that is ignored shows as a difference."""
    monkeypatch.setattr(edm, "distil", train_alone)
    d_q = edm.load_denoiser(tiny)[0]
    start = vector(d_q.state_dict().values())
    run = trained(small_run(tiny, tmp_path / "run", *options.split()), start)
    by_hand, figures = algorithm_2(d_q, d_q, (3, 8, 8), 3, **changed(DEFAULTS, options))
    if "--batch-gpu" not in options:
        assert logged(tmp_path / "run") == pytest.approx(figures, rel=2e-3)
    assert difference(run, by_hand) < 2e-3 and difference(run[1:3], by_hand[1:3]) < 1e-4


def test_two_ranks_give_the_weights_of_one_process(tiny, tmp_path, quick, monkeypatch):
    """torchrun, once for both stages: each rank computes half of the batch, in micro-batches."""
    images = ["--teacher", str(tiny), *SHORT, "--lr", "1e-5", "--batch-gpu", "2", "--out"]
    points = ["--part", "distil", *SHORT[:-4], "--lr", "1e-5", "--pretrain-steps", "3", "--out"]
    (tmp_path / "both.py").write_text(f"""if True:
        import importlib, sys, torch
        sys.path.insert(0, {str(ROOT)!r})
        dist = torch.distributed
        destroy, dist.destroy_process_group = dist.destroy_process_group, lambda: None
        edm, toy = importlib.import_module("02_edm_cifar"), importlib.import_module("01_toy_2d")
        edm.sample_teacher, toy.summarise = lambda net, z, labels: z, lambda *args: None
        edm.main({[*images, str(tmp_path / "edm-2")]})
        toy.main({[*points, str(tmp_path / "toy-2")]})
        destroy()  # not earlier: one group serves both stages""")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    done = subprocess.run([*torchrun, tmp_path / "both.py"], text=True, capture_output=True,
                          timeout=300)
    assert done.returncode == 0 and done.stdout.count("step 3/3") == 2, done.stderr
    monkeypatch.setattr(toy, "summarise", lambda *args: None)
    edm.main([*images[:-3], "--out", str(tmp_path / "edm-1")])
    toy.main([*points, str(tmp_path / "toy-1")])
    for stage in ("edm", "toy"):
        ranks, one = [trained(tmp_path / f"{stage}-{number}") for number in (2, 1)]
        assert difference(ranks[:3], one[:3]) < 1e-6 and difference(ranks[3:], one[3:]) < 1e-3


# ---- runs ----
@pytest.mark.slow
@pytest.mark.parametrize("kind, status", [(signal.SIGTERM, 130), (signal.SIGKILL, -9)])
def test_a_killed_run_goes_on(kind, status, tiny, tmp_path, quick, capsys):
    """Stopped and continued: the same as never stopped, bit for bit, with dropout."""
    options = ["--steps", "16", "--dropout", "0.2", "--save-every", "4", "--log-every", "1"]
    whole, folder = small_run(tiny, tmp_path / "whole", *options), tmp_path / "killed"
    typed = command("02_edm_cifar.py", "--teacher", tiny, *SHORT, *options, "--out", folder)
    with subprocess.Popen(typed, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        for line in run.stdout:
            if line.startswith("step 5/"):
                run.send_signal(kind)
        error = run.stderr.read()
    assert run.returncode == status and not (folder / "metrics.json").exists()
    if kind == signal.SIGTERM:
        assert error.count("\n") == 1 and "is saved in" in error and "goes on" in error
    capsys.readouterr()
    small_run(tiny, folder, *options)
    assert "goes on from step" in capsys.readouterr().out
    assert all(map(torch.equal, trained(folder), trained(whole)))
    small_run(tiny, folder, *options)
    assert "is finished" in capsys.readouterr().out


def test_what_a_run_leaves(tiny, tmp_path, quick, monkeypatch, capsys):
    compiled = []
    monkeypatch.setattr(nn.Module, "compile", lambda net: compiled.append(net))
    folder = small_run(tiny, tmp_path / "run", "--amp", "bf16", "--tf32", "--compile")
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    assert lines[-1].keys() == {"step", "loss_psi", "loss_theta", "divergence", "y_norm", "images",
                                "images_s", "seconds", "eta"}
    metrics, args = [json.loads((folder / f"{name}.json").read_text())
                     for name in ("metrics", "args")]
    assert metrics["steps"] == 3 and metrics["teacher"] == str(tiny) == args["teacher"]
    assert args["distance"] == "phuber,c=0.001" and args["teacher_sha256"] == common.sha256(tiny)
    assert args["preset"] == "paper" and args["p_mean"] == -3.5 and args["lr"] == 1e-3
    assert len(list((folder / "samples").glob("*.png"))) == 4  # of steps 0 to 3
    with Image.open(folder / "samples.png") as image:
        assert image.height > 400
    assert f"--sample {folder} --n 64 --teacher-sample" in capsys.readouterr().out
    assert torch.backends.cuda.matmul.allow_tf32 and len(compiled) == 3
    small_run(tiny, tmp_path / "fp32")
    assert not torch.backends.cuda.matmul.allow_tf32
    other = json.loads((tmp_path / "fp32" / "log.jsonl").read_text().splitlines()[-1])
    assert 0 < abs(lines[-1]["loss_psi"] / other["loss_psi"] - 1) < 0.1  # bf16 is near, not equal


def test_an_error_of_ours_keeps_its_traceback(tiny, tmp_path, monkeypatch):
    def broken(*args):
        raise TypeError("ours")
    monkeypatch.setattr(edm, "ema_beta", broken)
    with pytest.raises(TypeError, match="ours"):
        small_run(tiny, tmp_path / "run")


# ---- presets ----
def test_presets(monkeypatch):
    """SiD's settings, from its code, and an option before a preset. test_paper.py has Table 5."""
    seen = []
    finished = SimpleNamespace(finished=lambda: True)
    monkeypatch.setattr(edm, "load_teacher", lambda name: (nn.Linear(1, 1), {}, {}))
    monkeypatch.setattr(edm, "prepare", lambda args, *rest: seen.append(vars(args)) or finished)
    for options in ([], ["--preset", "sid"], ["--preset", "sid", "--sid-alpha", "1"]):
        edm.main(["--teacher", "uncond", *options, "--device", "cpu"])
    paper, sid, changed_sid = seen
    differ = {name: value for name, value in sid.items() if value != paper[name]}
    assert differ == {"method": "sid", "sid_alpha": 1.2, "p_theta": "karras", "preset": "sid"}
    assert changed_sid["sid_alpha"] == 1 and changed_sid["p_theta"] == "karras"


# ---- teachers ----
def test_the_embedded_teacher_and_judge():
    """The teacher makes what was asked for, says the judge, who is right about true pictures."""
    assert edm.FASHION.stat().st_size < 3.5e6 and edm.JUDGE.stat().st_size < 5e5
    net, _, meta = edm.load_denoiser(edm.FASHION)
    judge = edm.load_judge(edm.JUDGE, net.image_shape)
    assert sum(w.numel() for w in net.parameters()) <= 1.6e6 and net.label_dim == 10
    assert judge.meta["floor"]["class_accuracy_floor"] >= 0.925
    assert meta["judge_sha256"] == judge.sha256
    assert 0 < judge.meta["floor"]["fd_floor"] < meta["judged"]["fd_teacher"]
    z, labels = common.draw_latents(range(40), net.image_shape, 10)
    made = edm.grade(judge, edm.sample_teacher(net, z, labels, num_steps=6), labels)
    noise = edm.grade(judge, z, labels)
    assert made["class_accuracy"] > 0.6 > noise["class_accuracy"] and made["fd"] < noise["fd"] / 3
    assert edm.grade(judge, edm.sample_teacher(net, z, labels.roll(1, 1), num_steps=6),
                     labels)["class_accuracy"] < 0.3


def test_the_judge(tmp_path):
    """Its figures by hand; and files that it does not fit."""
    file = save_judge(tmp_path / "judge.pt", (3, 8, 8))
    judge, x = edm.load_judge(file, (3, 8, 8)), torch.randn(20, 3, 8, 8)
    labels = torch.eye(3)[torch.arange(20) % 3]
    seen = [judge(common.to_uint8(one)) for one in x.split(1)]
    features, logits = [torch.cat(v).detach() for v in zip(*seen)]
    found = edm.grade(judge, x, labels, batch=7)
    expected = common.frechet_distance(features.double().mean(0), torch.cov(features.double().T),
                                       judge.meta["mu"], judge.meta["sigma"])
    assert found["fd"] == pytest.approx(expected, rel=1e-4)
    assert found["class_accuracy"] == (logits.argmax(1) == torch.arange(20) % 3).double().mean()
    assert edm.grade(judge, x, labels[:, :0]).keys() == {"fd"}
    saved = torch.load(file, weights_only=True)
    common.save(saved | {"meta": {"mu": 0}}, tmp_path / "bare.pt")
    for path, shape in ((file, (1, 8, 8)), (tmp_path / "none.pt", (3, 8, 8)), (PKL, (3, 8, 8)),
                        (tmp_path / "bare.pt", (3, 8, 8))):
        with pytest.raises(UserError, match="expected a judge of images"):
            edm.load_judge(path, shape)


def test_a_run_with_a_judge(tiny, tmp_path, quick, monkeypatch, capsys):
    """Figures in the log, the best generator, and what the judge's file says of true pictures."""
    monkeypatch.setattr(edm, "LOOK", 20)
    monkeypatch.setattr(edm, "FINAL", 30)
    file = save_judge(tmp_path / "judge.pt", (3, 8, 8))
    folder = small_run(tiny, tmp_path / "run", "--judge", str(file))
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["n"] == 30 and metrics["fd_floor"] == 0.5 and "fd_teacher" not in metrics
    g, t_star, _ = edm.load_denoiser(folder)
    z, labels = common.draw_latents(range(30), (3, 8, 8), 3)
    judge = edm.load_judge(file, (3, 8, 8))
    found = edm.grade(judge, edm.sample_one_step(g, t_star, z, labels), labels)
    assert found == pytest.approx({key: metrics[key] for key in found}, rel=1e-6)
    fds = [json.loads(line)["fd"] for line in (folder / "log.jsonl").read_text().splitlines()]
    best = torch.load(folder / "g_best.pt", weights_only=True)
    assert len(fds) == 4 and best["meta"]["step"] == fds.index(min(fds))
    assert "FD-judge" in capsys.readouterr().out


def test_a_run_with_any_teacher(tiny, tmp_path, monkeypatch, capsys):
    """Without a classifier: sliced W2 to the teacher's samples, which the run's folder keeps."""
    monkeypatch.setattr(edm, "sample_teacher", partial(edm.sample_teacher, num_steps=2))
    monkeypatch.setattr(edm, "compare_with_teacher", partial(edm.compare_with_teacher, n=200))
    folder = small_run(tiny, tmp_path / "run", "--judge", "", "--p-mean", "-2")
    metrics = json.loads((folder / "metrics.json").read_text())
    theirs = torch.load(folder / "teacher_samples.pt", weights_only=True)["images"]
    assert theirs.shape == (400, 3, 8, 8) and metrics["n"] == 200
    g, t_star, _ = edm.load_denoiser(folder)
    ours = edm.sample_one_step(g, t_star, *common.draw_latents(range(200), (3, 8, 8), 3))
    directions = np.random.default_rng(1).standard_normal((192, 3000))
    directions /= np.linalg.norm(directions, axis=0)

    def w2(a, b):  # by scipy-free quantiles, on other directions
        a, b = [np.sort(v.flatten(1).double().numpy() @ directions, axis=0) for v in (a, b)]
        return ((a - b)**2).mean()**0.5

    assert metrics["sw2"] == pytest.approx(w2(ours, theirs[:200]), rel=0.05)
    assert metrics["sw2_teacher"] == pytest.approx(w2(theirs[200:], theirs[:200]), rel=0.05)
    values = [json.loads(line)["sw2"] for line in (folder / "log.jsonl").read_text().splitlines()]
    best = torch.load(folder / "g_best.pt", weights_only=True)
    assert best["meta"]["step"] == values.index(min(values))
    assert "sliced W2" in capsys.readouterr().out
    common.save({"images": theirs[:7]}, folder / "teacher_samples.pt")
    with pytest.raises(UserError, match="remove the file"):
        edm.compare_with_teacher(edm.load_denoiser(tiny)[0], folder / "teacher_samples.pt")


def test_the_default_command(tmp_path, quick, monkeypatch, capsys):
    monkeypatch.setattr(edm, "LOOK", 40)
    monkeypatch.setattr(edm, "FINAL", 50)
    edm.main(["--steps", "1", "--batch", "4", "--device", "cpu", "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert {"teacher", "method", "distance", "seed", "steps", "seconds", "fd", "fd_teacher", "n",
            "fd_floor", "class_accuracy", "class_accuracy_teacher"} <= metrics.keys()
    assert metrics["teacher"] == "fashion" and metrics["method"] == "sim"
    assert metrics["fd"] > metrics["fd_teacher"] > metrics["fd_floor"]
    out = capsys.readouterr().out
    assert f"{metrics['class_accuracy_teacher']:.1%}" in out
    args = json.loads((tmp_path / "run" / "args.json").read_text())
    assert args["preset"] == "fashion" and args["t_star"] == edm.PRESETS["fashion"]["t_star"]


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200 if "lost" not in self.path else 404)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(100_000 if "whole" in self.path else 999))

    def log_message(self, *args):
        pass


def test_fetch(tmp_path, monkeypatch):
    """A download is there or is not there; one that was cut short does not count."""
    monkeypatch.chdir(tmp_path)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        here = f"http://127.0.0.1:{server.server_port}"
        path = common.fetch(f"{here}/whole.pkl")
        assert path == Path("checkpoints/whole.pkl") and path.stat().st_size == 100_000
        for url in (f"{here}/cut.pkl", f"{here}/lost.pkl", "http://127.0.0.1:1/x.pkl"):
            with pytest.raises(UserError, match=".pkl cannot be used"):
                common.fetch(url)
        server.shutdown()
    assert [path.name for path in tmp_path.rglob("[!.]*.pkl")] == ["whole.pkl"]
    assert common.fetch(f"{here}/whole.pkl") == path  # with no network, since the file is there


class Foreign(nn.Module):
    """A denoiser that is none of ours: (x + t conv(x)) / (1 + t^2), without classes."""
    image_shape, label_dim = (3, 8, 8), 0

    def __init__(self, channels=3):
        super().__init__()
        self.image_shape = (channels, 8, 8)
        self.conv, self.dropout = nn.Conv2d(channels, channels, 3, padding=1), nn.Dropout(0.1)
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)
        assert self.table[-1].item() == 1  # needs numbers: cannot be made on the meta device

    def forward(self, x, t):
        h = self.dropout(self.conv(x))
        return (x + t.reshape(len(x), 1, 1, 1) * h) / (1 + t.square() + 0 * self.table[0])


def grey():
    net = Foreign(channels=1)
    net.image_range, net.sigma_range = (-3, 5), (0.01, 20)
    return net


@pytest.mark.parametrize("name, channels", [("Foreign", 3), ("grey", 1)])
def test_a_teacher_of_the_users_own(name, channels, tmp_path, refused, capsys):
    own, run = f"{__name__}:{name}", tmp_path / "run"
    edm.main(["--teacher", own, *SHORT, "--save-every", "2", "--out", str(run)])
    assert f"--sample {run} --teacher {own} " in capsys.readouterr().out
    for more in (["--teacher-sample"], []):
        edm.main(["--sample", str(run), "--teacher", own, "--n", "3", *more, "--device", "cpu"])
        edm.main(["--sample", str(run), "--teacher", own, "--n", "3", *more, "--device", "cpu",
                  "--out", str(tmp_path / f"x{len(more)}.npz")])
    arrays = np.load(tmp_path / "x1.npz")
    assert arrays["teacher"].shape == (3, 8, 8, channels) and arrays["teacher"].dtype == np.uint8
    values = torch.from_numpy(arrays["teacher_values"])  # which no rounding to bytes has touched
    shown = common.to_uint8((values + 3) / 4 - 1 if channels == 1 else values)
    assert (shown.movedim(1, -1).numpy() == arrays["teacher"]).all()
    for more in (["--teacher-sample"], []):  # a file names nothing to import
        line = refused(edm.main, ["--sample", run, *more, "--out", tmp_path / "y.npz"])
        assert f"--teacher {own}" in line and "add this option" in line


def returning(y):
    """A denoiser of the user's own whose output is y(x)."""
    net = Foreign()
    net.forward = lambda x, t: y(x)
    return net


number, half, shapeless = lambda: 3, lambda: Foreign().half(), lambda: nn.Linear(1, 1)
cropping, pair = lambda: returning(lambda x: x[:, :1]), lambda: returning(lambda x: (x, x))
failing = lambda: int("two\nlines")
constant, detached = lambda: returning(torch.zeros_like), lambda: returning(torch.Tensor.detach)
infinite = lambda: returning(lambda x: x / 0)


class Needy(Foreign):
    """It wants a class, and says that it has none."""
    def forward(self, x, t, class_labels):
        return x


class OneTime(Foreign):
    """It takes one noise level for the whole batch."""
    def forward(self, x, t):
        return x / t.item()


class Detached(Foreign):
    """Its output depends on its weights, and not on its input."""
    def forward(self, x, t):
        return x.detach() * next(self.parameters()).sum()


@pytest.mark.parametrize("name, text", [
    ("number", "'int' object has no attribute 'parameters'"), ("half", "not in float32"),
    ("failing", "two"), ("shapeless", "image_shape"), ("no_such_function", "no_such_function"),
    ("cropping", "(2, 3, 8, 8) becomes (2, 1, 8, 8)"), ("pair", "tuple"),
    ("constant", "no gradient"), ("detached", "no gradient"), ("infinite", "not finite"),
    ("Needy", "class_labels"), ("OneTime", "2 elements"), ("Detached", "no gradient")])
def test_wrong_teachers_of_the_users_own(name, text, tmp_path, refused):
    line = refused(edm.main, [*SHORT, "--teacher", f"{__name__}:{name}", "--out", tmp_path / "run"])
    assert text in line and "expected a function that returns a denoiser" in line
    assert not list(tmp_path.iterdir())


# ---- samples ----
def test_sampling(tiny, tmp_path, refused, capsys):
    typed = ["--sample", str(tiny), "--device", "cpu", "--n", "5", "--classes", "2", "1"]
    edm.main([*typed, "--teacher-sample", "--teacher", str(tiny), "--out", str(tmp_path / "x.npz")])
    arrays = np.load(tmp_path / "x.npz")
    assert arrays["one_step"].shape == arrays["teacher"].shape == (5, 8, 8, 3)
    assert arrays["labels"].tolist() == [2, 1, 2, 1, 2] and arrays["one_step"].dtype == np.uint8
    net = edm.load_denoiser(tiny)[0]
    z, labels = common.draw_latents(range(5), (3, 8, 8), 3, [2, 1])
    by_hand = [net(2.5 * z, 2.5, labels), edm_sampler(lambda x, t: net(x, t, labels), z)]  # (B.4)
    for name, x in zip(("one_step", "teacher"), by_hand):
        x = common.to_uint8(x.detach()).permute(0, 2, 3, 1)
        assert (torch.from_numpy(arrays[name]).int() - x.int()).abs().max() <= 1
    calls = []
    with net.register_forward_hook(lambda *_: calls.append(1)):
        edm.sample_teacher(net, z, labels)
    assert len(calls) == 35
    edm.main([*typed, "--t-star", "1", "--out", str(tmp_path / "t.npz")])
    assert (np.load(tmp_path / "t.npz")["one_step"] != arrays["one_step"]).any()
    edm.main([*typed, "--seed", "2", "--out", str(tmp_path / "folder")])
    names = sorted(path.name for path in (tmp_path / "folder").iterdir())
    assert names == [f"{number:06}.png" for number in range(2, 7)]
    assert "exists" in refused(edm.main, [*typed, "--out", tmp_path / "folder"])
    edm.main(typed)  # the default place: beside the file
    with Image.open(tiny.parent / "samples-5-seed-0.png") as image:
        assert image.height == 600 and image.width == 25 * 16
    edm.main([*typed, "--n", "1", "--out", str(tmp_path / "one.png")])
    with Image.open(tmp_path / "one.png") as image:
        assert image.size == (600, 600)


@pytest.mark.parametrize("options", [
    "--teacher no/such/file.pkl", "--teacher shapes", "--judge README.md", "--judge no.pt",
    "--teacher README.md", "--teacher no.module:function",
    "--teacher common:l2", "--teacher a:b:c", "--teacher .x:f", "--teacher a{x}.pkl", "--batch 0",
    "--batch-gpu 9", "--preset x", "--amp fp16", "--p-mean nan", "--dropout -1", "--dropout 1",
    "--distance l2,c=1", "--device meta", f"--seed {10**30}", "--adam-eps 0", "--p-theta x",
    "--sample tests", "--sample README.md", "--sample FASHION --classes 10", "--classes a",
    "--sample FASHION --classes -1", "--sample FASHION --out x.jpg", "--sample FASHION --n 0",
    "--sample FASHION --teacher-sample --teacher PKL",
    "--sample FASHION --teacher-sample --teacher none"])
def test_mistakes(options, tmp_path, monkeypatch, refused):
    monkeypatch.chdir(ROOT)
    before = {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}
    options = options.replace("FASHION", str(edm.FASHION)).replace("PKL", str(PKL)).split()
    refused(edm.main, ["--batch", "8", "--out", tmp_path / "run", *options])
    assert not list(tmp_path.iterdir())
    assert before == {path: path.stat().st_mtime_ns for path in (ROOT / "assets").iterdir()}


@pytest.mark.slow
def test_full_size_network():
    for name, args in edm.CIFAR.items():
        net = edm.make_unet(**args).eval()
        x, labels = torch.randn(2, 3, 32, 32), torch.eye(10)[:2] if "cond" == name[:4] else None
        assert net(x, torch.tensor([0.5, 3.0]), labels).shape == x.shape
