"""Distance to the k-th nearest reference sample."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import torch
from torch import Tensor

from grood_fast import ops
from grood_fast.errors import InputError
from grood_fast.scores.base import Score
from grood_fast.statistics import Reservoir, keeps_state, require_rows, require_same_config

if TYPE_CHECKING:
    from grood_fast.classifier import Classifier

BLOCK_BYTES = 64 << 20
"""How large one temporary of a search may be."""

PRODUCT_BYTES = 8 << 20
"""How large one block of products may be: what stays in a processor's cache is quick to search."""

RANKS_BESIDE = 8
"""Neighbours on either side of the k-th whose distances are recomputed."""

RELATIVE_ERROR = 1e-5
"""Largest relative error of a squared distance that float32 products may cause."""

GROUP = 16
"""How many distances share a minimum where the nearest are selected."""

IVF_TRAINING_ROWS = 39
"""Rows a cell of an inverted file needs at least; faiss complains about fewer."""

Search = Callable[[Tensor, int], tuple[Tensor, Tensor]]


class KNN(Score):
    """Euclidean distance to the k-th nearest reference sample; higher = more OOD.

    Sun et al., "Out-of-Distribution Detection with Deep Nearest Neighbors", ICML 2022. The search
    is exact, but for ``"faiss_ivf"``, and its memory does not grow with (samples scored) x
    (reference samples).

    Accuracy: float32, within 1e-5 relative of the k-th distance between the stored vectors, also
    among near-duplicates. NaN among the features gives a NaN score.

    Args:
        k: which neighbour; the paper uses 50 for CIFAR-10, 200 for CIFAR-100, 1000 for ImageNet.
        metric: ``"cosine"`` scales every vector to unit length first, as the paper does (distances
            in [0, 2]); ``"euclidean"`` does not.
        centred: whether ``"euclidean"`` moves everything by the reference's mean first, which
            changes no distance but its rounding. Not where what counts is near the origin.
        standardize: subtract the mean and divide by the standard deviation of the reference
            samples kept, feature by feature, before anything else. A feature that is constant
            there is only centred.
        max_samples: keep at most this many reference samples, chosen by their index; None keeps
            all, D x 4 bytes each.
        backend: ``"torch"``, on the features' device, or ``"faiss"`` (``IndexFlatL2``, on the
            CPU); the results are the same. ``"faiss_ivf"`` (``IndexIVFFlat``, on the CPU) is for
            millions of reference samples: approximate, because it looks only where most of the
            neighbours are.
        probes: of ``"faiss_ivf"``: into how many of the index' 4√N cells it looks.

    Raises:
        InputError: for an unknown setting, features with NaN or Inf in the reference, or fewer
            than k reference samples.
    """

    name: ClassVar[str] = "knn"
    representation: ClassVar[str] = "features"
    needs_fit: ClassVar[bool] = True

    def __init__(
        self,
        k: int = 50,
        metric: Literal["cosine", "euclidean"] = "cosine",
        standardize: bool = False,
        max_samples: int | None = None,
        backend: Literal["torch", "faiss", "faiss_ivf"] = "torch",
        centred: bool = True,
        probes: int = 16,
    ) -> None:
        super().__init__()
        if k < 1:
            raise InputError(f"k must be at least 1, got {k}.")
        if metric not in ("cosine", "euclidean"):
            raise InputError(f"metric must be 'cosine' or 'euclidean', got {metric!r}.")
        if backend not in ("torch", "faiss", "faiss_ivf"):
            raise InputError(f"backend must be 'torch', 'faiss' or 'faiss_ivf', got {backend!r}.")
        if probes < 1:
            raise InputError(f"probes must be at least 1, got {probes}.")
        if max_samples is not None and max_samples < k:
            raise InputError(f"max_samples={max_samples} is less than k={k}: keep at least k.")
        if backend != "torch":
            _import_faiss()
        self.k = k
        self.metric = metric
        self.standardize = standardize
        self.max_samples = max_samples
        self.backend = backend
        self.centred = centred
        self.probes = probes
        self._reservoir = Reservoir(max_samples)
        self._faiss: tuple[Tensor, Any] | None = None

    def config(self) -> dict[str, Any]:
        return {
            "k": self.k,
            "metric": self.metric,
            "standardize": self.standardize,
            "max_samples": self.max_samples,
            "backend": self.backend,
            "centred": self.centred,
            "probes": self.probes,
        }

    def begin(self, classifier: Classifier) -> None:
        self.fitted = {}
        self._reservoir = Reservoir(self.max_samples)

    @keeps_state
    def absorb(self, z: Tensor, labels: Tensor | None, indices: Tensor) -> None:
        """Take in one reference batch: ``z`` (B, D) floating point; labels are not read."""
        require_rows(z)
        self._reservoir.absorb({"features": z.float()}, indices)

    def merge(self, other: KNN) -> None:
        require_same_config(self, other)
        self._reservoir.merge(other._reservoir)

    @keeps_state
    def finish(self) -> None:
        if self._reservoir.kept < self.k:
            raise InputError(
                f"k={self.k} neighbours need as many reference samples, got "
                f"{self._reservoir.kept}: give more reference data or a smaller k."
            )
        bank = self._reservoir.finish()["features"]
        self._reservoir = Reservoir(self.max_samples)
        blocks = torch.split(bank, max(1, BLOCK_BYTES // (8 * bank.shape[1])))
        offset, scale = torch.zeros_like(bank[0]), torch.ones_like(bank[0])
        # Distances do not change when everything moves, and products cancel less near the origin.
        if self.standardize or (self.metric == "euclidean" and self.centred):
            mean = torch.stack([block.double().sum(dim=0) for block in blocks]).sum(dim=0)
            mean /= len(bank)
            offset = mean.float()
        if self.standardize:
            squares = [(block.double() - mean).square().sum(dim=0) for block in blocks]
            deviation = (torch.stack(squares).sum(dim=0) / len(bank)).sqrt()
            # Below float32's resolution a spread is rounding, not information.
            largest = torch.linalg.vector_norm(bank, ord=float("inf"), dim=0)
            resolution = torch.finfo(torch.float32).eps * largest
            scale = deviation.float().where(deviation > resolution, scale)
        self.fitted = {"bank": bank, "offset": offset, "scale": scale}
        for block in blocks:
            block.copy_(self._prepared(block))
        if self.k == 1:  # the search for the nearest is fastest in the order of the norms
            lengths = [torch.linalg.vector_norm(b, dim=1, dtype=torch.float64) for b in blocks]
            norms, order = torch.cat(lengths).sort(stable=True)
            self.fitted |= {"bank": bank[order], "norms": norms.float()}

    def _prepared(self, features: Tensor) -> Tensor:
        features = (features.float() - self.fitted["offset"]) / self.fitted["scale"]
        if self.metric == "euclidean":
            return features
        # Dividing by the largest entry first keeps the squares of tiny vectors from vanishing.
        tiny = torch.finfo(torch.float32).tiny
        features = features / features.abs().amax(dim=1, keepdim=True).clamp(min=tiny)
        return torch.nn.functional.normalize(features, dim=1)

    @torch.no_grad()
    def __call__(self, z: Tensor) -> Tensor:
        """Distances to the k-th neighbour of (B, D) features: (B,) float32, higher = more OOD."""
        self.require_fitted()
        bank = self.fitted["bank"]
        require_rows(z, bank.shape[1])
        if self.k == 1 and self.backend == "torch" and z.device.type == "cpu":
            norms = self.fitted["norms"]
            return ops.nearest_distance(self._prepared(z), bank, bank_norms=norms)[0]
        search = None if self.backend == "torch" else self._faiss_search()
        return kth_nearest_distance(self._prepared(z), bank, self.k, search=search)

    def _faiss_search(self) -> Search:
        bank = self.fitted["bank"]
        if self._faiss is None or self._faiss[0] is not bank:
            self._faiss = (bank, self._faiss_index(bank))
        index = self._faiss[1]

        def search(queries: Tensor, count: int) -> tuple[Tensor, Tensor]:
            squared, rows = (
                torch.from_numpy(found).to(queries.device)
                for found in index.search(queries.cpu().numpy(), count)
            )
            few = (rows < 0).any(dim=1)  # the cells looked into hold less than was asked for
            if bool(few.any()):
                step = max(1, BLOCK_BYTES // (8 * bank.shape[1]))
                squared[few], rows[few] = _nearest_by_products(queries[few], bank, count, step)
            return squared, rows

        return search

    def _faiss_index(self, bank: Tensor) -> Any:
        faiss, (count, columns) = _import_faiss(), bank.shape
        vectors = bank.cpu().numpy()
        if self.backend == "faiss":
            index = faiss.IndexFlatL2(columns)
        else:
            cells = max(1, min(int(4 * count**0.5), count // IVF_TRAINING_ROWS))
            index = faiss.IndexIVFFlat(faiss.IndexFlatL2(columns), columns, cells)
            index.train(vectors)
            index.nprobe = min(self.probes, cells)
        index.add(vectors)
        return index


def kth_nearest_distance(
    queries: Tensor,
    bank: Tensor,
    k: int,
    *,
    block_bytes: int | None = None,
    search: Search | None = None,
) -> Tensor:
    """Euclidean distance from every query to its k-th nearest row of the bank.

    Neighbours are ranked by ‖b‖² - 2 q·b, which is a matrix product but cancels when q is close to
    b. So the distances of the ranks around the k-th are recomputed from the differences, and a
    query whose k-th neighbour could still be among the ranks left out is searched again with
    float64 products.

    Args:
        queries: (B, D) float32.
        bank: (N, D) float32, N at least k.
        k: 1 for the nearest.
        block_bytes: limit on each temporary; ``BLOCK_BYTES`` unless told.
        search: another way to rank: (queries, count) → squared distances and rows, ascending.

    Returns:
        (B,) float32.
    """
    budget = BLOCK_BYTES if block_bytes is None else block_bytes
    dim = bank.shape[1]
    rows_at_once = max(1, budget // (8 * dim * (2 * RANKS_BESIDE + 1)))
    pieces = []
    for piece in torch.split(queries, rows_at_once):
        products = min(PRODUCT_BYTES, budget // 2)
        bank_rows = max(1, min(products // (4 * max(len(piece), 1)), budget // (8 * dim)))

        def by_products(some: Tensor, count: int, step: int = bank_rows) -> tuple[Tensor, Tensor]:
            return _nearest_by_products(some, bank, count, step)

        squared, doubtful = _kth_squared(piece, bank, k, search or by_products)
        if bool(doubtful.any()):
            again, _ = _kth_squared(piece[doubtful].double(), bank, k, by_products)
            squared[doubtful] = again.float()
        pieces.append(squared.sqrt())
    return torch.cat(pieces)


def _kth_squared(queries: Tensor, bank: Tensor, k: int, search: Search) -> tuple[Tensor, Tensor]:
    """Squared distance to the k-th neighbour, and where ``search`` was too coarse to be sure."""
    first, end = max(0, k - 1 - RANKS_BESIDE), min(len(bank), k + RANKS_BESIDE)
    ranked, rows = search(queries, end)
    ranked, rows = ranked[:, first:], rows[:, first:]
    exact = (bank[rows].to(queries.dtype) - queries.unsqueeze(1)).square().sum(dim=2)
    kth = exact.sort(dim=1).values[:, k - 1 - first]

    # How far off the other products may be: four times the worst seen here, which notices reduced
    # precision too (TF32, bf16), and at least one rounding.
    largest = queries.norm(dim=1) + exact.amax(dim=1).sqrt()
    rounding = torch.finfo(queries.dtype).eps * largest.square()
    error = torch.maximum(4 * (ranked - exact).abs().amax(dim=1), rounding)
    doubtful = torch.zeros_like(kth, dtype=torch.bool)
    if first > 0:  # one of the nearer ranks left out may really be beyond the k-th
        doubtful |= ranked[:, 0] + error > kth
    if end < len(bank):  # one of the farther ranks left out may really be within the k-th
        doubtful |= ranked[:, -1] - error < kth
    return kth, doubtful & (error > RELATIVE_ERROR * kth)


def _nearest_by_products(
    queries: Tensor, bank: Tensor, count: int, bank_rows: int
) -> tuple[Tensor, Tensor]:
    """The ``count`` nearest rows of the bank, (B, count), ascending: a running selection over
    blocks of ``bank_rows`` rows, in the queries' precision."""
    best: tuple[Tensor, Tensor] | None = None
    start = 0
    doubled = queries * -2
    # One buffer for all blocks: fresh memory costs more than the product that fills it.
    buffer = queries.new_empty(len(queries) * min(bank_rows, len(bank)))
    for block in torch.split(bank, bank_rows):
        block = block.to(queries.dtype)
        partial = buffer[: len(queries) * len(block)].view(len(queries), len(block))
        torch.mm(doubled, block.T, out=partial)
        # ‖q‖² is the same for the whole row: left to the end.
        partial += block.square().sum(dim=1)
        values, rows = _smallest(partial, min(count, len(block)))
        rows = rows + start
        start += len(block)
        if best is not None:
            values, rows = torch.cat([best[0], values], dim=1), torch.cat([best[1], rows], dim=1)
            values, chosen = values.topk(min(count, values.shape[1]), dim=1, largest=False)
            rows = rows.gather(1, chosen)
        best = values, rows
    assert best is not None
    return best[0] + queries.square().sum(dim=1, keepdim=True), best[1]


def _smallest(values: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The ``count`` smallest of each row (B, N), ascending, and where they are.

    ``topk`` walks through N numbers far more slowly than a minimum does. The ``count`` smallest lie
    in the ``count`` groups with the smallest minima, so only those are looked through.
    """
    size = values.shape[1] // GROUP
    if size < 2 * count:
        found = values.topk(count, dim=1, largest=False)
        return found.values, found.indices
    whole = size * GROUP
    minima = values[:, :whole].view(len(values), GROUP, size).amin(dim=1)
    groups = minima.topk(count, dim=1, largest=False).indices
    members = torch.arange(GROUP, device=values.device).view(1, GROUP, 1) * size
    rest = torch.arange(whole, values.shape[1], device=values.device).expand(len(values), -1)
    where = torch.cat([(groups.unsqueeze(1) + members).flatten(1), rest], dim=1)
    found = values.gather(1, where).topk(count, dim=1, largest=False)
    return found.values, where.gather(1, found.indices)


def _import_faiss() -> Any:
    try:
        import faiss
    except ImportError as error:
        raise InputError(
            "KNN(backend='faiss') needs faiss, which is not installed: "
            'pip install "grood-fast[faiss]", or use backend="torch".'
        ) from error
    return faiss
