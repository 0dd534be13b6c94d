// Services of library.cpp for the ops. Only declarations: anything inline here would be compiled
// once per instruction set, and the linker might keep the copy that old machines cannot run.
#pragma once

#include <cstddef>
#include <cstdint>

namespace fastkd {

// Runs body(context) on `threads` threads of torch's OpenMP pool; bodies share work by a counter.
void parallel(std::int64_t threads, void (*body)(void*), void* context);

// This thread's scratch memory, 4096-byte aligned, valid until its next call; nullptr if exhausted.
void* scratch(std::size_t bytes);

}  // namespace fastkd
