// The recurrence of each op, for one row. A row takes the state of the row after it and gives its results and its own
// state. All that a row needs of later rows is in the state, so a masked row is the identity.
//   Map, State, kInputs, kOutputs       results overwrite the first inputs in shared memory
//   end(bootstrap), end()               the state after a sequence's last row
//   step(in, state, out)                one row: writes its results, returns its state
//   map(in)                             the map from the later state to that state, without results
#pragma once
#include "../maps.h"

namespace qrm_fast {

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
    return gamma * in[1] + decay * advantage;
  }
  QRM_FAST_HOST_DEVICE Map map(const float* in) const { return {decay, gamma * in[1] + decay * (in[0] - in[1])}; }
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
    return out[0] = in[0] + gamma * later;
  }
  QRM_FAST_HOST_DEVICE Map map(const float* in) const { return {gamma, in[0]}; }
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
  QRM_FAST_HOST_DEVICE Map map(const float* in) const { return {mixed(in[1], in[0]), lam, rest * in[1]}; }
  QRM_FAST_HOST_DEVICE float mixed(float v, float q) const { return lam == 0 ? rest * v : rest * v + lam * q; }
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
    return {b + a * x.target + k * x.value, value};
  }
  QRM_FAST_HOST_DEVICE VtraceMap after(const VtraceMap& later) const {
    if (!counted) return later;
    if (!later.counted) return *this;
    return {decay_product(a, later.a), a * later.k, b + a * later.b + k * later.value, value, true};
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
    const float target = v + (rho * (r + gamma * later.value - v) + factor * (later.target - later.value));
    out[0] = target;
    out[1] = rho * (r + gamma * later.target - v);
    return {target, v};
  }
  QRM_FAST_HOST_DEVICE Map map(const float* in) const {
    const float r = in[0], v = in[1], rho = minimum(in[2], rho_bar), factor = decay * minimum(in[2], c_bar);
    return {factor, rho * gamma - factor, v + rho * (r - v), v, true};
  }
};

}  // namespace qrm_fast
