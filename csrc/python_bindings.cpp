// SPDX-License-Identifier: Apache-2.0

// Python module ems_vllm._C: the parts of the library that need no tensors.

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <limits>
#include <optional>
#include <string>
#include <utility>

#include "build_config.h"
#include "cuda/head_sizes.h"
#include "dtype_pairs.h"
#include "plan.h"

#if defined(EMS_CUDA_ARCHS)
#define EMS_CUDA_HEAD_SIZES ems::cuda::HeadSizes
#define EMS_CUDA_DTYPES ems::cuda::QueryCachePairs
#else
#define EMS_CUDA_ARCHS ""
#define EMS_CUDA_COMPILER ""
#define EMS_CUDA_HEAD_SIZES std::integer_sequence<int>
#define EMS_CUDA_DTYPES ems::DTypePairs<>
#endif

namespace py = pybind11;

namespace {

// Sums and products of valid parameters then stay far inside int64.
constexpr int64_t kMaxParam = std::numeric_limits<int32_t>::max();

void check_range(const char* name, int64_t value, int64_t low) {
  if (value >= low && value <= kMaxParam) return;
  throw py::value_error(std::string(name) + " must be in " + std::to_string(low) + ".." +
                        std::to_string(kMaxParam) + ", got " + std::to_string(value));
}

void check_whole_blocks(const char* name, int64_t tokens, int64_t block_size) {
  if (tokens % block_size == 0) return;
  throw py::value_error(std::string(name) + " must be a multiple of block_size (" +
                        std::to_string(block_size) + "), got " + std::to_string(tokens));
}

class CompressionPlan {
 public:
  CompressionPlan(int64_t prompt_len, int64_t block_size, int64_t budget_blocks,
                  int64_t recent_window, int64_t recompress_interval, int64_t min_blocks_saved,
                  std::optional<int64_t> global_queries, int64_t prefill_interval,
                  std::optional<int64_t> prefill_budget_blocks)
      : params_{prompt_len,
                block_size,
                budget_blocks,
                recent_window,
                recompress_interval,
                min_blocks_saved,
                global_queries.value_or(ems::kNoLimit),
                prefill_interval,
                prefill_budget_blocks.value_or(budget_blocks)} {
    check_range("prompt_len", prompt_len, 0);
    check_range("block_size", block_size, 1);
    check_range("budget_blocks", budget_blocks, 0);
    check_range("recent_window", recent_window, 0);
    check_range("recompress_interval", recompress_interval, 0);
    check_range("min_blocks_saved", min_blocks_saved, 1);
    if (global_queries) check_range("global_queries", *global_queries, 1);
    check_range("prefill_interval", prefill_interval, 0);
    check_range("prefill_budget_blocks", params_.prefill_budget_blocks, budget_blocks);
    check_whole_blocks("recompress_interval", recompress_interval, block_size);
    check_whole_blocks("prefill_interval", prefill_interval, block_size);
  }

  const ems::PlanParams& params() const { return params_; }

  py::tuple columns(int64_t num_processed) const {
    const ems::Columns columns = ems::columns_at(params_, checked(num_processed));
    return py::make_tuple(columns.first, columns.tail);
  }

  int64_t max_live_columns(int64_t num_processed) const {
    return ems::max_live_columns(params_, checked(num_processed));
  }

  std::optional<int64_t> next_compaction(int64_t num_processed) const {
    return none_if_unlimited(ems::next_compaction(params_, checked(num_processed)));
  }

  std::optional<int64_t> max_shared_tokens() const {
    return none_if_unlimited(ems::max_shared_tokens(params_));
  }

  int64_t first_scored_query(int64_t num_processed) const {
    return ems::first_scored_query(params_, checked(num_processed));
  }

  int64_t num_within_prompt() const { return ems::num_within_prompt(params_); }

  int64_t max_replay_columns(int64_t num_tokens) const {
    return ems::max_replay_columns(params_, checked(num_tokens));
  }

  std::optional<int64_t> global_queries() const {
    return none_if_unlimited(params_.global_queries);
  }

  py::tuple as_tuple() const {
    return py::make_tuple(params_.prompt_len, params_.block_size, params_.budget_blocks,
                          params_.recent_window, params_.recompress_interval,
                          params_.min_blocks_saved, global_queries(), params_.prefill_interval,
                          params_.prefill_budget_blocks);
  }

  std::string repr() const {
    return "CompressionPlan(prompt_len=" + std::to_string(params_.prompt_len) +
           ", block_size=" + std::to_string(params_.block_size) +
           ", budget_blocks=" + std::to_string(params_.budget_blocks) +
           ", recent_window=" + std::to_string(params_.recent_window) +
           ", recompress_interval=" + std::to_string(params_.recompress_interval) +
           ", min_blocks_saved=" + std::to_string(params_.min_blocks_saved) + ", global_queries=" +
           (global_queries() ? std::to_string(*global_queries()) : std::string("None")) +
           ", prefill_interval=" + std::to_string(params_.prefill_interval) +
           ", prefill_budget_blocks=" + std::to_string(params_.prefill_budget_blocks) + ")";
  }

 private:
  static int64_t checked(int64_t num_processed) {
    check_range("num_processed", num_processed, 0);
    return num_processed;
  }

  static std::optional<int64_t> none_if_unlimited(int64_t value) {
    if (value == ems::kNoLimit) return std::nullopt;
    return value;
  }

  ems::PlanParams params_;
};

template <int... SIZES>
py::tuple as_tuple(std::integer_sequence<int, SIZES...>) {
  return py::make_tuple(SIZES...);
}

// ((dtype of queries, dtype of the cache), ...)
template <typename... PAIRS>
py::tuple as_tuple(ems::DTypePairs<PAIRS...>) {
  return py::make_tuple(py::make_tuple(ems::DTypeTraits<typename PAIRS::Query>::name,
                                       ems::DTypeTraits<typename PAIRS::Cache>::name)...);
}

py::dict build_info() {
  py::dict info;
  info["version"] = EMS_VERSION;
#if defined(__clang__)
  info["compiler"] = "clang " __clang_version__;
#else
  info["compiler"] = "gcc " __VERSION__;
#endif
  info["torch_target"] = EMS_TORCH_TARGET;
#if EMS_AMX_VARIANT
  info["cpu_variants"] = py::make_tuple("amx", "avx512_bf16", "avx512", "avx2", "portable");
#elif EMS_X86_VARIANTS
  info["cpu_variants"] = py::make_tuple("avx512_bf16", "avx512", "avx2", "portable");
#else
  info["cpu_variants"] = py::make_tuple("portable");
#endif
  info["cuda_archs"] = py::tuple(py::str(EMS_CUDA_ARCHS).attr("split")());
  info["cuda_compiler"] = py::str(EMS_CUDA_COMPILER);
  info["cpu_dtypes"] = as_tuple(ems::cpu::QueryCachePairs{});
  info["cuda_dtypes"] = as_tuple(EMS_CUDA_DTYPES{});
  info["cuda_head_sizes"] = as_tuple(EMS_CUDA_HEAD_SIZES{});
  return info;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Compiled parts of ems_vllm that need no tensors.";
  m.def("build_info", &build_info);

  const auto param = [](int64_t ems::PlanParams::* member) {
    return [member](const CompressionPlan& self) { return self.params().*member; };
  };
  py::class_<CompressionPlan>(m, "CompressionPlan")
      .def(py::init<int64_t, int64_t, int64_t, int64_t, int64_t, int64_t, std::optional<int64_t>,
                    int64_t, std::optional<int64_t>>(),
           py::kw_only(), py::arg("prompt_len"), py::arg("block_size"), py::arg("budget_blocks"),
           py::arg("recent_window"), py::arg("recompress_interval"), py::arg("min_blocks_saved"),
           py::arg("global_queries") = py::none(), py::arg("prefill_interval") = 0,
           py::arg("prefill_budget_blocks") = py::none())
      .def("columns", &CompressionPlan::columns, py::arg("num_processed"))
      .def("max_live_columns", &CompressionPlan::max_live_columns, py::arg("num_processed"))
      .def("next_compaction", &CompressionPlan::next_compaction, py::arg("num_processed"))
      .def_property_readonly(
          "compresses_prompt",
          [](const CompressionPlan& self) { return ems::compresses_prompt(self.params()); })
      .def_property_readonly(
          "may_compress",
          [](const CompressionPlan& self) { return ems::may_compress(self.params()); })
      .def_property_readonly("max_shared_tokens", &CompressionPlan::max_shared_tokens)
      .def_property_readonly("prompt_len", param(&ems::PlanParams::prompt_len))
      .def_property_readonly("block_size", param(&ems::PlanParams::block_size))
      .def_property_readonly("budget_blocks", param(&ems::PlanParams::budget_blocks))
      .def_property_readonly("recent_window", param(&ems::PlanParams::recent_window))
      .def_property_readonly("recompress_interval", param(&ems::PlanParams::recompress_interval))
      .def_property_readonly("min_blocks_saved", param(&ems::PlanParams::min_blocks_saved))
      .def_property_readonly("global_queries", &CompressionPlan::global_queries)
      .def_property_readonly("prefill_interval", param(&ems::PlanParams::prefill_interval))
      .def_property_readonly("prefill_budget_blocks",
                             param(&ems::PlanParams::prefill_budget_blocks))
      .def_property_readonly("num_within_prompt", &CompressionPlan::num_within_prompt)
      .def("first_scored_query", &CompressionPlan::first_scored_query, py::arg("num_processed") = 0)
      .def("max_replay_columns", &CompressionPlan::max_replay_columns, py::arg("num_tokens"))
      .def("__repr__", &CompressionPlan::repr)
      .def("__hash__", [](const CompressionPlan& self) { return py::hash(self.as_tuple()); })
      .def("__eq__",
           [](const CompressionPlan& self, const py::object& other) -> py::object {
             if (!py::isinstance<CompressionPlan>(other)) {
               return py::reinterpret_borrow<py::object>(Py_NotImplemented);
             }
             return py::bool_(self.as_tuple().equal(other.cast<CompressionPlan>().as_tuple()));
           })
      .def(py::pickle([](const CompressionPlan& self) { return self.as_tuple(); },
                      [](const py::tuple& state) {
                        return CompressionPlan(state[0].cast<int64_t>(), state[1].cast<int64_t>(),
                                               state[2].cast<int64_t>(), state[3].cast<int64_t>(),
                                               state[4].cast<int64_t>(), state[5].cast<int64_t>(),
                                               state[6].cast<std::optional<int64_t>>(),
                                               state[7].cast<int64_t>(),
                                               state[8].cast<std::optional<int64_t>>());
                      }));
}
