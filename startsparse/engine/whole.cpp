// The products of products.h, of layers with most of their weights: all are computed, zeros too.
// Four rows share what they read, which is more than twice as fast per weight.

#include "exported.h"
#include "products.h"

namespace {

constexpr int64_t tile = std::max<int64_t>(1, 4 / registers);  // positions at a time
constexpr int64_t group = 64;                                  // positions before the next rows
constexpr int64_t block = 144;  // weights of a row before the next positions

// R rows of weights, each four numbers after the last: weight[k * rows_at_once + row].
template <int64_t R, int64_t T, typename Bases>
[[gnu::noinline]] void whole_gather_tile(const Scalar* in, Scalar* out, int64_t row_stride,
                                         const int64_t* from, const int64_t* to,
                                         const int32_t* offset, const Scalar* weight, int64_t count,
                                         bool fresh) {
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
[[gnu::noinline]] void whole_weight_gradient_tile(const Scalar* in, const Scalar* d_out,
                                                  int64_t row_stride, const int64_t* from,
                                                  const int64_t* to, const int32_t* offset,
                                                  Scalar* sums, int64_t count) {
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
        for (int64_t row = 0; row < R; row++) sum[row] = at::vec::fmadd(d[row][t][r], x, sum[row]);
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

}  // namespace

extern "C" {

// As `gather`, of a layer of `rows` rows with all their weights: offset [count]; weight [rows / 4,
// count, 4], rows that are not there included.
void whole_gather(const Scalar* in, Scalar* out, const Scalar* weight, const int32_t* offset,
                  int64_t count, int64_t rows, Positions at, bool add) {
  if (at.count == 0) return;
  const int64_t groups = (at.count + group - 1) / group;
  const int64_t fours = (rows + rows_at_once - 1) / rows_at_once;
  const int64_t parts = std::min(fours, (4 * at::get_num_threads() + groups - 1) / groups);
  at::parallel_for(0, groups * parts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t q0 = item / parts * group, q1 = std::min(at.count, q0 + group);
      const int64_t part = item % parts;
      for (int64_t k = 0; k < count; k += block)
        for (int64_t four = fours * part / parts; four < fours * (part + 1) / parts; four++)
          each_row(rows - four * rows_at_once, [&](auto R, int64_t row) {
            const Scalar* w = weight + (four * count + k) * rows_at_once + row;
            Scalar* to = out + (four * rows_at_once + row) * at.row_stride;
            each_tile<tile>(at, q0, q1,
                            [&](auto T, auto bases, const int64_t* from, const int64_t* where) {
                              whole_gather_tile<R, T, typename decltype(bases)::type>(
                                  in, to, at.row_stride, from, where, offset + k, w,
                                  std::min(block, count - k), k == 0 && !add);
                            });
          });
    }
  });
}
EXPORTED(whole_gather)

// gradient: [rows / 4, count, 4]; scratch: whole_scratch_size(count, rows) numbers.
void whole_weight_gradient(const Scalar* in, const Scalar* d_out, Scalar* gradient, Scalar* scratch,
                           const int32_t* offset, int64_t count, int64_t rows, Positions at) {
  const int64_t fours = (rows + rows_at_once - 1) / rows_at_once;
  const int64_t parts = std::min(fours, int64_t(4 * at::get_num_threads()));
  at::parallel_for(0, parts, 1, [&](int64_t begin, int64_t end) {
    const int64_t four0 = fours * begin / parts, four1 = fours * end / parts;
    const int64_t size = count * rows_at_once;
    std::fill(scratch + four0 * size * width, scratch + four1 * size * width, Scalar(0));
    for (int64_t q0 = 0; q0 < at.count; q0 += group)
      for (int64_t k = 0; k < count; k += block)
        for (int64_t four = four0; four < four1; four++)
          each_row(rows - four * rows_at_once, [&](auto R, int64_t row) {
            Scalar* sums = scratch + (four * size + k * rows_at_once + row) * width;
            const Scalar* d = d_out + (four * rows_at_once + row) * at.row_stride;
            each_tile<tile>(at, q0, std::min(at.count, q0 + group),
                            [&](auto T, auto bases, const int64_t* from, const int64_t* where) {
                              whole_weight_gradient_tile<R, T, typename decltype(bases)::type>(
                                  in, d, at.row_stride, from, where, offset + k, sums,
                                  std::min(block, count - k));
                            });
          });
    all_totals(scratch + four0 * size * width, (four1 - four0) * size, gradient + four0 * size);
  });
}
EXPORTED(whole_weight_gradient)

int64_t whole_scratch_size(int64_t count, int64_t rows) {
  return (rows + rows_at_once - 1) / rows_at_once * rows_at_once * count * width;
}
EXPORTED(whole_scratch_size)

}  // extern "C"
