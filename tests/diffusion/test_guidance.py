"""Guidance and clipping change what a procedure is told, and nothing else."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline.diffusion.conditioning import NO_LABEL, Conditioning
from pipeline.diffusion.denoiser import Prediction
from pipeline.diffusion.guidance import Clip, autoguidance, classifier_free, clipped
from pipeline.diffusion.oracles.exact import diagonal_mixture
from pipeline.diffusion.procedure import Answer, Procedure, Query, drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.samplers import SAMPLERS
from tests.diffusion.sampler_cases import PROCESS, uniform_gamma

F64 = torch.float64
# each label is one component
CLASSES = diagonal_mixture([0.5, 0.5], [[-0.5, 0.0], [0.5, 0.2]], [[0.05, 0.1], [0.1, 0.02]])
WEAK = diagonal_mixture([0.5, 0.5], [[-0.3, 0.1], [0.4, 0.0]], [[0.2, 0.2], [0.2, 0.2]])
LABELS = Conditioning(torch.tensor([0, 1, NO_LABEL]))


def start() -> Tensor:
    return torch.randn(3, 2, generator=torch.Generator().manual_seed(1), dtype=F64) * 12


def sampler(name: str = "heun", conditioning: Conditioning = LABELS, **options: Any) -> Procedure[Tensor]:
    return SAMPLERS[name].start(PROCESS, start(), uniform_gamma(8), Noise(range(3)), conditioning, **options)


def test_scale_one_is_the_conditional_model_and_zero_the_unconditional_one() -> None:
    assert torch.allclose(drive(classifier_free(sampler(), 1.0), CLASSES), drive(sampler(), CLASSES), rtol=1e-12)
    unconditional = drive(sampler(conditioning=LABELS.unconditional()), CLASSES)
    assert torch.allclose(drive(classifier_free(sampler(), 0.0), CLASSES), unconditional, rtol=1e-12)
    assert torch.allclose(
        drive(autoguidance(sampler(), 1.0), {"main": CLASSES, "guide": WEAK}), drive(sampler(), CLASSES)
    )
    weak = drive(sampler(), WEAK)
    assert torch.allclose(drive(autoguidance(sampler(), 0.0), {"main": CLASSES, "guide": WEAK}), weak)


@pytest.mark.parametrize("scale", [0.5, 2.0, 7.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_guidance_is_sampling_with_the_extrapolated_answer(name: str, scale: float) -> None:
    """The inner procedure takes x_hat + (scale - 1)(x_hat - reference) and recomputes eps_hat from its own y."""

    def extrapolated(reference: Any) -> Any:
        def answer(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
            main = CLASSES(y, gamma, conditioning).x_hat
            other = reference(y, gamma, conditioning)
            return Prediction(other + scale * (main - other))

        return answer

    unlabelled = extrapolated(lambda y, gamma, conditioning: CLASSES.denoise(y, gamma))
    got = drive(classifier_free(sampler(name), scale), CLASSES)
    assert torch.allclose(got, drive(sampler(name), unlabelled), rtol=1e-9, atol=1e-9)
    weak = extrapolated(lambda y, gamma, conditioning: WEAK.denoise(y, gamma, conditioning.label))
    got = drive(autoguidance(sampler(name), scale), {"main": CLASSES, "guide": WEAK})
    assert torch.allclose(got, drive(sampler(name), weak), rtol=1e-9, atol=1e-9)


def test_each_query_becomes_one_of_twice_the_rows() -> None:
    plain, guided = sampler(), classifier_free(sampler(), 3.0)
    one, two = next(plain), next(guided)
    assert one.rows == 3
    assert two.rows == 6
    assert two.conditioning.label is not None
    assert two.conditioning.label.tolist() == [0, 1, -1, -1, -1, -1]
    assert two.shared == one.shared
    pair = autoguidance(sampler(), 3.0)
    first = next(pair)
    second = pair.send(Answer(torch.zeros(3, 2, dtype=F64)))
    assert [first.network, second.network] == ["main", "guide"]
    assert second.y is first.y


def test_products_and_variance_head_pass_through() -> None:
    """Guided likelihoods need the guided Jacobian; the variance head is the main answer's."""

    def procedure() -> Procedure[Answer]:
        y = torch.zeros(2, 3, dtype=F64)
        return (
            yield Query(y, torch.zeros(2, dtype=F64), Conditioning(torch.tensor([0, 1])), probes=torch.ones(4, 2, 3))
        )

    guided = classifier_free(procedure(), 3.0)
    query = next(guided)
    assert query.probes is not None
    assert query.probes.shape == (4, 4, 3)
    x_hat, variance, products = (torch.randn(*shape, dtype=F64) for shape in ((4, 3), (4, 3), (4, 4, 3)))
    with pytest.raises(StopIteration) as stop:
        guided.send(Answer(x_hat, variance, products))
    answer: Answer = stop.value.value
    assert answer.products is not None
    assert torch.allclose(answer.x_hat, x_hat[2:] + 3 * (x_hat[:2] - x_hat[2:]))
    assert torch.allclose(answer.products, products[:, 2:] + 3 * (products[:, :2] - products[:, 2:]))
    assert answer.variance is not None
    assert torch.equal(answer.variance, variance[:2])


def test_closing_the_outer_procedure_closes_the_inner_one() -> None:
    """A cancelled request leaves nothing behind."""
    closed: list[str] = []

    def procedure(name: str) -> Procedure[Tensor]:
        try:
            while True:
                yield Query(torch.zeros(1, 2), torch.zeros(1, dtype=F64), Conditioning(torch.tensor([0])))
        finally:
            closed.append(name)

    for name, wrap in (("free", classifier_free), ("auto", autoguidance)):
        guided = wrap(procedure(name), 2.0)
        next(guided)
        guided.close()
    limited = clipped(procedure("clip"), 1.0)
    next(limited)
    limited.close()
    assert closed == ["free", "auto", "clip"]


def test_clipping_comes_after_guidance() -> None:
    """The guided answer is what is clipped, so that a scale cannot leave the range."""
    seen: list[float] = []

    def spy(procedure: Procedure[Tensor]) -> Procedure[Tensor]:
        query = next(procedure)
        try:
            while True:
                answer = yield query
                seen.append(float(answer.x_hat.abs().max()))
                query = procedure.send(answer)
        except StopIteration as stop:
            return stop.value

    assert float(drive(classifier_free(spy(sampler("ddim", clip=0.8)), 9.0), CLASSES).abs().max()) <= 0.8
    assert max(seen) > 0.8


def test_no_clip_is_the_procedure_itself() -> None:
    procedure = sampler()
    assert clipped(procedure, None) is procedure
    procedure.close()


@pytest.mark.parametrize(
    ("limit", "percentile", "message"),
    [
        (0.0, None, "clip must be above 0"),
        (math.nan, None, "clip must be above 0 and finite"),
        (1.0, 0.0, "percentile must be above 0 and at most 1"),
        (1.0, 1.5, "percentile must be above 0 and at most 1"),
    ],
)
def test_bad_clips_are_refused(limit: float, percentile: float | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Clip(limit, percentile)


def test_a_clipped_likelihood_is_refused() -> None:
    """The density of a clipped model is not what its probability flow says."""

    def procedure() -> Procedure[Answer]:
        return (yield Query(torch.zeros(1, 2), torch.zeros(1, dtype=F64), probes=torch.ones(1, 1, 2)))

    limited = clipped(procedure(), 1.0)
    next(limited)
    with pytest.raises(ValueError, match="estimate likelihoods without clip"):
        limited.send(Answer(torch.zeros(1, 2), products=torch.zeros(1, 1, 2)))
