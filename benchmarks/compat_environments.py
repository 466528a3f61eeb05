"""The tools that `compat.py` tries, and the environment of each: a virtual environment, or a folder of npm packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parent / "compat_tools"
STAMP = "planish-compat.json"
INSTALL_SECONDS = 1800
RUN_SECONDS = 600
TEXT_TASKS = ("feature-extraction", "text-classification", "token-classification", "question-answering", "fill-mask")
_LONGEST_REASON = 300


@dataclass(frozen=True)
class Tool(ABC):
    """A tool that loads model folders.

    Attributes:
        name: As its authors call it.
        packages: What is installed, in one go, with version limits.
        script: The file under ``compat_tools`` that loads the bundle.
        needs: A file that a folder must have for the tool to make sense, or an empty string.
    """

    name: str
    packages: tuple[str, ...]
    script: str
    needs: str = ""

    def unfit(self, task: str, bundle: Path) -> str:
        """Why the tool is not tried on this bundle; empty when it is."""
        if task not in TEXT_TASKS:
            return f"this check feeds sentences, and the task is {task}"
        if self.needs and not (bundle / self.needs).is_file():
            return f"the model has no {self.needs}, so it is none of this tool's kind"
        return ""

    @abstractmethod
    def install(self, place: Path, torch: str, torch_index: str | None) -> str:
        """Make the environment in an empty folder; returns why it could not, or an empty string."""

    @abstractmethod
    def command(self, place: Path) -> list[str]:
        """What runs the script there, to which bundle, request and answer are added."""

    def run(self, place: Path, bundle: Path, request: Path, answer: Path) -> str:
        """Run the script; returns why it could not, or an empty string."""
        return call([*self.command(place), str(bundle), str(request), str(answer)], RUN_SECONDS)


class PythonTool(Tool):
    """A tool in a virtual environment."""

    def install(self, place: Path, torch: str, torch_index: str | None) -> str:
        python = str(place / "bin" / "python")
        pip = [python, "-m", "pip", "install", "--quiet"]
        index = ["--index-url", torch_index] if torch_index else []
        # Torch first and exactly, so that nothing else chooses a build.
        commands = ([sys.executable, "-m", "venv", str(place)], [*pip, *index, torch], [*pip, torch, *self.packages])
        return next((reason for command in commands if (reason := call(command, INSTALL_SECONDS))), "")

    def command(self, place: Path) -> list[str]:
        return [str(place / "bin" / "python"), str(SCRIPTS / self.script)]


class NodeTool(Tool):
    """A tool from npm. Install scripts stay off: the processor's native libraries come with the packages."""

    def install(self, place: Path, torch: str, torch_index: str | None) -> str:
        if not shutil.which("npm"):
            return "npm is not installed"
        (place / "package.json").write_text('{"private": true, "type": "module"}\n', encoding="utf-8")
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--no-progress"]
        return call(["npm", "install", "--prefix", str(place), *options, *self.packages], INSTALL_SECONDS)

    def command(self, place: Path) -> list[str]:
        return ["node", str(SCRIPTS / self.script), str(place)]


TOOLS: dict[str, Tool] = {
    tool.name: tool
    for tool in (
        PythonTool("optimum-onnx", ("optimum-onnx[onnxruntime]", "transformers>=4.57,<4.58"), "with_optimum.py"),
        PythonTool(
            "sentence-transformers",
            ("sentence-transformers[onnx]", "transformers>=4.57,<4.58"),
            "with_sentence_transformers.py",
            needs="modules.json",
        ),
        NodeTool("transformers.js", ("@huggingface/transformers@4",), "with_transformers_js.mjs"),
    )
}


def prepare(tool: Tool, root: Path, torch: str, torch_index: str | None) -> Path | str:
    """The folder of the tool's environment, made where there is none for these packages yet; or why there is none."""
    place = root / tool.name
    wanted = {"packages": [torch, *tool.packages], "python": sys.version.split()[0]}
    stamp = place / STAMP
    if stamp.is_file() and json.loads(stamp.read_text(encoding="utf-8")) == wanted:
        return place
    if place.exists():
        shutil.rmtree(place)
    place.mkdir(parents=True)
    reason = tool.install(place, torch, torch_index)
    if reason:
        return f"it could not be installed: {reason}"
    stamp.write_text(json.dumps(wanted, indent=1) + "\n", encoding="utf-8")
    return place


def call(command: list[str], seconds: float) -> str:
    """Run a command offline as far as model hubs go; returns why it failed, or an empty string."""
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
    environment = {**kept, "HF_HUB_OFFLINE": "1", "PYTHONNOUSERSITE": "1"}
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=seconds,
            stdin=subprocess.DEVNULL,
            env=environment,
            check=False,
        )
    except FileNotFoundError:
        return f"{command[0]} is not installed"
    except subprocess.TimeoutExpired:
        return f"it took longer than {seconds:g} s"
    if done.returncode == 0:
        return ""
    print(done.stdout[-4000:], done.stderr[-4000:], sep="\n", file=sys.stderr)
    return f"{Path(command[0]).name} ended with status {done.returncode}; its own words were printed"


def failure(text: str, bundle: Path) -> str:
    """A tool's error for the results: one line, and nothing in it that tells where the bundle lies."""
    return " ".join(text.split()).replace(str(bundle), "bundle")[:_LONGEST_REASON]
