// Sparse products on maps whose innermost dimension is a block of 16 images.
//
// A map is [C, N, H, W, 16]: C channels, N blocks of 16 images. A *position* is one pixel of
// one block: 16 numbers that lie side by side, one per image, the same pixel of the same channel.
// An *entry* is a stored weight: the row (output channel) it belongs to, its value, and how far its
// input lies from that of the row's position. So every layer, of whatever kernel, stride and
// padding, forward and backward, is one of two products over positions and entries:
//
//   gather:  out[row][position] = sum over entries of the row: value * in[position + offset]
//   weight_gradient, of an entry = sum over positions: d_out[row][position] . in[position + offset]
//
// The first is a sparse matrix times a dense one (SpMM), the second a product of two dense matrices
// that is computed only where there are entries (SDDMM).
// (A row's positions in the output, and those in the input that its offsets start from, are lists.)
//
// Entries are sorted by (block of input channels, row), and a few positions are done at a time, so
// that what they read stays in the first-level cache while all rows use it. Every number is summed
// by one thread in one order: results do not depend on the number of threads.

#pragma once

#include <type_traits>

#include "vectors.h"

// Where the T positions from `from` on find their input: base(t) + offset of the entry. If they lie
// side by side, as in most of a stride-1 convolution, one pointer serves all.
template <int64_t T>
struct Apart {
  const Scalar* bases[T];
  Apart(const Scalar* in, const int64_t* from) {
    for (int64_t t = 0; t < T; t++) bases[t] = in + from[t];
  }
  const Scalar* base(int64_t t) const { return bases[t]; }
};

struct SideBySide {
  const Scalar* first;
  SideBySide(const Scalar* in, const int64_t* from) : first(in + from[0]) {}
  const Scalar* base(int64_t t) const { return first + t * lanes; }
};

template <int64_t T>
inline bool side_by_side(const int64_t* from) {
  return from[T - 1] - from[0] == (T - 1) * lanes;
}

// to[i] = the total of vector i, in one order of additions wherever it is among how many.
inline void all_totals(const Scalar* vectors, int64_t count, Scalar* to) {
  for (int64_t i = 0; i < count; i += width) {
    const int64_t some = std::min(width, count - i);
    Vec several[width];
    for (int64_t k = 0; k < width; k++)
      several[k] = k < some ? Vec::loadu(vectors + (i + k) * width) : Vec(Scalar(0));
    totals(several).store(to + i, some);
  }
}

// f(number of positions, type of their bases, input, output) for the tiles from q0 to q1.
template <int64_t T, typename F>
inline void each_tile(const Positions& at, int64_t q0, int64_t q1, F f) {
  constexpr std::integral_constant<int64_t, T> several;
  constexpr std::integral_constant<int64_t, 1> single;
  int64_t q = q0;
  for (; q + T <= q1; q += T) {
    if (side_by_side<T>(at.in + q))
      f(several, std::type_identity<SideBySide>(), at.in + q, at.out + q);
    else
      f(several, std::type_identity<Apart<T>>(), at.in + q, at.out + q);
  }
  for (; q < q1; q++) f(single, std::type_identity<SideBySide>(), at.in + q, at.out + q);
}

// Bytes of maps that are prefetched while as many are used: the second-level cache is to hold both.
constexpr int64_t prefetched = 3 << 17;

// Makes groups of positions small enough to be prefetched. If even a few are too large, or all stay
// in the cache, none is.
inline void fit_group(Positions& at, int64_t rows) {
  constexpr int64_t least = sums;
  const uint64_t bytes = (at.channels + rows) * lanes * sizeof(Scalar);  // of a position
  const int64_t most = prefetched / bytes / least * least;
  if (most == 0 || at.count * bytes <= Map::large_size) at.channels = 0;
  if (at.channels) at.group = std::min(at.group, most);
}

// Prefetches what the positions from q0 to q1 read of the input, while others are computed: of all
// its channels, in so many parts, of which this is one.
[[gnu::always_inline]] inline void prefetch_input(const Scalar* in, const Positions& at, int64_t q0,
                                                  int64_t q1, int64_t part, int64_t parts) {
  const int64_t first = at.channels * part / parts, last = at.channels * (part + 1) / parts;
  for (int64_t c = first; c < last; c++)
    for (int64_t q = q0; q < std::min(q1, at.count); q++)
      prefetch<false>(in + at.in[q] + c * at.channel_stride + at.reach, lanes);
}

// The same of a row of the output.
template <bool written>
[[gnu::always_inline]] inline void prefetch_row(const Scalar* row, const Positions& at, int64_t q0,
                                                int64_t q1) {
  for (int64_t q = q0; q < std::min(q1, at.count) && at.channels; q++)
    prefetch<written>(row + at.out[q], lanes);
}
