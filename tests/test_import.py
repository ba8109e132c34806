"""`import redpeft` takes no time, and RED is there wherever PEFT is, in whatever order they are imported."""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import subprocess
import sys
import threading

import pytest
import torch
from peft import get_peft_model
from transformers import AutoModelForCausalLM

import redpeft
from redpeft.import_hook import _Finder, after_import

HEAVY = ("torch", "transformers", "peft", "pandas", "datasets", "pyarrow", "matplotlib", "gradio")
CALLS = [[], ["--help"], ["--version"], ["train", "--help"], ["fold", "--help"], ["trian"], ["train", "--nosuch"]]
CALLS += [
    ["train", "base=m", "data=d", field] for field in ("lr=abc", "learing_rate=1", "schedule=lineer", "method=lorra")
]


def fresh(code: str, **environment: str) -> str:
    """Run `code` in a fresh process; what it prints."""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_what_needs_no_model_loads_none():
    """One process for all calls: the modules that are loaded only grow."""
    code = f"""
import contextlib, io, sys
from redpeft import cli
for call in {CALLS!r}:
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        try:
            cli.main(call)
        except SystemExit as exit_:
            code = exit_.code
    print(code, *[name for name in {HEAVY!r} if name in sys.modules])
"""
    assert fresh(code).split("\n") == [*"00000222222", ""]


def test_the_ground_floor_can_be_imported_before_peft():
    """Importing PEFT imports the tuner, which imports models/."""
    assert fresh("import redpeft.models as models; print(models.FLOATS[0])") == "torch.float64\n"


@pytest.fixture(scope="module")
def saved(tmp_path_factory, tiny_decoder_folder):
    """An adapter folder on the tiny decoder, with random edits."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_decoder_folder)
    model = get_peft_model(model, redpeft.RedConfig(init_weights=False, task_type="CAUSAL_LM"))
    folder = tmp_path_factory.mktemp("saved")
    model.save_pretrained(folder)
    return folder


CHECKS = """
import copy, pickle
from peft import AutoPeftModelForCausalLM, PeftModel, PeftType, get_peft_model
from transformers import AutoModelForCausalLM
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(BASE), SAVED)
edits = [name for name, module in model.named_modules() if type(module).__name__ == "RedLayer"]
assert len(edits) == 2
assert isinstance(model.base_model, redpeft.RedModel)
assert type(AutoPeftModelForCausalLM.from_pretrained(SAVED).base_model) is redpeft.RedModel
config = pickle.loads(pickle.dumps(model.peft_config["default"]))
assert config == model.peft_config["default"] and config.peft_type is PeftType.REDPEFT
again = copy.deepcopy(model).state_dict()
assert again.keys() == model.state_dict().keys() and any("redpeft_" in key for key in again)
get_peft_model(AutoModelForCausalLM.from_pretrained(BASE), redpeft.RedConfig())
plain = AutoModelForCausalLM.from_pretrained(BASE)
try:
    plain.load_adapter(SAVED)
    assert sum("redpeft_" in key for key in plain.state_dict()) == 6
except ImportError:
    pass  # this transformers wants a newer PEFT
"""
FIRST = {
    "redpeft": "import redpeft, sys\nassert 'peft' not in sys.modules and 'torch' not in sys.modules",
    "peft": "import peft, redpeft",
    "transformers": "import transformers, redpeft",
    "what uses peft": "import redpeft\nfrom redpeft.training import predict",
}


@pytest.mark.parametrize(
    "first", ["redpeft", *(pytest.param(name, marks=pytest.mark.slow) for name in FIRST if name != "redpeft")]
)
def test_red_is_registered_whatever_is_imported_first(saved, tiny_decoder_folder, first):
    names = f"BASE, SAVED = {str(tiny_decoder_folder)!r}, {str(saved)!r}\n"
    fresh(f"{FIRST[first]}\n{names}{CHECKS}")


def test_the_names_are_there_for_people_and_tools():
    assert set(redpeft.__all__) <= set(dir(redpeft))
    assert redpeft.errors.UserError.__name__ == "UserError"
    with pytest.raises(AttributeError, match="module 'redpeft' has no attribute 'nosuch'"):
        redpeft.nosuch  # noqa: B018
    with pytest.raises(ImportError, match="cannot import name 'nosuch'"):
        from redpeft import nosuch  # noqa: F401


NUMBERS = itertools.count()


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Write a package of one module with this code; returns its name."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))

    def write(code: str) -> str:
        name = f"made_up_{next(NUMBERS)}"
        (tmp_path / f"{name}.py").write_text(code)
        importlib.invalidate_caches()
        return name

    return write


def test_an_action_waits_for_the_import_and_comes_once(package):
    name, seen = package("value = 1"), []
    after_import(name, lambda: seen.append(sys.modules[name].value))
    spec = importlib.util.find_spec(name)
    assert spec.origin.endswith(f"{name}.py")
    assert spec.loader.get_source(name) == "value = 1"
    assert seen == []
    module = importlib.import_module(name)
    assert seen == [1]
    assert type(module.__loader__) is type(module.__spec__.loader) is type(itertools_loader())
    importlib.reload(module)
    assert seen == [1]
    after_import(name, lambda: seen.append(2))
    assert seen == [1, 2]


def itertools_loader():
    return importlib.util.find_spec("textwrap").loader


def test_a_lazy_loader_runs_the_action_with_the_module(package):
    name, seen = package("value = 1"), []
    after_import(name, lambda: seen.append(1))
    spec = importlib.util.find_spec(name)
    module = importlib.util.module_from_spec(spec)
    importlib.util.LazyLoader(spec.loader).exec_module(module)
    assert seen == []
    assert module.value == 1
    assert seen == [1]


def test_an_import_that_fails_does_not_use_up_the_action(package, tmp_path):
    name, seen = package("1 / 0"), []
    after_import(name, lambda: seen.append(1))
    with pytest.raises(ZeroDivisionError):
        importlib.import_module(name)
    assert (name in sys.modules, seen) == (False, [])
    (tmp_path / f"{name}.py").write_text("value = 'another length'")
    importlib.invalidate_caches()
    importlib.import_module(name)
    assert seen == [1]


def test_a_package_that_is_half_imported_is_waited_for(package, monkeypatch):
    seen = []
    monkeypatch.setattr(sys, "seen", seen, raising=False)
    name = package(
        "import sys\nfrom redpeft.import_hook import after_import\n"
        "after_import(__name__, lambda: sys.seen.append(sys.modules[__name__].end))\nend = 3"
    )
    module = importlib.import_module(name)
    assert seen == [3]
    assert type(module.__spec__).__name__ == "ModuleSpec"


def test_threads_that_import_at_once_find_the_action_done(package):
    name, seen = package("import time; time.sleep(0.05)"), []
    after_import(name, lambda: seen.append(1))
    found = []

    def work():
        importlib.import_module(name)
        found.append(list(seen))

    threads = [threading.Thread(target=work) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [[1]] * 8


def test_a_module_that_is_not_there_is_not_there(package):
    after_import("no_such_module_at_all", lambda: 1 / 0)
    assert sum(isinstance(finder, _Finder) for finder in sys.meta_path) >= 1
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("no_such_module_at_all")
