"""Packages that a GPU machine lacks, as wheels in a folder: ``python -m tests.programs.gpu_wheels [FOLDER]``.

For a machine without network that has Python 3.12, torch, transformers and accelerate. There, in a checkout:
``python3 -m pip install --no-index --no-deps --target /tmp/site FOLDER/*.whl && export PYTHONPATH=/tmp/site:$PWD``.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ALONE = ("timm==1.0.31", "datasets>=5.0", "evaluate>=0.4.6", "dill", "multiprocess", "pycocotools>=2.0.11")
WITH_WHAT_THEY_NEED = ("pydantic>=2.13",)  # its core must be of one version
PYTHON = "3.12"
# pip compares these to the letter
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in (34, 31, 28, 27, 24, 17)), "manylinux2014_x86_64")
LIMIT = 60e6  # bytes in all


def download(folder: Path) -> list[Path]:
    """Fetch the wheels; those that were there before are replaced."""
    folder.mkdir(parents=True, exist_ok=True)
    for wheel in folder.glob("*.whl"):
        wheel.unlink()
    target = ["--only-binary=:all:", "--implementation=cp", f"--python-version={PYTHON}"]
    target += [f"--platform={platform}" for platform in PLATFORMS]
    command = [sys.executable, "-m", "pip", "download", "--quiet", *target, "--dest", str(folder)]
    subprocess.run([*command, "--no-deps", *ALONE], check=True)
    subprocess.run([*command, *WITH_WHAT_THEY_NEED], check=True)
    return sorted(folder.glob("*.whl"))


def main(folder: str = ".whl") -> int:
    """Fetch and list them. Returns 1 where they are too large to travel."""
    wheels = download(Path(folder))
    sizes = [wheel.stat().st_size for wheel in wheels]
    for wheel, size in zip(wheels, sizes, strict=True):
        print(f"{size / 1e6:6.1f} MB  {wheel.name}")
    print(f"{sum(sizes) / 1e6:6.1f} MB in all, at most {LIMIT / 1e6:.0f}")
    return int(sum(sizes) > LIMIT)


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
