// grood_fast::nearest_distance: the Euclidean distance of every query to its nearest row of a bank.
//
// Tile by tile: torch's product, then a kernel that keeps what is nearer. By the triangle
// inequality a tile whose rows are all much longer or shorter than a query is no matter to it; the
// tighter the tiles' ranges of norms, the fewer remain, so a bank sorted by norm is searched
// fastest.
#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <vector>

#include "products.h"

namespace grood_fast::ops {
namespace {

constexpr int64_t kTileBankRows = 1024;
// Queries that are searched for together: the more, the better for the products, as long as their
// norms are similar.
constexpr int64_t kFewQueries = 64, kManyQueries = 256;
constexpr double kSimilar = 1.5;
// Products a thread should at least get to look through.
constexpr int64_t kGrain = 1 << 15;

struct Range {
  double low = std::numeric_limits<double>::infinity(), high = 0;
  bool unknown = false;  // a norm is NaN

  template <typename Real>
  Range(const Real* norms, int64_t count) {
    for (int64_t i = 0; i < count; ++i) {
      const double norm = norms[i];
      unknown |= norm != norm;
      low = std::min(low, norm);
      high = std::max(high, norm);
    }
  }

  // No distance between a row in this range and a query of this norm can be less; NaN: unknown.
  double gap(double norm, double tolerance) const {
    if (unknown) return std::numeric_limits<double>::quiet_NaN();
    return std::max({low - norm, norm - high, 0.0}) - tolerance * (norm + high);
  }
};

template <typename Real>
struct Search {
  const Tensor& queries;     // Real [B, D], contiguous
  const Tensor& bank;        // [N, D]
  const Tensor& bank_norms;  // Real [N], contiguous
  double tolerance;
  Real* distance;    // [B]
  int64_t* nearest;  // [B]

  void run() const {
    const int64_t batch = queries.size(0);
    std::vector<Real> norm(batch, Real(1));
    const RowNormArguments lengths{
        queries.const_data_ptr(),
        dtype(),
        queries.size(1),
        queries.size(1),
        Norm::l2,
        false,
        dtype(),
        norm.data()};
    torch::stable::parallel_for(
        0, batch, rows_per_task(0, queries.size(1)),
        [&](int64_t begin, int64_t end) { multiply_row_norm(lengths, begin, end); });
    std::vector<Range> ranges;
    const Real* norms = static_cast<const Real*>(bank_norms.const_data_ptr());
    for (int64_t first = 0; first < bank.size(0); first += kTileBankRows)
      ranges.emplace_back(norms + first, std::min(kTileBankRows, bank.size(0) - first));

    std::vector<int64_t> order(batch);
    std::iota(order.begin(), order.end(), int64_t{0});
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
      return norm[a] < norm[b] || (norm[b] != norm[b] && norm[a] == norm[a]);
    });
    for (int64_t start = 0, end = 0; start < batch; start = end) {
      const auto similar = [&](int64_t i) {
        return norm[order[i]] <= kSimilar * norm[order[start]];
      };
      end = std::min(batch, start + kFewQueries);
      while (end < batch && end < start + kManyQueries && similar(end)) ++end;
      block({order.begin() + start, order.begin() + end}, norm, ranges);
    }
  }

 private:
  static constexpr DType dtype() {
    return sizeof(Real) == sizeof(double) ? DType::float64 : DType::float32;
  }

  void block(
      const std::vector<int64_t>& members, const std::vector<Real>& norm,
      const std::vector<Range>& ranges) const {
    const int64_t columns = queries.size(1), most = static_cast<int64_t>(members.size());
    // The nearest tiles first: what they find rules out the others.
    std::vector<int64_t> tiles(ranges.size());
    std::iota(tiles.begin(), tiles.end(), int64_t{0});
    const double middle = norm[members[members.size() / 2]];
    const auto away = [&](int64_t tile) {
      const double gap = ranges[tile].gap(middle, 0);
      return gap == gap ? gap : 0.0;
    };
    std::stable_sort(
        tiles.begin(), tiles.end(), [&](int64_t a, int64_t b) { return away(a) < away(b); });

    const Tensor gathered = torch::stable::new_empty(queries, {most, columns});
    const Tensor products = torch::stable::new_empty(queries, {most * kTileBankRows});
    std::vector<int64_t> active, before, index(most);
    std::vector<Real> best(most), length(most);
    for (const int64_t tile : tiles) {
      active.clear();
      for (const int64_t query : members) {
        if (!(ranges[tile].gap(norm[query], tolerance) > distance[query])) active.push_back(query);
      }
      if (active.empty()) continue;
      const int64_t height = static_cast<int64_t>(active.size());
      for (int64_t i = 0; i < height; ++i) {
        best[i] = distance[active[i]];
        index[i] = nearest[active[i]];
        length[i] = norm[active[i]];
        if (active != before) {
          const Real* from = static_cast<const Real*>(queries.const_data_ptr());
          std::memcpy(
              static_cast<Real*>(gathered.mutable_data_ptr()) + i * columns,
              from + active[i] * columns, columns * sizeof(Real));
        }
      }
      before = active;
      const int64_t first = tile * kTileBankRows;
      const int64_t width = std::min(kTileBankRows, bank.size(0) - first);
      const Tensor q = rows(gathered, 0, height);
      const Tensor b =
          torch::stable::contiguous(as_real(rows(bank, first, width), queries.scalar_type()));
      const Tensor p = torch::stable::view(rows(products, 0, height * width), {height, width});
      multiply(q, torch::stable::transpose(b, 0, 1), p);
      const NearestArguments arguments{
          q.const_data_ptr(),
          length.data(),
          b.const_data_ptr(),
          static_cast<const Real*>(bank_norms.const_data_ptr()) + first,
          p.const_data_ptr(),
          dtype(),
          columns,
          width,
          first,
          tolerance,
          best.data(),
          index.data()};
      torch::stable::parallel_for(
          0, height, std::max<int64_t>(1, kGrain / width),
          [&](int64_t begin, int64_t end) { grood_fast::nearest(arguments, begin, end); });
      for (int64_t i = 0; i < height; ++i) {
        distance[active[i]] = best[i];
        nearest[active[i]] = index[i];
      }
    }
  }
};

std::tuple<Tensor, Tensor> nearest_distance(
    const Tensor& queries_in,  // [B, D]
    const Tensor& bank,        // [N, D]
    const Tensor& bank_norms,  // [N]
    double rounding) {         // of the products' factors, relatively, where they are rounded
  check_matrix(queries_in, "queries", "(B, D)");
  check_matrix(bank, "bank", "(N, D)");
  STD_TORCH_CHECK(
      queries_in.size(1) == bank.size(1),
      "queries and bank must have the same number of columns, got ", queries_in.size(1), " and ",
      bank.size(1));
  STD_TORCH_CHECK(bank.size(0) > 0, "bank must have at least one row");
  STD_TORCH_CHECK(
      bank_norms.dim() == 1 && bank_norms.size(0) == bank.size(0),
      "bank_norms must have the shape (N,)");
  const DType dtype = real_dtype_of(bank_norms, "bank_norms");
  dtype_of(bank, "bank");
  dtype_of(queries_in, "queries");
  const ScalarType real = bank_norms.scalar_type();
  const Tensor norms = torch::stable::contiguous(bank_norms);
  const Tensor queries = torch::stable::contiguous(as_real(queries_in, real));
  const int64_t batch = queries.size(0);

  const Tensor distance = torch::stable::new_empty(norms, {batch});  // [B]
  const Tensor nearest =
      torch::stable::new_empty(norms, {batch}, std::optional<ScalarType>(ScalarType::Long));  // [B]
  // Each of the columns' products is rounded when it is added up.
  const double eps = dtype == DType::float64 ? std::numeric_limits<double>::epsilon()
                                             : std::numeric_limits<float>::epsilon();
  const double tolerance = 2 * rounding + eps * static_cast<double>(queries.size(1) + 16);
  int64_t* index = static_cast<int64_t*>(nearest.mutable_data_ptr());
  std::fill(index, index + batch, int64_t{-1});
  const auto search = [&](auto zero) {
    using Real = decltype(zero);
    Real* to = static_cast<Real*>(distance.mutable_data_ptr());
    std::fill(to, to + batch, std::numeric_limits<Real>::infinity());
    Search<Real>{queries, bank, norms, tolerance, to, index}.run();
  };
  if (dtype == DType::float64) {
    search(double{});
  } else {
    search(float{});
  }
  return {distance, nearest};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(grood_fast, m) {
  m.def(
      "nearest_distance(Tensor queries, Tensor bank, Tensor bank_norms, float rounding)"
      " -> (Tensor distance, Tensor index)");
}

STABLE_TORCH_LIBRARY_IMPL(grood_fast, CPU, m) {
  m.impl("nearest_distance", TORCH_BOX(&nearest_distance));
}

}  // namespace grood_fast::ops
