// The transforms of Winograd's algorithm, on vectors of images or of weights.
//
// The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, at which rounding errors stay small
// (Barabasz et al., 2020: Error analysis and improving the accuracy of Winograd convolution for
// deep neural networks).
#pragma once

#include <cmath>

#include "vectors.h"

namespace winograd {

constexpr int64_t output_tile = 4, kernel = 3, input_tile = output_tile + kernel - 1;  // pixels
constexpr int64_t points = input_tile * input_tile;

constexpr Scalar a2 = 0.5, b2 = 2;  // squares of the points; a * b = 1
const Scalar a = std::sqrt(a2), b = std::sqrt(b2);

inline Vec fma(Scalar factor, const Vec& x, const Vec& y) {
  return at::vec::fmadd(Vec(factor), x, y);
}

// Transforms of one line: x(i) is its number i, put(i, y) takes number i of the result.

struct Input {  // 6 pixels -> 6 points
  static constexpr int64_t from = input_tile, to = input_tile;
  static void line(auto x, auto put) {
    const Vec even_a = fma(-b2, x(2), x(4)), odd_a = fma(-b2, x(1), x(3));
    const Vec even_b = fma(-a2, x(2), x(4)), odd_b = fma(-a2, x(1), x(3));
    put(0, fma(-(a2 + b2), x(2), x(0) + x(4)));
    put(1, fma(a, odd_a, even_a));
    put(2, fma(-a, odd_a, even_a));
    put(3, fma(b, odd_b, even_b));
    put(4, fma(-b, odd_b, even_b));
    put(5, fma(-(a2 + b2), x(3), x(1) + x(5)));
  }
};

struct Output {  // 6 points -> 4 pixels
  static constexpr int64_t from = input_tile, to = output_tile;
  static void line(auto x, auto put) {
    const Vec even_a = x(1) + x(2), odd_a = x(1) - x(2);
    const Vec even_b = x(3) + x(4), odd_b = x(3) - x(4);
    put(0, x(0) + even_a + even_b);
    put(1, fma(a, odd_a, Vec(b) * odd_b));
    put(2, fma(a2, even_a, Vec(b2) * even_b));
    put(3, fma(a * a2, odd_a, fma(b * b2, odd_b, x(5))));
  }
};

struct OutputTransposed {  // 4 pixels -> 6 points
  static constexpr int64_t from = output_tile, to = input_tile;
  static void line(auto x, auto put) {
    const Vec even_a = fma(a2, x(2), x(0)), odd_a = fma(a2, x(3), x(1));
    const Vec even_b = fma(b2, x(2), x(0)), odd_b = fma(b2, x(3), x(1));
    put(0, x(0));
    put(1, fma(a, odd_a, even_a));
    put(2, fma(-a, odd_a, even_a));
    put(3, fma(b, odd_b, even_b));
    put(4, fma(-b, odd_b, even_b));
    put(5, x(3));
  }
};

// Of each point: one over the product of its distances from the others.
constexpr Scalar at_a = 1 / (2 * a2 * (a2 - b2)), at_b = 1 / (2 * b2 * (b2 - a2));

struct Weight {  // 3 taps -> 6 points
  static constexpr int64_t from = kernel, to = input_tile;
  static void line(auto x, auto put) {
    const Vec even_a = Vec(at_a) * fma(a2, x(2), x(0)), odd_a = Vec(at_a * a) * x(1);
    const Vec even_b = Vec(at_b) * fma(b2, x(2), x(0)), odd_b = Vec(at_b * b) * x(1);
    put(0, x(0));
    put(1, even_a + odd_a);
    put(2, even_a - odd_a);
    put(3, even_b + odd_b);
    put(4, even_b - odd_b);
    put(5, x(2));
  }
};

struct WeightTransposed {  // 6 points -> 3 taps
  static constexpr int64_t from = input_tile, to = kernel;
  static void line(auto x, auto put) {
    const Vec even_a = Vec(at_a) * (x(1) + x(2)), even_b = Vec(at_b) * (x(3) + x(4));
    put(0, x(0) + even_a + even_b);
    put(1, fma(at_a * a, x(1) - x(2), Vec(at_b * b) * (x(3) - x(4))));
    put(2, fma(a2, even_a, fma(b2, even_b, x(5))));
  }
};

// Both directions of a square: x(i, j) -> put(i, j, y).
template <typename T>
inline void square(auto x, auto put) {
  Vec half[T::to][T::from];
  for (int64_t k = 0; k < T::from; k++)
    T::line([&](int64_t i) { return x(i, k); }, [&](int64_t i, const Vec& y) { half[i][k] = y; });
  for (int64_t k = 0; k < T::to; k++)
    T::line([&](int64_t j) { return half[k][j]; }, [&](int64_t j, const Vec& y) { put(k, j, y); });
}

}  // namespace winograd
