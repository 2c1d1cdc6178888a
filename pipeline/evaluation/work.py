"""Sampling and scoring cut into pieces that anyone may do, in any order: this process, or tasks of a cluster.

Where the cuts lie depends on the number of images alone, each piece is one procedure on exactly its rows, and every
image has its own seed: the answers are the same whoever does the pieces.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import key_seed
from pipeline.model import SCORED_TOGETHER, Model, Sampling, Scoring


@dataclass(frozen=True)
class SampleWork:
    """Make one image a seed; conditioning: what is asked of each."""

    seeds: tuple[int, ...]
    conditioning: Conditioning
    how: Sampling

    @property
    def images(self) -> int:
        return len(self.seeds)

    def run(self, model: Model) -> Tensor:
        """uint8 (n, C, H, W), on the CPU."""
        return model.space.decode(drive(model.sampling(self.seeds, self.conditioning, self.how), model.networks)).cpu()


@dataclass(frozen=True)
class ScoreWork:
    """Score pixels, uint8 (n, C, H, W), by network calls of exactly `chunk` rows."""

    pixels: Tensor
    seeds: tuple[int, ...]
    conditioning: Conditioning
    how: Scoring
    chunk: int = SCORED_TOGETHER

    @property
    def images(self) -> int:
        return len(self.seeds)

    def run(self, model: Model) -> Likelihood:
        """On the CPU."""
        scoring = model.scoring(self.pixels, self.seeds, self.conditioning, self.how)
        return drive(scoring, model.networks, self.chunk).to("cpu")


Work = SampleWork | ScoreWork
Result = Tensor | Likelihood


# Whoever does pieces of work with one model: yields (place in the list, result) as they are done, in any order.
Worker = Callable[[Sequence[Work]], Iterator[tuple[int, Result]]]


def here(model: Model) -> Worker:
    """In this process, one after the other."""

    def run(work: Sequence[Work]) -> Iterator[tuple[int, Result]]:
        for place, piece in enumerate(work):
            yield place, piece.run(model)

    return run


Progress = Callable[[int], None]  # images done so far


def finish(worker: Worker, work: Sequence[Work], progress: Progress | None = None) -> list[Result]:
    """All results, in the order of `work`.

    Raises:
        RuntimeError: the worker left a piece undone.
    """
    results: list[Result | None] = [None] * len(work)
    done = 0
    for place, result in worker(work):
        results[place] = result
        done += work[place].images
        if progress is not None:
            progress(done)
    finished = [result for result in results if result is not None]
    if len(finished) != len(work):
        raise RuntimeError(f"{len(work) - len(finished)} of {len(work)} pieces of work were left undone")
    return finished


def cuts(n: int, part: int) -> list[slice]:
    """0..n in pieces of `part`, the last one shorter."""
    return [slice(start, min(start + part, n)) for start in range(0, n, part)]


def sample_work(n: int, conditioning: Conditioning, how: Sampling, part: int, seed: int) -> list[SampleWork]:
    """n samples; image i depends on (seed, i) and on what is asked of it alone."""
    seeds = [key_seed("sample", seed, index) for index in range(n)]
    return [SampleWork(tuple(seeds[rows]), conditioning[rows], how) for rows in cuts(n, part)]


def score_work(
    pixels: Tensor, conditioning: Conditioning, how: Scoring, part: int, seed: int, chunk: int = SCORED_TOGETHER
) -> list[ScoreWork]:
    """pixels uint8 (n, C, H, W); image i's estimate depends on (seed, i) and the image alone."""
    seeds = [key_seed("score", seed, index) for index in range(len(pixels))]
    return [
        ScoreWork(pixels[rows], tuple(seeds[rows]), conditioning[rows], how, chunk) for rows in cuts(len(pixels), part)
    ]
