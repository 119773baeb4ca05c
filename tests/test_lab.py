"""lab/shapes.py: drawn shapes and who reads them back. lab/studies.py: many runs and curves.
lab/mutants.py: its mutations fit the code."""
import importlib
import json
import shutil

import numpy as np
import pytest
import torch
from conftest import ROOT
from PIL import Image

from common import UserError, save

edm, t2i = importlib.import_module("02_edm_cifar"), importlib.import_module("03_pixart_t2i")
shapes, studies = importlib.import_module("lab.shapes"), importlib.import_module("lab.studies")
mutants = importlib.import_module("lab.mutants")


# ---- shapes ----
def test_captions_and_their_images():
    prompts, random = shapes.PROMPTS, np.random.default_rng(0)
    meta = torch.load(t2i.EMBEDDED, weights_only=True)["meta"]
    texts, tested = list(map(shapes.caption_of, prompts)), shapes.tested_prompts()
    assert len(set(texts)) == 1120 and max(map(len, texts)) < t2i.MINI_NET["caption_tokens"]
    assert texts[0] == "a small red circle on a green background" and meta["prompts"] == texts
    assert meta["tested"] == list(map(shapes.caption_of, tested))
    assert any(map(shapes.held_out, tested))
    assert np.mean([shapes.held_out(prompt) for prompt in prompts]) == pytest.approx(0.1, abs=0.02)
    images = torch.stack([shapes.draw_captioned(prompt, random) for prompt in prompts])
    assert images.shape == (1120, 3, 16, 16) and images.abs().max() <= 1
    right, wrong = [shapes.prompt_accuracy(images, v) for v in (prompts, prompts[::-1])]
    assert min(right.values()) >= 0.99 and wrong["mean"] < 0.3
    one_wrong = shapes.prompt_accuracy(images[:2], [prompts[0]] * 2)  # another background
    assert one_wrong["all"] == one_wrong["background"] == 0.5 and one_wrong["shape"] == 1
    pixels = (images - images[:, :, :1, :1]).abs().amax(1).gt(0.1).sum((1, 2)).float()
    small, large = pixels.chunk(2)
    assert small.mean() < 0.7 * large.mean()
    true = shapes.draw_tested(1002, 1)
    assert shapes.prompt_accuracy(true[1000:], tested[:2])["all"] == 1  # the prompts in turn
    teacher, _, meta = t2i.load_pipeline(t2i.EMBEDDED)
    features = t2i.token_features(teacher.net, true[::5])  # whose mean is in the teacher's file
    standard_error = (meta["sigma"].trace() / len(features)).sqrt()
    assert (features.mean(0) - meta["mu"]).norm() < standard_error


def make_run(folder, file, **meta):
    """A run's folder with an embedded teacher as its generator. -> the folder"""
    folder.mkdir()
    saved = torch.load(file, weights_only=True)
    save(saved | {"meta": meta}, folder / "g_ema.pt")
    save({}, folder / "args.json")
    return folder


@pytest.mark.slow
def test_prompt_accuracy_of_a_run(tmp_path):
    run = make_run(tmp_path / "run", t2i.EMBEDDED, teacher="miniature", guidance=3.0)
    shapes.main([str(run), "--n", "16", "--teacher-too", "--device", "cpu"])
    found = json.loads((run / "shapes.json").read_text())
    assert found["n"] == 16 and found["true images"]["all"] == 1
    teacher, one_step = found["teacher, 14 steps"], found["one step"]
    assert teacher["mean"] >= 0.9 and 0.3 < one_step["all"] <= teacher["all"]


# ---- studies ----
def test_every_command_of_a_study_is_one():
    """Each stage's own parser takes the words of each run; the other methods are neighbours'."""
    parsers = {"01_toy_2d.py": importlib.import_module("01_toy_2d").parse,
               "02_edm_cifar.py": edm.stage_parser().parse_args,
               "lab/neighbours.py": studies.neighbours.parse}
    for study in studies.STUDIES.values():
        for flags in [flags for panel in study.panels.values() for flags in panel.values()]:
            script, *words = studies.command_of(study, flags)
            args = parsers[script](words)
            assert (script == "lab/neighbours.py") == (
                args.method in studies.neighbours.NEIGHBOURS or args.teacher == "flow")


@pytest.mark.parametrize("name", studies.STUDIES)
def test_the_results_are_those_of_the_page(name, tmp_path, monkeypatch, capsys, refused):
    results = tmp_path / "assets" / "results"
    shutil.copytree(studies.RESULTS, results)
    monkeypatch.setattr(studies, "RESULTS", results)
    studies.main([name, "--draw"])
    page = (ROOT / "lab" / "RESULTS.md").read_text().splitlines()
    lines = [line for line in capsys.readouterr().out.splitlines() if line]
    assert len(lines) > 3 and [line for line in lines if line not in page] == []
    assert (results.parent / f"{name}.png").exists() != studies.STUDIES[name].samples
    rows = json.loads((results / f"{name}.json").read_text())
    assert {row["seed"] for row in rows} == {*studies.STUDIES[name].seeds}
    save([row for row in rows if row["flags"] != rows[1]["flags"]], results / f"{name}.json")
    assert f"has no run of ['{rows[1]['flags']}']" in refused(studies.main, [name, "--draw"])


STAGE = """import json, sys
from pathlib import Path
options = dict(zip(sys.argv[1::2], sys.argv[2::2]))
folder, seed = Path(options["--out"]), int(options["--seed"])
assert not (folder / "metrics.json").exists() and options.get("--lr") != "0"
folder.mkdir(parents=True)
json.dump({"steps": 4, "batch": 10, "segments": 2}, (folder / "args.json").open("w"))
lines = [json.dumps({"step": k, "images": 10 * k, "sw2": 0.5 + k + seed}) for k in range(5)]
(folder / "log.jsonl").write_text("\\n".join(lines) + '\\n{"st')
if "--lr" in options:
    sys.exit("error: step 3: y is nan; the last good checkpoint is step 2 in it. Try --fresh")
json.dump({"sw2": 1.5 + seed, "mode_shares": [0.1, 0.7, 0.2]}, (folder / "metrics.json").open("w"))
"""


@pytest.fixture
def study(tmp_path, monkeypatch):
    """A study of a stage that is done at once; and the figures that are drawn."""
    (tmp_path / "stage.py").write_text(STAGE)
    panels, figures = {"one": {"SIM": "", "fast": "--lr 9"}, "two": {"SIM again": ""}}, []
    study = studies.Study(f"{tmp_path}/stage.py", "sw2", "W2", panels)
    monkeypatch.setitem(studies.STUDIES, "tiny", study)
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "assets" / "results")
    monkeypatch.setattr(studies, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(studies.Figure, "savefig",
                        lambda figure, path: figures.append(figure) or path.write_bytes(b""))
    return study, figures


def test_a_study_runs_what_is_missing_and_reports_it(study, tmp_path, capsys, refused):
    (study, figures), results = study, tmp_path / "assets" / "results"
    for _ in range(2):  # the second time, nothing but the run that stopped is missing
        shutil.rmtree(studies.folder_of(study, "--lr 9", 0), ignore_errors=True)
        studies.run_study("tiny", [0], 2)
    rows = json.loads((results / "tiny.json").read_text())
    assert [row["flags"] for row in rows] == ["", "--lr 9"] and "is nan" in rows[1]["stopped"]
    assert rows[0]["curve"] == [[0, 0.5], [10, 1.5], [20, 2.5], [30, 3.5], [40, 4.5]]
    assert (rows[0]["poorest"], rows[0]["richest"], rows[0]["evaluations"]) == (0.1, 0.7, 2)
    save([*rows, rows[0] | {"seed": 1, "sw2": 2.5, "curve": [[0, 2.5], [10, 3.5]]}],
         results / "tiny.json")
    studies.report_study("tiny")
    out = capsys.readouterr().out
    assert "| SIM | 1.5 to 2.5 | 10.0% | 70.0% |" in out and "| fast | 1 stopped | 1 stopped" in out
    sim, axes = figures[0].axes[0].lines[0], figures[0].axes[0]
    assert sim.get_label() == "SIM" and len(figures[0].axes) == 2
    assert sim.get_ydata().tolist() == [1.5, 2.5, 2.5, 3.5, 4.5]  # a median as far as there are two
    assert axes.collections[0].get_datalim(axes.transData).ymin == 0.5
    study.seeds = range(3, 5)  # a study's own seeds, unless others are asked for
    studies.main(["tiny"])
    assert {row["seed"] for row in json.loads((results / "tiny.json").read_text())} == {3, 4}
    study.panels["one"]["fast"] = "--lr 0"
    assert "stopped: AssertionError" in refused(studies.main, ["tiny", "--seeds", "0"])


def test_the_two_numbers_of_figure_2(capsys, monkeypatch):
    monkeypatch.setattr(studies, "METHODS", {"A": "", "B": "--b", "C": "--c"})
    panels = {"slow": {"A": "a1", "B": "b1", "C": "c1"}, "fast": {"A": "a2", "B": "b2", "C": "c2"},
              "others": {"A": "", "D": "d"}}
    study = studies.Study("", "sw2", "W2", panels, goal=0.5)
    run = lambda last, *values: ({} if last is None else {"sw2": last}) | {
        "curve": [[10 * k, v] for k, v in enumerate(values)]}
    runs = {"a1": [run(0.2, 1, 0.6, 0.5), run(0.3, 1, 0.4)], "a2": [run(0.1, 1), run(0.2, 1)],
            "b1": [run(0.3, 0.9, 0.8)], "b2": [run(0.7, 0.1)],
            "c1": [run(None, 1)], "c2": [run(None, 1)]}
    studies.report_figure_2(study, runs)
    lines = capsys.readouterr().out.splitlines()[3:]
    assert lines == ["| A | 0.1 | fast | 10 to 20 |", "| B | 0.3 | slow | inf |",
                     "| C | inf |  | inf |"]


@pytest.mark.slow
def test_a_study_of_real_runs_draws_their_samples(tmp_path, monkeypatch):
    short = "--steps 3 --batch 64"
    panels = {"one": {"SIM": f"{short} --pretrain-steps 3", "iCT": f"{short} --method ct"}}
    monkeypatch.setitem(studies.STUDIES, "tiny", studies.Study(*studies.TOY, panels, samples=True))
    monkeypatch.setattr(studies, "RESULTS", tmp_path / "assets" / "results")
    monkeypatch.setattr(studies, "RUNS", tmp_path / "runs")
    studies.main(["tiny", "--seeds", "2", "2"])
    rows = json.loads((tmp_path / "assets" / "results" / "tiny.json").read_text())
    assert all(row["curve"][-1][0] == 3 * 64 and row["sw2"] > 0 for row in rows) and len(rows) == 2
    with Image.open(tmp_path / "assets" / "tiny.png") as picture:
        assert picture.size == (3 * 360, 386)


def test_plot_draws_the_logs_of_any_runs(study, tmp_path, capsys, refused):
    for name, sign in (("a", 1), ("b", -1)):
        (tmp_path / name).mkdir()
        lines = [{"images": 10 * k, "fd": 2.0 + k, "y": sign * k} for k in range(3)]
        text = "\n".join(map(json.dumps, [*lines, {"images": 30, "divergence": 7.0}]))
        (tmp_path / name / "log.jsonl").write_text(text + '\n{"images": 40, "fd"')
    runs, figures = [str(tmp_path / "a"), str(tmp_path / "b")], study[1]
    studies.main(["plot", *runs])
    assert (tmp_path / "a" / "curves.png").exists() and "curves.png" in capsys.readouterr().out
    studies.main(["plot", *runs, "--keys", "y,sw2", "--out", str(tmp_path / "y.png")])
    assert (tmp_path / "y.png").exists()
    titles = [[axes.get_title() for axes in figure.axes] for figure in figures]
    assert titles == [["divergence", "fd"], ["y"]]
    fd, y = figures[0].axes[1], figures[1].axes[0]
    assert (fd.get_yscale(), y.get_yscale()) == ("log", "linear")
    assert [line.get_label() for line in y.lines] == ["a", "b"]
    assert y.lines[1].get_xydata().tolist() == [[0, 0], [10, -1], [20, -2]]
    for argv, message in ((["plot"], "expects runs"), (["teachers", runs[0]], "expects none"),
                          (["plot", *runs, "--keys", "z"], "among divergence, fd, images, y"),
                          (["no-such"], "invalid choice"), (["plot", "none"], "log.jsonl")):
        assert message in refused(studies.main, argv), argv


# ---- mutations ----
def test_mutations_fit_the_code(refused):
    """Each changes one place, and leaves a program."""
    equivalent = {name: (file, change) for name, (file, change, _) in mutants.EQUIVALENT.items()}
    table = {name: (file, change) for name, (file, _, change) in mutants.TABLE.items()} | equivalent
    assert sum(map(len, mutants.MUTATIONS.values())) + len(equivalent) == len(table) > 60
    for name, (file, change) in table.items():
        source = mutants.mutate(name, file, change)
        assert source != (ROOT / file).read_text() and compile(source, file, "exec")
    with pytest.raises(UserError, match="occurs 0 times"):
        mutants.mutate("x", "common.py", "no such <<text => word>>")
    assert "no mutation 'x'" in refused(mutants.main, ["x"])
