// Single images: a map is [C, H + 2 border, W + 2 border], and a vector holds pixels side by side.
//
// A convolution of stride 1 is `gather` of products.cpp over runs of 16 pixels of the whole plane,
// lines and borders alike: what it makes has lines as long as its input's, whose last pixels mean
// nothing. A stride is taken out of the input first: `split` deals pixels to one plane per phase.

#include <ATen/Parallel.h>

#include <cmath>

#include "exported.h"

namespace {

// As PyTorch's: NaN is larger than any number.
inline Scalar larger(Scalar best, Scalar x) { return x > best || std::isnan(x) ? x : best; }

template <typename F>
inline void each_channel(const Plane& z, F f) {
  const int64_t grain = std::max<int64_t>(1, 4096 / (z.height * z.columns));
  at::parallel_for(0, z.channels, grain, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) f(c);
  });
}

}  // namespace

extern "C" {

// y: sy * sx planes for each of x, of lines and pixels i, i + s, i + 2s, ...; x.height
// and x.columns say how far x may be read, the rest is zero.
void split(Plane x, int64_t sy, int64_t sx, Plane y) {
  each_channel(x, [&](int64_t c) {
    for (int64_t i = 0; i < sy; i++)
      for (int64_t j = 0; j < sx; j++)
        for (int64_t h = 0; h < y.height; h++) {
          Scalar* to = y.row((c * sy + i) * sx + j, h);
          const int64_t line = h * sy + i;
          for (int64_t w = 0; w < y.columns; w++)
            to[w] = line < x.height && w * sx + j < x.columns ? x.row(c, line)[w * sx + j] : 0;
        }
  });
}
EXPORTED(split)

// As `affine` of layers.cpp, by running statistics or without a norm; y stays as it is.
void plane_affine(Plane y, bool first, const Scalar* before, Norm norm, Plane residual, bool relu,
                  Plane z) {
  const Scalar least = relu ? 0 : -INFINITY, least_first = first ? 0 : -INFINITY;
  const Scalar epsilon = norm.epsilon;
  const int64_t grain = std::max<int64_t>(1, 4096 / (z.height * z.columns));
  at::parallel_for(0, z.channels, grain, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) {
      const Scalar offset = before ? before[c] : 0;
      Scalar scale = 1, shift = norm.beta ? norm.beta[c] : 0;
      if (norm.mode == running) {
        scale = 1 / std::sqrt(norm.running_variance[c] + epsilon);
        if (norm.gamma) scale *= norm.gamma[c];
        shift -= norm.running_mean[c] * scale;
      }
      for (int64_t h = 0; h < z.height; h++) {
        const Scalar *from = y.row(c, h), *other = residual.data ? residual.row(c, h) : nullptr;
        Scalar* to = z.row(c, h);
        for (int64_t w = 0; w < z.columns; w++) {
          const Scalar v = std::max(from[w] + offset, least_first) * scale + shift;
          to[w] = std::max(other ? v + other[w] : v, least);
        }
      }
    }
  });
}
EXPORTED(plane_affine)

void plane_max_pool(Plane x, int64_t kernel, int64_t stride, int64_t padding, Plane y) {
  each_channel(y, [&](int64_t c) {
    for (int64_t oh = 0; oh < y.height; oh++)
      for (int64_t ow = 0; ow < y.columns; ow++) {
        const int64_t top = oh * stride - padding, left = ow * stride - padding;
        Scalar best = -INFINITY;
        for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + kernel, x.height); h++)
          for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + kernel, x.columns); w++)
            best = larger(best, x.row(c, h)[w]);
        y.row(c, oh)[ow] = best;
      }
  });
}
EXPORTED(plane_max_pool)

void plane_mean(Plane x, Plane y) {
  each_channel(x, [&](int64_t c) {
    Scalar sum = 0;
    for (int64_t h = 0; h < x.height; h++) {
      Scalar line = 0;
      for (int64_t w = 0; w < x.columns; w++) line += x.row(c, h)[w];
      sum += line;
    }
    *y.row(c, 0) = sum / (x.height * x.columns);
  });
}
EXPORTED(plane_mean)

// A linear layer of one image: y[row] = sum of value * x[offset]; first: [rows + 1].
void dot(const Scalar* x, const Scalar* value, const int32_t* first, const int32_t* offset,
         int64_t rows, Scalar* y) {
  at::parallel_for(0, rows, 64, [&](int64_t row0, int64_t row1) {
    for (int64_t row = row0; row < row1; row++) {
      Scalar sum[4] = {0, 0, 0, 0};
      int32_t e = first[row];
      for (; e + 4 <= first[row + 1]; e += 4)
        for (int64_t i = 0; i < 4; i++) sum[i] += value[e + i] * x[offset[e + i]];
      for (; e < first[row + 1]; e++) sum[0] += value[e] * x[offset[e]];
      y[row] = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    }
  });
}
EXPORTED(dot)

}  // extern "C"
