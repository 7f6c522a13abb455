"""Packaging. Pure Python by default.

The CUDA kernels of csrc/ become `based_mp._C` when nvcc and a CUDA build of torch are found, or when BASED_MP_CUDA=1
asks for them (an error where they cannot be built); BASED_MP_CUDA=0 leaves them out. torch must be importable while
building, so: `pip install --no-build-isolation -e .`
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).resolve().parent
ARCHITECTURE = ["-gencode", "arch=compute_90a,code=sm_90a"]         # Hopper: the kernels use wgmma and TMA


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME, of PATH, or of the usual folder."""
    for home in filter(None, [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]):
        if (Path(home) / "bin" / "nvcc").is_file():
            return str(Path(home) / "bin" / "nvcc")
    usual = Path("/usr/local/cuda/bin/nvcc")
    return shutil.which("nvcc") or (str(usual) if usual.is_file() else None)


def toolkit(nvcc: str) -> Path:
    """The folder of the CUDA toolkit, from nvcc itself: what lies on PATH may be a wrapper."""
    plan = subprocess.run([nvcc, "-dryrun", "-c", "-x", "cu", os.devnull], capture_output=True, text=True).stderr
    top = re.search(r"^#\$ TOP=(.+)$", plan, re.MULTILINE)
    return Path(top[1]).resolve() if top else Path(nvcc).resolve().parent.parent


def missing_for_cuda() -> str | None:
    """What keeps the kernels from being built, in one sentence; None when nothing does."""
    if not list((HERE / "csrc").glob("*.cu")):
        return "csrc/ holds no .cu file"
    if find_nvcc() is None:
        return "nvcc was not found: install the CUDA toolkit or set CUDA_HOME"
    try:
        import torch
    except ImportError:
        return "torch cannot be imported while building: install torch first and pass --no-build-isolation to pip"
    if torch.version.cuda is None:
        return f"torch {torch.__version__} is a CPU build: install a CUDA build of torch first"
    return None


def cuda_extension() -> dict[str, object]:
    """The `ext_modules` and `cmdclass` that build based_mp._C, or nothing."""
    wanted = os.environ.get("BASED_MP_CUDA", "")
    if wanted == "0":
        return {}
    missing = missing_for_cuda()
    if missing:
        if wanted == "1":
            sys.exit(f"error: BASED_MP_CUDA=1, but {missing}")
        return {}
    from torch.utils.cpp_extension import BuildExtension, CppExtension

    nvcc = find_nvcc()
    cuda = toolkit(nvcc)
    libraries = [str(cuda / name) for name in ("lib64", "lib", "targets/x86_64-linux/lib") if (cuda / name).is_dir()]

    class Build(BuildExtension):
        """Compiles the kernels with nvcc directly: they include no torch header, so each takes seconds."""

        def build_extension(self, extension) -> None:
            folder = Path(self.build_temp) / "kernels"
            folder.mkdir(parents=True, exist_ok=True)
            for source in sorted((HERE / "csrc").glob("*.cu")):
                target = folder / f"{source.stem}.o"
                subprocess.run([nvcc, *ARCHITECTURE, "-O3", "-std=c++17", "--use_fast_math", "-lineinfo", "-Xcompiler",
                                "-fPIC", "-I", str(HERE / "csrc"), "-c", str(source), "-o", str(target)], check=True)
                extension.extra_objects.append(str(target))
            super().build_extension(extension)

    extension = CppExtension("based_mp._C", ["csrc/bindings.cpp"], library_dirs=libraries, libraries=["cudart"],
                             extra_compile_args=["-O2", "-std=c++17"])
    return {"ext_modules": [extension], "cmdclass": {"build_ext": Build.with_options(use_ninja=False)}}


def version() -> str:
    return re.search(r'__version__ = "(.+)"', (HERE / "based_mp" / "__init__.py").read_text())[1]


setup(
    name="based-mp",
    version=version(),
    description="Pretraining, evaluation and generation for BASED language models on Megatron-core and DeepSpeed",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="MIT",
    python_requires=">=3.11",
    packages=find_packages(include=["based_mp", "based_mp.*", "data_prep", "data_prep.*"]),
    install_requires=[
        "torch>=2.11", "megatron-core==0.16.1", "deepspeed==0.19.8", "numpy>=1.26", "pydantic>=2", "pyyaml",
        "sentencepiece>=0.2", "tokenizers>=0.20", "safetensors>=0.4", "zstandard>=0.22", "tensorboard>=2.16",
        "tqdm>=4.66", "psutil>=5.9", "orjson>=3.10",
    ],
    extras_require={
        "test": ["pytest>=8", "pytest-timeout>=2.3", "ruff>=0.6"],
        "mpi": ["mpi4py>=4"],
        "plot": ["matplotlib>=3.8"],
        "fast": ["gigatoken==0.10.0"],
        "s3": ["boto3>=1.34"],
        "ci": ["moto[server]>=5", "httpx>=0.27"],
        "serve": ["fastapi>=0.110", "uvicorn>=0.30", "httptools>=0.6", "uvloop>=0.19"],
        "dedup": ["rensa==0.5.0"],
        "fla": ["fla-core==0.6.0"],
        "eval": ["lm-eval==0.4.13"],
    },
    classifiers=["Programming Language :: Python :: 3", "Operating System :: POSIX :: Linux"],
    **cuda_extension(),
)
