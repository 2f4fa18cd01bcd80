// The machine that PTX runs on: warps of 32 lanes with registers, shared memory that knows who touched it, and
// asynchronous copies. ptx.cpp has the instructions.
//
// Lanes of a warp that part ways run on from the least program counter, and meet again where their counters
// do. An instruction that all lanes execute together waits for those that are behind; one that never comes is
// a fault, and so is a warp that ends while others wait at a barrier.
//
// Shared memory is watched word by word: two warps that touch a word without a barrier between, one of them
// writing, are a race, whatever came out of it. A word that an asynchronous copy was started for belongs to
// nobody until the thread that started it has waited. What nobody has written may not be read.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#include <vector>

#include "cuda_host/ptx.h"

namespace cuda_host::ptx {

constexpr int lanes = 32;

struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct Warp;
struct Instruction;
using Handler = void (*)(Warp&, const Instruction&, uint32_t mask);

enum class Flow { next, branch, end, barrier, together };

struct Instruction {
  Handler run = nullptr;
  Flow flow = Flow::next;
  int operand[14] = {};    // registers: where they begin in a warp's file
  uint8_t width[14] = {};  // theirs, in bytes
  int count = 1;           // of a vector, or of groups that may be pending
  int64_t offset = 0;      // from the address in the register
  int predicate = -1;
  bool negated = false;
  int target = -1;
  bool skipped = false;
  std::string text;
};

struct Kernel {
  std::string name, error;  // error: why it cannot run
  std::vector<Instruction> code;
  std::vector<Count> counts;
  struct Constant {
    int at;
    uint8_t width;
    uint64_t value;
  };
  std::vector<Constant> constants;
  int file_bytes = 0, thread = 0, block_x = 0, block_y = 0, grid_x = 0,
      grid_y = 0;  // special registers
  int parameter_bytes = 0, frame_bytes = 0, static_shared = 0, dynamic_shared = 0;
};

struct Random {
  uint64_t state;
  uint32_t below(uint32_t n) {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return uint32_t(((z ^ (z >> 31)) >> 32) * n >> 32);
  }
};

class Shared {
 public:
  explicit Shared(size_t bytes) : memory_((bytes + 15) / 16 * 16), words_(memory_.size() / 4) {}
  void clear() {
    std::fill(memory_.begin(), memory_.end(), 0xff);  // NaN in every floating-point type
    std::fill(words_.begin(), words_.end(), Word{});
    epoch_ = 0;
  }
  void barrier() { ++epoch_; }
  const unsigned char* read(uint64_t at, size_t bytes, int warp) {
    check(at, bytes);
    for (size_t i = at / 4; i <= (at + bytes - 1) / 4; ++i) {
      Word& w = words_[i];
      if (w.copying >= 0) throw Fault("reads what an asynchronous copy may not have written yet");
      if (w.written < 0) throw Fault("reads shared memory that nobody has written");
      if (w.written == epoch_ && w.writer != warp) race("read", warp, "write", w.writer);
      w.reader = w.read == epoch_ && w.reader != warp ? several : int16_t(warp);
      w.read = epoch_;
    }
    return &memory_[at];
  }
  unsigned char* write(uint64_t at, size_t bytes, int warp) {
    check(at, bytes);
    for (size_t i = at / 4; i <= (at + bytes - 1) / 4; ++i) {
      Word& w = words_[i];
      if (w.copying >= 0) throw Fault("writes where an asynchronous copy is under way");
      if (w.written == epoch_ && w.writer != warp) race("write", warp, "write", w.writer);
      if (w.read == epoch_ && w.reader != warp) race("write", warp, "read", w.reader);
      w.writer = int16_t(warp);
      w.written = epoch_;
    }
    return &memory_[at];
  }
  void begin_copy(uint64_t at, int thread) {
    write(at, 16, thread / lanes);
    for (size_t i = at / 4; i < at / 4 + 4; ++i) words_[i].copying = int16_t(thread);
  }
  // The copy's bytes, which may arrive at any time until its thread waits.
  unsigned char* landing(uint64_t at) { return &memory_[at]; }
  void end_copy(uint64_t at) {
    for (size_t i = at / 4; i < at / 4 + 4; ++i) words_[i].copying = -1, words_[i].written = epoch_;
  }

 private:
  static constexpr int16_t several = -2;
  struct Word {
    int32_t written = -1, read = -1;  // when last: barriers passed
    int16_t writer = -1, reader = -1, copying = -1;
  };
  void check(uint64_t at, size_t bytes) const {
    if (at > memory_.size() || at + bytes > memory_.size()) throw Fault("outside shared memory");
  }
  [[noreturn]] static void race(const char* one, int warp, const char* other, int its) {
    throw Fault("a race in shared memory: " + std::string(one) + " by warp " +
                std::to_string(warp) + ", " + other + " by " +
                (its == several ? "several warps" : "warp " + std::to_string(its)) +
                ", and no barrier between");
  }
  std::vector<unsigned char> memory_;
  std::vector<Word> words_;
  int32_t epoch_ = 0;
};

struct Copy {
  uint64_t to;
  const unsigned char* from;  // null: zeros
  bool landed;
};

struct Block {
  Kernel& kernel;
  Shared& shared;
  const std::vector<unsigned char>& parameters;
  Random& random;
  int copies_land = 0;  // 0: at once, 1: when waited for, 2: some at once
};

struct Warp {
  Block* block;
  int index;
  std::vector<unsigned char> file, frame;  // frame: of each lane, what calls pass
  uint32_t live = ~0u, waiting = 0;
  bool apart = false;
  int pc = 0, pcs[lanes] = {};
  std::vector<std::vector<Copy>>
      copies[lanes];  // groups that are under way; the last is not committed yet

  template <typename T>
  T* at(int reg) {
    return reinterpret_cast<T*>(file.data() + reg);
  }
  uint64_t address(const Instruction& i, int operand, int lane) {
    const int reg = i.operand[operand];
    return (i.width[operand] == 8 ? at<uint64_t>(reg)[lane] : at<uint32_t>(reg)[lane]) +
           uint64_t(i.offset);
  }

  void land(Copy& c) {
    if (c.landed) return;
    unsigned char* to = block->shared.landing(c.to);
    c.from ? void(std::memcpy(to, c.from, 16)) : void(std::memset(to, 0, 16));
    c.landed = true;
  }
  void start_copy(int lane, uint64_t to, const unsigned char* from) {
    block->shared.begin_copy(to, index * lanes + lane);
    auto& groups = copies[lane];
    if (groups.empty()) groups.emplace_back();
    groups.back().push_back({to, from, false});
    if (block->copies_land == 0 || (block->copies_land == 2 && block->random.below(2)))
      land(groups.back().back());
  }
  void commit(int lane) {
    if (copies[lane].empty()) copies[lane].emplace_back();
    copies[lane].emplace_back();
  }
  void wait(int lane, size_t pending) {
    auto& groups = copies[lane];
    while (groups.size() > pending + 1) {
      for (Copy& c : groups.front()) land(c), block->shared.end_copy(c.to);
      groups.erase(groups.begin());
    }
  }

  void part() {
    if (apart) return;
    std::fill(pcs, pcs + lanes, pc);
    apart = true;
  }

  // Up to a barrier (true) or the end (false).
  bool run() {
    const auto& code = block->kernel.code;
    while (live) {
      uint32_t mask = live;
      if (apart) {
        int least = int(code.size());
        for (int l = 0; l < lanes; ++l)
          if ((live & ~waiting) >> l & 1) least = std::min(least, pcs[l]);
        mask = 0;
        for (int l = 0; l < lanes; ++l) mask |= uint32_t(live >> l & 1 && pcs[l] == least) << l;
        pc = least;
        if (mask == live) apart = false, waiting = 0;
        if (mask == 0) throw Fault("the warp parts ways: lanes wait for others that have gone on");
      }
      if (pc == int(code.size())) {
        live &= ~mask;
        continue;
      }
      const Instruction& i = code[size_t(pc)];
      uint32_t active = mask;
      if (i.predicate >= 0) {
        const auto* p = at<uint8_t>(i.predicate);
        uint32_t set = 0;
        for (int l = 0; l < lanes; ++l) set |= uint32_t(p[l] != 0) << l;
        active &= i.negated ? ~set : set;
      }
      if ((i.flow == Flow::barrier || i.flow == Flow::together) && active != ~0u && !i.skipped) {
        if (active != mask)
          throw Fault("a predicate at what all lanes execute together: " + i.text);
        waiting |= mask;
        continue;
      }
      ++block->kernel.counts[size_t(pc)].runs;
      switch (i.skipped ? Flow::next : i.flow) {
        case Flow::branch:
          if (active == mask) {
            step(mask, i.target);
          } else if (active == 0) {
            step(mask, pc + 1);
          } else {
            part();
            for (int l = 0; l < lanes; ++l)
              if (mask >> l & 1) pcs[l] = active >> l & 1 ? i.target : pc + 1;
          }
          continue;
        case Flow::end: live &= ~active; break;
        case Flow::barrier: step(mask, pc + 1); return true;
        default:
          if (active && !i.skipped) {
            try {
              i.run(*this, i, active);
            } catch (const Fault& f) {
              throw Fault(std::string(f.what()) + ": " + i.text + " (instruction " +
                          std::to_string(pc) + ", warp " + std::to_string(index) + ")");
            }
          }
      }
      step(mask, pc + 1);
    }
    return false;
  }

 private:
  void step(uint32_t mask, int to) {
    if (!apart) {
      pc = to;
      return;
    }
    for (int l = 0; l < lanes; ++l)
      if (mask >> l & 1) pcs[l] = to;
  }
};

}  // namespace cuda_host::ptx
