// The library's entry points: the list of operators, and whether this processor can run them.

#include "attention_op.h"
#include "linears_op.h"
#include "op.h"

#define VLM_EDGE_EXPORT extern "C" __attribute__((visibility("default")))

namespace vlm_edge {
namespace {

constexpr const char* kDomain = "vlm_edge";

// ONNX Runtime keeps the pointers for as long as it lives: operators and domain are made once.
template <class Kernel>
const OrtCustomOp* op(const OrtApi& api) {
  return new Op<Kernel>(api);
}

OrtCustomOpDomain* make_domain(const OrtApi& api) {
  OrtCustomOpDomain* domain = nullptr;
  check(api, call(api, ort::CreateCustomOpDomain, kDomain, &domain));
  for (const OrtCustomOp* each : {
           op<Attention>(api),
           op<CachedAttention>(api),
           op<CachedAttentionInt8>(api),
           op<Linears>(api),
       }) {
    check(api, call(api, ort::CustomOpDomainAdd, domain, each));
  }
  return domain;
}

OrtStatus* register_ops(OrtSessionOptions* options, const OrtApi& api) {
  return guarded(api, kDomain, [&] {
    static OrtCustomOpDomain* domain = make_domain(api);
    check(api, call(api, ort::AddCustomOpDomain, options, domain));
  });
}

}  // namespace
}  // namespace vlm_edge

// What SessionOptions.register_custom_ops_library calls.
VLM_EDGE_EXPORT vlm_edge::OrtStatus* RegisterCustomOps(vlm_edge::OrtSessionOptions* options,
                                                       const vlm_edge::OrtApiBase* base) {
  return vlm_edge::register_ops(options, *base->GetApi(vlm_edge::kOrtVersion));
}

// 1 if this processor has the instructions that every kernel here uses.
VLM_EDGE_EXPORT int vlm_edge_supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512bf16");
}
