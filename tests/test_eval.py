"""eval_fid.py: each number against a closed form or a slow definition; then the command."""
import hashlib
import importlib
import json
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.linalg
import torch
from PIL import Image

from conftest import ROOT, TINY, save_judge, save_teacher

import common
import eval_fid
from common import UserError, draw_latents, moments, save, to_uint8
from eval_fid import (Images, frechet_distance, inception_score, kernel_distance, one_pass,
                      precision_recall)

edm = importlib.import_module("02_edm_cifar")
IMAGES = torch.randint(256, (40, 3, 16, 16), generator=torch.Generator().manual_seed(3)).byte()
DETECTOR = "inception-2015-12-05.pt"
random = np.random.default_rng(0)


def gaussian_features(n, d, seed=0):
    scale = torch.linspace(0.1, 1, d, dtype=torch.float64)
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed)).double() * scale + seed


# ---- Frechet distance ----
def test_gaussians_with_commuting_covariances():
    a, b, mu = random.uniform(0.1, 2, 5), random.uniform(0.1, 2, 5), random.normal(size=5)
    rotation = np.linalg.qr(random.normal(size=(5, 5)))[0]
    turn = lambda v: rotation @ np.diag(v) @ rotation.T
    for rel in (1e-9, 1e-6):
        expected = (mu**2).sum() + ((a**0.5 - b**0.5)**2).sum()
        distance = frechet_distance(mu, turn(a), 0 * mu, turn(b))
        assert distance == pytest.approx(expected, rel=rel)
        b[:2] = a[:2] = 0  # the second time there are directions without variance


def test_it_is_the_value_of_the_matrix_square_root():
    (mu1, sigma1), (mu2, sigma2) = [moments(gaussian_features(200, 30, seed)) for seed in (0, 1)]
    root = scipy.linalg.sqrtm((sigma1 @ sigma2).numpy())  # as pytorch-fid has it
    expected = ((mu1 - mu2)**2).sum() + (sigma1 + sigma2).trace() - 2 * np.trace(root).real
    distance = frechet_distance(mu1, sigma1, mu2, sigma2)
    assert distance == pytest.approx(expected.item(), rel=1e-9)
    assert frechet_distance(mu1, sigma1, mu1, sigma1) < 1e-8


@pytest.mark.parametrize("n", (9, 25, 200))
def test_fewer_features_than_dimensions(n):
    """In 6 of 40 dimensions, turned: the distance is that of the 6."""
    a, b = gaussian_features(n, 6, 0), gaussian_features(60, 6, 1)
    expected = frechet_distance(*moments(a), *moments(b))
    turn = torch.from_numpy(np.linalg.qr(random.normal(size=(40, 40)))[0][:6])
    distance = frechet_distance(*moments(a @ turn), *moments(b @ turn))
    assert distance == pytest.approx(expected, rel=1e-5)


def test_impossible_moments_are_refused():
    zero, one = torch.zeros(2), torch.eye(2)
    for sigma in (one * torch.nan, -2 * one, torch.eye(3)):
        with pytest.raises(UserError, match="Frechet distance"):
            frechet_distance(zero, sigma, zero, one)
    one_and = lambda v: torch.diag(torch.tensor([1.0, v]))
    assert frechet_distance(zero, one_and(1e-12), zero, one_and(-1e-4)) == 0  # -0.5e-4 of the trace
    with pytest.raises(UserError, match="-0.001"):
        frechet_distance(zero, one_and(1e-12), zero, one_and(-1e-3))
    assert frechet_distance(zero, 0 * one, torch.ones(2), 0 * one) == 2  # images that are all alike


# ---- KID, precision and recall, Inception Score ----
def test_kernel_distance_is_the_unbiased_mmd():
    x, y = gaussian_features(12, 3, 0), gaussian_features(12, 3, 1)
    k = lambda a, b: (float(a @ b) / 3 + 1)**3
    pairs = [(i, j) for i in range(12) for j in range(12)]
    within = lambda v: sum(k(v[i], v[j]) for i, j in pairs if i != j) / (12 * 11)
    expected = within(x) + within(y) - 2 * sum(k(x[i], y[j]) for i, j in pairs) / 144
    mean, std = kernel_distance(x, y)
    assert mean == pytest.approx(expected, rel=1e-9) and std < 1e-9  # each subset has all features
    same = gaussian_features(3000, 4)
    mean, std = kernel_distance(same[::2], same[1::2], size=200)
    assert abs(mean) < 3 * std and std > 0


def test_precision_and_recall():
    fake, real = gaussian_features(40, 3, 0).numpy(), gaussian_features(50, 3, 1).numpy()
    fake[:20] = real[:20] + 0.01

    def share(x, centres, k=3):
        radii = [sorted(np.linalg.norm(other - c) for other in centres)[k] for c in centres]
        return np.mean([any(np.linalg.norm(p - c) <= r for c, r in zip(centres, radii)) for p in x])

    got = precision_recall(torch.from_numpy(fake), torch.from_numpy(real))
    assert got == pytest.approx((share(fake, real), share(real, fake))) and 0.5 <= got[0] < 1


def in_memory(images):
    return Images("a test", lambda k: images[k], tuple(images.shape[1:]), len(images), None)


def probabilities(x):
    return torch.softmax(x.flatten(1).float()[:, :7] / 40, dim=1)


@pytest.mark.parametrize("n", (57, 60))
def test_inception_score_by_definition(n):
    images = torch.randint(256, (n, 3, 4, 4), dtype=torch.uint8)
    detect = lambda x: (x.flatten(1) / 255, probabilities(x))
    sums = one_pass(in_memory(images), range(n), detect, 11, "cpu")
    p = probabilities(images).double().numpy()
    parts = [p[i * n // 10:(i + 1) * n // 10] for i in range(10)]
    scores = [np.exp((q * (np.log(q) - np.log(q.mean(0)))).sum(1).mean()) for q in parts]
    got = inception_score(sums["p"], sums["p_log_p"], sums["counts"])
    assert got == pytest.approx((np.mean(scores), np.std(scores)), rel=1e-9)


@pytest.mark.parametrize("batch", (1, 7, 100))
def test_batches_change_nothing(batch, monkeypatch):
    monkeypatch.setattr(eval_fid, "STORED", 10)
    images = IMAGES[:33]
    features = images.flatten(1)[:, :20].double() / 255
    detect = lambda x: (x.flatten(1)[:, :20] / 255, torch.full((len(x), 2), 0.5))
    sums = one_pass(in_memory(images), range(33), detect, batch, "cpu")
    assert torch.allclose(sums["mu"], features.mean(0)) and sums["n"] == 33
    assert torch.allclose(sums["sigma"], torch.cov(features.T), atol=1e-9)
    assert torch.allclose(sums["stored"].double(), features[::4])


# ---- The command ----
class Inception(torch.nn.Module):
    """A detector of NVIDIA's signature with 6 features and 5 classes."""
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv2d(3, 6, 3)
        self.output = torch.nn.Linear(6, 5)

    def forward(self, img, return_features: bool = False, use_fp16: bool = False,
                no_output_bias: bool = False):
        x = img.float() / 127.5 - 1
        x = torch.nn.functional.interpolate(x, size=[19, 19], mode="bilinear")
        x = self.conv(x).exp().mean([2, 3])
        if return_features:
            return x
        bias = torch.zeros(5) if no_output_bias else self.output.bias
        return torch.softmax(torch.nn.functional.linear(x, self.output.weight, bias), dim=1)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the detector in checkpoints/, a generator g.pt, and 40 images in images/."""
    folder = tmp_path_factory.mktemp("eval")
    (folder / "checkpoints").mkdir()
    torch.manual_seed(0)
    with pytest.warns(DeprecationWarning):
        torch.jit.script(Inception()).save(folder / "checkpoints" / DETECTOR)
    save_teacher(folder / "g.pt")  # a bad generator, but one whose images differ
    save_judge(folder / "judge.pt", (3, 8, 8))
    write_images(folder / "images", IMAGES)
    return folder


def save_generator(path, state, meta):
    save({"net_args": TINY, "state_dict": state, "t_star": 2.5, "meta": meta}, path)


def write_images(folder, images):
    folder.mkdir()
    for i, image in enumerate(images):
        pixels = image.permute(1, 2, 0).numpy()
        Image.fromarray(pixels.squeeze()).save(folder / f"{i:03}.png")


def means(result):
    return {name: values["mean"] for name, values in result["metrics"].items()}


@pytest.fixture
def evaluate(place, monkeypatch, tmp_path, capsys):
    """In that folder: -> the result of a command, as fid.json has it; or its line, if it fails."""
    def run(*words, fails=False, folder=place, out="fid.json"):
        monkeypatch.chdir(folder)
        out = tmp_path / out
        words = [*map(str, words), "--device", "cpu", "--out", str(out)]
        if not fails:
            eval_fid.main(words)
            return json.loads(out.read_text())[-1] if out.exists() else None
        with pytest.raises(SystemExit) as stop:
            eval_fid.main(words)
        line = capsys.readouterr().err
        assert stop.value.code == 2 and line.startswith("error: ") and line.count("\n") == 1, line
        return line
    return run


def test_fid_and_inception_score_of_a_generator(evaluate, place):
    """By the real path, against numpy: images from their seeds, moments and root anew."""
    result = evaluate("g.pt", "images", "--n", 30, "--batch", 7, "--seed", 5)
    z, labels = draw_latents(range(5, 35), (3, 8, 8), 3)
    x = edm.sample_one_step(edm.load_denoiser(place / "g.pt")[0], 2.5, z, labels).numpy()
    images = np.clip(np.trunc(x * 127.5 + 128), 0, 255).astype(np.uint8)
    detector = Inception()
    state = torch.jit.load(place / "checkpoints" / DETECTOR).state_dict()
    detector.load_state_dict(state)
    with torch.no_grad():
        sets = torch.from_numpy(images), IMAGES
        a, b = [detector(v, return_features=True).double().numpy() for v in sets]
        p = detector(sets[0], no_output_bias=True).double().numpy()
    root = scipy.linalg.sqrtm(np.cov(a.T) @ np.cov(b.T)).real
    fid = ((a.mean(0) - b.mean(0))**2).sum() + np.trace(np.cov(a.T) + np.cov(b.T) - 2 * root)
    q = p.reshape(10, 3, 5)
    score = np.exp((q * np.log(q / q.mean(1, keepdims=True))).sum(2).mean(1))
    expected = {"FID-30": fid, "IS-30": score.mean(), "IS-30 (std of splits)": score.std()}
    assert {name: means(result)[name] for name in expected} == pytest.approx(expected, rel=1e-4)
    assert {"KID-30", "precision-inception-30", "recall-inception-30"} < means(result).keys()
    digest = hashlib.sha256((place / "checkpoints" / DETECTOR).read_bytes()).hexdigest()
    assert result["detector_sha256"] == digest and result["seeds"] == [[5, 34]]
    assert result["source_sha256"] and result["reference_sha256"] and result["reference_n"] == 40


def test_neither_batches_nor_files_change_the_number(evaluate, place, tmp_path):
    """Images that went through PNG files or an .npz give the same number as those that did not."""
    first = means(evaluate("g.pt", "images", "--n", 30, "--batch", 30))
    for out in ("png", "x.npz"):
        edm.main(["--sample", str(place / "g.pt"), "--n", "30", "--out", str(tmp_path / out),
                  "--device", "cpu"])
    for words in (["g.pt", "images", "--n", 30, "--batch", 4], [tmp_path / "png", "images"],
                  [tmp_path / "x.npz", "images"]):
        assert means(evaluate(*words)) == pytest.approx(first, rel=1e-4)


def test_trials_have_seeds_of_their_own(evaluate):
    result = evaluate("g.pt", "images", "--n", 12, "--trials", 3)
    fid = result["metrics"]["FID-12"]
    assert result["seeds"] == [[0, 11], [12, 23], [24, 35]] and len(set(fid["trials"])) == 3
    assert fid["mean"] == pytest.approx(np.mean(fid["trials"]))
    assert fid["std"] == pytest.approx(np.std(fid["trials"], ddof=1))
    again = means(evaluate("g.pt", "images", "--n", 12, "--seed", 24))
    assert again["FID-12"] == pytest.approx(fid["trials"][2], rel=1e-6)


def test_statistics_stand_for_their_images(evaluate, place, tmp_path):
    """Written by --stats; and in NVIDIA's form, mu and sigma alone."""
    direct = means(evaluate("g.pt", "images", "--n", 50))["FID-50"]
    evaluate("images", "--stats", tmp_path / "ours.npz")
    with np.load(tmp_path / "ours.npz") as file:
        assert file["mu"].shape == (6,) and file["sigma"].dtype == np.float64 and file["n"] == 40
        np.savez(place / "checkpoints" / "cifar10-32x32.npz", mu=file["mu"], sigma=file["sigma"])
    write_images(tmp_path / "big", IMAGES[:9].repeat(1, 1, 2, 2))  # CIFAR-10's size
    assert evaluate(tmp_path / "big")["reference"] == "checkpoints/cifar10-32x32.npz"
    for reference in (tmp_path / "ours.npz", "cifar10"):
        result = evaluate("g.pt", reference, "--n", 50)
        assert means(result)["FID-50"] == pytest.approx(direct, rel=1e-6)
        assert "KID-50" not in means(result) and len(result["reference_sha256"]) == 64


def test_statistics_of_a_generator_have_seeds_of_no_trial(evaluate, tmp_path, monkeypatch):
    seen = []

    def draw(seeds, *arguments, **options):
        seen.extend(seeds)
        return draw_latents(seeds, *arguments, **options)

    monkeypatch.setattr(eval_fid, "draw_latents", draw)
    evaluate("g.pt", "--stats", tmp_path / "x.npz", "--n", 10)
    assert sorted(set(seen) - {0}) == [*range(10**9, 10**9 + 10)]


def test_the_judges_features(evaluate, place, tmp_path, capsys):
    """The moments in the judge's file, by default; true pictures in a file allow KID as well."""
    words = ("--features", "judge", "--judge", "judge.pt", "--n", 20)
    result = evaluate("g.pt", *words, "--nfe", 3)
    assert means(result).keys() == {"FD-judge-20", "IS-judge-20", "IS-judge-20 (std of splits)"}
    assert "which is not FID" in capsys.readouterr().out and "judge.pt" in result["reference"]
    net, judge = edm.load_denoiser(place / "g.pt")[0], edm.load_judge(place / "judge.pt", (3, 8, 8))
    z, labels = draw_latents(range(20), (3, 8, 8), 3)
    x = edm.sample_teacher(net, z, labels, num_steps=2)
    expected = edm.grade(judge, x, labels)["fd"]
    assert means(result)["FD-judge-20"] == pytest.approx(expected, rel=1e-5)
    pictures = to_uint8(torch.randn(30, 3, 8, 8)).permute(0, 2, 3, 1).numpy()
    np.savez(tmp_path / "true.npz", images=pictures, labels=np.arange(30))
    again = means(evaluate("g.pt", tmp_path / "true.npz", *words))
    assert {"FD-judge-20", "KID-judge-20", "recall-judge-20"} < again.keys()


def test_grey_images(evaluate, place, tmp_path):
    """As PNGs, as (N, H, W) and (N, H, W, 1): the same; Inception sees them as RGB of one value."""
    grey = IMAGES[:, :1]
    write_images(tmp_path / "grey", grey)
    write_images(tmp_path / "rgb", grey.expand(-1, 3, -1, -1))
    np.savez(tmp_path / "a.npz", images=grey[:, 0].numpy())
    np.savez(tmp_path / "b.npz", images=grey[:, 0, :, :, None].numpy())
    found = [means(evaluate(tmp_path / name, "images"))
             for name in ("grey", "rgb", "a.npz", "b.npz")]
    assert found[0] == found[2] == found[3]
    assert found[0] == pytest.approx(found[1], rel=1e-4, abs=1e-9)
    judge = save_judge(tmp_path / "judge.pt", (1, 16, 16))
    assert "FD-judge-40" in means(evaluate(tmp_path / "grey", "--features", "judge",
                                           "--judge", judge))


def test_a_run_names_its_teacher(evaluate, place, tmp_path):
    run, words = tmp_path / "run", ("images", "--n", 3)
    state = torch.load(place / "g.pt", weights_only=True)["state_dict"]
    run.mkdir()
    save_generator(run / "g_ema.pt", state, {"teacher": str(place / "g.pt")})
    assert evaluate(run, *words)["source"] == f"{run}, one step from t* = 2.5"
    eval_fid.main([str(run), *map(str, words), "--device", "cpu"])  # its result is beside it
    assert len(json.loads((run / "fid.json").read_text())) == 1
    of_run = evaluate(run, *words, "--nfe", 5)
    of_teacher = evaluate(place / "g.pt", *words, "--nfe", 5)
    assert means(of_run) == means(of_teacher)
    assert of_run["source_sha256"] == of_teacher["source_sha256"]
    save_generator(run / "g_ema.pt", state, {"teacher": "os:getcwd"})  # a file imports nothing
    assert "name the teacher" in evaluate(run, *words, "--nfe", 5, fails=True)


def test_interrupted_trials_keep_those_before(evaluate, tmp_path, monkeypatch):
    def interrupted(images, numbers, **options):
        if numbers[0] == 24:
            raise KeyboardInterrupt
        return one_pass(images, numbers, **options)

    monkeypatch.setattr(eval_fid, "one_pass", interrupted)
    with pytest.raises(SystemExit):
        evaluate("g.pt", "images", "--n", 12, "--trials", 3)
    (entry,) = json.loads((tmp_path / "fid.json").read_text())
    assert entry["seeds"] == [[0, 11], [12, 23]] and len(entry["metrics"]["FID-12"]["trials"]) == 2


def test_what_is_measured_is_said_and_done(evaluate, capsys):
    """t*, an explicit teacher, a .pkl of NVIDIA's, and the detector's SHA-256."""
    usual, other = [evaluate("g.pt", "images", "--n", 5, "--t-star", t) for t in (2.5, 0.3)]
    assert means(usual) != means(other) and other["source"].endswith("t* = 0.3")
    assert "IS-5" not in means(usual)  # ten splits need ten images
    assert means(evaluate("g.pt", "images", "--n", 5)) == means(usual)
    taught = evaluate("g.pt", "images", "--n", 5, "--nfe", 3, "--teacher", "fashion")
    assert taught["source"] == "3 evaluations of fashion, teacher of g.pt"
    assert means(taught) != means(usual) and taught["source_sha256"] == common.sha256(edm.FASHION)
    digest, pkl = usual["detector_sha256"], ROOT / "tests" / "fixtures" / "ddpmpp-uncond.pkl"
    pkl = evaluate(pkl, "images", "--n", 4, "--detector-sha256", digest.upper())
    assert pkl["source"].endswith(".pkl, one step from t* = 2.5")
    assert digest in capsys.readouterr().out


def test_results_are_added_and_never_overwritten(evaluate, tmp_path):
    evaluate("g.pt", "images", "--n", 12)
    evaluate("g.pt", "images", "--n", 13)
    assert [entry["n"] for entry in json.loads((tmp_path / "fid.json").read_text())] == [12, 13]
    for other, text in (("settings.json", '{"a": 1}'), ("fid.txt", "[]"), ("half.json", "[{")):
        (tmp_path / other).write_text(text)
        assert other in evaluate("g.pt", "images", "--n", 12, out=other, fails=True)
        assert (tmp_path / other).read_text() == text
    assert "none/fid.json" in evaluate("g.pt", "images", out="none/fid.json", fails=True)


@pytest.mark.slow
def test_ranks_share_the_samples_and_agree(place):
    """As typed, in one process and through torchrun; the results go beside the checkpoint."""
    words = ["eval_fid.py", "g.pt", "images", "--n", "21", "--batch", "4", "--device", "cpu"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", "--"]
    for start in ([], torchrun):
        command = [sys.executable, *start, str(ROOT / words[0]), *words[1:]]
        subprocess.run(command, cwd=place, env=os.environ | {"OMP_NUM_THREADS": "1"}, check=True,
                       timeout=120, capture_output=True)
    alone, shared = json.loads((place / "fid.json").read_text())
    assert means(shared) == pytest.approx(means(alone), rel=1e-9)
    assert [alone[key] for key in ("source_sha256", "command")] == [
        shared[key] for key in ("source_sha256", "command")]


# ---- What a user can do wrong ----
@pytest.mark.parametrize("kind, message", (
    ("grey", "zzz.png cannot be used (its shape is (16, 16, 1)"), ("alpha", "its mode is RGBA"),
    ("bitmap", "cannot identify"), ("cut", "zzz.png"),
    ("large", "(16, 20, 3)): expected a PNG or JPEG, grey or RGB, of shape (16, 16, 3)")))
def test_bad_images(kind, message, evaluate, tmp_path):
    write_images(tmp_path / "bad", IMAGES[:3])
    image, last = Image.open(tmp_path / "bad" / "000.png"), tmp_path / "bad" / "zzz.png"
    if kind == "cut":
        last.write_bytes((tmp_path / "bad" / "000.png").read_bytes()[:-40])
    elif kind == "bitmap":
        image.save(last, format="BMP")  # only PNG and JPEG are opened
    else:
        {"grey": image.convert("L"), "alpha": image.convert("RGBA"),
         "large": image.resize((20, 16))}[kind].save(last)
    assert message in evaluate(tmp_path / "bad", "images", fails=True)
    assert message in evaluate("images", tmp_path / "bad", fails=True)


def test_bad_sources_and_flags(evaluate, tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    write_images(tmp_path / "one", IMAGES[:1])
    write_images(tmp_path / "large", IMAGES[:2].repeat(1, 1, 4, 4))
    np.savez(tmp_path / "stats.npz", mu=0)
    save({"net_args": {}, "state_dict": {}, "t_star": 2.5, "meta": {}}, tmp_path / "toy.pt")

    def one_pass_of_few(images, numbers, **options):
        assert len(numbers) < 100  # all of these stop before anything long
        return one_pass(images, numbers, **options)

    monkeypatch.setattr(eval_fid, "one_pass", one_pass_of_few)
    for words, message in (
            ([tmp_path / "empty", "images"], "no .png"),
            ([tmp_path / "one", "images"], "1 images, expected at least 2"),
            (["images", tmp_path / "one"], "1 images, expected at least 2"),
            (["missing", "images"], "missing is not there"),
            (["g.pt", "missing.npz"], "missing.npz"),
            (["missing.pt", "images"], "missing.pt"),
            ([tmp_path / "toy.pt", "images"], "runs of stage 2"),
            (["g.pt", "g.pt"], "g.pt holds no images"),
            (["images", "images", "--n", 41], "holds 40 images"),
            (["images", "images", "--nfe", 35], "--nfe"),
            (["images", "images", "--trials", 3], "--trials"),
            (["images", "images", "--seed", 3], "--seed"),
            (["g.pt", "images", "--nfe", 4], "odd number"),
            (["g.pt", "images", "--nfe", 3, "--t-star", 1], "--t-star"),
            (["g.pt", "images", "--n", 1], "at least 2"),
            (["g.pt", "images", "--features", "pixels"], "pixels"),
            (["g.pt"], "name a reference"),
            (["g.pt", "judge"], "judge"),
            (["g.pt", tmp_path / "stats.npz", "--features", "judge", "--judge", "judge.pt"],
             "inception fea"),
            ([tmp_path / "large"], "name a reference"),
            (["g.pt", "--features", "judge"], "a judge of images (1, 28, 28)"),
            (["g.pt", "images", "--judge", "judge.pt"], "--judge is for"),
            (["g.pt", "--features", "judge", "--judge", "judge.pt", "--detector-sha256", "0"],
             "--detector-sha256 is for"),
            (["g.pt", "images", "--features", "judge", "--judge", "judge.pt"], "(3, 16, 16)"),
            (["images", "images", "--detector-sha256", "0" * 64], "expects another"),
            (["images", "--stats", "x.pt"], "expected a new .npz"),
            (["g.pt", "--stats", "no/such/folder.npz"], "in a folder that is there"),
            (["g.pt", "--stats", tmp_path / "stats.npz"], "expected a new .npz"),
            (["g.pt", "images", "--stats", "x.npz"], "no reference")):
        assert message in evaluate(*words, fails=True), words


def test_bad_arrays(evaluate, tmp_path):
    file, images = tmp_path / "x.npz", IMAGES.permute(0, 2, 3, 1).numpy()
    sigma = np.eye(6)
    for arrays, message in (
            ({"images": images[..., :2]}, "expected one array of images"),
            ({"images": images[:0]}, "expected one array of images"),
            ({"images": images.astype(np.float32) * np.nan}, "expected one array of images"),
            ({"a": images, "b": images}, "a uint8 (40, 16, 16, 3), b uint8"),
            ({"images": np.array([{}])}, "cannot be used"),
            ({"mu": np.zeros(6)}, "expected mu (6,) and sigma (6, 6)"),
            ({"mu": np.zeros(5), "sigma": np.eye(5)}, "(5,)"),
            ({"mu": np.zeros(6), "sigma": sigma, "features": "judge"}, "judge features"),
            ({"mu": np.zeros(6), "sigma": sigma, "detector_sha256": "0"}, "another detector"),
            ({"mu": np.zeros(6, dtype=complex) + 1j, "sigma": sigma}, "finite and real"),
            ({"mu": np.zeros(6), "sigma": sigma * np.nan}, "finite and real")):
        np.savez(file, **arrays)
        assert message in evaluate("g.pt", file, "--n", 3, fails=True), message
    file.write_bytes(file.read_bytes()[:100])
    assert "cannot be used" in evaluate(file, "images", fails=True)


def test_images_that_are_not_finite(evaluate, place, tmp_path):
    state = torch.load(place / "g.pt", weights_only=True)["state_dict"]
    save_generator(tmp_path / "g.pt", {name: w * 1e30 for name, w in state.items()}, {})
    assert "not finite" in evaluate(tmp_path / "g.pt", "images", "--n", 3, fails=True)


def test_detectors_that_are_none(evaluate, place, tmp_path, monkeypatch):
    def no_network(*args, **kwargs):
        raise OSError("no network")

    shutil.copytree(place / "images", tmp_path / "images")
    with pytest.warns(DeprecationWarning):
        torch.jit.script(torch.nn.Linear(3, 3)).save(tmp_path / "linear.pt")
    torch.save({"weights": torch.zeros(3)}, tmp_path / "weights.pt")
    (tmp_path / "nothing.pt").write_bytes(b"")
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for name in ("linear.pt", "weights.pt", "nothing.pt", None):
        folder = tmp_path / f"with {name}"
        (folder / "checkpoints").mkdir(parents=True)
        if name:
            shutil.copy(tmp_path / name, folder / "checkpoints" / DETECTOR)
        message = evaluate("../images", "../images", fails=True, folder=folder)
        expected = "NVIDIA's Inception" if name else "saved by other means as checkpoints/"
        assert expected in message, name
