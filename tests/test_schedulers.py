"""Scheduler configurations: the same table, the same levels as diffusers asks at, refusals by name."""

from typing import Any

import pytest
import torch
from diffusers.models.unets.unet_2d_condition import UNet2DConditionModel
from diffusers.schedulers.scheduling_ddim import DDIMScheduler
from diffusers.schedulers.scheduling_ddpm import DDPMScheduler
from diffusers.schedulers.scheduling_dpmsolver_multistep import DPMSolverMultistepScheduler
from diffusers.schedulers.scheduling_euler_discrete import EulerDiscreteScheduler
from diffusers.schedulers.scheduling_flow_match_euler_discrete import FlowMatchEulerDiscreteScheduler
from diffusers.schedulers.scheduling_pndm import PNDMScheduler
from torch import Tensor

from pipeline.backbones.interchange import from_diffusers
from pipeline.backbones.words import Words
from pipeline.diffusion.conditioning import Conditioning
from pipeline.diffusion.denoiser import Denoiser
from pipeline.diffusion.parameterization import Parameterization
from pipeline.diffusion.procedure import drive
from pipeline.diffusion.randomness import Noise
from pipeline.diffusion.sampling.samplers import SAMPLERS
from pipeline.diffusion.schedule import Tabulated
from pipeline.schedulers import read_scheduler

THEIRS: dict[str, Any] = {
    "DDIMScheduler": DDIMScheduler,
    "DDPMScheduler": DDPMScheduler,
    "PNDMScheduler": PNDMScheduler,
    "EulerDiscreteScheduler": EulerDiscreteScheduler,
    "DPMSolverMultistepScheduler": DPMSolverMultistepScheduler,
}
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
TABLES: dict[str, dict[str, Any]] = {
    "stable diffusion": STABLE_DIFFUSION,
    "pixart": {"beta_schedule": "linear"},
    "cosine": {"beta_schedule": "squaredcos_cap_v2"},
    "fewer steps": {"beta_schedule": "linear", "num_train_timesteps": 400, "beta_start": 2e-4, "beta_end": 0.03},
}


def config_of(theirs: Any) -> dict[str, Any]:
    return dict(theirs.config) | {"_class_name": type(theirs).__name__}


# of diffusers' own way from torch to numpy
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", THEIRS)
def test_levels_are_those_that_diffusers_asks_at(name: str, spacing: str, table: str) -> None:
    options = {"skip_prk_steps": True} if name == "PNDMScheduler" else {}  # of its solver, which is not ours
    theirs = THEIRS[name](**TABLES[table], timestep_spacing=spacing, **options)
    found = read_scheduler(config_of(theirs))
    law = found.law()
    assert isinstance(law, Tabulated)
    alpha_bar = theirs.alphas_cumprod.double()
    their_table = torch.log((1 - alpha_bar) / alpha_bar)
    torch.testing.assert_close(law.table, their_table, atol=2e-3, rtol=1e-3)  # theirs is made in float32
    for steps in (7, 20):
        theirs.set_timesteps(steps)
        ours = found.levels(steps)
        if name in ("EulerDiscreteScheduler", "DPMSolverMultistepScheduler"):
            expected = 2 * torch.log(theirs.sigmas[:-1].double())
        else:
            expected = their_table[torch.unique(torch.as_tensor(theirs.timesteps).long()).flip(0)]
        assert len(ours) == steps
        torch.testing.assert_close(ours, expected, atol=2e-3, rtol=1e-3)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_levels_of_a_flow_are_those_that_diffusers_asks_at(shift: float) -> None:
    theirs: Any = FlowMatchEulerDiscreteScheduler(shift=shift)
    found = read_scheduler(config_of(theirs))
    assert (found.prediction, found.scaling) == ("flow", "flow")
    for steps in (5, 28):
        theirs.set_timesteps(steps)
        times = torch.sigmoid(found.levels(steps) / 2)
        torch.testing.assert_close(times, theirs.sigmas[:-1].double(), atol=1e-4, rtol=0)


def test_what_else_a_configuration_says_is_read() -> None:
    for name, prediction, ours in (
        ("DDIMScheduler", "epsilon", "eps"),
        ("DDIMScheduler", "v_prediction", "v"),
        ("EulerDiscreteScheduler", "sample", "x"),
    ):
        assert read_scheduler(config_of(THEIRS[name](prediction_type=prediction))).prediction == ours
    assert read_scheduler(config_of(DDIMScheduler(set_alpha_to_one=False))).ends_at == "first"
    assert read_scheduler(config_of(DDIMScheduler())).ends_at == "data"
    assert read_scheduler({"_class_name": "PNDMScheduler"}).ends_at == "first"  # its default
    assert read_scheduler(config_of(DDIMScheduler(clip_sample_range=2.0))).clip == 2.0
    assert read_scheduler(config_of(DDIMScheduler(clip_sample=False))).clip is None
    # silence says diffusers' default of that class, whichever it is
    assert read_scheduler({"_class_name": "DDIMScheduler"}).clip == 1.0


@pytest.mark.parametrize(
    ("name", "option", "value"),
    [
        ("DDIMScheduler", "rescale_betas_zero_snr", True),
        ("DDIMScheduler", "trained_betas", [0.1, 0.2]),
        ("DDIMScheduler", "beta_schedule", "sigmoid"),
        ("DDIMScheduler", "timestep_spacing", "karras"),
        ("DDIMScheduler", "prediction_type", "score"),
        ("DDIMScheduler", "thresholding", True),
        ("EulerDiscreteScheduler", "use_karras_sigmas", True),
        ("EulerDiscreteScheduler", "final_sigmas_type", "sigma_min"),
        ("DPMSolverMultistepScheduler", "use_lu_lambdas", True),
        ("FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting", True),
        ("LCMScheduler", "LCMScheduler", None),
    ],
)
def test_what_is_not_understood_is_refused_by_name(name: str, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=option):
        read_scheduler({"_class_name": name, option: value})


def test_too_many_steps_are_refused() -> None:
    scheduler = read_scheduler({"_class_name": "DDIMScheduler", "timestep_spacing": "linspace"})
    with pytest.raises(ValueError, match="repeat a level"):
        scheduler.levels(1500)


# --- sampled alike ----------------------------------------------------------------------------------------------------


class Told(torch.nn.Module):
    """A network with its words: what the denoiser asks."""

    def __init__(self, network: torch.nn.Module, words: Words) -> None:
        super().__init__()
        self.network, self.words = network, words

    def forward(self, z: Tensor, level: Tensor, conditioning: Conditioning) -> Tensor:
        return self.network(z, level, conditioning, self.words)


SAMPLED: dict[str, tuple[str, dict[str, Any], str]] = {
    "ddim, leading": ("DDIMScheduler", {"clip_sample": False}, "ddim"),
    "ddim, trailing": ("DDIMScheduler", {"clip_sample": False, "timestep_spacing": "trailing"}, "ddim"),
    "euler, linspace": ("EulerDiscreteScheduler", {}, "euler"),
    "euler, leading": ("EulerDiscreteScheduler", {"timestep_spacing": "leading"}, "euler"),
    "dpm-solver++ 2m": ("DPMSolverMultistepScheduler", {}, "dpmpp_2m"),
}


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("name", SAMPLED)
def test_a_network_told_words_is_sampled_as_by_diffusers(name: str, prediction: str) -> None:
    """From the same latents, on the configuration's own time spacing."""
    torch.manual_seed(0)
    unet: Any = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=12,
        attention_head_dim=4,
        norm_num_groups=8,
    ).eval()
    architecture, weights = from_diffusers(
        dict(unet.config) | {"_class_name": "UNet2DConditionModel"}, unet.state_dict()
    )
    network = architecture.build().eval()
    network.load_state_dict(weights)
    words, latents = Words(torch.randn(2, 6, 12)), torch.randn(2, 4, 8, 8)
    kind, options, sampler = SAMPLED[name]
    theirs = THEIRS[kind](**(STABLE_DIFFUSION | options | {"prediction_type": prediction}))
    # a number that divides the table: else diffusers' DDIM moves to a level other than the one it asks next
    read, steps = read_scheduler(config_of(theirs)), 10
    theirs.set_timesteps(steps)
    z = latents * theirs.init_noise_sigma
    for at in theirs.timesteps:
        output = unet(theirs.scale_model_input(z, at), at, words.states).sample
        z = theirs.step(output, at, z).prev_sample

    law = read.law()
    denoiser = Denoiser(Told(network, words), law, Parameterization(read.prediction, read.scaling), level="step_index")
    gammas = read.levels(steps)
    start = latents.double() * theirs.init_noise_sigma
    if kind != "EulerDiscreteScheduler":  # Euler's latents are already z / alpha
        start = start * torch.sqrt(1 + torch.exp(gammas[0]))
    ours = drive(SAMPLERS[sampler].procedure(start, gammas, Noise(range(2)), Conditioning()), denoiser)
    assert float((ours - z).abs().max()) < 1e-4 * float(z.abs().max())
