// An operator as a C++ class: Op<Kernel> is the table of callbacks that ONNX Runtime asks for.
//
// A Kernel has
//   static constexpr const char* kName;
//   static const std::vector<Operand> kInputs, kOutputs;
//   static void infer(const Shapes&);                          // sets the outputs' shapes
//   Kernel(const Node&);                                       // throws if the node is not valid
//   void compute(const Call&) const;                           // may run in several threads at once
// An exception becomes the error of the session or of the run: its text is what the user reads.
#pragma once

#include <cstddef>
#include <cstdint>
#include <exception>
#include <stdexcept>
#include <string>
#include <vector>

#include "ort.h"
#include "parallel.h"

namespace vlm_edge {

struct Operand {
  OrtElementType type;
  OrtCharacteristic need = kRequired;
};

using Dims = std::vector<int64_t>;

inline std::string text(const Dims& dims) {
  std::string out = "[";
  for (size_t i = 0; i < dims.size(); ++i) out += (i ? ", " : "") + std::to_string(dims[i]);
  return out + "]";
}

// `sentence` is what the user reads where it does not hold.
inline void require(bool holds, const std::string& sentence) {
  if (!holds) throw std::invalid_argument(sentence);
}

inline void check(const OrtApi& api, OrtStatus* status) {
  if (!status) return;
  std::string message = call(api, ort::GetErrorMessage, status);
  call(api, ort::ReleaseStatus, status);
  throw std::runtime_error(message);
}

inline Dims dims_of(const OrtApi& api, const OrtTensorInfo* info) {
  size_t rank = 0;
  check(api, call(api, ort::GetDimensionsCount, info, &rank));
  Dims dims(rank);
  check(api, call(api, ort::GetDimensions, info, dims.data(), rank));
  return dims;
}

// A tensor of the call or of the model; `data` is null for an optional input that is absent.
struct Tensor {
  Dims dims;
  void* data = nullptr;

  template <class T>
  const T* as() const {
    return static_cast<const T*>(data);
  }
};

inline Tensor tensor_of(const OrtApi& api, const OrtValue* value) {
  Tensor tensor;
  if (!value) return tensor;
  OrtTensorInfo* info = nullptr;
  check(api, call(api, ort::GetTensorTypeAndShape, value, &info));
  tensor.dims = dims_of(api, info);
  call(api, ort::ReleaseTensorTypeAndShapeInfo, info);
  check(api, call(api, ort::GetTensorMutableData, const_cast<OrtValue*>(value), &tensor.data));
  return tensor;
}

// The node while the session is made.
struct Node {
  const OrtApi& api;
  const OrtKernelInfo* info;

  size_t inputs() const {
    size_t count = 0;
    check(api, call(api, ort::KernelInfoGetInputCount, info, &count));
    return count;
  }
  size_t outputs() const {
    size_t count = 0;
    check(api, call(api, ort::KernelInfoGetOutputCount, info, &count));
    return count;
  }
  // Whether the input is there: an optional one may be left out, or be an empty name.
  bool has(size_t index) const {
    size_t size = 0;  // with the final zero
    if (index >= inputs()) return false;
    check(api, call(api, ort::KernelInfoGetInputName, info, index, static_cast<char*>(nullptr), &size));
    return size > 1;
  }
  // An initializer: its data stays where it is (in the mapped file) as long as the session lives.
  // `data` is null where the input is absent or not a constant.
  Tensor constant(size_t index) const {
    int is_constant = 0;
    const OrtValue* value = nullptr;
    if (!has(index)) return {};
    check(api, call(api, ort::KernelInfoGetConstantInput, info, index, &is_constant, &value));
    return is_constant ? tensor_of(api, value) : Tensor{};
  }
  int64_t attribute(const char* name, int64_t otherwise) const {
    int64_t value = otherwise;
    return there(call(api, ort::KernelInfoGetAttributeInt, info, name, &value)) ? value : otherwise;
  }
  float attribute(const char* name, float otherwise) const {
    float value = otherwise;
    return there(call(api, ort::KernelInfoGetAttributeFloat, info, name, &value)) ? value : otherwise;
  }
  // Empty where there is none.
  std::string text(const char* name) const {
    return sized<std::string>(ort::KernelInfoGetAttributeString, name).c_str();  // less the final zero
  }
  std::vector<int64_t> integers(const char* name) const {
    return sized<std::vector<int64_t>>(ort::KernelInfoGetAttributeInts, name);
  }

 private:
  bool there(OrtStatus* status) const {
    if (status) call(api, ort::ReleaseStatus, status);
    return !status;
  }
  // Asked twice: for the size, then for the values.
  template <class Values, class Entry>
  Values sized(Entry entry, const char* name) const {
    size_t size = 0;
    typename Values::value_type* none = nullptr;
    if (!there(call(api, entry, info, name, none, &size)) || size == 0) return {};
    Values values(size, 0);
    check(api, call(api, entry, info, name, values.data(), &size));
    return values;
  }
};

// One run of the node.
struct Call {
  const OrtApi& api;
  OrtKernelContext* context;

  Tensor input(size_t index) const {
    const OrtValue* value = nullptr;
    check(api, call(api, ort::KernelContextGetInput, context, index, &value));
    return tensor_of(api, value);
  }
  template <class T>
  T* output(size_t index, const Dims& dims) const {
    OrtValue* value = nullptr;
    void* data = nullptr;
    check(api, call(api, ort::KernelContextGetOutput, context, index, dims.data(), dims.size(), &value));
    check(api, call(api, ort::GetTensorMutableData, value, &data));
    return static_cast<T*>(data);
  }
  // The session's own threads: another pool would fight with them for the processors.
  ParallelFor parallel_for() const {
    return {[](const void* self, size_t count, ParallelFor::Task task, void* data) {
              auto& call_ = *static_cast<const Call*>(self);
              check(call_.api, call(call_.api, ort::KernelContextParallelFor, call_.context, task,
                                    count, count, data));
            },
            this};
  }
};

// Shapes while the model is checked. A dimension is a number, or -1 with a name (may be empty).
struct Shape {
  Dims dims;
  std::vector<std::string> names;
};

struct Shapes {
  const OrtApi& api;
  OrtShapeInferContext* context;

  size_t inputs() const {
    size_t count = 0;
    check(api, call(api, ort::ShapeInferGetInputCount, context, &count));
    return count;
  }
  // Whether the attribute is there and is not empty.
  bool has_text(const char* name) const {
    const OrtOpAttr* attribute = nullptr;
    char value[64];
    size_t size = 0;
    OrtStatus* status = call(api, ort::ShapeInferGetAttribute, context, name, &attribute);
    if (!status) status = call(api, ort::ReadOpAttr, attribute, kString, value, sizeof value, &size);
    if (status) call(api, ort::ReleaseStatus, status);
    return !status && size > 0;
  }
  Shape input(size_t index) const {
    OrtTensorInfo* info = nullptr;
    check(api, call(api, ort::ShapeInferGetInput, context, index, &info));
    Shape shape{dims_of(api, info), {}};
    std::vector<const char*> names(shape.dims.size());
    check(api, call(api, ort::GetSymbolicDimensions, info, names.data(), names.size()));
    for (const char* name : names) shape.names.emplace_back(name ? name : "");
    return shape;
  }
  void output(size_t index, OrtElementType type, const Shape& shape) const {
    OrtTensorInfo* info = nullptr;
    std::vector<const char*> names;
    for (const std::string& name : shape.names) names.push_back(name.c_str());
    check(api, call(api, ort::CreateTensorTypeAndShapeInfo, &info));
    check(api, call(api, ort::SetTensorElementType, info, type));
    check(api, call(api, ort::SetDimensions, info, shape.dims.data(), shape.dims.size()));
    check(api, call(api, ort::SetSymbolicDimensions, info, names.data(), names.size()));
    check(api, call(api, ort::ShapeInferSetOutput, context, index, info));
    call(api, ort::ReleaseTensorTypeAndShapeInfo, info);
  }
};

// Exceptions must not cross the C interface.
template <class F>
OrtStatus* guarded(const OrtApi& api, const char* name, const F& body) {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    return call(api, ort::CreateStatus, kOrtInvalidArgument,
                (std::string(name) + ": " + error.what()).c_str());
  }
}

template <class Kernel>
class Op : public OrtCustomOp {
 public:
  explicit Op(const OrtApi& api) : OrtCustomOp{} {
    api_ = &api;
    version = kOrtVersion;
    GetName = [](const OrtCustomOp*) { return Kernel::kName; };
    GetExecutionProviderType = [](const OrtCustomOp*) -> const char* { return nullptr; };  // CPU
    GetInputTypeCount = [](const OrtCustomOp*) { return Kernel::kInputs.size(); };
    GetOutputTypeCount = [](const OrtCustomOp*) { return Kernel::kOutputs.size(); };
    GetInputType = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].type; };
    GetOutputType = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].type; };
    GetInputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::kInputs[i].need; };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t i) { return Kernel::kOutputs[i].need; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return kDefaultMemory; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 0x7fffffff; };
    CreateKernelV2 = [](const OrtCustomOp*, const OrtApi* api, const OrtKernelInfo* info, void** out) {
      return guarded(*api, Kernel::kName, [&] { *out = new Running{*api, Kernel(Node{*api, info})}; });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      auto& running = *static_cast<const Running*>(kernel);
      return guarded(running.api, Kernel::kName,
                     [&] { running.kernel.compute(Call{running.api, context}); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Running*>(kernel); };
    InferOutputShape = [](const OrtCustomOp* op, OrtShapeInferContext* context) {
      const OrtApi& api = *static_cast<const Op*>(op)->api_;
      return guarded(api, Kernel::kName, [&] { Kernel::infer(Shapes{api, context}); });
    };
    // Not asked for without GetMayInplace and GetAliasMap, but ONNX Runtime calls them unchecked.
    GetMayInplace = GetAliasMap = [](int**, int**) -> size_t { return 0; };
    ReleaseMayInplace = ReleaseAliasMap = [](int*, int*) {};
  }

 private:
  struct Running {
    const OrtApi& api;
    Kernel kernel;
  };
  const OrtApi* api_;
};

}  // namespace vlm_edge
