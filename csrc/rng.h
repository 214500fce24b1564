// The key of the counter generator behind stochastic rounding; isa/vec.h holds
// the generator. reference.py holds the same formulas.
#pragma once

#include <cstdint>

namespace le {

inline uint64_t splitmix64(uint64_t z) {
  z += 0x9e3779b97f4a7c15u;
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
  z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
  return z ^ (z >> 31);
}

inline uint64_t rounding_key(uint64_t seed, int32_t slot, uint64_t version) {
  return splitmix64(splitmix64(splitmix64(seed) ^ static_cast<uint64_t>(slot)) ^ version);
}

}  // namespace le
