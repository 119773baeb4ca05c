"""lab/lesson.ipynb and its solutions: what they look like, and what they compute (slow)."""
import ast
import base64
import contextlib
import io
import json
import re

import matplotlib
import pytest
import torch
from conftest import ROOT

LESSON, SOLUTIONS = [json.loads((ROOT / "lab" / f"{name}.ipynb").read_text())["cells"]
                     for name in ("lesson", "lesson_solutions")]
EXERCISES = [f"exercise-{number}" for number in range(1, 9)]
BOTH = pytest.mark.parametrize("cells", (LESSON, SOLUTIONS), ids=("lesson", "solutions"))


def source(cell):
    return "".join(cell["source"])


def code_of(cells):
    """-> {id: source} of the cells with code, in their order."""
    return {cell["id"]: source(cell) for cell in cells if cell["cell_type"] == "code"}


def shown(cell, kind):
    """What a cell has stored of one kind of output, such as "image/png". -> a list of strings"""
    found = [output.get("data", {}).get(kind) for output in cell["outputs"]]
    found += [output["text"] for output in cell["outputs"] if kind == output.get("name")]
    return ["".join(value) for value in found if value is not None]


# ---- The files ----
def test_only_the_exercises_differ():
    assert [cell["id"] for cell in LESSON] == [cell["id"] for cell in SOLUTIONS]
    for hole, solved in zip(LESSON, SOLUTIONS):
        assert hole["cell_type"] == solved["cell_type"]
        assert (source(hole) != source(solved)) == (hole["id"] in EXERCISES), hole["id"]
    assert [name for name in code_of(LESSON) if name.startswith("exercise")] == EXERCISES


@BOTH
def test_size(cells):
    """At most 200 lines of code without comments, and 50 more in the eight exercises."""
    code = code_of(cells)
    lines = {name: [line for line in text.splitlines()
                    if line.strip() and not line.strip().startswith("#")]
             for name, text in code.items()}
    assert sum(len(lines[name]) for name in lines if name not in EXERCISES) <= 200
    assert sum(len(lines[name]) for name in EXERCISES) <= 50 and len(code) <= 18
    assert max(len(line) for text in code.values() for line in text.splitlines()) <= 100


@BOTH
def test_nothing_of_the_project_is_imported(cells):
    for text in code_of(cells).values():
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.Import):
                assert {name.name for name in node.names} <= {"copy", "math", "torch"}
            if isinstance(node, ast.ImportFrom):
                assert node.module in ("torch", "matplotlib")
            assert not isinstance(node, ast.Name) or node.id not in ("__import__", "importlib")


@BOTH
def test_outputs_are_stored(cells):
    figures, answers = 0, []
    for cell in cells:
        if cell["cell_type"] == "code":
            assert cell["execution_count"], cell["id"]
            assert not any(output["output_type"] == "error" for output in cell["outputs"])
            assert not shown(cell, "stderr"), cell["id"]
            for picture in shown(cell, "image/png"):
                assert base64.b64decode(picture)[:6] in (b"\x89PNG\r\n", b"GIF89a")
                figures += 1
            answers += re.findall(r"Exercise \d: (solved|not solved yet)",
                                  "".join(shown(cell, "stdout")))
    assert figures == 6 and answers == [("not solved yet", "solved")[cells is SOLUTIONS]] * 8
    text = "\n".join(source(cell) for cell in cells if cell["cell_type"] == "markdown")
    assert sorted(set(re.findall(r"\*\*Figure (\d)", text))) == list("123456")  # the captions
    assert text.count("Hint</summary>") == 8 and text.count("rediction") >= 6


def test_files_are_small():
    for name in ("lesson", "lesson_solutions"):
        assert (ROOT / "lab" / f"{name}.ipynb").stat().st_size < 600_000


def test_places():
    """Part 7 names lines of the project's files, and what stands there."""
    text = source(LESSON[-1])
    rows = re.findall(r"\[`(.+?)`, line (\d+)\]\((.+?)#L(\d+)\) \| `(.+?)` \|", text)
    assert len(rows) == text.count("#L") >= 12
    for file, line, link, anchor, start in rows:
        lines = (ROOT / file).read_text().splitlines()
        found = [n for n, text in enumerate(lines, 1) if text.strip().startswith(start)]
        assert (ROOT / "lab" / link).resolve() == ROOT / file
        assert found == [int(line)] and line == anchor, (
            f"`{start}` of {file} is at {found}, and lesson.ipynb and lesson_solutions.ipynb say "
            f"{line}: correct the number and the link in both")


# ---- What the text claims without running it ----
def test_the_smallest_student():
    """The three gradients of part 5's table, for data N(0, s^2) and g(z) = sigma z."""
    axis = torch.linspace(-9, 9, 181, dtype=torch.float64)
    z, eps = torch.cartesian_prod(axis, axis).T
    weights = torch.softmax(-(z**2 + eps**2) / 2, 0)
    for sigma, s, t in ((0.5, 1.0, 1.0), (1.5, 1.0, 0.7)):
        a, b = sigma**2 / (sigma**2 + t**2), s**2 / (s**2 + t**2)
        theta = torch.tensor(sigma, dtype=torch.float64, requires_grad=True)
        x_0 = theta * z
        x_t = x_0 + t * eps
        f, q, unit = a * x_t, b * x_t, sigma * (1 - a)
        for loss, gradient in ((-2 * (f - q) * (f - x_0), 4 * unit * (a - b)),
                               (-2 * (f - q).detach() * (f - x_0), 2 * unit * (a - b)),
                               (-2 * (f - q.detach()) * (f - x_0), 2 * unit * (2 * a - b))):
            found, = torch.autograd.grad(weights @ loss, theta, retain_graph=True)
            assert found.item() == pytest.approx(gradient, rel=1e-9)


# ---- What the notebooks compute ----
def run(cells, folder):
    """All cells from top to bottom, without Jupyter. -> the names they define, what they print"""
    names, printed = {"__name__": "lesson"}, io.StringIO()
    matplotlib.use("Agg")
    with (contextlib.chdir(folder), contextlib.redirect_stdout(printed), torch.random.fork_rng(),
          matplotlib.rc_context()):
        for name, text in code_of(cells).items():
            exec(compile(text, name, "exec"), names)
    matplotlib.pyplot.close("all")
    return names, printed.getvalue()


@pytest.fixture(scope="module")
def lesson(tmp_path_factory):
    return run(LESSON, tmp_path_factory.mktemp("lesson"))


@pytest.fixture(scope="module")
def solutions(tmp_path_factory):
    return run(SOLUTIONS, tmp_path_factory.mktemp("solutions"))


@pytest.mark.slow
def test_holes_fail_their_checks_and_stop_nothing(lesson):
    names, printed = lesson
    assert names["solved"] == {number: False for number in range(1, 9)}
    assert len(re.findall(r"^Exercise \d: not solved yet: .+$", printed, re.M)) == 8


@pytest.mark.slow
def test_solutions_pass_their_checks(solutions):
    names, printed = solutions
    assert names["solved"] == {number: True for number in range(1, 9)}
    assert len(re.findall(r"^Exercise \d: solved$", printed, re.M)) == 8


@pytest.mark.slow
def test_wrong_answers_fail_their_checks(lesson):
    """Answers that look right: each fills the hole of a cell, which runs again."""
    names, _ = lesson
    detached = "d_psi.requires_grad_(False)\n    f = d_psi(x_t.detach(), t)"
    wrong = [(1, "(x_t - d(x_t, t)) / t**2"), (1, "(d(x_t, t) - x_t) / t"), (2, "x - t * d(x, t)"),
             (3, "torch.tanh(y).sum(1)"), (3, "y"), (4, "f = d_psi(x_t, t)"), (4, detached),
             (5, "v"), (5, "t**2"), (6, "s"), (6, "s / 2"), (7, "1 / (x_0 - q).abs().mean(1)"),
             (7, "1 / (x_0 - q).abs().sum(1).detach()"), (8, "means")]
    for number, answer in wrong:
        text = code_of(LESSON)[f"exercise-{number}"]
        hole = "with torch.no_grad():  # This is wrong.\n        f = d_psi(x_t, t)"
        hole = hole if number == 4 else "..."
        assert text.count(hole) == 1
        with contextlib.redirect_stdout(io.StringIO()):
            exec(text.replace(hole, answer), names)
        assert names["solved"][number] is False, (number, answer)
        names["start"].zero_grad()


@pytest.mark.slow
def test_theorem(solutions):
    errors = solutions[0]["errors"]
    assert errors.keys() == {"L2", "Pseudo-Huber"}
    for right, d_prime_detached, d_q_detached in errors.values():
        assert right < 1e-10 and d_prime_detached > 0.05 and d_q_detached > 0.05


@pytest.mark.slow
def test_training(solutions):
    """Part 4's claims: the divergence falls, the loss does not, and the samples are good."""
    names, _ = solutions
    (first_loss, first), (last_loss, last) = [names["smooth"][part].mean(0).tolist()
                                              for part in (slice(2, 10), slice(-8, None))]
    assert last < 0.6 * first and abs(first_loss - last_loss) < 0.02
    on_modes, least, most = [int(v) for v in re.findall(r"(\d+)%", names["describe"](
        names["looks"][-1]))]
    assert on_modes >= 80 and least >= 7 and most <= 20
