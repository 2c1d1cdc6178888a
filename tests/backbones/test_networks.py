"""What every network of the table promises."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from pipeline.backbones import BACKBONES, BackboneConfig, DiTConfig, MLPConfig, UNetConfig, VDMConfig, build
from pipeline.diffusion.conditioning import NO_LABEL, Conditioning

SMALL_UNET = UNetConfig(base_width=16, multipliers=(1, 2), blocks=1, attention_at=(4,))
CONFIGS: dict[str, BackboneConfig] = {
    "unet": SMALL_UNET,
    "unet scale_shift, resized in blocks": UNetConfig(
        base_width=16,
        multipliers=(1, 2),
        blocks=1,
        attention_at=(8,),
        modulation="scale_shift",
        resample="block",
        heads=None,
        head_width=8,
        label_at="input",
    ),
    "unet ddpm++": UNetConfig(
        base_width=16,
        multipliers=(2, 2),
        blocks=2,
        attention_at=(4,),
        decoder_attention="last",
        resample="block",
        resample_projection=True,
        skip_scale=0.5**0.5,
        embedding="fourier",
        init="torch",
    ),
    "unet, Fourier features of z": UNetConfig(
        base_width=16, multipliers=(1, 2), blocks=1, attention_at=(4,), fourier_exponents=(6, 7)
    ),
    "vdm": VDMConfig(width=16, layers=2),
    "dit": DiTConfig(width=32, layers=2, heads=4),
    "mlp": MLPConfig(width=32, blocks=2),
}
every = pytest.mark.parametrize("name", CONFIGS)


def network(name: str, classes: int = 0, out_channels: int = 3, live: bool = True) -> nn.Module:
    """In evaluation mode. live: no weight is 0."""
    torch.manual_seed(0)
    made = build(CONFIGS[name], channels=3, size=8, classes=classes, out_channels=out_channels)
    if live:
        for parameter in made.parameters():
            with torch.no_grad():
                parameter.add_(0.05 * torch.randn_like(parameter))
    return made.eval()


def inputs(n: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(n, 3, 8, 8, generator=generator), torch.rand(n, generator=generator)


def test_the_table_is_covered() -> None:
    assert {type(config) for config in CONFIGS.values()} == set(BACKBONES.values())


@every
@pytest.mark.parametrize("out_channels", [3, 6])
def test_shape_dtype_and_layout(name: str, out_channels: int) -> None:
    z, level = inputs()
    out = network(name, out_channels=out_channels)(z, level, Conditioning())
    assert out.shape == (4, out_channels, 8, 8)
    assert out.dtype == torch.float32
    assert out.is_contiguous()


@every
def test_starts_at_its_prior_guess(name: str) -> None:
    """The last layer starts at 0: F = 0, or z for VDM."""
    z, level = inputs()
    out = network(name, live=False)(z, level, Conditioning())
    assert torch.equal(out, z if name == "vdm" else torch.zeros_like(z))


@every
def test_every_parameter_matters(name: str) -> None:
    z, level = inputs()
    made = network(name, classes=3)
    made(z, level, Conditioning(torch.tensor([0, 1, 2, NO_LABEL]))).square().sum().backward()
    dead = [key for key, parameter in made.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert dead == []


@every
def test_rows_do_not_meet(name: str) -> None:
    z, level = inputs()
    made = network(name, classes=3)
    label = torch.tensor([0, 1, 2, NO_LABEL])
    whole = made(z, level, Conditioning(label))
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(
        made(z[order], level[order], Conditioning(label[order])), whole[order], rtol=1e-5, atol=1e-5
    )


@every
def test_no_label_adds_nothing(name: str) -> None:
    z, level = inputs()
    made = network(name, classes=3)
    without = made(z, level, Conditioning())
    assert torch.equal(made(z, level, Conditioning(torch.full((4,), NO_LABEL))), without)
    labelled = made(z, level, Conditioning(torch.tensor([0, NO_LABEL, 2, NO_LABEL])))
    torch.testing.assert_close(labelled[1::2], without[1::2], rtol=1e-5, atol=1e-5)
    assert (labelled[::2] - without[::2]).abs().amax((1, 2, 3)).min() > 1e-3


def test_augmentation_labels_enter_the_unet() -> None:
    torch.manual_seed(0)
    config = dataclasses.replace(SMALL_UNET, augmentation_labels=9, last_gain=1.0)
    made = build(config, channels=3, size=8, classes=0, out_channels=3).eval()
    z, level = inputs()
    described = torch.zeros(4, 9)
    described[1, 4] = 1.0
    without = made(z, level, Conditioning())
    with_them = made(z, level, Conditioning(augmentation=described))
    changed = (with_them - without).abs().amax((1, 2, 3))
    assert changed[1] > 1e-4
    assert changed[[0, 2, 3]].max() < 1e-5
    made.train()(z, level, Conditioning()).sum().backward()
    assert all(p.grad is not None for p in made.parameters()), "a training without augmentation goes on"
    with pytest.raises(ValueError, match=r"augmentation of shape \(4, 3\) .* augmentation_labels 9"):
        made(z, level, Conditioning(augmentation=torch.zeros(4, 3)))


@every
def test_augmentation_is_refused_by_a_network_that_takes_none(name: str) -> None:
    z, level = inputs()
    with pytest.raises(ValueError, match="augmentation_labels"):
        network(name)(z, level, Conditioning(augmentation=torch.zeros(4, 9)))


@every
def test_labels_without_classes_are_an_error(name: str) -> None:
    z, level = inputs()
    with pytest.raises(ValueError, match="without classes"):
        network(name)(z, level, Conditioning(torch.zeros(4, dtype=torch.int64)))


@every
def test_the_level_matters_and_only_its_own_row(name: str) -> None:
    z, level = inputs()
    made = network(name)
    changed = level.clone()
    changed[1] += 0.3
    difference = (made(z, level, Conditioning()) - made(z, changed, Conditioning())).abs().amax((1, 2, 3))
    assert difference[1] > 1e-3
    assert difference[[0, 2, 3]].max() < 1e-5


@every
def test_several_vector_jacobian_products_of_one_forward(name: str) -> None:
    """The backward pass leaves what it needs: probes in any order give the same."""
    z, level = inputs(2)
    z.requires_grad_()
    out = network(name)(z, level, Conditioning())
    probes = torch.randn(3, *out.shape)
    products = [torch.autograd.grad(out, z, probe, retain_graph=True)[0] for probe in probes]
    for i in (2, 0, 1):
        assert torch.equal(torch.autograd.grad(out, z, probes[i], retain_graph=True)[0], products[i])


@every
def test_the_gradient_of_a_divergence_exists(name: str) -> None:
    """Implicit score matching differentiates twice; attention then needs the kernel that can."""
    z, level = inputs(2)
    z.requires_grad_()
    made = network(name).train()
    with sdpa_kernel(SDPBackend.MATH):
        probe = torch.randn_like(z)
        (product,) = torch.autograd.grad(made(z, level, Conditioning()), z, probe, create_graph=True)
        (product * probe).sum().backward()
    assert any(parameter.grad is not None and parameter.grad.any() for parameter in made.parameters())


@every
def test_first_derivative_against_finite_differences(name: str) -> None:
    made = network(name).double()
    z, level = inputs(1)
    z, direction = z.double().requires_grad_(), torch.randn(1, 3, 8, 8, dtype=torch.float64)
    if name in ("vdm", "unet, Fourier features of z"):  # their sinusoids of period 1/128 leave a smaller step
        direction = direction * 1e-2
    probe = torch.randn(1, 3, 8, 8, dtype=torch.float64)
    f = lambda x: (made(x, level, Conditioning()) * probe).sum()  # noqa: E731
    (gradient,) = torch.autograd.grad(f(z), z)
    step = 1e-5
    with torch.no_grad():
        numeric = (f(z + step * direction) - f(z - step * direction)) / (2 * step)
    torch.testing.assert_close((gradient * direction).sum(), numeric, rtol=1e-5, atol=1e-6)


def test_second_derivatives_of_the_perceptron() -> None:
    made = build(MLPConfig(width=8, blocks=1, zero_last=False), channels=2, size=1, classes=0, out_channels=2).double()
    level = torch.rand(2, dtype=torch.float64)
    z = torch.randn(2, 2, 1, 1, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradgradcheck(lambda x: made(x, level, Conditioning()), (z,))


@every
def test_training_repeats_under_one_seed_and_differs_under_another(name: str) -> None:
    z, level = inputs()
    made = network(name).train()

    def run(seed: int) -> tuple[Tensor, list[Tensor]]:
        torch.manual_seed(seed)
        made.zero_grad()
        out = made(z, level, Conditioning())
        out.square().sum().backward()
        return out.detach(), [parameter.grad.clone() for parameter in made.parameters() if parameter.grad is not None]

    (first, first_grads), (second, second_grads) = run(5), run(5)
    assert torch.equal(first, second)
    assert all(torch.equal(a, b) for a, b in zip(first_grads, second_grads, strict=True))
    if isinstance(CONFIGS[name], UNetConfig | VDMConfig):
        assert not torch.equal(run(6)[0], first)


@every
def test_memory_layout_and_autocast_change_nothing_but_rounding(name: str) -> None:
    z, level = inputs()
    made = network(name)
    expected = made(z, level, Conditioning())
    in_channels_last = made.to(memory_format=torch.channels_last)  # pyright: ignore[reportCallIssue]
    torch.testing.assert_close(
        in_channels_last(z.to(memory_format=torch.channels_last), level, Conditioning()), expected, rtol=1e-4, atol=1e-4
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        half = made(z, level, Conditioning())
    assert F.mse_loss(half.float(), expected) < 1e-3 * expected.square().mean()


@pytest.mark.parametrize(("name", "training"), [*((name, True) for name in CONFIGS), ("unet", False)])
def test_traces_as_one_graph(name: str, training: bool) -> None:
    """No Python that depends on data, no value fetched from the device: what compilation and CUDA graphs need."""
    z, level = inputs()
    made = network(name, classes=3).train(training)
    conditioning = Conditioning(torch.tensor([0, 1, 2, NO_LABEL]))
    torch.compiler.reset()
    out = torch.compile(made, backend="eager", fullgraph=True)(z, level, conditioning)
    if training:
        out.square().mean().backward()
    else:
        torch.testing.assert_close(out, made(z, level, conditioning), rtol=1e-4, atol=1e-4)


@every
def test_the_state_is_parameters_only_and_builds_on_the_meta_device(name: str) -> None:
    made = network(name, classes=2)
    extra = made.state_dict().keys() - dict(made.named_parameters()).keys()
    assert extra == ({"frequencies"} if name == "unet ddpm++" else set())
    with torch.device("meta"):
        skeleton = build(CONFIGS[name], channels=3, size=8, classes=2, out_channels=3)
    assert {k: v.shape for k, v in skeleton.state_dict().items()} == {k: v.shape for k, v in made.state_dict().items()}


@pytest.mark.parametrize(
    ("config", "changes", "named"),
    [
        (SMALL_UNET, {"base_width": 3}, "base_width"),
        (SMALL_UNET, {"base_width": "32"}, "base_width"),
        (SMALL_UNET, {"base_width": True}, "base_width"),
        (SMALL_UNET, {"multipliers": ()}, "multipliers"),
        (SMALL_UNET, {"multipliers": (1, 2.5)}, "multipliers"),
        (SMALL_UNET, {"dropout": 1.0}, "dropout"),
        (SMALL_UNET, {"dropout": float("nan")}, "dropout"),
        (SMALL_UNET, {"heads": None}, "head_width"),
        (SMALL_UNET, {"head_width": 8}, "heads"),
        (SMALL_UNET, {"down_padding": 2}, "down_padding"),
        (SMALL_UNET, {"modulation": "film"}, "modulation"),
        (SMALL_UNET, {"norm_eps": 0.0}, "norm_eps"),
        (CONFIGS["vdm"], {"width": 3}, "width"),
        (SMALL_UNET, {"fourier_exponents": (-9,)}, "fourier_exponents"),
        (CONFIGS["vdm"], {"fourier_exponents": (99,)}, "fourier_exponents"),
        (CONFIGS["dit"], {"heads": 5}, "heads"),
        (CONFIGS["mlp"], {"blocks": 0}, "blocks"),
    ],
)
def test_a_bad_option_is_named(config: Any, changes: dict[str, Any], named: str) -> None:
    with pytest.raises(ValueError, match=named):
        dataclasses.replace(config, **changes)


@pytest.mark.parametrize(
    ("config", "size", "named"),
    [
        (SMALL_UNET, 7, "size 7"),
        (dataclasses.replace(SMALL_UNET, attention_at=(5,)), 8, "attention_at"),
        (dataclasses.replace(SMALL_UNET, heads=3), 8, "heads = 3"),
        (dataclasses.replace(SMALL_UNET, base_width=18, norm_groups=4), 8, "norm_groups"),
        (CONFIGS["dit"], 9, "patch"),
        (CONFIGS["vdm"], 0, "size"),
    ],
)
def test_what_does_not_fit_the_image_is_named(config: BackboneConfig, size: int, named: str) -> None:
    with pytest.raises(ValueError, match=named):
        build(config, channels=3, size=size, classes=0, out_channels=3)


def test_lists_and_whole_numbers_of_a_run_file_are_taken() -> None:
    options: dict[str, Any] = {"multipliers": [1, 2], "attention_at": [], "dropout": 0, "skip_scale": 1}
    config = UNetConfig(**options)
    assert config.multipliers == (1, 2)
    assert isinstance(config.dropout, float)
    assert hash(config) == hash(dataclasses.replace(config))
