"""Files that act or weigh, links and pipes, two writers at once: what an attack once broke."""
import gc
import importlib
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from argparse import Namespace
from contextlib import suppress

import numpy as np
import pytest
import torch
from PIL import Image

from conftest import ROOT, TINY, save_judge, save_teacher
from test_runs import same, small_run

sys.path.insert(0, str(ROOT / "lab"))

import common
import eval_fid
import neighbours
import scores
from common import Run, UserError, atomic, load_saved, one_line_errors, save

toy, edm, t2i = [importlib.import_module(name) for name in ("01_toy_2d", "02_edm_cifar",
                                                            "03_pixart_t2i")]
FIXTURES = ROOT / "tests" / "fixtures"


def folder_with(source, target, file, **changes):
    """A copy of a fixture's folder whose file of JSON has other values. -> its path"""
    shutil.copytree(FIXTURES / source, target)
    path = target / file
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    return target


def clip_scores(folder):
    files = sorted((FIXTURES / "scored").glob("*.png"))
    return scores.embed(folder, files, ["a"] * len(files), "cpu")


def bitmap(path):
    """A picture of another format than its name says."""
    Image.new("RGB", (8, 8)).save(path, format="BMP")
    return path


# ---- A file acts ----
def test_code_of_a_text_model_is_neither_run_nor_asked_for(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    for source, read in (("t5", lambda folder: t2i.encode_prompts(folder, ["a"])),
                         ("clip", clip_scores)):
        names = ["AutoConfig", "AutoModel", "AutoTokenizer", "AutoProcessor", "AutoImageProcessor"]
        for number, file in enumerate(sorted(FIXTURES.glob(f"{source}/*config.json"))):
            folder = folder_with(source, tmp_path / f"{source}{number}", file.name,
                                 auto_map={name: "evil.Evil" for name in names})
            (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
            read(folder)
        for number, value in enumerate(({"attn_implementation": "who/what"},
                                        {"_attn_implementation": "who/what"},
                                        {"text_config": {"attn_implementation": "who/what"}})):
            folder = tmp_path / f"{source}-attn{number}"
            folder_with(source, folder, "config.json", **value)
            with pytest.raises(UserError, match="attn_implementation"):
                read(folder)
    assert not (tmp_path / "ran").exists() and "custom code" not in "".join(capfd.readouterr())


def test_a_picture_of_another_format_is_not_opened(tmp_path, monkeypatch):
    """PIL would start Ghostscript for a PostScript file that is named 0.png."""
    (tmp_path / "samples").mkdir()
    for k in range(3):
        bitmap(tmp_path / "samples" / f"{k}.png")
    with pytest.raises(UserError, match="cannot identify"):
        scores.embed(FIXTURES / "clip", sorted((tmp_path / "samples").iterdir()), ["a"] * 3, "cpu")
    with pytest.raises(UserError, match="cannot identify"):
        eval_fid.open_images(tmp_path / "samples")
    mixture = toy.make_mixture("ring")
    run = Namespace(folder=tmp_path, finish=lambda **figures: {"seconds": 1})
    with pytest.raises(OSError, match="cannot identify"):  # which main shows in one line
        toy.summarise(run, mixture, mixture.denoiser, lambda z: z, n=50, sets=2)
    shutil.rmtree(tmp_path / "samples")
    toy.summarise(run, mixture, mixture.denoiser, lambda z: z, n=50, sets=2)  # no animation then
    assert not (tmp_path / "animation.gif").exists()


def test_of_an_adam_only_the_moments_are_the_files(tmp_path):
    """A file with other settings changes nothing, and one whose moments do not fit is refused."""
    small_run(tmp_path / "whole")
    small_run(tmp_path / "run", steps=6)
    path = tmp_path / "run" / "ckpt.pt"
    honest = torch.load(path, weights_only=True)
    (tmp_path / "run" / "metrics.json").unlink()
    group = honest["opt"]["param_groups"][0]
    other = group | {"amsgrad": True, "betas": "x", "lr": [], "weight_decay": 1.0}
    save(honest | {"opt": honest["opt"] | {"param_groups": [other]}}, path)
    run = small_run(tmp_path / "run", save_every=1)
    assert run.opt.param_groups[0]["amsgrad"] is False
    for change in ({"exp_avg": torch.zeros(3)}, {"exp_avg_sq": torch.zeros(2, 2, 1)}, {"step": "x"},
                   {"step": torch.ones(2)}, {"exp_avg": "x"}, {"exp_avg": None}):
        state = honest["opt"]["state"]
        state = state | {0: {k: v for k, v in (state[0] | change).items() if v is not None}}
        save(honest | {"opt": honest["opt"] | {"state": state}}, path)
        with pytest.raises(UserError, match="ckpt.pt cannot be used"):
            small_run(tmp_path / "run")
    for change in ({"step": 7}, {"step": -1}, {"step": "x"}, {"seconds": "x"}):
        save(honest | change, path)
        with pytest.raises(UserError, match="ckpt.pt cannot be used"):
            small_run(tmp_path / "run")


# ---- Two writers, links, pipes, and what is lost ----
def test_two_writers_of_one_name(tmp_path):
    with atomic(tmp_path / "x.pt") as a, atomic(tmp_path / "x.pt") as b:
        assert a != b and a.suffix == b.suffix == ".pt"
        a.write_text("a" * 100)
        b.write_text("b")
    assert (tmp_path / "x.pt").read_text() == "a" * 100
    assert [path.name for path in tmp_path.iterdir()] == ["x.pt"]
    mask = os.umask(0)
    os.umask(mask)
    assert (tmp_path / "x.pt").stat().st_mode & 0o777 == 0o666 & ~mask


def test_no_link_is_followed_and_all_is_on_the_disk_before_the_rename(tmp_path, monkeypatch):
    (tmp_path / "thesis").write_text("text")
    done = []
    for module, name in ((os, "fsync"), (os, "replace")):
        call = getattr(module, name)
        monkeypatch.setattr(module, name, lambda *v, name=name, call=call: (
            done.append(name), call(*v)))
    save([1], tmp_path / "a.json")
    assert done == ["fsync", "replace"]
    monkeypatch.setattr(os, "urandom", lambda n: b"\0")
    (tmp_path / ".tmp-00-a.json").symlink_to(tmp_path / "thesis")
    with pytest.raises(UserError, match="a.json could not be written"):
        save([2], tmp_path / "a.json")
    assert (tmp_path / "thesis").read_text() == "text"
    assert (tmp_path / ".tmp-00-a.json").is_symlink()


@pytest.mark.parametrize("name", [".lock", "samples", "args.json", "ckpt.pt", "log.jsonl", "pipe"])
def test_links_and_pipes_in_a_run_are_refused(name, tmp_path):
    small_run(tmp_path / "run", steps=2)
    (tmp_path / "thesis").write_text("text")
    path = tmp_path / "run" / name
    path.unlink(missing_ok=True)
    os.mkfifo(path) if name in ("log.jsonl", "pipe") else path.symlink_to(tmp_path / "thesis")
    with pytest.raises(UserError, match=f"{name} is a link or no file"):
        small_run(tmp_path / "run", steps=2)
    assert (tmp_path / "thesis").read_text() == "text"


def test_what_a_kill_has_left_is_removed(tmp_path):
    small_run(tmp_path / "run", steps=2)
    left = tmp_path / "run" / ".tmp-5-ckpt.pt"
    left.write_text("half")
    with pytest.raises(UserError):
        small_run(tmp_path / "run", steps=3)
    assert left.exists()  # another run: nothing is touched
    small_run(tmp_path / "run", steps=2)
    assert not left.exists()


def test_a_run_without_its_log_does_not_go_on(tmp_path):
    small_run(tmp_path / "run")
    (tmp_path / "run" / "log.jsonl").unlink()
    (tmp_path / "run" / "metrics.json").unlink()
    with pytest.raises(UserError, match="log.jsonl cannot be used .*No such file.*--fresh"):
        small_run(tmp_path / "run")
    for text in ('{"a": 1}', "[" * 50_000, "5", '{"step": null}'):
        small_run(tmp_path / "run", fresh=True)
        (tmp_path / "run" / "log.jsonl").write_text(text + "\n")
        with pytest.raises(UserError, match="log.jsonl cannot be used"):
            small_run(tmp_path / "run")


def test_a_pipe_in_the_place_of_a_checkpoint(tmp_path):
    os.mkfifo(tmp_path / "x.pt")
    load_judge = lambda path: edm.load_judge(path, (1, 8, 8))
    for read in (edm.load_denoiser, t2i.load_pipeline, load_judge):
        with pytest.raises(UserError, match="x.pt cannot be used .there is no such file"):
            read(tmp_path / "x.pt")


def test_results_of_evaluations_at_once_are_all_kept(tmp_path):
    """Four processes add five results each, and then write each of them a second time."""
    out, children = tmp_path / "fid.json", []
    for child in range(4):
        children.append(os.fork())
        if children[-1] == 0:
            with suppress(Exception):
                before = None
                for k in range(10):
                    result = {"child": child, "n": k // 2, "again": k % 2}
                    eval_fid.add_result(out, result, before)
                    before = None if k % 2 else result
                os._exit(0)
            os._exit(1)
    assert all(os.waitpid(child, 0)[1] == 0 for child in children)
    results = json.loads(out.read_text())
    assert sorted((r["child"], r["n"]) for r in results) == [(i, k) for i in range(4)
                                                             for k in range(5)]
    assert all(r["again"] for r in results)


# ---- Files that weigh ----
def deflated(source, target):
    with zipfile.ZipFile(source) as old, \
            zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as new:
        for item in old.infolist():
            new.writestr(item.filename, old.read(item))
    return target


def expanded(path, **tensors):
    """A .pth of PixArt in which each of these tensors repeats one number."""
    saved = torch.load(FIXTURES / "pixart" / "original-plain-release.pth", weights_only=True)
    for name, shape in tensors.items():
        saved["state_dict"][name] = torch.ones(1).expand(shape)
    torch.save(saved, path)
    return path


def generator(path, net_args, **change):
    saved = {"net_args": net_args, "state_dict": {"w": torch.ones(3)}, "t_star": 1.0, "meta": {}}
    save(saved | change, path)
    return path


def pictures(folder, side):
    folder.mkdir()
    Image.new("RGB", (side, side)).save(folder / "0.png")
    return folder


def declared(path):
    """An .npz that says that a compressed array of 1 MB has 2 GB, and then might have as many."""
    np.savez_compressed(path, np.zeros(10**6, np.uint8))
    size = zipfile.ZipFile(path).infolist()[0].file_size
    data = path.read_bytes()
    path.write_bytes(data.replace(size.to_bytes(4, "little"), (2**31 - 1).to_bytes(4, "little")))
    return path


def t5(folder, file, **changes):
    return lambda: t2i.encode_prompts(folder_with("t5", folder, file, **changes), ["a"])


def clip(folder, file="config.json", **changes):
    return lambda: clip_scores(folder_with("clip", folder, file, **changes))


def heavy(tmp):
    """-> {name: (what is read, the words of the line)}"""
    zeros = {"w": torch.zeros(10**7, dtype=torch.uint8)}
    torch.save({"net_args": {}, "state_dict": zeros, "t_star": 1.0, "meta": {}}, tmp / "z.pt")
    deflated(tmp / "z.pt", tmp / "deflated.pt")
    typed = lambda path: Namespace(sample=str(path), n=3, seed=0, out=str(tmp / "x.npz"))
    flow = {"state_dict": neighbours.make_denoiser(False).state_dict(), "meta": {"segments": 10**7}}
    pth = lambda name, **tensors: lambda: t2i.load_pixart(expanded(tmp / name, **tensors))
    return {
        "deflated.pt": (lambda: edm.load_denoiser(tmp / "deflated.pt"), "compressed"),
        "deflated.npz": (lambda: eval_fid.open_images(declared(tmp / "x.npz")), "compressed"),
        "pos_embed": (pth("a.pth", pos_embed=(1, 4 * 10**8, 1)), "repeat"),
        "weights": (pth("b.pth", more=(10**5, 10**5)), "repeat"),
        "depth": (lambda: toy.sample(typed(generator(tmp / "d.pt", {"depth": 10**9}))), "depth"),
        "segments": (lambda: neighbours.sample(typed(generator(tmp / "s.pt", {"flow": False},
                                                               **flow))), "10000000 segments"),
        "T5's d_ff": (t5(tmp / "t5a", "config.json", d_ff=10**8), "too small"),
        "T5's extra_ids": (t5(tmp / "t5b", "tokenizer_config.json", extra_ids=2**63), "extra_ids"),
        "CLIP's sizes": (clip(tmp / "c1", text_config={"intermediate_size": 10**8}), "too small"),
        "CLIP's layers": (clip(tmp / "c2", vision_config={"num_hidden_layers": 10**4}), "layers"),
        "CLIP's images": (clip(tmp / "c3", "preprocessor_config.json", size=20_000,
                               crop_size=20_000), "size"),
        "a picture": (lambda: eval_fid.open_images(pictures(tmp / "p", 4200)), "its size"),
        "a score's picture": (lambda: scores.embed(
            FIXTURES / "clip", sorted(pictures(tmp / "q", 4200).iterdir()), ["a"], "cpu"), "4200")}


def test_files_that_declare_more_than_they_hold(tmp_path):
    """Each of them is refused in seconds, and in 500 MB."""
    from test_edm import peak_mib
    cases = heavy(tmp_path)
    clip_scores(FIXTURES / "clip")  # imports what it needs
    for name, (read, words) in cases.items():
        gc.collect()
        begun, before = time.time(), peak_mib(reset=True)
        with pytest.raises(UserError, match=words):
            read()
        assert time.time() - begun < 10 and peak_mib() - before < 500, name
        print(name, time.time() - begun, peak_mib() - before)


def test_pictures_are_read_in_batches_of_256_mb(monkeypatch):
    seen = []
    images = eval_fid.Images("x", lambda k: seen.append(len(k)) or torch.zeros(len(k), 3, 2, 2), (
        3, 4096, 4096), 20, None)
    detect = lambda x: (x.flatten(1), torch.full((len(x), 2), 0.5))
    eval_fid.one_pass(images, range(20), detect, 250, "cpu")
    assert max(seen) == 2**28 // (3 * 2**24) and sum(seen) == 20


# ---- Commands ----
def test_noise_levels_that_are_never_in_the_range():
    with pytest.raises(UserError, match="hardly a noise level"):
        common.p_edm((8, 1), 1000.0, 1.0, 0.01, 150.0, "resample")
    t = common.p_edm((100, 1), 0.0, 1.0, 2.0, 2.1, "resample")  # one in sixty
    assert ((t >= 2) & (t <= 2.1)).all()


@pytest.mark.parametrize("words, text", [
    (["--prompt", "a" * 10_001], "at most 10,000 bytes"), (["--prompt", "\udcff"], "surrogates"),
    (["--n", "1000000000", "--prompt", "a"], "below 10^9"), (["--batch", f"{2**63 - 1}"], "below")])
def test_prompts_and_numbers(words, text, tmp_path, refused):
    out = ["--out", tmp_path / "x.png", "--device", "cpu"]
    assert text in refused(t2i.main, ["--sample", t2i.EMBEDDED, *words, *out])


@pytest.mark.parametrize("meta", [
    {"teacher": 5}, {"t5": 5}, {"guidance": "x"}, {"prompts": 5}, {"tested": "x"}, {"mu": 5},
    {"fd_real": "x"}, {"judged": [1.0]}, {"judged": {"fd_teacher": "x"}}])
def test_meta_of_wrong_types(meta, tmp_path):
    net = torch.nn.Linear(2, 2)
    save({"net_args": {}, "state_dict": net.state_dict(), "t_star": 1.0, "meta": meta},
         tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt cannot be used"):
        common.load_generator(tmp_path / "x.pt", lambda: torch.nn.Linear(2, 2))


@pytest.mark.parametrize("net_args", [{"dropout": "x"}, {"dropout": 2}, {"label_dropout": None},
                                      {"label_dim": None}, {"label_dim": -1}, {"label_dim": 1.0}])
def test_networks_of_wrong_types(net_args, tmp_path):
    save_teacher(tmp_path / "x.pt", TINY)
    saved = torch.load(tmp_path / "x.pt", weights_only=True)
    save(saved | {"net_args": saved["net_args"] | net_args}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="x.pt cannot be used"):
        edm.load_denoiser(tmp_path / "x.pt")


def test_files_of_wrong_types(tmp_path):
    (tmp_path / "byte.pt").write_bytes(b"\x80")
    for text in ("null", "5", "[" * 50_000):
        shutil.copytree(FIXTURES / "pixart" / "vae", tmp_path / "vae", dirs_exist_ok=True)
        (tmp_path / "vae" / "config.json").write_text(text)
        with pytest.raises(UserError, match="config.json cannot be used"):
            t2i.load_vae_decoder(tmp_path)
    with zipfile.ZipFile(tmp_path / "text.npz", "w") as file:
        file.writestr("readme.txt", "text")
    with pytest.raises(UserError, match="expected one array"):
        eval_fid.open_images(tmp_path / "text.npz")
    for value in ("x", []):
        folder = folder_with("t5", tmp_path / f"t5{value}", "tokenizer_config.json",
                             model_max_length=value)
        with pytest.raises(UserError, match="expected a T5"):
            t2i.encode_prompts(folder, ["a"])
    folder = folder_with("clip", tmp_path / "clip", "preprocessor_config.json", image_mean="x")
    with pytest.raises(UserError, match="expected a CLIP"):
        clip_scores(folder)
    with pytest.raises(UserError, match="byte.pt"):
        edm.load_denoiser(tmp_path / "byte.pt")
    judge = torch.load(save_judge(tmp_path / "judge.pt", (3, 8, 8)), weights_only=True)
    judge["meta"]["floor"]["class_accuracy_floor"] = "x"  # which is read only after the training
    save(judge, tmp_path / "judge.pt")
    with pytest.raises(UserError, match="judge.pt"):
        edm.load_judge(tmp_path / "judge.pt", (3, 8, 8))


def test_a_name_that_the_terminal_cannot_show(refused):
    def main(argv):
        print("größer", file=io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert "'ascii' codec can't encode" in refused(one_line_errors(main), [])


@pytest.mark.parametrize("out", ["loop", "loop/x.png"])
def test_out_is_a_link_to_itself(out, tmp_path, refused):
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    refused(edm.main, ["--sample", edm.FASHION, "--n", "1", "--out", tmp_path / out])


def test_flags_may_stand_between_source_and_reference():
    args = eval_fid.parse(["a", "--features", "judge", "b"])
    assert (args.source, args.reference, args.features) == ("a", "b", "judge")


# ---- Sums ----
@pytest.mark.parametrize("kind", ["ckpt.pt", "g_ema.pt"])
def test_a_flipped_bit_is_noticed(kind, tmp_path):
    """In the numbers, always; elsewhere it is noticed, or it changes nothing."""
    small_run(tmp_path / "run", steps=2)
    path, draw = tmp_path / "run" / kind, random.Random(0)
    honest = path.read_bytes()
    content = lambda: json.dumps(load_saved(path), default=torch.Tensor.tolist)
    before, noticed = content(), 0
    for _ in range(150):
        data = bytearray(honest)
        data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
        path.write_bytes(data)
        after = None
        with suppress(Exception):
            after = content()
        assert after in (None, before)
        noticed += after is None
    assert noticed > 20
    with zipfile.ZipFile(io.BytesIO(honest)) as file:  # all that torch stores has a sum
        assert all(item.CRC for item in file.infolist() if item.file_size > 8)


# ---- Signals and clocks ----
@pytest.mark.parametrize("step", [3, 6])
def test_a_signal_in_any_update_stops_the_run(step, tmp_path, monkeypatch, capsys):
    """In the last one, too: the pictures at the end may take long."""
    small_run(tmp_path / "whole")
    write = Run.write
    monkeypatch.setattr(Run, "write", lambda run, **values: (
        write(run, **values), run.step == step and os.kill(os.getpid(), signal.SIGINT),
        run.step == step and kinds.append(signal.getsignal(signal.SIGTERM))))
    kinds = []
    with pytest.raises(SystemExit) as stop:
        one_line_errors(lambda argv: small_run(tmp_path / "run"))()
    assert stop.value.code == 130 and f"step {step} is saved in" in capsys.readouterr().err
    assert not (tmp_path / "run" / "metrics.json").exists()
    assert kinds == [signal.SIG_DFL]  # a second signal, of the other kind, kills
    monkeypatch.setattr(Run, "write", write)
    small_run(tmp_path / "run")
    same(tmp_path / "run", tmp_path / "whole")


def test_a_jump_of_the_clock(tmp_path, monkeypatch):
    jump = iter(range(10**9, 0, -10**6))
    monkeypatch.setattr(time, "time", lambda: float(next(jump)))
    run = small_run(tmp_path / "run")
    assert all(0 <= line["seconds"] < 1000 and line["eta"] >= 0 for line in run.lines())


@pytest.mark.slow
def test_under_torchrun_a_mistake_is_said_once_and_nobody_waits(tmp_path):
    """Of both ranks, and of the first one alone: a folder in use is seen by no other rank."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    typed = [str(ROOT / "01_toy_2d.py"), "--part", "distil", "--device", "cpu", "--out"]
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis").write_text("text")
    cases = {"multiple of 2": ["run", "--batch", "63"], "no run's folder": ["other"]}
    for text, words in cases.items():
        done = subprocess.run([*torchrun, *typed, *words], cwd=tmp_path, capture_output=True,
                              text=True, timeout=120)
        lines = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
        assert done.returncode and len(lines) == 1 and text in lines[0], done.stderr
        assert "exitcode  : 2" in done.stderr
