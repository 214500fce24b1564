// lora_engine._C: the C ABI as Python objects. No logic of its own.
#include <nanobind/stl/optional.h>
#include <nanobind/stl/string.h>

#include <optional>

#include "py_call.h"

namespace nb = nanobind;
using namespace nb::literals;
using le_py::check;
using le_py::context;

namespace {

nb::tuple op_counters(const le_op_counters &op) {
  nb::list buckets;
  for (uint64_t n : op.buckets) buckets.append(n);
  return nb::make_tuple(op.calls, op.timed, op.seconds, buckets);
}

}  // namespace

NB_MODULE(_C, m) {
  nb::set_leak_warnings(false);  // the library prints nothing; a pool may live until exit
  le_py::init_arrays();
  if (le_abi_version() != LE_ABI_VERSION) throw std::runtime_error("lora_engine: ABI mismatch");
  le_py::bind_pool(m);
  le_py::bind_ops(m);
  le_py::bind_nf4(m);
  le_py::bind_torch(m);
  le_py::bind_consolidate(m);
  m.def("isa", []() -> std::optional<std::string> {
    const char *name = le_isa();
    return name ? std::optional<std::string>(name) : std::nullopt;
  });
  m.def(
      "isas_built",
      [] {
        nb::dict built;
        int32_t supported = 0;
        for (int32_t i = 0; const char *name = le_isa_built(i, &supported); ++i)
          built[name] = supported != 0;
        return built;
      },
      nb::sig("def isas_built() -> dict[str, bool]"));
  m.def("last_error", [] { return std::string(le_last_error(context())); });
  m.def(
      "set_num_threads", [](int32_t n) { check(le_set_num_threads(context(), n)); },
      "num_threads"_a);
  m.def("get_num_threads", [] { return le_get_num_threads(context()); });
  m.def(
      "set_tuning",
      [](int64_t bytes_per_thread, int64_t tile_rows) {
        check(le_set_tuning(context(), bytes_per_thread, tile_rows));
      },
      "bytes_per_thread"_a, "tile_rows"_a);
  m.def(
      "counters",
      [] {
        le_counters c;
        check(le_get_counters(context(), &c));
        return nb::make_tuple(op_counters(c.forward), op_counters(c.adapt), c.skipped, c.resident);
      },
      nb::sig("def counters() -> tuple[tuple[int, int, float, list[int]],"
              " tuple[int, int, float, list[int]], int, int]"));
  m.def("abi_version", &le_abi_version);
}
