// Executes the PTX that nvcc makes of the kernels, where executor.cpp executes what g++ makes of them.
#pragma once

#include <cstdint>
#include <map>
#include <string>
#include <string_view>
#include <vector>

#include "cuda_host/device.h"

namespace cuda_host::ptx {

// What one instruction of shared memory or of the matrix units did: executions by a warp, passes over shared
// memory's banks, and the least number of passes that so many bytes can take.
struct Count {
  int64_t runs = 0, passes = 0, least = 0;
};
struct Line {
  std::string text;
  Count count;
};

// Every launch from now on runs a kernel of this PTX; an empty text goes back to the compiled kernels.
void load(const std::string& text);
bool loaded();
void run(const std::string& kernel, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::vector<unsigned char>& parameters, uint64_t seed);

// By kernel: what was executed since `forget`.
std::map<std::string, std::map<int, Line>> executed();
void forget();
// The instruction with this number does nothing; -1: all are executed.
void skip(const std::string& kernel, int instruction);

}  // namespace cuda_host::ptx
