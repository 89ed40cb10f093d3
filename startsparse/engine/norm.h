// What BatchNorm does to a channel.
#pragma once

#include "maps.h"

// z = (y - mean) * inverse * gamma + beta, of a channel. The mode tells where mean and inverse, one
// over the standard deviation, come from.
enum Mode : int64_t { plain, running, batch };  // 0 and 1; running statistics; this batch's

struct Norm {
  const Scalar *gamma, *beta;               // [channels]; nullptr: 1, and 0
  Scalar *running_mean, *running_variance;  // [channels]; in mode batch nullptr: not kept
  double momentum, epsilon;
  Mode mode;
  Scalar *mean, *inverse;  // [channels], written by `affine` and read by `affine_backward`

  Scalar scale(int64_t c) const { return gamma ? gamma[c] * inverse[c] : inverse[c]; }
  Scalar shift(int64_t c) const { return (beta ? beta[c] : 0) - mean[c] * scale(c); }
};
