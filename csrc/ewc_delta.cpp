#include "ewc_delta.h"

#include <algorithm>
#include <cmath>
#include <functional>

namespace le {
namespace {

struct Buffers {
  Scratch<double> products, eigen;
  Scratch<float> coefficients, coef, strips;
  Scratch<const float *> vec;
  Scratch<float *> rows;
};

Buffers &buffers() {
  LE_PER_THREAD(Buffers, b);
  return b;
}

// Rows p and q of a [n, n], turned by the angle whose cosine and sine are c and s.
void rotate(double *a, int64_t n, int64_t p, int64_t q, double c, double s) {
  double *x = a + p * n, *y = a + q * n;
  for (int64_t i = 0; i < n; ++i) {
    double xi = x[i], yi = y[i];
    x[i] = c * xi - s * yi;
    y[i] = s * xi + c * yi;
  }
}

// Makes element (p, q) of the symmetric m vanish.
void jacobi_rotation(double *m, double *vectors, int64_t n, int64_t p, int64_t q) {
  double off = m[p * n + q], mp = m[p * n + p], mq = m[q * n + q];
  double theta = (mq - mp) / (2 * off);
  double tangent = std::copysign(1.0, theta) / (std::fabs(theta) + std::sqrt(1 + theta * theta));
  double c = 1 / std::sqrt(1 + tangent * tangent), s = tangent * c;
  rotate(m, n, p, q, c, s);
  for (int64_t i = 0; i < n; ++i) {  // the columns are what the rows are
    m[i * n + p] = m[p * n + i];
    m[i * n + q] = m[q * n + i];
  }
  m[p * n + p] = mp - tangent * off;
  m[q * n + q] = mq + tangent * off;
  m[p * n + q] = m[q * n + p] = 0;
  rotate(vectors, n, p, q, c, s);
}

// The symmetric m [n, n] as V^T diag(values) V, V by rows (Jacobi's rotations; Golub and Van
// Loan, Matrix Computations, 8.5); m is lost.
void eigen(int64_t n, double *m, double *vectors, double *values) {
  std::fill(vectors, vectors + n * n, 0.0);
  double trace = 0;
  for (int64_t i = 0; i < n; ++i) {
    vectors[i * n + i] = 1;
    trace += std::fabs(m[i * n + i]);
  }
  constexpr double kNothing = 1e-17;  // of the trace: it moves no eigenvalue's last place
  constexpr int kSweeps = 40;         // some 10 are needed
  bool moved = true;
  for (int sweep = 0; moved && sweep < kSweeps; ++sweep) {
    moved = false;
    for (int64_t p = 0; p < n; ++p)
      for (int64_t q = p + 1; q < n; ++q) {
        if (!(std::fabs(m[p * n + q]) > kNothing * trace)) continue;
        jacobi_rotation(m, vectors, n, p, q);
        moved = true;
      }
  }
  for (int64_t i = 0; i < n; ++i) values[i] = m[i * n + i];
}

// The largest magnitude; Inf where one is not finite.
double largest_of(const double *values, int64_t n) {
  double most = 0;
  for (int64_t i = 0; i < n; ++i) {
    if (!std::isfinite(values[i])) return HUGE_VAL;
    most = std::max(most, std::fabs(values[i]));
  }
  return most;
}

// Of ranks 1 and 2; of others what it is at least.
double least_eigenvalue(const double *gram, int64_t r) {
  if (r == 1) return gram[0];
  if (r > 2) return 0;
  double a = gram[0], b = gram[1], c = gram[3];
  double largest = (a + c + std::sqrt((a - c) * (a - c) + 4 * b * b)) / 2;
  return largest > 0 ? std::max((a * c - b * b) / largest, 0.0) : 0;
}

// Of two ranks, as they are.
void set_matrix(const double *gram, const double *cross, double strength, float *matrix,
                Solve *to) {
  double m00 = strength * gram[0], m01 = strength * gram[1], m11 = strength * gram[3];
  double values[] = {m00, m01, m11, std::max(m00 * m11 - m01 * m01, 0.0)};
  std::copy_n(values, 4, matrix);
  for (int64_t j = 0; j < 2; ++j)
    for (int64_t k = 0; k < 2; ++k)
      matrix[4 + 2 * j + k] = static_cast<float>(strength * cross[2 * k + j]);
  to->matrix = matrix;
}

// The coefficients of a solve, for a pull of `strength` at a Fisher information of 1.
void set_coefficients(int64_t r, double *gram, double *cross, double strength, float largest,
                      Solve *to) {
  // Of weights that hold NaN or Inf: nothing to pull at, so that only their own columns suffer.
  if (!std::isfinite(largest_of(gram, r * r)) || !std::isfinite(largest_of(cross, r * r))) {
    std::fill(gram, gram + r * r, 0.0);
    std::fill(cross, cross + r * r, 0.0);
  }
  Buffers &b = buffers();
  double *vectors = b.eigen.get(r * r + r), *values = vectors + r * r;
  eigen(r, gram, vectors, values);

  // The greatest element joins the strength, so that none leaves float32's range.
  double *pulled = gram, most = *std::max_element(values, values + r);
  for (int64_t i = 0; i < r; ++i)
    for (int64_t j = 0; j < r; ++j) {
      double total = 0;
      for (int64_t l = 0; l < r; ++l) total += vectors[i * r + l] * cross[j * r + l];
      pulled[i * r + j] = total;
      most = std::max(most, std::fabs(total));
    }
  if (!(most > 0)) most = 1;
  float *into = b.coefficients.get(3 * r * r + r), *back = into + 2 * r * r, *lambda = back + r * r;
  for (int64_t i = 0; i < r; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      into[i * 2 * r + j] = back[j * r + i] = static_cast<float>(vectors[i * r + j]);
      into[i * 2 * r + r + j] = static_cast<float>(pulled[i * r + j] / most);
    }
    lambda[i] = static_cast<float>(std::max(values[i], 0.0) / most);
  }
  // A direction that feels less than a part in 1e18 of such a pull lies below what float64
  // resolves of the matrix: a stronger one changes nothing.
  constexpr double kStrongest = 1e18;
  strength *= most;
  if (strength * largest > kStrongest) strength = kStrongest / largest;
  to->u.penalty = static_cast<float>(strength);
  to->into = into;
  to->back = back;
  to->lambda = lambda;
}

}  // namespace

void delta_step(const Kernels &k, int32_t dtype, const FactorStep &step, const DeltaFactor &own,
                const DeltaFactor &other, const char *other_weights, double strength, Update u) {
  Buffers &b = buffers();
  const int64_t r = step.rank;
  double *gram = b.products.get(2 * r * r), *cross = gram + r * r;
  std::fill(cross, cross + r * r, 0.0);
  Products products{other_weights, other.anchor, other.fisher, r, other.n, gram, cross, false};
  k.products[dtype](products);
  // float32 sums, and sums of a pull with what it is to hold, are off by some 1e-7. That comes out
  // multiplied by what the strongest pull is over what any direction gives way to it.
  constexpr double kGentle = 4;
  const double pull = strength * step.lr, most = pull * largest_of(gram, 2 * r * r);
  const double least = pull * least_eigenvalue(gram, r), strongest = own.largest * most;
  const bool gentle = strongest * r <= kGentle * (1 + own.largest * least);
  if (!gentle) {
    products.wide = true;
    k.products[dtype](products);
  }
  // Without an eigenbasis: float32 holds the square of kFits; where only float64 tells the
  // determinant from 0, up to kStrong, and nothing may be pulled at.
  constexpr double kFits = 1e15, kStrong = 1e6;
  const bool direct = r == 2 && std::max(most, strongest) <= kFits &&
                      (gentle || (!own.anchor && strongest <= kStrong));

  Solve solve{};
  u.src = step.src;
  u.dst = step.dst;
  u.n = step.n;
  u.element = static_cast<uint32_t>(step.element);
  u.decay = step.decay;
  u.fisher = own.fisher;
  u.anchor = own.anchor;  // null where the anchored adapter adds nothing: nothing pulls
  solve.u = u;
  solve.rank = r;
  float matrix[8];
  if (direct)
    set_matrix(gram, cross, pull, matrix, &solve);
  else
    set_coefficients(r, gram, cross, pull, own.largest, &solve);
  const float **vec = b.vec.get(r);
  float *coef = b.coef.get(r);
  for (int64_t j = 0; j < r; ++j) {
    vec[j] = step.rows[j].vec;
    coef[j] = step.coef(j);
  }
  const int64_t width = strip_columns(r);
  float *strips = b.strips.get_aligned(3 * r * width), **rows = b.rows.get(3 * r);
  for (int64_t j = 0; j < 3 * r; ++j) rows[j] = strips + j * width;
  solve.vec = vec;
  solve.coef = coef;
  solve.rows = rows;
  k.solve[dtype](solve);
}

double delta_penalty(const Kernels &k, const AdapterPool &pool, const Block &block,
                     const EwcRecord &record, const float *theta) {
  std::vector<float> left, right;
  double total = 0;
  for (int s = 0; s < pool.num_slices(); ++s) {
    const SliceView view = pool.slice(block, s);
    const int64_t r = view.rank, in = pool.in_features(), out = pool.slice_out(s);
    if (!r) continue;
    const float *a = theta + view.element, *bt = a + r * in;
    const float *anchor_a = record.anchor.data() + view.element, *anchor_bt = anchor_a + r * in;
    const float *u = record.fisher.data() + factors_before(pool, block, s), *v = u + out;
    // B A - B* A* = [B - B*, B*] [A; A - A*]: near the anchor this cancels less.
    left.resize(static_cast<size_t>(2 * r * out));
    right.resize(static_cast<size_t>(2 * r * in));
    std::transform(bt, bt + r * out, anchor_bt, left.begin(), std::minus<float>());
    std::copy(anchor_bt, anchor_bt + r * out, left.begin() + r * out);
    std::copy(a, a + r * in, right.begin());
    std::transform(a, a + r * in, anchor_a, right.begin() + r * in, std::minus<float>());
    double *of_left = buffers().products.get(12 * r * r), *of_right = of_left + 4 * r * r;
    double *unused = of_right + 4 * r * r;
    k.products[LE_FLOAT32]({left.data(), left.data(), u, 2 * r, out, of_left, unused, true});
    k.products[LE_FLOAT32]({right.data(), right.data(), v, 2 * r, in, of_right, unused, true});
    for (int64_t i = 0; i < 4 * r * r; ++i) total += of_left[i] * of_right[i];
  }
  return total * double(block.scaling) * double(block.scaling);
}

}  // namespace le
