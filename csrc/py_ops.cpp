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

}  // namespace

void bind_ops(nb::module_ &m) {
  m.def("lora_delta", &lora_delta, "x"_a.none(), "A"_a.none(), "B"_a.none(), "scaling"_a,
        "out"_a.none(), "accumulate"_a);
  m.def("ewc_step", &ewc_step, "theta"_a.none(), "grad"_a.none(), "fisher"_a.none(),
        "anchor"_a.none(), "lr"_a, "ewc_lambda"_a, "seed"_a, "version"_a);
}

}  // namespace le_py
