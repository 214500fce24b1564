// consolidate of lora_engine._C.
#include <nanobind/stl/vector.h>

#include <limits>

#include "py_call.h"

using namespace nanobind::literals;

namespace le_py {
namespace {

// (A, B, versions, subspace sweeps, sweeps). The whole call is made without the GIL.
nb::tuple consolidate(nb::handle pool, int32_t base, nb::handle slots, nb::handle weights,
                      nb::handle u, nb::handle v, nb::handle samples, int32_t rank, float scaling,
                      int32_t max_sweeps, float tolerance, int32_t num_threads, nb::object A,
                      nb::object B) {
  const char *op = "consolidate";
  Array s = as_array(slots, op, "slots"), w = as_array(weights, op, "weights");
  Array ua = as_optional_array(u, op, "u"), va = as_optional_array(v, op, "v");
  Array na = as_optional_array(samples, op, "samples");
  Array a = as_array(A, op, "A"), b = as_array(B, op, "B");
  le_merge merge{s.ptr(), w.ptr(), ua.ptr(),   va.ptr(),  na.ptr(),
                 rank,    scaling, max_sweeps, tolerance, num_threads};
  std::vector<uint64_t> versions(static_cast<size_t>(s.width() + 1));
  le_merge_info info{};
  le_pool *handle = pool_handle(pool);
  check(run(s, std::numeric_limits<int64_t>::max(), [&] {
    return le_consolidate(handle, base, &merge, a.ptr(), b.ptr(), versions.data(), &info);
  }));
  return nb::make_tuple(A, B, versions, info.subspace_sweeps, info.sweeps);
}

}  // namespace

void bind_consolidate(nb::module_ &m) {
  m.def("consolidate", &consolidate, "pool"_a.none(), "base"_a, "slots"_a.none(),
        "weights"_a.none(), "u"_a.none(), "v"_a.none(), "samples"_a.none(), "rank"_a, "scaling"_a,
        "max_sweeps"_a, "tolerance"_a, "num_threads"_a, "A"_a, "B"_a);
}

}  // namespace le_py
