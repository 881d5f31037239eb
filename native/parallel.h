// Work split over threads, whoever owns them: kernels know nothing of ONNX Runtime.
#pragma once

#include <cstddef>

namespace vlm_edge {

// Runs task(0) ... task(count - 1), each once, in any order and on any thread; returns when all ended.
class ParallelFor {
 public:
  using Task = void (*)(void* data, size_t index);
  using Run = void (*)(const void* context, size_t count, Task task, void* data);

  ParallelFor(Run run, const void* context) : run_(run), context_(context) {}

  template <class F>
  void operator()(size_t count, const F& task) const {
    if (count == 1) return task(size_t{0});
    if (count == 0) return;
    run_(context_, count, [](void* data, size_t i) { (*static_cast<const F*>(data))(i); },
         const_cast<F*>(&task));
  }

 private:
  Run run_;
  const void* context_;
};

}  // namespace vlm_edge
