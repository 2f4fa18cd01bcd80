// What tests set and read: thread order, skipped barriers, and what a run did.
#pragma once

#include <cstdint>
#include <map>
#include <set>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "cuda_host/device.h"

namespace cuda_host {

struct Control {
  uint64_t seed = 0;         // of the order in which blocks, warps and threads run
  std::string skipped_file;  // the __syncthreads at this line of this file does nothing
  unsigned skipped_line = 0;
};
extern Control control;

struct Launch {
  std::string name;
  dim3 grid;
  unsigned threads;
  size_t shared_bytes;
};

struct Record {
  std::vector<Launch> launches;
  std::set<std::pair<std::string, unsigned>> barriers;  // met so far: file and line
  // Of each ldmatrix in the source: passes over shared memory's banks, matrices.
  std::map<std::pair<std::string_view, unsigned>, std::pair<int64_t, int64_t>> passes;
  int64_t products = 0;  // mma instructions
};
extern Record record;

}  // namespace cuda_host
