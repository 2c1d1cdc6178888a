"""How images become shards: the run file's section, checked."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from pipeline.choose import choose
from pipeline.data import images, storage
from pipeline.data.manifest import ImageSpec

SHARD_BYTES = 64 << 20
MOST_SAMPLES = 8192
PLACES = ("source", "url", "image_root", "removals", "mixture")  # do not change what is made of an image
DUPLICATES = {"keep": "count them", "drop": "readers leave out all but the first"}


@dataclass(frozen=True)
class ShardConfig:
    """How images become shards."""

    source: Annotated[str, "folder or s3:// prefix of images (sub-folders are classes), or of .tar or .parquet files"]
    url: Annotated[str, "where the set goes, a folder or s3:// prefix; more images there later give a new version"]
    image_size: Annotated[int, "side of the square images, pixels"] = 64
    channels: Annotated[int, "1 grey, 3 RGB"] = 3
    encoding: Annotated[str, "png, webp (smaller, lossless), jpg (lossy), or raw (pixels, for tiny images)"] = "png"
    quality: Annotated[int, "of jpg, 1 to 100"] = 95
    resize: Annotated[str, "centre-crop, squash, or exact (refuse other sizes)"] = "centre-crop"
    classes: Annotated[bool, "take classes: the first sub-folder, or what class_field names"] = True
    class_field: Annotated[str, "tar: suffix of the class member [cls]; Parquet: column of the class [label]"] = ""
    tags_field: Annotated[str, "tar: suffix of a JSON list of tags; Parquet: column of lists; empty: no tags"] = ""
    caption_field: Annotated[str, "tar: suffix of the caption, such as txt; Parquet: column; empty: no captions"] = ""
    image_field: Annotated[str, "Parquet: column of image bytes or URLs; empty: image, jpg, png, webp, url"] = ""
    image_root: Annotated[str, "Parquet: where image URLs must lie, a folder or s3:// prefix; empty: the source"] = ""
    held_out: Annotated[float, "fraction of images held out, chosen by content"] = 0.1
    duplicates: Annotated[str, "exact copies (equal pixels): keep, or drop"] = "keep"
    removals: Annotated[str, "file with a sha256 a line: these images are left out from the next version on"] = ""
    mixture: Annotated[
        dict[str, float], "instead of a source: finished sets by URL with weights; url becomes their mixture"
    ] = field(default_factory=dict)
    samples_per_shard: Annotated[int, "images a shard; 0: as many as give about 64 MiB of pixels"] = 0
    max_image_bytes: Annotated[int, "largest encoded image read, bytes"] = 64 << 20
    max_image_pixels: Annotated[int, "largest image decoded, pixels"] = 64_000_000

    def __post_init__(self) -> None:
        storage.parse(self.url)
        if not self.mixture:
            storage.parse(self.source)
        for name in ("image_root", "removals"):
            if getattr(self, name):
                storage.parse(getattr(self, name))
        if not 1 <= self.image_size <= 4096:
            raise ValueError(f"image_size must be 1 to 4096 pixels; got {self.image_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {self.channels}")
        choose(images.ENCODERS, self.encoding, "encoding")
        choose(images.POLICIES, self.resize, "resize policy")
        choose(DUPLICATES, self.duplicates, "duplicates policy")
        if not 1 <= self.quality <= 100:
            raise ValueError(f"quality must be 1 to 100; got {self.quality}")
        if not 0.0 <= self.held_out < 1.0:
            raise ValueError(f"held_out must be a fraction, 0 <= held_out < 1; got {self.held_out}")
        for name, least in (("samples_per_shard", 0), ("max_image_bytes", 1), ("max_image_pixels", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"{name} must be at least {least}; got {getattr(self, name)}")

    @property
    def image(self) -> ImageSpec:
        """What every sample of the set is."""
        return ImageSpec(self.image_size, self.channels, self.encoding)

    @property
    def limits(self) -> images.Limits:
        """What an image may be before it is decoded."""
        return images.Limits(self.max_image_bytes, self.max_image_pixels)

    @property
    def slice_size(self) -> int:
        """Source images a slice, and the most samples a shard."""
        return self.samples_per_shard or min(MOST_SAMPLES, max(64, SHARD_BYTES // self.image.bytes))

    @property
    def policy(self) -> dict[str, Any]:
        """Everything that decides what is made from given sources."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in PLACES} | {
            "samples_per_shard": self.slice_size
        }
