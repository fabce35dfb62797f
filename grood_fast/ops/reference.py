"""The compiled ops once more in plain PyTorch: the definition they are tested against.

Every function works in any floating dtype, is differentiable where the mathematics is, and is as
short as the formula. In float64 these are the truth; in float32 they are the baseline the compiled
ops have to beat.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.nn import functional

_NORM_ORDER = {"l1": 1, "l2": 2, "linf": torch.inf}


def energy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """−T·logsumexp(f/T) of logits f (B, C): (B,)."""
    return -temperature * torch.logsumexp(logits / temperature, dim=1)


def logit_gradient(
    logits: Tensor, objective: str, temperature: float = 1.0, target: Tensor | None = None
) -> Tensor:
    """δ = d objective / d logits, (B, C), of logits (B, C); see :mod:`grood_fast.objectives`."""
    p = torch.softmax(logits / temperature, dim=1)
    classes = logits.shape[1]
    # The first NaN counts as the maximum, as it does for torch.argmax.
    predicted = functional.one_hot(logits.argmax(dim=1), classes).to(logits.dtype)
    match objective:
        case "energy":
            return -p
        case "uniform":
            return (classes * p - 1) / temperature
        case "predicted":
            return (p - predicted) / temperature
        case "confounding":
            return torch.sigmoid(logits) - (1 if target is None else target)
        case "max_logit":
            return predicted
        case "logit_sum":
            return torch.ones_like(logits)
    raise ValueError(f"unknown objective {objective!r}")


def dual_project(
    delta: Tensor,
    features: Tensor,
    anchor_delta: Tensor,
    anchor_features: Tensor,
    coefficients: Tensor,
    bias: float = 0.0,
) -> Tensor:
    """((δΔᵀ) ∘ (hHᵀ + bias)) A of (B, C), (B, D), (N, C), (N, D), (N, K): (B, K)."""
    return ((delta @ anchor_delta.T) * (features @ anchor_features.T + bias)) @ coefficients


def cluster_extremes(assignments: Tensor, energies: Tensor, clusters: int) -> tuple[Tensor, Tensor]:
    """Per cluster the first sample of lowest and the first of highest energy, each (K,); or -1."""
    samples = len(energies)
    valid = ~energies.isnan()
    positions = torch.arange(samples, device=energies.device)

    def first(reduction: str) -> Tensor:
        extreme = energies.new_zeros(clusters).scatter_reduce(
            0,
            assignments,
            torch.where(
                valid,
                energies,
                energies.new_tensor(torch.inf if reduction == "amin" else -torch.inf),
            ),
            reduction,
            include_self=False,
        )
        candidates = torch.where(valid & (energies == extreme[assignments]), positions, samples)
        found = torch.full((clusters,), samples, device=energies.device)
        found = found.scatter_reduce(0, assignments, candidates, "amin")
        return torch.where(found < samples, found, -1)

    return first("amin"), first("amax")


def prototype_gradient(
    features: Tensor,
    ood_prototype: Tensor,
    offsets: Tensor,
    temperature: float = 1.0,
    squared: bool = False,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """scale · dL/dp of (B, D) features, (D,) p and (C, D) p_k − p: (B, D), and log π (B,).

    L is the cross-entropy over −‖h − p_k‖/T and −‖h − p‖/T, of which π is p's softmax.
    """
    x = features - ood_prototype
    norm: Tensor = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    others = torch.cdist(x, offsets, compute_mode="donot_use_mm_for_euclid_dist")
    distances = torch.cat([others, norm], dim=1)
    logits = -(distances.square() if squared else distances) / temperature
    log_weight = torch.log_softmax(logits, dim=1)[:, -1]
    length = (log_weight.exp() * scale / temperature).unsqueeze(1)
    if squared:
        return 2 * length * x, log_weight
    return length * (x / torch.where(norm > 0, norm, 1)), log_weight


def nearest_distance(queries: Tensor, bank: Tensor) -> tuple[Tensor, Tensor]:
    """Distance of (B, D) queries to the nearest row of (N, D), and its index: (B,) each."""
    distances = torch.cdist(queries, bank, compute_mode="donot_use_mm_for_euclid_dist")
    nearest = distances.min(dim=1)
    return nearest.values, nearest.indices


def short_circuit_logits(
    logits: Tensor, features: Tensor, weight_t: Tensor, removed: Tensor
) -> Tensor:
    """f_j − Σ over the removed i of W_ji h_i, of (B, C), (B, D), (D, C), (B, k): (B, C)."""
    contributions = features.gather(1, removed).unsqueeze(1) @ weight_t[removed]
    return logits - contributions.squeeze(1)


def layer_gradient_sqnorm(activation: Tensor, delta: Tensor, offsets: Sequence[int]) -> Tensor:
    """Σ_j ‖Σ_r delta_r activation_{r + offset_j}ᵀ‖² of (B, Q, N) and (B, R, M): (B,)."""
    count = delta.shape[1]
    shifted = (activation[:, offset : offset + count] for offset in offsets)
    parts = [(delta.mT @ part).square().sum(dim=(1, 2)) for part in shifted]
    return torch.stack(parts).sum(dim=0)


def channel_affine_backward(
    delta: Tensor, input: Tensor, scale: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """scale·δ, Σ δ·input and Σ δ over the positions, of (B, C, ...) twice and (C,)."""
    flat = delta.flatten(2) if delta.ndim > 2 else delta.unsqueeze(2)
    products, sums = (flat * input.reshape(flat.shape)).sum(dim=2), flat.sum(dim=2)
    if scale is None:
        return delta.new_empty(0), products, sums
    return delta * scale.reshape(-1, *[1] * (delta.ndim - 2)), products, sums


def row_norm(rows: Tensor, norm: str) -> Tensor:
    """The L1, L2 or L∞ norm of each row of (B, N): (B,)."""
    if rows.shape[1] == 0:
        return rows.new_zeros(rows.shape[0])
    norms: Tensor = torch.linalg.vector_norm(rows, ord=_NORM_ORDER[norm], dim=1)
    return norms


def head_gradient_norm(
    logits: Tensor,
    features: Tensor,
    objective: str,
    temperature: float = 1.0,
    target: Tensor | None = None,
    norm: str = "l1",
    bias: bool = False,
) -> Tensor:
    """‖δ [h; 1]ᵀ‖ = ‖δ‖ ‖[h; 1]‖, (B,); the 1 only with ``bias``."""
    if bias:
        features = torch.cat([features, features.new_ones(features.shape[0], 1)], dim=1)
    delta = logit_gradient(logits, objective, temperature, target)
    return row_norm(delta, norm) * row_norm(features, norm)


def logit_gradient_vjp(
    logits: Tensor, grad: Tensor, objective: str, temperature: float = 1.0
) -> Tensor:
    """gradᵀ · dδ/df: how a function of δ (B, C) depends on the logits (B, C)."""
    if objective in ("energy", "uniform", "predicted"):
        p = torch.softmax(logits / temperature, dim=1)
        through_softmax = p * (grad - (p * grad).sum(dim=1, keepdim=True)) / temperature
        factor = {
            "energy": -1.0,
            "uniform": logits.shape[1] / temperature,
            "predicted": 1 / temperature,
        }
        return factor[objective] * through_softmax
    if objective == "confounding":
        s = torch.sigmoid(logits)
        return s * (1 - s) * grad
    return torch.zeros_like(logits)


def row_norm_vjp(rows: Tensor, grad: Tensor, norm: str) -> Tensor:
    """grad (B,) · d‖row‖/d row, (B, N); 0 at a row of zeros; L∞ at the first largest entry."""
    if norm == "l1":
        return grad.unsqueeze(1) * rows.sign()
    if norm == "l2":
        length = torch.linalg.vector_norm(rows, dim=1, keepdim=True)
        return grad.unsqueeze(1) * rows / torch.where(length > 0, length, 1)
    if rows.shape[1] == 0:
        return torch.zeros_like(rows)
    largest = functional.one_hot(rows.abs().argmax(dim=1), rows.shape[1]).to(rows.dtype)
    return grad.unsqueeze(1) * rows.sign() * largest
