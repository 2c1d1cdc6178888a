# %% [markdown]
# From images to a sample, a score with its error bar, and a comparison of two samplers.
#
# Run it cell by cell in an editor that knows `# %%`, or whole from the root of the checkout: `python -m jobs.tutorial`.
# Everything goes to artifacts/tutorial. A longer training: RAYDIFFUSION_TUTORIAL_IMAGES=60000.

# %% What it needs
import os
from pathlib import Path

import matplotlib.pyplot as plt

import pipeline
from jobs.quickstart import write_digits
from pipeline import assembly
from pipeline.config import load_config
from pipeline.data.making.shards import shard_in_process
from pipeline.data.reading.stream import held_out
from pipeline.evaluation.pictures import grid
from pipeline.training.events import Step

IMAGES = int(os.environ.get("RAYDIFFUSION_TUTORIAL_IMAGES", 20_000))
FOLDER = Path("artifacts/tutorial")

# %% [markdown]
# ## Images to shards
#
# scikit-learn's 1,797 scans of digits, 8 x 8, as a folder of PNG files: sub-folders are classes. Yours would be such a
# folder too. A fifth is held out, chosen by content.

# %%
config = load_config(
    "jobs/configs/digits.yaml",
    [
        f"root={FOLDER.absolute()}",
        "output=run",
        "shard={source: images, url: shards}",
        "stream.url=shards",
        "model.network={base_width: 16, attention_at: []}",
        f"training={{images: {IMAGES}, checkpoint_every_images: 0, evaluate_every_images: 0, sample_every_images: 0}}",
        "training={warmup_images: 2000, ema_half_life_images: 2000, evaluate_images: 0, sample_images: 0}",
    ],
)
if not (FOLDER / "images").exists():
    write_digits(FOLDER / "images")
manifest = shard_in_process(config.shard)
print(manifest.url, "version", manifest.digest[:12])

# %% [markdown]
# ## Training
#
# The same loop as on a cluster, in this process. It yields events and knows nothing of who listens. Run again, it goes
# on from its newest checkpoint, here that of its end.

# %%
losses = [(event.images, event.metrics["loss"]) for event in assembly.train_here(config) if isinstance(event, Step)]
model = pipeline.load(assembly.export(config, manifest))

if losses:
    plt.figure()
    plt.plot(*zip(*losses, strict=True))
    plt.xlabel("images seen")
    plt.ylabel("loss")
    plt.savefig(FOLDER / "loss.png")

# %% [markdown]
# ## A sample
#
# Any sampler with any model. Image i follows from the model, the seed and i alone.

# %%
digits = model.sample(40, "dpmpp_2m", steps=20, labels=[i % 10 for i in range(40)], seed=0)
plt.figure()
plt.imshow(grid(digits, 10)[0].numpy(), cmap="gray")
plt.axis("off")
plt.savefig(FOLDER / "samples.png")

# %% [markdown]
# ## A score with its error bar
#
# Bits/dim of held-out images: an upper bound on -log2 P(image) / dimensions. An image's own standard error is that of
# its Monte Carlo estimate; the mean's comes from the images as well, and says how far another set's mean would lie.

# %%
real = held_out(manifest)
assert real.labels is not None, "this set has classes"
images, labels = real.images[:64], real.labels[:64]
scores = model.bits_per_dim(images, "vlb", levels=16, labels=labels)
mean = float(scores.bits_per_dim.mean())
error = float(scores.bits_per_dim.std()) / len(images) ** 0.5
own = float(scores.bits_per_dim_standard_error.mean())
print(f"held-out bits/dim {mean:.3f} +- {error:.3f}; of one image +- {own:.3f}")

shuffled = model.bits_per_dim(images, "vlb", levels=16, labels=(labels + 1) % 10)
worse = shuffled.bits_per_dim - scores.bits_per_dim  # paired: the same images with the same noise
wrong = float(worse.mean()), float(worse.std()) / len(images) ** 0.5
print(f"told the wrong class: {wrong[0]:+.3f} +- {wrong[1]:.3f}")

# %% [markdown]
# ## Two samplers
#
# Both follow the probability flow from the same noise, so they come to the same images as steps are refined. How far
# are they from there, for the same number of network evaluations? `heun` asks twice a step, but once in the last.

# %%
few, asked = [6, 12, 24, 48], list(range(10))
finest = model.sample(10, "heun", steps=200, labels=asked).float()


def distance(sampler: str, steps: int) -> float:
    """Root mean square difference to the finest, grey levels."""
    made = model.sample(10, sampler, steps=steps, labels=asked).float()
    return float((made - finest).square().mean().sqrt())


distances = {"euler": [distance("euler", 2 * n - 1) for n in few], "heun": [distance("heun", n) for n in few]}
plt.figure()
for name, found in distances.items():
    plt.loglog([2 * n - 1 for n in few], found, "o-", label=name)
    print(f"{name:6}", *(f"{value:7.2f}" for value in found), " grey levels")
plt.xlabel("network evaluations")
plt.ylabel("distance to the limit, grey levels")
plt.legend()
plt.savefig(FOLDER / "samplers.png")
