"""lab/pictures.py: data in every form. lab/teachers.py: the trainings, resumed. lab/machine.py:
live bytes, and the tables."""
import gzip
import importlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import TINY, edm, save_judge, vector
from PIL import Image

from common import draw_latents, moments

t2i = importlib.import_module("03_pixart_t2i")
teachers, machine, pictures = [importlib.import_module(f"lab.{name}")
                               for name in ("teachers", "machine", "pictures")]
SHORT = "--batch 4 --steps 4 --save-every 1 --log-every 1 --device cpu --out".split()
PIXELS = np.random.default_rng(0).integers(256, size=(40, 16, 16), dtype=np.uint8)
LABELS = np.arange(40) % 3


# ---- pictures ----
def write_idx(path, array):
    head = bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes()
    with (gzip.open if path.suffix == ".gz" else open)(path, "wb") as file:
        file.write(head + array.astype(np.uint8).tobytes())


def write_folders(folder, pixels=PIXELS):
    for k, (image, label) in enumerate(zip(pixels, LABELS)):
        (folder / f"class {label}").mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"class {label}" / f"{k:03}.png")  # exact, unlike JPEG
    return folder


def test_pictures_in_every_form(tmp_path):
    for part, cut in (("train", slice(0, 20)), ("t10k", slice(20, 40))):
        write_idx(tmp_path / f"{part}-images-idx3-ubyte.gz", PIXELS[cut])
        write_idx(tmp_path / f"{part}-labels-idx1-ubyte", LABELS[cut])
    for part, cut in (("train", slice(0, 20)), ("test", slice(20, 40))):
        images, labels = pictures.load_pictures(tmp_path, part)
        assert (images[:, 0].numpy() == PIXELS[cut]).all() and (labels.numpy() == LABELS[cut]).all()
    write_folders(tmp_path / "folders")
    order = np.argsort(LABELS, kind="stable")  # a class after the other
    np.savez(tmp_path / "x.npz", images=PIXELS[order], labels=LABELS[order])
    for name in ("folders", "x.npz"):
        parts = [pictures.load_pictures(tmp_path / name, part) for part in ("train", "test")]
        assert [len(images) for images, _ in parts] == [36, 4]  # a random tenth is for tests
        images, labels = [torch.cat(v) for v in zip(*parts)]
        numbers = [(PIXELS == x.numpy()).all((1, 2)).nonzero()[0].item() for x in images[:, 0]]
        assert sorted(numbers) == [*range(40)] and (labels.numpy() == LABELS[numbers]).all()
        assert len(set(labels[:36].tolist())) == 3
    rgb = np.stack([PIXELS, 255 - PIXELS, PIXELS], axis=-1)
    found = pictures.load_pictures(write_folders(tmp_path / "rgb", rgb))[0]
    assert found.shape == (36, 3, 16, 16) and (found[:, 1] == 255 - found[:, 0]).all()
    Image.fromarray(rgb[0]).save(tmp_path / "rgb" / "class 1" / "x.jpeg")
    assert len(pictures.load_pictures(tmp_path / "rgb")[0]) == 37
    pictures.main([str(tmp_path), "--n", "7", "--out", str(tmp_path / "test.npz")])
    with np.load(tmp_path / "test.npz") as file:
        assert (file["images"][..., 0] == PIXELS[20:27]).all()
        assert (file["labels"] == LABELS[20:27]).all()


def test_pictures_that_are_no_use(tmp_path, refused):
    write_folders(tmp_path / "oblong", PIXELS[:, :12])
    mixed = write_folders(tmp_path / "mixed")
    Image.new("L", (20, 20)).save(write_folders(tmp_path / "uneven") / "class 0" / "x.png")
    (mixed / "other").mkdir()
    Image.new("RGB", (16, 16)).save(mixed / "other" / "0.png")
    for name in ("empty", "cut", "no labels", "huge", "other test"):
        (tmp_path / name).mkdir()
    head = bytes([0, 0, 8, 3]) + np.array([-2, -2, 16], ">i4").tobytes()
    (tmp_path / "huge" / "train-images").write_bytes(head + bytes(64))
    for part, size in (("train", 16), ("t10k", 12)):
        write_idx(tmp_path / "other test" / f"{part}-images", np.tile(PIXELS, (1, 2, 2))[
            :, :size + 4, :size + 4])
        write_idx(tmp_path / "other test" / f"{part}-labels", LABELS)
    for name in ("cut", "no labels"):
        write_idx(tmp_path / name / "train-images", PIXELS)
    write_idx(tmp_path / "cut" / "train-labels", LABELS)
    whole = (tmp_path / "cut" / "train-images").read_bytes()
    (tmp_path / "cut" / "train-images").write_bytes(whole[:-1])
    for name, arrays in {"float": {"images": PIXELS / 1.0, "labels": LABELS},
                         "odd": {"images": PIXELS[:, :15, :15], "labels": LABELS},
                         "few": {"images": PIXELS, "labels": LABELS[:9]},
                         "negative": {"images": PIXELS, "labels": LABELS - 1},
                         "a billion": {"images": PIXELS, "labels": LABELS + 10**9},
                         "nothing": {"images": PIXELS[:0], "labels": LABELS[:0]},
                         "nineteen": {"images": PIXELS[:19], "labels": LABELS[:19]},
                         "unlabelled": {"images": PIXELS}}.items():
        np.savez(tmp_path / f"{name}.npz", **arrays)
    for name, text in (("oblong", "expected squares"), ("mixed", "one size and mode"),
                       ("uneven", "its shape is (20, 20, 1)"), ("empty", "a subfolder of pictures"),
                       ("cut", "it holds 10239 bytes"), ("no labels", "no file train-labels"),
                       ("float.npz", "expected uint8"), ("odd.npz", "a multiple of four"),
                       ("few.npz", "expected 40 numbers"), ("negative.npz", "numbers from 0 to"),
                       ("a billion.npz", "at most 999"), ("nothing.npz", "at least 20"),
                       ("nineteen.npz", "at least 20"), ("huge", "its shape is"),
                       ("other test", "another shape or other classes"),
                       ("unlabelled.npz", "expected images and labels"), ("none", "a subfolder")):
        typed = ["judge", "--data", tmp_path / name, "--out", tmp_path / "run"]
        assert text in refused(teachers.main, typed), name
        assert not (tmp_path / "run").exists()


# ---- teachers ----
@pytest.fixture
def small(monkeypatch, tmp_path):
    """Small networks, and few images to measure them by. -> the pictures to learn from"""
    sized = lambda side, channels, classes: TINY | {
        "img_resolution": side, "img_channels": channels, "label_dim": classes, "augment_dim": 1}
    monkeypatch.setattr(teachers, "unet_args", sized)
    monkeypatch.setattr(t2i, "MINI_NET", t2i.MINI_NET | {"hidden_size": 32, "depth": 1,
                                                         "num_heads": 2})
    monkeypatch.setattr(edm, "FINAL", 40)
    monkeypatch.setattr(edm, "sample_teacher", lambda net, z, labels: z)
    monkeypatch.setattr(teachers, "TRUE", 50)
    monkeypatch.setattr(teachers.shapes, "TESTED", 40)
    np.savez(tmp_path / "data.npz", images=PIXELS, labels=LABELS)
    return str(tmp_path / "data.npz")


@pytest.mark.parametrize("name, facts", [
    ("fashion", {"judged", "judge_sha256"}), ("judge", {"mu", "sigma", "floor"}),
    ("miniature", {"data", "mu", "sigma", "fd_real", "prompts", "tested"})])
def test_a_training_resumes(name, facts, small, tmp_path, monkeypatch, capsys):
    """Stopped in the third update and continued: the same file, which its stage can use."""
    rates, update = [], teachers.update

    def dies(optimiser, lr):
        update(optimiser, lr)
        if len(rates) == 2:
            raise KeyboardInterrupt
        rates.append(lr)

    typed = [name] + (["--data", small] if name != "miniature" else [])
    if name == "fashion":
        typed += ["--judge", str(save_judge(tmp_path / "judge.pt", (1, 16, 16)))]
    teachers.main([*typed, *SHORT, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(teachers, "update", dies)
        teachers.main([*typed, *SHORT, str(tmp_path / "killed")])
    file = "judge.pt" if name == "judge" else "teacher.pt"
    assert stop.value.code == 130 and not (tmp_path / "killed" / file).exists()
    if name == "fashion":  # sample_teacher, replaced above, returns z
        z, labels = draw_latents(range(40), (1, 16, 16), 3)
        seen = edm.grade(edm.load_judge(tmp_path / "judge.pt", (1, 16, 16)), z, labels)
        whole = torch.load(tmp_path / "whole" / file, weights_only=True)
        assert whole["meta"]["judged"] == {f"{key}_teacher": v for key, v in seen.items()}
    lr = teachers.RECIPES[name]["lr"]  # which rises to 1/200 and 2/200 of itself, and anneals
    assert rates == pytest.approx([lr / 200, 0.75 * lr * 2 / 200])
    teachers.main([*typed, *SHORT, str(tmp_path / "killed")])
    assert "goes on from step 2" in capsys.readouterr().out
    whole, killed = [torch.load(tmp_path / folder / file, weights_only=True)
                     for folder in ("whole", "killed")]
    assert all(map(torch.equal, whole["state_dict"].values(), killed["state_dict"].values()))
    assert {w.dtype for w in whole["state_dict"].values()} == {torch.float16}
    assert whole["meta"].keys() == facts | {"steps", "batch", "seed"}
    moved = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    assert not torch.equal(vector(moved["net"].values()), vector(moved["ema"].values()))
    path = tmp_path / "whole" / file
    if name == "fashion":
        assert edm.load_teacher(str(path))[0].image_shape == (1, 16, 16) and whole["t_star"] == 2.5
    elif name == "judge":
        assert edm.load_judge(path, (1, 16, 16)).head.out_features == 3
        assert 0 <= whole["meta"]["floor"]["class_accuracy_floor"] <= 1
    else:
        pipeline, meta, _ = t2i.load_teacher(str(path))
        assert len(meta["prompts"]) == 1120 and len(meta["tested"]) == 40
        assert pipeline.encode(["a"])[0].shape == (2, 64)


def test_what_a_judge_says_of_true_pictures(tmp_path):
    """The moments are those of the test, to which the test itself has no distance."""
    judge = edm.load_judge(save_judge(tmp_path / "judge.pt", (1, 16, 16)), (1, 16, 16))
    images, labels = torch.from_numpy(PIXELS)[:, None], torch.from_numpy(LABELS)
    same = teachers.describe_truth(judge, (images, labels), (images, labels))
    features, logits = judge(images)
    mu, sigma = moments(features)
    torch.testing.assert_close(same["mu"], mu)
    torch.testing.assert_close(same["sigma"], sigma)
    assert same["floor"]["fd_floor"] < 1e-6 and same["floor"]["n_floor"] == 40
    right = (logits.argmax(1) == labels).double().mean().item()
    assert same["floor"]["class_accuracy_floor"] == pytest.approx(right)
    other = teachers.describe_truth(judge, (images, labels), (255 - images, 2 - labels))["floor"]
    assert other["fd_floor"] > 1e-3 and other["class_accuracy_floor"] == pytest.approx(right)


def test_what_a_teacher_of_pictures_sees(small, tmp_path, monkeypatch):
    """Half of the pictures are flipped and the network is told which; a tenth of labels is lost."""
    seen = []

    def look(net, x, c_noise, labels, flipped):
        assert net.label_dropout == 0.1
        seen.append((labels, flipped))
        return 0 * x * net.map_label.weight.sum()
    monkeypatch.setattr(edm.SongUNet, "forward", look)
    monkeypatch.setattr(teachers, "dsm_loss", lambda denoiser, x_0, t: seen.append(x_0) or
                        denoiser(x_0, t).flatten(1).sum(1))
    teachers.main(["fashion", "--data", small, *SHORT, str(tmp_path / "run"), "--batch", "100"])
    train = pictures.load_pictures(small)
    for x_0, (labels, flipped) in zip(seen[::2], seen[1::2]):
        true = torch.where(flipped.reshape(-1, 1, 1, 1) == 1, x_0.flip(3), x_0)
        numbers = [(train[0] == x).flatten(1).all(1).nonzero().item()
                   for x in ((true + 1) * 127.5).round().byte()]
        assert (labels.argmax(1) == train[1][numbers]).all() and 0.3 < flipped.mean() < 0.7


def test_captions_are_dropped_and_held_out(small, tmp_path, monkeypatch):
    """A miniature starts without text and output; a tenth of captions are y_embedding; no held-out
    prompt is ever drawn."""
    drawn, draw = [], teachers.shapes.draw_captioned
    monkeypatch.setattr(teachers.shapes, "draw_captioned",
                        lambda prompt, *rest: drawn.append(prompt) or draw(prompt, *rest))
    monkeypatch.setattr(teachers, "describe_captions", lambda *_: {})
    teachers.main(["miniature", *SHORT[2:], str(tmp_path / "run"), "--batch", "30"])
    assert len(drawn) == 120 and len(set(drawn)) > 90
    assert not any(map(teachers.shapes.held_out, drawn))

    net = t2i.Miniature(t2i.MINI_NET, t2i.MINI_TEXT).net
    teachers.initialise(net.model)
    x = torch.randn(2, 3, 16, 16)
    y = net(x, torch.ones(2), torch.randn(2, 48, 64))
    assert torch.allclose(y, x * 0.25 / 1.25)  # EDM's c_skip: the network itself returns 0
    captions = SimpleNamespace(last_hidden_state=torch.zeros(2000, 48, 64))
    empty = net.model.y_embedder.y_embedding
    net.forward = lambda x, t, caption, mask: (caption == empty).all((1, 2))
    dropped = teachers.drop_captions(SimpleNamespace(net=net, text=lambda *_: captions),
                                     torch.zeros(2000, 1), 1.0, None, None)
    assert dropped.float().mean().item() == pytest.approx(0.1, abs=0.03)


# ---- speed and memory ----
def test_live_bytes():
    with machine.LiveBytes() as live:
        a = torch.zeros(1000)
        b = a.view(10, 100) + 1
        assert live.bytes == 8000
        del b
        c = a.double()
        assert live.bytes == live.peak == 12_000 and c.shape == a.shape


@pytest.mark.parametrize("stage, teacher", [("2", "fashion"), ("3", "miniature")])
def test_speed(stage, teacher, capsys):
    typed = f"speed {stage} --teacher {teacher} --batch 4 --steps 2 --device cpu"
    machine.main(typed.split())
    out = capsys.readouterr().out
    assert "theta update" in out and "of the peak" in out and "GFLOP an image" in out


def peak(*typed):
    args = machine.parse(t2i.stage_parser(), t2i.PRESETS, "miniature", typed)
    weights, between, most = machine.peak_memory(machine.stage_3, args)
    assert 1.9 * weights < between < most
    return most - between


@pytest.mark.slow
def test_checkpointing_saves_memory(monkeypatch):
    sizes = {"depth": 3, "hidden_size": 64, "num_heads": 2, "input_size": 32}
    monkeypatch.setattr(t2i, "MINI_NET", t2i.MINI_NET | sizes)
    typed = "--batch 4 --batch-gpu 4 --guidance 3 --steps 1".split()
    assert peak(*typed, "--checkpointing") < 0.6 * peak(*typed)
    assert type(t2i.noise_table()) is torch.Tensor  # no table without contents is kept


@pytest.mark.slow
def test_the_full_size_fits_into_40_gb():
    args = machine.parse(t2i.stage_parser(), t2i.PRESETS, "miniature",
                         "--teacher pixart --batch-gpu 8".split())
    assert machine.peak_memory(machine.stage_3, args)[2] * 2**30 < 40e9


@pytest.mark.parametrize("main, typed", [
    (teachers.main, "nothing"), (teachers.main, ""), (teachers.main, "fashion --batch 0"),
    (teachers.main, "judge"), (teachers.main, "judge --data x --amp bf16"),
    (teachers.main, "judge --data x --judge y"), (teachers.main, "miniature --data x"),
    (machine.main, "speed 4"), (machine.main, "fast 2"), (machine.main, "speed 2 --teacher own:f"),
    (machine.main, "memory 3 --teacher x")])
def test_mistakes(main, typed, refused):
    line = refused(main, typed.split())
    assert any(word in line for word in ("expected", "choose", "required", " for "))


def test_help(capsys):
    for main in (teachers.main, machine.main):
        try:
            main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert "python lab/" in capsys.readouterr().out
