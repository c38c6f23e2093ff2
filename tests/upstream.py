"""transformers' own tests of its models, on a tiny Gemma 4, with stock code and patched.

    python tests/upstream.py transformers-5.24.0.tar.gz [--structure e2b] [--only checkpointing]

transformers' source distribution carries the tests that all models share, `tests/test_modeling_common.py`, though not
the files of Gemma 4, which derive from it. `make test-upstream` downloads that of the installed version. Each test runs
with stock code first. What passes there has to pass patched; what does not, for want of a GPU, several, or a parameter
of another kind of model, says nothing. Without a GPU tests in bfloat16 are left out. Exits with 1 if a test fails
patched alone.
"""

from __future__ import annotations

import argparse
import importlib
import io
import logging
import os
import sys
import tarfile
import tempfile
import time
import types
import unittest
import warnings
from pathlib import Path
from typing import Any

os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path[:0] = [str(Path(__file__).parent), str(Path(__file__).parents[1])]

import quick_interpreter  # noqa: E402
import structures  # noqa: E402
import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.table import Table  # noqa: E402

import fastgemma  # noqa: E402


def common_tests(archive: Path, directory: Path) -> Any:
    """`tests/test_modeling_common.py` of a source distribution, as a module."""
    with tarfile.open(archive) as tar:
        members = [member for member in tar.getmembers() if member.name.split("/")[1:2] == ["tests"]]
        tar.extractall(directory, members, filter="data")
    (tests,) = directory.glob("*/tests")
    package = types.ModuleType("upstream")
    package.__path__ = [str(tests)]
    sys.modules["upstream"] = package
    # Bases that the distribution lacks; nothing of theirs is run.
    for name, base in (
        ("exporters.test_export", "ExportTesterMixin"),
        ("generation.test_utils", "GenerationTesterMixin"),
    ):
        parent = sys.modules.setdefault(f"upstream.{name.partition('.')[0]}", types.ModuleType(name))
        parent.__path__ = []
        module = types.ModuleType(f"upstream.{name}")
        setattr(module, base, type(base, (), {}))
        sys.modules[f"upstream.{name}"] = module
    return importlib.import_module("upstream.test_modeling_common")


class Tester:
    """What the shared tests ask of a model: a configuration, and inputs for it."""

    batch_size, seq_length, is_training = 2, 7, True

    def __init__(self, name: str) -> None:
        self.name = name
        model = structures.build(name)
        self.config = model.config
        self.base_model_class, self.causal_lm_class = type(model.model), type(model)
        for attribute in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size", "intermediate_size"):
            setattr(self, attribute, getattr(self.config, attribute))

    def get_config(self) -> Any:
        return type(self.config).from_dict(self.config.to_dict())

    def prepare_config_and_inputs_for_common(self) -> tuple[Any, dict[str, torch.Tensor]]:
        from transformers.testing_utils import torch_device

        shape = (self.batch_size, self.seq_length)
        ids = torch.randint(3, self.vocab_size, shape, device=torch_device)
        return self.get_config(), {"input_ids": ids, "attention_mask": torch.ones_like(ids)}

    def prepare_config_and_inputs(self) -> tuple[Any, ...]:
        config, inputs = self.prepare_config_and_inputs_for_common()
        return config, inputs["input_ids"], inputs["attention_mask"]


def cases(common: Any, name: str) -> type[unittest.TestCase]:
    """The shared tests over one structure."""
    tester = Tester(name)

    class Shared(common.ModelTesterMixin, unittest.TestCase):
        all_model_classes = (tester.base_model_class, tester.causal_lm_class)
        test_torch_exportable = False

        def setUp(self) -> None:
            torch.manual_seed(0)
            self.model_tester = tester

    return Shared


def outcome(test: unittest.TestCase) -> tuple[str, str]:
    """How a test ended ("passed", "skipped" or "failed"), and the last line of what it said."""
    result = unittest.TestResult()
    output = io.StringIO()
    stdout, stderr = sys.stdout, sys.stderr
    sys.stdout = sys.stderr = output
    try:
        test.run(result)
    finally:
        sys.stdout, sys.stderr = stdout, stderr
    for _, text in (*result.failures, *result.errors):
        return "failed", text.strip().splitlines()[-1][:160]
    return ("skipped", result.skipped[0][1][:160]) if result.skipped else ("passed", "")


def main() -> int:
    """The command; returns its exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("archive", type=Path, help="transformers-X.Y.Z.tar.gz, of the installed version")
    parser.add_argument("--only", default="", help="tests with this in their names")
    parser.add_argument("--structure", action="append", choices=structures.STRUCTURES, help="default: all five")
    arguments = parser.parse_args()
    quick_interpreter.install()
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    found: dict[str, list[tuple[str, str, str]]] = {}
    with tempfile.TemporaryDirectory() as directory:
        common = common_tests(arguments.archive, Path(directory))
        for name in arguments.structure or list(structures.STRUCTURES):
            case = cases(common, name)
            for method in unittest.TestLoader().getTestCaseNames(case):
                if arguments.only not in method:
                    continue
                if "bf16" in method and not torch.cuda.is_available():
                    continue  # Triton's interpreter multiplies bfloat16 wrongly
                start = time.monotonic()
                stock, why = outcome(case(method))
                patched = "not run"
                if stock == "passed":
                    with fastgemma.patched():
                        patched, why = outcome(case(method))
                print(
                    f"{name} {method}: stock {stock}, patched {patched} {why} ({time.monotonic() - start:.1f} s)",
                    flush=True,
                )
                found.setdefault(name, []).append((stock, patched, f"{method}: {why}"))
    table = Table("structure", "tests", "passed by stock", "passed patched", "failed patched alone")
    broken = []
    for name, results in found.items():
        passed = [result for result in results if result[0] == "passed"]
        alone = [what for _, patched, what in passed if patched != "passed"]
        table.add_row(name, *map(str, (len(results), len(passed), len(passed) - len(alone), len(alone))))
        broken += [f"{name}: {what}" for what in alone]
    Console().print(table)
    for what in broken:
        print(f"FAILED {what}")
    return 1 if broken else 0


if __name__ == "__main__":
    sys.exit(main())
