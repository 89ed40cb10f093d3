// What comes between sparse products: BatchNorm or bias, addition, ReLU in one pass, and pooling.
//
// A channel is done by one thread, and its numbers are summed in one order. In the last block the
// images from `last` on are padding: what is written there is zero, and sums leave it out.

#include "maps.h"

#include <cmath>

namespace {

// f(n, h, mask) for every row of a channel; the mask tells the lanes of block n that hold images,
// by 1 and 0, and is nullptr where all do.
template <typename F>
inline void each_row(const Map& y, const Scalar* mask, F f) {
  for (int64_t n = 0; n < y.blocks; n++)
    for (int64_t h = 0; h < y.height; h++) f(n, h, n + 1 == y.blocks ? mask : nullptr);
}

struct Mask {
  Scalar numbers[lanes];
  bool all;
  explicit Mask(int64_t last) : all(last == lanes) {
    for (int64_t i = 0; i < lanes; i++) numbers[i] = i < last;
  }
  const Scalar* get() const { return all ? nullptr : numbers; }
};

// A sum of many vectors: short stretches in their own precision, those in double.
struct Sum {
  Vec part[registers];
  int64_t pixels = 0;
  double all = 0;
  Sum() { clear(); }
  void clear() {
    for (auto& p : part) p = Vec(Scalar(0));
    pixels = 0;
  }
  void stretch(int64_t more) {  // to be called after so many pixels were added to the parts
    pixels += more;
    if (pixels < 32) return;
    value();
  }
  double value() {
    for (const auto& p : part) all += total(p);
    clear();
    return all;
  }
};

}  // namespace

extern "C" {

// Mean and biased variance of each channel over images and pixels; count is their number.
void moments(Map y, int64_t last, double count, Scalar* mean, Scalar* variance) {
  const Mask mask(last);
  at::parallel_for(0, y.channels, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) {
      Sum sum, squares;
      each_row(y, mask.get(), [&](int64_t n, int64_t h, const Scalar* m) {
        const Scalar* from = y.at(n, c, h, 0);
        for (int64_t w = 0; w < y.columns; w++)
          for (int64_t r = 0; r < registers; r++)  // images that are not there are zero
            sum.part[r] = sum.part[r] + Vec::loadu(from + w * lanes + r * width);
        sum.stretch(y.columns);
      });
      mean[c] = sum.value() / count;
      const Vec centre(mean[c]);
      each_row(y, mask.get(), [&](int64_t n, int64_t h, const Scalar* m) {
        const Scalar* from = y.at(n, c, h, 0);
        for (int64_t w = 0; w < y.columns; w++)
          for (int64_t r = 0; r < registers; r++) {
            Vec d = Vec::loadu(from + w * lanes + r * width) - centre;
            if (m) d = d * Vec::loadu(m + r * width);
            squares.part[r] = at::vec::fmadd(d, d, squares.part[r]);
          }
        squares.stretch(y.columns);
      });
      variance[c] = squares.value() / count;
    }
  });
}

// z = y * scale + shift (+ residual), then ReLU if asked for.
void affine(Map y, const Scalar* scale, const Scalar* shift, Map residual, bool relu, int64_t last,
            Map z) {
  const Mask mask(last);
  at::parallel_for(0, y.channels, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) {
      const Vec a(scale[c]), b(shift[c]), zero(Scalar(0));
      for (int64_t n = 0; n < y.blocks; n++) z.zero_border(n, c);
      each_row(y, mask.get(), [&](int64_t n, int64_t h, const Scalar* m) {
        const Scalar *from = y.at(n, c, h, 0), *other = nullptr;
        Scalar* to = z.at(n, c, h, 0);
        if (residual.data) other = residual.at(n, c, h, 0);
        for (int64_t i = 0; i < y.columns * lanes; i += width) {
          Vec v = at::vec::fmadd(Vec::loadu(from + i), a, b);
          if (other) v = v + Vec::loadu(other + i);
          if (relu) v = at::vec::maximum(v, zero);
          if (m) v = v * Vec::loadu(m + i % lanes);
          v.store(to + i);
        }
      });
    }
  });
}

// Backward of `affine`, with scale = gamma * inverse and shift = beta - mean * scale.
//
// g = d_z where z > 0 (everywhere without ReLU); d_beta = sum g; d_gamma = sum g * normalised y.
// batch: mean and inverse come from this batch (count numbers per channel), so that y moves them:
//   d_y = scale * (g - d_beta / count - normalised y * d_gamma / count); else d_y = scale * g.
// d_residual = g. Without a z, y tells where it is positive; a residual with ReLU needs it.
void affine_backward(Map d_z, Map z, Map y, const Scalar* mean, const Scalar* inverse,
                     const Scalar* scale, const Scalar* shift, bool relu, bool batch, int64_t last,
                     double count, Map d_y, Map d_residual, Scalar* d_gamma, Scalar* d_beta) {
  const Mask mask(last);
  at::parallel_for(0, y.channels, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) {
      const Vec a(scale[c]), b(shift[c]), centre(mean[c]), unit(inverse[c]), zero(Scalar(0));
      const auto gradient = [&](const Scalar* d, const Scalar* from, const Scalar* result) {
        const Vec g = Vec::loadu(d);
        if (!relu) return g;
        const Vec v = result ? Vec::loadu(result) : at::vec::fmadd(Vec::loadu(from), a, b);
        return Vec::blendv(zero, g, v > zero);
      };
      Sum sums, products;
      each_row(y, mask.get(), [&](int64_t n, int64_t h, const Scalar*) {
        const Scalar *d = d_z.at(n, c, h, 0), *from = y.at(n, c, h, 0);
        const Scalar* result = z.data ? z.at(n, c, h, 0) : nullptr;
        for (int64_t w = 0; w < y.columns; w++)
          for (int64_t r = 0; r < registers; r++) {  // d_z is zero for images that are not there
            const int64_t i = w * lanes + r * width;
            const Vec g = gradient(d + i, from + i, result ? result + i : nullptr);
            const Vec normalised = (Vec::loadu(from + i) - centre) * unit;
            sums.part[r] = sums.part[r] + g;
            products.part[r] = at::vec::fmadd(g, normalised, products.part[r]);
          }
        sums.stretch(y.columns);
        products.stretch(y.columns);
      });
      const double sum = sums.value(), product = products.value();
      d_beta[c] = sum;
      d_gamma[c] = product;
      const Vec mean_g(Scalar(batch ? sum / count : 0));
      const Vec slope(Scalar(batch ? product / count : 0));
      for (int64_t n = 0; n < y.blocks; n++) {
        d_y.zero_border(n, c);
        if (d_residual.data) d_residual.zero_border(n, c);
      }
      each_row(y, mask.get(), [&](int64_t n, int64_t h, const Scalar* m) {
        const Scalar *d = d_z.at(n, c, h, 0), *from = y.at(n, c, h, 0), *result = nullptr;
        Scalar *to = d_y.at(n, c, h, 0), *other = nullptr;
        if (z.data) result = z.at(n, c, h, 0);
        if (d_residual.data) other = d_residual.at(n, c, h, 0);
        for (int64_t i = 0; i < y.columns * lanes; i += width) {
          const Vec g = gradient(d + i, from + i, result ? result + i : nullptr);
          if (other) g.store(other + i);
          const Vec normalised = (Vec::loadu(from + i) - centre) * unit;
          Vec v = a * (g - mean_g - normalised * slope);
          if (m) v = v * Vec::loadu(m + i % lanes);
          v.store(to + i);
        }
      });
    }
  });
}

void zero_borders(Map x) {
  at::parallel_for(0, x.blocks * x.channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++)
      x.zero_border(item / x.channels, item % x.channels);
  });
}

// The largest of each window; beyond the edge there is nothing.
void max_pool(Map x, int64_t kernel, int64_t stride, int64_t padding, Map y) {
  at::parallel_for(0, x.blocks * x.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t n = item / x.channels, c = item % x.channels;
      y.zero_border(n, c);
      for (int64_t oh = 0; oh < y.height; oh++)
        for (int64_t ow = 0; ow < y.columns; ow++) {
          const int64_t top = oh * stride - padding, left = ow * stride - padding;
          Vec best[registers];
          for (auto& v : best) v = Vec(-INFINITY);
          for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + kernel, x.height); h++)
            for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + kernel, x.columns);
                 w++)
              for (int64_t r = 0; r < registers; r++)
                best[r] = at::vec::maximum(best[r], Vec::loadu(x.at(n, c, h, w) + r * width));
          for (int64_t r = 0; r < registers; r++) best[r].store(y.at(n, c, oh, ow) + r * width);
        }
    }
  });
}

// The gradient goes to the first of the largest, as in PyTorch.
void max_pool_backward(Map d_y, Map y, Map x, int64_t kernel, int64_t stride, int64_t padding,
                       Map d_x) {
  at::parallel_for(0, x.blocks * x.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; item++) {
      const int64_t n = item / x.channels, c = item % x.channels;
      const int64_t plane = (x.height + 2 * d_x.border) * (x.columns + 2 * d_x.border) * lanes;
      Scalar* start = d_x.at(n, c, -d_x.border, -d_x.border);
      std::fill(start, start + plane, Scalar(0));
      for (int64_t oh = 0; oh < y.height; oh++)
        for (int64_t ow = 0; ow < y.columns; ow++) {
          const int64_t top = oh * stride - padding, left = ow * stride - padding;
          for (int64_t r = 0; r < registers; r++) {
            const Vec best = Vec::loadu(y.at(n, c, oh, ow) + r * width), zero(Scalar(0));
            Vec left_over = Vec::loadu(d_y.at(n, c, oh, ow) + r * width);
            for (int64_t h = std::max<int64_t>(top, 0); h < std::min(top + kernel, x.height); h++)
              for (int64_t w = std::max<int64_t>(left, 0); w < std::min(left + kernel, x.columns);
                   w++) {
                const Vec here = Vec::loadu(x.at(n, c, h, w) + r * width) == best;
                Scalar* to = d_x.at(n, c, h, w) + r * width;
                (Vec::loadu(to) + Vec::blendv(zero, left_over, here)).store(to);
                left_over = Vec::blendv(left_over, zero, here);
              }
          }
        }
    }
  });
}

}  // extern "C"
