"""A packed file as an MLflow model: ``mlflow.pyfunc.load_model("runs:/RUN/model").predict(images)``.

MLflow stores the name of this module beside ``model.fqs`` and calls ``_load_pyfunc`` when the model is loaded
(https://mlflow.org/docs/latest/python_api/mlflow.pyfunc.html, second workflow); fqsweep has to be installed there.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from fqsweep.errors import InputError
from fqsweep.quant.packed_model import load_model, read_notes
from fqsweep.quant.packing import read_metadata

BATCH = 64


class PackedClassifier:
    """Classifies images with the network of a packed file, on the CPU."""

    def __init__(self, blob: bytes) -> None:
        self.notes = read_notes(read_metadata(blob))
        self.network = load_model(blob)

    def predict(self, model_input: np.ndarray, params: dict[str, Any] | None = None) -> pd.DataFrame:
        """Probability of each class.

        Args:
            model_input: uint8, (images, side, side, 3), RGB, with the side in pixels that the network was trained
                at.

        Returns:
            One row an image, one column a class.

        Raises:
            InputError: the images have another type or size.
        """
        image_nhwc = np.asarray(model_input)
        side = self.notes.image_size
        if image_nhwc.dtype != np.uint8 or image_nhwc.shape[1:] != (side, side, 3):
            raise InputError(
                f"images must be uint8 of shape (number, {side}, {side}, 3), but are {image_nhwc.dtype} of shape "
                f"{image_nhwc.shape}: resize them first"
            )
        parts = [self._probabilities(image_nhwc[i : i + BATCH]) for i in range(0, len(image_nhwc), BATCH)]
        names = list(self.notes.class_names)
        return pd.DataFrame(np.concatenate(parts) if parts else np.empty((0, len(names))), columns=names)

    @torch.no_grad()
    def _probabilities(self, image_nhwc: np.ndarray) -> np.ndarray:
        mean, std = (
            torch.tensor(v).view(1, 3, 1, 1)
            for v in (self.notes.normalisation.mean, self.notes.normalisation.std)
        )
        pixel_nchw = torch.from_numpy(image_nhwc.copy()).permute(0, 3, 1, 2).float() / 255
        probability_nc: np.ndarray = self.network((pixel_nchw - mean) / std).softmax(dim=1).numpy()
        return probability_nc


def _load_pyfunc(path: str) -> PackedClassifier:
    """What MLflow calls, by this name, with the path of the stored file."""
    return PackedClassifier(Path(path).read_bytes())
