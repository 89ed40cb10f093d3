// Vector registers of this CPU, and prefetch.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include "structs.h"

using Vec = at::vec::Vectorized<Scalar>;
constexpr int64_t width = Vec::size();        // numbers of a vector register
constexpr int64_t registers = lanes / width;  // registers of a position

// Prefetches `count` numbers, which will soon be read, or written: maps come from memory, and where
// the next strip of one begins the processor does not foresee. (Inlined: else g++ takes it for a
// call without effect, and leaves it out.)
template <bool written>
[[gnu::always_inline]] inline void prefetch(const Scalar* from, int64_t count) {
  constexpr int64_t line = 64 / sizeof(Scalar);  // of the cache
  for (int64_t i = 0; i < count; i += line) __builtin_prefetch(from + i, written, 2);
}

inline Scalar total(const Vec& vector) {
  return at::vec::vec_reduce_all<Scalar>([](const Vec& a, const Vec& b) { return a + b; }, vector);
}

// The totals of as many vectors as a vector has numbers; overwrites them. Each halving adds up
// neighbours, and the vectors close ranks.
inline Vec totals(Vec* vectors) {
  for (int64_t left = width / 2; left > 0; left /= 2)
    for (int64_t i = 0; i < left; i++) {
      const auto [even, odd] = at::vec::deinterleave2(vectors[2 * i], vectors[2 * i + 1]);
      vectors[i] = even + odd;
    }
  return vectors[0];
}
