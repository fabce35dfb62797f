// grood_fast._kernels: build facts, instruction-set control and the kernels on NumPy arrays.
//
// No torch header may be included: this module serves people who have NumPy alone.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdint>
#include <memory>
#include <new>
#include <optional>
#include <sstream>
#include <string>

#include "../kernels/kernels.h"

namespace py = pybind11;

namespace grood_fast {
namespace {

constexpr const char* kObjectiveNames[kObjectives] = {"energy",      "uniform",   "predicted",
                                                      "confounding", "max_logit", "logit_sum"};
constexpr const char* kNormNames[kNorms] = {"l1", "l2", "linf"};

template <std::size_t N>
int index_of(const std::string& name, const char* const (&names)[N], const char* what) {
  std::string known;
  for (std::size_t i = 0; i < N; ++i) {
    if (name == names[i]) return static_cast<int>(i);
    known += std::string(i == 0 ? "" : ", ") + names[i];
  }
  throw py::value_error("unknown " + std::string(what) + " '" + name + "'; known: " + known);
}

// float64 stays float64, everything else is computed in float32.
struct Matrix {
  py::array array;
  DType dtype;

  Matrix(const py::array& input, const char* what) {
    const bool wide =
        input.dtype().kind() == 'f' && input.itemsize() == sizeof(double);  // of any byte order
    dtype = wide ? DType::float64 : DType::float32;
    array = wide ? py::array(py::array_t<double, py::array::c_style | py::array::forcecast>(input))
                 : py::array(py::array_t<float, py::array::c_style | py::array::forcecast>(input));
    if (array.ndim() != 2) throw py::value_error(std::string(what) + " must have two dimensions");
  }
  std::int64_t rows() const { return array.shape(0); }
  std::int64_t columns() const { return array.shape(1); }
  py::array real(std::vector<py::ssize_t> shape) const {
    return dtype == DType::float64 ? py::array(py::array_t<double>(shape))
                                   : py::array(py::array_t<float>(shape));
  }
};

struct Scratch {
  explicit Scratch(std::int64_t classes)
      : memory(::operator new(logit_gradient_scratch_bytes(classes), std::align_val_t{64})) {}
  ~Scratch() { ::operator delete(memory, std::align_val_t{64}); }
  void* memory;
};

LogitGradientArguments arguments_of(
    const Matrix& logits, const std::string& objective, double temperature,
    const std::optional<Matrix>& target) {
  LogitGradientArguments arguments{};
  arguments.logits = logits.array.data();
  arguments.dtype = logits.dtype;
  arguments.classes = logits.columns();
  arguments.row_stride = logits.columns();
  arguments.objective = static_cast<Objective>(index_of(objective, kObjectiveNames, "objective"));
  arguments.temperature = temperature;
  if (arguments.classes < 1) throw py::value_error("logits must have at least one class");
  if (!(temperature > 0)) throw py::value_error("temperature must be positive");
  if (target.has_value()) {
    if (arguments.objective != Objective::confounding) {
      throw py::value_error("only the confounding objective takes a target");
    }
    if (target->rows() != 1 || target->columns() != arguments.classes ||
        target->dtype != logits.dtype) {
      throw py::value_error("target must have the shape (1, C) and the dtype of the logits");
    }
    arguments.target = target->array.data();
  }
  return arguments;
}

std::optional<Matrix> matrix_or_none(const std::optional<py::array>& array, const char* what) {
  if (!array.has_value()) return std::nullopt;
  // One row may be given without its first dimension.
  if (array->ndim() == 1) return Matrix(py::array(*array).reshape({1, -1}), what);
  return Matrix(*array, what);
}

py::dict logit_gradient_numpy(
    const py::array& logits_in, const std::string& objective, double temperature,
    const std::optional<py::array>& target_in) {
  const Matrix logits(logits_in, "logits");
  const std::optional<Matrix> target = matrix_or_none(target_in, "target");
  LogitGradientArguments arguments = arguments_of(logits, objective, temperature, target);
  py::array energy = logits.real({logits.rows()}), log_sum_exp = logits.real({logits.rows()});
  py::array maximum = logits.real({logits.rows()}),
            delta = logits.real({logits.rows(), logits.columns()});
  py::array_t<std::int64_t> argmax({logits.rows()});
  py::array norms[kNorms];
  arguments.energy = energy.mutable_data();
  arguments.log_sum_exp = log_sum_exp.mutable_data();
  arguments.maximum = maximum.mutable_data();
  arguments.delta = delta.mutable_data();
  arguments.argmax = argmax.mutable_data();
  for (int n = 0; n < kNorms; ++n) {
    norms[n] = logits.real({logits.rows()});
    arguments.norm[n] = norms[n].mutable_data();
  }
  const Scratch scratch(arguments.classes);
  arguments.scratch = scratch.memory;
  {
    py::gil_scoped_release release;
    logit_gradient(arguments, 0, logits.rows());
  }
  py::dict result;
  result["energy"] = energy;
  result["log_sum_exp"] = log_sum_exp;
  result["maximum"] = maximum;
  result["argmax"] = argmax;
  result["delta"] = delta;
  for (int n = 0; n < kNorms; ++n) result[kNormNames[n]] = norms[n];
  return result;
}

py::array head_gradient_norm_numpy(
    const py::array& logits_in, const py::array& features_in, const std::string& objective,
    double temperature, const std::optional<py::array>& target_in, const std::string& norm_name,
    bool bias) {
  const Matrix logits(logits_in, "logits");
  const Matrix features(features_in, "features");
  const std::optional<Matrix> target = matrix_or_none(target_in, "target");
  if (logits.rows() != features.rows())
    throw py::value_error("logits and features must have the same number of rows");
  LogitGradientArguments arguments = arguments_of(logits, objective, temperature, target);
  const int norm = index_of(norm_name, kNormNames, "norm");
  py::array result = logits.real({logits.rows()});
  arguments.norm[norm] = result.mutable_data();
  const RowNormArguments row_norm{
      features.array.data(),   features.dtype, features.columns(), features.columns(),
      static_cast<Norm>(norm), bias,           logits.dtype,       result.mutable_data()};
  const Scratch scratch(arguments.classes);
  arguments.scratch = scratch.memory;
  {
    py::gil_scoped_release release;
    logit_gradient(arguments, 0, logits.rows());
    multiply_row_norm(row_norm, 0, logits.rows());
  }
  return result;
}

py::list words(const std::string& text) {
  py::list list;
  std::istringstream stream(text);
  for (std::string word; stream >> word;) list.append(word);
  return list;
}

py::dict build_facts() {
  py::dict facts;
  facts["version"] = GROOD_FAST_VERSION;
  facts["compiler"] = GROOD_FAST_COMPILER;
  facts["torch"] = GROOD_FAST_TORCH_VERSION;
  facts["cuda_architectures"] = words(GROOD_FAST_CUDA_ARCHITECTURES);
  py::list compiled, supported;
  for (const char* level : kSimdLevels) {
    if (simd_level_compiled(level)) compiled.append(level);
    if (simd_level_compiled(level) && simd_level_supported(level)) supported.append(level);
  }
  facts["simd_levels_compiled"] = compiled;
  facts["simd_levels_supported"] = supported;
  facts["simd_level_complaint"] = simd_level_complaint();
  py::list objectives, norms;
  for (const char* name : kObjectiveNames) objectives.append(name);
  for (const char* name : kNormNames) norms.append(name);
  facts["objectives"] = objectives;
  facts["norms"] = norms;
  return facts;
}

}  // namespace
}  // namespace grood_fast

PYBIND11_MODULE(_kernels, m) {
  using namespace grood_fast;
  m.doc() =
      "Build facts, instruction-set control and the CPU kernels on NumPy arrays; needs no torch.";
  m.def("build_facts", &build_facts, "What this build was made from and what it holds.");
  m.def(
      "simd_level", [] { return std::string(simd_level()); },
      "The instruction set the kernels run with.");
  m.def(
      "set_simd_level", [](const std::string& level) { return set_simd_level(level.c_str()); },
      py::arg("level"),
      "Change it; False, and nothing changed, where the build or the processor lacks it.");
  m.def(
      "logit_gradient", &logit_gradient_numpy, py::arg("logits"), py::arg("objective"),
      py::kw_only(), py::arg("temperature") = 1.0, py::arg("target") = py::none(),
      "Energy, maximum, norms and delta of (B, C) logits, as a dict of arrays; float64 in float64, "
      "else float32.");
  m.def(
      "head_gradient_norm", &head_gradient_norm_numpy, py::arg("logits"), py::arg("features"),
      py::arg("objective"), py::kw_only(), py::arg("temperature") = 1.0,
      py::arg("target") = py::none(), py::arg("norm") = "l1", py::arg("bias") = false,
      "Norm of the last layer's gradient of each row, shape (B,).");
}
