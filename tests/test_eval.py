"""eval_fid.py: each number against a closed form or a slow definition; then the command, on real files."""

import hashlib
import importlib
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

import common
import eval_fid
from common import UserError, draw_latents, draw_shapes, save_generator, to_uint8
from eval_fid import (
    Images,
    frechet_distance,
    inception_score,
    kernel_distance,
    moments,
    one_pass,
    precision_recall,
    read_shapes,
)

edm = importlib.import_module("02_edm_cifar")
ROOT = Path(__file__).parent.parent
IMAGES = to_uint8(draw_shapes(40, 1)[0])
random = np.random.default_rng(0)


def gaussian_features(n, d, seed=0):
    generator = torch.Generator().manual_seed(seed)
    scale = torch.linspace(0.1, 1, d, dtype=torch.float64)
    return torch.randn(n, d, generator=generator).double() * scale + seed


# ---- Frechet distance ----
def test_gaussians_with_commuting_covariances():
    a, b, mu = random.uniform(0.1, 2, 5), random.uniform(0.1, 2, 5), random.normal(size=5)
    rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
    turn = lambda v: rotation @ np.diag(v) @ rotation.T
    expected = (mu**2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet_distance(mu, turn(a), np.zeros(5), turn(b)) == pytest.approx(expected, rel=1e-9)
    b[:2] = a[:2] = 0  # the first has no Cholesky factor, nor has the second
    expected = (mu**2).sum() + ((a**0.5 - b**0.5) ** 2).sum()
    assert frechet_distance(mu, turn(a), np.zeros(5), turn(b)) == pytest.approx(expected, rel=1e-6)


def test_it_is_the_value_of_the_matrix_square_root():
    (mu1, sigma1), (mu2, sigma2) = [moments(gaussian_features(200, 30, seed)) for seed in (0, 1)]
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())  # as pytorch-fid has it
    expected = ((mu1 - mu2) ** 2).sum() + (sigma1 + sigma2).trace() - 2 * np.trace(root).real
    assert frechet_distance(mu1, sigma1, mu2, sigma2) == pytest.approx(expected.item(), rel=1e-9)


@pytest.mark.parametrize("n", (9, 25, 200))
def test_fewer_features_than_dimensions(n):
    """In 6 of 40 dimensions, turned: the distance is that of the 6."""
    a, b = gaussian_features(n, 6, 0), gaussian_features(60, 6, 1)
    expected = frechet_distance(*moments(a), *moments(b))
    turn = torch.from_numpy(np.linalg.qr(random.normal(size=(40, 40)))[0][:6])
    wide = a @ turn, b @ turn
    stats = [*moments(wide[0]), *moments(wide[1])]
    assert frechet_distance(*stats) == pytest.approx(expected, rel=1e-5)
    if n < 40:
        assert frechet_distance(*stats, *wide) == pytest.approx(expected, rel=1e-12)


def test_the_same_moments_are_at_no_distance():
    x = torch.randn(50, 8, dtype=torch.float64)
    assert frechet_distance(*moments(x), *moments(x)) < 1e-8


@pytest.mark.parametrize("sigma", (torch.full((2, 2), math.nan), -2 * torch.eye(2), torch.eye(3)))
def test_impossible_moments_are_refused(sigma):
    with pytest.raises(UserError, match="Frechet distance"):
        frechet_distance(torch.zeros(2), sigma, torch.zeros(2), torch.eye(2))


def test_a_little_below_zero_is_zero_and_more_is_an_error():
    one, below = torch.diag(torch.tensor([1, 1e-12])), lambda v: torch.diag(torch.tensor([1.0, v]))
    assert frechet_distance(torch.zeros(2), one, torch.zeros(2), below(-1e-4)) == 0  # -0.5e-4 of the trace
    with pytest.raises(UserError, match="-0.001"):
        frechet_distance(torch.zeros(2), one, torch.zeros(2), below(-1e-3))
    zero = torch.zeros(2, 2)
    assert frechet_distance(torch.zeros(2), zero, torch.ones(2), zero) == 2  # images that are all the same


# ---- KID, precision and recall, Inception Score ----
def test_kernel_distance_is_the_unbiased_mmd():
    x, y = gaussian_features(12, 3, 0), gaussian_features(12, 3, 1)
    k = lambda a, b: (float(a @ b) / 3 + 1) ** 3
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = lambda v: sum(k(v[i], v[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within(x) + within(y) - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9) and std < 1e-9  # all subsets are the whole
    same = gaussian_features(3000, 4)
    mean, std = kernel_distance(same[::2], same[1::2], size=200)
    assert abs(mean) < 3 * std and std > 0


def test_precision_and_recall():
    fake, real = gaussian_features(40, 3, 0).numpy(), gaussian_features(50, 3, 1).numpy()
    fake[:20] = real[:20] + 0.01

    def share(x, centres, k=3):
        hits = 0
        for point in x:
            for c in centres:
                radius = sorted(np.linalg.norm(other - c) for other in centres)[k]
                if np.linalg.norm(point - c) <= radius:
                    hits += 1
                    break
        return hits / len(x)

    got = precision_recall(torch.from_numpy(fake), torch.from_numpy(real))
    assert got == pytest.approx([share(fake, real), share(real, fake)]) and 0.5 <= got[0] < 1


def source(images, labels=None):
    return Images(
        "a test", lambda k: (images[k], None if labels is None else labels[k]), (3, 16, 16), len(images)
    )


def probabilities(x):
    return torch.softmax(x.flatten(1).float()[:, :7] / 40, dim=1)


@pytest.mark.parametrize("n", (57, 60))
def test_inception_score_by_definition(n):
    images = torch.randint(256, (n, 3, 4, 4), dtype=torch.uint8)
    sums = one_pass(source(images), range(n), lambda x: (x.flatten(1) / 255, probabilities(x)), 11, "cpu")
    p = probabilities(images).double().numpy()
    parts = [p[i * n // 10 : (i + 1) * n // 10] for i in range(10)]
    scores = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
    got = inception_score(sums["p"], sums["p_log_p"], sums["counts"])
    assert got == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


# ---- One pass ----
@pytest.mark.parametrize("batch", (1, 7, 100))
def test_a_pass_in_batches_is_the_whole(batch, monkeypatch):
    monkeypatch.setattr(eval_fid, "KEPT", 10)
    images, labels = draw_shapes(33, 0)
    images = to_uint8(images)
    features = images.flatten(1)[:, :20].double() / 255
    detect = lambda x: (x.flatten(1)[:, :20] / 255, None)
    sums = one_pass(source(images, labels), range(33), detect, batch, "cpu", count_shapes=True)
    assert torch.allclose(sums["mu"], features.mean(0)) and sums["right"] == 33
    assert torch.allclose(sums["sigma"], torch.cov(features.T), atol=1e-9)
    assert torch.allclose(sums["kept"].double(), features[::4])


def test_true_shapes_are_read():
    images, labels = draw_shapes(1000, 4)
    classes, colours, backgrounds = read_shapes(to_uint8(images))
    assert (classes == labels).float().mean() >= 0.99
    corners = torch.stack([images[:, :, i, j] for i in (0, -1) for j in (0, -1)])  # background, mostly
    assert ((corners.median(0).values / 2 + 0.5 - backgrounds).abs().amax(1) < 0.05).float().mean() > 0.99
    assert ((colours - backgrounds).norm(dim=1) > 0.55).float().mean() > 0.99  # as draw_shapes has them
    noise = torch.randint(256, (300, 3, 16, 16), dtype=torch.uint8)
    assert (read_shapes(noise)[0] == labels[:300]).float().mean() < 0.2


# ---- The command ----
class Inception(torch.nn.Module):
    """A detector of NVIDIA's signature with 6 features and 5 classes."""

    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.output = torch.nn.Linear(6, 5)

    def forward(
        self, img, return_features: bool = False, use_fp16: bool = False, no_output_bias: bool = False
    ):
        x = torch.nn.functional.interpolate(img.float() / 127.5 - 1, size=[19, 19], mode="bilinear")
        x = self.conv(x).exp().mean([2, 3])
        if return_features:
            return x
        bias = torch.zeros(5) if no_output_bias else self.output.bias
        return torch.softmax(torch.nn.functional.linear(x, self.output.weight, bias), dim=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with checkpoints/inception-2015-12-05.pt, a generator g.pt, and 40 images in images/."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(folder / "checkpoints" / "inception-2015-12-05.pt")
    net = edm.load_denoiser(edm.EMBEDDED)[0]  # a bad generator, but one whose images differ
    save_generator(folder / "g.pt", net, net.net_args, 2.5)
    write_images(folder / "images", IMAGES)
    return folder


def means(result):
    return {name: values["mean"] for name, values in result["metrics"].items()}


def write_images(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{i:03}.png")


@pytest.fixture
def evaluate(place, monkeypatch, tmp_path, capsys):
    """In that folder: -> the results of a command, as fid.json has them; or, where it fails, its one line."""

    def run(*words, fails=False, folder=place, out="fid.json"):
        monkeypatch.chdir(folder)
        out = tmp_path / out
        words = [*map(str, words), "--device", "cpu", "--out", str(out)]
        if not fails:
            eval_fid.main(words)
            return json.loads(out.read_text())[-1] if out.exists() else None
        with pytest.raises(SystemExit) as stop:
            eval_fid.main(words)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and error.count("\n") == 1, error
        return error

    return run


def test_fid_and_inception_score_of_a_generator(evaluate, place):
    """By the real path, against numpy: the images again from their seeds, the moments and the root anew."""
    result = evaluate("g.pt", "images", "--n", 30, "--batch", 7, "--seed", 5)
    net = edm.load_denoiser(place / "g.pt")[0]
    z, labels = draw_latents(range(5, 35), (3, 16, 16), 10)
    x = edm.sample_one_step(net, 2.5, z, labels).numpy()
    images = np.clip(np.trunc(x * 127.5 + 128), 0, 255).astype(np.uint8)
    detector = Inception()
    detector.load_state_dict(torch.jit.load(place / "checkpoints" / "inception-2015-12-05.pt").state_dict())
    with torch.no_grad():
        a, b = [detector(torch.from_numpy(v), True).double().numpy() for v in (images, IMAGES.numpy())]
        p = detector(torch.from_numpy(images), no_output_bias=True).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T))
    fid = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root.real)
    q = p.reshape(10, 3, 5)
    score = np.exp((q * np.log(q / q.mean(1, keepdims=True))).sum(2).mean(1))
    expected = {"FID-30": fid, "IS-30": score.mean(), "IS-30 (std of splits)": score.std()}
    assert {name: means(result)[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {"KID-30", "precision-inception-30", "recall-inception-30"} < means(result).keys()
    assert result["seeds"] == [[5, 34]] and "class accuracy-30" not in means(result)
    digest = hashlib.sha256((place / "checkpoints" / "inception-2015-12-05.pt").read_bytes()).hexdigest()
    assert result["detector_sha256"] == digest and result["source_sha256"] and result["reference_sha256"]


def test_neither_batches_nor_folders_nor_arrays_change_the_number(evaluate, place, tmp_path):
    """Images that went through PNG files or an .npz give the same number as those that did not."""
    first = means(evaluate("g.pt", "images", "--n", 30, "--batch", 30))
    edm.main(
        ["--sample", str(place / "g.pt"), "--n", "30", "--out", str(tmp_path / "png"), "--device", "cpu"]
    )
    edm.main(
        ["--sample", str(place / "g.pt"), "--n", "30", "--out", str(tmp_path / "x.npz"), "--device", "cpu"]
    )
    for words in (
        ["g.pt", "images", "--n", 30, "--batch", 4],
        [tmp_path / "png", "images"],
        [tmp_path / "x.npz", "images"],
    ):
        again = means(evaluate(*words))
        assert all(
            again[name] == pytest.approx(first[name], rel=1e-4) for name in first if name != "images/s"
        )


def test_trials_have_seeds_of_their_own(evaluate):
    result = evaluate("g.pt", "images", "--n", 12, "--trials", 3)
    fid = result["metrics"]["FID-12"]
    assert result["seeds"] == [[0, 11], [12, 23], [24, 35]] and len(set(fid["trials"])) == 3
    assert fid["std"] == pytest.approx(np.std(fid["trials"], ddof=1))
    again = evaluate("g.pt", "images", "--n", 12, "--seed", 24)
    assert means(again)["FID-12"] == pytest.approx(fid["trials"][2], rel=1e-6)


def test_statistics_stand_for_their_images(evaluate, place, tmp_path):
    """Written by --stats; and in NVIDIA's form, mu and sigma alone."""
    direct = means(evaluate("g.pt", "images", "--n", 50))["FID-50"]
    evaluate("images", "--stats", tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:
        assert file["mu"].shape == (6,) and file["sigma"].dtype == np.float64 and file["n"] == 40
        np.savez(place / "checkpoints" / "cifar10-32x32.npz", mu=file["mu"], sigma=file["sigma"])
    big = IMAGES[:9].repeat(1, 1, 2, 2)
    write_images(tmp_path / "big", big)  # of CIFAR-10's size, which chooses the reference
    assert evaluate(tmp_path / "big")["reference"] == "checkpoints/cifar10-32x32.npz"
    for reference in (tmp_path / "ours.npz", "cifar10"):
        result = evaluate("g.pt", reference, "--n", 50)
        assert means(result)["FID-50"] == pytest.approx(direct, rel=1e-6) and "KID-50" not in means(result)
        assert len(result["reference_sha256"]) == 64


@pytest.mark.parametrize("features", ("teacher", "pixels"))
def test_other_features_are_called_so(features, evaluate, monkeypatch, capsys):
    monkeypatch.setattr(eval_fid, "DRAWN", 300)
    result = evaluate("g.pt", "--features", features, "--n", 20, "--nfe", 3)
    assert {f"FD-{features}-20", f"KID-{features}-20", "class accuracy-20"} < means(result).keys()
    assert not any("FID" in name for name in means(result)) and "which is not FID" in capsys.readouterr().out
    assert means(result)["class accuracy-20"] < 0.6 and result["source"] == "3 evaluations of g.pt"
    true = means(evaluate("shapes", "--features", features, "--n", 200))
    assert true[f"FD-{features}-200"] < 0.3 * means(result)[f"FD-{features}-20"]
    assert true["class accuracy-200"] >= 0.99


def test_a_run_names_its_teacher(evaluate, place, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_fid, "DRAWN", 100)
    run = tmp_path / "run"
    run.mkdir()
    saved = torch.load(place / "g.pt", weights_only=True)
    torch.save(saved | {"meta": {"teacher": str(edm.EMBEDDED)}}, run / "g_ema.pt")
    assert evaluate(run, "--features", "teacher", "--n", 3)["source"] == f"{run}, one step from t* = 2.5"
    with pytest.MonkeyPatch.context() as context:  # beside what it is about
        context.chdir(tmp_path)
        eval_fid.main(["run", "--features", "teacher", "--n", "3", "--device", "cpu"])
    assert len(json.loads((run / "fid.json").read_text())) == 1
    of_run = evaluate(run, "--features", "teacher", "--n", 3, "--nfe", 5)
    of_teacher = evaluate(edm.EMBEDDED, "--features", "teacher", "--n", 3, "--nfe", 5)
    assert means(of_run)["FD-teacher-3"] == means(of_teacher)["FD-teacher-3"]
    assert of_run["source_sha256"] == of_teacher["source_sha256"]


def test_interrupted_trials_keep_those_before(evaluate, place, tmp_path, monkeypatch):
    def interrupted(images, numbers, *args, **kwargs):
        if numbers[0] == 24:
            raise KeyboardInterrupt
        return one_pass(images, numbers, *args, **kwargs)

    monkeypatch.setattr(eval_fid, "one_pass", interrupted)
    with pytest.raises(SystemExit):
        evaluate("g.pt", "images", "--n", 12, "--trials", 3)
    (entry,) = json.loads((tmp_path / "fid.json").read_text())
    assert entry["seeds"] == [[0, 11], [12, 23]] and len(entry["metrics"]["FID-12"]["trials"]) == 2


def test_what_is_measured_is_said_and_done(evaluate, place, tmp_path, capsys, monkeypatch):
    """t*, an explicit teacher, a .pkl of NVIDIA's, and the detector's SHA-256."""
    usual, other = [evaluate("g.pt", "images", "--n", 5, "--t-star", t) for t in (2.5, 0.3)]
    assert means(usual) != means(other) and other["source"].endswith("t* = 0.3")
    assert means(evaluate("g.pt", "images", "--n", 5)) == means(usual)
    taught = evaluate("g.pt", "images", "--n", 5, "--nfe", 3, "--teacher", "shapes")
    assert taught["source"] == "3 evaluations of shapes, teacher of g.pt" and means(taught) != means(usual)
    digest = usual["detector_sha256"]
    pkl = evaluate(
        ROOT / "tests" / "fixtures" / "ddpmpp-uncond.pkl",
        "images",
        "--n",
        4,
        "--detector-sha256",
        digest.upper(),
    )
    assert pkl["source"].endswith(".pkl, one step from t* = 2.5") and digest in capsys.readouterr().out


def test_references_have_seeds_of_their_own(evaluate, tmp_path, monkeypatch):
    monkeypatch.setattr(eval_fid, "DRAWN", 20)
    seen, draw = [], eval_fid.draw_shapes
    monkeypatch.setattr(eval_fid, "draw_shapes", lambda n, seed: seen.append(seed[0]) or draw(n, seed))
    evaluate("shapes", "--n", 10)
    assert set(range(10)) < set(seen) and sum(k >= 10**9 for k in seen) == 20 and len(seen) - 20 < 13
    seen.clear()
    evaluate("shapes", "--stats", tmp_path / "x.npz", "--n", 10)
    assert sum(k >= 10**9 for k in seen) == 10


def test_few_features_take_the_nuclear_norm(evaluate, monkeypatch):
    calls = []
    monkeypatch.setattr(eval_fid, "frechet_distance", lambda *v: calls.append(len(v)) or 0.0)
    evaluate("g.pt", "images", "--n", 5)
    monkeypatch.setattr(eval_fid, "KEPT", 39)  # not all of the 40 images are kept
    evaluate("g.pt", "images", "--n", 5)
    assert calls == [6, 4]


def test_teacher_features_are_its_deepest_level(place):
    net = edm.load_denoiser(place / "g.pt")[0]
    deepest = []
    net.model.enc[list(net.model.enc)[-1]].register_forward_hook(lambda *v: deepest.append(v[2]))
    x = IMAGES[:4] / 127.5 - 1
    net(x, 0.2, class_labels=torch.zeros(4, 10))
    assert torch.allclose(eval_fid.teacher_features(net, x, batch=3), deepest[0].mean((2, 3)), atol=1e-6)


def test_results_are_added_and_never_overwritten(evaluate, place, tmp_path):
    evaluate("g.pt", "images", "--n", 12)
    evaluate("g.pt", "images", "--n", 13)
    assert [entry["n"] for entry in json.loads((tmp_path / "fid.json").read_text())] == [12, 13]
    for other, words in (("settings.json", {"a": 1}), ("fid.txt", []), ("none/fid.json", [])):
        if other != "none/fid.json":
            (tmp_path / other).write_text(json.dumps(words))
        assert other in evaluate("g.pt", "images", out=other, fails=True)
        assert other == "none/fid.json" or json.loads((tmp_path / other).read_text()) == words
    (tmp_path / "fid.json").write_text("[{")
    assert "fid.json is no list of results" in evaluate("g.pt", "images", "--n", 12, fails=True)
    assert (tmp_path / "fid.json").read_text() == "[{"


@pytest.mark.slow
def test_ranks_share_the_samples_and_agree(place):
    """As typed, in a process on its own and through torchrun; the results go beside the checkpoint."""
    words = ["eval_fid.py", "g.pt", "images", "--n", "21", "--batch", "4", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for start in ([], torchrun):
        command = [sys.executable, *start, str(ROOT / words[0]), *words[1:]]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        subprocess.run(command, cwd=place, env=environment, check=True, timeout=120, capture_output=True)
    alone, shared = json.loads((place / "fid.json").read_text())
    for name in means(alone):
        assert means(shared)[name] == pytest.approx(means(alone)[name], rel=1e-9), name
    assert alone["source_sha256"] == shared["source_sha256"] and alone["command"] == shared["command"]


# ---- What a user can do wrong ----
def spoil(folder, kind):
    """One image in a folder of good ones that is not as they are."""
    write_images(folder, IMAGES[:3])
    image = Image.open(folder / "000.png")
    if kind == "truncated":
        (folder / "zzz.png").write_bytes((folder / "000.png").read_bytes()[:-40])
    else:
        spoilt = {"grey": image.convert("L"), "alpha": image.convert("RGBA"), "large": image.resize((20, 16))}
        spoilt[kind].save(folder / "zzz.png")


@pytest.mark.parametrize(
    "kind, message",
    (
        ("grey", "zzz.png is L, ("),
        ("alpha", "RGBA"),
        ("large", "(20, 16): expected RGB, (16, 16)"),
        ("truncated", "cannot be read"),
    ),
)
def test_bad_images(kind, message, evaluate, tmp_path):
    spoil(tmp_path / "bad", kind)
    assert message in evaluate(tmp_path / "bad", "images", fails=True)
    assert message in evaluate("images", tmp_path / "bad", fails=True)


def one_pass_of_few(images, numbers, *args, **kwargs):
    assert len(numbers) < 100
    return one_pass(images, numbers, *args, **kwargs)


def test_bad_folders_and_flags(evaluate, place, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", IMAGES[:1])
    write_images(tmp_path / "large", IMAGES[:2].repeat(1, 1, 4, 4))
    np.savez(tmp_path / "stats.npz", mu=0)
    monkeypatch.setattr(eval_fid, "one_pass", one_pass_of_few)  # all of these stop before anything long
    for words, message in (
        ([tmp_path / "empty", "images"], "no .png"),
        ([tmp_path / "one", "images"], "1 images, expected at least 2"),
        (["images", tmp_path / "one"], "1 images, expected at least 2"),
        (["missing", "images"], "missing is not there"),
        (["g.pt", "missing.npz"], "missing.npz"),
        (["missing.pt", "images"], "does not exist"),
        (["images", "images", "--n", 41], "holds 40 images"),
        (["images", "cifar10", "--features", "pixels"], "Inception's"),
        (["images", "images", "--nfe", 35], "--nfe"),
        (["shapes", "shapes", "--nfe", 35], "--nfe"),
        (["g.pt", "g.pt"], "g.pt holds no images"),
        (["images", "--stats", "x.pt"], "expected an .npz"),
        ([tmp_path / "large", "images", "--features", "pixels"], "at most 4096"),
        ([tmp_path / "large", "images", "--features", "teacher"], "expects 3 x 16 x 16"),
        ([tmp_path / "large"], "name a reference"),
        (["images", "images", "--trials", 3], "--trials"),
        (["g.pt", "images", "--nfe", 4], "odd number"),
        (["g.pt", "images", "--n", 1], "--n"),
        (["images", "images", "--detector-sha256", "0" * 64], "expects another"),
        (["g.pt", "images", "--nfe", 3, "--t-star", 1], "--t-star"),
        (["g.pt", "--stats", "no/such/folder.npz"], "in a folder that is there"),
        (["g.pt", "images", "--stats", "x.npz"], "no reference"),
        (["g.pt", "--stats", tmp_path / "stats.npz"], "name another"),
        (["images", tmp_path / "large", "--features", "pixels"], "(3, 64, 64)"),
    ):
        assert message in evaluate(*words, fails=True), words


def test_bad_arrays(evaluate, tmp_path):
    file = tmp_path / "x.npz"
    images = IMAGES.permute(0, 2, 3, 1).numpy()
    for arrays, message in (
        ({"images": images[..., :1]}, "expected one array of images"),
        ({"images": images[:0]}, "expected one array of images"),
        ({"mu": np.zeros(6, dtype=complex), "sigma": np.eye(6)}, "not finite numbers"),
        ({"images": images.astype(np.float32) * np.nan}, "expected one array of images"),
        ({"a": images, "b": images}, "a uint8 (40, 16, 16, 3), b uint8"),
        ({"mu": np.zeros(6)}, "expected mu (6,) and sigma (6, 6)"),
        ({"mu": np.zeros(5), "sigma": np.eye(5)}, "expected mu (6,) and sigma (6, 6)"),
        ({"mu": np.zeros(6), "sigma": np.eye(6), "features": "teacher"}, "teacher features"),
        ({"mu": np.zeros(6), "sigma": np.eye(6) * np.nan}, "not finite"),
        ({"images": np.array([{}])}, "cannot be read"),
    ):
        np.savez(file, **arrays)
        assert message in evaluate("g.pt", file, "--n", 3, fails=True), message
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be read" in evaluate(file, "images", fails=True)


def test_images_that_are_not_finite(evaluate, place, tmp_path):
    saved = torch.load(place / "g.pt", weights_only=True)
    saved["state_dict"] = {name: w * 1e30 for name, w in saved["state_dict"].items()}
    torch.save(saved, tmp_path / "g.pt")
    assert "not finite" in evaluate(tmp_path / "g.pt", "images", "--n", 3, fails=True)


def test_detectors_that_are_none(evaluate, place, tmp_path, monkeypatch):
    shutil.copytree(place / "images", tmp_path / "images")
    with pytest.warns(DeprecationWarning):
        torch.jit.script(torch.nn.Linear(3, 3)).save(tmp_path / "linear.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "nothing.pt").write_bytes(b"")
    monkeypatch.setattr(common.urllib.request, "urlopen", no_network)
    for name, message in (
        ("linear.pt", "not NVIDIA's Inception"),
        ("weights.pt", "not NVIDIA's Inception"),
        ("nothing.pt", "not NVIDIA's Inception"),
        (None, "save it by other means as checkpoints/"),
    ):
        folder = tmp_path / f"with {name}"
        (folder / "checkpoints").mkdir(parents=True)
        if name:
            shutil.copy(tmp_path / name, folder / "checkpoints" / "inception-2015-12-05.pt")
        assert message in evaluate("../images", "../images", fails=True, folder=folder), name


def no_network(*args, **kwargs):
    raise OSError("no network")
