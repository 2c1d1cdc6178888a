"""The step: gradients meet once, blocks computed twice have the same gradients, what is measured at the start."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.distributed import GradBucket  # pyright: ignore[reportPrivateImportUsage]
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pipeline import backbones
from pipeline.conditioner import numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import StepKey
from pipeline.training import events as say
from pipeline.training import hardware
from pipeline.training.loop import train
from pipeline.training.prepare import blocks, checkpoint_blocks, compile_blocks, laid_out
from pipeline.training.reduction import DDP
from pipeline.training.step import Place, TrainingModule, backward
from tests.training.runs import BATCH, CLASSES, SHARDS, SIZE, batch_of, denoiser, losses, task

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def test_accumulated_gradients_meet_once(tmp_path: Path) -> None:
    """Three logical shards on one rank: DDP's reduction runs in the last backward alone, on their sum."""
    store = torch.distributed.FileStore(  # pyright: ignore[reportPrivateImportUsage]
        str(tmp_path / "store"), 1
    )
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        module = TrainingModule(
            denoiser().train(), OBJECTIVES["weighted"](), numbered("labels", CLASSES), Pixels((1, SIZE, SIZE))
        )
        reduction = DDP(module, Place())
        reduced: list[Tensor] = []

        def hook(_state: object, bucket: GradBucket) -> torch.futures.Future[torch.Tensor]:
            reduced.append(bucket.buffer().clone())
            done: torch.futures.Future[Tensor] = torch.futures.Future()
            done.set_result(bucket.buffer())
            return done

        reduction.ddp.register_comm_hook(None, hook)
        keys = [StepKey(0, 0, shard, 3) for shard in range(3)]
        batches = [batch_of(0, shard) for shard in range(3)]
        reduction.backward(batches, keys)
        buckets = len(reduced) - 2  # two throwaway backwards of one shard settle the buckets
        together = [p.grad.clone() for p in module.parameters() if p.grad is not None]
        module.zero_grad(set_to_none=True)
        for batch, key in zip(batches, keys, strict=True):
            backward(module, [batch], [key], Place())
    finally:
        torch.distributed.destroy_process_group()
    assert buckets == 1, "one bucket holds this network: one reduction in all"
    for mine, apart in zip(together, [p.grad for p in module.parameters() if p.grad is not None], strict=True):
        torch.testing.assert_close(mine, apart, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("name", ["unet", "vdm", "dit"])
def test_blocks_computed_twice_have_the_same_gradients_and_keep_less(name: str) -> None:
    configs = {
        "unet": backbones.UNetConfig(base_width=8, multipliers=(1, 2), blocks=1, attention_at=(4,), last_gain=0.1),
        "vdm": backbones.VDMConfig(width=8, layers=2),
        "dit": backbones.DiTConfig(width=32, layers=2, heads=2),
    }
    torch.manual_seed(0)
    network = laid_out(backbones.build(configs[name], 1, 8, 0, 1).train(), CPU)
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.01 * torch.randn_like(p))
    z, level = torch.randn(4, 1, 8, 8), torch.rand(4)

    def run() -> tuple[list[Tensor], int]:
        kept: dict[int, int] = {}

        def pack(t: Tensor) -> Tensor:
            kept[t.untyped_storage().data_ptr()] = t.untyped_storage().nbytes()
            return t

        torch.manual_seed(1)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            loss = network(z, level, Conditioning()).square().mean()
        weights = [p for p in network.parameters()]
        own = {p.untyped_storage().data_ptr() for p in weights}
        grads = torch.autograd.grad(loss, weights, allow_unused=True)
        return [g for g in grads if g is not None], sum(size for at, size in kept.items() if at not in own)

    expected, before = run()
    names = set(network.state_dict())
    checkpoint_blocks(network)
    found, after = run()
    assert set(network.state_dict()) == names
    assert all(torch.equal(a, b) for a, b in zip(expected, found, strict=True))
    print(f"{name}: {before} bytes of activations kept, {after} with blocks computed twice")
    assert after < 0.5 * before


@pytest.mark.parametrize("name", ["unet", "dit", "vdm"])
def test_operations_are_those_that_torch_counts(name: str) -> None:
    configs = {
        "unet": backbones.UNetConfig(base_width=8, multipliers=(1, 2), blocks=1, attention_at=(4,)),
        "dit": backbones.DiTConfig(width=32, layers=2, heads=2),
        "vdm": backbones.VDMConfig(width=8, layers=1),
    }
    network = backbones.build(configs[name], 1, 8, CLASSES, 1)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        network(
            torch.zeros(1, 1, 8, 8), torch.zeros(1), Conditioning(torch.zeros(1, dtype=torch.int64))
        ).sum().backward()
    assert (
        hardware.training_flops(network, (1, 8, 8), numbered("labels", CLASSES).nothing(1)) == counter.get_total_flops()
    )


def test_a_run_says_what_it_found_and_takes_the_faster_precision(tmp_path: Path) -> None:
    found = list(train(task(str(tmp_path), images=3 * BATCH, precision="auto", log_every_images=BATCH)))
    prepared = next(event for event in found if isinstance(event, say.Prepared))
    tried = {"fp32", "bf16"} if hardware.has_bf16(CPU) else {"fp32"}
    assert set(prepared.forward_backward_s) == tried
    assert prepared.precision == min(tried, key=lambda name: prepared.forward_backward_s[name])
    network = denoiser().network
    assert (
        prepared.flops_per_image
        == hardware.training_flops(network, (1, 8, 8), numbered("labels", CLASSES).nothing(1))
        > 1e6
    )
    assert say.decode(say.encode(prepared)) == prepared
    for event in found:
        if isinstance(event, say.Step):
            m = event.metrics
            assert m["tflops"] == pytest.approx(m["images_per_s"] * prepared.flops_per_image / 1e12)
            assert m["mfu"] == pytest.approx(1e12 * m["tflops"] / prepared.peak_flops)
            assert m["peak_memory_gib"] > 0.01


def test_computing_blocks_twice_changes_no_loss(tmp_path: Path) -> None:
    plain = losses(list(train(task(str(tmp_path / "a"), images=3 * BATCH))))
    twice = losses(list(train(task(str(tmp_path / "b"), images=3 * BATCH, checkpoint_activations=True))))
    assert plain == twice
    assert SHARDS > 1


@pytest.mark.slow  # torch imports its compiler for it
def test_deterministic_algorithms_are_asked_for_while_training_and_change_no_bit_here(tmp_path: Path) -> None:
    plain = losses(list(train(task(str(tmp_path / "a"), images=3 * BATCH))))
    asked: list[bool] = []
    events: list[say.Event] = []
    for event in train(task(str(tmp_path / "b"), images=3 * BATCH, deterministic=True)):
        events.append(event)
        asked.append(torch.are_deterministic_algorithms_enabled() and torch.backends.cudnn.deterministic)
    assert all(asked)
    assert not torch.are_deterministic_algorithms_enabled()
    assert losses(events) == plain


FAULTS = """
import resource, torch
from pipeline.training.hardware import keep_memory
torch.set_num_threads(1)
def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        held = [torch.ones(1 << 22) for _ in range(8)]  # 16 MiB each
        del held
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
print(faults(), keep_memory(), faults() and faults())
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc's allocator")
def test_memory_that_is_kept_faults_no_more() -> None:
    root = Path(__file__).parent.parent.parent
    run = subprocess.run([sys.executable, "-c", FAULTS], cwd=root, capture_output=True, text=True, check=True)
    before, understood, after = run.stdout.split()
    assert understood == "True"
    assert int(before) > 10_000, "the fault that is to be mended"
    assert int(after) < 100


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
def test_compiled_blocks_give_the_same() -> None:
    torch.manual_seed(0)
    network = backbones.build(backbones.DiTConfig(width=32, layers=3, heads=2), 1, 8, 0, 1).eval()
    with torch.no_grad():
        for p in network.parameters():
            p.add_(0.05 * torch.randn_like(p))
    z, level = torch.randn(2, 1, 8, 8), torch.rand(2)
    expected = network(z, level, Conditioning())
    names = set(network.state_dict())
    compile_blocks(network, "default")
    torch.testing.assert_close(network(z, level, Conditioning()), expected, rtol=1e-4, atol=1e-5)
    assert set(network.state_dict()) == names
    assert len(blocks(network)) == 3


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, when it compiles
def test_every_shape_of_block_is_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """A U-Net's blocks share one forward in more shapes than torch compiles of one function by default (8), after
    which it would run the rest eagerly. The compiler here traces and compiles nothing, which is what counts shapes."""
    import torch._dynamo

    def traced(block: torch.nn.Module, mode: str | None = None) -> None:
        block._compiled_call_impl = torch.compile(block._call_impl, backend="eager", mode=mode)  # pyright: ignore

    monkeypatch.setattr(torch.nn.Module, "compile", traced)
    monkeypatch.setattr(torch._dynamo.config, "recompile_limit", 8)
    network = backbones.build(
        backbones.UNetConfig(base_width=8, multipliers=(1, 2, 3), blocks=1, attention_at=(4,)), 1, 16, 0, 1
    )
    compile_blocks(network, "default")
    torch._dynamo.reset()
    with torch._dynamo.config.patch(fail_on_recompile_limit_hit=True):
        network(torch.randn(2, 1, 16, 16), torch.rand(2), Conditioning())
