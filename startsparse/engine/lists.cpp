// Lists of entries: from a mask, transposed for the gradient of the input, and without zeros.

#include <ATen/Parallel.h>

#include <bit>
#include <cstring>
#include <numeric>

#include "exported.h"

namespace {

// Every mask is looked at in words of eight; mostly all of them are false.
inline uint64_t word(const bool* mask, int64_t size) {
  static_assert(std::endian::native == std::endian::little);
  uint64_t eight = 0;
  std::memcpy(&eight, mask, std::min<int64_t>(size, 8));
  return eight;
}

// f(index) for every index from begin to end where the mask is true.
template <typename F>
inline void each_true(const bool* mask, int64_t begin, int64_t end, F f) {
  for (int64_t i = begin; i < end; i += 8)
    for (uint64_t left = i + 8 <= end ? word(mask + i, 8) : word(mask + i, end - i); left;
         left &= left - 1)
      f(i + std::countr_zero(left) / 8);
}

// Divides numbers of 32 bits by one that is not known when this is compiled, by a multiplication
// (Lemire, Kaser and Kurz, 2019: Faster remainder by direct computation).
struct Divisor {
  uint64_t inverse;
  uint32_t by;
  explicit Divisor(uint32_t by) : inverse(UINT64_MAX / by + 1), by(by) {}
  uint32_t quotient(uint32_t n) const {
    return by == 1 ? n : static_cast<unsigned __int128>(inverse) * n >> 64;
  }
  uint32_t rest(uint32_t n) const { return n - quotient(n) * by; }
};

}  // namespace

extern "C" {

// counts [blocks * rows]: how many of mask [rows, channels, taps] are true in each (block, row);
// a block is `size` channels, the last may be smaller.
void count_entries(const bool* mask, int64_t rows, int64_t channels, int64_t taps, int64_t size,
                   int32_t* counts) {
  at::parallel_for(0, rows, 8, [&](int64_t row0, int64_t row1) {
    for (int64_t row = row0; row < row1; row++)
      for (int64_t c = 0, block = 0; c < channels; c += size, block++) {
        const bool* from = mask + (row * channels + c) * taps;
        const int64_t numbers = std::min(size, channels - c) * taps;
        int32_t count = 0;
        int64_t i = 0;
        for (; i + 8 <= numbers; i += 8) count += std::popcount(word(from + i, 8));
        counts[block * rows + row] = count + std::popcount(word(from + i, numbers - i));
      }
  });
}
EXPORTED(count_entries)

// Fills flat, the index in the mask of each entry; first: [blocks * rows + 1] summed counts.
void list_entries(const bool* mask, int64_t rows, int64_t channels, int64_t taps, int64_t size,
                  const int32_t* first, int32_t* flat) {
  at::parallel_for(0, rows, 8, [&](int64_t row0, int64_t row1) {
    for (int64_t row = row0; row < row1; row++)
      for (int64_t c = 0, block = 0; c < channels; c += size, block++) {
        const int64_t start = row * channels * taps, last = std::min(c + size, channels);
        int32_t* to = flat + first[block * rows + row];
        each_true(mask, start + c * taps, start + last * taps,
                  [&](int64_t index) { *to++ = index; });
      }
  });
}
EXPORTED(list_entries)

}  // extern "C"

namespace {

// f(entry, (block of `size` rows, input channel)) for the forward entries whose tap is not
// `no_tap`: by input channel, for the gradient of the input, where row and channel are exchanged.
// Each block of rows is done by one thread.
template <typename F>
inline void each_transposed(const Entries& forward, const int32_t* flat, int32_t channels,
                            int32_t taps, const int64_t* tap, int32_t size, F f) {
  const Divisor by_taps(taps);
  const int64_t parts = (forward.rows + size - 1) / size;
  const bool all = std::find(tap, tap + taps, no_tap) == tap + taps;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t row = begin * size; row < std::min(forward.rows, end * size); row++)
      for (int64_t block = 0; block < forward.blocks; block++) {
        const int32_t* bounds = forward.first + block * forward.rows + row;
        const int32_t start = row * channels * taps, base = row / size * channels;
        for (int32_t e = bounds[0]; e < bounds[1]; e++) {
          const uint32_t here = flat[e] - start, channel = by_taps.quotient(here);
          if (all || tap[here - channel * taps] != no_tap) f(e, base + channel);
        }
      }
  });
}

}  // namespace

extern "C" {

// flat: of the forward entries. tap: [taps]. counts: [blocks of rows * channels].
void count_transposed(Entries forward, const int32_t* flat, int32_t channels, int32_t taps,
                      const int64_t* tap, int32_t size, int32_t* counts) {
  each_transposed(forward, flat, channels, taps, tap, size,
                  [&](int32_t, int32_t group) { counts[group]++; });
}
EXPORTED(count_transposed)

// next: the summed counts, which are moved on. Fills order: which forward entry it is.
void list_transposed(Entries forward, const int32_t* flat, int32_t channels, int32_t taps,
                     const int64_t* tap, int32_t size, int32_t* next, int32_t* order) {
  each_transposed(forward, flat, channels, taps, tap, size,
                  [&](int32_t e, int32_t group) { order[next[group]++] = e; });
}
EXPORTED(list_transposed)

// Of entry e, whose index in the mask is f = flat[order[e]] (order nullptr: flat[e]): the input
// channel is f / divisor % modulus, and begins at stride times that.
void set_offsets(const int32_t* flat, const int32_t* order, int64_t entries, int64_t divisor,
                 int64_t modulus, int64_t stride, const int64_t* tap, int64_t taps,
                 int32_t* offset) {
  const Divisor d(divisor), m(modulus), k(taps);
  at::parallel_for(0, entries, 4096, [&](int64_t begin, int64_t end) {
    for (int64_t e = begin; e < end; e++) {
      const uint32_t f = flat[order ? order[e] : e];
      offset[e] = m.rest(d.quotient(f)) * stride + tap[k.rest(f)];
    }
  });
}
EXPORTED(set_offsets)

// List l has the entries from first[l] to first[l + 1]; entry e is at offset[e] and has the value
// value[order[e]]. Fills the same of the entries that are left, where value_left[e] is the value of
// entry e. Each list is done by one thread.
void list_nonzero(const int32_t* first, const int32_t* offset, const int32_t* order,
                  const Scalar* value, int64_t lists, int32_t* first_left, int32_t* offset_left,
                  int32_t* order_left, Scalar* value_left) {
  first_left[0] = 0;
  at::parallel_for(0, lists, 64, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; list++) {
      int32_t count = 0;
      for (int32_t e = first[list]; e < first[list + 1]; e++) count += value[order[e]] != 0;
      first_left[list + 1] = count;
    }
  });
  std::partial_sum(first_left, first_left + lists + 1, first_left);
  at::parallel_for(0, lists, 64, [&](int64_t begin, int64_t end) {
    for (int64_t list = begin; list < end; list++) {
      int32_t to = first_left[list];
      // Without a branch: what was written last stays only if its value is not zero.
      for (int32_t e = first[list]; to < first_left[list + 1]; e++) {
        const Scalar v = value[order[e]];
        offset_left[to] = offset[e], order_left[to] = order[e], value_left[to] = v;
        to += v != 0;
      }
    }
  });
}
EXPORTED(list_nonzero)

}  // extern "C"
