// From PTX text to a Kernel.
#include <algorithm>
#include <cctype>
#include <cstring>
#include <set>

#include "ptx.h"

namespace ptx {
namespace {

const std::map<std::string, Type> TYPES = {
    {"pred", {Kind::Predicate, 1}},   {"b8", {Kind::Bits, 1}},      {"b16", {Kind::Bits, 2}},
    {"b32", {Kind::Bits, 4}},         {"b64", {Kind::Bits, 8}},     {"u8", {Kind::Unsigned, 1}},
    {"u16", {Kind::Unsigned, 2}},     {"u32", {Kind::Unsigned, 4}}, {"u64", {Kind::Unsigned, 8}},
    {"s8", {Kind::Signed, 1}},        {"s16", {Kind::Signed, 2}},   {"s32", {Kind::Signed, 4}},
    {"s64", {Kind::Signed, 8}},       {"f16", {Kind::Float, 2}},    {"f32", {Kind::Float, 4}},
    {"f64", {Kind::Float, 8}},        {"bf16", {Kind::Bfloat, 2}},  {"bf16x2", {Kind::Bfloat, 2, true}},
    {"f16x2", {Kind::Float, 2, true}}};

const std::map<std::string, Special> SPECIALS = {{"%tid.x", Special::Thread},
                                                 {"%tid.y", Special::Zero},
                                                 {"%tid.z", Special::Zero},
                                                 {"%ntid.x", Special::Threads},
                                                 {"%ntid.y", Special::One},
                                                 {"%ntid.z", Special::One},
                                                 {"%ctaid.x", Special::BlockX},
                                                 {"%ctaid.y", Special::BlockY},
                                                 {"%ctaid.z", Special::BlockZ},
                                                 {"%nctaid.x", Special::BlocksX},
                                                 {"%nctaid.y", Special::BlocksY},
                                                 {"%nctaid.z", Special::BlocksZ},
                                                 {"%laneid", Special::Lane},
                                                 {"%warpid", Special::Warp},
                                                 {"%cluster_ctarank", Special::ClusterRank},
                                                 {"%cluster_nctarank", Special::ClusterBlocks}};

std::string trimmed(const std::string& s) {
  const size_t begin = s.find_first_not_of(" \t\r\n"), end = s.find_last_not_of(" \t\r\n");
  return begin == std::string::npos ? "" : s.substr(begin, end - begin + 1);
}

std::vector<std::string> words(const std::string& s, const char* separators) {
  std::vector<std::string> found;
  for (size_t at = 0; (at = s.find_first_not_of(separators, at)) != std::string::npos;) {
    const size_t end = std::min(s.find_first_of(separators, at), s.size());
    found.push_back(s.substr(at, end - at));
    at = end;
  }
  return found;
}

// At commas outside brackets and braces.
std::vector<std::string> operands_of(const std::string& s) {
  std::vector<std::string> found;
  std::string now;
  int depth = 0;
  for (const char c : s) {
    depth += (c == '[' || c == '{') - (c == ']' || c == '}');
    if (c == ',' && depth == 0) {
      found.push_back(trimmed(now));
      now.clear();
    } else {
      now += c;
    }
  }
  if (!trimmed(now).empty()) found.push_back(trimmed(now));
  return found;
}

std::string without_comments(const std::string& text) {
  std::string kept;
  for (size_t at = 0; at < text.size();) {
    const size_t comment = std::min(text.find("//", at), text.size());
    kept.append(text, at, comment - at);
    at = std::min(text.find('\n', comment), text.size());
  }
  return kept;
}

int rounded_up(int x, int multiple) { return (x + multiple - 1) / multiple * multiple; }

class Parser {
 public:
  Parser(const std::string& text, const std::string& name) : text_(without_comments(text)) {
    kernel_.name = name;
    const size_t entry = find_entry(name);
    declare_module_memory();
    const size_t open = text_.find('(', entry), close = text_.find(')', open);
    for (const auto& line : words(text_.substr(open + 1, close - open - 1), ",\n")) parameter(trimmed(line));
    scopes_.push_back({0, {}});
    at_ = text_.find('{', close) + 1;  // .reqntid, .maxntid and the like bind the launcher
    while (!scopes_.empty()) statement();
    resolve_branches();
  }
  Kernel take() { return std::move(kernel_); }

 private:
  struct Scope {
    int id;
    std::map<std::string, int> registers;
  };
  struct Branch {
    size_t instruction;
    std::string label;
    std::vector<int> scopes;
  };

  size_t find_entry(const std::string& name) const {
    for (size_t at = 0; (at = text_.find(".entry", at)) != std::string::npos; at += 6) {
      const size_t begin = text_.find_first_not_of(" \t\n", at + 6), end = text_.find_first_of("( \t\n", begin);
      if (text_.compare(begin, end - begin, name) == 0) return end;
    }
    throw Fault("no kernel " + name);
  }

  // The launch's dynamic shared memory starts at 0: no kernel here has variables of fixed size beside it.
  void declare_module_memory() {
    for (size_t at = 0; (at = text_.find(".extern .shared", at)) != std::string::npos; ++at) {
      const size_t end = text_.find('[', at), begin = text_.find_last_of(" \t", end) + 1;
      symbols_[text_.substr(begin, end - begin)] = 0;
      dynamic_ = true;
    }
  }

  void parameter(const std::string& line) {
    if (line.empty()) return;
    const auto parts = words(line, " \t");
    int align = 0, bytes = 0;
    for (size_t i = 1; i + 1 < parts.size(); ++i) {
      if (parts[i] == ".align" && !bytes)
        align = std::stoi(parts[++i]);
      else if (TYPES.count(parts[i].substr(1)) && !bytes)
        bytes = TYPES.at(parts[i].substr(1)).bytes;
    }
    std::string name = parts.back();
    const size_t bracket = name.find('[');
    if (bracket != std::string::npos) {
      bytes *= std::stoi(name.substr(bracket + 1));
      name.resize(bracket);
    }
    if (parts[0] != ".param" || bytes == 0) throw Fault("unknown parameter: " + line);
    const int offset = rounded_up(kernel_.parameter_bytes, align ? align : bytes);
    kernel_.parameters.push_back({offset, bytes});
    kernel_.parameter_bytes = offset + bytes;
    symbols_[name] = PARAMETERS + offset;
  }

  void statement() {
    at_ = text_.find_first_not_of(" \t\r\n", at_);
    if (at_ == std::string::npos) throw Fault("the text of " + kernel_.name + " ends early");
    const char c = text_[at_];
    if (c == '{') {
      scopes_.push_back({++num_scopes_, {}});
      ++at_;
    } else if (c == '}') {
      scopes_.pop_back();
      ++at_;
    } else if (c == ';') {
      ++at_;
    } else if (text_.compare(at_, 4, ".loc") == 0) {
      const size_t end = std::min(text_.find('\n', at_), text_.size());
      line_ = std::stoi(words(text_.substr(at_, end - at_), " \t").at(2));
      at_ = end;
    } else {
      const size_t end = text_.find(';', at_), colon = text_.find(':', at_);
      const std::string word = text_.substr(at_, std::min(text_.find_first_of(" \t\n;:{", at_), end) - at_);
      if (colon == at_ + word.size() && text_[colon + 1] != ':') {
        labels_[{scopes_.back().id, word}] = kernel_.code.size();
        at_ = colon + 1;
        return;
      }
      if (end == std::string::npos) throw Fault("statement without end in " + kernel_.name);
      const std::string body = trimmed(text_.substr(at_, end - at_));
      at_ = end + 1;
      if (word == ".reg")
        declare_registers(body);
      else if (word == ".shared")
        declare_shared(body);
      else if (word == ".pragma")
        return;
      else if (word[0] == '.')
        throw Fault("unknown directive: " + body);
      else
        instruction(body);
    }
  }

  void declare_registers(const std::string& body) {  // .reg .b32 %r<9> or .reg .b32 a, b
    const auto parts = words(body, " \t,");
    for (size_t i = 2; i < parts.size(); ++i) {
      const std::string& name = parts[i];
      const size_t range = name.find('<');
      if (range == std::string::npos) {
        scopes_.back().registers[name] = kernel_.num_slots++;
        continue;
      }
      const int count = std::stoi(name.substr(range + 1));
      for (int k = 0; k < count; ++k) {
        scopes_.back().registers[name.substr(0, range) + std::to_string(k)] = kernel_.num_slots++;
      }
    }
  }

  void declare_shared(const std::string& body) {  // .shared .align 8 .b8 name[64]
    if (dynamic_) throw Fault("shared variables of fixed size beside dynamic ones: " + body);
    const auto parts = words(body, " \t");
    if (parts.size() != 5 || parts[1] != ".align") throw Fault("unknown shared variable: " + body);
    const size_t bracket = parts[4].find('[');
    const int count = bracket == std::string::npos ? 1 : std::stoi(parts[4].substr(bracket + 1));
    const int offset = rounded_up(kernel_.shared_bytes, std::stoi(parts[2]));
    symbols_[parts[4].substr(0, bracket)] = offset;
    kernel_.shared_bytes = offset + count * TYPES.at(parts[3].substr(1)).bytes;
  }

  int constant(uint64_t value) {
    const auto found = kernel_.constants.find(value);
    if (found != kernel_.constants.end()) return found->second;
    return kernel_.constants[value] = kernel_.num_slots++;
  }

  int register_slot(const std::string& name) const {
    for (auto scope = scopes_.rbegin(); scope != scopes_.rend(); ++scope) {
      const auto found = scope->registers.find(name);
      if (found != scope->registers.end()) return found->second;
    }
    return -1;
  }

  int slot(const std::string& name) {
    if (name == "_") return kernel_.num_slots++;
    const int declared = register_slot(name);
    if (declared >= 0) return declared;
    const auto special = SPECIALS.find(name);
    if (special != SPECIALS.end()) {
      const auto [found, fresh] = kernel_.specials.try_emplace(special->second, kernel_.num_slots);
      kernel_.num_slots += fresh;
      return found->second;
    }
    const auto symbol = symbols_.find(name);
    if (symbol != symbols_.end()) return constant(symbol->second);
    const bool floating = name.size() > 2 && name[0] == '0' && std::strchr("fFdD", name[1]);
    if (floating) return constant(std::stoull(name.substr(2), nullptr, 16));
    if (std::isdigit(name[0])) return constant(std::stoull(name, nullptr, 0));
    if (name[0] == '-') return constant(std::stoll(name, nullptr, 0));
    throw Fault("unknown operand " + name);
  }

  void address(Instruction& i, const std::string& inside) {  // base, base+8, or a tensor map and coordinates
    const auto parts = operands_of(inside);
    const size_t sign = parts[0].find_first_of("+-", 1);
    i.slots.push_back(slot(trimmed(parts[0].substr(0, sign))));
    std::string offset = sign == std::string::npos ? "0" : parts[0].substr(sign);
    offset.erase(std::remove_if(offset.begin(), offset.end(), ::isspace), offset.end());
    i.offsets.push_back(std::stoll(offset[0] == '+' ? offset.substr(1) : offset, nullptr, 0));
    if (parts.size() > 2) throw Fault("unknown address [" + inside + "]");
    if (parts.size() == 2) list(i, parts[1]);
  }

  void list(Instruction& i, const std::string& braced) {
    if (braced.front() != '{' || braced.back() != '}') throw Fault("expected a list, got " + braced);
    for (const auto& name : operands_of(braced.substr(1, braced.size() - 2))) i.slots.push_back(slot(name));
  }

  void instruction(const std::string& body) {
    Instruction i;
    i.text = body.substr(0, 100);
    i.line = line_;
    std::string rest = body;
    if (rest[0] == '@') {
      const size_t end = rest.find_first_of(" \t");
      i.guard_inverted = rest[1] == '!';
      i.guard = slot(rest.substr(1 + i.guard_inverted, end - 1 - i.guard_inverted));
      rest = trimmed(rest.substr(end));
    }
    const size_t end = std::min(rest.find_first_of(" \t\n"), rest.size());
    modifiers(i, rest.substr(0, end));
    rest = trimmed(rest.substr(end));
    if (i.name == "bra" || i.name == "bra.uni") {
      std::vector<int> chain;
      for (const auto& scope : scopes_) chain.push_back(scope.id);
      branches_.push_back({kernel_.code.size(), rest, chain});
    } else {
      for (const auto& operand : operands_of(rest)) {
        i.operands.push_back(i.slots.size());
        const size_t bar = operand.find('|');
        if (operand[0] == '[') {
          address(i, operand.substr(1, operand.size() - 2));
        } else if (operand[0] == '{') {
          list(i, operand);
        } else if (bar != std::string::npos) {
          i.slots.push_back(slot(trimmed(operand.substr(0, bar))));
          i.slots.push_back(slot(trimmed(operand.substr(bar + 1))));
        } else {
          i.slots.push_back(slot(operand));
        }
      }
    }
    kernel_.code.push_back(std::move(i));
  }

  static void modifiers(Instruction& i, const std::string& opcode) {
    size_t at = 0;
    while (at <= opcode.size()) {
      const size_t end = std::min(opcode.find('.', at), opcode.size());
      const std::string word = opcode.substr(at, end - at);
      at = end + 1;
      const auto type = TYPES.find(word);
      const bool shape = !i.name.empty() && word.size() > 1 && std::strchr("mx", word[0]) && std::isdigit(word[1]);
      if (!i.name.empty() && type != TYPES.end())
        i.types.push_back(type->second);
      else if (word == "v2" || word == "v4")
        i.width = word[1] - '0';
      else if (shape)
        i.shapes.push_back(word);
      else
        i.name += (i.name.empty() ? "" : ".") + word;
    }
  }

  void resolve_branches() {
    for (const auto& branch : branches_) {
      int target = -1;
      for (const int scope : branch.scopes) {  // the innermost wins
        const auto found = labels_.find({scope, branch.label});
        if (found != labels_.end()) target = found->second;
      }
      if (target < 0) throw Fault("no label " + branch.label);
      kernel_.code[branch.instruction].target = target;
    }
  }

  std::string text_;
  Kernel kernel_;
  size_t at_ = 0;
  int line_ = 0, num_scopes_ = 0;
  bool dynamic_ = false;
  std::vector<Scope> scopes_;
  std::map<std::string, uint64_t> symbols_;
  std::map<std::pair<int, std::string>, int> labels_;
  std::vector<Branch> branches_;
};

// Within blocks without labels and branches.
void contract_products(Kernel& kernel) {
  std::vector<int> uses(kernel.num_slots), writes(kernel.num_slots);
  std::set<int> starts;
  for (const auto& i : kernel.code) {
    for (size_t k = 0; k < i.slots.size(); ++k) ++(static_cast<int>(k) < i.outputs ? writes : uses)[i.slots[k]];
    if (i.guard >= 0) ++uses[i.guard];
    starts.insert(i.target);
  }
  std::map<int, size_t> products;
  for (size_t at = 0; at < kernel.code.size(); ++at) {
    Instruction& i = kernel.code[at];
    if (starts.count(at) || i.target >= 0) products.clear();
    const bool floating = i.type().kind == Kind::Float && i.type().bytes >= 4 && i.guard < 0;
    if (!floating) continue;
    if (i.name == "mul" && uses[i.slots[0]] == 1 && writes[i.slots[0]] == 1 && writes[i.slots[1]] <= 1 &&
        writes[i.slots[2]] <= 1) {
      products[i.slots[0]] = at;
    } else if (i.name == "add" || i.name == "sub") {
      for (int side = 0; side < 2; ++side) {
        const auto found = products.find(i.slots[1 + side]);
        if (found == products.end() || !(kernel.code[found->second].type() == i.type())) continue;
        const auto& product = kernel.code[found->second].slots;
        const int other = i.slots[2 - side];
        i.name = i.name == "add" ? "fma.rn" : side == 0 ? "contracted.minus" : "contracted.from";
        i.slots = {i.slots[0], product[1], product[2], other};
        i.operands = {0, 1, 2, 3};
        decode(i);
        break;
      }
    }
  }
}

}  // namespace

Kernel parse(const std::string& text, const std::string& name, bool contract) {
  Kernel kernel = Parser(text, name).take();
  for (auto& i : kernel.code) decode(i);
  if (contract) contract_products(kernel);
  return kernel;
}

}  // namespace ptx
