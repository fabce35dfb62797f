"""Sufficient statistics that absorb a batch, merge with another of their kind, and finish.

Every fit in the project is a merge of these. Sums are kept in float64 on the data's device, about
the running mean (Chan, Golub and LeVeque 1983), so nothing cancels when the mean is much larger
than the spread. However the data are split into batches and shards, and in whatever order those
come, counts and reservoirs end up identical and sums agree to rounding in float64.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from grood_fast.errors import FitWarning, InputError, warn
from grood_fast.hashing import hash_indices

Method = TypeVar("Method", bound=Callable[..., Any])

CLASS_SCATTER_BUDGET = 4 << 30
"""Default limit in bytes on what a :class:`ClassMoments` may hold."""

SLACK = 0.25
"""How much more than its capacity a :class:`Reservoir` holds before it chooses."""


def keeps_state(method: Method) -> Method:
    """Run a method without autograd and outside inference mode.

    What a statistic keeps outlives the pass; where a user runs that in inference mode, an inference
    tensor could not be updated in place after it.
    """
    return torch.inference_mode(mode=False)(torch.no_grad()(method))


def require_rows(rows: Tensor, dim: int | None = None, what: str = "features") -> None:
    """Raise :class:`InputError` unless ``rows`` is a floating-point (B, dim) tensor.

    Args:
        rows: one vector a sample.
        dim: the expected number of columns; None accepts any but zero.
        what: how the message names the rows.
    """
    expected = "D" if dim is None else str(dim)
    if not isinstance(rows, Tensor) or rows.ndim != 2 or not rows.is_floating_point():
        found = (
            f"a {rows.dtype} tensor of shape {tuple(rows.shape)}"
            if isinstance(rows, Tensor)
            else type(rows).__name__
        )
        raise InputError(
            f"{what} must be a floating-point tensor of shape (B, {expected}), got {found}: "
            "flatten or pool each sample to one vector."
        )
    if rows.shape[1] == 0 or (dim is not None and rows.shape[1] != dim):
        raise InputError(
            f"{what} must have {expected} columns, got {rows.shape[1]}: every batch, shard and "
            "scored sample must come from the same representation."
        )


def checked_labels(labels: Tensor | None, rows: Tensor, num_classes: int | None = None) -> Tensor:
    """The labels (B,) as int64, beside the rows (B, ...) they belong to.

    Args:
        labels: integers in [0, num_classes), or at least 0 where ``num_classes`` is None.
        rows: one a sample.
        num_classes: C.

    Raises:
        InputError: no labels, another shape or type, or labels out of range.
    """
    if labels is None:
        raise InputError("class labels are needed: let the reference loader yield (input, label).")
    if labels.shape != rows.shape[:1] or labels.is_floating_point() or labels.is_complex():
        raise InputError(
            f"labels must be integers of shape ({len(rows)},), got a {labels.dtype} tensor of "
            f"shape {tuple(labels.shape)}: one class number a sample, not one-hot."
        )
    labels = labels.to(rows.device, torch.int64)
    if len(labels):
        lowest, highest = (int(bound) for bound in labels.aminmax())
        if lowest < 0 or (num_classes is not None and highest >= num_classes):
            limit = "" if num_classes is None else f" and less than {num_classes}"
            raise InputError(
                f"labels must be at least 0{limit}, got {lowest} to {highest}: the reference "
                "must hold in-distribution samples only, with the classes numbered from 0."
            )
    return labels


def warn_of_missing_classes(seen: Sequence[int], classes: int) -> None:
    """Warn (:class:`FitWarning`) where not all classes from 0 to C − 1 have been seen."""
    missing = sorted(set(range(classes)) - set(seen))
    if missing:
        names = ", ".join(map(str, missing[:5])) + (", …" if len(missing) > 5 else "")
        warn(
            f"{len(missing)} of {classes} classes have no reference samples ({names}): they are "
            "left out, so their samples will look out of distribution.",
            FitWarning,
        )


def require_finite(rows: Tensor, indices: Tensor | None = None, what: str = "features") -> None:
    """Raise :class:`InputError` if any sample holds a NaN or an infinity.

    Args:
        rows: (B, ...) floating point.
        indices: (B,) the samples' positions in the reference data, to name them; without it the
            message names rows of the batch.
        what: how the message names the rows.
    """
    bad = ~torch.isfinite(rows.flatten(1)).all(dim=1) if rows.ndim > 1 else ~torch.isfinite(rows)
    if not bool(bad.any()):
        return
    positions = bad.nonzero().flatten()
    place = "rows of the batch"
    if indices is not None:
        positions, place = indices.to(positions.device)[positions], "positions"
    shown = ", ".join(str(position) for position in positions[:5].tolist())
    more = ", …" if len(positions) > 5 else ""
    raise InputError(
        f"{what} of {len(positions)} of {len(rows)} samples hold NaN or Inf "
        f"({place} {shown}{more}): look at these inputs, and at the model's precision, or leave "
        "them out of the reference."
    )


def require_same_config(mine: Any, other: Any) -> None:
    """Raise :class:`InputError` unless both are of one type and have equal ``config()``."""
    if type(mine) is not type(other) or mine.config() != other.config():
        theirs = f"({other.config()})" if hasattr(other, "config") else ""
        raise InputError(
            f"cannot merge {type(other).__name__}{theirs} into "
            f"{type(mine).__name__}({mine.config()}): shards must be made with the same settings."
        )


class Moments:
    """Count, mean and scatter of vectors.

    Args:
        dim: D, the vectors' length; None takes it from the first batch.

    Attributes:
        dim: D, or None before the first batch.
        count: number of vectors N.
        mean: (D,) float64; None while nothing was absorbed.
        scatter: (D, D) float64, the sum of (x - mean)(x - mean)ᵀ; None while nothing was absorbed.
    """

    def __init__(self, dim: int | None = None) -> None:
        self.dim = dim
        self.count = 0
        self.mean: Tensor | None = None
        self.scatter: Tensor | None = None

    @keeps_state
    def absorb(self, rows: Tensor, indices: Tensor | None = None) -> None:
        """Take in (B, D) floating-point vectors; ``indices`` (B,) only name samples in errors.

        Raises:
            InputError: for another shape, or NaN or Inf among the values.
        """
        require_rows(rows, self.dim)
        require_finite(rows, indices)
        self.dim = rows.shape[1]
        if len(rows) == 0:
            return
        values = rows.to(torch.float64)
        mean = values.mean(dim=0)
        centred = values - mean
        self._combine(len(rows), mean, centred.T @ centred)

    @keeps_state
    def merge(self, other: Moments) -> None:
        """Add what ``other`` has absorbed; ``other`` is left as it was."""
        if other.mean is None or other.scatter is None:
            return
        if self.dim not in (None, other.dim):
            raise InputError(f"cannot merge moments of {other.dim} features with {self.dim}.")
        self.dim = other.dim
        self._combine(other.count, other.mean, other.scatter)

    def _combine(self, count: int, mean: Tensor, scatter: Tensor) -> None:
        if self.mean is None or self.scatter is None:
            self.count, self.mean, self.scatter = count, mean.clone(), scatter.clone()
            return
        total = self.count + count
        shift = mean.to(self.mean.device) - self.mean
        self.scatter += scatter.to(self.mean.device)
        self.scatter.addr_(shift, shift, alpha=self.count * count / total)
        self.mean += shift * (count / total)
        self.count = total

    def covariance(self) -> Tensor:
        """(D, D) float64: the scatter over N (maximum likelihood, not N - 1).

        Raises:
            InputError: when nothing was absorbed.
        """
        if self.scatter is None:
            raise _no_samples()
        return self.scatter / self.count


class ClassMoments:
    """Count and mean of every class, with the scatter within classes.

    Args:
        num_classes: C; None lets the number of classes grow with the labels.
        dim: D, the vectors' length; None takes it from the first batch.
        covariance: ``"tied"`` keeps one scatter pooled over the classes, 8 D² bytes;
            ``"class"`` keeps one a class, 8 C D² bytes.
        budget: limit in bytes on the means and scatters; beyond it ``absorb`` refuses.

    Attributes:
        counts: (C,) int64 samples a class.
        means: (C, D) float64, zero for a class without samples.
    """

    def __init__(
        self,
        num_classes: int | None = None,
        dim: int | None = None,
        covariance: Literal["tied", "class"] = "tied",
        budget: int = CLASS_SCATTER_BUDGET,
    ) -> None:
        if covariance not in ("tied", "class"):
            raise InputError(f"covariance must be 'tied' or 'class', got {covariance!r}.")
        self.num_classes = num_classes
        self.dim = dim
        self.covariance = covariance
        self.budget = budget
        self.counts = torch.zeros(0, dtype=torch.int64)
        self.means = torch.zeros(0, 0, dtype=torch.float64)
        # One (D, D) matrix a class, or the pooled one alone under the key None. Separate matrices
        # let a class appear without copying those of the others.
        self._scatters: dict[int | None, Tensor] = {}

    def config(self) -> dict[str, Any]:
        """What two shards must share to be merged."""
        return {"num_classes": self.num_classes, "covariance": self.covariance}

    @property
    def count(self) -> int:
        """Number of samples N over all classes."""
        return int(self.counts.sum())

    @keeps_state
    def absorb(self, rows: Tensor, labels: Tensor | None, indices: Tensor | None = None) -> None:
        """Take in one batch.

        Args:
            rows: (B, D) floating point.
            labels: (B,) integers in [0, C), or non-negative where C grows.
            indices: (B,) the samples' positions in the reference data, to name them in errors.

        Raises:
            InputError: for another shape, labels out of range, NaN or Inf among the values, or
                when the state would outgrow its budget.
        """
        require_rows(rows, self.dim)
        labels = checked_labels(labels, rows, self.num_classes)
        require_finite(rows, indices)
        self.dim = rows.shape[1]
        if len(rows) == 0:
            return
        values = rows.to(torch.float64)
        classes, position, counts = torch.unique(labels, return_inverse=True, return_counts=True)
        sums = values.new_zeros(len(classes), self.dim).index_add_(0, position, values)
        means = sums / counts.unsqueeze(1)
        centred = values - means[position]
        scatters: Iterable[Tensor]
        if self.covariance == "tied":
            scatters = [centred.T @ centred]
        else:
            groups = centred[position.argsort()].split(counts.tolist())
            scatters = (group.T @ group for group in groups)
        self._combine(classes, counts, means, scatters)

    @keeps_state
    def merge(self, other: ClassMoments) -> None:
        """Add what ``other`` has absorbed; ``other`` is left as it was."""
        require_same_config(self, other)
        if other.dim is None or other.count == 0:
            return
        if self.dim not in (None, other.dim):
            raise InputError(f"cannot merge moments of {other.dim} features with {self.dim}.")
        self.dim = other.dim
        classes = other.counts.nonzero().flatten()
        keys = [None] if self.covariance == "tied" else classes.tolist()
        scatters = (other._scatters[key] for key in keys)
        self._combine(classes, other.counts[classes], other.means[classes], scatters)

    def _combine(
        self, classes: Tensor, counts: Tensor, means: Tensor, scatters: Iterable[Tensor]
    ) -> None:
        if self.count == 0:
            self.counts = self.counts.to(means.device)
            self.means = self.means.to(means.device)
        device = self.means.device
        classes, counts, means = classes.to(device), counts.to(device), means.to(device)
        self._make_room(classes)
        before = self.counts[classes]
        share = (counts / (before + counts).to(torch.float64)).unsqueeze(1)
        shift = means - self.means[classes]
        # The scatter between the old and the new mean of a class; zero for a class just met.
        between = shift * (before.unsqueeze(1) * share).sqrt()
        if self.covariance == "tied":
            steps: Iterable[tuple[int | None, Tensor]] = [(None, between)]
        else:
            steps = zip(classes.tolist(), torch.split(between, 1), strict=True)
        for (key, step), scatter in zip(steps, scatters, strict=True):
            self._scatters[key] += scatter.to(device)
            self._scatters[key].addmm_(step.T, step)
        self.means[classes] += shift * share
        self.counts[classes] += counts

    def _make_room(self, classes: Tensor) -> None:
        assert self.dim is not None
        size = max(int(classes.max()) + 1, self.num_classes or 0, len(self.counts))
        keys = {None} if self.covariance == "tied" else set(classes.tolist())
        new = keys - self._scatters.keys()
        needed = 8 * self.dim * (size + self.dim * (len(self._scatters) + len(new)))
        if needed > self.budget:
            what = "one covariance a class" if self.covariance == "class" else "class means"
            raise InputError(
                f"{what} of {self.dim} features up to class {size - 1} would take "
                f"{needed / 2**30:.1f} GiB, more than the {self.budget / 2**30:.1f} GiB allowed: "
                "use Mahalanobis (one covariance for all classes), fewer features, or check that "
                "the labels are class numbers."
            )
        grown = size - len(self.counts)
        if grown:
            self.counts = torch.cat([self.counts, self.counts.new_zeros(grown)])
            kept = self.means.reshape(len(self.means), self.dim)
            self.means = torch.cat([kept, kept.new_zeros(grown, self.dim)])
        for key in new:
            self._scatters[key] = self.means.new_zeros(self.dim, self.dim)

    def seen_classes(self) -> Tensor:
        """See :func:`seen_classes`."""
        return seen_classes(self.counts)

    def within_scatter(self) -> Tensor:
        """(D, D) float64: the sum over all samples of (x - mean of its class)(...)ᵀ.

        Raises:
            InputError: when nothing was absorbed.
        """
        if not self._scatters:
            raise _no_samples()
        first, *others = self._scatters.values()
        pooled = first.clone()
        for scatter in others:
            pooled += scatter
        return pooled

    def class_scatter(self, label: int) -> Tensor:
        """(D, D) float64: the scatter of one class with samples; needs ``covariance="class"``."""
        return self._scatters[label]

    def total(self) -> Moments:
        """The moments of all samples regardless of class: scatter within plus between classes.

        Raises:
            InputError: when nothing was absorbed.
        """
        moments = Moments(self.dim)
        scatter = self.within_scatter()
        weights = self.counts.to(torch.float64).unsqueeze(1)
        mean = (weights * self.means).sum(dim=0) / weights.sum()
        shift = self.means - mean
        moments._combine(self.count, mean, scatter + (weights * shift).T @ shift)
        return moments


def seen_classes(counts: Tensor) -> Tensor:
    """(C',) int64: the classes with samples, ascending, of (C,) samples a class.

    A class without any is left out, with a :class:`FitWarning`.

    Raises:
        InputError: when nothing was absorbed.
    """
    seen = counts.nonzero().flatten()
    if len(seen) == 0:
        raise _no_samples()
    warn_of_missing_classes(seen.tolist(), len(counts))
    return seen


class ClassMeans:
    """The mean of every class, of vectors whose scatter would be too large to keep.

    Args:
        budget: limit in bytes on the sums, 8 C D; beyond it ``absorb`` refuses.
    """

    def __init__(self, budget: int = CLASS_SCATTER_BUDGET) -> None:
        self.budget = budget
        self._counts = torch.zeros(0, dtype=torch.int64)
        self._sums = torch.zeros(0, 0, dtype=torch.float64)

    @keeps_state
    def absorb(self, rows: Tensor, labels: Tensor | None) -> None:
        """Take in (B, D) floating-point vectors and their (B,) classes.

        Raises:
            InputError: for another shape, labels below 0, or sums that would outgrow the budget.
        """
        labels = checked_labels(labels, rows)
        require_rows(rows, self._sums.shape[1] or None)
        if len(rows) == 0:
            return
        size = int(labels.max()) + 1
        sums = torch.zeros(size, rows.shape[1], dtype=torch.float64, device=rows.device)
        counts = torch.bincount(labels, minlength=size)
        self._add(counts, sums.index_add_(0, labels, rows.double()))

    @keeps_state
    def merge(self, other: ClassMeans) -> None:
        """Add what ``other`` has absorbed; ``other`` is left as it was."""
        if len(other._counts):
            self._add(other._counts, other._sums)

    def finish(self) -> tuple[Tensor, Tensor]:
        """The classes with samples (C',), ascending, and their means (C', D) float64.

        Warns and raises as :func:`seen_classes`.
        """
        seen = seen_classes(self._counts)
        return seen, self._sums[seen] / self._counts[seen].unsqueeze(1)

    def _add(self, counts: Tensor, sums: Tensor) -> None:
        size, dim = max(len(counts), len(self._counts)), sums.shape[1]
        if 8 * size * dim > self.budget:
            raise InputError(
                f"the means of {size} classes of {dim} features would take "
                f"{8 * size * dim / 2**30:.1f} GiB, more than the {self.budget / 2**30:.1f} GiB "
                "allowed: choose a layer with smaller activations."
            )
        if len(self._counts) < size:
            grown = sums.new_zeros(size, dim)
            grown[: len(self._sums)] = self._sums.reshape(-1, dim)
            more = counts.new_zeros(size)
            more[: len(self._counts)] = self._counts
            self._counts, self._sums = more, grown
        self._counts[: len(counts)] += counts.to(self._counts.device)
        self._sums[: len(sums)] += sums.to(self._sums.device)


class Reservoir:
    """A sample of the rows it has seen, chosen by a hash of each sample's index.

    A row's key is a 64-bit hash of (sample index, seed); the rows with the smallest keys are kept.
    So what is kept depends on which samples were seen alone: not on their order, batches or
    shards. Rows keep their dtype and device; memory is that of the kept
    rows, a quarter more, and a batch.

    Args:
        capacity: how many rows to keep; None keeps all.
        balanced: keep an equal number a class, by a column named ``"labels"``. Where a class runs
            short, the others share its places. Exactly: the rows are taken in the order of
            (rank of the key within the class, key).
        seed: another seed keeps another sample.

    Attributes:
        seen: number of rows absorbed.
    """

    def __init__(
        self, capacity: int | None = None, *, balanced: bool = False, seed: int = 0
    ) -> None:
        if capacity is not None and capacity < 1:
            raise InputError(f"a reservoir's capacity must be at least 1, got {capacity}.")
        self.capacity = capacity
        self.balanced = balanced
        self.seed = seed
        self.seen = 0
        self._held = 0
        self._buffers: dict[str, Tensor] = {}

    def config(self) -> dict[str, Any]:
        """What two shards must share to be merged."""
        return {"capacity": self.capacity, "balanced": self.balanced, "seed": self.seed}

    @property
    def kept(self) -> int:
        """Number of rows that :meth:`finish` would give now."""
        return self._held if self.capacity is None else min(self._held, self.capacity)

    @keeps_state
    def absorb(self, columns: Mapping[str, Tensor], indices: Tensor) -> None:
        """Take in one batch.

        Args:
            columns: name → (B, ...); the same names, dtypes and trailing shapes in every batch.
                ``"labels"`` (B,) is required where ``balanced``.
            indices: (B,) int64, each sample's position in the reference data.

        Raises:
            InputError: for columns that do not fit, or NaN or Inf among floating-point values.
        """
        if self.balanced and "labels" not in columns:
            raise InputError("a class-balanced reservoir needs a column 'labels'.")
        if indices.ndim != 1 or indices.dtype != torch.int64:
            raise InputError(
                f"indices must be int64 of shape (B,), got {indices.dtype} of shape "
                f"{tuple(indices.shape)}."
            )
        for name, column in columns.items():
            if column.shape[:1] != indices.shape or name == "indices":
                raise InputError(
                    f"column {name!r} of shape {tuple(column.shape)} does not go with "
                    f"{len(indices)} indices: one row a sample, and no column named 'indices'."
                )
            if column.is_floating_point():
                require_finite(column, indices, what=name)
        self._insert({**columns, "indices": indices})
        self.seen += len(indices)

    @keeps_state
    def merge(self, other: Reservoir) -> None:
        """Add what ``other`` has absorbed; ``other`` is left as it was."""
        require_same_config(self, other)
        if other._buffers:
            self._insert({name: rows[: other._held] for name, rows in other._buffers.items()})
            self.seen += other.seen

    @keeps_state
    def finish(self) -> dict[str, Tensor]:
        """The kept rows by column name, and ``"indices"``, all sorted by index.

        Raises:
            InputError: when nothing was absorbed.
        """
        if self._held == 0:
            raise _no_samples()
        self._prune()
        order = self._buffers["indices"][: self._held].argsort()
        return {name: rows[: self._held][order] for name, rows in self._buffers.items()}

    def _insert(self, columns: dict[str, Tensor]) -> None:
        columns = self._fitting(columns)
        start = self._held
        self._held += len(columns["indices"])
        self._grow()
        for name, buffer in self._buffers.items():
            buffer[start : self._held] = columns[name]
        # Choosing takes sorting: some rows wait for more to be sorted with.
        if self.capacity is not None and self._held > self.capacity * (1 + SLACK):
            self._prune()

    def _prune(self) -> None:
        """Let go of the rows beyond the capacity."""
        if self.capacity is None or self._held <= self.capacity:
            return
        keys = ["indices", "labels"] if self.balanced else ["indices"]
        chosen = self._chosen({name: self._buffers[name][: self._held] for name in keys})
        for buffer in self._buffers.values():
            buffer[: self.capacity] = buffer[: self._held][chosen]
        self._held = self.capacity

    def _fitting(self, columns: dict[str, Tensor]) -> dict[str, Tensor]:
        """The columns on the buffers' device, after the first batch has settled what they are."""
        if not self._buffers:
            device = next(iter(columns.values())).device
            self._buffers = {
                name: torch.empty((0, *column.shape[1:]), dtype=column.dtype, device=device)
                for name, column in columns.items()
            }
        described = {name: (rows.dtype, rows.shape[1:]) for name, rows in self._buffers.items()}
        if {name: (rows.dtype, rows.shape[1:]) for name, rows in columns.items()} != described:
            raise InputError(
                "a reservoir's columns must keep their names, dtypes and row shapes: started with "
                f"{described}, got { {n: (c.dtype, c.shape[1:]) for n, c in columns.items()} }."
            )
        device = self._buffers["indices"].device
        return {name: column.to(device) for name, column in columns.items()}

    def _grow(self) -> None:
        size = len(self._buffers["indices"])
        if self._held <= size:
            return
        size = max(self._held, 2 * size)
        if self.capacity is not None:
            size = max(self._held, min(size, int(self.capacity * (1 + SLACK))))
        for name, buffer in self._buffers.items():
            self._buffers[name] = buffer.new_empty(size, *buffer.shape[1:])
            self._buffers[name][: len(buffer)] = buffer

    def _chosen(self, rows: dict[str, Tensor]) -> Tensor:
        """Boolean mask of the ``capacity`` rows to keep.

        A row left out here can never be wanted later: rows that arrive only push others back, both
        within a class and in the whole order. Hence merging shards equals one pass.
        """
        indices = rows["indices"]
        order = hash_indices(indices, self.seed).argsort()
        if self.balanced:
            labels = rows["labels"]
            by_class = order[labels[order].argsort(stable=True)]
            ordered_labels = labels[by_class]
            first = torch.searchsorted(ordered_labels, ordered_labels)
            rank = torch.empty_like(indices)
            rank[by_class] = torch.arange(len(indices), device=indices.device) - first
            order = order[rank[order].argsort(stable=True)]
        mask = torch.zeros_like(indices, dtype=torch.bool)
        mask[order[: self.capacity]] = True
        return mask


def _no_samples() -> InputError:
    return InputError("no reference samples were absorbed: the reference loader yielded none.")
