// ONNX Runtime's stable C interface, as far as custom operators need it.
//
// The real header comes with no Python package. The interface is a table of function pointers that
// only ever grows at its end, so an entry's index is a fact of the binary interface. Version 18 is
// the first that has all entries below; every later ONNX Runtime hands it out on request.
#pragma once

#include <cstddef>
#include <cstdint>

namespace vlm_edge {

inline constexpr uint32_t kOrtVersion = 18;

struct OrtStatus;
struct OrtSessionOptions;
struct OrtCustomOpDomain;
struct OrtKernelInfo;
struct OrtKernelContext;
struct OrtShapeInferContext;
struct OrtValue;
struct OrtCustomOp;
struct OrtOpAttr;
struct OrtTensorInfo;  // OrtTensorTypeAndShapeInfo

enum OrtErrorCode : int { kOrtFail = 1, kOrtInvalidArgument = 2 };
enum OrtElementType : int { kFloat = 1, kUint8 = 2, kInt8 = 3, kInt32 = 6, kInt64 = 7, kBool = 9 };
enum OrtCharacteristic : int { kRequired = 0, kOptional = 1, kVariadic = 2 };
enum OrtOpAttrType : int { kString = 5 };
enum OrtMemoryType : int { kDefaultMemory = 0 };

struct OrtApi {
  void* entries[285];  // what version 18 is sure to have
};

struct OrtApiBase {
  const OrtApi* (*GetApi)(uint32_t version);
  const char* (*GetVersionString)();
};

// An entry of the table: its index, with its signature as type.
template <class Signature>
struct OrtEntry {
  size_t index;
};

template <class Result, class... Parameters, class... Arguments>
inline Result call(const OrtApi& api, OrtEntry<Result(Parameters...)> entry, Arguments... arguments) {
  using Function = Result (*)(Parameters...);
  return reinterpret_cast<Function>(api.entries[entry.index])(arguments...);
}

namespace ort {

using Status = OrtStatus*;

inline constexpr OrtEntry<Status(OrtErrorCode, const char*)> CreateStatus{0};
inline constexpr OrtEntry<const char*(const OrtStatus*)> GetErrorMessage{2};
inline constexpr OrtEntry<Status(const char*, OrtCustomOpDomain**)> CreateCustomOpDomain{26};
inline constexpr OrtEntry<Status(OrtCustomOpDomain*, const OrtCustomOp*)> CustomOpDomainAdd{27};
inline constexpr OrtEntry<Status(OrtSessionOptions*, OrtCustomOpDomain*)> AddCustomOpDomain{28};
inline constexpr OrtEntry<Status(OrtValue*, void**)> GetTensorMutableData{51};
inline constexpr OrtEntry<Status(OrtTensorInfo**)> CreateTensorTypeAndShapeInfo{57};
inline constexpr OrtEntry<Status(OrtTensorInfo*, OrtElementType)> SetTensorElementType{58};
inline constexpr OrtEntry<Status(OrtTensorInfo*, const int64_t*, size_t)> SetDimensions{59};
inline constexpr OrtEntry<Status(const OrtTensorInfo*, OrtElementType*)> GetTensorElementType{60};
inline constexpr OrtEntry<Status(const OrtTensorInfo*, size_t*)> GetDimensionsCount{61};
inline constexpr OrtEntry<Status(const OrtTensorInfo*, int64_t*, size_t)> GetDimensions{62};
inline constexpr OrtEntry<Status(const OrtTensorInfo*, const char**, size_t)> GetSymbolicDimensions{63};
inline constexpr OrtEntry<Status(const OrtValue*, OrtTensorInfo**)> GetTensorTypeAndShape{65};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, const char*, float*)> KernelInfoGetAttributeFloat{85};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, const char*, int64_t*)> KernelInfoGetAttributeInt{86};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, const char*, char*, size_t*)>
    KernelInfoGetAttributeString{87};
inline constexpr OrtEntry<Status(const OrtKernelContext*, size_t*)> KernelContextGetInputCount{88};
inline constexpr OrtEntry<Status(const OrtKernelContext*, size_t, const OrtValue**)> KernelContextGetInput{90};
inline constexpr OrtEntry<Status(OrtKernelContext*, size_t, const int64_t*, size_t, OrtValue**)>
    KernelContextGetOutput{91};
inline constexpr OrtEntry<void(OrtStatus*)> ReleaseStatus{93};
inline constexpr OrtEntry<void(OrtTensorInfo*)> ReleaseTensorTypeAndShapeInfo{99};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, const char*, int64_t*, size_t*)>
    KernelInfoGetAttributeInts{163};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, size_t*)> KernelInfoGetInputCount{230};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, size_t*)> KernelInfoGetOutputCount{231};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, size_t, char*, size_t*)> KernelInfoGetInputName{232};
inline constexpr OrtEntry<Status(const OrtKernelInfo*, size_t, int*, const OrtValue**)>
    KernelInfoGetConstantInput{249};
inline constexpr OrtEntry<Status(const OrtShapeInferContext*, size_t*)> ShapeInferGetInputCount{267};
inline constexpr OrtEntry<Status(const OrtShapeInferContext*, size_t, OrtTensorInfo**)> ShapeInferGetInput{268};
inline constexpr OrtEntry<Status(const OrtShapeInferContext*, size_t, const OrtTensorInfo*)>
    ShapeInferSetOutput{270};
inline constexpr OrtEntry<Status(OrtTensorInfo*, const char**, size_t)> SetSymbolicDimensions{271};
inline constexpr OrtEntry<Status(const OrtShapeInferContext*, const char*, const OrtOpAttr**)>
    ShapeInferGetAttribute{269};
inline constexpr OrtEntry<Status(const OrtOpAttr*, OrtOpAttrType, void*, size_t, size_t*)> ReadOpAttr{272};
inline constexpr OrtEntry<
    Status(const OrtKernelContext*, void (*)(void*, size_t), size_t, size_t, void*)>
    KernelContextParallelFor{274};

}  // namespace ort

// What an operator is to ONNX Runtime. Entries that are null are not asked for.
struct OrtCustomOp {
  uint32_t version;
  void* (*CreateKernel)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*);
  const char* (*GetName)(const OrtCustomOp*);
  const char* (*GetExecutionProviderType)(const OrtCustomOp*);
  OrtElementType (*GetInputType)(const OrtCustomOp*, size_t);
  size_t (*GetInputTypeCount)(const OrtCustomOp*);
  OrtElementType (*GetOutputType)(const OrtCustomOp*, size_t);
  size_t (*GetOutputTypeCount)(const OrtCustomOp*);
  void (*KernelCompute)(void*, OrtKernelContext*);
  void (*KernelDestroy)(void*);
  OrtCharacteristic (*GetInputCharacteristic)(const OrtCustomOp*, size_t);
  OrtCharacteristic (*GetOutputCharacteristic)(const OrtCustomOp*, size_t);
  OrtMemoryType (*GetInputMemoryType)(const OrtCustomOp*, size_t);
  int (*GetVariadicInputMinArity)(const OrtCustomOp*);
  int (*GetVariadicInputHomogeneity)(const OrtCustomOp*);
  int (*GetVariadicOutputMinArity)(const OrtCustomOp*);
  int (*GetVariadicOutputHomogeneity)(const OrtCustomOp*);
  OrtStatus* (*CreateKernelV2)(const OrtCustomOp*, const OrtApi*, const OrtKernelInfo*, void**);
  OrtStatus* (*KernelComputeV2)(void*, OrtKernelContext*);
  OrtStatus* (*InferOutputShape)(const OrtCustomOp*, OrtShapeInferContext*);
  int (*GetStartVersion)(const OrtCustomOp*);
  int (*GetEndVersion)(const OrtCustomOp*);
  size_t (*GetMayInplace)(int**, int**);
  void (*ReleaseMayInplace)(int*, int*);
  size_t (*GetAliasMap)(int**, int**);
  void (*ReleaseAliasMap)(int*, int*);
};

}  // namespace vlm_edge
