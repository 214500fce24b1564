// What the groups of the check share: drawn arrays, sums in float64, and the error
// measure of tests/helpers.py, here for each element instead of for whole arrays.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <vector>

#include "lora_engine.h"

namespace check {

constexpr int32_t kDtypes[] = {LE_FLOAT32, LE_BFLOAT16, LE_FLOAT16};

// Of the sum of the magnitudes of an element's products, by the dtype of the output.
inline double tolerance(int32_t dtype) {
  return dtype == LE_BFLOAT16 ? 4e-3 : dtype == LE_FLOAT16 ? 1e-3 : 1e-6;
}
// Of weights after a step: a stochastic rounding is off by less than a unit in the last place.
inline double stored(int32_t dtype) {
  return dtype == LE_BFLOAT16 ? 0x1p-7 : dtype == LE_FLOAT16 ? 0x1p-10 : 2e-6;
}

// The same numbers on every run (xorshift32: Marsaglia 2003).
inline uint32_t draw() {
  static uint32_t state = 2463534242u;
  state ^= state << 13;
  state ^= state >> 17;
  return state ^= state << 5;
}
inline int64_t draw(int64_t low, int64_t high) { return low + draw() % (high - low + 1); }
inline double uniform(double low, double high) { return low + (high - low) * (draw() * 0x1p-32); }

// To the nearest number of the dtype, ties to even; within its range.
inline double rounded(int32_t dtype, double v) {
  if (v == 0 || dtype == LE_FLOAT64) return v;
  int digits = dtype == LE_BFLOAT16 ? 8 : dtype == LE_FLOAT16 ? 11 : 24;
  int unit = std::max(std::ilogb(v), dtype == LE_FLOAT16 ? -14 : -126) - (digits - 1);
  return std::scalbn(std::nearbyint(std::scalbn(v, -unit)), unit);
}

inline double from_half(uint16_t bits) {
  int exponent = bits >> 10 & 31, digits = bits & 1023;
  double size = exponent == 31 ? (digits ? NAN : INFINITY)
                : exponent     ? std::scalbn(1024 + digits, exponent - 25)
                               : std::scalbn(digits, -24);
  return bits & 0x8000 ? -size : size;
}
inline uint16_t to_half(double v) {
  double size = std::fabs(v);
  int exponent = size < 0x1p-14 ? -15 : std::ilogb(size);
  // Past the digits' leading one, which is the exponent's last bit.
  int bits = size < 0x1p-14
                 ? static_cast<int>(size * 0x1p24)
                 : (exponent + 14) * 1024 + static_cast<int>(std::scalbn(size, 10 - exponent));
  return static_cast<uint16_t>(bits | (std::signbit(v) ? 0x8000 : 0));
}

// A matrix or a vector in poisoned memory: all bits are ones, a NaN. Half of the matrices
// have gaps between rows, and they begin at any multiple of an element.
class Array {
 public:
  Array(int32_t dtype, int64_t rows, int64_t cols) : rows(rows), cols(cols), dtype_(dtype) {
    size_ = dtype == LE_FLOAT64 ? 8 : dtype == LE_FLOAT32 || dtype == LE_INT32 ? 4 : 2;
    stride_ = cols + 3 * draw(0, 1);
    first_ = draw(1, 4);
    bytes_.assign(static_cast<size_t>((first_ + rows * stride_ + 4) * size_), 0xff);
  }
  static Array vector(int32_t dtype, int64_t n) {
    Array a(dtype, 1, n);
    a.ndim_ = 1;
    return a;
  }
  Array &fill(double low = -1, double high = 1) {
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) set(i, j, uniform(low, high));
    return *this;
  }

  double at(int64_t i, int64_t j) const {
    const uint8_t *p = bytes_.data() + place(i, j);
    if (dtype_ == LE_FLOAT64) return get<double>(p);
    if (dtype_ == LE_FLOAT32) return get<float>(p);
    if (dtype_ == LE_INT32) return get<int32_t>(p);
    if (dtype_ == LE_FLOAT16) return from_half(get<uint16_t>(p));
    uint32_t bits = static_cast<uint32_t>(get<uint16_t>(p)) << 16;
    return get<float>(reinterpret_cast<const uint8_t *>(&bits));
  }
  void set(int64_t i, int64_t j, double v) {
    uint8_t *p = bytes_.data() + place(i, j);
    if (dtype_ == LE_FLOAT64) return put(p, v);
    if (dtype_ == LE_INT32) return put(p, static_cast<int32_t>(v));
    float narrow = static_cast<float>(rounded(dtype_, v));
    if (dtype_ == LE_FLOAT32) return put(p, narrow);
    if (dtype_ == LE_FLOAT16) return put(p, to_half(narrow));
    uint32_t bits = get<uint32_t>(reinterpret_cast<const uint8_t *>(&narrow));
    put(p, static_cast<uint16_t>(bits >> 16));
  }
  std::vector<double> values() const {
    std::vector<double> all;
    all.reserve(static_cast<size_t>(rows * cols));
    for (int64_t i = 0; i < rows; ++i)
      for (int64_t j = 0; j < cols; ++j) all.push_back(at(i, j));
    return all;
  }

  bool same_row(const Array &other, int64_t i) const {
    return std::memcmp(bytes_.data() + place(i, 0), other.bytes_.data() + other.place(i, 0),
                       static_cast<size_t>(cols * size_)) == 0;
  }
  // Whether nothing was written outside.
  bool intact() const {
    Array copy = *this;
    for (int64_t i = 0; i < rows; ++i)
      std::memset(copy.bytes_.data() + place(i, 0), 0xff, static_cast<size_t>(cols * size_));
    return std::all_of(copy.bytes_.begin(), copy.bytes_.end(), [](uint8_t b) { return b == 0xff; });
  }
  const le_array *c() {
    c_ = {};
    c_.data = bytes_.data() + place(0, 0);
    c_.ndim = ndim_;
    c_.dtype = dtype_;
    c_.shape[0] = ndim_ == 1 ? cols : rows;
    c_.strides[0] = ndim_ == 1 ? 1 : stride_;
    c_.shape[1] = ndim_ == 1 ? 0 : cols;
    c_.strides[1] = ndim_ == 1 ? 0 : 1;
    return &c_;
  }

  int64_t rows, cols;

 private:
  template <class T>
  static T get(const uint8_t *p) {
    T v;
    std::memcpy(&v, p, sizeof v);
    return v;
  }
  template <class T>
  static void put(uint8_t *p, T v) {
    std::memcpy(p, &v, sizeof v);
  }
  int64_t place(int64_t i, int64_t j) const { return (first_ + i * stride_ + j) * size_; }

  int32_t dtype_, ndim_ = 2;
  int64_t size_, stride_, first_;
  std::vector<uint8_t> bytes_;
  le_array c_{};
};

// A sum, and the sum of the magnitudes of what was added.
struct Sum {
  double value = 0, size = 0;
  Sum() = default;
  Sum(double v) : value(v), size(std::fabs(v)) {}
  void add(double factor, const Sum &s) {
    value += factor * s.value;
    size += std::fabs(factor) * s.size;
  }
};

struct Adapter {
  Array A, B;
  float scaling;
  Adapter(int32_t dtype, int64_t in, int64_t rank, int64_t out)
      : A(dtype, rank, in), B(dtype, out, rank), scaling(static_cast<float>(uniform(0.5, 2))) {
    A.fill();
    B.fill();
  }
  // y += weight scaling B (A x), or A^T (B^T x).
  void add_to(Sum *y, const double *x, double weight, bool transposed) const {
    for (int64_t r = 0; r < A.rows; ++r) {
      Sum h;
      if (transposed)
        for (int64_t o = 0; o < B.rows; ++o) h.add(B.at(o, r), x[o]);
      else
        for (int64_t k = 0; k < A.cols; ++k) h.add(A.at(r, k), x[k]);
      double s = weight * scaling;
      if (transposed)
        for (int64_t k = 0; k < A.cols; ++k) y[k].add(s * A.at(r, k), h);
      else
        for (int64_t o = 0; o < B.rows; ++o) y[o].add(s * B.at(o, r), h);
    }
  }
};

// What is known of a group: how many calls, how bad, what was wrong.
class Group {
 public:
  explicit Group(le_context *ctx) : ctx(ctx) {}
  void call(le_status status) {
    ++cases;
    if (status != LE_OK) require(false, le_last_error(ctx));
  }
  void require(bool holds, const char *what) {
    if (!holds && !wrong++) std::printf("  case %d: %s\n", cases, what);
  }
  void close(double got, double want, double allowed) {
    double error = std::fabs(got - want) / (allowed + 1e-30);
    if (!(error <= 1)) require(false, "an element is off by more than its tolerance");
    worst = error <= worst ? worst : error;  // NaN is the worst
  }
  void close(const Array &y, const std::vector<Sum> &want, double tolerance) {
    for (int64_t i = 0; i < y.rows * y.cols; ++i)
      close(y.at(i / y.cols, i % y.cols), want[i].value, tolerance * want[i].size);
    require(y.intact(), "something was written outside of an output");
  }

  le_context *ctx;
  int cases = 0, wrong = 0;
  double worst = 0;
};

// A pool of one slice with adapters of ranks 1, 2, 3, 8, 17, 64 and 0.
struct Pool {
  le_pool *pool = nullptr;
  std::vector<Adapter> adapters;
  Pool(Group &g, int32_t dtype, int64_t in, int64_t out);
  ~Pool() { le_pool_destroy(pool); }
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;
  // Slots, and -1 in every fourth row.
  Array drawn_ids(int64_t n, int64_t k) const;
};

void nf4_encode(Group &g);
void nf4_decode(Group &g);
void nf4_linear(Group &g);
void nf4_linear_backward(Group &g);

}  // namespace check
