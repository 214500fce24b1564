// Which instruction set's kernels run: the best at first use, or what
// LORA_ENGINE_ISA names.
#pragma once

#include "isa/kernels.h"

namespace le {

struct IsaEntry {
  const Kernels *kernels;
  bool (*supported)();
};

// What this library was built with, worst first, ended by a null entry.
extern const IsaEntry isa_table[];

// Throws LE_ERROR_UNSUPPORTED where LORA_ENGINE_ISA cannot be had.
const Kernels &kernels();

}  // namespace le
