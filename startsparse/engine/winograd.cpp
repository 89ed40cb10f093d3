// Convolutions of 3x3 weights, most of them not zero, with a quarter of the multiplications
// (Lavin and Gray, 2016: Fast algorithms for convolutional neural networks, F(4x4, 3x3)).
//
// The output is cut into tiles of 4x4 pixels; each needs 6x6 (tile + kernel - 1) pixels of the
// input. Six numbers in a line, seen as a polynomial, are known by its values at six points, and so
// is the product of two polynomials by the products of their values. So tiles and weights are
// transformed to their values at 6x6 points; there the convolution is a matrix product for each
// point; and the result is transformed back (winograd.h).
//
// All happens on vectors of images, or of weights, without a look at single numbers. A *position*
// is a tile of a block of 16 images.

#include "winograd.h"

#include <array>

#include "exported.h"

namespace {

using namespace winograd;

constexpr int64_t four = rows_at_once;                         // rows, and channels
constexpr int64_t tile = std::max<int64_t>(1, 4 / registers);  // positions at a time
constexpr int64_t cached = 144;  // channels of a tile of positions that stay in the cache

// Positions at a time: as many as keep the transformed maps in the cache, but a least number, since
// each time all transformed weights are read, or their sums added up.
struct Budget {
  int64_t numbers, least;
};
constexpr Budget for_maps{1 << 19, 4}, for_weights{1 << 20, 16};

inline int64_t ceil_four(int64_t n) { return (n + four - 1) / four * four; }

// Weights, or their gradient: [from * from, size] -> [to * to, size], size a multiple of 16.
template <typename T>
void transform_weights(const Scalar* x, Scalar* y, int64_t size) {
  at::parallel_for(0, size / lanes, 64, [&](int64_t begin, int64_t end) {
    for (int64_t k = begin * lanes; k < end * lanes; k += width)
      square<T>(
          [&](int64_t i, int64_t j) { return Vec::loadu(x + (i * T::from + j) * size + k); },
          [&](int64_t i, int64_t j, const Vec& v) { v.store(y + (i * T::to + j) * size + k); });
  });
}

// The positions of a map, from `begin` on so many, of which some may be after the last.
struct Tiles {
  int64_t blocks, down, right, begin, count;

  Tiles(const Map& output, int64_t channels, const Budget& budget)
      : blocks(output.blocks),
        down((output.height + output_tile - 1) / output_tile),
        right((output.columns + output_tile - 1) / output_tile),
        begin(0) {
    const int64_t most = ceil_four(budget.numbers / (points * lanes * channels));
    count = std::min(ceil_four(all()), std::max(budget.least, most));
  }

  int64_t all() const { return blocks * down * right; }

  bool has(int64_t q) const { return begin + q < all(); }

  // Block, first line and first column of the q-th of them.
  std::array<int64_t, 3> corner(int64_t q) const {
    const int64_t i = begin + q;
    return {i / (down * right), i / right % down * output_tile, i % right * output_tile};
  }
};

// A transformed map: [points, channels, count, 16], the points a little apart, lest their numbers
// fall on the same lines of the cache.
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
      const auto [n, h0, w0] = tiles.corner(q);
      const int64_t h = h0 - up, w = w0 - left;
      for (int64_t i = 0; i < T::from && c + 1 < map.channels; i++)
        prefetch<false>(map.at(n, c + 1, h + i, w), output_tile * lanes);
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
          y.store(to.at(i * input_tile + j, c, q) + r);
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
      const auto [n, h, w] = tiles.corner(q);
      const int64_t height = map.height - h, columns = map.columns - w;
      for (int64_t i = 0; i < output_tile && c + 1 < map.channels; i++)
        prefetch<true>(map.at(n, c + 1, h + i, w), output_tile * lanes);
      for (int64_t r = 0; r < lanes; r += width) {
        Scalar* to = map.at(n, c, h, w) + r;
        const auto at = [&](int64_t i, int64_t j) {
          return Vec::loadu(from.at(i * input_tile + j, c, q) + r);
        };
        square<Output>(at, [&](int64_t i, int64_t j, const Vec& y) {
          if (i >= height || j >= columns) return;
          Scalar* pixel = to + i * line + j * lanes;
          (add ? y + Vec::loadu(pixel) : y).store(pixel);
        });
      }
    }
  });
}

// out[row][q] = sum over channels: weight[channel][row] * in[channel][q], of four rows and a few
// positions; in and out: a point of transformed maps, weight: [channels, 4].
[[gnu::noinline]] void product(const Scalar* in, int64_t in_stride, const Scalar* weight,
                               int64_t channels, Scalar* out, int64_t out_stride, bool fresh) {
  Vec sum[four][tile * registers];
  for (int64_t row = 0; row < four; row++)
    for (int64_t q = 0; q < tile * registers; q++)
      sum[row][q] = fresh ? Vec(Scalar(0)) : Vec::loadu(out + row * out_stride + q * width);
  for (int64_t c = 0; c < channels; c++) {
    Vec x[tile * registers];
    for (int64_t q = 0; q < tile * registers; q++)
      x[q] = Vec::loadu(in + c * in_stride + q * width);
    for (int64_t row = 0; row < four; row++) {
      const Vec w(weight[c * four + row]);
      for (int64_t q = 0; q < tile * registers; q++)
        sum[row][q] = at::vec::fmadd(w, x[q], sum[row][q]);
    }
  }
  for (int64_t row = 0; row < four; row++)
    for (int64_t q = 0; q < tile * registers; q++)
      sum[row][q].store(out + row * out_stride + q * width);
}

// gradient[channel][row] += sum over `size` numbers: in[channel] * d_out[row], of four of each.
[[gnu::noinline]] void dots(const Scalar* in, int64_t in_stride, const Scalar* d_out,
                            int64_t out_stride, int64_t size, Scalar* gradient) {
  Vec sum[four * four];
  std::fill(sum, sum + four * four, Vec(Scalar(0)));
  for (int64_t i = 0; i < size; i += width) {
    Vec d[four];
    for (int64_t row = 0; row < four; row++) d[row] = Vec::loadu(d_out + row * out_stride + i);
    for (int64_t c = 0; c < four; c++) {
      const Vec x = Vec::loadu(in + c * in_stride + i);
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
  Transformed input, output;

  Work(const Map& in, const Map& out, Scalar* scratch, const Budget& budget)
      : channels(ceil_four(in.channels)),
        rows(ceil_four(out.channels)),
        size(channels * rows),
        tiles(out, channels + rows, budget),
        weight(scratch),
        input{scratch + points * size, channels, tiles.count},
        output{input.data + input.size(), rows, tiles.count} {}

  int64_t numbers() const { return points * size + input.size() + output.size(); }

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
EXPORTED(winograd_scratch_size)

// The convolution of `in`, which is written to `out` or added to what is there. up, left: padding;
// weight: [9, rows / 4, channels, 4], zero for rows and channels that are not there.
void winograd_gather(Map in, Map out, const Scalar* weight, int64_t up, int64_t left,
                     Scalar* scratch, bool add) {
  Work work(in, out, scratch, for_maps);
  Tiles& tiles = work.tiles;
  transform_weights<Weight>(weight, work.weight, work.size);
  for (; tiles.begin < tiles.all(); tiles.begin += tiles.count) {
    transform<Input>(in, tiles, up, left, work.input);
    work.each([&](int64_t p, int64_t rows) {
      const Scalar* w = work.weight + p * work.size + rows * work.channels * four;
      for (int64_t c = 0; c < work.channels; c += cached)
        for (int64_t q = 0; q < tiles.count; q += tile)
          product(work.input.at(p, c, q), work.input.channel(), w + c * four,
                  std::min(cached, work.channels - c), work.output.at(p, rows * four, q),
                  work.output.channel(), c == 0);
    });
    transform_back(work.output, tiles, out, add);
  }
}
EXPORTED(winograd_gather)

// The gradient of the weight of `winograd_gather`, laid out as it is.
void winograd_weight_gradient(Map in, Map d_out, Scalar* gradient, int64_t up, int64_t left,
                              Scalar* scratch) {
  Work work(in, d_out, scratch, for_weights);
  Tiles& tiles = work.tiles;
  std::fill(work.weight, work.weight + points * work.size, Scalar(0));
  for (; tiles.begin < tiles.all(); tiles.begin += tiles.count) {
    transform<Input>(in, tiles, up, left, work.input);
    transform<OutputTransposed>(d_out, tiles, 0, 0, work.output);
    work.each([&](int64_t p, int64_t rows) {
      const Scalar* d = work.output.at(p, rows * four, 0);
      Scalar* sums = work.weight + p * work.size + rows * work.channels * four;
      for (int64_t c = 0; c < work.channels; c += four)
        dots(work.input.at(p, c, 0), work.input.channel(), d, work.output.channel(),
             tiles.count * lanes, sums + c * four);
    });
  }
  transform_weights<WeightTransposed>(work.weight, gradient, work.size);
}
EXPORTED(winograd_weight_gradient)

}  // extern "C"
