"""From a bucket of images to autoscaled sampling and likelihood endpoints for diffusion models.

import pipeline
model = pipeline.load("models:/digits@champion")
images = model.sample(16)
print(model.bits_per_dim(images).bits_per_dim)
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pipeline.model import Model

__version__ = "0.1.0"


def load(url: str, *, device: str = "cpu", tracking_uri: str | None = None) -> "Model":
    """A trained model, verified against its digests.

    url: `models:/NAME@alias` or `models:/NAME/VERSION` in the MLflow registry, a model directory or a run's output
    (local path or s3://). Of a run that has not ended it is the newest checkpoint; the card's `complete` says so.
    device: where the network runs; tracking_uri: the registry's server or database (default: MLflow's own setting).

    Raises:
        ValueError: no such version, or files that do not match their digests.
    """
    from pipeline import storage
    from pipeline.model import FILES
    from pipeline.model import load as load_directory

    if not url.startswith("models:/"):
        if not storage.exists(storage.join(url, FILES[1])):  # no model directory: sampling one loads no data plane
            from pipeline import trained

            if trained.is_output(url):
                return trained.load(url, device)
        return load_directory(url, device)
    from pipeline.tracking.registry import files

    with files(url, tracking_uri=tracking_uri) as folder:
        return load_directory(folder, device)
