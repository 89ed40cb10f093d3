// Maps: Scalar [C, N, H + 2 border, W + 2 border, 16]; see products.cpp. The border is zero.
#pragma once

#include <ATen/Parallel.h>
#include <ATen/cpu/vec/functional.h>
#include <ATen/cpu/vec/vec.h>

#include <algorithm>
#include <cstdint>

using Scalar = SCALAR;  // float or double; a library is built for each
using Vec = at::vec::Vectorized<Scalar>;
constexpr int64_t lanes = 16;                 // images of a block
constexpr int64_t width = Vec::size();        // numbers of a vector register
constexpr int64_t registers = lanes / width;  // registers of a position
constexpr uint64_t large_size = 1 << 20;      // bytes

// The pixels of one channel.
struct Channel {
  Scalar* start;  // nullptr if there is no map
  int64_t block, line;  // numbers from one block of images, or line of pixels, to the next
  Scalar* row(int64_t n, int64_t h) const { return start ? start + n * block + h * line : nullptr; }
};

struct Map {
  Scalar* data;
  int64_t blocks, channels, height, columns, border;

  // Pixel (h, w) of channel c in block n; the border is at -1, -2, ... and beyond height, columns.
  Scalar* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t rows = height + 2 * border, line = columns + 2 * border;
    return data + (((c * blocks + n) * rows + h + border) * line + w + border) * lanes;
  }

  // Whether it comes from memory: it would fill a second-level cache.
  bool large() const { return channels * blocks * plane() * sizeof(Scalar) > large_size; }

  // Numbers from one line of pixels to the next.
  int64_t line() const { return (columns + 2 * border) * lanes; }

  // Numbers from one block of a channel to the next; after the last comes the next channel.
  int64_t plane() const { return (height + 2 * border) * line(); }

  Channel channel(int64_t c) const {
    return {data ? at(0, c, 0, 0) : nullptr, plane(), line()};
  }

  void zero_border(int64_t n, int64_t c) const {
    if (border == 0) return;
    std::fill(at(n, c, -border, -border), at(n, c, 0, 0), Scalar(0));
    for (int64_t h = 0; h + 1 < height; h++)
      std::fill(at(n, c, h, columns), at(n, c, h + 1, 0), Scalar(0));
    Scalar* last = at(n, c, height - 1, columns);
    std::fill(last, last + (border + border * (columns + 2 * border)) * lanes, Scalar(0));
  }
};

// Asks for `count` numbers, which will soon be read, or written: maps come from memory, and where
// the next strip of one begins the processor does not foresee. (Inlined: else g++ takes it for a
// call without effect, and leaves it out.)
template <bool written>
[[gnu::always_inline]] inline void fetch(const Scalar* from, int64_t count) {
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
