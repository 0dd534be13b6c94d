// Shared by the ops, and not to be compiled for a wide instruction set: threads, scratch memory, and
// the list of instruction sets that this machine supports.

#include "entry.h"
#include "runtime.h"

#include <cstdlib>

namespace fastkd {
namespace {

// Signature of GOMP_parallel, which GNU, LLVM and Intel OpenMP all export.
using ParallelFn = void (*)(void (*)(void*), void*, unsigned, unsigned);
ParallelFn openmp_parallel = nullptr;

struct Scratch {
  void* memory = nullptr;
  std::size_t bytes = 0;
  ~Scratch() { std::free(memory); }
};

}  // namespace

void parallel(std::int64_t threads, void (*body)(void*), void* context) {
  if (threads > 1 && openmp_parallel != nullptr)
    openmp_parallel(body, context, static_cast<unsigned>(threads), 0);
  else
    body(context);
}

void* scratch(std::size_t bytes) {
  static thread_local Scratch mine;
  if (mine.bytes < bytes) {
    std::free(mine.memory);
    const std::size_t rounded = (bytes + 4095) / 4096 * 4096;
    mine.memory = std::aligned_alloc(4096, rounded);
    mine.bytes = mine.memory != nullptr ? rounded : 0;
  }
  return mine.memory;
}

}  // namespace fastkd

// Digest of all C++ sources: Python refuses a library that was built from different ones.
FASTKD_EXPORT const char* fastkd_sources() { return FASTKD_SOURCES; }

// Sets the OpenMP runtime, which torch has loaded already. A second runtime would bring a second
// pool of spinning threads that compete for the cores.
FASTKD_EXPORT void fastkd_use_openmp(void* gomp_parallel) {
  fastkd::openmp_parallel = reinterpret_cast<fastkd::ParallelFn>(gomp_parallel);
}

// The instruction sets that are compiled in and present here, widest first, separated by spaces.
FASTKD_EXPORT const char* fastkd_isas() {
#if defined(FASTKD_HAS_avx512)
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl"))
    return "avx512 avx2 base";
#endif
#if defined(FASTKD_HAS_avx2)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return "avx2 base";
#endif
  return "base";
}
