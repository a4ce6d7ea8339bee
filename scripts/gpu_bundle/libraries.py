"""Finds CUDA libraries by path: those of a pip-installed torch, or of a toolkit."""

import pathlib
import shutil
import subprocess
import sys

LIBRARY = "libcublasLt.so.*"
PYTHONS = ("python3", "python", "/opt/conda/bin/python", "/usr/bin/python3", "/usr/local/bin/python3")


def site_folders():
    """Folders in which pip installs, of every Python that is found."""
    folders = []
    for python in dict.fromkeys(filter(None, [sys.executable, *map(shutil.which, PYTHONS)])):
        try:
            done = subprocess.run(
                [python, "-c", "import sys; print('\\n'.join(sys.path))"], capture_output=True, text=True, timeout=20
            )
        except (OSError, subprocess.TimeoutExpired):
            continue
        folders += [pathlib.Path(line) for line in done.stdout.splitlines() if line.endswith("-packages")]
    return list(dict.fromkeys(folders))


def find():
    """Folders with CUDA libraries, those with cuBLASLt first."""
    candidates = []
    for site in site_folders():
        candidates += sorted(site.glob("nvidia/*/lib")) + [site / "torch" / "lib"]
    candidates += sorted(pathlib.Path("/usr/local").glob("cuda*/lib64"), reverse=True)
    candidates += sorted(pathlib.Path("/usr/local").glob("cuda*/targets/x86_64-linux/lib"), reverse=True)
    with_libraries = [folder for folder in candidates if any(folder.glob("*.so*"))]
    return sorted(dict.fromkeys(with_libraries), key=lambda folder: not any(folder.glob(LIBRARY)))


def find_program(name, folders):
    """A program of the toolkit: in PATH, or beside one of the library folders."""
    beside = [str(pathlib.Path(folder).parent / "bin") for folder in folders]
    places = beside + [str(p) for p in sorted(pathlib.Path("/usr/local").glob("cuda*/bin"), reverse=True)]
    return shutil.which(name) or next(filter(None, (shutil.which(name, path=place) for place in places)), None)


def python_with_torch():
    """A Python that imports torch and sees a GPU."""
    for python in dict.fromkeys(filter(None, [sys.executable, *map(shutil.which, PYTHONS)])):
        try:
            check = subprocess.run([python, "-c", "import torch; assert torch.cuda.is_available()"], capture_output=True, timeout=90)
        except (OSError, subprocess.TimeoutExpired):
            continue
        if check.returncode == 0:
            return python
    return None
