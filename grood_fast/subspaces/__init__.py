"""Subspaces of last-layer gradients that are never formed."""

from __future__ import annotations

from grood_fast.subspaces.builder import KINDS, Subspace, build
from grood_fast.subspaces.forms import FORMS, Form, choose, costs, project
from grood_fast.subspaces.state import GradientState

__all__ = [
    "FORMS",
    "KINDS",
    "Form",
    "GradientState",
    "Subspace",
    "build",
    "choose",
    "costs",
    "project",
]
