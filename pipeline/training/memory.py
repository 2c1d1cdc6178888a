"""Whether a logical shard fits in memory, found out before the first step."""

import gc

import torch
import torch.distributed

from pipeline.data.reading.stream import Batch
from pipeline.diffusion.randomness import StepKey
from pipeline.training import hardware
from pipeline.training.restore import RunError
from pipeline.training.step import Place, TrainingModule, backward

# what torch and oneDNN say on a CPU
EXHAUSTED = ("can't allocate memory", "bad_alloc", "could not create a ", "could not execute a primitive")


def fits(module: TrainingModule, batch: Batch, key: StepKey, place: Place, images: int) -> bool:
    """Whether the first `images` of the batch go forward and backward; leaves no gradient."""
    part = batch.first(images)
    try:
        backward(module, [part], [key], place)
        hardware.finish(place.device)
    except (torch.OutOfMemoryError, MemoryError):
        return False
    except RuntimeError as error:
        if not any(text in str(error) for text in EXHAUSTED):
            raise
        return False
    finally:
        module.zero_grad(set_to_none=True)
        gc.collect()  # tensors that a traceback held
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
    return True


def check_memory(module: TrainingModule, batch: Batch, key: StepKey, place: Place, batch_size: int) -> None:
    """One forward and backward pass at full shape; where it does not fit, the largest number of images that does is
    found by trying. Every rank must come here.

    Raises:
        RunError: on every rank, where it does not fit on some rank; names that number and what to set.
    """
    images = len(batch.images)
    most = images if fits(module, batch, key, place, images) else 0
    if most < images:
        least_bad = images
        while least_bad - most > 1:
            middle = (most + least_bad) // 2
            most, least_bad = (middle, least_bad) if fits(module, batch, key, place, middle) else (most, middle)
    box = torch.tensor([most], device=place.device)
    if place.world > 1:
        torch.distributed.all_reduce(box, op=torch.distributed.ReduceOp.MIN)
    most = int(box)
    if most == images:
        return
    shards = next(
        (n for n in range(key.shards, batch_size + 1) if batch_size % n == 0 and batch_size // n <= most), None
    )
    mend = "" if shards is None else f"set stream.logical_shards to {shards} ({batch_size // shards} images a shard), "
    raise RunError(
        f"out of memory: a logical shard of {images} images does not fit in this {place.device.type}'s memory, "
        f"{most} do: {mend}training.checkpoint_activations: true, or a smaller network"
    )
