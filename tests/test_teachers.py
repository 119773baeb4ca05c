"""lab/teachers.py: both trainings, resumed. lab/machine.py: live bytes, and the tables."""
import importlib
from types import SimpleNamespace

import pytest
import torch
from conftest import TINY, edm, vector

t2i = importlib.import_module("03_pixart_t2i")
teachers, machine = [importlib.import_module(f"lab.{name}") for name in ("teachers", "machine")]
SHORT = "--batch 4 --steps 4 --save-every 1 --log-every 1 --device cpu --out".split()


@pytest.fixture
def small(monkeypatch):
    """Small networks, and few images to measure them by."""
    monkeypatch.setattr(teachers, "SHAPES_NET", TINY | {"img_resolution": 16, "label_dim": 10})
    monkeypatch.setattr(t2i, "MINI_NET", t2i.MINI_NET | {"hidden_size": 32, "depth": 1,
                                                         "num_heads": 2})
    monkeypatch.setattr(edm, "FD_IMAGES", 40)
    monkeypatch.setattr(edm, "sample_teacher", lambda net, z, labels: z)
    monkeypatch.setattr(teachers, "TRUE", 50)
    monkeypatch.setattr(teachers.shapes, "TESTED", 40)


# ---- teachers ----
@pytest.mark.parametrize("name, facts", [
    ("shapes", {"data", "mu", "sigma", "fd_teacher", "fd_real"}),
    ("miniature", {"data", "mu", "sigma", "fd_real", "prompts", "tested"})])
def test_a_training_resumes(name, facts, small, tmp_path, monkeypatch, capsys):
    """Stopped in the third update and continued: the same file, which its stage can use."""
    rates, update = [], teachers.update

    def dies(optimiser, lr):
        update(optimiser, lr)
        if len(rates) == 2:
            raise KeyboardInterrupt
        rates.append(lr)

    teachers.main([name, *SHORT, str(tmp_path / "whole")])
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(teachers, "update", dies)
        teachers.main([name, *SHORT, str(tmp_path / "killed")])
    assert stop.value.code == 130 and not (tmp_path / "killed" / "teacher.pt").exists()
    lr = teachers.RECIPES[name]["lr"]  # which rises to 1/200 and 2/200 of itself, and anneals
    assert rates == pytest.approx([lr / 200, 0.75 * lr * 2 / 200])
    teachers.main([name, *SHORT, str(tmp_path / "killed")])
    assert "goes on from step 2" in capsys.readouterr().out
    whole, killed = [torch.load(tmp_path / folder / "teacher.pt", weights_only=True)
                     for folder in ("whole", "killed")]
    assert all(map(torch.equal, whole["state_dict"].values(), killed["state_dict"].values()))
    assert {w.dtype for w in whole["state_dict"].values()} == {torch.float16}
    assert whole["meta"].keys() == facts | {"steps", "batch", "seed"} and whole["t_star"] == 2.5
    moved = torch.load(tmp_path / "whole" / "ckpt.pt", weights_only=True)
    assert not torch.equal(vector(moved["net"].values()), vector(moved["ema"].values()))
    file = str(tmp_path / "whole" / "teacher.pt")
    if name == "shapes":
        assert edm.load_teacher(file)[0].label_dim == 10
    else:
        pipeline, meta, _ = t2i.load_teacher(file)
        assert len(meta["prompts"]) == 1120 and len(meta["tested"]) == 40
        assert pipeline.encode(["a"])[0].shape == (2, 64)


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


@pytest.mark.parametrize("stage, teacher", [("2", "shapes"), ("3", "miniature")])
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
    (teachers.main, "nothing"), (teachers.main, ""), (teachers.main, "shapes --batch 0"),
    (machine.main, "speed 4"), (machine.main, "fast 2"), (machine.main, "speed 2 --teacher own:f"),
    (machine.main, "memory 3 --teacher x")])
def test_mistakes(main, typed, refused):
    assert any(word in refused(main, typed.split()) for word in ("expected", "choose", "required"))


def test_help(capsys):
    for main in (teachers.main, machine.main):
        try:
            main(["--help"])
        except SystemExit as stop:
            assert stop.code == 0
        assert "python lab/" in capsys.readouterr().out
