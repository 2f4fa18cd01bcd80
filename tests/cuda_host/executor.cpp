#include <dlfcn.h>
#include <pthread.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cstdlib>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <vector>

#include "cuda_host/control.h"
#include "cuda_host/device.h"
#include "cuda_host/ptx.h"

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

namespace cuda_host {

const Self* self = nullptr;
Device device;
Control control;
Record record;

namespace {

constexpr size_t stack_bytes = 64 << 10;
constexpr int warp_size = 32;

// -- switching between fibers

#if defined(__x86_64__)
using Context = void*;  // the stack pointer of what is suspended
extern "C" void cuda_host_switch(Context* save, Context resume);
// Callee-saved registers go to the stack; the rest the caller has saved.
asm(R"(
.text
.type cuda_host_switch, @function
cuda_host_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size cuda_host_switch, .-cuda_host_switch
)");
void swap(Context& save, Context& resume) { cuda_host_switch(&save, resume); }
void prepare(Context& context, char* stack, void (*entry)()) {
  // As if `entry` had been suspended before its first instruction, where the stack is 8 short of
  // 16-byte alignment.
  auto** top = reinterpret_cast<void**>(stack + stack_bytes - 16);
  *--top = nullptr;
  *--top = reinterpret_cast<void*>(entry);
  for (int i = 0; i < 6; ++i) *--top = nullptr;
  context = top;
}
#else
using Context = ucontext_t;
void swap(Context& save, Context& resume) { swapcontext(&save, &resume); }
void prepare(Context& context, char* stack, void (*entry)()) {
  getcontext(&context);
  context.uc_stack.ss_sp = stack;
  context.uc_stack.ss_size = stack_bytes;
  makecontext(&context, entry, 0);
}
#endif

// -- one block

std::string file_of(const Where& where) {
  const std::string file = where.file_name();
  return file.substr(file.rfind('/') + 1);
}
std::string place(const Where& where) {
  return file_of(where) + ":" + std::to_string(where.line());
}
bool same_place(const Where& a, const Where& b) {
  return a.line() == b.line() && a.column() == b.column() &&
         (a.file_name() == b.file_name() || std::strcmp(a.file_name(), b.file_name()) == 0);
}

struct Copy {
  char* to;
  const char* from;  // null: zeros
};

struct Thread {
  Self self;
  Context context;
  char* stack = nullptr;
  const char* waits = nullptr;  // for what, if it does
  Where where;
  bool done = false;
  // Groups that are under way; the last is not committed yet.
  std::vector<std::vector<Copy>> copies;
};

struct Warp {
  uint32_t ready = 0;  // lanes that can go on
  int arrived = 0;     // lanes at the meeting point
  const char* what = nullptr;
  Where where;  // it is
  void* brought[warp_size];
};

struct Random {
  uint64_t state;
  uint32_t operator()() {  // splitmix64
    uint64_t z = (state += 0x9e3779b97f4a7c15ull);
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9ull;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebull;
    return uint32_t((z ^ (z >> 31)) >> 32);
  }
  uint32_t below(uint32_t n) { return uint32_t((uint64_t((*this)()) * n) >> 32); }
};

// How the next thread is chosen.
enum class Order {
  warp_by_warp,  // one warp as far as it comes, then another: the widest gap between threads
  any_warp,
  warps_in_turn,
};

struct Block {
  std::vector<Thread> threads;
  std::vector<Warp> warps;
  int at_barrier = 0;
  Where barrier;
  std::map<std::string, std::shared_ptr<void>> arrays;
  unsigned char* dynamic = nullptr;
  Thread* running = nullptr;
  int warp = 0;
  Random random{0};
  Order order{};
  bool late_copies = false;
  std::string error;
  const std::function<void()>* body = nullptr;
  Context scheduler;
  const void* scheduler_stack = nullptr;
  size_t scheduler_size = 0;
};
Block* block = nullptr;

std::shared_ptr<void> poisoned(size_t bytes, size_t alignment) {
  void* p = nullptr;
  if (posix_memalign(&p, alignment, std::max<size_t>(bytes, 1)) != 0) throw std::bad_alloc();
  std::memset(p, 0xff, bytes);  // NaN in every floating-point type
  return {p, std::free};
}

// Stacks live as long as the process, each behind a page that cannot be touched.
char* stack_of(size_t i) {
  static std::vector<char*> stacks;
  const size_t page = size_t(sysconf(_SC_PAGESIZE));
  while (stacks.size() <= i) {
    void* p = mmap(nullptr, stack_bytes + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS,
                   -1, 0);
    if (p == MAP_FAILED) throw std::bad_alloc();
    mprotect(p, page, PROT_NONE);
    stacks.push_back(static_cast<char*>(p) + page);
  }
  return stacks[i];
}

void leave_fiber(bool for_good = false) {
  Thread* me = block->running;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(for_good ? nullptr : &fake, block->scheduler_stack,
                                 block->scheduler_size);
#endif
  swap(me->context, block->scheduler);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
}

void enter_fiber(Thread& t) {
  block->running = &t;
  self = &t.self;
#if defined(__SANITIZE_ADDRESS__)
  void* fake = nullptr;
  __sanitizer_start_switch_fiber(&fake, t.stack, stack_bytes);
#endif
  swap(block->scheduler, t.context);
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(fake, nullptr, nullptr);
#endif
  block->running = nullptr;
  self = nullptr;
}

void finish_copies(Thread& t, size_t keep) {
  while (t.copies.size() > keep) {
    for (const Copy& c : t.copies.front()) {
      if (c.from) {
        std::memcpy(c.to, c.from, 16);
      } else {
        std::memset(c.to, 0, 16);
      }
    }
    t.copies.erase(t.copies.begin());
  }
}

void fiber_main() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(nullptr, &block->scheduler_stack, &block->scheduler_size);
#endif
  (*block->body)();
  Thread& me = *block->running;
  finish_copies(me, 0);
  me.done = true;
  leave_fiber(true);
}

int index_of(const Thread* t) { return int(t - block->threads.data()); }

void wait(const char* what, const Where& where) {
  Thread* me = block->running;
  const int i = index_of(me);
  me->waits = what;
  me->where = where;
  block->warps[size_t(i / warp_size)].ready &= ~(1u << (i % warp_size));
  leave_fiber();
}

// Every thread that waits, grouped by what for.
std::string stuck() {
  std::map<std::string, std::vector<int>> groups;
  for (const Thread& t : block->threads)
    groups[t.done ? "ended" : std::string("in ") + t.waits + " (" + place(t.where) + ")"].push_back(
        index_of(&t));
  std::string text = "no thread can go on:";
  for (const auto& [state, members] : groups)
    text += " [" + std::to_string(members.size()) + " of " + std::to_string(block->threads.size()) +
            ", such as " + std::to_string(members[0]) + ": " + state + "]";
  return text;
}

// The next thread to run, or null.
Thread* choose() {
  const int warps = int(block->warps.size());
  Random& random = block->random;
  if (block->order != Order::warp_by_warp || block->warps[size_t(block->warp)].ready == 0) {
    const int start =
        block->order == Order::warps_in_turn ? block->warp + 1 : int(random.below(uint32_t(warps)));
    int i = 0;
    while (i < warps && block->warps[size_t((start + i) % warps)].ready == 0) ++i;
    if (i == warps) return nullptr;
    block->warp = (start + i) % warps;
  }
  const uint32_t ready = block->warps[size_t(block->warp)].ready;
  const uint32_t turn = random.below(warp_size);
  const uint32_t turned = ready >> turn | (turn ? ready << (warp_size - turn) : 0);
  const int lane = (__builtin_ctz(turned) + int(turn)) % warp_size;
  return &block->threads[size_t(block->warp * warp_size + lane)];
}

void run_block() {
  for (;;) {
    Thread* next = choose();
    if (next == nullptr) break;
    enter_fiber(*next);
    if (!block->error.empty()) return;
    if (next->done)
      block->warps[size_t(index_of(next) / warp_size)].ready &=
          ~(1u << (index_of(next) % warp_size));
  }
  for (const Thread& t : block->threads)
    if (!t.done) {
      block->error = stuck();
      return;
    }
}

}  // namespace

void fail(const std::string& what) {
  if (block == nullptr || block->running == nullptr) throw std::runtime_error(what);
  const dim3 b = self->block;
  block->error = what + " (block " + std::to_string(b.x) + ", " + std::to_string(b.y) + ", " +
                 std::to_string(b.z) + ", thread " + std::to_string(self->thread.x) + ")";
  leave_fiber(true);
  std::abort();  // an abandoned fiber never runs again
}

void* shared_array(size_t bytes, Where where) {
  auto& array = block->arrays[place(where) + ":" + std::to_string(where.column())];
  if (array == nullptr) array = poisoned(bytes, 16);
  return array.get();
}
unsigned char* dynamic_shared() { return block->dynamic; }

void meet(const char* what, const Where& where, void* mine, void (*together)(void* const*)) {
  Thread* me = block->running;
  const int i = index_of(me);
  Warp& warp = block->warps[size_t(i / warp_size)];
  if (warp.arrived == 0) {
    warp.what = what;
    warp.where = where;
  } else if (!same_place(warp.where, where)) {
    fail(std::string("the warp parts ways: a lane is in ") + what + " (" + place(where) +
         "), others in " + warp.what + " (" + place(warp.where) + ")");
  }
  warp.brought[i % warp_size] = mine;
  if (++warp.arrived < warp_size) return wait(what, where);
  together(warp.brought);
  warp.arrived = 0;
  warp.ready = 0xffffffffu;
}

namespace {

// Shared memory has 32 banks of 4 bytes; eight rows of 16 bytes that touch each bank once go in one
// pass. The same row twice is read once.
int passes_over_banks(void* const* rows) {
  int used[8] = {};
  for (int l = 0; l < 8; ++l)
    if (std::find(rows, rows + l, rows[l]) == rows + l)
      ++used[reinterpret_cast<uintptr_t>(rows[l]) / 16 % 8];
  return *std::max_element(used, used + 8);
}

struct MatrixLoad {
  uint32_t* result;
  const char* row;
  bool transposed;
  const Where* where;
};

void load_together(void* const* lanes) {
  const auto lane = [&](int l) { return static_cast<MatrixLoad*>(lanes[l]); };
  const Where& where = *lane(0)->where;
  auto& [passes, matrices] = record.passes[{where.file_name(), where.line()}];
  matrices += 4;
  for (int m = 0; m < 4; ++m) {
    void* rows[8];
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      rows[r] = const_cast<char*>(lane(8 * m + r)->row);
      std::memcpy(matrix[r], rows[r], 16);
    }
    passes += passes_over_banks(rows);
    for (int l = 0; l < warp_size; ++l) {
      const int i = l / 4, j = l % 4 * 2;
      const bool t = lane(l)->transposed;
      lane(l)->result[m] = t ? matrix[j][i] | uint32_t(matrix[j + 1][i]) << 16
                             : matrix[i][j] | uint32_t(matrix[i][j + 1]) << 16;
    }
  }
}

struct Product {
  float* d;
  const uint32_t* a;
  uint32_t b[2];
  Kind kind;
};

float half_of(Kind kind, uint32_t word, int which) {
  const auto bits = uint16_t(word >> (16 * which));
  const fastda::bf16 b{bits};
  const fastda::f16 h{bits};
  return kind == Kind::bf16 ? fastda::load(&b) : fastda::load(&h);
}

// The fragments of mma.m16n8k16 (16-bit types) and mma.m16n8k8 (TF32) as the PTX ISA draws them:
// lane l holds, with g = l / 4 and t = l % 4,
//   a[i]: row g, and g + 8 for odd i; columns 2t, 2t + 1 (TF32: t), and 8 (4) further for i > 1
//   b[i]: the same rows of b's transpose: column g; rows 2t, 2t + 1 (t), 8 (4) further for i = 1
//   d[i]: row g, and g + 8 for i > 1; column 2t + i % 2
__attribute__((optimize("O3"), no_sanitize_address)) void multiply_together(void* const* lanes) {
  const auto lane = [&](int l) { return static_cast<Product*>(lanes[l]); };
  const Kind kind = lane(0)->kind;
  const int depth = kind == Kind::tf32 ? 8 : 16;
  float a[16][16], b[16][8];
  for (int l = 0; l < warp_size; ++l) {
    const int g = l / 4, t = l % 4;
    for (int i = 0; i < 4; ++i) {
      const int row = g + 8 * (i % 2);
      if (kind == Kind::tf32) {  // the low 13 bits are not looked at
        a[row][t + 4 * (i / 2)] = fastda::bits_to_float(lane(l)->a[i] & ~0x1fffu);
      } else {
        for (int e = 0; e < 2; ++e)
          a[row][2 * t + e + 8 * (i / 2)] = half_of(kind, lane(l)->a[i], e);
      }
    }
    for (int i = 0; i < 2; ++i) {
      if (kind == Kind::tf32) {
        b[t + 4 * i][g] = fastda::bits_to_float(lane(l)->b[i] & ~0x1fffu);
      } else {
        for (int e = 0; e < 2; ++e) b[2 * t + e + 8 * i][g] = half_of(kind, lane(l)->b[i], e);
      }
    }
  }
  float product[16][8] = {};
  for (int row = 0; row < 16; ++row)
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) product[row][column] += a[row][k] * b[k][column];
  for (int l = 0; l < warp_size; ++l)
    for (int i = 0; i < 4; ++i) lane(l)->d[i] += product[l / 4 + 8 * (i / 2)][l % 4 * 2 + i % 2];
  ++record.products;
}

}  // namespace

void load_matrices(uint32_t* result, const void* row, bool transposed, const Where& where) {
  MatrixLoad mine{result, static_cast<const char*>(aligned(row, 16)), transposed, &where};
  meet("ldmatrix", where, &mine, load_together);
}

void mma(Kind kind, float* d, const uint32_t* a, uint32_t b0, uint32_t b1, const Where& where) {
  Product mine{d, a, {b0, b1}, kind};
  meet("mma", where, &mine, multiply_together);
}

// A copy is done at once or only when it is waited for, whatever hurts more: the seed decides.
void copy_async(void* to, const void* from, bool inside) {
  Thread* me = block->running;
  if (me->copies.empty()) me->copies.emplace_back();
  me->copies.back().push_back({static_cast<char*>(aligned(to, 16)),
                               inside ? static_cast<const char*>(aligned(from, 16)) : nullptr});
  if (!block->late_copies) {
    const Copy c = me->copies.back().back();
    me->copies.back().pop_back();
    if (c.from) {
      std::memcpy(c.to, c.from, 16);
    } else {
      std::memset(c.to, 0, 16);
    }
  }
}
void commit_copies() {
  Thread* me = block->running;
  if (me->copies.empty()) me->copies.emplace_back();
  me->copies.emplace_back();
}
void wait_copies(int pending) {
  Thread* me = block->running;
  if (!me->copies.empty()) finish_copies(*me, size_t(pending) + 1);
}

void launch(const char* name, dim3 grid, unsigned threads, size_t shared_bytes,
            const std::function<void()>& body, const void* kernel,
            const std::vector<unsigned char>& parameters) {
  static std::mutex one_at_a_time;
  const std::lock_guard lock(one_at_a_time);
  if (threads == 0 || threads > 1024 || threads % warp_size != 0)
    fail(std::string(name) + ": a block must have 32, 64, … 1024 threads");
  if (grid.x == 0 || grid.y == 0 || grid.z == 0 || grid.x > 0x7fffffffu || grid.y > 65535 ||
      grid.z > 65535)
    fail(std::string(name) + ": no such grid");
  if (shared_bytes > device.shared_bytes_per_block)
    fail(std::string(name) + ": more shared memory than the device has");
  record.launches.push_back({name, grid, threads, shared_bytes});

  if (kernel && ptx::loaded()) {
    Dl_info symbol{};
    if (!dladdr(kernel, &symbol) || symbol.dli_saddr != kernel)
      fail(std::string(name) + ": the kernel has no symbol");
    return ptx::run(symbol.dli_sname, grid, threads, shared_bytes, parameters, control.seed);
  }

  const uint64_t blocks = uint64_t(grid.x) * grid.y * grid.z;
  std::vector<uint64_t> todo(blocks);
  for (uint64_t i = 0; i < blocks; ++i) todo[i] = i;
  Random shuffle{control.seed * 1000003 + record.launches.size()};
  for (uint64_t i = blocks; i > 1; --i) std::swap(todo[i - 1], todo[shuffle.below(uint32_t(i))]);
  const auto dynamic = poisoned(shared_bytes, 1024);
#if defined(__SANITIZE_ADDRESS__)
  static bool abandoned = false;  // fibers in the middle of their work, frames and all
  for (unsigned t = 0; abandoned && t < 1024; ++t)
    __asan_unpoison_memory_region(stack_of(t), stack_bytes);
  abandoned = false;
#endif

  for (uint64_t b : todo) {
    Block state;
    state.threads.resize(threads);
    state.warps.resize(threads / warp_size);
    state.dynamic = static_cast<unsigned char*>(dynamic.get());
    std::memset(dynamic.get(), 0xff, shared_bytes);
    state.random.state = shuffle() | uint64_t(b) << 32;
    state.order = Order((control.seed + b) % 3);
    state.late_copies = (control.seed / 3 + b) % 2 == 0;
    state.body = &body;
    for (unsigned t = 0; t < threads; ++t) {
      Thread& thread = state.threads[t];
      thread.self = {
          dim3(t),
          dim3(unsigned(b % grid.x), unsigned(b / grid.x % grid.y), unsigned(b / grid.x / grid.y)),
          dim3(threads), grid};
      thread.stack = stack_of(t);
#if defined(__SANITIZE_ADDRESS__)
      // Where the last one ended.
      __asan_unpoison_memory_region(thread.stack + stack_bytes - 1024, 1024);
#endif
      prepare(thread.context, thread.stack, fiber_main);
      state.warps[t / warp_size].ready |= 1u << (t % warp_size);
    }
    block = &state;
    run_block();
    block = nullptr;
    self = nullptr;
    if (!state.error.empty()) {
#if defined(__SANITIZE_ADDRESS__)
      abandoned = true;
#endif
      throw std::runtime_error(std::string(name) + ": " + state.error);
    }
  }
}

}  // namespace cuda_host

void __syncthreads(cuda_host::Where where) {
  using namespace cuda_host;
  if (control.skipped_line == where.line() && control.skipped_file == file_of(where)) return;
  if (block->at_barrier == 0) record.barriers.insert({file_of(where), where.line()});
  if (block->at_barrier > 0 && !same_place(block->barrier, where))
    fail("__syncthreads at " + place(where) + " while others wait in one at " +
         place(block->barrier));
  block->barrier = where;
  if (++block->at_barrier < int(block->threads.size())) return wait("__syncthreads", where);
  block->at_barrier = 0;
  for (Warp& warp : block->warps) warp.ready = 0xffffffffu;
}
