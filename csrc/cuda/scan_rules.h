// The recurrence of each op, for one row. A row takes the state of the row after it and gives its results and its own
// state. All that a row needs of later rows is in the state, so a masked row is the identity.
//   Map, State, kInputs, kOutputs       results overwrite the first inputs in shared memory
//   end(bootstrap), end()               the state after a sequence's last row
//   step(in, state, out)                one row: writes its results, returns its state
//   before(in, later)                   the map to that state: of this row, then `later` of those behind it in a piece
//   folded(map)                         what those maps of a piece come to
#pragma once
#include "../maps.h"

namespace qrm_fast {

// The product of a piece's equal factors: zero only if they are, as in decay_product.
QRM_FAST_HOST_DEVICE inline float decay_power_of(float product, float factor) {
  return product == 0 && factor != 0 ? kSmallest<float> : product;
}

// A_t = r_t + u_{t+1} - V_t with u_t = gamma V_t + gamma lam A_t
struct GaeRows {
  using Map = Affine<float>;
  using State = float;
  static constexpr int kInputs = 2, kOutputs = 2;

  float gamma, decay;

  QRM_FAST_HOST_DEVICE State end(float bootstrap) const { return gamma * bootstrap; }
  QRM_FAST_HOST_DEVICE State end() const { return 0; }
  QRM_FAST_HOST_DEVICE State step(const float* in, State u, float* out) const {
    const float advantage = in[0] + u - in[1];
    out[0] = advantage;
    out[1] = advantage + in[1];
    return multiply_add(decay, advantage, gamma * in[1]);
  }
  QRM_FAST_HOST_DEVICE Map before(const float* in, const Map& later) const {
    return {decay * later.a, multiply_add(decay, in[0] + later.b - in[1], gamma * in[1])};
  }
  QRM_FAST_HOST_DEVICE Map folded(const Map& map) const { return {decay_power_of(map.a, decay), map.b}; }
};

// R_t = r_t + gamma R_{t+1}
struct ReturnRows {
  using Map = Affine<float>;
  using State = float;
  static constexpr int kInputs = 1, kOutputs = 1;

  float gamma;

  QRM_FAST_HOST_DEVICE State end(float bootstrap) const { return bootstrap; }
  QRM_FAST_HOST_DEVICE State end() const { return 0; }
  QRM_FAST_HOST_DEVICE State step(const float* in, State later, float* out) const {
    return out[0] = multiply_add(gamma, later, in[0]);
  }
  QRM_FAST_HOST_DEVICE Map before(const float* in, const Map& later) const {
    return {gamma * later.a, multiply_add(gamma, later.b, in[0])};
  }
  QRM_FAST_HOST_DEVICE Map folded(const Map& map) const { return {decay_power_of(map.a, gamma), map.b}; }
};

// Q_t = min(r_t, u_{t+1}) with u_t = (1 - lam) V_t + lam Q_t
struct MinRows {
  using Map = ClampedAffine<float>;
  using State = float;
  static constexpr int kInputs = 2, kOutputs = 2;

  float lam, rest;  // rest = 1 - lam

  QRM_FAST_HOST_DEVICE State end(float bootstrap) const { return bootstrap; }
  QRM_FAST_HOST_DEVICE State end() const { return static_cast<float>(INFINITY); }
  QRM_FAST_HOST_DEVICE State step(const float* in, State u, float* out) const {
    const float v = in[1], q = minimum(in[0], u);
    out[0] = q - v;
    out[1] = q;
    return mixed(v, q);
  }
  QRM_FAST_HOST_DEVICE Map before(const float* in, const Map& later) const {
    return Map{mixed(in[1], in[0]), lam, rest * in[1]}.after(later);
  }
  QRM_FAST_HOST_DEVICE Map folded(const Map& map) const { return map; }
  QRM_FAST_HOST_DEVICE float mixed(float v, float q) const {
    return lam == 0 ? rest * v : multiply_add(lam, q, rest * v);
  }
};

// The state of vtrace: the successor's target and value.
struct TargetAndValue {
  float target, value;
};

// target -> a target + k value + b; the value is replaced unless all rows are masked.
struct VtraceMap {
  float a, k, b, value;
  bool counted;

  QRM_FAST_HOST_DEVICE static VtraceMap identity() { return {1, 0, 0, 0, false}; }
  QRM_FAST_HOST_DEVICE TargetAndValue operator()(TargetAndValue x) const {
    if (!counted) return x;
    return {multiply_add(k, x.value, multiply_add(a, x.target, b)), value};
  }
  QRM_FAST_HOST_DEVICE VtraceMap after(const VtraceMap& later) const {
    if (!counted) return later;
    if (!later.counted) return *this;
    return {decay_product(a, later.a), a * later.k, multiply_add(k, later.value, multiply_add(a, later.b, b)), value,
            true};
  }
};

// A_t = rho_t (r_t + gamma V' - V_t) + gamma c_t (target' - V'), target_t = V_t + A_t
struct VtraceRows {
  using Map = VtraceMap;
  using State = TargetAndValue;
  static constexpr int kInputs = 3, kOutputs = 2;

  float gamma, decay, rho_bar, c_bar;  // decay = gamma lam

  QRM_FAST_HOST_DEVICE State end(float bootstrap) const { return {bootstrap, bootstrap}; }
  QRM_FAST_HOST_DEVICE State end() const { return {0, 0}; }
  QRM_FAST_HOST_DEVICE State step(const float* in, State later, float* out) const {
    const float r = in[0], v = in[1], rho = minimum(in[2], rho_bar), factor = decay * minimum(in[2], c_bar);
    const float target =
        v + multiply_add(factor, later.target - later.value, rho * (multiply_add(gamma, later.value, r) - v));
    out[0] = target;
    out[1] = rho * (multiply_add(gamma, later.target, r) - v);
    return {target, v};
  }
  QRM_FAST_HOST_DEVICE Map before(const float* in, const Map& later) const {
    const float r = in[0], v = in[1], rho = minimum(in[2], rho_bar), factor = decay * minimum(in[2], c_bar);
    return Map{factor, multiply_add(rho, gamma, -factor), multiply_add(rho, r - v, v), v, true}.after(later);
  }
  QRM_FAST_HOST_DEVICE Map folded(const Map& map) const { return map; }
};

}  // namespace qrm_fast
