// Small dense linear algebra in float64: what is left of a problem once the long sums are done.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace le {

using Doubles = std::vector<double>;

// Of the largest diagonal element: pivots below that are rounding, of sums from float32.
constexpr double kDetermined = 1e-6;

// The eigenvectors of a symmetric S [n, n], one a row, largest eigenvalue first (cyclic Jacobi).
inline Doubles eigenvectors(Doubles S, int64_t n, Doubles *values) {
  Doubles V(static_cast<size_t>(n * n));
  for (int64_t i = 0; i < n; ++i) V[i * n + i] = 1.0;
  auto rotate = [n](double *p, double *q, int64_t step, double c, double s) {
    for (int64_t i = 0; i < n; ++i) {
      double a = p[i * step], b = q[i * step];
      p[i * step] = c * a - s * b;
      q[i * step] = s * a + c * b;
    }
  };
  for (int sweep = 0, moved = 1; sweep < 40 && moved; ++sweep) {
    moved = 0;
    for (int64_t p = 0; p < n; ++p) {
      for (int64_t q = p + 1; q < n; ++q) {
        double off = S[p * n + q], pp = S[p * n + p], qq = S[q * n + q];
        if (!(std::fabs(off) > 1e-16 * std::sqrt(std::fabs(pp) * std::fabs(qq)))) continue;
        moved = 1;
        double theta = (qq - pp) / (2 * off);
        double t = (theta < 0 ? -1 : 1) / (std::fabs(theta) + std::sqrt(theta * theta + 1));
        double c = 1 / std::sqrt(t * t + 1), s = t * c;
        rotate(&S[p], &S[q], n, c, s);
        rotate(&S[p * n], &S[q * n], 1, c, s);
        rotate(&V[p * n], &V[q * n], 1, c, s);
      }
    }
  }
  std::vector<int64_t> order(static_cast<size_t>(n));
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(),
                   [&](int64_t i, int64_t j) { return S[i * n + i] > S[j * n + j]; });
  Doubles sorted(V.size());
  values->resize(order.size());
  for (int64_t i = 0; i < n; ++i) {
    (*values)[i] = S[order[i] * n + order[i]];
    std::copy_n(&V[order[i] * n], n, &sorted[i * n]);
  }
  return sorted;
}

// Solves S x = y in place, S [n, n] symmetric and not negative; destroys S. A direction that S
// does not determine gets 0.
inline void solve_in_place(double *S, double *y, int64_t n) {
  double largest = 0;
  for (int64_t j = 0; j < n; ++j) largest = std::max(largest, S[j * n + j]);
  for (int64_t j = 0; j < n; ++j) {
    double pivot = S[j * n + j];
    for (int64_t k = 0; k < j; ++k) pivot -= S[j * n + k] * S[j * n + k];
    double inverse = pivot > kDetermined * largest ? 1 / std::sqrt(pivot) : 0.0;
    for (int64_t i = j + 1; i < n; ++i) {
      double sum = S[i * n + j];
      for (int64_t k = 0; k < j; ++k) sum -= S[i * n + k] * S[j * n + k];
      S[i * n + j] = sum * inverse;
    }
    S[j * n + j] = inverse;
  }
  for (int64_t j = 0; j < n; ++j) {
    for (int64_t k = 0; k < j; ++k) y[j] -= S[j * n + k] * y[k];
    y[j] *= S[j * n + j];
  }
  for (int64_t j = n - 1; j >= 0; --j) {
    for (int64_t i = j + 1; i < n; ++i) y[j] -= S[i * n + j] * y[i];
    y[j] *= S[j * n + j];
  }
}

}  // namespace le
