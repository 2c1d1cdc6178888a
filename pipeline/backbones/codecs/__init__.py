"""Codecs: pixels to latents and back, with their normalisation."""

from pipeline.backbones.codecs.autoencoder_kl import AutoencoderKL, AutoencoderKLConfig, Posterior
from pipeline.backbones.codecs.diffusers_codec import Codec, codec_from_diffusers, codec_to_diffusers

__all__ = [
    "AutoencoderKL",
    "AutoencoderKLConfig",
    "Codec",
    "Posterior",
    "codec_from_diffusers",
    "codec_to_diffusers",
]
