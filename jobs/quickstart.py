"""The whole run on real images: shard, train, evaluate, register, serve, report.

scikit-learn's bundled digits become a folder of PNG files, shards, a trained class-conditional diffusion model, a model version and an
endpoint, each through the job a user would call. Run it again and it continues: finished stages are verified and kept.
"""

from pathlib import Path

from pipeline.data import images


def write_digits(folder: Path) -> int:
    """scikit-learn's digits (1,797 scans, 8x8, 17 grey levels) as FOLDER/CLASS/NNNN.png, 0..16 spread over 0..255; returns how many."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    if folder.exists():
        return len(digits.images)
    pixels = (digits.images * (255 / 16)).round().astype("uint8")
    building = folder.with_name(folder.name + ".building")
    for index, (image, label) in enumerate(zip(pixels, digits.target, strict=True)):
        path = building / str(label) / f"{index:04d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(images.encode_png(image[:, :, None]))
    building.rename(folder)  # the folder appears whole or not at all
    return len(pixels)
