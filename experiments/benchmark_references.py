"""What the benchmark compares the program with: its matrix products alone, and a PyTorch loop."""

import functools
import itertools
import math
from collections.abc import Callable

import jax
import numpy as np

from gapjax.model.mlp import UNIFORM_WEIGHT, min_log_scale

EVENT, LATENT, HIDDEN = (28, 28), 10, (500, 500)
ALPHA = 0.5  # of the refit


def layers(num_outputs: int) -> tuple[list, list]:
    """(in, out) of every linear layer of the encoder and of the decoder."""
    pixels = EVENT[0] * EVENT[1]
    encoder = [pixels, *HIDDEN, 2 * LATENT]
    decoder = [LATENT, *reversed(HIDDEN), num_outputs * pixels]
    return list(itertools.pairwise(encoder)), list(itertools.pairwise(decoder))


def products(phase: str, num_outputs: int, batch: int, samples: int) -> list[tuple]:
    """(rows, inner, columns) and the operand orders of each product of one step."""
    encoder, decoder = layers(num_outputs)
    forward = [("nn", batch, *layer) for layer in encoder]
    if phase == "evaluate":
        return forward + [("nn", batch * samples, *layer) for layer in decoder]
    products = forward + [("nn", batch, *layer) for layer in decoder]
    products += [("tn", batch, *layer) for layer in encoder]  # weights' gradients
    products += [("nt", batch, *layer) for layer in encoder[1:] + decoder]  # inputs' gradients
    if phase == "train":
        products += [("tn", batch, *layer) for layer in decoder]
    else:
        products += [("nn", round(ALPHA * batch), *layer) for layer in decoder]  # model samples
    return products


def floor(products: list[tuple], steps: int) -> Callable[[], None]:
    """Some steps' matrix products, compiled, each with operands of its own."""
    operands = []
    for index, (order, rows, inner, columns) in enumerate(products):
        left, right = jax.random.split(jax.random.key(index))
        shapes = {
            "nn": ((rows, inner), (inner, columns)),
            "tn": ((rows, inner), (rows, columns)),
            "nt": ((rows, columns), (inner, columns)),
        }[order]
        operands.append(tuple(map(jax.random.normal, (left, right), shapes)))

    @jax.jit
    def multiply(operands):
        contract = {"nn": (1, 0), "tn": (0, 0), "nt": (1, 1)}
        return [
            jax.lax.dot_general(a, b, (((contract[order][0],), (contract[order][1],)), ((), ())))
            for (order, *_), (a, b) in zip(products, operands, strict=True)
        ]

    def run(steps: int) -> None:
        for _ in range(steps):
            out = multiply(operands)
        jax.block_until_ready(out)

    run(1)
    return functools.partial(run, steps)


def torch_loop(images: np.ndarray, levels: int, batch_size: int) -> Callable[[], None] | None:
    """An epoch of joint training of the same model as a plain PyTorch loop, data in memory."""
    try:
        import torch
    except ImportError:
        return None
    functional = torch.nn.functional
    encoder_layers, decoder_layers = layers(1 if levels == 2 else 2)

    def mlp(layers):
        modules = []
        for size in layers:
            modules += [torch.nn.Linear(*size), torch.nn.ReLU()]
        return torch.nn.Sequential(*modules[:-1])

    encoder, decoder = mlp(encoder_layers), mlp(decoder_layers)
    optimizer = torch.optim.Adam([*encoder.parameters(), *decoder.parameters()], lr=1e-3)
    pixels = torch.from_numpy(np.array(images)).flatten(1)

    def log_likelihood(out, k):
        if levels == 2:
            return -functional.binary_cross_entropy_with_logits(out, k, reduction="none").sum(1)
        loc, log_scale = out.chunk(2, dim=1)
        scale = torch.exp(log_scale.clamp(min=min_log_scale(levels)))
        loc, scale = loc * (levels - 1), scale * (levels - 1)
        above, below = (k + 0.5 - loc) / scale, (k - 0.5 - loc) / scale
        zero = torch.zeros_like(k)
        left = torch.where(k >= levels - 1, zero, functional.logsigmoid(above))
        right = torch.where(k <= 0, zero, functional.logsigmoid(-below))
        width = torch.log(-torch.expm1(-1 / scale))
        log_prob = left + right + torch.where((k > 0) & (k < levels - 1), width, zero)
        uniform = torch.tensor(math.log(UNIFORM_WEIGHT / levels))
        return torch.logaddexp(log_prob + math.log1p(-UNIFORM_WEIGHT), uniform).sum(1)

    def run() -> None:
        order = torch.randperm(len(pixels))
        for indices in order.split(batch_size):
            k = pixels[indices].float()
            loc, raw_scale = encoder(k / (levels - 1)).chunk(2, dim=1)
            scale = functional.softplus(raw_scale) + 1e-6
            z = loc + scale * torch.randn_like(loc)
            kl = 0.5 * (loc**2 + scale**2 - 1).sum(1) - scale.log().sum(1)
            loss = (kl - log_likelihood(decoder(z), k)).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

    run()
    return run
