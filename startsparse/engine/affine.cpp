// What comes between sparse products: BatchNorm or bias, addition, ReLU in one pass.
//
// A channel is done by one thread, and its numbers are summed in one order. In the last block the
// images from `last` on are padding: what is written there is zero, and sums leave it out. As in
// products.cpp, what loops over pixels stands alone, so that g++ keeps its numbers in registers.

#include <cmath>
#include <initializer_list>
#include <utility>

#include "exported.h"
#include "vectors.h"

namespace {

struct Pixels {
  int64_t blocks, height, columns, last;
  Scalar present[lanes];  // of the last block: 1 for images that are there, 0 for others
  Pixels(const Map& y, int64_t last, int64_t widest_border)
      : blocks(y.blocks), height(y.height), columns(y.columns), last(last) {
    if (height * columns == 1 && widest_border == 0 && last == lanes)  // one line is faster
      columns = std::exchange(blocks, 1);
    for (int64_t i = 0; i < lanes; i++) present[i] = i < last;
  }
  Vec present_at(int64_t i) const { return Vec::loadu(present + i % lanes); }
  // Sets a line of the last block to zero where there is no image.
  void clear(Scalar* line) const {
    for (int64_t w = 0; w < columns; w++, line += lanes)
      std::fill(line + last, line + lanes, Scalar(0));
  }
  double count() const { return double(((blocks - 1) * lanes + last) * height * columns); }
  bool partial(int64_t n) const { return n + 1 == blocks && last < lanes; }
};

// Maps of which a channel is prefetched, line by line, while another is computed: of maps that are
// written the same channel, of maps that are read the next one.
template <bool written>
class Prefetched {
 public:
  explicit Prefetched(std::initializer_list<Map> all) {
    for (const Map& map : all)
      if (map.data && map.large()) maps[count++] = map;  // others are in the cache
  }

  [[gnu::always_inline]] void prefetch_line(int64_t c, int64_t n, int64_t h) const {
    for (int64_t i = 0; i < count; i++) {
      const Map& map = maps[i];
      if (written)
        prefetch<true>(map.at(n, c, h, 0), map.line());
      else if (c + 1 < map.channels)
        prefetch<false>(map.at(n, c + 1, h, 0), map.line());
    }
  }

 private:
  Map maps[3];
  int64_t count = 0;
};

// A sum of many vectors: short stretches in their own precision, those in double.
struct Sum {
  Vec part[registers][2];
  double all = 0;
  Sum() { clear(); }
  void clear() {
    for (auto& pair : part) pair[0] = pair[1] = Vec(Scalar(0));
  }
  void close() {
    Vec sum(Scalar(0));
    for (const auto& pair : part) sum = sum + (pair[0] + pair[1]);
    all += total(sum);
    clear();
  }
};

// f(n, h, w, r, which part of a sum) for every vector of a channel, and end() after short stretches
// of pixels.
template <typename F, typename End>
inline void each_vector(const Pixels& p, F row, End end) {
  int64_t pixels = 0;
  for (int64_t n = 0; n < p.blocks; n++)
    for (int64_t h = 0; h < p.height; h++) {
      const auto f = row(n, h);
      int64_t w = 0;
      for (; w + 1 < p.columns; w += 2)
        for (int64_t r = 0; r < registers; r++) {
          f(w * lanes + r * width, r, 0);
          f((w + 1) * lanes + r * width, r, 1);
        }
      if (w < p.columns)
        for (int64_t r = 0; r < registers; r++) f(w * lanes + r * width, r, 0);
      pixels += p.columns;
      if (pixels >= 32) {
        end();
        pixels = 0;
      }
    }
  end();
}

[[gnu::noinline]] double sum_of(const Channel& y, const Pixels& p) {
  Sum sum;
  each_vector(
      p,
      [&](int64_t n, int64_t h) {
        return [&sum, from = y.row(n, h)](int64_t i, int64_t r, int64_t part) {
          sum.part[r][part] = sum.part[r][part] + Vec::loadu(from + i);
        };
      },
      [&] { sum.close(); });
  return sum.all;  // images that are not there are zero
}

[[gnu::noinline]] double squares_about(Scalar mean, const Channel& y, const Pixels& p,
                                       const Prefetched<true>& output, int64_t c) {
  const Vec centre(mean);
  Sum sum;
  each_vector(
      p,
      [&](int64_t n, int64_t h) {
        output.prefetch_line(c, n, h);
        return [&, from = y.row(n, h), partial = p.partial(n)](int64_t i, int64_t r, int64_t part) {
          Vec d = Vec::loadu(from + i) - centre;
          if (partial) d = d * p.present_at(i);
          sum.part[r][part] = at::vec::fmadd(d, d, sum.part[r][part]);
        };
      },
      [&] { sum.close(); });
  return sum.all;
}

template <bool with_residual, bool relu>
[[gnu::noinline]] void affine_channel(const Channel& y, Scalar scale, Scalar shift,
                                      const Channel& residual, const Channel& z, const Pixels& p,
                                      const Prefetched<false>& input, int64_t c) {
  const Vec a(scale), b(shift), zero(Scalar(0));
  for (int64_t n = 0; n < p.blocks; n++)
    for (int64_t h = 0; h < p.height; h++) {
      const Scalar *from = y.row(n, h), *other = residual.row(n, h);
      Scalar* to = z.row(n, h);
      input.prefetch_line(c, n, h);
      for (int64_t i = 0; i < p.columns * lanes; i += width) {
        Vec v = at::vec::fmadd(Vec::loadu(from + i), a, b);
        if (with_residual) v = v + Vec::loadu(other + i);
        if (relu) v = at::vec::maximum(v, zero);
        v.store(to + i);
      }
      if (p.partial(n)) p.clear(to);  // not by a product: of NaN and infinity it is not zero
    }
}

// Where the gradient goes through: everywhere, or not where y * scale + shift <= 0, or z <= 0. So
// it goes through NaN, as PyTorch's.
enum class Gate { open, by_y, by_z };

template <Gate gate>
struct Gradient {
  Vec a, b, zero;
  Gradient(Scalar scale, Scalar shift) : a(scale), b(shift), zero(Scalar(0)) {}
  Vec operator()(const Vec& d, const Vec& y, const Scalar* z) const {
    if (gate == Gate::open) return d;
    const Vec v = gate == Gate::by_z ? Vec::loadu(z) : at::vec::fmadd(y, a, b);
    return Vec::blendv(d, zero, v <= zero);
  }
};

// Sums of g, and of g * (y - mean).
template <Gate gate>
[[gnu::noinline]] std::pair<double, double> gradient_sums(
    const Channel& d_z, const Channel& z, const Channel& y, Scalar mean, Scalar scale, Scalar shift,
    const Pixels& p, const Prefetched<true>& output, int64_t c) {
  const Gradient<gate> gradient(scale, shift);
  const Vec centre(mean);
  Sum sums, products;
  each_vector(
      p,
      [&](int64_t n, int64_t h) {
        output.prefetch_line(c, n, h);
        return [&, d = d_z.row(n, h), result = z.row(n, h), from = y.row(n, h)](
                   int64_t i, int64_t r, int64_t part) {
          const Vec v = Vec::loadu(from + i);  // d_z is zero for images that are not there
          const Vec g = gradient(Vec::loadu(d + i), v, result + i);
          sums.part[r][part] = sums.part[r][part] + g;
          products.part[r][part] = at::vec::fmadd(g, v - centre, products.part[r][part]);
        };
      },
      [&] { sums.close(), products.close(); });
  return {sums.all, products.all};
}

// d_y = scale * g, with `moved` + (y - mean) * slope + constant, and d_residual = g. May be done in
// place.
template <Gate gate, bool moved>
[[gnu::noinline]] void gradient_channel(const Channel& d_z, const Channel& z, const Channel& y,
                                        Scalar mean, Scalar scale, Scalar shift, Scalar slope,
                                        Scalar constant, const Channel& d_y,
                                        const Channel& d_residual, const Pixels& p,
                                        const Prefetched<false>& input, int64_t c) {
  const Gradient<gate> gradient(scale, shift);
  const Vec a(scale), centre(mean), k(slope), b(constant);
  for (int64_t n = 0; n < p.blocks; n++)
    for (int64_t h = 0; h < p.height; h++) {
      const Scalar *d = d_z.row(n, h), *result = z.row(n, h), *from = y.row(n, h);
      Scalar *to = d_y.row(n, h), *other = d_residual.row(n, h);
      input.prefetch_line(c, n, h);
      for (int64_t i = 0; i < p.columns * lanes; i += width) {
        const Vec v = Vec::loadu(from + i), g = gradient(Vec::loadu(d + i), v, result + i);
        Vec sum = moved ? at::vec::fmadd(a, g, at::vec::fmadd(v - centre, k, b)) : a * g;
        if (other) g.store(other + i);
        sum.store(to + i);
      }
      if (p.partial(n)) p.clear(to);
    }
}

template <typename F>
inline void each_channel(const Map& y, F f) {
  at::parallel_for(0, y.channels, 1, [&](int64_t c0, int64_t c1) {
    for (int64_t c = c0; c < c1; c++) f(c);
  });
}

inline void zero_borders(const Map& x, int64_t c) {
  for (int64_t n = 0; n < x.blocks && x.data; n++) x.zero_border(n, c);
}

}  // namespace

extern "C" {

// z = norm(y) (+ residual), then ReLU if `relu`. With `first`, y = ReLU(y + before) comes before
// all that, in place; before: [channels], or nullptr for 0.
void affine(Map y, bool first, const Scalar* before, Norm norm, Map residual, bool relu,
            int64_t last, Map z) {
  const Pixels p(y, last, std::max({y.border, residual.border, z.border}));
  const Prefetched<true> output({z});
  const Prefetched<false> input({y, residual}), none({});
  const double count = p.count(), unbiased = count / (count - 1);
  const auto apply = residual.data ? relu ? affine_channel<true, true> : affine_channel<true, false>
                     : relu        ? affine_channel<false, true>
                                   : affine_channel<false, false>;
  each_channel(y, [&](int64_t c) {
    const Channel from = y.channel(c);
    if (first) affine_channel<false, true>(from, 1, before ? before[c] : 0, {}, from, p, none, c);
    norm.mean[c] = 0, norm.inverse[c] = 1;
    if (norm.mode != plain) {
      double mean, variance;
      if (norm.mode == batch) {
        mean = sum_of(from, p) / count;
        variance = squares_about(mean, from, p, output, c) / count;
        if (norm.running_mean) {
          Scalar &mean_so_far = norm.running_mean[c], &variance_so_far = norm.running_variance[c];
          mean_so_far += norm.momentum * (mean - mean_so_far);
          variance_so_far += norm.momentum * (variance * unbiased - variance_so_far);
        }
      } else {
        mean = norm.running_mean[c], variance = norm.running_variance[c];
      }
      norm.mean[c] = mean, norm.inverse[c] = 1 / std::sqrt(variance + norm.epsilon);
    }
    zero_borders(z, c);
    apply(from, norm.scale(c), norm.shift(c), residual.channel(c), z.channel(c), p, input, c);
  });
}
EXPORTED(affine)

// Backward of `affine`: d_y, d_residual, and d_gamma, d_beta and d_before [channels].
//
// g = d_z, but 0 where z <= 0 (without ReLU d_z everywhere); d_beta = sum g; d_gamma = sum g *
// normalised y. In mode batch y moves mean and deviation: d_y = scale * (g - d_beta / count -
// normalised y * d_gamma / count); else d_y = scale * g. Without a z, y tells where it is positive;
// a residual with ReLU needs it. d_y or d_residual may be d_z itself.
void affine_backward(Map d_z, Map z, Map y, bool first, Norm norm, bool relu, int64_t last, Map d_y,
                     Map d_residual, Scalar* d_gamma, Scalar* d_beta, Scalar* d_before) {
  const Pixels p(y, last,
                 std::max({d_z.border, z.border, y.border, d_y.border, d_residual.border}));
  const Prefetched<true> output({d_y});
  const Prefetched<false> input({d_z, z, y}), none({});
  const double count = p.count();
  const auto sums_of = !relu    ? gradient_sums<Gate::open>
                       : z.data ? gradient_sums<Gate::by_z>
                                : gradient_sums<Gate::by_y>;
  const bool moved = norm.mode == batch;
  const auto apply =
      !relu    ? moved ? gradient_channel<Gate::open, true> : gradient_channel<Gate::open, false>
      : z.data ? moved ? gradient_channel<Gate::by_z, true> : gradient_channel<Gate::by_z, false>
      : moved  ? gradient_channel<Gate::by_y, true>
               : gradient_channel<Gate::by_y, false>;
  each_channel(y, [&](int64_t c) {
    const Channel d = d_z.channel(c), result = z.channel(c), from = y.channel(c);
    const Channel to = d_y.channel(c);
    const Scalar mean = norm.mean[c], scale = norm.scale(c), shift = norm.shift(c);
    const auto [sum, product] = sums_of(d, result, from, mean, scale, shift, p, output, c);
    d_beta[c] = sum, d_gamma[c] = product * norm.inverse[c];
    double slope = 0, constant = 0;
    if (moved) {
      slope = -scale * norm.inverse[c] * d_gamma[c] / count;
      constant = -scale * sum / count;
    }
    zero_borders(d_y, c);
    apply(d, result, from, mean, scale, shift, slope, constant, to, d_residual.channel(c), p, input,
          c);
    if (first) {  // y is the output of that ReLU
      gradient_channel<Gate::by_z, false>(to, from, from, 0, 1, 0, 0, 0, to, {}, p, none, c);
      d_before[c] = sum_of(to, p);
    }
  });
}
EXPORTED(affine_backward)

}  // extern "C"
