"""Model folders of diffusers: one that `DDPMPipeline.from_pretrained` opens and samples from, and back, as first
weights of a training. Nothing here imports diffusers.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from torch import Tensor, nn

from pipeline import backbones
from pipeline.backbones.diffusers_unet import unet_config_to_diffusers
from pipeline.backbones.interchange import from_diffusers, to_diffusers
from pipeline.choose import build as build_choice
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.schedule import SCHEDULES, Tabulated
from pipeline.model import Model, ModelConfig

PREDICTIONS = {"eps": "epsilon", "x": "sample", "v": "v_prediction"}
WEIGHTS = "diffusion_pytorch_model.safetensors"
TOLERANCE = 1e-3  # of outputs of order 1: rounding apart, two networks are the same or far apart


def export(model: Model, folder: str | Path) -> None:
    """Writes the folder. A model with classes is written as its unconditional self, where it learned to be that.

    Raises:
        ValueError: what diffusers cannot express, by name; nothing is written then.
    """
    scheduler, architecture = expressed(model.config, model.card.get("label_dropout") or 0.0)
    weights: Mapping[str, Tensor] = model.denoiser.network.state_dict()
    if model.config.classes:
        weights = {name: value for name, value in weights.items() if not name.startswith("labels.")}
    unet_config, tensors = to_diffusers(architecture, weights)
    root = Path(folder)
    for part in ("unet", "scheduler"):
        (root / part).mkdir(parents=True, exist_ok=True)
    kept = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    safetensors.torch.save_file(kept, root / "unet" / WEIGHTS)
    _write(root / "unet" / "config.json", unet_config)
    _write(root / "scheduler" / "scheduler_config.json", scheduler)
    parts = {"scheduler": ["diffusers", "DDPMScheduler"], "unet": ["diffusers", "UNet2DModel"]}
    _write(root / "model_index.json", {"_class_name": "DDPMPipeline", **parts})


def evened(network: Mapping[str, Any]) -> dict[str, Any]:
    """A U-Net's options with one number of groups in all its norms, the most that fit, as diffusers needs it; others,
    and those that say their `norm_groups`, as they are.
    """
    config = build_choice(backbones.BACKBONES, network, "network")
    if not isinstance(config, backbones.UNetConfig) or "norm_groups" in network:
        return dict(network)
    narrowest = config.base_width * min(config.multipliers)
    return {**network, "norm_groups": min(config.norm_groups, max(1, narrowest // config.norm_group_width))}


def expressed(config: ModelConfig, label_dropout: float) -> tuple[dict[str, Any], backbones.Architecture]:
    """Scheduler and unconditional network of such a model in diffusers' terms, known before it is trained.

    Raises:
        ValueError: what diffusers cannot express, by name.
    """
    scheduler = scheduler_config(config)
    architecture = backbones.Architecture(
        build_choice(backbones.BACKBONES, config.network, "network"),
        config.channels,
        config.size,
        config.classes,
        config.channels,
    )
    if not isinstance(architecture.config, backbones.UNetConfig):
        raise refused(f"network is {config.network['name']}; DDPMPipeline takes a U-Net")
    if config.classes:
        if not label_dropout:
            raise refused(
                "DDPMPipeline passes no labels, and this model is never trained without: set training.label_dropout "
                "above 0, such as 0.1"
            )
        architecture = backbones.Architecture(
            architecture.config, config.channels, config.size, 0, architecture.out_channels
        )
    unet_config_to_diffusers(architecture)
    return scheduler, architecture


def scheduler_config(config: ModelConfig) -> dict[str, Any]:
    """A `DDPMScheduler` of the same steps and prediction. Raises ValueError for what it cannot express, by name."""
    schedule = build_choice(SCHEDULES, config.schedule, "schedule")
    if not isinstance(schedule, Tabulated):
        raise refused(
            f"schedule is {config.schedule['name']}; only a table of steps (linear_beta, cosine) carries over"
        )
    needed = {"scaling": "vp", "level": "step_index", "network_input": "z", "learned_variance": False}
    for name, value in needed.items():
        if getattr(config, name) != value:
            raise refused(f"{name} is {getattr(config, name)!r}; diffusers has only {value!r}")
    if config.prediction not in PREDICTIONS:
        raise refused(f"prediction is {config.prediction}; diffusers has {', '.join(PREDICTIONS)}")
    betas = schedule.betas().tolist()
    return {
        "_class_name": "DDPMScheduler",
        "num_train_timesteps": len(betas),
        "trained_betas": betas,
        "prediction_type": PREDICTIONS[config.prediction],
        "variance_type": "fixed_large",
        "clip_sample": True,
        "clip_sample_range": 1.0,
    }


def is_diffusers(folder: str) -> bool:
    """Whether this local folder holds a diffusers pipeline or network."""
    return any(
        (Path(folder) / name).is_file() for name in ("model_index.json", "unet/config.json", "config.json")
    ) and (not (Path(folder) / "digests.json").exists())


def start_from(network: nn.Module, config: ModelConfig, folder: str) -> None:
    """Copies a diffusers network's weights into ours, built from `config`, if both compute the same.

    Raises:
        ValueError: no such folder, another architecture, or a scheduler of another prediction.
    """
    root = Path(folder)
    unet = root / "unet" if (root / "unet" / "config.json").is_file() else root
    scheduler = root / "scheduler" / "scheduler_config.json"
    if scheduler.is_file():
        theirs = json.loads(scheduler.read_text()).get("prediction_type", "epsilon")
        if theirs != PREDICTIONS.get(config.prediction):
            raise ValueError(f"{folder}: its network predicts {theirs}, model.prediction is {config.prediction}")
    if not (unet / WEIGHTS).is_file():
        raise ValueError(f"{unet} has no {WEIGHTS}: only safetensors are read")
    architecture, weights = from_diffusers(
        json.loads((unet / "config.json").read_text()), safetensors.torch.load_file(unet / WEIGHTS)
    )
    try:
        network.load_state_dict(weights)
    except RuntimeError as error:
        raise ValueError(f"the weights of {folder} do not fit the model of this run: {error}") from None
    with torch.random.fork_rng(devices=[]):
        original = architecture.build()
    original.load_state_dict(weights)
    if not _same(original, network, config):
        raise ValueError(
            f"{folder}: the run's network takes these weights but computes something else; its own options are "
            f"{architecture.config}"
        )


def _same(a: nn.Module, b: nn.Module, config: ModelConfig) -> bool:
    """Whether two networks of the same weights agree: options such as a norm's epsilon change no shape."""
    generator = torch.Generator().manual_seed(0)
    z = torch.randn(2, *config.image_shape, generator=generator)
    level = torch.tensor([3.0, 700.0])
    label = Conditioning(torch.zeros(2, dtype=torch.int64)) if config.classes else Conditioning()
    modes = a.training, b.training
    with torch.no_grad():
        first, second = a.eval()(z, level, label), b.eval()(z, level, label)
    a.train(modes[0])
    b.train(modes[1])
    return bool((first - second).abs().max() <= TOLERANCE * (1 + first.abs().max()))


def refused(reason: str) -> ValueError:
    return ValueError(f"no diffusers pipeline of this model: {reason}")


def _write(path: Path, values: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(values, indent=2) + "\n")
