"""Stage 2: the U-Net against the original outputs, pickles read without running them, runs as typed."""

import http.server
import importlib
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
from common import SongUNet, UserError, draw_latents, draw_shapes, edm_sampler, make_unet

edm = importlib.import_module("02_edm_cifar")
ROOT = Path(__file__).parent.parent
PKL = ROOT / "tests" / "fixtures" / "ddpmpp-uncond.pkl"
CASE = np.load(PKL.with_suffix(".npz"))
REAL = json.loads((PKL.parent / "edm_shapes.json").read_text())
TINY = {
    "img_resolution": 8,
    "model_channels": 4,
    "channel_mult": [1, 2],
    "num_blocks": 1,
    "attn_resolutions": [4],
    "channel_mult_emb": 2,
    "label_dim": 3,
    "dropout": 0.0,
}
SHORT = [
    "--steps",
    "6",
    "--batch",
    "8",
    "--save-every",
    "2",
    "--log-every",
    "1",
    "--lr",
    "1e-3",
    "--device",
    "cpu",
]


def case(name, dtype):
    return torch.from_numpy(CASE[name]).to(dtype)


def relative(a, b):
    return ((a - torch.from_numpy(b)).norm() / np.linalg.norm(b)).item()


# ---- the network ----
@pytest.mark.parametrize("name", REAL)
def test_names_and_shapes_of_the_published_checkpoints(name):
    short = name.removeprefix("edm-cifar10-32x32-").removesuffix("-vp")
    with torch.device("meta"):
        net = make_unet(**edm.CIFAR[short])
    assert {key: list(w.shape) for key, w in net.state_dict().items()} == REAL[name]["shapes"]
    assert sum(w.numel() for w in net.parameters()) == REAL[name]["params"]


@pytest.mark.parametrize("dtype, bits, limit", [(torch.float32, "f32", 1e-5), (torch.float64, "f64", 1e-10)])
@torch.no_grad()
def test_outputs_of_the_original(dtype, bits, limit):
    net = edm.load_edm_pickle(PKL).to(dtype)
    x, sigma, augment = [case(name, dtype) for name in ("x", "sigma", "augment")]
    assert relative(net(x, sigma), CASE[f"out_{bits}"]) < limit
    assert relative(net(x, sigma, None, augment), CASE[f"out_aug_{bits}"]) < limit
    assert relative(net(x, sigma, augment_labels=0 * augment), CASE[f"out_{bits}"]) < limit
    assert relative(edm_sampler(net, case("latents", dtype)), CASE[f"samp_{bits}"]) < limit


@torch.no_grad()
def test_the_network_inside():
    net = edm.load_edm_pickle(PKL).double()
    assert (
        relative(
            net.model(case("raw_in", torch.float64), case("raw_cnoise", torch.float64)), CASE["raw_out_f64"]
        )
        < 1e-10
    )


def test_labels_and_resampling():
    torch.manual_seed(0)
    net = make_unet(
        **TINY,
        embedding_type="fourier",
        channel_mult_noise=2,
        encoder_type="residual",
        resample_filter=[1, 3, 3, 1],
    ).double()
    for w in net.parameters():
        torch.nn.init.normal_(w, std=0.3)
    x, one_hot = torch.randn(3, 3, 8, 8, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    assert torch.equal(net(x, 1.0), net(x, 1.0, torch.zeros(3, 3).double()))
    assert not torch.allclose(net(x, 1.0), net(x, 1.0, one_hot))
    assert torch.allclose(net(x, 1.0, one_hot)[1], net(x[1:2], torch.ones(1).double(), one_hot[1:2])[0])
    down, up = net.model.enc["4x4_down"].conv0, net.model.dec["8x8_up"].conv0
    for taps, conv in (
        ([1, 3, 3, 1], down),
        ([1, 1], make_unet(**TINY).double().model.enc["4x4_down"].conv0),
    ):
        f = np.outer(taps, taps) / np.sum(taps) ** 2  # correlation with the filter, every second pixel
        pad = np.pad(x[0, 0].numpy(), len(taps) // 2 - 1)
        by_hand = [
            [(pad[i : i + len(taps), j : j + len(taps)] * f).sum() for j in range(0, 8, 2)]
            for i in range(0, 8, 2)
        ]
        np.testing.assert_allclose(conv.change_resolution(x)[0, 0], by_hand)
    aux = net.model.enc["4x4_aux_residual"]  # fused: the order of filter and weights does not matter
    whole = torch.nn.functional.pad(x, (2, 2, 2, 2))
    filtered = torch.nn.functional.conv2d(whole, aux.resample_filter.expand(3, 1, 4, 4), groups=3)
    torch.testing.assert_close(aux(x), torch.nn.functional.conv2d(filtered, aux.weight, aux.bias, stride=2))
    a, b = torch.randn(2, 1, 5, 8, 8, dtype=torch.float64)  # up is 4 times the transpose of down
    small = torch.randn(1, 5, 4, 4, dtype=torch.float64)
    assert torch.allclose(
        (up.change_resolution(small) * a).sum(), 4 * (small * down.change_resolution(a)).sum()
    )


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"num_blocks": 2e9},
        {"num_blocks": 2**31},
        {"img_resolution": 32, "channel_mult": [1] * 9},
        {"img_resolution": 32, "model_channels": -4},
        {"img_resolution": "32"},
        {"img_resolution": 32, "code": 1},
        {"img_resolution": 32, "encoder_type": "skip"},
        {"img_resolution": 32, "dropout": float("nan")},
        {"img_resolution": 32, "attn_resolutions": 16},
        {"img_resolution": 32, "channel_mult": [[2]]},
    ],
)
def test_arguments_that_no_network_has(args):
    with pytest.raises((ValueError, TypeError)):
        make_unet(**args)


# ---- NVIDIA's pickles ----
class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def evil(tmp_path):
    ran = str(tmp_path / "ran")
    yield pickle.dumps({"ema": Call(os.system, f"touch {ran}")}, 4)
    yield pickle.dumps({"ema": Call(eval, f"open({ran!r}, 'w')")}, 4)
    yield pickle.dumps({"ema": Call(__import__("functools").partial, os.system, f"touch {ran}")}, 4)
    yield pickle.dumps({"ema": Call(torch.load, ran)}, 4)
    yield pickle.dumps({"ema": np.array([os.getcwd], dtype=object)}, 4)
    yield pickle.dumps({"ema": 1, "loss_fn": Call(exec, f"open({ran!r}, 'w')")}, 4)
    yield b"\x80\x04}X\x03\x00\x00\x00emacos\nsystem\nX\x04\x00\x00\x00true\x85Rs."  # GLOBAL of protocol 0
    yield b"\x80\x04("  # a mark and nothing more
    yield b"\x80\x04N\x93."  # STACK_GLOBAL without names
    yield b"\x80\x04N0."  # an instruction that these files do not have, an empty stack
    yield b"\x80\x04\x8e\xff\xff\xff\xff\xff\xff\xff\x00."  # BINBYTES8 of 2^56 bytes
    yield b"\x80\x04Nr\xff\xff\xff\xff."  # LONG_BINPUT 2^32 - 1
    yield b"\x80\x04" + b"N0" * 10**6 + b"."
    yield b"\x80\x04" + b"]" * 199_000 + b"a" * 198_999 + b"."  # deep nesting
    yield b"<!DOCTYPE html><html><body>404 Not Found</body></html>"
    bomb = b"".join(b"h" + bytes([i, ord("h"), i]) + b"\x86\x94" for i in range(60))  # t = (t, t), 60 times
    yield b"\x80\x04)\x94" + bomb + b"."
    yield b""


def test_evil_pickles(tmp_path):
    for i, data in enumerate(evil(tmp_path)):
        path = tmp_path / f"{i}.pkl"
        path.write_bytes(data)
        begun = time.time()
        with pytest.raises(UserError, match="expected an EDM checkpoint") as error:
            edm.load_edm_pickle(path)
        assert "\n" not in str(error.value) and time.time() - begun < 20 and not (tmp_path / "ran").exists()


def edited(change):
    """The fixture's pickle with its text replaced: bytes of the same length."""
    data = PKL.read_bytes()
    for old, new in change.items():
        assert len(old) == len(new) and data.count(old), old
        data = data.replace(old, new)
    return data


@pytest.mark.parametrize(
    "change",
    [
        {b"EDMPrecond": b"VPPrecondX"},
        {b"SongUNet": b"EvilUNet"},
        {b"_rebuild_tensor_v2": b"_rebuild_tensor_v3"},
        {b"torch.storage": b"torch.serials"},
        {b"FloatStorage": b"LongyStorage"},
    ],
)
def test_another_network_is_refused(change, tmp_path):
    (tmp_path / "x.pkl").write_bytes(edited(change))
    with pytest.raises(UserError, match="refused"):
        edm.load_edm_pickle(tmp_path / "x.pkl")


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9, 0.9999])
def test_truncated_pickle(part, tmp_path):
    data = PKL.read_bytes()
    (tmp_path / "x.pkl").write_bytes(data[: int(part * len(data))])
    with pytest.raises(UserError, match="refused"):
        edm.load_edm_pickle(tmp_path / "x.pkl")


def test_more_refusals(tmp_path):
    data, name = PKL.read_bytes(), "model.map_augment.weight"
    (tmp_path / "after.pkl").write_bytes(data + b"more")
    torch.save({"ema": torch.ones(3)}, tmp_path / "zip.pkl")
    for path in (tmp_path / "after.pkl", tmp_path / "zip.pkl", tmp_path / "missing.pkl", tmp_path):
        with pytest.raises(UserError):
            edm.load_edm_pickle(path)
    net = edm.load_edm_pickle(PKL)
    for change in (
        {name: torch.ones(3, 9)},
        {name: torch.full((16, 9), torch.nan)},
        {"extra": torch.ones(1)},
    ):
        with pytest.raises(ValueError):
            common.adopt(make_unet, net.net_args, net.state_dict() | change)


@pytest.mark.parametrize(
    "size, stride, offset",
    [
        ((4, 4), (4, 1), 1),
        ((10**12, 10**12), (0, 0), 0),
        ((-1,), (1,), 0),
        ((4,), (2**62,), 0),
        ((2, 2), (1,), 0),
        ((True,), (1,), 0),
        ([4], [1], 0),
        ((4,) * 9, (1,) * 9, 0),
    ],
)
def test_tensors_stay_within_their_storage(size, stride, offset):
    with pytest.raises(ValueError):
        edm.rebuild_tensor(np.zeros(16, "f4"), offset, size, stride)


def test_a_view_is_no_storage():
    view = edm.rebuild_tensor(np.zeros(16, "f4"), 15, (16,), (0,))
    with pytest.raises(ValueError):
        edm.rebuild_tensor(view, 0, (16,), (1,))  # would read what lies behind


def test_structures_that_never_end():
    empty = {"_parameters": {}, "_buffers": {}}
    loop = empty | {"_modules": {}}
    loop["_modules"]["a"] = loop
    twice = empty | {"_modules": {}}
    for _ in range(60):
        twice = empty | {"_modules": {"a": twice, "b": twice}}
    for module in (loop, twice):
        with pytest.raises(ValueError):
            edm.collect(module)


def test_convert(tmp_path, capsys):
    edm.main(["--convert", str(PKL), str(tmp_path / "plain.pt")])
    net, t_star, meta = edm.load_denoiser(tmp_path / "plain.pt")
    ours = edm.load_edm_pickle(PKL).state_dict()
    assert all(torch.equal(w, ours[name]) for name, w in net.state_dict().items()) and t_star == 2.5
    assert meta["sha256"] == common.sha256(PKL)
    edm.main(
        [
            "--sample",
            str(tmp_path / "plain.pt"),
            "--n",
            "2",
            "--out",
            str(tmp_path / "a.png"),
            "--device",
            "cpu",
        ]
    )
    edm.main(["--sample", str(PKL), "--n", "2", "--out", str(tmp_path / "b.png"), "--device", "cpu"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()


# ---- shapes, latents ----
def test_shapes():
    a, labels = draw_shapes(40, 5)
    b, same = draw_shapes(40, 5)
    assert torch.equal(a, b) and torch.equal(labels, same) and a.shape == (40, 3, 16, 16)
    assert -1 <= a.min() and a.max() <= 1 and a.dtype == torch.float32
    big, fixed = draw_shapes(20, 0, size=32, labels=[3] * 20)
    assert big.shape[-1] == 32 and (fixed == 3).all()
    corners = big[:, :, [0, 0, -1, -1], [0, -1, 0, -1]]  # background only, but for a shape in a corner
    assert ((corners - corners[:, :, :1]).abs().amax((1, 2)) < 1e-6).float().mean() > 0.9


def test_latents_depend_on_their_seed_alone():
    z, labels = draw_latents(range(7), (3, 4, 4), 5)
    z3, labels3 = draw_latents([3], (3, 4, 4), 5)
    assert torch.equal(z[3], z3[0]) and torch.equal(labels[3], labels3[0]) and labels.sum() == 7
    _, fixed = draw_latents(range(5), (1,), 5, [4, 0])
    assert fixed.argmax(1).tolist() == [4, 0, 4, 0, 4]
    assert draw_latents(range(2), (1,))[1].shape == (2, 0)


# ---- Algorithm 2 ----
def tiny_teacher(tmp_path):
    """-> the path of a small teacher, random but always the same"""
    torch.manual_seed(0)
    net = make_unet(**TINY)
    torch.nn.init.normal_(net.model.dec["8x8_aux_conv"].weight, std=0.1)
    common.save_generator(tmp_path / "tiny.pt", net, TINY, 2.5)
    return str(tmp_path / "tiny.pt")


def small_run(tmp_path, monkeypatch, name, *options):
    """A run from a tiny teacher, as typed. -> its folder"""
    edm.main(
        [
            "--teacher",
            tiny_teacher(tmp_path),
            *SHORT,
            "--dropout",
            "0",
            "--out",
            str(tmp_path / name),
            *options,
        ]
    )
    return tmp_path / name


def weights(folder):
    """All weights of a run's three networks as one vector each."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    return [torch.cat([w.flatten() for w in state[net].values()]) for net in ("d_psi", "g", "g_ema")]


def gradients(folder):
    """The last gradients of d_psi and g: with beta_1 = 0 they are what Adam keeps."""
    state = torch.load(folder / "ckpt.pt", weights_only=True)
    states = [state[name]["state"].values() for name in ("opt_psi", "opt_theta")]
    return [torch.cat([s["exp_avg"].flatten() for s in state]) for state in states]


def differences(a, b):
    """The largest |a - b| / |b|. Not of each: Adam makes any gradient, 1e-9 too, a step of lr."""
    return max(((x - y).norm() / y.norm()).item() for x, y in zip(a, b))


def test_train_is_algorithm_2(tmp_path, monkeypatch):
    """Two updates by hand, with torch's own pieces only."""
    folder = small_run(tmp_path, monkeypatch, "run", "--steps", "2", "--save-every", "1", "--anneal", "none")
    torch.manual_seed(0)
    d_q = edm.load_denoiser(tmp_path / "tiny.pt")[0]
    d_psi, g, g_ema = [edm.load_denoiser(tmp_path / "tiny.pt")[0].train().requires_grad_() for _ in range(3)]
    opt_psi, opt_g = [torch.optim.Adam(n.parameters(), 1e-3, (0.0, 0.999)) for n in (d_psi, g)]
    for step in range(2):
        random = common.seed_step(0, step)
        for phase in ("psi", "theta"):
            z, eps = torch.randn(8, 3, 8, 8, generator=random), torch.randn(8, 3, 8, 8, generator=random)
            mean, std = (-1.2, 1.2) if phase == "psi" else (-3.5, 2.5)
            t = (mean + std * torch.randn(8, 1, 1, 1, generator=random)).exp()
            c = torch.eye(3)[torch.randint(3, (8,), generator=random)]
            x_0 = g(2.5 * z, 2.5, c)
            if phase == "psi":
                x_0 = x_0.detach()
                loss = (t**2 + 0.25) / (t * 0.5) ** 2 * (d_psi(x_0 + t * eps, t, c) - x_0) ** 2
            else:
                f = d_psi(x_0 + t * eps, t, c)
                y = f - d_q(x_0 + t * eps, t, c)
                loss = -y / (y.square().sum((1, 2, 3), keepdim=True) + 1e-6).sqrt() * (f - x_0)
            (opt_psi if phase == "psi" else opt_g).zero_grad()
            (loss.sum() / 8).backward()
            (opt_psi if phase == "psi" else opt_g).step()
        beta = 0.5 ** (8 / max(min(5e5, 0.05 * 8 * step), 1e-8))
        for a, b in zip(g_ema.parameters(), g.parameters()):
            a.data = beta * a.data + (1 - beta) * b.data
    by_hand = [
        torch.cat([w.detach().flatten() for w in net.state_dict().values()]) for net in (d_psi, g, g_ema)
    ]
    assert differences(weights(folder), by_hand) < 1e-6
    start = torch.cat([w.flatten() for w in d_q.state_dict().values()])
    assert all(differences([start], [w]) > 1e-4 for w in by_hand[:2])


def test_micro_batches_give_the_gradient_of_the_whole(tmp_path, monkeypatch):
    whole = small_run(tmp_path, monkeypatch, "whole", "--lr", "1e-5")
    parts = small_run(tmp_path, monkeypatch, "parts", "--lr", "1e-5", "--batch-gpu", "3")  # 3 + 3 + 2
    assert differences(weights(parts), weights(whole)) < 1e-6
    assert differences(gradients(parts), gradients(whole)) < 1e-3


def test_two_ranks_give_one_process_s_weights(tmp_path, monkeypatch):
    whole = small_run(tmp_path, monkeypatch, "whole", "--lr", "1e-5")
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc_per_node=2",
        "02_edm_cifar.py",
        "--teacher",
        tmp_path / "tiny.pt",
        *SHORT,
        "--dropout",
        "0",
        "--batch-gpu",
        "2",
        "--lr",
        "1e-5",
        "--out",
        tmp_path / "ranks",
    ]
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("step 6/6") == 1
    assert differences(weights(tmp_path / "ranks"), weights(whole)) < 1e-6
    assert differences(gradients(tmp_path / "ranks"), gradients(whole)) < 1e-3


@pytest.mark.parametrize(
    "options",
    [
        ["--method", "sid"],
        ["--method", "di"],
        ["--preset", "sid"],
        ["--amp", "bf16"],
        ["--distance", "l2", "--psi-updates", "2", "--dropout", "0.2"],
    ],
)
def test_settings(options, tmp_path, monkeypatch):
    folder = small_run(tmp_path, monkeypatch, "run", *options)
    line = json.loads((folder / "log.jsonl").read_text().splitlines()[-1])
    assert line.keys() >= {
        "step",
        "images",
        "loss_psi",
        "loss_theta",
        "divergence",
        "y_norm",
        "images_s",
        "peak_share",
        "memory_gib",
        "seconds",
    }
    args = json.loads((folder / "args.json").read_text())
    assert args["sid_alpha"] == (1.2 if "--preset" in options else 1.0) and len(args["teacher_sha256"]) == 64


@pytest.mark.slow
def test_resume_and_sigterm(tmp_path, monkeypatch):
    """Stopped by SIGTERM and by kill -9, then continued: the same as never stopped, dropout and all."""
    options = ["--steps", "24", "--dropout", "0.2", "--save-every", "3"]
    whole = small_run(tmp_path, monkeypatch, "whole", *options)
    command = [
        sys.executable,
        "02_edm_cifar.py",
        "--teacher",
        tmp_path / "tiny.pt",
        *SHORT,
        *options,
        "--out",
        tmp_path / "killed",
    ]
    for kind, status in ((signal.SIGTERM, 130), (signal.SIGKILL, -9)):
        process = subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        since = 0
        for line in process.stdout:
            since += line.startswith("step")
            if since == 6:
                process.send_signal(kind)
        error = process.communicate()[1]
        assert process.returncode == status and (kind == signal.SIGKILL or "is saved" in error), error
    assert 6 <= torch.load(tmp_path / "killed" / "ckpt.pt", weights_only=True)["log"]["step"] < 24
    small_run(tmp_path, monkeypatch, "killed", *options)
    assert all(torch.equal(a, b) for a, b in zip(weights(tmp_path / "killed"), weights(whole)))


# ---- the embedded teacher ----
def test_the_embedded_teacher():
    assert edm.EMBEDDED.stat().st_size < 3e6
    saved = torch.load(edm.EMBEDDED, weights_only=True)
    assert all(w.dtype == torch.float16 for w in saved["state_dict"].values())
    net, _, meta = edm.load_denoiser(edm.EMBEDDED)
    assert sum(w.numel() for w in net.parameters()) <= 1.5e6
    assert 0 < meta["fd_real"] < meta["fd_teacher"]
    images, labels = draw_shapes(200, [9])
    assert edm.shapes_fd(net, draw_shapes(2000, [2, 0])[0], meta) == pytest.approx(meta["fd_real"], rel=0.01)
    one_hot, t = torch.nn.functional.one_hot(labels, 10).float(), 1.0
    x_t = images + t * torch.randn_like(images)
    error = lambda c: (net(x_t, t, c) - images).square().mean().item()
    assert error(one_hot) < error(None) < 0.3 * images.var().item()  # it denoises, better when told the class


def test_sampling(tmp_path, capsys):
    base = ["--sample", str(edm.EMBEDDED), "--device", "cpu", "--n", "6", "--classes", "3,7"]
    edm.main([*base, "--out", str(tmp_path / "x.npz"), "--teacher-sample", "--teacher", "shapes"])
    arrays = np.load(tmp_path / "x.npz")
    assert (
        arrays["one_step"].shape == arrays["teacher"].shape == (6, 16, 16, 3)
        and arrays["labels"].tolist() == [3, 7] * 3
    )
    edm.main([*base, "--out", str(tmp_path / "folder"), "--seed", "2"])
    assert [path.name for path in sorted((tmp_path / "folder").iterdir())][:2] == ["000002.png", "000003.png"]
    edm.main([*base, "--out", str(tmp_path / "grid.png")])
    with Image.open(tmp_path / "grid.png") as image:
        assert image.size == (2 * 16 * 3, 3 * 16 * 3)


def test_bench(tmp_path, monkeypatch, capsys):
    edm.main(["--bench", "--teacher", "shapes", "--batch", "4", "--steps", "2", "--device", "cpu"])
    out = capsys.readouterr().out
    assert "theta update" in out and "of the peak" in out and out.count("\n") < 12


class Foreign(torch.nn.Module):
    """A denoiser that is none of ours: (x + t conv(x)) / (1 + t^2), without classes."""

    image_shape, label_dim = (3, 8, 8), 0

    def __init__(self):
        super().__init__()
        self.conv, self.dropout = torch.nn.Conv2d(3, 3, 3, padding=1), torch.nn.Dropout(0.1)
        self.register_buffer("table", torch.linspace(0, 1, 5), persistent=False)
        assert self.table[-1].item() == 1

    def forward(self, x, t):
        return (x + t.reshape(len(x), 1, 1, 1) * self.dropout(self.conv(x))) / (
            1 + t.square() + 0 * self.table[0]
        )


def test_a_teacher_of_the_users_own(tmp_path):
    teacher = ["--teacher", f"{__name__}:Foreign", "--device", "cpu"]
    edm.main([*SHORT, *teacher, "--out", str(tmp_path / "run")])
    edm.main(["--sample", str(tmp_path / "run"), *teacher, "--n", "2", "--out", str(tmp_path / "x.npz")])
    assert np.load(tmp_path / "x.npz")["one_step"].shape == (2, 8, 8, 3)
    with pytest.raises(SystemExit):  # a file does not say what to import
        edm.main(["--sample", str(tmp_path / "run"), "--teacher-sample", "--out", str(tmp_path / "y.npz")])


@pytest.mark.parametrize(
    "gpu, online, chosen", [(False, True, "shapes"), (True, True, "uncond"), (True, False, "shapes")]
)
def test_auto(gpu, online, chosen, monkeypatch, capsys):
    def fetch(name):
        if not online:
            raise UserError("no network")
        return name

    monkeypatch.setattr(edm, "fetch", fetch)
    assert edm.choose_teacher(torch.device("cuda" if gpu else "cpu")) == chosen
    assert capsys.readouterr().out.count("\n") == (3 if chosen == "shapes" else 0)


def test_the_default_command_takes_the_embedded_teacher(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(edm, "FD_IMAGES", 50)
    edm.main([*SHORT, "--steps", "2", "--out", str(tmp_path / "run")])
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["teacher"] == "shapes" and metrics["fd"] > metrics["fd_teacher"] > metrics["fd_real"]
    for name in ("samples.png", "curve.png", "samples/0000000.png"):
        with Image.open(tmp_path / "run" / name) as image:
            image.verify()
    assert (tmp_path / "run" / "g_best.pt").exists() and "it is not FID" in capsys.readouterr().out


class Handler(http.server.SimpleHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.send_header("Content-Length", "100000")
        self.end_headers()
        self.wfile.write(bytes(100_000 if "whole" in self.path else 999))

    def log_message(self, *args):
        pass


def test_download(tmp_path):
    server = http.server.HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    common.download(f"http://127.0.0.1:{server.server_port}/whole", tmp_path / "new" / "x.pkl")
    assert (tmp_path / "new" / "x.pkl").stat().st_size == 100_000
    for url in (
        f"http://127.0.0.1:{server.server_port}/cut",
        "http://127.0.0.1:1/x",
        "http://no.such.host.invalid/x",
    ):
        with pytest.raises(UserError, match="could not download"):
            common.download(url, tmp_path / "y.pkl")
    server.shutdown()
    assert [path.name for path in tmp_path.rglob("*.pkl")] == ["x.pkl"]


def test_train_teacher_resumes(tmp_path, monkeypatch):
    monkeypatch.setattr(edm, "FD_IMAGES", 60)
    options = [
        "--train-teacher",
        "--steps",
        "4",
        "--batch",
        "8",
        "--save-every",
        "2",
        "--device",
        "cpu",
        "--out",
    ]
    edm.main([*options, str(tmp_path / "whole")])
    monkeypatch.setattr(edm, "measure_teacher", lambda args, net: 1 / 0)  # killed at its end
    with pytest.raises(ZeroDivisionError):
        edm.main([*options, str(tmp_path / "again")])
    state = torch.load(tmp_path / "again" / "ckpt.pt", weights_only=True)
    whole = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    assert all(torch.equal(w, whole["ema"][name]) for name, w in state["ema"].items())
    net, _, meta = edm.load_denoiser(tmp_path / "whole" / "teacher.pt")
    assert net.net_args == edm.SHAPES_NET and meta["fd_teacher"] > meta["fd_real"] > 0


@pytest.mark.slow
def test_two_processes_in_a_folder(tmp_path, monkeypatch):
    run = [
        sys.executable,
        "02_edm_cifar.py",
        "--teacher",
        tiny_teacher(tmp_path),
        *SHORT,
        "--steps",
        "100000",
        "--out",
    ]
    first = subprocess.Popen([*run, tmp_path / "run"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not (tmp_path / "run" / "ckpt.pt").exists():
        first.stdout.readline()
    second = subprocess.run([*run, tmp_path / "run", "--fresh"], cwd=ROOT, text=True, capture_output=True)
    assert second.returncode == 2 and "in use by another process" in second.stderr
    first.kill()
    first.communicate()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run", "tiny.pt"]


@pytest.mark.parametrize(
    "options",
    [
        ["--teacher", "no/such/file.pkl"],
        ["--teacher", "README.md"],
        ["--teacher", "no.module:function"],
        ["--teacher", "common:l2"],
        ["--batch", "0"],
        ["--preset", "x"],
        ["--amp", "fp16"],
        ["--classes", "a"],
        ["--p-mean", "nan"],
        ["--dropout", "-1"],
        ["--distance", "l2", "--c", "1"],
        ["--convert", "README.md", "x.pt"],
        ["--convert", "none.pkl", "x.pt"],
        ["--sample", "tests"],
        ["--sample", "README.md"],
        ["--sample", str(edm.EMBEDDED), "--classes", "10"],
        ["--device", "meta"],
        ["--teacher", "a:b:c"],
        ["--teacher", ".x:f"],
        ["--teacher", "a{x}.pkl"],
        ["--dropout", "1.5"],
        ["--sample", str(edm.EMBEDDED), "--out", "x.jpg"],
        ["--sample", str(edm.EMBEDDED), "--teacher-sample", "--teacher", str(PKL)],
        ["--seed", str(10**30)],
    ],
)
def test_mistakes(options, tmp_path, monkeypatch, capsys):
    before = {path: path.stat().st_mtime_ns for path in ROOT.rglob("*")}
    with pytest.raises(SystemExit) as stop:
        edm.main(["--teacher", "shapes", "--out", str(tmp_path / "run"), *options])
    captured = capsys.readouterr()
    assert stop.value.code == 2 and captured.err.count("\n") == 1 and captured.err.startswith("error: ")
    assert (
        not list(tmp_path.iterdir()) and {path: path.stat().st_mtime_ns for path in ROOT.rglob("*")} == before
    )


@pytest.mark.slow
def test_full_size_network():
    for name, args in edm.CIFAR.items():
        net = make_unet(**args).eval()
        x, labels = torch.randn(2, 3, 32, 32), torch.eye(10)[:2] if "cond" == name[:4] else None
        assert net(x, torch.tensor([0.5, 3.0]), labels).shape == x.shape
        assert isinstance(net.model, SongUNet)
