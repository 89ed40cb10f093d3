// What BatchNorm does to a channel.
#pragma once

#include "maps.h"

#include <cmath>

// z = (y - mean) * inverse * gamma + beta, of a channel. The mode tells where mean and inverse, one
// over the standard deviation, come from.
enum Mode : int64_t { plain, running, batch };  // 0 and 1; running statistics; this batch's

struct Norm {
  const Scalar *gamma, *beta;               // [channels]; nullptr: 1, and 0
  Scalar *running_mean, *running_variance;  // [channels]; in mode batch nullptr: not kept
  double momentum, epsilon;
  Mode mode;
  Scalar *mean, *inverse;  // [channels], written by `affine` and read by `affine_backward`

  // Mean, inverse and running statistics; of the batch, `count` numbers a channel, in mode batch.
  void set(int64_t c, double batch_mean, double batch_variance, double count) const {
    mean[c] = 0, inverse[c] = 1;
    if (mode == plain) return;
    if (mode == batch && running_mean) {
      const double unbiased = batch_variance * (count / (count - 1));
      running_mean[c] += momentum * (batch_mean - running_mean[c]);
      running_variance[c] += momentum * (unbiased - running_variance[c]);
    }
    mean[c] = mode == batch ? batch_mean : running_mean[c];
    inverse[c] = 1 / std::sqrt((mode == batch ? batch_variance : running_variance[c]) + epsilon);
  }

  Scalar scale(int64_t c) const { return gamma ? gamma[c] * inverse[c] : inverse[c]; }
  Scalar shift(int64_t c) const { return (beta ? beta[c] : 0) - mean[c] * scale(c); }
};
