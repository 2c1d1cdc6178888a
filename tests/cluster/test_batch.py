"""Work as Ray tasks: the answers of one process, errors as they are, nothing left behind."""

import pytest
import torch

from pipeline.cluster.batch import ray_worker
from pipeline.conditioner import numbered
from pipeline.diffusion.likelihood.estimate import Likelihood
from pipeline.evaluation.work import finish, here, sample_work, score_work
from pipeline.model import Sampling, Scoring
from tests.evaluation.tiny import stripes, tiny_model

THREE = numbered("labels", 3)


def test_tasks_give_the_bits_of_one_process(ray_cluster: None) -> None:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    model, real = tiny_model(), stripes(30, 0)
    worker = ray_worker(model)
    made = sample_work(50, THREE.in_turn(range(50)), Sampling("dpmpp_2m", 5), 8, 0)
    for near, far in zip(finish(here(model), made), finish(worker, made), strict=True):
        assert isinstance(near, torch.Tensor)
        assert isinstance(far, torch.Tensor)
        assert torch.equal(near, far)
    scored = score_work(real.images, THREE.of(real), Scoring("vlb", {"levels": 4}), 7, 0)
    for near, far in zip(finish(here(model), scored), finish(worker, scored), strict=True):
        assert isinstance(near, Likelihood)
        assert isinstance(far, Likelihood)
        assert torch.equal(near.nats, far.nats)
        assert near.parts.keys() == far.parts.keys()
    torch.set_num_threads(threads)


def test_an_error_arrives_as_it_is(ray_cluster: None) -> None:
    worker = ray_worker(tiny_model())
    work = sample_work(4, THREE.in_turn(range(4)), Sampling("dpmpp_2m", 5, options={"temperature": 1.0}), 2, 0)
    with pytest.raises((ValueError, TypeError), match="temperature"):
        finish(worker, work)
