// The C functions that Python calls: one per op and instruction set, with a struct as its argument.
#pragma once

#include <cstdint>
#include <type_traits>

#define FASTKD_JOIN(a, b) a##b
#define FASTKD_NAME(a, b) FASTKD_JOIN(a, b)
#define FASTKD_EXPORT extern "C" __attribute__((visibility("default")))

// FASTKD_ENTRY(op, Args) { .. } defines fastkd_<op>_<isa>(const Args* a) and
// fastkd_<op>_bytes_<isa>(), the size of Args, which Python compares with what it packs. All fields
// of Args are 8 bytes wide (pointers, std::int64_t, double), so that there is no padding.
#define FASTKD_ENTRY(op, Args)                                                                  \
  static_assert(std::is_standard_layout<Args>::value && std::is_trivial<Args>::value,           \
                "Python packs " #Args " field by field");                                       \
  static_assert(sizeof(void*) == 8 && alignof(Args) == 8 && sizeof(Args) % 8 == 0,              \
                "every field of " #Args " takes 8 bytes");                                      \
  FASTKD_EXPORT std::int64_t FASTKD_NAME(fastkd_##op##_bytes_, FASTKD_ISA)() {                  \
    return sizeof(Args);                                                                        \
  }                                                                                             \
  FASTKD_EXPORT std::int64_t FASTKD_NAME(fastkd_##op##_, FASTKD_ISA)(const Args* a)
