#include "merge_sweep.h"

#include <cstring>

#include "dispatch.h"

namespace le {
namespace {

constexpr int64_t kGroup = 12;      // rows of a tile that stay in the L2, some of them in the L1
constexpr int64_t kRun = 8;         // groups that are summed in float32 before they go to float64
constexpr int64_t kChunks = 8;      // of columns: tasks whose sums are added up in order
constexpr int64_t kMost = 8 << 20;  // float64 of a task; beyond it there are fewer

}  // namespace

// Of one task: its sums and its buffers.
struct MergeSweep::Work {
  Inner sums;
  int64_t columns;  // of the tile
  Floats x;         // [width, tile], the tile of X
  Floats weighed;   // [group, tile], factor rows times their adapter's Fisher row
  Floats products;  // [pairs, tile]
  Floats part;      // what a kernel wrote
  Doubles gathered, system, shared, x64, change;
  std::vector<const float *> left;
  std::vector<const void *> right;
  std::vector<void *> lines;
};

MergeSweep::MergeSweep(Context &context, const MergeTerms &terms, int threads)
    : context_(context), kernels_(kernels()), terms_(terms), threads_(threads) {}

// to[lines, tile] = coefficients[lines, terms] rows[terms, tile]; group(first, count) gives some
// of the rows.
template <class Group>
void MergeSweep::gather(const float *coefficients, int64_t lines, int64_t terms, Group &&group,
                        Work &w, double *to) {
  w.part.resize(static_cast<size_t>(lines * kMergeTile));
  w.lines.resize(static_cast<size_t>(lines));
  w.right.resize(static_cast<size_t>(kGroup));
  for (int64_t j = 0; j < lines; ++j) w.lines[j] = &w.part[j * kMergeTile];
  std::fill(to, to + lines * kMergeTile, 0.0);
  for (int64_t first = 0; first < terms; first += kGroup) {
    int64_t count = std::min(kGroup, terms - first);
    const float *rows = group(first, count);
    for (int64_t f = 0; f < count; ++f) w.right[f] = rows + f * kMergeTile;
    bool more = first % (kRun * kGroup) != 0, last = first + count == terms;
    kernels_.expand[LE_FLOAT32][LE_FLOAT32](lines, count, coefficients + first, terms,
                                            w.right.data(), w.columns, w.lines.data(), more);
    if (!last && (first + kGroup) % (kRun * kGroup) != 0) continue;
    for (int64_t j = 0; j < lines; ++j)
      for (int64_t i = j * kMergeTile; i < j * kMergeTile + w.columns; ++i)
        to[i] += double(w.part[i]);
  }
}

// to[columns, lines] += right[columns, tile] rows[lines, tile]^T.
template <class Group>
void MergeSweep::scatter(int64_t lines, Group &&group, const float *right, int64_t columns, Work &w,
                         double *to) {
  w.part.resize(static_cast<size_t>(kGroup * columns));
  w.left.resize(static_cast<size_t>(columns));
  w.right.resize(static_cast<size_t>(kGroup));
  for (int64_t j = 0; j < columns; ++j) w.left[j] = right + j * kMergeTile;
  for (int64_t first = 0; first < lines; first += kGroup) {
    int64_t count = std::min(kGroup, lines - first);
    const float *rows = group(first, count);
    for (int64_t f = 0; f < count; ++f) w.right[f] = rows + f * kMergeTile;
    kernels_.shrink[LE_FLOAT32](columns, w.left.data(), count, w.right.data(), w.columns, kGroup,
                                w.part.data(), kGroup);
    for (int64_t j = 0; j < columns; ++j)
      for (int64_t f = 0; f < count; ++f)
        to[j * lines + first + f] += double(w.part[j * kGroup + f]);
  }
}

const float *MergeSweep::weighed(const MergeSide &side, int64_t tile, int64_t first, int64_t count,
                                 Work &w) {
  const float *fishers = side.tile(tile), *rows = fishers + terms_.fishers * kMergeTile;
  w.weighed.resize(static_cast<size_t>(kGroup * kMergeTile));
  for (int64_t f = 0; f < count; ++f) {
    int64_t factor = terms_.base_rank + first + f;
    const float *d = fishers + terms_.owner[factor] * kMergeTile;
    const float *row = rows + factor * kMergeTile;
    float *to = &w.weighed[f * kMergeTile];
    for (int64_t i = 0; i < w.columns; ++i) to[i] = d[i] * row[i];
  }
  return w.weighed.data();
}

void MergeSweep::add_inner(const MergeSide &side, int64_t tile, int64_t width, bool fisher,
                           Work &w) {
  const float *fishers = side.tile(tile), *rows = fishers + terms_.fishers * kMergeTile;
  for (int64_t s = 0; s < width; ++s) {
    for (int64_t t = s; t < width; ++t) {
      double sum = 0;
      for (int64_t i = 0; i < w.columns; ++i)
        sum += double(w.x[s * kMergeTile + i]) * double(w.x[t * kMergeTile + i]);
      w.sums.gram[s * width + t] += sum;
    }
  }
  auto from = [](const float *all) {
    return [all](int64_t first, int64_t) { return all + first * kMergeTile; };
  };
  if (!fisher) return scatter(terms_.factors, from(rows), w.x.data(), width, w, w.sums.own.data());
  float *product = w.products.data();
  auto multiply = [&](const float *p, const float *q) {
    for (int64_t i = 0; i < w.columns; ++i) product[i] = p[i] * q[i];
    product += kMergeTile;
  };
  for (int64_t s = 0; s < width; ++s)
    for (int64_t t = s; t < width; ++t) multiply(&w.x[s * kMergeTile], &w.x[t * kMergeTile]);
  for (int64_t p = 0; p < terms_.base_rank; ++p)
    for (int64_t t = 0; t < width; ++t) multiply(rows + p * kMergeTile, &w.x[t * kMergeTile]);
  scatter(terms_.fishers, from(fishers), w.products.data(), pairs(width), w, w.sums.shared.data());
  auto own = [&](int64_t first, int64_t count) { return weighed(side, tile, first, count, w); };
  scatter(terms_.factors - terms_.base_rank, own, w.x.data(), width, w, w.sums.own.data());
}

// Columns of a tile: (sum_k d_k X'_k) x = sum_k d_k target_k, both gathered, for x's change: what
// the sums do not determine stays.
void MergeSweep::solve_columns(const MergeSide &side, int64_t tile, int64_t width, bool had,
                               const Floats &X, Work &w) {
  const float *base = side.tile(tile) + terms_.fishers * kMergeTile;
  int64_t triangle = width * (width + 1) / 2;
  Doubles &S = w.system;
  Doubles &x = w.x64, &change = w.change;
  for (int64_t i = 0; i < w.columns; ++i) {
    double quadratic = 0, decrease = 0;
    auto fill = [&] {
      for (int64_t s = 0, q = 0; s < width; ++s)
        for (int64_t t = s; t < width; ++t, ++q)
          S[t * width + s] = S[s * width + t] = w.shared[q * kMergeTile + i];
    };
    fill();
    for (int64_t t = 0; t < width; ++t)
      x[t] = had ? double(X[t * side.n + tile * kMergeTile + i]) : 0.0;
    for (int64_t t = 0; t < width; ++t) {
      change[t] = w.gathered[t * kMergeTile + i];
      for (int64_t p = 0; p < terms_.base_rank; ++p)
        change[t] += double(base[p * kMergeTile + i]) *
                     w.shared[(triangle + p * width + t) * kMergeTile + i];
      for (int64_t s = 0; s < width; ++s) change[t] -= S[t * width + s] * x[s];
    }
    solve_in_place(S.data(), change.data(), width);
    fill();
    for (int64_t t = 0; t < width; ++t) {
      x[t] += change[t];
      w.x[t * kMergeTile + i] = static_cast<float>(x[t]);
    }
    for (int64_t s = 0; s < width; ++s) {
      for (int64_t t = 0; t < width; ++t) {
        quadratic += x[s] * S[s * width + t] * x[t];
        decrease += change[s] * S[s * width + t] * change[t];
      }
    }
    w.sums.size += quadratic;
    if (had) w.sums.decrease += decrease;
  }
}

// columns(tile, work) leaves a tile of X in work.x.
template <class Columns>
Inner MergeSweep::run(const MergeSide &side, int64_t width, bool fisher, Floats *X,
                      Columns &&columns) {
  int64_t own = (terms_.factors - own_first(fisher)) * width;
  int64_t shared = fisher ? terms_.fishers * pairs(width) : 0;
  int64_t tile = fisher ? 2 * pairs(width) * kMergeTile : 0;
  int64_t chunks =
      std::clamp<int64_t>(kMost / (own + shared + tile + 1), 1, std::min(kChunks, side.tiles()));
  std::vector<Work> works(static_cast<size_t>(chunks));
  for (Work &w : works) {
    w.sums.own.resize(static_cast<size_t>(own));
    w.sums.shared.resize(static_cast<size_t>(shared));
    w.sums.gram.resize(static_cast<size_t>(width * width));
    w.x.resize(static_cast<size_t>(width * kMergeTile));
    w.gathered.resize(w.x.size());
    if (!fisher) continue;
    w.products.resize(static_cast<size_t>(pairs(width) * kMergeTile));
    w.shared.resize(w.products.size());
    w.system.resize(w.sums.gram.size());
    w.x64.resize(static_cast<size_t>(width));
    w.change.resize(static_cast<size_t>(width));
  }
  context_.threads.run(chunks, threads_, [&](int64_t c) {
    Work &w = works[c];
    for (int64_t t = side.tiles() * c / chunks; t < side.tiles() * (c + 1) / chunks; ++t) {
      w.columns = side.width(t);
      columns(t, w);
      for (int64_t j = 0; j < width; ++j)
        std::copy_n(&w.x[j * kMergeTile], w.columns, &(*X)[j * side.n + t * kMergeTile]);
      add_inner(side, t, width, fisher, w);
    }
  });
  Inner total = std::move(works[0].sums);
  auto add = [](Doubles &to, const Doubles &from) {
    for (size_t i = 0; i < to.size(); ++i) to[i] += from[i];
  };
  for (size_t c = 1; c < works.size(); ++c) {
    add(total.own, works[c].sums.own);
    add(total.shared, works[c].sums.shared);
    add(total.gram, works[c].sums.gram);
    total.decrease += works[c].sums.decrease;
    total.size += works[c].sums.size;
  }
  for (int64_t s = 0; s < width; ++s)
    for (int64_t t = 0; t < s; ++t) total.gram[s * width + t] = total.gram[t * width + s];
  return total;
}

Inner MergeSweep::inner(const MergeSide &side, const Floats &X, int64_t width, bool fisher) {
  Floats copy = X;
  return run(side, width, fisher, &copy, [&](int64_t tile, Work &w) {
    for (int64_t j = 0; j < width; ++j)
      std::copy_n(&X[j * side.n + tile * kMergeTile], w.columns, &w.x[j * kMergeTile]);
  });
}

namespace {

// As kernels take coefficients.
Floats to_float(const Doubles &from) { return Floats(from.begin(), from.end()); }

}  // namespace

Inner MergeSweep::apply(const MergeSide &side, const Inner &other, const Doubles &weights,
                        int64_t width, Floats *X) {
  Doubles scaled = other.own;
  for (int64_t j = 0; j < width; ++j)
    for (int64_t f = 0; f < terms_.factors; ++f)
      scaled[j * terms_.factors + f] *= weights[terms_.owner[f]];
  Floats own = to_float(scaled);
  X->assign(static_cast<size_t>(width * side.n), 0.0f);
  return run(side, width, false, X, [&](int64_t tile, Work &w) {
    const float *rows = side.tile(tile) + terms_.fishers * kMergeTile;
    auto group = [&](int64_t first, int64_t) { return rows + first * kMergeTile; };
    gather(own.data(), width, terms_.factors, group, w, w.gathered.data());
    for (size_t i = 0; i < w.x.size(); ++i) w.x[i] = static_cast<float>(w.gathered[i]);
  });
}

Inner MergeSweep::solve(const MergeSide &side, const Inner &other, int64_t width, bool had,
                        Floats *X) {
  Floats own = to_float(other.own), shared = to_float(other.shared);
  int64_t rows = terms_.factors - terms_.base_rank;
  X->resize(static_cast<size_t>(width * side.n));
  return run(side, width, true, X, [&](int64_t tile, Work &w) {
    auto group = [&](int64_t first, int64_t count) { return weighed(side, tile, first, count, w); };
    auto fishers = [&](int64_t first, int64_t) { return side.tile(tile) + first * kMergeTile; };
    gather(own.data(), width, rows, group, w, w.gathered.data());
    gather(shared.data(), pairs(width), terms_.fishers, fishers, w, w.shared.data());
    solve_columns(side, tile, width, had, *X, w);
  });
}

}  // namespace le
