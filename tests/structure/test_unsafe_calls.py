"""Calls that run code out of files, or a shell: none but those that are listed here with their reasons."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("megamm", "tools", "examples")

# What is called, and how it is safe. A call that `is_unsafe` names has to stand in ALLOWED.
ALLOWED = {
    ("megamm/data/worker.py", "pickle.loads"): "of an exception that this process has just pickled itself",
}
UNSAFE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "dill.load", "dill.loads", "joblib.load"),
    *("cPickle.load", "cPickle.loads", "marshal.load", "marshal.loads", "shelve.open", "cloudpickle.loads"),
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "runpy.run_path"),
    *("yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "yaml.unsafe_load_all", "yaml.full_load_all"),
    *("shutil.unpack_archive", "torch.hub.load", "torch.jit.load", "torch.package.PackageImporter"),
    *("tempfile.mktemp", "np.fromregex", "pandas.read_pickle", "pd.read_pickle"),
}
METHODS = {"extract", "extractall"}  # of tar and zip files


def dotted(node: ast.expr) -> str:
    """`a.b.c` of a name or an attribute; "?" in the place of anything else."""
    if isinstance(node, ast.Name):
        return node.id
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return "?"


def keyword(call: ast.Call, name: str) -> object:
    """The value of a keyword argument, as source; None if it is not given."""
    return next((ast.unparse(one.value) for one in call.keywords if one.arg == name), None)


def is_unsafe(call: ast.Call) -> bool:
    """Whether the call runs what a file says, or gives text to a shell."""
    name = dotted(call.func)
    if (name in ("torch.load", "load") and keyword(call, "map_location") is not None) or name == "torch.load":
        return keyword(call, "weights_only") != "True"
    if name == "yaml.load":
        return keyword(call, "Loader") not in ("yaml.SafeLoader", "_Loader")  # a SafeLoader of ours
    if name in ("np.load", "numpy.load"):
        return keyword(call, "allow_pickle") is not None
    if name.endswith(".from_pretrained"):
        return keyword(call, "trust_remote_code") not in (None, "False")
    return (
        name in UNSAFE
        or keyword(call, "shell") not in (None, "False")
        or keyword(call, "trust_remote_code") == "True"
        or keyword(call, "allow_pickle") not in (None, "False")
        or (isinstance(call.func, ast.Attribute) and call.func.attr in METHODS)
    )


def calls(text: str) -> Iterator[tuple[int, str]]:
    """Line and name of every unsafe call. Names that are imported by themselves are told by what they are."""
    tree = ast.parse(text)
    full: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module:
            full |= {one.asname or one.name: f"{node.module}.{one.name}" for one in node.names}
        elif isinstance(node, ast.Import):
            full |= {one.asname: one.name for one in node.names if one.asname and one.name != "numpy"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, _, rest = dotted(node.func).partition(".")
            name = full.get(head, head) + (f".{rest}" if rest else "")
            seen = ast.Call(ast.parse(name, mode="eval").body if "?" not in name else node.func, [], [])
            seen.keywords = node.keywords
            if is_unsafe(seen):
                yield node.lineno, name


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('x')",
        "import torch\ntorch.load('x', weights_only=False)",
        "from torch import load\nload('x')",
        "import pickle as p\np.loads(b'')",
        "from pickle import load\nload(f)",
        "import yaml\nyaml.load(t, Loader=yaml.Loader)",
        "import yaml\nyaml.load(t, yaml.FullLoader)",
        "import numpy as np\nnp.load('x', allow_pickle=True)",
        "tarfile.open('x').extractall('y')",
        "archive.extract(member)",
        "import subprocess\nsubprocess.run('ls', shell=True)",
        "eval(text)",
        "exec(text)",
        "os.system('ls')",
        "AutoModel.from_pretrained(path, trust_remote_code=True)",
    ],
)
def test_unsafe_calls_are_seen(text: str) -> None:
    assert list(calls(text))


@pytest.mark.parametrize(
    "text",
    [
        "import torch\ntorch.load('x', weights_only=True)",
        "import yaml\nyaml.safe_load(t)",
        "import numpy as np\nnp.load('x')",
        "import re\nre.compile('x')",
        "model.eval()",
        "import subprocess\nsubprocess.run(['ls'])",
    ],
)
def test_others_are_not(text: str) -> None:
    assert not list(calls(text))


def test_there_are_none_but_these() -> None:
    found: dict[tuple[str, str], int] = {}
    files = [path for folder in FOLDERS for path in sorted((ROOT / folder).rglob("*.py"))]
    assert len(files) > 250
    for path in files:
        for line, name in calls(path.read_text()):
            found[str(path.relative_to(ROOT)), name] = line
    assert {key: line for key, line in found.items() if key not in ALLOWED} == {}
    assert set(ALLOWED) <= set(found), "what is gone needs no permission"


def test_loaders_that_are_handed_on() -> None:
    """The recipe's Loader is one that makes plain values only."""
    import yaml

    from megamm import recipe

    assert issubclass(recipe._Loader, yaml.SafeLoader)
    made = {tag for tag in recipe._Loader.yaml_constructors if tag is not None and "python" in tag}
    assert made == set()
    with pytest.raises(yaml.YAMLError):
        yaml.load("!!python/object/apply:os.getpid []", Loader=recipe._Loader)
