// What Python passes to the kernels: the structures of kernels.py, field by field.
#pragma once

#include <algorithm>
#include <cstdint>

using Scalar = SCALAR;         // float or double; a library is built for each
constexpr int64_t lanes = 16;  // images of a block

// What Python reads by `constant`, beside the sizes of the structures.
constexpr int64_t sums = 8;          // vectors that a kernel sums in registers: more only wait
constexpr int64_t rows_at_once = 4;  // of a layer of which all weights are computed
constexpr int64_t no_tap = INT64_MIN;

// The pixels of one channel.
struct Channel {
  Scalar* start;        // nullptr if there is no map
  int64_t block, line;  // numbers from one block of images, or line of pixels, to the next
  Scalar* row(int64_t n, int64_t h) const { return start ? start + n * block + h * line : nullptr; }
};

// Activations: Scalar [C, N, H + 2 border, W + 2 border, 16]; see products.h. The border is zero.
struct Map {
  Scalar* data;
  int64_t blocks, channels, height, columns, border;

  // Pixel (h, w) of channel c in block n; the border is at -1, -2, ... and beyond height, columns.
  Scalar* at(int64_t n, int64_t c, int64_t h, int64_t w) const {
    const int64_t rows = height + 2 * border, line = columns + 2 * border;
    return data + (((c * blocks + n) * rows + h + border) * line + w + border) * lanes;
  }

  // Whether it comes from memory: it would fill a second-level cache.
  bool large() const { return channels * blocks * plane() * sizeof(Scalar) > large_size; }
  static constexpr uint64_t large_size = 1 << 20;  // bytes

  // Numbers from one line of pixels to the next.
  int64_t line() const { return (columns + 2 * border) * lanes; }

  // Numbers from one block of a channel to the next; after the last comes the next channel.
  int64_t plane() const { return (height + 2 * border) * line(); }

  Channel channel(int64_t c) const { return {data ? at(0, c, 0, 0) : nullptr, plane(), line()}; }

  void zero_border(int64_t n, int64_t c) const {
    if (border == 0) return;
    std::fill(at(n, c, -border, -border), at(n, c, 0, 0), Scalar(0));
    for (int64_t h = 0; h + 1 < height; h++)
      std::fill(at(n, c, h, columns), at(n, c, h + 1, 0), Scalar(0));
    Scalar* last = at(n, c, height - 1, columns);
    std::fill(last, last + (border + border * (columns + 2 * border)) * lanes, Scalar(0));
  }
};

// The entries of a product, sorted by (block of input channels, row).
struct Entries {
  const int32_t* first;   // [blocks * rows + 1], of each (block, row)
  const int32_t* offset;  // [entries], in numbers
  int64_t blocks, rows;
};

// Where a product reads and writes.
struct Positions {
  const int64_t* in;   // [count], in numbers
  const int64_t* out;  // [count], in numbers; row 0
  int64_t count, group, row_stride;
  int64_t channels, channel_stride, reach;  // of the input; from a position to its last tap
};

// BatchNorm of a channel: z = (y - mean) * inverse * gamma + beta. The mode tells where mean and
// inverse, one over the standard deviation, come from.
enum Mode : int64_t { plain, running, batch };  // 0 and 1; running statistics; this batch's

struct Norm {
  const Scalar *gamma, *beta;               // [channels]; nullptr: 1, and 0
  Scalar *running_mean, *running_variance;  // [channels]; in mode batch nullptr: not updated
  double momentum, epsilon;
  Mode mode;
  Scalar *mean, *inverse;  // [channels], written by `affine` and read by `affine_backward`

  Scalar scale(int64_t c) const { return gamma ? gamma[c] * inverse[c] : inverse[c]; }
  Scalar shift(int64_t c) const { return (beta ? beta[c] : 0) - mean[c] * scale(c); }
};

// A map of one image; see planes.cpp.
struct Plane {
  Scalar* data;  // pixel (0, 0) of channel 0
  int64_t channels, height, columns;
  int64_t channel, line;  // numbers from one channel, or line, to the next

  Scalar* row(int64_t c, int64_t h) const { return data + c * channel + h * line; }
};
