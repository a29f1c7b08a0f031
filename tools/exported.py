"""Exported networks: .onnx files made by tools.export, run by ONNX Runtime.

    exported = Exported("model_3_int8.onnx")
    probabilities = exported(images)

From uint8 (N, 32, 32, 3), RGB, to float32 (N, 10).
"""

import contextlib
import json
from pathlib import Path
from typing import Annotated

import numpy as np
from pydantic import BaseModel, Field, ValidationError
from tqdm import tqdm

import support.needed
from errors import UsageError, first_of

INPUT, OUTPUT = "images", "probabilities"
BATCH = 500  # images


def needed() -> contextlib.AbstractContextManager:
    """As support.needed, for ONNX."""
    return support.needed.needed("ONNX", "requirements-export.txt")


class Metadata(BaseModel, strict=True):
    """What is read of a file's metadata; a file may come from anybody."""

    network: Annotated[str, Field(pattern=r"^[A-Za-z_][A-Za-z0-9_]{0,99}$")]
    classes: list[str]
    quantised: dict | None = None
    val_split: Annotated[int, Field(gt=0, lt=50_000)] | None = None
    data_sha256: dict | None = None


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

    def __init__(self, file: str | Path | bytes, threads: int = 0) -> None:
        with needed():
            import onnxruntime  # here: who asks for no .onnx file needs none of it
        self.file = "what was exported" if isinstance(file, bytes) else Path(file)
        onnxruntime.set_default_logger_severity(4)
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads, options.log_severity_level = threads, 4
        if not isinstance(file, bytes) and not self.file.is_file():
            raise UsageError(f"{file} is no file; python -m tools.export RUN makes one")
        try:
            content = file if isinstance(file, bytes) else self.file.read_bytes()
            self.session = onnxruntime.InferenceSession(content, options, ["CPUExecutionProvider"])
        except Exception as error:  # ONNX Runtime has a dozen kinds of its own
            reason = " ".join(str(error).split())
            raise UsageError(f"{self.file} is no whole .onnx file: {reason:.200}") from None
        found = [
            (each.name, each.type, each.shape[1:])
            for each in (*self.session.get_inputs(), *self.session.get_outputs())
        ]
        if found != [(INPUT, "tensor(uint8)", [32, 32, 3]), (OUTPUT, "tensor(float)", [10])]:
            raise UsageError(
                f"{self.file} was not made by tools.export: wanted {INPUT}, uint8 (N, 32, 32, 3) "
                f"in, and {OUTPUT}, float32 (N, 10) out"
            )
        metadata = self.session.get_modelmeta().custom_metadata_map
        try:
            self.settings = {name: json.loads(value) for name, value in metadata.items()}
            Metadata.model_validate(self.settings)
        except ValidationError as error:
            raise UsageError(f"{self.file} is damaged: {first_of(error)} in its metadata") from None
        except (ValueError, RecursionError):
            raise UsageError(f"{self.file} is damaged: its metadata is no JSON") from None

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

        Raises:
            UsageError: it fails at them, or answers with something else.
        """
        starts = range(0, len(images), BATCH)
        quiet = None if title else True
        answers = [np.zeros((0, 10), np.float32)]
        for start in tqdm(starts, desc=title, unit="batch", leave=False, disable=quiet):
            batch = images[start : start + BATCH]
            try:
                (answer,) = self.session.run([OUTPUT], {INPUT: batch})
            except Exception as error:
                reason = " ".join(str(error).split())
                raise UsageError(f"{self.file} fails at pictures: {reason:.200}") from None
            sums = answer.sum(axis=1) if answer.shape == (len(batch), 10) else np.full(1, np.nan)
            if not (answer.min(initial=0) >= 0 and np.abs(sums - 1).max(initial=0) < 1e-3):
                raise UsageError(f"{self.file} answers with no probabilities: it is damaged")
            answers.append(answer)
        return np.concatenate(answers)
