"""What `jobs.benchmark step` runs side by side: our training step, a peer's, a bare convolution.

Each maker takes the options and returns a `Contestant`; its `step()` is one whole training step on a batch that lies
in memory: forward, backward, clipping, AdamW, moving average.
"""

import math
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.backbones.diffusers_dit import dit_to_diffusers
from pipeline.backbones.diffusers_unet import unet_config_to_diffusers
from pipeline.backbones.dit import DiTConfig
from pipeline.backbones.published import PUBLISHED
from pipeline.backbones.table import Architecture
from pipeline.backbones.unet import UNetConfig
from pipeline.choose import choose
from pipeline.conditioner import numbered
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.objectives.objective import OBJECTIVES
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.pixels import Pixels
from pipeline.diffusion.randomness import StepKey
from pipeline.diffusion.schedule import SCHEDULES
from pipeline.size import sides
from pipeline.training import hardware
from pipeline.training.ema import EMA, decay
from pipeline.training.optim import AdamW, clip_scale, gradient_norm
from pipeline.training.prepare import compile_blocks, laid_out

BASE32 = UNetConfig(
    base_width=32, multipliers=(1, 2, 2), heads=None, head_width=64, norm_groups=32, norm_group_width=1, dropout=0.1
)
MODELS: dict[str, Architecture] = {
    "base32": Architecture(BASE32, channels=3, size=32, classes=0, out_channels=3),
    "base32_at_8": Architecture(replace(BASE32, attention_at=(4,)), channels=3, size=8, classes=0, out_channels=3),
    "ddpm_cifar10": PUBLISHED["ddpm_cifar10"],
    "edm_cifar10": PUBLISHED["ddpmpp_cifar10"],
    "adm_imagenet64": PUBLISHED["adm_imagenet64"],
    "dit_xl2": PUBLISHED["dit_xl_2"],
    "tiny_unet": Architecture(replace(BASE32, base_width=8, head_width=8, norm_groups=4), 3, 16, 0, 3),
    "tiny_dit": Architecture(DiTConfig(width=32, layers=2, heads=2), 4, 8, 10, 4),
}


@dataclass
class Contestant:
    """step: one training step. module: what is counted and compiled. forward: () -> loss, for counting operations."""

    module: nn.Module
    step: Callable[[], object]
    forward: Callable[[], Tensor] | None = None


def trained(model: str) -> Architecture:
    """The architecture with as many output as input channels: a plain prediction of the noise."""
    architecture = choose(MODELS, model, "model")
    return replace(architecture, out_channels=architecture.channels)


def batch(args: Namespace, architecture: Architecture) -> tuple[Tensor, Tensor | None]:
    device, (height, width) = torch.device(args.device), sides(architecture.size)
    torch.manual_seed(0)
    images = torch.rand(args.batch, architecture.channels, height, width, device=device) * 2 - 1
    labels = torch.arange(args.batch, device=device) % architecture.classes if architecture.classes else None
    return images, labels


@contextmanager
def precision(args: Namespace) -> Iterator[None]:
    with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
        yield


def unzeroed(module: nn.Module) -> nn.Module:
    """Weights away from exact zero, where gradients would be zero and arithmetic untypical."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(torch.randn_like(parameter) * 1e-3)
    return module


def ours(args: Namespace) -> Contestant:
    """The library's pieces, put together as the training loop has them."""
    hardware.keep_memory()
    architecture = trained(args.model)
    images, labels = batch(args, architecture)
    network = unzeroed(architecture.build())
    schedule = SCHEDULES["linear_beta"]()
    denoiser = Denoiser(network, schedule, Parameterization("eps", "vp"), level="step_index").train()
    denoiser = laid_out(denoiser, torch.device(args.device), compiled=args.compile != "none")
    ema = EMA(denoiser)
    compile_blocks(network, args.compile)
    objective = OBJECTIVES["weighted"]()
    optimizer = AdamW(denoiser.named_parameters(), (0.9, 0.999), 1e-6)
    done = 0

    def loss(key: StepKey) -> Tensor:
        with precision(args):
            return objective.loss(denoiser, images, Conditioning(labels), key).per_image.mean()

    def step() -> None:
        nonlocal done
        torch.manual_seed(done)
        loss(StepKey(0, done, 0, 1)).backward()
        norm = gradient_norm(optimizer.gradients())
        if math.isfinite(float(norm)):
            optimizer.step(1e-4, clip_scale(norm, 1.0))
            ema.update(decay(len(images), done * len(images), 5e5, 0.05))
        optimizer.zero_grad()
        done += 1

    return Contestant(network, step, lambda: loss(StepKey(0, 0, 0, 1)))


def diffusers_network(architecture: Architecture) -> tuple[nn.Module, bool]:
    """The same architecture as diffusers has it, and whether it is a transformer. ValueError where it has none."""
    if isinstance(architecture.config, UNetConfig):
        from diffusers.models.unets.unet_2d import UNet2DModel

        return UNet2DModel.from_config(unet_config_to_diffusers(architecture)), False  # pyright: ignore[reportReturnType]
    from diffusers.models.transformers.dit_transformer_2d import DiTTransformer2DModel

    architecture = replace(architecture, config=replace(architecture.config, embedding_denominator="half_minus_1"))
    with torch.device("meta"):
        weights = architecture.build().state_dict()
    return DiTTransformer2DModel.from_config(dit_to_diffusers(architecture, weights).config), True  # pyright: ignore[reportReturnType]


def diffusers(args: Namespace) -> Contestant:
    """The loop of diffusers' examples/unconditional_image_generation/train_unconditional.py, on its own network,
    noise scheduler, EMAModel and accelerate.
    """
    from accelerate import Accelerator
    from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
    from diffusers.training_utils import EMAModel

    architecture = trained(args.model)
    images, labels = batch(args, architecture)
    made, transformer = diffusers_network(architecture)
    network: Any = unzeroed(made).to(args.device).train()
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)
    rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)
    accelerator = Accelerator(mixed_precision="bf16" if args.precision == "bf16" else "no", cpu=args.device == "cpu")
    model, optimizer, rates = accelerator.prepare(network, optimizer, rates)
    called = (
        torch.compile(model, mode=None if args.compile == "default" else args.compile)
        if args.compile != "none"
        else model
    )
    noise_scheduler: Any = DDPMScheduler(num_train_timesteps=1000)

    def loss() -> Tensor:
        noise = torch.randn(images.shape, device=images.device)
        timesteps = torch.randint(0, 1000, (len(images),), device=images.device).long()
        noisy = noise_scheduler.add_noise(images, noise, timesteps)
        asked = {"class_labels": labels} if labels is not None else {}
        with accelerator.autocast():
            output = (
                called(noisy, timestep=timesteps, **asked).sample
                if transformer
                else called(noisy, timesteps, **asked).sample
            )
        return F.mse_loss(output.float(), noise)

    def step() -> None:
        with accelerator.accumulate(model):
            value = loss()
            accelerator.backward(value)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            rates.step()
            optimizer.zero_grad()
        average.step(model.parameters())
        value.detach().item()

    return Contestant(network, step, loss)


def lucidrains(args: Namespace) -> Contestant:
    """denoising-diffusion-pytorch's Unet as its Trainer steps it; equal operations, not equal parameters."""
    from denoising_diffusion_pytorch import Unet  # pyright: ignore[reportMissingImports]
    from ema_pytorch import EMA as Average  # pyright: ignore[reportMissingImports]

    images, _ = batch(args, trained(args.model))
    network: Any = unzeroed(Unet(dim=args.peer_width, dim_mults=(1, 2, 2), full_attn=(False, True, False), dropout=0.1))
    optimizer = torch.optim.Adam(network.train().parameters(), lr=1e-4, betas=(0.9, 0.99))
    average = Average(network, beta=0.995, update_every=1)

    def loss() -> Tensor:
        noise, t = torch.randn_like(images), torch.randint(0, 1000, (len(images),))
        return F.mse_loss(network(images + noise, t), noise)

    def step() -> None:
        value = loss()
        value.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        average.update()

    return Contestant(network, step, loss)


def our_loop(args: Namespace) -> Contestant:
    """The training loop itself, a loss told every step, its images uint8 in memory. Needs the data plane's packages."""
    from tempfile import mkdtemp

    from pipeline.data.reading.stream import Batch
    from pipeline.training import events as say
    from pipeline.training.loop import Task, TrainingConfig, train
    from pipeline.training.step import Place

    architecture = trained(args.model)
    images, labels = batch(args, architecture)
    pixels = ((images + 1) * 127.5).byte().cpu()
    given = Batch(0, 0, pixels, None if labels is None else labels.cpu(), torch.arange(args.batch))
    config = TrainingConfig(
        images=1_000_000 * args.batch,
        log_every_images=args.batch,
        evaluate_every_images=0,
        sample_every_images=0,
        checkpoint_every_images=0,
        precision=args.precision,
        compile=args.compile,
    )
    network = unzeroed(architecture.build())
    task = Task(
        config,
        Denoiser(network, SCHEDULES["linear_beta"](), Parameterization("eps", "vp"), level="step_index"),
        OBJECTIVES["weighted"](),
        numbered("labels", architecture.classes),
        Pixels((architecture.channels, *sides(architecture.size))),
        lambda step: Endless(given),
        args.batch,
        logical_shards=1,
        seed=0,
        store=mkdtemp(),
        place=Place(device=torch.device(args.device)),
    )
    events = train(task)

    def step() -> None:
        while not isinstance(next(events), say.Step):
            pass

    return Contestant(network, step)


class Endless:
    """The same batch for ever."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __iter__(self) -> "Endless":
        return self

    def __next__(self) -> Any:
        return self.value

    def close(self) -> None:
        pass


def our_passes(args: Namespace) -> Contestant:
    """Forward and backward alone, beside `our_loop`: what the loop takes more is its host time a step. On small images
    (model base32_at_8) the difference is not lost in the noise of the passes.
    """
    made = ours(args)
    assert made.forward is not None
    forward = made.forward
    return Contestant(made.module, lambda: forward().backward(), forward)


def our_tail(args: Namespace) -> Contestant:
    """What follows the backward pass: clipping, AdamW and the moving average."""
    hardware.keep_memory()
    network = with_gradients(args)
    ema, optimizer = EMA(network), AdamW(network.named_parameters(), (0.9, 0.999), 1e-6)

    def step() -> None:
        norm = gradient_norm(optimizer.gradients())
        optimizer.step(1e-4, clip_scale(norm, 1.0))
        ema.update(0.999)

    return Contestant(network, step)


def our_ema(args: Namespace) -> Contestant:
    hardware.keep_memory()
    network = with_gradients(args)
    ema = EMA(network)
    return Contestant(network, lambda: ema.update(0.999))


def diffusers_tail(args: Namespace) -> Contestant:
    """The same of train_unconditional.py: clip_grad_norm_, torch's AdamW as it comes, EMAModel."""
    from diffusers.training_utils import EMAModel

    network = with_gradients(args)
    average = EMAModel(network.parameters(), decay=0.9999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4, betas=(0.95, 0.999), weight_decay=1e-6, eps=1e-8)

    def step() -> None:
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        average.step(network.parameters())

    return Contestant(network, step)


def with_gradients(args: Namespace) -> nn.Module:
    torch.manual_seed(0)
    network = laid_out(unzeroed(trained(args.model).build()), torch.device(args.device))
    count = sum(p.numel() for p in network.parameters())
    for parameter in network.parameters():  # of norm 1/2: within the bound, as most gradients of a training are
        parameter.grad = torch.randn_like(parameter) * (0.5 * count**-0.5)
    return network


def convolution(args: Namespace, layout: torch.memory_format, kept: bool) -> Contestant:
    """Forward and backward of one 3x3 convolution, 64 channels at 32x32: what the machine gives a network at best.
    kept: with memory kept as our step keeps it."""
    if kept:
        hardware.keep_memory()
    conv = nn.Conv2d(64, 64, 3, padding=1).to(args.device)
    conv.weight.data = conv.weight.data.contiguous(memory_format=layout)
    x, g = (torch.randn(args.batch, 64, 32, 32, device=args.device).contiguous(memory_format=layout) for _ in range(2))
    x.requires_grad_()

    def step() -> None:
        for _ in range(4):
            with precision(args):
                y = conv(x)
            torch.autograd.grad(y, (x, *conv.parameters()), g.to(y.dtype))

    return Contestant(conv, step)


CONTESTANTS: dict[str, Callable[[Namespace], Contestant]] = {
    "ours": ours,
    "diffusers": diffusers,
    "lucidrains": lucidrains,
    "our_loop": our_loop,
    "our_passes": our_passes,
    "our_tail": our_tail,
    "our_ema": our_ema,
    "diffusers_tail": diffusers_tail,
    "conv3x3": lambda args: convolution(args, torch.contiguous_format, kept=False),
    "conv3x3_kept": lambda args: convolution(args, torch.contiguous_format, kept=True),
    "conv3x3_kept_nhwc": lambda args: convolution(args, torch.channels_last, kept=True),
}


def versions() -> dict[str, str]:
    """Of what is loaded here."""
    names = ("torch", "diffusers", "accelerate", "denoising_diffusion_pytorch", "numpy")
    found = {name: str(getattr(sys.modules[name], "__version__", "?")) for name in names if name in sys.modules}
    return {"python": sys.version.split()[0], **found}
