"""Exported networks: .onnx files made by tools.export, run by ONNX Runtime.

exported = Exported("model_3_int8.onnx")
probabilities = exported(images)        # uint8 (N, 32, 32, 3) to float32 (N, 10)
"""

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from tqdm import tqdm

from errors import UsageError

INPUT, OUTPUT = "images", "probabilities"
BATCH = 500  # images


class NotInstalledError(UsageError):
    """Packages that only exported networks need."""


@contextlib.contextmanager
def needed() -> Iterator[None]:
    """Imports within it that may fail.

    Raises:
        NotInstalledError: says in a line what to install.
    """
    try:
        yield
    except ImportError as error:
        raise NotInstalledError(
            f"ONNX needs {error.name or error}; pip install -r requirements-export.txt"
        ) from None


class Exported:
    """A network in an .onnx file: it takes pixels, and gives probabilities.

    Fields: `file`; `settings`, its metadata: network, parameters, classes, mean, std, accuracy in
    percent and what it was evaluated on, the run's commit and val_split, ...

    Args:
        file: its path, or its content.
        threads: for ONNX Runtime; 0 are all.

    Raises:
        UsageError: not there, damaged, or not made by tools.export.
        NotInstalledError: ONNX Runtime is not there.
    """

    def __init__(self, file: Path | bytes, threads: int = 0) -> None:
        with needed():
            import onnxruntime  # here: who asks for no .onnx file needs none of it
        self.file = file if isinstance(file, Path) else "what was exported"
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        if isinstance(file, Path) and not file.is_file():
            raise UsageError(f"{file} is not there; python -m tools.export RUN makes one")
        try:
            content = file if isinstance(file, bytes) else file.read_bytes()
            self.session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a dozen kinds of its own
            reason = " ".join(str(error).split())
            raise UsageError(f"{self.file} is no whole .onnx file: {reason:.200}") from None
        found = [
            (each.name, each.type, each.shape[1:])
            for each in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        wanted = [(INPUT, "tensor(uint8)", [32, 32, 3]), (OUTPUT, "tensor(float)", [10])]
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.settings = {name: json.loads(value) for name, value in metadata.items()}
        except ValueError:
            found = []
        if found != wanted or "network" not in self.settings:
            raise UsageError(
                f"{self.file} was not made by tools.export: wanted uint8 (N, 32, 32, 3) in and "
                "float32 (N, 10) out, with metadata"
            )

    @property
    def name(self) -> str:
        """The network's class."""
        return self.settings["network"]

    @property
    def precision(self) -> str:
        """Of its arithmetic: int8 or float32."""
        return "int8" if self.settings.get("quantised") else "float32"

    def __call__(self, images: np.ndarray, title: str = "") -> np.ndarray:
        """Probabilities float32 (N, 10) of images uint8 (N, 32, 32, 3), RGB.

        Args:
            title: of the progress bar; none without.
        """
        starts = range(0, len(images), BATCH)
        shown = tqdm(starts, desc=title, unit="batch", leave=False, disable=None if title else True)
        answers = [
            self.session.run([OUTPUT], {INPUT: images[start : start + BATCH]})[0] for start in shown
        ]
        return np.concatenate(answers) if answers else np.zeros((0, 10), np.float32)
