"""From the command to the first step: what is not imported on the way there."""
import subprocess
import sys

from helpers import ROOT

from robot.models import MODELS

# What only the end of a run, another command or another format of data needs; it takes from 20 ms to 2 s.
NOT_YET = {"torch._dynamo", "torch._inductor", "torch.onnx", "tools.report", "tools.drawing", "tools.charts",
           "tools.pictures", "tools.words", "tools.explain", "tools.bench", "tools.compare", "tools.movie",
           "matplotlib", "PIL", "pandas", "pyarrow", "av", "zarr", "gymnasium", "lerobot", "sentencepiece",
           "safetensors", "huggingface_hub", "transformers", *MODELS}


def imported(code):
    """Names of the modules that are there after `code` has run."""
    code = f"import sys\ntry:\n    {code}\nexcept SystemExit:\n    pass\nprint('\\n', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


def test_help_imports_nothing_that_only_a_run_needs():
    modules = imported("import train; train.main(['--help'])")
    assert {"torch", "tools.options", "data"} <= modules
    assert not NOT_YET & modules


def test_a_model_file_imports_nothing_of_the_compiler():
    """A robot that loads a policy would wait two seconds for it. dit.py has a method that is not compiled."""
    modules = imported(f"import {', '.join(name for name in MODELS if name != 'dit')}, robot.policy")
    assert {*MODELS} - modules == {"dit"} and not {"torch._dynamo", "torch._inductor"} & modules
