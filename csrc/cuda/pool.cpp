#include "host/pool.h"

#include "cuda/device.h"
#include "cuda/kernels/pool.h"

namespace fastda::cuda {
namespace {

struct Pool : Device {
  using Device::Device;

  void forward(const PoolProblem& p, const void* x, void* y, uint8_t* indices) const {
    pool_forward(p, x, y, indices, stream());
  }
  void backward(const PoolProblem& p, const void* grad, const uint8_t* indices, void* out) const {
    pool_backward(p, grad, indices, out, stream());
  }
};

}  // namespace

FASTDA_CUDA_LIBRARY(m) { register_pool<Pool>(m); }

}  // namespace fastda::cuda
