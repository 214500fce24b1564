// Step, Pool and Ewc of lora_engine._C.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <algorithm>
#include <memory>
#include <optional>

#include "py_call.h"

using namespace nanobind::literals;

namespace le_py {
namespace {

struct Step : le_step {
  Step(float lr_, float max_norm_, float lr_ratio_, bool train_A_, float weight_decay_,
       le_ewc *ewc_)
      : le_step{lr_, lr_ratio_, max_norm_, weight_decay_, train_A_, ewc_} {}
};

class Ewc;

// A view of a slot, and the pool that it borrows.
struct HeldView {
  le_view *view;
  nb::object pool;
};

nb::object tensor_of(const le_array &array, nb::handle owner) {
  using Code = nb::dlpack::dtype_code;
  nb::dlpack::dtype dtype{
      static_cast<uint8_t>(array.dtype == LE_BFLOAT16 ? Code::Bfloat : Code::Float),
      static_cast<uint8_t>(array.dtype == LE_FLOAT32 ? 32 : 16), 1};
  size_t shape[2] = {static_cast<size_t>(array.shape[0]), static_cast<size_t>(array.shape[1])};
  nb::ndarray<nb::pytorch> tensor(array.data, 2, shape, owner, array.strides, dtype);
  return nb::cast(tensor);
}

class Pool {
 public:
  Pool(int64_t in, std::vector<int64_t> outs, const std::string &dtype, int64_t capacity,
       int32_t max_rank, int32_t history, uint64_t seed)
      : in_(in), outs_(outs), out_(0), slices_(outs.size()) {
    for (int64_t o : outs) out_ += o;
    int32_t code = dtype == "float32"    ? LE_FLOAT32
                   : dtype == "bfloat16" ? LE_BFLOAT16
                   : dtype == "float16"  ? LE_FLOAT16
                                         : -1;
    le_pool_options options{in,      outs.data(), static_cast<int32_t>(outs.size()),
                            code,    capacity,    max_rank,
                            history, seed};
    check(le_pool_create(context(), &options, &pool_));
  }
  ~Pool() { le_pool_destroy(pool_); }
  Pool(const Pool &) = delete;
  Pool &operator=(const Pool &) = delete;

  le_pool *handle() const { return pool_; }
  int64_t in() const { return in_; }
  int64_t out() const { return out_; }
  size_t num_slices() const { return slices_; }
  int64_t slice_out(size_t s) const { return outs_[s]; }

  std::vector<le_array> slices(const char *op, const char *arg, nb::list arrays) const {
    if (nb::len(arrays) != slices_) {
      PyErr_Format(PyExc_ValueError, "%s: %s: expected %zu slices, got %zu", op, arg, slices_,
                   nb::len(arrays));
      throw nb::python_error();
    }
    std::vector<le_array> views;
    for (nb::handle a : arrays) views.push_back(as_optional_array(a, op, arg).view);
    return views;
  }

  // Read and written by x's rows with `adapters` each, of the largest rank there was.
  int64_t elements(const Array &x, int64_t adapters = 1) const {
    return x.rows() * adapters * (x.width() + out_) * std::max(1, largest_rank_ / 2);
  }

  static int64_t adapters_of(const Array &ids) { return ids.view.ndim == 2 ? ids.width() : 1; }

  int32_t add(nb::list A, nb::list B, float scaling) {
    auto a = slices("AdapterPool.add", "A", A), b = slices("AdapterPool.add", "B", B);
    note_ranks(a);
    int32_t slot = -1;
    check(le_pool_add(pool_, a.data(), b.data(), scaling, &slot));
    return slot;
  }
  void set(int32_t slot, nb::list A, nb::list B, float scaling) {
    auto a = slices("AdapterPool.set", "A", A), b = slices("AdapterPool.set", "B", B);
    note_ranks(a);
    check(le_pool_set(pool_, slot, a.data(), b.data(), scaling));
  }
  // (A, B, scaling): lists of arrays, None for a missing slice of several. Read
  // again where the slot was changed while room was made for it.
  nb::tuple get(int32_t slot) {
    const char *op = "AdapterPool.get";
    for (;;) {
      uint64_t before = version(slot);
      nb::list A, B;
      std::vector<int32_t> rank = ranks(slot);
      for (size_t s = 0; s < slices_; ++s) {
        bool missing = slices_ > 1 && rank[s] == 0;
        A.append(missing ? nb::none() : new_float32(rank[s], in_));
        B.append(missing ? nb::none() : new_float32(outs_[s], rank[s]));
      }
      auto a = slices(op, "A", A), b = slices(op, "B", B);
      float scaling = 0;
      le_status status = le_pool_get(pool_, slot, a.data(), b.data(), &scaling);
      if (version(slot) != before) continue;
      check(status);
      return nb::make_tuple(A, B, scaling);
    }
  }
  void remove(int32_t slot) { check(le_pool_remove(pool_, slot)); }
  void remove_all(nb::handle slots) {
    Array s = as_array(slots, "AdapterPool.remove", "slots");
    int64_t elements = s.width() * (in_ + out_) * std::max(1, largest_rank_);
    check(run(s, elements, [&] { return le_pool_remove_all(pool_, s.ptr()); }));
  }
  std::vector<int32_t> ranks(int32_t slot) {
    std::vector<int32_t> r(slices_);
    check(le_pool_ranks(pool_, slot, r.data()));
    return r;
  }
  uint64_t version(int32_t slot) {
    uint64_t v = 0;
    check(le_pool_version(pool_, slot, &v));
    return v;
  }
  void rollback(int32_t slot) { check(le_pool_rollback(pool_, slot)); }
  // (A [r, in], transpose of B [r, out]) as torch tensors in the pool's memory, by slice; None
  // for a missing one. They keep the pool, and the memory, as long as they live.
  static nb::list view(nb::object self, int32_t slot) {
    Pool &pool = nb::cast<Pool &>(self);
    std::vector<le_array> A(pool.slices_), bt(pool.slices_);
    auto held = std::make_unique<HeldView>(HeldView{nullptr, self});
    check(le_pool_view(pool.pool_, slot, A.data(), bt.data(), &held->view));
    nb::capsule owner(held.release(), [](void *p) noexcept {
      std::unique_ptr<HeldView> last(static_cast<HeldView *>(p));
      le_view_release(last->view);
    });
    nb::list views;
    for (size_t s = 0; s < pool.slices_; ++s) {
      bool missing = A[s].ndim == 0;
      views.append(missing ? nb::object(nb::none())
                           : nb::make_tuple(tensor_of(A[s], owner), tensor_of(bt[s], owner)));
    }
    return views;
  }
  nb::tuple info() {
    le_pool_info i{};
    check(le_pool_get_info(pool_, &i));
    return nb::make_tuple(i.live, i.issued, i.bytes);
  }

  nb::object forward(nb::handle x, nb::handle ids, nb::handle weights, nb::object out,
                     bool accumulate, bool transposed) {
    const char *op = "batched_lora_delta";
    Array xa = as_array(x, op, "x"), ia = as_array(ids, op, "ids");
    Array wa = as_optional_array(weights, op, "weights");
    if (out.is_none()) {
      out = new_output(x, xa, transposed ? in_ : out_);
      accumulate = false;
    }
    Array ya = as_array(out, op, "out");
    check(run(xa, elements(xa, adapters_of(ia)), [&] {
      return le_pool_forward(pool_, xa.ptr(), ia.ptr(), wa.ptr(), transposed, accumulate, ya.ptr());
    }));
    return out;
  }

  nb::object forward_slot(nb::handle x, int32_t slot, nb::object out, bool accumulate,
                          bool transposed, int64_t width) {
    const char *op = "batched_lora_delta";
    Array xa = as_array(x, op, "x");
    if (out.is_none()) {
      out = new_output(x, xa, width);
      accumulate = false;
    }
    Array ya = as_array(out, op, "out");
    check(run(xa, elements(xa), [&] {
      return le_pool_forward_slot(pool_, slot, xa.ptr(), transposed, accumulate, ya.ptr());
    }));
    return out;
  }

  nb::object adapt(nb::handle x, nb::handle grad, nb::handle ids, nb::handle weights,
                   const Step &step) {
    const char *op = "batched_adapt";
    Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad"), ia = as_array(ids, op, "ids");
    Array wa = as_optional_array(weights, op, "weights");
    uint8_t *outcomes = nullptr;
    nb::object made = new_uint8(xa.rows(), &outcomes);
    check(run(xa, elements(xa, adapters_of(ia)), [&] {
      return le_pool_adapt(pool_, xa.ptr(), ga.ptr(), ia.ptr(), wa.ptr(), &step, outcomes);
    }));
    return made;
  }

  nb::tuple adapt_slot(nb::handle x, nb::handle grad, int32_t slot, const Step &step) {
    const char *op = "batched_adapt";
    Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad");
    return outcome_of(xa, [&](uint8_t *outcome, double *norm) {
      return le_pool_adapt_slot(pool_, slot, xa.ptr(), ga.ptr(), &step, outcome, norm);
    });
  }

  nb::tuple adapt_slot_observed(nb::handle x, nb::handle grad, int32_t slot, const Step &step,
                                nb::handle u, nb::handle v) {
    const char *op = "batched_adapt";
    Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad");
    Array ua = as_array(u, op, "u"), va = as_array(v, op, "v");
    return outcome_of(xa, [&](uint8_t *outcome, double *norm) {
      return le_pool_adapt_slot_observed(pool_, slot, xa.ptr(), ga.ptr(), &step, ua.ptr(), va.ptr(),
                                         outcome, norm);
    });
  }

  int64_t gradient_size(int32_t slot) {
    int64_t size = 0;
    check(le_pool_gradient_size(pool_, slot, &size));
    return size;
  }

  nb::tuple gradient(nb::handle x, nb::handle grad, int32_t slot, nb::handle h, nb::handle total) {
    const char *op = "AdapterPool.gradient";
    Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad");
    Array ha = as_optional_array(h, op, "h"), ta = as_array(total, op, "gradient");
    return outcome_of(xa, [&](uint8_t *outcome, double *norm) {
      return le_pool_gradient(pool_, slot, xa.ptr(), ga.ptr(), ha.ptr(), ta.ptr(), outcome, norm);
    });
  }

  nb::tuple apply(nb::handle gradient, int32_t slot, float scale, const Step &step) {
    Array ga = as_array(gradient, "AdapterPool.apply", "gradient");
    return outcome_of(ga, [&](uint8_t *outcome, double *norm) {
      return le_pool_apply(pool_, slot, ga.ptr(), scale, &step, outcome, norm);
    });
  }

  nb::object shrink(nb::handle x, int32_t slot) {
    Array xa = as_array(x, "AdapterPool.shrink", "x");
    int64_t rank = 0;
    for (int32_t r : ranks(slot)) rank += r;
    nb::object h = new_float32(xa.rows(), rank);
    Array ha = as_array(h, "AdapterPool.shrink", "h");
    check(le_pool_shrink(pool_, slot, xa.ptr(), ha.ptr()));
    return h;
  }

 private:
  template <class Call>
  nb::tuple outcome_of(const Array &x, Call &&call) {
    uint8_t outcome = LE_NO_ADAPTER;
    double norm = 0;
    check(run(x, elements(x), [&] { return call(&outcome, &norm); }));
    return nb::make_tuple(static_cast<int>(outcome), norm);
  }

  void note_ranks(const std::vector<le_array> &A) {
    for (const le_array &a : A)
      if (a.ndim == 2)
        largest_rank_ =
            static_cast<int32_t>(std::clamp<int64_t>(a.shape[0], largest_rank_, LE_MAX_RANK));
  }

  le_pool *pool_ = nullptr;
  int64_t in_;
  std::vector<int64_t> outs_;
  int64_t out_;
  size_t slices_;
  int32_t largest_rank_ = 0;
};

class Ewc {
 public:
  Ewc(Pool &pool, const std::string &form, float ewc_lambda)
      : pool_(pool), delta_(form == "delta") {
    if (form != "factor" && !delta_) {
      PyErr_Format(PyExc_ValueError, "EWC: form: expected factor or delta, got %s", form.c_str());
      throw nb::python_error();
    }
    check(le_ewc_create(pool.handle(), delta_ ? LE_EWC_DELTA : LE_EWC_FACTOR, ewc_lambda, &ewc_));
  }
  ~Ewc() { le_ewc_destroy(ewc_); }
  Ewc(const Ewc &) = delete;
  Ewc &operator=(const Ewc &) = delete;

  le_ewc *handle() const { return ewc_; }
  void set(int32_t slot, nb::list first, nb::list second) {
    auto a = pool_.slices("EWC.set", first_name(), first);
    auto b = pool_.slices("EWC.set", second_name(), second);
    check(le_ewc_set(ewc_, slot, a.data(), b.data()));
  }
  // (first, second, anchor_A, anchor_B): lists of arrays, None for a missing slice. Read again
  // where the slot was changed while room was made for it.
  nb::tuple get(int32_t slot) {
    const char *op = "EWC.get";
    std::vector<le_array> none(pool_.num_slices());
    check(le_ewc_get(ewc_, slot, none.data(), none.data(), none.data(), none.data()));
    for (;;) {
      uint64_t before = pool_.version(slot);
      nb::list lists[4];
      std::vector<int32_t> ranks = pool_.ranks(slot);
      for (size_t s = 0; s < ranks.size(); ++s) {
        int64_t r = ranks[s], in = pool_.in(), out = pool_.slice_out(s);
        for (size_t i = 0; i < 4; ++i)
          lists[i].append(r == 0             ? nb::none()
                          : delta_ && i == 0 ? new_float32(out)
                          : delta_ && i == 1 ? new_float32(in)
                          : i % 2 == 0       ? new_float32(r, in)
                                             : new_float32(out, r));
      }
      auto first = pool_.slices(op, first_name(), lists[0]);
      auto second = pool_.slices(op, second_name(), lists[1]);
      auto a = pool_.slices(op, "anchor_A", lists[2]), b = pool_.slices(op, "anchor_B", lists[3]);
      le_status status = le_ewc_get(ewc_, slot, first.data(), second.data(), a.data(), b.data());
      if (pool_.version(slot) != before) continue;
      check(status);
      return nb::make_tuple(lists[0], lists[1], lists[2], lists[3]);
    }
  }
  void restore(int32_t slot, nb::list first, nb::list second, nb::list anchor_A,
               nb::list anchor_B) {
    const char *op = "EWC.restore";
    auto f = pool_.slices(op, first_name(), first), g = pool_.slices(op, second_name(), second);
    auto a = pool_.slices(op, "anchor_A", anchor_A), b = pool_.slices(op, "anchor_B", anchor_B);
    check(le_ewc_restore(ewc_, slot, f.data(), g.data(), a.data(), b.data()));
  }
  void remove(int32_t slot) { check(le_ewc_remove(ewc_, slot)); }
  double penalty() {
    double p = 0;
    check(le_ewc_penalty(ewc_, &p));
    return p;
  }

 private:
  const char *first_name() const { return delta_ ? "u" : "fisher_A"; }
  const char *second_name() const { return delta_ ? "v" : "fisher_B"; }

  Pool &pool_;
  const bool delta_;
  le_ewc *ewc_ = nullptr;
};

}  // namespace

le_pool *pool_handle(nb::handle pool) {
  return pool.is_none() ? nullptr : nb::cast<Pool &>(pool).handle();
}

void bind_pool(nb::module_ &m) {
  nb::class_<Step>(m, "Step", "How a step is taken: le_step of lora_engine.h.")
      .def(
          "__init__",
          [](Step *self, float lr, float max_norm, float lr_ratio, bool train_A, float weight_decay,
             std::optional<Ewc *> ewc) {
            new (self) Step(lr, max_norm, lr_ratio, train_A, weight_decay,
                            ewc && *ewc ? (*ewc)->handle() : nullptr);
          },
          "lr"_a, "max_norm"_a = 0.0f, "lr_ratio"_a = 1.0f, "train_A"_a = true,
          "weight_decay"_a = 0.0f, "ewc"_a = nb::none(), nb::keep_alive<1, 7>());

  nb::class_<Pool>(m, "Pool", "Storage of many adapters: le_pool of lora_engine.h.")
      .def(nb::init<int64_t, std::vector<int64_t>, const std::string &, int64_t, int32_t, int32_t,
                    uint64_t>(),
           "in_features"_a, "out_features"_a, "dtype"_a, "capacity"_a, "max_rank"_a, "history"_a,
           "seed"_a)
      .def("add", &Pool::add, "A"_a, "B"_a, "scaling"_a)
      .def("set", &Pool::set, "slot"_a, "A"_a, "B"_a, "scaling"_a)
      .def("get", &Pool::get, "slot"_a)
      .def("remove", &Pool::remove, "slot"_a)
      .def("remove_all", &Pool::remove_all, "slots"_a.none())
      .def("ranks", &Pool::ranks, "slot"_a)
      .def("version", &Pool::version, "slot"_a)
      .def("rollback", &Pool::rollback, "slot"_a)
      .def("view", &Pool::view, "slot"_a)
      .def("info", &Pool::info)
      .def("forward", &Pool::forward, "x"_a.none(), "ids"_a.none(), "weights"_a.none(),
           "out"_a.none(), "accumulate"_a, "transposed"_a = false)
      .def("forward_slot", &Pool::forward_slot, "x"_a.none(), "slot"_a, "out"_a.none(),
           "accumulate"_a, "transposed"_a, "width"_a)
      .def("adapt", &Pool::adapt, "x"_a.none(), "grad"_a.none(), "ids"_a.none(), "weights"_a.none(),
           "step"_a)
      .def("adapt_slot", &Pool::adapt_slot, "x"_a.none(), "grad"_a.none(), "slot"_a, "step"_a)
      .def("adapt_slot_observed", &Pool::adapt_slot_observed, "x"_a.none(), "grad"_a.none(),
           "slot"_a, "step"_a, "u"_a.none(), "v"_a.none())
      .def("gradient_size", &Pool::gradient_size, "slot"_a)
      .def("gradient", &Pool::gradient, "x"_a.none(), "grad"_a.none(), "slot"_a, "h"_a.none(),
           "gradient"_a.none())
      .def("apply", &Pool::apply, "gradient"_a.none(), "slot"_a, "scale"_a, "step"_a)
      .def("shrink", &Pool::shrink, "x"_a.none(), "slot"_a);

  nb::class_<Ewc>(m, "Ewc", "Fisher information and anchors: le_ewc of lora_engine.h.")
      .def(nb::init<Pool &, const std::string &, float>(), "pool"_a, "form"_a, "ewc_lambda"_a,
           nb::keep_alive<1, 2>())
      .def("set", &Ewc::set, "slot"_a, "first"_a, "second"_a)
      .def("get", &Ewc::get, "slot"_a)
      .def("restore", &Ewc::restore, "slot"_a, "first"_a, "second"_a, "anchor_A"_a, "anchor_B"_a)
      .def("remove", &Ewc::remove, "slot"_a)
      .def("penalty", &Ewc::penalty);
}

}  // namespace le_py
