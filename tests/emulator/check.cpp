// Every op on drawn data against plain loops in float64, through the C ABI alone and
// linked statically, for an emulator of a CPU that is not at hand (run.sh; `make
// emulate`). Prints the instruction set in use and a line a group; LORA_ENGINE_ISA
// names the one that has to be in use.
#include "check.h"

#include <cstdlib>
#include <string>

namespace check {

Pool::Pool(Group &g, int32_t dtype, int64_t in, int64_t out) {
  le_pool_options options{};
  options.in_features = in;
  options.out_features = &out;
  options.num_slices = 1;
  options.dtype = dtype;
  options.seed = 7;
  g.require(le_pool_create(g.ctx, &options, &pool) == LE_OK, "le_pool_create failed");
  for (int64_t rank : {1, 2, 3, 8, 17, 64, 0}) {
    Adapter &a = adapters.emplace_back(dtype, in, rank, out);
    int32_t slot;
    le_status status = le_pool_add(pool, a.A.c(), a.B.c(), a.scaling, &slot);
    g.require(status == LE_OK, "le_pool_add failed");
  }
}

Array Pool::drawn_ids(int64_t n, int64_t k) const {
  Array ids(LE_INT32, n, k);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j)
      ids.set(i, j, i % 4 == 2 ? -1 : draw(-1, static_cast<int64_t>(adapters.size()) - 1));
  return ids;
}

namespace {

void lora_delta(Group &g) {
  constexpr int64_t kShapes[][4] = {{1, 64, 8, 64},   {3, 100, 5, 33},    {16, 256, 16, 128},
                                    {7, 17, 1, 1},    {33, 300, 32, 200}, {1, 1024, 8, 1024},
                                    {40, 63, 17, 127}};
  for (auto [n, in, r, out] : kShapes)
    for (int32_t x_dtype : kDtypes)
      for (int32_t w_dtype : kDtypes)
        for (bool accumulate : {false, true}) {
          Array x(x_dtype, n, in), y(x_dtype, n, out);
          Adapter a(w_dtype, in, r, out);
          std::vector<double> rows = x.fill().values();
          std::vector<Sum> want(n * out);
          if (accumulate) {
            std::vector<double> before = y.fill().values();
            want.assign(before.begin(), before.end());
          }
          for (int64_t i = 0; i < n; ++i) a.add_to(&want[i * out], &rows[i * in], 1, false);
          g.call(le_lora_delta(g.ctx, x.c(), a.A.c(), a.B.c(), a.scaling, accumulate, y.c()));
          g.close(y, want, tolerance(x_dtype));
        }
}

void forward_case(Group &g, Pool &pool, int32_t dtype, int64_t n, int64_t k, bool transposed,
                  bool accumulate) {
  int64_t in = pool.adapters[0].A.cols, out = pool.adapters[0].B.rows;
  if (transposed) std::swap(in, out);
  Array x(dtype, n, in), y(dtype, n, out), ids = pool.drawn_ids(n, k), weights(LE_FLOAT32, n, k);
  std::vector<double> rows = x.fill().values();
  weights.fill();
  std::vector<Sum> want(n * out);
  if (accumulate) {
    std::vector<double> before = y.fill().values();
    want.assign(before.begin(), before.end());
  }
  Array zeros(dtype, n, out), unchanged = accumulate ? y : zeros.fill(0, 0);
  for (int64_t i = 0; i < n; ++i)
    for (int64_t j = 0; j < k; ++j)
      if (ids.at(i, j) >= 0)
        pool.adapters[static_cast<size_t>(ids.at(i, j))].add_to(
            &want[i * out], &rows[i * in], k > 1 ? weights.at(i, j) : 1, transposed);
  g.call(le_pool_forward(pool.pool, x.c(), ids.c(), k > 1 ? weights.c() : nullptr, transposed,
                         accumulate, y.c()));
  g.close(y, want, tolerance(dtype));
  for (int64_t i = 2; i < n; i += 4)
    g.require(y.same_row(unchanged, i), "a row without an adapter changed");
}

void pool_forward(Group &g) {
  constexpr int64_t kShapes[][3] = {{1, 64, 65}, {13, 93, 70}, {40, 256, 130}};
  for (int32_t pool_dtype : kDtypes)
    for (auto [n, in, out] : kShapes) {
      Pool pool(g, pool_dtype, in, out);
      for (int32_t dtype : kDtypes)
        for (int64_t k : {1, 2})
          for (bool transposed : {false, true})
            for (bool accumulate : {false, true})
              forward_case(g, pool, dtype, n, k, transposed, accumulate);
    }
}

// theta - lr (clip g + decay theta) against what the pool holds.
void close_step(Group &g, const Array &after, const Array &before, const std::vector<Sum> &gradient,
                double lr, double clip, double decay, int32_t dtype) {
  for (int64_t i = 0; i < before.rows * before.cols; ++i) {
    double theta = before.at(i / before.cols, i % before.cols);
    double want = theta - lr * (clip * gradient[i].value + decay * theta);
    double size = std::fabs(theta) * (1 + lr * decay) + lr * clip * gradient[i].size;
    g.close(after.at(i / after.cols, i % after.cols), want, stored(dtype) * size);
  }
  g.require(after.intact(), "something was written outside of an output");
}

void check_slot(Group &g, Pool &pool, int32_t slot, const Array &x, const Array &grad,
                const Array &ids, const le_step &step, int32_t dtype) {
  const Adapter &a = pool.adapters[static_cast<size_t>(slot)];
  int64_t in = a.A.cols, out = a.B.rows, rank = a.A.rows, named = 0;
  std::vector<Sum> gA(rank * in), gB(out * rank);
  for (int64_t i = 0; i < x.rows; ++i) named += ids.at(i, 0) == slot;
  for (int64_t i = 0; i < x.rows; ++i) {
    if (ids.at(i, 0) != slot) continue;
    for (int64_t r = 0; r < rank; ++r) {
      Sum h, up;
      for (int64_t k = 0; k < in; ++k) h.add(a.A.at(r, k), x.at(i, k));
      for (int64_t o = 0; o < out; ++o) up.add(a.B.at(o, r), grad.at(i, o));
      double s = a.scaling / static_cast<double>(named);
      for (int64_t k = 0; k < in; ++k) gA[r * in + k].add(s * x.at(i, k), up);
      for (int64_t o = 0; o < out; ++o) gB[o * rank + r].add(s * grad.at(i, o), h);
    }
  }
  double squares = 0;
  for (const Sum &s : gB) squares += s.value * s.value;
  if (step.train_A)
    for (const Sum &s : gA) squares += s.value * s.value;
  double norm = std::sqrt(squares);
  double clip = step.max_norm > 0 && norm > step.max_norm ? step.max_norm / norm : 1;
  Array A(dtype, rank, in), B(dtype, out, rank);
  float scaling;
  g.require(le_pool_get(pool.pool, slot, A.c(), B.c(), &scaling) == LE_OK, "le_pool_get failed");
  double lr = named ? step.lr : 0, decay = step.weight_decay;
  close_step(g, A, a.A, gA, step.train_A ? lr : 0, clip, decay, dtype);
  close_step(g, B, a.B, gB, lr * step.lr_ratio, clip, decay, dtype);
}

void pool_adapt(Group &g) {
  constexpr le_step kSteps[] = {{1e-2f, 1, 0, 0, 1, nullptr},
                                {1e-2f, 4, 1, 0.1f, 1, nullptr},
                                {1e-2f, 1, 0, 0.1f, 0, nullptr}};
  for (int32_t pool_dtype : kDtypes)
    for (int32_t dtype : kDtypes)
      for (int64_t n : {1, 30})
        for (const le_step &step : kSteps) {
          int64_t in = n == 1 ? 128 : 93, out = n == 1 ? 33 : 70;
          Pool pool(g, pool_dtype, in, out);
          Array x(dtype, n, in), grad(dtype, n, out), ids = pool.drawn_ids(n, 1);
          x.fill();
          grad.fill();
          std::vector<uint8_t> outcomes(n, 99);
          g.call(
              le_pool_adapt(pool.pool, x.c(), grad.c(), ids.c(), nullptr, &step, outcomes.data()));
          for (int64_t i = 0; i < n; ++i) {
            double id = ids.at(i, 0);
            bool learns = id >= 0 && pool.adapters[static_cast<size_t>(id)].A.rows > 0;
            g.require(outcomes[i] == (learns ? LE_APPLIED : LE_NO_ADAPTER), "an outcome is wrong");
          }
          for (int32_t slot = 0; slot < static_cast<int32_t>(pool.adapters.size()); ++slot)
            check_slot(g, pool, slot, x, grad, ids, step, pool_dtype);
        }
}

void ewc_step(Group &g) {
  for (int32_t dtype : kDtypes)
    for (int32_t g_dtype : kDtypes)
      for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {3, 127}, {70, 33}, {2, 2049}}) {
        Array theta(dtype, n, m), grad(g_dtype, n, m), F(LE_FLOAT32, n, m), at(LE_FLOAT32, n, m);
        theta.fill();
        grad.fill();
        F.fill(0, 4);
        at.fill();
        Array before = theta;
        constexpr float kRate = 0.1f, kLambda = 2;
        g.call(le_ewc_step(g.ctx, theta.c(), grad.c(), F.c(), at.c(), kRate, kLambda, 1, 2));
        for (int64_t i = 0; i < n; ++i)
          for (int64_t j = 0; j < m; ++j) {
            double pull = 2.0 * kRate * kLambda * F.at(i, j);
            Sum s(before.at(i, j));
            s.add(-kRate, grad.at(i, j));
            s.add(pull, at.at(i, j));
            g.close(theta.at(i, j), s.value / (1 + pull), stored(dtype) * s.size / (1 + pull));
          }
        g.require(theta.intact(), "something was written outside of an output");
      }
}

void fisher_accumulate(Group &g) {
  for (int32_t dtype : kDtypes)
    for (int32_t g_dtype : kDtypes)
      for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 1}, {3, 127}, {70, 33}, {2, 2049}}) {
        Array F(dtype, n, m), grad(g_dtype, n, m);
        std::vector<double> before = F.fill(0, 4).values(), up = grad.fill().values();
        std::vector<Sum> want(before.size());
        constexpr float kGamma = 0.95f, kScale = 0.3f;
        for (size_t i = 0; i < want.size(); ++i) {
          want[i].add(kGamma, before[i]);
          want[i].add(kScale, up[i] * up[i]);
        }
        g.call(le_fisher_accumulate(g.ctx, F.c(), grad.c(), kGamma, kScale));
        g.close(F, want, tolerance(dtype));
      }
}

// Single rows, empty samples and samples of many rows, to the last row.
Array drawn_segments(int64_t n) {
  std::vector<int64_t> ends = {0};
  while (ends.back() < n) ends.push_back(std::min(n, ends.back() + draw(0, draw(0, 2) ? 1 : 40)));
  Array segments = Array::vector(LE_INT32, static_cast<int64_t>(ends.size()));
  for (size_t i = 0; i < ends.size(); ++i) segments.set(0, i, ends[i]);
  return segments;
}

void add_square(Sum &total, Sum &gradient) {
  total.add(1, Sum(gradient.value * gradient.value));
  total.size += gradient.size * gradient.size - gradient.value * gradient.value;
  gradient = {};
}

void fisher_case(Group &g, int64_t n, int64_t in, int64_t r, int64_t out, int32_t dtype,
                 int32_t w_dtype, bool segmented, bool accumulate) {
  int32_t to = draw(0, 1) ? LE_FLOAT64 : LE_FLOAT32;
  Array x(dtype, n, in), grad(dtype, n, out), F_A(to, r, in), F_B(to, out, r);
  Array segments = drawn_segments(n);
  Adapter a(w_dtype, in, r, out);
  std::vector<double> rows = x.fill().values(), up = grad.fill().values();
  std::vector<Sum> want_A(r * in), want_B(out * r), gA(r * in), gB(out * r);
  if (accumulate) {
    std::vector<double> A = F_A.fill(0, 1).values(), B = F_B.fill(0, 1).values();
    want_A.assign(A.begin(), A.end());
    want_B.assign(B.begin(), B.end());
  }
  for (int64_t i = 0, sample = 1; i < n; ++i) {
    for (int64_t j = 0; j < r; ++j) {
      Sum h, down;
      for (int64_t k = 0; k < in; ++k) h.add(a.A.at(j, k), rows[i * in + k]);
      for (int64_t o = 0; o < out; ++o) down.add(a.B.at(o, j), up[i * out + o]);
      for (int64_t k = 0; k < in; ++k) gA[j * in + k].add(a.scaling * rows[i * in + k], down);
      for (int64_t o = 0; o < out; ++o) gB[o * r + j].add(a.scaling * up[i * out + o], h);
    }
    while (segmented && segments.at(0, sample) <= i) ++sample;
    if (segmented && segments.at(0, sample) != i + 1) continue;
    for (int64_t e = 0; e < r * in; ++e) add_square(want_A[e], gA[e]);
    for (int64_t e = 0; e < out * r; ++e) add_square(want_B[e], gB[e]);
  }
  g.call(le_lora_fisher(g.ctx, x.c(), grad.c(), a.A.c(), a.B.c(), a.scaling,
                        segmented ? segments.c() : nullptr, accumulate, F_A.c(), F_B.c()));
  g.close(F_A, want_A, 1e-6);
  g.close(F_B, want_B, 1e-6);
}

void lora_fisher(Group &g) {
  constexpr int64_t kShapes[][4] = {
      {1, 64, 1, 33}, {7, 93, 2, 70}, {40, 130, 3, 65}, {130, 40, 4, 17}, {20, 257, 17, 64}};
  for (auto [n, in, r, out] : kShapes)
    for (int32_t dtype : kDtypes)
      for (int32_t w_dtype : kDtypes)
        for (bool segmented : {false, true})
          for (bool accumulate : {false, true})
            fisher_case(g, n, in, r, out, dtype, w_dtype, segmented, accumulate);
}

void lora_fisher_factors(Group &g) {
  for (auto [n, m] : {std::pair<int64_t, int64_t>{1, 64}, {7, 33}, {130, 93}})
    for (int32_t dtype : kDtypes)
      for (int32_t to : {LE_FLOAT32, LE_FLOAT64}) {
        Array x(dtype, n, m), grad(dtype, n, 2 * m);
        Array u = Array::vector(to, 2 * m), v = Array::vector(to, m);
        std::vector<double> rows = x.fill().values(), up = grad.fill().values();
        std::vector<Sum> want_u(2 * m), want_v(m);
        for (size_t i = 0; i < up.size(); ++i) want_u[i % (2 * m)].add(up[i], up[i]);
        for (size_t i = 0; i < rows.size(); ++i) want_v[i % m].add(rows[i], rows[i]);
        g.call(le_lora_fisher_factors(g.ctx, x.c(), grad.c(), 0, u.c(), v.c()));
        g.close(u, want_u, 1e-6);
        g.close(v, want_v, 1e-6);
      }
}

constexpr struct {
  const char *name;
  void (*run)(Group &);
} kGroups[] = {
    {"lora_delta", lora_delta},
    {"pool_forward", pool_forward},
    {"pool_adapt", pool_adapt},
    {"ewc_step", ewc_step},
    {"fisher_accumulate", fisher_accumulate},
    {"lora_fisher", lora_fisher},
    {"lora_fisher_factors", lora_fisher_factors},
    {"nf4_encode", nf4_encode},
    {"nf4_decode", nf4_decode},
    {"nf4_linear", nf4_linear},
    {"nf4_linear_backward", nf4_linear_backward},
};

int run() {
  const char *isa = le_isa(), *wanted = std::getenv("LORA_ENGINE_ISA");
  std::printf("instruction set: %s\n", isa ? isa : "none");
  if (!isa || (wanted && *wanted && std::string(wanted) != isa)) {
    std::printf("LORA_ENGINE_ISA=%s: not in use\n", wanted ? wanted : "");
    return 1;
  }
  le_context *ctx;
  if (le_context_create(nullptr, &ctx) != LE_OK) return 1;
  int failed = 0;
  for (auto [name, group] : kGroups) {
    Group g(ctx);
    group(g);
    std::printf("%-20s %4d cases, worst error %.3f of its tolerance%s\n", name, g.cases, g.worst,
                g.wrong ? "  FAILED" : "");
    std::fflush(stdout);
    failed += g.wrong != 0;
  }
  le_context_destroy(ctx);
  return failed != 0;
}

}  // namespace
}  // namespace check

int main() { return check::run(); }
