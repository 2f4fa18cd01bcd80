// How the statistics of a normalisation lie in images, for the kernels of every device.
#pragma once

#include <cstdint>

namespace fastda {

// `groups` times `channels` statistics, each over `rows` values. An image's own statistics make a
// group of every image.
struct NormLayout {
  bool by_rows;  // rows of all channels; otherwise planes of one
  int64_t groups, images, channels, pixels;
  int64_t rows() const { return images * pixels; }
  int64_t statistics() const { return groups * channels; }
};

}  // namespace fastda
