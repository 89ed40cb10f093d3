// Sparse products on maps whose innermost dimension is a block of 16 images.
//
// A map is [C, N, H, W, 16]: C channels, N blocks of 16 images. A *position* is one pixel of
// one block: 16 numbers that lie side by side, one per image, the same pixel of the same channel.
// An *entry* is a stored weight: the row (output channel) it belongs to, its value, and how far its
// input lies from that of the row's position. So every layer, of whatever kernel, stride and
// padding, forward and backward, is one of two products over positions and entries:
//
//   gather:   out[row][position] = sum over entries of the row: value * in[position + offset]
//   weights:  gradient of an entry = sum over positions: d_out[row][position] . in[position + its
//             offset]
//
// (A row's positions in the output, and those in the input that its offsets start from, are lists.)
//
// Entries are sorted by (block of input channels, row), and a few positions are done at a time, so
// that what they read stays in the first-level cache while all rows use it. Every number is summed
// by one thread in one order: results do not depend on the number of threads.

#include "maps.h"

#include <algorithm>
#include <bit>
#include <cstring>
#include <type_traits>
#include <vector>

namespace {

// Positions at a time: eight sums in registers hide the latency of a multiply-add.
constexpr int64_t tile = std::max<int64_t>(1, 8 / registers);
constexpr int64_t few = 64;  // positions that are all done before the next row's weights

struct Entries {
  const int32_t* first;   // [blocks * rows + 1], of each (block, row)
  const int32_t* offset;  // [entries], in numbers
  int64_t blocks, rows;
};

struct Positions {
  const int64_t* in;   // [count], in numbers
  const int64_t* out;  // [count], in numbers; row 0
  int64_t count, group, row_stride;
  int64_t channels, channel_stride, reach;  // of the input; from a position to its last tap
};

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

// The kernels stand alone, not inlined: only so does g++ keep all sums in registers.
template <int64_t T, typename Bases>
[[gnu::noinline]] void gather_tile(const Scalar* in, Scalar* out, const int64_t* from,
                                   const int64_t* to, const int32_t* offset, const Scalar* value,
                                   int64_t entries, bool fresh) {
  Vec sum[T][registers];
  const Bases at(in, from);
  for (int64_t t = 0; t < T; t++)
    for (int64_t r = 0; r < registers; r++)
      sum[t][r] = fresh ? Vec(Scalar(0)) : Vec::loadu(out + to[t] + r * width);
  for (int64_t e = 0; e < entries; e++) {
    const Vec weight(value[e]);
    const int64_t k = offset[e];
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++)
        sum[t][r] = at::vec::fmadd(weight, Vec::loadu(at.base(t) + k + r * width), sum[t][r]);
  }
  for (int64_t t = 0; t < T; t++)
    for (int64_t r = 0; r < registers; r++) sum[t][r].store(out + to[t] + r * width);
}

template <int64_t T, typename Bases>
[[gnu::noinline]] void weights_tile(const Scalar* in, const Scalar* d_out, const int64_t* from,
                                    const int64_t* to, const int32_t* offset, Scalar* sums,
                                    int64_t entries) {
  Vec d[T][registers];
  const Bases at(in, from);
  for (int64_t t = 0; t < T; t++)
    for (int64_t r = 0; r < registers; r++) d[t][r] = Vec::loadu(d_out + to[t] + r * width);
  for (int64_t e = 0; e < entries; e++) {
    const int64_t k = offset[e];
    Vec even = Vec::loadu(sums + e * width), odd(Scalar(0));
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++) {
        Vec& sum = (t + r) % 2 ? odd : even;
        sum = at::vec::fmadd(d[t][r], Vec::loadu(at.base(t) + k + r * width), sum);
      }
    (even + odd).store(sums + e * width);
  }
}

// to[i] = the total of vector i.
inline void all_totals(const Scalar* vectors, int64_t count, Scalar* to) {
  int64_t i = 0;
  for (; i + width <= count; i += width) {
    Vec several[width];
    for (int64_t k = 0; k < width; k++) several[k] = Vec::loadu(vectors + (i + k) * width);
    totals(several).store(to + i);
  }
  for (; i < count; i++) to[i] = total(Vec::loadu(vectors + i * width));
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

// Bytes of maps that are fetched while as many are used: the second-level cache is to hold both.
constexpr int64_t fetched = 3 << 17;

// Makes groups of positions small enough to be fetched. If even a few are too large, or all stay in
// the cache, none will be.
inline void fit_group(Positions& at, int64_t rows) {
  constexpr int64_t least = 8;
  const uint64_t bytes = (at.channels + rows) * lanes * sizeof(Scalar);  // of a position
  const int64_t most = fetched / bytes / least * least;
  if (most == 0 || at.count * bytes <= large_size) at.channels = 0;
  if (at.channels) at.group = std::min(at.group, most);
}

// Fetches what the positions from q0 to q1 read of the input, while others are computed: of all its
// channels, in `shares` shares, of which this is one.
[[gnu::always_inline]] inline void fetch_input(const Scalar* in, const Positions& at, int64_t q0,
                                               int64_t q1, int64_t share, int64_t shares) {
  const int64_t first = at.channels * share / shares, last = at.channels * (share + 1) / shares;
  for (int64_t c = first; c < last; c++)
    for (int64_t q = q0; q < std::min(q1, at.count); q++)
      fetch<false>(in + at.in[q] + c * at.channel_stride + at.reach, lanes);
}

// The same of a row of the output.
template <bool written>
[[gnu::always_inline]] inline void fetch_row(const Scalar* row, const Positions& at, int64_t q0,
                                             int64_t q1) {
  for (int64_t q = q0; q < std::min(q1, at.count) && at.channels; q++)
    fetch<written>(row + at.out[q], lanes);
}

// Of a layer that has most of its weights, all are computed, zeros too: four rows share what they
// read, which is more than twice as fast per weight.
constexpr int64_t rows_at_once = 4;
constexpr int64_t whole_tile = std::max<int64_t>(1, 4 / registers);  // positions at a time
constexpr int64_t whole_group = 64;   // positions before the next rows
constexpr int64_t whole_block = 144;  // weights of a row before the next positions

// R rows of weights, each four numbers after the last: weight[k * rows_at_once + row].
template <int64_t R, int64_t T, typename Bases>
[[gnu::noinline]] void whole_gather_tile(const Scalar* in, Scalar* out, int64_t row_stride,
                                         const int64_t* from, const int64_t* to,
                                         const int32_t* offset, const Scalar* weight,
                                         int64_t count, bool fresh) {
  Vec sum[R][T][registers];
  const Bases at(in, from);
  for (int64_t row = 0; row < R; row++)
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++)
        sum[row][t][r] =
            fresh ? Vec(Scalar(0)) : Vec::loadu(out + row * row_stride + to[t] + r * width);
  for (int64_t k = 0; k < count; k++) {
    Vec x[T][registers];
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++)
        x[t][r] = Vec::loadu(at.base(t) + offset[k] + r * width);
    for (int64_t row = 0; row < R; row++) {
      const Vec w(weight[k * rows_at_once + row]);
      for (int64_t t = 0; t < T; t++)
        for (int64_t r = 0; r < registers; r++)
          sum[row][t][r] = at::vec::fmadd(w, x[t][r], sum[row][t][r]);
    }
  }
  for (int64_t row = 0; row < R; row++)
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++)
        sum[row][t][r].store(out + row * row_stride + to[t] + r * width);
}

template <int64_t R, int64_t T, typename Bases>
[[gnu::noinline]] void whole_weights_tile(const Scalar* in, const Scalar* d_out,
                                          int64_t row_stride, const int64_t* from,
                                          const int64_t* to, const int32_t* offset, Scalar* sums,
                                          int64_t count) {
  Vec d[R][T][registers];
  const Bases at(in, from);
  for (int64_t row = 0; row < R; row++)
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++)
        d[row][t][r] = Vec::loadu(d_out + row * row_stride + to[t] + r * width);
  for (int64_t k = 0; k < count; k++) {
    Vec sum[R];
    for (int64_t row = 0; row < R; row++)
      sum[row] = Vec::loadu(sums + (k * rows_at_once + row) * width);
    for (int64_t t = 0; t < T; t++)
      for (int64_t r = 0; r < registers; r++) {
        const Vec x = Vec::loadu(at.base(t) + offset[k] + r * width);
        for (int64_t row = 0; row < R; row++)
          sum[row] = at::vec::fmadd(d[row][t][r], x, sum[row]);
      }
    for (int64_t row = 0; row < R; row++) sum[row].store(sums + (k * rows_at_once + row) * width);
  }
}

// f(number of rows, how many rows before) for four rows, or one by one for the last few.
template <typename F>
inline void each_row(int64_t rows, F f) {
  if (rows >= rows_at_once) {
    f(std::integral_constant<int64_t, rows_at_once>(), 0);
  } else {
    for (int64_t row = 0; row < rows; row++) f(std::integral_constant<int64_t, 1>(), row);
  }
}

// Every mask is looked at in words of eight; mostly all of them are false.
inline uint64_t word(const bool* mask, int64_t size) {
  static_assert(std::endian::native == std::endian::little);
  uint64_t eight = 0;
  std::memcpy(&eight, mask, std::min<int64_t>(size, 8));
  return eight;
}

// f(place) for every place from begin to end where the mask is true.
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
        const int64_t places = std::min(size, channels - c) * taps;
        int32_t count = 0;
        int64_t i = 0;
        for (; i + 8 <= places; i += 8) count += std::popcount(word(from + i, 8));
        counts[block * rows + row] = count + std::popcount(word(from + i, places - i));
      }
  });
}

// Fills flat, the place in the mask of each entry; first: [blocks * rows + 1] summed counts.
void list_entries(const bool* mask, int64_t rows, int64_t channels, int64_t taps, int64_t size,
                  const int32_t* first, int32_t* flat) {
  at::parallel_for(0, rows, 8, [&](int64_t row0, int64_t row1) {
    for (int64_t row = row0; row < row1; row++)
      for (int64_t c = 0, block = 0; c < channels; c += size, block++) {
        const int64_t start = row * channels * taps, last = std::min(c + size, channels);
        int32_t* to = flat + first[block * rows + row];
        each_true(mask, start + c * taps, start + last * taps,
                  [&](int64_t place) { *to++ = place; });
      }
  });
}

}  // extern "C"

namespace {

// f(entry, (block of `size` rows, input channel)) for the forward entries whose tap is not `no_tap`:
// by input channel, for the gradient of the input, where row and channel change places. Each block
// of rows is done by one thread.
constexpr int64_t no_tap = INT64_MIN;

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

// next: the summed counts, which are moved on. Fills order: which forward entry it is.
void list_transposed(Entries forward, const int32_t* flat, int32_t channels, int32_t taps,
                     const int64_t* tap, int32_t size, int32_t* next, int32_t* order) {
  each_transposed(forward, flat, channels, taps, tap, size,
                  [&](int32_t e, int32_t group) { order[next[group]++] = e; });
}

// Of entry e, whose place in the mask is f = flat[order[e]] (order nullptr: flat[e]): the input
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

// value: [entries]; in, out: maps; every row is written at every position, or added to what is there.
void gather(const Scalar* in, Scalar* out, const Scalar* value, Entries entries, Positions at,
            bool add) {
  if (at.count == 0) return;
  fit_group(at, entries.rows);
  const int64_t groups = (at.count + at.group - 1) / at.group;
  const int64_t parts = std::min(entries.rows, (4 * at::get_num_threads() + groups - 1) / groups);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t q0 = item / parts * at.group, q1 = std::min(at.count, q0 + at.group);
      const int64_t part = item % parts;
      const int64_t row0 = entries.rows * part / parts, row1 = entries.rows * (part + 1) / parts;
      for (int64_t block = 0; block < entries.blocks; block++)
        for (int64_t row = row0; row < row1; row++) {
          const int32_t* bounds = entries.first + block * entries.rows + row;
          const int64_t count = bounds[1] - bounds[0];
          const bool fresh = block == 0 && !add;
          Scalar* to = out + row * at.row_stride;
          if (block == 0 && parts == 1) {
            fetch_input(in, at, q1, q1 + at.group, row, entries.rows);
            fetch_row<true>(to, at, q1, q1 + at.group);
          }
          if (count == 0 && !fresh) continue;
          const int32_t* offset = entries.offset + bounds[0];
          const Scalar* values = value + bounds[0];
          each_tile<tile>(at, q0, q1, [&](auto t, auto bases, const int64_t* from, const int64_t* where) {
            gather_tile<t, typename decltype(bases)::type>(in, to, from, where, offset, values,
                                                           count, fresh);
          });
        }
    }
  });
}

// gradient: [entries]; scratch: [scratch_size(entries, positions)].
void weights(const Scalar* in, const Scalar* d_out, Scalar* gradient, Scalar* scratch,
             Entries entries, Positions at) {
  const int64_t parts = std::min(entries.rows, int64_t(4 * at::get_num_threads()));
  // Of few positions all are done before the next row: so its sums stay in the cache.
  fit_group(at, entries.rows);
  const int64_t group = at.count <= few ? few : at.group;
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    std::vector<Scalar> own;
    const int64_t row0 = entries.rows * begin / parts, row1 = entries.rows * end / parts;
    for (int64_t q0 = 0; q0 < at.count; q0 += group) {
      const int64_t q1 = std::min(at.count, q0 + group);
      for (int64_t block = 0; block < entries.blocks; block++)
        for (int64_t row = row0; row < row1; row++) {
          const int32_t* bounds = entries.first + block * entries.rows + row;
          const int64_t count = bounds[1] - bounds[0];
          if (block == 0) fetch_input(in, at, q1, q1 + group, row - row0, row1 - row0);
          if (count == 0) continue;
          const Scalar* d = d_out + row * at.row_stride;
          if (block == 0) fetch_row<false>(d, at, q1, q1 + group);
          const int32_t* offset = entries.offset + bounds[0];
          if (at.count <= few) own.resize(std::max<size_t>(own.size(), count * width));
          Scalar* sums = at.count <= few ? own.data() : scratch + bounds[0] * width;
          if (q0 == 0) std::fill(sums, sums + count * width, Scalar(0));
          each_tile<tile>(at, q0, q1, [&](auto t, auto bases, const int64_t* from, const int64_t* where) {
            weights_tile<t, typename decltype(bases)::type>(in, d, from, where, offset, sums, count);
          });
          if (q1 == at.count)
            all_totals(sums, count, gradient + bounds[0]);
        }
    }
  });
}

// As `gather`, of a layer of `rows` rows with all their weights: offset [count]; weight [rows / 4,
// count, 4], rows that are not there included.
void whole_gather(const Scalar* in, Scalar* out, const Scalar* weight, const int32_t* offset,
                  int64_t count, int64_t rows, Positions at, bool add) {
  if (at.count == 0) return;
  const int64_t groups = (at.count + whole_group - 1) / whole_group;
  const int64_t fours = (rows + rows_at_once - 1) / rows_at_once;
  const int64_t parts = std::min(fours, (4 * at::get_num_threads() + groups - 1) / groups);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t q0 = item / parts * whole_group, q1 = std::min(at.count, q0 + whole_group);
      const int64_t part = item % parts;
      for (int64_t k = 0; k < count; k += whole_block)
        for (int64_t four = fours * part / parts; four < fours * (part + 1) / parts; four++)
          each_row(rows - four * rows_at_once, [&](auto R, int64_t row) {
            const Scalar* w = weight + (four * count + k) * rows_at_once + row;
            Scalar* to = out + (four * rows_at_once + row) * at.row_stride;
            each_tile<whole_tile>(
                at, q0, q1, [&](auto T, auto bases, const int64_t* from, const int64_t* where) {
                  whole_gather_tile<R, T, typename decltype(bases)::type>(
                      in, to, at.row_stride, from, where, offset + k, w,
                      std::min(whole_block, count - k), k == 0 && !add);
                });
          });
    }
  });
}

// gradient: [rows / 4, count, 4]; scratch: whole_scratch_size(count, rows) numbers.
void whole_weights(const Scalar* in, const Scalar* d_out, Scalar* gradient, Scalar* scratch,
                   const int32_t* offset, int64_t count, int64_t rows, Positions at) {
  const int64_t fours = (rows + rows_at_once - 1) / rows_at_once;
  const int64_t parts = std::min(fours, int64_t(4 * at::get_num_threads()));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t four0 = fours * begin / parts, four1 = fours * end / parts;
    const int64_t size = count * rows_at_once;
    std::fill(scratch + four0 * size * width, scratch + four1 * size * width, Scalar(0));
    for (int64_t q0 = 0; q0 < at.count; q0 += whole_group)
      for (int64_t k = 0; k < count; k += whole_block)
        for (int64_t four = four0; four < four1; four++)
          each_row(rows - four * rows_at_once, [&](auto R, int64_t row) {
            Scalar* sums = scratch + (four * size + k * rows_at_once + row) * width;
            const Scalar* d = d_out + (four * rows_at_once + row) * at.row_stride;
            each_tile<whole_tile>(
                at, q0, std::min(at.count, q0 + whole_group),
                [&](auto T, auto bases, const int64_t* from, const int64_t* where) {
                  whole_weights_tile<R, T, typename decltype(bases)::type>(
                      in, d, at.row_stride, from, where, offset + k, sums,
                      std::min(whole_block, count - k));
                });
          });
    all_totals(scratch + four0 * size * width, (four1 - four0) * size, gradient + four0 * size);
  });
}

int64_t whole_scratch_size(int64_t count, int64_t rows) {
  return (rows + rows_at_once - 1) / rows_at_once * rows_at_once * count * width;
}

int64_t scratch_size(int64_t entries, int64_t positions) {
  return positions <= few ? 0 : entries * width;
}

}  // extern "C"
