"""Wheels and sdists hold real files, and the folder `kernels` does not hide the distribution of that name."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FILES = (
    "fastgemma/__init__.py",
    "fastgemma/py.typed",
    "fastgemma/demo/run.py",
    "fastgemma/kernels/rms_norm.py",
    "fastgemma/patches/engine.py",
)


@pytest.mark.slow
def test_wheel_and_sdist_hold_real_files(tmp_path):
    for arguments in (("wheel", "--no-deps", "-w", str(tmp_path)),):
        subprocess.run(
            [sys.executable, "-m", "pip", *arguments, str(ROOT)], check=True, capture_output=True, cwd=tmp_path
        )
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
        assert names >= set(FILES)
        assert not any(name.startswith(("kernels/", "patches/", "tests/", "bench/")) for name in names)
        assert b"def rms_norm" in archive.read("fastgemma/kernels/rms_norm.py")
    code = "from setuptools import build_meta; build_meta.build_sdist(__import__('sys').argv[1])"
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=True, capture_output=True, cwd=ROOT)
    (sdist,) = tmp_path.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        members = {member.name.partition("/")[2]: member for member in archive.getmembers()}
        assert all(members[name].isfile() for name in FILES)


def test_the_distribution_named_kernels_still_wins(tmp_path):
    """transformers imports a package called `kernels`; from the repository's root ours must not be taken for it."""
    package = tmp_path / "kernels"
    package.mkdir()
    (package / "__init__.py").write_text("marker = 'the other one'\n")
    code = f"import sys; sys.path.append({str(tmp_path)!r}); import kernels; print(kernels.marker)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.strip() == "the other one", done.stderr


def test_import_is_light_and_changes_nothing():
    code = (
        "import sys, fastgemma; assert 'transformers' not in sys.modules and 'peft' not in sys.modules; "
        "from fastgemma.kernels.rms_norm import rms_norm; assert 'transformers' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_layers_depend_one_way():
    for path in (ROOT / "kernels").glob("*.py"):
        text = path.read_text()
        for library in ("transformers", "peft", "trl", "bitsandbytes", "accelerate", "fastgemma.patches"):
            assert f"import {library}" not in text and f"from {library}" not in text, path
    for folder in ("patches", "fastgemma", "fastgemma/demo"):
        for path in (ROOT / folder).glob("*.py"):
            assert "import triton" not in path.read_text().replace("find_spec", ""), path
