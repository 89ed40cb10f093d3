// Convolutions of 3x3 weights, most of them not zero, with a quarter of the multiplications
// (Lavin and Gray, 2016: Fast algorithms for convolutional neural networks, F(4x4, 3x3)).
//
// The map that is made is cut into tiles of 4x4 pixels; each needs 6x6 pixels of the map given. Six
// numbers in a line, seen as a polynomial, are known by its values at six points, and so is the
// product of two polynomials by the products of their values. So tiles and weights are transformed
// to their values at 6x6 points; there the convolution is a matrix product for each point; and the
// result is transformed back. The points are 0, +-sqrt(1/2), +-sqrt(2) and infinity, at which
// rounding errors stay small (Barabasz et al., 2020: Error analysis and improving the accuracy of
// Winograd convolution for deep neural networks).
//
// All happens on vectors of images, or of weights, without a look at single numbers. A *position*
// is a tile of a block of 16 images.

#include "maps.h"

#include <array>
#include <cmath>

namespace {

constexpr int64_t six = 6, points = six * six;
constexpr int64_t four = 4;  // pixels of a tile, and rows, or channels, that are done at once
constexpr int64_t tile = std::max<int64_t>(1, 4 / registers);  // positions, likewise
constexpr int64_t cached = 144;  // channels of a tile of positions that stay in the cache

// Positions at a time: as many as keep the transformed maps in the cache, but a least number, since
// each time all transformed weights are read, or their sums added up.
struct Share {
  int64_t numbers, least;
};
constexpr Share for_maps{1 << 19, 4}, for_weights{1 << 20, 16};

constexpr Scalar a2 = 0.5, b2 = 2;  // squares of the points; a * b = 1
const Scalar a = std::sqrt(a2), b = std::sqrt(b2);

inline int64_t ceil_four(int64_t n) { return (n + four - 1) / four * four; }

inline Vec fma(Scalar factor, const Vec& x, const Vec& y) {
  return at::vec::fmadd(Vec(factor), x, y);
}

// Transforms of one line: x(i) is its number i, put(i, y) takes number i of the result.

struct Given {  // 6 pixels -> 6 points
  static constexpr int64_t from = 6, to = 6;
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

struct Made {  // 6 points -> 4 pixels
  static constexpr int64_t from = 6, to = 4;
  static void line(auto x, auto put) {
    const Vec even_a = x(1) + x(2), odd_a = x(1) - x(2);
    const Vec even_b = x(3) + x(4), odd_b = x(3) - x(4);
    put(0, x(0) + even_a + even_b);
    put(1, fma(a, odd_a, Vec(b) * odd_b));
    put(2, fma(a2, even_a, Vec(b2) * even_b));
    put(3, fma(a * a2, odd_a, fma(b * b2, odd_b, x(5))));
  }
};

struct MadeTransposed {  // 4 pixels -> 6 points
  static constexpr int64_t from = 4, to = 6;
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
  static constexpr int64_t from = 3, to = 6;
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
  static constexpr int64_t from = 6, to = 3;
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

// Weights, or their gradient: [from * from, size] -> [to * to, size], size a multiple of 16.
template <typename T>
void transform_weights(const Scalar* x, Scalar* y, int64_t size) {
  at::parallel_for(0, size / lanes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * lanes; k < end * lanes; k += width)
      square<T>([&](int64_t i, int64_t j) { return Vec::loadu(x + (i * T::from + j) * size + k); },
                [&](int64_t i, int64_t j, const Vec& v) {
                  v.store(y + (i * T::to + j) * size + k);
                });
  });
}

// The positions of a map, from `begin` on so many, of which some may be after the last.
struct Tiles {
  int64_t blocks, down, right, begin, count;

  Tiles(const Map& made, int64_t channels, const Share& share)
      : blocks(made.blocks),
        down((made.height + four - 1) / four),
        right((made.columns + four - 1) / four),
        begin(0) {
    const int64_t most = ceil_four(share.numbers / (points * lanes * channels));
    count = std::min(ceil_four(all()), std::max(share.least, most));
  }

  int64_t all() const { return blocks * down * right; }

  bool has(int64_t q) const { return begin + q < all(); }

  // Block, first line and first column of the q-th of them.
  std::array<int64_t, 3> place(int64_t q) const {
    const int64_t i = begin + q;
    return {i / (down * right), i / right % down * four, i % right * four};
  }
};

// A transformed map: [points, channels, count, 16], the points a little apart, lest their numbers
// fall on the same places of the cache.
struct Transformed {
  Scalar* data;
  int64_t channels, count;
  int64_t channel() const { return count * lanes; }
  int64_t point() const { return (channels * count + 1) * lanes; }
  int64_t size() const { return points * point(); }
  Scalar* at(int64_t p, int64_t c, int64_t q) const {
    return data + p * point() + c * channel() + q * lanes;
  }
};

// The tiles of a map, each from a few pixels `up` and to the `left` of it on. Channels, positions
// and pixels that are not there are zero.
template <typename T>
void transform(const Map& map, const Tiles& tiles, int64_t up, int64_t left,
               const Transformed& to) {
  const int64_t line = map.line(), border = map.border;
  at::parallel_for(0, to.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * to.count; i < end * to.count; i++) {
      const int64_t c = i / to.count, q = i % to.count;
      if (c >= map.channels || !tiles.has(q)) {
        for (int64_t p = 0; p < points; p++) {
          Scalar* zero = to.at(p, c, q);
          std::fill(zero, zero + lanes, Scalar(0));
        }
        continue;
      }
      const auto [n, h0, w0] = tiles.place(q);
      const int64_t h = h0 - up, w = w0 - left;
      for (int64_t i = 0; i < T::from && c + 1 < map.channels; i++)
        fetch<false>(map.at(n, c + 1, h + i, w), four * lanes);
      const bool inside = std::min(h, w) >= -border && h + T::from <= map.height + border &&
                          w + T::from <= map.columns + border;
      for (int64_t r = 0; r < lanes; r += width) {
        const Scalar* from = map.at(n, c, h, w) + r;
        const auto stored = [&](int64_t i, int64_t j) {
          return Vec::loadu(from + i * line + j * lanes);
        };
        const auto if_stored = [&](int64_t i, int64_t j) {
          const bool there = h + i >= 0 && h + i < map.height && w + j >= 0 && w + j < map.columns;
          return there ? stored(i, j) : Vec(Scalar(0));
        };
        const auto put = [&](int64_t i, int64_t j, const Vec& y) {
          y.store(to.at(i * six + j, c, q) + r);
        };
        if (inside)
          square<T>(stored, put);
        else
          square<T>(if_stored, put);
      }
    }
  });
}

// Back to pixels, which are written or added to what is there.
void transform_back(const Transformed& from, const Tiles& tiles, const Map& map, bool add) {
  const int64_t line = map.line();
  at::parallel_for(0, map.channels, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin * from.count; i < end * from.count; i++) {
      const int64_t c = i / from.count, q = i % from.count;
      if (!tiles.has(q)) continue;
      const auto [n, h, w] = tiles.place(q);
      const int64_t height = map.height - h, columns = map.columns - w;
      for (int64_t i = 0; i < four && c + 1 < map.channels; i++)
        fetch<true>(map.at(n, c + 1, h + i, w), four * lanes);
      for (int64_t r = 0; r < lanes; r += width) {
        Scalar* to = map.at(n, c, h, w) + r;
        const auto at = [&](int64_t i, int64_t j) {
          return Vec::loadu(from.at(i * six + j, c, q) + r);
        };
        square<Made>(at, [&](int64_t i, int64_t j, const Vec& y) {
          if (i >= height || j >= columns) return;
          Scalar* pixel = to + i * line + j * lanes;
          (add ? y + Vec::loadu(pixel) : y).store(pixel);
        });
      }
    }
  });
}

// made[row][q] = sum over channels: weight[channel][row] * given[channel][q], of four rows and a
// few positions; given and made: a point of transformed maps, weight: [channels, 4].
[[gnu::noinline]] void product(const Scalar* given, int64_t given_stride, const Scalar* weight,
                               int64_t channels, Scalar* made, int64_t made_stride, bool fresh) {
  Vec sum[four][tile * registers];
  for (int64_t row = 0; row < four; row++)
    for (int64_t q = 0; q < tile * registers; q++)
      sum[row][q] = fresh ? Vec(Scalar(0)) : Vec::loadu(made + row * made_stride + q * width);
  for (int64_t c = 0; c < channels; c++) {
    Vec x[tile * registers];
    for (int64_t q = 0; q < tile * registers; q++)
      x[q] = Vec::loadu(given + c * given_stride + q * width);
    for (int64_t row = 0; row < four; row++) {
      const Vec w(weight[c * four + row]);
      for (int64_t q = 0; q < tile * registers; q++)
        sum[row][q] = at::vec::fmadd(w, x[q], sum[row][q]);
    }
  }
  for (int64_t row = 0; row < four; row++)
    for (int64_t q = 0; q < tile * registers; q++)
      sum[row][q].store(made + row * made_stride + q * width);
}

// gradient[channel][row] += sum over `size` numbers: given[channel] * d_made[row], of four of each.
[[gnu::noinline]] void dots(const Scalar* given, int64_t given_stride, const Scalar* d_made,
                            int64_t made_stride, int64_t size, Scalar* gradient) {
  Vec sum[four * four];
  std::fill(sum, sum + four * four, Vec(Scalar(0)));
  for (int64_t i = 0; i < size; i += width) {
    Vec d[four];
    for (int64_t row = 0; row < four; row++) d[row] = Vec::loadu(d_made + row * made_stride + i);
    for (int64_t c = 0; c < four; c++) {
      const Vec x = Vec::loadu(given + c * given_stride + i);
      for (int64_t row = 0; row < four; row++)
        sum[c * four + row] = at::vec::fmadd(x, d[row], sum[c * four + row]);
    }
  }
  for (int64_t i = 0; i < four * four; i += width)
    (Vec::loadu(gradient + i) + totals(sum + i)).store(gradient + i);
}

// What a call works on: transformed weights [points, rows / 4, channels, 4] and maps, in scratch.
struct Work {
  int64_t channels, rows, size;  // channels and rows: the next multiples of four
  Tiles tiles;
  Scalar* weight;
  Transformed given, made;

  Work(const Map& in, const Map& out, Scalar* scratch, const Share& share)
      : channels(ceil_four(in.channels)), rows(ceil_four(out.channels)), size(channels * rows),
        tiles(out, channels + rows, share), weight(scratch),
        given{scratch + points * size, channels, tiles.count},
        made{given.data + given.size(), rows, tiles.count} {}

  int64_t numbers() const { return points * size + given.size() + made.size(); }

  // f(point, four rows) for all, in parallel.
  template <typename F>
  void each(F f) const {
    const int64_t fours = rows / four;
    at::parallel_for(0, points * fours, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; i++) f(i / fours, i % fours);
    });
  }
};

}  // namespace

extern "C" {

// Numbers of scratch that both functions need.
int64_t winograd_scratch_size(Map in, Map out) {
  return std::max(Work(in, out, nullptr, for_maps).numbers(),
                  Work(in, out, nullptr, for_weights).numbers());
}

// The convolution of `in`, which is written to `out` or added to what is there. up, left: padding;
// weight: [9, rows / 4, channels, 4], zero for rows and channels that are not there.
void winograd_gather(Map in, Map out, const Scalar* weight, int64_t up, int64_t left,
                     Scalar* scratch, bool add) {
  Work work(in, out, scratch, for_maps);
  Tiles& tiles = work.tiles;
  transform_weights<Weight>(weight, work.weight, work.size);
  for (; tiles.begin < tiles.all(); tiles.begin += tiles.count) {
    transform<Given>(in, tiles, up, left, work.given);
    work.each([&](int64_t p, int64_t rows) {
      const Scalar* w = work.weight + p * work.size + rows * work.channels * four;
      for (int64_t c = 0; c < work.channels; c += cached)
        for (int64_t q = 0; q < tiles.count; q += tile)
          product(work.given.at(p, c, q), work.given.channel(), w + c * four,
                  std::min(cached, work.channels - c), work.made.at(p, rows * four, q),
                  work.made.channel(), c == 0);
    });
    transform_back(work.made, tiles, out, add);
  }
}

// The gradient of the weight of `winograd_gather`, laid out as it is.
void winograd_weights(Map in, Map d_out, Scalar* gradient, int64_t up, int64_t left,
                      Scalar* scratch) {
  Work work(in, d_out, scratch, for_weights);
  Tiles& tiles = work.tiles;
  std::fill(work.weight, work.weight + points * work.size, Scalar(0));
  for (; tiles.begin < tiles.all(); tiles.begin += tiles.count) {
    transform<Given>(in, tiles, up, left, work.given);
    transform<MadeTransposed>(d_out, tiles, 0, 0, work.made);
    work.each([&](int64_t p, int64_t rows) {
      const Scalar* d = work.made.at(p, rows * four, 0);
      Scalar* sums = work.weight + p * work.size + rows * work.channels * four;
      for (int64_t c = 0; c < work.channels; c += four)
        dots(work.given.at(p, c, 0), work.given.channel(), d, work.made.channel(),
             tiles.count * lanes, sums + c * four);
    });
  }
  transform_weights<WeightTransposed>(work.weight, gradient, work.size);
}

}  // extern "C"
