"""What README.md and lab/*.md say is true: commands, options, names, links, tables of studies."""
import argparse
import contextlib
import importlib
import inspect
import json
import re
import shlex
import textwrap
from pathlib import Path

import common

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path: path.read_text() for path in (ROOT / "README.md", *sorted(ROOT.glob("lab/*.md")))}
STAGES = [importlib.import_module(path.stem) for path in sorted(ROOT.glob("0?_*.py"))]
SCRIPTS = ["01_toy_2d", "02_edm_cifar", "03_pixart_t2i", "eval_fid",
           *sorted(f"lab.{path.stem}" for path in ROOT.glob("lab/*.py")
                   if "\ndef main(" in path.read_text())]


class Parsed(Exception):
    """The command line was accepted."""


def accept(monkeypatch, script, words):
    """What the script does with its command line, and nothing else. SystemExit if it refuses."""
    module = importlib.import_module(script)
    if hasattr(module, "parse") and len(inspect.signature(module.parse).parameters) == 1:
        return module.parse(words)
    if hasattr(module, "stage_parser"):
        return module.stage_parser().parse_args(words)
    parse = argparse.ArgumentParser.parse_args

    def parse_and_stop(*args, **options):
        parse(*args, **options)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_and_stop)
    with pytest.raises(Parsed):
        module.main(words)


def commands_in(text):
    """The commands of this project in blocks of bash, in `code` and in docstrings, one string each.
    A capital letter stands for a number, and RUN... for one run or more."""
    lines = [line for block in re.findall(r"```bash\n(.*?)```", text, re.S)
             for whole in block.splitlines() for line in whole.split("&&")]
    lines += re.findall(r"`((?:python|torchrun) [^`]*)`", text.replace("```", ""))
    lines += re.findall(r"^    ((?:python|torchrun) .*?)(?:\s{2,}.*)?$", text, re.M)
    found = [re.sub(r"\b[A-Z]\b", "1", " ".join(line.split("#")[0].split())) for line in lines]
    return [line.replace("RUN...", "RUN") for line in found
            if re.match(r"(python|torchrun) .*\.py\b", line)]


def docstring(script):
    return inspect.getdoc(importlib.import_module(script))


COMMANDS = sorted({command for text in PAGES.values() for command in commands_in(text)})
DOCUMENTED = sorted({command for script in SCRIPTS for command in commands_in(docstring(script))})


def test_there_are_commands():
    assert len(COMMANDS) > 50 and "python 02_edm_cifar.py --distance phuber" in COMMANDS
    assert {command.split()[1] for command in COMMANDS if command.startswith("python")} == {
        f"{script.replace('.', '/')}.py" for script in SCRIPTS}


@pytest.mark.parametrize("command", sorted({*COMMANDS, *DOCUMENTED}))
def test_commands_are_accepted(command, monkeypatch):
    words = shlex.split(command)
    place = next(i for i, word in enumerate(words) if word.endswith(".py"))
    script = words[place].removesuffix(".py").replace("/", ".")
    assert script in SCRIPTS
    accept(monkeypatch, script, words[place + 1:])


def help_of(script, capsys):
    with contextlib.suppress(SystemExit):
        importlib.import_module(script).main(["--help"])
    return capsys.readouterr().out


def test_every_option_that_is_named_exists(capsys):
    helps = {script: help_of(script, capsys) for script in SCRIPTS}
    for script, text in helps.items():
        assert docstring(script).splitlines()[0] in text
    others = {"--standalone", "--nproc_per_node", "--nnodes", "--rdzv-endpoint"}  # torchrun's
    known = set(re.findall(r"--[a-z][\w-]*", "\n".join(helps.values()))) | others
    for path, text in PAGES.items():
        code = " ".join(re.findall(r"`([^`\n]+)`", text.replace("```", "")))
        assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", code)) - known == set(), path


# ---- The map ----
def test_equations_stand_where_the_table_says():
    rows = re.findall(r"^\| (\([^|]*) \| [^|]* \| `(\w+)` \|$", README, re.M)
    assert len(rows) >= 11
    for equations, name in rows:
        home = next(module for module in (common, *STAGES) if hasattr(module, name))
        value = getattr(home, name)
        source = inspect.getsource(value if callable(value) else home)
        for equation in re.findall(r"\([\dA-Z]+\.\d+\)|Table \d", equations):
            assert equation in source, f"{name} does not mention {equation}"


def test_every_question_has_a_place():
    table = README.split("| question | place |")[1].split("\n\n")[0]
    rows = re.findall(r"^\| ([^|]*\?) \| (.*) \|$", table, re.M)
    assert len(rows) == 15
    for question, place in rows:
        names = re.findall(r"`((?:common\.)?[A-Za-z_][\w.]*)`", place)
        assert names, question
        for name in names:
            assert is_defined(name, "each stage" in place and name == names[0]), (question, name)


def is_defined(name, in_each_stage=False):
    """Does a name, such as common.Run.save or train, stand where the table of questions says?"""
    if name.startswith("common."):
        value = common
        for part in name.split(".")[1:]:
            value = getattr(value, part)
        return True
    pattern = rf"\b(def|class) {name}\b|^{name} = |{re.escape(name)}\(\)"
    found = [re.search(pattern, inspect.getsource(stage), re.M) for stage in STAGES]
    return all(found) if in_each_stage else any(found)


def test_algorithm_2_reads_the_same_in_every_stage():
    block = re.compile(r"( *# -+ Algorithm 2: begin -+\n.*?# -+ Algorithm 2: end -+)", re.S)
    found = [block.findall(Path(stage.__file__).read_text()) for stage in STAGES]
    assert [len(blocks) for blocks in found] == [1, 1, 1]
    assert len({textwrap.dedent(blocks[0]) for blocks in found}) == 1


# ---- The page ----
def test_the_readme_is_short():
    assert len(README.splitlines()) <= 300 and len(README.split()) <= 3500


def test_two_commands():
    """Those that a newcomer types, and that .ci/run executes."""
    text = README.split("<!-- two commands -->")[1].split("<!-- end -->")[0]
    commands = [line for line in text.splitlines() if line.startswith("python3 -m venv ")]
    assert [shlex.split(line)[-1] for line in commands] == ["01_toy_2d.py", "pytest"]


def anchors(text):
    """What GitHub makes of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", re.sub(r"```.*?```", "", text, flags=re.S), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda path: path.name)
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)\s]*)\)", re.sub(r"```.*?```", "", PAGES[page], flags=re.S))
    assert links
    for link in links:
        if link.startswith("https://"):
            continue
        place, _, anchor = link.partition("#")
        path = (page.parent / place).resolve() if place else page
        assert path.exists(), link
        assert not anchor or anchor in anchors(path.read_text()), link


# ---- Numbers ----
def test_every_study_has_results():
    names = {path.stem for path in ROOT.glob("assets/results/*.json")}
    assert names == set(importlib.import_module("lab.studies").STUDIES)


def test_the_ring_of_the_readme():
    rows = json.loads((ROOT / "assets" / "results" / "t-star.json").read_text())
    sim = sorted((row for row in rows if row["flags"] == ""), key=lambda row: row["seed"])
    shares = ", ".join(f"{100 * row['share_on_modes']:.1f}" for row in sim)
    poorest, richest = min(row["poorest"] for row in sim), max(row["richest"] for row in sim)
    distances = ", ".join(f"{row['sw2']:.4f}" for row in sim)
    assert (f"| {shares} % | {100 * poorest:.1f} to {100 * richest:.1f} % | {distances} |"
            in README)
