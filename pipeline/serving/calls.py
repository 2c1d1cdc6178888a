"""One network call for rows of many requests: joined, padded to exactly `rows`, answered, cut apart again.

The floats of a row are those of `procedure.answer_queries` with a chunk of this size. What a level comes to (the three
coefficients and what the network is told) is looked up, not computed, wherever a sampler knows its level as a number:
computed for eight rows it takes longer than all else that happens around a small network.
"""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from pipeline.diffusion.conditioning import Conditioning, concatenate
from pipeline.diffusion.denoiser import Denoiser, Prediction
from pipeline.diffusion.procedure import Answer, Query, answer_queries


def answer_at_once(
    networks: Mapping[str, Denoiser], queries: Sequence[Query], counts: Sequence[int], rows: int
) -> tuple[list[Answer], bool]:
    """The answers to queries of one kind, `counts` rows each and at most `rows` together, by one call on `rows` rows;
    and whether all in them is finite.

    Raises:
        ValueError: a network that the model has not.
    """
    if queries[0].probes is not None:
        answers = answer_queries(networks, queries, rows)
        return answers, all(map(finite, answers))
    name = queries[0].network
    if name not in networks:
        raise ValueError(f"this model has no network '{name}'; it has: {', '.join(networks)}")
    denoiser = networks[name]
    missing = rows - sum(counts)
    y, conditioning = _joined(queries, missing)
    prediction = _predict(denoiser, queries, counts, missing, y, conditioning)
    sizes = [*counts, missing] if missing else list(counts)
    x_hats = prediction.x_hat.split(sizes)
    variances = [None] * len(sizes) if prediction.variance is None else prediction.variance.split(sizes)
    answers = [Answer(x_hat, variance) for x_hat, variance in zip(x_hats, variances, strict=True)][: len(queries)]
    # one look at the sum of all; who it was is asked only then
    return answers, math.isfinite(float(prediction.x_hat.sum())) or all(map(finite, answers))


def finite(answer: Answer) -> bool:
    """Whether x_hat and the products hold neither NaN nor infinity."""
    whole = bool(torch.isfinite(answer.x_hat).all())
    return whole and (answer.products is None or bool(torch.isfinite(answer.products).all()))


def _joined(queries: Sequence[Query], missing: int) -> tuple[Tensor, Conditioning]:
    """All rows, the last one repeated `missing` times."""
    last = queries[-1]
    parts = [query.y for query in queries]
    told = [query.conditioning for query in queries]
    if missing:
        row = slice(last.y.shape[0] - 1, None)
        parts.append(last.y[row].expand(missing, *last.y.shape[1:]))
        if last.conditioning.label is not None:
            told.append(Conditioning(last.conditioning.label[row].expand(missing)))
    if len(parts) == 1:
        return parts[0], told[0]
    return torch.cat(parts), concatenate(told)


def _predict(
    denoiser: Denoiser,
    queries: Sequence[Query],
    counts: Sequence[int],
    missing: int,
    y: Tensor,
    conditioning: Conditioning,
) -> Prediction:
    """`Denoiser.forward` with the coefficients of `_coefficients`."""
    rows = _coefficients(denoiser, queries, counts, missing)
    c_in, c_skip, c_out, _ = rows.to(y.dtype).view(len(rows), 4, *[1] * (y.ndim - 1)).unbind(1)
    with torch.inference_mode():  # about 3% of a small network's time; nothing made in here leaves this function
        output = denoiser.network((c_in * y).to(denoiser.dtype), rows[:, 3].to(denoiser.dtype), conditioning)
    output, variance = denoiser._split(output)
    x_hat = torch.addcmul(c_skip * y, c_out, output.to(y.dtype))
    return Prediction(x_hat, None if variance is None else variance.clone())


def _coefficients(denoiser: Denoiser, queries: Sequence[Query], counts: Sequence[int], missing: int) -> Tensor:
    """c_in, c_skip, c_out and what the network is told of the level, float64 (rows, 4).

    A level that is known is always looked up, so that its row has the same bits whatever it is called with.
    """
    known = [None if query.shared is None else denoiser._coefficients(query.shared) for query in queries]
    device = queries[0].y.device
    found = [row if row is not None and row.level is not None else None for row in known]  # None: the schedule learns
    if None not in found:
        table = [row for row, count in zip(found, counts, strict=True) for _ in range(count)]
        return torch.tensor(table + table[-1:] * missing, dtype=torch.float64, device=device)
    gammas = [query.gamma for query in queries]
    if missing:
        gammas.append(gammas[-1][-1:].expand(missing))
    gamma = torch.cat(gammas).double()
    parameterization = denoiser.parameterization
    c_in, (c_skip, c_out) = denoiser.network_input(parameterization, gamma), parameterization.decode(gamma)
    rows, start = torch.stack([c_in, c_skip, c_out, denoiser.level(denoiser.schedule, gamma)], dim=1), 0
    for row, count in zip(found, counts, strict=True):
        if row is not None:
            rows[start : start + count] = torch.tensor(row, dtype=torch.float64, device=device)
        start += count
    return rows
