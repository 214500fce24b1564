// The ops on arrays of lora_engine._C.
#include "py_call.h"

using namespace nanobind::literals;

namespace le_py {
namespace {

nb::object lora_delta(nb::handle x, nb::handle A, nb::handle B, float scaling, nb::object out,
                      bool accumulate) {
  const char *op = "lora_delta";
  Array xa = as_array(x, op, "x"), aa = as_array(A, op, "A"), ba = as_array(B, op, "B");
  int64_t width = ba.view.ndim == 2 ? ba.view.shape[0] : 1;
  if (out.is_none()) {
    out = new_output(x, xa, width);
    accumulate = false;
  }
  Array ya = as_array(out, op, "out");
  check(run(xa, xa.rows() * (xa.width() + width), [&] {
    return le_lora_delta(context(), xa.ptr(), aa.ptr(), ba.ptr(), scaling, accumulate, ya.ptr());
  }));
  return out;
}

void ewc_step(nb::handle theta, nb::handle grad, nb::handle fisher, nb::handle anchor, float lr,
              float ewc_lambda, uint64_t seed, uint64_t version) {
  const char *op = "ewc_step";
  Array t = as_array(theta, op, "theta"), g = as_array(grad, op, "grad");
  Array f = as_array(fisher, op, "fisher"), a = as_array(anchor, op, "anchor");
  check(run(t, 2 * t.rows() * t.width(), [&] {
    return le_ewc_step(context(), t.ptr(), g.ptr(), f.ptr(), a.ptr(), lr, ewc_lambda, seed,
                       version);
  }));
}

void fisher_accumulate(nb::handle F, nb::handle g, float gamma, float scale) {
  const char *op = "fisher_accumulate";
  Array to = as_array(F, op, "F"), from = as_array(g, op, "g");
  check(run(to, 2 * to.rows() * to.width(),
            [&] { return le_fisher_accumulate(context(), to.ptr(), from.ptr(), gamma, scale); }));
}

// The pair that the caller gave to be added to, or two new arrays.
nb::tuple sum_outputs(nb::handle out, const char *op, const char *names, nb::handle like,
                      const Array &like_view, nb::object first, nb::object second) {
  if (out.is_none())
    return nb::make_tuple(new_sums(like, like_view, first), new_sums(like, like_view, second));
  if ((!PyTuple_Check(out.ptr()) && !PyList_Check(out.ptr())) || nb::len(out) != 2) {
    PyErr_Format(PyExc_TypeError, "%s: out: expected a pair of arrays %s, got %R", op, names,
                 reinterpret_cast<PyObject *>(Py_TYPE(out.ptr())));
    throw nb::python_error();
  }
  return nb::make_tuple(out[0], out[1]);
}

nb::object lora_fisher(nb::handle x, nb::handle grad, nb::handle A, nb::handle B, float scaling,
                       nb::handle segments, nb::handle out) {
  const char *op = "lora_fisher";
  Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad");
  Array aa = as_array(A, op, "A"), ba = as_array(B, op, "B");
  Array sa = as_optional_array(segments, op, "segments");
  int64_t rank = aa.rows();
  nb::tuple sums = sum_outputs(out, op, "(F_A, F_B)", x, xa, nb::make_tuple(rank, aa.width()),
                               nb::make_tuple(ba.view.ndim == 2 ? ba.rows() : 1, rank));
  Array fa = as_array(sums[0], op, "F_A"), fb = as_array(sums[1], op, "F_B");
  check(run(xa, xa.rows() * (xa.width() + ga.width()) * rank, [&] {
    return le_lora_fisher(context(), xa.ptr(), ga.ptr(), aa.ptr(), ba.ptr(), scaling, sa.ptr(),
                          !out.is_none(), fa.ptr(), fb.ptr());
  }));
  return sums;
}

nb::object lora_fisher_factors(nb::handle x, nb::handle grad, nb::handle out) {
  const char *op = "lora_fisher_factors";
  Array xa = as_array(x, op, "x"), ga = as_array(grad, op, "grad");
  nb::tuple sums =
      sum_outputs(out, op, "(u, v)", x, xa, nb::make_tuple(ga.width()), nb::make_tuple(xa.width()));
  Array u = as_array(sums[0], op, "u"), v = as_array(sums[1], op, "v");
  check(run(xa, xa.rows() * (xa.width() + ga.width()), [&] {
    return le_lora_fisher_factors(context(), xa.ptr(), ga.ptr(), !out.is_none(), u.ptr(), v.ptr());
  }));
  return sums;
}

}  // namespace

void bind_ops(nb::module_ &m) {
  m.def("lora_delta", &lora_delta, "x"_a.none(), "A"_a.none(), "B"_a.none(), "scaling"_a,
        "out"_a.none(), "accumulate"_a);
  m.def("ewc_step", &ewc_step, "theta"_a.none(), "grad"_a.none(), "fisher"_a.none(),
        "anchor"_a.none(), "lr"_a, "ewc_lambda"_a, "seed"_a, "version"_a);
  m.def("fisher_accumulate", &fisher_accumulate, "F"_a.none(), "g"_a.none(), "gamma"_a, "scale"_a);
  m.def("lora_fisher", &lora_fisher, "x"_a.none(), "grad"_a.none(), "A"_a.none(), "B"_a.none(),
        "scaling"_a, "segments"_a.none(), "out"_a.none());
  m.def("lora_fisher_factors", &lora_fisher_factors, "x"_a.none(), "grad"_a.none(), "out"_a.none());
}

}  // namespace le_py
