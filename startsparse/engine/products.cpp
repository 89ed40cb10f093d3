// The products of products.h, of layers with a few of their weights.

#include <vector>

#include "exported.h"
#include "products.h"

namespace {

constexpr int64_t tile = std::max<int64_t>(1, sums / registers);  // positions at a time
constexpr int64_t few = 64;  // positions that are all done before the next row's weights

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
[[gnu::noinline]] void weight_gradient_tile(const Scalar* in, const Scalar* d_out,
                                            const int64_t* from, const int64_t* to,
                                            const int32_t* offset, Scalar* sums, int64_t entries) {
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

}  // namespace

extern "C" {

// value: [entries]; in, out: maps; every row is written at every position, or added to what is
// there.
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
            prefetch_input(in, at, q1, q1 + at.group, row, entries.rows);
            prefetch_row<true>(to, at, q1, q1 + at.group);
          }
          if (count == 0 && !fresh) continue;
          const int32_t* offset = entries.offset + bounds[0];
          const Scalar* values = value + bounds[0];
          each_tile<tile>(at, q0, q1,
                          [&](auto t, auto bases, const int64_t* from, const int64_t* where) {
                            gather_tile<t, typename decltype(bases)::type>(
                                in, to, from, where, offset, values, count, fresh);
                          });
        }
    }
  });
}
EXPORTED(gather)

// gradient: [entries]; scratch: [scratch_size(entries, positions)].
void weight_gradient(const Scalar* in, const Scalar* d_out, Scalar* gradient, Scalar* scratch,
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
          if (block == 0) prefetch_input(in, at, q1, q1 + group, row - row0, row1 - row0);
          if (count == 0) continue;
          const Scalar* d = d_out + row * at.row_stride;
          if (block == 0) prefetch_row<false>(d, at, q1, q1 + group);
          const int32_t* offset = entries.offset + bounds[0];
          if (at.count <= few) own.resize(std::max<size_t>(own.size(), count * width));
          Scalar* sums = at.count <= few ? own.data() : scratch + bounds[0] * width;
          if (q0 == 0) std::fill(sums, sums + count * width, Scalar(0));
          each_tile<tile>(at, q0, q1,
                          [&](auto t, auto bases, const int64_t* from, const int64_t* where) {
                            weight_gradient_tile<t, typename decltype(bases)::type>(
                                in, d, from, where, offset, sums, count);
                          });
          if (q1 == at.count) all_totals(sums, count, gradient + bounds[0]);
        }
    }
  });
}
EXPORTED(weight_gradient)

int64_t scratch_size(int64_t entries, int64_t positions) {
  return positions <= few ? 0 : entries * width;
}
EXPORTED(scratch_size)

}  // extern "C"
