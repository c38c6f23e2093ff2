"""Packaging of fastgemma.

`kernels/` and `patches/` sit at the top of the repository and are reached from the package through the relative
symlinks `fastgemma/kernels` and `fastgemma/patches`; wheels and sdists hold real files in their place.
"""

from pathlib import Path

from setuptools import find_namespace_packages, setup

TRAIN = ["trl>=1.15", "bitsandbytes>=0.50", "accelerate>=1.10", "datasets>=4.7"]

setup(
    name="fastgemma",
    version="0.1.0",
    description=(
        "Fused Triton kernels that fine-tune Gemma 4 faster and in less memory, with stock losses and gradients"
    ),
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_namespace_packages(include=["fastgemma", "fastgemma.*"]),
    package_data={"fastgemma": ["py.typed"]},
    install_requires=[
        "torch>=2.8",
        "triton>=3.4; platform_system == 'Linux'",
        "transformers>=5.15,<5.25",
        "peft>=0.21",
        "psutil>=5.9",
        "rich>=13",
        "typer>=0.12",
    ],
    extras_require={
        "train": TRAIN,
        "bench": ["pytest-benchmark>=4", "matplotlib>=3.8", "liger-kernel>=0.8.5"],
        # Triton's interpreter cannot run loops with run-time bounds under numpy 2.4.
        "test": [
            *TRAIN,
            "pytest>=8",
            "pytest-timeout>=2.3",
            "pytest-xdist>=3.5",
            "hypothesis>=6.100",
            "matplotlib>=3.8",
            "mypy>=1.10",
            "numpy<2.4",
            "ruff>=0.6",
        ],
    },
    entry_points={"console_scripts": ["fastgemma = fastgemma.__main__:main"]},
    classifiers=[
        "Programming Language :: Python :: 3",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
