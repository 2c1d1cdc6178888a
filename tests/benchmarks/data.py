"""Reading shards against the decoder alone and other readers: `python -m tests.benchmarks.data [--json FILE]`; with
--ray the same stream read by one and by two Ray tasks at a time for two workers, in wall time, and Ray Data beside it.

32x32 PNG, 64x64 JPEG and 32x32 raw pixels in tars, page cache warm, one core, every line ending in uint8 batches of
128 images (our stream verifies all bytes); and 32x32 PNG that OpenCV wrote, which our stream, too, decodes by OpenCV.
The readers take turns; a rate is images over process CPU time. The record is JSON with medians, ratios and the
machine; each of the two commands keeps the other's part of FILE. Readers that are not installed are left out.
"""

import argparse
import contextlib
import importlib
import importlib.util
import json
import os
import shutil
import statistics
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import simplejpeg
import torch

from jobs.benchmark.step import machine
from pipeline.data.config import StreamConfig
from pipeline.data.formats import codecs
from pipeline.data.making.shards import ShardConfig, shard_in_process
from pipeline.data.reading.stream import Stream, steps_a_block, thread_stream
from pipeline.data.sets.manifest import Manifest

BATCH = 128
READERS = 2
Reader = Callable[[], int]


def one_core() -> None:
    """Holds this process to one core and every library to one thread."""
    os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    cv2.setNumThreads(1)
    torch.set_num_threads(1)


def write_crops(folder: Path, count: int, size: int) -> None:
    """PNG crops of scikit-learn's two photographs, in ten classes."""
    from sklearn.datasets import load_sample_images

    photos, draw = load_sample_images().images, np.random.default_rng(0)
    for i in range(count):
        photo = photos[int(draw.integers(2))]
        top, left = (int(draw.integers(n - size)) for n in photo.shape[:2])
        place = folder / str(i % 10)
        place.mkdir(parents=True, exist_ok=True)
        cv2.imwrite(str(place / f"{i:06d}.png"), photo[top : top + size, left : left + size])


def members(done: Manifest) -> Iterator[tuple[bytes, bytes]]:
    """Encoded image and class of every sample."""
    for url in done.shards["url"].to_pylist():
        with tarfile.open(Path(done.url, url)) as file:
            image = b""
            for member in file:
                opened = file.extractfile(member)
                assert opened is not None
                if member.name.endswith(".cls"):
                    yield image, opened.read()
                else:
                    image = opened.read()


def ours(done: Manifest) -> Reader:
    """An epoch of our stream, one thread; the memory of shards holds little more than a window, so that all bytes are
    read and verified in every epoch.
    """
    sizes = done.split("train").sizes
    assert len(sizes) >= 10  # several windows: nothing is kept from one epoch to the next
    config = StreamConfig(
        done.url,
        batch_size=BATCH,
        logical_shards=1,
        readers=1,
        window=2,
        read_ahead_bytes=4096 * done.image.bytes,
        cache_bytes=int(5 * sizes.max()),
    )
    a_block = steps_a_block(config, done, 1)
    steps = done.split("train").total // BATCH // a_block * a_block  # the same work in every turn
    source = thread_stream(config, done, [0])

    def run() -> int:
        count = sum(len(batch.images) for batch in islice(source, steps))
        for handle in source.under_way:  # what is read ahead is work of this turn, as the last turn's was of that
            source.readers.result(handle)
        return count

    run()
    return run


def own_decoder(encoded: list[bytes], size: int) -> Reader:
    """Our decoder of images that lie in memory, and nothing else."""
    payloads = [memoryview(data) for data in encoded]
    out = codecs.room((BATCH, size, size, 3))

    def run() -> int:
        for first in range(0, len(payloads), BATCH):
            some = payloads[first : first + BATCH]
            codecs.decode_own(some, out[: len(some)])
        return len(payloads)

    return run


def webdataset(done: Manifest, suffix: str) -> Reader:
    """webdataset as it comes: decode("rgb8") for images, its own decoder for .npy."""
    from webdataset.compat import WebDataset

    urls = [str(Path(done.url, url)) for url in done.shards["url"].to_pylist()]

    def run() -> int:
        dataset: Any = WebDataset(urls, shardshuffle=False).decode("rgb8").to_tuple(suffix, "cls")
        count, held = 0, []
        for image, _ in dataset:
            held.append(image)
            if len(held) == BATCH:
                count += len(torch.from_numpy(np.stack(held)))
                held = []
        return count + len(held)

    return run


def litdata(folder: Path, encoded: list[bytes], decode: str) -> Reader:
    """litdata's optimized format; decoded by Pillow (its own way) or by cv2."""
    reading, writing = importlib.import_module("litdata"), importlib.import_module("litdata.streaming")
    cache: Any = writing.Cache(input_dir=str(folder), chunk_bytes="16MB")
    for i, data in enumerate(encoded):
        cache[i] = {"image": data, "label": i % 10}
    cache.done()
    cache.merge()

    def run() -> int:
        count, held = 0, []
        for sample in reading.StreamingDataset(str(folder)):
            held.append(_pixels(sample["image"], decode))
            if len(held) == BATCH:
                count += len(torch.from_numpy(np.stack(held)))
                held = []
        return count + len(held)

    return run


def mosaic(folder: Path, encoded: list[bytes]) -> Reader:
    """mosaicml-streaming: MDS of encoded bytes, decoded by Pillow as its own image encodings are."""
    streaming: Any = importlib.import_module("streaming")
    with streaming.MDSWriter(out=str(folder), columns={"image": "bytes", "label": "int"}) as out:
        for i, data in enumerate(encoded):
            out.write({"image": data, "label": i % 10})

    def run() -> int:
        count, held = 0, []
        for sample in streaming.StreamingDataset(local=str(folder), batch_size=BATCH, shuffle=False):
            held.append(_pixels(sample["image"], "pillow"))
            if len(held) == BATCH:
                count += len(torch.from_numpy(np.stack(held)))
                held = []
        return count + len(held)

    return run


def _pixels(data: bytes, decode: str) -> np.ndarray[Any, Any]:
    if decode == "cv2":
        return np.asarray(cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB))
    import io

    from PIL import Image

    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def decoders(encoded: list[bytes], kind: str) -> dict[str, Reader]:
    """Every decoder at hand, alone."""

    def looped(one: Callable[[bytes], Any]) -> Reader:
        return lambda: sum(1 for data in encoded if one(data) is not None)

    found = {name: looped(lambda data, name=name: _pixels(data, name)) for name in ("cv2", "pillow")}
    if kind == "jpg":
        found["simplejpeg"] = looped(simplejpeg.decode_jpeg)
    if importlib.util.find_spec("pyvips"):
        pyvips: Any = importlib.import_module("pyvips")
        found["pyvips"] = looped(lambda data: pyvips.Image.new_from_buffer(data, "").numpy())
    return found


def rates(readers: dict[str, Reader], rounds: int) -> dict[str, float]:
    """Images a second of CPU time, medians of interleaved rounds after one that does not count."""
    seen: dict[str, list[float]] = {name: [] for name in readers}
    for turn in range(rounds + 1):
        for name, run in readers.items():
            began = time.process_time()
            count = run()
            if turn:
                seen[name].append(count / (time.process_time() - began))
    return {name: statistics.median(values) for name, values in seen.items()}


@contextlib.contextmanager
def opencv_writes() -> Iterator[None]:
    """Sets that are made meanwhile hold OpenCV's PNGs."""
    ours = codecs.ENCODERS["png"]
    codecs.ENCODERS["png"] = lambda pixels, _: cv2.imencode(".png", pixels[:, :, ::-1])[1].tobytes()
    try:
        yield
    finally:
        codecs.ENCODERS["png"] = ours


def read_rates(kind: str, folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Rates of all readers of one kind of set: png, jpg or raw."""
    size = 64 if kind == "jpg" else 32
    write_crops(folder / "images", count, size)
    done = shard_in_process(
        ShardConfig(
            str(folder / "images"),
            str(folder / "set"),
            image_size=size,
            encoding=kind,
            quality=90,
            held_out=0.0,
            samples_per_shard=1000,
        )
    )
    readers = {"ours": ours(done), "webdataset": webdataset(done, "npy" if kind == "raw" else kind)}
    if kind != "raw":
        encoded = [image for image, _ in members(done)]
        readers["own decoder alone"] = own_decoder(encoded, size)
        if importlib.util.find_spec("litdata"):
            readers["litdata"] = litdata(folder / "litdata", encoded, "pillow")
            readers["litdata, cv2"] = litdata(folder / "litdata-cv2", encoded, "cv2")
        if importlib.util.find_spec("streaming"):
            readers["mosaicml-streaming"] = mosaic(folder / "mds", encoded)
        readers |= {f"{name} alone": run for name, run in decoders(encoded, kind).items()}
    return rates(readers, rounds)


def foreign_rates(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Rates of PNGs that OpenCV wrote."""
    with opencv_writes():
        found = read_rates("png", folder, count, rounds)
    found.pop("own decoder alone")
    return found


def shard_rates(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Sharding 64x64 photographs down to 32x32 PNG, against a plain loop of Pillow and webdataset.TarWriter."""
    from PIL import Image
    from webdataset.writer import TarWriter

    write_crops(folder / "images", count, 64)
    paths = sorted((folder / "images").rglob("*.png"))

    def job() -> int:
        shutil.rmtree(folder / "set", ignore_errors=True)
        shard_in_process(
            ShardConfig(
                str(folder / "images"), str(folder / "set"), image_size=32, held_out=0.0, samples_per_shard=1000
            )
        )
        return count

    def loop() -> int:
        for first in range(0, count, 1000):
            with TarWriter(str(folder / f"plain-{first}.tar")) as out:
                for number, path in enumerate(paths[first : first + 1000], first):
                    image = Image.open(path).convert("RGB").resize((32, 32), Image.Resampling.LANCZOS)
                    out.write({"__key__": f"{number:08d}", "png": image, "cls": int(path.parent.name)})
        return count

    return rates({"ours": job, "plain loop": loop}, rounds)


def ray_rates(folder: Path, count: int, rounds: int) -> dict[str, float]:
    """Images a second of wall time at two workers: read by one task at a time and by two, and by Ray Data;
    medians of interleaved rounds."""
    write_crops(folder / "images", count, 32)
    config = ShardConfig(
        str(folder / "images"), str(folder / "set"), image_size=32, held_out=0.0, samples_per_shard=1000
    )
    done = shard_in_process(config)
    settings = StreamConfig(done.url, batch_size=2 * BATCH, logical_shards=2, window=2)
    steps = 6 * (count // settings.batch_size)
    os.environ |= {"RAY_AUTH_MODE": "disabled", "OMP_NUM_THREADS": "1", "RAY_worker_niceness": "0"}
    import ray

    ray.init(address="local", num_cpus=READERS, include_dashboard=False, log_to_driver=False)
    seen: dict[str, list[float]] = {"in process": [], "1 reader tasks": [], f"{READERS} reader tasks": []}
    for _ in range(rounds):
        seen["in process"].append(in_process(settings, done, steps))
        for readers in (1, READERS):  # at a time, of both workers together
            chosen = replace(settings, readers=readers, reader_cpus=READERS / readers)
            seen[f"{readers} reader tasks"].append(through_ray(chosen, done, steps))
    found = {name: statistics.median(values) for name, values in seen.items()} | {"Ray Data": ray_data(done, count)}
    ray.shutdown()
    inside, one, more = (statistics.median(values) for values in seen.values())
    return found | {"1 reader / in process": one / inside, f"{READERS} readers / 1": more / one}


class Consumer:
    """A worker that takes batches of some logical shards and does nothing with them."""

    def __init__(self, make: Callable[..., Stream], settings: StreamConfig, done: Manifest, parts: list[int]) -> None:
        self.source = make(settings, done, parts)

    def run(self, steps: int) -> tuple[int, float, float]:
        """How many images came, and from when to when."""
        began = time.time()
        return sum(len(batch.images) for batch in islice(self.source, steps)), began, time.time()

    def close(self) -> None:
        """Ends the reading ahead."""
        self.source.close()


def in_process(settings: StreamConfig, done: Manifest, steps: int) -> float:
    """By one thread, in this process."""
    consumer = Consumer(thread_stream, replace(settings, readers=1), done, [0, 1])
    consumer.run(steps // 4)
    count, began, ended = consumer.run(2 * steps)
    consumer.close()
    return count / (ended - began)


def through_ray(settings: StreamConfig, done: Manifest, steps: int) -> float:
    """Two workers, each with a logical shard of its own; all processes have started before the clock does."""
    import ray

    from pipeline.cluster.feed import ray_stream

    actor: Any = ray.remote(Consumer).options(num_cpus=0)
    workers = [actor.remote(ray_stream, settings, done, [place]) for place in (0, 1)]
    ray.get([worker.run.remote(steps // 4) for worker in workers])
    counts, began, ended = zip(*ray.get([worker.run.remote(steps) for worker in workers]), strict=True)
    ray.get([worker.close.remote() for worker in workers])
    return sum(counts) / (max(ended) - min(began))


def ray_data(done: Manifest, count: int) -> float:
    """`ray.data.read_webdataset`, decoded by its own decoder."""
    import ray.data

    urls = [str(Path(done.url, url)) for url in done.shards["url"].to_pylist()]
    began, seen = time.perf_counter(), 0
    while seen < count:
        rows: Any = ray.data.read_webdataset(urls, decoder="rgb8")
        for batch in rows.iter_batches(batch_size=BATCH, batch_format="numpy"):
            seen += len(torch.from_numpy(np.stack(list(batch["png"]))))
    return seen / (time.perf_counter() - began)


def measure(count: int, rounds: int) -> dict[str, Any]:
    """All rates of one core."""
    one_core()
    with tempfile.TemporaryDirectory(prefix="raydiffusion-benchmark-") as folder:
        found: dict[str, Any] = {
            kind: read_rates(kind, Path(folder, kind), count, rounds) for kind in ("png", "jpg", "raw")
        }
        found["png by OpenCV"] = foreign_rates(Path(folder, "foreign"), count, rounds)
        found["shard"] = shard_rates(Path(folder, "shard"), count // 4, rounds)
    for values in found.values():
        values |= {f"ours / {name}": values["ours"] / rate for name, rate in values.items() if name != "ours"}
    return found | {"images": count, "rounds": rounds}


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--count", type=int, default=12_000)
    arguments.add_argument("--rounds", type=int, default=7)
    arguments.add_argument("--ray", action="store_true")
    arguments.add_argument("--json", type=Path, help="file for the record")
    args = arguments.parse_args()
    facts = machine("cpu") | {"opencv": cv2.__version__}
    if args.ray:
        with tempfile.TemporaryDirectory(prefix="raydiffusion-benchmark-") as folder:
            found = {"ray": ray_rates(Path(folder), args.count, args.rounds) | {"machine": facts}}
    else:
        found = {"one core": measure(args.count, args.rounds) | {"machine": facts}}
    if args.json is not None:
        before = json.loads(args.json.read_text()) if args.json.exists() else {}
        args.json.write_text(json.dumps(before | found, indent=1) + "\n")
    print(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
