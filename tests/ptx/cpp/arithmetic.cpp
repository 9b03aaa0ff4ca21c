// Moves, integer and floating-point arithmetic, comparisons, conversions.
//
// The multifunction unit's results (ex2, rsqrt, div.full, ...) are within 1 or 2 units in the last place on a GPU, and
// which is not documented: here each is moved by up to half its bound, drawn from its input's bits.
#include <cmath>
#include <limits>
#include <type_traits>

#include "machine.h"

namespace ptx {
namespace {

struct Bfloat {
  uint16_t bits;
};

float wide(Bfloat x) { return value_of<float>(static_cast<uint64_t>(x.bits) << 16); }
template <typename T>
T wide(T x) {
  return x;
}

template <typename T>
constexpr bool is_float =
    std::is_same_v<T, float> || std::is_same_v<T, double> || std::is_same_v<T, _Float16> || std::is_same_v<T, Bfloat>;

Bfloat rounded_bfloat(float x) {
  if (x != x) return {0x7fff};
  const uint32_t bits = bits_of(x);
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

_Float16 rounded_half(float x) { return x != x ? value_of<_Float16>(0x7fff) : static_cast<_Float16>(x); }

float flushed(float x) { return std::fabs(x) < std::numeric_limits<float>::min() ? std::copysign(0.f, x) : x; }
double flushed(double x) { return x; }

// x, whose bound is `ulps` units in the last place; what float32 holds exactly stays, as ex2(0) = 1.
float approximate(double x, double ulps, uint64_t key) {
  const float rounded = static_cast<float>(x);
  if (rounded == x || !std::isfinite(rounded)) return rounded;
  uint64_t hash = key * 0x9E3779B97F4A7C15;
  hash = (hash ^ hash >> 29) * 0xBF58476D1CE4E5B9;
  const double unit = static_cast<double>((hash ^ hash >> 32) >> 11) / (1ull << 52) - 1;
  return static_cast<float>(x * (1 + ulps * unit * 0x1p-25));
}

// Calls v with a value of the type that the instruction names.
template <typename V>
Handler integers(Type t, V v) {
  const bool negative = t.kind == Kind::Signed;
  if (t.packed || t.kind == Kind::Predicate || t.kind == Kind::Float || t.kind == Kind::Bfloat) return nullptr;
  if (t.bytes == 1) return negative ? v(int8_t{}) : v(uint8_t{});
  if (t.bytes == 2) return negative ? v(int16_t{}) : v(uint16_t{});
  if (t.bytes == 4) return negative ? v(int32_t{}) : v(uint32_t{});
  if (t.bytes == 8) return negative ? v(int64_t{}) : v(uint64_t{});
  return nullptr;
}

template <typename V>
Handler floats(Type t, V v) {
  if (t.packed || t.kind != Kind::Float) return nullptr;
  if (t.bytes == 4) return v(float{});
  if (t.bytes == 8) return v(double{});
  return nullptr;
}

template <typename V>
Handler numbers(Type t, V v) {
  if (t.packed) return nullptr;
  if (t.kind == Kind::Bfloat) return v(Bfloat{});
  if (t.kind == Kind::Float && t.bytes == 2) return v(_Float16{});
  if (Handler h = floats(t, v)) return h;
  return integers(t, v);
}

Handler known(const Instruction& i, Handler h) {
  if (!h) unknown(i);
  return h;
}

template <typename T, typename F, bool FTZ>
void map1(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1);
  s.each([=](int l) {
    if constexpr (FTZ)
      out[l] = bits_of(flushed(F{}(flushed(value_of<T>(a[l])))));
    else
      out[l] = bits_of(F{}(value_of<T>(a[l])));
  });
}

template <typename T, typename F, bool FTZ>
void map2(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2);
  s.each([=](int l) {
    if constexpr (FTZ)
      out[l] = bits_of(flushed(F{}(flushed(value_of<T>(a[l])), flushed(value_of<T>(b[l])))));
    else
      out[l] = bits_of(F{}(value_of<T>(a[l]), value_of<T>(b[l])));
  });
}

template <typename T, typename F, bool FTZ>
void map3(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2), *c = s.nth(3);
  s.each([=](int l) {
    const T x = value_of<T>(a[l]), y = value_of<T>(b[l]), z = value_of<T>(c[l]);
    if constexpr (FTZ)
      out[l] = bits_of(flushed(F{}(flushed(x), flushed(y), flushed(z))));
    else
      out[l] = bits_of(F{}(x, y, z));
  });
}

// Integers wrap.
template <typename T>
using Wrapping = typename std::conditional_t<std::is_integral_v<T>, std::make_unsigned<T>, std::common_type<T>>::type;

struct Add {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wrapping<T>>(a) + static_cast<Wrapping<T>>(b));
  }
};
struct Sub {
  template <typename T>
  T operator()(T a, T b) const {
    return static_cast<T>(static_cast<Wrapping<T>>(a) - static_cast<Wrapping<T>>(b));
  }
};
struct Mul {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (sizeof(T) == 2)
      return static_cast<T>(static_cast<uint32_t>(a) * static_cast<uint32_t>(b));
    else
      return static_cast<T>(static_cast<Wrapping<T>>(a) * static_cast<Wrapping<T>>(b));
  }
};
struct MulHigh {
  template <typename T>
  T operator()(T a, T b) const {
    using Wide = std::conditional_t<std::is_signed_v<T>, __int128, unsigned __int128>;
    return static_cast<T>(static_cast<Wide>(a) * static_cast<Wide>(b) >> (8 * sizeof(T)));
  }
};
struct MulAdd {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return Add{}(Mul{}(a, b), c);
  }
};
struct Fma {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, c);
  }
};
struct ProductMinus {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return std::fma(a, b, -c);
  }
};
struct FromProduct {
  template <typename T>
  T operator()(T a, T b, T c) const {
    return std::fma(-a, b, c);
  }
};
struct Div {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (std::is_integral_v<T>) {
      if (b == 0) throw Fault("integer division by zero");
      if (std::is_signed_v<T> && b == static_cast<T>(-1)) return Sub{}(T{}, a);
    }
    return a / b;
  }
};
struct Rem {
  template <typename T>
  T operator()(T a, T b) const {
    if (b == 0) throw Fault("integer division by zero");
    if (std::is_signed_v<T> && b == static_cast<T>(-1)) return 0;
    return a % b;
  }
};
struct Min {  // of a number and NaN, the number
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) {
      if (a != a) return b;
      if (b != b) return a;
      return a < b || (a == b && std::signbit(a)) ? a : b;
    }
    return a < b ? a : b;
  }
};
struct Max {
  template <typename T>
  T operator()(T a, T b) const {
    if constexpr (is_float<T>) {
      if (a != a) return b;
      if (b != b) return a;
      return a > b || (a == b && !std::signbit(a)) ? a : b;
    }
    return a > b ? a : b;
  }
};
struct MaxNaN {
  float operator()(float a, float b) const { return a != a || b != b ? value_of<float>(0x7fffffff) : Max{}(a, b); }
};
struct Neg {
  template <typename T>
  T operator()(T a) const {
    if constexpr (std::is_integral_v<T>) return Sub{}(T{}, a);
    return -a;
  }
};
struct Abs {
  template <typename T>
  T operator()(T a) const {
    if constexpr (is_float<T>) return std::fabs(a);
    return a < 0 ? Sub{}(T{}, a) : a;
  }
};
struct And {
  template <typename T>
  T operator()(T a, T b) const {
    return a & b;
  }
};
struct Or {
  template <typename T>
  T operator()(T a, T b) const {
    return a | b;
  }
};
struct Xor {
  template <typename T>
  T operator()(T a, T b) const {
    return a ^ b;
  }
};
struct Not {
  template <typename T>
  T operator()(T a) const {
    return ~a;
  }
};
struct CountBits {
  template <typename T>
  T operator()(T a) const {
    return __builtin_popcountll(a);
  }
};
struct Sqrt {
  template <typename T>
  T operator()(T a) const {
    return std::sqrt(a);
  }
};
struct Exp2 {
  float operator()(float a) const { return approximate(std::exp2(static_cast<double>(a)), 2, bits_of(a)); }
};
struct Log2 {
  float operator()(float a) const { return approximate(std::log2(static_cast<double>(a)), 2, bits_of(a)); }
};
// Of a double, the flushing instructions give the upper half.
double upper_half(double x) { return std::isfinite(x) ? value_of<double>(bits_of(x) & 0xffffffff00000000) : x; }
struct Rcp {
  float operator()(float a) const { return approximate(1 / static_cast<double>(a), 1, bits_of(a)); }
  double operator()(double a) const { return upper_half(1 / a); }
};
struct Rsqrt {
  float operator()(float a) const { return approximate(1 / std::sqrt(static_cast<double>(a)), 2, bits_of(a)); }
  double operator()(double a) const { return 1 / std::sqrt(a); }
};
struct DivFull {
  float operator()(float a, float b) const {
    return approximate(static_cast<double>(a) / b, 2, bits_of(a) * 31 + bits_of(b));
  }
};

template <typename F, bool FTZ = false>
Handler float1(const Instruction& i) {
  return known(i, floats(i.type(), [](auto x) -> Handler { return map1<decltype(x), F, FTZ>; }));
}
template <typename F, bool FTZ = false>
Handler float2(const Instruction& i) {
  return known(i, floats(i.type(), [](auto x) -> Handler { return map2<decltype(x), F, FTZ>; }));
}
template <typename F, bool FTZ = false>
Handler float3(const Instruction& i) {
  return known(i, floats(i.type(), [](auto x) -> Handler { return map3<decltype(x), F, FTZ>; }));
}
template <typename F>
Handler single2(const Instruction& i) {
  if (!(i.type() == Type{Kind::Float, 4})) unknown(i);
  return map2<float, F, false>;
}
template <typename F>
Handler single1(const Instruction& i) {
  if (!(i.type() == Type{Kind::Float, 4})) unknown(i);
  return map1<float, F, false>;
}
template <typename F, bool FTZ = true>
Handler single1_flushed(const Instruction& i) {
  if (!(i.type() == Type{Kind::Float, 4})) unknown(i);
  return map1<float, F, FTZ>;
}
template <typename F>
Handler integer1(const Instruction& i) {
  return known(i, integers(i.type(), [](auto x) -> Handler { return map1<decltype(x), F, false>; }));
}
template <typename F>
Handler integer2(const Instruction& i) {
  return known(i, integers(i.type(), [](auto x) -> Handler { return map2<decltype(x), F, false>; }));
}
template <typename F>
Handler integer3(const Instruction& i) {
  return known(i, integers(i.type(), [](auto x) -> Handler { return map3<decltype(x), F, false>; }));
}
template <typename F>
Handler any1(const Instruction& i) {
  return i.type().kind == Kind::Float ? float1<F>(i) : integer1<F>(i);
}
template <typename F>
Handler any2(const Instruction& i) {
  return i.type().kind == Kind::Float ? float2<F>(i) : integer2<F>(i);
}
template <typename F>
Handler bits2(const Instruction& i) {
  return i.type().kind == Kind::Predicate ? map2<uint8_t, F, false> : integer2<F>(i);
}

void not_predicate(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1);
  s.each([=](int l) { out[l] = !(a[l] & 1); });
}
Handler bits_not(const Instruction& i) { return i.type().kind == Kind::Predicate ? not_predicate : integer1<Not>(i); }

Handler count_bits(const Instruction& i) {
  if (i.type().bytes != 4) unknown(i);
  return map1<uint32_t, CountBits, false>;
}

template <typename T, typename W>
void wide_product(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2);
  uint64_t* c = s.i.slots.size() > 3 ? s.nth(3) : nullptr;
  s.each([=](int l) {
    const W product = static_cast<W>(static_cast<W>(value_of<T>(a[l])) * static_cast<W>(value_of<T>(b[l])));
    out[l] = bits_of(Add{}(product, c ? value_of<W>(c[l]) : W{}));
  });
}
Handler wide(const Instruction& i) {
  const Type t = i.type();
  if (t.bytes == 4) return t.kind == Kind::Signed ? wide_product<int32_t, int64_t> : wide_product<uint32_t, uint64_t>;
  if (t.bytes == 2) return t.kind == Kind::Signed ? wide_product<int16_t, int32_t> : wide_product<uint16_t, uint32_t>;
  unknown(i);
}

template <typename T, bool LEFT>
void shift(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2);
  s.each([=](int l) {
    const uint32_t by = b[l], most = 8 * sizeof(T);
    const T x = value_of<T>(a[l]);
    if (LEFT)
      out[l] = by >= most ? 0 : bits_of(static_cast<T>(static_cast<Wrapping<T>>(x) << by));
    else
      out[l] = bits_of(static_cast<T>(by >= most ? (std::is_signed_v<T> && x < 0 ? -1 : 0) : x >> by));
  });
}
template <bool LEFT>
Handler shifts(const Instruction& i) {
  return known(i, integers(i.type(), [](auto x) -> Handler { return shift<decltype(x), LEFT>; }));
}

template <typename T>
void extract(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2), *c = s.nth(3);
  s.each([=](int l) {
    const int begin = b[l] & 255, length = c[l] & 255, most = 8 * sizeof(T);
    if (length == 0 || begin + length > most) throw Fault("a bit field outside its register is not known");
    const auto high = static_cast<T>(static_cast<Wrapping<T>>(value_of<T>(a[l])) << (most - begin - length));
    out[l] = bits_of(static_cast<T>(high >> (most - length)));  // signed fields carry their sign
  });
}
Handler extracts(const Instruction& i) {
  if (i.type().bytes < 4) unknown(i);
  return known(i, integers(i.type(), [](auto x) -> Handler { return extract<decltype(x)>; }));
}

void insert(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2), *position = s.nth(3), *length = s.nth(4);
  const int width = 8 * s.i.type().bytes;
  s.each([=](int l) {
    const int at = position[l] & 255, n = length[l] & 255;
    const uint64_t field = (n < 64 ? uint64_t(1) << n : 0) - 1;
    const uint64_t all = at < 64 ? (b[l] & ~(field << at)) | (a[l] & field) << at : b[l];
    out[l] = width < 64 ? all & 0xffffffff : all;
  });
}
Handler inserts(const Instruction& i) {
  if (i.type().kind != Kind::Bits || i.type().bytes < 4) unknown(i);
  return insert;
}

void permute(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2), *c = s.nth(3);
  s.each([=](int l) {
    const uint64_t both = (a[l] & 0xffffffff) | b[l] << 32;
    uint64_t result = 0;
    for (int k = 0; k < 4; ++k) {
      const int select = c[l] >> (4 * k) & 15;
      uint64_t byte = both >> (8 * (select & 7)) & 255;
      if (select & 8) byte = byte & 128 ? 255 : 0;
      result |= byte << (8 * k);
    }
    out[l] = result;
  });
}

uint64_t mask_of(int bytes) { return bytes == 8 ? ~0ull : (1ull << (8 * bytes)) - 1; }

void move(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1);
  const uint64_t mask = s.i.type().kind == Kind::Predicate ? 1 : mask_of(s.i.type().bytes);
  s.each([=](int l) { out[l] = a[l] & mask; });
}
void unpack(Step& s) {
  const int parts = s.i.count(0), bytes = s.i.type().bytes / parts;
  s.each([&](int l) {
    const uint64_t whole = s.slot(1)[l];
    for (int k = 0; k < parts; ++k) s.nth(k)[l] = whole >> (8 * bytes * k) & mask_of(bytes);
  });
}
void pack(Step& s) {
  const int parts = s.i.count(1), bytes = s.i.type().bytes / parts;
  s.each([&](int l) {
    uint64_t whole = 0;
    for (int k = 0; k < parts; ++k) whole |= (s.nth(1 + k)[l] & mask_of(bytes)) << (8 * bytes * k);
    s.nth(0)[l] = whole;
  });
}
Handler moves(const Instruction& i) {
  if (i.operands.size() != 2 || i.types.size() != 1) unknown(i);
  return i.count(0) > 1 ? unpack : i.count(1) > 1 ? pack : move;
}
Handler plain_move(const Instruction& i) {  // generic addresses are those of global memory and of parameters
  if (!(i.type() == Type{Kind::Unsigned, 8})) unknown(i);
  return move;
}

void select(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1), *b = s.nth(2), *p = s.nth(3);
  const uint64_t mask = mask_of(s.i.type().bytes);
  s.each([=](int l) { out[l] = (p[l] & 1 ? a[l] : b[l]) & mask; });
}
Handler selects(const Instruction&) { return select; }

enum class Relation { Eq, Ne, Lt, Le, Gt, Ge, Equ, Neu, Ltu, Leu, Gtu, Geu, Num, Nan };

template <Relation R, typename T>
bool related(T x, T y) {
  const auto a = wide(x), b = wide(y);
  const bool unordered = a != a || b != b;
  switch (R) {
    case Relation::Eq:
      return a == b;
    case Relation::Ne:
      return !unordered && a != b;
    case Relation::Lt:
      return a < b;
    case Relation::Le:
      return a <= b;
    case Relation::Gt:
      return a > b;
    case Relation::Ge:
      return a >= b;
    case Relation::Equ:
      return unordered || a == b;
    case Relation::Neu:
      return unordered || a != b;
    case Relation::Ltu:
      return unordered || a < b;
    case Relation::Leu:
      return unordered || a <= b;
    case Relation::Gtu:
      return unordered || a > b;
    case Relation::Geu:
      return unordered || a >= b;
    case Relation::Num:
      return !unordered;
    case Relation::Nan:
      return unordered;
  }
}

template <Relation R, typename T>
void compare(Step& s) {
  uint64_t *out = s.nth(0), *a = s.slot(1), *b = s.slot(2);
  uint64_t* inverse = s.i.count(0) == 2 ? s.nth(1) : nullptr;
  s.each([=](int l) {
    const bool holds = related<R>(value_of<T>(a[l]), value_of<T>(b[l]));
    out[l] = holds;
    if (inverse) inverse[l] = !holds;
  });
}
template <Relation R, typename T>
void compare_packed(Step& s) {
  uint64_t *low = s.nth(0), *high = s.nth(1), *a = s.slot(1), *b = s.slot(2);
  s.each([=](int l) {
    const uint64_t x = a[l], y = b[l];
    low[l] = related<R>(value_of<T>(x), value_of<T>(y));
    high[l] = related<R>(value_of<T>(x >> 16), value_of<T>(y >> 16));
  });
}
template <Relation R>
Handler compares(const Instruction& i) {
  const Type t = i.type();
  if (t.packed && i.count(0) == 2) {
    return t.kind == Kind::Bfloat ? compare_packed<R, Bfloat> : compare_packed<R, _Float16>;
  }
  return known(i, numbers(t, [](auto x) -> Handler { return compare<R, decltype(x)>; }));
}

// Rounding as the instruction's name says: to nearest for floats, towards zero for integers.
template <typename To, typename From>
To converted(From x) {
  if constexpr (is_float<From>) {
    const auto v = wide(x);
    if constexpr (std::is_same_v<To, Bfloat>)
      return rounded_bfloat(v);
    else if constexpr (std::is_same_v<To, _Float16>)
      return rounded_half(v);
    else if constexpr (is_float<To>)
      return static_cast<To>(v);
    else {
      const double most = std::ldexp(1.0, 8 * sizeof(To) - std::is_signed_v<To>), d = static_cast<double>(v);
      if (d != d) return 0;
      if (d >= most) return std::numeric_limits<To>::max();
      if (d < (std::is_signed_v<To> ? -most : 0)) return std::numeric_limits<To>::min();
      return static_cast<To>(d);
    }
  } else {
    return static_cast<To>(x);
  }
}
template <typename To, typename From>
void convert(Step& s) {
  uint64_t *out = s.nth(0), *a = s.nth(1);
  s.each([=](int l) { out[l] = bits_of(converted<To>(value_of<From>(a[l]))); });
}
template <typename Half>
void convert_pair(Step& s) {
  uint64_t *out = s.nth(0), *high = s.nth(1), *low = s.nth(2);
  s.each([=](int l) {
    out[l] = bits_of(converted<Half>(value_of<float>(low[l]))) | bits_of(converted<Half>(value_of<float>(high[l])))
                                                                     << 16;
  });
}

template <typename V>
Handler pairs(const Instruction& i, V allowed) {
  if (i.types.size() != 2 || !allowed(i.types[0], i.types[1])) unknown(i);
  const Type source = i.types[1];
  return known(i, numbers(i.types[0], [&](auto to) -> Handler {
                 return numbers(source, [&](auto from) -> Handler {
                   using To = decltype(to);
                   using From = decltype(from);
                   constexpr bool half = std::is_same_v<To, Bfloat> || std::is_same_v<To, _Float16>;
                   if constexpr (half && !std::is_same_v<From, float>)
                     return nullptr;
                   else
                     return convert<To, From>;
                 });
               }));
}
bool floating(Type t) { return t.kind == Kind::Float || t.kind == Kind::Bfloat; }
Handler exact_conversions(const Instruction& i) {
  return pairs(
      i, [](Type to, Type from) { return floating(to) ? floating(from) && to.bytes > from.bytes : !floating(from); });
}
Handler nearest_conversions(const Instruction& i) {
  if (i.type().packed && i.types[1] == Type{Kind::Float, 4} && i.slots.size() == 3) {
    return i.type().kind == Kind::Bfloat ? convert_pair<Bfloat> : convert_pair<_Float16>;
  }
  return pairs(i, [](Type to, Type from) { return floating(to) && (!floating(from) || to.bytes < from.bytes); });
}
Handler truncating_conversions(const Instruction& i) {
  return pairs(i, [](Type to, Type from) { return !floating(to) && floating(from); });
}

template <Handler H>
Handler words(const Instruction& i) {
  if (i.type().bytes != 4) unknown(i);
  return H;
}

}  // namespace

const Decoders& arithmetic() {
  static const Decoders table = {
      {"mov", {1, moves}},
      {"cvta.to.global", {1, plain_move}},
      {"cvta.param", {1, plain_move}},
      {"selp", {1, selects}},
      {"prmt", {1, words<permute>}},
      {"and", {1, bits2<And>}},
      {"or", {1, bits2<Or>}},
      {"xor", {1, bits2<Xor>}},
      {"not", {1, bits_not}},
      {"popc", {1, count_bits}},
      {"shl", {1, shifts<true>}},
      {"shr", {1, shifts<false>}},
      {"bfe", {1, extracts}},
      {"bfi", {1, inserts}},
      {"add", {1, any2<Add>}},
      {"add.rn", {1, float2<Add>}},
      {"sub", {1, any2<Sub>}},
      {"sub.rn", {1, float2<Sub>}},
      {"mul", {1, float2<Mul>}},
      {"mul.rn", {1, float2<Mul>}},
      {"mul.lo", {1, integer2<Mul>}},
      {"mul.hi", {1, integer2<MulHigh>}},
      {"mul.wide", {1, wide}},
      {"mad.lo", {1, integer3<MulAdd>}},
      {"mad.wide", {1, wide}},
      {"fma.rn", {1, float3<Fma>}},
      {"fma.rn.ftz", {1, float3<Fma, true>}},
      {"contracted.minus", {1, float3<ProductMinus>}},
      {"contracted.from", {1, float3<FromProduct>}},
      {"div", {1, integer2<Div>}},
      {"div.rn", {1, float2<Div>}},
      {"div.full", {1, words<map2<float, DivFull, false>>}},
      {"rem", {1, integer2<Rem>}},
      {"min", {1, any2<Min>}},
      {"max", {1, any2<Max>}},
      {"max.NaN", {1, single2<MaxNaN>}},
      {"neg", {1, any1<Neg>}},
      {"abs", {1, any1<Abs>}},
      {"abs.ftz", {1, single1_flushed<Abs>}},
      {"sqrt.rn", {1, float1<Sqrt>}},
      {"ex2.approx", {1, single1<Exp2>}},
      {"ex2.approx.ftz", {1, single1_flushed<Exp2>}},
      {"lg2.approx", {1, single1<Log2>}},
      {"lg2.approx.ftz", {1, single1_flushed<Log2>}},
      {"rcp.approx.ftz", {1, float1<Rcp, true>}},
      {"rsqrt.approx", {1, float1<Rsqrt>}},
      {"rsqrt.approx.ftz", {1, single1_flushed<Rsqrt>}},
      {"cvt", {1, exact_conversions}},
      {"cvt.rn", {1, nearest_conversions}},
      {"cvt.rzi", {1, truncating_conversions}},
      {"setp.eq", {1, compares<Relation::Eq>}},
      {"setp.ne", {1, compares<Relation::Ne>}},
      {"setp.lt", {1, compares<Relation::Lt>}},
      {"setp.le", {1, compares<Relation::Le>}},
      {"setp.gt", {1, compares<Relation::Gt>}},
      {"setp.ge", {1, compares<Relation::Ge>}},
      {"setp.equ", {1, compares<Relation::Equ>}},
      {"setp.neu", {1, compares<Relation::Neu>}},
      {"setp.ltu", {1, compares<Relation::Ltu>}},
      {"setp.leu", {1, compares<Relation::Leu>}},
      {"setp.gtu", {1, compares<Relation::Gtu>}},
      {"setp.geu", {1, compares<Relation::Geu>}},
      {"setp.num", {1, compares<Relation::Num>}},
      {"setp.nan", {1, compares<Relation::Nan>}},
  };
  return table;
}

}  // namespace ptx
