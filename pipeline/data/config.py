"""What is made of images and what a training reads of them: the run file's sections `shard` and `stream`, checked."""

from dataclasses import dataclass, field, fields
from typing import Annotated, Any

from pipeline import storage
from pipeline.choose import choose
from pipeline.data.formats import codecs, fit, headers
from pipeline.data.sets.manifest import ImageSpec
from pipeline.ranges import Range, check
from pipeline.size import settled, sides


@dataclass(frozen=True)
class StreamConfig:
    """What the training stream reads and how far ahead."""

    url: Annotated[str, "the shard set, a folder or s3:// prefix"]
    batch_size: Annotated[int, "images of the global batch, over all workers", Range(ge=1)] = 128
    logical_shards: Annotated[
        int, "parts of the global batch, fixed for a run whatever the number of workers", Range(ge=1)
    ] = 2
    window: Annotated[int, "tar shards shuffled together", Range(ge=1)] = 8
    seed: Annotated[int, "of order and augmentation"] = 0
    flip: Annotated[float, "probability of mirroring an image left to right", Range(ge=0, le=1)] = 0.0
    readers: Annotated[int, "threads, or Ray tasks at a time, a worker", Range(ge=1)] = 2
    reader_cpus: Annotated[float, "CPUs a Ray reader task asks for", Range(ge=0)] = 0.25
    read_ahead_bytes: Annotated[int, "decoded bytes read ahead, a worker", Range(ge=1)] = 256 << 20
    cache_bytes: Annotated[
        int,
        "verified shard bytes a reading process keeps; at best window x shard size x logical shards of a worker",
        Range(ge=0),
    ] = 512 << 20
    disk_cache_bytes: Annotated[
        int, "shard bytes a node keeps on disk (in TMPDIR) for all its readers of sets on S3; 0: none", Range(ge=0)
    ] = 16 << 30
    on_damage: Annotated[
        str, "damaged shard: fail, or quarantine (use its whole samples; others of the window stand in for the rest)"
    ] = "fail"
    removals: Annotated[
        str, "file with a sha256 a line: these images are not read any more, others stand in; empty: none"
    ] = ""

    def __post_init__(self) -> None:
        check(self)
        if self.batch_size % self.logical_shards:
            raise ValueError(
                f"batch_size must be a multiple of logical_shards; got {self.batch_size} and {self.logical_shards}"
            )
        choose(ON_DAMAGE, self.on_damage, "on_damage")

    @property
    def shard_batch(self) -> int:
        """Samples of one logical shard a step, b = B / L."""
        return self.batch_size // self.logical_shards


SHARD_BYTES = 64 << 20
MOST_SAMPLES = 8192
KEYS = {"first-dot": "WebDataset's rule", "last-dot": "every image by itself"}
LATER = ("key", "image")  # settings that older sets do not know: part of a policy where they are not as usual
PLACES = ("source", "url", "image_root", "removals", "mixture", "kind")  # do not change what is made of an image
ON_DAMAGE = {"fail": "end the run", "quarantine": "go on with the whole samples of a damaged shard"}
DUPLICATES = {"keep": "count them", "drop": "readers leave out all but the first"}


@dataclass(frozen=True)
class ShardConfig:
    """How images become shards."""

    source: Annotated[str, "folder or s3:// prefix of images (sub-folders are classes), or of .tar or .parquet files"]
    url: Annotated[str, "where the set goes, a folder or s3:// prefix; more images there later give a new version"]
    image_size: Annotated[int | tuple[int, int], "image height and width, pixels: 64, or [height, width]"] = 64
    channels: Annotated[int, "1 grey, 3 RGB"] = 3
    encoding: Annotated[str, "png, webp (smaller, lossless), jpg (lossy), or raw (pixels, for tiny images)"] = "png"
    quality: Annotated[int, "of jpg, 1 to 100", Range(ge=1, le=100)] = 95
    resize: Annotated[str, "centre-crop, squash, or exact (refuse other sizes)"] = "centre-crop"
    classes: Annotated[bool, "take classes: the first sub-folder, or what class_field names"] = True
    class_field: Annotated[str, "tar: suffix of the class member [cls]; Parquet: column of the class [label]"] = ""
    tags_field: Annotated[str, "tar: suffix of a JSON list of tags; Parquet: column of lists; empty: no tags"] = ""
    caption_field: Annotated[str, "tar: suffix of the caption, such as txt; Parquet: column; empty: no captions"] = ""
    image_field: Annotated[str, "Parquet: column of image bytes or URLs; empty: image, jpg, png, webp, url"] = ""
    image_root: Annotated[str, "Parquet: where image URLs must lie, a folder or s3:// prefix; empty: the source"] = ""
    held_out: Annotated[float, "fraction of images held out, chosen by content", Range(ge=0, lt=1)] = 0.1
    duplicates: Annotated[str, "exact copies (equal pixels): keep, or drop"] = "keep"
    removals: Annotated[str, "file with a sha256 a line: these images are left out from the next version on"] = ""
    mixture: Annotated[
        dict[str, float], "instead of a source: finished sets by URL with weights; url becomes their mixture"
    ] = field(default_factory=dict)
    samples_per_shard: Annotated[int, "images a shard; 0: as many as give about 64 MiB of pixels", Range(ge=0)] = 0
    max_image_bytes: Annotated[int, "largest encoded image read, bytes", Range(ge=1)] = 64 << 20
    max_image_pixels: Annotated[int, "largest image decoded, pixels", Range(ge=1)] = 64_000_000
    kind: Annotated[str, "of a source with files of several kinds: images, tars or tables; empty: what is there"] = ""
    key: Annotated[
        str,
        "tar: members of one sample share their name up to the first-dot of the base name (WebDataset's rule), "
        "or up to the last-dot (every image by itself)",
    ] = "first-dot"
    image: Annotated[str, "tar: suffix of the image member where a key has several, such as left.png; empty: any"] = ""

    def __post_init__(self) -> None:
        storage.parse(self.url)
        if not self.mixture:
            storage.parse(self.source)
        for name in ("image_root", "removals"):
            if getattr(self, name):
                storage.parse(getattr(self, name))
        check(self)
        object.__setattr__(self, "image_size", settled(self.image_size, "image_size"))
        if max(sides(self.image_size)) > 4096:
            raise ValueError(f"image_size must be 1 to 4096 pixels; got {self.image_size}")
        if self.channels not in (1, 3):
            raise ValueError(f"channels must be 1 (grey) or 3 (RGB); got {self.channels}")
        choose(codecs.ENCODERS, self.encoding, "encoding")
        choose(fit.POLICIES, self.resize, "resize policy")
        choose(DUPLICATES, self.duplicates, "duplicates policy")
        choose(KEYS, self.key, "key rule")

    @property
    def spec(self) -> ImageSpec:
        """What every sample of the set is."""
        return ImageSpec(self.image_size, self.channels, self.encoding)

    @property
    def limits(self) -> headers.Limits:
        """What an image may be before it is decoded."""
        return headers.Limits(self.max_image_bytes, self.max_image_pixels)

    @property
    def slice_size(self) -> int:
        """Source images a slice, and the most samples a shard."""
        return self.samples_per_shard or min(MOST_SAMPLES, max(64, SHARD_BYTES // self.spec.bytes))

    @property
    def policy(self) -> dict[str, Any]:
        """Everything that decides what is made from given sources."""
        decides = [f for f in fields(self) if f.name not in PLACES]
        said = {
            f.name: getattr(self, f.name) for f in decides if f.name not in LATER or getattr(self, f.name) != f.default
        }
        size = self.image_size if isinstance(self.image_size, int) else list(self.image_size)  # as JSON reads it back
        return said | {"image_size": size, "samples_per_shard": self.slice_size}
