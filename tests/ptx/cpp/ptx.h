// A PTX kernel as the emulator runs it: parameters, shared variables, and instructions whose operands are slots of a
// register file. Constants and special registers are slots too, filled when a warp starts.
#pragma once
#include <cstdint>
#include <map>
#include <stdexcept>
#include <string>
#include <vector>

namespace ptx {

// What is wrong with a kernel, or what the emulator does not know: either ends the launch.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

constexpr int LANES = 32;
constexpr uint64_t PARAMETERS = 0x7000000000000000;  // where generic addresses of parameters start

enum class Kind : uint8_t { None, Predicate, Bits, Unsigned, Signed, Float, Bfloat };

struct Type {
  Kind kind = Kind::None;
  uint8_t bytes = 0;
  bool packed = false;  // two halves in 32 bits

  bool operator==(const Type& other) const {
    return kind == other.kind && bytes == other.bytes && packed == other.packed;
  }
};

struct Step;
using Handler = void (*)(Step&);

struct Instruction {
  std::string text;
  int line = 0;                     // of the source, by the last .loc
  std::string name;                 // opcode and modifiers without types and vector widths: "ld.global.cg"
  std::vector<Type> types;          // in their order
  std::vector<std::string> shapes;  // m64n256k16, x4
  int width = 1;                    // of v2 and v4
  int guard = -1;                   // slot of the predicate, or -1
  bool guard_inverted = false;
  std::vector<int> slots;        // of all operands, in their order; an address gives its base, then its coordinates
  std::vector<int> operands;     // where each operand's slots begin
  std::vector<int64_t> offsets;  // of the addresses
  int outputs = 0;               // how many of the slots are written
  int target = -1;               // of a branch
  bool convergent = false;       // all lanes of a warp execute it together
  Handler execute = nullptr;

  int slot(int operand) const { return slots[operands[operand]]; }
  int count(int operand) const {
    const int end = operand + 1 < static_cast<int>(operands.size()) ? operands[operand + 1] : slots.size();
    return end - operands[operand];
  }
  Type type() const { return types.empty() ? Type{} : types[0]; }
};

struct Parameter {
  int offset, bytes;
};

enum class Special : int {
  Thread,
  Threads,
  BlockX,
  BlockY,
  BlockZ,
  BlocksX,
  BlocksY,
  BlocksZ,
  Lane,
  Warp,
  Zero,
  One,
  ClusterRank,
  ClusterBlocks
};

struct Kernel {
  std::string name;
  std::vector<Parameter> parameters;
  int parameter_bytes = 0;
  int shared_bytes = 0;  // of variables of fixed size
  int num_slots = 0;
  std::map<uint64_t, int> constants;  // value to slot
  std::map<Special, int> specials;    // to slot
  std::vector<Instruction> code;
};

// The entry `name` of a module's text. `contract`: as ptxas does by default, a product that is used once, by a sum,
// becomes a fused multiply-add.
Kernel parse(const std::string& text, const std::string& name, bool contract);

// Finds the instruction's handler and outputs, or throws: an unknown opcode, modifier or type is never guessed.
void decode(Instruction& instruction);

}  // namespace ptx
