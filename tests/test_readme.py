"""What README.md says is true: its commands, its table of equations, the one form of Algorithm 2."""

import importlib
import inspect
import re
import shlex
import textwrap
from pathlib import Path

import pytest

import common

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
STAGES = sorted(ROOT.glob("0?_*.py"))
SCRIPTS = [*STAGES, ROOT / "eval_fid.py"]
COMMANDS = [
    shlex.split(part, comments=True)
    for block in re.findall(r"```bash\n(.*?)```", README, re.S)
    for line in block.splitlines()
    for part in line.split("&&")
    if part.strip().startswith("python ") and ".py" in part
]


def test_there_are_commands():
    assert ["python", "01_toy_2d.py"] in COMMANDS and len(COMMANDS) > 5


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_commands_are_accepted(command):
    script = importlib.import_module(command[1].removesuffix(".py"))
    args = script.parse([word for word in command[2:] if word != "--help"])
    if script.__name__ != "eval_fid":
        common.make_distance(args)


def test_docstring_commands_are_accepted():
    for script in SCRIPTS:
        for line in re.findall(rf"python {script.name}.*", script.read_text().split('"""')[1]):
            words = shlex.split(re.split(r"\s{3,}", line)[0])
            importlib.import_module(script.stem).parse(words[2:])


def test_help_names_every_option(capsys):
    for script in SCRIPTS:
        with pytest.raises(SystemExit) as stop:
            importlib.import_module(script.stem).main(["--help"])
        out = capsys.readouterr().out
        assert stop.value.code == 0 and ("--features" if script.stem == "eval_fid" else "--distance") in out


def test_equations_stand_where_the_table_says():
    rows = re.findall(r"^\| (\([^|]*) \| [^|]* \| `(\w+)` \|$", README, re.M)
    assert len(rows) >= 11
    for equations, name in rows:
        home = common if hasattr(common, name) else importlib.import_module("03_pixart_t2i")
        value = getattr(home, name)
        source = inspect.getsource(value) if callable(value) else Path(home.__file__).read_text()
        for equation in re.findall(r"\([\dA-Z]+\.\d+\)|Table \d", equations):
            assert equation in source, f"{name} does not mention {equation}"


def test_algorithm_2_reads_the_same_in_every_stage():
    block = re.compile(r"( *# -+ Algorithm 2: begin -+\n.*?# -+ Algorithm 2: end -+)", re.S)
    blocks = {textwrap.dedent(block.search(script.read_text())[1]) for script in STAGES}
    assert len(blocks) == 1


def test_pictures_exist():
    for path in re.findall(r"!\[[^\]]*\]\(([^)]*)\)", README):
        assert (ROOT / path).is_file(), path


def test_the_readme_names_no_missing_file():
    for path in re.findall(r"\]\((\w[^):]*)\)", README):
        assert (ROOT / path).exists(), path
