// Host side of packing: Python lists of token ids to packed numpy arrays. No tensor crosses this file.
// The ids are copied out of their Python objects once, under the GIL: the only pass whose cost Python sets. Everything
// derived from the lengths (25 bytes per token, 16 per action) is filled sequence by sequence with the GIL released.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <string>
#include <vector>

#include "../check.h"

namespace py = pybind11;

namespace qrm_fast {
namespace {

constexpr int64_t kIgnoreIndex = -100;

const char* type_name(PyObject* object) { return Py_TYPE(object)->tp_name; }

// A Python list or tuple read in place. Nothing read from it runs Python code, so its length cannot change meanwhile.
class Items {
 public:
  template <typename... Name>
  Items(PyObject* object, const char* of_what, const Name&... name) : object_(object) {
    if (!PyList_Check(object) && !PyTuple_Check(object)) {
      throw py::type_error(sentence(name..., " must be a list of ", of_what, ", got ", type_name(object)));
    }
  }

  int64_t size() const { return PySequence_Fast_GET_SIZE(object_); }
  PyObject* operator[](int64_t i) const { return PySequence_Fast_GET_ITEM(object_, i); }

  // Item i as a number >= 0.
  template <typename... Name>
  int64_t natural(int64_t i, const Name&... name) const {
    PyObject* item = (*this)[i];
    if (!PyLong_Check(item)) {
      throw py::type_error(sentence(name..., "[", i, "] must be an int, got ", type_name(item)));
    }
    int overflow = 0;
    const int64_t value = PyLong_AsLongLongAndOverflow(item, &overflow);
    CHECK_VALUE(overflow == 0 && value >= 0, name..., "[", i, "] must be in [0, 2^63), got ",
                std::string(py::str(py::handle(item))));
    return value;
  }

 private:
  PyObject* object_;
};

struct Packed {
  explicit Packed(int64_t num_sequences, int64_t num_tokens, int64_t num_actions)
      : input_ids(num_tokens),
        position_ids(num_tokens),
        cu_seqlens(num_sequences + 1),
        targets(num_tokens),
        action_mask(num_tokens),
        action_index(num_actions),
        action_cu_seqlens(num_sequences + 1),
        seq_ids(num_actions) {}

  py::array_t<int64_t> input_ids, position_ids;
  py::array_t<int32_t> cu_seqlens;
  py::array_t<int64_t> targets;
  py::array_t<bool> action_mask;
  py::array_t<int64_t> action_index;
  py::array_t<int32_t> action_cu_seqlens;
  py::array_t<int64_t> seq_ids;
};

// Model row bos + i predicts token i + 1, so the actions prompt_len .. len - 1 are predicted by rows
// bos + prompt_len - 1 .. bos + len - 2, and the last row predicts nothing.
void fill_sequence(int64_t i_seq, int64_t bos, int64_t len, int64_t prompt_len, const int64_t* input_ids,
                   int64_t* position_ids, int64_t* targets, bool* action_mask, int64_t* action_index,
                   int64_t* seq_ids) {
  const int64_t num_actions = len - prompt_len;
  for (int64_t i = 0; i < len; ++i) position_ids[bos + i] = i;
  std::copy_n(input_ids + bos + 1, len - 1, targets + bos);
  targets[bos + len - 1] = kIgnoreIndex;
  std::fill_n(action_mask + bos, len, false);
  std::fill_n(action_mask + bos + prompt_len - 1, num_actions, true);
  for (int64_t t = 0; t < num_actions; ++t) action_index[t] = bos + prompt_len - 1 + t;
  std::fill_n(seq_ids, num_actions, i_seq);
}

py::tuple pack(const py::object& sequences, const py::object& prompt_lens) {
  const Items seqs(sequences.ptr(), "lists of token ids", "sequences");
  const Items prompts(prompt_lens.ptr(), "ints", "prompt_lens");
  const int64_t num_sequences = seqs.size();
  CHECK_VALUE(prompts.size() == num_sequences, "prompt_lens must have one entry per sequence, ", num_sequences,
              ", got ", prompts.size());

  std::vector<int64_t> prompt_len(num_sequences), bos(num_sequences + 1, 0), action_bos(num_sequences + 1, 0);
  int64_t max_seqlen = 0;
  for (int64_t s = 0; s < num_sequences; ++s) {
    const int64_t len = Items(seqs[s], "token ids", "sequences[", s, "]").size();
    prompt_len[s] = prompts.natural(s, "prompt_lens");
    CHECK_VALUE(len > 0, "sequences[", s, "] must hold at least one prompt token, got an empty list");
    CHECK_VALUE(prompt_len[s] >= 1 && prompt_len[s] <= len, "prompt_lens[", s, "] must be between 1 and ", len,
                ", the length of sequences[", s, "], got ", prompt_len[s]);
    bos[s + 1] = bos[s] + len;
    action_bos[s + 1] = action_bos[s] + len - prompt_len[s];
    max_seqlen = std::max(max_seqlen, len);
  }
  const int64_t num_tokens = bos[num_sequences];
  CHECK_VALUE(num_tokens <= std::numeric_limits<int32_t>::max(),
              "a packed batch must have fewer than 2^31 tokens, its cu_seqlens being int32, got ", num_tokens);

  Packed out(num_sequences, num_tokens, action_bos[num_sequences]);
  int64_t* input_ids = out.input_ids.mutable_data();
  for (int64_t s = 0; s < num_sequences; ++s) {
    const Items ids(seqs[s], "token ids", "sequences[", s, "]");
    for (int64_t i = 0; i < ids.size(); ++i) input_ids[bos[s] + i] = ids.natural(i, "sequences[", s, "]");
  }

  int64_t* position_ids = out.position_ids.mutable_data();
  int64_t* targets = out.targets.mutable_data();
  bool* action_mask = out.action_mask.mutable_data();
  int64_t* action_index = out.action_index.mutable_data();
  int64_t* seq_ids = out.seq_ids.mutable_data();
  int32_t* cu_seqlens = out.cu_seqlens.mutable_data();
  int32_t* action_cu_seqlens = out.action_cu_seqlens.mutable_data();
  {
    const py::gil_scoped_release no_gil;
    std::copy(bos.begin(), bos.end(), cu_seqlens);
    std::copy(action_bos.begin(), action_bos.end(), action_cu_seqlens);
    for (int64_t s = 0; s < num_sequences; ++s) {
      fill_sequence(s, bos[s], bos[s + 1] - bos[s], prompt_len[s], input_ids, position_ids, targets, action_mask,
                    action_index + action_bos[s], seq_ids + action_bos[s]);
    }
  }
  return py::make_tuple(out.input_ids, out.position_ids, out.cu_seqlens, out.targets, out.action_mask, out.action_index,
                        out.action_cu_seqlens, out.seq_ids, max_seqlen);
}

}  // namespace
}  // namespace qrm_fast

PYBIND11_MODULE(_host, m) { m.def("pack", &qrm_fast::pack); }
