"""Which code made a run: the digest of a model file, the versions, the commit, the command.

For settings.json, and for the question whether weights still are the code's beside them.
"""

import ast
import hashlib
import io
import platform
import shlex
import subprocess
import sys
import tokenize
from importlib.metadata import version
from pathlib import Path

import torch

from support.files import HERE

PACKAGES = (
    "torch", "torchvision", "albumentations", "opencv-python-headless", "numpy", "torchsummary",
    "matplotlib",
)  # fmt: skip


def environment() -> dict:
    """What besides the settings a repetition of this run needs: versions, commit, command."""
    return {
        "command": command(),
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
        "platform": platform.platform(),
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "cuda": torch.version.cuda,
        "git_commit": _git("rev-parse", "HEAD"),
        "git_changes": (_git("status", "--porcelain", "--untracked-files=no") or "").splitlines(),
    }


def command() -> str:
    """What was typed, as one would type it in the repository's folder."""
    typed = shlex.join([Path(sys.executable).name, *_program(), *sys.argv[1:]])
    return typed.encode(errors="backslashreplace").decode()  # a path may hold any byte


def processor() -> str:
    """The CPU's name, as far as it is known."""
    return torch.cpu.get_capabilities().get("cpu_name") or platform.processor()


def _program() -> list[str]:
    """What was started, as one types it in the repository's folder, on whichever machine."""
    path, here = Path(sys.argv[0]).resolve(), HERE
    if not path.is_relative_to(here):
        return [path.name]
    path = path.relative_to(here)
    return ["-m", ".".join(path.with_suffix("").parts)] if len(path.parts) > 1 else [str(path)]


def _git(*arguments: str) -> str | None:
    """What git says of the code's own folder; None without git or outside a repository."""
    try:
        result = subprocess.run(
            ["git", "-C", str(HERE), *arguments],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return result.stdout.rstrip()


def code_digest(path: Path) -> str:
    """SHA-256 (hexadecimal) of a model file's code, and of all files of its own that it imports.

    Comments, docstrings and recipes are left out: weights stay this network's when a remark or
    its RECIPE changes, and are another's as soon as its code does. Modules and packages beside the
    file count, and this repository's; not what lies elsewhere, or is read by other means than
    import.

    Raises:
        OSError, SyntaxError, ValueError: it cannot be read as Python.
    """
    codes: dict[Path, str] = {}
    unread = [path]
    while unread:
        file = unread.pop()
        if file not in codes:
            tree, codes[file] = _code_of(file)
            unread += _imported_files(tree, file, path.parent)
    first, *rest = codes.values()
    return hashlib.sha256("\0".join([first, *sorted(rest)]).encode()).hexdigest()


def _imported_files(tree: ast.Module, file: Path, folder: Path) -> list[Path]:
    """The files of the repository, and of the model file's folder, that a file imports."""
    found = []
    for node in ast.walk(tree):
        # What is loaded already comes first, as for Python itself: this repository's.
        roots = [HERE, folder]
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module or ''}.{alias.name}".strip(".") for alias in node.names]
            if node.level:
                roots = [file.parents[node.level - 1]]
        else:
            continue
        for parts in (name.split(".") for name in names):
            for count in range(1, len(parts) + 1):
                places = [root.joinpath(*parts[:count]) for root in roots]
                files = [
                    file
                    for place in places
                    for file in (place / "__init__.py", place.with_name(f"{place.name}.py"))
                    if file.is_file()
                ]
                found += files[:1]
    return found


def _code_of(path: Path) -> tuple[ast.Module, str]:
    """A file's syntax tree, and its lines of code."""
    with tokenize.open(path) as file:  # in the encoding that its first lines may name
        source = file.read()
    tree = ast.parse(source, str(path))
    lines = source.split("\n")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            row, column = token.start
            lines[row - 1] = lines[row - 1][:column]
    remarks = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Expr)
        and isinstance(node.value, ast.Constant)
        and isinstance(node.value.value, str)
    ]
    settings = [
        node
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        and ast.unparse(getattr(node, "target", None) or node.targets[0]) in ("RECIPE", "PUBLISHED")
    ]
    for node in sorted([*remarks, *settings], key=lambda node: (-node.lineno, -node.col_offset)):
        first, last = node.lineno - 1, node.end_lineno - 1
        # Columns are counted in bytes of UTF-8.
        before = lines[first].encode()[: node.col_offset].decode()
        after = lines[last].encode()[node.end_col_offset :].decode()
        lines[first : last + 1] = [before + after]
    return tree, "\n".join(line.rstrip() for line in lines if line.strip())
