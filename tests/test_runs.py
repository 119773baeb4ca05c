"""The second half of common.py: files that survive a crash, logs, pictures."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common import (
    Log,
    UserError,
    atomic,
    image_grid,
    load,
    load_state,
    save,
    save_picture,
    save_state,
    seed_step,
)

ROOT = Path(__file__).parent.parent


def test_save_and_load(tmp_path):
    value = {"a": torch.arange(3), "b": {"c": 1.5, "d": "text"}}
    save(value, tmp_path / "x.pt")
    torch.testing.assert_close(load(tmp_path / "x.pt", ("a", "b"))["a"], value["a"])
    with pytest.raises(UserError, match="holds something else"):
        load(tmp_path / "x.pt", ("a", "z"))


def test_a_crash_during_a_save_leaves_the_old_file(tmp_path):
    path = tmp_path / "ckpt.pt"
    save({"step": 1}, path)
    old = path.read_bytes()
    with pytest.raises(AttributeError):  # a local function cannot be pickled: the save breaks in the middle
        save({"big": torch.zeros(100_000), "bad": lambda: 0}, path)
    with pytest.raises(ZeroDivisionError), atomic(path) as temporary:
        temporary.write_text("half")
        1 / 0  # noqa: B018
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_ends_in_one_line_and_leaves_the_old_file(tmp_path):
    code = (
        "import resource, signal, torch; from common import *\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))\n"
        "one_line_errors(lambda argv: save({'w': torch.zeros(100_000)}, 'ckpt.pt'))()"
    )
    (tmp_path / "ckpt.pt").write_text("old")
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(ROOT)},
        text=True,
        capture_output=True,
    )
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and "ckpt.pt" in done.stderr
    assert (tmp_path / "ckpt.pt").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_state_brings_back_networks_and_optimisers(tmp_path):
    def parts():
        net = torch.nn.Linear(3, 3)
        return {"net": net, "opt": torch.optim.Adam(net.parameters())}

    def step(net, opt):
        opt.zero_grad()
        net(torch.randn(4, 3, generator=seed_step(1, 2))).square().sum().backward()
        opt.step()

    first, second = parts(), parts()
    step(**first)
    save_state(tmp_path / "s.pt", **first)
    step(**first)
    load_state(tmp_path / "s.pt", **second)
    step(**second)
    torch.testing.assert_close(first["net"].weight, second["net"].weight, rtol=0, atol=0)
    with pytest.raises(UserError, match="not of this run"):
        load_state(tmp_path / "s.pt", net=torch.nn.Linear(2, 2), opt=second["opt"])


def test_loading_executes_nothing(tmp_path):
    class Evil:
        def __reduce__(self):
            return (exec, (f"open({str(tmp_path / 'ran')!r}, 'w')",))

    torch.save({"rng": Evil()}, tmp_path / "evil.pt")
    with pytest.raises(UserError):
        load(tmp_path / "evil.pt", ("rng",))
    assert not (tmp_path / "ran").exists()


def test_log_means_and_resume(tmp_path, capsys):
    log = Log(tmp_path / "log.jsonl", 4)
    states = []
    for step in range(4):
        log.add(loss=torch.tensor([step, step + 1.0]))
        log.advance()
        states.append(json.loads(json.dumps(log.state_dict())))
        if step % 2:
            log.write(extra=step)
    assert [(line["step"], line["loss"], line["extra"]) for line in log.read()] == [(2, 1.0, 1), (4, 3.0, 3)]
    assert "step 2/4" in capsys.readouterr().out
    with (tmp_path / "log.jsonl").open("a") as file:
        file.write('{"step": 5, "lo')  # what a kill may leave
    again = Log(tmp_path / "log.jsonl", 4)
    again.load_state_dict(states[2])
    assert again.step == 3 and [line["step"] for line in again.read()] == [2]
    again.add(loss=torch.tensor([3.0, 4.0]))
    again.advance()
    again.write(extra=3)
    assert again.read()[-1]["loss"] == 3.0
    with pytest.raises(UserError, match="step 5: loss is nan; the last good checkpoint is step 3"):
        again.add(loss=torch.tensor([1.0, float("nan")]))


def test_pictures(tmp_path):
    images = torch.arange(3, dtype=torch.uint8).reshape(3, 1, 1, 1).expand(3, 3, 4, 5) + 100
    grid = np.array(image_grid(images, columns=2))
    assert grid.shape == (8, 10, 3)
    assert (grid[:4, :5] == 100).all() and (grid[:4, 5:] == 101).all() and (grid[4:, :5] == 102).all()
    assert (grid[4:, 5:] == 0).all()
    save_picture(
        image_grid(images[:1]), tmp_path / "a.gif", [image_grid(images[1:2]), image_grid(images[2:])]
    )
    with Image.open(tmp_path / "a.gif") as gif:
        assert gif.n_frames == 3 and gif.info["loop"] == 0
