// PTX text → instructions of ptx_machine.h. Semantics and the fragments of mma and ldmatrix are those of the
// PTX ISA 9.0; an instruction that is not here stops the launch by name.
#include "cuda_host/ptx.h"

#include <cfenv>
#include <cmath>
#include <set>
#include <utility>

#include "cuda_host/control.h"
#include "cuda_host/ptx_machine.h"

extern "C" void* __asan_region_is_poisoned(void*, size_t);

namespace cuda_host::ptx {
namespace {

// -- what instructions do ------------------------------------------------------------------------

template <typename F>
void each(uint32_t mask, F&& f) {
  if (mask == ~0u) {
    for (int l = 0; l < lanes; ++l) f(l);
  } else {
    for (; mask; mask &= mask - 1) f(std::countr_zero(mask));
  }
}

// d = f(operands), element by element; `f` has no state and is made anew where it runs.
template <typename D, typename A, typename F>
Handler unary(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    D* d = w.at<D>(i.operand[0]);
    const A* a = w.at<A>(i.operand[1]);
    each(mask, [&](int l) { d[l] = D(F{}(a[l])); });
  };
}
template <typename D, typename A, typename B = A, typename F>
Handler binary(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    D* d = w.at<D>(i.operand[0]);
    const A* a = w.at<A>(i.operand[1]);
    const B* b = w.at<B>(i.operand[2]);
    each(mask, [&](int l) { d[l] = D(F{}(a[l], b[l])); });
  };
}
template <typename D, typename A, typename C = A, typename F>
Handler ternary(F) {
  return [](Warp& w, const Instruction& i, uint32_t mask) {
    D* d = w.at<D>(i.operand[0]);
    const A *a = w.at<A>(i.operand[1]), *b = w.at<A>(i.operand[2]);
    const C* c = w.at<C>(i.operand[3]);
    each(mask, [&](int l) { d[l] = D(F{}(a[l], b[l], c[l])); });
  };
}

template <int mode, typename F>
float rounded(F&& f) {
  const int before = std::fegetround();
  std::fesetround(mode);
  volatile float v = f();
  std::fesetround(before);
  return v;
}

// Elements of a vector may be narrower than the registers that they come from and go to.
template <typename T>
void put(Warp& w, int reg, int width, int lane, T v) {
  if (width == sizeof(T)) {
    w.at<T>(reg)[lane] = v;
    return;
  }
  const auto wide = std::is_signed_v<T> ? uint64_t(int64_t(v)) : uint64_t(v);
  switch (width) {
    case 2: w.at<uint16_t>(reg)[lane] = uint16_t(wide); break;
    case 4: w.at<uint32_t>(reg)[lane] = uint32_t(wide); break;
    default: w.at<uint64_t>(reg)[lane] = wide;
  }
}
template <typename T>
T take(Warp& w, int reg, int width, int lane) {
  if (width == sizeof(T)) return w.at<T>(reg)[lane];
  switch (width) {
    case 2: return T(w.at<uint16_t>(reg)[lane]);
    case 4: return T(w.at<uint32_t>(reg)[lane]);
    default: return T(w.at<uint64_t>(reg)[lane]);
  }
}

void check_aligned(uint64_t at, size_t bytes) {
  if (at % bytes) throw Fault("misaligned access of " + std::to_string(bytes) + " bytes");
}
unsigned char* global(uint64_t at, size_t bytes) {
  auto* p = reinterpret_cast<unsigned char*>(at);
  if (at < 4096 || __asan_region_is_poisoned(p, bytes)) throw Fault("outside what was allocated");
  return p;
}

// Passes over 32 banks of four bytes: lanes go in phases of so many that 128 bytes are asked for, and in each
// phase the bank with the most different words decides.
void count_passes(Warp& w, uint32_t mask, size_t bytes, const uint64_t* at) {
  Count& count = w.block->kernel.counts[size_t(w.pc)];
  const int phase = int(std::min<size_t>(lanes, 128 / std::max<size_t>(bytes, 4)));
  for (int first = 0; first < lanes; first += phase) {
    uint64_t words[lanes][lanes];
    int used[lanes] = {}, most = 0;
    for (int l = first; l < first + phase; ++l) {
      if (!(mask >> l & 1)) continue;
      for (uint64_t word = at[l] / 4; word <= (at[l] + bytes - 1) / 4; ++word) {
        uint64_t* bank = words[word % lanes];
        int& n = used[word % lanes];
        if (std::find(bank, bank + n, word) == bank + n) bank[n++] = word;
        most = std::max(most, n);
      }
    }
    count.passes += most;
    count.least += most > 0;
  }
}

enum class Space { global, shared, parameter, frame };

template <Space space, typename T>
void load(Warp& w, const Instruction& i, uint32_t mask) {
  const size_t bytes = sizeof(T) * size_t(i.count);
  uint64_t at[lanes];
  each(mask, [&](int l) {
    at[l] = w.address(i, i.count, l);
    check_aligned(at[l], bytes);
    const unsigned char* from = nullptr;
    if constexpr (space == Space::global) {
      from = global(at[l], bytes);
    } else if constexpr (space == Space::shared) {
      from = w.block->shared.read(at[l], bytes, w.index);
    } else if constexpr (space == Space::parameter) {
      if (at[l] + bytes > w.block->parameters.size()) throw Fault("outside the parameters");
      from = &w.block->parameters[at[l]];
    } else {
      from = &w.frame[size_t(l * w.block->kernel.frame_bytes) + at[l]];
    }
    for (int k = 0; k < i.count; ++k) {
      T v;
      std::memcpy(&v, from + size_t(k) * sizeof(T), sizeof(T));
      put(w, i.operand[k], i.width[k], l, v);
    }
  });
  if (space == Space::shared) count_passes(w, mask, bytes, at);
}

template <Space space, typename T>
void store(Warp& w, const Instruction& i, uint32_t mask) {
  const size_t bytes = sizeof(T) * size_t(i.count);
  uint64_t at[lanes];
  each(mask, [&](int l) {
    at[l] = w.address(i, i.count, l);
    check_aligned(at[l], bytes);
    unsigned char* to = nullptr;
    if constexpr (space == Space::global) {
      to = global(at[l], bytes);
    } else if constexpr (space == Space::shared) {
      to = w.block->shared.write(at[l], bytes, w.index);
    } else {
      to = &w.frame[size_t(l * w.block->kernel.frame_bytes) + at[l]];
    }
    for (int k = 0; k < i.count; ++k) {
      const T v = take<T>(w, i.operand[k], i.width[k], l);
      std::memcpy(to + size_t(k) * sizeof(T), &v, sizeof(T));
    }
  });
  if (space == Space::shared) count_passes(w, mask, bytes, at);
}

void copy_async(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t at[lanes];
  each(mask, [&](int l) {
    at[l] = w.address(i, 0, l);
    const uint64_t from = w.at<uint64_t>(i.operand[1])[l];
    const uint32_t bytes = w.at<uint32_t>(i.operand[2])[l];
    check_aligned(at[l], 16);
    check_aligned(from, 16);
    if (bytes != 0 && bytes != 16) throw Fault("copies part of 16 bytes");
    w.start_copy(l, at[l], bytes ? global(from, 16) : nullptr);
  });
  count_passes(w, mask, 16, at);
}

template <bool transposed>
void load_matrices(Warp& w, const Instruction& i, uint32_t mask) {
  uint64_t at[lanes];
  for (int m = 0; m < 4; ++m) {
    uint16_t matrix[8][8];
    for (int r = 0; r < 8; ++r) {
      const int l = m * 8 + r;
      at[l] = w.address(i, 4, l);
      check_aligned(at[l], 16);
      std::memcpy(matrix[r], w.block->shared.read(at[l], 16, w.index), 16);
    }
    auto* d = w.at<uint32_t>(i.operand[m]);
    for (int l = 0; l < lanes; ++l) {
      const int r = l / 4, c = l % 4 * 2;
      d[l] = transposed ? matrix[c][r] | uint32_t(matrix[c + 1][r]) << 16
                        : matrix[r][c] | uint32_t(matrix[r][c + 1]) << 16;
    }
  }
  const Count before = w.block->kernel.counts[size_t(w.pc)];
  count_passes(w, mask, 16, at);
  const Count& after = w.block->kernel.counts[size_t(w.pc)];
  auto& [passes, matrices] = record.passes[{w.block->kernel.name, 0}];
  passes += after.passes - before.passes, matrices += after.least - before.least;
}

template <typename T>
float half_of(uint32_t word, int which) {
  const T half{uint16_t(word >> (16 * which))};
  return fastda::load(&half);
}

// D = A · B + C: in lane l, with g = l / 4 and t = l % 4, A's registers 0 and 2 are of row g, 1 and 3 of row
// g + 8; in m16n8k16 they hold columns 2t and 2t + 1 (and 8 further in registers 2 and 3), in m16n8k8 of TF32
// column t (and 4 further). B's are its transpose of columns g. C and D hold (g, 2t), (g, 2t + 1), and the
// same 8 rows down.
template <typename T>
void multiply(Warp& w, const Instruction& i, uint32_t) {
  ++record.products;
  constexpr int depth = std::is_same_v<T, float> ? 8 : 16;
  float a[16][16], b[16][8], d[16][8];
  const auto word = [&](int operand, int l) { return w.at<uint32_t>(i.operand[operand])[l]; };
  for (int l = 0; l < lanes; ++l) {
    const int g = l / 4, t = l % 4;
    for (int r = 0; r < 4; ++r) {
      const uint32_t v = word(4 + r, l);
      if constexpr (depth == 8) {  // the low 13 bits are not looked at
        a[g + r % 2 * 8][t + r / 2 * 4] = fastda::bits_to_float(v & ~0x1fffu);
      } else {
        for (int e = 0; e < 2; ++e) a[g + r % 2 * 8][2 * t + e + r / 2 * 8] = half_of<T>(v, e);
      }
    }
    for (int r = 0; r < 2; ++r) {
      const uint32_t v = word(8 + r, l);
      if constexpr (depth == 8) {
        b[t + r * 4][g] = fastda::bits_to_float(v & ~0x1fffu);
      } else {
        for (int e = 0; e < 2; ++e) b[2 * t + e + r * 8][g] = half_of<T>(v, e);
      }
    }
    for (int r = 0; r < 4; ++r)
      d[g + r / 2 * 8][2 * t + r % 2] = fastda::bits_to_float(word(10 + r, l));
  }
  for (int row = 0; row < 16; ++row) {
    float sum[8] = {};
    for (int k = 0; k < depth; ++k)
      for (int column = 0; column < 8; ++column) sum[column] += a[row][k] * b[k][column];
    for (int column = 0; column < 8; ++column) d[row][column] += sum[column];
  }
  for (int l = 0; l < lanes; ++l)
    for (int r = 0; r < 4; ++r)
      w.at<float>(i.operand[r])[l] = d[l / 4 + r / 2 * 8][l % 4 * 2 + r % 2];
}

// -- the text ------------------------------------------------------------------------------------

std::vector<std::string> split(const std::string& text, char at) {
  std::vector<std::string> parts;
  std::string part;
  int depth = 0;
  for (char c : text) {
    depth += (c == '{' || c == '[' || c == '(') - (c == '}' || c == ']' || c == ')');
    if (c == at && depth == 0) {
      parts.push_back(part);
      part.clear();
    } else if (c != ' ' && c != '\t' && c != '\n') {
      part += c;
    }
  }
  if (!part.empty()) parts.push_back(part);
  return parts;
}
std::vector<std::string> elements(const std::string& operand) {  // of {a, b}; else itself
  return operand[0] == '{' ? split(operand.substr(1, operand.size() - 2), ',')
                           : std::vector{operand};
}

// Calls f with a value of the type's C++ counterpart.
template <typename F>
Handler of_type(const std::string& t, F&& f) {
  if (t == "b8" || t == "u8") return f(uint8_t{});
  if (t == "s8") return f(int8_t{});
  if (t == "b16" || t == "u16") return f(uint16_t{});
  if (t == "s16") return f(int16_t{});
  if (t == "b32" || t == "u32") return f(uint32_t{});
  if (t == "s32") return f(int32_t{});
  if (t == "b64" || t == "u64") return f(uint64_t{});
  if (t == "s64") return f(int64_t{});
  if (t == "f32") return f(float{});
  if (t == "f64") return f(double{});
  return nullptr;
}
template <typename F>
Handler of_integer(const std::string& t, F&& f) {
  return of_type(t, [&](auto v) -> Handler {
    if constexpr (std::is_integral_v<decltype(v)>) return f(v);
    return nullptr;
  });
}
template <typename F>
Handler of_float(const std::string& t, F&& f) {
  return of_type(t, [&](auto v) -> Handler {
    if constexpr (std::is_floating_point_v<decltype(v)>) return f(v);
    return nullptr;
  });
}
int bytes_of(const std::string& t) { return t == "pred" ? 1 : std::stoi(t.substr(1)) / 8; }

struct Function {
  std::string header, body;
};
using Functions = std::map<std::string, Function>;

class Compiler {
 public:
  Compiler(Kernel& kernel, const Functions& functions, std::string dynamic)
      : k_(kernel), functions_(functions), dynamic_(std::move(dynamic)) {}

  void compile(const Function& entry) {
    for (auto [place, bytes, name] : {std::tuple(&k_.thread, 4, "%tid.x"),
                                      {&k_.block_x, 4, "%ctaid.x"},
                                      {&k_.block_y, 4, "%ctaid.y"},
                                      {&k_.grid_x, 4, "%nctaid.x"},
                                      {&k_.grid_y, 4, "%nctaid.y"}}) {
      *place = allocate(bytes);
      registers_[name] = {*place, 4};
    }
    int at = 0;
    for (const auto& [name, align, bytes] : parameters_of(entry.header)) {
      at = (at + align - 1) / align * align;
      symbols_[name] = uint64_t(at);
      at += bytes;
    }
    k_.parameter_bytes = at;
    body(entry.body, "", "");
    for (auto [instruction, label] : jumps_) {
      if (!labels_.contains(label)) throw Fault("no label " + label);
      k_.code[size_t(instruction)].target = labels_[label];
    }
    k_.static_shared = (k_.static_shared + 1023) / 1024 * 1024;
    for (int c : dynamic_uses_) k_.constants[size_t(c)].value += uint64_t(k_.static_shared);
    k_.counts.resize(k_.code.size());
  }

 private:
  struct Register {
    int at, width;
  };

  static std::vector<std::tuple<std::string, int, int>> parameters_of(const std::string& header) {
    std::vector<std::tuple<std::string, int, int>> found;
    const size_t open = header.rfind('(');
    const std::string list = header.substr(open + 1, header.rfind(')') - open - 1);
    for (size_t at = 0; (at = list.find(".param", at)) != std::string::npos; ++at) {
      const std::string one = list.substr(at, list.find(',', at) - at);
      int align = 0;
      const size_t aligned = one.find(".align ");
      if (aligned != std::string::npos) align = std::stoi(one.substr(aligned + 7));
      const size_t name = one.rfind(' ') + 1, bracket = one.find('[');
      const size_t type = one.rfind('.') + 1;
      int bytes = bytes_of(one.substr(type, one.find(' ', type) - type));
      if (bracket != std::string::npos) bytes *= std::stoi(one.substr(bracket + 1));
      std::string text = one.substr(name, bracket == std::string::npos ? bracket : bracket - name);
      while (!text.empty() && !(isalnum(text.back()) || text.back() == '_')) text.pop_back();
      found.emplace_back(text, align ? align : bytes, bytes);
    }
    return found;
  }

  int allocate(int width) {
    const int at = k_.file_bytes;
    k_.file_bytes += width * lanes;
    k_.file_bytes = (k_.file_bytes + 63) / 64 * 64;
    return at;
  }

  Register constant(uint64_t value, int width) {
    const int at = allocate(width);
    k_.constants.push_back({at, uint8_t(width), value});
    return {at, width};
  }

  Register operand(const std::string& text, int width) {
    if (text[0] == '%') {
      const std::string name = text.find('.') == std::string::npos ? prefix_ + text : text;
      if (auto found = registers_.find(name); found != registers_.end()) return found->second;
      std::string stem = text;
      while (isdigit(stem.back())) stem.pop_back();
      const auto declared = widths_.find(prefix_ + stem);
      if (declared == widths_.end()) throw Fault("unknown register " + text);
      return registers_[name] = {allocate(declared->second), declared->second};
    }
    if (text[0] == '0' && (text[1] == 'f' || text[1] == 'd'))
      return constant(std::stoull(text.substr(2), nullptr, 16), width);
    if (isdigit(text[0])) return constant(std::stoull(text, nullptr, 0), width);
    if (text[0] == '-') return constant(uint64_t(std::stoll(text, nullptr, 0)), width);
    if (text == dynamic_) {
      dynamic_uses_.push_back(int(k_.constants.size()));
      return constant(0, width);
    }
    const auto found = symbols_.find(text);
    if (found == symbols_.end()) throw Fault("unknown symbol " + text);
    return constant(found->second, width);
  }

  void use(Instruction& i, int place, const std::string& text, int width, bool exact = true) {
    const Register r = operand(text, width);
    if (exact && r.width != width) throw Fault("a register of another width: " + i.text);
    i.operand[place] = r.at;
    i.width[place] = uint8_t(r.width);
  }

  void address(Instruction& i, int place, const std::string& text) {
    std::string base = text.substr(1, text.size() - 2);
    const size_t plus = base.find('+');
    if (plus != std::string::npos) {
      i.offset = std::stoll(base.substr(plus + 1));
      base.resize(plus);
    }
    use(i, place, base, 8, false);
  }

  // The statements of a body. Calls are expanded: `prefix` keeps their registers and labels apart, and a
  // return goes to `end`.
  void body(const std::string& text, const std::string& prefix, const std::string& end) {
    const std::string outer = std::exchange(prefix_, prefix), outer_end = std::exchange(end_, end);
    for (size_t at = 0; at < text.size();) {
      if (isspace(text[at]) || text[at] == '{' || text[at] == '}') {
        ++at;
        continue;
      }
      if (text[at] == '$') {
        const size_t colon = text.find(':', at);
        labels_[prefix_ + text.substr(at, colon - at)] = int(k_.code.size());
        at = colon + 1;
        continue;
      }
      const size_t stop = text.find(';', at);
      statement(text.substr(at, stop - at));
      at = stop + 1;
    }
    prefix_ = outer;
    end_ = outer_end;
  }

  void statement(std::string text) {
    for (char& c : text)
      if (c == '\t' || c == '\n') c = ' ';
    if (text.starts_with(".reg")) {
      const size_t dot = text.find('.', 1), percent = text.find('%');
      if (percent == std::string::npos) return;
      std::string name = text.substr(percent, text.find_first_of("< ", percent) - percent);
      widths_[prefix_ + name] = bytes_of(text.substr(dot + 1, text.find(' ', dot) - dot - 1));
      return;
    }
    if (text.starts_with(".shared") || text.starts_with(".param")) {
      for (const auto& [name, align, bytes] :
           parameters_of("(.param" + text.substr(text.find(' ')) + ")")) {
        int& used = text[1] == 's' ? k_.static_shared : k_.frame_bytes;
        used = (used + align - 1) / align * align;
        symbols_[name] = uint64_t(used);
        if (text[1] == 'p') frame_.insert(name);
        used += bytes;
      }
      return;
    }
    if (text.starts_with(".pragma")) return;
    if (text[0] == '.') throw Fault("unknown directive " + text);

    Instruction i;
    i.text = text;
    if (text[0] == '@') {
      const size_t space = text.find(' ');
      i.negated = text[1] == '!';
      const std::string name = text.substr(1 + i.negated, space - 1 - i.negated);
      i.predicate = operand(name, 1).at;
      text = text.substr(text.find_first_not_of(' ', space));
    }
    const size_t space = text.find(' ');
    const std::vector<std::string> op = split(text.substr(0, space), '.');
    const auto o =
        space == std::string::npos ? std::vector<std::string>{} : split(text.substr(space), ',');
    if (op[0] == "call") return call(o);
    instruction(i, op, o);
    k_.code.push_back(std::move(i));
  }

  void call(const std::vector<std::string>& o) {
    const auto names = [](const std::string& list) {
      return split(list.substr(1, list.size() - 2), ',');
    };
    const auto found = functions_.find(o.at(1));
    if (found == functions_.end()) throw Fault("unknown function " + o.at(1));
    const std::string tag = "call" + std::to_string(++calls_) + ":";
    const std::string& header = found->second.header;
    std::vector<std::pair<std::string, uint64_t>> bound;
    const std::vector<std::string> given = names(o.at(2));
    size_t next = 0;
    for (const auto& parameter : parameters_of(header))
      bound.emplace_back(std::get<0>(parameter), symbols_.at(given.at(next++)));
    bound.emplace_back("func_retval0", symbols_.at(names(o[0]).at(0)));
    for (const auto& [name, at] : bound) symbols_[name] = at, frame_.insert(name);
    body(found->second.body, tag, tag + "end");
    labels_[tag + "end"] = int(k_.code.size());
  }

  void instruction(Instruction& i, const std::vector<std::string>& op,
                   const std::vector<std::string>& o) {
    const std::string &base = op[0], &t = op.back();
    const auto is = [&](const char* part) {
      return std::find(op.begin(), op.end(), part) != op.end();
    };
    // Registers of one type, and the handler for it.
    const auto typed = [&](Handler handler, std::initializer_list<int> widths) {
      i.run = handler;
      int n = 0;
      for (int width : widths) use(i, n, o.at(size_t(n)), width), ++n;
    };

    if (base == "bra") {
      i.flow = Flow::branch;
      jumps_.emplace_back(int(k_.code.size()), prefix_ + o.at(0));
    } else if (base == "ret") {
      i.flow = end_.empty() ? Flow::end : Flow::branch;
      if (!end_.empty()) jumps_.emplace_back(int(k_.code.size()), end_);
    } else if (base == "bar" && o == std::vector<std::string>{"0"}) {
      i.flow = Flow::barrier;
    } else if (base == "ld" || base == "st") {
      memory(i, op, o);
    } else if (base == "cp" && is("ca") + is("cg") == 1) {
      if (o.at(2) != "16") throw Fault("a copy of other than 16 bytes");
      address(i, 0, o[0]);
      use(i, 1, o[1].substr(1, o[1].size() - 2), 8);
      use(i, 2, o.size() > 3 ? o[3] : "16", 4);
      i.run = copy_async;
    } else if (base == "cp" && is("commit_group")) {
      i.run = [](Warp& w, const Instruction&, uint32_t mask) {
        each(mask, [&](int l) { w.commit(l); });
      };
    } else if (base == "cp" && is("wait_group")) {
      i.count = std::stoi(o.at(0));
      i.run = [](Warp& w, const Instruction& i, uint32_t mask) {
        each(mask, [&](int l) { w.wait(l, size_t(i.count)); });
      };
    } else if (base == "ldmatrix" && is("m8n8") && is("x4") && is("b16")) {
      i.flow = Flow::together;
      const auto d = elements(o.at(0));
      for (int n = 0; n < 4; ++n) use(i, n, d.at(size_t(n)), 4);
      address(i, 4, o.at(1));
      i.run = is("trans") ? load_matrices<true> : load_matrices<false>;
    } else if (base == "mma" && is("row") && is("col") && t == "f32") {
      i.flow = Flow::together;
      int n = 0;
      for (const auto& group : o)
        for (const auto& word : elements(group)) use(i, n++, word, 4);
      if (n != 14) throw Fault("another shape of mma: " + i.text);
      if (is("m16n8k16") && is("bf16")) {
        i.run = multiply<fastda::bf16>;
      } else if (is("m16n8k16") && is("f16")) {
        i.run = multiply<fastda::f16>;
      } else if (is("m16n8k8") && is("tf32")) {
        i.run = multiply<float>;
      }
    } else if (base == "shfl" && (is("bfly") || is("idx"))) {
      i.flow = Flow::together;
      use(i, 0, o[0].substr(0, o[0].find('|')), 4);
      use(i, 1, o[1], 4);
      for (int n = 2; n < 5; ++n) use(i, n, o.at(size_t(n)), 4);
      const auto shuffle = [](auto bfly) -> Handler {
        return [](Warp& w, const Instruction& i, uint32_t) {
          if (w.at<uint32_t>(i.operand[3])[0] != 31 || w.at<uint32_t>(i.operand[4])[0] != ~0u)
            throw Fault("a shuffle within parts of a warp");
          uint32_t from[lanes];
          std::memcpy(from, w.at<uint32_t>(i.operand[1]), sizeof from);
          const auto* other = w.at<uint32_t>(i.operand[2]);
          auto* d = w.at<uint32_t>(i.operand[0]);
          uint32_t result[lanes];
          for (int l = 0; l < lanes; ++l)
            result[l] =
                from[decltype(bfly)::value ? (uint32_t(l) ^ other[l]) % lanes : other[l] % lanes];
          std::memcpy(d, result, sizeof result);
        };
      };
      i.run = is("bfly") ? shuffle(std::true_type{}) : shuffle(std::false_type{});
    } else if (base == "mov") {
      move(i, t, o);
    } else if (base == "cvta") {
      typed(unary<uint64_t, uint64_t>([](auto a) { return a; }), {8, 8});
    } else if (base == "cvt") {
      convert(i, op, o);
    } else if (base == "setp") {
      compare(i, op, o);
    } else if (base == "selp") {
      const int b = bytes_of(t);
      typed(of_type(t,
                    [](auto v) -> Handler {
                      using T = decltype(v);
                      return ternary<T, T, uint8_t>([](T x, T y, uint8_t p) { return p ? x : y; });
                    }),
            {b, b, b, 1});
    } else {
      arithmetic(i, op, o);
    }
    if (i.run == nullptr && (i.flow == Flow::next || i.flow == Flow::together))
      throw Fault("unknown instruction " + i.text);
  }

  void memory(Instruction& i, const std::vector<std::string>& op,
              const std::vector<std::string>& o) {
    const bool loads = op[0] == "ld";
    const auto words = elements(o.at(loads ? 0 : 1));
    const std::string& at = o.at(loads ? 1 : 0);
    i.count = int(words.size());
    for (int n = 0; n < i.count; ++n) {
      if (words[size_t(n)] == "_") throw Fault("unknown operand _");
      use(i, n, words[size_t(n)], bytes_of(op.back()), false);
    }
    address(i, i.count, at);
    std::string symbol = at.substr(1, at.find_first_of("+]") - 1);
    const bool frame = frame_.contains(symbol);
    i.run = of_type(op.back(), [&](auto v) -> Handler {
      using T = decltype(v);
      if (op[1] == "global") return loads ? load<Space::global, T> : store<Space::global, T>;
      if (op[1] == "shared") return loads ? load<Space::shared, T> : store<Space::shared, T>;
      if (op[1] == "param" && frame) return loads ? load<Space::frame, T> : store<Space::frame, T>;
      if (op[1] == "param" && loads) return load<Space::parameter, T>;
      return nullptr;
    });
  }

  void move(Instruction& i, const std::string& t, const std::vector<std::string>& o) {
    const int bytes = bytes_of(t);
    const auto to = elements(o.at(0)), from = elements(o.at(1));
    if (to.size() == 1 && from.size() == 1) {
      use(i, 0, to[0], bytes);
      use(i, 1, from[0], bytes);
      i.run = t == "pred" ? unary<uint8_t, uint8_t>([](auto a) { return a; })
                          : of_type(t, [](auto v) -> Handler {
                              return unary<decltype(v), decltype(v)>([](auto a) { return a; });
                            });
      return;
    }
    // {parts} = whole, or whole = {parts}: operand 0 is the whole, the rest the parts.
    const bool apart = to.size() > 1;
    const auto& parts = apart ? to : from;
    i.count = int(parts.size());
    use(i, 0, apart ? from[0] : to[0], bytes);
    for (int n = 0; n < i.count; ++n) use(i, n + 1, parts[size_t(n)], bytes / i.count);
    const auto handler = [](auto apart) -> Handler {
      return [](Warp& w, const Instruction& i, uint32_t mask) {
        const int bytes = i.width[0], part = bytes / i.count;
        each(mask, [&](int l) {
          for (int n = 0; n < i.count; ++n) {
            unsigned char* whole = w.at<unsigned char>(i.operand[0]) + l * bytes + n * part;
            unsigned char* one = w.at<unsigned char>(i.operand[n + 1]) + l * part;
            decltype(apart)::value ? std::memcpy(one, whole, size_t(part))
                                   : std::memcpy(whole, one, size_t(part));
          }
        });
      };
    };
    i.run = apart ? handler(std::true_type{}) : handler(std::false_type{});
  }

  void convert(Instruction& i, const std::vector<std::string>& op,
               const std::vector<std::string>& o) {
    const std::string& to = op[op.size() - 2];
    const std::string& from = op.back();
    std::string way;
    for (size_t n = 1; n + 2 < op.size(); ++n) way += op[n];
    const auto set = [&](Handler handler, int d, int s) {
      i.run = handler;
      use(i, 0, o.at(0), d, false);
      use(i, 1, o.at(1), s, false);
    };
    if (to == "f32" && from == "f16") {
      set(unary<float, fastda::f16>([](fastda::f16 v) { return fastda::load(&v); }), 4, 2);
    } else if (to == "bf16" && from == "f32" && way == "rn") {
      set(unary<fastda::bf16, float>([](float v) {
            fastda::bf16 h;
            fastda::store(&h, v);
            return h;
          }),
          2, 4);
    } else if (to == "f16" && from == "f32" && way == "rn") {
      set(unary<fastda::f16, float>([](float v) {
            fastda::f16 h;
            fastda::store(&h, v);
            return h;
          }),
          2, 4);
    } else if (to == "tf32" && from == "f32" && way == "rna") {
      // To nearest, halves away from zero; NaN and infinities stay.
      set(unary<uint32_t, uint32_t>([](uint32_t v) {
            if ((v & 0x7f800000u) == 0x7f800000u) return v & 0x7fffffu ? 0x7fffffffu : v;
            return (v + 0x1000u) & ~0x1fffu;
          }),
          4, 4);
    } else if (to == "f32" && from == "f32" && way == "sat") {
      set(unary<float, float>([](float v) { return v > 0 ? (v < 1 ? v : 1.0f) : 0.0f; }), 4, 4);
    } else if (way == "" || way == "rn") {
      const bool floats = to[0] == 'f' || from[0] == 'f';
      if (from[0] == 'f' && to[0] != 'f') return;  // needs a way of rounding
      i.run = of_type(from, [&](auto s) -> Handler {
        using S = decltype(s);
        return of_type(to, [&](auto d) -> Handler {
          using D = decltype(d);
          if (floats) return unary<D, S>([](S v) { return D(v); });
          return [](Warp& w, const Instruction& i, uint32_t mask) {
            each(mask, [&](int l) {
              put(w, i.operand[0], i.width[0], l, D(take<S>(w, i.operand[1], i.width[1], l)));
            });
          };
        });
      });
      use(i, 0, o.at(0), bytes_of(to), floats);
      use(i, 1, o.at(1), bytes_of(from), floats);
    }
  }

  void compare(Instruction& i, const std::vector<std::string>& op,
               const std::vector<std::string>& o) {
    const std::string &how = op.at(1), &t = op.back();
    if (op.size() != 3) return;
    i.run = of_type(t, [&](auto v) -> Handler {
      using T = decltype(v);
      const auto with = [](auto f) { return binary<uint8_t, T>(f); };
      if (how == "eq") return with([](T a, T b) { return a == b; });
      if (how == "lt" || how == "lo") return with([](T a, T b) { return a < b; });
      if (how == "le" || how == "ls") return with([](T a, T b) { return a <= b; });
      if (how == "gt" || how == "hi") return with([](T a, T b) { return a > b; });
      if (how == "ge" || how == "hs") return with([](T a, T b) { return a >= b; });
      if (how == "ne") return with([](T a, T b) { return a < b || a > b; });  // ordered
      // With u, true where one is not a number.
      if (how == "equ") return with([](T a, T b) { return !(a < b || a > b); });
      if (how == "neu") return with([](T a, T b) { return !(a == b); });
      if (how == "ltu") return with([](T a, T b) { return !(a >= b); });
      if (how == "leu") return with([](T a, T b) { return !(a > b); });
      if (how == "gtu") return with([](T a, T b) { return !(a <= b); });
      if (how == "geu") return with([](T a, T b) { return !(a < b); });
      if (how == "nan") return with([](T a, T b) { return a != a || b != b; });
      return nullptr;
    });
    const std::string& d = o.at(0);
    if (d.find('|') != std::string::npos) i.run = nullptr;
    use(i, 0, d, 1);
    use(i, 1, o.at(1), bytes_of(t));
    use(i, 2, o.at(2), bytes_of(t));
  }

  void arithmetic(Instruction& i, const std::vector<std::string>& op,
                  const std::vector<std::string>& o) {
    const std::string &base = op[0], &t = op.back();
    const auto is = [&](const char* part) {
      return std::find(op.begin(), op.end(), part) != op.end();
    };
    const int bytes = bytes_of(t);
    int widths[5] = {bytes, bytes, bytes, bytes, bytes};
    if (t == "pred") {
      if (base == "and") i.run = binary<uint8_t, uint8_t>([](int a, int b) { return a && b; });
      if (base == "or") i.run = binary<uint8_t, uint8_t>([](int a, int b) { return a || b; });
      if (base == "xor") i.run = binary<uint8_t, uint8_t>([](int a, int b) { return !a != !b; });
      if (base == "not") i.run = unary<uint8_t, uint8_t>([](int a) { return !a; });
    } else if (t == "f32" && is("rm") && base == "fma") {
      i.run = ternary<float, float>([](float a, float b, float c) {
        return rounded<FE_DOWNWARD>([&] { return std::fma(a, b, c); });
      });
    } else if (t == "f32" && is("rz") && base == "add") {
      i.run = binary<float, float>([](float a, float b) {
        volatile float x = a, y = b;  // not before the mode is set
        return rounded<FE_TOWARDZERO>([&] { return x + y; });
      });
    } else if (base == "ex2" && is("approx") && t == "f32") {
      i.run = unary<float, float>([](float a) {
        const auto v = float(std::exp2(double(std::fabs(a) < 0x1p-126f ? 0.0f : a)));
        return std::fabs(v) < 0x1p-126f ? 0.0f : v;
      });
    } else if (base == "rcp" && is("approx") && t == "f64") {  // 20 bits of the mantissa
      i.run = unary<double, double>([](double a) {
        return std::bit_cast<double>(std::bit_cast<uint64_t>(1 / a) & 0xffffffff00000000u);
      });
    } else if (t[0] == 'f' && !is("approx")) {
      for (const char* mode : {"rz", "rm", "rp", "sat"})
        if (is(mode)) return;
      i.run = of_float(t, [&](auto v) -> Handler {
        using T = decltype(v);
        if (base == "add") return binary<T, T>([](T a, T b) { return a + b; });
        if (base == "sub") return binary<T, T>([](T a, T b) { return a - b; });
        if (base == "mul") return binary<T, T>([](T a, T b) { return a * b; });
        if (base == "div") return binary<T, T>([](T a, T b) { return a / b; });
        if (base == "fma") return ternary<T, T>([](T a, T b, T c) { return std::fma(a, b, c); });
        if (base == "rcp") return unary<T, T>([](T a) { return 1 / a; });
        if (base == "sqrt") return unary<T, T>([](T a) { return std::sqrt(a); });
        if (base == "min") return binary<T, T>([](T a, T b) { return std::fmin(a, b); });
        if (base == "max") return binary<T, T>([](T a, T b) { return std::fmax(a, b); });
        if (base == "neg") return unary<T, T>([](T a) { return -a; });
        if (base == "abs") return unary<T, T>([](T a) { return std::fabs(a); });
        return nullptr;
      });
    } else if (t[0] != 'f') {
      if (base == "shl" || base == "shr") widths[2] = 4;
      if (is("wide")) widths[0] = widths[3] = 2 * bytes;
      if (base == "bfi") widths[3] = widths[4] = 4;
      i.run = of_integer(t, [&](auto v) { return integer<decltype(v)>(op); });
    }
    if (i.run == nullptr) return;
    for (size_t n = 0; n < o.size(); ++n) use(i, int(n), o[n], widths[n]);
  }

  template <typename T>
  static Handler integer(const std::vector<std::string>& op) {
    using U = std::make_unsigned_t<T>;
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    using Twice = std::conditional_t<sizeof(T) == 2,
                                     std::conditional_t<std::is_signed_v<T>, int32_t, uint32_t>,
                                     std::conditional_t<std::is_signed_v<T>, int64_t, uint64_t>>;
    constexpr unsigned bits = sizeof(T) * 8;
    const std::string &base = op[0], &part = op.size() > 2 ? op[1] : op[0];
    if (base == "add") return binary<T, T>([](T a, T b) { return T(U(a) + U(b)); });
    if (base == "sub") return binary<T, T>([](T a, T b) { return T(U(a) - U(b)); });
    if (base == "and") return binary<T, T>([](T a, T b) { return T(a & b); });
    if (base == "or") return binary<T, T>([](T a, T b) { return T(a | b); });
    if (base == "xor") return binary<T, T>([](T a, T b) { return T(a ^ b); });
    if (base == "not") return unary<T, T>([](T a) { return T(~a); });
    if (base == "neg") return unary<T, T>([](T a) { return T(U(0) - U(a)); });
    if (base == "abs") return unary<T, T>([](T a) { return a < T(0) ? T(U(0) - U(a)) : a; });
    if (base == "min") return binary<T, T>([](T a, T b) { return std::min(a, b); });
    if (base == "max") return binary<T, T>([](T a, T b) { return std::max(a, b); });
    // By zero: all ones, and the dividend.
    if (base == "div")
      return binary<T, T>([](T a, T b) { return b == 0 ? T(-1) : T(Wide(a) / Wide(b)); });
    if (base == "rem")
      return binary<T, T>([](T a, T b) { return b == 0 ? a : T(Wide(a) % Wide(b)); });
    if (base == "shl")
      return binary<T, T, uint32_t>([](T a, uint32_t n) { return n < bits ? T(U(a) << n) : T(0); });
    if (base == "shr")
      return binary<T, T, uint32_t>(
          [](T a, uint32_t n) { return n < bits ? T(a >> n) : T(a < T(0) ? -1 : 0); });
    if (base == "mul" && part == "lo")
      return binary<T, T>([](T a, T b) { return T(U(Wide(a) * Wide(b))); });
    if (base == "mul" && part == "hi")
      return binary<T, T>([](T a, T b) { return T(Wide(a) * Wide(b) >> bits); });
    if (base == "mul" && part == "wide" && bits < 64)
      return binary<Twice, T>([](T a, T b) { return Twice(a) * Twice(b); });
    if (base == "mad" && part == "lo")
      return ternary<T, T>([](T a, T b, T c) { return T(U(Wide(a) * Wide(b) + Wide(c))); });
    if (base == "mad" && part == "wide" && bits < 64)
      return ternary<Twice, T, Twice>([](T a, T b, Twice c) {
        return Twice(std::make_unsigned_t<Twice>(Twice(a) * Twice(b)) +
                     std::make_unsigned_t<Twice>(c));
      });
    if (base == "bfi" && bits >= 32)
      return [](Warp& w, const Instruction& i, uint32_t mask) {
        each(mask, [&](int l) {
          const U a = w.at<U>(i.operand[1])[l], b = w.at<U>(i.operand[2])[l];
          const uint32_t from = w.at<uint32_t>(i.operand[3])[l] & 0xff;
          const uint32_t n = w.at<uint32_t>(i.operand[4])[l] & 0xff;
          const U ones = n < bits ? (U(1) << n) - 1 : ~U(0);
          const U field = from < bits ? ones << from : U(0);
          w.at<U>(i.operand[0])[l] = (b & ~field) | (from < bits ? a << from & field : U(0));
        });
      };
    return nullptr;
  }

  Kernel& k_;
  const Functions& functions_;
  std::string dynamic_, prefix_, end_;
  std::map<std::string, Register> registers_;
  std::map<std::string, int> widths_;
  std::map<std::string, uint64_t> symbols_;
  std::set<std::string> frame_;
  std::map<std::string, int> labels_;
  std::vector<std::pair<int, std::string>> jumps_;
  std::vector<int> dynamic_uses_;
  int calls_ = 0;
};

Functions entries, functions;
std::string dynamic_symbol;
std::map<std::string, Kernel> kernels;

Kernel& kernel_of(const std::string& name) {
  auto [found, fresh] = kernels.try_emplace(name);
  Kernel& kernel = found->second;
  if (!fresh) return kernel;
  kernel.name = name;
  if (!entries.contains(name)) throw Fault("no such kernel in the PTX: " + name);
  try {
    Compiler(kernel, functions, dynamic_symbol).compile(entries[name]);
  } catch (const std::exception& e) {
    kernel.error = e.what();
  }
  return kernel;
}

}  // namespace

void load(const std::string& text) {
  entries.clear(), functions.clear(), kernels.clear();
  std::string plain;  // without comments
  for (size_t at = 0; at < text.size();) {
    const size_t comment = std::min(text.find("//", at), text.size());
    plain.append(text, at, comment - at);
    at = comment < text.size() ? std::min(text.find('\n', comment), text.size()) : comment;
  }
  const size_t dynamic = plain.find(".extern .shared");
  if (dynamic != std::string::npos) {
    const size_t bracket = plain.find("[]", dynamic), name = plain.rfind(' ', bracket) + 1;
    dynamic_symbol = plain.substr(name, bracket - name);
  }
  for (size_t at = 0;;) {
    const size_t entry = plain.find(".entry ", at), function = plain.find(".func ", at);
    const size_t begin = std::min(entry, function);
    if (begin == std::string::npos) return;
    const size_t open = plain.find('{', begin), end = plain.find(';', begin);
    if (end < open) {  // declared only
      at = end;
      continue;
    }
    size_t close = open;
    for (int depth = 0;; ++close) {
      depth += (plain[close] == '{') - (plain[close] == '}');
      if (depth == 0) break;
    }
    const std::string header = plain.substr(begin, open - begin);
    const size_t list = header.rfind('(');
    const size_t name = header.find_last_of(" ,)", list - 1) + 1;
    Function found{header.substr(0, header.rfind(')') + 1),
                   plain.substr(open + 1, close - open - 1)};
    (begin == entry ? entries : functions)[header.substr(name, list - name)] = std::move(found);
    at = close;
  }
}

bool loaded() { return !entries.empty(); }

void run(const std::string& name, dim3 grid, unsigned threads, size_t shared_bytes,
         const std::vector<unsigned char>& parameters, uint64_t seed) {
  Kernel& kernel = kernel_of(name);
  if (!kernel.error.empty()) throw Fault(name + ": " + kernel.error);
  if (int(parameters.size()) < kernel.parameter_bytes)
    throw Fault(name + ": fewer parameters than the kernel reads");
  Random random{seed};
  Shared shared(size_t(kernel.static_shared) + shared_bytes);
  std::vector<uint32_t> order(grid.x * grid.y);
  for (uint32_t i = 0; i < order.size(); ++i) order[i] = i;
  for (uint32_t i = uint32_t(order.size()); i > 1; --i)
    std::swap(order[i - 1], order[random.below(i)]);
  std::vector<Warp> warps(threads / lanes);
  for (uint32_t b : order) {
    shared.clear();
    Block block{kernel, shared, parameters, random, int((seed + b) % 3)};
    for (size_t n = 0; n < warps.size(); ++n) {
      Warp& w = warps[n];
      std::vector<unsigned char> file = std::move(w.file);
      w = Warp{&block, int(n), std::move(file), {}};
      w.file.assign(size_t(kernel.file_bytes), 0xa5);
      w.frame.assign(size_t(kernel.frame_bytes * lanes), 0xa5);
      for (const auto& c : kernel.constants)
        for (int l = 0; l < lanes; ++l)
          std::memcpy(w.at<unsigned char>(c.at) + l * c.width, &c.value, c.width);
      for (int l = 0; l < lanes; ++l) {
        w.at<uint32_t>(kernel.thread)[l] = uint32_t(n) * lanes + uint32_t(l);
        w.at<uint32_t>(kernel.block_x)[l] = b % grid.x;
        w.at<uint32_t>(kernel.block_y)[l] = b / grid.x;
        w.at<uint32_t>(kernel.grid_x)[l] = grid.x;
        w.at<uint32_t>(kernel.grid_y)[l] = grid.y;
      }
    }
    try {
      std::vector<Warp*> running;
      for (Warp& w : warps) running.push_back(&w);
      while (!running.empty()) {
        for (size_t n = running.size(); n > 1; --n)
          std::swap(running[n - 1], running[random.below(uint32_t(n))]);
        size_t waiting = 0;
        for (Warp* w : running) waiting += w->run();
        if (waiting == 0) break;
        if (waiting < running.size())
          throw Fault("no warp can go on: some have ended, others wait at a barrier");
        shared.barrier();
      }
    } catch (const Fault& f) {
      throw Fault(name + ": block " + std::to_string(b) + ": " + f.what());
    }
  }
}

std::map<std::string, std::map<int, Line>> executed() {
  std::map<std::string, std::map<int, Line>> found;
  for (const auto& [name, kernel] : kernels)
    for (size_t i = 0; i < kernel.counts.size(); ++i)
      if (kernel.counts[i].runs) found[name][int(i)] = {kernel.code[i].text, kernel.counts[i]};
  return found;
}

void forget() {
  for (auto& [name, kernel] : kernels)
    std::fill(kernel.counts.begin(), kernel.counts.end(), Count{});
}

void skip(const std::string& name, int instruction) {
  for (auto& [its, kernel] : kernels)
    for (Instruction& i : kernel.code) i.skipped = false;
  if (instruction >= 0) kernel_of(name).code.at(size_t(instruction)).skipped = true;
}

}  // namespace cuda_host::ptx
