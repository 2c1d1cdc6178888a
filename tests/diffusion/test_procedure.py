"""Queries answered alone, together and in chunks; vector-Jacobian products; what the driver promises."""

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser, Prediction
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import Answer, FiniteWatch, Procedure, Query, answer_queries, drive
from pipeline.diffusion.schedule import LinearGamma

F64 = torch.float64


class Net(nn.Module):
    """Small and smooth; looks at level and label; counts its calls and the rows of each."""

    def __init__(self, channels: int = 2) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.weight = nn.Parameter(torch.randn(channels * 2, 2, generator=generator))
        self.embedding = nn.Parameter(torch.randn(4, channels * 2, generator=generator))
        self.calls: list[int] = []

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        self.calls.append(len(z))
        out = torch.einsum("oc,nchw->nohw", self.weight, torch.tanh(z)) + level.view(-1, 1, 1, 1)
        if conditioning.label is not None:
            shown = (conditioning.label >= 0).float()[:, None] * self.embedding[conditioning.label.clamp(min=0)]
            out = out + shown[:, :, None, None]
        return out


def denoiser() -> Denoiser:
    return Denoiser(Net(), LinearGamma(-6, 4), Parameterization("v"), learned_variance=True)


def query(rows: int, seed: int = 0, **options: Any) -> Query:
    generator = torch.Generator().manual_seed(seed)
    y = torch.randn(rows, 2, 3, 3, generator=generator)
    gamma = torch.linspace(-5, 3, rows, dtype=F64)
    return Query(y, gamma, Conditioning(torch.arange(rows) % 5 - 1), **options)


def networks(**models: Denoiser) -> dict[str, Denoiser]:
    return models


def network_of(model: Denoiser) -> Net:
    assert isinstance(model.network, Net)
    return model.network


def assert_close(a: Answer, b: Answer, *, exactly: bool = False) -> None:
    for one, other in ((a.x_hat, b.x_hat), (a.variance, b.variance), (a.products, b.products)):
        assert (one is None) == (other is None)
        if one is not None and other is not None:
            assert torch.equal(one, other) if exactly else torch.allclose(one, other, rtol=1e-5, atol=1e-6)


def probes(rows: int, count: int = 2) -> Tensor:
    return torch.randn(count, rows, 2, 3, 3, generator=torch.Generator().manual_seed(9))


@torch.no_grad()
def test_one_call_for_many_queries_of_a_kind() -> None:
    """Requests of different sizes and levels share a call; networks and probe counts have their own."""
    main, guide = denoiser(), denoiser()
    asked = [
        query(3, 1),
        query(5, 2),
        query(2, 3, network="guide"),
        query(4, 4, probes=probes(4)),
        query(1, 5),
        query(2, 6, probes=probes(2)),
    ]
    answers = answer_queries(networks(main=main, guide=guide), asked)
    assert sorted(network_of(main).calls) == [6, 9]
    assert network_of(guide).calls == [2]
    for one, answer in zip(asked, answers, strict=True):
        assert_close(answer, answer_queries(networks(main=main, guide=guide), [one])[0])
        assert answer.x_hat.shape == one.y.shape
        assert (answer.products is None) == (one.probes is None)


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 4, 16])
def test_chunked_answers_are_bit_equal_in_any_company(chunk: int) -> None:
    main = denoiser()
    asked = [query(3, 1), query(7, 2), query(2, 3, probes=probes(2)), query(5, 4, probes=probes(5))]
    together = answer_queries(networks(main=main), asked, chunk)
    assert set(network_of(main).calls) == {chunk}
    for one, answer in zip(asked, together, strict=True):
        assert_close(answer, answer_queries(networks(main=main), [one], chunk)[0], exactly=True)
        assert_close(answer, answer_queries(networks(main=main), [one])[0])


@torch.no_grad()
@pytest.mark.parametrize("known", [(True, True, True), (True, False, True)])
def test_a_known_level_changes_no_float_of_a_chunk(known: tuple[bool, ...]) -> None:
    """Looked up or computed, alone or beside rows of the other way, in a whole chunk or a padded one."""
    main = denoiser()
    asked = [replace(query(n, n), gamma=torch.full((n,), 1.7 - n, dtype=F64)) for n in (1, 3, 4)]
    told = [replace(q, shared=float(q.gamma[0]) if k else None) for q, k in zip(asked, known, strict=True)]
    for chunk in (8, 5):
        expected = answer_queries(networks(main=main), asked, chunk)
        for one, other in zip(answer_queries(networks(main=main), told, chunk), expected, strict=True):
            assert_close(one, other, exactly=True)


@torch.no_grad()
def test_what_is_told_of_an_image_is_padded_with_it_and_parts_the_queries() -> None:
    """A chunk's missing rows carry every field of the conditioning; queries that differ in a field are not joined."""
    main = denoiser()
    told = replace(query(3), conditioning=Conditioning(torch.arange(3), torch.ones(3, 9)))
    answers = answer_queries(networks(main=main), [told, query(2)], 4)
    assert [len(answer.x_hat) for answer in answers] == [3, 2]
    assert network_of(main).calls == [4, 4]


@torch.no_grad()
def test_products_are_vector_jacobian_products_of_x_hat() -> None:
    """Against the full Jacobian; the answer carries no graph, and no gradient is left on the network."""
    main = denoiser()
    one = query(2, probes=probes(2, count=3))
    answer = answer_queries(networks(main=main), [one])[0]
    assert answer.products is not None
    assert one.probes is not None
    for row in range(2):
        level, condition = one.gamma[row : row + 1], one.conditioning[row : row + 1]

        def x_hat(y: Tensor, level: Tensor = level, condition: Conditioning = condition) -> Tensor:
            return main(y[None], level, condition).x_hat[0]

        jacobian = torch.func.jacrev(x_hat)(one.y[row]).reshape(18, 18)
        expected = one.probes[:, row].reshape(3, 18) @ jacobian
        assert torch.allclose(answer.products[:, row].reshape(3, 18), expected, rtol=1e-4, atol=1e-5)
    for tensor in (answer.x_hat, answer.products, answer.variance):
        assert tensor is not None
        assert not tensor.requires_grad
    assert all(parameter.grad is None for parameter in main.parameters())


def test_rows_of_both_precisions_are_not_mixed() -> None:
    """A request in float64 does not change the dtype of another's answer."""
    single, double = query(2, 1), query(2, 2)
    double = Query(double.y.double(), double.gamma, double.conditioning)
    answers = answer_queries(networks(main=denoiser()), [single, double])
    assert [a.x_hat.dtype for a in answers] == [torch.float32, F64]


def test_an_unknown_network_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="no network 'guide'; it has: main"):
        answer_queries(networks(main=denoiser()), [query(1, network="guide")])


def test_the_driver_records_no_graph_and_closes_what_it_drove() -> None:
    closed: list[bool] = []

    def procedure(steps: int) -> Procedure[Tensor]:
        try:
            total = torch.zeros(2, 2, 3, 3)
            for step in range(steps):
                total = total + (yield query(2, step)).x_hat
            return total
        finally:
            closed.append(True)

    result = drive(procedure(3), denoiser())
    assert not result.requires_grad
    with pytest.raises(ValueError, match="no network"):
        drive(procedure(3), networks(other=denoiser()))
    assert closed == [True, True]


@pytest.mark.parametrize("where", ["x_hat", "products"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_an_answer_that_is_not_finite_is_named(where: str, bad: float) -> None:
    """Found at the end, in one look: query, level and image."""
    watch = FiniteWatch()
    for index in range(4):
        one = query(3)
        x_hat, products = torch.zeros(3, 2, 3, 3), torch.zeros(2, 3, 2, 3, 3)
        if index == 2:
            (x_hat if where == "x_hat" else products[1])[1, 0, 2, 2] = bad
        watch.note(one, Answer(x_hat, products=products))
    with pytest.raises(
        ValueError, match=r"not finite at query 2 of 4 \(gamma -1\.0000, sigma/alpha 0\.6065\), image 1"
    ):
        watch.check()


def test_finite_answers_pass() -> None:
    watch = FiniteWatch()
    watch.check()
    watch.note(query(3), Answer(torch.full((3, 2, 3, 3), 1e30)))
    watch.check()


def test_any_answerer_may_stand_for_the_network() -> None:
    def zero(y: Tensor, gamma: Tensor, conditioning: Conditioning, shared: object = None) -> Prediction:
        return Prediction(torch.zeros_like(y))

    def procedure() -> Procedure[Tensor]:
        return (yield query(2)).x_hat

    assert float(drive(procedure(), zero).abs().max()) == 0
    assert float(drive(procedure(), {"main": zero}).abs().max()) == 0
