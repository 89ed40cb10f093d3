// Pooling.

#include <cmath>

#include "exported.h"
#include "vectors.h"

namespace {

// f(n, c) for each plane of a map, in the order of memory.
template <typename F>
inline void each_plane(const Map& x, F f) {
  at::parallel_for(0, x.channels * x.blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) f(item % x.blocks, item / x.blocks);
  });
}

// The lines, or columns, that a window reads, of so many that there are.
struct Reach {
  int64_t first, last;  // the last is not read
  Reach(int64_t window, int64_t kernel, int64_t stride, int64_t padding, int64_t size)
      : first(std::max<int64_t>(window * stride - padding, 0)),
        last(std::min(window * stride - padding + kernel, size)) {}
};

}  // namespace

extern "C" {

// The largest of each window; beyond the edge there is nothing.
void max_pool(Map x, int64_t kernel, int64_t stride, int64_t padding, Map y) {
  each_plane(x, [&](int64_t n, int64_t c) {
    y.zero_border(n, c);
    for (int64_t oh = 0; oh < y.height; oh++) {
      const Reach down(oh, kernel, stride, padding, x.height);
      for (int64_t h = down.first; h < down.last; h++)
        prefetch<false>(x.at(n, c, h, 0) + x.plane(), x.columns * lanes);
      for (int64_t ow = 0; ow < y.columns; ow++) {
        const Reach right(ow, kernel, stride, padding, x.columns);
        Vec best[registers];
        for (auto& v : best) v = Vec(-INFINITY);
        for (int64_t h = down.first; h < down.last; h++)
          for (int64_t w = right.first; w < right.last; w++)
            for (int64_t r = 0; r < registers; r++)
              best[r] = at::vec::maximum(best[r], Vec::loadu(x.at(n, c, h, w) + r * width));
        for (int64_t r = 0; r < registers; r++) best[r].store(y.at(n, c, oh, ow) + r * width);
      }
    }
  });
}
EXPORTED(max_pool)

// As in PyTorch, the gradient goes to the first of the largest, or to the last NaN.
void max_pool_backward(Map d_y, Map y, Map x, int64_t kernel, int64_t stride, int64_t padding,
                       Map d_x) {
  each_plane(x, [&](int64_t n, int64_t c) {
    Scalar* start = d_x.at(n, c, -d_x.border, -d_x.border);
    std::fill(start, start + d_x.plane(), Scalar(0));
    for (int64_t oh = 0; oh < y.height; oh++) {
      const Reach down(oh, kernel, stride, padding, x.height);
      for (int64_t h = down.first; h < down.last; h++) {
        prefetch<false>(x.at(n, c, h, 0) + x.plane(), x.columns * lanes);
        prefetch<true>(d_x.at(n, c, h, 0) + d_x.plane(), x.columns * lanes);
      }
      for (int64_t ow = 0; ow < y.columns; ow++) {
        const Reach right(ow, kernel, stride, padding, x.columns);
        for (int64_t r = 0; r < registers; r++) {
          const Vec best = Vec::loadu(y.at(n, c, oh, ow) + r * width), zero(Scalar(0));
          Vec left_over = Vec::loadu(d_y.at(n, c, oh, ow) + r * width);
          const auto give = [&](int64_t h, int64_t w, const Vec& here) {
            Scalar* to = d_x.at(n, c, h, w) + r * width;
            (Vec::loadu(to) + Vec::blendv(zero, left_over, here)).store(to);
            left_over = Vec::blendv(left_over, zero, here);
          };
          for (int64_t h = down.first; h < down.last; h++)
            for (int64_t w = right.first; w < right.last; w++)
              give(h, w, Vec::loadu(x.at(n, c, h, w) + r * width) == best);
          if (!best.has_inf_nan()) continue;
          for (int64_t h = down.last - 1; h >= down.first; h--)  // what equals nothing: NaN
            for (int64_t w = right.last - 1; w >= right.first; w--)
              give(h, w, Vec::loadu(x.at(n, c, h, w) + r * width).isnan());
        }
      }
    }
  });
}
EXPORTED(max_pool_backward)

}  // extern "C"
