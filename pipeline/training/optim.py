"""AdamW in one fused pass with the clipping inside it, and learning-rate laws in images."""

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from pipeline.choose import choose

EPS = 1e-8


class AdamW:
    """AdamW (Loshchilov & Hutter 2019) by torch's fused kernel; its state is a flat dict of tensors.

    Weight decay applies to matrices and convolution kernels, not to biases, norms' scales and other vectors.
    (torch.optim.AdamW does the same arithmetic; calling the kernel itself spares importing the compiler, 1.5 s of every
    start, and lets the gradient clipping ride in the same pass.)
    """

    def __init__(
        self, named_parameters: Iterable[tuple[str, nn.Parameter]], betas: tuple[float, float], weight_decay: float
    ) -> None:
        named = [(name, p) for name, p in named_parameters if p.requires_grad]
        self.betas, self.weight_decay = betas, weight_decay
        self.parameters: list[Tensor] = [p for _, p in named]
        self._names = [name for name, _ in named]
        self._means = [torch.zeros_like(p) for p in self.parameters]
        self._squares = [torch.zeros_like(p) for p in self.parameters]
        device = self.parameters[0].device if self.parameters else "cpu"
        self._steps = torch.zeros((), dtype=torch.float32, device=device)
        groups: dict[tuple[torch.dtype, float], list[int]] = {}  # the kernel takes one dtype and one decay at a time
        for index, parameter in enumerate(self.parameters):
            decay = weight_decay if parameter.ndim >= 2 else 0.0
            groups.setdefault((parameter.dtype, decay), []).append(index)
        self._groups = [(indices, decay) for (_, decay), indices in groups.items()]

    def gradients(self) -> list[Tensor]:
        """One a parameter.

        Raises:
            RuntimeError: a parameter has none: the loss does not depend on it.
        """
        gradients: list[Tensor] = []
        for name, parameter in zip(self._names, self.parameters, strict=True):
            if parameter.grad is None:
                raise RuntimeError(f"parameter {name} got no gradient: the loss does not depend on it")
            gradients.append(parameter.grad)
        return gradients

    @torch.no_grad()
    def step(self, learning_rate: float, gradient_scale: Tensor | None = None) -> None:
        """One update. gradient_scale: float32 (), gradients are divided by it first (clipping)."""
        gradients = self.gradients()
        self._steps += 1
        for indices, weight_decay in self._groups:
            torch._fused_adamw_(  # pyright: ignore[reportPrivateImportUsage]
                [self.parameters[i] for i in indices],
                [gradients[i] for i in indices],
                [self._means[i] for i in indices],
                [self._squares[i] for i in indices],
                [],
                [self._steps] * len(indices),
                lr=learning_rate,
                beta1=self.betas[0],
                beta2=self.betas[1],
                weight_decay=weight_decay,
                eps=EPS,
                amsgrad=False,
                maximize=False,
                grad_scale=gradient_scale,
                found_inf=None,
            )

    def zero_grad(self) -> None:
        """In place, so that the buffers of gradients stay where they are."""
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if gradients:
            torch._foreach_zero_(gradients)  # pyright: ignore[reportPrivateImportUsage]

    def state_dict(self) -> dict[str, Tensor]:
        state = {"step": self._steps}
        for name, mean, square in zip(self._names, self._means, self._squares, strict=True):
            state[f"mean.{name}"], state[f"square.{name}"] = mean, square
        return state

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Copies a state in.

        Raises:
            ValueError: names or shapes of another network.
        """
        own = self.state_dict()
        if own.keys() != state.keys():
            differing = sorted(own.keys() ^ state.keys())
            raise ValueError(f"optimizer state of another network; names on one side only: {', '.join(differing[:4])}")
        for name, tensor in own.items():
            if tensor.shape != state[name].shape:
                raise ValueError(
                    f"optimizer state {name}: shape {tuple(state[name].shape)}, expected {tuple(tensor.shape)}"
                )
            tensor.copy_(state[name])


@torch.no_grad()
def gradient_norm(gradients: list[Tensor]) -> Tensor:
    """The 2-norm of all gradients together, ()."""
    norms = torch._foreach_norm(gradients)  # pyright: ignore[reportPrivateImportUsage]
    return torch.linalg.vector_norm(torch.stack(norms))


def clip_scale(norm: Tensor, clip_norm: float) -> Tensor | None:
    """What to divide the gradients by so that their norm is at most `clip_norm` (0: never), float32 ().

    None where that is 1: the optimizer then leaves the gradients unwritten, a seventh less memory to pass over.
    """
    if clip_norm <= 0 or float(norm) <= clip_norm:
        return None
    return (norm / clip_norm).float()


# --- learning-rate laws: share of the full rate at a fraction 0..1 of the budget --------------------------------------

LAWS: dict[str, Callable[[float], float]] = {
    "constant": lambda done: 1.0,
    "cosine": lambda done: 0.5 * (1 + math.cos(math.pi * done)),
    "linear": lambda done: 1 - done,
}


def learning_rate(peak: float, law: str, warmup_images: int, total_images: int, images: int) -> float:
    """The rate of the step that ends at `images` seen: a linear warm-up times the law."""
    warm = min(1.0, images / warmup_images) if warmup_images else 1.0
    return peak * warm * choose(LAWS, law, "learning-rate law")(min(1.0, images / total_images))
